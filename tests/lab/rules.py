"""The iptables rules of the lab, written as Docker writes them.

Only rule text, applied in one router's namespace; never a rule outside of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.topology import Namespace


def docker_nat(router: Namespace, *, random_fully: bool = False) -> None:
    """Set Docker's own nat rules: the DOCKER chain, and the masquerade of the default bridge."""
    random = " --random-fully" if random_fully else ""
    for rule in (
        "-N DOCKER",
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER",
        f"-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE{random}",
        "-A DOCKER -i docker0 -j RETURN",
    ):
        router.run(f"iptables -w -t nat {rule}")


def publish(router: Namespace, protocol: str, port: int, container: str, container_port: int) -> None:
    """Publish a container's port as ``docker run -p PORT:CONTAINER_PORT`` does, hairpin masquerade included."""
    router.run(
        f"iptables -w -t nat -A POSTROUTING -s {container}/32 -d {container}/32 -p {protocol} "
        f"--dport {container_port} -j MASQUERADE"
    )
    router.run(
        f"iptables -w -t nat -A DOCKER ! -i docker0 -p {protocol} --dport {port} "
        f"-j DNAT --to-destination {container}:{container_port}"
    )


def snat_inward(router: Namespace, protocol: str, ports: str) -> None:
    """Masquerade what enters the bridge from outside, with source ports out of `ports` (``LOW-HIGH``)."""
    router.run(f"iptables -w -t nat -A POSTROUTING -o docker0 -p {protocol} -j MASQUERADE --to-ports {ports}")


def masquerade(router: Namespace, interface: str) -> None:
    """Masquerade everything that leaves by an interface, as a home router does."""
    router.run(f"iptables -w -t nat -A POSTROUTING -o {interface} -j MASQUERADE")


def masquerade_v6(router: Namespace, network: str) -> None:
    """Masquerade an IPv6 network as Docker does with its ip6tables option."""
    router.run(f"ip6tables -w -t nat -A POSTROUTING -s {network} ! -o docker0 -j MASQUERADE")


def drop_every(router: Namespace, nth: int, first: int, incoming: str) -> None:
    """Drop every `nth` forwarded packet that came in by `incoming`, beginning with number `first` (from 0)."""
    router.run(
        f"iptables -w -A FORWARD -i {incoming} -m statistic --mode nth --every {nth} --packet {first} -j DROP"
    )


def dropped(router: Namespace) -> int:
    """Return how many packets the kernel counted on the DROP rules of FORWARD."""
    saved = router.run("iptables-save -c -t filter")
    return sum(int(n) for n in re.findall(r"^\[(\d+):\d+\] -A FORWARD .*-j DROP$", saved, re.MULTILINE))

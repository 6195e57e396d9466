"""The iptables rules of the lab, written as Docker writes them.

Only rule text, applied in one router's namespace; never a rule outside of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def docker_masquerade(router: Namespace, network: str, bridge: str) -> None:
    """Masquerade a further network's packets where they leave its bridge's side, as Docker does for each."""
    router.run(f"iptables -w -t nat -A POSTROUTING -s {network} ! -o {bridge} -j MASQUERADE")


def synproxy(router: Namespace, port: int) -> None:
    """Have the router answer the handshake of what asks for a TCP port, as its documentation says."""
    router.sysctl("netfilter.nf_conntrack_tcp_loose", 0)
    router.run(f"iptables -w -t raw -A PREROUTING -i docker0 -p tcp --dport {port} --syn -j CT --notrack")
    router.run(
        f"iptables -w -A FORWARD -i docker0 -p tcp --dport {port} -m conntrack --ctstate INVALID,UNTRACKED "
        "-j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460"
    )


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


def masquerade(
    router: Namespace, interface: str, protocol: str = "", ports: str = "", *, random_fully: bool = False
) -> None:
    """Masquerade what leaves by an interface, as a home router does; `ports` is LOW-HIGH or one port."""
    words = f"-p {protocol} " if protocol else ""
    target = "MASQUERADE" + (f" --to-ports {ports}" if ports else "")
    random = " --random-fully" if random_fully else ""
    router.run(f"iptables -w -t nat -A POSTROUTING {words}-o {interface} -j {target}{random}")


def masquerade_v6(router: Namespace, network: str) -> None:
    """Masquerade an IPv6 network as Docker does with its ip6tables option."""
    router.run(f"ip6tables -w -t nat -A POSTROUTING -s {network} ! -o docker0 -j MASQUERADE")


def dnat(router: Namespace, address: str, protocol: str, port: int | None, to: str, match: str = "") -> None:
    """Send what asks for an address (and port) to another one; `match` may narrow the rule."""
    ports = "" if port is None else f"--dport {port} "
    router.run(
        f"iptables -w -t nat -A PREROUTING -d {address}/32 -p {protocol} {ports}{match} "
        f"-j DNAT --to-destination {to}"
    )


def one_of_many(router: Namespace, address: str, protocol: str, port: int, to: Sequence[str]) -> None:
    """Send each new flow to one of several servers at random, as kube-proxy's iptables mode does."""
    for left, server in zip(range(len(to), 0, -1), to, strict=True):
        match = f"-m statistic --mode random --probability {1 / left:.8f}" if left > 1 else ""
        dnat(router, address, protocol, port, server, match)


def in_turn(router: Namespace, address: str, protocol: str, port: int, to: Sequence[str]) -> None:
    """Send new flows to several servers in turn."""
    for left, server in zip(range(len(to), 0, -1), to, strict=True):
        match = f"-m statistic --mode nth --every {left} --packet 0" if left > 1 else ""
        dnat(router, address, protocol, port, server, match)


def nft_service(router: Namespace, address: str, servers: Sequence[str], inside: str) -> None:
    """Write a service with nft: UDP 53 to port 5353 and TCP 80 to port 8080 of one server, masquerade behind."""
    picks = ", ".join(f"{number} : {server}" for number, server in enumerate(servers))
    size = len(servers)
    for line in (
        "add table ip service",
        "add chain ip service pre { type nat hook prerouting priority -100 ; }",
        "add chain ip service post { type nat hook postrouting priority 100 ; }",
        f"add rule ip service pre ip daddr {address} udp dport 53 dnat to numgen random mod {size} map {{ {picks} }} : 5353",
        f"add rule ip service pre ip daddr {address} tcp dport 80 dnat to numgen inc mod {size} map {{ {picks} }} : 8080",
        f"add rule ip service post ip saddr {inside} oifname eth0 masquerade",
    ):
        router.run(f"nft {line}")


def one_to_one(router: Namespace, public: str, inside: str) -> None:
    """Give one container a public address of its own, both ways."""
    router.run(f"iptables -w -t nat -A PREROUTING -d {public}/32 -j DNAT --to-destination {inside}")
    router.run(f"iptables -w -t nat -A POSTROUTING -s {inside}/32 -o eth0 -j SNAT --to-source {public}")


def netmap(router: Namespace, public: str, inside: str) -> None:
    """Map a public network onto an inner one of the same size, both ways."""
    router.run(f"iptables -w -t nat -A PREROUTING -i eth0 -d {public} -j NETMAP --to {inside}")
    router.run(f"iptables -w -t nat -A POSTROUTING -o eth0 -s {inside} -j NETMAP --to {public}")


def redirect(router: Namespace, incoming: str, protocol: str, port: int, to: int) -> None:
    """Take what asks any address for a port to the router's own port."""
    router.run(
        f"iptables -w -t nat -A PREROUTING -i {incoming} -p {protocol} --dport {port} -j REDIRECT --to-ports {to}"
    )


def publish_v6(router: Namespace, protocol: str, port: int, container: str, container_port: int) -> None:
    """Publish a container's port on the router's IPv6 addresses."""
    router.run(
        f"ip6tables -w -t nat -A PREROUTING ! -i docker0 -p {protocol} --dport {port} "
        f"-j DNAT --to-destination [{container}]:{container_port}"
    )


def reject(router: Namespace) -> None:
    """Answer everything that a router would forward with an error (type 3 code 13), as a firewall does."""
    router.run("iptables -w -A FORWARD -j REJECT --reject-with icmp-admin-prohibited")


def reject_v6(router: Namespace, port: int) -> None:
    """Answer forwarded TCP to a port with an error (type 1 code 1)."""
    router.run(f"ip6tables -w -A FORWARD -p tcp --dport {port} -j REJECT --reject-with icmp6-adm-prohibited")


def drop_every(router: Namespace, nth: int, first: int, incoming: str) -> None:
    """Drop every `nth` forwarded packet that came in by `incoming`, beginning with number `first` (from 0)."""
    router.run(
        f"iptables -w -A FORWARD -i {incoming} -m statistic --mode nth --every {nth} --packet {first} -j DROP"
    )


def dropped(router: Namespace) -> int:
    """Return how many packets the kernel counted on the DROP rules of FORWARD."""
    saved = router.run("iptables-save -c -t filter")
    return sum(int(n) for n in re.findall(r"^\[(\d+):\d+\] -A FORWARD .*-j DROP$", saved, re.MULTILINE))

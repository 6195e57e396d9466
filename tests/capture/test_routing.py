"""Where packets leave, against what the kernel does with packets that a container sends."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from lab import topology
from lab.topology import Namespace

from nattrace.capture.context.host import LocalHost
from nattrace.capture.routing import outgoing_interfaces

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.lab

#: Where the container pings; nothing leaves the namespaces.
PLACES = ("9.9.9.9", "198.41.0.4")
ADDRESSES = {
    "docker0": "172.17.0.1/16",
    "eth0": "203.0.113.10/24",
    "eth1": "192.0.2.10/24",
    "br0": "198.18.0.2/24",
    "tun0": "10.8.0.2/24",
}
_RUN = itertools.count(1)


@contextmanager
def docker_host() -> Iterator[tuple[Namespace, Namespace]]:
    """A host with docker0 and a container behind it, whose default route is eth0; eth1, br0 and tun0 lead out too."""
    name = f"nt-{os.getpid()}-way{next(_RUN)}"
    host, container = Namespace(name), Namespace(f"{name}-c")
    with ExitStack() as stack:
        for each in (host, container):
            subprocess.run(["ip", "netns", "add", each.name], check=True, capture_output=True, timeout=30)
            stack.callback(subprocess.run, ["ip", "netns", "del", each.name], capture_output=True, timeout=30)
        for line in (
            "ip link add docker0 type bridge",
            "ip link add br0 type bridge",
            f"ip link add cable type veth peer name eth0 netns {container.name}",
            "ip link set cable master docker0",
            "ip link add eth0 type veth peer name far0",
            "ip link add eth1 type veth peer name far1",
            "ip tuntap add tun0 mode tun",
        ):
            host.run(line)
        host.sysctl("ipv4.ip_forward", 1)
        for interface in ("cable", "far0", "far1", *ADDRESSES):
            host.up(interface)
        for interface, address in ADDRESSES.items():
            host.run(f"ip address add {address} dev {interface}")
            host.run(f"iptables -A FORWARD -o {interface}")
        host.route("default", "203.0.113.1")
        container.up("eth0")
        container.address("eth0", "172.17.0.2", 16)
        container.route("default", "172.17.0.1")
        yield host, container


def ways_out() -> list[str]:
    host = LocalHost()
    return outgoing_interfaces(host, host.kernel_state(), ["docker0"])


def taken(host: Namespace, container: Namespace) -> set[str]:
    """The interfaces by which the kernel forwarded what the container sent to places far away."""
    for place in PLACES:
        words = container.command("ping", "-c", "1", "-W", "0.1", place)
        subprocess.run(words, capture_output=True, timeout=30, check=False)
    return set(
        re.findall(r"^\[[1-9]\d*:\d+\] -A FORWARD -o (\S+)$", host.run("iptables-save -c"), re.MULTILINE)
    )


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        pytest.param((), {"eth0"}, id="one default route"),
        pytest.param(("ip route add default via 192.0.2.1 metric 100",), {"eth0"}, id="a second, dearer"),
        pytest.param(
            ("ip route replace default nexthop via 203.0.113.1 nexthop via 192.0.2.1",),
            {"eth0", "eth1"},
            id="two equal ones",
        ),
        pytest.param(
            ("ip rule add from 172.17.0.0/16 table 100", "ip route add default via 192.0.2.1 table 100"),
            {"eth1"},
            id="a rule for containers",
        ),
        pytest.param(
            ("ip rule add iif docker0 table 100", "ip route add default via 192.0.2.1 table 100"),
            {"eth1"},
            id="a rule for the bridge",
        ),
        pytest.param(
            ("ip route add 0.0.0.0/1 dev tun0", "ip route add 128.0.0.0/1 dev tun0"),
            {"tun0"},
            id="a VPN in two halves",
        ),
        pytest.param(
            ("ip rule add not fwmark 51820 table 51820", "ip route add default dev tun0 table 51820"),
            {"tun0"},
            id="a VPN with a table of its own",
        ),
        pytest.param(("ip route replace default via 198.18.0.1",), {"br0"}, id="a bridge as the way out"),
        pytest.param(("ip route del default", "ip route add unreachable default"), set(), id="no way out"),
    ],
)
def test_the_interfaces_are_those_that_the_kernel_forwards_to(
    setup: tuple[str, ...], expected: set[str]
) -> None:
    reason = topology.missing()
    if reason is not None:
        pytest.skip(reason)
    with docker_host() as (host, container):
        for line in setup:
            host.run(line)
        with host.inside():
            found = ways_out()
        assert set(found) == expected
        used = taken(host, container)
        # of equal ways two pings may take the same
        assert used <= expected
        assert bool(used) == bool(expected)


def test_ipv6_may_leave_elsewhere() -> None:
    reason = topology.missing()
    if reason is not None:
        pytest.skip(reason)
    with docker_host() as (host, _):
        host.address("docker0", "fd00:17::1", 64)
        host.address("eth1", "2001:db8:1::10", 64)
        host.sysctl("ipv6.conf.all.forwarding", 1)
        host.route("default", "2001:db8:1::1")
        with host.inside():
            assert ways_out() == ["eth0", "eth1"]

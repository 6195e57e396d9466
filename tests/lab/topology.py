"""Namespaces, bridges, veth pairs, addresses and routes, laid out like a Docker host.

    c1 ... cN --- docker0 [router] eth0 --- internet                         one NAT hop
    c1 ... cN --- docker0 [router] mid0 --- mid0 [router2] eth0 --- internet     two NAT hops
    o1 ... oN --- br-xyz  [router]                                               a second network beside docker0

The namespaces carry a name of their own for each run and are removed when the lab is left, also after a
failure. This module builds links and nothing else: no NAT rules (rules.py), no traffic (traffic.py).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute, netns

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The lab's addresses: Docker's default bridge, and documentation addresses outside (RFC 5737, RFC 3849).
BRIDGE, BRIDGE_V6 = "172.17.0.1", "fd00:17::1"
UPLINK, UPLINK_V6 = "203.0.113.10", "2001:db8:1::10"
GATEWAY, GATEWAY_V6 = "203.0.113.1", "2001:db8:1::1"
SERVERS = ("198.51.100.1", "198.51.100.2", "198.51.100.3")
SERVERS_V6 = ("2001:db8:2::1", "2001:db8:2::2")
MIDDLE_NEAR, MIDDLE_FAR = "10.9.0.2", "10.9.0.1"
#: A second bridge, as `docker network create` makes one.
OTHER_BRIDGE, OTHER_GATEWAY, OTHER_NETWORK = "br-xyz", "172.18.0.1", "172.18.0.0/16"
#: Servers behind a router outside, and the narrow link to them; IPv6 needs 1280 bytes (RFC 8200 section 5).
FARS = ("192.0.2.1", "192.0.2.3", "192.0.2.4")
FARS_V6 = ("2001:db8:3::1", "2001:db8:3::3", "2001:db8:3::4")
NARROW_MTU = 1400

#: Address flag that skips duplicate address detection, which would take seconds (linux/if_addr.h).
IFA_F_NODAD = 0x02

#: Where br_netfilter keeps its settings; absent when the kernel has not loaded it.
BRIDGE_NETFILTER = Path("/proc/sys/net/bridge")

#: What a run may need; a test says so when it is missing.
TOOLS = ("ip", "iptables", "ip6tables", "tcpdump", "conntrack", "ethtool")

_RUN = itertools.count(1)


def missing() -> str | None:
    """Say what keeps the lab from running on this machine, or None when nothing does."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"needs {tool}"
    probe = f"nt-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if os.geteuid() != 0 or made.returncode:
        return "needs root and network namespaces"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=True)
    return None


@dataclass(frozen=True, slots=True)
class Namespace:
    """One network namespace: a host of the lab."""

    name: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Move the calling thread into the namespace; sockets made here stay here after it is left."""
        with Path("/proc/thread-self/ns/net").open() as home:
            netns.setns(self.name, flags=0)
            try:
                yield
            finally:
                netns.setns(home.fileno())

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` in the namespace."""
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, line: str) -> str:
        """Run a command in the namespace and return what it printed; raises when it fails."""
        words = self.command(*line.split())
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {line}: {done.stderr.strip()}")
        return done.stdout

    def sysctl(self, name: str, value: int) -> None:
        """Set ``net.NAME`` of this namespace."""
        with self.inside():
            Path("/proc/sys/net", *name.split(".")).write_text(f"{value}\n")

    @contextmanager
    def netlink(self) -> Iterator[Any]:
        """Open rtnetlink in the namespace. The socket is made by this thread: pyroute2's own `netns=` forks."""
        with self.inside():
            socket = IPRoute()
        with socket:
            yield socket

    def address(self, interface: str, address: str, prefix: int) -> None:
        """Give an interface an address, usable at once."""
        with self.netlink() as ip:
            index = ip.link_lookup(ifname=interface)[0]
            flags = {"flags": IFA_F_NODAD} if ":" in address else {}
            ip.addr("add", index=index, address=address, prefixlen=prefix, **flags)

    def index(self, interface: str) -> int:
        """Return an interface's index."""
        with self.netlink() as ip:
            return int(ip.link_lookup(ifname=interface)[0])

    def up(self, interface: str) -> None:
        """Set an interface up."""
        with self.netlink() as ip:
            ip.link("set", index=ip.link_lookup(ifname=interface)[0], state="up")

    def route(self, destination: str, gateway: str) -> None:
        """Add a route; ``default`` for the default route of the gateway's family."""
        with self.netlink() as ip:
            if ":" in gateway and destination == "default":
                destination = "::/0"
            ip.route("add", dst=destination, gateway=gateway)


@dataclass(slots=True)
class Lab:
    """The namespaces of one run. `hops` lists each router with its inner and its outer interface."""

    clients: list[Namespace]
    router: Namespace
    internet: Namespace
    hops: list[tuple[Namespace, str, str]]
    others: list[Namespace]  #: containers of the second network

    @property
    def outer_router(self) -> Namespace:
        """The router that holds the uplink address."""
        return self.hops[-1][0]


def client_address(number: int) -> str:
    """Return the address that Docker would give to the container started as `number` (from 1)."""
    return f"172.17.0.{number + 1}"


def other_address(number: int) -> str:
    """Return the address of container `number` (from 1) of the second network."""
    return f"172.18.0.{number + 1}"


def client_address_v6(number: int) -> str:
    """Return the IPv6 address of client `number` (from 1)."""
    return f"fd00:17::{number + 1:x}"


@contextmanager
def lab(
    clients: int,
    *,
    hops: int = 1,
    ipv6: bool = False,
    bridge_netfilter: bool = True,
    others: int = 0,
    offload: bool = False,
) -> Iterator[Lab]:
    """Build the hosts and links of one run and take them down again.

    `clients` containers stand behind `hops` routers (1 or 2), `others` on a second bridge of the first. No
    rule is set: routers forward and do not translate. `bridge_netfilter` is Docker's own setting, where the
    kernel has it. With `offload` interfaces keep what the kernel gives them: one super-frame may then cross
    as many segments. Raises RuntimeError when a command fails.
    """
    tag = f"nt-{os.getpid()}-{next(_RUN)}"
    with ExitStack() as stack:

        def host(role: str) -> Namespace:
            made = Namespace(f"{tag}-{role}")
            subprocess.run(["ip", "netns", "add", made.name], check=True, capture_output=True, timeout=30)
            stack.callback(subprocess.run, ["ip", "netns", "del", made.name], capture_output=True, timeout=30)
            for group in ("all", "default"):
                made.sysctl(f"ipv6.conf.{group}.disable_ipv6", int(not ipv6))
                made.sysctl(f"ipv6.conf.{group}.accept_dad", 0)
                made.sysctl(f"ipv6.conf.{group}.router_solicitations", 0)
            made.up("lo")
            return made

        router = host("router")
        internet = host("internet")
        routers = [router] + [host("router2")] * (hops == 2)
        containers = [host(f"c{number}") for number in range(1, clients + 1)]

        if BRIDGE_NETFILTER.exists():
            for family in ("iptables", "ip6tables"):
                router.sysctl(f"bridge.bridge-nf-call-{family}", int(bridge_netfilter))
        _bridge(router, containers, ipv6=ipv6, offload=offload)
        neighbours = [host(f"o{number}") for number in range(1, others + 1)]
        if neighbours:
            _plug(router, neighbours)
        if hops == 2:
            _cable(router, "mid0", routers[1], "mid0", offload=offload)
            router.address("mid0", MIDDLE_NEAR, 24)
            routers[1].address("mid0", MIDDLE_FAR, 24)
            router.route("default", MIDDLE_FAR)
        outer = routers[-1]
        _cable(outer, "eth0", internet, "eth0", offload=offload)
        outer.address("eth0", UPLINK, 24)
        outer.route("default", GATEWAY)
        internet.address("eth0", GATEWAY, 24)
        for server in SERVERS:
            internet.address("eth0", server, 32)
        # Where nothing translates, the servers must find the way back.
        internet.route("172.17.0.0/16", UPLINK)
        if ipv6:
            outer.address("eth0", UPLINK_V6, 64)
            outer.route("default", GATEWAY_V6)
            internet.address("eth0", GATEWAY_V6, 64)
            for server in SERVERS_V6:
                internet.address("eth0", server, 128)
        for each in routers:
            each.sysctl("ipv4.ip_forward", 1)
            if ipv6:
                each.sysctl("ipv6.conf.all.forwarding", 1)
        inner = ("docker0", "mid0")[: len(routers)]
        outer_names = ("mid0", "eth0")[-len(routers) :]
        yield Lab(
            containers, router, internet, list(zip(routers, inner, outer_names, strict=True)), neighbours
        )


@contextmanager
def beyond(net: Lab) -> Iterator[Namespace]:
    """Put a server behind the internet's host, which so becomes a router, over a link of NARROW_MTU bytes."""
    far = Namespace(net.internet.name.removesuffix("internet") + "far")
    subprocess.run(["ip", "netns", "add", far.name], check=True, capture_output=True, timeout=30)
    try:
        far.up("lo")
        _cable(net.internet, "far0", far, "eth0", offload=False)
        families = [(FARS, "192.0.2.2", 24)]
        net.internet.sysctl("ipv4.ip_forward", 1)
        if net.internet.run("ip -6 addr show dev eth0").strip():
            net.internet.sysctl("ipv6.conf.all.forwarding", 1)
            for group in ("all", "default", "eth0"):
                far.sysctl(f"ipv6.conf.{group}.accept_dad", 0)
            families.append((FARS_V6, "2001:db8:3::2", 64))
        for servers, gateway, prefix in families:
            net.internet.address("far0", gateway, prefix)
            for server in servers:
                far.address("eth0", server, prefix)
            far.route("default", gateway)
        # the server believes in the link's usual size: only the router knows that it is narrow
        net.internet.run(f"ip link set far0 mtu {NARROW_MTU}")
        yield far
    finally:
        subprocess.run(["ip", "netns", "del", far.name], check=False, capture_output=True, timeout=30)


@contextmanager
def far_behind(net: Lab, routers: int) -> Iterator[list[Namespace]]:
    """Put `routers` routers in a row behind the internet's host, and the FARS servers behind the last of them.

    Gives the routers and then the servers' host.
    """
    role = net.internet.name.removesuffix("internet")
    made = [Namespace(f"{role}r{number}") for number in range(1, routers + 1)] + [Namespace(f"{role}far")]
    ipv6 = bool(net.internet.run("ip -6 addr show dev eth0").strip())
    before = [net.internet, *made[:-1]]
    try:
        for host in made:
            subprocess.run(["ip", "netns", "add", host.name], check=True, capture_output=True, timeout=30)
            host.up("lo")
            for group in ("all", "default"):
                host.sysctl(f"ipv6.conf.{group}.accept_dad", 0)
        for number, (near, host) in enumerate(zip(before, made, strict=True), 1):
            _cable(near, "far0", host, "eth0", offload=False)
            near.sysctl("ipv4.ip_forward", 1)
            ways = [("10.77.{}.{}", 24, "192.0.2.0/24")]
            if ipv6:
                near.sysctl("ipv6.conf.all.forwarding", 1)
                ways.append(("2001:db8:77:{}::{}", 64, "2001:db8:3::/64"))
            for address, prefix, servers in ways:
                near.address("far0", address.format(number, 1), prefix)
                host.address("eth0", address.format(number, 2), prefix)
                host.route("default", address.format(number, 1))
                near.route(servers, address.format(number, 2))
        for server in (*FARS, *(FARS_V6 if ipv6 else ())):
            made[-1].address("lo", server, 128 if ":" in server else 32)
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True, timeout=30)


def _bridge(router: Namespace, containers: list[Namespace], *, ipv6: bool, offload: bool) -> None:
    """Make docker0 and plug every container into it."""
    with router.netlink() as ip:
        ip.link("add", ifname="docker0", kind="bridge")
    router.address("docker0", BRIDGE, 16)
    router.up("docker0")
    if ipv6:
        router.address("docker0", BRIDGE_V6, 64)
    for number, container in enumerate(containers, 1):
        _cable(router, f"veth{number}", container, "eth0", offload=offload)
        with router.netlink() as ip:
            bridge, port = ip.link_lookup(ifname="docker0")[0], ip.link_lookup(ifname=f"veth{number}")[0]
            ip.link("set", index=port, master=bridge)
        container.address("eth0", client_address(number), 16)
        container.route("default", BRIDGE)
        if ipv6:
            container.address("eth0", client_address_v6(number), 64)
            container.route("default", BRIDGE_V6)


def hairpin_mode(router: Namespace, port: str) -> None:
    """Let a bridge port send packets back where they came from, as Docker does without its proxy."""
    router.run(f"bridge link set dev {port} hairpin on")


def macvlan(router: Namespace, parent: str, container: Namespace, address: str, gateway: str) -> None:
    """Give a container a macvlan interface mv0 on the router's uplink, and its default route by it."""
    with router.netlink() as ip:
        link = ip.link_lookup(ifname=parent)[0]
        ip.link("add", ifname="mv0", kind="macvlan", link=link, macvlan_mode="bridge")
        index = ip.link_lookup(ifname="mv0")[0]
        ip.link("set", index=index, net_ns_fd=container.name)
    container.address("mv0", address, 24)
    container.up("mv0")
    container.run("ip route del default")
    container.route("default", gateway)


def _plug(router: Namespace, containers: list[Namespace]) -> None:
    """Make the second bridge and plug its containers in, as veth-o1, veth-o2..."""
    with router.netlink() as ip:
        ip.link("add", ifname=OTHER_BRIDGE, kind="bridge")
    router.address(OTHER_BRIDGE, OTHER_GATEWAY, 16)
    router.up(OTHER_BRIDGE)
    for number, container in enumerate(containers, 1):
        _cable(router, f"veth-o{number}", container, "eth0", offload=False)
        with router.netlink() as ip:
            bridge, port = (ip.link_lookup(ifname=name)[0] for name in (OTHER_BRIDGE, f"veth-o{number}"))
            ip.link("set", index=port, master=bridge)
        container.address("eth0", other_address(number), 16)
        container.route("default", OTHER_GATEWAY)


def _cable(here: Namespace, name: str, there: Namespace, peer: str, *, offload: bool) -> None:
    """Join two namespaces with a veth pair, both ends up, segmentation offload off unless wanted.

    Mostly it is off, because one super-frame that leaves as many segments is another story than NAT.
    """
    with here.netlink() as ip:
        ip.link("add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": there.name})
    for host, interface in ((here, name), (there, peer)):
        if not offload:
            host.run(f"ethtool -K {interface} tso off gso off gro off")
        host.up(interface)

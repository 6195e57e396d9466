"""Boxes that change more than addresses, or other things: clamps, marks, proxies, prefixes, IP versions."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from lab import rules
from lab.recorder import Recording
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.topology import (
    SERVERS,
    SERVERS_V6,
    UPLINK,
    UPLINK_V6,
    Lab,
    client_address_v6,
    lab,
)
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token
from lab.truth import Addressing, Entry, Truth

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.topology import Namespace

#: Longest wait for a translator of the lab to start.
PATIENCE_S = 5.0

#: Prefixes outside that stand for the containers' ones (RFC 3849, RFC 6052, RFC 2544), and the translator's own address.
NPT_PREFIX, NAT64_PREFIX, NAT64_POOL, NAT64_OWN = (
    "2001:db8:9::/64",
    "2001:db8:64::",
    "198.18.0.0/24",
    "198.18.0.1",
)


def mss_clamped(folder: Path) -> Truth:
    """A router that masquerades clamps the MSS of every SYN, both ways."""
    return _masqueraded(folder, "-p tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1000", keeps="options")


def options_stripped(folder: Path) -> Truth:
    """A router that masquerades strips timestamps and ECN from TCP: no packet keeps its options."""
    return _masqueraded(
        folder,
        "-p tcp -j TCPOPTSTRIP --strip-options timestamp,sack-permitted",
        "-p tcp --syn -j ECN --ecn-tcp-remove",
        keeps="options",
        ecn=True,
    )


def options_stripped_in_mid_stream(folder: Path) -> Truth:
    """A router that masquerades strips the timestamps of established connections only."""
    return _masqueraded(
        folder, "-p tcp ! --tcp-flags ACK ACK -j RETURN", "-p tcp ! --syn -j TCPOPTSTRIP --strip-options timestamp",
        keeps="options",
    )  # fmt: skip


def ttl_and_dscp_rewritten(folder: Path) -> Truth:
    """A router that masquerades sets every TTL to 64 and a DSCP: nothing says who is further along."""
    return _masqueraded(folder, "-j TTL --ttl-set 64", "-j DSCP --set-dscp 46", keeps="ttl")


def ttl_raised(folder: Path) -> Truth:
    """A router that masquerades sets every TTL to 255: packets gain hops on their way."""
    return _masqueraded(folder, "-j TTL --ttl-set 255", "-j TOS --set-tos 0x10", keeps="ttl")


def _masqueraded(folder: Path, *mangling: str, keeps: str, ecn: bool = False) -> Truth:
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        for rule in mangling:
            net.router.run(f"iptables -w -t mangle -A FORWARD {rule}")
        if ecn:
            for host in net.clients:
                host.sysctl("ipv4.tcp_ecn", 1)
        tcp, udp = TcpServer(net.internet, SERVERS[0], 80), UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(tcp, udp, *pingers, *clients), recorded(net, folder):
            connections = [TcpConnection(client, 41000, tcp, (SERVERS[0], 80)) for client in net.clients]
            for seq in range(3):
                for pinger in pingers:
                    pinger.ping(seq)
                for client in clients:
                    client.exchange(udp, token(), token())
                for connection in connections:
                    connection.exchange(token(80), token(300))
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder, keeps=keeps)


def synproxy(folder: Path) -> Truth:
    """SYNPROXY answers the handshake itself: every number of the server is shifted for the clients."""
    with lab(clients=2) as net:
        with recorded(net, folder):
            _behind_synproxy(net)
        return kernel_truth(net, folder, keeps="proxied")


def synproxy_in_one_capture(folder: Path) -> Truth:
    """The same in one capture of all interfaces, with headers that do not number them."""
    with lab(clients=2, bridge_netfilter=False) as net:
        with Recording.into(folder) as recording:
            recording.conntrack(net.router, "conntrack.txt")
            recording.capture(net.router, "any", link_type="LINUX_SLL")
            _behind_synproxy(net)
        (hop,) = kernel_truth(net, folder, keeps="proxied").hops
        return Truth((replace(hop, inner="any", outer="any", repeats=True),), unique_payloads=True)


def _behind_synproxy(net: Lab) -> None:
    rules.docker_nat(net.router)
    rules.synproxy(net.router, 80)
    tcp = TcpServer(net.internet, SERVERS[0], 80)
    with closing_all(tcp):
        connections = [TcpConnection(client, 41000, tcp, (SERVERS[0], 80)) for client in net.clients]
        for _ in range(4):
            for connection in connections:
                connection.exchange(token(80), token(300))
        for connection in connections:
            connection.close()


def nat66(folder: Path) -> Truth:
    """NAT66: containers leave by SNAT with few ports to choose from, and are reached by DNAT."""
    with lab(clients=2, ipv6=True) as net:
        for rule in (
            f"POSTROUTING -s fd00:17::/64 -o eth0 -p tcp -j SNAT --to-source [{UPLINK_V6}]:20000-20003",
            f"POSTROUTING -s fd00:17::/64 -o eth0 -j SNAT --to-source {UPLINK_V6}",
            f"PREROUTING -i eth0 -p tcp --dport 8080 -j DNAT --to-destination [{client_address_v6(1)}]:80",
        ):
            net.router.run(f"ip6tables -w -t nat -A {rule}")
        web = TcpServer(net.clients[0], client_address_v6(1), 80)
        with closing_all(web):
            _everything(net, folder, SERVERS_V6[0], web)
        return kernel_truth(net, folder)


def npt(folder: Path) -> Truth:
    """NPTv6: prefixes are exchanged without any state and no checksum changes; conntrack knows nothing of it."""
    with lab(clients=2, ipv6=True) as net:
        for rule in (
            "raw -A PREROUTING -j CT --notrack",
            "raw -A OUTPUT -j CT --notrack",
            f"mangle -A POSTROUTING -o eth0 -s fd00:17::/64 -j SNPT --src-pfx fd00:17::/64 --dst-pfx {NPT_PREFIX}",
            f"mangle -A PREROUTING -i eth0 -d {NPT_PREFIX} -j DNPT --src-pfx {NPT_PREFIX} --dst-pfx fd00:17::/64",
        ):
            net.router.run(f"ip6tables -w -t {rule}")
        net.internet.route(NPT_PREFIX, UPLINK_V6)
        _everything(net, folder, SERVERS_V6[0])
        mapped = {
            client_address_v6(n): _npt(client_address_v6(n), "fd00:17::/64", NPT_PREFIX) for n in (1, 2)
        }
        return by_construction(net, folder, _entries(SERVERS_V6[0], SERVERS_V6[0], mapped))


def _npt(address: str, inside: str, outside: str) -> str:
    """Map an address as RFC 6296 section 3.1 does for /64: the next word that is not ffff takes the difference."""

    def words(text: str) -> list[int]:
        packed = ipaddress.IPv6Address(text).packed
        return [int.from_bytes(packed[n : n + 2], "big") for n in range(0, 16, 2)]

    old, new, host = (
        words(inside.split("/", maxsplit=1)[0]),
        words(outside.split("/", maxsplit=1)[0]),
        words(address),
    )
    adjusted = (sum(old[:4]) - sum(new[:4]) + host[4]) % 0xFFFF
    octets = b"".join(word.to_bytes(2, "big") for word in [*new[:4], adjusted, *host[5:]])
    return str(ipaddress.IPv6Address(octets))


def nat64(folder: Path) -> Truth:
    """NAT64 by tayga: IPv6 containers reach IPv4 servers; each has an IPv4 address of the pool to itself."""
    if shutil.which("tayga") is None:
        raise NotHereError("needs tayga")
    with lab(clients=2, ipv6=True) as net:
        mapped = {client_address_v6(n): f"198.18.0.{100 + n}" for n in (1, 2)}
        with tayga(net.router, folder, mapped):
            net.internet.route(NAT64_POOL, UPLINK)
            _everything(net, folder, f"{NAT64_PREFIX}{SERVERS[0]}", server=SERVERS[0])
        server = str(ipaddress.IPv6Address(f"{NAT64_PREFIX}{SERVERS[0]}"))
        return keeping(by_construction(net, folder, _entries(server, SERVERS[0], mapped)), "version")


def keeping(truth: Truth, keeps: str) -> Truth:
    """Return the truth of boxes that leave other things alone."""
    return replace(truth, hops=tuple(replace(hop, keeps=keeps) for hop in truth.hops))


@contextmanager
def tayga(router: Namespace, folder: Path, mapped: dict[str, str]) -> Iterator[None]:
    """Run tayga, a NAT64 in user space, between a tun device and the router's own forwarding."""
    configuration = folder / "tayga.conf"
    configuration.write_text(
        f"tun-device nat64\nipv4-addr {NAT64_OWN}\nprefix {NAT64_PREFIX}/96\n"
        + "".join(f"map {four} {six}\n" for six, four in mapped.items())
    )
    router.run(f"tayga -c {configuration} --mktun")
    router.up("nat64")
    with router.netlink() as ip:
        index = ip.link_lookup(ifname="nat64")[0]
        ip.route("add", dst=NAT64_POOL, oif=index)
        ip.route("add", dst=f"{NAT64_PREFIX}/96", oif=index)
    process = subprocess.Popen(
        router.command("tayga", "-c", str(configuration), "--nodetach"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "nat64: <NO-CARRIER" in router.run("ip -o link show nat64"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("tayga did not start")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        configuration.unlink()


def redirected(folder: Path) -> Truth:
    """REDIRECT and TPROXY deliver to the router itself: those packets never pass its other interface."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        net.router.run(
            "iptables -w -t nat -A PREROUTING -i docker0 -p tcp --dport 80 -j REDIRECT --to-ports 3128"
        )
        proxy, tcp = TcpServer(net.router, "172.17.0.1", 3128), TcpServer(net.internet, SERVERS[0], 443)
        pinger = Pinger(net.clients[0], SERVERS[0], 1)
        with closing_all(proxy, tcp, pinger), recorded(net, folder):
            crossing = [TcpConnection(client, 41000, tcp, (SERVERS[0], 443)) for client in net.clients]
            stopped = [TcpConnection(client, 42000, proxy, (SERVERS[0], 80)) for client in net.clients]
            for seq in range(3):
                pinger.ping(seq)
                for connection in (*stopped, *crossing):
                    connection.exchange(token(80), token(300))
            for connection in (*stopped, *crossing):
                connection.close()
            pinger.ping(3)
        return kernel_truth(net, folder)


def _everything(net: Lab, folder: Path, to: str, web: TcpServer | None = None, server: str = "") -> None:
    """Ping, UDP and TCP of all clients to one server with equal ids and ports; and inwards to `web` if given."""
    server = server or to
    tcp, udp = TcpServer(net.internet, server, 80), UdpServer(net.internet, server, 53)
    pingers = [Pinger(client, to, 1) for client in net.clients]
    clients = [UdpClient(client, 40000, to, 53) for client in net.clients]
    with closing_all(tcp, udp, *pingers, *clients), recorded(net, folder):
        connections = [TcpConnection(client, 41000, tcp, (to, 80)) for client in net.clients]
        if web is not None:
            connections.append(TcpConnection(net.internet, 50000, web, (UPLINK_V6, 8080), SERVERS_V6[0]))
        for seq in range(3):
            for pinger in pingers:
                pinger.ping(seq)
            for client in clients:
                client.exchange(udp, token(), token())
            for connection in connections:
                connection.exchange(token(80), token(300))
        for connection in connections:
            connection.close()


def _entries(server: str, server_after: str, mapped: dict[str, str]) -> tuple[Entry, ...]:
    """Return what `_everything` makes a stateless box translate, as the kernel would list it."""
    found = []
    for inside, outside in mapped.items():
        four = "." in outside
        for protocol, sport, dport in (("tcp", 41000, 80), ("udp", 40000, 53)):
            found.append(
                Entry(
                    protocol,
                    Addressing(inside, server, sport, dport),
                    Addressing(server_after, outside, dport, sport),
                )
            )
        found.append(
            Entry(
                "icmpv6",
                Addressing(inside, server, type=128, id=1),
                Addressing(server_after, outside, type=0 if four else 129, id=1),
            )
        )
    return tuple(found)


def by_construction(net: Lab, folder: Path, entries: tuple[Entry, ...]) -> Truth:
    """Return the truth of a stateless box: the kernel lists nothing, the configuration says all."""
    truth = kernel_truth(net, folder)
    return replace(truth, hops=tuple(replace(hop, conntrack="", entries=entries) for hop in truth.hops))


SCENARIOS = (
    mss_clamped,
    options_stripped,
    options_stripped_in_mid_stream,
    ttl_and_dscp_rewritten,
    ttl_raised,
    synproxy,
    synproxy_in_one_capture,
    nat66,
    npt,
    nat64,
    redirected,
)

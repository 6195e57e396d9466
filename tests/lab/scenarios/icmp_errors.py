"""ICMP errors through NAT: from servers, from containers, from routers outside and inside, and from the NAT host."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

from lab import rules, topology
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.topology import FARS, FARS_V6, SERVERS, SERVERS_V6, UPLINK, UPLINK_V6, beyond, client_address, lab
from lab.topology import client_address_v6 as client_v6
from lab.traffic import ANSWER_S, Pinger, TcpConnection, TcpServer, UdpServer, closing_all, token

if TYPE_CHECKING:
    from pathlib import Path

    from lab.topology import Lab, Namespace
    from lab.truth import Truth

#: A port that nobody listens on.
CLOSED = 9
#: What linux/in.h and linux/in6.h call these; Python's socket module does not.
IP_RECVERR, IPV6_RECVERR = 11, 25
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DONT, PMTUDISC_DO = 10, 23, 0, 2
#: A TTL that ends at the router outside, and one that ends at the NAT host.
OUTSIDE, AT_THE_HOST = 2, 1


class Prober:
    """A UDP socket that sends single packets and waits for the error that each of them provokes."""

    def __init__(self, host: Namespace, sport: int, to: tuple[str, int], source: str = "") -> None:
        self._v6 = ":" in to[0]
        with host.inside():
            self._socket = socket.socket(socket.AF_INET6 if self._v6 else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.settimeout(ANSWER_S)
        level, option = (socket.IPPROTO_IPV6, IPV6_RECVERR) if self._v6 else (socket.IPPROTO_IP, IP_RECVERR)
        self._socket.setsockopt(level, option, 1)
        self._level = level
        self._socket.bind((source, sport))
        self._socket.connect(to)

    def provoke(self, payload: bytes, *, ttl: int = 64, may_fragment: bool = False) -> int:
        """Send one datagram with this TTL and return the errno that the kernel makes of the answer.

        A datagram that `may_fragment` has DF clear, and so an IP identification.
        """
        if self._v6:
            self._socket.setsockopt(self._level, socket.IPV6_UNICAST_HOPS, ttl)
        else:
            self._socket.setsockopt(self._level, socket.IP_TTL, ttl)
        discover = PMTUDISC_DONT if may_fragment else PMTUDISC_DO
        self._socket.setsockopt(self._level, IPV6_MTU_DISCOVER if self._v6 else IP_MTU_DISCOVER, discover)
        self._socket.send(payload)
        try:
            self._socket.recv(65535)
        except OSError as error:
            return error.errno or 0
        raise AssertionError("an answer where an error was due")

    def answered(self, question: bytes, server: UdpServer, answer: bytes) -> None:
        """Send a datagram that `server` gets and answers."""
        self._socket.send(question)
        assert server.answer(answer) == question
        assert self._socket.recv(65535) == answer

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def refused_connection(host: Namespace, sport: int, to: tuple[str, int], *, ttl: int = 64) -> int:
    """Try to connect with this TTL and return the errno that the ICMP error makes of it."""
    v6 = ":" in to[0]
    with host.inside():
        made = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
    with made:
        level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
        made.setsockopt(level, socket.IPV6_UNICAST_HOPS if v6 else socket.IP_TTL, ttl)
        # otherwise errors are soft, and the SYN is sent again and again (RFC 1122 section 4.2.3.9)
        made.setsockopt(level, IPV6_RECVERR if v6 else IP_RECVERR, 1)
        made.bind(("", sport))
        made.settimeout(ANSWER_S)
        try:
            made.connect(to)
        except OSError as error:
            return error.errno or 0
    raise AssertionError("connected where an error was due")


class Tracer:
    """Sends echo requests that a router answers with an error, as traceroute -I does."""

    def __init__(self, host: Namespace, server: str, id_: int, ttl: int) -> None:
        self._v6 = ":" in server
        self._id = id_
        family = socket.AF_INET6 if self._v6 else socket.AF_INET
        with host.inside():
            protocol = socket.IPPROTO_ICMPV6 if self._v6 else socket.IPPROTO_ICMP
            self._listener = socket.socket(family, socket.SOCK_RAW, protocol)
        self._listener.settimeout(ANSWER_S)
        self._pinger = Pinger(host, server, id_, ttl=ttl)

    def trace(self, seq: int) -> None:
        """Send one request and wait for the error that quotes it."""
        self._pinger.send(seq)
        wanted = struct.pack(">HH", self._id, seq)
        body = b""
        while not body or body[0] != (3 if self._v6 else 11) or wanted not in body:
            received = self._listener.recv(65535)
            body = received if self._v6 else received[20:]

    def close(self) -> None:
        """Close both sockets."""
        self._listener.close()
        self._pinger.close()


def unlimited(net: Lab, *hosts: Namespace) -> None:
    """Let hosts send as many errors as they like: by default Linux sends one a second to each destination."""
    for host in (*net.clients, *(router for router, _, _ in net.hops), net.internet, *hosts):
        host.sysctl("ipv4.icmp_ratelimit", 0)
        host.sysctl("ipv6.icmp.ratelimit", 0)


def port_unreachable(folder: Path) -> Truth:
    """A server refuses UDP on a closed port, behind masquerade that gives every flow a new port."""
    with lab(clients=2) as net:
        unlimited(net)
        rules.docker_nat(net.router, random_fully=True)
        probers = [Prober(client, 40000, (SERVERS[0], CLOSED)) for client in net.clients]
        with closing_all(*probers), recorded(net, folder):
            for may_fragment in (True, False) * 2:
                for prober in probers:
                    assert prober.provoke(token(), may_fragment=may_fragment) == errno.ECONNREFUSED
        return kernel_truth(net, folder)


def published_port_unreachable(folder: Path) -> Truth:
    """A container refuses UDP on a published port that nobody listens on: the error comes from inside."""
    return _refused_inside(folder, masqueraded=False, bridge_netfilter=True)


def published_port_unreachable_masqueraded(folder: Path) -> Truth:
    """The same with the outside's source masqueraded as well: both ends of the quote change in one crossing."""
    return _refused_inside(folder, masqueraded=True, bridge_netfilter=False)


def published_port_unreachable_half(folder: Path) -> Truth:
    """The same with bridge netfilter: docker0 may show the container's error after half of its translation."""
    if not topology.BRIDGE_NETFILTER.exists():
        raise NotHereError("kernel has no br_netfilter")
    return _refused_inside(folder, masqueraded=True, bridge_netfilter=True)


def _refused_inside(folder: Path, *, masqueraded: bool, bridge_netfilter: bool) -> Truth:
    with lab(clients=1, bridge_netfilter=bridge_netfilter) as net:
        unlimited(net)
        rules.docker_nat(net.router)
        rules.publish(net.router, "udp", 5353, client_address(1), 53)
        if masqueraded:
            rules.snat_inward(net.router, "udp", "20000-20007")
        probers = [Prober(net.internet, 50000, (UPLINK, 5353), source) for source in SERVERS[:2]]
        with closing_all(*probers), recorded(net, folder):
            for may_fragment in (True, False) * 2:
                for prober in probers:
                    assert prober.provoke(token(), may_fragment=may_fragment) == errno.ECONNREFUSED
        return kernel_truth(net, folder)


def traceroute(folder: Path) -> Truth:
    """Probes of UDP, TCP and ICMP echo die at the router outside, and at the NAT host; ids and ports collide."""
    with lab(clients=2) as net, beyond(net):
        unlimited(net)
        rules.docker_nat(net.router)
        tracers = [Tracer(client, FARS[0], 1, OUTSIDE) for client in net.clients]
        own = Tracer(net.clients[0], FARS[0], 2, AT_THE_HOST)
        probers = [Prober(client, 40000, (FARS[0], 33434)) for client in net.clients]
        near = Prober(net.clients[0], 40001, (FARS[0], 33434))
        with closing_all(*tracers, own, *probers, near), recorded(net, folder):
            for seq in range(3):
                for prober, tracer in zip(probers, tracers, strict=True):
                    tracer.trace(seq)
                    assert prober.provoke(token(), ttl=OUTSIDE, may_fragment=True) == errno.EHOSTUNREACH
                    assert prober.provoke(token(), ttl=OUTSIDE) == errno.EHOSTUNREACH
                own.trace(seq)
                assert near.provoke(token(), ttl=AT_THE_HOST) == errno.EHOSTUNREACH
                for client in net.clients:
                    assert (
                        refused_connection(client, 41000 + seq, (FARS[0], 80), ttl=OUTSIDE)
                        == errno.EHOSTUNREACH
                    )
        return kernel_truth(net, folder)


def path_mtu(folder: Path) -> Truth:
    """Full packets do not fit beyond the router outside: fragmentation needed, outwards and from a published port."""
    with lab(clients=1) as net, beyond(net) as far:
        unlimited(net, far)
        rules.docker_nat(net.router)
        rules.publish(net.router, "tcp", 8080, client_address(1), 80)
        _too_big(net, far, folder, FARS, (client_address(1), UPLINK))
        return kernel_truth(net, folder)


def path_mtu_v6(folder: Path) -> Truth:
    """Packet too big, outwards behind IPv6 masquerade and from a published port."""
    with lab(clients=1, ipv6=True) as net, beyond(net) as far:
        unlimited(net, far)
        rules.masquerade_v6(net.router, "fd00:17::/64")
        rules.publish_v6(net.router, "tcp", 8080, client_v6(1), 80)
        _too_big(net, far, folder, FARS_V6, (client_v6(1), UPLINK_V6))
        return kernel_truth(net, folder)


def _too_big(
    net: Lab, far: Namespace, folder: Path, servers: tuple[str, ...], published: tuple[str, str]
) -> None:
    """Send datagrams and segments that are too big beyond the router, from the container and as its answers.

    Each to an address of its own: the container remembers the path MTU of those that it has learned of.
    """
    client, (container, uplink) = net.clients[0], published
    udp, tcp = UdpServer(far, servers[0], 53), TcpServer(far, servers[1], 80)
    web = TcpServer(client, container, 80)
    prober = Prober(client, 40000, (servers[0], 53))
    with closing_all(udp, tcp, web, prober), recorded(net, folder):
        prober.answered(token(), udp, token())
        assert prober.provoke(token(1440)) == errno.EMSGSIZE
        outward = TcpConnection(client, 41000, tcp, (servers[1], 80))
        inward = TcpConnection(far, 50000, web, (uplink, 8080), servers[2])
        # the connections came up with what the container's interface can carry; now they learn the path
        outward.exchange(token(2000), token(64))
        inward.exchange(token(64), token(2000))
        outward.close()
        inward.close()


def prohibited(folder: Path) -> Truth:
    """A firewall outside rejects UDP, TCP and pings, and the NAT host has no route for one of them."""
    with lab(clients=2) as net, beyond(net):
        unlimited(net)
        rules.docker_nat(net.router)
        rules.reject(net.internet)
        # what dies inside the host is seen at docker0 only
        net.router.run("ip route add unreachable 192.0.2.128/25")
        probers = [Prober(client, 40000, (FARS[0], 53)) for client in net.clients]
        lost = Prober(net.clients[0], 40001, ("192.0.2.130", 53))
        with closing_all(*probers, lost), recorded(net, folder):
            for round_ in range(3):
                for prober in probers:
                    assert prober.provoke(token()) == errno.EHOSTUNREACH
                assert lost.provoke(token()) == errno.EHOSTUNREACH
                for client in net.clients:
                    assert refused_connection(client, 41000 + round_, (FARS[0], 80)) == errno.EHOSTUNREACH
        return kernel_truth(net, folder)


def errors_v6(folder: Path) -> Truth:
    """IPv6: refused, prohibited and expired probes of UDP, TCP and ICMPv6 echo behind masquerade."""
    with lab(clients=2, ipv6=True) as net, beyond(net):
        unlimited(net)
        rules.masquerade_v6(net.router, "fd00:17::/64")
        rules.reject_v6(net.internet, 81)
        tracers = [Tracer(client, FARS_V6[0], 1, OUTSIDE) for client in net.clients]
        refused = [Prober(client, 40000, (SERVERS_V6[0], CLOSED)) for client in net.clients]
        expired = [Prober(client, 40001, (FARS_V6[0], 33434)) for client in net.clients]
        with closing_all(*tracers, *refused, *expired), recorded(net, folder):
            for seq in range(3):
                for client, tracer, closed, dying in zip(net.clients, tracers, refused, expired, strict=True):
                    tracer.trace(seq)
                    assert closed.provoke(token()) == errno.ECONNREFUSED
                    assert dying.provoke(token(), ttl=OUTSIDE) == errno.EHOSTUNREACH
                    assert refused_connection(client, 41000 + seq, (FARS_V6[0], 81)) == errno.EACCES
        return kernel_truth(net, folder)


def errors_two_hops(folder: Path) -> Truth:
    """Two NAT hosts in a row: errors from between them, and errors that cross both."""
    with lab(clients=2, hops=2) as net:
        unlimited(net)
        rules.docker_nat(net.router)
        rules.masquerade(net.outer_router, "eth0")
        refused = [Prober(client, 40000, (SERVERS[0], CLOSED)) for client in net.clients]
        between = [Prober(client, 40001, (SERVERS[0], CLOSED)) for client in net.clients]
        with closing_all(*refused, *between), recorded(net, folder):
            for may_fragment in (True, False):
                for far, near in zip(refused, between, strict=True):
                    assert far.provoke(token(), may_fragment=may_fragment) == errno.ECONNREFUSED
                    code = near.provoke(token(), ttl=2, may_fragment=may_fragment)
                    assert code == errno.EHOSTUNREACH
        return kernel_truth(net, folder)


SCENARIOS = (
    port_unreachable,
    published_port_unreachable,
    published_port_unreachable_masqueraded,
    published_port_unreachable_half,
    traceroute,
    path_mtu,
    path_mtu_v6,
    prohibited,
    errors_v6,
    errors_two_hops,
)

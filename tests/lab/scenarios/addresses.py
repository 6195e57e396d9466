"""Twice NAT, 1:1 NAT, services, NETMAP, null bindings, REDIRECT: rules that change more than one source.

Every scenario has one router between docker0 and eth0. Bridge netfilter is off unless a scenario is about
it, so that docker0 shows packets before or after the whole translation.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from lab import rules, topology
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.services import TcpServers, UdpServers
from lab.topology import BRIDGE, SERVERS, UPLINK, client_address, lab
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab.topology import Lab
    from lab.truth import Truth

#: Addresses that no host has: only a rule gives them a meaning. A service's, and one of the uplink's network.
VIRTUAL, VIRTUAL_2 = "198.51.100.99", "198.51.100.98"
PUBLIC = "203.0.113.20"
#: A published range (RFC 5737) that NETMAP maps onto the containers' addresses, bit for bit.
RANGE, RANGE_INSIDE = "192.0.2.0/28", "172.17.0.0/28"


def twice_nat(folder: Path) -> Truth:
    """One router changes source and destination of one packet: a virtual address outside, masquerade inside."""
    return _twice(folder, bridge_netfilter=False)


def twice_nat_bridge_netfilter(folder: Path) -> Truth:
    """The same with bridge netfilter: docker0 shows requests after DNAT and answers before anything."""
    if not topology.BRIDGE_NETFILTER.exists():
        raise NotHereError("kernel has no br_netfilter")
    return _twice(folder, bridge_netfilter=True)


def _twice(folder: Path, *, bridge_netfilter: bool) -> Truth:
    with lab(clients=2, bridge_netfilter=bridge_netfilter) as net:
        rules.docker_nat(net.router)
        rules.dnat(net.router, VIRTUAL, "udp", 53, f"{SERVERS[0]}:5353")
        rules.dnat(net.router, VIRTUAL, "tcp", 80, f"{SERVERS[1]}:8080")
        rules.dnat(net.router, VIRTUAL, "icmp", None, SERVERS[2])
        udp, tcp = UdpServer(net.internet, SERVERS[0], 5353), TcpServer(net.internet, SERVERS[1], 8080)
        pingers = [Pinger(client, VIRTUAL, 1) for client in net.clients]
        clients = [UdpClient(client, 40000, VIRTUAL, 53) for client in net.clients]
        with closing_all(udp, tcp, *pingers, *clients), recorded(net, folder):
            connections = [TcpConnection(client, 41000, tcp, (VIRTUAL, 80)) for client in net.clients]
            for seq in range(3):
                for pinger in pingers:
                    pinger.ping(seq)
                for client in clients:
                    client.exchange(udp, token(), token())
                for connection in connections:
                    connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder)


def one_to_one(folder: Path) -> Truth:
    """One container owns a public address both ways (1:1 NAT) beside another that is masqueraded."""
    with lab(clients=2, bridge_netfilter=False) as net:
        inside = client_address(1)
        net.router.address("eth0", PUBLIC, 32)
        rules.one_to_one(net.router, PUBLIC, inside)
        rules.docker_nat(net.router)
        udp, web = UdpServer(net.internet, SERVERS[0], 53), TcpServer(net.internet, SERVERS[0], 80)
        dns, tcp = UdpServer(net.clients[0], inside, 53), TcpServer(net.clients[0], inside, 80)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        outside = [UdpClient(net.internet, 50000, PUBLIC, 53, source) for source in SERVERS[:2]]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        inward = Pinger(net.internet, PUBLIC, 1)
        with closing_all(udp, web, dns, tcp, inward, *pingers, *outside, *clients), recorded(net, folder):
            connections = [TcpConnection(client, 41000, web, (SERVERS[0], 80)) for client in net.clients]
            connections += [TcpConnection(net.internet, 51000, tcp, (PUBLIC, 80), each) for each in SERVERS]
            for seq in range(3):
                for pinger in (*pingers, inward):
                    pinger.ping(seq)
                for client in clients:
                    client.exchange(udp, token(), token())
                for client in outside:
                    client.exchange(dns, token(), token())
                for connection in connections:
                    connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder)


def service_iptables(folder: Path) -> Truth:
    """kube-proxy with iptables: a virtual address becomes one of three servers, at random or in turn."""

    def service(net: Lab) -> None:
        rules.docker_nat(net.router)
        rules.one_of_many(net.router, VIRTUAL, "udp", 53, [f"{server}:5353" for server in SERVERS])
        rules.in_turn(net.router, VIRTUAL, "tcp", 80, [f"{server}:8080" for server in SERVERS])

    return _service(folder, service)


def service_nftables(folder: Path) -> Truth:
    """The same service written for nft: numgen picks the server, masquerade follows."""

    def service(net: Lab) -> None:
        rules.nft_service(net.router, VIRTUAL, SERVERS, "172.17.0.0/16")

    return _service(folder, service)


def service_address_range(folder: Path) -> Truth:
    """DNAT to a range of addresses: the kernel hashes source and destination to pick one (find_best_ips_proto)."""

    def service(net: Lab) -> None:
        rules.docker_nat(net.router)
        between = f"{SERVERS[0]}-{SERVERS[2]}"
        rules.dnat(net.router, VIRTUAL, "udp", 53, f"{between}:5353")
        rules.dnat(net.router, VIRTUAL, "tcp", 80, f"{between}:8080")

    return _service(folder, service)


def _service(folder: Path, service: Callable[[Lab], None]) -> Truth:
    """Two containers ask a service from four ports each; which server answers is the kernel's choice."""
    with lab(clients=2, bridge_netfilter=False) as net:
        service(net)
        udp = UdpServers(net.internet, SERVERS, 5353)
        tcp = TcpServers(net.internet, SERVERS, 8080)
        with closing_all(udp, tcp), recorded(net, folder):
            for number in range(4):
                for client in net.clients:
                    asking = UdpClient(client, 40000 + number, VIRTUAL, 53)
                    with closing_all(asking):
                        asking.exchange(udp, token(), token())
                        asking.exchange(udp, token(), token())
                    connection = TcpConnection(client, 41000 + number, tcp, (VIRTUAL, 80))
                    connection.exchange(token(40), token(90))
                    connection.close()
        return kernel_truth(net, folder)


def node_port(folder: Path) -> Truth:
    """A published port leads to one of three containers, and its callers are masqueraded on the way in."""
    with lab(clients=3, bridge_netfilter=False) as net:
        containers = [client_address(number) for number in (1, 2, 3)]
        rules.one_of_many(net.router, UPLINK, "udp", 30053, [f"{each}:53" for each in containers])
        rules.one_of_many(net.router, UPLINK, "tcp", 30080, [f"{each}:80" for each in containers])
        rules.masquerade(net.router, "docker0")
        with ExitStack() as stack:
            udp = UdpServers.on(list(zip(net.clients, containers, strict=True)), 53)
            tcp = TcpServers.on(list(zip(net.clients, containers, strict=True)), 80)
            stack.enter_context(closing_all(udp, tcp))
            stack.enter_context(recorded(net, folder))
            for number in range(4):
                for source in SERVERS[:2]:  # both callers use one port: masquerade must tell them apart
                    asking = UdpClient(net.internet, 50000 + number, UPLINK, 30053, source)
                    with closing_all(asking):
                        asking.exchange(udp, token(), token())
                        asking.exchange(udp, token(), token())
                    connection = TcpConnection(net.internet, 51000 + number, tcp, (UPLINK, 30080), source)
                    connection.exchange(token(40), token(90))
                    connection.close()
        return kernel_truth(net, folder)


def netmap(folder: Path) -> Truth:
    """NETMAP maps a published range onto the containers, both ways: hosts change, ports and ids never."""
    with lab(clients=3, bridge_netfilter=False) as net:
        rules.netmap(net.router, RANGE, RANGE_INSIDE)
        net.internet.route(RANGE, UPLINK)
        udp, outside = UdpServer(net.internet, SERVERS[0], 53), []
        served = [UdpServer(client, client_address(n), 53) for n, client in enumerate(net.clients, 1)]
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        for number in (1, 2, 3):
            public = f"{RANGE.rsplit('.', 1)[0]}.{number + 1}"
            outside.append(UdpClient(net.internet, 40000, public, 53, SERVERS[1], reuse=True))
            pingers.append(Pinger(net.internet, public, 1))
        with closing_all(udp, *served, *pingers, *clients, *outside), recorded(net, folder):
            for seq in range(3):
                for pinger in pingers:
                    pinger.ping(seq)
                for client, server in zip(outside, served, strict=True):
                    client.exchange(server, token(), token())
                for client in clients:
                    client.exchange(udp, token(), token())
        return kernel_truth(net, folder)


def null_binding(folder: Path) -> Truth:
    """A source port changes with no rule for it: two virtual addresses lead to one server, and one is asked directly.

    The answers of all three would carry one tuple, so the kernel gives the later ones another port
    (nf_nat_alloc_null_binding).
    """
    with lab(clients=2, bridge_netfilter=False) as net:
        for virtual in (VIRTUAL, VIRTUAL_2):
            rules.dnat(net.router, virtual, "udp", 53, f"{SERVERS[0]}:53")
            rules.dnat(net.router, virtual, "tcp", 80, f"{SERVERS[0]}:80")
        udp, tcp = UdpServer(net.internet, SERVERS[0], 53), TcpServer(net.internet, SERVERS[0], 80)
        with closing_all(udp, tcp), recorded(net, folder):
            asked = (VIRTUAL, VIRTUAL_2, SERVERS[0])
            clients = [
                UdpClient(client, 40000, server, 53, reuse=True) for client in net.clients for server in asked
            ]
            connections = [
                TcpConnection(client, 41000, tcp, (server, 80)) for client in net.clients for server in asked
            ]
            with closing_all(*clients):
                for _ in range(3):
                    for client in clients:
                        client.exchange(udp, token(), token())
                    for connection in connections:
                        connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder)


def redirect(folder: Path) -> Truth:
    """REDIRECT takes some ports to a server on the router itself, which eth0 never sees; the rest crosses."""
    with lab(clients=2, bridge_netfilter=False) as net:
        rules.docker_nat(net.router)
        rules.redirect(net.router, "docker0", "tcp", 80, 3128)
        rules.redirect(net.router, "docker0", "udp", 53, 5353)
        proxy, resolver = TcpServer(net.router, "", 3128), UdpServer(net.router, BRIDGE, 5353)
        tcp, udp = TcpServer(net.internet, SERVERS[0], 8080), UdpServer(net.internet, SERVERS[0], 5300)
        caught = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        through = [UdpClient(client, 40001, SERVERS[0], 5300) for client in net.clients]
        with closing_all(proxy, resolver, tcp, udp, *caught, *through), recorded(net, folder):
            connections = [
                TcpConnection(client, sport, server, (SERVERS[0], port))
                for client in net.clients
                for sport, server, port in ((41000, proxy, 80), (41001, tcp, 8080))
            ]
            for _ in range(3):
                for client in caught:
                    client.exchange(resolver, token(), token())
                for client in through:
                    client.exchange(udp, token(), token())
                for connection in connections:
                    connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder)


SCENARIOS = (
    twice_nat,
    twice_nat_bridge_netfilter,
    one_to_one,
    service_iptables,
    service_nftables,
    service_address_range,
    node_port,
    netmap,
    null_binding,
    redirect,
)

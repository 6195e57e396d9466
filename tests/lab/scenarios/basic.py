"""Masquerade and published ports on one host or two, collisions, flushes, losses: NAT as it is every day."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lab import rules, topology
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.topology import SERVERS, SERVERS_V6, UPLINK, Lab, client_address, lab
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token

if TYPE_CHECKING:
    from pathlib import Path

    from lab.truth import Truth

#: Ethernet 14, IPv4 20, ICMP 8: the headers of a ping and nothing of its payload.
HEADERS_ONLY = 42
#: Silence between the last packet that may be lost and the packet that shows the capture still ran.
AFTER_LOSS_S = 0.3
#: What ping sends when its payload says nothing: as many zeros as iputils sends bytes.
ZEROS = bytes(56)


def icmp_id_collision(folder: Path) -> Truth:
    """Three containers ping one address with ICMP id 1 and a payload of zeros, one with id 7."""
    with lab(clients=4) as net:
        rules.docker_nat(net.router)
        pingers = [
            Pinger(client, SERVERS[0], id_, payload=ZEROS)
            for client, id_ in zip(net.clients, (1, 1, 1, 7), strict=True)
        ]
        with closing_all(*pingers), recorded(net, folder):
            for seq in range(5):
                for pinger in pingers:
                    pinger.send(seq)
                for pinger in pingers:
                    pinger.receive()
        return kernel_truth(net, folder, unique_payloads=False)


def icmp_random_fully(folder: Path, *, containers: int = 4, ids: int = 3, rounds: int = 20) -> Truth:
    """MASQUERADE --random-fully gives every ping a new id; zeros as payload, captured at snaplen 42."""
    with lab(clients=containers) as net:
        rules.docker_nat(net.router, random_fully=True)
        pingers = [
            Pinger(client, SERVERS[0], id_, payload=ZEROS)
            for client in net.clients
            for id_ in range(1, ids + 1)
        ]
        with closing_all(*pingers), recorded(net, folder, snaplen=HEADERS_ONLY):
            for seq in range(rounds):
                for pinger in pingers:
                    pinger.send(seq)
                for pinger in pingers:
                    # A constant payload of 56 bytes comes back whole; only the capture is cut.
                    pinger.receive()
        return kernel_truth(net, folder, unique_payloads=False)


def port_collision(folder: Path) -> Truth:
    """Three containers use one source port, TCP and UDP, towards the same server and another one."""
    with lab(clients=3) as net:
        rules.docker_nat(net.router)
        tcp = TcpServer(net.internet, SERVERS[0], 80)
        udp = [UdpServer(net.internet, server, 53) for server in SERVERS[:2]]
        with closing_all(tcp, *udp), recorded(net, folder):
            clients = [
                (UdpClient(client, 40000, server, 53), answering)
                for client, server, answering in zip(
                    net.clients, (SERVERS[0], SERVERS[0], SERVERS[1]), (udp[0], udp[0], udp[1]), strict=True
                )
            ]
            with closing_all(*(client for client, _ in clients)):
                connections = [
                    TcpConnection(client, 40000, tcp, (SERVERS[0], 80))
                    for client in (net.clients[0], net.clients[1])
                ]
                for _ in range(3):
                    for connection in connections:
                        connection.exchange(token(100), token(900))
                    for client, answering in clients:
                        client.exchange(answering, token(), token())
                for connection in connections:
                    connection.close()
        return kernel_truth(net, folder)


def published_port(folder: Path) -> Truth:
    """Outside hosts reach containers by published ports (docker run -p 8080:80, -p 5353:53/udp)."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        rules.publish(net.router, "tcp", 8080, client_address(1), 80)
        rules.publish(net.router, "udp", 5353, client_address(2), 53)
        _reach_inward(net, folder)
        return kernel_truth(net, folder)


def published_port_masqueraded(folder: Path) -> Truth:
    """Published ports whose outside sources are masqueraded too: both ends change in one crossing."""
    return _masqueraded_inward(folder, bridge_netfilter=False)


def half_translated(folder: Path) -> Truth:
    """The same with bridge netfilter: docker0 shows the answers after one half of their translation."""
    if not topology.BRIDGE_NETFILTER.exists():
        raise NotHereError("kernel has no br_netfilter")
    return _masqueraded_inward(folder, bridge_netfilter=True)


def _masqueraded_inward(folder: Path, *, bridge_netfilter: bool) -> Truth:
    with lab(clients=2, bridge_netfilter=bridge_netfilter) as net:
        rules.docker_nat(net.router)
        rules.publish(net.router, "tcp", 8080, client_address(1), 80)
        rules.publish(net.router, "udp", 5353, client_address(2), 53)
        rules.snat_inward(net.router, "tcp", "20000-20007")
        rules.snat_inward(net.router, "udp", "20000-20007")
        _reach_inward(net, folder)
        return kernel_truth(net, folder)


def _reach_inward(net: Lab, folder: Path) -> None:
    """Two outside hosts use one source port towards each published port."""
    web = TcpServer(net.clients[0], client_address(1), 80)
    dns = UdpServer(net.clients[1], client_address(2), 53)
    with closing_all(web, dns), recorded(net, folder):
        connections = [
            TcpConnection(net.internet, 50000, web, (UPLINK, 8080), source) for source in SERVERS[:2]
        ]
        clients = [UdpClient(net.internet, 50000, UPLINK, 5353, source) for source in SERVERS[:2]]
        with closing_all(*clients):
            for _ in range(3):
                for connection in connections:
                    connection.exchange(token(60), token(700))
                for client in clients:
                    client.exchange(dns, token(), token())
            for connection in connections:
                connection.close()


def two_hops(folder: Path) -> Truth:
    """Docker's masquerade, then a second router's: three points, colliding ids and ports at the first."""
    with lab(clients=2, hops=2) as net:
        rules.docker_nat(net.router)
        rules.masquerade(net.outer_router, "eth0")
        tcp, udp = TcpServer(net.internet, SERVERS[0], 80), UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        # The second router pings with the same id itself, so it must rewrite one that came unchanged.
        neighbour = Pinger(net.outer_router, SERVERS[0], 1)
        with closing_all(tcp, udp, neighbour, *pingers), recorded(net, folder):
            neighbour.ping(0)
            for seq in range(4):
                for pinger in pingers:
                    pinger.send(seq)
                for pinger in pingers:
                    pinger.receive()
            clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
            with closing_all(*clients):
                connections = [TcpConnection(client, 41000, tcp, (SERVERS[0], 80)) for client in net.clients]
                for _ in range(3):
                    for client in clients:
                        client.exchange(udp, token(), token())
                    for connection in connections:
                        connection.exchange(token(80), token(500))
                for connection in connections:
                    connection.close()
        return kernel_truth(net, folder)


def ipv6_masquerade(folder: Path) -> Truth:
    """IPv6 masquerade of ping, UDP and TCP with colliding ids and ports."""
    with lab(clients=2, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        server = SERVERS_V6[0]
        tcp, udp = TcpServer(net.internet, server, 80), UdpServer(net.internet, server, 53)
        pingers = [Pinger(client, server, 1) for client in net.clients]
        with closing_all(tcp, udp, *pingers), recorded(net, folder):
            for seq in range(4):
                for pinger in pingers:
                    pinger.send(seq)
                for pinger in pingers:
                    pinger.receive()
            clients = [UdpClient(client, 40000, server, 53) for client in net.clients]
            with closing_all(*clients):
                connections = [TcpConnection(client, 41000, tcp, (server, 80)) for client in net.clients]
                for _ in range(3):
                    for client in clients:
                        client.exchange(udp, token(), token())
                    for connection in connections:
                        connection.exchange(token(80), token(500))
                for connection in connections:
                    connection.close()
        return kernel_truth(net, folder)


def identical_ipv6_pings(folder: Path) -> Truth:
    """Four containers ping with id 1 and zeros over IPv6, which has no IP id: only order tells them apart."""
    with lab(clients=4, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        pingers = [Pinger(client, SERVERS_V6[0], 1, payload=ZEROS) for client in net.clients]
        with closing_all(*pingers), recorded(net, folder):
            for seq in range(10):
                for pinger in pingers:
                    pinger.send(seq)
                for pinger in pingers:
                    pinger.receive()
        return kernel_truth(net, folder, unique_payloads=False, tied=True)


def conntrack_flushed(folder: Path) -> Truth:
    """conntrack -F in mid-flow under --random-fully: the same sockets get new ids and ports, twice."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router, random_fully=True)
        udp = UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(udp, *pingers, *clients), recorded(net, folder):
            for life in range(3):
                if life:
                    net.router.run("conntrack -F")
                for seq in range(4 * life, 4 * life + 4):
                    for pinger in pingers:
                        pinger.ping(seq)
                    for client in clients:
                        client.exchange(udp, token(), token())
        return kernel_truth(net, folder)


def identical_keepalives(folder: Path) -> Truth:
    """Keep-alives of one zero byte, UDP, both ways, in bursts, under --random-fully: all payloads are equal."""
    with lab(clients=3) as net:
        rules.docker_nat(net.router, random_fully=True)
        udp = UdpServer(net.internet, SERVERS[0], 4500)
        clients = [
            UdpClient(client, sport, SERVERS[0], 4500) for client in net.clients for sport in (4500, 4501)
        ]
        with closing_all(udp, *clients), recorded(net, folder):
            for _ in range(10):
                for client in clients:
                    client.send(b"\0")
                for _ in clients:
                    udp.answer(b"\0")
                for client in clients:
                    client.receive()
        return kernel_truth(net, folder, unique_payloads=False)


def routed(folder: Path) -> Truth:
    """Plain routing with connection tracking and without NAT: nothing may be called a rewrite."""
    with lab(clients=2) as net:
        net.router.run("iptables -w -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
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
        return kernel_truth(net, folder)


def host_traffic(folder: Path) -> Truth:
    """Container traffic beside the host's own on eth0: same servers, ids and ports, but it never crosses."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        udp, inbound = UdpServer(net.internet, SERVERS[0], 53), UdpServer(net.router, UPLINK, 123)
        # The host comes first, so the containers' id 1 and port 40000 are taken already.
        pingers = [Pinger(host, SERVERS[0], 1) for host in (net.router, *net.clients)]
        clients = [UdpClient(host, 40000, SERVERS[0], 53) for host in (net.router, *net.clients)]
        outside = UdpClient(net.internet, 123, UPLINK, 123)
        with closing_all(udp, inbound, outside, *pingers, *clients), recorded(net, folder):
            for seq in range(5):
                for pinger in pingers:
                    pinger.send(seq)
                for pinger in pingers:
                    pinger.receive()
                for client in clients:
                    client.exchange(udp, token(), token())
                outside.exchange(inbound, token(), token())
        return kernel_truth(net, folder)


def dropped_in_forward(folder: Path) -> Truth:
    """The router drops every 5th packet outwards and every 7th inwards; its counters say how many."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        rules.drop_every(net.router, 5, 2, incoming="docker0")
        rules.drop_every(net.router, 7, 3, incoming="eth0")
        udp = UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(udp, *pingers, *clients), recorded(net, folder):
            for seq in range(12):
                for pinger in pingers:
                    pinger.ping(seq, lossy=True)
                for client in clients:
                    client.send(token())
            # A loss may only be claimed where the other point provably captured for a while longer.
            time.sleep(AFTER_LOSS_S)
            for seq in range(12, 16):
                if pingers[0].ping(seq, lossy=True):
                    break
        return kernel_truth(net, folder, dropped=rules.dropped(net.router))


def partial_capture(folder: Path) -> Truth:
    """eth0 is captured only in the middle of what docker0 shows: nothing is lost, much is unknowable."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        with closing_all(*pingers), recorded(net, folder, without="eth0") as recording:
            for seq in range(15):
                if seq == 5:
                    recording.capture(net.router, "eth0")
                if seq == 10:
                    recording.stop_capture("eth0")
                for pinger in pingers:
                    pinger.ping(seq)
        return kernel_truth(net, folder, partial=True)


SCENARIOS = (
    icmp_id_collision,
    icmp_random_fully,
    port_collision,
    published_port,
    published_port_masqueraded,
    half_translated,
    two_hops,
    ipv6_masquerade,
    identical_ipv6_pings,
    conntrack_flushed,
    identical_keepalives,
    routed,
    host_traffic,
    dropped_in_forward,
    partial_capture,
)

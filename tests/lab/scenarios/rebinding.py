"""One tuple, several translations: entries deleted or timed out, ports used again, packets left untranslated.

conntrack's events say when each entry began and ended; translations are compared with its tuples.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lab import rules
from lab.scenarios.recording import kernel_truth, recorded
from lab.topology import SERVERS, client_address, lab
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token

if TYPE_CHECKING:
    from pathlib import Path

    from lab.truth import Truth

#: Timeouts are set to one second; the kernel's garbage collection honours them on the next packet.
TIMEOUT_S = 1
EXPIRED_S = 1.3
#: TCP acknowledges after 40 ms at the latest where it has nothing to say (Linux TCP_DELACK_MIN).
DELAYED_ACK_S = 0.1


def entry_deleted(folder: Path) -> Truth:
    """conntrack -D of one entry under --random-fully: that flow gets another port, its neighbours keep theirs."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router, random_fully=True)
        udp = UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(udp, *pingers, *clients), recorded(net, folder):
            for life in range(3):
                if life:
                    net.router.run(f"conntrack -D -p udp -s {client_address(1)} --sport 40000")
                    net.router.run(f"conntrack -D -p icmp -s {client_address(2)}")
                for seq in range(3 * life, 3 * life + 3):
                    for pinger in pingers:
                        pinger.ping(seq)
                    for client in clients:
                        client.exchange(udp, token(), token())
        return kernel_truth(net, folder)


def timed_out(folder: Path) -> Truth:
    """UDP and ICMP entries time out after a second of silence; the same sockets go on with other ports and ids."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router, random_fully=True)
        for name in ("udp_timeout", "udp_timeout_stream", "icmp_timeout"):
            net.router.sysctl(f"netfilter.nf_conntrack_{name}", TIMEOUT_S)
        udp = UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(udp, *pingers, *clients), recorded(net, folder):
            for life in range(3):
                if life:
                    time.sleep(EXPIRED_S)
                for seq in range(3 * life, 3 * life + 3):
                    for pinger in pingers:
                        pinger.ping(seq)
                    for client in clients:
                        client.exchange(udp, token(), token())
        return kernel_truth(net, folder)


def one_port_pool(folder: Path) -> Truth:
    """All share one external port (--to-ports 40000), one after the other: each takes it when the last has gone."""
    with lab(clients=3) as net:
        rules.masquerade(net.router, "eth0", "udp", "40000")
        rules.masquerade(net.router, "eth0", "tcp", "40000")
        udp, tcp = UdpServer(net.internet, SERVERS[0], 53), TcpServer(net.internet, SERVERS[0], 80)
        with closing_all(udp, tcp), recorded(net, folder), ExitStack() as stack:
            clients = [UdpClient(client, 50001 + n, SERVERS[0], 53) for n, client in enumerate(net.clients)]
            stack.enter_context(closing_all(*clients))
            for turn in range(2):
                for number, client in enumerate(clients):
                    client.exchange(udp, token(), token())
                    client.exchange(udp, token(), token())
                    connection = TcpConnection(net.clients[number], 51001 + turn, tcp, (SERVERS[0], 80))
                    connection.exchange(token(40), token(90))
                    connection.close()
                    net.router.run("conntrack -F")
        return kernel_truth(net, folder)


def tuple_reused(folder: Path) -> Truth:
    """One TCP tuple for four connections: after RST, after TIME_WAIT, and with another external port."""
    with lab(clients=1) as net:
        rules.docker_nat(net.router, random_fully=True)
        tcp = TcpServer(net.internet, SERVERS[0], 80)
        with closing_all(tcp), recorded(net, folder):
            for end in ("reset", "close", "close", "reset"):
                connection = TcpConnection(net.clients[0], 41000, tcp, (SERVERS[0], 80))
                connection.exchange(token(40), token(90))
                connection.exchange(token(40), token(90))
                if end == "reset":
                    connection.reset()
                    connection.forget()
                else:
                    connection.close(server_first=True)
                    net.router.run("conntrack -D -p tcp --orig-port-src 41000")
        return kernel_truth(net, folder)


def left_untranslated(folder: Path) -> Truth:
    """INVALID packets keep their private source: data of flushed entries while tcp_loose is off."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        net.router.sysctl("netfilter.nf_conntrack_tcp_loose", 0)
        net.internet.run("ip route del 172.17.0.0/16")
        tcp = TcpServer(net.internet, SERVERS[0], 80)
        with closing_all(tcp), recorded(net, folder):
            connections = [TcpConnection(client, 41000, tcp, (SERVERS[0], 80)) for client in net.clients]
            for connection in connections:
                connection.exchange(token(60), token(90))
                connection.exchange(token(60), token(90))
            time.sleep(
                DELAYED_ACK_S
            )  # else the server repeats itself to a router that knows nothing any more
            net.router.run("conntrack -F")
            for connection in connections:
                connection.say(token(60))  # nobody can answer an address that only the container has
                connection.say(token(60))
            time.sleep(0.5)
            for connection in connections:
                connection.reset()
        for connection in connections:
            connection.forget()  # a server that never saw the RST would say FIN, to a router that knows nothing
        return kernel_truth(net, folder)


def renewed_at_the_second_hop(folder: Path) -> Truth:
    """Two routers; only the second forgets: one translation at the first hop, three at the second."""
    with lab(clients=2, hops=2) as net:
        rules.docker_nat(net.router)
        rules.masquerade(net.outer_router, "eth0", "udp", random_fully=True)
        rules.masquerade(net.outer_router, "eth0", "icmp", random_fully=True)
        udp = UdpServer(net.internet, SERVERS[0], 53)
        pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(udp, *pingers, *clients), recorded(net, folder):
            seq = 0
            for life, rounds in enumerate((2, 3, 4)):
                if life:
                    net.outer_router.run("conntrack -F")
                for _ in range(rounds):
                    for pinger in pingers:
                        pinger.ping(seq)
                    for client in clients:
                        client.exchange(udp, token(), token())
                    seq += 1
        return kernel_truth(net, folder)


def renewed_at_both_hops(folder: Path) -> Truth:
    """Two routers forget at different times: five stretches of one conversation, each with its own tuples."""
    with lab(clients=2, hops=2) as net:
        rules.docker_nat(net.router, random_fully=True)
        rules.masquerade(net.outer_router, "eth0", "udp", random_fully=True)
        udp = UdpServer(net.internet, SERVERS[0], 53)
        clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
        with closing_all(udp, *clients), recorded(net, folder):
            for forgetful in (None, net.outer_router, net.router, net.outer_router, net.router):
                if forgetful is not None:
                    forgetful.run("conntrack -F")
                for _ in range(3):
                    for client in clients:
                        client.exchange(udp, token(), token())
        return kernel_truth(net, folder)


SCENARIOS = (
    entry_deleted,
    timed_out,
    one_port_pool,
    tuple_reused,
    left_untranslated,
    renewed_at_the_second_hop,
    renewed_at_both_hops,
)

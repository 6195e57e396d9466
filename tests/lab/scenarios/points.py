"""Many points of one host: container, veth, bridge, uplink, two networks, and one capture of all interfaces.

Taps on one path share a timestamp, a point that a flow does not pass proves nothing about it, and with
bridge netfilter the bridge shows packets halfway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import rules, topology
from lab.recorder import Recording
from lab.scenarios.recording import NotHereError
from lab.topology import OTHER_BRIDGE, OTHER_NETWORK, SERVERS, UPLINK, client_address, lab, other_address
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token
from lab.truth import Hop, Truth, parse_conntrack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from lab.topology import Lab

_CONNTRACK = "conntrack.txt"


def _truth(folder: Path, *chains: tuple[str, ...]) -> Truth:
    """Return what the one router did, for each chain of points that a packet may pass from inside to outside."""
    entries = tuple(parse_conntrack((folder / _CONNTRACK).read_text()))
    return Truth(
        tuple(Hop(chain[0], chain[-1], _CONNTRACK, entries, via=chain[1:-1]) for chain in chains),
        unique_payloads=True,
    )


def _out_and_in(net: Lab, folder: Path, capture: Callable[[Recording], None]) -> None:
    """Record traffic that passes all of the host, only its bridge, or ends at it."""
    rules.docker_nat(net.router)
    rules.publish(net.router, "tcp", 8080, client_address(2), 80)
    udp, tcp = UdpServer(net.internet, SERVERS[0], 53), TcpServer(net.internet, SERVERS[0], 80)
    web = TcpServer(net.clients[1], client_address(2), 80)
    beside = UdpServer(net.clients[1], client_address(2), 5000)
    host = UdpServer(net.router, topology.BRIDGE, 5001)
    pingers = [Pinger(client, SERVERS[0], 1) for client in net.clients]
    clients = [UdpClient(client, 40000, SERVERS[0], 53) for client in net.clients]
    # to its neighbour on the bridge, and to the host itself: no packet of these leaves by eth0
    neighbour = UdpClient(net.clients[0], 40001, client_address(2), 5000)
    inward = UdpClient(net.clients[0], 40002, topology.BRIDGE, 5001)
    with (
        closing_all(udp, tcp, web, beside, host, neighbour, inward, *pingers, *clients),
        Recording.into(folder) as recording,
    ):
        recording.conntrack(net.router, _CONNTRACK)
        capture(recording)
        connections = [TcpConnection(client, 41000, tcp, (SERVERS[0], 80)) for client in net.clients]
        connections += [TcpConnection(net.internet, 50000, web, (UPLINK, 8080), each) for each in SERVERS[:2]]
        for seq in range(2):
            for pinger in pingers:
                pinger.ping(seq)
            for client in clients:
                client.exchange(udp, token(), token())
            neighbour.exchange(beside, token(), token())
            inward.exchange(host, token(), token())
            for connection in connections:
                connection.exchange(token(60), token(90))
        for connection in connections:
            connection.close()


def _all_points(net: Lab) -> Callable[[Recording], None]:
    def capture(recording: Recording) -> None:
        recording.capture(net.clients[0], "eth0", name="c1")
        for point in ("veth1", "veth2", "docker0", "eth0"):
            recording.capture(net.router, point)

    return capture


def all_points(folder: Path) -> Truth:
    """A container's own interface, both veth, the bridge and the uplink, five files."""
    with lab(clients=2, bridge_netfilter=False) as net:
        _out_and_in(net, folder, _all_points(net))
        return _truth(folder, ("c1", "veth1", "docker0", "eth0"), ("veth2", "docker0", "eth0"))


def all_points_bridge_netfilter(folder: Path) -> Truth:
    """The same with bridge netfilter: translation may show between veth and bridge already."""
    _needs_bridge_netfilter()
    with lab(clients=2) as net:
        _out_and_in(net, folder, _all_points(net))
        return _truth(folder, ("c1", "veth1", "docker0", "eth0"), ("veth2", "docker0", "eth0"))


def any_alone(folder: Path) -> Truth:
    """One capture of all interfaces (SLL2): every forwarded packet stands in it three times."""
    with lab(clients=2, bridge_netfilter=False) as net:
        _out_and_in(net, folder, lambda recording: recording.capture(net.router, "any"))
        return _truth(folder, *_any_chains(net))


def any_alone_bridge_netfilter(folder: Path) -> Truth:
    """The same with bridge netfilter."""
    _needs_bridge_netfilter()
    with lab(clients=2) as net:
        _out_and_in(net, folder, lambda recording: recording.capture(net.router, "any"))
        return _truth(folder, *_any_chains(net))


def _any_chains(net: Lab) -> Iterable[tuple[str, ...]]:
    for veth in ("veth1", "veth2"):
        yield tuple(f"any:{net.router.index(name)}" for name in (veth, "docker0", "eth0"))


def two_networks(folder: Path) -> Truth:
    """Two bridges talk to each other and to the outside through the host, which masquerades all of it."""
    with lab(clients=1, others=1, bridge_netfilter=False) as net:
        rules.docker_nat(net.router)
        rules.docker_masquerade(net.router, OTHER_NETWORK, OTHER_BRIDGE)
        (one,), (other,) = net.clients, net.others
        udp, tcp = UdpServer(net.internet, SERVERS[0], 53), TcpServer(net.internet, SERVERS[0], 80)
        dns, web = UdpServer(other, other_address(1), 53), TcpServer(one, client_address(1), 80)
        pingers = [
            Pinger(host, address, 1)
            for host in (one, other)
            for address in (SERVERS[0], other_address(1) if host is one else client_address(1))
        ]
        clients = [UdpClient(host, 40000, SERVERS[0], 53) for host in (one, other)]
        across = UdpClient(one, 40001, other_address(1), 53)
        with (
            closing_all(udp, tcp, dns, web, across, *pingers, *clients),
            Recording.into(folder) as recording,
        ):
            recording.conntrack(net.router, _CONNTRACK)
            for point in ("veth1", "docker0", "veth-o1", "br-xyz", "eth0"):
                recording.capture(net.router, point)
            connections = [TcpConnection(host, 41000, tcp, (SERVERS[0], 80)) for host in (one, other)]
            connections.append(TcpConnection(other, 41001, web, (client_address(1), 80)))
            for seq in range(2):
                for pinger in pingers:
                    pinger.ping(seq)
                for client in clients:
                    client.exchange(udp, token(), token())
                across.exchange(dns, token(), token())
                for connection in connections:
                    connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return _truth(
            folder,
            ("veth1", "docker0", "eth0"),
            ("veth-o1", "br-xyz", "eth0"),
            ("veth1", "docker0", "br-xyz", "veth-o1"),
        )


def macvlan(folder: Path) -> Truth:
    """A macvlan container beside a masqueraded one: its packets pass eth0 as they are."""
    with lab(clients=1, others=1, bridge_netfilter=False) as net:
        rules.docker_nat(net.router)
        (one,), (other,) = net.clients, net.others
        topology.macvlan(net.router, "eth0", other, "203.0.113.77", topology.GATEWAY)
        udp, tcp = UdpServer(net.internet, SERVERS[0], 53), TcpServer(net.internet, SERVERS[0], 80)
        pingers = [Pinger(host, SERVERS[0], 1) for host in (one, other)]
        clients = [UdpClient(host, 40000, SERVERS[0], 53) for host in (one, other)]
        with closing_all(udp, tcp, *pingers, *clients), Recording.into(folder) as recording:
            recording.conntrack(net.router, _CONNTRACK)
            recording.capture(other, "mv0")
            for point in ("docker0", "eth0"):
                recording.capture(net.router, point)
            connections = [TcpConnection(host, 41000, tcp, (SERVERS[0], 80)) for host in (one, other)]
            for seq in range(2):
                for pinger in pingers:
                    pinger.ping(seq)
                for client in clients:
                    client.exchange(udp, token(), token())
                for connection in connections:
                    connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return _truth(folder, ("docker0", "eth0"), ("mv0", "eth0"))


def redirect_seen_at_the_bridge(folder: Path) -> Truth:
    """REDIRECT to the host under bridge netfilter: requests change between veth and bridge, answers do not."""
    _needs_bridge_netfilter()
    with lab(clients=1) as net:
        rules.docker_nat(net.router)
        rules.redirect(net.router, "docker0", "tcp", 80, 3128)
        rules.redirect(net.router, "docker0", "udp", 53, 5353)
        proxy, resolver = TcpServer(net.router, "", 3128), UdpServer(net.router, topology.BRIDGE, 5353)
        client = UdpClient(net.clients[0], 40000, SERVERS[0], 53)
        with closing_all(proxy, resolver, client), Recording.into(folder) as recording:
            recording.conntrack(net.router, _CONNTRACK)
            for point in ("veth1", "docker0", "eth0"):
                recording.capture(net.router, point)
            connection = TcpConnection(net.clients[0], 41000, proxy, (SERVERS[0], 80))
            for _ in range(4):
                client.exchange(resolver, token(), token())
                connection.exchange(token(60), token(90))
            connection.close()
        return _truth(folder, ("veth1", "docker0"))


def hairpin(folder: Path) -> Truth:
    """A container reaches another one, and itself, by the host's published port: docker0 shows both sides."""
    with lab(clients=2, bridge_netfilter=False) as net:
        topology.hairpin_mode(net.router, "veth2")
        rules.dnat(net.router, UPLINK, "tcp", 8080, f"{client_address(2)}:80")
        rules.dnat(net.router, UPLINK, "udp", 5353, f"{client_address(2)}:53")
        rules.masquerade(net.router, "docker0")
        rules.docker_masquerade(net.router, "172.17.0.0/16", "docker0")
        web, dns = TcpServer(net.clients[1], client_address(2), 80), UdpServer(net.clients[1], "", 53)
        udp = UdpServer(net.internet, SERVERS[0], 53)
        clients = [UdpClient(client, 40000, UPLINK, 5353) for client in net.clients]
        out = UdpClient(net.clients[0], 40001, SERVERS[0], 53)
        inward = UdpClient(net.internet, 40002, UPLINK, 5353)
        with closing_all(web, dns, udp, out, inward, *clients), Recording.into(folder) as recording:
            recording.conntrack(net.router, _CONNTRACK)
            for point in ("docker0", "eth0"):
                recording.capture(net.router, point)
            connections = [TcpConnection(client, 41000, web, (UPLINK, 8080)) for client in net.clients]
            for _ in range(4):
                for client in (*clients, inward):
                    client.exchange(dns, token(), token())
                out.exchange(udp, token(), token())
                for connection in connections:
                    connection.exchange(token(60), token(90))
            for connection in connections:
                connection.close()
        return _truth(folder, ("docker0", "eth0"))


def any_cooked(folder: Path) -> Truth:
    """One capture of all interfaces with SLL headers, which do not number them: all sightings at one point."""
    with lab(clients=2, bridge_netfilter=False) as net:
        _out_and_in(
            net, folder, lambda recording: recording.capture(net.router, "any", link_type="LINUX_SLL")
        )
        entries = tuple(parse_conntrack((folder / _CONNTRACK).read_text()))
        return Truth((Hop("any", "any", _CONNTRACK, entries, repeats=True),), unique_payloads=True)


def _needs_bridge_netfilter() -> None:
    if not topology.BRIDGE_NETFILTER.exists():
        raise NotHereError("kernel has no br_netfilter")


SCENARIOS = (
    all_points,
    all_points_bridge_netfilter,
    any_alone,
    any_alone_bridge_netfilter,
    two_networks,
    macvlan,
    redirect_seen_at_the_bridge,
    hairpin,
    any_cooked,
)

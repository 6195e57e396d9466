"""NAT in front of a tunnel, behind one, and a packet that is plain at one point and wrapped at the next."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from lab import rules
from lab.scenarios.icmp_errors import CLOSED, Prober, unlimited
from lab.scenarios.recording import kernel_truth, recorded
from lab.scenarios.tunnel_devices import DEVICE, FAR, FAR_V6, KINDS, NEAR_V6, Kind, tunnel
from lab.topology import GATEWAY, MIDDLE_FAR, MIDDLE_NEAR, SERVERS, SERVERS_V6, UPLINK, lab
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token

if TYPE_CHECKING:
    from pathlib import Path

    from lab.topology import Lab
    from lab.truth import Truth


def tunnel_vxlan(folder: Path) -> Truth:
    """Containers masqueraded into a VXLAN; docker0, the VXLAN device and the wrapped packets on eth0."""
    return _masqueraded_into(KINDS["vxlan"], folder, with_device=True)


def tunnel_geneve(folder: Path) -> Truth:
    """Containers masqueraded into a Geneve tunnel; docker0 plain, eth0 wrapped, with options."""
    return _masqueraded_into(KINDS["geneve"], folder)


def tunnel_gre(folder: Path) -> Truth:
    """Containers masqueraded into GRE with a key; docker0 plain, eth0 wrapped."""
    return _masqueraded_into(KINDS["gre"], folder)


def tunnel_gretap(folder: Path) -> Truth:
    """Containers masqueraded into Ethernet over GRE; docker0 plain, eth0 wrapped."""
    return _masqueraded_into(KINDS["gretap"], folder)


def tunnel_ipip(folder: Path) -> Truth:
    """Containers masqueraded into IP in IP; docker0 plain, eth0 wrapped."""
    return _masqueraded_into(KINDS["ipip"], folder)


def tunnel_6in4(folder: Path) -> Truth:
    """Containers masqueraded over IPv6 into a 6in4 tunnel; docker0 plain, eth0 wrapped."""
    return _masqueraded_into(KINDS["sit"], folder)


def overlay_vxlan(folder: Path) -> Truth:
    """An overlay: plain at the first host's bridge, VXLAN between the hosts, masqueraded by the second host."""
    return _overlay(KINDS["vxlan"], folder)


def overlay_gre(folder: Path) -> Truth:
    """The same with GRE and a key."""
    return _overlay(KINDS["gre"], folder)


def overlay_unwrapped(folder: Path) -> Truth:
    """VXLAN between two hosts, and its device at the second one: plain, wrapped, unwrapped, masqueraded."""
    return _overlay(KINDS["vxlan"], folder, with_device=True)


def _masqueraded_into(kind: Kind, folder: Path, *, with_device: bool = False) -> Truth:
    v6 = kind.version == 6
    server = SERVERS_V6[0] if v6 else SERVERS[0]
    with lab(clients=2, ipv6=v6) as net, tunnel(kind, ((net.router, UPLINK), (net.internet, GATEWAY))):
        if v6:
            net.router.run(f"ip -6 route add {server}/128 via {FAR_V6} dev {DEVICE}")
            rules.masquerade_v6(net.router, "fd00:17::/64")
            net.router.run(
                f"ping -6 -c 1 -W 5 -I {NEAR_V6} {FAR_V6}"
            )  # neighbours found before the recording
        else:
            rules.docker_nat(net.router)
            net.router.run(f"ip route add {server}/32 via {FAR} dev {DEVICE}")
            net.router.run(f"ping -c 1 -W 5 {FAR}")
        if with_device:
            net.hops[0] = (net.router, "docker0", DEVICE)
        with recorded(net, folder) as recording:
            if with_device:
                recording.capture(net.router, "eth0")
            _talk(net, server)
        return kernel_truth(net, folder)


def _overlay(kind: Kind, folder: Path, *, with_device: bool = False) -> Truth:
    with lab(clients=2, hops=2) as net:
        ends = ((net.router, MIDDLE_NEAR), (net.outer_router, MIDDLE_FAR))
        with tunnel(kind, ends):
            net.router.run(f"ip route add {SERVERS[0]}/32 via {FAR} dev {DEVICE}")
            net.outer_router.run(f"ip route add 172.17.0.0/16 dev {DEVICE} via 10.200.0.1")
            rules.masquerade(net.outer_router, "eth0")
            net.router.run(f"ping -c 1 -W 5 {FAR}")
            if with_device:
                net.hops[1] = (net.outer_router, DEVICE, "eth0")
            with recorded(net, folder) as recording:
                if with_device:
                    recording.capture(net.outer_router, DEVICE)
                _talk(net, SERVERS[0])
        return kernel_truth(net, folder)


def _talk(net: Lab, server: str) -> None:
    """Ping with equal ids, UDP and TCP from equal ports: what NAT must tell apart."""
    tcp, udp = TcpServer(net.internet, server, 80), UdpServer(net.internet, server, 53)
    pingers = [Pinger(client, server, 1) for client in net.clients]
    with closing_all(tcp, udp, *pingers):
        for seq in range(3):
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


def tunnel_errors_vxlan(folder: Path) -> Truth:
    """Errors inside a VXLAN: plain at docker0, wrapped at eth0, quoting flows of two containers with equal ports."""
    return _refused_beyond(KINDS["vxlan"], folder)


def tunnel_errors_gre(folder: Path) -> Truth:
    """The same with GRE and a key."""
    return _refused_beyond(KINDS["gre"], folder)


def tunnel_errors_ipip(folder: Path) -> Truth:
    """The same with IP in IP."""
    return _refused_beyond(KINDS["ipip"], folder)


def tunnel_errors_6in4(folder: Path) -> Truth:
    """The same over IPv6 in a 6in4 tunnel."""
    return _refused_beyond(KINDS["sit"], folder)


def _refused_beyond(kind: Kind, folder: Path) -> Truth:
    """A server at the tunnel's far end refuses datagrams."""
    v6 = kind.version == 6
    server = SERVERS_V6[0] if v6 else SERVERS[0]
    with lab(clients=2, ipv6=v6) as net, tunnel(kind, ((net.router, UPLINK), (net.internet, GATEWAY))):
        unlimited(net)
        if v6:
            net.router.run(f"ip -6 route add {server}/128 via {FAR_V6} dev {DEVICE}")
            rules.masquerade_v6(net.router, "fd00:17::/64")
            net.router.run(f"ping -6 -c 1 -W 5 -I {NEAR_V6} {FAR_V6}")
        else:
            rules.docker_nat(net.router)
            net.router.run(f"ip route add {server}/32 via {FAR} dev {DEVICE}")
            net.router.run(f"ping -c 1 -W 5 {FAR}")
        refused = [Prober(client, 40000, (server, CLOSED)) for client in net.clients]
        other = [Prober(client, 40001, (server, CLOSED)) for client in net.clients]
        with closing_all(*refused, *other), recorded(net, folder):
            for _ in range(3):
                for prober in (*refused, *other):
                    assert prober.provoke(token()) == errno.ECONNREFUSED
        return kernel_truth(net, folder)


SCENARIOS = (
    tunnel_errors_vxlan,
    tunnel_errors_gre,
    tunnel_errors_ipip,
    tunnel_errors_6in4,
    tunnel_vxlan,
    tunnel_geneve,
    tunnel_gre,
    tunnel_gretap,
    tunnel_ipip,
    tunnel_6in4,
    overlay_vxlan,
    overlay_gre,
    overlay_unwrapped,
)

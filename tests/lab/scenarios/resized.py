"""Segmentation offload and fragments: packets that have other sizes on the other side of the router.

A scenario records whole packets of random bytes, so that the oracle can compare the bytes themselves.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import dpkt

from lab import rules, topology
from lab.pieces import SEGMENT
from lab.scenarios.helpers import give_helper
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.topology import SERVERS, SERVERS_V6, UPLINK, client_address, lab
from lab.traffic import Pinger, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, ftp_port

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lab.recorder import Recording
    from lab.topology import Lab, Namespace
    from lab.truth import Truth

#: Silence between the last packet that may be lost and the packet that shows the capture still ran.
AFTER_LOSS_S = 0.3

#: Trains that all say the same are told by the pause between them.
TRAINS_APART_S = 0.005
LONGEST_PAUSE_NS = 20_000
FILLING = b"\xa5"

_CUT, _WHOLE = "tso off gso off", "tso on gso on"
_MERGE, _ALONE = "gro on", "gro off"
_BYTES = random.Random(1)


def _offload(host: Namespace, interface: str, *settings: str) -> None:
    for setting in settings:
        host.run(f"ethtool -K {interface} {setting}")


def _far(net: Lab, folder: Path) -> AbstractContextManager[Recording]:
    """Record docker0, and eth0 where the packets arrive: at the host behind the router's eth0."""
    return recorded(net, folder, outside=net.internet)


def tcp_segmented(folder: Path, *, size: int = 4_400) -> Truth:
    """Super-frames on docker0, segments on eth0: cut on the way out, merged by GRO on the way in."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        _offload(net.router, "eth0", _CUT, _MERGE)
        _offload(net.internet, "eth0", _CUT, _ALONE)
        _exchange(net, folder, SERVERS[0], size)
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def tcp_segmented_ipv6(folder: Path, *, size: int = 4_400) -> Truth:
    """The same over IPv6, where no identification counts the segments."""
    with lab(clients=2, offload=True, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        _offload(net.router, "eth0", _CUT, _MERGE)
        _offload(net.internet, "eth0", _CUT, _ALONE)
        _exchange(net, folder, SERVERS_V6[0], size)
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def tcp_segmented_behind_synproxy(folder: Path) -> Truth:
    """SYNPROXY shifts every number of the server, and super-frames are cut and merged on the way as well."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        rules.synproxy(net.router, 80)
        _offload(net.router, "eth0", _CUT, _MERGE)
        _offload(net.internet, "eth0", _CUT, _ALONE)
        _exchange(net, folder, SERVERS[0], 8_000)
        return kernel_truth(net, folder, unique_payloads=False, resized=True, keeps="proxied")


def tcp_segmented_behind_a_helper(folder: Path) -> Truth:
    """FTP helper: a rewritten PORT shifts what follows on the control connection, long answers as super-frames."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        _offload(net.router, "eth0", _CUT, _MERGE)
        _offload(net.internet, "eth0", _CUT, _ALONE)
        give_helper(net.router, "tcp", 21, "ftp")
        control = TcpServer(net.internet, SERVERS[0], 21)
        with closing_all(control), _far(net, folder):
            for n, client in enumerate(net.clients, 1):
                connection = TcpConnection(client, 40000, control, (SERVERS[0], 21))
                connection.exchange(b"USER anonymous\r\n", b"230 Guest login ok.\r\n")
                for port in (50_000 + 10 * n, 50_001 + 10 * n):
                    asked, arrives = (ftp_port(address, port) for address in (client_address(n), UPLINK))
                    connection.exchange(asked, b"200 PORT command successful.\r\n", arrives=arrives)
                    # as STAT of a folder is answered, and what a client that talks much asks
                    connection.exchange(_lines(300), _lines(4_400))
                    connection.exchange(_lines(3_200), _lines(300))
                connection.close()
        return kernel_truth(net, folder, unique_payloads=False, resized=True, keeps="stream")


def _lines(size: int) -> bytes:
    """Return printable lines of random letters."""
    letters = bytes(97 + n % 26 for n in _BYTES.randbytes(size))
    return b"\r\n".join(letters[at : at + 70] for at in range(0, size - 2, 72)) + b"\r\n"


def tcp_merged(folder: Path, *, size: int = 4_400) -> Truth:
    """Segments on docker0, super-frames on eth0: merged on the way out, cut on the way in."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        for client in net.clients:
            _offload(client, "eth0", _CUT)
        for port in ("veth1", "veth2"):
            _offload(net.router, port, _CUT, _ALONE)
        _offload(net.router, "docker0", _CUT)
        _offload(net.router, "eth0", _CUT, _ALONE)
        _offload(net.internet, "eth0", _WHOLE, _MERGE)
        _exchange(net, folder, SERVERS[0], size)
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def tcp_cut_elsewhere(folder: Path, *, size: int = 6_200) -> Truth:
    """Super-frames on both sides, cut in between and merged again at other places."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        _offload(net.router, "eth0", _CUT, _MERGE)
        _offload(net.internet, "eth0", _CUT, _MERGE)
        # two full segments at most: what docker0 shows as one super-frame arrives as several
        net.internet.run("ip link set eth0 gro_max_size 4000")
        _exchange(net, folder, SERVERS[0], size)
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def tcp_segmented_with_losses(folder: Path) -> Truth:
    """Super-frames of which the router drops some: the same bytes are sent again, and cross."""
    with lab(clients=1, offload=True) as net:
        rules.docker_nat(net.router)
        _offload(net.router, "eth0", _CUT, _ALONE)
        _offload(net.internet, "eth0", _CUT, _ALONE)
        # by size, so that only data is lost, and every third time, so that what is sent again comes through
        net.router.run(
            "iptables -w -A FORWARD -i docker0 -p tcp -m length --length 2000:65535 "
            "-m statistic --mode nth --every 3 --packet 1 -j DROP"
        )
        tcp = TcpServer(net.internet, SERVERS[0], 80)
        with closing_all(tcp), _far(net, folder):
            connection = TcpConnection(net.clients[0], 40000, tcp, (SERVERS[0], 80))
            for _ in range(3):
                connection.exchange(_BYTES.randbytes(4_400), _BYTES.randbytes(100))
            time.sleep(AFTER_LOSS_S)
            connection.exchange(_BYTES.randbytes(100), _BYTES.randbytes(100))
            connection.close()
        return kernel_truth(
            net, folder, dropped=rules.dropped(net.router), unique_payloads=False, resized=True
        )


def _exchange(net: Lab, folder: Path, server: str, size: int) -> None:
    """Two containers with one source port send and receive `size` random bytes, and half as many."""
    tcp = TcpServer(net.internet, server, 80)
    with closing_all(tcp), _far(net, folder):
        connections = [TcpConnection(client, 40000, tcp, (server, 80)) for client in net.clients]
        for connection in connections:
            connection.exchange(_BYTES.randbytes(size), _BYTES.randbytes(size))
            size //= 2
        for connection in connections:
            connection.close()


def fragments_reassembled(folder: Path) -> Truth:
    """Large UDP datagrams and pings: bridge netfilter shows them whole on docker0, eth0 shows fragments."""
    if not topology.BRIDGE_NETFILTER.exists():
        raise NotHereError("kernel has no br_netfilter")
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        _fragmented(net, folder, SERVERS[0])
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def fragments_kept(folder: Path) -> Truth:
    """The same without bridge netfilter: fragments of one size on both sides."""
    with lab(clients=2, bridge_netfilter=False) as net:
        rules.docker_nat(net.router)
        _fragmented(net, folder, SERVERS[0])
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def fragments_smaller_outside(folder: Path) -> Truth:
    """Fragments of 1500 bytes on docker0, of 1000 bytes on eth0, whose link takes no more."""
    with lab(clients=2, bridge_netfilter=False) as net:
        rules.docker_nat(net.router)
        for host in (net.router, net.internet):
            host.run("ip link set eth0 mtu 1000")
        _fragmented(net, folder, SERVERS[0])
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def fragments_ipv6(folder: Path) -> Truth:
    """Large UDP datagrams and pings over IPv6, where the router gives every fragmented datagram a new id."""
    with lab(clients=2, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        _fragmented(net, folder, SERVERS_V6[0])
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def _fragmented(net: Lab, folder: Path, server: str) -> None:
    """Two containers with one source port and one ICMP id exchange datagrams of one and several fragments."""
    udp = UdpServer(net.internet, server, 53)
    clients = [UdpClient(client, 40000, server, 53) for client in net.clients]
    pingers = [Pinger(client, server, 1, payload=_BYTES.randbytes(2_000)) for client in net.clients]
    with closing_all(udp, *clients, *pingers), recorded(net, folder):
        for client in clients:
            client.exchange(udp, _BYTES.randbytes(3_000), _BYTES.randbytes(1_800))
        for pinger in pingers:
            pinger.ping(0)


def udp_segmented(folder: Path) -> Truth:
    """UDP_SEGMENT: one large datagram on the sender's side, many on the other, both ways."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        _segmented_datagrams(net, folder, SERVERS[0])
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def udp_segmented_ipv6(folder: Path) -> Truth:
    """The same over IPv6: nothing numbers the datagrams, their order and lengths must do."""
    with lab(clients=2, offload=True, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        _segmented_datagrams(net, folder, SERVERS_V6[0])
        return kernel_truth(net, folder, unique_payloads=False, resized=True)


def udp_segmented_constant(folder: Path) -> Truth:
    """UDP_SEGMENT of one byte again and again, both ways: datagrams that say the same, and share identifications."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        _constant_trains(net, folder, SERVERS[0])
        return kernel_truth(net, folder, unique_payloads=False, tied=_paused(folder), resized=True)


def udp_segmented_constant_ipv6(folder: Path) -> Truth:
    """The same over IPv6: pieces that nothing at all tells apart but their order."""
    with lab(clients=2, offload=True, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        _constant_trains(net, folder, SERVERS_V6[0])
        return kernel_truth(net, folder, unique_payloads=False, tied=_paused(folder), resized=True)


def udp_segmented_constant_with_losses(folder: Path) -> Truth:
    """The same over IPv4, where the router drops every third large datagram on its way out."""
    with lab(clients=2, offload=True) as net:
        rules.docker_nat(net.router)
        net.router.run(
            "iptables -w -A FORWARD -i docker0 -p udp -m length --length 200:65535 "
            "-m statistic --mode nth --every 3 --packet 1 -j DROP"
        )
        _constant_trains(net, folder, SERVERS[0], rounds=3)
        return kernel_truth(
            net,
            folder,
            dropped=rules.dropped(net.router),
            unique_payloads=False,
            tied=_paused(folder),
            resized=True,
        )


def _constant_trains(net: Lab, folder: Path, server: str, rounds: int = 1) -> None:
    """Two containers with one source port send trains that all say the same, and get such answers."""
    _cut_datagrams(net)
    udp = UdpServer(net.internet, server, 53)
    clients = [UdpClient(client, 40000, server, 53) for client in net.clients]
    with closing_all(udp, *clients), _far(net, folder):
        for client in clients:
            client.send(_BYTES.randbytes(60))
            _, peer = udp.receive()
            for size in (930, 400, 300, 250) * rounds:
                client.send(FILLING * size, segment_bytes=SEGMENT)
                time.sleep(TRAINS_APART_S)
                udp.send(FILLING * (size - 130), peer, segment_bytes=SEGMENT)
                time.sleep(TRAINS_APART_S)
            time.sleep(AFTER_LOSS_S)
            udp.drain()
            client.drain()
            client.exchange(udp, _BYTES.randbytes(60), _BYTES.randbytes(60))


def _paused(folder: Path) -> bool:
    """Whether the machine was so busy that it made a pause inside a train, which then looks like two."""
    for path in folder.glob("*.pcap"):
        with path.open("rb") as file:
            times = [
                int(time * 10**9) for time, frame in dpkt.pcap.Reader(file) if frame.endswith(FILLING * 20)
            ]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        if any(LONGEST_PAUSE_NS < gap < TRAINS_APART_S * 5 * 10**8 for gap in gaps):
            return True
    return False


def _cut_datagrams(net: Lab) -> None:
    """Have the router cut large datagrams whichever way they go; what the far host sends its own capture shows whole."""
    for interface in ("eth0", "docker0"):
        _offload(net.router, interface, _CUT, "tx-udp-segmentation off")
    _offload(net.internet, "eth0", _WHOLE, _ALONE)


def _segmented_datagrams(net: Lab, folder: Path, server: str) -> None:
    """Two containers with one source port send bursts of segmented datagrams, and get such answers."""
    _cut_datagrams(net)
    udp = UdpServer(net.internet, server, 53)
    clients = [UdpClient(client, 40000, server, 53) for client in net.clients]
    with closing_all(udp, *clients), _far(net, folder):
        for client in clients:
            for size in (930, 400, 250):
                client.send(_BYTES.randbytes(size), segment_bytes=SEGMENT)
            received = -(-930 // 100) + -(-400 // 100) + -(-250 // 100)
            peers = [udp.receive() for _ in range(received)]
            for size in (730, 200):
                udp.send(_BYTES.randbytes(size), peers[0][1], segment_bytes=SEGMENT)
            for _ in range(8 + 2):
                client.receive()
            client.exchange(udp, _BYTES.randbytes(60), _BYTES.randbytes(60))


SCENARIOS = (
    udp_segmented,
    udp_segmented_ipv6,
    udp_segmented_constant,
    udp_segmented_constant_ipv6,
    udp_segmented_constant_with_losses,
    fragments_reassembled,
    fragments_kept,
    fragments_smaller_outside,
    fragments_ipv6,
    tcp_segmented,
    tcp_segmented_ipv6,
    tcp_segmented_behind_synproxy,
    tcp_segmented_behind_a_helper,
    tcp_merged,
    tcp_cut_elsewhere,
    tcp_segmented_with_losses,
)

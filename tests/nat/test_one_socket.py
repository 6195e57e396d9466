"""A capture of `any` shows what passes two interfaces at one instant in the order in which it passed them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dpkt
import pytest
from simulation import EPOCH_NS, address, write_pcap

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

SLL2 = 276


def cooked(interface: int, packet: bytes, *, sent: bool) -> bytes:
    """Return a record with an SLL2 header (tcpdump.org/linktypes/LINKTYPE_LINUX_SLL2.html)."""
    kind = b"\x04" if sent else b"\0"
    return b"\x08\0\0\0" + interface.to_bytes(4, "big") + b"\0\1" + kind + b"\6" + bytes(8) + packet


def datagram(src: str, dst: str, sport: int, number: int, ttl: int) -> bytes:
    udp = dpkt.udp.UDP(sport=sport, dport=514, data=b"message number %d" % number)
    udp.ulen = len(udp)
    ip = dpkt.ip.IP(src=address(src), dst=address(dst), p=17, ttl=ttl, id=7_000 + 13 * number, data=udp)
    ip.len = len(ip)
    return bytes(ip)


def write_any(path: Path, packets: list[tuple[int, bytes]]) -> None:
    write_pcap(path, packets)
    raw = bytearray(path.read_bytes())
    raw[20:24] = SLL2.to_bytes(4, "little")
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("veth", [2, 4])
@pytest.mark.parametrize("bridge_first", [False, True])
def test_veth_before_bridge_whatever_their_numbers(veth: int, bridge_first: bool, tmp_path: Path) -> None:
    """Packets of one direction, one time and one TTL at both: nothing else says which came first."""
    bridge, uplink, packets = 3, 5, []
    if bridge_first:
        # the host itself spoke first, by the bridge and out of the veth
        told = datagram("172.17.0.1", "172.17.0.9", 1000, 99, 64)
        packets += [(EPOCH_NS - 10**9, cooked(each, told, sent=True)) for each in (bridge, veth)]
    for number in range(8):
        now_ns = EPOCH_NS + number * 10_000_000
        inside = datagram("172.17.0.2", "198.51.100.1", 40_000, number, 64)
        outside = datagram("203.0.113.10", "198.51.100.1", 40_000, number, 63)
        packets += [(now_ns, cooked(each, inside, sent=False)) for each in (veth, bridge)]
        packets.append((now_ns + 20_000, cooked(uplink, outside, sent=True)))
    write_any(tmp_path / "any.pcap", packets)
    report = nattrace.analyze(tmp_path / "any.pcap")
    flow = next(flow for flow in report.flows if flow.initiator.src == "172.17.0.2")
    assert flow.path == (f"any:{veth}", f"any:{bridge}", f"any:{uplink}")
    (translation,) = flow.translations
    assert (translation.from_point, translation.to_point) == (f"any:{bridge}", f"any:{uplink}")
    first, second = (crossing for crossing in flow.crossings if crossing.direction == "original")
    assert not first.latency.measurable
    assert second.latency.median_ns == 20_000

"""Packets in tunnels: found behind every kind of header, refused where the header or what follows is not right.

Frames are put together here byte by byte from the standards; what lies inside is known, so every field of the
carried packet has a value that the decoder did not compute.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import dpkt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest.test_decode_twin import records_of

from nattrace.encapsulation import encapsulation_name
from nattrace.ingest.decode import comparable_bytes, decode, tunnel_header_bytes
from nattrace.ingest.source import Inner, ReadOptions
from nattrace.ingest.tunnels import TUNNEL_DEPTH_LIMIT
from nattrace.table import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

RAW = 101
OUTER_V4 = (bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2)))
OUTER_V6 = (bytes(15) + b"\1", bytes(15) + b"\2")
MAC = bytes(12)


def ipv4(
    payload: bytes, protocol: int, *, source: bytes = b"\x0a\0\0\1", more: bool = False, at: int = 0
) -> bytes:
    place = more << 13 | at // 8
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 77, place, 61, protocol, 0)
    return head + source + b"\x0a\0\0\2" + payload


def ipv6(payload: bytes, following: int) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), following, 63) + OUTER_V6[0] + OUTER_V6[1] + payload


def udp(payload: bytes, dport: int, sport: int = 50000) -> bytes:
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload


def tcp(payload: bytes = b"what the packet inside says") -> bytes:
    return bytes(dpkt.tcp.TCP(sport=1234, dport=80, seq=7, ack=9, flags=24, win=500, data=payload))


PLAIN = ipv4(tcp(), 6)
PLAIN_V6 = ipv6(tcp(), 6)


def ethernet(packet: bytes, kind: int = 0x0800) -> bytes:
    return MAC + struct.pack(">H", kind) + packet


def in_udp(header: bytes, packet: bytes, port: int) -> bytes:
    return ipv4(udp(header + packet, port), 17)


def gre(kind: int, *, checksum: bool = False, key: int | None = None, sequence: bool = False) -> bytes:
    flags = checksum << 15 | (key is not None) << 13 | sequence << 12
    header = struct.pack(">HH", flags, kind)
    header += bytes(4) * checksum
    header += struct.pack(">I", key) if key is not None else b""
    return header + struct.pack(">I", 99) * sequence


def vxlan(vni: int, flags: int = 0x08000000) -> bytes:
    return struct.pack(">II", flags, vni << 8)


def geneve(vni: int, options: bytes = b"", kind: int = 0x6558) -> bytes:
    return struct.pack(">BBHI", len(options) // 4, 0, kind, vni << 8) + options


def gtp(packet: bytes, teid: int, flags: int = 0x30, extra: bytes = b"", kind: int = 255) -> bytes:
    return struct.pack(">BBHI", flags, kind, len(extra) + len(packet), teid) + extra + packet


def read(frames: Sequence[bytes], wire: int | None = None) -> list[Inner]:
    inner: list[list[Inner]] = []
    decode(records_of(RAW, [(f, len(f) if wire is None else wire) for f in frames]), ReadOptions(), inner)
    return [Inner.concatenate(parts) for parts in inner]


PPP = b"\xff\x03\x00\x21"
EXTENSIONS = b"\0\1\0\x85" + b"\1\x10\x20\xc0" + b"\2" + bytes(6) + b"\0"

FRAMES: dict[str, tuple[bytes, str]] = {
    "IP in IP": (ipv4(PLAIN, 4), "ipip"),
    "IPv4 in IPv6": (ipv6(PLAIN, 4), "4in6"),
    "GRE": (ipv4(gre(0x0800) + PLAIN, 47), "gre"),
    "GRE with a key of 0": (ipv4(gre(0x0800, key=0) + PLAIN, 47), "gre 0"),
    "GRE with everything": (
        ipv4(gre(0x0800, checksum=True, key=4_000_000_000, sequence=True) + PLAIN, 47),
        "gre 4000000000",
    ),
    "GRE over IPv6": (ipv6(gre(0x0800, sequence=True) + PLAIN, 47), "gre"),
    "GRE with Ethernet": (ipv4(gre(0x6558, key=0x2A00) + ethernet(PLAIN), 47), "gre 10752"),
    "GRE in UDP": (in_udp(gre(0x0800, key=5), PLAIN, 4754), "gre 5"),
    "ERSPAN I": (ipv4(gre(0x88BE) + ethernet(PLAIN), 47), "erspan"),
    "ERSPAN II": (
        ipv4(gre(0x88BE, sequence=True) + struct.pack(">HHI", 0x1000, 513, 0) + ethernet(PLAIN), 47),
        "erspan 513",
    ),
    "ERSPAN III with a subheader": (
        ipv4(
            gre(0x22EB, sequence=True) + struct.pack(">HHIHHQ", 0x2000, 7, 0, 0, 1, 0) + ethernet(PLAIN), 47
        ),
        "erspan 7",
    ),
    "PPTP": (
        ipv4(struct.pack(">HHHHII", 0x3081, 0x880B, len(PPP + PLAIN), 6016, 1, 1) + PPP + PLAIN, 47),
        "pptp 6016",
    ),
    "VXLAN": (in_udp(vxlan(42), ethernet(PLAIN), 4789), "vxlan 42"),
    "VXLAN on Linux's old port": (in_udp(vxlan(1), ethernet(PLAIN), 8472), "vxlan 1"),
    "VXLAN with a group policy": (in_udp(vxlan(9, 0x88080017), ethernet(PLAIN), 4789), "vxlan 9"),
    "VXLAN-GPE": (in_udp(vxlan(9, 0x0C000001), PLAIN, 4790), "vxlan 9"),
    "VXLAN with a VLAN tag": (
        in_udp(vxlan(0xFFFFFF), ethernet(b"\0\7\x08\0" + PLAIN, 0x8100), 4789),
        "vxlan 16777215",
    ),
    "Geneve": (in_udp(geneve(5001), ethernet(PLAIN), 6081), "geneve 5001"),
    "Geneve with options": (in_udp(geneve(3, bytes(252)), ethernet(PLAIN), 6081), "geneve 3"),
    "Geneve without Ethernet": (in_udp(geneve(3, kind=0x0800), PLAIN, 6081), "geneve 3"),
    "GTP-U": (in_udp(gtp(PLAIN, 1050199), b"", 2152), "gtp-u 1050199"),
    "GTP-U with a sequence number": (in_udp(gtp(PLAIN, 1, 0x32, b"\0\1\0\0"), b"", 2152), "gtp-u 1"),
    "GTP-U with extension headers": (in_udp(gtp(PLAIN, 8, 0x34, EXTENSIONS), b"", 2152), "gtp-u 8"),
    "L2TP": (in_udp(struct.pack(">HHH", 2, 7, 1) + PPP, PLAIN, 1701), "l2tp 7/1"),
    "L2TP with everything": (
        in_udp(
            struct.pack(">HHHHHHH", 0x4A02, 14 + 6 + 1 + len(PLAIN), 65535, 2, 1, 1, 6)
            + b"\xee" * 6
            + b"\x21",
            PLAIN,
            1701,
        ),
        "l2tp 65535/2",
    ),
}
FRAMES_V6: dict[str, tuple[bytes, str]] = {
    "6in4": (ipv4(PLAIN_V6, 41), "6in4"),
    "IPv6 in IPv6": (ipv6(PLAIN_V6, 41), "6in6"),
    "Teredo": (in_udp(b"", PLAIN_V6, 3544), "teredo"),
    "Teredo with authentication and origin": (
        in_udp(b"\0\1\0\0" + bytes(9) + b"\0\0" + bytes(6), PLAIN_V6, 3544),
        "teredo",
    ),
    "GRE with IPv6": (ipv4(gre(0x86DD) + PLAIN_V6, 47), "gre"),
}


@pytest.mark.parametrize(("frame", "name"), FRAMES.values(), ids=FRAMES.keys())
def test_an_ipv4_packet_is_read_behind_every_tunnel_header(frame: bytes, name: str) -> None:
    (found,) = read([frame])

    assert [encapsulation_name(int(w)) for w in found.wrap] == [name]
    table = found.table
    expected = {
        "version": 4, "src": 0x0A000001, "dst": 0x0A000002, "protocol": 6, "ttl": 61, "ip_id": 77,
        "ip_length": len(PLAIN), "sport": 1234, "dport": 80, "seq": 7, "ack": 9, "tcp_flags": 24, "window": 500,
        "payload_length": 27, "frame": 1, "captured_length": len(frame), "wire_length": len(frame),
    }  # fmt: skip
    assert {field: int(getattr(table, field)[0]) for field in expected} == expected


@pytest.mark.parametrize(("frame", "name"), FRAMES.values(), ids=FRAMES.keys())
def test_a_packet_in_a_tunnel_is_worth_the_same_as_the_packet_alone(frame: bytes, name: str) -> None:
    (found,) = read([frame])
    alone, _ = decode(records_of(RAW, [(PLAIN, len(PLAIN))]), ReadOptions())

    same = [field for field in COLUMNS if field not in ("captured_length", "wire_length")]
    assert {f: getattr(found.table, f)[0] for f in same} == {f: getattr(alone, f)[0] for f in same}, name


@pytest.mark.parametrize(("frame", "name"), FRAMES_V6.values(), ids=FRAMES_V6.keys())
def test_an_ipv6_packet_is_read_behind_a_tunnel_header(frame: bytes, name: str) -> None:
    (found,) = read([frame])

    assert [encapsulation_name(int(w)) for w in found.wrap] == [name]
    assert (found.table.version[0], found.table.ttl[0], found.table.dport[0]) == (6, 63, 80)


REFUSED: dict[str, bytes] = {
    "VXLAN without its flag": in_udp(vxlan(42, 0), ethernet(PLAIN), 4789),
    "VXLAN with ARP": in_udp(vxlan(42), ethernet(bytes(28), 0x0806), 4789),
    "another program on VXLAN's port": in_udp(b"\x08\0\0\0hello, world", b"", 4789),
    "VXLAN in the answer's direction": ipv4(udp(vxlan(42) + ethernet(PLAIN), 50000, sport=4789), 17),
    "Geneve of version 1": in_udp(b"\x40" + geneve(1)[1:], ethernet(PLAIN), 6081),
    "GRE of version 0 with source routing": ipv4(b"\x40\0\x08\0" + bytes(4) + PLAIN, 47),
    "GRE that says IPv6 and carries IPv4": ipv4(gre(0x86DD) + PLAIN, 47),
    "GTP-U with a wrong length": in_udp(gtp(PLAIN, 1), b"x", 2152),
    "a GTP-U echo request": in_udp(gtp(b"\0\0\0\0", 0, kind=1), b"", 2152),
    "GTP-U with an extension header of length 0": in_udp(
        gtp(PLAIN, 8, 0x34, b"\0\1\0\x85\0\0\0\0"), b"", 2152
    ),
    "an L2TP control message": in_udp(struct.pack(">HHHHHH", 0xC802, 12, 1, 0, 0, 0), b"", 1701),
    "L2TP with PPP's own protocol": in_udp(
        struct.pack(">HHH", 2, 7, 1) + b"\xff\x03\xc0\x21", b"\1\1\0\4", 1701
    ),
    "IP in IP of the wrong version": ipv4(PLAIN_V6, 4),
    "a packet longer than what carries it": ipv4(PLAIN[:-1], 4),
    "a later fragment": ipv4(PLAIN, 4, at=1480),
    "ESP": ipv4(PLAIN, 50),
}


@pytest.mark.parametrize("frame", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_tunnel_header_or_carries_no_ip_gives_no_packet(frame: bytes) -> None:
    assert read([frame]) == []


def test_carried_packets_keep_the_order_of_their_frames_whatever_carries_them() -> None:
    frames = [frame for frame, _ in (*FRAMES.values(), *FRAMES_V6.values())] * 3
    frames = [frame for pair in zip(frames, [PLAIN] * len(frames), strict=True) for frame in pair]

    (found,) = read(frames)

    assert found.table.frame.tolist() == list(range(1, len(frames), 2))
    names = [name for _, name in (*FRAMES.values(), *FRAMES_V6.values())] * 3
    assert [encapsulation_name(int(w)) for w in found.wrap] == names


def test_every_depth_is_a_table_of_its_own() -> None:
    in_vxlan = in_udp(vxlan(7), ethernet(PLAIN), 4789)
    in_gre = ipv4(gre(0x0800, key=1) + in_vxlan, 47)

    first, second = read([in_gre, in_vxlan, PLAIN])

    assert [encapsulation_name(int(w)) for w in first.wrap] == ["gre 1", "vxlan 7"]
    assert (first.table.frame.tolist(), first.table.protocol.tolist()) == ([1, 2], [17, 6])
    assert [encapsulation_name(int(w)) for w in second.wrap] == ["vxlan 7"]
    assert second.table.frame.tolist() == [1]


def test_a_packet_of_nothing_but_ip_headers_is_followed_to_the_limit_and_no_further() -> None:
    nested = PLAIN
    while len(nested) < 65_000:
        nested = ipv4(nested, 4)

    found = read([nested] * 50)

    assert [len(each.table) for each in found] == [50] * TUNNEL_DEPTH_LIMIT


def test_the_first_fragment_of_a_carrier_holds_a_packet_that_is_not_all_there() -> None:
    large = ipv4(tcp(bytes(3000)), 6)
    frames = [
        ipv4(large[:1480], 4, more=True),
        ipv4(udp(vxlan(1) + ethernet(large), 4789)[:1480], 17, more=True),
    ]

    (found,) = read(frames)

    assert found.table.payload_length.tolist() == [3000, 3000]
    assert found.table.ip_length.tolist() == [len(large)] * 2


@pytest.mark.parametrize(("frame", "name"), FRAMES.values(), ids=FRAMES.keys())
def test_a_capture_cut_anywhere_gives_the_same_packet_or_none(frame: bytes, name: str) -> None:
    needed = frame.index(PLAIN) + 24  # IP header and ports
    (found,) = read([frame[:snaplen] for snaplen in range(len(frame) + 1)], wire=len(frame))

    # frame 1 has 0 bytes
    assert found.table.frame.tolist() == list(range(needed + 1, len(frame) + 2)), name
    assert np.unique(found.wrap).size == 1
    for field in ("src", "dst", "sport", "dport", "ttl", "ip_length", "payload_length"):
        assert np.unique(getattr(found.table, field)).size == 1, field


def test_a_tunnel_leaves_fewer_comparable_bytes() -> None:
    frame = in_udp(vxlan(42), ethernet(PLAIN), 4789)
    records = records_of(RAW, [(frame[:96], len(frame)), (PLAIN[:40], len(PLAIN))])

    assert tunnel_header_bytes(records) == 20 + 8 + 8 + 14
    assert comparable_bytes(records) == 40
    assert comparable_bytes(records_of(RAW, [(frame[:85], len(frame))])) == 85 - 50


def test_a_tunnel_header_that_no_packet_follows_legibly_cuts_nothing() -> None:
    frame = in_udp(vxlan(42), ethernet(PLAIN), 4789)

    assert comparable_bytes(records_of(RAW, [(frame[:60], len(frame))])) == 60


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_changed_anywhere_give_packets_inside_their_frames_or_none(data: st.DataObject) -> None:
    frames = [frame for frame, _ in (*FRAMES.values(), *FRAMES_V6.values())]
    frame = bytearray(data.draw(st.sampled_from(frames)))
    for _ in range(data.draw(st.integers(1, 6))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    kept = bytes(frame[: data.draw(st.integers(0, len(frame)))])

    # the frames around it must be read as if it were not there
    found = read([PLAIN, frames[0], kept, frames[0]], wire=None)

    assert found[0].table.frame[0] == 2
    assert found[0].table.frame[-1] == 4
    assert np.isin(found[0].table.frame, [2, 3, 4]).all()
    assert len(found) <= TUNNEL_DEPTH_LIMIT
    for each in found:
        assert each.wrap.size == len(each.table)
        assert (np.diff(each.table.frame.astype(int)) > 0).all()

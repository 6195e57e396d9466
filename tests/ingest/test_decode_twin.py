"""The vectorised decoder against a slow and obvious twin: one packet at a time, plain integers, no numpy.

The twin is written from RFCs and `decode`'s documentation, not from the decoder. hypothesis feeds both with
frames that dpkt built, with header stacks that no library builds, and with both cut, mutated and padded.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

import dpkt
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nattrace.ingest.decode import comparable_bytes, decode
from nattrace.ingest.source import PADDING, ReadOptions, Records
from nattrace.table import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

LINK_TYPES = (0, 1, 9, 12, 14, 50, 51, 101, 104, 108, 113, 228, 229, 276)
M64 = (1 << 64) - 1

Frame = tuple[bytes, int]  # captured bytes, wire length


class Skip(Exception):  # noqa: N818  # it is an answer, not an error
    """The record is no row, for this reason."""


def records_of(link_type: int, frames: Sequence[Frame], fill: int = 0xA5) -> Records:
    """Lay frames into one buffer with rubbish before, between and after them, as a file would."""
    buffer = bytearray([fill]) * 7
    offsets = []
    for data, _ in frames:
        offsets.append(len(buffer))
        buffer += data + bytes([fill]) * 3
    buffer += bytes([fill]) * PADDING
    n = len(frames)
    return Records(
        point=0,
        link_type=link_type,
        buffer=np.frombuffer(bytes(buffer), np.uint8),
        offset=np.array(offsets, np.int64),
        captured_length=np.array([len(d) for d, _ in frames], np.uint32),
        wire_length=np.array([w for _, w in frames], np.uint32),
        time_ns=np.arange(n, dtype=np.int64) * 1000 + 1_700_000_000_000_000_000,
        frame=np.arange(1, n + 1, dtype=np.uint32),
    )


# ---------------------------------------------------------------- the twin: link layers


def u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def need(data: bytes, length: int) -> None:
    if len(data) < length:
        raise Skip("truncated")


def twin_link(link_type: int, data: bytes) -> int:
    """Return where IP begins."""
    if link_type in (12, 14, 101, 228, 229):
        return 0
    if link_type == 1:
        need(data, 14)
        return twin_ethertype(data, 14, u16(data, 12), 16)
    if link_type in (113, 276):
        need(data, 16 if link_type == 113 else 20)
        protocol, hardware = (
            (u16(data, 14), u16(data, 2)) if link_type == 113 else (u16(data, 0), u16(data, 8))
        )
        start = 16 if link_type == 113 else 20
        if hardware == 824:
            raise Skip("not-ip")
        if protocol == 4:
            return twin_llc(data, start, 16)
        if protocol <= 1500:
            raise Skip("not-ip")
        return twin_ethertype(data, start, protocol, 16)
    if link_type in (0, 108):
        need(data, 4)
        families = {int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big")}
        if families & {2, 10, 24, 28, 30}:
            return 4
        raise Skip("not-ip")
    if link_type == 51:
        return twin_ethertype(data, 0, 0x8864, 16)
    return twin_ppp(data, 0, 16, hdlc=True)


def twin_ethertype(data: bytes, at: int, kind: int, left: int) -> int:
    if kind in (0x0800, 0x86DD):
        return at
    if kind <= 1500:
        return twin_llc(data, at, left)
    following = kind in (0x8100, 0x88A8, 0x9100, 0x9200, 0x8864, 0x8847, 0x8848)
    if not following:
        names = {0x0806: "arp", 0x8035: "rarp", 0x8863: "pppoe-discovery", 0x888E: "eapol", 0x88CC: "lldp"}
        raise Skip(names.get(kind, "not-ip"))
    mpls = kind in (0x8847, 0x8848)
    if left == 0:
        raise Skip("mpls" if mpls else "link-depth")
    if mpls:
        need(data[at:], 5)
        if not data[at + 2] & 1:
            return twin_ethertype(data, at + 4, kind, left - 1)
        if data[at + 4] >> 4 in (4, 6):
            return at + 4
        raise Skip("not-ip")
    if kind == 0x8864:
        need(data[at:], 6)
        return twin_ppp(data, at + 6, left - 1, hdlc=False)
    need(data[at:], 4)
    return twin_ethertype(data, at + 4, u16(data, at + 2), left - 1)


def twin_llc(data: bytes, at: int, left: int) -> int:
    if left == 0:
        raise Skip("llc")
    need(data[at:], 3)
    if data[at : at + 3] == b"\x06\x06\x03":
        return at + 3
    if data[at : at + 3] == b"\xaa\xaa\x03" and data[at + 3 : at + 6].ljust(3, b"\0") in (
        b"\0\0\0",
        b"\0\0\xf8",
    ):
        need(data[at:], 8)
        kind = u16(data, at + 6)
        if kind <= 1500:
            raise Skip("not-ip")
        return twin_ethertype(data, at + 8, kind, left - 1)
    raise Skip("llc")


def twin_ppp(data: bytes, at: int, left: int, *, hdlc: bool) -> int:
    if left == 0:
        raise Skip("link-depth")
    need(data[at:], 1)
    if hdlc and data[at] in (0x0F, 0x8F) and data[at + 1 : at + 2] in (b"", b"\0"):
        need(data[at:], 4)
        kind = u16(data, at + 2)
        if kind <= 1500:
            raise Skip("not-ip")
        return twin_ethertype(data, at + 4, kind, left - 1)
    if data[at : at + 2] == b"\xff\x03":
        at += 2
    need(data[at:], 1)
    if data[at] & 1:
        protocol, at = data[at], at + 1
    else:
        need(data[at:], 2)
        protocol, at = u16(data, at), at + 2
    if protocol in (0x21, 0x57):
        return at
    if protocol in (0x281, 0x283):
        return twin_ethertype(data, at, 0x8847, left - 1)
    raise Skip("not-ip")


# ---------------------------------------------------------------- the twin: IP and above


def twin_row(link_type: int, data: bytes, wire: int, *, comparable: int = 65535) -> dict[str, int | bytes]:
    """Return every column of one packet, addresses of IPv6 as bytes; raise Skip where there is no row."""
    start = twin_link(link_type, data)
    ip, wire = data[start:], wire - start
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    need(ip, 1)
    row["version"] = ip[0] >> 4
    if row["version"] == 4:
        need(ip, 20)
        header = (ip[0] & 15) * 4
        length = u16(ip, 2) or max(wire, 0)
        if header < 20 or length < header:
            raise Skip("bad-ip-header")
        need(ip, header)
        row |= {"ttl": ip[8], "ip_id": u16(ip, 4), "fragment": u16(ip, 6), "protocol": ip[9]}
        row |= {"src": int.from_bytes(ip[12:16], "big"), "dst": int.from_bytes(ip[16:20], "big")}
        addresses, routed = ip[12:20], False
        ip = ip[:length]
    elif row["version"] == 6:
        need(ip, 40)
        length = u16(ip, 4) + 40
        if length == 40 and ip[6] != 59:
            length = max(wire, 40)
        row |= {"ttl": ip[7], "src": ip[8:24], "dst": ip[24:40]}
        addresses = ip[8:40]
        ip = ip[:length]
        header, routed = twin_extensions(ip, row)
    else:
        raise Skip("ip-version")
    row["ip_length"] = length
    row["payload_length"] = twin_l4(row, ip[header:], length - header, addresses, routed=routed)
    seen = min(len(ip), comparable) - header
    row["l4_visible"] = max(0, min(seen, 255))
    content = row.pop("content")
    if content is not None:
        hashed = ip[: min(len(ip), comparable)][header:][content:][:32]
        row["content_length"], row["content_hash"] = len(hashed), twin_hash(hashed)
    return row


def twin_extensions(ip: bytes, row: dict[str, Any]) -> tuple[int, bool]:
    kind, at, routed = ip[6], 40, False
    for _ in range(16):
        if kind not in (0, 43, 44, 51, 60):
            break
        need(ip, at + 8)
        following, length = ip[at], (ip[at + 1] + 1) * 8
        if kind == 43:
            routed = True
        if kind == 51:
            length = (ip[at + 1] + 2) * 4
        last = False
        if kind == 44:
            length = 8
            word = u16(ip, at + 2)
            row["fragment"] = word >> 3 | (0x2000 if word & 1 else 0)
            row["ip_id"] = int.from_bytes(ip[at + 4 : at + 8], "big")
            last = word >> 3 != 0
        at += length
        need(ip, at)
        kind = following
        if last:
            break
    else:
        if kind in (0, 43, 44, 51, 60):
            raise Skip("ip-extension-limit")
    row["protocol"] = kind
    return at, routed


def field(data: bytes, at: int, size: int) -> int:
    """A header field, or 0 when not all of it is there."""
    return int.from_bytes(data[at : at + size], "big") if len(data) >= at + size else 0


def twin_l4(row: dict[str, Any], l4: bytes, length: int, addresses: bytes, *, routed: bool) -> int:
    """Fill the upper-layer columns and `content` (where hashing starts, or None); return the payload length."""
    protocol, six = row["protocol"], row["version"] == 6
    row["content"] = 0
    checksum_at: int | None = None
    touched = addresses
    if row["fragment"] & 0x1FFF:
        return length
    if protocol in (6, 17, 136, 132, 33):
        need(l4, 4)
        row["sport"], row["dport"] = field(l4, 0, 2), field(l4, 2, 2)
        touched += l4[:4]
    if protocol == 6:
        row["seq"], row["ack"] = field(l4, 4, 4), field(l4, 8, 4)
        word = field(l4, 12, 2)
        row["tcp_flags"], row["window"] = word & 0xFFF, field(l4, 14, 2)
        header = max((word >> 12) * 4, 20)
        row["content"] = header if word & 2 else 20
        checksum_at = 16
    elif protocol in (17, 136):
        header = row["content"] = 8
        checksum_at = 6
    elif protocol == 132:
        header = row["content"] = 12
        row["seq"] = field(l4, 4, 4)
    elif protocol == 33:
        header = max((field(l4, 4, 2) >> 8) * 4, 12)
        row["content"] = 8
        checksum_at = 6
    elif protocol == (58 if six else 1):
        need(l4, 2)
        kind = row["icmp_type"] = l4[0]
        row["icmp_code"] = l4[1]
        query = kind in ((128, 129) if six else (0, 8, 13, 14, 15, 16, 17, 18))
        error = kind < 128 if six else kind in (3, 4, 5, 11, 12)
        header, checksum_at = 8, 2
        row["content"] = None if error else 8 if query else 4
        touched = addresses if six else b""
        if query:
            need(l4, 6)
            row["sport"] = row["dport"] = field(l4, 4, 2)
            row["seq"] = field(l4, 6, 2)
            touched += l4[4:6]
        if error:
            row["checksum"] = field(l4, 2, 2)
            return max(length - header, 0)
    else:
        if protocol == 47 and field(l4, 0, 2) & 7 == 1 and field(l4, 2, 2) == 0x880B:
            row["content"] = 8
        return length
    if checksum_at is not None and len(l4) >= checksum_at + 2:
        checksum = row["checksum"] = u16(l4, checksum_at)
        pseudo = ones_sum(addresses + struct.pack("!II", length, protocol))
        offloaded = protocol not in (1, 58) and checksum == pseudo
        absent = protocol in (17, 136) and checksum == 0
        if not (routed or offloaded or absent):
            row["residual_known"] = 1
            row["residual"] = (-checksum - ones_sum(touched)) % 65535
            if protocol == 58 and row["icmp_type"] in (128, 129):
                # an ICMPv6 echo as the ICMP echo that a NAT64 makes of it: no next header, the other type
                kind = 8 if row["icmp_type"] == 128 else 0
                beyond = 58 + ((row["icmp_type"] - kind) << 8)
                row["residual"] = (row["residual"] - beyond) % 65535
    return max(length - header, 0)


def ones_sum(data: bytes) -> int:
    """RFC 1071, the obvious way: dpkt's own sum, whose complement is the checksum."""
    total = sum(u16(data, at) for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def twin_hash(data: bytes) -> int:
    state = len(data) * 0x27D4EB2F165667C5 & M64
    words = struct.unpack("<4Q", data.ljust(32, b"\0"))
    factors = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63)
    for word, factor in zip(words, factors, strict=True):
        state = (state ^ word) * factor & M64
        state ^= state >> 32
    return state


def assert_same(link_type: int, frames: Sequence[Frame], comparable: int = 65535) -> None:
    options = ReadOptions(comparable_bytes=comparable)
    records = records_of(link_type, frames)
    table, skipped = decode(records, options)
    expected, reasons = [], Counter[str]()
    fewest = 65535
    for number, (data, wire) in enumerate(frames):
        try:
            row = twin_row(link_type, data, wire, comparable=comparable)
        except Skip as reason:
            reasons[str(reason)] += 1
            continue
        row |= {"frame": number + 1, "captured_length": len(data), "wire_length": wire}
        row["time_ns"] = 1_700_000_000_000_000_000 + number * 1000
        expected.append(row)
        held = len(data) - twin_link(link_type, data)
        if len(data) < wire and held < int(row["ip_length"]):
            fewest = min(fewest, held)
    assert skipped == reasons
    assert len(table) == len(expected)
    for name, dtype in COLUMNS.items():
        column = getattr(table, name)
        assert column.dtype == dtype
        values = column.tolist()
        if name in ("src", "dst"):
            values = [
                options.book.packed(6, v) if version == 6 else v
                for v, version in zip(values, table.version.tolist(), strict=True)
            ]
        assert values == [row[name] for row in expected], name
    assert comparable_bytes(records) == fewest


# ---------------------------------------------------------------- what hypothesis feeds them

SMALL_PORTS = st.integers(0, 65535)
PAYLOADS = st.binary(max_size=48)
ADDRESSES = st.sampled_from([b"\xac\x11\x00\x03", b"\xca\x59\xe9\x64", b"\xff\xff\xff\xff", b"\0\0\0\0"])
ADDRESSES_V6 = st.binary(min_size=16, max_size=16) | st.just(b"\xfd" + bytes(14) + b"\x01")


@st.composite
def dpkt_upper(draw: st.DrawFn, *, six: bool) -> tuple[int, Any]:
    """An upper layer as dpkt builds it, with its protocol number."""
    kind = draw(st.sampled_from(["tcp", "udp", "icmp", "sctp", "other"]))
    data = draw(PAYLOADS)
    sport, dport = draw(SMALL_PORTS), draw(SMALL_PORTS)
    if kind == "tcp":
        options = draw(st.sampled_from([b"", b"\x02\x04\x05\xb4", b"\x01\x01\x08\x0a" + bytes(range(8))]))
        tcp = dpkt.tcp.TCP(
            sport=sport,
            dport=dport,
            seq=draw(st.integers(0, 2**32 - 1)),
            ack=draw(st.integers(0, 2**32 - 1)),
            flags=draw(st.integers(0, 255)),
            win=draw(SMALL_PORTS),
            opts=options,
            data=data,
        )
        tcp.off = 5 + len(options) // 4
        return 6, tcp
    if kind == "udp":
        return 17, dpkt.udp.UDP(sport=sport, dport=dport, ulen=8 + len(data), data=data)
    if kind == "icmp" and not six:
        kinds = st.sampled_from([0, 3, 5, 8, 9, 11, 13, 18])
        echo = dpkt.icmp.ICMP.Echo(id=sport, seq=dport, data=data)
        return 1, dpkt.icmp.ICMP(type=draw(kinds), code=draw(st.integers(0, 3)), data=echo)
    if kind == "icmp":
        body = struct.pack("!HH", sport, dport) + data
        return 58, dpkt.icmp6.ICMP6(type=draw(st.sampled_from([1, 3, 128, 129, 135])), code=0, data=body)
    if kind == "sctp":
        return 132, struct.pack("!HHI", sport, dport, draw(st.integers(0, 2**32 - 1))) + data
    return draw(st.integers(0, 255)), data


@st.composite
def ip_packets(draw: st.DrawFn) -> bytes:
    """An IP datagram; dpkt fills in lengths and checksums."""
    if draw(st.booleans()):
        protocol, upper = draw(dpkt_upper(six=False))
        options = draw(st.sampled_from([b"", b"", b"\x94\x04\0\0", b"\x07\x07\x04\0\0\0\0\0"]))
        packet = dpkt.ip.IP(
            src=draw(ADDRESSES),
            dst=draw(ADDRESSES),
            p=protocol,
            ttl=draw(st.integers(0, 255)),
            id=draw(SMALL_PORTS),
            opts=options,
            data=upper,
        )
        packet.hl = 5 + len(options) // 4
        packet.len = len(packet)
        return bytearray_with_fragment(
            bytes(packet), draw(st.sampled_from([0, 0, 0, 0x4000, 0x2000, 0x2003, 3]))
        )
    protocol, upper = draw(dpkt_upper(six=True))
    chain = draw(
        st.lists(st.sampled_from([0, 43, 44, 51, 60]), max_size=4) | st.just([0] * 17) | st.just([0] * 16)
    )
    body = bytes(upper)
    following = protocol
    for kind in reversed(chain):
        extra = draw(st.integers(0, 1)) if kind != 44 else 0
        if kind == 44:
            offset = draw(st.sampled_from([0, 0, 1, 8, 9]))
            body = struct.pack("!BBHI", following, 0, offset, draw(st.integers(0, 2**32 - 1))) + body
        elif kind == 51:
            body = struct.pack("!BB", following, 1 + extra) + bytes(10 + 4 * extra) + body
        else:
            body = struct.pack("!BB", following, extra) + bytes(6 + 8 * extra) + body
        following = kind
    packet = dpkt.ip6.IP6(
        src=draw(ADDRESSES_V6), dst=draw(ADDRESSES_V6), nxt=following, hlim=draw(st.integers(0, 255))
    )
    packet.plen = len(body)
    header = bytes(packet)[:40]
    return header + body


def bytearray_with_fragment(packet: bytes, word: int) -> bytes:
    return packet[:6] + struct.pack("!H", word) + packet[8:]


TAGS = st.lists(st.sampled_from([0x8100, 0x88A8, 0x9100, 0x9200, 0x8847, 0x8864]), max_size=3) | st.lists(
    st.just(0x8100), min_size=15, max_size=18
)


@st.composite
def frames(draw: st.DrawFn, link_type: int) -> Frame:
    """A frame of the link type, mostly well formed, then perhaps damaged, padded, cut."""
    packet = draw(ip_packets() | st.binary(max_size=64))
    six = packet[:1] >= b"\x60"
    kind = 0x86DD if six else 0x0800
    kind = draw(st.sampled_from([kind, kind, kind, kind, 0x0806, 0x88CC, 0x0100, 0x1234]))
    body = packet
    if link_type in (1, 113, 276):
        for tag in draw(TAGS):
            if tag == 0x8847:
                body = b"\x00\x01" + draw(st.sampled_from([b"\x11", b"\x10"])) + b"\x40" + body
            elif tag == 0x8864:
                body = struct.pack("!BBHHH", 0x11, 0, 1, len(body) + 2, 0x57 if six else 0x21) + body
            else:
                body = struct.pack("!HH", 100, kind) + body
            kind = tag
        if draw(st.integers(0, 9)) == 0:
            body, kind = b"\xaa\xaa\x03\0\0\0" + struct.pack("!H", kind) + body, 46 if link_type == 1 else 4
        if draw(st.integers(0, 9)) == 0:
            body, kind = b"\x06\x06\x03" + packet, 46 if link_type == 1 else 4
    ppp = draw(st.sampled_from([b"", b"\xff\x03"])) + (
        draw(st.sampled_from([b"\x00\x21", b"\x21"]))
        if not six
        else draw(st.sampled_from([b"\x00\x57", b"\x57"]))
    )
    family = draw(st.sampled_from([10, 24, 28, 30])) if six else 2
    link = {
        1: bytes(12) + struct.pack("!H", kind),
        0: struct.pack(draw(st.sampled_from(["<I", ">I"])), family),
        108: struct.pack(">I", family),
        9: ppp,
        50: draw(st.sampled_from([ppp, b"\x0f\x00" + struct.pack("!H", kind), b"\x8f\x00\x86\xdd"])),
        104: b"\x0f\x00" + struct.pack("!H", kind),
        51: struct.pack("!BBHH", 0x11, 0, 1, len(body) + 2) + ppp[-2:],
        113: struct.pack("!HHHQH", 0, draw(st.sampled_from([1, 1, 824])), 6, 0, kind),
        276: struct.pack("!HHIHBB8x", kind, 0, 3, draw(st.sampled_from([1, 1, 824])), 0, 6),
    }.get(link_type, b"")
    data = bytearray(link + body + bytes(draw(st.sampled_from([0, 0, 6, 46]))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        if data:
            at = draw(st.integers(0, min(len(data) - 1, 80)))
            data[at] = draw(st.integers(0, 255))
    wire = len(data) + draw(st.sampled_from([0, 0, 0, 1, 2000]))
    cut = draw(st.integers(0, len(data)) | st.just(len(data)) | st.sampled_from([34, 38, 42, 54]))
    return bytes(data[:cut]), max(wire, 0)


BATCHES = st.sampled_from(LINK_TYPES).flatmap(
    lambda lt: st.tuples(st.just(lt), st.lists(frames(lt), max_size=6))
)
RELAXED = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@RELAXED
@given(BATCHES, st.sampled_from([65535, 65535, 28, 33, 40, 60]))
def test_decoder_agrees_with_its_twin_on_built_and_damaged_frames(
    batch: tuple[int, list[Frame]], comparable: int
) -> None:
    link_type, content = batch
    assert_same(link_type, content, comparable)


@RELAXED
@given(st.sampled_from(LINK_TYPES), st.lists(st.binary(max_size=80).map(lambda b: (b, len(b))), max_size=5))
def test_decoder_agrees_with_its_twin_on_noise(link_type: int, content: list[Frame]) -> None:
    assert_same(link_type, content)


@RELAXED
@given(st.lists(ip_packets(), min_size=1, max_size=5))
def test_dpkt_reads_the_same_fields(packets: list[bytes]) -> None:
    """The twin is ours; dpkt is not."""
    packets = [p for p in packets if p[0] >> 4 == 4 and dpkt.ip.IP(p).offset == 0 and not dpkt.ip.IP(p).mf]
    table, _ = decode(records_of(101, [(p, len(p)) for p in packets]), ReadOptions())
    rows = {frame: row for row, frame in enumerate(table.frame.tolist())}
    for number, packet in enumerate(packets, start=1):
        ip = dpkt.ip.IP(packet)
        if number not in rows:
            assert len(ip.data) < 6
            continue
        row = rows[number]
        assert int(table.src[row]).to_bytes(4, "big") == ip.src
        assert int(table.dst[row]).to_bytes(4, "big") == ip.dst
        assert (table.ttl[row], table.ip_id[row], table.protocol[row]) == (ip.ttl, ip.id, ip.p)
        if isinstance(ip.data, dpkt.tcp.TCP):
            tcp = ip.data
            assert (table.sport[row], table.dport[row]) == (tcp.sport, tcp.dport)
            assert (table.seq[row], table.ack[row]) == (tcp.seq, tcp.ack)
            assert (table.tcp_flags[row] & 0xFF, table.window[row]) == (tcp.flags, tcp.win)
            assert table.payload_length[row] == len(tcp.data)
        elif isinstance(ip.data, dpkt.udp.UDP):
            assert (table.sport[row], table.dport[row]) == (ip.data.sport, ip.data.dport)
            assert table.payload_length[row] == len(ip.data.data)
        elif isinstance(ip.data, dpkt.icmp.ICMP) and ip.data.type in (0, 8):
            assert (table.sport[row], table.seq[row]) == (ip.data.data.id, ip.data.data.seq)


@pytest.mark.parametrize("rows", [1, 50, 20_000])
def test_a_block_boundary_changes_nothing(rows: int) -> None:
    """20,000 rows are more than one block; fast blocks and mixed blocks give the same columns."""
    plain = (
        bytes(12)
        + b"\x08\x00"
        + bytes(dpkt.ip.IP(src=b"\x0a\0\0\x01", dst=b"\x0a\0\0\x02", p=17, len=36, data=bytes(16)))
    )
    tagged = plain[:12] + b"\x81\x00\x00\x05" + plain[12:]
    fast, none_skipped = decode(records_of(1, [(plain, len(plain))] * rows), ReadOptions())
    mixed, _ = decode(records_of(1, [(tagged, len(tagged))] + [(plain, len(plain))] * rows), ReadOptions())
    assert len(fast) == rows
    assert not none_skipped
    for name in set(COLUMNS) - {"frame", "time_ns"}:
        assert np.array_equal(getattr(fast, name), getattr(mixed, name)[1:]), name

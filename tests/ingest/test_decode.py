"""What `decode` promises, each promise on packets whose truth somebody else made: a kernel's NAT, or dpkt."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpkt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.ingest.decode import comparable_bytes, decode
from nattrace.ingest.source import PADDING, ReadOptions, Records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nattrace.table import AddressBook, PacketTable

FIXTURES = Path(__file__).parents[1] / "fixtures"
RAW, ETHERNET = 101, 1
Place = tuple[str, str, int, int]  # source, destination, ports (or ICMP id twice)
INSIDE, OUTSIDE, SERVER = b"\xac\x11\x00\x02", b"\xcb\x00\x71\x0a", b"\xc6\x33\x64\x01"


def records_of(link_type: int, frames: Sequence[tuple[bytes, int]], fill: int = 0) -> Records:
    """Frames as (captured bytes, wire length) in one buffer, apart, with `fill` around them."""
    gap = bytes([fill]) * 5
    buffer, offsets = bytearray(gap), []
    for data, _ in frames:
        offsets.append(len(buffer))
        buffer += data + gap
    return Records(
        point=0,
        link_type=link_type,
        buffer=np.frombuffer(bytes(buffer) + bytes([fill]) * PADDING, np.uint8),
        offset=np.array(offsets, np.int64),
        captured_length=np.array([len(data) for data, _ in frames], np.uint32),
        wire_length=np.array([wire for _, wire in frames], np.uint32),
        time_ns=np.arange(len(frames), dtype=np.int64),
        frame=np.arange(1, len(frames) + 1, dtype=np.uint32),
    )


def decode_packets(
    packets: Iterable[bytes], snaplen: int = 65535, options: ReadOptions | None = None, link_type: int = RAW
) -> PacketTable:
    frames = [(packet[:snaplen], len(packet)) for packet in packets]
    return decode(records_of(link_type, frames), options or ReadOptions())[0]


def decode_file(path: Path, options: ReadOptions) -> PacketTable:
    data = path.read_bytes()
    order = "<" if data[0] in (0xD4, 0x4D) else ">"
    frames, at = [], 24
    while at < len(data):
        captured, wire = struct.unpack_from(order + "II", data, at + 8)
        frames.append((data[at + 16 : at + 16 + captured], wire))
        at += 16 + captured
    (link_type,) = struct.unpack_from(order + "I", data, 20)
    return decode(records_of(link_type, frames), options)[0]


def ipv4(upper: Any, protocol: int, src: bytes = INSIDE, dst: bytes = SERVER, **fields: Any) -> bytes:
    packet = dpkt.ip.IP(src=src, dst=dst, p=protocol, data=upper, **fields)
    packet.len = len(packet)
    return bytes(packet)


def ipv6(upper: Any, protocol: int, src: bytes, dst: bytes) -> bytes:
    return bytes(dpkt.ip6.IP6(src=src, dst=dst, nxt=protocol, hlim=64, plen=len(upper), data=upper))


def tcp(payload: bytes = b"hello", **fields: Any) -> Any:
    return dpkt.tcp.TCP(
        **{"sport": 40000, "dport": 80, "seq": 7, "ack": 9, "flags": 24, **fields}, data=payload
    )


def udp(payload: bytes = b"hello", sport: int = 40000, dport: int = 53) -> Any:
    return dpkt.udp.UDP(sport=sport, dport=dport, ulen=8 + len(payload), data=payload)


def echo(payload: bytes = b"hello", ident: int = 1, seq: int = 3) -> Any:
    return dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=ident, seq=seq, data=payload))


# ------------------------------------------------------------------------------------- against a kernel's NAT


def tuples(table: PacketTable, book: AddressBook) -> list[Place]:
    """Source and destination address, then ports (or ICMP id twice), of each row."""
    rows = zip(
        *(c.tolist() for c in (table.version, table.src, table.dst, table.sport, table.dport)), strict=True
    )
    return [(book.text(v, s), book.text(v, d), sp, dp) for v, s, d, sp, dp in rows]


def back(there: Place) -> Place:
    """The tuple of the other direction."""
    src, dst, sport, dport = there
    return dst, src, dport, sport


def place(said: dict[str, Any]) -> Place:
    ports = (said["id"], said["id"]) if said["id"] >= 0 else (said["sport"], said["dport"])
    return (said["src"], said["dst"], *ports)


def kernel_mapping(truth: dict[str, Any]) -> dict[Place, Place]:
    """Inner tuple to outer tuple, both directions, for the first hop of a lab recording."""
    mapping: dict[Place, Place] = {}
    for entry in truth["hops"][0]["entries"]:
        original, reply = (place(entry[side]) for side in ("original", "reply"))
        inside_is_original = truth["hops"][0]["inner"] == "docker0" and not original[1].startswith(
            "203.0.113."
        )
        if inside_is_original:
            mapping[original] = back(reply)
            mapping[back(original)] = reply
        else:  # a published port: the initiator is outside, so the inside sees the reply tuple
            mapping[reply] = back(original)
            mapping[back(reply)] = original
    return mapping


LAB_PAIRS = ["icmp_id_collision", "icmp_random_fully", "port_collision", "published_port", "ipv6_masquerade"]


@pytest.mark.parametrize("name", LAB_PAIRS)
def test_what_the_kernel_rewrote_keeps_its_residual_and_content(name: str) -> None:
    """Translated by the kernel's own conntrack entries, the inside is the outside, packet for packet."""
    folder = FIXTURES / "lab" / name
    options = ReadOptions()
    inside, outside = (decode_file(folder / f"{point}.pcap", options) for point in ("docker0", "eth0"))
    mapping = kernel_mapping(json.loads((folder / "truth.json").read_text()))

    def keyed(table: PacketTable, places: list[Place]) -> dict[Any, list[int]]:
        found: dict[Any, list[int]] = {}
        for row, address in enumerate(places):
            key = (address, *(int(c[row]) for c in (table.protocol, table.icmp_type, table.seq, table.ack)))
            key += tuple(int(c[row]) for c in (table.tcp_flags, table.ip_id, table.content_hash))
            found.setdefault((*key, int(table.payload_length[row])), []).append(row)
        return found

    translated = [mapping.get(t, t) for t in tuples(inside, options.book)]
    before, after = keyed(inside, translated), keyed(outside, tuples(outside, options.book))
    changed = [old != new for old, new in zip(tuples(inside, options.book), translated, strict=True)]
    pairs = [
        (row, after[key][0]) for key, rows in before.items() if key in after for row in rows if changed[row]
    ]
    assert len(pairs) >= 0.9 * sum(changed) > 0
    known = [(i, o) for i, o in pairs if inside.residual_known[i] and outside.residual_known[o]]
    assert [inside.residual[i] for i, _ in known] == [outside.residual[o] for _, o in known]
    # ICMP is summed in software; the lab's virtual links leave every TCP and UDP checksum unfinished.
    finished = np.isin(inside.protocol, (1, 58))
    assert len(known) == sum(finished[i] for i, _ in pairs)
    assert np.array_equal(inside.residual_known, finished)


def test_docker_ping_pairs_agree_in_everything_but_addresses_ids_and_ttl() -> None:
    options = ReadOptions()
    inside, outside = (
        decode_file(FIXTURES / "docker-ping" / f"{p}.pcap", options) for p in ("docker0", "eth0")
    )

    def invariants(table: PacketTable) -> Counter[tuple[int, ...]]:
        names = ("ip_id", "icmp_type", "seq", "residual", "content_hash", "payload_length", "residual_known")
        return Counter(zip(*(getattr(table, name).tolist() for name in names), strict=True))

    assert len(inside) == 40
    assert inside.residual_known.all()
    assert invariants(inside) == invariants(outside)
    assert len(set(outside.residual.tolist())) > 1


# ------------------------------------------------------------------------------------- residual, by dpkt's sums

PORTS = st.integers(1, 65535)
V4 = st.binary(min_size=4, max_size=4)
V6 = st.binary(min_size=16, max_size=16)


ENDS = st.tuples(V4, V4, PORTS)
BUILD: dict[int, tuple[Callable[..., Any], str]] = {6: (tcp, "sport"), 17: (udp, "sport"), 1: (echo, "ident")}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200), ENDS, ENDS, st.sampled_from([6, 17, 1]))
def test_residual_survives_any_ipv4_translation_and_snaplen(
    payload: bytes, old: tuple[bytes, bytes, int], new: tuple[bytes, bytes, int], protocol: int
) -> None:
    build, port = BUILD[protocol]
    before, after = (ipv4(build(payload, **{port: end[2]}), protocol, *end[:2]) for end in (old, new))
    other = ipv4(build(payload + b"\x01\x02", **{port: old[2]}), protocol, *old[:2])
    table = decode_packets([before, after, other])
    cut = decode_packets([before, after], snaplen=40 if protocol == 6 else 28)
    if table.residual_known.all():  # a sum may by chance look unfinished
        assert cut.residual_known.all()
        assert table.residual[0] == table.residual[1] == cut.residual[0] == cut.residual[1]
        assert table.residual[0] != table.residual[2]
    assert table.content_hash[0] == table.content_hash[1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=100), V6, st.tuples(V6, PORTS), st.tuples(V6, PORTS))
def test_residual_survives_nat66(
    payload: bytes, dst: bytes, old: tuple[bytes, int], new: tuple[bytes, int]
) -> None:
    table = decode_packets([ipv6(tcp(payload, sport=port), 6, src, dst) for src, port in (old, new)])
    if table.residual_known.all():
        assert table.residual[0] == table.residual[1]


def test_residual_is_the_sum_of_what_nat_leaves_alone() -> None:
    """Worked by hand: protocol 17, length 10 twice (pseudo-header and UDP), and the payload 0x1234."""
    table = decode_packets([ipv4(udp(b"\x12\x34"), 17)])
    assert table.residual_known[0]
    assert table.residual[0] == 17 + 10 + 10 + 0x1234


def test_a_checksum_left_to_the_network_card_says_nothing() -> None:
    packet = bytearray(ipv4(tcp(), 6))
    pseudo = sum(struct.unpack("!4H", INSIDE + SERVER)) + 6 + len(packet) - 20
    pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
    packet[36:38] = struct.pack("!H", pseudo)
    assert not decode_packets([bytes(packet)]).residual_known[0]
    packet[36:38] = struct.pack("!H", pseudo ^ 1)
    assert decode_packets([bytes(packet)]).residual_known[0]


def test_no_residual_where_there_is_no_ones_complement_sum_of_untouched_bytes() -> None:
    unchecked = ipv4(bytes(udp())[:6] + b"\0\0hello", 17)
    later_fragment = ipv4(b"x" * 24, 17)
    later_fragment = later_fragment[:6] + b"\x00\x03" + later_fragment[8:]
    sctp = ipv4(struct.pack("!HHII", 1, 2, 3, 4), 132)
    gre = ipv4(b"\0\0\x08\0" + bytes(20), 47)
    error = ipv4(dpkt.icmp.ICMP(type=3, data=dpkt.icmp.ICMP.Unreach(data=dpkt.ip.IP(ipv4(udp(), 17)))), 1)
    cut = ipv4(tcp(), 6)[:37]
    table = decode_packets([unchecked, later_fragment, sctp, gre, error, cut])
    assert len(table) == 6
    assert not table.residual_known.any()
    assert not table.residual.any()


# ------------------------------------------------------------------------------------- content


def test_bytes_that_are_no_packet_change_nothing() -> None:
    """Neither what follows a record in the buffer nor Ethernet padding is read."""
    packet = ipv4(udp(b"hi"), 17)
    frame = bytes(12) + b"\x08\x00" + packet
    one = decode(records_of(ETHERNET, [(frame, len(frame))], fill=0), ReadOptions())[0]
    two = decode(records_of(ETHERNET, [(frame, len(frame))], fill=255), ReadOptions())[0]
    padded = decode_packets([frame.ljust(60, b"\xee")], link_type=ETHERNET)
    for table in (two, padded):
        assert table.content_hash[0] == one.content_hash[0]
        assert (table.content_length[0], table.l4_visible[0]) == (2, 10)


def test_points_with_different_snaplens_compare_what_both_have() -> None:
    packets = [ipv4(tcp(bytes(range(60)), sport=port), 6) for port in (1, 2)]
    long, short = (decode_packets(packets, snap, ReadOptions(comparable_bytes=52)) for snap in (65535, 52))
    assert np.array_equal(long.content_hash, short.content_hash)
    assert long.content_length.tolist() == short.content_length.tolist() == [12, 12]
    assert long.l4_visible.tolist() == short.l4_visible.tolist() == [32, 32]


def test_fields_are_read_beyond_what_is_comparable() -> None:
    table = decode_packets([ipv4(tcp(ack=0xDEADBEEF, win=77), 6)], options=ReadOptions(comparable_bytes=28))
    assert (table.ack[0], table.window[0], table.l4_visible[0], table.content_length[0]) == (
        0xDEADBEEF,
        77,
        8,
        0,
    )


def test_snaplen_42_keeps_a_tcp_row_with_ports_and_seq() -> None:
    frame = bytes(12) + b"\x08\x00" + ipv4(tcp(seq=123456), 6)
    table = decode_packets([frame], snaplen=42, link_type=ETHERNET)
    assert (table.sport[0], table.dport[0], table.seq[0], table.l4_visible[0]) == (40000, 80, 123456, 8)
    assert (table.ack[0], table.tcp_flags[0], table.checksum[0], bool(table.residual_known[0])) == (
        0,
        0,
        0,
        False,
    )


def test_a_clamped_mss_does_not_change_the_content_of_a_syn() -> None:
    one, two = (
        tcp(b"fast open data", flags=2, opts=b"\x02\x04" + mss.to_bytes(2, "big"), off=6)
        for mss in (1460, 1400)
    )
    table = decode_packets([ipv4(one, 6), ipv4(two, 6)])
    assert table.content_length.tolist() == [14, 14]
    assert table.content_hash[0] == table.content_hash[1]


def test_timestamps_make_pure_acks_distinct() -> None:
    acks = [tcp(b"", flags=16, opts=b"\x01\x01\x08\x0a" + struct.pack("!II", n, 5), off=8) for n in (1, 2)]
    table = decode_packets([ipv4(ack, 6) for ack in acks])
    assert table.payload_length.tolist() == [0, 0]
    assert table.content_hash[0] != table.content_hash[1]


def test_printed_sources_turn_content_off() -> None:
    table = decode_packets([ipv4(udp(), 17)], options=ReadOptions(comparable_content=False))
    assert (table.content_length[0], table.content_hash[0]) == (0, 0)


def test_content_hash_is_frozen() -> None:
    """The value itself: partial results of several machines and versions must agree."""
    table = decode_packets([ipv4(udp(b"nattrace"), 17), ipv4(udp(b""), 17)])
    assert table.content_hash.tolist() == [12437615593390153214, 0]


# ------------------------------------------------------------------------------------- records that are no row


def test_every_record_is_a_row_or_one_reason() -> None:
    ethernet = bytes(12)
    good = ipv4(udp(), 17)
    frames = [
        ethernet + b"\x08\x00" + good,
        ethernet + b"\x08\x06" + bytes(28),
        ethernet + b"\x88\xcc" + bytes(28),
        ethernet + b"\x08\x00" + good[:23],
        ethernet + b"\x08\x00\x44" + good[1:],
        ethernet + b"\x08\x00\x75" + good[1:],
        ethernet + b"\x12\x34" + good,
        ethernet + b"\x00\x26\x42\x42\x03" + bytes(35),
        ethernet + b"\x81\x00\x00\x01" * 30 + b"\x08\x00" + good,
        b"",
    ]
    table, skipped = decode(records_of(ETHERNET, [(f, len(f)) for f in frames]), ReadOptions())
    assert table.frame.tolist() == [1]
    assert skipped == {
        "arp": 1,
        "lldp": 1,
        "truncated": 2,
        "bad-ip-header": 1,
        "ip-version": 1,
        "not-ip": 1,
        "llc": 1,
        "link-depth": 1,
    }


def test_an_unknown_link_type_is_counted_by_number() -> None:
    table, skipped = decode(records_of(127, [(b"x" * 60, 60)] * 3), ReadOptions())
    assert len(table) == 0
    assert skipped == {"link-type-127": 3}


def test_no_records_are_no_rows() -> None:
    for link_type in (ETHERNET, RAW, 127):
        table, skipped = decode(records_of(link_type, []), ReadOptions())
        assert (len(table), skipped) == (0, Counter())


def test_comparable_bytes_is_that_of_the_most_truncated_packet() -> None:
    whole, long = ipv4(udp(b""), 17), ipv4(udp(bytes(500)), 17)
    assert comparable_bytes(records_of(RAW, [(whole, len(whole)), (long, len(long))])) == 65535
    assert (
        comparable_bytes(records_of(RAW, [(whole, len(whole)), (long[:82], len(long)), (long[:99], 900)]))
        == 82
    )
    # Cut Ethernet padding, and a record too short to be a row, do not count.
    assert comparable_bytes(records_of(RAW, [(whole, len(whole) + 18), (long[:22], len(long))])) == 65535

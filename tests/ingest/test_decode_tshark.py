"""The decoder against tshark, field by field, over every pcap of the shared captures.

The records of all files of one link type are written into one pcap, so that tshark starts once a link type
and not once a file. Only plain pcap is read here: what a record holds does not depend on its container.
Every disagreement is named below with its reason; one that is not, or one that is gone, fails.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nattrace.ingest.decode import decode
from nattrace.ingest.link import KNOWN_LINK_TYPES
from nattrace.ingest.source import PADDING, ReadOptions, Records
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, AddressBook, PacketTable

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPTURES = Path(__file__).parents[2].parent / "shared" / "captures"
MAGICS = {
    b"\xd4\xc3\xb2\xa1": "<",
    b"\x4d\x3c\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\xa1\xb2\x3c\x4d": ">",
}
RECORD_LIMIT = 262_144  # what tshark reads at most

pytestmark = [
    pytest.mark.skipif(not CAPTURES.is_dir(), reason="needs the shared captures beside the checkout"),
    pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark"),
]

FIELDS = (
    "frame.number",
    "frame.protocols",
    "ip.src",
    "ip.dst",
    "ip.len",
    "ip.id",
    "ip.ttl",
    "ip.proto",
    "ip.flags.df",
    "ip.flags.mf",
    "ip.frag_offset",
    "ipv6.src",
    "ipv6.dst",
    "ipv6.hlim",
    "ipv6.plen",
    "ipv6.fraghdr.ident",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.flags",
    "tcp.window_size_value",
    "tcp.checksum",
    "tcp.len",
    "udp.srcport",
    "udp.dstport",
    "udp.checksum",
    "icmp.type",
    "icmp.code",
    "icmp.checksum",
    "icmp.ident",
    "icmp.seq",
    "icmpv6.type",
    "icmpv6.code",
    "icmpv6.checksum",
    "icmpv6.echo.identifier",
    "icmpv6.echo.sequence_number",
    "sctp.srcport",
    "sctp.dstport",
    "sctp.verification_tag",
    "dccp.srcport",
    "dccp.dstport",
    "dccp.checksum",
)

#: tshark as a reader of single packets: nothing reassembled, nothing relative, nothing remembered.
PREFERENCES = (
    "ip.defragment:FALSE",
    "ipv6.defragment:FALSE",
    "tcp.desegment_tcp_streams:FALSE",
    "tcp.relative_sequence_numbers:FALSE",
    "tcp.analyze_sequence_numbers:FALSE",
)

#: Encapsulations that tshark follows to IP and the decoder does not: such records are no rows.
FOREIGN = {"avsp", "macsec", "nsh", "cfp", "vntag", "pwethcw"}

_BIG = "tcpdump-tests/tests/bigtcp-"
_PORTS = ("udp.srcport", "udp.dstport", "udp.checksum")
_TCP = (
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.flags",
    "tcp.window_size_value",
    "tcp.checksum",
    "tcp.len",
)
_IP = ("ip.src", "ip.dst", "ip.id", "ip.ttl", "ip.proto", "ip.len")

#: Where decoder and tshark differ on purpose: why, in which fields, in which file and frame.
NAMED: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, int], ...]], ...] = (
    (
        "cut off, or ended by its IP length, inside the IP header, an extension header or before ports and id",
        ("no row",),
        (
            ("pcapplusplus/Tests/Pcap++Test/PcapExamples/ip4_bad_fragment.pcap", 1),
            ("tcpdump-tests/tests/hoobr_rt6_print.pcap", 3),
            ("tcpdump-tests/tests/ip6_frag_asan.pcap", 1),
            ("tcpdump-tests/tests/ip_printroute_asan.pcap", 1),
            ("tcpdump-tests/tests/ip_ts_opts_asan.pcap", 1),
            ("tcpdump-tests/tests/ipv4_invalid_length.pcap", 1),
            ("tcpdump-tests/tests/ipv6-next-header-oobr-1.pcap", 1),
            ("tcpdump-tests/tests/ipv6-next-header-oobr-2.pcap", 1),
            ("tcpdump-tests/tests/ipv6-rthdr-oobr.pcap", 1),
            ("tcpdump-tests/tests/ipv6-srh-tlv-pad1-padn-5-trunc.pcap", 1),
            ("tcpdump-tests/tests/ipv6_39_byte_header.pcap", 1),
            ("tcpdump-tests/tests/ipv6_invalid_length.pcap", 1),
            ("tcpdump-tests/tests/ipv6hdr-heapoverflow.pcap", 1),
            ("zeek/testing/btest/Traces/trunc/ip6-ext-trunc.pcap", 1),
            ("zeek/testing/btest/Traces/trunc/ip6-trunc.pcap", 1),
            ("zeek/testing/btest/Traces/trunc/ipv4-internally-truncated-header.pcap", 1),
        ),
    ),
    (
        "more extension headers than EXTENSION_LIMIT",
        ("no row",),
        (("libpcap-tests/tests/filter/ipv6_ext_headers.pcap", 1),),
    ),
    (
        "Cisco HDLC under the NULL link type, a quirk of one capture driver that tshark guesses",
        ("no row",),
        (("pcapplusplus/Tests/Pcap++Test/PcapExamples/null_loopback.pcap", 3),),
    ),
    (
        "tshark takes a bad home address option as the end, the decoder goes by the option header's length",
        ("no row", *_PORTS),
        tuple(("zeek/testing/btest/Traces/ipv6-mobility-dst-opts.pcap", frame) for frame in (1, 2)),
    ),
    (
        "source routing: tshark calls the last hop the destination, the header (and conntrack) the next one",
        ("ip.dst",),
        tuple(
            ("pcapplusplus/Tests/Packet++Test/PacketExamples/ipv4-options.pcap", frame) for frame in (6, 7)
        ),
    ),
    (
        "BIG TCP: lengths of 0, where this tshark reads no further",
        (*_PORTS, *_TCP),
        (
            (_BIG + "ipv4-vxlan-ipv4.pcap", 1),
            (_BIG + "ipv4-vxlan-ipv6.pcap", 1),
            (_BIG + "ipv6-geneve-ipv4.pcap", 1),
            (_BIG + "ipv6-geneve-ipv6.pcap", 1),
            (_BIG + "ipv6-vxlan-ipv4.pcap", 1),
            (_BIG + "ipv6-vxlan-ipv6.pcap", 1),
            (_BIG + "ipv6.pcap", 1),
        ),
    ),
    (
        "three bytes of ICMP: type and code are there, tshark wants the checksum too",
        ("icmp.type", "icmp.code"),
        (("tcpdump-tests/tests/icmp-icmp_print-oobr-1.pcap", 1),),
    ),
    (
        "the fragment header is in the quoted packet, and tshark's first occurrence is that one",
        ("ipv6.fraghdr.ident",),
        (("tcpdump-tests/tests/icmpv6-rfc7112.pcap", 1),),
    ),
    (
        "a payload length of 0 without jumbo option: tshark reads no fragment header",
        ("ipv6.fraghdr.ident",),
        (("tcpdump-tests/tests/ipv6_frag6_negative_len.pcap", 1),),
    ),
    (
        "a TCP data offset below 5: tshark stops, the decoder keeps the fixed fields",
        ("tcp.seq_raw", "tcp.ack_raw"),
        (("tcpdump-tests/tests/tcp_header_heapoverflow.pcap", 1),),
    ),
    (
        "the frame ends before its IP length: tshark's length is the frame's, the table's the IP header's",
        ("tcp.len",),
        (
            ("tcpdump-tests/tests/kday4.pcap", 10),
            ("tcpdump-tests/tests/kday7.pcap", 10),
            *(("zeek/testing/btest/Traces/tcp/reassembly.pcap", frame) for frame in (7, 26, 35, 39, 85)),
        ),
    ),
    (
        "PPPoE says 40 bytes and IP 46: tshark believes PPPoE",
        ("tcp.len",),
        tuple(
            ("zeek/testing/btest/Traces/pppoe-over-qinq.pcap", frame) for frame in (19, 33, 41, 47, 63, 81)
        ),
    ),
    (
        "IPv4 under LINKTYPE_IPV6: the version in the packet decides, as tcpdump does for RAW",
        (*_IP, *_PORTS),
        (("tcpdump-tests/tests/LINKTYPE_IPV6_invalid.pcap", 1),),
    ),
)

Record = tuple[str, int, bytes, int]  # file, frame, captured bytes, wire length
Disagreement = tuple[str, int, str]  # file, frame, field


def records_of_file(path: Path) -> tuple[int, list[Record]] | None:
    """A pcap, read the slow and obvious way; None for anything else."""
    data = path.read_bytes()
    order = MAGICS.get(data[:4])
    if order is None or len(data) < 24:
        return None
    name = path.relative_to(CAPTURES).as_posix()
    found: list[Record] = []
    at = 24
    while at + 16 <= len(data):
        captured, wire = struct.unpack_from(order + "II", data, at + 8)
        if at + 16 + captured > len(data) or captured > RECORD_LIMIT:
            break
        found.append((name, len(found) + 1, data[at + 16 : at + 16 + captured], wire))
        at += 16 + captured
    return struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF, found


def all_records() -> dict[int, list[Record]]:
    by_link_type: dict[int, list[Record]] = {}
    for path in sorted(CAPTURES.rglob("*")):
        read = records_of_file(path) if path.is_file() else None
        if read and read[0] in KNOWN_LINK_TYPES:
            by_link_type.setdefault(read[0], []).extend(read[1])
    return by_link_type


def merge(link_type: int, records: list[Record], target: Path) -> Records:
    """Write the records as one pcap; return them as the decoder wants them, from the same bytes."""
    data = bytearray(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, RECORD_LIMIT, link_type))
    offsets = []
    for _, _, packet, wire in records:
        data += struct.pack("<IIII", 1_700_000_000, 0, len(packet), wire)
        offsets.append(len(data))
        data += packet
    target.write_bytes(data)
    return Records(
        point=0,
        link_type=link_type,
        buffer=np.frombuffer(bytes(data) + bytes(PADDING), np.uint8),
        offset=np.array(offsets, np.int64),
        captured_length=np.array([len(packet) for _, _, packet, _ in records], np.uint32),
        wire_length=np.array([wire for _, _, _, wire in records], np.uint32),
        time_ns=np.full(len(records), 1_700_000_000_000_000_000, np.int64),
        frame=np.arange(1, len(records) + 1, dtype=np.uint32),
    )


def tshark(path: Path) -> dict[int, dict[str, str]]:
    """Fields by frame number; the first occurrence of each, since tunnels and quotes repeat them."""
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "occurrence=f", "-E", "separator=/t"]
    command += [word for preference in PREFERENCES for word in ("-o", preference)]
    command += [word for field in FIELDS for word in ("-e", field)]
    done = subprocess.run(command, capture_output=True, check=True)
    rows = (line.split("\t") for line in done.stdout.decode(errors="replace").splitlines())
    return {int(row[0]): dict(zip(FIELDS, row, strict=True)) for row in rows}


def expected_fields(table: PacketTable, row: int, book: AddressBook) -> Iterator[tuple[str, Any]]:
    """What tshark should print for a row, by field."""
    version, protocol = int(table.version[row]), int(table.protocol[row])
    fragment = int(table.fragment[row])
    src, dst = (book.text(version, int(column[row])) for column in (table.src, table.dst))
    if version == 4:
        yield from (("ip.src", src), ("ip.dst", dst), ("ip.id", table.ip_id[row]), ("ip.ttl", table.ttl[row]))
        yield from (("ip.proto", protocol), ("ip.len", table.ip_length[row]))
        yield from (("ip.flags.df", fragment >> 14 & 1), ("ip.flags.mf", fragment >> 13 & 1))
        yield "ip.frag_offset", fragment & FRAGMENT_OFFSET
    else:
        yield from (("ipv6.src", src), ("ipv6.dst", dst), ("ipv6.hlim", table.ttl[row]))
        yield from (("ipv6.plen", int(table.ip_length[row]) - 40), ("ipv6.fraghdr.ident", table.ip_id[row]))
    name = {6: "tcp", 17: "udp", 136: "udp", 132: "sctp", 33: "dccp"}.get(protocol)
    if fragment & FRAGMENT_OFFSET:
        return
    if name:
        yield from ((f"{name}.srcport", table.sport[row]), (f"{name}.dstport", table.dport[row]))
    if name == "tcp":
        yield from (("tcp.seq_raw", table.seq[row]), ("tcp.ack_raw", table.ack[row]))
        yield from (("tcp.flags", table.tcp_flags[row]), ("tcp.window_size_value", table.window[row]))
        yield "tcp.checksum", table.checksum[row]
        if table.l4_visible[row] >= 20 and not fragment & MORE_FRAGMENTS:  # tshark: no length for a part
            yield "tcp.len", table.payload_length[row]
    elif protocol == 17:
        yield "udp.checksum", table.checksum[row]
    elif name == "sctp":
        yield "sctp.verification_tag", table.seq[row]
    elif name == "dccp":
        yield "dccp.checksum", table.checksum[row]
    elif (version, protocol) in ((4, 1), (6, 58)):
        name, ident, seq, queries = (
            ("icmp", "icmp.ident", "icmp.seq", (0, 8, 13, 14))
            if version == 4
            else ("icmpv6", "icmpv6.echo.identifier", "icmpv6.echo.sequence_number", (128, 129))
        )
        yield from ((f"{name}.type", table.icmp_type[row]), (f"{name}.code", table.icmp_code[row]))
        yield f"{name}.checksum", table.checksum[row]
        if table.icmp_type[row] in queries:
            yield from ((ident, table.sport[row]), (seq, table.seq[row]))


def number(text: str) -> int:
    """A field as tshark prints it; an absent one is 0, as in the table."""
    return {"": 0, "True": 1, "False": 0}[text] if text in ("", "True", "False") else int(text, 0)


def disagreements(link_type: int, records: list[Record], folder: Path) -> Iterator[tuple[Disagreement, str]]:
    path = folder / f"{link_type}.pcap"
    raw = merge(link_type, records, path)
    options = ReadOptions()
    table, skipped = decode(raw, options)
    assert len(table) + sum(skipped.values()) == len(records)
    seen = tshark(path)
    assert len(seen) == len(records)
    rows = {frame: row for row, frame in enumerate(table.frame.tolist())}
    for frame, (name, in_file, _, _) in enumerate(records, start=1):
        said = seen[frame]
        row = rows.get(frame)
        if row is None:
            if (said["ip.src"] or said["ipv6.src"]) and not FOREIGN & set(said["frame.protocols"].split(":")):
                yield (name, in_file, "no row"), said["frame.protocols"]
            continue
        for field, value in expected_fields(table, row, options.book):
            printed = said[field]
            if field == "ipv6.plen" and number(printed) == 0:
                continue  # a jumbogram or BIG TCP: the table has the length on the wire instead
            same = printed == value if isinstance(value, str) else number(printed) == int(value)
            if not same:
                yield (name, in_file, field), f"{value} is not {printed!r} in {said['frame.protocols']}"


def test_every_field_is_what_tshark_prints(tmp_path: Path) -> None:
    found: dict[Disagreement, str] = {}
    for link_type, records in all_records().items():
        found.update(disagreements(link_type, records, tmp_path))
    excused = {(name, frame): fields for _, fields, places in NAMED for name, frame in places}
    assert not {key: text for key, text in found.items() if key[2] not in excused.get(key[:2], ())}
    # A newer tshark may read what "this tshark" does not; any other exception must still be needed.
    needed = {
        (name, frame) for reason, _, places in NAMED if "this tshark" not in reason for name, frame in places
    }
    assert not needed - {key[:2] for key in found}

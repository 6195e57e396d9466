"""pcapng files: every section, interface and packet block, as Wireshark counts and dates them."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.errors import InputError
from nattrace.ingest import PointInfo, ReadOptions, open_capture
from nattrace.ingest.capture import FileCapture
from nattrace.ingest.chunks import CHUNK_BYTES
from nattrace.ingest.pcapng_fields import options, rows_with_options, timestamps_ns
from nattrace.ingest.points import MAX_COMMENTS
from nattrace.ingest.source import Source

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captures")
needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
needs_capinfos = pytest.mark.skipif(shutil.which("capinfos") is None, reason="needs capinfos")

SHB, IDB, OLD, SPB, NRB, ISB, EPB, JOURNAL = 0x0A0D0D0A, 1, 2, 3, 4, 5, 6, 9
CUSTOM, CUSTOM_NO_COPY, UNKNOWN = 0xBAD, 0x40000BAD, 0x7777
COMMENT, IF_NAME, IF_TSRESOL, IF_TSOFFSET, EPB_FLAGS, EPB_DROPCOUNT, ISB_IFDROP = 1, 2, 9, 14, 2, 4, 5


class Packet(NamedTuple):
    point: str
    frame: int
    time_ns: int
    wire: int
    data: bytes


def read(content: bytes, name: str | None = None) -> tuple[list[PointInfo], list[Packet]]:
    file = io.BytesIO(content)
    file.name = "cap.pcapng"
    capture = open_capture(Source((file,), name), ReadOptions())
    assert isinstance(capture, FileCapture)
    packets: list[tuple[int, Packet]] = []
    for records in capture.records():
        packets += [
            (
                records.point,
                Packet(
                    "",
                    int(records.frame[i]),
                    int(records.time_ns[i]),
                    int(records.wire_length[i]),
                    records.buffer[records.offset[i] :][: records.captured_length[i]].tobytes(),
                ),
            )
            for i in range(records.frame.size)
        ]
    # Points may be renamed until the end, so names are looked up last.
    names = [p.name for p in capture.points]
    return capture.points, sorted(
        (found._replace(point=names[point]) for point, found in packets), key=lambda p: p.frame
    )


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + pad(value)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    length = struct.pack(f"{order}I", 12 + len(pad(body)))
    return struct.pack(f"{order}I", kind) + length + pad(body) + length


def section(order: str = "<", opts: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    return block(SHB, struct.pack(f"{order}IHHq", 0x1A2B3C4D, *version, -1) + opts, order)


def interface(
    link_type: int = 1, snaplen: int = 0, name: str | None = None, opts: bytes = b"", order: str = "<"
) -> bytes:
    if name is not None:
        opts = option(IF_NAME, name.encode(), order) + opts
    return block(IDB, struct.pack(f"{order}HHI", link_type, 0, snaplen) + opts, order)


def packet(
    data: bytes = b"data", *, on: int = 0, ticks: int = 1, wire: int = 0, opts: bytes = b"", order: str = "<"
) -> bytes:
    head = struct.pack(f"{order}IIIII", on, ticks >> 32, ticks & 0xFFFFFFFF, len(data), max(wire, len(data)))
    return block(EPB, head + pad(data) + opts, order)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("<>"),
            st.lists(
                st.tuples(
                    st.integers(0, 2),
                    st.integers(0, 2**52),
                    st.binary(max_size=40),
                    st.integers(0, 99),
                    st.booleans(),
                ),
                max_size=8,
            ),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_sections_of_both_byte_orders_in_one_file_give_what_was_written(
    sections: list[tuple[str, list[tuple[int, int, bytes, int, bool]]]],
) -> None:
    content = b""
    expected: list[Packet] = []
    for order, packets in sections:
        content += section(order)
        content += b"".join(interface(name=f"if{i}", order=order) for i in range(3))
        for on, ticks, data, more, noisy in packets:
            flags = option(EPB_FLAGS, b"\1\0\0\0", order) + bytes(4) if noisy else b""
            content += packet(data, on=on, ticks=ticks, wire=len(data) + more, opts=flags, order=order)
            content += block(UNKNOWN, b"unknown", order) if noisy else b""
            expected.append(Packet(f"if{on}", len(expected) + 1, ticks * 1000, len(data) + more, data))
    points, found = read(content)
    assert found == expected
    assert [p.name for p in points] == ["if0", "if1", "if2"]
    assert {p.name: p.packets for p in points} == {
        f"if{i}": sum(p.point == f"if{i}" for p in expected) for i in range(3)
    }


def test_blocks_across_chunk_ends_are_read_once_and_whole() -> None:
    random = np.random.default_rng(7)
    sizes = random.integers(0, 4000, 1500).tolist()
    content = section() + interface()
    datas = [random.bytes(size) for size in sizes]
    content += b"".join(packet(data, ticks=i) for i, data in enumerate(datas))
    assert len(content) > 2 * CHUNK_BYTES
    _, found = read(content)
    assert [p.data for p in found] == datas
    assert [p.frame for p in found] == list(range(1, 1501))


def test_blocks_longer_than_a_chunk_are_read() -> None:
    long = bytes(2 * CHUNK_BYTES)
    content = section(opts=option(COMMENT, b"hello")) + interface() + packet(b"before")
    content += block(UNKNOWN, long) + packet(b"between") + packet(long) + packet(b"after")
    points, found = read(content)
    assert [p.data for p in found] == [b"before", b"between", long, b"after"]
    assert not points[0].truncated


def test_a_section_header_longer_than_a_chunk_is_read() -> None:
    huge = b"".join(option(COMMENT, bytes(65532)) for _ in range(20))
    assert [p.data for p in read(section(opts=huge) + interface() + packet(b"x"))[1]] == [b"x"]


# ---- names and points


def test_a_single_interface_is_named_after_the_file() -> None:
    points, _ = read(section() + interface(name="eth0", snaplen=96) + packet())
    assert [(p.name, p.interface, p.link_type, p.snaplen) for p in points] == [("cap", "eth0", "EN10MB", 96)]
    assert [p.name for p in read(section() + interface(name="eth0") + packet(), "inside")[0]] == ["inside"]


def test_several_interfaces_are_named_by_if_name_or_number() -> None:
    content = section() + interface(name="eth0") + interface(101) + interface(name="wg0") + interface(113)
    content += packet(on=3) + packet(on=1)
    points, found = read(content)
    # eth0 and wg0 saw nothing but carry a name.
    assert sorted((p.name, p.packets, p.link_type) for p in points) == [
        ("cap:1", 1, "RAW"),
        ("cap:3", 1, "LINUX_SLL"),
        ("eth0", 0, "EN10MB"),
        ("wg0", 0, "EN10MB"),
    ]
    assert [p.point for p in found] == ["cap:3", "cap:1"]
    assert sorted(p.name for p in read(content, "host")[0]) == ["host:1", "host:3", "host:eth0", "host:wg0"]


def test_interfaces_of_one_name_in_one_section_stay_apart() -> None:
    # Every container has an eth0 of its own.
    content = section() + interface(name="eth0") + interface(name="eth0") + packet(on=0) + packet(on=1)
    assert [p.point for p in read(content)[1]] == ["eth0:0", "eth0:1"]


def test_an_interface_of_a_later_section_is_the_same_point_when_name_and_link_type_agree() -> None:
    one = section() + interface(name="a") + interface(name="b") + packet(on=0) + packet(on=1)
    two = section(">") + interface(name="b", order=">") + interface(101, name="a", order=">")
    two += packet(on=0, order=">") + packet(on=1, order=">")
    points, found = read(one + two)
    assert [(p.name, p.link_type, p.packets) for p in points] == [
        ("a:0", "EN10MB", 1),
        ("b", "EN10MB", 2),
        ("a:3", "RAW", 1),
    ]
    assert [p.frame for p in found] == [1, 2, 3, 4]


def test_a_file_without_packets_or_interfaces_is_still_a_point() -> None:
    assert [(p.name, p.packets, p.link_type) for p in read(section())[0]] == [("cap", 0, "UNKNOWN")]
    assert [(p.name, p.link_type) for p in read(section() + interface(101))[0]] == [("cap", "RAW")]


# ---- packet blocks


def test_a_simple_packet_has_no_time_and_is_cut_at_the_snaplen() -> None:
    body = struct.pack("<I", 60) + bytes(8)
    points, found = read(section() + interface(snaplen=6) + block(SPB, body) * 2)
    assert [(p.frame, p.time_ns, p.wire, len(p.data)) for p in found] == [(1, 0, 60, 6), (2, 0, 60, 6)]
    assert (points[0].packets, points[0].first_ns, points[0].dated) == (2, None, False)


def test_the_obsolete_packet_block_counts_drops() -> None:
    def old(drops: int) -> bytes:
        return block(OLD, struct.pack("<HHIIII", 0, drops, 0, 7, 4, 60) + b"data")

    points, found = read(section() + interface() + old(3) + old(0xFFFF) + old(2))
    assert [(p.time_ns, p.wire, p.data) for p in found] == [(7000, 60, b"data")] * 3
    assert points[0].dropped_by_kernel == 5


def test_other_records_take_a_frame_number_as_in_wireshark() -> None:
    custom = struct.pack("<I", 32473) + b"whatever"  # the enterprise number of documentation, RFC 5612
    content = section() + interface() + packet() + block(JOURNAL, b"A=1\n") + packet()
    content += block(CUSTOM, custom) + block(CUSTOM_NO_COPY, custom) + block(NRB, bytes(4)) + packet()
    points, found = read(content)
    assert [p.frame for p in found] == [1, 3, 6]
    assert points[0].packets == 3


def test_a_packet_of_an_unknown_interface_costs_only_itself() -> None:
    content = section() + interface() + packet(b"one") + packet(b"two", on=1) + packet(b"three")
    points, found = read(content)
    assert [(p.frame, p.data) for p in found] == [(1, b"one"), (3, b"three")]
    assert points[0].truncated
    assert "names interface 1 of 1" in str(points[0].damage)


def test_an_interface_must_be_described_before_its_packets() -> None:
    _, found = read(section() + interface() + packet(b"early", on=1) + interface() + packet(b"late", on=1))
    assert [p.data for p in found] == [b"late"]


def test_a_packet_that_claims_more_than_its_block_costs_only_itself() -> None:
    bad = block(EPB, struct.pack("<IIIII", 0, 0, 1, 5000, 5000) + b"data")
    points, found = read(section() + interface() + bad + packet(b"good"))
    assert [p.data for p in found] == [b"good"]
    assert "claims 5000 bytes of 4" in str(points[0].damage)


@pytest.mark.parametrize("length", [0, 1, 4, 8, 11, 17 << 20, 0xFFFFFFFF])
def test_an_impossible_block_length_ends_the_file_there(length: int) -> None:
    good = section() + interface() + packet(b"one")
    points, found = read(good + struct.pack("<II", EPB, length) + bytes(64))
    assert [p.data for p in found] == [b"one"]
    assert f"the block at byte {len(good)} claims {length} bytes" in str(points[0].damage)


def test_a_block_whose_two_lengths_differ_ends_the_file_there() -> None:
    good = section() + interface() + packet(b"one")
    broken = packet(b"two")[:-4] + struct.pack("<I", 32)
    points, found = read(good + broken + packet(b"three"))
    assert [p.data for p in found] == [b"one"]
    assert f"byte {len(good)} claims 36 bytes at its start and 32 at its end" in str(points[0].damage)


def test_a_length_that_is_no_multiple_of_four_is_rounded_up() -> None:
    body = struct.pack("<IIIII", 0, 0, 1, 3, 3) + b"abc"
    length = struct.pack("<I", 12 + len(body))
    odd = struct.pack("<I", EPB) + length + pad(body) + length
    assert [p.data for p in read(section() + interface() + odd + packet(b"next"))[1]] == [b"abc", b"next"]


@pytest.mark.parametrize(
    "content",
    [section()[:20], section(version=(2, 0)), b"\x0a\x0d\x0d\x0a" + bytes(40), section()[:6]],
)
def test_a_damaged_first_section_header_is_one_clear_error(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^cap.pcapng: .*section header"):
        read(content)


def test_a_damaged_later_section_header_keeps_what_came_before() -> None:
    good = section() + interface() + packet(b"one")
    for bad in (section(version=(2, 0)), b"\x0a\x0d\x0d\x0a" + bytes(40)):
        points, found = read(good + bad + interface() + packet(b"two"))
        assert [p.data for p in found] == [b"one"]
        assert str(points[0].damage).startswith(f"the section header at byte {len(good)}")


def test_every_cut_keeps_the_blocks_before_it() -> None:
    content = section(opts=option(COMMENT, b"c")) + interface(name="eth0")
    ends = [len(content)]
    for i in range(3):
        content += packet(bytes(i), ticks=i)
        ends.append(len(content))
    for cut in range(40, len(content)):
        points, found = read(content[:cut])
        assert len(found) == sum(end <= cut for end in ends[1:])
        whole = cut in ends or cut == len(section(opts=option(COMMENT, b"c")))
        assert points[0].truncated is not whole


# ---- options


def test_comments_are_kept_with_their_frames() -> None:
    content = section(opts=option(COMMENT, b"about the section"))
    content += interface(opts=option(COMMENT, "über das Interface".encode()))
    content += packet() + packet(opts=option(EPB_FLAGS, bytes(4)) + option(COMMENT, b"odd \xff one"))
    points, _ = read(content)
    assert [(c.frame, c.text) for c in points[0].comments] == [
        (None, "about the section"),
        (None, "über das Interface"),
        (2, "odd � one"),
    ]


def test_comments_are_limited() -> None:
    content = section() + interface() + packet(opts=option(COMMENT, b"x")) * (MAX_COMMENTS + 10)
    points, found = read(content)
    assert len(found) == MAX_COMMENTS + 10
    assert len(points[0].comments) == MAX_COMMENTS
    content = section() + interface() + packet(opts=option(COMMENT, bytes(60_000))) * 100
    assert sum(len(c.text) for c in read(content)[0][0].comments) <= 1 << 20


def test_the_last_interface_statistics_tell_the_drops_and_sections_add_up() -> None:
    def statistics(on: int, drops: int, order: str = "<") -> bytes:
        body = struct.pack(f"{order}III", on, 0, 0)
        return block(ISB, body + option(ISB_IFDROP, struct.pack(f"{order}Q", drops), order), order)

    one = section() + interface(name="a") + interface(name="b") + packet(on=1) + packet()
    content = one + statistics(0, 3) + statistics(0, 5) + one + statistics(0, 2) + statistics(7, 9)
    points, _ = read(content)
    assert [(p.name, p.dropped_by_kernel) for p in points] == [("a", 7), ("b", None)]


def test_drop_counts_of_packets_add_up() -> None:
    drops = option(EPB_DROPCOUNT, struct.pack("<Q", 2))
    assert read(section() + interface() + packet(opts=drops) * 3)[0][0].dropped_by_kernel == 6


def test_an_option_that_is_longer_than_its_block_is_said_and_ignored() -> None:
    bad = struct.pack("<HH", COMMENT, 5000) + b"text"
    points, found = read(section() + interface(opts=bad) + packet(b"x"))
    assert [p.data for p in found] == [b"x"]
    assert "longer than its block" in str(points[0].damage)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=9)), max_size=5), min_size=1, max_size=6
    ),
    st.sampled_from("<>"),
)
def test_looking_for_options_column_by_column_finds_what_a_plain_loop_finds(
    rows: list[list[tuple[int, bytes]]], order: str
) -> None:
    data, start, end = b"", [], []
    for row in rows:
        start.append(len(data))
        data += b"".join(option(code, value, order) for code, value in row)
        end.append(len(data))
    found = rows_with_options(
        np.frombuffer(data + bytes(256), np.uint8), np.array(start), np.array(end), order, (1, 4)
    )
    expected = []
    for i in range(len(rows)):
        codes = [code for code, _ in options(memoryview(data), start[i], end[i], order)[0]]
        if set(codes) & {1, 4}:
            expected.append(i)
    assert found.tolist() == expected


# ---- time


@settings(max_examples=300, deadline=None)
@given(
    ticks=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 10**10)),
    resolution=st.integers(0, 255),
    offset_s=st.one_of(st.just(0), st.integers(-(2**63), 2**63 - 1), st.integers(-(10**9), 10**10)),
)
def test_any_resolution_and_offset_gives_the_exact_time_or_the_limit(
    ticks: int, resolution: int, offset_s: int
) -> None:
    unit = Fraction(1, 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution)
    limit = 2**63 - 1
    ticks_ns = min(limit, int(ticks * unit * 10**9))
    offset_ns = max(-limit, min(limit, offset_s * 10**9))
    expected = min(limit, ticks_ns + offset_ns)
    high, low = np.array([ticks >> 32], np.uint32), np.array([ticks & 0xFFFFFFFF], np.uint32)
    (got,) = timestamps_ns(high, low, resolution, offset_s).tolist()
    # Beyond 2**-34 s binary fractions are cut, and whole seconds clamp near the year 2262.
    assert abs(got - expected) <= (1 if abs(expected) < limit - 2 * 10**9 else 2 * 10**9)
    if not resolution & 0x80:
        assert got == expected


@needs_tshark
@pytest.mark.parametrize("resolution", [0, 3, 6, 9, 0x80 | 10, 0x80 | 20, 0x80 | 30])
def test_resolutions_and_offsets_are_read_as_tshark_does(tmp_path: Path, resolution: int) -> None:
    second = 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution
    opts = option(IF_TSRESOL, bytes([resolution])) + option(IF_TSOFFSET, struct.pack("<q", 1000))
    ticks = [1_700_000_000 * second + part for part in (0, second // 3, second - 1)]
    content = section() + interface(opts=opts) + b"".join(packet(ticks=t) for t in ticks)
    path = tmp_path / "r.pcapng"
    path.write_bytes(content)
    assert [(p.frame, p.time_ns) for p in read(content)[1]] == [
        (frame, time_ns) for frame, time_ns, _ in tshark_frames(path)
    ]


# ---- whole files, judged by others


def tshark_frames(path: Path) -> list[tuple[int, int, str]]:
    fields = ["frame.number", "frame.time_epoch", "frame.interface_name"]
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", *[x for f in fields for x in ("-e", f)]]
    rows = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        number, epoch, interface_name = line.split("\t")
        seconds, _, fraction = epoch.partition(".")
        time_ns = int(seconds) * 10**9 + int(fraction.ljust(9, "0")) if epoch else 0
        rows.append((int(number), time_ns, interface_name))
    return rows


@needs_shared
@needs_tshark
@pytest.mark.parametrize(
    "file",
    [
        "pcapng-test-generator/output_be/difficult/test202.pcapng",
        "pcapng-test-generator/output_le/difficult/test201.pcapng",
        "pcapng-test-generator/output_le/basic/test006.pcapng",
        "pcapplusplus/Tests/Pcap++Test/PcapExamples/many_interfaces-1.pcapng",
        "pcapplusplus/Tests/Pcap++Test/PcapExamples/pcapng-example.pcapng",
        "ptcpdump/testdata/format/dns.pcapng",
    ],
)
def test_frames_times_and_interfaces_are_those_of_tshark(file: str) -> None:
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"needs {file}")
    points, found = read(path.read_bytes())
    interfaces = {p.name: p.interface or "unknown" for p in points}
    # Records without an interface are no packets; times beyond the range of int64 stop at its end.
    expected = [
        (frame, min(time_ns, 2**63 - 1), name) for frame, time_ns, name in tshark_frames(path) if name
    ]
    assert [(p.frame, p.time_ns) for p in found] == [(frame, time_ns) for frame, time_ns, _ in expected]
    assert expected
    # tshark looks interface names up in the first section, whichever section the packet is in.
    if path.read_bytes().count(b"\x0a\x0d\x0d\x0a") == 1:
        assert [interfaces[p.point] for p in found] == [name for _, _, name in expected]


@needs_shared
@needs_tshark
def test_packet_comments_are_those_of_tshark() -> None:
    for path in sorted((SHARED / "ptcpdump").rglob("*.pcapng"))[:4]:
        printed = subprocess.run(
            ["tshark", "-n", "-r", path, "-T", "fields", "-e", "frame.number", "-Y", "frame.comment"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        points, _ = read(path.read_bytes())
        frames = sorted({c.frame for p in points for c in p.comments if c.frame is not None})
        assert frames == [int(number) for number in printed.split()]


@needs_shared
@needs_capinfos
def test_packet_counts_equal_capinfos_on_every_file_that_it_reads() -> None:
    paths = sorted(p for p in SHARED.rglob("*") if p.is_file() and p.suffix not in {".json", ".md", ".txt"})
    table = subprocess.run(
        ["capinfos", "-T", "-r", "-M", "-c", *map(str, paths)], capture_output=True, text=True, check=False
    ).stdout
    expected = {path: int(count) for path, count in (line.split("\t") for line in table.splitlines())}
    assert len(expected) > 1000
    wrong = {}
    for path, count in expected.items():
        capture = open_capture(Source((Path(path),)), ReadOptions())
        assert isinstance(capture, FileCapture)
        frames = Counter(frame for records in capture.records() for frame in records.frame.tolist())
        packets = sum(p.packets for p in capture.points)
        if (packets, len(frames)) != (count, count):
            wrong[path] = (count, packets, len(frames))
    assert wrong == {}

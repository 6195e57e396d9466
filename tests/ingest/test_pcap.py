"""pcap files: every variant gives the records that libpcap, Wireshark and dpkt find in them."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import dpkt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.errors import InputError
from nattrace.ingest import ReadOptions, open_capture
from nattrace.ingest.capture import FileCapture
from nattrace.ingest.chunks import CHUNK_BYTES
from nattrace.ingest.linktypes import MAX_PACKET_BYTES, link_type_name
from nattrace.ingest.source import PADDING, PointInfo, Source

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captures")
needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")

MICRO, NANO, MODIFIED = 0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34


class Packet(NamedTuple):
    frame: int
    time_ns: int
    wire: int
    data: bytes


def read(content: bytes | io.RawIOBase) -> tuple[list[PointInfo], list[Packet]]:
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    capture = open_capture(Source((stream,)), ReadOptions())  # type: ignore[arg-type]
    assert isinstance(capture, FileCapture)
    packets = []
    for records in capture.records():
        assert records.buffer.size >= int((records.offset + records.captured_length).max()) + PADDING
        packets += [
            Packet(
                int(records.frame[i]),
                int(records.time_ns[i]),
                int(records.wire_length[i]),
                records.buffer[records.offset[i] :][: records.captured_length[i]].tobytes(),
            )
            for i in range(records.frame.size)
        ]
    return capture.points, packets


def pcap_header(
    *,
    magic: int = MICRO,
    order: str = "<",
    version: tuple[int, int] = (2, 4),
    snaplen: int = 262144,
    link_type: int = 1,
) -> bytes:
    return struct.pack(f"{order}IHHiIII", magic, *version, 0, 0, snaplen, link_type)


def record(data: bytes, *, order: str = "<", seconds: int = 1, fraction: int = 0, wire: int = 0) -> bytes:
    return struct.pack(f"{order}IIII", seconds, fraction, len(data), wire or len(data)) + data


packets_strategy = st.lists(
    st.tuples(
        st.integers(0, 2**32 - 1), st.integers(0, 999_999), st.binary(max_size=80), st.integers(0, 2000)
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(
    packets=packets_strategy,
    order=st.sampled_from("<>"),
    magic=st.sampled_from([MICRO, NANO, MODIFIED]),
    snaplen=st.sampled_from([0, 96, 262144, 2**31]),
)
def test_every_variant_gives_what_was_written(
    packets: list[tuple[int, int, bytes, int]], order: str, magic: int, snaplen: int
) -> None:
    content = pcap_header(magic=magic, order=order, snaplen=snaplen)
    extra = b"\x07" * 8 if magic == MODIFIED else b""
    for seconds, fraction, data, more in packets:
        content += struct.pack(f"{order}IIII", seconds, fraction, len(data), len(data) + more) + extra + data
    unit_ns = 1 if magic == NANO else 1000
    points, found = read(content)
    assert found == [
        Packet(i, seconds * 10**9 + fraction * unit_ns, len(data) + more, data)
        for i, (seconds, fraction, data, more) in enumerate(packets, 1)
    ]
    assert [(p.packets, p.link_type, p.snaplen) for p in points] == (
        [(len(packets), "EN10MB", snaplen or None)] if packets else [(0, "EN10MB", snaplen or None)]
    )
    assert not points[0].truncated


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packets_a_second", [3, 700, 20_000])
def test_dense_captures_whose_packets_hold_records(order: str, packets_a_second: int) -> None:
    """Records of one second are found all at once; what looks like one inside a packet is none."""
    rng = random.Random(packets_a_second)
    packets, records = [], []
    for frame in range(1, 30_001):
        seconds = 1_700_000_000 + frame // packets_a_second
        data = rng.randbytes(rng.choice([20, 60, 96]))
        if rng.random() < 0.01:
            data = data[:7] + record(data[:9], order=order, seconds=seconds) * rng.choice([1, 2]) + data[7:]
        packets.append(Packet(frame, seconds * 10**9 + 5000, len(data), data))
        records.append(record(data, order=order, seconds=seconds, fraction=5))
    content = pcap_header(order=order) + b"".join(records)
    assert len(content) > 2 * CHUNK_BYTES
    points, found = read(content)
    assert found == packets
    assert not points[0].truncated
    points, found = read(content[:-1])
    assert found == packets[:-1]
    assert points[0].truncated


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.binary(max_size=200)), max_size=20), st.booleans())
def test_what_dpkt_writes_is_read_back(packets: list[tuple[int, bytes]], nano: bool) -> None:
    file = io.BytesIO()
    writer = dpkt.pcap.Writer(file, nano=nano)
    for seconds, data in packets:
        writer.writepkt(data, ts=seconds)
    _, found = read(file.getvalue())
    assert [(p.time_ns, p.data) for p in found] == [(seconds * 10**9, data) for seconds, data in packets]


class Dribbling(io.RawIOBase):
    """A pipe that never gives more than a few bytes at a time."""

    def __init__(self, content: bytes, sizes: int) -> None:
        self._content = io.BytesIO(content)
        self._sizes = sizes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._content.readinto(buffer[: self._sizes])


def test_a_file_of_many_chunks_reads_the_same_from_a_slow_pipe_and_by_a_plain_loop() -> None:
    random = np.random.default_rng(4)
    sizes = random.integers(0, 3000, 2500).tolist()
    content = pcap_header() + b"".join(
        record(random.bytes(size), seconds=i, wire=size + 5) for i, size in enumerate(sizes)
    )
    assert len(content) > 3 * CHUNK_BYTES
    expected: list[Packet] = []
    at = 24
    while at < len(content):
        seconds, _, captured, wire = struct.unpack_from("<IIII", content, at)
        expected.append(
            Packet(len(expected) + 1, seconds * 10**9, wire, content[at + 16 : at + 16 + captured])
        )
        at += 16 + captured
    assert read(content)[1] == expected
    assert read(Dribbling(content, 4093))[1] == expected


def test_records_that_fill_a_chunk_exactly_are_all_found() -> None:
    for spare in range(-20, 21):
        data = bytes(1000)
        count = (CHUNK_BYTES - 24) // 1016
        last = bytes(CHUNK_BYTES - 24 - count * 1016 - 16 + spare)
        content = pcap_header() + record(data) * count + record(last) + record(b"the next")
        _, found = read(content)
        assert len(found) == count + 2
        assert found[-1].data == b"the next"


def test_a_record_longer_than_a_chunk_is_read_where_the_link_type_allows_it() -> None:
    dbus = 231
    message = b"\x01" * (3 * CHUNK_BYTES + 7)
    _, found = read(pcap_header(link_type=dbus) + record(b"before") + record(message) + record(b"after"))
    assert [p.data for p in found] == [b"before", message, b"after"]


@pytest.mark.parametrize(
    ("version", "lengths", "expected"),
    [
        ((2, 4), (4, 60), (4, 60)),
        ((2, 2), (60, 4), (4, 60)),  # before 2.3 the wire length came first
        ((543, 0), (60, 4), (4, 60)),  # DG/UX
        ((2, 3), (4, 60), (4, 60)),  # 2.3 was written either way
        ((2, 3), (60, 4), (4, 60)),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_order_of_the_lengths_follows_the_version(
    version: tuple[int, int], lengths: tuple[int, int], expected: tuple[int, int], order: str
) -> None:
    content = pcap_header(version=version, order=order)
    content += (struct.pack(f"{order}IIII", 1, 2, *lengths) + b"data") * 3
    _, found = read(content)
    assert [(len(p.data), p.wire) for p in found] == [expected] * 3


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (1, "EN10MB"),
        (0x14000001, "EN10MB"),  # frame check sequence of 1 unit present
        (101, "RAW"),
        (12, "RAW"),  # DLT_RAW as Linux numbers it
        (113, "LINUX_SLL"),
        (9, "PPP"),
        (65000, "LINKTYPE_65000"),
    ],
)
def test_the_link_type_is_the_low_bits_under_its_libpcap_name(field: int, name: str) -> None:
    points, _ = read(pcap_header(link_type=field) + record(b"\0" * 60))
    assert [p.link_type for p in points] == [name]


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump")
def test_link_types_are_named_as_tcpdump_names_them(tmp_path: Path) -> None:
    file = tmp_path / "empty.pcap"
    wrong = {}
    for link_type in (0, 1, 9, 50, 51, 101, 105, 108, 113, 127, 192, 228, 229, 239, 276):
        file.write_bytes(pcap_header(link_type=link_type))
        said = subprocess.run(["tcpdump", "-r", file], capture_output=True, text=True, check=False).stderr
        name = said.partition("link-type ")[2].split(" ")[0].rstrip(",\n")
        if name != link_type_name(link_type):
            wrong[link_type] = name
    assert wrong == {}


def test_an_impossible_length_ends_the_file_there_and_keeps_what_came_before() -> None:
    good = pcap_header() + record(b"one") + record(b"two")
    bad = struct.pack("<IIII", 1, 2, MAX_PACKET_BYTES + 1, 60)
    points, found = read(good + bad + bytes(100))
    assert [p.data for p in found] == [b"one", b"two"]
    assert points[0].truncated
    assert f"byte {len(good)} claims 262145 bytes" in str(points[0].damage)
    # The same when the bytes it claims are really there.
    points, found = read(good + bad + bytes(MAX_PACKET_BYTES + 1) + record(b"three"))
    assert [p.data for p in found] == [b"one", b"two"]
    assert f"byte {len(good)} " in str(points[0].damage)


@pytest.mark.parametrize("missing", [1, 3, 4, 12, 18])
def test_a_file_cut_inside_its_last_record_says_so(missing: int) -> None:
    content = pcap_header() + record(b"one") + record(b"two")
    points, found = read(content[:-missing])
    assert [p.data for p in found] == [b"one"]
    assert (points[0].packets, points[0].truncated) == (1, True)
    assert points[0].damage == "ends inside the record at byte 43"


def test_a_file_of_nothing_but_its_header_is_a_point_without_packets() -> None:
    points, found = read(pcap_header())
    assert found == []
    assert [(p.packets, p.first_ns, p.truncated) for p in points] == [(0, None, False)]


def test_a_cut_header_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="ends at byte 20, inside the 24-byte pcap header"):
        read(pcap_header()[:20])


def test_an_unknown_version_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"byte 4: pcap version 1\.4 is unknown"):
        read(pcap_header(version=(1, 4)))


def test_first_and_last_are_the_earliest_and_latest_not_the_outermost() -> None:
    points, _ = read(
        pcap_header() + record(b"a", seconds=5) + record(b"b", seconds=9) + record(b"c", seconds=3)
    )
    assert (points[0].first_ns, points[0].last_ns) == (3 * 10**9, 9 * 10**9)


@needs_shared
@needs_tshark
@pytest.mark.parametrize(
    "name",
    [
        "docker-ping/docker0.pcap",
        "docker-ping/eth0.pcap",
        "tcpdump-tests/tests/pim-packet-assortment.pcap",
        "libpcap-tests/tests/filter/ipv6_ext_headers.pcap",
        "pcapplusplus/Tests/Pcap++Test/PcapExamples/nanosecs_big_endian.pcap",
    ],
)
def test_frames_times_and_lengths_are_those_of_tshark(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name}")
    assert_as_tshark(path)


def assert_as_tshark(path: Path) -> None:
    fields = ["frame.number", "frame.time_epoch", "frame.len", "frame.cap_len"]
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", *[x for f in fields for x in ("-e", f)]]
    # Only the frame layer is wanted, so let tshark skip the others.
    printed = subprocess.run(
        [*command, "--disable-protocol", "ip", "--disable-protocol", "ipv6"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = []
    for line in printed.splitlines():
        number, epoch, wire, captured = line.split("\t")
        seconds, _, fraction = epoch.partition(".")
        expected.append(
            (int(number), int(seconds) * 10**9 + int(fraction.ljust(9, "0")), int(wire), int(captured))
        )
    _, found = read(path.read_bytes())
    assert [(p.frame, p.time_ns, p.wire, len(p.data)) for p in found] == expected
    assert expected


def comparable(snaplen: int, *sizes: int) -> int:
    """Return what a capture of whole packets of these sizes says every packet has."""
    content = b"".join([pcap_header(snaplen=snaplen), *(record(bytes(size)) for size in sizes)])
    return open_capture(Source((io.BytesIO(content),)), ReadOptions()).comparable_bytes()


def test_a_snaplen_counts_before_a_packet_is_long_enough_to_show_it() -> None:
    assert comparable(96, 60, 74) == 96 - 14
    assert comparable(262144, 60, 1514) == 65535


def test_a_snaplen_that_packets_exceed_means_nothing() -> None:
    assert comparable(20, 60, 74) == 65535
    assert comparable(0, 60) == 65535

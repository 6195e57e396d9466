"""From arguments to captures: names, rotation, folders, formats by magic, errors of one line."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from nattrace.errors import InputError, NattraceError, UsageError
from nattrace.ingest import PointInfo, ReadOptions, Source, open_capture, parse_sources, unique_names
from nattrace.ingest.capture import FileCapture

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captures")


def pcap(*seconds: int, link_type: int = 1, data: bytes = b"\0" * 60) -> bytes:
    content = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, link_type)
    for second in seconds:
        content += struct.pack("<IIII", second, 0, len(data), len(data)) + data
    return content


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def open_one(*arguments: str) -> FileCapture:
    (source,) = parse_sources(arguments)
    capture = open_capture(source, ReadOptions())
    assert isinstance(capture, FileCapture)
    return capture


def read(capture: FileCapture) -> list[tuple[str, int, int]]:
    rows = []
    for records in capture.records():
        rows += [
            (records.point, int(frame), int(time) // 10**9)
            for frame, time in zip(records.frame, records.time_ns, strict=True)
        ]
    return [(capture.points[point].name, frame, second) for point, frame, second in rows]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("docker0.pcap", "docker0"),
        ("eth0.pcapng.gz", "eth0"),
        ("ens1.100.pcap", "ens1.100"),
        ("host.eth0", "host.eth0"),
        ("trace.pcap0", "trace.pcap0"),
        ("UPPER.PCAP.XZ", "UPPER"),
    ],
)
def test_a_point_is_named_after_its_files_stem(tmp_path: Path, file: str, name: str) -> None:
    assert read(open_one(write(tmp_path / file, pcap(1)))) == [(name, 1, 1)]


def test_a_point_takes_the_name_given(tmp_path: Path) -> None:
    capture = open_one("inside=" + write(tmp_path / "a.pcap", pcap(1)))
    assert [(p.name, p.named) for p in capture.points] == [("inside", True)]
    capture.close()


def test_a_path_that_exists_wins_over_reading_it_as_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a=b.pcap"), pcap(1))
    write(Path("b.pcap"), pcap(1, 2))
    assert [p.name for p in open_one("a=b.pcap").points] == ["a=b"]
    assert [p.name for p in open_one("x=b.pcap").points] == ["x"]


def test_a_pathlike_is_a_path_and_never_a_name(tmp_path: Path) -> None:
    (source,) = parse_sources([Path(write(tmp_path / "x=y.pcap", pcap(1)))])
    assert source.name is None


def test_the_file_is_reported_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("sub/eth0.pcap"), pcap(1))
    assert [p.file for p in open_one("sub/eth0.pcap").points] == ["sub/eth0.pcap"]


def test_rotated_files_of_one_name_are_one_point_in_the_order_of_time(tmp_path: Path) -> None:
    later = write(tmp_path / "x.pcap0", pcap(30, 31))
    first = write(tmp_path / "x.pcap1", pcap(10, 11, 12))
    middle = write(tmp_path / "x.pcap2", pcap(20))
    capture = open_one(f"eth0={later}", f"eth0={first}", f"eth0={middle}")
    assert read(capture) == [("eth0", n, s) for n, s in enumerate([10, 11, 12, 20, 30, 31], 1)]
    assert [(p.packets, p.first_ns, p.last_ns) for p in capture.points] == [(6, 10 * 10**9, 31 * 10**9)]


def test_rotated_files_without_a_name_are_points_of_their_own(tmp_path: Path) -> None:
    files = [write(tmp_path / f"x.pcap{n}", pcap(n)) for n in range(3)]
    assert len(parse_sources(files)) == 3


def test_damage_in_one_rotated_file_costs_only_that_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a", pcap(1, 2)[:-5])
    second = write(tmp_path / "b", pcap(3))
    capture = open_one(f"x={first}", f"x={second}")
    assert [second for _, _, second in read(capture)] == [1, 3]
    assert capture.points[0].truncated
    assert str(capture.points[0].damage).startswith(f"{first}: ends inside the record at byte")


def test_a_folder_gives_the_captures_in_it_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.pcap", pcap(1))
    write(tmp_path / "a.dat", pcap(2))
    write(tmp_path / "notes.txt", b"not a capture\n")
    write(tmp_path / "empty", b"")
    sources = parse_sources([str(tmp_path)])
    assert [Path(str(s.files[0])).name for s in sources] == ["a.dat", "b.pcap"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no source given"),
        (["-", "-"], "standard input can be only one source"),
        (["=x.pcap"], "expected NAME=PATH"),
        (["eth0="], "expected NAME=PATH"),
    ],
)
def test_senseless_arguments_are_usage_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_sources(arguments)


@pytest.mark.parametrize("path", ["missing.pcap", "x=missing.pcap", "a\0b", "x" * 5000])
def test_a_missing_file_is_an_input_error(path: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        parse_sources([path])


def test_an_unreadable_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder without pcap or pcapng files"):
        parse_sources([str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xd4\xc3", "ends at byte 2, too short"),
        (b"snoop\0\0\0\0\0\0\x02", "a snoop capture; convert it: editcap"),
        (b"PK\x03\x04rest", "a zip archive; unpack it"),
        (b"\0" * 257 + b"ustar\0", "byte 257: a tar archive; unpack it"),
        (b"\x7fELF\x02\x01\x01\0", "byte 0: 7f454c46 begins no capture format"),
        (b"\x0a\x0d\x0d\x0a", "ends at byte 4, inside its section header block"),
    ],
)
def test_what_is_no_capture_is_said_in_one_line_with_advice(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = write(tmp_path / "f.pcap", content)
    with pytest.raises(InputError, match=message) as caught:
        read(open_one(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_opened_as_text_is_an_input_error(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "f.pcap", pcap(1)))
    with path.open(encoding="latin-1") as text, pytest.raises(InputError, match="cannot be read"):
        open_capture(Source((text,)), ReadOptions())  # type: ignore[arg-type]


def test_a_failing_disk_is_an_input_error() -> None:
    class Failing(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _buffer: memoryview) -> int:  # type: ignore[override]
            raise OSError(5, "Input/output error")

    with pytest.raises(InputError, match="Input/output error"):
        open_capture(Source((Failing(),)), ReadOptions())  # type: ignore[arg-type]


def test_an_open_file_is_a_source_and_is_left_open(tmp_path: Path) -> None:
    with Path(write(tmp_path / "eth7.pcap", pcap(1, 2))).open("rb") as file:
        (source,) = parse_sources([file])
        capture = open_capture(source, ReadOptions())
        assert isinstance(capture, FileCapture)
        assert len(read(capture)) == 2
        assert not file.closed
    assert capture.points[0].name == "eth7"


def test_standard_input_needs_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pcap(*range(1, 30_001))
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb") as sink:
            sink.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reader, "rb") as source:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=source))
        capture = open_one("-")
        assert capture.comparable_bytes() == 65535
        rows = read(capture)
    thread.join()
    assert rows[0] == ("stdin", 1, 1)
    assert rows[-1] == ("stdin", 30_000, 30_000)


def test_a_closed_standard_input_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        parse_sources(["-"])


def test_looking_at_the_first_chunk_takes_no_packet_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pcap", pcap(*range(1, 40_001)))
    capture = open_one(path)
    capture.comparable_bytes()
    table_rows = sum(info.packets for info in capture.points)
    assert table_rows == 0
    assert [frame for _, frame, _ in read(capture)] == list(range(1, 40_001))


def test_packets_are_decoded_or_counted_by_reason(tmp_path: Path) -> None:
    arp = b"\xff" * 6 + b"\x02" * 6 + b"\x08\x06" + bytes(46)
    capture = open_one(write(tmp_path / "a.pcap", pcap(1, 2, data=arp)))
    assert sum(len(batch.table) for batch in capture.batches(ReadOptions())) == 0
    (info,) = capture.points
    assert (info.packets, info.decoded, sum(info.skipped.values())) == (2, 0, 2)


@needs_shared
def test_the_batches_of_docker0_and_eth0_hold_every_packet() -> None:
    for name in ("docker0", "eth0"):
        capture = open_one(str(SHARED / "docker-ping" / f"{name}.pcap"))
        rows = sum(len(batch.table) for batch in capture.batches(ReadOptions()))
        (info,) = capture.points
        assert info.name == name
        assert rows == info.decoded == info.packets - sum(info.skipped.values())


def sll2(ifindex: int) -> bytes:
    return struct.pack(">HHIHBB8s", 0x0800, 0, ifindex, 1, 0, 6, bytes(8)) + b"E" + bytes(19)


def test_an_any_capture_is_one_point_for_each_interface_index(tmp_path: Path) -> None:
    content = pcap(link_type=276)
    for second, ifindex in enumerate([3, 2, 3, 3, 70000], 1):
        data = sll2(ifindex)
        content += struct.pack("<IIII", second, 0, len(data), len(data)) + data
    path = write(tmp_path / "any.pcap", content)
    assert sorted(read(open_one(path)), key=lambda row: row[1]) == [
        ("any:3", 1, 1),
        ("any:2", 2, 2),
        ("any:3", 3, 3),
        ("any:3", 4, 4),
        ("any:70000", 5, 5),
    ]
    named = open_one(f"host={path}")
    assert [p.name for p in named.points] == ["host:2", "host:3", "host:70000"]
    assert {p.link_type for p in named.points} == {"LINUX_SLL2"}
    named.close()


@needs_shared
@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
def test_the_packets_of_each_ifindex_are_those_of_tshark() -> None:
    path = SHARED / "ptcpdump" / "testdata" / "format" / "tfo.pcap"
    if not path.exists():
        pytest.skip("needs tfo.pcap")
    fields = ["-e", "frame.number", "-e", "sll.ifindex"]
    printed = subprocess.run(
        ["tshark", "-n", "-r", path, "-T", "fields", *fields], capture_output=True, text=True, check=True
    ).stdout
    expected = [(f"tfo:{i}", int(n)) for n, i in (line.split("\t") for line in printed.splitlines())]
    assert sorted((n, f) for f, n, _ in read(open_one(str(path)))) == sorted((n, f) for f, n in expected)


def test_text_is_handed_to_the_reader_of_printed_captures(tmp_path: Path) -> None:
    printed = b"12:00:00.000001 IP 172.17.0.3 > 192.0.2.1: ICMP echo request, id 1, seq 0, length 64\n"
    (source,) = parse_sources([write(tmp_path / "docker0.pcap", printed)])
    capture = open_capture(source, ReadOptions())
    assert sum(len(batch.table) for batch in capture.batches(ReadOptions())) == 1
    assert [(p.name, p.packets) for p in capture.points] == [("docker0", 1)]


@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
def test_unknown_link_types_go_to_tshark_only_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pcap", pcap(1, link_type=147))
    assert open_one(path).link_types == {147}
    (source,) = parse_sources([path])
    capture = open_capture(source, ReadOptions(dissector="tshark"))
    assert not isinstance(capture, FileCapture)


def test_too_many_interfaces_are_one_clear_error(tmp_path: Path) -> None:
    content = pcap(link_type=276)
    for ifindex in range(1, 1026):
        data = sll2(ifindex)
        content += struct.pack("<IIII", 1, 0, len(data), len(data)) + data
    with pytest.raises(InputError, match="more than 1024 interfaces"):
        read(open_one(write(tmp_path / "any.pcap", content)))


def point(name: str, file: str, *, first: int | None = None, named: bool = False) -> PointInfo:
    return PointInfo(name, file, first_ns=first, named=named)


def test_points_of_one_name_are_told_apart_by_their_folders() -> None:
    points = [
        point("eth0", "a/eth0.pcap"),
        point("eth0", "b/eth0.pcap"),
        point("eth1", "b/eth1.pcap"),
    ]
    assert unique_names(points) == ["a/eth0", "b/eth0", "eth1"]


def test_points_without_different_folders_are_numbered_by_time() -> None:
    points = [point("x", "-", first=9), point("x", "-", first=3)]
    assert unique_names(points) == ["x#2", "x"]


def test_a_name_that_the_user_gave_is_kept() -> None:
    points = [point("eth0", "a/eth0.pcap"), point("eth0", "b/z.pcap", named=True)]
    assert unique_names(points) == ["a/eth0", "eth0"]


def test_unique_names_do_not_depend_on_the_order_of_the_points() -> None:
    points = [
        point("x", "-", first=1),
        point("x", "-", first=2),
        point("x#2", "y"),
        point("x", "a/x"),
        point("x", "b/a/x"),
    ]
    names = unique_names(points)
    assert len(set(names)) == len(names)
    for turn in range(5):
        turned = points[turn:] + points[:turn]
        assert unique_names(turned) == names[turn:] + names[:turn]


def test_every_error_of_this_room_is_a_nattrace_error() -> None:
    assert issubclass(InputError, NattraceError)
    assert issubclass(UsageError, NattraceError)

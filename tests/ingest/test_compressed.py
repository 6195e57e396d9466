"""Compressed captures: the four formats by their magic, members, layers, damage and bombs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nattrace.errors import InputError
from nattrace.ingest import ReadOptions, open_capture
from nattrace.ingest import compressed as room
from nattrace.ingest.capture import FileCapture
from nattrace.ingest.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from nattrace.ingest import PointInfo

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"

HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)


def record(number: int, size: int = 60) -> bytes:
    data = random.Random(number).randbytes(size)
    return struct.pack("<IIII", number, 0, size, size) + data


def zst(content: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415 - new in 3.14

        return zstd.compress(content)
    import zstandard  # noqa: PLC0415 - only needed before 3.14

    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


FORMATS = [
    pytest.param(gzip.compress, id="gzip"),
    pytest.param(bz2.compress, id="bzip2"),
    pytest.param(lzma.compress, id="xz"),
    pytest.param(zst, id="zstandard"),
]
each_format = pytest.mark.parametrize("compress", FORMATS)


def read(content: bytes) -> tuple[PointInfo, list[int]]:
    capture = open_capture(Source((io.BytesIO(content),)), ReadOptions())
    assert isinstance(capture, FileCapture)
    seconds = [int(t) // 10**9 for records in capture.records() for t in records.time_ns]
    return capture.points[0], seconds


@each_format
def test_a_compressed_capture_reads_like_the_plain_one(compress: Callable[[bytes], bytes]) -> None:
    plain = HEADER + b"".join(record(i) for i in range(1, 30_001))
    info, seconds = read(compress(plain))
    assert seconds == list(range(1, 30_001))
    assert not info.truncated


@each_format
def test_members_one_after_the_other_are_one_stream(compress: Callable[[bytes], bytes]) -> None:
    parts = [HEADER + record(1), record(2), b"", record(3)]
    assert read(b"".join(compress(part) for part in parts))[1] == [1, 2, 3]


@each_format
def test_padding_and_strange_bytes_after_the_last_member_are_no_ones(
    compress: Callable[[bytes], bytes],
) -> None:
    for tail in (bytes(1024), b"trailing garbage"):
        info, seconds = read(compress(HEADER + record(1)) + tail)
        assert (seconds, info.truncated) == ([1], False)


@each_format
def test_a_cut_stream_gives_what_could_be_read_and_says_so(compress: Callable[[bytes], bytes]) -> None:
    plain = HEADER + b"".join(record(i) for i in range(1, 40_001))
    whole = compress(plain)
    info, seconds = read(whole[: len(whole) // 2])
    assert 10_000 < len(seconds) < 30_000
    assert seconds == list(range(1, len(seconds) + 1))
    assert info.truncated
    assert "is cut after" in str(info.damage)


@each_format
def test_a_corrupt_stream_gives_what_could_be_read_and_says_so(compress: Callable[[bytes], bytes]) -> None:
    plain = HEADER + b"".join(record(i) for i in range(1, 40_001))
    broken = bytearray(compress(plain))
    middle = len(broken) // 2
    broken[middle : middle + 64] = bytes(b ^ 0xFF for b in broken[middle : middle + 64])
    info, seconds = read(bytes(broken))
    # Random payload is stored as it is, so a format without checksums of blocks may read on over the damage.
    assert len(seconds) > 1000
    assert seconds[:1000] == list(range(1, 1001))
    assert info.truncated


@each_format
def test_every_cut_of_a_small_file_gives_packets_or_one_error(compress: Callable[[bytes], bytes]) -> None:
    whole = compress(HEADER + record(1) + record(2))
    refused = 0
    for cut in range(8, len(whole)):
        try:
            info, seconds = read(whole[:cut])
        except InputError:
            refused += 1
        else:
            assert seconds in ([], [1], [1, 2])
            assert info.truncated
    assert refused > 0


def test_two_layers_are_opened_and_three_are_refused() -> None:
    plain = HEADER + record(1)
    assert read(gzip.compress(lzma.compress(plain)))[1] == [1]
    with pytest.raises(InputError, match="compressed once more"):
        read(gzip.compress(gzip.compress(gzip.compress(plain))))


@each_format
def test_a_bomb_ends_at_the_ratio_with_what_came_before(
    compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FREE_BYTES", 4 << 20)
    plain = HEADER + record(1) + bytes(32 << 20)
    info, seconds = read(compress(plain))
    assert seconds[0] == 1
    assert 100_000 < len(seconds) < 1_000_000
    assert f"grows more than {room.MAX_RATIO} times" in str(info.damage)


@each_format
def test_memory_does_not_follow_what_a_stream_expands_to(compress: Callable[[bytes], bytes]) -> None:
    size = 64 << 20
    packed = compress(HEADER + bytes(size))
    stream = room.DecompressedStream(io.BytesIO(packed), packed[:16])
    buffer = memoryview(bytearray(1 << 20))
    total = 0
    tracemalloc.start()
    try:
        while got := stream.readinto(buffer):
            total += got
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == len(HEADER) + size
    assert stream.damage is None
    # zstd's densest 512 bytes give 16 MiB, joined once; the others give _OUTPUT_BYTES at a time.
    assert peak < 40 << 20


def test_layers_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FREE_BYTES", 1 << 20)
    # Each layer alone stays below the ratio that both together exceed.
    plain = HEADER + b"".join(record(i, 1000) + bytes(150_000) for i in range(1, 201))
    inner = gzip.compress(plain)
    assert len(plain) < room.MAX_RATIO * len(inner)
    zeros = gzip.compress(gzip.compress(HEADER + record(1) + bytes(30 << 20)))
    info, _ = read(zeros)
    assert "grows more than" in str(info.damage)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captures")
@pytest.mark.skipif(shutil.which("capinfos") is None, reason="needs capinfos")
def test_compressed_files_of_others_have_the_packets_that_capinfos_counts() -> None:
    paths = sorted([*SHARED.rglob("*.gz"), *SHARED.rglob("*.zst")])
    assert paths
    table = subprocess.run(
        ["capinfos", "-T", "-r", "-M", "-c", *map(str, paths)], capture_output=True, text=True, check=True
    ).stdout
    counts = {path: int(count) for path, count in (line.split("\t") for line in table.splitlines())}
    for path, count in counts.items():
        capture = open_capture(Source((Path(path),)), ReadOptions())
        assert isinstance(capture, FileCapture)
        assert sum(records.frame.size for records in capture.records()) == count

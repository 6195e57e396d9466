"""Disks that fill up, here or at the engine: what is there is kept, and what is not is said."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dpkt
import pytest

import nattrace
from capture.evidence import manifest_of
from nattrace.capture.helper.watchdog import DISK_FULL
from nattrace.capture.records import records_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from capture.engine import Engine


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    subprocess.run(command, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


def pings(count: int) -> tuple[str, ...]:
    """A workload of some 60,000 bytes of packets each time."""
    return ("--", "ping", "-q", "-c", str(count), "-i", "0.02", "-s", "30000", "127.0.0.1")


@pytest.mark.parametrize("via", ["docker", "host"])
def test_the_bundle_s_disk_is_full(engine: Engine, tmp_path: Path, via: str) -> None:
    with small_disk(tmp_path / "small", "1m"):
        folder = tmp_path / "small/b"
        done = engine.nattrace(
            *("capture", "--via", via, "-i", "lo", "--filter", "icmp", "-w", str(folder)), *pings(40)
        )
        assert done.returncode == 0, done.stderr
        (point,) = manifest_of(folder).points
        assert point.counters is not None
        assert (point.counters.captured, point.files) == (80, ("lo.pcap",))
        held = records_in(folder / "lo.pcap")
        assert 0 < held < 80
        reason = {
            "docker": "the capture, or its end, is missing: No space left on device",
            "host": f"tcpdump counted 80 packets and wrote {held}: was the disk full?",
        }[via]
        assert point.problem == reason
        assert f"lo: {reason}" in done.stderr
        report = nattrace.analyze(str(folder))
        assert report.points[0].packets == held
        assert [f.code for f in report.findings if reason in f.message] == ["incomplete-bundle"]


def test_the_engine_s_disk_is_full(engine: Engine, tmp_path: Path) -> None:
    with small_disk(engine.folder / "data/volumes", "14m"):
        done = engine.nattrace(
            *("capture", "-i", "lo", "--filter", "icmp", "-w", f"{tmp_path}/b"), *pings(1000)
        )
        assert done.returncode == 0, done.stderr
        manifest = manifest_of(tmp_path / "b")
        (point,) = manifest.points
        assert manifest.stopped_by == "failure"
        assert DISK_FULL in (point.problem or "")
        assert point.counters is not None
        # 8 MiB are left to others; no packet that was counted is missing
        assert records_in(tmp_path / "b/lo.pcap") == point.counters.captured
        assert (tmp_path / "b/lo.pcap").stat().st_size > 4_000_000


def test_records_are_counted_as_the_reader_does(tmp_path: Path) -> None:
    for nano in (False, True):
        with (tmp_path / "a.pcap").open("wb") as file:
            writer = dpkt.pcap.Writer(file, nano=nano)
            for size in (0, 1, 60, 1500):
                writer.writepkt(bytes(size), ts=1.0)
        whole = (tmp_path / "a.pcap").read_bytes()
        assert records_in(tmp_path / "a.pcap") == 4
        for cut, count in ((0, 0), (24, 0), (39, 0), (40, 1), (56, 1), (57, 2), (len(whole) - 1, 3)):
            (tmp_path / "b.pcap").write_bytes(whole[:cut])
            assert records_in(tmp_path / "b.pcap") == count

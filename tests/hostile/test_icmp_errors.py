"""ICMP errors cut at every byte, by the file's end or by a snaplen, and overwritten: never a wrong row, never a crash."""

from __future__ import annotations

import io
import random
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.error_oracle import expected_errors, is_error, read_errors
from lab.truth import Truth

from nattrace.pipeline import analyze
from nattrace.report.json import write_json

if TYPE_CHECKING:
    from lab.oracle import ExpectedRow

    from nattrace.report_object import Report

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lab"
NAMES = ("traceroute", "path_mtu", "errors_v6")
_HEADER = 24

Records = list[tuple[bytes, bytes]]  #: record headers and packets


@cache
def records(name: str, point: str) -> tuple[bytes, Records]:
    """A fixture's file header and its records (little-endian, as tcpdump wrote them)."""
    data = (FIXTURES / name / f"{point}.pcap").read_bytes()
    found: Records = []
    at = _HEADER
    while at < len(data):
        length = int.from_bytes(data[at + 8 : at + 12], "little")
        found.append((data[at : at + 16], data[at + 16 : at + 16 + length]))
        at += 16 + length
    return data[:_HEADER], found


def cut(head: bytes, packet: bytes, length: int) -> bytes:
    """A record of which no more than `length` bytes were captured."""
    kept = packet[:length]
    return head[:8] + struct.pack("<I", len(kept)) + head[12:] + kept


@cache
def truth(name: str) -> frozenset[ExpectedRow]:
    points = {path.stem: read_errors(path) for path in (FIXTURES / name).glob("*.pcap")}
    return frozenset(
        row for hop in Truth.load(FIXTURES / name / "truth.json").hops for row in expected_errors(hop, points)
    )


def analyzed(docker0: bytes, eth0: bytes) -> Report:
    inside, outside = io.BytesIO(docker0), io.BytesIO(eth0)
    inside.name, outside.name = "docker0.pcap", "eth0.pcap"
    report = analyze(inside, outside)
    accounting = report.accounting
    told = accounting.matched + sum(accounting.unmatched.values()) + sum(accounting.skipped.values())
    assert accounting.packets == told
    list(report.rewrites.all())
    write_json(report, io.StringIO())
    return report


def error_rows(report: Report) -> set[tuple[str, int, str, int]]:
    return {
        (row.before.point, row.before.frame, row.after.point, row.after.frame)
        for row in report.rewrites
        if is_error(row.before)
    }


def right_rows(name: str) -> set[tuple[str, int, str, int]]:
    return {(r.before_point, r.before_frame, r.after_point, r.after_frame) for r in truth(name)}


def file_of(name: str, point: str, changed: dict[int, bytes] | None = None, snaplen: int = 65535) -> bytes:
    """A fixture's file, with some records replaced (by 1-based frame number) or all cut."""
    head, found = records(name, point)
    return head + b"".join(
        (changed or {}).get(frame) or cut(*record, snaplen) for frame, record in enumerate(found, 1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_ends_inside_an_error(name: str) -> None:
    head, found = records(name, "docker0")
    frame = min(error.frame for error in read_errors(FIXTURES / name / "docker0.pcap"))
    start = _HEADER + sum(16 + len(packet) for _, packet in found[: frame - 1])
    data = head + b"".join(h + p for h, p in found)
    for end in range(start, start + 16 + min(len(found[frame - 1][1]), 200)):
        rows = error_rows(analyzed(data[:end], file_of(name, "eth0")))
        assert rows <= right_rows(name)


@pytest.mark.parametrize("point", ["docker0", "eth0"])
@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_which_only_so_many_bytes_were_captured(name: str, point: str) -> None:
    frame = min(error.frame for error in read_errors(FIXTURES / name / f"{point}.pcap"))
    head, packet = records(name, point)[1][frame - 1]
    other = {"docker0": "eth0", "eth0": "docker0"}[point]
    for length in range(min(len(packet), 200)):
        files = {point: file_of(name, point, {frame: cut(head, packet, length)}), other: file_of(name, other)}
        report = analyzed(files["docker0"], files["eth0"])
        rows = error_rows(report)
        assert rows <= right_rows(name), length
        # without IP ids, a point whose packets show no upper layer binds no flow
        if length >= 80 or not name.endswith("v6"):
            assert len(rows) >= len(right_rows(name)) - 1, length
        assert not [f.code for f in report.findings if f.code.startswith("icmp-error-quote")], length


@pytest.mark.parametrize("name", [*NAMES, "trace_udp", "trace_v6", "nat64_errors"])
def test_every_snaplen_gives_right_rows_or_none(name: str) -> None:
    v6 = name.endswith("v6") or name.startswith("nat64")
    # the outer headers, the error's own, the quoted IP header and its ports (an echo: type to id)
    enough = 14 + (40 + 8 + 40 if v6 else 20 + 8 + 20) + 8
    # across IP versions what an error says has to be seen as well
    enough += 32 * name.startswith("nat64")
    for snaplen in range(42, 150):
        report = analyzed(
            file_of(name, "docker0", snaplen=snaplen), file_of(name, "eth0", snaplen=max(snaplen, 60))
        )
        rows = error_rows(report)
        assert rows <= right_rows(name), snaplen
        assert not [f.code for f in report.findings if f.code.startswith("icmp-error-quote")], snaplen
        if snaplen >= enough:
            assert rows == right_rows(name), snaplen


@pytest.mark.parametrize("name", NAMES)
def test_overwritten_errors(name: str) -> None:
    picked = random.Random(name)
    frames = [error.frame for error in read_errors(FIXTURES / name / "docker0.pcap")]
    for _ in range(80):
        frame = picked.choice(frames)
        head, packet = records(name, "docker0")[1][frame - 1]
        spoilt = bytearray(packet)
        for _ in range(picked.randrange(1, 6)):
            spoilt[picked.randrange(14, len(spoilt))] = picked.randrange(256)
        report = analyzed(file_of(name, "docker0", {frame: head + bytes(spoilt)}), file_of(name, "eth0"))
        wrong = error_rows(report) - right_rows(name)
        assert not {row for row in wrong if frame not in (row[1], row[3])}

"""Quoted packets are what tshark shows of them, and no cut makes more of them than there is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nattrace.ingest import ReadOptions, open_capture, parse_sources

TESTS = Path(__file__).resolve().parents[1]
FIXTURES = TESTS / "fixtures" / "lab"
FIELDS = [
    "frame.number",
    "ip.src",
    "ip.dst",
    "ip.id",
    "ip.ttl",
    "ipv6.src",
    "ipv6.dst",
    "ipv6.hlim",
    "udp.srcport",
    "udp.dstport",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq",
    "icmp.mtu",
    "icmpv6.mtu",
]


def quotes(path: Path) -> list[dict[str, Any]]:
    """Every quote of a file, as plain values."""
    options = ReadOptions()
    (capture,) = (open_capture(source, options) for source in parse_sources([str(path)]))
    found = []
    for batch in capture.batches(options):
        if batch.quotes is None:
            continue
        q = batch.quotes
        for n in range(len(q)):
            row = {name: getattr(q.packets, name)[n].item() for name in ("frame", "ttl", "ip_id", "protocol")}
            row |= {
                name: getattr(q.packets, name)[n].item() for name in ("sport", "dport", "seq", "icmp_type")
            }
            version = int(q.packets.version[n])
            row |= {name: options.book.text(version, getattr(q.packets, name)[n]) for name in ("src", "dst")}
            row |= {"rest": int(q.rest[n]), "l4_length": int(q.l4_length[n]), "row": int(q.row[n])}
            assert int(batch.table.frame[q.row[n]]) == row["frame"]
            found.append(row)
    return sorted(found, key=lambda row: row["frame"])


def of_tshark(path: Path) -> list[dict[str, Any]]:
    """The same, as tshark prints it: the quoted value of a field comes second."""
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark")
    words = ["tshark", "-r", str(path), "-n", "-T", "fields", "-o", "tcp.relative_sequence_numbers:FALSE"]
    for field in FIELDS:
        words += ["-e", field]
    words += ["-Y", "icmp.type in {3, 4, 5, 11, 12} || icmpv6.type in {1, 2, 3, 4}"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    found = []
    for line in printed.splitlines():
        cells = dict(zip(FIELDS, (cell.split(",") for cell in line.split("\t")), strict=True))

        def second(*names: str, of: dict[str, list[str]] = cells) -> str:
            return next((of[name][1] for name in names if len(of[name]) > 1), "0")

        def only(*names: str, of: dict[str, list[str]] = cells) -> int:
            return next((int(of[name][0], 0) for name in names if of[name][0]), 0)

        found.append(
            {
                "frame": only("frame.number"),
                "src": second("ip.src", "ipv6.src"),
                "dst": second("ip.dst", "ipv6.dst"),
                "ip_id": int(second("ip.id"), 0),
                "ttl": int(second("ip.ttl", "ipv6.hlim"), 0),
                "ports": (only("udp.srcport", "tcp.srcport"), only("udp.dstport", "tcp.dstport")),
                "seq": only("tcp.seq"),
                "mtu": only("icmp.mtu", "icmpv6.mtu"),
            }
        )
    return found


def compare(path: Path) -> int:
    """Compare all quotes of a file; return how many there are."""
    ours, theirs = quotes(path), of_tshark(path)
    plain = []
    for row in ours:
        ported = row["protocol"] in (6, 17)
        plain.append(
            {
                **{name: row[name] for name in ("frame", "src", "dst", "ip_id", "ttl")},
                "ports": (row["sport"], row["dport"]) if ported else (0, 0),
                "seq": row["seq"] if row["protocol"] == 6 else 0,
            }
        )
    assert plain == [{name: value for name, value in row.items() if name != "mtu"} for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert other["mtu"] in (0, row["rest"] & 0xFFFFFFFF), (row, other)
    return len(ours)


@pytest.mark.parametrize(
    ("name", "errors"),
    [("traceroute", 30), ("path_mtu", 3), ("path_mtu_v6", 3), ("errors_v6", 24), ("prohibited", 15)],
)
def test_quotes_of_the_lab_are_those_of_tshark(name: str, errors: int) -> None:
    assert compare(FIXTURES / name / "docker0.pcap") == errors

"""Printed ICMP errors: tcpdump's text of the lab's captures says what the captures say, or less of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from error_frames import CONTAINER, ROUTER, SERVER, TCP, Packet, Points, error

import nattrace
from nattrace.ingest import ReadOptions, open_capture, parse_sources
from nattrace.model import Rewrite, Unmatched

if TYPE_CHECKING:
    from nattrace import Report

LAB = Path(__file__).parents[1] / "fixtures" / "lab"
#: Errors over IPv4, of which tcpdump -v prints the quote.
QUOTED = ("errors_two_hops", "path_mtu", "port_unreachable", "prohibited", "trace_udp", "trace_echo")
ALL = [
    path.name
    for path in sorted(LAB.iterdir())
    if re.search("error|trace|path_mtu|unreachable|prohibited", path.name)
]

pytestmark = pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump")


def as_text(capture: Path, folder: Path, flags: str) -> Path:
    """Write what tcpdump prints of a capture."""
    words = ["tcpdump", "-n", "--nano", *flags.split(), "-r", str(capture)]
    done = subprocess.run(words, capture_output=True, check=True, env={**os.environ, "TZ": "UTC"})
    path = folder / f"{capture.stem}.txt"
    path.write_bytes(done.stdout)
    return path


def quotes(path: Path) -> list[dict[str, Any]]:
    """Return what the errors of a file quote, as far as tcpdump prints it."""
    options = ReadOptions(comparable_content=False)
    (source,) = parse_sources([str(path)])
    found = []
    for batch in open_capture(source, options).batches(options):
        if batch.quotes is None:
            continue
        q = batch.quotes
        for n in np.argsort(q.row).tolist():
            names = (
                "frame",
                "ttl",
                "ip_id",
                "ip_length",
                "fragment",
                "protocol",
                "sport",
                "dport",
                "src",
                "dst",
            )
            row: dict[str, Any] = {name: int(getattr(q.packets, name)[n]) for name in names}
            row["numbers"] = int(q.packets.seq[n])
            row["kind"] = int(q.packets.icmp_type[n]), int(q.packets.icmp_code[n])
            found.append(row | {"rest": int(q.rest[n]), "error": int(batch.table.frame[q.row[n]])})
    return found


def rows(report: Report) -> set[tuple[str, int, str, int, str]]:
    return {
        (row.before.point, row.before.frame, row.after.point, row.after.frame, row.direction)
        for row in report.rewrites.all()
        if isinstance(row, Rewrite)
    }


def lost(report: Report) -> set[tuple[str, int]]:
    return {
        (row.packet.point, row.packet.frame)
        for row in report.rewrites.all()
        if isinstance(row, Unmatched) and row.reason == "lost"
    }


@pytest.mark.parametrize("flags", ["-v", "-vv -e", "-t -v", "-S -v", "-x", "-v -X"])
@pytest.mark.parametrize("name", [*QUOTED, "trace_tcp"])
def test_printed_quotes_are_those_of_the_capture(name: str, flags: str, tmp_path: Path) -> None:
    capture = LAB / name / "docker0.pcap"
    told, printed = quotes(capture), quotes(as_text(capture, tmp_path, flags))

    assert len(told) >= 3
    assert printed == told


@pytest.mark.parametrize("name", QUOTED)
@pytest.mark.parametrize("flags", ["-tt -v", "-tt -vv -e", "-tt -x"])
def test_what_is_printed_with_its_quotes_is_matched_as_the_captures_are(
    name: str, flags: str, tmp_path: Path
) -> None:
    captures = sorted((LAB / name).glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    report = nattrace.analyze(*(as_text(path, tmp_path, flags) for path in captures))

    assert rows(report) == rows(whole)
    assert [(f.status, f.icmp_errors) for f in report.flows] == [
        (f.status, f.icmp_errors) for f in whole.flows
    ]
    assert {f.code for f in report.findings} == {f.code for f in whole.findings}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("flags", ["-tt", "-tt -v", "-tt -vv -e"])
def test_what_is_printed_without_its_quotes_costs_matches_and_invents_nothing(
    name: str, flags: str, tmp_path: Path
) -> None:
    captures = sorted((LAB / name).glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    report = nattrace.analyze(*(as_text(path, tmp_path, flags) for path in captures))

    assert rows(report) <= rows(whole)
    assert lost(report) <= lost(whole)
    assert not [f for f in report.flows if f.status == "lost"]
    told = {f.code for f in report.findings if f.code.startswith("icmp-error")}
    assert told <= {f.code for f in whole.findings}


@pytest.mark.parametrize("name", [name for name in QUOTED if name != "path_mtu"])
def test_a_text_and_a_capture_agree_on_errors(name: str, tmp_path: Path) -> None:
    first, *others = sorted((LAB / name).glob("*.pcap"))
    whole = nattrace.analyze(first, *others)
    report = nattrace.analyze(as_text(first, tmp_path, "-tt -v"), *others)

    assert rows(report) == rows(whole)
    assert lost(report) == lost(whole)


def test_a_text_without_ttls_says_nothing_of_the_order_of_points(tmp_path: Path) -> None:
    """A TTL that was not printed is no TTL of 0: packets went from docker0 to eth0."""
    first, second = sorted((LAB / "prohibited").glob("*.pcap"))
    whole = nattrace.analyze(first, second)
    report = nattrace.analyze(as_text(first, tmp_path, "-tt"), second)

    assert rows(report)
    assert rows(report) <= rows(whole)


def test_a_quote_that_ends_in_the_tcp_header_is_none(tmp_path: Path) -> None:
    """Eight bytes of TCP (RFC 792) hold the sequence number, but tcpdump prints nothing of it."""
    points = Points()
    probe = Packet(CONTAINER, 50000, SERVER, 80, b"", protocol=TCP)
    points.inside.append((points.now_ns, probe.ip()))
    points.step()
    points.back(None, error(ROUTER, CONTAINER, probe.ip()[:28]))
    capture, _ = points.write(tmp_path)

    assert len(quotes(capture)) == 1
    assert quotes(as_text(capture, tmp_path, "-v")) == []

"""Cut captures of real NAT: the answer is that of the whole captures, or less of it, and never another one."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nattrace
from nattrace.model import Rewrite, Unmatched

if TYPE_CHECKING:
    from nattrace import Report

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
#: Packets in tunnels need more bytes, and where they are cut off crossings pass their point by: lab/test_tunnels.
TUNNELS = ("tunnel_", "overlay_")
RECORDED = [path for path in sorted((FIXTURES / "lab").iterdir()) if not path.name.startswith(TUNNELS)]
RECORDED.append(FIXTURES / "docker-ping")
WRAPPED = [path for path in sorted((FIXTURES / "lab").iterdir()) if path.name.startswith(TUNNELS)]
#: In what tunnels carry, before and behind the sequence numbers.
IN_TUNNELS = (68, 78, 90, 98)
#: From the ports and the TCP sequence number of IPv4 alone (42) on, in and between the fields of what follows.
SNAPLENS = (42, 46, 54, 62, 74, 94)
#: One point cut, the others whole: between the fields of a TCP header over IPv4, and of one over IPv6.
ALONE = (46, 62)
#: Ethernet, IPv6 and a TCP header with timestamps, and 8 bytes of what an ICMP echo carries.
HEADERS_WHOLE = 94
#: Behind an IPv6 fragment header it is longer.
LONGER = "fragments_ipv6"
#: ICMPv6 errors (RFC 4443): what they quote is longer as well, so they are not asked for. Of probes that nothing but
#: these errors tells apart it may be said that they are ambiguous.
ERROR_TYPES = (1, 2, 3, 4)
#: Where ICMP errors are recorded, and snaplens before, in and behind what they quote over IPv4 and IPv6.
QUOTING = [
    path
    for path in sorted((FIXTURES / "lab").iterdir())
    if re.search("error|trace|path_mtu|unreachable|prohibited", path.name)
]
IN_QUOTES = (42, 62, 66, 68, 70, 74, 90, 94, 102, 104, 106, 110)

#: before, after, direction
Row = tuple[str, int, str, int, str]


def cut(source: Path, target: Path, snaplen: int) -> None:
    """Write a copy of a native-order pcap as tcpdump -s would have (draft-ietf-opsawg-pcap)."""
    data = source.read_bytes()
    out = bytearray(data[:24])
    struct.pack_into("<I", out, 16, snaplen)
    at = 24
    while at < len(data):
        seconds, fraction, captured, wire = struct.unpack_from("<IIII", data, at)
        kept = min(captured, snaplen)
        out += struct.pack("<IIII", seconds, fraction, kept, wire) + data[at + 16 : at + 16 + kept]
        at += 16 + captured
    target.write_bytes(out)


def rows(report: Report) -> set[Row]:
    """Return all crossings, also those that changed nothing."""
    return {as_row(row) for row in crossed(report)}


def crossed(report: Report) -> list[Rewrite]:
    """Return the same as the report tells them."""
    return [row for row in report.rewrites.all() if isinstance(row, Rewrite)]


def as_row(row: Rewrite) -> Row:
    """Return a crossing's two sightings."""
    return row.before.point, row.before.frame, row.after.point, row.after.frame, row.direction


def with_shortcuts(crossings: set[Row]) -> set[Row]:
    """Return crossings and those that they add up to: a point where a packet was not legible is passed over."""
    onward = {(row[0], row[1], row[4]): row for row in crossings}
    found = set(crossings)
    for row in crossings:
        last = row
        while (following := onward.get((last[2], last[3], last[4]))) is not None:
            found.add((row[0], row[1], following[2], following[3], row[4]))
            last = following
    return found


def tuples(report: Report) -> set[object]:
    """Return the originals and the replies of all translations."""
    every = [t for flow in report.flows for t in flow.translations]
    return {("original", t.original) for t in every} | {("reply", t.reply) for t in every}


def unmatched(report: Report, *reasons: str) -> set[tuple[str, int]]:
    """Return the packets that were not matched for these reasons."""
    return {
        (row.packet.point, row.packet.frame)
        for row in report.rewrites.all()
        if isinstance(row, Unmatched) and row.reason in reasons
    }


def lost_flows(report: Report) -> set[object]:
    """Return the flows of which nothing is said to have arrived."""
    return {(flow.path, flow.protocol, flow.initiator) for flow in report.flows if flow.status == "lost"}


def analyze_cut(
    captures: list[Path], short: list[Path], snaplen: int, folder: Path
) -> tuple[Report, tuple[int, list[str]]]:
    """Analyze captures of which some are cut short; return the report, and what it was made of."""
    given = [folder / path.name if path in short else path for path in captures]
    for path in short:
        cut(path, folder / path.name, snaplen)
    return nattrace.analyze(*given), (snaplen, [path.stem for path in short])


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_cut_captures_give_the_same_answer_or_less_of_it(folder: Path, tmp_path: Path) -> None:
    captures = sorted(folder.glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    all_rows, all_tuples = rows(whole), tuples(whole)
    possible = with_shortcuts(all_rows)
    errors = {
        as_row(row)
        for row in crossed(whole)
        if "icmpv6" in (row.before.protocol, row.after.protocol)
        and not {row.before.type, row.after.type}.isdisjoint(ERROR_TYPES)
    }
    for snaplen in SNAPLENS:
        # all points alike, then the first or the last of them alone
        alone = (captures[:1], captures[-1:]) if snaplen in ALONE else ()
        for short in (captures, *alone):
            report, what = analyze_cut(captures, short, snaplen, tmp_path)
            assert not rows(report) - possible, what
            assert not tuples(report) - all_tuples, what
            assert unmatched(report, "lost") <= unmatched(whole, "lost"), what
            assert lost_flows(report) <= lost_flows(whole), what
            if snaplen >= HEADERS_WHOLE and folder.name != LONGER:
                missing = all_rows - rows(report) - errors
                doubtful = unmatched(report, "ambiguous") if folder.name == "trace_v6" else set()
                assert not {row for row in missing if not {row[:2], row[2:4]} <= doubtful}, what


def test_what_keeps_neither_end_and_is_cut_names_what_it_could_be(tmp_path: Path) -> None:
    captures = sorted((FIXTURES / "lab" / "half_translated").glob("*.pcap"))
    report, _ = analyze_cut(captures, captures, 50, tmp_path)
    doubtful = [r for r in report.rewrites.all() if isinstance(r, Unmatched) and r.reason == "ambiguous"]
    named = {
        frozenset({(r.packet.point, r.packet.frame), (c.point, c.frame)})
        for r in doubtful
        for c in r.candidates
    }
    assert named
    assert named <= {frozenset({row[:2], row[2:4]}) for row in rows(nattrace.analyze(*captures))}


@pytest.mark.parametrize("folder", WRAPPED, ids=lambda folder: folder.name)
def test_what_a_tunnel_carries_is_not_lost_where_it_is_cut_off(folder: Path, tmp_path: Path) -> None:
    captures = sorted(folder.glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    for snaplen in IN_TUNNELS:
        for short in (captures, captures[:1], captures[-1:]):
            report, what = analyze_cut(captures, short, snaplen, tmp_path)
            assert unmatched(report, "lost") <= unmatched(whole, "lost"), what
            assert lost_flows(report) <= lost_flows(whole), what


@pytest.mark.parametrize("folder", QUOTING, ids=lambda folder: folder.name)
def test_what_a_cut_error_may_be_about_is_not_lost(folder: Path, tmp_path: Path) -> None:
    captures = sorted(folder.glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    for snaplen in IN_QUOTES:
        for short in (captures, captures[:1], captures[-1:]):
            report, what = analyze_cut(captures, short, snaplen, tmp_path)
            assert unmatched(report, "lost") <= unmatched(whole, "lost"), what
            assert lost_flows(report) <= lost_flows(whole), what
            told = {f.code for f in report.findings if f.code.startswith("icmp-error")}
            assert told <= {f.code for f in whole.findings}, what

"""Cut captures of real NAT: the answer is that of the whole captures, or less of it, and never another one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from nattrace import Report

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
#: Packets in tunnels need more bytes, and where they are cut off crossings pass their point by: lab/test_tunnels.
TUNNELS = ("tunnel_", "overlay_")
RECORDED = [path for path in sorted((FIXTURES / "lab").iterdir()) if not path.name.startswith(TUNNELS)]
RECORDED.append(FIXTURES / "docker-ping")
#: From the ports and the TCP sequence number of IPv4 alone (42) on, in and between the fields of what follows.
SNAPLENS = (42, 46, 54, 62, 74, 94)
#: One point cut, the others whole: between the fields of a TCP header over IPv4, and of one over IPv6.
ALONE = (46, 62)
#: Ethernet, IPv6 and a TCP header with timestamps, and 8 bytes of what an ICMP echo carries.
HEADERS_WHOLE = 94
#: What is longer: an IPv6 fragment header, what an ICMP error quotes, headers that name a SIP message.
LONGER = ("fragments", "errors", "nat64_errors", "trace_v6", "path_mtu", "sip")

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
    return {
        (row.before.point, row.before.frame, row.after.point, row.after.frame, row.direction)
        for row in report.rewrites.all()
        if isinstance(row, Rewrite)
    }


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


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_cut_captures_give_the_same_answer_or_less_of_it(folder: Path, tmp_path: Path) -> None:
    captures = sorted(folder.glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    all_rows, all_tuples = rows(whole), tuples(whole)
    possible = with_shortcuts(all_rows)
    longer = folder.name.startswith(LONGER)
    for snaplen in SNAPLENS:
        # all points alike, then the first or the last of them alone
        alone = (captures[:1], captures[-1:]) if snaplen in ALONE else ()
        for short in (captures, *alone):
            given = [tmp_path / path.name if path in short else path for path in captures]
            for path in short:
                cut(path, tmp_path / path.name, snaplen)
            report = nattrace.analyze(*given)
            what = (snaplen, [path.stem for path in short])
            assert not rows(report) - possible, what
            assert not tuples(report) - all_tuples, what
            if snaplen >= HEADERS_WHOLE and not longer:
                assert rows(report) == all_rows, what

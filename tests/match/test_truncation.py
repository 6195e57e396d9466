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
SNAPLENS = (42, 46, 47, 48, 54, 58, 62, 66, 74, 82, 94)
#: Ethernet, IPv6 and a TCP header with timestamps, and 8 bytes of what an ICMP echo carries.
HEADERS_WHOLE = 94

#: before, after, nat, what changed, direction
Row = tuple[str, int, str, int, str | None, tuple[str, ...], str]


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
        (row.before.point, row.before.frame, row.after.point, row.after.frame, row.nat, row.changed, row.direction)
        for row in report.rewrites.all()
        if isinstance(row, Rewrite)
    }  # fmt: skip


def translations(report: Report) -> set[object]:
    return {
        (flow.protocol, t.from_point, t.to_point, t.nat, t.original, t.reply)
        for flow in report.flows
        for t in flow.translations
    }


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_cut_captures_give_the_same_answer_or_less_of_it(folder: Path, tmp_path: Path) -> None:
    captures = sorted(folder.glob("*.pcap"))
    whole = nattrace.analyze(*captures)
    all_rows, all_translations = rows(whole), translations(whole)
    assert all_rows
    for snaplen in SNAPLENS:
        # all points alike, then each of them alone
        for short in (captures, *([each] for each in captures)):
            given = [tmp_path / path.name if path in short else path for path in captures]
            for path in short:
                cut(path, tmp_path / path.name, snaplen)
            report = nattrace.analyze(*given)
            what = (snaplen, [path.stem for path in short])
            assert not rows(report) - all_rows, what
            assert not translations(report) - all_translations, what
            if snaplen >= HEADERS_WHOLE:
                assert rows(report) == all_rows, what

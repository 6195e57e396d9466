"""Captures that a filter left nothing but ICMP in: errors tell the translation of packets that nobody captured.

The lab's captures are thinned out as tcpdump's filter would have; the kernel's entries say what is right.
"""

from __future__ import annotations

import re
import struct
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from error_frames import CONTAINER, PUBLIC, ROUTER, SERVER, Packet, Points, error
from lab.error_oracle import expected_errors, is_error, read_error_points
from lab.oracle import ExpectedRow
from lab.truth import Addressing, Truth

import nattrace
from nattrace.model import Tuple

if TYPE_CHECKING:
    from nattrace import Report

LAB = Path(__file__).resolve().parents[2] / "fixtures" / "lab"
FOLDERS = [
    path
    for path in sorted(LAB.iterdir())
    if re.search("error|trace_|traceroute|path_mtu|unreachable|prohibited", path.name)
    and not path.name.startswith("tunnel_")
]
#: Where both ends changed nothing of the tuple says which quotes are one; IPv6 has no identifications.
BOTH_ENDS = {
    "errors_hairpin",
    "errors_twice_nat",
    "errors_twice_nat_half",
    "published_port_unreachable_masqueraded",
}
UNNUMBERED = {"errors_v6", "trace_v6"}


def icmp_only(source: Path, folder: Path) -> Path:
    """Write a copy of a native-order pcap with what ``tcpdump 'icmp or icmp6'`` would have kept."""
    data, at = source.read_bytes(), 24
    kept = bytearray(data[:at])
    while at < len(data):
        size = 16 + struct.unpack_from("<I", data, at + 8)[0]
        record = data[at : at + size]
        kind, protocol = record[28:30], record[16:]
        if (kind == b"\x08\0" and protocol[23] == 1) or (kind == b"\x86\xdd" and protocol[20] == 58):
            kept += record
        at += size
    path = folder / source.name
    path.write_bytes(kept)
    return path


def translations(report: Report) -> set[object]:
    return {(flow.protocol, t.original, t.reply) for flow in report.flows for t in flow.translations}


def kernel_translations(truth: Truth) -> set[object]:
    """Return what the kernel's entries say, whole and cut in two where a packet may be seen between DNAT and SNAT."""

    def plain(each: Addressing) -> Tuple:
        ends = (None if each.sport < 0 else each.sport, None if each.dport < 0 else each.dport)
        return Tuple(each.src, each.dst, *ends, None if each.id < 0 else each.id)

    found: set[object] = set()
    for entry in {entry for hop in truth.hops for entry in hop.entries}:
        protocol = "icmpv6" if "icmp" in entry.protocol and ":" in entry.original.src else entry.protocol
        states = [entry.original, *entry.halves, entry.reply.inverted()]
        found |= {(protocol, plain(one), plain(other.inverted())) for one, other in combinations(states, 2)}
    return found


def expected(truth: Truth, paths: list[Path]) -> set[ExpectedRow]:
    points = {name: errors for path in paths for name, errors in read_error_points(path).items()}
    return {row for hop in truth.hops for row in expected_errors(hop, points)}


def error_rows(report: Report) -> set[ExpectedRow]:
    return {
        ExpectedRow(row.before.point, row.before.frame, row.after.point, row.after.frame, row.direction)
        for row in report.rewrites
        if is_error(row.before)
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_errors_alone_tell_the_translations(folder: Path, tmp_path: Path) -> None:
    thinned = [icmp_only(path, tmp_path) for path in sorted(folder.glob("*.pcap"))]
    report = nattrace.analyze(*thinned)

    truth = Truth.load(folder / "truth.json")
    shown, due = error_rows(report), expected(truth, thinned)
    assert shown <= due
    if folder.name not in BOTH_ENDS | UNNUMBERED:
        assert shown == due
    assert translations(report) <= kernel_translations(truth)
    assert not [f for f in report.findings if f.code.startswith("icmp-error")]
    assert "lost" not in report.accounting.unmatched
    told = [flow for flow in report.flows if flow.protocol in ("udp", "tcp")]
    assert all((flow.packets_original, flow.packets_reply) == (0, 0) for flow in told)
    assert all(flow.status in ("translated", "untranslated") and flow.icmp_errors for flow in told)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_filter_at_one_point_loses_no_packet_of_the_other(folder: Path, tmp_path: Path) -> None:
    captures = sorted(folder.glob("*.pcap"))
    truth = Truth.load(folder / "truth.json")
    for thin in (captures[0], captures[-1]):
        given = [icmp_only(path, tmp_path) if path == thin else path for path in captures]
        report = nattrace.analyze(*given)

        assert error_rows(report) <= expected(truth, given)
        assert translations(report) <= kernel_translations(truth)
        assert not [f for f in report.findings if f.code.startswith("icmp-error")]
        assert sum(c.lost for flow in report.flows for c in flow.crossings) == 0
        assert not [flow for flow in report.flows if flow.status == "lost"]


def test_errors_that_no_number_tells_apart_bind_nothing(tmp_path: Path) -> None:
    """Two containers ask one server from one port, and routers without identifications answer."""
    points = Points()
    for n in range(4):
        asked = Packet(CONTAINER[:-1] + str(2 + n % 2), 40000, SERVER, 9, b"same", ip_id=0)
        sent = Packet(PUBLIC, 40000 + n % 2, SERVER, 9, b"same", ip_id=0)
        points.back(error(ROUTER, PUBLIC, sent.ip(), ip_id=0), error(ROUTER, asked.src, asked.ip(), ip_id=0))
    report = nattrace.analyze(*points.write(tmp_path))

    assert list(report.flows) == []
    assert report.accounting.unmatched == {"icmp-error": 8}


def test_what_an_error_quotes_is_no_flow_where_nothing_binds_it(tmp_path: Path) -> None:
    points = Points()
    points.frame()
    points.back(None, error(ROUTER, CONTAINER, Packet(CONTAINER, 40000, SERVER, 9).ip()))
    points.frame()
    report = nattrace.analyze(*points.write(tmp_path))

    assert {flow.protocol for flow in report.flows} == {"udp"}
    assert all(flow.initiator.dport == 443 for flow in report.flows)

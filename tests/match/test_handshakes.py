"""Both sides of a proxy that answers handshakes, in one capture: each packet is found again, and no other one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from match.renumber.test_shifted import (
    FA,
    PA,
    PUBLIC,
    SERVER,
    A,
    Connection,
    S,
    Wire,
    connections,
    packet,
    proxied_handshake,
)
from match.test_truncation import cut
from simulation import write_pcap
from verdict import check_accounting

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report


def analyzed(wire: Wire, folder: Path, snaplen: int = 0) -> tuple[Report, set[tuple[int, int]]]:
    """Analyze one file that holds both captures; return the report and the pairs of frames that are one packet."""
    both = [(when, point, n, data) for point, capture in (("inside", wire.inside), ("outside", wire.outside))
            for n, (when, data) in enumerate(capture, 1)]  # fmt: skip
    both.sort(key=lambda each: each[0])
    frame = {(point, n): place for place, (_, point, n, _) in enumerate(both, 1)}
    write_pcap(folder / "merged.pcap", [(when, data) for when, _, _, data in both])
    if snaplen:
        cut(folder / "merged.pcap", folder / "cut", snaplen)
        (folder / "cut").replace(folder / "merged.pcap")
    report = nattrace.analyze(folder / "merged.pcap")
    check_accounting(report)
    return report, {(frame["inside", a], frame["outside", b]) for a, b in wire.pairs}


def crossed(report: Report) -> set[tuple[int, int]]:
    """Return pairs of frames, the one with the private address first."""
    found = set()
    for row in report.rewrites.all():
        if isinstance(row, Rewrite):
            inner = "172.17.0." in row.before.src + row.before.dst
            frames = row.before.frame, row.after.frame
            found.add(frames if inner else frames[::-1])
    return found


@pytest.mark.parametrize("snaplen", [0, 54, 66])
def test_both_sides_of_a_proxy_in_one_file(snaplen: int, tmp_path: Path) -> None:
    wire = Wire()
    for n, c in enumerate(connections(wire, 3)):
        proxied_handshake(c, 0x11111111 * (n + 1))
        c.talk(6)
        c.send(flags=FA)
        c.send(flags=FA, reply=True)
    report, pairs = analyzed(wire, tmp_path, snaplen)
    assert crossed(report) == pairs
    assert report.accounting.unmatched == {"proxied": 3 * 7}
    assert [flow.status for flow in report.flows] == ["translated"] * 3


def test_three_packets_are_too_few(tmp_path: Path) -> None:
    wire = Wire()
    (c,) = connections(wire, 1)
    proxied_handshake(c, 0x11111111)
    for _ in range(3):
        c.send(b"x" * 40, reply=True)
    report, _ = analyzed(wire, tmp_path)
    assert not crossed(report)
    assert not any(c.lost for flow in report.flows for c in flow.crossings)


def test_a_scan_that_sends_one_number_to_one_port_joins_nothing(tmp_path: Path) -> None:
    wire = Wire()
    for n in range(200):
        wire.see("inside", packet(wire, ("172.17.0.2", 1024 + n), SERVER, 0xABCD1234, 0, S, ip_id=n + 1))
    report, _ = analyzed(wire, tmp_path)
    assert not crossed(report)
    assert len(report.flows) == 200


@pytest.mark.parametrize("seed", range(24))
def test_whatever_is_missing_no_row_is_wrong(seed: int, tmp_path: Path) -> None:
    """Clients with made up numbers that count in step, of which each point misses some packets.

    Where acknowledgement numbers are cut off nothing but ids and sequence numbers is left: then these are random.
    """
    chance = random.Random(seed)
    wire = Wire()
    snaplen = chance.choice([0, 42, 54, 60, 66])
    isn = [chance.getrandbits(32) if snaplen == 42 else 1000 for _ in range(4)]
    clients = [
        Connection(
            wire, (f"172.17.0.{n + 2}", 40000), (PUBLIC, 1024 + n), seq=isn[n], ack=0x7000 + 5 * n, id=100
        )
        for n in range(4)
    ]
    for n, c in enumerate(clients):
        proxied_handshake(c, 0x9000 + 5 * n)
    for _ in range(12):
        for c in clients:
            lost = chance.choice(["", "", "", "inside", "outside"])
            reply = chance.random() < 0.5
            c.send(b"same" * 10, reply=reply, lost=lost)
            if chance.random() < 0.5:
                c.send(flags=chance.choice([A, PA]), reply=not reply, lost=chance.choice(["", "inside"]))
    report, pairs = analyzed(wire, tmp_path, snaplen)
    assert not crossed(report) - pairs

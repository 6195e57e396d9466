"""Streams without IP identifications that a helper rewrites, of which a capture missed packets.

The kernel's recordings and generated streams, with identifications taken away and frames left out: what is left crosses
all the same or is ambiguous, and is neither matched wrongly nor called lost.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import dpkt
import pytest
from lab import oracle, pieces
from lab.truth import Truth
from match.renumber.test_shifted import FA, A, Connection, Wire, connections, crossed, proxied_handshake

import nattrace
from nattrace.model import Unmatched

if TYPE_CHECKING:
    from nattrace import Report

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "lab"
Frame = tuple[str, int]


def records(raw: bytes) -> list[tuple[bytes, bytes]]:
    """Return the records of a pcap: header, frame."""
    found, at = [], 24
    while at < len(raw):
        size = int.from_bytes(raw[at + 8 : at + 12], "little")
        found.append((raw[at : at + 16], raw[at + 16 : at + 16 + size]))
        at += 16 + size
    return found


def without_id(frame: bytes) -> bytes:
    """Return an Ethernet frame whose IPv4 packet with TCP has the identification 0."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return frame
    header = bytearray(frame[14:34])
    header[4:6] = header[10:12] = b"\0\0"
    header[10:12] = dpkt.in_cksum(bytes(header)).to_bytes(2, "big")
    return frame[:14] + bytes(header) + frame[34:]


def unmatched(report: Report) -> dict[Frame, str]:
    rows = report.rewrites.all()
    return {(row.packet.point, row.packet.frame): row.reason for row in rows if isinstance(row, Unmatched)}


class Recorded:
    """A recording of the kernel's, and which frames it says are one packet."""

    def __init__(self, name: str) -> None:
        """Read a fixture."""
        self.folder = FIXTURES / name
        truth = Truth.load(self.folder / "truth.json")
        self.frames = {path.stem: records(path.read_bytes()) for path in self.folder.glob("*.pcap")}
        points: dict[str, list[oracle.Seen]] = {}
        for path in sorted(self.folder.glob("*.pcap")):
            points |= {path.stem: pieces.read(path)} if truth.resized else oracle.read_points(path)
        expected = pieces.expected_pieces if truth.resized else oracle.expected_rows
        self.pairs = {
            ((row.before_point, row.before_frame), (row.after_point, row.after_frame))
            for hop in truth.hops
            for row in expected(hop, points)
        }

    def analyze(self, folder: Path, missed: Frame | None) -> tuple[set[frozenset[Frame]], Report]:
        """Analyze without identifications and one frame; return the pairs that are left, and the report."""
        numbers: dict[Frame, Frame] = {}
        for point, frames in self.frames.items():
            kept = [n for n in range(1, len(frames) + 1) if (point, n) != missed]
            numbers |= {(point, n): (point, k) for k, n in enumerate(kept, 1)}
            packets = [head + without_id(frame) for head, frame in (frames[n - 1] for n in kept)]
            header = (self.folder / f"{point}.pcap").read_bytes()[:24]
            (folder / f"{point}.pcap").write_bytes(header + b"".join(packets))
        report = nattrace.analyze(*(folder / f"{point}.pcap" for point in sorted(self.frames)))
        left = {
            frozenset((numbers[here], numbers[there]))
            for here, there in self.pairs
            if missed not in (here, there)
        }
        return left, report


def rewritten(report: Report) -> set[frozenset[Frame]]:
    return {
        frozenset(((row.before.point, row.before.frame), (row.after.point, row.after.frame)))
        for row in report.rewrites
        if row.changed
    }


@pytest.mark.parametrize("name", ["ftp_active", "ftp_passive", "sip_tcp", "irc_dcc"])
def test_a_frame_that_one_capture_missed_costs_nothing_behind_it(name: str, tmp_path: Path) -> None:
    recorded = Recorded(name)
    left, report = recorded.analyze(tmp_path, None)
    assert rewritten(report) == left
    frames = [
        (point, n) for point, every in sorted(recorded.frames.items()) for n in range(1, len(every) + 1)
    ]
    missing = total = 0
    for missed in frames[::5]:
        left, report = recorded.analyze(tmp_path, missed)
        found = rewritten(report)
        assert not found - left, missed
        why = unmatched(report)
        assert {why[frame] for pair in left - found for frame in pair} <= {"ambiguous"}, missed
        missing += len(left - found)
        total += len(left)
    # the last packets of a stream may have too few behind them to tell
    assert missing <= total / 20


def test_offload_cut_what_is_behind_a_missed_frame_as_well(tmp_path: Path) -> None:
    recorded = Recorded("tcp_segmented_behind_a_helper")
    frames = [
        (point, n) for point, every in sorted(recorded.frames.items()) for n in range(1, len(every) + 1)
    ]
    found_in_all = total = 0
    for missed in frames[::8]:
        left, report = recorded.analyze(tmp_path, missed)
        found = rewritten(report)
        assert not found - left, missed
        found_in_all += len(found)
        total += len(left)
    # of three super-frames without identifications nothing tells which transmission their segments are of
    assert found_in_all >= 0.65 * total


def ftp(c: Connection) -> None:
    """Say what a helper rewrites now and then, in both directions."""
    for n in range(4):
        c.send(b"PORT 172,17,0,2,195,%d\r\n" % (80 + n), becomes=b"PORT 203,0,113,10,195,%d\r\n" % (80 + n))
        c.send(flags=A, reply=True)
        c.send(b"200 ok %d\r\n" % n, reply=True)
        c.send(flags=A)
        c.talk(1, size=37 + n)
        told = b"227 (203,0,113,10,195,%d)\r\n" % (10 + n), b"227 (172,17,0,2,195,%d)\r\n" % (10 + n)
        c.send(told[0], reply=True, becomes=told[1])
        c.send(flags=A)


def sip(c: Connection) -> None:
    """Say what a helper rewrites every time."""
    chance = random.Random(1)
    for n in range(15):
        reply = chance.random() < 0.5
        size = 100 + chance.randrange(80)
        c.send(bytes([n]) * size, becomes=bytes([n]) * (size + chance.randrange(1, 9)), reply=reply)
        c.send(flags=A, reply=not reply)


# behind a proxy nothing binds the two sides where every message is rewritten, and has no identification
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("says", "proxied"), [(ftp, False), (ftp, True), (sip, False)])
def test_each_packet_missed_in_turn(says: object, proxied: bool, version: int, tmp_path: Path) -> None:
    def spoken(missed: Frame | None) -> Wire:
        wire = Wire(version=version)
        (c,) = connections(wire, 1, ids=False)
        if proxied:
            proxied_handshake(c, 0x33333333)
            c.talk(3)
        else:
            c.open()
        says(c)  # type: ignore[operator]
        c.send(flags=FA)
        c.send(flags=FA, reply=True)
        c.send(flags=A)
        if missed is not None:
            point, frame = missed
            (wire.inside if point == "inside" else wire.outside).pop(frame - 1)
            side = point == "outside"
            wire.pairs = {
                tuple(n - (s == side and n > frame) for s, n in enumerate(pair))  # type: ignore[misc]
                for pair in wire.pairs
                if pair[side] != frame
            }
        return wire

    whole = spoken(None)
    found = crossed(whole.analyze(tmp_path))
    assert not found - whole.pairs
    # before anything is known of a proxy's shift, what has no data may be the proxy's own
    assert len(whole.pairs - found) <= (2 if proxied else 0)
    # nor may anything bind the two sides before the first payload is rewritten
    allowed = {"ambiguous", "proxied", "one-sided"} if proxied else {"ambiguous"}
    first, missing, total = 8 if proxied else 4, 0, 0
    for point, frames in (("inside", whole.inside), ("outside", whole.outside)):
        for frame in range(first, len(frames) + 1, 2):
            wire = spoken((point, frame))
            report = wire.analyze(tmp_path)
            found = crossed(report)
            assert not found - wire.pairs, (point, frame)
            why = unmatched(report)
            reasons = {why["inside", a] for a, _ in wire.pairs - found} | {
                why["outside", b] for _, b in wire.pairs - found
            }
            assert reasons <= allowed, (point, frame)
            missing += len(wire.pairs - found)
            total += len(wire.pairs)
    assert proxied or missing <= total / 10


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_missed_of_two_streams_no_crossing_is_wrong(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    wire = Wire(version=chance.choice([4, 6]))
    both = connections(wire, 2, ids=False)
    for c in both:
        c.open()
    share, loss = chance.choice([0.2, 1.0]), chance.choice([0.02, 0.1, 0.3])

    def missed() -> str:
        return chance.choice(["inside", "outside"]) if chance.random() < loss else ""

    for _ in range(80):
        c = chance.choice(both)
        wire.now_ns += chance.choice([0, 100_000, 2_000_000])
        said = chance.randbytes(chance.randrange(20, 60))
        reply = chance.random() < 0.5
        more = said + b"y" * chance.randrange(1, 9) if chance.random() < share else said
        c.send(said, becomes=more, reply=reply, lost=missed())
        if chance.random() < 0.7:
            c.send(flags=A, reply=not reply, lost=missed())
    assert not crossed(wire.analyze(tmp_path)) - wire.pairs

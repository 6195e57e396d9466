"""UDP segmentation: large datagrams against those they were cut into, by what a cutting network knows to be true.

A train's identifications count up from the large datagram's, and the next one's begin one higher: those of two
trains overlap, as the kernel makes them.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import EPOCH_NS, masquerade, packet_at, write_pcap
from verdict import check_accounting, rows_told

import nattrace

if TYPE_CHECKING:
    from nattrace import Report
    from nattrace.model import Rewrite

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(0, 10**6)


@dataclass(frozen=True)
class Settings:
    """How trains go. Probabilities are between 0 and 1."""

    seed: int = 1
    version: int = 4
    sends: int = 20
    merged: bool = False  #: the datagrams come one by one and are merged at the second point
    spacing_us: tuple[int, int] = (30, 300)
    lost: float = 0.0  #: share of small datagrams that one capture or the way lost
    missed: float = 0.0  #: share of large datagrams that their capture misses
    ordinary: float = 0.2  #: share of datagrams that nobody cuts
    constant: float = 0.0  #: share of large datagrams all of whose pieces say the same
    unlike: bool = True  #: such a datagram says something else than the others that do
    ids: str = "counted"  #: of the pieces: counted up, equal, or zero, as are then those of the large ones


@dataclass
class Truth:
    sources: list[str]
    shared: set[tuple[int, int]] = field(default_factory=set)


def send(folder: Path, s: Settings) -> Truth:
    """Write inside.pcap and outside.pcap of two clients' trains, one way and the other."""
    rng = random.Random(s.seed)
    client, server = ("172.17.0.{}", "198.51.100.1") if s.version == 4 else ("fd00::{}", "2001:db8:1::1")
    talks = [masquerade("udp", (client.format(n), 40_000), (server, 443), 40_000 + n) for n in (2, 3)]
    ids = {(n, reply): rng.randint(0, 65_535) for n in range(2) for reply in (False, True)}
    frames: dict[str, list[tuple[int, bytes, tuple[int, int]]]] = {"inside": [], "outside": []}
    serial, now_ns = count(), EPOCH_NS
    for turn in range(s.sends):
        n, reply = rng.randrange(2), rng.random() < 0.4
        now_ns += rng.randint(*s.spacing_us) * 1000
        # each client begins with one that nobody cuts, which binds its flow
        n, alone = (turn, True) if turn < 2 else (n, rng.random() < s.ordinary)
        size = 60 if alone else rng.choice([100, 120])
        payload = rng.randbytes(size if size == 60 else rng.randint(size + 1, size * 9))
        if s.constant and not alone and rng.random() < s.constant:
            one = rng.randbytes(size) if s.unlike else b"\xa5" * size
            payload = (one * 10)[: len(payload) if rng.random() < 0.5 else size * rng.randint(2, 9)]
        number, ids[n, reply] = ids[n, reply], (ids[n, reply] + 1) % 65_536
        number = 0 if s.ids == "zero" else number
        train = next(serial)
        pieces = [(number, payload, (train, 0))]
        cut = [
            ((number + k * (s.ids == "counted")) % 65_536, payload[at : at + size], (train, k))
            for k, at in enumerate(range(0, len(payload), size))
        ]
        first, second = (cut, pieces) if s.merged else (pieces, cut)
        points = (("outside", 1), ("inside", 0)) if reply else (("inside", 0), ("outside", 1))
        at_ns = now_ns
        for hop, ((point, seen), group) in enumerate(zip(points, (first, second), strict=True)):
            for k, (ip_id, data, name) in enumerate(group):
                if rng.random() < (s.lost if len(group) > 1 else s.missed):
                    continue
                packet = packet_at(
                    talks[n], talks[n].seen[seen], data, reply=reply, ip_id=ip_id, ttl=64 - hop
                )
                frames[point].append((at_ns + k * 700, packet, name))
            at_ns += rng.randint(8_000, 25_000)
    kind = b"\x08\x00" if s.version == 4 else b"\x86\xdd"
    truth = Truth([f"{name}={folder / name}.pcap" for name in frames])
    numbers: dict[str, dict[int, list[int]]] = {"inside": {}, "outside": {}}
    for point, packets in frames.items():
        packets.sort(key=lambda packet: packet[0])
        write_pcap(
            folder / f"{point}.pcap",
            [(at, b"\2" * 6 + b"\4" * 6 + kind + packet) for at, packet, _ in packets],
        )
        for frame, (_, _, (train, _)) in enumerate(packets, 1):
            numbers[point].setdefault(train, []).append(frame)
    for train, here in numbers["inside"].items():
        truth.shared |= {(a, b) for a in here for b in numbers["outside"].get(train, ())}
    return truth


def judged(drawn: Settings) -> tuple[Report, dict[tuple[int, int], Rewrite], Truth]:
    with tempfile.TemporaryDirectory() as folder:
        truth = send(Path(folder), drawn)
        report = nattrace.analyze(*truth.sources)
        rows = rows_told(report)
        check_accounting(report)
        return report, rows, truth


@EXAMPLES
@given(seed=SEEDS, version=st.sampled_from([4, 6]), merged=st.booleans())
def test_every_datagram_finds_its_train(seed: int, version: int, *, merged: bool) -> None:
    report, rows, truth = judged(Settings(seed=seed, version=version, merged=merged))
    assert set(rows) == truth.shared
    crossings = [c for flow in report.flows for c in flow.crossings]
    assert sum(c.lost + c.ambiguous + c.unknowable for c in crossings) == 0
    assert sum(c.segments.missing_bytes for c in crossings if c.segments) == 0


@EXAMPLES
@given(seed=SEEDS, version=st.sampled_from([4, 6]), merged=st.booleans())
def test_what_was_lost_shifts_no_datagram_into_another_train(
    seed: int, version: int, *, merged: bool
) -> None:
    drawn = Settings(seed=seed, version=version, merged=merged, sends=40, lost=0.1, missed=0.1)
    _, rows, truth = judged(drawn)
    assert not set(rows) - truth.shared
    # a train that lacks a datagram may be ambiguous, whole ones are found
    assert len(rows) >= len(truth.shared) // 3


@EXAMPLES
@given(seed=SEEDS, ids=st.sampled_from(["counted", "zero"]), merged=st.booleans(), unlike=st.booleans())
def test_datagrams_that_say_the_same_are_packets_each_and_find_their_train(
    seed: int, ids: str, *, merged: bool, unlike: bool
) -> None:
    drawn = Settings(
        seed=seed, merged=merged, constant=0.7, unlike=unlike, ids=ids, sends=40, spacing_us=(300, 900)
    )
    report, rows, truth = judged(drawn)
    assert not set(rows) - truth.shared
    assert len(rows) >= 0.9 * len(truth.shared)
    assert set(report.accounting.unmatched) <= {"ambiguous"}


def test_a_burst_is_not_that_of_a_large_datagram_with_another_one_like_it_nearer_by() -> None:
    """Two bursts have a datagram of one identification; the nearer one pauses nowhere before it."""
    drawn = Settings(
        seed=132072, sends=60, merged=True, spacing_us=(30, 60), lost=0.3, missed=0.1, constant=0.7, unlike=False
    )  # fmt: skip
    _, rows, truth = judged(drawn)
    assert not set(rows) - truth.shared


@EXAMPLES
@given(
    seed=SEEDS,
    ids=st.sampled_from(["counted", "equal", "zero"]),
    version=st.sampled_from([4, 6]),
    merged=st.booleans(),
    unlike=st.booleans(),
)
def test_datagrams_that_say_the_same_are_never_taken_for_those_that_were_lost(
    seed: int, ids: str, version: int, *, merged: bool, unlike: bool
) -> None:
    drawn = Settings(
        seed=seed, version=version, merged=merged, sends=40, lost=0.1, missed=0.1,
        constant=0.7, unlike=unlike, ids=ids,
    )  # fmt: skip
    _, rows, truth = judged(drawn)
    assert not set(rows) - truth.shared

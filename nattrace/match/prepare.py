"""Prepare: everything about a capture's packets that needs no other capture: decode, keys, flows.

Packets come out in chunks of one size, whoever prepares them: this process or a worker (see `workers`), so
that results cannot depend on where the work was done.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nattrace.match.errors.icmp_errors import ERRORS_LIMIT, Errors, duplicates
from nattrace.match.errors.unread import Unread
from nattrace.match.fragments import FirstFragments
from nattrace.match.keys import icmp_error_rows, icmp_query_rows
from nattrace.match.roll import FlowRoll
from nattrace.match.rows import Rows
from nattrace.match.sightings import DUPLICATE, TURNS, Sightings
from nattrace.table import ICMP, ICMPV6, PacketTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nattrace.ingest.quotes import Quotes
    from nattrace.ingest.source import Capture, PointInfo, ReadOptions
    from nattrace.match.flows import Flows

#: Packets of a capture that are handed on at once.
CHUNK_PACKETS = 32_768

_PCAP_RECORD_HEADER_BYTES = 16


class Layer(NamedTuple):
    """Which of a point's packets: matching takes each layer for a point of its own.

    `depth` counts the tunnels around them; `turn` is more than 0 for packets that the point had shown before
    with other addresses or ports (see `sightings`).
    """

    depth: int = 0
    turn: int = 0


#: Where the packets are that stand in no tunnel and are seen for the first time.
FIRST_LAYER = Layer()


@dataclass(slots=True)
class Prepared:
    """Packets of one layer of a point, ready to be matched."""

    point: int  #: index into the capture's points
    rows: Rows
    size_bytes: int  #: how much of the file this was
    layer: Layer = FIRST_LAYER
    carrier: NDArray[np.int64] | None = None  #: of packets in tunnels: their carriers, see `carriers`
    last: bool = True  #: False: more packets of the same time follow


@dataclass(slots=True)
class Outcome:
    """What is known when a capture has been read to its end; lists are by point of the capture."""

    points: list[PointInfo]
    set_aside: list[Counter[str]]  #: decoded packets that matching cannot use, by reason
    errors: list[list[Errors]]  #: ICMP errors, which are matched when all else is; for each point by depth
    unread: list[list[Unread]]  #: those without a legible quote, likewise
    flows: dict[tuple[int, Layer], Flows]  #: by point and layer, as `Rows.flow` numbers them


#: A carrier is named by its turn and its running number in that layer.
_TURN_SHIFT = 48
_NO_CARRIER = -1


def carriers(codes: NDArray[np.int64], turn: int) -> NDArray[np.int64]:
    """Return the running numbers of those carriers that the layer without tunnel of that turn holds."""
    found: NDArray[np.int64] = codes[codes >> _TURN_SHIFT == turn] & ((1 << _TURN_SHIFT) - 1)
    return found


@dataclass(slots=True)
class _PointReading:
    first_fragments: FirstFragments = field(default_factory=FirstFragments)
    set_aside: Counter[str] = field(default_factory=Counter)
    errors: list[Errors] = field(default_factory=list)
    error_count: int = 0
    unread: list[Unread] = field(default_factory=list)
    unread_count: int = 0
    placed: int = 0  #: of `errors`, those whose carriers are known
    tables: list[PacketTable] = field(default_factory=list)
    sightings: Sightings = field(default_factory=Sightings)
    prepared: list[int] = field(default_factory=lambda: [0] * TURNS)  #: packets so far, by turn
    rolls: list[FlowRoll] = field(default_factory=lambda: [FlowRoll() for _ in range(TURNS)])
    size_bytes: int = 0
    #: what stands in tunnels, by depth; of these readings, which frames are wrapped in what
    inner: list[_PointReading] = field(default_factory=list)
    wraps: list[tuple[NDArray[np.uint32], NDArray[np.uint64]]] = field(default_factory=list)

    def wrap_of(self, frame: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Return what the packets of the given frames are wrapped in."""
        frames, wraps = (np.concatenate(parts) for parts in zip(*self.wraps, strict=True))
        found: NDArray[np.uint64] = wraps[np.searchsorted(frames, frame)]
        return found


class Preparation:
    """Prepares one capture in this process: iterate over `chunks`, then read `outcome`."""

    def __init__(self, capture: Capture, options: ReadOptions) -> None:
        self._capture = capture
        self._options = options
        self._points: list[_PointReading] = []

    def chunks(self) -> Iterator[Prepared]:
        """Give the packets, in file order for each point."""
        waiting = 0
        for batch in self._capture.batches(self._options):
            while len(self._points) <= batch.point:
                self._points.append(_PointReading())
            reading = self._points[batch.point]
            reading.size_bytes += int(batch.table.captured_length.sum(dtype=np.int64))
            reading.size_bytes += _PCAP_RECORD_HEADER_BYTES * len(batch.table)
            table = _usable(batch.table, batch.quotes, reading)
            if len(table):
                reading.tables.append(table)
                waiting += len(table)
            for depth, inner in enumerate(batch.inner):
                if depth == len(reading.inner):
                    reading.inner.append(_PointReading())
                inside = reading.inner[depth]
                inside.wraps.append((inner.table.frame, inner.wrap))
                inside.tables.append(_usable(inner.table, inner.quotes, inside))
            if waiting >= CHUNK_PACKETS:
                yield from self._flush()
                waiting = 0
        yield from self._flush()

    def outcome(self) -> Outcome:
        """Return what is known at the end."""
        missing = len(self._capture.points) - len(self._points)
        aside = [reading.set_aside for reading in self._points] + [Counter() for _ in range(missing)]
        errors = []
        for point, reading in enumerate(self._points):
            errors.append([Errors.concatenate(each.errors) for each in (reading, *reading.inner)])
            for depth, own in enumerate(errors[point]):
                again = duplicates(own)
                if again.any():
                    errors[point][depth] = own.take(np.flatnonzero(~again))
                    # in a tunnel it is the carrier that is told
                    aside[point]["duplicate"] += int(again.sum()) * (depth == 0)
        flows = {
            (point, Layer(depth, turn)): roll.flows()
            for point, reading in enumerate(self._points)
            for depth, each in enumerate((reading, *reading.inner))
            for turn, roll in enumerate(each.rolls)
            if each.prepared[turn]
        }
        unread = [
            [Unread.concatenate(each.unread) for each in (reading, *reading.inner)]
            for reading in self._points
        ]
        errors += [[Errors.empty()] for _ in range(missing)]
        unread += [[Unread.none()] for _ in range(missing)]
        return Outcome(self._capture.points, aside, errors, unread, flows)

    def _flush(self) -> Iterator[Prepared]:
        parts = [
            part for point, reading in enumerate(self._points) for part in self._parts_of(point, reading)
        ]
        for part in parts:
            part.last = part is parts[-1]
            yield part

    def _parts_of(self, point: int, reading: _PointReading) -> Iterator[Prepared]:
        """Give what waits of one point, the packets on the wire first, then those in tunnels."""
        size_bytes, reading.size_bytes = reading.size_bytes, 0
        places: list[tuple[NDArray[np.uint32], NDArray[np.int64]]] = []
        for rows, turn in self._by_turn(reading):
            yield Prepared(point, rows, size_bytes, Layer(turn=turn))
            size_bytes = 0
            if reading.inner:
                places.append((rows.table.frame, rows.number + (turn << _TURN_SHIFT)))
        for depth, inner in enumerate(reading.inner, 1):
            for errors in inner.errors[inner.placed :]:
                errors.carrier = _carriers(errors.packets.frame, places)
            inner.placed = len(inner.errors)
            for rows, turn in self._by_turn(inner):
                carrier = _carriers(rows.table.frame, places)
                yield Prepared(point, rows, size_bytes, Layer(depth, turn), carrier)
                size_bytes = 0
            inner.wraps = []

    def _by_turn(self, reading: _PointReading) -> Iterator[tuple[Rows, int]]:
        """Give what waits of one reading, each turn apart."""
        table = PacketTable.concatenate(reading.tables)
        reading.tables = []
        if not len(table):
            return
        rows, hashes = Rows.prepare(table, printed=not self._options.comparable_content)
        turns = reading.sightings.turns(rows, self._options.book)
        if turns is None:
            yield _numbered(rows, hashes, reading, 0), 0
            return
        if count := int((turns == DUPLICATE).sum()):
            reading.set_aside["duplicate"] += count
        for turn in range(TURNS):
            of_turn = np.flatnonzero(turns == turn)
            if of_turn.size:
                yield _numbered(rows.take(of_turn), hashes[of_turn], reading, turn), turn


def _numbered(rows: Rows, hashes: NDArray[np.uint64], reading: _PointReading, turn: int) -> Rows:
    """Give a layer's next packets their numbers and those of their flows; return them."""
    wrap = reading.wrap_of(rows.table.frame) if reading.wraps else None
    first, reading.prepared[turn] = reading.prepared[turn], reading.prepared[turn] + len(rows)
    rows.number = np.arange(first, reading.prepared[turn])
    rows.flow = reading.rolls[turn].number(rows.table, hashes, rows.backward, wrap)
    return rows


def _carriers(
    frame: NDArray[np.uint32], places: list[tuple[NDArray[np.uint32], NDArray[np.int64]]]
) -> NDArray[np.int64]:
    """Return which packets carry those of the given frames; _NO_CARRIER where matching has set it aside."""
    code = np.full(frame.size, _NO_CARRIER, np.int64)
    for frames, codes in places:
        spot = np.minimum(np.searchsorted(frames, frame), frames.size - 1)
        code = np.where(frames[spot] == frame, codes[spot], code)
    return code


def _usable(table: PacketTable, quotes: Quotes | None, reading: _PointReading) -> PacketTable:
    """Give later fragments their ports; keep ICMP errors apart; set aside what has nothing to match by."""
    aside = orphan = reading.first_fragments.fill(table)
    icmp = (table.protocol == ICMP) | (table.protocol == ICMPV6)
    if icmp.any():
        error = icmp & icmp_error_rows(table) & ~orphan
        other = icmp & ~icmp_query_rows(table) & ~error & ~orphan
        unread = error.copy()
        illegible = int(error.sum()) - (0 if quotes is None else len(quotes))
        if quotes is not None:
            quotes = quotes.first(ERRORS_LIMIT - reading.error_count)
            reading.errors.append(Errors.of_batch(table, quotes))
            reading.error_count += len(quotes)
            unread[quotes.row] = False
        if unread.any():
            room = ERRORS_LIMIT - reading.unread_count
            kept = Unread.first_of(table.take(np.flatnonzero(unread)), room, illegible)
            reading.unread.append(kept)
            reading.unread_count += len(kept)
        for reason, count in (("icmp-error", int(unread.sum())), ("icmp-other", int(other.sum()))):
            if count:
                reading.set_aside[reason] += count
        aside = orphan | error | other
    if not aside.any():
        return table
    if count := int(orphan.sum()):
        reading.set_aside["fragment-without-first"] += count
    return table.take(np.flatnonzero(~aside))

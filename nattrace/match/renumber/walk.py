"""Walk: streams without IP ids whose payloads a helper rewrites again and again, followed packet by packet.

Over IPv6 only numbers tell packets apart, and behind each rewritten payload they are others. In a bound flow the
first one has its numbers still; it says by how much all behind it are shifted, up to the next one. Flows in which
nothing of the kind begins are never walked: this costs a step of Python a packet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import M1, M2, mix
from nattrace.match.pairing import unique_pairs
from nattrace.match.renumber.anchors import ANCHORS, FLAGS, FLAGS_END, GROWTH_BYTES, SOON_NS, legible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows

_S32, _S48 = np.uint64(32), np.uint64(48)
_M32 = 0xFFFFFFFF


def walk(rows_a: Rows, rows_b: Rows, lanes: Lanes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs of rows that are one packet by the numbers of all that came before them, shape (2, pairs).

    And the first point's rows of all flows that were walked, in which equal numbers alone prove nothing.
    """
    sides = []
    for rows, lane in ((rows_a, lanes.lane_a), (rows_b, lanes.lane_b)):
        table = rows.table
        usable = legible(table, np.arange(len(rows))) & (table.ip_id == 0) & (table.l4_visible >= FLAGS_END)
        sides.append(np.flatnonzero(usable & (lane >= 0)))
    a, b = sides
    started = _rewritten(rows_a, a, rows_b, b, lanes)
    if not started.size:
        return np.empty((2, 0), np.int64), a[:0]
    a = a[np.isin(lanes.lane_a[a] >> 1, started)]
    b = b[np.isin(lanes.lane_b[b] >> 1, started)]
    walks: dict[int, _Walk] = defaultdict(_Walk)
    for row, packet in zip(b.tolist(), _packets(rows_b, b, lanes.lane_b), strict=True):
        walks[packet.lane >> 1].there[packet.lane & 1, packet.seq, packet.ack, packet.flags].append(
            (row, packet)
        )
    for row, packet in zip(a.tolist(), _packets(rows_a, a, lanes.lane_a), strict=True):
        walks[packet.lane >> 1].step(row, packet)
    pairs = [pair for each in walks.values() if each.told >= ANCHORS for pair in each.pairs]
    found = np.array(pairs, np.int64).reshape(-1, 2).T
    # what has its equal was refused for a reason, or waits for its turn
    return found[:, rows_a.content[found[0]] != rows_b.content[found[1]]], a


def _rewritten(
    rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64], lanes: Lanes
) -> NDArray[np.int64]:
    """Return the edges in which some packet has the same numbers at both points, and a little more or less data."""
    keys = []
    for rows, which, lane in ((rows_a, a, lanes.lane_a), (rows_b, b, lanes.lane_b)):
        table = rows.table
        word = table.seq[which].astype(np.uint64) << _S32 | table.ack[which]
        flags = (table.tcp_flags[which] & FLAGS).astype(np.uint64) << _S48
        keys.append(mix(mix(word) ^ (lane[which].astype(np.uint64) | flags) * M2 ^ M1))
    i, j = unique_pairs(*keys)
    a, b = a[i], b[j]
    growth = (rows_b.table.payload_length[b] - rows_a.table.payload_length[a]).view(np.int32)
    grown = (growth != 0) & (np.abs(growth) <= GROWTH_BYTES)
    grown &= np.abs(rows_b.table.time_ns[b] - rows_a.table.time_ns[a]) <= SOON_NS
    return np.unique(lanes.lane_a[a[grown]] >> 1)


@dataclass(frozen=True, slots=True)
class _Packet:
    lane: int
    time_ns: int
    seq: int
    ack: int
    flags: int
    length: int


def _packets(rows: Rows, which: NDArray[np.int64], lane: NDArray[np.int64]) -> list[_Packet]:
    table = rows.table
    columns = (
        lane, table.time_ns, table.seq, table.ack, table.tcp_flags & FLAGS, table.payload_length
    )  # fmt: skip
    return [_Packet(*row) for row in zip(*(column[which].tolist() for column in columns), strict=True)]


@dataclass(slots=True)
class _Shifts:
    """One direction's shifts: from which of the first point's numbers on they are what, and up to which known."""

    reference: int | None = None
    places: list[int] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    end: int | None = None  #: the furthest number, as a place, up to which every packet was found

    def at(self, number: int) -> int:
        """Return the shift of a number."""
        place = bisect_right(self.places, self._place(number)) - 1
        return self.shifts[place] if place >= 0 else 0

    def knows(self, number: int) -> bool:
        """Return whether no packet is missing before a number: behind one nobody knows what became of the rest."""
        if self.reference is None:
            self.reference = number
        return self.end is None or self._place(number) <= self.end

    def found(self, start: int, length: int, growth: int) -> bool:
        """Note a packet that was found; return whether its growth can be so: what was sent before is as it was."""
        place = self._place(start) + length
        further = self.end is None or place > self.end
        if growth and not further:
            return False
        if growth:
            self.shifts.append((self.shifts[-1] if self.shifts else 0) + growth)
            self.places.append(place)
        if further:
            self.end = place
        return True

    def _place(self, number: int) -> int:
        reference = number if self.reference is None else self.reference
        return ((number - reference + 2**31) & _M32) - 2**31


@dataclass(slots=True)
class _Walk:
    """One flow: its packets at the second point that wait for their selves, and what is known of its numbers."""

    there: dict[tuple[int, int, int, int], list[tuple[int, _Packet]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    ways: tuple[_Shifts, _Shifts] = field(default_factory=lambda: (_Shifts(), _Shifts()))
    pairs: list[tuple[int, int]] = field(default_factory=list)
    told: int = 0  #: packets whose shifted numbers were found

    def step(self, row: int, packet: _Packet) -> None:
        """Find the next packet of the first point, in the order of time, at the second."""
        way = packet.lane & 1
        own, other = self.ways[way], self.ways[1 - way]
        if not own.knows(packet.seq) or not other.knows(packet.ack):
            return
        shifts = own.at(packet.seq), other.at(packet.ack)
        key = way, (packet.seq + shifts[0]) & _M32, (packet.ack + shifts[1]) & _M32, packet.flags
        near = [each for each in self.there.get(key, ()) if abs(each[1].time_ns - packet.time_ns) <= SOON_NS]
        if len(near) != 1:
            return
        (found,) = near
        growth = found[1].length - packet.length
        if abs(growth) > GROWTH_BYTES or not own.found(packet.seq, packet.length, growth):
            return
        self.there[key].remove(found)
        self.told += any(shifts)
        self.pairs.append((row, found[0]))

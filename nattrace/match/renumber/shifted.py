"""Shifted: the rest of a TCP flow, matched by the shifts that its anchors taught (see `anchors`).

A packet is its shifted self when its numbers, moved by the shift of the anchors next to it in time, its length,
flags and IP id are those of exactly one packet of the other flow. A packet whose payload a helper rewrote has
another length: it must have grown by just as much as all numbers behind it are shifted. What a proxy answers
itself (SYNPROXY: the handshake) has no other self, and is said to be so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nattrace.match import evidence
from nattrace.match.keys import M1, M2, M3, mix
from nattrace.match.outcome import Matches, Shifts
from nattrace.match.pairing import unique_pairs
from nattrace.match.renumber.anchors import (
    FLAGS,
    FLAGS_END,
    SOON_NS,
    Anchors,
    comparable,
    empty_bytes,
    find_anchors,
    legible,
)
from nattrace.match.ties import TIE_WINDOW_NS
from nattrace.table import TCP_SYN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.rows import Rows
    from nattrace.table import AddressBook, PacketTable

_S16, _S32 = np.uint64(16), np.uint64(32)


@dataclass(slots=True)
class Shifted:
    """What was found: matches, shifts, and the rows of either side that a proxy made or swallowed.

    `suspect_a[i]` could be `suspect_b[i]`, and too little speaks for it. Of `moved_a` and `moved_b`, merged flows,
    equal numbers are not equal bytes.
    """

    matches: Matches
    shifts: Shifts | None
    answered_a: NDArray[np.int64]
    answered_b: NDArray[np.int64]
    suspect_a: NDArray[np.int64]
    suspect_b: NDArray[np.int64]
    moved_a: NDArray[np.int64]
    moved_b: NDArray[np.int64]


def match_shifted(
    rows_a: Rows,
    rows_b: Rows,
    flows_a: NDArray[np.int64],
    flows_b: NDArray[np.int64],
    edges: Edges,
    book: AddressBook,
) -> Shifted:
    """Match TCP packets whose numbers are shifted or whose options differ.

    The rows are those that stricter rules have left. `flows_a` and `flows_b` map their partial flows to merged
    ones, of which `edges` says what is bound.
    """
    rows_a, rows_b = (replace(rows, table=comparable(rows.table)) for rows in (rows_a, rows_b))
    anchors, suspects = find_anchors(rows_a, rows_b, flows_a, flows_b, edges)
    nothing = np.empty(0, np.int64)
    # without an IP id, equal lengths and one equal number are too common to bar anything
    moved = [anchors.moved, suspects.moved & (rows_a.table.ip_id[suspects.a] != 0)]
    flows = [np.concatenate([getattr(each, f)[rows] for each, rows in zip((anchors, suspects), moved, strict=True)])
             for f in ("flow_a", "flow_b")]  # fmt: skip
    if not len(anchors):
        none = Matches(nothing, nothing, np.empty(0, np.uint16))
        return Shifted(none, None, nothing, nothing, suspects.a, suspects.b, *flows)
    known = _Known.of(anchors, rows_b.table.time_ns[anchors.b])
    here = _Side.of(rows_a, known.lanes(flows_a[rows_a.flow], known.flow_a), known.first_a)
    there = _Side.of(rows_b, known.lanes(flows_b[rows_b.flow], known.flow_b), known.first_b)
    there.backward ^= known.swap[there.lane]
    a, b, forward, backward = _by_numbers(here, there, known)
    grown = _by_growth(here, there, known, a, b)
    every_a = here.rows[np.concatenate([a, grown.a])]
    every_b = there.rows[np.concatenate([b, grown.b])]
    shifted = np.concatenate([(forward != 0) | (backward != 0), np.ones(grown.a.size, np.bool_)])
    flags = _flags(rows_a.table, every_a, rows_b.table, every_b, shifted, book)
    flags[a.size :] |= np.uint16(evidence.REWRITTEN)
    return Shifted(
        Matches(every_a, every_b, flags),
        _told(rows_a, rows_b, here, there, known, grown),
        here.rows[_answered(here, known, np.concatenate([a, grown.a]))],
        there.rows[_answered(there, known, np.concatenate([b, grown.b]))],
        suspects.a,
        suspects.b,
        *flows,
    )


@dataclass(slots=True)
class _Known:
    """What the anchors taught: which flows are one (lanes), and by how much they are shifted at what time."""

    anchors: Anchors  #: ordered by lane and time
    lane: NDArray[np.int64]  #: of each anchor
    #: by lane:
    flow_a: NDArray[np.int64]
    flow_b: NDArray[np.int64]
    swap: NDArray[np.bool_]
    unshifted: NDArray[np.bool_]
    whole: NDArray[np.bool_]  #: shifted from the first packet to the last
    first_a: NDArray[np.int64]  #: time of the first anchor at the first point, ns
    first_b: NDArray[np.int64]  #: and at the second

    @classmethod
    def of(cls, anchors: Anchors, time_b: NDArray[np.int64]) -> _Known:
        """Put anchors in order; `time_b` is their time at the second point."""
        order = np.lexsort((anchors.time_ns, anchors.flow_a))
        anchors, time_b = anchors.take(order), time_b[order]
        flow_a, start, lane = np.unique(anchors.flow_a, return_index=True, return_inverse=True)
        return cls(
            anchors, lane.reshape(-1), flow_a, anchors.flow_b[start], anchors.swap[start], anchors.unshifted[start],
            ~anchors.unshifted[start] & np.logical_and.reduceat(anchors.moved, start),
            anchors.time_ns[start], np.minimum.reduceat(time_b, start),
        )  # fmt: skip

    @staticmethod
    def lanes(flow: NDArray[np.int64], flows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lane of each packet's flow, -1 for none; `flows` are those of the lanes."""
        order = np.argsort(flows)
        place = np.minimum(np.searchsorted(flows[order], flow), flows.size - 1)
        return np.where(flows[order][place] == flow, order[place], -1)

    def shifts(
        self, lane: NDArray[np.int64], time_ns: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.bool_], NDArray[np.uint32], NDArray[np.uint32]]]:
        """Return (there is one, forward, backward) of the last anchor before each packet, and of the next one.

        Before the first anchor of a flow that others bind nothing is shifted.
        """
        instants, rank = np.unique(self.anchors.time_ns, return_inverse=True)
        code = self.lane * (instants.size + 1) + rank.reshape(-1)
        after = np.searchsorted(
            code, lane * (instants.size + 1) + np.searchsorted(instants, time_ns, "right")
        )
        found = []
        for neighbour in (after - 1, after):
            inside = (neighbour >= 0) & (neighbour < code.size)
            place = np.clip(neighbour, 0, code.size - 1)
            inside &= self.lane[place] == lane
            forward, backward = self.anchors.forward[place], self.anchors.backward[place]
            found.append((inside, np.where(inside, forward, 0), np.where(inside, backward, 0)))
        before, forward, backward = found[0]
        return [(before | self.unshifted[lane], forward, backward), found[1]]


@dataclass(slots=True)
class _Side:
    """One point's packets of flows that anchors bind."""

    table: PacketTable
    rows: NDArray[np.int64]  #: into the table
    lane: NDArray[np.int64]
    backward: NDArray[np.bool_]  #: in terms of the first point
    early: NDArray[np.bool_]  #: before the flow's first anchor

    @classmethod
    def of(cls, rows: Rows, lane: NDArray[np.int64], first_ns: NDArray[np.int64]) -> _Side:
        """Choose the packets that have a lane; `first_ns` is each lane's first anchor at this point."""
        chosen = np.flatnonzero((lane >= 0) & legible(rows.table, np.arange(len(rows))))
        early = rows.table.time_ns[chosen] < first_ns[lane[chosen]]
        return cls(rows.table, chosen, lane[chosen], rows.backward[chosen], early)

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the packet table for these packets."""
        return cast("NDArray[Any]", getattr(self.table, name)[self.rows])

    def keys(
        self,
        which: NDArray[np.int64],
        forward: NDArray[np.uint32] | int,
        backward: NDArray[np.uint32] | int,
        *,
        length: bool,
    ) -> NDArray[np.uint64]:
        """Return keys of packets with their numbers shifted so much, with or without their length."""
        rows, back = self.rows[which], self.backward[which]
        table = self.table
        seq = table.seq[rows] + np.where(back, backward, forward).astype(np.uint32)
        ack = table.ack[rows] + np.where(back, forward, backward).astype(np.uint32)
        word = (table.tcp_flags[rows] & FLAGS).astype(np.uint64) << _S32 | table.ip_id[rows]
        if length:
            word ^= table.payload_length[rows].astype(np.uint64) << (_S32 + _S16)
        lane = self.lane[which].astype(np.uint64) << np.uint64(1) | back
        return mix(mix(seq.astype(np.uint64) << _S32 | ack) ^ mix(word * M2) ^ (lane + np.uint64(1)) * M1)


def _by_numbers(
    here: _Side, there: _Side, known: _Known
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
    """Return places (a, b) of packets that are each other's shifted selves, and their shifts."""
    (is_before, forward_0, backward_0), (is_after, forward_1, backward_1) = known.shifts(
        here.lane, here.column("time_ns")
    )
    is_after &= ~is_before | (forward_0 != forward_1) | (backward_0 != backward_1)
    before, after = np.flatnonzero(is_before), np.flatnonzero(is_after)
    place = np.concatenate([before, after])
    forward = np.concatenate([forward_0[before], forward_1[after]])
    backward = np.concatenate([backward_0[before], backward_1[after]])
    everything = np.arange(there.rows.size)
    chosen, b = unique_pairs(
        here.keys(place, forward, backward, length=True), there.keys(everything, 0, 0, length=True)
    )
    a, forward, backward = place[chosen], forward[chosen], backward[chosen]
    # two shifts that give two different partners decide nothing
    good = (np.bincount(a, minlength=here.rows.size)[a] == 1) & (
        np.bincount(b, minlength=there.rows.size)[b] == 1
    )
    apart = np.abs(there.column("time_ns")[b] - here.column("time_ns")[a])
    no_id = here.column("ip_id")[a] == 0
    good &= apart <= np.where(no_id, SOON_NS, TIE_WINDOW_NS)
    # a proxy repeats the client's handshake in its own, without IP ids: what has none crosses only behind it
    syn = (here.column("tcp_flags")[a] & np.uint16(TCP_SYN)) != 0
    syn |= no_id & (here.column("l4_visible")[a] < FLAGS_END)
    good &= ~known.whole[here.lane[a]] | (~syn & ~(no_id & (here.early[a] | there.early[b])))
    return a[good], b[good], forward[good], backward[good]


@dataclass(slots=True)
class _Grown:
    """Packets whose payload a helper rewrote: places at both sides, and the shifts behind them."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    forward: NDArray[np.uint32]
    backward: NDArray[np.uint32]


def _by_growth(
    here: _Side, there: _Side, known: _Known, taken_a: NDArray[np.int64], taken_b: NDArray[np.int64]
) -> _Grown:
    """Return packets with equal numbers and IP id that grew by as much as all behind them is shifted further."""
    free = [
        np.setdiff1d(np.flatnonzero(side.column("ip_id") != 0), taken)
        for side, taken in ((here, taken_a), (there, taken_b))
    ]
    (is_known, forward, backward), _ = known.shifts(here.lane[free[0]], here.column("time_ns")[free[0]])
    a, b = unique_pairs(
        here.keys(free[0], forward, backward, length=False), there.keys(free[1], 0, 0, length=False)
    )
    forward, backward, is_known = forward[a], backward[a], is_known[a]
    a, b = free[0][a], free[1][b]
    growth = there.column("payload_length")[b] - here.column("payload_length")[a]
    back = here.backward[a]
    forward = forward + np.where(back, np.uint32(0), growth)
    backward = backward + np.where(back, growth, np.uint32(0))
    anchors = known.anchors
    own = np.where(back, backward, forward)
    shifted = [
        mix((lane.astype(np.uint64) << np.uint64(1) | way) * M3 ^ shift.astype(np.uint64))
        for lane, way, shift in (
            (here.lane[a], back, own),
            (known.lane, np.zeros(known.lane.size, np.bool_), anchors.forward),
            (known.lane, np.ones(known.lane.size, np.bool_), anchors.backward),
        )
    ]
    good = is_known & (growth != 0) & np.isin(shifted[0], np.concatenate(shifted[1:]))
    good &= np.abs(there.column("time_ns")[b] - here.column("time_ns")[a]) <= TIE_WINDOW_NS
    return _Grown(a[good], b[good], forward[good], backward[good])


def _answered(side: _Side, known: _Known, taken: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return places of packets that a proxy made or swallowed: without data, before anything has crossed."""
    alone = np.ones(side.rows.size, np.bool_)
    alone[taken] = False
    alone &= known.whole[side.lane] & side.early
    alone &= side.column("payload_length") <= empty_bytes(side.table)[side.rows]
    return np.flatnonzero(alone)


def _flags(
    table_a: PacketTable,
    a: NDArray[np.int64],
    table_b: PacketTable,
    b: NDArray[np.int64],
    moved: NDArray[np.bool_],
    book: AddressBook,
) -> NDArray[np.uint16]:
    """Return the evidence of matches: what two packets still share."""
    _, flags, _ = evidence.weigh(table_a, a, table_b, b, book)
    # `weigh` takes numbers and content for equal: here they need not be
    flags &= ~np.uint16(evidence.TCP_SEQ | evidence.TCP_ACK | evidence.PAYLOAD)
    flags |= (table_a.seq[a] == table_b.seq[b]) * np.uint16(evidence.TCP_SEQ)
    flags |= (table_a.ack[a] == table_b.ack[b]) * np.uint16(evidence.TCP_ACK)
    content = (table_a.content_hash[a] == table_b.content_hash[b]) & (table_a.content_length[a] > 0)
    flags |= content * np.uint16(evidence.PAYLOAD)
    flags |= moved * np.uint16(evidence.SHIFTED)
    return flags | np.uint16(evidence.BINDING)


def _told(rows_a: Rows, rows_b: Rows, here: _Side, there: _Side, known: _Known, grown: _Grown) -> Shifts:
    """Return each shift of each flow once, with the packet that began it where a helper rewrote one."""
    anchors = known.anchors

    def keys(
        lane: NDArray[np.int64], forward: NDArray[np.uint32], backward: NDArray[np.uint32]
    ) -> NDArray[np.uint64]:
        return mix(
            mix(forward.astype(np.uint64) << _S32 | backward) ^ (lane.astype(np.uint64) + np.uint64(1)) * M1
        )

    shift, first = np.unique(keys(known.lane, anchors.forward, anchors.backward), return_index=True)
    moved = anchors.moved[first]
    shift, first = shift[moved], first[moved]
    frames = [np.zeros(first.size, np.uint32), np.zeros(first.size, np.uint32)]
    if first.size and grown.a.size:
        behind = keys(here.lane[grown.a], grown.forward, grown.backward)
        place = np.minimum(np.searchsorted(shift, behind), shift.size - 1)
        same = shift[place] == behind
        for column, side, at in ((frames[0], here, grown.a), (frames[1], there, grown.b)):
            column[place[same]] = side.column("frame")[at[same]]
    lane = known.lane[first]
    order = np.lexsort((anchors.time_ns[first], lane))
    first, lane = first[order], lane[order]
    return Shifts(
        rows_a.flow[anchors.a[first]], rows_b.flow[anchors.b[first]], anchors.forward[first], anchors.backward[first],
        anchors.time_ns[first], known.whole[lane], frames[0][order], frames[1][order],
    )  # fmt: skip

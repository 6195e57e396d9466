"""Shifted: the rest of a TCP flow, matched by the shifts that its anchors taught (see `anchors`).

Anchors with an IP id are matches. Another packet is its shifted self when its numbers, moved by the shift of the
anchors next to it in time, its length, flags and IP id are those of exactly one packet of the other flow. A packet
whose payload a helper rewrote has another length, and all numbers behind it are shifted by as much more. What a proxy answers
itself (SYNPROXY: the handshake) has no other self, and is said to be so.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nattrace.match import evidence
from nattrace.match.edges import Edges, edges_of
from nattrace.match.keys import FLAGS_END, M1, M2, mix
from nattrace.match.lanes import Lanes
from nattrace.match.outcome import Matches, Shifts
from nattrace.match.pairing import unique_pairs
from nattrace.match.renumber.anchors import (
    FLAGS,
    SOON_NS,
    Anchors,
    comparable,
    empty_bytes,
    find_anchors,
    legible,
)
from nattrace.match.renumber.numbering import Numbering
from nattrace.match.renumber.walk import walk
from nattrace.match.ties import TIE_WINDOW_NS
from nattrace.table import TCP_SYN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.table import AddressBook, PacketTable

_S16, _S32 = np.uint64(16), np.uint64(32)


@dataclass(slots=True)
class Shifted:
    """What was found: matches, shifts, and the rows of either side that a proxy made or swallowed.

    `suspect_a[i]` could be `suspect_b[i]`, and too little speaks for it. Of `moved_a` and `moved_b`, merged flows,
    equal numbers are not equal bytes, and nobody knows which are; nor of the rows `unknown_a`. `edges` are of flows
    that anchors alone bind.
    """

    matches: Matches
    shifts: Shifts | None
    answered_a: NDArray[np.int64]
    answered_b: NDArray[np.int64]
    suspect_a: NDArray[np.int64]
    suspect_b: NDArray[np.int64]
    moved_a: NDArray[np.int64]
    moved_b: NDArray[np.int64]
    unknown_a: NDArray[np.int64]
    edges: Edges
    numbering: Numbering | None


def match_shifted(
    rows_a: Rows,
    rows_b: Rows,
    flows_a: NDArray[np.int64],
    flows_b: NDArray[np.int64],
    edges: Edges,
    lanes: Lanes,
    book: AddressBook,
) -> Shifted:
    """Match TCP packets whose numbers are shifted or whose options differ.

    The rows are those that stricter rules have left, `lanes` theirs. `flows_a` and `flows_b` map their flow numbers to flows in
    order, of which `edges` says what is bound.
    """
    rows_a, rows_b = (replace(rows, table=comparable(rows.table)) for rows in (rows_a, rows_b))
    walked = walk(rows_a, rows_b, lanes, edges)
    anchors, suspects = find_anchors(
        rows_a, rows_b, flows_a, flows_b, edges, len(edges), walked.pairs, walked.rows
    )
    new = anchors.take(~anchors.bound)
    learned = Matches(new.a, new.b, np.zeros(len(new), np.uint16))
    fresh = edges_of(rows_a, rows_b, learned, flows_a, flows_b) if len(new) else Edges.empty()
    if len(fresh):
        # flows that anchors bind may have further ones, of which both numbers are shifted or payloads rewritten
        own = Lanes.of(rows_a, rows_b, flows_a, flows_b, fresh)
        walked += walk(rows_a, rows_b, own, fresh, _begun(new, own))
        anchors, suspects = find_anchors(
            rows_a, rows_b, flows_a, flows_b, Edges.concatenate([edges, fresh]), len(edges), walked.pairs,
            walked.rows,
        )  # fmt: skip
    nothing = np.empty(0, np.int64)
    # without an IP id, equal lengths and one equal number are too common to bar anything
    moved = suspects.take(suspects.moved & suspects.sure)
    doubt = (
        np.concatenate([suspects.a, walked.possible[0]]), np.concatenate([suspects.b, walked.possible[1]]),
        moved.flow_a, moved.flow_b, walked.unknown, fresh,
    )  # fmt: skip
    if not len(anchors):
        none = Matches(nothing, nothing, np.empty(0, np.uint16))
        return Shifted(none, None, nothing, nothing, *doubt, None)
    known = _Known.of(anchors, rows_b.table.time_ns[anchors.b])
    here = _Side.of(rows_a, known.lanes(flows_a[rows_a.flow], known.flow_a), known.first_a)
    there = _Side.of(rows_b, known.lanes(flows_b[rows_b.flow], known.flow_b), known.first_b)
    there.backward ^= known.swap[there.lane]
    agreed = known.one_to_one()
    here = here.without(np.concatenate([known.anchors.a[agreed], walked.rows]))
    there = there.without(known.anchors.b[agreed])
    a, b, shifted = _by_numbers(here, there, known)
    every_a = np.concatenate([known.anchors.a[agreed], here.rows[a]])
    every_b = np.concatenate([known.anchors.b[agreed], there.rows[b]])
    grown = known.anchors.growth[agreed] != 0
    shifted = np.concatenate([known.anchors.moved[agreed], shifted])
    flags = _flags(rows_a.table, every_a, rows_b.table, every_b, shifted, book)
    flags[: agreed.size] |= grown * np.uint16(evidence.REWRITTEN)
    return Shifted(
        Matches(every_a, every_b, flags),
        _told(rows_a, rows_b, known, agreed[grown]),
        here.rows[_answered(here, known, a)],
        there.rows[_answered(there, known, b)],
        *doubt,
        Numbering.of(rows_b, known.anchors, known.lane, known.flow_b, known.swap, known.unshifted),
    )


def _begun(anchors: Anchors, lanes: Lanes) -> dict[int, list[tuple[int, int]]]:
    """Return the shifts of both directions that anchors tell of each edge, the first ones first."""
    order = np.argsort(anchors.time_ns, kind="stable")
    edge = lanes.lane_a[anchors.a] >> 1
    begun: dict[int, dict[tuple[int, int], None]] = defaultdict(dict)
    for each, forward, backward in zip(
        edge[order].tolist(), anchors.forward[order].tolist(), anchors.backward[order].tolist(), strict=True
    ):
        begun[each][forward, backward] = None
    return {each: list(shifts) for each, shifts in begun.items()}


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

    def one_to_one(self) -> NDArray[np.int64]:
        """Return the anchors that are matches by themselves: sure ones, and each packet in one of them only."""
        chosen = np.flatnonzero(self.anchors.sure)
        for side in (self.anchors.a, self.anchors.b):
            rows = side[chosen]
            chosen = chosen[np.bincount(rows)[rows] == 1]
        return chosen

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
        anchors = self.anchors
        for neighbour, forwards, backwards in (
            (after - 1, anchors.forward_after, anchors.backward_after),
            (after, anchors.forward, anchors.backward),
        ):
            inside = (neighbour >= 0) & (neighbour < code.size)
            place = np.clip(neighbour, 0, code.size - 1)
            inside &= self.lane[place] == lane
            found.append(
                (inside, np.where(inside, forwards[place], 0), np.where(inside, backwards[place], 0))
            )
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

    def without(self, rows: NDArray[np.int64]) -> _Side:
        """Return the same less the packets of the given rows."""
        kept = np.isin(self.rows, rows, invert=True)
        return _Side(self.table, self.rows[kept], self.lane[kept], self.backward[kept], self.early[kept])

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the packet table for these packets."""
        return cast("NDArray[Any]", getattr(self.table, name)[self.rows])

    def keys(
        self,
        which: NDArray[np.int64],
        forward: NDArray[np.uint32] | int,
        backward: NDArray[np.uint32] | int,
    ) -> NDArray[np.uint64]:
        """Return keys of packets with their numbers shifted so much."""
        rows, back = self.rows[which], self.backward[which]
        table = self.table
        seq = table.seq[rows] + np.where(back, backward, forward).astype(np.uint32)
        ack = table.ack[rows] + np.where(back, forward, backward).astype(np.uint32)
        word = (table.tcp_flags[rows] & FLAGS).astype(np.uint64) << _S32 | table.ip_id[rows]
        word ^= table.payload_length[rows].astype(np.uint64) << (_S32 + _S16)
        lane = self.lane[which].astype(np.uint64) << np.uint64(1) | back
        return mix(mix(seq.astype(np.uint64) << _S32 | ack) ^ mix(word * M2) ^ (lane + np.uint64(1)) * M1)


def _by_numbers(
    here: _Side, there: _Side, known: _Known
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return places (a, b) of packets that are each other's shifted selves, and which are shifted at all."""
    (is_before, forward_0, backward_0), (is_after, forward_1, backward_1) = known.shifts(
        here.lane, here.column("time_ns")
    )
    is_after &= ~is_before | (forward_0 != forward_1) | (backward_0 != backward_1)
    before, after = np.flatnonzero(is_before), np.flatnonzero(is_after)
    place = np.concatenate([before, after])
    forward = np.concatenate([forward_0[before], forward_1[after]])
    backward = np.concatenate([backward_0[before], backward_1[after]])
    everything = np.arange(there.rows.size)
    chosen, b = unique_pairs(here.keys(place, forward, backward), there.keys(everything, 0, 0))
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
    return a[good], b[good], ((forward != 0) | (backward != 0))[good]


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


def _told(rows_a: Rows, rows_b: Rows, known: _Known, grown: NDArray[np.int64]) -> Shifts:
    """Return each shift of each flow once, with the packet that began it where a helper rewrote one.

    `grown` are the anchors whose payload has another length.
    """
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
    if first.size and grown.size:
        behind = keys(known.lane[grown], anchors.forward_after[grown], anchors.backward_after[grown])
        place = np.minimum(np.searchsorted(shift, behind), shift.size - 1)
        same = shift[place] == behind
        for column, rows, of in ((frames[0], rows_a, anchors.a), (frames[1], rows_b, anchors.b)):
            column[place[same]] = rows.table.frame[of[grown[same]]]
    lane = known.lane[first]
    order = np.lexsort((anchors.time_ns[first], lane))
    first, lane = first[order], lane[order]
    return Shifts(
        rows_a.flow[anchors.a[first]], rows_b.flow[anchors.b[first]], anchors.forward[first], anchors.backward[first],
        anchors.time_ns[first], known.whole[lane], frames[0][order], frames[1][order],
    )  # fmt: skip

"""One pair of points: which packets are the same, window by window, and what is decided at the end.

Steps (docs/architecture.md says them in prose): unique exact keys with enough evidence are believed at
once; what they leave is tried without the IP id; the rest that still has a candidate waits until all
bindings are known, then bindings decide, then nearness in time inside one binding. What stays tied is
ambiguous. Nothing here reads files or knows what NAT is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.bindings import match_by_binding
from nattrace.match.edges import Edges, edges_of, group_lanes, merge_edges, ttl_drop
from nattrace.match.errors.binding import bind_by_errors, match_quoted
from nattrace.match.errors.silent import bind_silent
from nattrace.match.keys import illegible
from nattrace.match.lanes import Lanes
from nattrace.match.outcome import ABSENT, ANSWERED, ILLEGIBLE, TIED, Matches, Shifts, Unmatched
from nattrace.match.renumber.anchors import worth_waiting
from nattrace.match.renumber.renumbered import Identifications, unnumbered
from nattrace.match.renumber.rewritten import datagram_rows, match_rewritten
from nattrace.match.renumber.sharing import may_share_an_end
from nattrace.match.renumber.shifted import Shifted, match_shifted
from nattrace.match.renumber.unseen import unseen_rows, unseen_ties
from nattrace.match.resize.datagrams import Firsts
from nattrace.match.resize.heads import HEAD_BYTES, match_heads
from nattrace.match.resize.pieces import Pieces, Resized
from nattrace.match.resize.resized import match_pieces
from nattrace.match.resize.waiting import Trains, may_be_resized
from nattrace.match.rows import Rows
from nattrace.match.ties import TIE_WINDOW_NS, candidates, tied_rows
from nattrace.match.unique import commonplace, match_renumbered
from nattrace.match.usual import Usual
from nattrace.match.votes import elect
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, TCP

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.flows import Flows
    from nattrace.table import AddressBook

#: Rows a side that may wait for the end; more are decided with the bindings known so far. It bounds memory
#: at some 100 MB in the worst case (all packets alike) and is far above what ordinary traffic leaves.
WAITING_LIMIT = 262_144


@dataclass(slots=True)
class PairState:
    """What is known between a first and a second point; grows with every window."""

    book: AddressBook
    #: both points' records stand in one file, so that those of one instant have an order
    one_capture: bool = False
    edges: list[Edges] = field(default_factory=list)
    edge_count: int = 0
    merged_count: int = 0  #: of them, those that the last merge left
    #: latency samples: twice the partial edge index, plus one for backward packets; delta ns
    sample_lane: list[NDArray[np.int32]] = field(default_factory=list)
    sample_delta: list[NDArray[np.int64]] = field(default_factory=list)
    #: when, at the first point; nothing while `timed` is not set
    sample_time: list[NDArray[np.int64]] = field(default_factory=list)
    #: there are further points: hops may have to be divided between bindings of the next hop, packet by packet
    timed: bool = False
    #: of packets matched in pieces, which have no samples yet
    resized: list[Resized] = field(default_factory=list)
    #: matched first fragments that tell how datagrams are identified at either point, see `datagrams.Firsts`
    firsts: list[tuple[Rows, Rows]] = field(default_factory=list)
    #: flows of either side in which UDP segmentation was seen
    trains: tuple[Trains, Trains] = field(default_factory=lambda: (Trains(), Trains()))
    waiting_a: list[Rows] = field(default_factory=list)
    waiting_b: list[Rows] = field(default_factory=list)
    unmatched_a: list[Unmatched] = field(default_factory=list)
    unmatched_b: list[Unmatched] = field(default_factory=list)
    given_up: int = 0  #: packets in these
    usual: Usual = field(default_factory=Usual)
    shifts: list[Shifts] = field(default_factory=list)
    identifications: Identifications = field(default_factory=Identifications)
    #: called with every accepted set of pairs: (rows a, rows b, partial edge indices, flags)
    on_match: Callable[[Rows, Rows, NDArray[np.int64], NDArray[np.uint16]], None] | None = None
    #: called with packets that stay unmatched: (side, rows, frames of candidates or None), see `ties.candidates`
    on_unmatched: Callable[[int, Rows, NDArray[np.uint32] | None], None] | None = None

    def commit(self, rows_a: Rows, rows_b: Rows, found: Matches) -> None:
        """Turn matched packets into partial edges and latency samples."""
        if not found.a.size:
            return
        lane, delta = self._add_edges(rows_a, rows_b, found)
        self.sample_lane.append(lane)
        self.sample_delta.append(delta)
        time = rows_a.table.time_ns[found.a]
        self.sample_time.append(time if self.timed else time[:0])

    def commit_pieces(self, rows_a: Rows, rows_b: Rows, found: Pieces) -> None:
        """Turn packets matched in pieces into partial edges, and note what they add up to."""
        if not found.a.size:
            return
        whole, found = found.split()
        self.commit(rows_a, rows_b, whole)
        if found.a.size:
            lane, _ = self._add_edges(rows_a, rows_b, Matches(found.a, found.b, found.flags))
            times = rows_a.table.time_ns, rows_b.table.time_ns
            self.resized.append(Resized.of(found, lane.astype(np.int64), *times))

    def _firsts(self, flows_a: NDArray[np.int64], flows_b: NDArray[np.int64], edges: Edges) -> Firsts:
        """Return the first fragments matched so far whose later ones must be told by them, and forget them."""
        rows_a = Rows.concatenate([rows for rows, _ in self.firsts])
        rows_b = Rows.concatenate([rows for _, rows in self.firsts])
        self.firsts = []
        return Firsts(rows_a, rows_b, Lanes.of(rows_a, rows_b, flows_a, flows_b, edges).lane_a)

    def _add_edges(
        self, rows_a: Rows, rows_b: Rows, found: Matches
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Add partial edges for the pairs; return each pair's lane (see `sample_lane`) and delta, ns."""
        a, b = found.a, found.b
        backward = rows_a.backward[a]
        swap = backward != rows_b.backward[b]
        time = rows_a.table.time_ns[a]
        delta = rows_b.table.time_ns[b] - time
        told = delta
        if self.one_capture:
            frame_a, frame_b = rows_a.table.frame[a], rows_b.table.frame[b]
            told = np.where(delta == 0, np.where(frame_a < frame_b, 1, -1), delta)
        ttl = ttl_drop(rows_a.table.ttl[a], rows_b.table.ttl[b])
        edges, member = group_lanes(
            rows_a.flow[a], rows_b.flow[b], swap, backward, time, ttl, told, found.flags
        )
        member += self.edge_count
        self.edges.append(edges)
        self.edge_count += len(edges)
        firsts = Firsts.among(rows_a, rows_b, found)
        if firsts is not None:
            self.firsts.append(firsts)
        self.identifications.saw_matches(found.flags)
        if self.on_match is not None:
            self.on_match(rows_a.take(a), rows_b.take(b), member, found.flags)
        return (member.astype(np.int32) << np.int32(1)) | backward, delta

    def piled_up(self) -> int:
        """Return how many partial edges came since the last merge, less three times those that it left.

        A merge moves all of them: with many flows it must come seldom, or it costs more than it saves.
        """
        return self.edge_count - 4 * self.merged_count

    def compact(self) -> NDArray[np.int64]:
        """Merge partial edges; return the new number of every edge."""
        edges, member = merge_edges(self.edges)
        self.edges, self.edge_count, self.merged_count = [edges], len(edges), len(edges)
        self.follow_edges(member)
        return member

    def follow_edges(self, member: NDArray[np.int64]) -> None:
        """Give the latency samples their new lanes after edge e has become edge member[e]."""
        of_lane = member.astype(np.int32).repeat(2) << np.int32(1)
        of_lane[1::2] |= np.int32(1)
        # part by part: what is in the cache costs a fraction of what is not
        self.sample_lane = [of_lane[lanes] for lanes in self.sample_lane]
        for part in self.resized:
            part.follow_edges(member)

    def settle(
        self,
        side: int,
        rows: Rows,
        leaving: NDArray[np.bool_],
        others: Rows,
        open_others: NDArray[np.bool_],
    ) -> None:
        """Take unmatched packets that leave the window: those with a candidate wait, the others are absent.

        `open_others` says which of the other side's packets in the window, `others`, are unmatched.
        """
        left = np.flatnonzero(leaving)
        if not left.size:
            return
        waiting = self.waiting_b if side == 0 else self.waiting_a
        # what waits for longer than anything is forwarded is no candidate of these
        oldest_ns = int(rows.table.time_ns[left].min()) - TIE_WINDOW_NS
        recent = [part for part in waiting if int(part.table.time_ns.max()) >= oldest_ns]
        there = [others.content[open_others], *(part.content for part in recent)]
        waits = np.isin(rows.content[left], np.concatenate(there))
        alone = np.flatnonzero(~waits)
        waits[alone] = may_be_resized(
            rows, left[alone], left[waits], others, np.flatnonzero(open_others), recent, self.trains[side]
        )
        alone = np.flatnonzero(~waits)
        if alone.size:
            tables = [(others.table, np.flatnonzero(open_others))]
            tables += [(part.table, np.arange(len(part))) for part in recent]
            waits[alone] = worth_waiting(rows.table, left[alone], tables)
            for of_kind in (unseen_rows, datagram_rows):
                waits[alone] |= may_share_an_end(rows.table, left[alone], tables, of_kind)
        if waits.any():
            waiter = rows.take(left[waits])
            waiter.common = commonplace(rows, left[waits])
            (self.waiting_a if side == 0 else self.waiting_b).append(waiter)
        if not waits.all():
            gone = rows.take(left[~waits])
            self.give_up(side, gone, np.full(len(gone), ABSENT, np.uint8))

    def waiting_rows(self) -> int:
        """Return how many rows wait on the fuller side."""
        return max(sum(map(len, self.waiting_a)), sum(map(len, self.waiting_b)))

    def give_up(
        self, side: int, rows: Rows, reason: NDArray[np.uint8], near: NDArray[np.uint32] | None = None
    ) -> None:
        """Record packets that stay unmatched, with the frames of their candidates where they have some."""
        if not len(rows):
            return
        if self.on_unmatched is not None:
            self.on_unmatched(side, rows, near)
        if not self.edge_count and self.given_up > WAITING_LIMIT:
            # between points that share nothing, as tunnels and what they carry, absence says nothing
            rows, reason = rows.take(reason != ABSENT), reason[reason != ABSENT]
        self.given_up += len(rows)
        table = rows.table
        tcp = table.protocol == TCP
        reason = np.where((reason == ABSENT) & illegible(table), np.uint8(ILLEGIBLE), reason)
        record = Unmatched(
            flow=rows.flow,
            time_ns=table.time_ns,
            backward=rows.backward,
            number=rows.number,
            reason=reason,
            seq=table.seq,
            data=np.where(tcp, table.payload_length, np.uint32(0)),
            ip_id=table.ip_id,
            fragment=(table.fragment & np.uint16(MORE_FRAGMENTS | FRAGMENT_OFFSET)) != 0,
        )
        (self.unmatched_a if side == 0 else self.unmatched_b).append(record)

    def resolve(
        self,
        flows_a: NDArray[np.int64],
        flows_b: NDArray[np.int64],
        errors: tuple[Errors, Errors],
        merged: tuple[Flows, Flows],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Decide all waiting packets with the bindings known by now; return the numbers of matched packets.

        `flows_a` and `flows_b` map flow numbers to places in `merged`, the flows in order. Bindings come from
        packets matched by evidence; where a flow has none, the ICMP `errors` about it may tell, or weak
        evidence of several packets add up to one.
        """
        rows_a, rows_b = Rows.concatenate(self.waiting_a), Rows.concatenate(self.waiting_b)
        self.waiting_a, self.waiting_b = [], []
        done_a, done_b = np.zeros(len(rows_a), np.bool_), np.zeros(len(rows_b), np.bool_)
        matched_a, matched_b = done_a.copy(), done_b.copy()

        def note_matched(a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
            matched_a[a] = done_a[a] = True
            matched_b[b] = done_b[b] = True

        pieces = Pieces.none()
        unseen = np.empty(0, np.int64), np.empty(0, np.int64)
        suspects = np.empty((2, 0), np.int64)
        self.identifications.look(rows_a, rows_b, self.usual, self.book)
        renumbered = self.identifications.renumbered
        if renumbered:
            found = match_renumbered(rows_a, rows_b, TIE_WINDOW_NS, self.usual, self.book, renumbered)
            self.commit(rows_a, rows_b, found)
            note_matched(found.a, found.b)
        if len(rows_a) and len(rows_b):
            edges, _ = merge_edges(self.edges, flows_a, flows_b)
            heads = match_heads(rows_a, rows_b, TIE_WINDOW_NS, self.usual, self.book)
            if heads.a.size:
                begun = edges_of(rows_a, rows_b, heads, flows_a, flows_b)
                same = (np.arange(1 + int(flows.max(initial=0))) for flows in (flows_a, flows_b))
                edges, _ = merge_edges([edges, begun], *same)
            if len(errors[0]) and len(errors[1]):
                told = bind_by_errors(
                    errors, merged, edges, self.usual, self.book, renumbered=renumbered != 0
                )
                edges = Edges.concatenate([edges, told])
                found = match_quoted(rows_a, rows_b, merged, (flows_a, flows_b), told, self.book)
                self.commit(rows_a, rows_b, found)
                note_matched(found.a, found.b)
            votes = elect(rows_a, rows_b, flows_a, flows_b, edges, self.usual, self.book, renumbered)
            if len(votes):
                edges = Edges.concatenate([edges, votes])
            lanes = Lanes.of(rows_a, rows_b, flows_a, flows_b, edges)
            for by in ("exact", "content"):
                open_a, open_b = np.flatnonzero(~done_a), np.flatnonzero(~done_b)
                left_a, left_b = rows_a.take(open_a), rows_b.take(open_b)
                own = lanes.take(open_a, open_b)
                found = match_by_binding(
                    left_a,
                    left_b,
                    by,
                    own,
                    self.usual,
                    self.book,
                    renumbered,
                    kept=self.identifications.are_kept,
                )
                found = Matches(open_a[found.a], open_b[found.b], found.flags)
                self.commit(rows_a, rows_b, found)
                note_matched(found.a, found.b)
            shifted, suspects = self._resolve_shifted(
                rows_a, rows_b, done_a, done_b, flows_a, flows_b, edges, lanes
            )
            note_matched(shifted.matches.a, shifted.matches.b)
            if len(shifted.edges):
                edges = Edges.concatenate([edges, shifted.edges])
                lanes = Lanes.of(rows_a, rows_b, flows_a, flows_b, edges)
            open_a, open_b = np.flatnonzero(~done_a), np.flatnonzero(~done_b)
            left_a, left_b = rows_a.take(open_a), rows_b.take(open_b)
            moved = np.zeros(open_b.size, np.bool_)
            if shifted.numbering is not None:
                left_b, moved = shifted.numbering.of_first_point(left_b, flows_b)
            # where numbers are shifted, and nobody knows by how much, equal ones are not the same bytes
            own = lanes.take(open_a, open_b).without(
                np.flatnonzero(
                    np.isin(flows_a[left_a.flow], shifted.moved_a) | np.isin(open_a, shifted.unknown_a)
                ),
                np.flatnonzero(np.isin(flows_b[left_b.flow], shifted.moved_b)),
            )
            heads = heads.among(open_a, open_b)
            firsts = self._firsts(flows_a, flows_b, edges)
            if renumbered:
                left_a, left_b = unnumbered(left_a), unnumbered(left_b)
            pieces = match_pieces(left_a, left_b, own, heads, firsts, self.usual)
            pieces.say_shifted(moved[pieces.b])
            pieces = pieces.of_rows(open_a, open_b)
            self.commit_pieces(rows_a, rows_b, pieces)
            note_matched(pieces.a, pieces.b)
            # what may be a piece of something is no datagram that was rewritten
            free_a, free_b = (
                np.setdiff1d(np.flatnonzero(~done), tied)
                for done, tied in ((done_a, pieces.tied_a), (done_b, pieces.tied_b))
            )
            left_a, left_b = rows_a.take(free_a), rows_b.take(free_b)
            found, perhaps = match_rewritten(left_a, left_b, lanes.take(free_a, free_b))
            self.commit(left_a, left_b, found)
            note_matched(free_a[found.a], free_b[found.b])
            suspects = np.concatenate([suspects, np.stack([free_a[perhaps[0]], free_b[perhaps[1]]])], axis=1)
            open_a, open_b = np.flatnonzero(~done_a), np.flatnonzero(~done_b)
            left_a, left_b = rows_a.take(open_a), rows_b.take(open_b)
            of_a, of_b = unseen_ties(left_a, left_b, lanes.take(open_a, open_b))
            unseen = open_a[of_a], open_b[of_b]
        rest_a, rest_b = rows_a.take(~done_a), rows_b.take(~done_b)
        named = self.on_unmatched is not None
        blind = renumbered != 0
        why_a, why_b = (
            tied_rows(rows, others, renumbered=blind) for rows, others in ((rest_a, rest_b), (rest_b, rest_a))
        )
        for why, done, tied in (
            (why_a, done_a, np.concatenate([pieces.tied_a, unseen[0]])),
            (why_b, done_b, np.concatenate([pieces.tied_b, unseen[1]])),
        ):
            why[(np.cumsum(~done) - 1)[tied]] = TIED
        near_a = candidates(rest_a, rest_b, renumbered=blind) if named else None
        near_b = candidates(rest_b, rest_a, renumbered=blind) if named else None
        # what agrees in too little to be matched, and in too much to be called lost
        left = ~done_a[suspects[0]] & ~done_b[suspects[1]]
        a, b = (
            np.cumsum(~done)[rows[left]] - 1 for done, rows in ((done_a, suspects[0]), (done_b, suspects[1]))
        )
        why_a[a], why_b[b] = TIED, TIED
        if near_a is not None and near_b is not None:
            near_a[a, 0], near_b[b, 0] = rest_b.table.frame[b], rest_a.table.frame[a]
        self.give_up(0, rest_a, why_a, near_a)
        self.give_up(1, rest_b, why_b, near_b)
        return rows_a.number[matched_a], rows_b.number[matched_b]

    def bind_silent(
        self,
        errors: tuple[Errors, Errors],
        merged: tuple[Flows, Flows],
        members: tuple[NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        """Bind flows of which one point shows nothing but `errors`, when all packets have been decided."""
        renumbered = self.identifications.renumbered != 0
        told = bind_silent(self.edges, errors, merged, members, self.usual, self.book, renumbered=renumbered)
        self.edges.append(told)
        self.edge_count += len(told)

    def _resolve_shifted(
        self,
        rows_a: Rows,
        rows_b: Rows,
        done_a: NDArray[np.bool_],
        done_b: NDArray[np.bool_],
        flows_a: NDArray[np.int64],
        flows_b: NDArray[np.int64],
        edges: Edges,
        lanes: Lanes,
    ) -> tuple[Shifted, NDArray[np.int64]]:
        """Match what a box has numbered anew; mark as done what was found, and what the box answered itself.

        Returns what was found, with rows of `rows_a` and `rows_b`, and rows that may be one packet all the same.
        """
        open_a, open_b = np.flatnonzero(~done_a), np.flatnonzero(~done_b)
        left_a, left_b = rows_a.take(open_a), rows_b.take(open_b)
        asked = left_a, left_b
        if self.identifications.renumbered:
            asked = unnumbered(left_a), unnumbered(left_b)
        found = match_shifted(*asked, flows_a, flows_b, edges, lanes.take(open_a, open_b), self.book)
        if found.shifts is not None:
            self.shifts.append(found.shifts)
        self.commit(left_a, left_b, found.matches)
        if self.usual.reach_ns() is None:
            # behind a proxy nothing else says how long packets take
            self.usual.learn(left_b.table.time_ns[found.matches.b] - left_a.table.time_ns[found.matches.a])
        for side, left, answered in ((0, left_a, found.answered_a), (1, left_b, found.answered_b)):
            self.give_up(side, left.take(answered), np.full(answered.size, ANSWERED, np.uint8))
        done_a[open_a[np.concatenate([found.matches.a, found.answered_a])]] = True
        done_b[open_b[np.concatenate([found.matches.b, found.answered_b])]] = True
        matches = replace(found.matches, a=open_a[found.matches.a], b=open_b[found.matches.b])
        # what says the same under other numbers must not be taken for a piece of something else
        a, b = found.suspect_a, found.suspect_b
        free = ~done_a[open_a[a]] & ~done_b[open_b[b]]
        same = free & (left_a.table.content_hash[a] == left_b.table.content_hash[b])
        same &= (left_a.table.content_length[a] >= HEAD_BYTES) & (left_a.table.payload_length[a] > 0)
        for side, left, (rows, first), frames in (
            (0, left_a, np.unique(a[same], return_index=True), left_b.table.frame[b[same]]),
            (1, left_b, np.unique(b[same], return_index=True), left_a.table.frame[a[same]]),
        ):
            self.give_up(
                side, left.take(rows), np.full(rows.size, TIED, np.uint8), frames[first].reshape(-1, 1)
            )
        done_a[open_a[a[same]]], done_b[open_b[b[same]]] = True, True
        found = replace(found, matches=matches, unknown_a=open_a[found.unknown_a])
        return found, np.stack([open_a[a[free & ~same]], open_b[b[free & ~same]]])

"""One pair of points: which packets are the same, window by window, and what is decided at the end.

Steps (docs/architecture.md says them in prose): unique exact keys with enough evidence are believed at
once; what they leave is tried without the IP id; the rest that still has a candidate waits until all
bindings are known, then bindings decide, then nearness in time inside one binding. What stays tied is
ambiguous. Nothing here reads files or knows what NAT is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.l4 import fillings
from nattrace.match import evidence
from nattrace.match.edges import Edges, group_edges, group_lanes, merge_edges
from nattrace.match.keys import ACK_END, M1, commonplace_keys, mix
from nattrace.match.pairing import group_ids, nearest_distance, nearest_pairs, unique_pairs
from nattrace.match.rows import Rows
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, TCP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.table import AddressBook

#: Why a packet has no partner at the other point.
ABSENT, TIED = 0, 1

#: Rows a side that may wait for the end; more are decided with the bindings known so far. It bounds memory
#: at some 100 MB in the worst case (all packets alike) and is far above what ordinary traffic leaves.
WAITING_LIMIT = 262_144

#: A pair of unique but repeatable packets (no IP id to tell repeats apart) is believed at once only when it
#: is no further apart than this many times the usual latency of the pair of points.
_REACH_FACTOR = 4
_REACH_FLOOR_NS = 100_000
#: Packets with nothing of their own are paired inside a binding only when about as far apart as usual: half
#: as far again, plus what one interrupt more or less makes.
_NEAREST_FLOOR_NS = 20_000
#: A packet that is unique inside its binding may be this late without an IP id: neighbour discovery takes a
#: few milliseconds, and no host repeats itself sooner.
_UNIQUE_REACH_NS = 10_000_000
#: TCP repeats a segment after 200 ms at the earliest (Linux TCP_RTO_MIN); closer twins are one packet.
_TCP_REACH_NS = 100_000_000

#: Weak evidence must add up to this much, from several packets and nearly without dissent, to bind flows.
_VOTE_BITS = 90
_VOTE_PACKETS = 4
_VOTE_SHARE = 0.9
#: How far apart in time two packets may be to vote for their flows.
_VOTE_WINDOW_NS = 1_000_000_000
#: A packet has a candidate only this close: nothing forwards a packet after half a minute (see REACH_NS).
_TIE_WINDOW_NS = 30_000_000_000
#: A nearest neighbour is clear when the runner-up is this many times further away.
_MARGIN = 8
#: Clock ticks closer than this say nothing about order (microsecond captures).
_FLOOR_NS = 1_000

#: Latencies of elected pairs teach only up to this many medians; jitter on one host stays below.
_TYPICAL_FACTOR = 4

#: Candidates named for an ambiguous packet.
CANDIDATES = 4

#: Latencies kept to learn what is usual between two points.
_SAMPLE = 4_096


@dataclass(slots=True)
class Matches:
    """Matched packets of one step: indices into the rows of both sides, and the evidence flags."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    flags: NDArray[np.uint16]


@dataclass(slots=True)
class Unmatched:
    """Packets of one side that found no partner at the other point, and why (ABSENT or TIED)."""

    flow: NDArray[np.int64]  #: partial flow index
    time_ns: NDArray[np.int64]
    backward: NDArray[np.bool_]
    number: NDArray[np.int64]
    reason: NDArray[np.uint8]
    seq: NDArray[np.uint32]  #: TCP sequence number
    data: NDArray[np.uint32]  #: TCP payload bytes; 0 for other protocols
    ip_id: NDArray[np.uint32]
    fragment: NDArray[np.bool_]  #: one of several fragments

    @classmethod
    def concatenate(cls, parts: Sequence[Unmatched], flows: NDArray[np.int64]) -> Unmatched:
        """Return all packets of the parts; `flows` says which merged flow each partial flow became."""
        kinds = {
            "backward": np.bool_,
            "reason": np.uint8,
            "seq": np.uint32,
            "data": np.uint32,
            "ip_id": np.uint32,
            "fragment": np.bool_,
        }
        joined = cls(
            **{
                f.name: np.concatenate(
                    [*(getattr(p, f.name) for p in parts), np.empty(0, kinds.get(f.name, np.int64))]
                )
                for f in fields(cls)
            }
        )
        joined.flow = flows[joined.flow]
        return joined


@dataclass(slots=True)
class PairState:
    """What is known between a first and a second point; grows with every window."""

    book: AddressBook
    edges: list[Edges] = field(default_factory=list)
    edge_count: int = 0
    #: latency samples: twice the partial edge index, plus one for backward packets; delta ns
    sample_lane: list[NDArray[np.int32]] = field(default_factory=list)
    sample_delta: list[NDArray[np.int64]] = field(default_factory=list)
    waiting_a: list[Rows] = field(default_factory=list)
    waiting_b: list[Rows] = field(default_factory=list)
    unmatched_a: list[Unmatched] = field(default_factory=list)
    unmatched_b: list[Unmatched] = field(default_factory=list)
    usual: list[NDArray[np.int64]] = field(default_factory=list)
    usual_count: int = 0
    #: called with every accepted set of pairs: (rows a, rows b, partial edge indices, flags)
    on_match: Callable[[Rows, Rows, NDArray[np.int64], NDArray[np.uint16]], None] | None = None
    #: called with packets that stay unmatched: (side, rows, frames of candidates or None), see `_candidates`
    on_unmatched: Callable[[int, Rows, NDArray[np.uint32] | None], None] | None = None

    # -- learning ------------------------------------------------------------------------------------

    def usual_ns(self) -> int | None:
        """Return how far apart two sightings of one packet usually are at most; None while unknown."""
        if not self.usual:
            return None
        return int(np.percentile(np.abs(np.concatenate(self.usual)), 99.5))

    def reach_ns(self) -> int | None:
        """Return how far apart two unique sightings may be without an IP id to vouch for them."""
        usual = self.usual_ns()
        return None if usual is None else max(_REACH_FACTOR * usual, _REACH_FLOOR_NS)

    def learn(self, deltas: NDArray[np.int64]) -> None:
        """Remember latencies of pairs that are beyond doubt."""
        if deltas.size and self.usual_count < _SAMPLE:
            step = max(1, deltas.size // (_SAMPLE // 4))
            self.usual.append(deltas[::step][:_SAMPLE])
            self.usual_count += self.usual[-1].size

    # -- commit --------------------------------------------------------------------------------------

    def commit(self, rows_a: Rows, rows_b: Rows, found: Matches) -> None:
        """Turn matched packets into partial edges and latency samples."""
        if not found.a.size:
            return
        a, b = found.a, found.b
        backward = rows_a.backward[a]
        swap = backward != rows_b.backward[b]
        time = rows_a.table.time_ns[a]
        delta = rows_b.table.time_ns[b] - time
        ttl = rows_a.table.ttl[a].astype(np.int64) - rows_b.table.ttl[b]
        edges, member = group_lanes(
            rows_a.flow[a], rows_b.flow[b], swap, backward, time, ttl, delta, found.flags
        )
        member += self.edge_count
        self.edges.append(edges)
        self.edge_count += len(edges)
        self.sample_lane.append((member.astype(np.int32) << np.int32(1)) | backward)
        self.sample_delta.append(delta)
        if self.on_match is not None:
            self.on_match(rows_a.take(a), rows_b.take(b), member, found.flags)

    def compact(self, flows_a: NDArray[np.int64], flows_b: NDArray[np.int64]) -> NDArray[np.int64]:
        """Merge partial edges, and follow flows to their new numbers; return the new number of every edge."""
        edges, member = merge_edges(self.edges, flows_a, flows_b)
        self.edges, self.edge_count = [edges], len(edges)
        self.sample_lane = [self.lanes(member)]
        for flows, waiting, unmatched in (
            (flows_a, self.waiting_a, self.unmatched_a),
            (flows_b, self.waiting_b, self.unmatched_b),
        ):
            for rows in waiting:
                rows.flow = flows[rows.flow]
            for record in unmatched:
                record.flow = flows[record.flow]
        return member

    def lanes(self, member: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the lanes of all samples after edge e has become edge member[e]."""
        lanes = np.concatenate([*self.sample_lane, np.empty(0, np.int32)])
        if not lanes.size:
            return lanes
        of_lane = member.astype(np.int32).repeat(2) << np.int32(1)
        of_lane[1::2] |= np.int32(1)
        renumbered: NDArray[np.int32] = of_lane[lanes]
        return renumbered

    # -- step 1 and 2: keys and evidence -------------------------------------------------------------

    def match_unique(
        self,
        rows_a: Rows,
        open_a: NDArray[np.int64],
        rows_b: Rows,
        open_b: NDArray[np.int64],
        window_ns: int,
    ) -> Matches:
        """Match packets whose key is unique on both sides and whose evidence suffices by itself.

        `open_a` and `open_b` are the indices of the rows that have no partner yet.
        """
        ia, ib = unique_pairs(rows_a.exact[open_a], rows_b.exact[open_b])
        first = self._believe(rows_a, rows_b, open_a[ia], open_b[ib], window_ns)
        left_a = _without(open_a, first.a, len(rows_a))
        left_b = _without(open_b, first.b, len(rows_b))
        ia, ib = unique_pairs(rows_a.content[left_a], rows_b.content[left_b])
        if not ia.size:
            return first
        second = self._believe(rows_a, rows_b, left_a[ia], left_b[ib], window_ns)
        return Matches(
            np.concatenate([first.a, second.a]),
            np.concatenate([first.b, second.b]),
            np.concatenate([first.flags, second.flags]),
        )

    def _believe(
        self, rows_a: Rows, rows_b: Rows, a: NDArray[np.int64], b: NDArray[np.int64], window_ns: int
    ) -> Matches:
        if not a.size:
            return Matches(a, b, np.empty(0, np.uint16))
        bits, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, self.book)
        delta = rows_b.table.time_ns[b] - rows_a.table.time_ns[a]
        apart = np.abs(delta)
        good = (bits >= evidence.STRONG) & ~conflict & (apart <= window_ns)
        told_apart = (flags & evidence.IP_ID) != 0
        tcp = (flags & evidence.TCP_SEQ) != 0
        endpoint = (flags & (evidence.SAME_SRC | evidence.SAME_DST)) != 0
        repeated = np.flatnonzero(good & ~tcp & ~(told_apart & endpoint))
        if repeated.size:
            # where it must carry the match, a payload may not be what everybody says all the time
            common = commonplace(rows_a, a[repeated]) | commonplace(rows_b, b[repeated])
            good[repeated[common]] = False
        acknowledged = tcp & ((flags & evidence.TCP_ACK) != 0)
        # a segment without an IP id may be another copy of itself, but not so soon
        self.learn(delta[good & (told_apart | (acknowledged & (apart <= _TCP_REACH_NS)))])
        reach = self.reach_ns()
        if reach is not None:
            limit = np.where(tcp, max(reach, _TCP_REACH_NS), reach)
            good &= told_apart | (apart <= limit)
        else:
            good &= told_apart | tcp | (apart <= _VOTE_WINDOW_NS)
        if not good.all():
            a, b, flags = a[good], b[good], flags[good]
        return Matches(a, b, flags)

    # -- step 3 and 5: bindings, ties, refusal -------------------------------------------------------

    def settle(self, side: int, rows: Rows, leaving: NDArray[np.bool_], others: NDArray[np.uint64]) -> None:
        """Take unmatched packets that leave the window: those with a candidate wait, the others are absent.

        `others` are the content keys of the other side's unmatched packets in the window.
        """
        left = np.flatnonzero(leaving)
        if not left.size:
            return
        waiting = self.waiting_b if side == 0 else self.waiting_a
        waits = np.isin(rows.content[left], np.concatenate([others, *(w.content for w in waiting)]))
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
        table = rows.table
        tcp = table.protocol == TCP
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
        if self.on_unmatched is not None:
            self.on_unmatched(side, rows, near)

    def resolve(
        self, flows_a: NDArray[np.int64], flows_b: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Decide all waiting packets with the bindings known by now; return the numbers of matched packets.

        `flows_a` and `flows_b` map partial to merged flows. Bindings come from packets matched by
        evidence; where a flow has none, weak evidence of several packets may add up to one.
        """
        rows_a, rows_b = Rows.concatenate(self.waiting_a), Rows.concatenate(self.waiting_b)
        self.waiting_a, self.waiting_b = [], []
        matched_a, matched_b = [], []
        edges, _ = merge_edges(self.edges, flows_a, flows_b)
        done_a, done_b = np.zeros(len(rows_a), np.bool_), np.zeros(len(rows_b), np.bool_)
        if len(rows_a) and len(rows_b):
            votes = self._vote(rows_a, rows_b, flows_a, flows_b, edges)
            if len(votes):
                edges = Edges.concatenate([edges, votes])
            for by in ("exact", "content"):
                open_a, open_b = np.flatnonzero(~done_a), np.flatnonzero(~done_b)
                found = self._by_binding(
                    rows_a.take(open_a), rows_b.take(open_b), by, flows_a, flows_b, edges
                )
                found = Matches(open_a[found.a], open_b[found.b], found.flags)
                self.commit(rows_a, rows_b, found)
                done_a[found.a] = True
                done_b[found.b] = True
                matched_a.append(rows_a.number[found.a])
                matched_b.append(rows_b.number[found.b])
        rest_a, rest_b = rows_a.take(~done_a), rows_b.take(~done_b)
        named = self.on_unmatched is not None
        self.give_up(0, rest_a, _tied(rest_a, rest_b), _candidates(rest_a, rest_b) if named else None)
        self.give_up(1, rest_b, _tied(rest_b, rest_a), _candidates(rest_b, rest_a) if named else None)
        none = [np.empty(0, np.int64)]
        return np.concatenate(matched_a + none), np.concatenate(matched_b + none)

    def _vote(
        self,
        rows_a: Rows,
        rows_b: Rows,
        flows_a: NDArray[np.int64],
        flows_b: NDArray[np.int64],
        edges: Edges,
    ) -> Edges:
        """Let pairs too weak alone vote for bindings between flows that have none yet."""
        free_a = np.flatnonzero(~np.isin(flows_a[rows_a.flow], edges.flow_a))
        free_b = np.flatnonzero(~np.isin(flows_b[rows_b.flow], edges.flow_b))
        if not free_a.size or not free_b.size:
            return Edges.empty()
        rows_a, rows_b = rows_a.take(free_a), rows_b.take(free_b)
        by = "content" if _without_ids(rows_a, rows_b) else "exact"
        pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [
            unique_pairs(getattr(rows_a, by), getattr(rows_b, by))
        ]
        for end in ("dst", "src"):
            keys = [
                mix(getattr(r, by) ^ (getattr(r.table, end).astype(np.uint64) + np.uint64(1)) * M1)
                for r in (rows_a, rows_b)
            ]
            group_a, group_b = group_ids(*keys)
            pairs.append(
                nearest_pairs(
                    group_a,
                    rows_a.table.time_ns,
                    group_b,
                    rows_b.table.time_ns,
                    window_ns=_VOTE_WINDOW_NS,
                    floor_ns=_FLOOR_NS,
                    margin=_MARGIN,
                    rounds=1,
                )
            )
        both = np.unique(np.concatenate([np.stack(p) for p in pairs], axis=1), axis=1)
        a, b = both[0], both[1]
        soon = np.abs(rows_b.table.time_ns[b] - rows_a.table.time_ns[a]) <= _VOTE_WINDOW_NS
        a, b = a[soon], b[soon]
        bits, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, self.book)
        a, b, bits, flags = a[~conflict], b[~conflict], bits[~conflict], flags[~conflict]
        if not a.size:
            return Edges.empty()
        # what everybody says all the time says nothing of who is who
        common = rows_a.common[a] | rows_b.common[b]
        bits[common] -= evidence.said_bits(rows_a.table, a[common])
        backward = rows_a.backward[a]
        time = rows_a.table.time_ns[a]
        delta = rows_b.table.time_ns[b] - time
        votes, member = group_edges(
            flows_a[rows_a.flow[a]], flows_b[rows_b.flow[b]], backward != rows_b.backward[b], backward, time,
            np.zeros(a.size, np.int64), delta, flags,
        )  # fmt: skip
        weight = np.bincount(member, bits, len(votes))
        count = np.bincount(member, minlength=len(votes))
        total_a = np.bincount(votes.flow_a, count, int(votes.flow_a.max()) + 1)[votes.flow_a]
        total_b = np.bincount(votes.flow_b, count, int(votes.flow_b.max()) + 1)[votes.flow_b]
        elected = (weight >= _VOTE_BITS) & (count >= _VOTE_PACKETS)
        elected &= (count >= _VOTE_SHARE * total_a) & (count >= _VOTE_SHARE * total_b)
        # what an elected binding says of times comes from its typical pairs only, see `_typical`
        voters = np.flatnonzero(elected[member])
        voters = voters[_typical(delta[voters])]
        drop = rows_a.table.ttl[a[voters]].astype(np.int64) - rows_b.table.ttl[b[voters]]
        voters = voters[_causal(member[voters], backward[voters], delta[voters], drop, len(votes))]
        if self.reach_ns() is None:
            self.learn(delta[voters])
        member, backward = member[voters], backward[voters]
        return group_edges(
            votes.flow_a[member], votes.flow_b[member], votes.swap[member], backward, time[voters],
            np.zeros(voters.size, np.int64), delta[voters], flags[voters],
        )[0]  # fmt: skip

    def _by_binding(
        self,
        rows_a: Rows,
        rows_b: Rows,
        by: str,
        flows_a: NDArray[np.int64],
        flows_b: NDArray[np.int64],
        edges: Edges,
    ) -> Matches:
        """Match packets with equal keys inside one binding: alone there, or clearly nearest in time."""
        nothing = Matches(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint16))
        if not len(edges) or not len(rows_a) or not len(rows_b):
            return nothing
        edge_a = edge_of(flows_a[rows_a.flow], rows_a.table.time_ns, edges.flow_a, edges)
        edge_b = edge_of(flows_b[rows_b.flow], rows_b.table.time_ns, edges.flow_b, edges)
        on_a, on_b = np.flatnonzero(edge_a >= 0), np.flatnonzero(edge_b >= 0)
        if not on_a.size or not on_b.size:
            return nothing
        edge_a, edge_b = edge_a[on_a], edge_b[on_b]
        back_a = rows_a.backward[on_a]
        back_b = rows_b.backward[on_b] ^ edges.swap[edge_b]
        lane_a = (edge_a.astype(np.uint64) << np.uint64(1)) | back_a
        lane_b = (edge_b.astype(np.uint64) << np.uint64(1)) | back_b
        key_a = mix(getattr(rows_a, by)[on_a] ^ lane_a * M1)
        key_b = mix(getattr(rows_b, by)[on_b] ^ lane_b * M1)
        group_a, group_b = group_ids(key_a, key_b)
        shift = _usual_delta(edges, edge_a, back_a)
        # what is said once, and by nobody else, may be late: the first packet of a flow waits for ARP
        own_a, own_b = _distinct(rows_a, on_a), _distinct(rows_b, on_b)
        ua, ub = unique_pairs(key_a[own_a], key_b[own_b])
        ua, ub = own_a[ua], own_b[ub]
        soon = np.abs(rows_b.table.time_ns[on_b[ub]] - rows_a.table.time_ns[on_a[ua]]) <= _UNIQUE_REACH_NS
        ua, ub = ua[soon], ub[soon]
        left_a, left_b = _others(on_a.size, ua), _others(on_b.size, ub)
        usual = self.usual_ns()
        a, b = nearest_pairs(
            group_a[left_a], rows_a.table.time_ns[on_a[left_a]] + shift[left_a],
            group_b[left_b], rows_b.table.time_ns[on_b[left_b]],
            window_ns=_VOTE_WINDOW_NS if usual is None else usual + usual // 2 + _NEAREST_FLOOR_NS,
            floor_ns=_FLOOR_NS if usual is None else max(usual // 2, _FLOOR_NS),
            margin=_MARGIN, rounds=4,
        )  # fmt: skip
        near_a, near_b = np.concatenate([ua, left_a[a]]), np.concatenate([ub, left_b[b]])
        a, b = on_a[near_a], on_b[near_b]
        # a packet of this way that is seen at the wrong end first is another one
        delta = rows_b.table.time_ns[b] - rows_a.table.time_ns[a]
        onward = np.sign(delta) * np.sign(shift[near_a]) >= 0
        a, b = a[onward], b[onward]
        _, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, self.book)
        flags |= np.uint16(evidence.BINDING)
        return Matches(a[~conflict], b[~conflict], flags[~conflict])


def commonplace(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each chosen row whether another packet of the window says the very same.

    A payload of equal bytes counts as said by others. Never so for TCP, where the sequence number tells
    packets apart.
    """
    if rows.said is None:
        said = np.sort(commonplace_keys(rows.table, np.flatnonzero(rows.table.protocol != TCP)))
        rows.said = said[1:][said[1:] == said[:-1]]
    result = np.zeros(chosen.size, np.bool_)
    asked = np.flatnonzero(rows.table.protocol[chosen] != TCP)
    if asked.size and rows.said.size:
        wanted = commonplace_keys(rows.table, chosen[asked])
        place = np.minimum(np.searchsorted(rows.said, wanted), rows.said.size - 1)
        result[asked] = rows.said[place] == wanted
    filled = fillings()
    hashes = rows.table.content_hash[chosen[asked]]
    result[asked] |= filled[np.minimum(np.searchsorted(filled, hashes), filled.size - 1)] == hashes
    return result


def _distinct(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return positions in `chosen` of packets that say something of their own."""
    table = rows.table
    telling = (table.content_length[chosen] >= 4) | (table.ip_id[chosen] != 0)
    numbered = (table.protocol[chosen] == TCP) & (table.seq[chosen] != 0)
    telling |= numbered & (table.l4_visible[chosen] >= ACK_END)
    return np.flatnonzero(telling & ~rows.common[chosen])


def _without(rows: NDArray[np.int64], chosen: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Return `rows` (ascending indices below `total`) without the chosen ones."""
    mask = np.zeros(total, np.bool_)
    mask[rows] = True
    mask[chosen] = False
    return np.flatnonzero(mask)


def _causal(
    member: NDArray[np.int64],
    backward: NDArray[np.bool_],
    delta: NDArray[np.int64],
    ttl_drop: NDArray[np.int64],
    edges: int,
) -> NDArray[np.bool_]:
    """Return which pairs belong to an edge whose two directions can be one path, whatever the clocks.

    On a path from the first point to the second every forward packet is seen later at the second point,
    by the clocks' offset and the way, and every backward packet earlier: the two never overlap. And the
    TTL falls the same way.
    """
    high = np.full((2, edges), -(2**62), np.int64)
    low = np.full((2, edges), 2**62, np.int64)
    np.maximum.at(high, (backward.astype(np.int64), member), delta)
    np.minimum.at(low, (backward.astype(np.int64), member), delta)
    both = (high > -(2**62)).all(axis=0)
    first_to_second, second_to_first = low[0] >= high[1], low[1] >= high[0]
    possible = ~both | first_to_second | second_to_first
    way = np.where(first_to_second == second_to_first, 0, np.where(first_to_second, 1, -1))
    uphill = np.sign(ttl_drop) * np.where(backward, -1, 1) * np.where(both, way, 0)[member] < 0
    possible[member[uphill]] = False
    result: NDArray[np.bool_] = possible[member]
    return result


def _typical(deltas: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which latencies are not far above the median: an election tolerates some wrong votes."""
    apart = np.abs(deltas)
    limit = _TYPICAL_FACTOR * np.median(apart) if apart.size else 0
    result: NDArray[np.bool_] = apart <= limit
    return result


def _others(rows: int, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices below `rows` that are not among `chosen`."""
    mask = np.ones(rows, np.bool_)
    mask[chosen] = False
    return np.flatnonzero(mask)


def edge_of(
    flow: NDArray[np.int64], time_ns: NDArray[np.int64], edge_flow: NDArray[np.int64], edges: Edges
) -> NDArray[np.int64]:
    """Return for each packet the edge its flow was on at its time, -1 where its flow has none.

    A flow with several edges over time (a binding that was renewed) is on the one whose matched packets
    surround it in time, or the first or last one for a packet before or after all of them; a packet
    between two bindings, or inside both, is on neither.
    """
    order = np.argsort(edge_flow, kind="stable")  # nearly free: merged edges come in order of flow_a
    owner = edge_flow[order]
    if (owner[1:] == owner[:-1]).any():
        order = np.lexsort((edges.first_ns, edge_flow))
    low = np.searchsorted(owner, flow, "left")
    high = np.searchsorted(owner, flow, "right")
    result = np.full(flow.size, -1, np.int64)
    single = high - low == 1
    result[single] = order[low[single]]
    several = np.flatnonzero(high - low > 1)
    if several.size:
        first, last = edges.first_ns[order], edges.last_ns[order]
        t = time_ns[several]
        covering = np.zeros(several.size, np.int64)
        choice = np.full(several.size, -1, np.int64)
        ends = last[low[several]]
        for step in range(int((high - low).max())):
            slot = low[several] + step
            valid = slot < high[several]
            slot = np.minimum(slot, order.size - 1)
            inside = valid & (first[slot] <= t) & (t <= last[slot])
            covering += inside
            choice = np.where(inside, order[slot], choice)
            # edges of a flow are in order of their first packet; their last packets need not be
            ends = np.where(valid, np.maximum(ends, last[slot]), ends)
        result[several] = np.where(covering == 1, choice, -1)
        early, late = t < first[low[several]], t > ends
        result[several[early]] = order[low[several[early]]]
        result[several[late]] = order[high[several[late]] - 1]
    return result


def _usual_delta(edges: Edges, edge: NDArray[np.int64], backward: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the mean delta of each packet's edge and direction, 0 where it has no samples."""
    count = np.where(backward, edges.backward[edge], edges.forward[edge])
    total = np.where(backward, edges.delta_backward[edge], edges.delta_forward[edge])
    return np.where(count > 0, total // np.maximum(count, 1), 0)


def _without_ids(rows: Rows, others: Rows) -> bool:
    """Say whether one side has no IP identification at all: printed captures, IPv6."""
    return not rows.table.ip_id.any() or not others.table.ip_id.any()


def _tie_keys(rows: Rows, others: Rows, end: str) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return keys of both sides that are equal where two packets could be one, with `end` untouched."""
    without_ids = _without_ids(rows, others)

    def keys(r: Rows) -> NDArray[np.uint64]:
        by = np.where((r.table.ip_id != 0) & (not without_ids), r.exact, r.content)
        return mix(by ^ (getattr(r.table, end).astype(np.uint64) + np.uint64(1)) * M1)

    return keys(rows), keys(others)


def _tied(rows: Rows, others: Rows) -> NDArray[np.uint8]:
    """Return TIED for rows that still have a believable candidate among `others`, else ABSENT."""
    tied = np.full(len(rows), ABSENT, np.uint8)
    if len(rows) and len(others):
        for end in ("src", "dst"):
            group, their_group = group_ids(*_tie_keys(rows, others, end))
            apart = nearest_distance(group, rows.table.time_ns, their_group, others.table.time_ns)
            tied[apart <= _TIE_WINDOW_NS] = TIED
    return tied


def _candidates(rows: Rows, others: Rows) -> NDArray[np.uint32]:
    """Return the frames of the first CANDIDATES packets that each row could be; shape (rows, CANDIDATES).

    0 fills the places of rows that have fewer.
    """
    frames = np.zeros((len(rows), CANDIDATES), np.uint32)
    if not len(rows) or not len(others):
        return frames
    for end in ("dst", "src"):
        own, their = _tie_keys(rows, others, end)
        order = np.argsort(their, kind="stable")
        low, high = (np.searchsorted(their, own, side, sorter=order) for side in ("left", "right"))
        empty = frames[:, 0] == 0
        for place in range(CANDIDATES):
            there = empty & (low + place < high)
            frames[there, place] = others.table.frame[order[(low + place)[there]]]
    return frames

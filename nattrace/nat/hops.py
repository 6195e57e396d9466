"""What became of the packets between two neighbouring points: matched, lost, unknowable, ambiguous; how fast.

A packet counts as lost only where the next point was provably capturing before and after it; everything
else is unknowable. A packet that could be several of the other point's packets is ambiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.lanes import edge_of
from nattrace.match.outcome import ANSWERED, ILLEGIBLE, TIED
from nattrace.match.resize.pieces import Resized
from nattrace.nat.resized import resized

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.outcome import Unmatched
    from nattrace.nat.icmp_answered import IcmpAnswers
    from nattrace.nat.lifetimes import Division
    from nattrace.nat.paths import Hops

#: Codes of `HopCounts.reasons`: why a packet has no crossing; where several pairs speak, the highest holds.
ONE_SIDED, NOT_SEEN_UPSTREAM, UNKNOWABLE, LOST, RESIZED, AMBIGUOUS, PROXIED, ICMP_ANSWERED = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
)
REASON_NAMES = {
    ONE_SIDED: "one-sided",
    NOT_SEEN_UPSTREAM: "not-seen-upstream",
    UNKNOWABLE: "unknowable",
    LOST: "lost",
    RESIZED: "resized",
    AMBIGUOUS: "ambiguous",
    PROXIED: "proxied",  # made, or answered, by a box between the points: SYNPROXY's handshakes
    ICMP_ANSWERED: "icmp-answered",  # an ICMP error says what became of it, see `icmp_answered`
}


#: A latency takes 36 bits of a packed value: REACH_NS is below 2**35 on either side of zero.
_LATENCY_BITS = np.uint64(36)
_LATENCY_HALF = np.int64(2**35)


@dataclass(slots=True)
class Coverage:
    """When each point was provably capturing: between its first and its last packet, without kernel drops."""

    first_ns: NDArray[np.int64]  #: one for each point; a point without packets has first > last
    last_ns: NDArray[np.int64]
    complete: NDArray[np.bool_]  #: False: the kernel dropped packets, so a missing packet proves nothing
    #: for each point the first layer of the same capture; empty where every point is its own
    home: Sequence[int] = ()
    #: by point: merged flows that need not show all of their packets there: of which others are at another layer of
    #: the point (see `match.sightings`), or of which it shows nothing but the errors about them
    parted: Sequence[NDArray[np.int64]] = ()
    cut_off: bool = False  #: a snaplen left less of some packets than of others of another IP version

    def sure(self, point: int, time_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say for each instant whether the point was capturing before and after it."""
        inside: NDArray[np.bool_] = (time_ns > self.first_ns[point]) & (time_ns < self.last_ns[point])
        return inside & bool(self.complete[point])

    def placed(self, point: int) -> bool:
        """Say whether it is known when the point's packets were seen."""
        return bool(self.first_ns[point] <= self.last_ns[point])

    def unparted(self, hops: Hops) -> NDArray[np.bool_]:
        """Say of which hops both flows have all their packets where the hop looks for them.

        Never so between two layers of one capture: nobody knows what interfaces it was made from, and a packet
        that passed a second one unchanged is told as a duplicate.
        """
        whole = np.ones(len(hops), np.bool_)
        if len(self.home):
            home = np.asarray(self.home)
            whole = home[hops.from_point] != home[hops.to_point]
        for point, flows in enumerate(self.parted):
            if flows.size:
                whole &= ~((hops.from_point == point) & np.isin(hops.from_flow, flows))
                whole &= ~((hops.to_point == point) & np.isin(hops.to_flow, flows))
        return whole


@dataclass(slots=True)
class PairEvidence:
    """What matching found between two points, with all flow and edge numbers merged."""

    edges: Edges
    sample_lane: Sequence[NDArray[np.int32]]  #: in parts: twice the edge index, plus one for backward packets
    sample_delta: Sequence[NDArray[np.int64]]  #: in the same parts
    sample_time: Sequence[NDArray[np.int64]]  #: in the same parts, at the first point; empty with two points
    unmatched: tuple[Unmatched, Unmatched]  #: first point's, second point's; merged flow numbers
    margin_ns: int  #: how much later the other point may see a packet
    clock_bound_ns: int | None = 0  #: by how much the points' clocks may still differ; None: unknown
    resized: Resized = field(default_factory=lambda: Resized.concatenate([]))  #: of packets matched in pieces


@dataclass(slots=True)
class HopCounts:
    """Per hop and direction (column 0 original, 1 reply); latencies in ns, oriented along the direction."""

    matched: NDArray[np.int64]
    lost: NDArray[np.int64]
    unknowable: NDArray[np.int64]
    ambiguous: NDArray[np.int64]
    #: (hops, 2, 2): unmatched packets at the hop's from (0) or to (1) point that the hop did not carry,
    #: by direction: seen downstream but not upstream
    unseen: NDArray[np.int64]
    latency: NDArray[np.int64]  #: (hops, 2, 4): min, median, p99, max
    measurable: NDArray[np.bool_]  #: (hops, 2)
    #: point to (packet numbers, reasons)
    reasons: dict[int, list[tuple[NDArray[np.int64], NDArray[np.uint8]]]] = field(default_factory=dict)
    #: point to merged flows that have a tied packet
    tied_flows: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    #: (hops, 2, 4): packets matched in pieces, before and after the hop, bytes of them that crossed and bytes
    #: that are missing after it; None where nothing changed size anywhere
    segments: NDArray[np.int64] | None = None

    @property
    def missing(self) -> NDArray[np.int64]:
        """Packets sent into the hop that have no match, whatever the reason; shape (hops, 2)."""
        return self.lost + self.unknowable + self.ambiguous


@dataclass(slots=True)
class Onward:
    """What was seen further along: a packet that passed a point unseen was missed there, not lost."""

    hops: Hops  #: all directed edges, those that skip a point included
    found_at: Mapping[
        tuple[int, int], NDArray[np.bool_]
    ]  #: (point, other): packet numbers matched between them

    def seen(
        self,
        point: int,
        but: int,
        number: NDArray[np.int64],
        flow: NDArray[np.int64],
        reply: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Say which packets sent from `point` were matched at a point further along other than `but`."""
        result = np.zeros(number.size, np.bool_)
        for (here, other), found in self.found_at.items():
            if here != point or other == but:
                continue
            there = np.flatnonzero(found[number])
            away = (self.hops.from_point == point) & (self.hops.to_point == other)
            back = (self.hops.to_point == point) & (self.hops.from_point == other)
            further = np.where(
                reply[there],
                np.isin(flow[there], self.hops.to_flow[back]),
                np.isin(flow[there], self.hops.from_flow[away]),
            )
            result[there] |= further
        return result


def count_hops(
    hops: Hops,
    pairs: Mapping[tuple[int, int], PairEvidence],
    coverage: Coverage,
    onward: Onward,
    division: Division | None = None,
    other_version: NDArray[np.bool_] | None = None,
    answers: IcmpAnswers | None = None,
) -> HopCounts:
    """Count the packets of every hop and measure its latencies.

    `other_version` tells hops that change the IP version: longer headers leave less of a packet that was cut off,
    so what has no equal beyond them need not be lost. `answers` tells packets that ICMP errors answered.
    """
    size = len(hops)
    counts = HopCounts(
        matched=np.zeros((size, 2), np.int64), lost=np.zeros((size, 2), np.int64),
        unknowable=np.zeros((size, 2), np.int64), ambiguous=np.zeros((size, 2), np.int64),
        unseen=np.zeros((size, 2, 2), np.int64), latency=np.zeros((size, 2, 4), np.int64),
        measurable=np.zeros((size, 2), np.bool_),
    )  # fmt: skip
    unparted = coverage.unparted(hops)
    if other_version is not None and coverage.cut_off:
        unparted &= ~other_version
    for number, (i, j) in enumerate(sorted(pairs)):
        pair = pairs[i, j]
        mine = np.flatnonzero(hops.pair == number)
        hop_of_edge = np.full(len(pair.edges), -1, np.int64)
        hop_of_edge[hops.edge[mine[::-1]]] = mine[::-1]  # a divided hop stands before its pieces
        _matched(counts, hops, mine, pair.edges)
        _in_pieces(counts, hops, hop_of_edge, pair.resized)
        _latencies(counts, hops, hop_of_edge, pair, division.pieces.get(number) if division else None)
        first, second = pair.unmatched
        places = [_place(hops, hop_of_edge, pair.edges, pair.unmatched[side], side) for side in (0, 1)]
        lanes = [place.lane() for place in places]
        for side, (own, other, point, far) in enumerate(((first, second, i, j), (second, first, j, i))):
            if own.flow.size:
                changed_size = resized(own, lanes[side], other, lanes[1 - side])
                # nobody knows which of a flow's packets one is that is cut off before its number
                unread = lanes[1 - side][other.reason == ILLEGIBLE]
                legible = (own.reason != ILLEGIBLE) & ~np.isin(lanes[side], unread)
                place = places[side]
                if division is not None:
                    place.hop = division.piece(place.hop, place.reply, own.time_ns, place.at_to)
                told = None
                if answers is not None:
                    told = answers.answered(point, own), answers.maybe_answered(point, own)
                _missing(
                    counts,
                    pair,
                    own,
                    place,
                    changed_size,
                    legible,
                    point,
                    far,
                    coverage,
                    onward,
                    unparted,
                    told,
                )
    if division is not None:
        counts.matched[division.of_pieces] = division.matched[division.of_pieces]
    return counts


def _matched(counts: HopCounts, hops: Hops, mine: NDArray[np.int64], edges: Edges) -> None:
    """Count matched packets by direction."""
    edge = hops.edge[mine]
    forward_a = hops.forward[mine] ^ (hops.reverse[mine] & hops.swap[mine])
    counts.matched[mine, 0] = np.where(forward_a, edges.forward[edge], edges.backward[edge])
    counts.matched[mine, 1] = np.where(forward_a, edges.backward[edge], edges.forward[edge])


def _in_pieces(counts: HopCounts, hops: Hops, hop_of_edge: NDArray[np.int64], resized: Resized) -> None:
    """Count packets matched in pieces once each, at the sending point, and what became of their bytes."""
    hop = hop_of_edge[resized.lane >> 1]
    rows = np.flatnonzero(hop >= 0)
    if not rows.size:
        return
    hop = hop[rows]
    reply, sent_by_a = hops.way(hop, (resized.lane[rows] & 1) != 0)
    if counts.segments is None:
        counts.segments = np.zeros((len(hops), 2, 4), np.int64)
    of_a, of_b = resized.frames_a[rows], resized.frames_b[rows]
    before, after = np.where(sent_by_a, of_a, of_b), np.where(sent_by_a, of_b, of_a)
    sent = np.where(sent_by_a, resized.bytes_a[rows], resized.bytes_b[rows])
    place = (hop, reply.astype(np.int64))
    np.add.at(counts.matched, place, before - resized.pairs[rows])
    figures = (before, after, resized.bytes[rows], sent - resized.bytes[rows])
    np.add.at(counts.segments, place, np.stack(figures, axis=1))


def with_sent_samples(pair: PairEvidence, number: int, hops: Hops) -> PairEvidence:
    """Return the evidence of pair number `number` with one latency sample more for each packet sent in pieces.

    Which of the two sides sent it is known once the hops have their directions.
    """
    resized = pair.resized
    if not resized.lane.size:
        return pair
    hop_of_edge = np.full(len(pair.edges), -1, np.int64)
    mine = np.flatnonzero(hops.pair == number)
    hop_of_edge[hops.edge[mine]] = mine
    lanes, deltas, times = list(pair.sample_lane), list(pair.sample_delta), list(pair.sample_time)
    for first, lane, delta, time in (
        (True, resized.sample_lane_a, resized.sample_delta_a, resized.sample_time_a),
        (False, resized.sample_lane_b, resized.sample_delta_b, resized.sample_time_b),
    ):
        hop = hop_of_edge[lane >> 1]
        chosen = np.flatnonzero(hop >= 0)
        chosen = chosen[hops.way(hop[chosen], (lane[chosen] & 1) != 0)[1] == first]
        lanes.append(lane[chosen].astype(np.int32))
        deltas.append(delta[chosen])
        times.append(time[chosen])
    return replace(pair, sample_lane=lanes, sample_delta=deltas, sample_time=times)


def _latencies(
    counts: HopCounts,
    hops: Hops,
    hop_of_edge: NDArray[np.int64],
    pair: PairEvidence,
    pieces: NDArray[np.int64] | None,
) -> None:
    """Order the latency samples of every hop and direction with one sort of packed values.

    `pieces` says for each sample which piece of a divided hop it belongs to, -1 for none.
    """
    total = sum(lanes.size for lanes in pair.sample_lane)
    if not total or not len(hops):
        return
    # what a lane means is worked out once for every edge and direction, not for every sample
    hop = hop_of_edge.repeat(2)
    backward = np.tile(np.array([False, True]), hop_of_edge.size)
    place = np.maximum(hop, 0)
    forward_a = hops.forward[place] ^ (hops.reverse[place] & hops.swap[place])
    reply = backward == forward_a
    # original runs from a to b unless the hop is reverse; replies run the other way
    sign = np.where(reply == hops.reverse[place], np.int8(1), np.int8(-1))
    code = np.where(hop >= 0, (hop << 1) | reply, 0).astype(np.uint64) << _LATENCY_BITS
    skipped = hop < 0
    packed = np.empty(total, np.uint64)
    size = start = 0
    for lanes, delta in zip(pair.sample_lane, pair.sample_delta, strict=True):
        signed = delta * sign[lanes]
        np.clip(signed, -_LATENCY_HALF, _LATENCY_HALF - 1, out=signed)
        signed += _LATENCY_HALF
        values = signed.view(np.uint64)
        values |= code[lanes] if pieces is None else _codes(code[lanes], pieces[start : start + lanes.size])
        start += lanes.size
        if skipped.any():
            values = values[~skipped[lanes]]
        packed[size : size + values.size] = values
        size += values.size
    packed = packed[:size]
    if not size:
        return
    packed.sort()
    first = np.flatnonzero((packed[1:] ^ packed[:-1]) >> _LATENCY_BITS) + 1
    starts = np.concatenate([[0], first])
    sizes = np.diff(np.append(starts, size))
    lanes_found = (packed[starts] >> _LATENCY_BITS).astype(np.int64)
    ranks = (np.zeros(sizes.size, np.int64), (sizes - 1) // 2, -(-sizes * 99 // 100) - 1, sizes - 1)
    low_bits = np.uint64((1 << int(_LATENCY_BITS)) - 1)
    values_at = [(packed[starts + rank] & low_bits).astype(np.int64) - _LATENCY_HALF for rank in ranks]
    for column, values_of_rank in enumerate(values_at):
        counts.latency[lanes_found >> 1, lanes_found & 1, column] = values_of_rank
    # taps that share one timestamp measure nothing; a negative latency means two clocks
    bound_ns = pair.clock_bound_ns
    if bound_ns is None:
        return
    # two clocks are known to within a bound: what is smaller than that was not measured
    measured = (values_at[0] >= -bound_ns) & (values_at[1] >= bound_ns) & (values_at[-1] > 0)
    counts.measurable[lanes_found >> 1, lanes_found & 1] = measured


def _codes(code: NDArray[np.uint64], piece: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the codes of samples of which some belong to a piece of their hop."""
    moved = (piece.astype(np.uint64) << np.uint64(1) << _LATENCY_BITS) | (
        code & (np.uint64(1) << _LATENCY_BITS)
    )
    return np.where(piece >= 0, moved, code)


@dataclass(slots=True)
class _Placed:
    """Where the unmatched packets of one side belong.

    `hop` is -1 for none; `sending` tells packets sent into the hop at this point from those that should have
    arrived from it.
    """

    hop: NDArray[np.int64]
    reply: NDArray[np.bool_]
    sending: NDArray[np.bool_]
    at_to: NDArray[np.bool_]
    unsure: NDArray[np.bool_]  #: the flow has several bindings, and no saying which of them the packet used

    def lane(self) -> NDArray[np.int64]:
        """Return one number for each hop and direction; -1 where there is none."""
        return np.where(self.hop >= 0, self.hop * 2 + self.reply, -1)


def _place(hops: Hops, hop_of_edge: NDArray[np.int64], edges: Edges, record: Unmatched, side: int) -> _Placed:
    edge_flow = edges.flow_a if side == 0 else edges.flow_b
    edge = edge_of(record.flow, record.time_ns, side, edges)
    hop = np.where(edge >= 0, hop_of_edge[np.maximum(edge, 0)], -1) if len(edges) else edge
    if not len(hops):
        nowhere = np.zeros(hop.size, np.bool_)
        return _Placed(hop, nowhere, nowhere, nowhere, nowhere)
    h = np.maximum(hop, 0)
    reverse, swap = hops.reverse[h], hops.swap[h]
    forward = hops.forward[h] ^ (swap & (reverse if side == 0 else ~reverse))
    reply = record.backward == forward
    at_to = reverse if side == 0 else ~reverse
    unsure = (edge < 0) & np.isin(record.flow, edge_flow)
    return _Placed(hop, reply, reply == at_to, at_to, unsure)


def _missing(
    counts: HopCounts,
    pair: PairEvidence,
    record: Unmatched,
    place: _Placed,
    changed_size: NDArray[np.bool_],
    legible: NDArray[np.bool_],
    point: int,
    other: int,
    coverage: Coverage,
    onward: Onward,
    unparted: NDArray[np.bool_],
    told: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None,
) -> None:
    """Say why the unmatched packets of one side have no match, and count them where they belong.

    `told` are those that an ICMP error answered, and those that one may have answered.
    """
    tied = (record.reason == TIED) | place.unsure
    reason = np.where(tied, AMBIGUOUS, ONE_SIDED).astype(np.uint8)
    reason[record.reason == ANSWERED] = PROXIED
    if told is not None:
        reason[told[0] & ~tied] = ICMP_ANSWERED
    rows = np.flatnonzero(place.hop >= 0)
    if rows.size:
        time = record.time_ns[rows]
        covered = coverage.sure(other, time) & coverage.sure(other, time + pair.margin_ns)
        covered &= unparted[place.hop[rows]] & coverage.placed(point) & legible[rows]
        sending = place.sending[rows]
        covered &= ~onward.seen(point, other, record.number[rows], record.flow[rows], place.reply[rows])
        verdict = np.where(covered, LOST, UNKNOWABLE)
        if told is not None:
            verdict[told[1][rows]] = UNKNOWABLE
            verdict[told[0][rows]] = ICMP_ANSWERED
        verdict = np.where(sending, verdict, NOT_SEEN_UPSTREAM)
        verdict = np.where(changed_size[rows], RESIZED, verdict)
        verdict = np.where(record.reason[rows] == ANSWERED, PROXIED, verdict)
        verdict = np.where(tied[rows], AMBIGUOUS, verdict)
        reason[rows] = verdict
        hop, direction = place.hop[rows], place.reply[rows].astype(np.int64)
        for code, column in (
            (LOST, counts.lost),
            (UNKNOWABLE, counts.unknowable),
            (RESIZED, counts.unknowable),
            (PROXIED, counts.unknowable),
            (ICMP_ANSWERED, counts.unknowable),
            (AMBIGUOUS, counts.ambiguous),
        ):
            chosen = (verdict == code) & sending
            np.add.at(column, (hop[chosen], direction[chosen]), 1)
        idle = ~sending
        np.add.at(counts.unseen, (hop[idle], place.at_to[rows][idle].astype(np.int64), direction[idle]), 1)
    counts.reasons.setdefault(point, []).append((record.number, reason))
    if tied.any():
        known = counts.tied_flows.get(point, np.empty(0, np.int64))
        counts.tied_flows[point] = np.union1d(known, record.flow[tied])

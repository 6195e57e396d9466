"""Lifetimes: a hop that several conversations share is divided among them, packet by packet.

A binding renewed at the second of two hops makes two conversations of what is one flow at the first, and a
point that shows the two directions under different tuples makes two of what is one flow before it. Either
way a packet of the shared hop belongs to the conversation whose other hops it crossed: the record at the
point between two hops is the same, and so is its time. A packet that crossed no other hop belongs to the
conversation that was nearest in time. Counts, latencies and lifetimes follow.

This module works only where hops are shared, which takes three points; it decides no match.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import M1, mix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.nat.hops import PairEvidence
    from nattrace.nat.paths import Hops

#: Stands for the time of a packet that was matched before there was a third point.
UNTIMED_NS = -(2**62)


@dataclass(slots=True)
class _Runs:
    """Stretches of time in which one direction of a divided hop belonged to one piece, by (lane, time)."""

    lane: NDArray[np.int64]  #: twice the divided hop, plus one for replies
    start_ns: NDArray[np.int64]
    stop_ns: NDArray[np.int64]
    piece: NDArray[np.int64]

    @classmethod
    def of(cls, lane: NDArray[np.int64], time_ns: NDArray[np.int64], piece: NDArray[np.int64]) -> _Runs:
        """Join neighbouring packets of one piece."""
        order = np.lexsort((piece, time_ns, lane))
        lane, time_ns, piece = lane[order], time_ns[order], piece[order]
        new = np.ones(lane.size, np.bool_)
        new[1:] = (lane[1:] != lane[:-1]) | (piece[1:] != piece[:-1])
        start = np.flatnonzero(new)
        stop = np.append(start[1:], lane.size)[: start.size] - 1
        return cls(lane[start], time_ns[start], time_ns[stop], piece[start])

    def at(self, lane: NDArray[np.int64], time_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the piece nearest in time, of the lane or else of its other direction; -1 where there is none."""
        result = np.full(lane.size, -1, np.int64)
        order = np.argsort(lane, kind="stable")
        starts = np.flatnonzero(np.diff(lane[order], prepend=-1))
        stops = np.append(starts[1:], lane.size)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=False):
            rows = order[start:stop]
            each = int(lane[rows[0]])
            for own in (each, each ^ 1):
                low, high = np.searchsorted(self.lane, [own, own + 1])
                if low == high:
                    continue
                time = time_ns[rows]
                after = low + np.searchsorted(self.start_ns[low:high], time, "right")
                before = np.maximum(after - 1, low)
                after = np.minimum(after, high - 1)
                since = np.maximum(time - self.stop_ns[before], 0)
                result[rows] = np.where(
                    since <= np.abs(self.start_ns[after] - time), self.piece[before], self.piece[after]
                )
                break
        return result


@dataclass(slots=True)
class Division:
    """Which piece of a divided hop a packet belongs to. Pieces are rows of the hops like others."""

    divided: NDArray[np.bool_]  #: per hop
    from_runs: _Runs
    to_runs: _Runs
    #: by number of the pair: per latency sample, in the order of the pair's parts, its piece; -1 for none
    pieces: dict[int, NDArray[np.int64]]
    matched: NDArray[np.int64]  #: shape (hops, 2), of divided hops and their pieces only
    of_pieces: NDArray[np.bool_]  #: which hops `matched` speaks of

    def piece(
        self,
        hop: NDArray[np.int64],
        reply: NDArray[np.bool_],
        time_ns: NDArray[np.int64],
        at_to: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Return the piece for each packet of a hop seen at this time at the hop's from_point, or its to_point."""
        result = hop.copy()
        for runs, there in ((self.from_runs, ~at_to), (self.to_runs, at_to)):
            rows = np.flatnonzero((hop >= 0) & self.divided[np.maximum(hop, 0)] & there)
            if rows.size:
                found = runs.at(hop[rows] * 2 + reply[rows], time_ns[rows])
                result[rows] = np.where(found >= 0, found, hop[rows])
        return result


@dataclass(slots=True)
class _Samples:
    """Matched packets of the hops in question, one row each."""

    hop: NDArray[np.int64]
    reply: NDArray[np.bool_]
    from_ns: NDArray[np.int64]
    to_ns: NDArray[np.int64]
    pair: NDArray[np.int64]
    place: NDArray[np.int64]  #: among the pair's samples


def divide(
    hops: Hops,
    paths: list[NDArray[np.int64]],
    pairs: Sequence[PairEvidence],
    nodes: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> tuple[Hops, list[NDArray[np.int64]], Division | None]:
    """Divide the hops that several paths share.

    `paths` are those of `follow`, `pairs` the evidence by the hops' pair numbers, `nodes` one number for each
    hop's flow at its from_point and at its to_point. Returns the hops with their pieces (a divided hop is
    its own first piece), the paths over them without those that no packet took, and who got what; None
    where nothing is shared.
    """
    uses = np.bincount(np.concatenate([block.reshape(-1) for block in paths] or [np.empty(0, np.int64)]),
                       minlength=len(hops))  # fmt: skip
    if uses.max(initial=0) <= 1:
        return hops, paths, None
    shared = uses > 1
    sharing = [shared[block].any(axis=1) for block in paths]
    unchanged = [block[~own] for block, own in zip(paths, sharing, strict=True)]
    routes = [row for block, own in zip(paths, sharing, strict=True) for row in block[own].tolist()]
    involved = np.zeros(len(hops), np.bool_)
    paths_of: dict[int, set[int]] = {}
    for n, route in enumerate(routes):
        involved[route] = True
        for hop in route:
            paths_of.setdefault(hop, set()).add(n)
    samples = _collect(hops, involved, pairs)
    owner = _owners(samples, nodes, paths_of, max(map(len, routes)))
    owner = _nearest(samples, owner, paths_of)

    taken = np.unique(samples.hop * np.int64(len(routes)) + owner)
    carried = {divmod(code, len(routes)) for code in taken.tolist()}
    pieces: dict[tuple[int, int], int] = {}  #: (hop, path) to hop
    extra: list[int] = []
    given: set[int] = set()
    kept: dict[int, list[list[int]]] = {}
    for n, route in enumerate(routes):
        # a path begins where one of its packets was first seen, and ends where one was last seen
        own = [place for place, hop in enumerate(route) if not shared[hop] or (hop, n) in carried]
        if not own:
            continue
        row = route[own[0] : own[-1] + 1]
        for place, hop in enumerate(row):
            if shared[hop]:
                if hop in given:
                    row[place] = len(hops) + len(extra)
                    extra.append(hop)
                given.add(hop)
                pieces[hop, n] = row[place]
        kept.setdefault(len(row), []).append(row)
    rows = np.concatenate([np.arange(len(hops)), np.array(extra, np.int64)])
    wider = type(hops)(**{name: getattr(hops, name)[rows] for name in hops.__dataclass_fields__})
    blocks = unchanged + [np.array(of_length, np.int64) for _, of_length in sorted(kept.items())]
    return (
        wider,
        [block for block in blocks if block.size],
        _division(wider, samples, owner, shared, pieces, pairs),
    )


def _collect(hops: Hops, involved: NDArray[np.bool_], pairs: Sequence[PairEvidence]) -> _Samples:
    """Gather the matched packets of the hops in question."""
    columns: list[tuple[NDArray[np.int64], ...]] = []
    for number, pair in enumerate(pairs):
        mine = np.flatnonzero((hops.pair == number) & involved)
        if not mine.size:
            continue
        hop_of_edge = np.full(len(pair.edges), -1, np.int64)
        hop_of_edge[hops.edge[mine]] = mine
        lane = np.concatenate([lanes.astype(np.int64) for lanes in pair.sample_lane])
        delta = np.concatenate(pair.sample_delta)
        time = np.concatenate(
            [
                times if times.size else np.full(lanes.size, UNTIMED_NS)
                for times, lanes in zip(pair.sample_time, pair.sample_lane, strict=True)
            ]
        )
        hop = hop_of_edge[lane >> 1]
        place = np.flatnonzero(hop >= 0)
        hop, lane, time, delta = hop[place], lane[place], time[place], delta[place]
        reverse, swap = hops.reverse[hop], hops.swap[hop]
        reply = ((lane & 1) == 1) == (hops.forward[hop] ^ (reverse & swap))
        time_b = np.where(time == UNTIMED_NS, UNTIMED_NS, time + delta)
        columns.append(
            (
                hop,
                reply.astype(np.int64),
                np.where(reverse, time_b, time),
                np.where(reverse, time, time_b),
                np.full(hop.size, number),
                place,
            )
        )
    none = np.empty(0, np.int64)
    hop, reply, start, stop, pair_number, place = (
        (np.concatenate(column) for column in zip(*columns, strict=True)) if columns else (none,) * 6
    )
    return _Samples(hop, reply.astype(np.bool_), start, stop, pair_number, place)


def _owners(
    s: _Samples, nodes: tuple[NDArray[np.int64], NDArray[np.int64]], paths_of: dict[int, set[int]], depth: int
) -> NDArray[np.int64]:
    """Return for each packet the one path that has all hops it crossed; -1 where several or none have."""
    before, after = _links(s, nodes)
    left, right = s.hop.copy(), s.hop.copy()
    for _ in range(depth - 1):
        left, right = _class(s.hop, left, before), _class(s.hop, right, after)
    _, example, kind = np.unique(np.stack([left, right]), axis=1, return_index=True, return_inverse=True)
    owner_of_kind = np.full(example.size, -1, np.int64)
    for n, start in enumerate(example.tolist()):
        crossed = {int(s.hop[start])}
        for link in (before, after):
            at = int(link[start])
            for _ in range(depth):
                if at < 0:
                    break
                crossed.add(int(s.hop[at]))
                at = int(link[at])
        candidates = set.intersection(*sorted((paths_of[hop] for hop in crossed), key=len))
        if len(candidates) == 1:
            owner_of_kind[n] = candidates.pop()
    return owner_of_kind[kind.reshape(-1)]


def _links(
    s: _Samples, nodes: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each packet's crossing before and after this one (in the hops' order), -1 for none.

    Two crossings are of one packet where the flow between them, its direction and the time there are equal.
    """
    before, after = np.full(s.hop.size, -1, np.int64), np.full(s.hop.size, -1, np.int64)

    def keys(node: NDArray[np.int64], time_ns: NDArray[np.int64]) -> NDArray[np.uint64]:
        lane = (node[s.hop] * 2 + s.reply).astype(np.uint64)
        return mix(mix(time_ns.view(np.uint64) * M1) ^ lane)

    timed = np.flatnonzero(s.from_ns != UNTIMED_NS)
    if timed.size:
        leaving, arriving = keys(nodes[0], s.from_ns), keys(nodes[1], s.to_ns)
        order = timed[np.argsort(leaving[timed], kind="stable")]
        place = np.minimum(np.searchsorted(leaving[order], arriving), order.size - 1)
        onward = order[place]
        found = np.flatnonzero((leaving[onward] == arriving) & (s.to_ns != UNTIMED_NS))
        after[found] = onward[found]
        before[onward[found]] = found
    return before, after


def _class(hop: NDArray[np.int64], of_link: NDArray[np.int64], link: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return numbers for the packets, by their hop and by the class of the crossing next to it."""
    beside = np.where(link >= 0, of_link[link] + 1, 0)
    _, number = np.unique(hop * (int(beside.max(initial=0)) + 1) + beside, return_inverse=True)
    return number.reshape(-1).astype(np.int64)


def _nearest(s: _Samples, owner: NDArray[np.int64], paths_of: dict[int, set[int]]) -> NDArray[np.int64]:
    """Give the packets that crossed nothing else to the path in use nearest in time on their hop."""
    lane = s.hop * 2 + s.reply
    known, open_ = owner >= 0, np.flatnonzero(owner < 0)
    if open_.size:
        owner = owner.copy()
        owner[open_] = _Runs.of(lane[known], s.from_ns[known], owner[known]).at(lane[open_], s.from_ns[open_])
        left = open_[owner[open_] < 0]
        lowest = {hop: min(paths) for hop, paths in paths_of.items()}
        owner[left] = [lowest[hop] for hop in s.hop[left].tolist()]
    return owner


def _division(
    wider: Hops,
    s: _Samples,
    owner: NDArray[np.int64],
    shared: NDArray[np.bool_],
    pieces: dict[tuple[int, int], int],
    pairs: Sequence[PairEvidence],
) -> Division:
    """Give every packet its piece, and every piece its counts and its life."""
    size = len(wider)
    rows = np.flatnonzero(shared[s.hop])
    s = replace(s, **{name: getattr(s, name)[rows] for name in s.__dataclass_fields__})
    both = list(zip(s.hop.tolist(), owner[rows].tolist(), strict=True))
    piece = np.array([pieces[each] for each in both], np.int64)
    matched = np.zeros((size, 2), np.int64)
    np.add.at(matched, (piece, s.reply.astype(np.int64)), 1)
    of_pieces = np.zeros(size, np.bool_)
    of_pieces[list(pieces.values())] = True
    timed = s.from_ns != UNTIMED_NS
    for start, stop, times in (
        (wider.first_ns, wider.last_ns, s.from_ns),
        (wider.to_first_ns, wider.to_last_ns, s.to_ns),
    ):
        first, last = np.full(size, 2**62), np.full(size, -(2**62))
        np.minimum.at(first, piece[timed], times[timed])
        np.maximum.at(last, piece[timed], times[timed])
        # what came before there was a third point is the earliest of its hop
        early = np.unique(piece[~timed])
        first[early] = start[early]
        known = of_pieces & (first < 2**62)
        start[known] = first[known]
        stop[known] = np.maximum(last, first)[known]
    lane = s.hop * 2 + s.reply
    samples: dict[int, NDArray[np.int64]] = {}
    for number in np.unique(s.pair).tolist():
        mine = s.pair == number
        total = sum(lanes.size for lanes in pairs[number].sample_lane)
        samples[number] = np.full(total, -1, np.int64)
        samples[number][s.place[mine]] = piece[mine]
    divided = np.zeros(size, np.bool_)
    divided[: shared.size] = shared
    return Division(
        divided,
        _Runs.of(lane, s.from_ns, piece),
        _Runs.of(lane, s.to_ns, piece),
        samples,
        matched,
        of_pieces,
    )

"""Windows: matching any number of points over time with bounded memory.

Packets of all points are taken in together, in step with time. A window is matched when some point has
enough packets; what is older than the reach of the window leaves it, the rest is carried into the next.
`Matcher.add` and `Matcher.finish` are all a reader needs; nothing here touches files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.errors.icmp_errors import Errors
from nattrace.match.errors.silent import silent_flows
from nattrace.match.errors.unread import Unread
from nattrace.match.flows import Flows
from nattrace.match.pair import WAITING_LIMIT, PairState
from nattrace.match.rows import Window
from nattrace.match.unique import match_unique

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.table import AddressBook

#: Packets of one point that make a window: large enough that per-window work is small, small enough to
#: stay in cache (some 20 MB with its keys).
WINDOW_PACKETS = 131_072

#: Two sightings of one packet are never further apart than this. Queues of slow uplinks hold packets for
#: seconds (a full 1000-packet queue at 1 Mbit/s: 12 s); nothing forwards a packet after half a minute.
REACH_NS = 30_000_000_000

#: Partial edges of a pair of points that may pile up before they are merged: some 20 MB.
COMPACT_EDGES = 262_144

#: With more points than this, pairs without a common key are skipped instead of matched.
_FEW_POINTS = 3


@dataclass(slots=True)
class PointState:
    """One point while it is read."""

    capture: int  #: number of the capture that it is a part of
    window: Window = field(default_factory=Window)
    paired: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))  #: (points, rows)
    flows: Flows | None = None  #: by their numbers; known when all packets have been added
    flow_count: int = 0
    decoded: int = 0
    tried: int = 0  #: rows at the start of the window that were there when it was last matched
    errors: Errors = field(default_factory=Errors.empty)  #: kept apart: they are matched by `match_errors`
    unread: Unread = field(default_factory=Unread.none)  #: errors that cannot be matched
    silent: bool = False  #: some of `flows` have no packets, see `match.errors.silent`
    _found: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    _ordered: tuple[Flows, NDArray[np.int64]] | None = None

    @property
    def matched(self) -> NDArray[np.bool_]:
        """Which of the point's packets, by their numbers, were matched with any other point."""
        anywhere = np.zeros(self.decoded, np.bool_)
        for other in self._found:
            anywhere |= self.found_at(other)
        return anywhere

    def found_at(self, other: int) -> NDArray[np.bool_]:
        """Which of the point's packets, by their numbers, were matched with the other point; may be set."""
        found = self._found.get(other, np.zeros(0, np.bool_))
        if found.size < self.decoded:
            grown = np.zeros(self.decoded + self.decoded // 2, np.bool_)
            grown[: found.size] = found
            found = self._found[other] = grown
        return found[: self.decoded]

    def ordered_flows(self) -> tuple[Flows, NDArray[np.int64]]:
        """Return the flows in the order of their hashes, and the place of every flow number among them.

        While packets are still to come they are in the order of their numbers, and nothing is told of them.
        """
        if self.flows is None:
            return Flows.empty(), np.arange(self.flow_count)
        if self._ordered is None:
            order = np.argsort(self.flows.hash)
            place = np.empty(order.size, np.int64)
            place[order] = np.arange(order.size)
            self._ordered = self.flows.take(order), place
        return self._ordered

    def add_silent_flows(self) -> None:
        """Make flows of what errors quote and no packet shows, when all packets have been added."""
        known = Flows.empty() if self.flows is None else self.flows
        made = silent_flows(self.errors, known)
        if len(made):
            self.silent = True
            self.flows, self._ordered = Flows.concatenate([known, made]), None
            self.flow_count = len(self.flows)


@dataclass(slots=True)
class Matcher:
    """Matches the packets of points that are added as they are found (0, 1, 2, ...)."""

    book: AddressBook
    on_pair: Callable[[int, int, PairState], None] | None = None  #: told of every new pair of points
    on_lonely: Callable[[int, Rows], None] | None = None  #: given the packets of points without a second one
    #: told when partial edges get new numbers: by pair the new number of every old one
    on_compact: Callable[[dict[tuple[int, int], NDArray[np.int64]]], None] | None = None
    points: list[PointState] = field(default_factory=list)
    pairs: dict[tuple[int, int], PairState] = field(default_factory=dict)

    def add_point(self, capture: int) -> None:
        """Make room for one more point, of a capture; points are numbered in the order of this call."""
        self.points.append(PointState(capture))

    def add(self, point: int, rows: Rows) -> None:
        """Take in the next packets of a point, in the order of its file."""
        state = self.points[point]
        state.flow_count = max(state.flow_count, int(rows.flow.max()) + 1)
        state.window.append(rows)
        state.decoded += len(rows)

    def full(self) -> bool:
        """Say whether some point has enough packets for a window."""
        return any(len(s.window) >= WINDOW_PACKETS for s in self.points)

    def advance(self, horizon_ns: int | None) -> None:
        """Match what is there. All packets up to `horizon_ns` have been added; None means all packets."""
        rows = [state.window.rows() for state in self.points]
        for state in self.points:
            paired = np.zeros((len(self.points), len(state.window)), np.bool_)
            paired[: state.paired.shape[0], : state.paired.shape[1]] = state.paired
            state.paired = paired
        for i, j in self._worth_trying(rows):
            self._match(i, j, rows[i], rows[j])
        self._leave(horizon_ns, rows)
        if horizon_ns is not None:
            self._compact()

    def finish(self) -> None:
        """Match the last window and decide all that waited."""
        self.advance(None)
        self._add_silent_flows()
        for i, j in sorted(self.pairs):
            self._resolve(i, j)

    # ------------------------------------------------------------------------------------------------

    def _worth_trying(self, rows: Sequence[Rows]) -> list[tuple[int, int]]:
        """Return the pairs of points that may have packets in common."""
        present = [n for n, of_point in enumerate(rows) if len(of_point)]
        if len(present) <= _FEW_POINTS:
            return list(combinations(present, 2))
        keys = [np.unique(rows[n].content) for n in present]
        merged = np.concatenate(keys)
        owner = np.repeat(np.array(present), [k.size for k in keys])
        order = np.lexsort((owner, merged))
        merged, owner = merged[order], owner[order]
        found: set[tuple[int, int]] = set()
        # a key held by k points gives pairs at distance 1..k-1 in the sorted order
        for step in range(1, len(present)):
            same = merged[step:] == merged[:-step]
            if not same.any():
                break
            codes = np.unique(owner[:-step][same] * len(self.points) + owner[step:][same])
            found.update(divmod(int(code), len(self.points)) for code in codes)
        return sorted(found)

    def _pair(self, i: int, j: int) -> PairState:
        state = self.pairs.get((i, j))
        if state is None:
            one_capture = self.points[i].capture == self.points[j].capture
            state = self.pairs[i, j] = PairState(self.book, one_capture)
            if self.on_pair is not None:
                self.on_pair(i, j, state)
        return state

    def _match(self, i: int, j: int, rows_a: Rows, rows_b: Rows) -> None:
        a, b = self.points[i], self.points[j]
        pair = self._pair(i, j)
        pair.timed = len(self.points) > 2  # two points make one hop, which nothing can divide
        open_a, open_b = np.flatnonzero(~a.paired[j]), np.flatnonzero(~b.paired[i])
        fresh = min(int((of >= at.tried).sum()) for at, of in ((a, open_a), (b, open_b)))
        found = match_unique(rows_a, open_a, rows_b, open_b, REACH_NS, pair.usual, self.book, fresh)
        pair.commit(rows_a, rows_b, found)
        a.paired[j, found.a] = True
        b.paired[i, found.b] = True
        a.found_at(j)[rows_a.number[found.a]] = True
        b.found_at(i)[rows_b.number[found.b]] = True

    def _leave(self, horizon_ns: int | None, rows: Sequence[Rows]) -> None:
        """Let packets out of the window that have been matched, or that nothing to come can match."""
        limit = 2**62 if horizon_ns is None else self._limit(horizon_ns, rows)
        leaving = [of_point.table.time_ns < limit for of_point in rows]
        for (i, j), pair in self.pairs.items():
            open_a, open_b = ~self.points[i].paired[j], ~self.points[j].paired[i]
            pair.settle(0, rows[i], open_a & leaving[i], rows[j], open_b)
            pair.settle(1, rows[j], open_b & leaving[j], rows[i], open_a)
            if horizon_ns is not None and pair.waiting_rows() > WAITING_LIMIT:
                self._resolve(i, j)
        compared = {point for pair_of_points in self.pairs for point in pair_of_points}
        for n, state in enumerate(self.points):
            if n not in compared and self.on_lonely is not None:
                self.on_lonely(n, rows[n].take(np.flatnonzero(leaving[n])))
            stay = np.flatnonzero(~(leaving[n] | self._done(n, state)))
            state.window.keep(stay)
            state.tried = stay.size
            state.paired = state.paired[:, stay]

    def _done(self, point: int, state: PointState) -> NDArray[np.bool_]:
        """Return which packets were found at all other points: they are nobody's candidates any more."""
        others = np.delete(np.arange(len(self.points)), point)
        done: NDArray[np.bool_] = np.logical_and.reduce(state.paired[others], axis=0)
        return done if others.size else np.zeros(len(state.window), np.bool_)

    def _limit(self, horizon_ns: int, rows: Sequence[Rows]) -> int:
        """Return the time before which packets leave: a reach behind the horizon, or as memory allows."""
        limit = horizon_ns - REACH_NS
        keep = WINDOW_PACKETS // 3
        for n, (state, of_point) in enumerate(zip(self.points, rows, strict=True)):
            time = of_point.table.time_ns[~self._done(n, state)]
            ready = time[time <= horizon_ns]
            if ready.size > keep:
                limit = max(limit, int(np.partition(ready, ready.size - keep)[ready.size - keep]))
        return limit

    def _compact(self) -> None:
        """Merge edges that have piled up, so that memory follows their number and not that of packets."""
        compacted = {
            points: pair.compact() for points, pair in self.pairs.items() if pair.piled_up() > COMPACT_EDGES
        }
        if compacted and self.on_compact is not None:
            self.on_compact(compacted)

    def _resolve(self, i: int, j: int) -> None:
        a, b = self.points[i], self.points[j]
        (in_order_a, flows_a), (in_order_b, flows_b) = a.ordered_flows(), b.ordered_flows()
        errors = a.errors, b.errors
        numbers_a, numbers_b = self.pairs[i, j].resolve(flows_a, flows_b, errors, (in_order_a, in_order_b))
        a.found_at(j)[numbers_a] = True
        b.found_at(i)[numbers_b] = True
        if a.silent or b.silent:
            self.pairs[i, j].bind_silent(errors, (in_order_a, in_order_b), (flows_a, flows_b))

    def _add_silent_flows(self) -> None:
        """Give every point the flows of which it shows nothing but errors, where another point shows errors as well."""
        heard = [n for n, state in enumerate(self.points) if len(state.errors)]
        if len(heard) < 2:
            return
        for n in heard:
            self.points[n].add_silent_flows()
        for i, j in combinations(heard, 2):
            if self.points[i].silent or self.points[j].silent:
                self._pair(i, j)

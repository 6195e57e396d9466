"""Paths: which way a conversation's packets went, and through which points.

Every edge gets a direction (which point the opening side's packets pass first), edges that skip a point
are dropped, and what is left is followed from its first point to its last. Request-before-reply order in time
says it, and the TTL, which needs no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.nat.order import first_is_from
from nattrace.nat.orientation import SLACK_NS, originals_forward

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.flows import Flows


@dataclass(slots=True)
class Hops:
    """Directed edges: the original direction's packets go from `from_*` to `to_*`. One row each."""

    pair: NDArray[np.int64]  #: index of the pair of points
    edge: NDArray[np.int64]  #: index of the edge in its pair
    reverse: NDArray[np.bool_]  #: from the pair's second point to its first
    from_point: NDArray[np.int64]
    to_point: NDArray[np.int64]
    from_flow: NDArray[np.int64]  #: merged flow index at from_point
    to_flow: NDArray[np.int64]
    forward: NDArray[np.bool_]  #: at from_point the original direction is low to high
    swap: NDArray[np.bool_]
    first_ns: NDArray[np.int64]  #: of its matched packets, at from_point
    last_ns: NDArray[np.int64]
    to_first_ns: NDArray[np.int64]  #: the same at to_point
    to_last_ns: NDArray[np.int64]

    def __len__(self) -> int:
        """Hops."""
        return int(self.pair.size)

    def way(
        self, hop: NDArray[np.int64], backward: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return whether packets of the given hops are replies, and whether the pair's first point sent them.

        `backward` is their direction at the pair's first point.
        """
        forward_a = self.forward[hop] ^ (self.reverse[hop] & self.swap[hop])
        reply = backward == forward_a
        return reply, reply == self.reverse[hop]


def direct(
    pairs: Mapping[tuple[int, int], Edges],
    flows: Sequence[Flows],
    clock_bounds: Mapping[tuple[int, int], int | None],
    homes: Sequence[int] = (),
) -> Hops:
    """Give every edge its direction. Pairs are numbered in sorted order.

    `clock_bounds` says by how much the clocks of a pair of points may differ (ns; None: unknown); for `homes` see
    `order`.
    """
    numbered = [(number, key) for number, key in enumerate(sorted(pairs)) if len(pairs[key])]
    columns: list[tuple[NDArray[Any], ...]] = []
    with_edges = [(key, pairs[key]) for _, key in numbered]
    forwards = originals_forward(with_edges, flows)
    bounds = [clock_bounds[key] for key, _ in with_edges]
    firsts = first_is_from(with_edges, forwards, flows, bounds, homes)
    for (number, (i, j)), forward, first in zip(numbered, forwards, firsts, strict=True):
        edges = pairs[i, j]
        size = len(edges)
        at_a = (edges.flow_a, forward, edges.first_ns, edges.last_ns)
        at_b = (edges.flow_b, forward ^ edges.swap, edges.first_b_ns, edges.last_b_ns)
        start = [np.where(first, a, b) for a, b in zip(at_a, at_b, strict=True)]
        stop = [np.where(first, b, a) for a, b in zip(at_a, at_b, strict=True)]
        columns.append(
            (
                np.full(size, number),
                np.arange(size),
                ~first,
                np.where(first, i, j),
                np.where(first, j, i),
                start[0],
                stop[0],
                start[1],
                edges.swap,
                *start[2:],
                *stop[2:],
            )
        )
    if not columns:
        none = np.empty(0, np.int64)
        no = np.empty(0, np.bool_)
        return Hops(none, none, no, none, none, none, none, no, no, none, none, none, none)
    return Hops(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


def _nodes(point: NDArray[np.int64], flow: NDArray[np.int64], flows: Sequence[Flows]) -> NDArray[np.int64]:
    """Return one number for each (point, flow), running through all points."""
    base = np.concatenate([[0], np.cumsum([len(f) for f in flows])]).astype(np.int64)
    return base[point] + flow


def ends(hops: Hops, flows: Sequence[Flows]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one number for each hop's flow at its from_point, and at its to_point."""
    return _nodes(hops.from_point, hops.from_flow, flows), _nodes(hops.to_point, hops.to_flow, flows)


def _join(left: NDArray[np.int64], right: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all index pairs (l, r) with left[l] == right[r]."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    low, high = np.searchsorted(ordered, left, "left"), np.searchsorted(ordered, left, "right")
    count = high - low
    rows = np.repeat(np.arange(left.size), count)
    offset = np.arange(rows.size) - np.repeat(np.cumsum(count) - count, count)
    return rows, order[np.repeat(low, count) + offset]


def _take(hops: Hops, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Hops:
    return Hops(*(getattr(hops, name)[rows] for name in Hops.__dataclass_fields__))


def without_shortcuts(hops: Hops, flows: Sequence[Flows]) -> Hops:
    """Drop u -> w where u -> v -> w exists: the packets passed v on their way."""
    start, stop = ends(hops, flows)
    first, second = _join(stop, start)
    if not first.size:
        return hops
    total = int(max(start.max(), stop.max())) + 1
    long_way = np.unique(start[first] * total + stop[second])
    return _take(hops, ~np.isin(start * total + stop, long_way))


def follow(hops: Hops, flows: Sequence[Flows]) -> list[NDArray[np.int64]]:
    """Follow hops from first points to last ones.

    Returns one array per path length: shape (paths, length), each row the indices of a path's hops.
    """
    if not len(hops):
        return []
    start, stop = ends(hops, flows)
    heads = np.flatnonzero(~np.isin(start, stop))
    finished: list[NDArray[np.int64]] = []
    paths = heads.reshape(-1, 1)
    for _ in range(len(flows)):
        if not paths.size:
            break
        tail = paths[:, -1]
        path, following = _join(stop[tail], start)
        # the flow between two hops is one point's, and so are these times
        together = hops.first_ns[following] <= hops.to_last_ns[tail[path]] + SLACK_NS
        together &= hops.last_ns[following] >= hops.to_first_ns[tail[path]] - SLACK_NS
        path, following = path[together], following[together]
        ended = np.ones(len(paths), np.bool_)
        ended[path] = False
        finished.append(paths[ended])
        paths = np.concatenate([paths[path], following.reshape(-1, 1)], axis=1)
    used = np.zeros(len(hops), np.bool_)
    for block in finished:
        used[block.reshape(-1)] = True
    if not used.all():  # a circle, or a hop cut off from its path by time: still a crossing on its own
        finished.append(np.flatnonzero(~used).reshape(-1, 1))
    return [block for block in finished if block.size]

"""Paths: which way a conversation's packets went, and through which points.

Every edge gets a direction (which point the opening side's packets pass first), edges that skip a point
are dropped, and what is left is followed from its first point to its last. TTL says the order without any
clock; where the points are bridged and TTL is silent, request-before-reply order in time says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.match.flows import HIGH_OPENED, LOW_OPENED
from nattrace.table import TCP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.flows import Flows

#: Two bindings of one path are in use together when their packets are no further apart than this.
_SLACK_NS = 2_000_000_000

#: Ports below 1024 belong to servers (IANA system ports); Linux clients pick ports from 32768 up.
_SYSTEM_PORTS, _EPHEMERAL_PORTS = 1024, 32768


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
    first_ns: NDArray[np.int64]
    last_ns: NDArray[np.int64]

    def __len__(self) -> int:
        """Hops."""
        return int(self.pair.size)


def original_is_forward(flows: Flows) -> NDArray[np.int8]:
    """Return for each flow at one point +1 (low opened it), -1 (high opened it), 0 (nothing says so)."""
    opened = np.zeros(len(flows), np.int8)
    opened[flows.hint == LOW_OPENED] = 1
    opened[flows.hint == HIGH_OPENED] = -1
    return opened


def _by_port(flows: Flows) -> NDArray[np.int8]:
    """Return +1 where only the high endpoint has a server's port, -1 where only the low one has, else 0."""
    guess = (flows.high_port < _SYSTEM_PORTS).astype(np.int8) - (flows.low_port < _SYSTEM_PORTS)
    # a TCP conversation without its handshake was open before the capture: the first packet says nothing
    late = (guess == 0) & (flows.protocol == TCP)
    ephemeral = (flows.low_port >= _EPHEMERAL_PORTS).astype(np.int8) - (flows.high_port >= _EPHEMERAL_PORTS)
    guess[late] = ephemeral[late]
    ported = (flows.low_port != 0) | (flows.high_port != 0)
    same = flows.low_port == flows.high_port  # ICMP ids, NTP, IKE
    result: NDArray[np.int8] = np.where(ported & ~same, guess, 0).astype(np.int8)
    return result


def opening_side(flows: Flows) -> NDArray[np.bool_]:
    """Return for each flow whether the original direction is forward, from this point's packets alone."""
    opened = original_is_forward(flows)
    opened = np.where(opened == 0, _by_port(flows), opened)
    result: NDArray[np.bool_] = np.where(opened == 0, ~flows.first_backward, opened > 0)
    return result


def direct(pairs: Mapping[tuple[int, int], Edges], flows: Sequence[Flows]) -> Hops:
    """Give every edge its direction. Pairs are numbered in sorted order."""
    columns: list[tuple[NDArray[Any], ...]] = []
    for number, (i, j) in enumerate(sorted(pairs)):
        edges = pairs[i, j]
        if not len(edges):
            continue
        forward, first_is_from = _directions(edges, flows[i], flows[j])
        size = len(edges)
        forward_b = forward ^ edges.swap
        columns.append(
            (
                np.full(size, number),
                np.arange(size),
                ~first_is_from,
                np.where(first_is_from, i, j),
                np.where(first_is_from, j, i),
                np.where(first_is_from, edges.flow_a, edges.flow_b),
                np.where(first_is_from, edges.flow_b, edges.flow_a),
                np.where(first_is_from, forward, forward_b),
                edges.swap,
                edges.first_ns,
                edges.last_ns,
            )
        )
    if not columns:
        none = np.empty(0, np.int64)
        no = np.empty(0, np.bool_)
        return Hops(none, none, no, none, none, none, none, no, no, none, none)
    return Hops(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


def _directions(edges: Edges, at_a: Flows, at_b: Flows) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return (original is forward at the first point, original passes the first point first)."""
    turn = np.where(edges.swap, -1, 1)
    a, b = edges.flow_a, edges.flow_b
    vote = original_is_forward(at_a)[a] + original_is_forward(at_b)[b] * turn
    ports = _by_port(at_a)[a] + _by_port(at_b)[b] * turn
    vote = np.where(vote == 0, ports, vote)
    earlier_a = at_a.first_ns[a] <= at_b.first_ns[b]
    by_first = np.where(
        earlier_a, np.where(at_a.first_backward[a], -1, 1), np.where(at_b.first_backward[b], -1, 1) * turn
    )
    vote = np.where(vote == 0, by_first, vote)
    forward = vote > 0

    ttl = np.where(forward, edges.ttl_forward - edges.ttl_backward, edges.ttl_backward - edges.ttl_forward)
    delta = np.where(
        forward, edges.delta_forward - edges.delta_backward, edges.delta_backward - edges.delta_forward
    )
    order = np.where(ttl != 0, np.sign(ttl), np.sign(delta))
    habit = 1 if int(order.sum()) >= 0 else -1
    return forward, np.where(order == 0, habit, order) > 0


def _nodes(point: NDArray[np.int64], flow: NDArray[np.int64], flows: Sequence[Flows]) -> NDArray[np.int64]:
    """Return one number for each (point, flow), running through all points."""
    base = np.concatenate([[0], np.cumsum([len(f) for f in flows])]).astype(np.int64)
    return base[point] + flow


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
    start = _nodes(hops.from_point, hops.from_flow, flows)
    stop = _nodes(hops.to_point, hops.to_flow, flows)
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
    start = _nodes(hops.from_point, hops.from_flow, flows)
    stop = _nodes(hops.to_point, hops.to_flow, flows)
    heads = np.flatnonzero(~np.isin(start, stop))
    finished: list[NDArray[np.int64]] = []
    paths = heads.reshape(-1, 1)
    for _ in range(len(flows)):
        if not paths.size:
            break
        tail = paths[:, -1]
        path, following = _join(stop[tail], start)
        together = hops.first_ns[following] <= hops.last_ns[tail[path]] + _SLACK_NS
        together &= hops.last_ns[following] >= hops.first_ns[tail[path]] - _SLACK_NS
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

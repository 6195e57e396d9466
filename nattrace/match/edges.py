"""Edges: a flow at one point and the flow at another point that carry the same packets.

An edge is what matched packets add up to: a binding, seen from outside the kernel. Partial edges are made
window by window and merged once at the end, like flows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.match.flows import added_up, extremes, members, sorted_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.match.outcome import Matches
    from nattrace.match.rows import Rows


@dataclass(slots=True)
class Edges:
    """One row for each pair of flows that share packets, between a first and a second point.

    `swap` is True where the low endpoint at the first point is the high endpoint at the second. Forward and
    backward are those of the first point. Partial edges hold flows and counts in 32 bits. Deltas are second
    point's time minus first point's, ns.
    """

    flow_a: NDArray[np.signedinteger]
    flow_b: NDArray[np.signedinteger]
    swap: NDArray[np.bool_]
    forward: NDArray[np.signedinteger]  #: matched packets
    backward: NDArray[np.signedinteger]
    first_ns: NDArray[np.int64]  #: at the first point
    last_ns: NDArray[np.int64]
    first_b_ns: NDArray[np.int64]  #: at the second point
    last_b_ns: NDArray[np.int64]
    ttl_forward: NDArray[np.signedinteger]  #: sum of TTL at the first point minus TTL at the second
    ttl_backward: NDArray[np.signedinteger]
    delta_forward: NDArray[np.int64]  #: sum of deltas
    delta_backward: NDArray[np.int64]
    evidence: NDArray[np.uint16]  #: flags that any of its pairs had

    def __len__(self) -> int:
        """Edges."""
        return int(self.flow_a.size)

    def take(self, rows: NDArray[Any]) -> Edges:
        """Return the given rows."""
        return Edges(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Edges]) -> Edges:
        """Return all rows in order."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    @classmethod
    def empty(cls) -> Edges:
        """Return a table of no edges."""
        kinds = {"swap": np.bool_, "evidence": np.uint16}
        return cls(**{f.name: np.empty(0, kinds.get(f.name, np.int64)) for f in fields(cls)})


def edge_keys(
    flow_a: NDArray[np.int64],
    flow_b: NDArray[np.int64],
    swap: NDArray[np.bool_],
    backward: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint64]:
    """Return one uint64 key for each (flow_a, flow_b, swap, backward), high bits first, so that short sorts work.

    Flow indexes below 2**31 fit without loss; they are shifted up so that the informative bits are on top.
    """
    if not flow_a.size:
        return np.empty(0, np.uint64)
    base_a, base_b = flow_a.min(), flow_b.min()
    key: NDArray[np.uint64] = (flow_a - base_a).astype(np.uint64)
    width = max(int(flow_b.max() - base_b).bit_length(), 1)
    used = width + max(int(flow_a.max() - base_a).bit_length(), 1) + 2
    key <<= np.uint64(width)
    key |= (flow_b - base_b).astype(np.uint64)
    key <<= np.uint64(1)
    key |= swap
    key <<= np.uint64(1)
    if backward is not None:
        key |= backward
    key <<= np.uint64(max(64 - used, 0))
    return key


def ttl_drop(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return by how much the TTL is smaller at the second point, packet by packet; 0 where one was not printed."""
    drop = first.astype(np.int64) - second
    if not (first.all() and second.all()):
        drop[(first == 0) | (second == 0)] = 0
    return drop


def group_lanes(
    flow_a: NDArray[np.int64],
    flow_b: NDArray[np.int64],
    swap: NDArray[np.bool_],
    backward: NDArray[np.bool_],
    time_ns: NDArray[np.int64],
    ttl_drop: NDArray[np.int64],
    delta_ns: NDArray[np.int64],
    evidence: NDArray[np.uint16],
) -> tuple[Edges, NDArray[np.int64]]:
    """Group matched packet pairs (arrays of one length) into partial edges of one direction each.

    Returns them and each pair's index among them. `merge_edges` joins the two directions of an edge; until
    then nothing need be added up by direction.
    """
    order, starts = sorted_groups(edge_keys(flow_a, flow_b, swap, backward))
    if not order.size:
        return Edges.empty(), np.empty(0, np.int64)
    member = members(order, starts)
    leader = order[starts]
    turned = backward[leader]
    sizes = np.diff(np.append(starts, order.size))
    if (time_ns[1:] >= time_ns[:-1]).all():
        # in order of time, as captures mostly are: a group's first pair is its earliest
        first, last = time_ns[leader], time_ns[order[starts + sizes - 1]]
    else:
        first, last = extremes(member, starts.size, time_ns, time_ns)
    time_b = time_ns + delta_ns
    first_b, last_b = extremes(member, starts.size, time_b, time_b)
    delta = added_up(member, starts.size, delta_ns)
    sizes = sizes.astype(np.int32)
    # of one window: at most 255 times its packets
    ttl = added_up(member, starts.size, ttl_drop).astype(np.int32)
    none = np.int32(0)
    edges = Edges(
        flow_a=flow_a[leader].astype(np.int32),
        flow_b=flow_b[leader].astype(np.int32),
        swap=swap[leader],
        forward=np.where(turned, none, sizes),
        backward=np.where(turned, sizes, none),
        first_ns=first,
        last_ns=last,
        first_b_ns=first_b,
        last_b_ns=last_b,
        ttl_forward=np.where(turned, none, ttl),
        ttl_backward=np.where(turned, ttl, none),
        delta_forward=np.where(turned, 0, delta),
        delta_backward=np.where(turned, delta, 0),
        evidence=np.bitwise_or.reduceat(evidence[order], starts),
    )
    return edges, member


def group_edges(
    flow_a: NDArray[np.int64],
    flow_b: NDArray[np.int64],
    swap: NDArray[np.bool_],
    backward: NDArray[np.bool_],
    time_ns: NDArray[np.int64],
    ttl_drop: NDArray[np.int64],
    delta_ns: NDArray[np.int64],
    evidence: NDArray[np.uint16],
) -> tuple[Edges, NDArray[np.int64]]:
    """Group matched packet pairs (arrays of one length) into edges; return them and each pair's edge index."""
    lanes, lane = group_lanes(flow_a, flow_b, swap, backward, time_ns, ttl_drop, delta_ns, evidence)
    edges, edge = _joined(lambda name: getattr(lanes, name))
    return edges, edge[lane]


def merge_edges(
    parts: Sequence[Edges],
    flows_a: NDArray[np.int64] | None = None,
    flows_b: NDArray[np.int64] | None = None,
) -> tuple[Edges, NDArray[np.int64]]:
    """Merge partial edges; `flows_a` and `flows_b` say which number each flow is to have, None for its own.

    Returns the merged edges and, for each row of the concatenated parts, its index among them.
    """
    if not parts:
        return Edges.empty(), np.empty(0, np.int64)

    def column(name: str) -> NDArray[Any]:
        column: NDArray[Any] = np.concatenate([getattr(part, name) for part in parts])
        flows = {"flow_a": flows_a, "flow_b": flows_b}.get(name)
        return column if flows is None else flows[column]

    return _joined(column)


def _joined(column: Callable[[str], NDArray[Any]]) -> tuple[Edges, NDArray[np.int64]]:
    """Join rows of the same edge, given column by column; return the edges and the index of each row's edge."""
    flow_a, flow_b, swap = column("flow_a"), column("flow_b"), column("swap")
    order, starts = sorted_groups(edge_keys(flow_a, flow_b, swap))
    if not order.size:
        return Edges.empty(), np.empty(0, np.int64)
    leader, member = order[starts], members(order, starts)
    joined: dict[str, Any] = {"flow_a": flow_a[leader], "flow_b": flow_b[leader], "swap": swap[leader]}
    for name in ("forward", "backward", "ttl_forward", "ttl_backward", "delta_forward", "delta_backward"):
        joined[name] = added_up(member, starts.size, column(name))
    for low, high in (("first_ns", "last_ns"), ("first_b_ns", "last_b_ns")):
        joined[low], joined[high] = extremes(member, starts.size, column(low), column(high))
    joined["evidence"] = np.bitwise_or.reduceat(column("evidence")[order], starts)
    return Edges(**joined), member


def edges_of(
    rows_a: Rows, rows_b: Rows, found: Matches, flows_a: NDArray[np.int64], flows_b: NDArray[np.int64]
) -> Edges:
    """Return the edges, between merged flows, that the given pairs add up to."""
    a, b = found.a, found.b
    backward = rows_a.backward[a]
    time = rows_a.table.time_ns[a]
    return group_edges(
        flows_a[rows_a.flow[a]], flows_b[rows_b.flow[b]], backward != rows_b.backward[b], backward, time,
        ttl_drop(rows_a.table.ttl[a], rows_b.table.ttl[b]), rows_b.table.time_ns[b] - time, found.flags,
    )[0]  # fmt: skip


def without_instants(edges: Edges) -> None:
    """Forget the order of records of one instant: a difference of a nanosecond each, see `PairState`."""
    for delta, count in ((edges.delta_forward, edges.forward), (edges.delta_backward, edges.backward)):
        delta[np.abs(delta) <= count] = 0

"""Edges: a flow at one point and the flow at another point that carry the same packets.

An edge is what matched packets add up to: a binding, seen from outside the kernel. Partial edges are made
window by window and merged once at the end, like flows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.match.flows import members, sorted_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(slots=True)
class Edges:
    """One row for each pair of flows that share packets, between a first and a second point.

    `swap` is True where the low endpoint at the first point is the high endpoint at the second. Forward
    and backward are those of the first point. Deltas are second point's time minus first point's, ns.
    """

    flow_a: NDArray[np.int64]
    flow_b: NDArray[np.int64]
    swap: NDArray[np.bool_]
    forward: NDArray[np.int64]  #: matched packets
    backward: NDArray[np.int64]
    first_ns: NDArray[np.int64]  #: at the first point
    last_ns: NDArray[np.int64]
    ttl_forward: NDArray[np.int64]  #: sum of TTL at the first point minus TTL at the second
    ttl_backward: NDArray[np.int64]
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
    flow_a: NDArray[np.int64], flow_b: NDArray[np.int64], swap: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """Return one uint64 key for each (flow_a, flow_b, swap), high bits first, so that short sorts work.

    Flow indexes below 2**31 fit without loss; they are shifted up so that the informative bits are on top.
    """
    if not flow_a.size:
        return np.empty(0, np.uint64)
    base_a, base_b = flow_a.min(), flow_b.min()
    key: NDArray[np.uint64] = (flow_a - base_a).astype(np.uint64)
    width = max(int(flow_b.max() - base_b).bit_length(), 1)
    used = width + max(int(flow_a.max() - base_a).bit_length(), 1) + 1
    key <<= np.uint64(width)
    key |= (flow_b - base_b).astype(np.uint64)
    key <<= np.uint64(1)
    key |= swap
    key <<= np.uint64(max(64 - used, 0))
    return key


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
    order, starts = sorted_groups(edge_keys(flow_a, flow_b, swap))
    if not order.size:
        return Edges.empty(), np.empty(0, np.int64)
    member = members(order, starts)
    leader = order[starts]
    turned = backward[order]
    time, ttl, delta = time_ns[order], ttl_drop[order], delta_ns[order]
    sizes = np.diff(np.append(starts, order.size))
    backwards = np.add.reduceat(turned.astype(np.int64), starts)
    ttl_all = np.add.reduceat(ttl, starts)
    ttl_back = np.add.reduceat(np.where(turned, ttl, 0), starts)
    delta_all = np.add.reduceat(delta, starts)
    delta_back = np.add.reduceat(np.where(turned, delta, 0), starts)
    edges = Edges(
        flow_a=flow_a[leader],
        flow_b=flow_b[leader],
        swap=swap[leader],
        forward=sizes - backwards,
        backward=backwards,
        first_ns=np.minimum.reduceat(time, starts),
        last_ns=np.maximum.reduceat(time, starts),
        ttl_forward=ttl_all - ttl_back,
        ttl_backward=ttl_back,
        delta_forward=delta_all - delta_back,
        delta_backward=delta_back,
        evidence=np.bitwise_or.reduceat(evidence[order], starts),
    )
    return edges, member


def merge_edges(
    parts: Sequence[Edges], flows_a: NDArray[np.int64], flows_b: NDArray[np.int64]
) -> tuple[Edges, NDArray[np.int64]]:
    """Merge partial edges; `flows_a` and `flows_b` say which merged flow each partial flow became.

    Returns the merged edges and, for each row of the concatenated parts, its index among them.
    """
    if not parts:
        return Edges.empty(), np.empty(0, np.int64)
    rows = Edges.concatenate(parts)
    rows.flow_a = flows_a[rows.flow_a]
    rows.flow_b = flows_b[rows.flow_b]
    order, starts = sorted_groups(edge_keys(rows.flow_a, rows.flow_b, rows.swap))
    if not order.size:
        return rows, np.empty(0, np.int64)
    leader = order[starts]
    merged: dict[str, Any] = {name: getattr(rows, name)[leader] for name in ("flow_a", "flow_b", "swap")}
    for name in ("forward", "backward", "ttl_forward", "ttl_backward", "delta_forward", "delta_backward"):
        merged[name] = np.add.reduceat(getattr(rows, name)[order], starts)
    merged["first_ns"] = np.minimum.reduceat(rows.first_ns[order], starts)
    merged["last_ns"] = np.maximum.reduceat(rows.last_ns[order], starts)
    merged["evidence"] = np.bitwise_or.reduceat(rows.evidence[order], starts)
    return Edges(**merged), members(order, starts)

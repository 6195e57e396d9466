"""Order: which of two points a conversation's packets pass first, edge by edge.

An edge's own packets say so where the TTL falls along the path, or where requests are later and answers
earlier at one point. Where they do not, the same translation is looked up between other points: what changes
one tuple into another does so in one direction wherever it shows. Names, files and arguments say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.flows import Flows


#: From so much on, the time that packets take both ways together is no rounding and no jitter of timestamps.
_CLEAR_NS = 2_000


@dataclass(slots=True)
class _Votes:
    """What the edges of one pair of points say: +1 first point first, -1 second point first, 0 nothing."""

    order: NDArray[np.int64]
    sure: NDArray[np.bool_]
    silent: NDArray[np.bool_]  #: no packet says anything; `order` is habit


def first_is_from(
    pairs: Sequence[tuple[tuple[int, int], Edges]],
    forwards: Sequence[NDArray[np.bool_]],
    flows: Sequence[Flows],
    clock_bounds: Sequence[int | None],
    homes: Sequence[int],
) -> list[NDArray[np.bool_]]:
    """Return for each pair's edges whether original packets pass the pair's first point first.

    Pairs come as ((first point, second point), edges); `forwards` say whether the original direction is
    forward at the first point, `clock_bounds` by how much the clocks of a pair may differ (ns; None:
    unknown). `homes` has one number for each point, equal for layers of one capture, whose numbers ascend in
    the order in which they saw their first packets; empty where there are none.
    """
    votes = []
    for ((i, j), edges), forward, bound_ns in zip(pairs, forwards, clock_bounds, strict=True):
        vote = _votes(edges, forward, bound_ns, one_capture=bool(homes) and homes[i] == homes[j])
        silent = np.flatnonzero(vote.silent)
        if silent.size:
            by_sides = _by_sides(edges.take(silent), forward[silent], flows[i], flows[j])
            vote.order[silent] = np.where(by_sides != 0, by_sides, vote.order[silent])
        votes.append(vote)
    if any(not vote.sure.all() for vote in votes):
        _ask_others(pairs, votes, flows)
    return [vote.order > 0 for vote in votes]


def _votes(
    edges: Edges, forward: NDArray[np.bool_], clock_bound_ns: int | None, *, one_capture: bool
) -> _Votes:
    """Weigh TTL and times; an edge that says nothing does as most of its pair do.

    Packets of both directions tell the order whatever the clocks: on the way from the first point to the second,
    the former are seen later there, the latter earlier. That is physics, and holds against a TTL that was set
    on the way. On one clock, two directions that pass the same point first are no path, though: one point
    sees copies (a bridge that floods), and neither times nor a TTL that falls the same way in both
    directions say which.
    """
    sign = np.where(forward, 1, -1)
    out, back = np.sign(edges.ttl_forward), np.sign(-edges.ttl_backward)
    ttl = np.where(out * back < 0, 0, np.sign(edges.ttl_forward - edges.ttl_backward)) * sign
    there = edges.delta_forward / np.maximum(edges.forward, 1)
    again = edges.delta_backward / np.maximum(edges.backward, 1)
    both = (edges.forward > 0) & (edges.backward > 0)
    # means, not sums: with two clocks, what is left of their offset is in every packet
    apart = there - again
    by_time = np.sign(apart) * sign
    margin = np.inf if clock_bound_ns is None else clock_bound_ns
    one_clock = margin == 0
    copies = both & (there * again > 0) & one_clock
    # of two clocks what exceeds their error, of one clock what is no jitter of its timestamps
    clear = both & (np.abs(apart) > max(2 * margin, _CLEAR_NS)) & ~copies
    contrary = clear & (ttl * by_time < 0)
    if 2 * contrary.sum() > (both & (ttl != 0)).sum():
        ttl = np.zeros_like(ttl)  # the TTL is set between these points: it tells no order
    by_time = np.where(both | (np.abs(apart) > margin), by_time, 0)
    order = np.where(clear & ((ttl == 0) | one_clock), by_time, ttl)
    sure = (order != 0) | (both & ~copies) | (not one_clock)
    habit: NDArray[np.int64] | int = 1 if int(np.where(order == 0, by_time, order).sum()) >= 0 else -1
    if one_clock:  # what one clock says of order is never doubted
        order = np.where(order == 0, by_time, order)
    if one_capture:
        # one instant for both sightings: the layer that saw the first packet of all is the earlier one
        habit = np.where(np.where(forward, edges.forward, edges.backward) > 0, 1, -1)
    return _Votes(np.where(order == 0, habit, order).astype(np.int64), sure, order == 0)


def _by_sides(edges: Edges, forward: NDArray[np.bool_], at_a: Flows, at_b: Flows) -> NDArray[np.int64]:
    """Return the order of points that saw packets of one direction at one instant, as far as tuples tell it.

    Where one endpoint is kept and one of the two tuples carries both directions, that tuple is the one on
    the kept endpoint's side: there its packets arrive as they left. The other one is a half of the
    translation, which bridge netfilter shows in one direction only.
    """

    def end(flows: Flows, rows: NDArray[np.int64], low: NDArray[np.bool_]) -> NDArray[np.uint64]:
        address = np.where(low, flows.low_address[rows], flows.high_address[rows]).astype(np.uint64)
        return address << np.uint64(16) | np.where(low, flows.low_port[rows], flows.high_port[rows])

    a, b, forward_b = edges.flow_a, edges.flow_b, forward ^ edges.swap
    same_src = end(at_a, a, forward) == end(at_b, b, forward_b)
    same_dst = end(at_a, a, ~forward) == end(at_b, b, ~forward_b)
    whole_a, whole_b = ((f.forward[r] > 0) & (f.backward[r] > 0) for f, r in ((at_a, a), (at_b, b)))
    whole_first = np.where(whole_a, 1, -1)
    known = (same_src ^ same_dst) & (whole_a ^ whole_b) & (at_a.version[a] == at_b.version[b])
    result: NDArray[np.int64] = np.where(known, np.where(same_src, whole_first, -whole_first), 0)
    return result


def _ask_others(
    pairs: Sequence[tuple[tuple[int, int], Edges]], votes: Sequence[_Votes], flows: Sequence[Flows]
) -> None:
    """Give edges that are not sure the order of sure edges with the same tuples at both ends."""
    here = np.concatenate([flows[i].hash[edges.flow_a] for (i, _), edges in pairs])
    there = np.concatenate([flows[j].hash[edges.flow_b] for (_, j), edges in pairs])
    order = np.concatenate([vote.order for vote in votes])
    sure = np.concatenate([vote.sure for vote in votes])
    # from the tuple with the smaller hash to the other, whichever point shows which
    turn = np.where(here < there, 1, -1)
    asking = np.flatnonzero(~sure & (here != there))
    if not asking.size:
        return
    both = np.stack([np.minimum(here, there), np.maximum(here, there)])
    _, group = np.unique(both, axis=1, return_inverse=True)
    group = group.reshape(-1)
    told = np.bincount(group[sure], (order * turn)[sure], int(group.max()) + 1)[group] * turn
    known = asking[told[asking] != 0]
    order[known] = np.sign(told[known])
    for vote, part in zip(votes, np.split(order, np.cumsum([v.order.size for v in votes])[:-1]), strict=True):
        vote.order = part

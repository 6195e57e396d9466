"""Lanes: packets of two points that travel in one direction of one binding, numbered alike on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.rows import Rows


@dataclass(slots=True)
class Lanes:
    """Which lane each packet of two sides is in, -1 for none, and when it is expected on the other side."""

    lane_a: NDArray[np.int64]  #: twice the edge, plus one for backward packets; one for each row of a
    lane_b: NDArray[np.int64]
    due_a: NDArray[np.int64]  #: time plus the lane's mean delay: on the second point's clock
    due_b: NDArray[np.int64]  #: time as it is

    @classmethod
    def of(
        cls, rows_a: Rows, rows_b: Rows, flows_a: NDArray[np.int64], flows_b: NDArray[np.int64], edges: Edges
    ) -> Lanes:
        """Return the lanes of rows of both sides; `flows_a` and `flows_b` map partial to merged flows."""
        time_a, time_b = rows_a.table.time_ns, rows_b.table.time_ns
        if not len(edges):
            return cls(np.full(len(rows_a), -1), np.full(len(rows_b), -1), time_a, time_b)
        edge_a = edge_of(flows_a[rows_a.flow], time_a, 0, edges)
        edge_b = edge_of(flows_b[rows_b.flow], time_b, 1, edges)
        known_a = np.maximum(edge_a, 0)
        back_b = rows_b.backward ^ edges.swap[np.maximum(edge_b, 0)]
        return cls(
            np.where(edge_a >= 0, edge_a * 2 + rows_a.backward, -1),
            np.where(edge_b >= 0, edge_b * 2 + back_b, -1),
            time_a + _usual_delta(edges, known_a, rows_a.backward),
            time_b,
        )

    def take(self, rows_a: NDArray[Any], rows_b: NDArray[Any]) -> Lanes:
        """Return the lanes of the given rows of either side."""
        return Lanes(self.lane_a[rows_a], self.lane_b[rows_b], self.due_a[rows_a], self.due_b[rows_b])

    def without(self, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> Lanes:
        """Return the same with no lane for the given rows of either side."""
        lane_a, lane_b = self.lane_a.copy(), self.lane_b.copy()
        lane_a[rows_a] = lane_b[rows_b] = -1
        return Lanes(lane_a, lane_b, self.due_a, self.due_b)


def edge_of(
    flow: NDArray[np.int64], time_ns: NDArray[np.int64], side: int, edges: Edges
) -> NDArray[np.int64]:
    """Return for each packet of the first point (`side` 0) or the second (1) the edge its flow was on, -1 for none.

    A flow with several edges over time (a binding that was renewed) is on the one whose matched packets
    surround it in time, or the first or last one for a packet before or after all of them; a packet
    between two bindings, or inside both, is on neither.
    """
    edge_flow, first_ns, last_ns = (
        (edges.flow_b, edges.first_b_ns, edges.last_b_ns)
        if side
        else (edges.flow_a, edges.first_ns, edges.last_ns)
    )
    # flows are small numbers, or -1, for which there is a place of no edge at the end
    places = 2 + max(int(edge_flow.max(initial=0)), int(flow.max(initial=0)))
    count = np.bincount(edge_flow, minlength=places)
    edge_at = np.empty(places, np.int64)
    edge_at[edge_flow] = np.arange(edge_flow.size)
    result = np.where(count[flow] == 1, edge_at[flow], -1)
    several = np.flatnonzero(count[flow] > 1)
    if several.size:
        order = np.flatnonzero(count[edge_flow] > 1)
        order = order[np.lexsort((first_ns[order], edge_flow[order]))]
        low = np.searchsorted(edge_flow[order], flow[several], "left")
        high = np.searchsorted(edge_flow[order], flow[several], "right")
        first, last = first_ns[order], last_ns[order]
        t = time_ns[several]
        covering = np.zeros(several.size, np.int64)
        choice = np.full(several.size, -1, np.int64)
        ends = last[low]
        for step in range(int((high - low).max())):
            slot = low + step
            valid = slot < high
            slot = np.minimum(slot, order.size - 1)
            inside = valid & (first[slot] <= t) & (t <= last[slot])
            covering += inside
            choice = np.where(inside, order[slot], choice)
            # edges of a flow are in order of their first packet; their last packets need not be
            ends = np.where(valid, np.maximum(ends, last[slot]), ends)
        result[several] = np.where(covering == 1, choice, -1)
        early, late = t < first[low], t > ends
        result[several[early]] = order[low[early]]
        result[several[late]] = order[high[late] - 1]
    return result


def _usual_delta(edges: Edges, edge: NDArray[np.int64], backward: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the mean delta of each packet's edge and direction, 0 where it has no samples."""
    count = np.where(backward, edges.backward[edge], edges.forward[edge])
    total = np.where(backward, edges.delta_backward[edge], edges.delta_forward[edge])
    return np.where(count > 0, total // np.maximum(count, 1), 0)

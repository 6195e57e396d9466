"""Lanes: packets of two points that travel in one direction of one binding, numbered alike on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.match.bindings import edge_of, usual_delta

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
            time_a + usual_delta(edges, known_a, rows_a.backward),
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

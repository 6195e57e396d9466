"""Encapsulations: what wraps the packets of conversations at each point of their paths.

Made only where some capture has tunnels. It reads what flows were wrapped in; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.encapsulation import both_ways, encapsulation_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.flows import Flows
    from nattrace.nat.conversations import Conversations


@dataclass(slots=True)
class Encapsulations:
    """What wraps conversations, as indices into `texts`, of which the first is None: nothing."""

    texts: list[str | None]
    first: NDArray[np.int64]  #: by conversation: at the first point of its path
    after: NDArray[np.int64]  #: by hop: at the point that it leads to
    flows: Sequence[Flows]  #: by point

    def along(self, start: int, steps: Sequence[int]) -> tuple[str | None, ...] | None:
        """Return a conversation's encapsulation at each point of its path; None where there is none at all."""
        found = (self.texts[self.first[start]], *(self.texts[self.after[step]] for step in steps))
        return found if any(found) else None

    def of_packets(
        self, point: int, flow: NDArray[np.int64], backward: NDArray[np.bool_]
    ) -> list[str | None] | None:
        """Name what packets of the given merged flows are wrapped in; None where nothing is, at that point."""
        at = self.flows[point]
        if not at.wrap_forward.any() and not at.wrap_backward.any():
            return None
        wrap = np.where(backward, at.wrap_backward[flow], at.wrap_forward[flow])
        return [encapsulation_name(number) for number in wrap.tolist()]


def name_encapsulations(c: Conversations, flows: Sequence[Flows]) -> Encapsulations | None:
    """Return what wraps the given conversations; None where no flow of any point is wrapped."""
    if not any(at.wrap_forward.any() or at.wrap_backward.any() for at in flows):
        return None
    first = np.zeros((len(c), 2), np.uint64)
    after = np.zeros((len(c.hops), 2), np.uint64)
    forward_after = c.hops.forward ^ c.hops.swap
    for point, at in enumerate(flows):
        rows = np.flatnonzero(c.point == point)
        flow = c.flow[rows]
        forward = (c.initiator.src[rows] == at.low_address[flow]) & (
            c.initiator.sport[rows] == at.low_port[flow]
        )
        first[rows] = _both(at, flow, forward)
        hops = np.flatnonzero(c.hops.to_point == point)
        after[hops] = _both(at, c.hops.to_flow[hops], forward_after[hops])
    kinds, place = np.unique(np.concatenate([first, after]), axis=0, return_inverse=True)
    place = place.reshape(-1)
    texts = [None, *(both_ways(forth, back) for forth, back in kinds.tolist())]
    place += 1
    return Encapsulations(texts, place[: len(c)], place[len(c) :], flows)


def _both(at: Flows, flow: NDArray[np.int64], forward: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return what wraps the packets of the original direction and of the reply, shape (n, 2)."""
    low, high = at.wrap_forward[flow], at.wrap_backward[flow]
    return np.column_stack([np.where(forward, low, high), np.where(forward, high, low)])

"""Outcome: what matching two points leaves behind for every packet. Data only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Why a packet has no partner at the other point; ANSWERED: a box between the points made it, or swallowed it;
#: ILLEGIBLE: the capture is cut off before the number that tells it from others of its flow.
ABSENT, TIED, ANSWERED, ILLEGIBLE = 0, 1, 2, 3


@dataclass(slots=True)
class Matches:
    """Matched packets of one step: indices into the rows of both sides, and the evidence flags."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    flags: NDArray[np.uint16]

    def among(self, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> Matches:
        """Return the matches between the given rows (ascending indices), as indices into those."""
        kept = np.flatnonzero(np.isin(self.a, rows_a) & np.isin(self.b, rows_b))
        return Matches(
            np.searchsorted(rows_a, self.a[kept]), np.searchsorted(rows_b, self.b[kept]), self.flags[kept]
        )


@dataclass(slots=True)
class Unmatched:
    """Packets of one side that found no partner at the other point, and why (ABSENT or TIED)."""

    flow: NDArray[np.int64]  #: flow number
    time_ns: NDArray[np.int64]
    backward: NDArray[np.bool_]
    number: NDArray[np.int64]
    reason: NDArray[np.uint8]
    seq: NDArray[np.uint32]  #: see `PacketTable`
    data: NDArray[np.uint32]  #: TCP payload bytes; 0 for other protocols
    ip_id: NDArray[np.uint32]
    fragment: NDArray[np.bool_]  #: one of several fragments

    @classmethod
    def concatenate(cls, parts: Sequence[Unmatched], flows: NDArray[np.int64]) -> Unmatched:
        """Return all packets of the parts; `flows` says where each flow number stands in order."""
        kinds = {
            "backward": np.bool_,
            "reason": np.uint8,
            "seq": np.uint32,
            "data": np.uint32,
            "ip_id": np.uint32,
            "fragment": np.bool_,
        }
        joined = cls(
            **{
                f.name: np.concatenate(
                    [*(getattr(p, f.name) for p in parts), np.empty(0, kinds.get(f.name, np.int64))]
                )
                for f in fields(cls)
            }
        )
        joined.flow = flows[joined.flow]
        return joined


@dataclass(slots=True)
class Shifts:
    """Flows whose TCP numbers are shifted between two points, one row for each shift of each flow.

    Forward and backward are those of the first point. A shift is the second point's number minus the first
    point's, modulo 2**32.
    """

    flow_a: NDArray[np.int64]  #: flow number at the first point
    flow_b: NDArray[np.int64]
    forward: NDArray[np.uint32]  #: shift of the forward direction's sequence numbers
    backward: NDArray[np.uint32]
    first_ns: NDArray[np.int64]  #: first packet known to be shifted so, at the first point
    whole: NDArray[np.bool_]  #: no packet of the flow crosses unshifted: a proxy answered the handshake
    #: frames at the first and the second point of the packet whose payload grew or shrank by this shift; 0 for none
    frame_a: NDArray[np.uint32]
    frame_b: NDArray[np.uint32]

    def __len__(self) -> int:
        """Shifts."""
        return int(self.flow_a.size)

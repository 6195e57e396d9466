"""Shifts: what matching learned of shifted TCP numbers, told along the path of each conversation.

Pure functions over columns; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from nattrace.match.outcome import Shifts
    from nattrace.match.pair import PairState
    from nattrace.nat.conversations import Conversations

#: Shifts that are told; a proxy in front of a busy server shifts every connection.
MAX_SHIFTS = 1_000


@dataclass(frozen=True, slots=True)
class SequenceShift:
    """TCP numbers of one conversation that differ between two neighbouring points of its path.

    `original_bytes` and `reply_bytes` are what a sequence number of that direction is higher by at `to_point` than
    at `from_point`, from -2**31 to 2**31 - 1; the other direction's acknowledgements differ alike.
    """

    flow: int  #: id of the conversation
    from_point: int
    to_point: int
    original_bytes: int
    reply_bytes: int
    whole: bool  #: from the first packet on: a proxy answered the handshake
    #: frames at from_point and to_point of the packet that was rewritten and began this shift
    rewritten: tuple[int, int] | None


def sequence_shifts(
    states: Mapping[tuple[int, int], PairState],
    flows: Mapping[int, NDArray[np.int64]],
    hop_of_edge: Mapping[tuple[int, int], NDArray[np.int64]],
    c: Conversations,
) -> list[SequenceShift]:
    """Return the shifts of all conversations, in the order of their ids and of time, at most MAX_SHIFTS.

    `flows` maps the flow numbers of each point to their places in order, `hop_of_edge` a pair's merged edges to hops.
    """
    found: list[tuple[tuple[int, int, int], SequenceShift]] = []
    for pair, state in sorted(states.items()):
        for shifts in state.shifts:
            found += _of_pair(shifts, pair, (flows[pair[0]], flows[pair[1]]), hop_of_edge[pair], c)
    return [shift for _, shift in sorted(found, key=lambda item: item[0])[:MAX_SHIFTS]]


def _of_pair(
    shifts: Shifts,
    pair: tuple[int, int],
    flows: tuple[NDArray[np.int64], NDArray[np.int64]],
    hop_of_edge: NDArray[np.int64],
    c: Conversations,
) -> list[tuple[tuple[int, int, int], SequenceShift]]:
    """Return the shifts of one pair of points with what they are sorted by."""
    found = []
    hops = hop_of_edge[hop_of_edge >= 0]
    ends = (
        np.where(c.hops.reverse[hops], c.hops.to_flow[hops], c.hops.from_flow[hops]),
        np.where(c.hops.reverse[hops], c.hops.from_flow[hops], c.hops.to_flow[hops]),
    )
    hop_of_flows = dict(zip(zip(ends[0].tolist(), ends[1].tolist(), strict=True), hops.tolist(), strict=True))
    columns = zip(
        flows[0][shifts.flow_a].tolist(), flows[1][shifts.flow_b].tolist(),
        shifts.forward.view(np.int32).tolist(), shifts.backward.view(np.int32).tolist(), shifts.first_ns.tolist(),
        shifts.whole.tolist(), shifts.frame_a.tolist(), shifts.frame_b.tolist(), strict=True,
    )  # fmt: skip
    for flow_a, flow_b, forward, backward, first_ns, whole, frame_a, frame_b in columns:
        hop = hop_of_flows.get((flow_a, flow_b))
        row = -1 if hop is None else int(c.flow_of_hop[hop])
        if hop is None or row < 0:
            continue
        reverse = bool(c.hops.reverse[hop])
        original_is_forward = bool(c.hops.forward[hop] ^ (reverse & c.hops.swap[hop]))
        original, reply = (forward, backward) if original_is_forward else (backward, forward)
        frames = (frame_b, frame_a) if reverse else (frame_a, frame_b)
        sign = -1 if reverse else 1
        shift = SequenceShift(
            flow=row + 1,
            from_point=int(c.hops.from_point[hop]),
            to_point=int(c.hops.to_point[hop]),
            original_bytes=sign * original,
            reply_bytes=sign * reply,
            whole=whole,
            rewritten=frames if frame_a else None,
        )
        found.append(((row, first_ns, pair[0]), shift))
    return found

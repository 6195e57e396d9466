"""Packets that changed size on the way: cut into segments, merged, or fragmented differently.

With segmentation offload one frame here is many frames there, so neither has an equal at the other point;
that is no loss. This module only tells such packets from missing ones; it does not match them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.pairing import group_ids, nearest_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.outcome import Unmatched

#: Sequence numbers are compared as distances from one of their lane; a lane spans less than 2**32 bytes
#: between wraps, and 2**33 keeps lanes apart.
_LANE_SPAN = np.int64(1 << 33)

#: What has no identification in common is one packet only this soon.
_SOON_NS = 10_000_000


def resized(
    own: Unmatched, own_lane: NDArray[np.int64], other: Unmatched, other_lane: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which of one point's unmatched packets the other point has in other sizes.

    Lanes number the hops and directions of the packets of both sides alike; -1 is none. TCP data is known
    by its byte range: some unmatched data of the same lane overlaps it. Fragments are known by their IP
    identification: the other side has unmatched packets of the same lane with the same one; over IPv6 by their lane
    and time alone.
    """
    result = np.zeros(own.flow.size, np.bool_)
    mine, theirs = (
        np.flatnonzero((r.data > 0) & (lane >= 0)) for r, lane in ((own, own_lane), (other, other_lane))
    )
    if mine.size and theirs.size:
        result[mine] = _overlapping(
            own_lane[mine],
            own.seq[mine],
            own.data[mine],
            other_lane[theirs],
            other.seq[theirs],
            other.data[theirs],
        )
    known = (own_lane >= 0) & (own.ip_id != 0)
    if known.any() and (own.fragment.any() or other.fragment.any()):
        key = own_lane * 2**32 + own.ip_id
        there = (other_lane >= 0) & (other.ip_id != 0)
        whole = np.isin(key, (other_lane * 2**32 + other.ip_id)[there & other.fragment])
        part = np.isin(key, (other_lane * 2**32 + other.ip_id)[there]) & own.fragment
        result |= known & (whole | part)
    return result | _cut_anew(own, own_lane, other, other_lane)


def _cut_anew(
    own: Unmatched, own_lane: NDArray[np.int64], other: Unmatched, other_lane: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which packets may be others of their lane that are fragments, or the other way round, over IPv6.

    Whoever cuts there gives a new identification; longer than 16 bits it is no IPv4 packet's (RFC 8200 section 4.5).
    """
    result = np.zeros(own.flow.size, np.bool_)
    six_own, six_other = (each.fragment & (each.ip_id > 0xFFFF) for each in (own, other))
    for mine, theirs in ((six_own, other_lane >= 0), (own_lane >= 0, six_other)):
        here, there = np.flatnonzero(mine & (own_lane >= 0)), np.flatnonzero(theirs & (other_lane >= 0))
        if not here.size or not there.size:
            continue
        group_own, group_other = group_ids(
            own_lane[here].astype(np.uint64), other_lane[there].astype(np.uint64)
        )
        apart = nearest_distance(group_own, own.time_ns[here], group_other, other.time_ns[there])
        result[here] |= apart <= _SOON_NS
    return result


def _overlapping(
    lane: NDArray[np.int64],
    seq: NDArray[np.uint32],
    data: NDArray[np.uint32],
    other_lane: NDArray[np.int64],
    other_seq: NDArray[np.uint32],
    other_data: NDArray[np.uint32],
) -> NDArray[np.bool_]:
    """Return which byte ranges overlap some range of the same lane on the other side."""
    # the first packet of a lane is its origin; earlier ones (reordering) come out slightly negative
    lanes, first = np.unique(other_lane, return_index=True)
    place = np.minimum(np.searchsorted(lanes, lane), lanes.size - 1)
    shared = lanes[place] == lane
    origin = other_seq[first]

    def distance(value: NDArray[np.uint32], base: NDArray[np.uint32]) -> NDArray[np.int64]:
        return (value - base).view(np.int32).astype(np.int64)

    base = np.int64(1 << 31)
    other_place = np.searchsorted(lanes, other_lane)
    other_start = other_place * _LANE_SPAN + base + distance(other_seq, origin[other_place])
    other_stop = other_start + other_data
    order = np.argsort(other_start, kind="stable")
    other_start, reach = other_start[order], np.maximum.accumulate(other_stop[order])
    start = place * _LANE_SPAN + base + distance(seq, origin[place])
    stop = start + data
    before = np.searchsorted(other_start, stop, "left") - 1
    result: NDArray[np.bool_] = shared & (before >= 0) & (reach[np.maximum(before, 0)] > start)
    return result

"""Trains: a large UDP datagram that segmentation offload cut into datagrams of one size, or merged from them.

UDP_SEGMENT hands one datagram to the kernel, which leaves as many: all of one size but for the last, in order,
their IP identifications counting up from the large one's (kernel: __udp_gso_segment, inet_gso_segment). The next
large datagram's identification is only one higher, so those of two trains overlap: what a datagram says at its
beginning finds the first of a train, then order, length and identification the others. Receive offload merges
them again (kernel: udp_gro_receive). This module never decides where two trains could have sent a datagram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.keys import M1, mix
from nattrace.match.pairing import group_ids, nearest_distance, nearest_pairs
from nattrace.match.resize.datagrams import fragment_rows
from nattrace.match.resize.heads import HEAD_BYTES
from nattrace.match.resize.pieces import Pieces
from nattrace.match.unique import FAR_NS
from nattrace.match.votes import MARGIN
from nattrace.table import UDP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable

#: Datagrams of one train at most (linux/udp.h: UDP_MAX_SEGMENTS).
_LONGEST = 128
#: Trains before the latest that a datagram may still belong to: reordering on one host reaches no further.
_EARLIER = 3
_FLOOR_NS = 1_000
#: Datagrams of one train leave in one loop, and over a link of 250 Mbit/s no further apart than this.
_APART_NS = 50_000
#: What is left over on both sides of a lane with trains, this close, may belong together.
_BESIDE_NS = 10_000_000


def train_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets may be part of a train, or one."""
    rows: NDArray[np.bool_] = (table.protocol == UDP) & (table.payload_length > 0) & ~fragment_rows(table)
    return rows


def match_trains(rows_a: Rows, rows_b: Rows, lanes: Lanes) -> Pieces:
    """Return pairs of a large datagram and one of those it was cut into, whichever side has which; and what is tied.

    Rows without a lane are left alone.
    """
    a = np.flatnonzero((lanes.lane_a >= 0) & train_rows(rows_a.table))
    b = np.flatnonzero((lanes.lane_b >= 0) & train_rows(rows_b.table))
    shared = np.intersect1d(lanes.lane_a[a], lanes.lane_b[b])
    a, b = a[np.isin(lanes.lane_a[a], shared)], b[np.isin(lanes.lane_b[b], shared)]
    if not a.size or not b.size:
        return Pieces.none()
    side_a = _Side.of(rows_a, a, lanes.lane_a, lanes.due_a)
    side_b = _Side.of(rows_b, b, lanes.lane_b, lanes.due_b)
    forth, back = _cut(side_a, side_b), _cut(side_b, side_a)
    return Pieces.concatenate([forth, _turned(back)])


@dataclass(slots=True)
class _Side:
    """One side's datagrams in the order of their lanes and of time."""

    table: PacketTable
    row: NDArray[np.int64]
    lane: NDArray[np.int64]
    due_ns: NDArray[np.int64]
    common: NDArray[np.bool_]
    length: NDArray[np.int64]

    @classmethod
    def of(
        cls, rows: Rows, chosen: NDArray[np.int64], lane: NDArray[np.int64], due_ns: NDArray[np.int64]
    ) -> _Side:
        chosen = chosen[np.lexsort((chosen, due_ns[chosen], lane[chosen]))]
        table = rows.table.take(chosen)
        return cls(
            table,
            chosen,
            lane[chosen],
            due_ns[chosen],
            rows.common[chosen],
            table.payload_length.astype(np.int64),
        )

    def beginnings(self) -> NDArray[np.uint64]:
        """Return keys that a train and its first datagram have in common."""
        said = np.where(self.table.content_length >= HEAD_BYTES, self.table.content_hash, np.uint64(0))
        word = mix(said ^ (self.table.ip_id.astype(np.uint64) + np.uint64(1)) * M1)
        return mix(word ^ (self.lane + 1).astype(np.uint64) * M1)


def _cut(large: _Side, small: _Side) -> Pieces:
    """Find the datagrams of one side that are pieces of the other side's."""
    whole, first = _anchors(large, small)
    if not whole.size:
        return Pieces.none()
    anchored = np.full(small.row.size, -1, np.int64)
    anchored[first] = whole
    # trains are numbered in the order of their first datagrams; every datagram has a latest one
    spots = np.flatnonzero(anchored >= 0)
    trains = anchored[spots]
    latest = np.cumsum(anchored >= 0) - 1
    place, certain = _places(large, small, spots, trains, latest)
    own, filled = _in_order(place[:, 0], latest)
    options, chosen = own.astype(np.int64), np.where(own, latest, -1)
    for back in range(1, 1 + _EARLIER):
        train = np.maximum(latest - back, 0)
        free = (place[:, back] > 0) & ~_contains(filled, train * _LONGEST + place[:, back])
        options += free
    taken = np.flatnonzero(own & (options == 1) & certain)
    left = np.setdiff1d(np.arange(small.row.size), taken)
    tied = np.setdiff1d(np.flatnonzero((options > 0) | (place[:, 0] >= 0)), taken)
    open_large = np.setdiff1d(np.arange(large.row.size), trains)
    near = _near(large, open_large, small, left, trains)
    train = trains[chosen[taken]]
    flags = np.full(taken.size, evidence.BYTE_RANGE | evidence.BINDING, np.uint16)
    numbered = (small.table.ip_id[taken] != 0) & (large.table.ip_id[train] != 0)
    flags |= numbered * np.uint16(evidence.IP_ID)
    said = (anchored[taken] >= 0) & (small.table.content_length[taken] >= HEAD_BYTES)
    flags |= said * np.uint16(evidence.PAYLOAD)
    flags |= evidence.kept_ends(large.table, train, small.table, taken)
    return Pieces(
        large.row[train], small.row[taken], small.length[taken], large.length[train], small.length[taken], flags,
        large.row[open_large[near]], small.row[np.union1d(tied, left[_near(small, left, large, open_large, first)])],
    )  # fmt: skip


def _places(
    large: _Side,
    small: _Side,
    spots: NDArray[np.int64],
    trains: NDArray[np.int64],
    latest: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each small datagram's position in its latest train and the _EARLIER before, -1 where it fits none.

    And whether it certainly is in the latest one. Where a datagram is missing, one of a later train whose first
    is missing too could stand in its place. So a train must be complete: all its datagrams one after the other,
    the last one shorter, or soon behind the others and right before the next train. Or the next large datagram is known to be the
    next one sent, and its first one was found: then what lies between is of this train.
    """
    size = small.length[spots]
    count = -(-large.length[trains] // size)
    rest = large.length[trains] - (count - 1) * size
    at = np.arange(small.row.size)
    place = np.full((at.size, 1 + _EARLIER), -1, np.int64)
    certain = np.zeros(at.size, np.bool_)
    complete = np.zeros(spots.size, np.bool_)
    for back in range(1 + _EARLIER):
        train = np.maximum(latest - back, 0)
        begin = spots[train]
        numbered = _is_numbered(small, begin)
        by_id = (small.table.ip_id - small.table.ip_id[begin]).astype(np.uint16).astype(np.int64)
        step = np.where(numbered, by_id, at - begin)
        fits = small.length == np.where(step == count[train] - 1, rest[train], size[train])
        fits &= (latest >= back) & (small.lane == small.lane[begin]) & (step > 0) & (step < count[train])
        fits &= small.due_ns - small.due_ns[begin] <= FAR_NS
        if back:
            fits &= numbered
            fits[spots] = False
        else:
            gapless = np.bincount(latest[fits & (step == at - begin)], minlength=spots.size)
            ends = _ends_lane(small, spots + count, spots)
            shorter = (rest < size) & numbered[spots]
            together = (rest < size) | _sent_together(small, spots, count)
            complete = (gapless == count - 1) & (shorter | ends) & together
            certain = complete[train] | (numbered & _continued(large, trains)[train] & (at - begin <= step))
        place[:, back] = np.where(fits, step, -1)
    place[spots, 0] = 0
    # without identifications a beginning says little: many protocols begin alike all the time
    certain[spots] = _is_numbered(small, spots) | complete
    return place, certain


def _sent_together(small: _Side, spots: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which trains' last datagram came soon behind the others, so that it is no later train's."""
    last = np.minimum(spots + count - 1, small.row.size - 1)
    span = small.due_ns[last] - small.due_ns[spots]
    before = small.due_ns[np.maximum(last - 1, spots)] - small.due_ns[spots]
    result: NDArray[np.bool_] = span <= np.maximum(count * _APART_NS, before * 2)
    return result


def _ends_lane(small: _Side, after: NDArray[np.int64], spots: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return behind which trains, all datagrams counted, the lane ends or the next train begins."""
    inside = np.minimum(after, small.row.size - 1)
    result: NDArray[np.bool_] = (after >= small.row.size) | (small.lane[inside] != small.lane[spots])
    return result | np.isin(after, spots)


def _continued(large: _Side, trains: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which trains are followed by that of the next datagram sent, by their identifications."""
    following = np.append(trains[1:], trains[-1:])
    result: NDArray[np.bool_] = large.lane[following] == large.lane[trains]
    result &= (large.table.ip_id[following] - large.table.ip_id[trains]).astype(np.uint16) == 1
    return result


def _is_numbered(small: _Side, begin: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether identifications tell positions: not over IPv6, nor where all that follow have the same one.

    Where nothing of the lane follows, nothing says so.
    """
    following = np.minimum(begin + 1, small.row.size - 1)
    result: NDArray[np.bool_] = (small.table.version[begin] == 4) & (following != begin)
    result &= small.lane[following] == small.lane[begin]
    result &= small.table.ip_id[following] != small.table.ip_id[begin]
    return result


def _near(
    own: _Side,
    chosen: NDArray[np.int64],
    other: _Side,
    others: NDArray[np.int64],
    lanes_of: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return which of the chosen datagrams have some other side's left over beside them, in a lane with trains."""
    apart = nearest_distance(own.lane[chosen], own.due_ns[chosen], other.lane[others], other.due_ns[others])
    known = own.lane[lanes_of] if lanes_of.size else np.empty(0, np.int64)
    result: NDArray[np.bool_] = (apart <= _BESIDE_NS) & np.isin(own.lane[chosen], known)
    return result


def _anchors(large: _Side, small: _Side) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (large datagrams, the first small ones that they were cut into)."""
    key_large, key_small = group_ids(large.beginnings(), small.beginnings())
    i, j = nearest_pairs(
        key_large, large.due_ns, key_small, small.due_ns,
        window_ns=FAR_NS, floor_ns=_FLOOR_NS, margin=MARGIN, rounds=1,
    )  # fmt: skip
    # what everybody says at the beginning is nobody's
    longer = ~(large.common[i] | small.common[j])
    longer &= (large.length[i] > small.length[j]) & (large.length[i] <= small.length[j] * _LONGEST)
    return i[longer], j[longer]


def _in_order(
    position: NDArray[np.int64], latest: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which datagrams follow their latest train's first one at rising positions, and the places they take.

    A place is train * _LONGEST + position; places come sorted.
    """
    own = position >= 0
    code = latest * _LONGEST + position
    highest = np.full(position.size, -1, np.int64)
    highest[1:] = np.maximum.accumulate(np.where(own, code, -1))[:-1]
    own = own & (code > highest)
    return own, code[own]


def _contains(places: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    spot = np.minimum(np.searchsorted(places, wanted), places.size - 1)
    result: NDArray[np.bool_] = places[spot] == wanted
    return result


def _turned(pieces: Pieces) -> Pieces:
    """Return the pieces with both sides exchanged."""
    return Pieces(
        pieces.b, pieces.a, pieces.shared_bytes, pieces.whole_b, pieces.whole_a, pieces.flags,
        pieces.tied_b, pieces.tied_a,
    )  # fmt: skip

"""Trains: a large UDP datagram that segmentation offload cut into datagrams of one size, or merged from them.

UDP_SEGMENT hands one datagram to the kernel, which leaves as many: all of one size but for the last, in order,
their IP identifications counting up from the large one's (kernel: __udp_gso_segment, inet_gso_segment). The next
large datagram's identification is only one higher, so those of two trains overlap: what a datagram says at its
beginning finds the first of a train, then order, length and identification the others. Receive offload merges
them again (kernel: udp_gro_receive). This module never decides where two trains could have sent a datagram.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.lookup import contains
from nattrace.match import evidence
from nattrace.match.keys import M1, mix
from nattrace.match.pairing import group_ids, nearest_distance, nearest_pairs, nearest_row
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
    from nattrace.match.usual import Usual
    from nattrace.table import PacketTable

#: Datagrams of one train at most (linux/udp.h: UDP_MAX_SEGMENTS).
LONGEST_TRAIN = 128
#: Trains before the latest that a datagram may still belong to: reordering on one host reaches no further.
_EARLIER = 3
_FLOOR_NS = 1_000
#: A pause shorter than this may be one inside a train: up to 23 us were measured behind the first one.
_PAUSE_NS = 25_000
#: Datagrams of one train leave in one loop, and over a link of 250 Mbit/s no further apart than this.
TRAIN_GAP_NS = 50_000
#: What is left over on both sides of a lane with trains, this close, may belong together.
_BESIDE_NS = 10_000_000


def train_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets may be part of a train, or one."""
    rows: NDArray[np.bool_] = (table.protocol == UDP) & (table.payload_length > 0) & ~fragment_rows(table)
    return rows


def match_trains(rows_a: Rows, rows_b: Rows, lanes: Lanes, usual: Usual) -> Pieces:
    """Return pairs of a large datagram and one of those it was cut into, whichever side has which; and what is tied.

    Rows without a lane are left alone.
    """
    sides = _sides(rows_a, rows_b, lanes)
    if sides is None:
        return Pieces.none()
    near_ns = usual.reach_ns()
    forth = _cut(*sides, near_ns)
    if forth.a.size:
        sides = _sides(rows_a, rows_b, lanes.without(forth.a, forth.b))
    back = Pieces.none() if sides is None else _turned(_cut(*sides[::-1], near_ns))
    found = Pieces.concatenate([forth, back])
    return replace(
        found, tied_a=np.setdiff1d(found.tied_a, found.a), tied_b=np.setdiff1d(found.tied_b, found.b)
    )


def _sides(rows_a: Rows, rows_b: Rows, lanes: Lanes) -> tuple[_Side, _Side] | None:
    """Return the datagrams of both sides in the lanes that both have; None where there are none."""
    a = np.flatnonzero((lanes.lane_a >= 0) & train_rows(rows_a.table))
    b = np.flatnonzero((lanes.lane_b >= 0) & train_rows(rows_b.table))
    shared = np.intersect1d(lanes.lane_a[a], lanes.lane_b[b])
    if not shared.size:
        return None
    a, b = a[np.isin(lanes.lane_a[a], shared)], b[np.isin(lanes.lane_b[b], shared)]
    return _Side.of(rows_a, a, lanes.lane_a, lanes.due_a), _Side.of(rows_b, b, lanes.lane_b, lanes.due_b)


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

    def beginnings(self, *, numbered: bool = True) -> NDArray[np.uint64]:
        """Return keys that a train and its first datagram have in common, with or without their identification."""
        said = np.where(self.table.content_length >= HEAD_BYTES, self.table.content_hash, np.uint64(0))
        if numbered:
            said ^= (self.table.ip_id.astype(np.uint64) + np.uint64(1)) * M1
        word = mix(said)
        return mix(word ^ (self.lane + 1).astype(np.uint64) * M1)


def _cut(large: _Side, small: _Side, near_ns: int | None) -> Pieces:
    """Find the datagrams of one side that are pieces of the other side's.

    `near_ns` is how far apart those may be that only nearness tells.
    """
    starts = _starts(small)
    whole, first, alike = _anchors(large, small, starts, near_ns or 0)
    lanes = np.union1d(large.lane[whole], _lanes_alike(large, small))
    if not lanes.size:
        return Pieces.none()
    anchored = np.full(small.row.size, -1, np.int64)
    anchored[first] = whole
    # trains are numbered in the order of their first datagrams; every datagram has a latest one
    spots = np.flatnonzero(anchored >= 0)
    trains = anchored[spots]
    taken = chosen = tied = np.empty(0, np.int64)
    if spots.size:
        constant = np.isin(spots, first[alike])
        taken, chosen, tied = _decide(large, small, spots, trains, starts, constant)
    left = np.setdiff1d(np.arange(small.row.size), taken)
    open_large = np.setdiff1d(np.arange(large.row.size), trains[np.unique(chosen)])
    train = trains[chosen]
    flags = np.full(taken.size, evidence.BYTE_RANGE | evidence.BINDING, np.uint16)
    numbered = (small.table.ip_id[taken] != 0) & (large.table.ip_id[train] != 0)
    flags |= numbered * np.uint16(evidence.IP_ID)
    said = (anchored[taken] >= 0) & (small.table.content_length[taken] >= HEAD_BYTES)
    flags |= said * np.uint16(evidence.PAYLOAD)
    flags |= evidence.kept_ends(large.table, train, small.table, taken)
    return Pieces(
        large.row[train], small.row[taken], small.length[taken], large.length[train], small.length[taken], flags,
        large.row[open_large[_near(large, open_large, small, left, lanes)]],
        small.row[np.union1d(tied, left[_near(small, left, large, open_large, lanes)])],
    )  # fmt: skip


def _decide(
    large: _Side,
    small: _Side,
    spots: NDArray[np.int64],
    trains: NDArray[np.int64],
    starts: NDArray[np.bool_],
    constant: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (small datagrams, the trains that they are of), and the small ones that may be of a train."""
    latest = np.cumsum(np.isin(np.arange(small.row.size), spots)) - 1
    place, certain = _places(large, small, spots, trains, latest, starts, constant)
    own, filled = _in_order(place[:, 0], latest)
    options = own.astype(np.int64)
    for back in range(1, 1 + _EARLIER):
        train = np.maximum(latest - back, 0)
        options += (place[:, back] > 0) & ~contains(filled, train * LONGEST_TRAIN + place[:, back])
    taken = np.flatnonzero(own & (options == 1) & certain)
    tied = np.setdiff1d(np.flatnonzero((options > 0) | (place[:, 0] >= 0)), taken)
    return taken, latest[taken], tied


def _places(
    large: _Side,
    small: _Side,
    spots: NDArray[np.int64],
    trains: NDArray[np.int64],
    latest: NDArray[np.int64],
    starts: NDArray[np.bool_],
    constant: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each small datagram's position in its latest train and the _EARLIER before, -1 where it fits none.

    And whether it certainly is in the latest one. Where a datagram is missing, one of a later train whose first
    is missing too could stand in its place. So a train must be complete: all its datagrams one after the other,
    the last one shorter, or soon behind the others and right before the next train. Or the next large datagram is
    known to be the next one sent, and its first one was found: then what lies between is of this train. Trains whose
    datagrams begin alike (`constant`) are taken complete only, and these and what is not numbered only with nothing
    that starts anew inside (`starts`).
    """
    size = small.length[spots]
    count = -(-large.length[trains] // size)
    rest = large.length[trains] - (count - 1) * size
    said = small.table.content_hash
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
        fits &= ~constant[train] | (step == count[train] - 1) | (said == said[begin])
        if back:
            fits &= numbered
            fits[spots] = False
        else:
            gapless = np.bincount(latest[fits & (step == at - begin)], minlength=spots.size)
            shorter = (rest < size) & numbered[spots]
            together = (rest < size) | _sent_together(small, spots, count)
            complete = (gapless == count - 1) & (shorter | _begins(spots + count, starts, spots)) & together
            follows = np.append(False, (gapless == count - 1)[:-1] & (spots[:-1] + count[:-1] == spots[1:]))
            complete &= numbered[spots] | starts[spots] | follows
            begun = np.append(0, np.cumsum(starts))
            anew = begun[np.minimum(spots + count, at.size)] - begun[np.minimum(spots + 1, at.size)]
            complete &= (anew == 0) | (numbered[spots] & ~constant)
            continued = numbered & _continued(large, trains)[train] & (at - begin <= step)
            certain = complete[train] | (continued & ~constant[train])
        place[:, back] = np.where(fits, step, -1)
    place[spots, 0] = 0
    # without identifications a beginning says little: many protocols begin alike all the time
    certain[spots] = (_is_numbered(small, spots) & ~constant) | complete
    return place, certain


def _sent_together(small: _Side, spots: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which trains' last datagram came soon behind the others, so that it is no later train's."""
    last = np.minimum(spots + count - 1, small.row.size - 1)
    span = small.due_ns[last] - small.due_ns[spots]
    before = small.due_ns[np.maximum(last - 1, spots)] - small.due_ns[spots]
    result: NDArray[np.bool_] = span <= np.maximum(count * TRAIN_GAP_NS, before * 2)
    return result


def _begins(
    after: NDArray[np.int64], starts: NDArray[np.bool_], spots: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return at which places something else begins: a lane, a train, whatever comes after a pause, or nothing."""
    behind = after >= starts.size
    result: NDArray[np.bool_] = behind | starts[np.where(behind, 0, after)] | np.isin(after, spots)
    return result


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
    lanes: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return which of the chosen datagrams have some other side's left over beside them, in one of the lanes."""
    apart = nearest_distance(own.lane[chosen], own.due_ns[chosen], other.lane[others], other.due_ns[others])
    result: NDArray[np.bool_] = (apart <= _BESIDE_NS) & np.isin(own.lane[chosen], lanes)
    return result


def _starts(small: _Side) -> NDArray[np.bool_]:
    """Return which datagrams start a train, by the pause before them or by their numbers.

    A pause is many times longer than the shortest one of the lane, which is that inside trains.
    """
    gap = np.append(0, np.diff(small.due_ns))
    begins = np.append(True, small.lane[1:] != small.lane[:-1])[: gap.size]
    lane = np.cumsum(begins) - 1
    shortest = np.full(int(begins.sum()), 2**62)
    np.minimum.at(shortest, lane[~begins], gap[~begins])
    step = np.append(0, np.diff(small.table.ip_id.astype(np.int64))) % 65536
    # nothing pauses before the first; a lane of one has no pauses
    pause = gap // MARGIN >= np.maximum(shortest[lane], _PAUSE_NS // MARGIN)
    result: NDArray[np.bool_] = begins | pause | (step > 1)
    return result


def _lanes_alike(large: _Side, small: _Side) -> NDArray[np.int64]:
    """Return the lanes in which datagrams of one side begin, close in time, like longer ones of the other side."""
    key_large, key_small = group_ids(large.beginnings(numbered=False), small.beginnings(numbered=False))
    i, j = (
        np.flatnonzero(large.table.content_length >= HEAD_BYTES),
        np.flatnonzero(small.table.content_length >= HEAD_BYTES),
    )
    if not i.size or not j.size:
        return np.empty(0, np.int64)
    shortest = np.full(int(max(key_large.max(), key_small.max())) + 1, 2**31)
    np.minimum.at(shortest, key_small[j], small.length[j])
    i = i[large.length[i] > shortest[key_large[i]]]
    apart = nearest_distance(key_large[i], large.due_ns[i], key_small[j], small.due_ns[j])
    return np.unique(large.lane[i[apart <= _BESIDE_NS]])


def _anchors(
    large: _Side, small: _Side, starts: NDArray[np.bool_], near_ns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return (large datagrams, the first small ones that they were cut into), and where others begin like these.

    What everybody says at the beginning, or the next datagram as well, is nobody's, but for the first one after a
    pause, about as far as usual.
    """
    key_large, key_small = group_ids(large.beginnings(), small.beginnings())
    found = []
    for ones, window_ns in ((np.arange(small.row.size), FAR_NS), (np.flatnonzero(starts), near_ns)):
        i, j = nearest_pairs(
            key_large, large.due_ns, key_small[ones], small.due_ns[ones],
            window_ns=window_ns, floor_ns=_FLOOR_NS, margin=MARGIN, rounds=1,
        )  # fmt: skip
        j = ones[j]
        longer = (large.length[i] > small.length[j]) & (large.length[i] <= small.length[j] * LONGEST_TRAIN)
        found.append((i[longer], j[longer]))
    (i, j), (start_i, start_j) = found
    # what begins a burst is no beginning of this one when another burst has one like it, and nearer
    burst = np.cumsum(starts)
    near = nearest_row(key_large[start_i], large.due_ns[start_i], key_small, small.due_ns)
    own = burst[near] == burst[start_j]
    start_i, start_j = start_i[own], start_j[own]
    own = ~(large.common[i] | small.common[j])
    i, j = i[own], j[own]
    alike = ~np.isin(start_i, i) & ~np.isin(start_j, j)
    whole, first = np.concatenate([i, start_i[alike]]), np.concatenate([j, start_j[alike]])
    return whole, first, np.arange(whole.size) >= i.size


def _in_order(
    position: NDArray[np.int64], latest: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which datagrams follow their latest train's first one at rising positions, and the places they take.

    A place is train * LONGEST_TRAIN + position; places come sorted.
    """
    own = position >= 0
    code = latest * LONGEST_TRAIN + position
    highest = np.full(position.size, -1, np.int64)
    highest[1:] = np.maximum.accumulate(np.where(own, code, -1))[:-1]
    own = own & (code > highest)
    return own, code[own]


def _turned(pieces: Pieces) -> Pieces:
    """Return the pieces with both sides exchanged."""
    return Pieces(
        pieces.b, pieces.a, pieces.shared_bytes, pieces.whole_b, pieces.whole_a, pieces.flags,
        pieces.tied_b, pieces.tied_a,
    )  # fmt: skip

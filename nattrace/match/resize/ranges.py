"""Ranges: byte ranges of two sides that overlap, and which overlaps exclude each other.

Pure array code: what a range means (TCP data, a part of a datagram), which overlaps can be one packet, and how
well they agree is said by the caller. Nothing here looks at packets. All ranges are half open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

#: Ranges of the other side that one range may overlap: a super-frame of 512 KiB (Linux BIG TCP) has 978
#: segments of 536 bytes (RFC 9293 section 3.7.1). What overlaps more is not one packet.
PIECES_LIMIT = 1_024
#: Overlaps looked at for every range given, on average: 1 or 2 without retransmissions. It bounds memory.
_OVERLAPS_EACH = 8

#: A cost that nothing has.
_FAR = 2**62


@dataclass(slots=True)
class Ranges:
    """Byte ranges, one row each; ranges of different groups never overlap."""

    group: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    def take(self, rows: NDArray[Any]) -> Ranges:
        """Return the given rows."""
        return Ranges(self.group[rows], self.start[rows], self.stop[rows])


def overlapping(
    first: Ranges, second: Ranges
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return index pairs (i, j) of ranges of one group that overlap, ascending in i, and the i left out.

    Left out is a range with more than PIECES_LIMIT overlaps, and those with most where there are too many in
    all: traffic that repeats the same bytes again and again, which no pair of ranges can tell apart.
    """
    none = np.empty(0, np.int64)
    if not first.group.size or not second.group.size:
        return none, none, none
    base = _bases(first, second)
    first_base = base[first.group]
    start, stop = second.start + base[second.group], second.stop + base[second.group]
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    low = np.searchsorted(reach, first.start + first_base, "right")
    count = np.maximum(np.searchsorted(start, first.stop + first_base, "left") - low, 0)
    allowed = count <= PIECES_LIMIT
    budget = _OVERLAPS_EACH * (first.group.size + second.group.size)
    if int(count[allowed].sum()) > budget:
        by_count = np.argsort(np.where(allowed, count, _FAR), kind="stable")
        allowed[by_count] &= np.cumsum(np.where(allowed, count, 0)[by_count]) <= budget
    left_out = np.flatnonzero(~allowed & (count > 0))
    count[~allowed] = 0
    i = np.repeat(np.arange(count.size), count)
    j = order[np.arange(i.size) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)]
    # the furthest reach of what comes before says nothing of each range before
    real = second.stop[j] > first.start[i]
    return i[real], j[real], left_out


def _bases(first: Ranges, second: Ranges) -> NDArray[np.int64]:
    """Return for each group a number to add to its ranges, so that groups follow each other on one line."""
    group = np.concatenate([first.group, second.group])
    low = np.full(int(group.max()) + 1, _FAR, np.int64)
    high = np.full(low.size, -_FAR, np.int64)
    np.minimum.at(low, group, np.concatenate([first.start, second.start]))
    np.maximum.at(high, group, np.concatenate([first.stop, second.stop]))
    size = np.maximum(high - low, 0) + 1
    size[high < low] = 0
    base: NDArray[np.int64] = np.cumsum(size) - size - low
    return base


def decide(
    i: NDArray[np.int64],
    j: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    cost: NDArray[np.int64],
    *,
    floor: int,
    margin: int,
    rounds: int,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which of the overlaps (i, j) are taken and which stay contested; the others gave way.

    Two overlaps are rivals when they are of one range and share bytes (`start` to `stop`): a byte of a packet
    is in one packet only on the other side. An overlap without a rival is taken; one with rivals when the
    cheapest of them costs at least `margin` times as much, where a cost below `floor` counts as `floor`.
    """
    taken = np.zeros(i.size, np.bool_)
    if not i.size:
        return taken, taken.copy()
    p: list[NDArray[np.int64]] = []
    q: list[NDArray[np.int64]] = []
    crowded = np.zeros(i.size, np.bool_)
    for owner in (i, j):
        ranges = Ranges(np.unique(owner, return_inverse=True)[1].reshape(-1).astype(np.int64), start, stop)
        one, other, left_out = overlapping(ranges, ranges)
        different = one != other
        p.append(one[different])
        q.append(other[different])
        crowded[left_out] = True
    rival, against = np.concatenate(p), np.concatenate(q)
    standing = ~crowded
    # who has too many rivals to look at is nobody's match, and nobody's who shares its bytes either
    standing[rival[crowded[against]]] = False
    contested = ~standing
    for _ in range(rounds):
        live = standing[rival] & standing[against]
        runner_up = np.full(i.size, _FAR, np.int64)
        np.minimum.at(runner_up, rival[live], cost[against[live]])
        clear = standing & ~taken
        clear &= (runner_up == _FAR) | (runner_up // margin >= np.maximum(cost, floor))
        if not clear.any():
            break
        taken |= clear
        standing[against[taken[rival] & ~taken[against]]] = False
    return taken, (standing & ~taken) | contested

"""Pairing: equal keys by sorting, nearest neighbours in time. Pure array code without any policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: A distance in time that nothing has.
_FAR = 2**62


def unique_pairs(
    keys_a: NDArray[np.uint64], keys_b: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return index pairs (a, b) whose key occurs exactly once on either side, ascending in a.

    One sort of packed values (key bits, side, index) is several times faster than an argsort, because the
    index rides in the low bits. A key shortened by that may make two keys look equal; such rows are simply
    not returned (they stay for a later, smaller round), and every returned pair has equal full keys.
    """
    rows = max(keys_a.size, keys_b.size, 2)
    if not keys_a.size or not keys_b.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    bits = int(rows - 1).bit_length()
    low = np.uint64((1 << (bits + 1)) - 1)
    index_mask = np.uint64((1 << bits) - 1)
    side = np.uint64(1 << bits)
    packed = np.empty(keys_a.size + keys_b.size, np.uint64)
    np.bitwise_and(keys_a, ~low, out=packed[: keys_a.size])
    packed[: keys_a.size] |= np.arange(keys_a.size, dtype=np.uint64)
    np.bitwise_and(keys_b, ~low, out=packed[keys_a.size :])
    packed[keys_a.size :] |= np.arange(keys_b.size, dtype=np.uint64) | side
    packed.sort()
    # neighbours that differ in no bit of the key, and of these such as are of different sides
    apart = packed[1:] ^ packed[:-1]
    alike = apart <= low
    pair = alike & (apart >= side)
    # exactly two of one key: neither neighbour has a third one beside it
    pair[1:] &= ~alike[:-1]
    pair[:-1] &= ~alike[1:]
    first = np.flatnonzero(pair)
    a = (packed[first] & index_mask).view(np.int64)
    b = (packed[first + 1] & index_mask).view(np.int64)
    # by scatter, not by sort: later gathers are then nearly sequential in both tables
    partner = np.full(keys_a.size, -1, np.int64)
    partner[a] = b
    a = np.flatnonzero(partner >= 0)
    b = partner[a]
    same = keys_a[a] == keys_b[b]
    return (a, b) if same.all() else (a[same], b[same])


def group_ids(*keys: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return dense ids, shared between the arrays: equal key, equal id."""
    _, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    inverse = inverse.reshape(-1)
    edges = np.cumsum([k.size for k in keys])[:-1]
    return [part.astype(np.int64) for part in np.split(inverse, edges)]


def same_ranks(
    group_a: NDArray[np.int64],
    time_a: NDArray[np.int64],
    group_b: NDArray[np.int64],
    time_b: NDArray[np.int64],
    *,
    pause_ns: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs (a, b) of the first in a burst with the first, the second with the second, and so on.

    A burst are rows of one group, of both sides together, that follow each other within less than `pause_ns`.
    Only bursts with as many rows on either side count, so that none need be missing.
    """
    time = np.concatenate([time_a, time_b])
    group = np.concatenate([group_a, group_b])
    order = np.lexsort((time, group))
    new = np.diff(group[order], prepend=-1) != 0
    new[1:] |= np.diff(time[order]) >= pause_ns
    burst = np.cumsum(new)
    first = order < time_a.size  # rows of the first side, in this order
    in_a, in_b = burst[first], burst[~first]
    bursts = int(burst[-1]) + 1 if burst.size else 0
    even = np.bincount(in_a, minlength=bursts) == np.bincount(in_b, minlength=bursts)
    return order[first][even[in_a]], order[~first][even[in_b]] - time_a.size


def _in_one(
    group_a: NDArray[np.int64],
    time_a: NDArray[np.int64],
    group_b: NDArray[np.int64],
    time_b: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one number for each (group, time) of either side, which sorts as the two do; groups are dense ids."""
    time = np.concatenate([time_a, time_b])
    group = np.concatenate([group_a, group_b])
    if not time.size:
        return group_a, group_b
    first, last = int(time.min()), int(time.max())
    if int(group.max()).bit_length() + (last - first).bit_length() > 63:
        time = np.unique(time, return_inverse=True)[1].reshape(-1)
        first, last = 0, time.size
    one = group << (last - first).bit_length() | (time - first)
    return one[: time_a.size], one[time_a.size :]


def _neighbours(
    group: NDArray[np.int64],
    time: NDArray[np.int64],
    other_group: NDArray[np.int64],
    other_time: NDArray[np.int64],
    far: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For rows sorted by (group, time): nearest row of the other side, its distance, the runner-up's distance.

    Nearest is -1 and a distance `far` where the group has no such row.
    """
    position = np.searchsorted(*_in_one(other_group, other_time, group, time), "right")
    best = np.full(time.size, far, np.int64)
    second = np.full(time.size, far, np.int64)
    nearest = np.full(time.size, -1, np.int64)
    for step in (-1, 0, -2, 1):
        candidate = position + step
        inside = (candidate >= 0) & (candidate < other_time.size)
        candidate = np.clip(candidate, 0, max(other_time.size - 1, 0))
        inside &= other_group[candidate] == group
        distance = np.where(inside, np.abs(other_time[candidate] - time), far)
        closer = distance < best
        second = np.where(closer, best, np.minimum(second, distance))
        nearest = np.where(closer, candidate, nearest)
        best = np.where(closer, distance, best)
    return nearest, best, second


def nearest_distance(
    group: NDArray[np.int64],
    time: NDArray[np.int64],
    other_group: NDArray[np.int64],
    other_time: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return how far in time the nearest row of the other side with the same group is; 2**62 where none is."""
    return _nearest(group, time, other_group, other_time)[1]


def nearest_row(
    group: NDArray[np.int64],
    time: NDArray[np.int64],
    other_group: NDArray[np.int64],
    other_time: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return which row of the other side with the same group is nearest in time; -1 where there is none."""
    return _nearest(group, time, other_group, other_time)[0]


def _nearest(
    group: NDArray[np.int64],
    time: NDArray[np.int64],
    other_group: NDArray[np.int64],
    other_time: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows, other = np.lexsort((time, group)), np.lexsort((other_time, other_group))
    nearest, distance = np.full(time.size, -1, np.int64), np.full(time.size, _FAR, np.int64)
    if rows.size and other.size:
        found, distance[rows], _ = _neighbours(
            group[rows], time[rows], other_group[other], other_time[other], _FAR
        )
        nearest[rows] = np.where(found >= 0, other[np.maximum(found, 0)], -1)
    return nearest, distance


def nearest_pairs(
    group_a: NDArray[np.int64],
    time_a: NDArray[np.int64],
    group_b: NDArray[np.int64],
    time_b: NDArray[np.int64],
    *,
    window_ns: int,
    floor_ns: int,
    margin: int,
    rounds: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs (a, b) of one group that are each other's nearest in time, and clearly so.

    Clearly: the runner-up on either side is at least `margin` times further away than the pair is apart,
    where a pair closer than `floor_ns` counts as `floor_ns` apart (what the path's own jitter can do). A
    tie is never broken. No pair is further apart than `window_ns`. With more than one round, a packet
    whose rival has found its own partner gets another chance.
    """
    far = np.int64(_FAR)
    rows_a = np.lexsort((time_a, group_a))
    rows_b = np.lexsort((time_b, group_b))
    found_a: list[NDArray[np.int64]] = []
    found_b: list[NDArray[np.int64]] = []
    for _ in range(rounds):
        if not rows_a.size or not rows_b.size:
            break
        ga, ta, gb, tb = group_a[rows_a], time_a[rows_a], group_b[rows_b], time_b[rows_b]
        near_a, best_a, second_a = _neighbours(ga, ta, gb, tb, int(far))
        near_b, _, second_b = _neighbours(gb, tb, ga, ta, int(far))
        own = np.arange(rows_a.size)
        safe = np.maximum(near_a, 0)
        runner_up = np.minimum(second_a, second_b[safe])
        limit = np.maximum(best_a, floor_ns)
        clear = (near_a >= 0) & (near_b[safe] == own) & (best_a <= window_ns)
        clear &= runner_up // margin >= limit
        if not clear.any():
            break
        taken_b = np.zeros(rows_b.size, np.bool_)
        taken_b[near_a[clear]] = True
        found_a.append(rows_a[clear])
        found_b.append(rows_b[near_a[clear]])
        rows_a, rows_b = rows_a[~clear], rows_b[~taken_b]
    if not found_a:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    a = np.concatenate(found_a)
    order = np.argsort(a, kind="stable")
    return a[order], np.concatenate(found_b)[order]

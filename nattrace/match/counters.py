"""Counters: IP identifications that agree although no packet is the same, because both sides count.

A host or a box that numbers what it sends makes a run of identifications. Where two runs overlap by chance, and the
packets say nothing of their own (keep-alives), every packet of one flow finds its number in another flow, a few
packets earlier or later. What gives that away are nearer packets that say the same. This module only looks at pairs
that others found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.pairing import group_ids, nearest_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows

#: Of the pairs of two flows, so many must be each other's nearest in time among packets that say the same.
_NEAREST_SHARE = 0.5
#: What is no further apart than two taps of one host (7 to 66 us were measured) counts as nearest.
_HOST_NS = 66_000
#: Where so few pairs are not nearest, no counters overlap: packets that met their own are then nobody's rivals, and a
#: packet that was held up (the first one of a flow, on a busy host) may be further from its own than from those.
_LATE_SHARE = 0.1
#: Identifications that go up by no more are a counter's.
_COUNTED_STEP = 256
#: So many pairs of two flows do not share identifications by chance, unless these count.
_FEW_PAIRS = 4


def by_chance(rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which pairs (row a[n] of one side, b[n] of the other) agree by chance in their identifications.

    Looked at are those that have one and say what others on their side say.
    """
    result = np.zeros(a.size, np.bool_)
    ip_id = rows_a.table.ip_id[a]
    asked = np.flatnonzero((ip_id != 0) & (ip_id == rows_b.table.ip_id[b]))
    if asked.size:
        asked = asked[_repeats(rows_a, a[asked]) | _repeats(rows_b, b[asked])]
    if asked.size:
        result[asked] = _are_chance(rows_a, a[asked], rows_b, b[asked])
    return result


def _repeats(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen rows say what others say, but for their identification."""
    keys = np.sort(rows.content)
    own = rows.content[chosen]
    result: NDArray[np.bool_] = np.searchsorted(keys, own, "right") - np.searchsorted(keys, own, "left") > 1
    return result


def _are_chance(rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64]) -> NDArray[np.bool_]:
    time_a, time_b = rows_a.table.time_ns, rows_b.table.time_ns
    lane_a = rows_a.flow[a] << 1 | rows_a.backward[a]
    lane_b = rows_b.flow[b] << 1 | rows_b.backward[b]
    _, binding, pairs = np.unique(lane_a << 32 | lane_b, return_inverse=True, return_counts=True)
    binding = binding.reshape(-1)
    counting = counts_up(binding, time_a[a], rows_a.table.ip_id[a])
    group_a, group_b = group_ids(rows_a.content, rows_b.content)
    left_a, left_b = np.ones(len(rows_a), np.bool_), np.ones(len(rows_b), np.bool_)

    def are_near(asked: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of the asked pairs are nearest among the packets left that say the same."""
        apart = np.abs(time_b[b[asked]] - time_a[a[asked]])
        ahead = nearest_distance(group_a[a[asked]], time_a[a[asked]], group_b[left_b], time_b[left_b])
        back = nearest_distance(group_b[b[asked]], time_b[b[asked]], group_a[left_a], time_a[left_a])
        result: NDArray[np.bool_] = apart <= np.maximum(np.minimum(ahead, back), _HOST_NS)
        return result

    nearest = are_near(np.arange(a.size))
    near = np.bincount(binding[nearest], minlength=pairs.size) >= _NEAREST_SHARE * pairs
    met = nearest & near[binding]
    late = np.flatnonzero(~met)
    if late.size and late.size <= _LATE_SHARE * a.size:
        left_a[a[met]] = left_b[b[met]] = False
        nearest[late] = are_near(late)
        near = np.bincount(binding[nearest], minlength=pairs.size) >= _NEAREST_SHARE * pairs
    result: NDArray[np.bool_] = ~(near | (pairs >= _FEW_PAIRS))[binding] | (counting & ~near[binding])
    return result


def counts_up(
    group: NDArray[np.int64], time_ns: NDArray[np.int64], ip_id: NDArray[np.uint32]
) -> NDArray[np.bool_]:
    """Return which packets are of a group (numbered from 0) whose identifications mostly go up by little."""
    order = np.lexsort((time_ns, group))
    following = group[order][1:]
    numbers = ip_id[order].astype(np.int64)
    step = (numbers[1:] - numbers[:-1]) % 65536
    little = (following == group[order][:-1]) & (step <= _COUNTED_STEP)
    size = np.bincount(group)
    result: NDArray[np.bool_] = (2 * np.bincount(following[little], minlength=size.size) >= size - 1)[group]
    return result

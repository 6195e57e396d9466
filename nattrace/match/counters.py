"""Counters: IP identifications that agree although no packet is the same, because both sides count.

A host or a box that numbers what it sends makes a run of identifications. Where two runs overlap by chance, and the
packets say nothing of their own (keep-alives), every packet of one flow finds its number in another flow, a few
packets earlier or later. What gives that away are nearer packets that say the same, and packets that would have
gone backwards. This module only looks at pairs that others found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.lookup import occurrences
from nattrace.match.rivals import HOST_NS, Rivals

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows

#: Of the pairs of two flows, so many must be each other's nearest in time among packets that say the same.
_NEAREST_SHARE = 0.5
#: Two taps of one clock, or two clocks corrected, may disagree by so much about which saw a packet first.
_SKEW_NS = 10_000
#: Identifications that go up by no more are a counter's.
_COUNTED_STEP = 256
#: So many pairs of two flows do not share identifications by chance, unless these count. So many pairs that say
#: something of their own show that identifications are kept.
_FEW_PAIRS = 4
#: And so many times as many as chance would have it, where they are drawn at random.
_ABOVE_CHANCE = 8
#: Where so few pairs are not nearest, no counters overlap: packets that met their own are then nobody's rivals, and a
#: packet that was held up (the first one of a flow, on a busy host) may be further from its own than from those.
_LATE_SHARE = 0.1


def by_chance(
    rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64], *, kept: bool = False
) -> NDArray[np.bool_]:
    """Return which pairs (row a[n] of one side, b[n] of the other) agree by chance in their identifications.

    Looked at are those that have one and rivals. The rest, if there is some, shows that nothing between the points
    writes identifications of its own; `kept` where others have shown it.
    """
    result = np.zeros(a.size, np.bool_)
    ip_id = rows_a.table.ip_id[a]
    numbered = np.flatnonzero((ip_id != 0) & (ip_id == rows_b.table.ip_id[b]))
    if not numbered.size:
        return result
    # most pairs say something of their own, whatever their ends
    asked = numbered[_repeats(rows_a, a[numbered]) | _repeats(rows_b, b[numbered])]
    if asked.size:
        rivals = Rivals.of(rows_a, a[asked], rows_b, b[asked])
        asked, rivals = asked[rivals.several], rivals.take(rivals.several)
        kept |= numbered.size - asked.size >= _FEW_PAIRS or _drawn(rows_a, a[asked], rivals)
        result[asked] = _are_chance(rows_a, a[asked], rows_b, b[asked], rivals, kept=kept)
    return result


def _repeats(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen rows say what others say, but for their identification."""
    keys = np.sort(rows.content)
    return occurrences(keys, rows.content[chosen]) > 1


def _drawn(rows_a: Rows, a: NDArray[np.int64], rivals: Rivals) -> bool:
    """Say whether pairs have identifications drawn at random, and are too many to share them by chance."""
    if a.size < _FEW_PAIRS:
        return False
    counting = counts_up(np.zeros(a.size, np.int64), rows_a.table.time_ns[a], rows_a.table.ip_id[a])
    return not counting[0] and a.size >= _ABOVE_CHANCE * float(rivals.pairings.sum()) / 65536


def _are_chance(
    rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64], rivals: Rivals, *, kept: bool
) -> NDArray[np.bool_]:
    """Return which pairs agree by chance; `kept` where identifications are known to be."""
    lane_a = rows_a.flow[a] << 1 | rows_a.backward[a]
    lane_b = rows_b.flow[b] << 1 | rows_b.backward[b]
    _, binding, pairs = np.unique(lane_a << 32 | lane_b, return_inverse=True, return_counts=True)
    binding = binding.reshape(-1)
    counting = counts_up(binding, rows_a.table.time_ns[a], rows_a.table.ip_id[a])
    nearest, near = _near(rows_a, a, rows_b, b, rivals, binding, pairs, kept=kept)
    met = nearest & near[binding]
    late = np.flatnonzero(~met)
    if late.size and late.size <= _LATE_SHARE * a.size:
        left_a, left_b = np.ones(len(rows_a), np.bool_), np.ones(len(rows_b), np.bool_)
        left_a[a[met]] = left_b[b[met]] = False
        again = Rivals.of(rows_a, a[late], rows_b, b[late], left_a, left_b)
        rivals.nearest[late], rivals.clear[late] = again.nearest, again.clear
        _, near = _near(rows_a, a, rows_b, b, rivals, binding, pairs, kept=kept)
    result: NDArray[np.bool_] = ~(near | (pairs >= _FEW_PAIRS))[binding] | (counting & ~near[binding])
    return result


def _near(
    rows_a: Rows,
    a: NDArray[np.int64],
    rows_b: Rows,
    b: NDArray[np.int64],
    rivals: Rivals,
    binding: NDArray[np.int64],
    pairs: NDArray[np.int64],
    *,
    kept: bool,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pairs time speaks for, and of which bindings enough of them; `pairs` says how many each has."""
    delta = rows_b.table.time_ns[b] - rows_a.table.time_ns[a]
    nearest, soon = rivals.nearest, np.abs(delta) <= HOST_NS
    if not kept:
        # a packet goes the way that its TTL falls; the lag of a counter behind another one knows no way
        onward = np.sign(rows_a.table.ttl[a].astype(np.int64) - rows_b.table.ttl[b]) * np.sign(delta)
        nearest = nearest & ((onward >= 0) | (np.abs(delta) <= _SKEW_NS))
        soon &= onward > 0
    nearest = nearest | soon
    near = np.bincount(binding[nearest], minlength=pairs.size) >= _NEAREST_SHARE * pairs
    if not kept:
        # what lost its own twin is the nearest of something, too
        near &= (pairs >= _FEW_PAIRS) | (np.bincount(binding[rivals.clear], minlength=pairs.size) == pairs)
    return nearest, near


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

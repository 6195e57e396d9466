"""Votes: flows that no packet can bind on its own, bound by many weak packets that agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.counters import by_chance
from nattrace.match.edges import Edges, group_edges, ttl_drop
from nattrace.match.keys import M1, mix
from nattrace.match.pairing import group_ids, nearest_pairs, same_ranks, unique_pairs
from nattrace.match.ties import without_ids
from nattrace.match.unique import FAR_NS, REPEAT_NS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: Weak evidence must add up to this much, from several packets and nearly without dissent, to bind flows.
_VOTE_BITS = 90
_VOTE_PACKETS = 4
_VOTE_SHARE = 0.9
#: Packets that say the same and come so close together that the box may have exchanged them: as two hosts 5 us apart
#: are exchanged in 4 of 10 bursts, so many bursts are the same way round by accident once in 40,000 times.
_CROWDED_PACKETS = 12
#: A nearest neighbour is clear when the runner-up is this many times further away.
MARGIN = 8
#: Clock ticks closer than this say nothing about order (microsecond captures).
FLOOR_NS = 1_000
#: Between points of one host packets take so long (7 to 66 us were measured), when nothing is known yet: what
#: is nearer than that is no nearer than any other.
_HOST_NS = 50_000
#: Packets that say the same and come in bursts keep their order mostly; bursts are so far apart at least.
_PAUSE_NS = 1_000_000
#: Latencies of elected pairs teach only up to this many medians; jitter on one host stays below.
_TYPICAL_FACTOR = 4


def elect(
    rows_a: Rows,
    rows_b: Rows,
    flows_a: NDArray[np.int64],
    flows_b: NDArray[np.int64],
    edges: Edges,
    usual: Usual,
    book: AddressBook,
    renumbered: int = 0,
) -> Edges:
    """Let pairs too weak alone vote for bindings between flows that have none yet."""
    free_a = np.flatnonzero(~np.isin(flows_a[rows_a.flow], edges.flow_a))
    free_b = np.flatnonzero(~np.isin(flows_b[rows_b.flow], edges.flow_b))
    if not free_a.size or not free_b.size:
        return Edges.empty()
    rows_a, rows_b = rows_a.take(free_a), rows_b.take(free_b)
    by = "content" if renumbered or without_ids(rows_a, rows_b) else "exact"
    longest = usual.longest_ns()
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [
        unique_pairs(getattr(rows_a, by), getattr(rows_b, by))
    ]
    for end in ("dst", "src"):
        keys = [
            mix(getattr(r, by) ^ (getattr(r.table, end).astype(np.uint64) + np.uint64(1)) * M1)
            for r in (rows_a, rows_b)
        ]
        group_a, group_b = group_ids(*keys)
        pairs.append(
            same_ranks(group_a, rows_a.table.time_ns, group_b, rows_b.table.time_ns, pause_ns=_PAUSE_NS)
        )
        pairs.append(
            nearest_pairs(
                group_a,
                rows_a.table.time_ns,
                group_b,
                rows_b.table.time_ns,
                window_ns=FAR_NS,
                floor_ns=_HOST_NS if longest is None else max(longest // 2, FLOOR_NS),
                margin=MARGIN,
                rounds=1,
            )
        )
    both = np.unique(np.concatenate([np.stack(p) for p in pairs], axis=1), axis=1)
    a, b = both[0], both[1]
    soon_ns = FAR_NS if longest is None else longest + REPEAT_NS
    soon = np.abs(rows_b.table.time_ns[b] - rows_a.table.time_ns[a]) <= soon_ns
    a, b = a[soon], b[soon]
    bits, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, book, renumbered=renumbered)
    a, b, bits, flags = a[~conflict], b[~conflict], bits[~conflict], flags[~conflict]
    if not a.size:
        return Edges.empty()
    # what everybody says all the time says nothing of who is who
    common = rows_a.common[a] | rows_b.common[b]
    bits[common] -= evidence.said_bits(rows_a.table, a[common])
    backward = rows_a.backward[a]
    time = rows_a.table.time_ns[a]
    delta = rows_b.table.time_ns[b] - time
    votes, member = group_edges(
        flows_a[rows_a.flow[a]], flows_b[rows_b.flow[b]], backward != rows_b.backward[b], backward, time,
        np.zeros(a.size, np.int64), delta, flags,
    )  # fmt: skip
    weight = np.bincount(member, bits, len(votes))
    count = np.bincount(member, minlength=len(votes))
    total_a = np.bincount(votes.flow_a, count, int(votes.flow_a.max()) + 1)[votes.flow_a]
    total_b = np.bincount(votes.flow_b, count, int(votes.flow_b.max()) + 1)[votes.flow_b]
    # of packets that are closer than the way through a host takes, nobody knows which came out first
    crowded = _crowded(rows_a, by)[a] | _crowded(rows_b, by)[b]
    sure = np.bincount(member, np.where(crowded, 1 / _CROWDED_PACKETS, 1 / _VOTE_PACKETS), len(votes))
    elected = (weight >= _VOTE_BITS) & (sure >= 1 - 1e-9)
    elected &= (count >= _VOTE_SHARE * total_a) & (count >= _VOTE_SHARE * total_b)
    # what agrees by chance elects nobody, and is dissent all the same
    elected &= 2 * np.bincount(member[by_chance(rows_a, a, rows_b, b)], minlength=len(votes)) <= count
    # what an elected binding says of times comes from its typical pairs only, see `_typical`
    voters = np.flatnonzero(elected[member])
    voters = voters[_typical(delta[voters])]
    drop = ttl_drop(rows_a.table.ttl[a[voters]], rows_b.table.ttl[b[voters]])
    voters = voters[_causal(member[voters], backward[voters], delta[voters], drop, len(votes))]
    if usual.reach_ns() is None:
        usual.learn(delta[voters])
    member, backward = member[voters], backward[voters]
    return group_edges(
        votes.flow_a[member], votes.flow_b[member], votes.swap[member], backward, time[voters],
        np.zeros(voters.size, np.int64), delta[voters], flags[voters],
    )[0]  # fmt: skip


def _crowded(rows: Rows, by: str) -> NDArray[np.bool_]:
    """Return which rows have another one of their key this side of what a host takes to forward it."""
    keys, time = getattr(rows, by), rows.table.time_ns
    order = np.lexsort((time, keys))
    soon = (keys[order][1:] == keys[order][:-1]) & (np.diff(time[order]) < _HOST_NS)
    result = np.zeros(len(rows), np.bool_)
    result[order[1:][soon]] = result[order[:-1][soon]] = True
    return result


def _causal(
    member: NDArray[np.int64],
    backward: NDArray[np.bool_],
    delta: NDArray[np.int64],
    ttl_drop: NDArray[np.int64],
    edges: int,
) -> NDArray[np.bool_]:
    """Return which pairs belong to an edge whose two directions can be one path, whatever the clocks.

    On a path from the first point to the second every forward packet is seen later at the second point,
    by the clocks' offset and the way, and every backward packet earlier: the two never overlap. And the
    TTL falls the same way.
    """
    high = np.full((2, edges), -(2**62), np.int64)
    low = np.full((2, edges), 2**62, np.int64)
    np.maximum.at(high, (backward.astype(np.int64), member), delta)
    np.minimum.at(low, (backward.astype(np.int64), member), delta)
    both = (high > -(2**62)).all(axis=0)
    first_to_second, second_to_first = low[0] >= high[1], low[1] >= high[0]
    possible = ~both | first_to_second | second_to_first
    way = np.where(first_to_second == second_to_first, 0, np.where(first_to_second, 1, -1))
    uphill = np.sign(ttl_drop) * np.where(backward, -1, 1) * np.where(both, way, 0)[member] < 0
    possible[member[uphill]] = False
    result: NDArray[np.bool_] = possible[member]
    return result


def _typical(deltas: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which latencies are not far above the median: an election tolerates some wrong votes."""
    apart = np.abs(deltas)
    limit = _TYPICAL_FACTOR * np.median(apart) if apart.size else 0
    result: NDArray[np.bool_] = apart <= limit
    return result

"""Copies: packets that their senders repeat word for word, of which each capture may have missed another one.

Datagrams and bare acknowledgements without an identification of their own: one here and one there may be two
packets. How likely that is, say the share of what was sent more than once and the shares that either point missed;
and how soon it was sent again says whether time tells. This module only looks at pairs that others found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.lookup import occurrences
from nattrace.match.keys import M1, mix
from nattrace.match.pairing import group_ids
from nattrace.table import TCP, TCP_SYN, UDP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable

#: Pairs are no match where they are two copies more often than this.
_RISK = 0.001
#: Copies may be sent again sooner than was seen, by this factor.
_SPARE = 4
#: Copies of one packet on one side, at most.
_MOST_COPIES = 4
#: What stands twice sooner than this may have been recorded twice (see `duplicates`).
_AT_ONCE_NS = 20_000


def may_be_copies(
    rows_a: Rows,
    a: NDArray[np.int64],
    rows_b: Rows,
    b: NDArray[np.int64],
    longest_ns: int | None,
    *,
    numbered: bool = True,
    left: bool = False,
) -> NDArray[np.bool_]:
    """Return which pairs (row a[n] of one side, b[n] of the other) may be two copies of what was sent twice.

    Looked at are those that are there once, in their flow, on either side. `longest_ns` is how long packets usually
    take at most, None while unknown; not `numbered` where identifications say nothing; `left` where the rows are
    what is left when most of their like have found their own, so that missed ones are too many among them.
    """
    result = np.zeros(a.size, np.bool_)
    repeatable_a, repeatable_b = (_repeatable(rows.table, numbered) for rows in (rows_a, rows_b))
    # what has no like of its length at the other point was cut or merged there, not missed
    size_a, size_b = rows_a.table.payload_length, rows_b.table.payload_length
    repeatable_a &= np.isin(size_a, size_b[repeatable_b])
    repeatable_b &= np.isin(size_b, size_a[repeatable_a])
    asked = np.flatnonzero(repeatable_a[a] & repeatable_b[b])
    if not asked.size:
        return result
    group_a, group_b = group_ids(rows_a.content[repeatable_a], rows_b.content[repeatable_b])
    kinds = int(max(group_a.max(), group_b.max())) + 1
    many_a, many_b = np.bincount(group_a, minlength=kinds), np.bincount(group_b, minlength=kinds)
    whole = np.zeros(kinds, np.bool_)  # what one side never shows it missed
    if not left:
        # nobody cuts an acknowledgement; a datagram may have been a piece
        whole[group_a[rows_a.table.protocol[repeatable_a] == TCP]] = True
        whole[group_b[rows_b.table.protocol[repeatable_b] == TCP]] = True
    # who says the same all the time does not repeat a packet
    most, least = np.maximum(many_a, many_b), np.minimum(many_a, many_b)
    counted = (most <= _MOST_COPIES) & ((least > 0) | whole)
    several = counted & (most > 1)
    share = int(several.sum()) / max(int(counted.sum()), 1)
    # of what was sent once only those packets are left that neither side missed: they say nothing of how many are
    telling = several | (counted & whole)
    missed = _missed(many_a[telling], many_b[telling]) * _missed(many_b[telling], many_a[telling])
    risk = 2 * share * missed
    if not risk:
        return result
    once = _once(rows_a, repeatable_a, a[asked]) & _once(rows_b, repeatable_b, b[asked])
    again_a = _sent_again(rows_a, repeatable_a, counted[group_a])
    again_b = _sent_again(rows_b, repeatable_b, counted[group_b])
    soonest = int(np.concatenate([again_a, again_b]).min(initial=2**62))
    # two copies are about as far apart as they were sent, less what the way takes
    apart = np.abs(rows_b.table.time_ns[b[asked]] - rows_a.table.time_ns[a[asked]])
    late = apart > max(longest_ns or 0, soonest // _SPARE)
    untold = longest_ns is None or soonest < 2 * longest_ns
    result[asked] = once & (late | (untold and risk > _RISK))
    return result


def _missed(here: NDArray[np.int64], there: NDArray[np.int64]) -> float:
    """Return the share of what `there` shows that `here` misses, counted by what is said."""
    return float(np.maximum(there - here, 0).sum() / max(int(there.sum()), 1))


def _once(rows: Rows, repeatable: NDArray[np.bool_], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen rows are the only repeatable ones of their flow that say what they say."""
    keys = mix(rows.content ^ rows.flow.astype(np.uint64) * M1)
    said = np.sort(keys[repeatable])
    alone: NDArray[np.bool_] = occurrences(said, keys[chosen]) == 1
    return alone


def _repeatable(table: PacketTable, numbered: bool) -> NDArray[np.bool_]:
    """Return which packets senders may repeat word for word whenever they like, without identifications of their own."""
    bare = (table.protocol == TCP) & (table.payload_length == 0)
    bare &= (table.tcp_flags & np.uint16(TCP_SYN)) == 0
    result: NDArray[np.bool_] = ((table.ip_id == 0) | (not numbered)) & ((table.protocol == UDP) | bare)
    return result


def _sent_again(rows: Rows, repeatable: NDArray[np.bool_], counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return after what time, in ns, those of the repeatable packets that are counted were sent again in their flow."""
    chosen = np.flatnonzero(repeatable)[counted]
    flow, said, time = rows.flow[chosen], rows.content[chosen], rows.table.time_ns[chosen]
    order = np.lexsort((time, flow, said))
    after = np.diff(time[order])
    again = (np.diff(said[order]) == 0) & (np.diff(flow[order]) == 0) & (after > _AT_ONCE_NS)
    result: NDArray[np.int64] = after[again]
    return result

"""Ties: what could still be the same packet when everything has been tried, and is therefore ambiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import M1, mix
from nattrace.match.outcome import ABSENT, TIED
from nattrace.match.pairing import group_ids, nearest_distance
from nattrace.match.unique import FAR_NS
from nattrace.match.worn import made_up, young_ids
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable

#: A packet has a candidate only this close: nothing forwards a packet after half a minute (see REACH_NS).
TIE_WINDOW_NS = 30_000_000_000
#: Candidates named for an ambiguous packet.
CANDIDATES = 4


def without_ids(rows: Rows, others: Rows) -> bool:
    """Say whether one side has no IP identification at all: printed captures, IPv6."""
    return not rows.table.ip_id.any() or not others.table.ip_id.any()


def _tie_keys(
    rows: Rows, others: Rows, end: str, *, renumbered: bool
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return keys of both sides that are equal where two packets could be one, with `end` untouched."""
    no_ids = renumbered or without_ids(rows, others)

    def keys(r: Rows) -> NDArray[np.uint64]:
        by = np.where((r.table.ip_id != 0) & (not no_ids), r.exact, r.content)
        return mix(by ^ (getattr(r.table, end).astype(np.uint64) + np.uint64(1)) * M1)

    return keys(rows), keys(others)


def tied_rows(rows: Rows, others: Rows, *, renumbered: bool = False) -> NDArray[np.uint8]:
    """Return TIED for rows that still have a believable candidate among `others`, else ABSENT.

    `renumbered` where a box between the points writes IP identifications of its own.
    """
    tied = np.full(len(rows), ABSENT, np.uint8)
    if len(rows) and len(others):
        for end in ("src", "dst"):
            group, their_group = group_ids(*_tie_keys(rows, others, end, renumbered=renumbered))
            apart = nearest_distance(group, rows.table.time_ns, their_group, others.table.time_ns)
            tied[apart <= TIE_WINDOW_NS] = TIED
        if not renumbered:
            tied[_both_ends_changed(rows, others)] = TIED
    return tied


def _both_ends_changed(rows: Rows, others: Rows) -> NDArray[np.int64]:
    """Return the rows of which others tell the same, under the same identification or TCP number, of other addresses.

    Where captures are cut, that is too little for a match, and too much for a loss.
    """

    def telling(table: PacketTable) -> NDArray[np.int64]:
        numbered = (table.ip_id != 0) & ~young_ids(table.ip_id)
        return np.flatnonzero(numbered | ((table.protocol == TCP) & ~made_up(table.seq)))

    own, their = telling(rows.table), telling(others.table)
    group, their_group = group_ids(rows.exact[own], others.exact[their])
    apart = nearest_distance(group, rows.table.time_ns[own], their_group, others.table.time_ns[their])
    return own[apart <= FAR_NS]


def candidates(rows: Rows, others: Rows, *, renumbered: bool = False) -> NDArray[np.uint32]:
    """Return the frames of the first CANDIDATES packets that each row could be; shape (rows, CANDIDATES).

    0 fills the places of rows that have fewer.
    """
    frames = np.zeros((len(rows), CANDIDATES), np.uint32)
    if not len(rows) or not len(others):
        return frames
    for end in ("dst", "src"):
        own, their = _tie_keys(rows, others, end, renumbered=renumbered)
        order = np.argsort(their, kind="stable")
        low, high = (np.searchsorted(their, own, side, sorter=order) for side in ("left", "right"))
        empty = frames[:, 0] == 0
        for place in range(CANDIDATES):
            there = empty & (low + place < high)
            frames[there, place] = others.table.frame[order[(low + place)[there]]]
    return frames

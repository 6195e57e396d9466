"""Ties: what could still be the same packet when everything has been tried, and is therefore ambiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

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
#: By the end that was left untouched, how close: with both ends changed much less speaks for a packet.
_WINDOWS_NS: Final[dict[str | None, int]] = {"dst": TIE_WINDOW_NS, "src": TIE_WINDOW_NS, None: FAR_NS}
#: Candidates named for an ambiguous packet.
CANDIDATES = 4


def without_ids(rows: Rows, others: Rows) -> bool:
    """Say whether one side has no IP identification at all: printed captures, IPv6."""
    return not rows.table.ip_id.any() or not others.table.ip_id.any()


def _alike(
    rows: Rows, others: Rows, end: str | None, *, renumbered: bool
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64]]:
    """Return rows of both sides, with keys that are equal where two packets could be one with `end` untouched.

    With no end untouched (None), their identification or TCP number has to tell, and that they say the same. Where
    captures are cut, that is too little for a match, and too much for a loss.
    """
    if end is None:
        own, their = (_numbered(r.table) if not renumbered else np.empty(0, np.int64) for r in (rows, others))
        return own, rows.exact[own], their, others.exact[their]
    no_ids = renumbered or without_ids(rows, others)

    def keys(r: Rows) -> NDArray[np.uint64]:
        by = np.where((r.table.ip_id != 0) & (not no_ids), r.exact, r.content)
        return mix(by ^ (getattr(r.table, end).astype(np.uint64) + np.uint64(1)) * M1)

    return np.arange(len(rows)), keys(rows), np.arange(len(others)), keys(others)


def _numbered(table: PacketTable) -> NDArray[np.int64]:
    """Return the rows with a number that hardly anybody else sends."""
    numbered = (table.ip_id != 0) & ~young_ids(table.ip_id)
    return np.flatnonzero(numbered | ((table.protocol == TCP) & ~made_up(table.seq)))


def tied_rows(rows: Rows, others: Rows, *, renumbered: bool = False) -> NDArray[np.uint8]:
    """Return TIED for rows that still have a believable candidate among `others`, else ABSENT.

    `renumbered` where a box between the points writes IP identifications of its own.
    """
    tied = np.full(len(rows), ABSENT, np.uint8)
    if len(rows) and len(others):
        for end, window_ns in _WINDOWS_NS.items():
            own, keys, their, their_keys = _alike(rows, others, end, renumbered=renumbered)
            group, their_group = group_ids(keys, their_keys)
            times = rows.table.time_ns[own], others.table.time_ns[their]
            apart = nearest_distance(group, times[0], their_group, times[1])
            tied[own[apart <= window_ns]] = TIED
    return tied


def candidates(rows: Rows, others: Rows, *, renumbered: bool = False) -> NDArray[np.uint32]:
    """Return the frames of the first CANDIDATES packets that each row could be; shape (rows, CANDIDATES).

    0 fills the places of rows that have fewer.
    """
    frames = np.zeros((len(rows), CANDIDATES), np.uint32)
    if not len(rows) or not len(others):
        return frames
    for end in _WINDOWS_NS:
        own, keys, their, their_keys = _alike(rows, others, end, renumbered=renumbered)
        order = np.argsort(their_keys, kind="stable")
        low, high = (np.searchsorted(their_keys, keys, side, sorter=order) for side in ("left", "right"))
        empty = frames[own, 0] == 0
        for place in range(CANDIDATES):
            there = empty & (low + place < high)
            frames[own[there], place] = others.table.frame[their[order[(low + place)[there]]]]
    return frames

"""Unseen: datagrams cut off before anything of their payload, which a helper on the way may have rewritten.

The SIP helper changes the length of what it rewrites; where nothing of it is captured nobody knows what it was.
Such packets of equal IP identification, one binding and direction or one equal end, are neither matched nor called
lost. This module only says so; it matches nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.sip import START_BYTES
from nattrace.match.keys import M3, mix
from nattrace.match.pairing import group_ids, nearest_distance
from nattrace.match.renumber.anchors import SOON_NS
from nattrace.match.renumber.sharing import end_keys
from nattrace.match.unique import FAR_NS
from nattrace.table import UDP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable


def unseen_rows(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of the given rows that are datagrams cut off before they show what they are."""
    unseen = (table.protocol[rows] == UDP) & (table.content_length[rows] < START_BYTES)
    chosen: NDArray[np.int64] = rows[unseen & (table.payload_length[rows] >= START_BYTES)]
    return chosen


def unseen_ties(rows_a: Rows, rows_b: Rows, lanes: Lanes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of either side that may be some row of the other side, seen from its headers alone."""
    a, b = (unseen_rows(rows.table, np.arange(len(rows))) for rows in (rows_a, rows_b))
    if not a.size or not b.size:
        return a[:0], b[:0]
    tied_a, tied_b = np.zeros(a.size, np.bool_), np.zeros(b.size, np.bool_)
    time_a, time_b = rows_a.table.time_ns[a], rows_b.table.time_ns[b]
    # without an identification a packet is its other self only this soon
    limit_a, limit_b = (
        np.where(rows.table.ip_id[which] != 0, FAR_NS, SOON_NS) for rows, which in ((rows_a, a), (rows_b, b))
    )
    for key_a, key_b in zip(
        _keys(rows_a.table, a, lanes.lane_a[a]), _keys(rows_b.table, b, lanes.lane_b[b]), strict=True
    ):
        group_a, group_b = group_ids(key_a, key_b)
        tied_a |= nearest_distance(group_a, time_a, group_b, time_b) <= limit_a
        tied_b |= nearest_distance(group_b, time_b, group_a, time_a) <= limit_b
    return a[tied_a], b[tied_b]


def _keys(table: PacketTable, rows: NDArray[np.int64], lane: NDArray[np.int64]) -> list[NDArray[np.uint64]]:
    """Return keys by either end, or by binding and direction where there is one."""
    bound = mix(lane.astype(np.uint64) * M3 ^ table.ip_id[rows])
    return [np.where(lane >= 0, bound, keys) for keys in end_keys(table, rows)]

"""Sharing: packets of two points that have one end and their IP identification in common, and maybe nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import M1, mix
from nattrace.match.renumber.anchors import ends

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.table import PacketTable


def end_keys(table: PacketTable, rows: NDArray[np.int64]) -> list[NDArray[np.uint64]]:
    """Return keys of the given rows' identification with either end: source, destination."""
    return [mix(end ^ table.ip_id[rows].astype(np.uint64) * M1) for end in ends(table, rows)]


def may_share_an_end(
    table: PacketTable,
    rows: NDArray[np.int64],
    others: Sequence[tuple[PacketTable, NDArray[np.int64]]],
    of_kind: Callable[[PacketTable, NDArray[np.int64]], NDArray[np.int64]],
) -> NDArray[np.bool_]:
    """Return which of the given rows, ascending, have an end and the identification of some row of the other point.

    `others` are tables of the other point, each with the rows of it that have no partner; `of_kind` chooses those of
    a table's rows that are looked at, on both sides.
    """
    result = np.zeros(rows.size, np.bool_)
    mine = of_kind(table, rows)
    if mine.size:
        kind = [(other, of_kind(other, which)) for other, which in others]
        there = np.concatenate([keys for other, which in kind for keys in end_keys(other, which)])
        found = np.logical_or.reduce([np.isin(keys, there) for keys in end_keys(table, mine)])
        result[np.searchsorted(rows, mine[found])] = True
    return result

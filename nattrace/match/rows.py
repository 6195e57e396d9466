"""Rows: packets of one point with what matching needs beside the packet table. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.match.keys import flow_hash, packet_keys
from nattrace.table import COLUMNS, PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(slots=True)
class Rows:
    """Packets that wait to be matched, one row each; all columns of equal length."""

    table: PacketTable
    content: NDArray[np.uint64]  #: key without IP id, see `packet_keys`
    exact: NDArray[np.uint64]  #: key with IP id
    backward: NDArray[np.bool_]
    number: NDArray[np.int64]  #: running number among the point's decoded packets
    flow: NDArray[np.int64]  #: number of the point's flow, see `roll`
    common: NDArray[np.bool_]  #: others in its window said the very same; only known of rows that wait
    said: NDArray[np.uint64] | None = None  #: no column: what several packets say, sorted; see `commonplace`

    def __len__(self) -> int:
        """Packets."""
        return len(self.table)

    @classmethod
    def prepare(
        cls,
        table: PacketTable,
        *,
        printed: bool = False,
    ) -> tuple[Rows, NDArray[np.uint64]]:
        """Compute keys for freshly decoded packets; return their rows, and the hashes of their flows.

        Numbers of packets and flows are still to be given. `printed` when some point of the analysis has only
        printed fields.
        """
        content, exact = packet_keys(table, residuals=not printed)
        hashes, backward = flow_hash(table)
        return cls.numbered(table, content, exact, backward, 0, np.zeros(len(table), np.int64)), hashes

    @classmethod
    def numbered(
        cls,
        table: PacketTable,
        content: NDArray[np.uint64],
        exact: NDArray[np.uint64],
        backward: NDArray[np.bool_],
        first_number: int,
        flow: NDArray[np.int64],
    ) -> Rows:
        """Return rows of packets that follow each other at their point."""
        number = np.arange(first_number, first_number + len(table))
        return cls(table, content, exact, backward, number, flow, np.zeros(len(table), np.bool_))

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """Return all rows in order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.prepare(PacketTable.empty())[0]
        return cls(
            PacketTable.concatenate([p.table for p in parts]),
            *(np.concatenate([getattr(p, name) for p in parts]) for name in _EXTRA),
        )

    def take(self, rows: NDArray[Any]) -> Rows:
        """Return the given rows: indices or a mask."""
        return Rows(self.table.take(rows), *(getattr(self, name)[rows] for name in _EXTRA))

    def columns(self) -> list[NDArray[Any]]:
        """Return all columns, those of the packet table first."""
        return [getattr(self.table, name) for name in COLUMNS] + [getattr(self, name) for name in _EXTRA]

    @classmethod
    def of_columns(cls, columns: Sequence[NDArray[Any]]) -> Rows:
        """Return rows made of such columns."""
        return cls(PacketTable(*columns[: len(COLUMNS)]), *columns[len(COLUMNS) :])


class Window:
    """Rows that come and go at one point, in arrays that are used again and again.

    Memory that is touched for the first time costs more than all that is done with it; a window's arrays
    stay where they are, and grow only when a window is fuller than any before.
    """

    def __init__(self) -> None:
        self._arrays = [np.empty(0, column.dtype) for column in Rows.concatenate([]).columns()]
        self._size = 0

    def __len__(self) -> int:
        """Packets."""
        return self._size

    def rows(self) -> Rows:
        """Return the rows, as views that hold until the window is changed."""
        return Rows.of_columns([array[: self._size] for array in self._arrays])

    def append(self, rows: Rows) -> None:
        """Copy rows in, after those that are there."""
        stop = self._size + len(rows)
        for place, column in enumerate(rows.columns()):
            array = self._arrays[place]
            if array.size < stop:
                grown = np.empty(stop + stop // 4, array.dtype)
                grown[: self._size] = array[: self._size]
                self._arrays[place] = array = grown
            array[self._size : stop] = column
        self._size = stop

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Drop all rows but the given ones (ascending indices)."""
        for array in self._arrays:
            array[: rows.size] = array[rows]
        self._size = rows.size


_EXTRA = ("content", "exact", "backward", "number", "flow", "common")

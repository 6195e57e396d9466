"""Openings: how the TCP connections of a point begin and end, and the first bytes that each side says.

What is noted of a connection are its SYN-ACK, the first segment with data in either direction, with the first
bytes of that data, and its FINs and resets. That suffices to tell a proxy, which copies what is said onto a
connection of its own (`diagnose.proxies`). Everything noted is a few packets of a few connections: this module
never looks at the rest beyond one table look-up, never reassembles, and forgets what comes beyond its limits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.ingest.gather import gather_bytes, prefix_masks
from nattrace.ingest.ip import read_ip
from nattrace.ingest.link import find_ip
from nattrace.lookup import contains
from nattrace.table import TCP, AddressBook, PacketTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.ingest.source import Records

#: Connections noted at one point: the first ones that were answered. A ticket's capture has fewer, and whether
#: a port is served by a proxy shows in the first few.
CONNECTIONS: Final = 4_096
#: Packets noted at one point: those of so many connections, and as many FINs and resets of others.
PACKETS: Final = 8 * CONNECTIONS
#: Bytes kept of what a side says first: a request line, a banner, the random bytes of a TLS hello.
HEAD_BYTES: Final = 64
#: Batches (some ten thousand packets each) for which the first data of a connection is waited for.
_PATIENCE: Final = 8

_FIN_RST, _SYN_ACK = 0x005, 0x012
#: Sequence numbers looked for are marked in a table by their low bits: few packets pass by chance.
_MARKS: Final = 1 << 20
_HEAD_MASK = prefix_masks(HEAD_BYTES)


@dataclass(slots=True)
class Noted:
    """Noted packets of one point, in file order: SYN-ACKs, first data, FINs and resets. Columns of one length."""

    table: PacketTable
    head: NDArray[np.uint8]  #: shape (n, HEAD_BYTES): the first payload bytes, 0 behind `head_length`
    head_length: NDArray[np.uint8]  #: payload bytes that the capture holds, at most HEAD_BYTES


@dataclass(slots=True)
class Openings:
    """Notes about the TCP connections of one point; grows while its packets are read."""

    _parts: list[Noted] = field(default_factory=list)
    _packets: int = 0
    _connections: int = 0
    _ends: int = 0
    #: sequence numbers at which data is to begin, and the batch that they were learned in
    _wanted: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    _since: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _batch: int = 0
    _marks: NDArray[np.bool_] | None = None

    def __bool__(self) -> bool:
        """Whether a connection was seen from its beginning to an end."""
        return self._connections > 0 and self._ends > 0

    def note(self, records: Records, table: PacketTable) -> None:
        """Note what the given packets tell of connections; `table` are the rows decoded from `records`."""
        flags = table.tcp_flags  # 0 for all that is not TCP
        telling = np.flatnonzero(flags & np.uint16(_FIN_RST | 0x002))
        if not telling.size and not self._wanted.size:
            return
        self._batch += 1
        kind = flags[telling] & np.uint16(_FIN_RST | _SYN_ACK)
        answers = telling[kind == _SYN_ACK][: CONNECTIONS - self._connections]
        self._connections += answers.size
        self._want(table, answers)
        first = self._first_data(table)
        ends = telling[(kind & np.uint16(_FIN_RST)) != 0] if self._connections else telling[:0]
        self._ends += ends.size
        rows = np.union1d(np.concatenate([answers, ends]), first)[: PACKETS - self._packets]
        if rows.size:
            self._packets += rows.size
            self._parts.append(_noted(records, table.take(rows)))

    def conclude(self) -> None:
        """Forget what only serves to note more."""
        self._marks, self._wanted, self._since = None, self._wanted[:0], self._since[:0]

    def noted(self) -> Noted:
        """Return all that was noted."""
        parts = self._parts
        return Noted(
            PacketTable.concatenate([part.table for part in parts]),
            np.concatenate([np.zeros((0, HEAD_BYTES), np.uint8), *(part.head for part in parts)]),
            np.concatenate([np.zeros(0, np.uint8), *(part.head_length for part in parts)]),
        )

    def translate(self, handles: NDArray[np.uint32]) -> None:
        """Turn IPv6 address handles of another book into this process's: handle h becomes handles[h]."""
        for part in self._parts:
            six = part.table.version == 6
            part.table.src[six] = handles[part.table.src[six]]
            part.table.dst[six] = handles[part.table.dst[six]]

    def _want(self, table: PacketTable, answers: NDArray[np.int64]) -> None:
        """Learn where both sides of newly answered connections begin, and give up the oldest ones."""
        stale = self._since <= self._batch - _PATIENCE
        if not answers.size and not stale.any():
            return
        new = np.concatenate([table.ack[answers], table.seq[answers] + np.uint32(1)])
        if self._marks is None:
            self._marks = np.zeros(_MARKS, np.bool_)
        self._marks[self._wanted[stale] % _MARKS] = False
        self._wanted = np.concatenate([self._wanted[~stale], new])
        self._since = np.concatenate([self._since[~stale], np.full(new.size, self._batch)])
        self._marks[self._wanted % _MARKS] = True

    def _first_data(self, table: PacketTable) -> NDArray[np.int64]:
        """Return the rows with which a side of a connection begins to speak, and wait for these no more."""
        if not self._wanted.size or self._marks is None:
            return np.empty(0, np.int64)
        rows: NDArray[np.int64] = np.flatnonzero(self._marks[table.seq & np.uint32(_MARKS - 1)])
        rows = rows[(table.payload_length[rows] > 0) & (table.protocol[rows] == TCP)]
        rows = rows[contains(np.sort(self._wanted), table.seq[rows])]
        found = contains(np.sort(table.seq[rows]), self._wanted)
        self._marks[self._wanted[found] % _MARKS] = False
        self._wanted, self._since = self._wanted[~found], self._since[~found]
        return rows


def _noted(records: Records, table: PacketTable) -> Noted:
    """Look at a few packets a second time, for their payload."""
    at = np.searchsorted(records.frame, table.frame)
    few = replace(
        records,
        offset=records.offset[at],
        captured_length=records.captured_length[at],
        wire_length=records.wire_length[at],
        time_ns=records.time_ns[at],
        frame=records.frame[at],
    )
    frames = find_ip(few, slice(0, at.size), Counter())
    frames = frames.take(np.ones(frames.at.size, np.bool_))
    rows = read_ip(few.buffer, frames, AddressBook(), Counter())
    payload = rows.l4_offset + (rows.l4["flags"] >> 12).astype(np.int64) * 4
    length = np.clip(rows.available - payload, 0, HEAD_BYTES)
    head = np.zeros((at.size, HEAD_BYTES), np.uint8)
    head[rows.record] = gather_bytes(few.buffer, rows.at + payload, HEAD_BYTES) & _HEAD_MASK[length]
    head_length = np.zeros(at.size, np.uint8)
    head_length[rows.record] = length
    return Noted(table, head, head_length)

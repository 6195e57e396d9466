"""Connections: what was noted of TCP connections at all points, put together to one row a connection.

Pure array work over `ingest.openings`. A connection seen at several points is one: NAT keeps the initial sequence
numbers, and nothing else has the same two. This module judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.openings import Noted
from nattrace.match.keys import M1, M2, endpoint_hash, mix
from nattrace.table import PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.openings import Openings

_SYN_ACK, _END = 0x012, 0x005
_FIN = 0x001

#: Directions: what the client sends, what the server sends.
CLIENT, SERVER = 0, 1


@dataclass(slots=True)
class Connections:
    """TCP connections of which both ends were seen, one row for each point that saw one.

    Columns with two columns are by direction, CLIENT and SERVER. Byte counts are what a side sent in all, by its
    FIN or reset. `heads` are the first bytes of that, as many as were captured.
    """

    point: NDArray[np.int64]  #: index into the points given
    answer: PacketTable  #: the SYN-ACK
    total_bytes: NDArray[np.int64]  #: shape (n, 2)
    first_ns: NDArray[np.int64]  #: (n, 2): when the side first sent data; 2**62 where it sent none
    last_ns: NDArray[np.int64]  #: (n, 2): when it said that it was done
    heads: NDArray[np.uint8]  #: (n, 2, HEAD_BYTES)
    head_length: NDArray[np.int64]  #: (n, 2)
    client_ttl: NDArray[np.int64]  #: TTL of the client's first data, 0 where it sent none

    def __len__(self) -> int:
        """Rows."""
        return int(self.point.size)


def connections(openings: Sequence[Openings]) -> Connections:
    """Return the connections that were noted from SYN-ACK to the end of both directions, at each point."""
    noted = [each.noted() for each in openings]
    point = np.repeat(np.arange(len(noted)), [len(each.table) for each in noted])
    table = PacketTable.concatenate([each.table for each in noted])
    every = Noted(
        table,
        np.concatenate([each.head for each in noted]),
        np.concatenate([each.head_length for each in noted]),
    )
    ways = _ways(table, point)
    flags = table.tcp_flags
    answer = np.flatnonzero((flags & np.uint16(_SYN_ACK | _END)) == _SYN_ACK)
    # retransmitted SYN-ACKs: the first stands for all
    key = ways[answer, 1] ^ table.seq[answer] * M2 ^ table.ack[answer] * M1
    answer = np.sort(answer[np.unique(key, return_index=True)[1]])
    # where the server's sequence numbers begin, and the client's
    begin = np.stack([table.ack[answer], table.seq[answer] + np.uint32(1)], axis=1)
    data = np.flatnonzero((table.payload_length > 0) & ((flags & np.uint16(0x002)) == 0))
    ends = np.flatnonzero((flags & np.uint16(_END)) != 0)
    size = answer.size
    total, first = np.full((size, 2), -1), np.full((size, 2), 2**62)
    last, head_row = np.full((size, 2), 2**62), np.full((size, 2), -1)
    for side in (CLIENT, SERVER):
        way = ways[answer, 1 if side == CLIENT else 0]
        start = begin[:, side]
        row = _first_at(way, start, ways[data, 0], table.seq[data])
        said = np.flatnonzero(row >= 0)
        head_row[said, side] = data[row[said]]
        first[said, side] = table.time_ns[data[row[said]]]
        row = _end_of(way, table.time_ns[answer], ways[ends, 0], table.time_ns[ends], flags[ends])
        done = np.flatnonzero(row >= 0)
        end = ends[row[done]]
        stop = table.seq[end] + table.payload_length[end].astype(np.uint32)
        total[done, side] = (stop - start[done]).astype(np.int64)
        last[done, side] = table.time_ns[end]
    whole = (total >= 0).all(axis=1)
    # what was said, and nothing of it captured as the first, is of no use; nor is a total that is no total
    whole &= ((total == 0) == (head_row < 0)).all(axis=1) & (total < 2**31).all(axis=1)
    heads = np.where((head_row >= 0)[:, :, None], every.head[np.maximum(head_row, 0)], np.uint8(0))
    length = np.where(head_row >= 0, every.head_length[np.maximum(head_row, 0)], 0)
    ttl = np.where(head_row[:, CLIENT] >= 0, table.ttl[np.maximum(head_row[:, CLIENT], 0)], 0)
    return Connections(
        point=point[answer][whole],
        answer=table.take(answer[whole]),
        total_bytes=total[whole],
        first_ns=first[whole],
        last_ns=last[whole],
        heads=heads[whole],
        head_length=length[whole].astype(np.int64),
        client_ttl=ttl[whole].astype(np.int64),
    )


def _ways(table: PacketTable, point: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return hashes of (point, source, target) and of (point, target, source), shape (n, 2)."""
    source = endpoint_hash(table.version, table.src, table.sport)
    target = endpoint_hash(table.version, table.dst, table.dport)
    place = (point.astype(np.uint64) + np.uint64(1)) * M2
    return np.stack([mix((source * M1 ^ target) + place), mix((target * M1 ^ source) + place)], axis=1)


def _first_at(
    way: NDArray[np.uint64], start: NDArray[np.uint32], ways: NDArray[np.uint64], seq: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """Return the first packet of each way that begins at sequence number `start`; -1 for none."""
    own, theirs = mix(way ^ start * M1), mix(ways ^ seq * M1)
    order = np.argsort(theirs, kind="stable")
    place = np.searchsorted(theirs[order], own)
    row = order[np.minimum(place, max(order.size - 1, 0))] if order.size else np.full(own.size, -1)
    found = (place < order.size) & (theirs[row] == own) if order.size else np.zeros(own.size, np.bool_)
    result: NDArray[np.int64] = np.where(found, row, -1)
    return result


def _end_of(
    way: NDArray[np.uint64],
    since_ns: NDArray[np.int64],
    ways: NDArray[np.uint64],
    time_ns: NDArray[np.int64],
    flags: NDArray[np.uint16],
) -> NDArray[np.int64]:
    """Return the first end on each way since a time, a FIN rather than a reset; -1 for none.

    The same two endpoints may connect again: the way's next connection has its ends later.
    """
    result = np.full(way.size, -1, np.int64)
    for chosen in (np.flatnonzero((flags & np.uint16(_FIN)) == 0), np.flatnonzero(flags & np.uint16(_FIN))):
        order = chosen[np.lexsort((time_ns[chosen], ways[chosen]))]
        both = np.concatenate([ways[order], way])
        rank = np.lexsort((np.concatenate([time_ns[order], since_ns]), both))
        # walking backwards, the last end seen is the next one in time
        is_end = rank < order.size
        step = np.where(is_end, np.arange(rank.size), rank.size)
        following = np.minimum.accumulate(step[::-1])[::-1]
        asked = np.flatnonzero(~is_end)
        spot = following[asked]
        valid = spot < rank.size
        hit = rank[np.minimum(spot, rank.size - 1)]
        mine = rank[asked] - order.size
        valid &= both[hit] == way[mine]
        result[mine[valid]] = order[hit[valid]]
    return result

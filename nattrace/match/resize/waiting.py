"""Waiting: which packets without an equal at the other point may be there in another size, and should wait.

Cheap tests on few packets: most of what leaves a window without an equal was simply not captured at the other
point. To wait costs memory only; whether a packet is there is decided later (`streams`, `heads`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import flow_hash, mix
from nattrace.match.resize.datagrams import datagram_ids, fragment_rows
from nattrace.match.resize.heads import HEAD_BYTES, head_keys, head_rows
from nattrace.match.resize.streams import stream_rows
from nattrace.match.resize.trains import train_rows
from nattrace.table import PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.rows import Rows

#: Flows with UDP segmentation remembered for one side: half a megabyte. Of further ones, packets that have no
#: equal and come late in their window are taken for missing.
_FLOWS = 65_536

_SEQUENCES = np.int64(1 << 32)


@dataclass(slots=True)
class Trains:
    """The flows, by direction, of one side in which a datagram began like another one of the other side."""

    flows: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def wait(
        self,
        table: PacketTable,
        rows: NDArray[np.int64],
        equals: NDArray[np.int64],
        others: Sequence[tuple[PacketTable, NDArray[np.int64]]],
    ) -> NDArray[np.bool_]:
        """Return which rows, whole UDP datagrams, are of such a flow; learn the flows first, also from `equals`."""
        own = table.take(np.concatenate([rows, equals]))
        keys = [np.empty(0, np.uint64)]
        for other, chosen in others:
            datagrams = chosen[train_rows(other)[chosen]]
            keys.append(_beginnings(other.take(datagrams)))
        alike = np.isin(_beginnings(own), np.concatenate(keys))
        hashes, backward = flow_hash(own)
        flows = mix(hashes ^ backward)
        self.flows = np.union1d(self.flows, flows[alike])[:_FLOWS]
        result: NDArray[np.bool_] = np.isin(flows[: rows.size], self.flows)
        return result


def _beginnings(table: PacketTable) -> NDArray[np.uint64]:
    """Return what datagrams say at their beginning; where none of it is captured, their identification."""
    return np.where(table.content_length >= HEAD_BYTES, head_keys(table), mix(datagram_ids(table)))


def may_be_resized(
    rows: Rows,
    left: NDArray[np.int64],
    equals: NDArray[np.int64],
    others: Rows,
    open_others: NDArray[np.int64],
    waiting: Sequence[Rows],
    trains: Trains,
) -> NDArray[np.bool_]:
    """Return which of the rows `left` may be among the other side's packets in another size.

    The other side's packets are its rows `open_others` in the window, and those that wait already. `equals` are rows
    that wait for an equal: pieces all alike may be among them. `trains` are the flows of this side that UDP
    segmentation was seen in; more may come to be known.
    """
    own = rows.table.take(left)
    there = [(others.table, open_others)]
    there += [(part.table, np.arange(len(part))) for part in waiting]
    result = fragment_rows(own)
    data = np.flatnonzero(stream_rows(own))
    if data.size:
        result[data] = _shares_bytes(own, data, there)
    whole = np.flatnonzero(~result)
    if whole.size:
        cut = [table.take(chosen[fragment_rows(table)[chosen]]) for table, chosen in there]
        fragments = PacketTable.concatenate([table for table in cut if len(table)])
        if len(fragments):
            result[whole] = _is_cut(own.take(whole), fragments)
    datagrams = np.flatnonzero(~result & train_rows(own))
    if datagrams.size:
        of_trains = equals[train_rows(rows.table.take(equals))]
        result[datagrams] = trains.wait(rows.table, left[datagrams], of_trains, there)
    return result


def _is_cut(whole: PacketTable, fragments: PacketTable) -> NDArray[np.bool_]:
    """Return which packets have the identification of some fragment, or begin like a first one."""
    ids = datagram_ids(whole)
    result: NDArray[np.bool_] = (ids != 0) & np.isin(ids, datagram_ids(fragments))
    heads = head_rows(fragments)
    if heads.any():
        own = np.flatnonzero(head_rows(whole))
        result[own] |= np.isin(head_keys(whole.take(own)), head_keys(fragments.take(heads)))
    return result


def _shares_bytes(
    table: PacketTable, rows: NDArray[np.int64], others: Sequence[tuple[PacketTable, NDArray[np.int64]]]
) -> NDArray[np.bool_]:
    """Return which rows' TCP data has sequence numbers that some other packet's data has as well.

    Of any connection: two that share numbers by chance are few, and are told apart later.
    """
    starts, lengths = [], []
    for other, chosen in others:
        data = chosen[stream_rows(other)[chosen]]
        starts.append(other.seq[data].astype(np.int64))
        lengths.append(other.payload_length[data].astype(np.int64))
    start, length = np.concatenate(starts), np.concatenate(lengths)
    if not start.size:
        return np.zeros(rows.size, np.bool_)
    # numbers wrap: what follows the last one comes again before the first one
    start = np.concatenate([start, start - _SEQUENCES, start + _SEQUENCES])
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate((start + np.tile(length, 3))[order])
    first = table.seq[rows].astype(np.int64)
    before = np.searchsorted(start[order], first + table.payload_length[rows], "left") - 1
    result: NDArray[np.bool_] = (before >= 0) & (reach[np.maximum(before, 0)] > first)
    return result

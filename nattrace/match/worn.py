"""Worn: numbers that do not tell packets apart, since many devices send the same ones.

Identifications of young counters, and of devices that count in step; sequence numbers that somebody made up. This
module looks at the packets of one point; it matches nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.l4 import fillings
from nattrace.lookup import contains
from nattrace.match.counters import counts_up
from nattrace.match.keys import ACK_END, commonplace_keys
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable

#: IP identifications of a device that counts from its start are small; then many devices send the same ones.
_YOUNG_ID = 1024
#: And sequence numbers of whoever begins with 0, 1 or 1000, or with four equal bytes: random ones are hardly ever so.
_YOUNG_SEQ = 1 << 16
_FILLED_SEQ = 1 << 12
#: Counters that were started together are no further apart.
_IN_STEP = 16
#: Further apart than any two identifications.
_NEXT_SAID = 1 << 17


def worn_ids(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for which chosen rows the IP identification does not tell packets apart that say the same.

    So it is for young ones (two equal bytes are filled like the packet), and where several packets
    that say the same have the same identification much more often than chance would have it: their senders
    count in step.
    """
    table = rows.table
    own_id = table.ip_id[chosen]
    worn = young_ids(own_id)
    alike = np.flatnonzero((table.protocol != TCP) & (table.ip_id != 0))
    said, place = np.unique(commonplace_keys(table, alike), return_inverse=True)
    place = place.reshape(-1)
    identity = np.unique((place.astype(np.int64) << 32) | table.ip_id[alike])
    sent = np.bincount(place, minlength=said.size)
    different = np.bincount(identity >> 32, minlength=said.size)
    by_chance = sent * (sent - 1.0) / (2 * 65536)
    shared = sent - different > 2 + 4 * by_chance
    own = np.minimum(np.searchsorted(said, commonplace_keys(table, chosen)), max(said.size - 1, 0))
    if said.size:
        worn |= shared[own]
    return worn | in_step(rows, chosen)


def in_step(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which chosen rows have an IP identification close to one of another flow that says the same, and counts.

    Devices of a kind that were started together count in step: what one of them has sent when both captures missed
    it, the other one has sent under the same number.
    """
    table = rows.table
    others = np.flatnonzero((table.ip_id != 0) & ((table.protocol != TCP) | numbered_by_hand(table)))
    if not others.size:
        return np.zeros(chosen.size, np.bool_)
    _, place = np.unique(commonplace_keys(table, others), return_inverse=True)
    lane = (rows.flow[others] << 1 | rows.backward[others]).astype(np.int64)
    _, sender = np.unique(place.reshape(-1).astype(np.int64) << 32 | lane, return_inverse=True)
    sender = sender.reshape(-1)
    counting = counts_up(sender, table.time_ns[others], table.ip_id[others])
    counting &= np.bincount(sender)[sender] > 1
    code = place.reshape(-1).astype(np.int64) * _NEXT_SAID + table.ip_id[others]
    order = np.lexsort((sender, code))
    code, sender, counting = code[order], sender[order], counting[order]
    at = np.arange(code.size)
    begins = np.append(True, sender[1:] != sender[:-1])
    before = np.maximum.accumulate(np.where(begins, at, 0)) - 1
    ends = np.append(sender[1:] != sender[:-1], True)
    behind = np.minimum.accumulate(np.where(ends, at, code.size)[::-1])[::-1] + 1
    close = np.zeros(code.size, np.bool_)
    for beside in (before, behind):
        there = np.clip(beside, 0, code.size - 1)
        close |= (there == beside) & (np.abs(code[there] - code) <= _IN_STEP) & (counting | counting[there])
    worn = np.zeros(len(rows), np.bool_)
    worn[others[order]] = close
    result: NDArray[np.bool_] = worn[chosen]
    return result


def young_ids(ip_id: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which IP identifications many devices send: those of a young counter, and two equal bytes."""
    young: NDArray[np.bool_] = (ip_id < _YOUNG_ID) | (ip_id % 0x0101 == 0)
    return young


def made_up(seq: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which TCP sequence numbers are no random ones (RFC 6528): close above 0, or above four equal bytes.

    Packets that were made by hand begin with 0, 1 or 1000, and fuzzed ones are filled with one byte.
    """
    made_up: NDArray[np.bool_] = (seq < _YOUNG_SEQ) | (seq % np.uint32(0x01010101) < _FILLED_SEQ)
    return made_up


def numbered_by_hand(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets are segments whose sequence number was made up, and what they acknowledge as well.

    An answer to a SYN (RST) begins with 0 and acknowledges a number that is random.
    """
    result: NDArray[np.bool_] = (table.protocol == TCP) & made_up(table.seq)
    result &= made_up(table.ack) | (table.l4_visible < ACK_END)
    return result


def says_nothing(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen segments, of made up numbers, say nothing, or what such segments of other flows say."""
    table = rows.table
    hashes = table.content_hash[chosen]
    nothing = contains(fillings(), hashes)
    nothing |= table.content_length[chosen] == 0
    others = np.flatnonzero(numbered_by_hand(table))
    said, place = np.unique(table.content_hash[others], return_inverse=True)
    flows = np.bincount(np.unique(np.stack([place.reshape(-1), rows.flow[others]]), axis=1)[0])
    result: NDArray[np.bool_] = nothing | (flows[np.searchsorted(said, hashes)] > 1)
    return result


def worn_segments(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen segments, of made up numbers, have an IP identification that others have as well."""
    return _shares_id(rows, chosen) | in_step(rows, chosen)


def _shares_id(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen segments, of made up numbers, have the IP identification of another such one."""
    table = rows.table
    ids, count = np.unique(table.ip_id[numbered_by_hand(table)], return_counts=True)
    own = table.ip_id[chosen]
    result: NDArray[np.bool_] = (count[np.searchsorted(ids, own)] > 1) | (own % 0x0101 == 0)
    return result

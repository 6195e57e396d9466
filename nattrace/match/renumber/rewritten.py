"""Rewritten: datagrams in which a helper wrote other addresses or ports, SIP apart (see `ingest.sip`).

The helpers for SNMP, H.323 and Amanda change some bytes of a payload and its checksum (kernel: nf_nat_snmp_basic,
nf_nat_h323, nf_nat_amanda); what stays is the IP identification. So in a bound flow datagrams of one direction
and identification, soon after each other, are one where several say so; fewer are ambiguous. Where nothing binds their flow
they may be one when one end is the same, and are never matched. A checksum that a capture shows is no contradiction here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.sip import START_BYTES
from nattrace.match import evidence
from nattrace.match.keys import M1, M2, M3, mix
from nattrace.match.outcome import Matches
from nattrace.match.pairing import unique_pairs
from nattrace.match.renumber.anchors import ANCHORS, GROWTH_BYTES, SOON_NS
from nattrace.match.renumber.sharing import end_keys
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, NAMED, UDP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable


def datagram_rows(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of the given rows that are whole datagrams with an identification, and say something that has no name."""
    whole = (table.fragment[rows] & np.uint16(FRAGMENT_OFFSET | MORE_FRAGMENTS)) == 0
    length = table.content_length[rows]
    whole &= (table.protocol[rows] == UDP) & (table.ip_id[rows] != 0)
    chosen: NDArray[np.int64] = rows[whole & (length >= START_BYTES) & (length < NAMED)]
    return chosen


def match_rewritten(rows_a: Rows, rows_b: Rows, lanes: Lanes) -> tuple[Matches, NDArray[np.int64]]:
    """Return datagrams that are one, and pairs of rows, of shape (2, n), that may be.

    The rows are those that stricter rules have left.
    """
    a, b = (datagram_rows(rows.table, np.arange(len(rows))) for rows in (rows_a, rows_b))
    lane_a, lane_b = lanes.lane_a[a], lanes.lane_b[b]
    pairs = [np.empty((2, 0), np.int64)]
    ids_a, ids_b = (_ids(rows.table, which) for rows, which in ((rows_a, a), (rows_b, b)))
    keys_a = [mix(ids_a ^ lane_a.astype(np.uint64) * M3)]
    keys_b = [mix(ids_b ^ lane_b.astype(np.uint64) * M3)]
    keys_a += end_keys(rows_a.table, a)
    keys_b += end_keys(rows_b.table, b)
    for number, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=True)):
        bound = number == 0
        here, there = np.flatnonzero((lane_a >= 0) == bound), np.flatnonzero((lane_b >= 0) == bound)
        i, j = unique_pairs(key_a[here], key_b[there])
        pairs.append(np.stack([a[here[i]], b[there[j]]]))
    first, second = np.unique(np.concatenate(pairs, axis=1), axis=1)
    table_a, table_b = rows_a.table, rows_b.table
    grown = (table_b.payload_length[second] - table_a.payload_length[first]).view(np.int32)
    good = np.abs(table_b.time_ns[second] - table_a.time_ns[first]) <= SOON_NS
    good &= np.abs(grown) <= GROWTH_BYTES
    # what says the same was refused for a reason, or waits for its turn; but only the beginning is compared
    said = table_a.residual_known[first] & table_b.residual_known[second]
    said &= table_a.residual[first] != table_b.residual[second]
    good &= said | (rows_a.content[first] != rows_b.content[second])
    first, second = first[good], second[good]
    lane = lanes.lane_a[first]
    many = (lane >= 0) & (np.bincount(lane + 1, minlength=1)[lane + 1] >= ANCHORS)
    a, b = first[many], second[many]
    flags = np.full(a.size, evidence.IP_ID | evidence.BINDING | evidence.REWRITTEN, np.uint16)
    flags |= evidence.kept_ends(table_a, a, table_b, b)
    return Matches(a, b, flags), np.stack([first[~many], second[~many]])


def _ids(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    return table.ip_id[rows].astype(np.uint64) * M1 ^ M2

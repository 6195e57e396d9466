"""Fragments: later fragments get the ports of their datagram's first one, so that they belong to its flow.

Only the first fragment of a datagram has a transport header (RFC 791 section 3.2). Conntrack translates
whole datagrams and fragments them again with the same identification, so what holds for the first fragment
holds for the others. This module fills columns; it never drops or reorders packets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import M1, M2, mix
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.table import PacketTable

#: First fragments remembered at one point. Linux gives up on a datagram after 30 s (ipfrag_time) and holds
#: 4 MiB of fragments (ipfrag_high_thresh), some 2,700 datagrams of full frames.
_REMEMBERED = 8_192


class FirstFragments:
    """The first fragments seen lately at one point."""

    def __init__(self) -> None:
        self._key = np.empty(0, np.uint64)
        self._sport = np.empty(0, np.uint16)
        self._dport = np.empty(0, np.uint16)
        self._icmp_type = np.empty(0, np.uint8)

    def fill(self, table: PacketTable) -> NDArray[np.bool_]:
        """Give the later fragments in `table` their ports or ICMP id; return which rows lack a first fragment."""
        orphan = np.zeros(len(table), np.bool_)
        offset = table.fragment & np.uint16(FRAGMENT_OFFSET)
        later = np.flatnonzero(offset != 0)
        first = np.flatnonzero((offset == 0) & ((table.fragment & np.uint16(MORE_FRAGMENTS)) != 0))
        if not later.size and not first.size:
            return orphan
        if first.size:
            # newest first, so that a reused identification means its latest datagram
            newest = first[::-1]
            self._key = np.concatenate([_datagram_key(table, newest), self._key])[:_REMEMBERED]
            self._sport = np.concatenate([table.sport[newest], self._sport])[:_REMEMBERED]
            self._dport = np.concatenate([table.dport[newest], self._dport])[:_REMEMBERED]
            self._icmp_type = np.concatenate([table.icmp_type[newest], self._icmp_type])[:_REMEMBERED]
        if later.size:
            keys, place = np.unique(self._key, return_index=True)
            wanted = _datagram_key(table, later)
            spot = np.minimum(np.searchsorted(keys, wanted), max(keys.size - 1, 0))
            known = keys[spot] == wanted if keys.size else np.zeros(later.size, np.bool_)
            source = place[spot[known]] if keys.size else spot[known]
            table.sport[later[known]] = self._sport[source]
            table.dport[later[known]] = self._dport[source]
            table.icmp_type[later[known]] = self._icmp_type[source]
            orphan[later[~known]] = True
        return orphan


def _datagram_key(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash what names a datagram: addresses, protocol, identification (RFC 791 section 3.2)."""
    word = (table.src[rows].astype(np.uint64) << np.uint64(32)) | table.dst[rows]
    word *= M1
    word ^= (table.ip_id[rows].astype(np.uint64) << np.uint64(16)) * M2
    word ^= (table.version[rows].astype(np.uint64) << np.uint64(8)) | table.protocol[rows]
    return mix(word)

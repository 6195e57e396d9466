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
        # what is remembered comes before the table's first row, oldest first
        place = np.concatenate([np.arange(-self._key.size, 0), first])
        self._key = np.concatenate([self._key, _datagram_key(table, first)])
        self._sport = np.concatenate([self._sport, table.sport[first]])
        self._dport = np.concatenate([self._dport, table.dport[first]])
        self._icmp_type = np.concatenate([self._icmp_type, table.icmp_type[first]])
        if later.size and place.size:
            source = self._sources(place, later, _datagram_key(table, later))
            known = source >= 0
            table.sport[later[known]] = self._sport[source[known]]
            table.dport[later[known]] = self._dport[source[known]]
            table.icmp_type[later[known]] = self._icmp_type[source[known]]
            orphan[later[~known]] = True
        else:
            orphan[later] = True
        for name in ("_key", "_sport", "_dport", "_icmp_type"):
            setattr(self, name, getattr(self, name)[-_REMEMBERED:])
        return orphan

    def _sources(
        self, place: NDArray[np.int64], later: NDArray[np.int64], wanted: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Return which first fragment each later one belongs to, -1 for none.

        An identification is used again and again: the latest first fragment before the row is meant, or
        the earliest one after it where fragments were reordered. `place` is the row of each first fragment.
        """
        keys, datagram = np.unique(self._key, return_inverse=True)
        span = int(max(place[-1], later[-1])) + 1 - int(min(place[0], 0))
        code = datagram.reshape(-1) * span + (place - min(place[0], 0))
        order = np.argsort(code)
        code = code[order]
        group = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
        spot = np.searchsorted(code, group * span + (later - min(place[0], 0)), "right") - 1
        spot += (spot < 0) | (code[spot] // span != group)
        result: NDArray[np.int64] = np.where(
            keys[group] == wanted, order[np.minimum(spot, code.size - 1)], -1
        )
        return result


def _datagram_key(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash what names a datagram: addresses, protocol, identification (RFC 791 section 3.2)."""
    word = (table.src[rows].astype(np.uint64) << np.uint64(32)) | table.dst[rows]
    word *= M1
    word ^= (table.ip_id[rows].astype(np.uint64) << np.uint64(16)) * M2
    word ^= (table.version[rows].astype(np.uint64) << np.uint64(8)) | table.protocol[rows]
    return mix(word)

"""Handshakes: two flows of one point that are the two sides of a proxy which answers handshakes itself.

SYNPROXY shifts every number of the server, so none of its packets stands in a capture twice with one key. But it
opens its own connection with the client's initial sequence number (kernel: synproxy_send_server_syn), and what
crosses afterwards keeps IP id, length, flags, the server's end and the client's number, while the server's number
differs by one constant. This module finds such flows; whose packet is whose is decided where points are matched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import FLAGS_END, M1, M2, M3, endpoint_hash, flow_hash, mix
from nattrace.match.pairing import unique_pairs
from nattrace.table import TCP, TCP_SYN, PacketTable

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from nattrace.match.rows import Rows

#: The proxy asks the server when the client has acknowledged its answer: a round trip of a long path, sent again once.
_ANSWERED_NS = 3_000_000_000
#: What crosses a proxy is seen again within this time.
_AGAIN_NS = 100_000_000
#: So many packets with different numbers must differ by one and the same constant.
_PACKETS = 4
#: Pairs of flows that are looked at: a scan may send one number to everybody.
_PAIRS_LIMIT = 4_096
#: SYN and ACK, and L4 bytes up to the flags (RFC 9293 section 3.1).
_SYN_ACK = np.uint16(0x012)
_S32, _S48 = np.uint64(32), np.uint64(48)


@dataclass(slots=True)
class Handshakes:
    """Pairs of one point's flows whose opening SYNs ask one server with one number; grows chunk by chunk."""

    #: by `flow_hash`, each flow once: the client's side, the server's side, and the server's `endpoint_hash`
    _pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    _paired: set[int] = field(default_factory=set)

    def joined(self, parts: Sequence[Rows], known: Container[int]) -> list[tuple[int, int]]:
        """Return pairs of flows that a proxy joins, as the packets of the given parts, in file order, show.

        `known` are flows that are recognised already.
        """
        for one, other, server in _same_opening([part.table for part in parts]):
            if len(self._pairs) < _PAIRS_LIMIT and not self._paired & {one, other}:
                self._pairs[one, other] = server
                self._paired |= {one, other}
        for pair in [pair for pair in self._pairs if pair[0] in known and pair[1] in known]:
            del self._pairs[pair]
        if not self._pairs:
            return []
        return _crossing(PacketTable.concatenate([part.table for part in parts]), self._pairs)


def _same_opening(tables: Sequence[PacketTable]) -> list[tuple[int, int, int]]:
    """Return pairs of flows that ask one server with one sequence number, one soon after the other, and that server."""
    opening = [np.flatnonzero((table.tcp_flags & _SYN_ACK) == TCP_SYN) for table in tables]
    if sum(rows.size for rows in opening) < 2:
        return []
    table = PacketTable.concatenate([table.take(rows) for table, rows in zip(tables, opening, strict=True)])
    server = endpoint_hash(table.version, table.dst, table.dport)
    key = server ^ table.seq.astype(np.uint64) * M3
    order = np.lexsort((table.time_ns, key))
    first, second = order[:-1], order[1:]
    hashes = flow_hash(table)[0]
    same = (key[first] == key[second]) & (hashes[first] != hashes[second])
    same &= table.time_ns[second] - table.time_ns[first] <= _ANSWERED_NS
    first, second = first[same], second[same]
    return list(zip(hashes[first].tolist(), hashes[second].tolist(), server[first].tolist(), strict=True))


def _crossing(table: PacketTable, pairs: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """Return which of the pairs of flows share packets whose numbers differ by one constant."""
    names = list(pairs)
    flows = np.array(names, np.uint64).T.ravel()  # the clients' sides, then the servers' sides
    order = np.argsort(flows)
    hashes = flow_hash(table)[0]
    place = order[np.minimum(np.searchsorted(flows, hashes, sorter=order), flows.size - 1)]
    usable = (table.protocol == TCP) & (table.ip_id != 0) & (table.l4_visible >= FLAGS_END)
    usable &= (flows[place] == hashes) & ((table.tcp_flags & TCP_SYN) == 0)
    pair = place % len(names)
    inner, outer = (np.flatnonzero(usable & (place // len(names) == side)) for side in (0, 1))
    server = np.array(list(pairs.values()), np.uint64)[pair]
    to_server = endpoint_hash(table.version, table.dst, table.dport) == server
    word = table.payload_length.astype(np.uint64) << _S32 | table.ip_id
    word ^= (table.tcp_flags.astype(np.uint64) << _S48) | to_server
    keys = mix(word * M1 ^ pair.astype(np.uint64) * M2)
    # either side may show a packet more than once
    inner, outer = (rows[np.unique(keys[rows], return_index=True)[1]] for rows in (inner, outer))
    i, j = unique_pairs(keys[inner], keys[outer])
    a, b = inner[i], outer[j]
    seq, ack = table.seq[b] - table.seq[a], table.ack[b] - table.ack[a]
    # of what goes to the server the acknowledgement differs, of what comes from it the sequence number
    kept, shift = np.where(to_server[a], seq, ack), np.where(to_server[a], ack, seq)
    good = (kept == 0) & (shift != 0) & (np.abs(table.time_ns[b] - table.time_ns[a]) <= _AGAIN_NS)
    a, shift = a[good], shift[good]
    said = pair[a].astype(np.uint64) << _S32 | shift
    number = table.seq[a].astype(np.uint64) << _S32 | table.ack[a]
    distinct = np.unique(np.stack([said, number]), axis=1)[0]
    constant, count = np.unique(distinct, return_counts=True)
    return [names[each] for each in np.unique(constant[count >= _PACKETS] >> _S32).tolist()]

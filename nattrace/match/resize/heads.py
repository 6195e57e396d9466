"""Heads: a packet that was cut, and its first piece, begin alike; that binds flows in which nothing kept its size.

The first segment of a super-frame has its sequence number, acknowledgement number, window, options, first bytes
and IP identification; a first fragment has its datagram's header with the checksum over the whole datagram.
So heads are compared as whole packets are, lengths apart, and believed on the same evidence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.keys import M1, M2, mix
from nattrace.match.outcome import Matches
from nattrace.match.resize.streams import same_transmission_word, stream_rows
from nattrace.match.unique import match_unique
from nattrace.table import FRAGMENT_OFFSET, ICMP, ICMPV6, MORE_FRAGMENTS, TCP, UDP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook, PacketTable

#: Bytes that a head must have said before it can be recognised.
HEAD_BYTES = 8


def head_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets may be the first piece of one, or be cut themselves."""
    first = (table.fragment & np.uint16(FRAGMENT_OFFSET)) == 0
    rows: NDArray[np.bool_] = first & (table.content_length >= HEAD_BYTES) & (table.payload_length > 0)
    return rows


def head_keys(table: PacketTable) -> NDArray[np.uint64]:
    """Return a key of what each packet says at its beginning, its size apart; never addresses, ports, ids."""
    tcp = table.protocol == TCP
    icmp = (table.protocol == ICMP) | (table.protocol == ICMPV6)
    word = np.where(tcp, same_transmission_word(table), np.uint64(0))
    kind = (table.icmp_type.astype(np.uint64) << np.uint64(8)) | table.icmp_code
    word ^= np.where(icmp, kind, np.uint64(0))
    word *= M1
    word ^= (table.seq.astype(np.uint64) << np.uint64(32)) | table.protocol
    word *= M2
    word ^= table.content_hash
    return mix(word)


def match_heads(rows_a: Rows, rows_b: Rows, window_ns: int, usual: Usual, book: AddressBook) -> Matches:
    """Return pairs of packets of different sizes whose beginnings are the same, as far as evidence suffices."""
    a, b = (np.flatnonzero(head_rows(rows.table)) for rows in (rows_a, rows_b))
    if not a.size or not b.size:
        return Matches(a[:0], b[:0], np.empty(0, np.uint16))
    heads_a, heads_b = _as_heads(rows_a, a), _as_heads(rows_b, b)
    found = match_unique(
        heads_a, np.arange(a.size), heads_b, np.arange(b.size), window_ns, usual, book, min(a.size, b.size)
    )
    a, b = a[found.a], b[found.b]
    # equals were compared before, and refused for a reason
    good = rows_a.content[a] != rows_b.content[b]
    good &= _one_datagram(rows_a.table, a, rows_b.table, b, found.flags)
    return Matches(a[good], b[good], found.flags[good])


def _one_datagram(
    table_a: PacketTable,
    a: NDArray[np.int64],
    table_b: PacketTable,
    b: NDArray[np.int64],
    flags: NDArray[np.uint16],
) -> NDArray[np.bool_]:
    """Return which pairs are more than two packets with the same first bytes, which many protocols send always.

    A sequence number or an identification vouches for them; else only a checksum over the whole of both.
    """
    vouched = (flags & np.uint16(evidence.IP_ID | evidence.TCP_SEQ | evidence.ICMP_SEQ)) != 0
    cut = ((table_a.fragment[a] | table_b.fragment[b]) & np.uint16(MORE_FRAGMENTS)) != 0
    both = table_a.residual_known[a] & table_b.residual_known[b]
    same = table_a.residual[a] == table_b.residual[b]
    result: NDArray[np.bool_] = np.where(cut & both, same, vouched)
    return result


def _as_heads(rows: Rows, chosen: NDArray[np.int64]) -> Rows:
    """Return rows whose keys are those of their beginnings, and whose checksums speak only where they cover all.

    A first fragment's checksum covers its datagram; a segment's covers the segment alone.
    """
    heads = rows.take(chosen)
    table = heads.table
    cut = (table.fragment & np.uint16(MORE_FRAGMENTS)) != 0
    segmented = stream_rows(table) | (table.protocol == UDP)
    known = table.residual_known & (cut | ~segmented)
    content = head_keys(table)
    exact = mix(content ^ (table.ip_id.astype(np.uint64) + np.uint64(1)) * M1)
    return replace(heads, table=replace(table, residual_known=known), content=content, exact=exact)

"""Evidence: how much two packets of two points agree on, in bits, and whether anything contradicts.

The figures are estimates of how hard it is for two different packets to agree by chance. They are set so
that no single thing that traffic commonly repeats (an ICMP sequence number, a keep-alive's payload, a
server's address) can carry a match alone. This module weighs; it never pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import icmp_query_rows
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.table import AddressBook, PacketTable

#: Evidence flags; `names` spells them for reports.
ICMP_SEQ, TCP_SEQ, TCP_ACK, PAYLOAD, CHECKSUM, IP_ID, SAME_SRC, SAME_DST, BINDING, NEAREST = (
    1 << n for n in range(10)
)
_NAMES = (
    "icmp-seq", "tcp-seq", "tcp-ack", "payload", "checksum", "ip-id", "same-src", "same-dst", "binding", "nearest",
)  # fmt: skip

#: Bits of agreement from which a pair that is unique on both sides is believed on its own.
STRONG = 40

_BITS_TCP_SEQ = 24  # 32 random bits, less what windows of nearby connections share
_BITS_TCP_ACK = 16
_BITS_ICMP_SEQ = 4  # every ping counts from 0 or 1
_BITS_IP_ID = 14  # 16 bits; small counters repeat
_BITS_CONTENT_LONG = 24  # 8 bytes and more
_BITS_CONTENT_SHORT = 12  # 4 to 7 bytes
_BITS_CONTENT_TINY = 4
_BITS_RESIDUAL = 12  # 16 bits over the whole payload; constant payloads share it
_BITS_ADDRESS = 16
_BITS_PORT = 8


def weigh(
    a: PacketTable, b: PacketTable, book: AddressBook
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.bool_]]:
    """Compare row i of `a` with row i of `b`, which have equal content keys.

    Returns (bits, flags, conflict). A conflict is a field that Linux NAT never changes and that differs:
    both IP identifications present and different, or both checksum residuals known and different. Where
    neither endpoint survived, only an IP identification or a TCP sequence number can vouch for the pair
    (a proxy copies payloads onto its own connection), so anything less is a conflict too.
    """
    tcp = a.protocol == TCP
    bits = np.zeros(len(a), np.int32)
    flags = np.zeros(len(a), np.uint16)

    def credit(rows: NDArray[np.bool_], flag: int, amount: int) -> None:
        flags[rows] |= np.uint16(flag)
        bits[rows] += amount

    tcp_seq = tcp & (a.seq != 0)
    credit(tcp_seq, TCP_SEQ, _BITS_TCP_SEQ)
    credit(tcp & (a.ack != 0) & (a.l4_visible >= 12) & (b.l4_visible >= 12), TCP_ACK, _BITS_TCP_ACK)
    if not tcp.all():
        credit(icmp_query_rows(a), ICMP_SEQ, _BITS_ICMP_SEQ)

    # Payload and checksum residual speak of the same bytes: only the stronger of the two counts.
    length = a.content_length
    content = np.where(
        length >= 8,
        _BITS_CONTENT_LONG,
        np.where(length >= 4, _BITS_CONTENT_SHORT, np.where(length > 0, _BITS_CONTENT_TINY, 0)),
    )
    both_residuals = a.residual_known & b.residual_known
    same_residual = both_residuals & (a.residual == b.residual)
    flags[length > 0] |= np.uint16(PAYLOAD)
    flags[same_residual] |= np.uint16(CHECKSUM)
    bits += np.maximum(content, np.where(same_residual, _BITS_RESIDUAL, 0)).astype(np.int32)

    both_ids = (a.ip_id != 0) & (b.ip_id != 0)
    same_id = a.ip_id == b.ip_id
    credit(both_ids & same_id, IP_ID, _BITS_IP_ID)

    query = icmp_query_rows(a) if not tcp.all() else np.zeros(len(a), np.bool_)
    same_version = a.version == b.version
    same_src = same_version & (a.src == b.src)
    same_dst = same_version & (a.dst == b.dst)
    credit(same_src, SAME_SRC, _BITS_ADDRESS)
    credit(same_dst, SAME_DST, _BITS_ADDRESS)
    ported = ~query & ((a.sport != 0) | (a.dport != 0))
    bits[same_src & ported & (a.sport == b.sport)] += _BITS_PORT
    bits[same_dst & ported & (a.dport == b.dport)] += _BITS_PORT

    conflict = (both_ids & ~same_id) | (both_residuals & ~same_residual)
    conflict |= ~(same_src | same_dst) & ~(both_ids & same_id) & ~tcp_seq
    # Multicast and broadcast are not translated: a group address at both points must be the same one,
    # and its sender too, or two hosts are merely saying the same thing to everybody.
    conflict |= (book.is_group(a.version, a.dst) | book.is_group(b.version, b.dst)) & ~(same_src & same_dst)
    return bits, flags, conflict


def names(flags: int) -> tuple[str, ...]:
    """Spell evidence flags as the report prints them."""
    return tuple(name for n, name in enumerate(_NAMES) if flags >> n & 1)

"""Upper layers: ports, ids, sequence numbers, and what of a packet NAT leaves alone, for a block at once.

It fills table columns from headers at known places. It never follows a tunnel and never believes a length:
only bytes that are captured and inside the datagram count, and the content hash looks no further than what
every observation point has.
Formats: RFC 792, RFC 768, RFC 9293, RFC 3828, RFC 9260, RFC 4340, RFC 4443.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.ingest.gather import gather, prefix_masks
from nattrace.ingest.ip import L4, headers
from nattrace.ingest.sip import OTHER, START_BYTES, may_be_sip, message_names
from nattrace.table import (
    DCCP,
    ECHO_REPLY,
    ECHO_REPLY_V6,
    ECHO_REQUEST,
    ECHO_REQUEST_V6,
    FRAGMENT_OFFSET,
    GRE,
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    TCP_SYN,
    UDP,
    UDPLITE,
)

if TYPE_CHECKING:
    from collections import Counter

    from numpy.typing import NDArray

    from nattrace.ingest.ip import Datagrams
    from nattrace.ingest.source import ReadOptions
    from nattrace.table import PacketTable

#: Bytes that `content_hash` covers at most: enough for TCP timestamps and the start of any payload.
CONTENT_BYTES: Final = 32

# What an ICMP message is, by version and type. Queries carry an id and a sequence number at bytes 4 and 6
# (RFC 792, RFC 950, RFC 4443). Errors quote a packet, which NAT rewrites too (kernel: nf_conntrack_icmpv4_error;
# RFC 4443 section 2.1 for all ICMPv6 types below 128).
_QUERY, _ERROR = 1, 2
_MESSAGE = np.zeros((2, 256), np.uint8)
_MESSAGE[0, [0, 8, 13, 14, 15, 16, 17, 18]] = _QUERY
_MESSAGE[0, [3, 4, 5, 11, 12]] = _ERROR
_MESSAGE[1, [128, 129]] = _QUERY
_MESSAGE[1, :128] = _ERROR

# How a header is laid out. UDP and UDP-Lite differ in nothing that matters here.
_OTHER, _TCP, _UDP, _ICMP, _ICMPV6, _SCTP, _DCCP = range(7)
_KIND = np.zeros((2, 256), np.uint8)
for _number, _kind in ((TCP, _TCP), (UDP, _UDP), (UDPLITE, _UDP), (SCTP, _SCTP), (DCCP, _DCCP)):
    _KIND[:, _number] = _kind
_KIND[0, ICMP], _KIND[1, ICMPV6] = _ICMP, _ICMPV6

# By kind: bytes without which there is no row, bytes of all fields, header length, where the checksum ends,
# where the content begins that NAT does not rewrite.
#                      other TCP UDP ICMP ICMPv6 SCTP DCCP
_NEEDED = np.array([0, 4, 4, 2, 2, 4, 4], np.int64)
_WANTED = np.array([0, 20, 8, 8, 8, 8, 8], np.int64)
_HEADER = np.array([0, 20, 8, 8, 8, 12, 12], np.int64)
_CHECKSUM_END = np.array([0, 18, 8, 4, 4, 0, 8], np.int64)
_CONTENT = np.array([0, 20, 8, 4, 4, 12, 8], np.int64)
_QUERY_NEEDED = 6  # up to the id
# What PPTP's GRE says that it carries, where that is said, and where its call id ends (RFC 2637 section 4.1).
_PPP, _PPP_END, _CALL_ID_END = 0x880B, 4, 8

# By kind: how many leading bytes hold whole fields when that many are captured; half a field is no field.
_WHOLE_FIELDS = np.zeros((7, L4.itemsize + 1), np.int64)
for _kind, _ends in enumerate(
    (
        (),
        (2, 4, 8, 12, 14, 16, 18, 20),
        (2, 4, 6, 8),
        (1, 2, 4, 6, 8),
        (1, 2, 4, 6, 8),
        (2, 4, 8),
        (2, 4, 6, 8),
    )
):
    for _end in _ends:
        _WHOLE_FIELDS[_kind, _end:] = _end
_HEADER_MASK = prefix_masks(L4.itemsize)

#: Odd 64-bit constants with no structure (from xxHash, BSD; any will do, but they must never change).
_MIX: Final = tuple(
    np.uint64(n) for n in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63)
)
_MIX_LENGTH: Final = np.uint64(0x27D4EB2F165667C5)
# What an ICMPv6 echo's checksum covers beyond ICMP's: the type's difference, at its place in the first word, and
# the pseudo-header's next header (RFC 4443 section 2.3); its length is left in, see `keys.without_length`.
_BEYOND_ICMP = np.zeros(256, np.uint64)
_BEYOND_ICMP[ECHO_REQUEST_V6] = ((ECHO_REQUEST_V6 - ECHO_REQUEST) << 8) + ICMPV6
_BEYOND_ICMP[ECHO_REPLY_V6] = ((ECHO_REPLY_V6 - ECHO_REPLY) << 8) + ICMPV6
_CONTENT_MASK = prefix_masks(CONTENT_BYTES).view(f"V{CONTENT_BYTES}").reshape(-1)
_NONE = np.zeros(0, np.intp)


def legible_rows(rows: Datagrams, skipped: Counter[str]) -> tuple[Datagrams, NDArray[np.uint8]]:
    """Return the rows that have ports or id, and their kinds; header fields that were cut off become 0."""
    six = rows.version == 6
    kind = _KIND[0][rows.protocol]
    if six.any():
        kind[six] = _KIND[1][rows.protocol[six]]
    later = rows.fragment & FRAGMENT_OFFSET != 0
    if later.any():
        kind[later] = _OTHER
    have = rows.available - rows.l4_offset
    short = np.flatnonzero(have < _WANTED[kind])
    if not short.size:
        return rows, kind
    whole = _WHOLE_FIELDS[kind[short], np.minimum(have[short], L4.itemsize)]
    head = headers(rows.l4, short).view(np.uint8).reshape(-1, L4.itemsize) & _HEADER_MASK[whole]
    rows.l4[short] = head.view(L4).reshape(-1)
    needed = _NEEDED[kind[short]]
    icmp = (kind[short] == _ICMP) | (kind[short] == _ICMPV6)
    query = icmp & (_MESSAGE[six[short].astype(np.intp), head[:, 0]] == _QUERY)
    needed[query] = _QUERY_NEEDED
    cut = short[have[short] < needed]
    if not cut.size:
        return rows, kind
    skipped["truncated"] += cut.size
    keep = np.ones(kind.size, np.bool_)
    keep[cut] = False
    return rows.take(keep), kind[keep]


def read_l4(
    buffer: NDArray[np.uint8],
    rows: Datagrams,
    options: ReadOptions,
    table: PacketTable,
    skipped: Counter[str],
) -> tuple[Datagrams, PacketTable]:
    """Fill the upper-layer columns of `table` from its row 0 on; return the rows, and the part of the table, filled.

    Rows without ports or id are left out and counted as ``truncated``. `table` has at least as many rows as
    `rows`. What every column means is said in `PacketTable`, and in `decode` for hash and residual.
    """
    rows, kind = legible_rows(rows, skipped)
    if rows.at.size != len(table):
        table = table.take(slice(0, rows.at.size))
    l4 = rows.l4
    # The layout of TCP for all; rows of other protocols are put right after it.
    table.sport[:] = l4["word0"]
    table.dport[:] = l4["word1"]
    table.seq[:] = l4["seq"]
    table.ack[:] = l4["ack"]
    flags = l4["flags"].astype(np.uint16)
    np.bitwise_and(flags, 0x0FFF, out=table.tcp_flags)
    table.window[:] = l4["window"]
    table.checksum[:] = l4["tcp_checksum"]
    table.icmp_type[:] = 0
    table.icmp_code[:] = 0
    header = (flags >> 12).astype(np.int64)
    header *= 4
    np.maximum(header, _HEADER[_TCP], out=header)
    content = np.full(rows.at.size, _CONTENT[_TCP])
    known = np.ones(rows.at.size, np.bool_)
    quoting = _NONE
    not_tcp = np.flatnonzero(kind != _TCP)
    if not_tcp.size:
        kinds = kind[not_tcp]
        header[not_tcp] = _HEADER[kinds]
        content[not_tcp] = _CONTENT[kinds]
        known[not_tcp] = _CHECKSUM_END[kinds] > 0
        _other_layouts(table, not_tcp, kinds, headers(l4, not_tcp))
        dccp = np.flatnonzero(kind == _DCCP)
        header[dccp] = np.maximum((l4["word2"][dccp] >> 8).astype(np.int64) * 4, _HEADER[_DCCP])
        known[not_tcp[(kinds == _UDP) & (table.checksum[not_tcp] == 0)]] = False
        # PPTP's GRE has a call id for a port, which NAT rewrites (kernel: nf_nat_pptp)
        calls = (rows.protocol[not_tcp] == GRE) & (kinds == _OTHER) & (l4["word1"][not_tcp] == _PPP)
        calls &= ((l4["word0"][not_tcp] & 7) == 1) & ((rows.fragment[not_tcp] & FRAGMENT_OFFSET) == 0)
        calls &= rows.available[not_tcp] >= rows.l4_offset[not_tcp] + _PPP_END
        content[not_tcp[calls]] = _CALL_ID_END
        icmp = not_tcp[(kinds == _ICMP) | (kinds == _ICMPV6)]
        message = _icmp(table, icmp, (kind[icmp] == _ICMPV6).astype(np.intp), headers(l4, icmp))
        content[icmp[message == _QUERY]] = _HEADER[_ICMP]
        quoting = icmp[message == _ERROR]
        known[quoting] = False
    # Options of a SYN may be clamped (MSS) or stripped on the way, so its content is what follows them.
    syn = np.flatnonzero(table.tcp_flags & TCP_SYN)
    content[syn] = header[syn]
    l4_length = rows.ip_length - rows.l4_offset
    known &= ~rows.routed
    known &= rows.available - rows.l4_offset >= _CHECKSUM_END[kind]
    _residual(table, rows, kind, l4_length, known)
    l4_length -= header
    np.maximum(l4_length, 0, out=l4_length)
    table.payload_length[:] = l4_length
    visible = np.minimum(rows.available, options.comparable_bytes)
    visible -= rows.l4_offset
    # minimum and maximum: on small batches np.clip costs as much as five of the steps above.
    np.maximum(visible, 0, out=visible)
    table.l4_visible[:] = np.minimum(visible, 255)
    visible -= content
    np.maximum(visible, 0, out=visible)
    np.minimum(visible, CONTENT_BYTES if options.comparable_content else 0, out=visible)
    visible[quoting] = 0
    content += rows.l4_offset
    content += rows.at
    table.content_length[:] = visible
    table.content_hash[:] = _content_hash(buffer, content, visible)
    if not_tcp.size:
        _name_messages(buffer, rows, kind, not_tcp, options.comparable_bytes, table)
    return rows, table


def _name_messages(
    buffer: NDArray[np.uint8],
    rows: Datagrams,
    kind: NDArray[np.uint8],
    chosen: NDArray[np.intp],
    comparable_bytes: int,
    table: PacketTable,
) -> None:
    """Of the chosen rows, give SIP messages over UDP the content that helpers leave alone: what names them."""
    chosen = chosen[(kind[chosen] == _UDP) & (table.content_length[chosen] >= START_BYTES)]
    start = rows.at[chosen] + rows.l4_offset[chosen] + _HEADER[_UDP]
    asked = may_be_sip(buffer, start)
    chosen, start = chosen[asked], start[asked]
    if not chosen.size:
        return
    stop = rows.at[chosen] + np.minimum(rows.available[chosen], comparable_bytes)
    names, known = message_names(buffer, start, stop, comparable_bytes)
    named = np.flatnonzero(known != OTHER)
    table.content_hash[chosen[named]] = names[named]
    table.content_length[chosen[named]] = known[named]


def _other_layouts(
    table: PacketTable, at: NDArray[np.intp], kind: NDArray[np.uint8], l4: NDArray[Any]
) -> None:
    """Put right the rows `at`, which are of `kind`, not TCP, and have the headers `l4`."""
    table.ack[at] = 0
    table.tcp_flags[at] = 0
    table.window[at] = 0
    table.seq[at] = np.where(kind == _SCTP, l4["seq"], 0)
    late = (kind == _UDP) | (kind == _DCCP)
    early = (kind == _ICMP) | (kind == _ICMPV6)
    table.checksum[at] = np.where(late, l4["word3"], np.where(early, l4["word1"], 0))
    portless = at[early | (kind == _OTHER)]
    table.sport[portless] = 0
    table.dport[portless] = 0


def _icmp(
    table: PacketTable, at: NDArray[np.intp], six: NDArray[np.intp], l4: NDArray[Any]
) -> NDArray[np.uint8]:
    """Fill the rows `at` of ICMP (`six` 0) and ICMPv6 (`six` 1); return what each message is."""
    message: NDArray[np.uint8] = _MESSAGE[six, l4["type"]]
    table.icmp_type[at] = l4["type"]
    table.icmp_code[at] = l4["code"]
    query = message == _QUERY
    asked = at[query]
    table.sport[asked] = table.dport[asked] = l4["word2"][query]
    table.seq[asked] = l4["word3"][query]
    return message


def _residual(
    table: PacketTable,
    rows: Datagrams,
    kind: NDArray[np.uint8],
    length: NDArray[np.int64],
    known: NDArray[np.bool_],
) -> None:
    """Fill `residual` and `residual_known`; `known` says where a checksum is at hand, offload apart.

    All sums are of 16-bit words modulo 65535 (RFC 1071); there -x is 65535 - x, and ~x is -x as well.
    """
    checksum = table.checksum
    # Transmit offload leaves the bare sum of the pseudo-header for the card to finish (kernel: CHECKSUM_PARTIAL).
    pseudo = rows.address_sum + rows.protocol
    pseudo += length.astype(np.uint64)
    unfinished = _fold(pseudo) == checksum
    total = rows.address_sum + checksum
    icmp = np.flatnonzero(kind == _ICMP)
    if icmp.size:
        total[icmp] = checksum[icmp]
    total += table.sport
    total += table.dport
    queries = np.flatnonzero((kind == _ICMP) | (kind == _ICMPV6))
    if queries.size:
        total[queries] -= table.dport[queries]  # the id stands in both columns, in the packet once
        unfinished[queries] = False  # no sender leaves ICMP or ICMPv6 to the card; equal sums are chance
    six = queries[(kind[queries] == _ICMPV6) & (_BEYOND_ICMP[table.icmp_type[queries]] != 0)]
    if six.size:
        # as ICMP would have it but for the length, which a first fragment of the datagram does not tell
        total[six] += _BEYOND_ICMP[table.icmp_type[six]]
    known &= ~unfinished
    residual = 0xFFFF - _fold(total)
    residual *= residual != 0xFFFF
    residual *= known
    table.residual[:] = residual
    table.residual_known[:] = known


def _fold(total: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ones' complement sum of the 16-bit words of numbers below 2**40; 0 only for 0."""
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@cache
def fillings() -> NDArray[np.uint64]:
    """Return the content hashes of 1 to 32 equal bytes, sorted: what a sender fills a payload with."""
    buffer = np.repeat(np.arange(256, dtype=np.uint8), CONTENT_BYTES)
    length = np.tile(np.arange(1, CONTENT_BYTES + 1), 256)
    at = np.repeat(np.arange(256) * CONTENT_BYTES, CONTENT_BYTES)
    return np.sort(_content_hash(buffer, at, length))


def _content_hash(
    buffer: NDArray[np.uint8], at: NDArray[np.int64], length: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Hash `length` (0..32) bytes at each position; 0 for none. The same on every machine and in every run.

    Each step is a bijection of the state, so contents that differ in one 8-byte word never collide.
    """
    words = gather(buffer, at, CONTENT_BYTES).view("<u8").reshape(-1, CONTENT_BYTES // 8)
    words &= _CONTENT_MASK[length].view("<u8").reshape(-1, CONTENT_BYTES // 8)
    state = length.astype(np.uint64)
    state *= _MIX_LENGTH
    for column, factor in enumerate(_MIX):
        state ^= words[:, column]
        state *= factor
        state ^= state >> 32
    return state

"""Keys: what a packet is, apart from everything NAT may rewrite.

A key never contains an address, a port, an ICMP id, a TTL or an IP or L4 checksum. Packets of two points
with equal keys are candidates for being the same packet; this module never decides that they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.table import (
    DCCP,
    ECHO_REPLY,
    ECHO_REPLY_V6,
    ECHO_REQUEST,
    ECHO_REQUEST_V6,
    FRAGMENT_OFFSET,
    ICMP,
    ICMPV6,
    KIND,
    MORE_FRAGMENTS,
    NAMED,
    SCTP,
    TCP,
    UDP,
    UDPLITE,
)

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from nattrace.table import PacketTable

# Odd 64-bit constants with well spread bits (the golden ratio and primes of xxHash and Murmur3).
M1 = np.uint64(0x9E3779B97F4A7C15)
M2 = np.uint64(0xC2B2AE3D27D4EB4F)
M3 = np.uint64(0xFF51AFD7ED558CCD)
_S16, _S17, _S29, _S31, _S32, _S48 = (np.uint64(n) for n in (16, 17, 29, 31, 32, 48))

_ECHO_HEADER_BYTES = 8  # RFC 792, RFC 4443
#: L4 bytes that must be comparable before a TCP field may enter a key (RFC 9293 section 3.1).
ACK_END, FLAGS_END, WINDOW_END = 12, 14, 16
#: Where sequence numbers end in the headers of TCP and of ICMP queries (RFC 792).
SEQ_END = 8


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit values in place so that every input bit moves every output bit; return them."""
    value ^= value >> _S31
    value *= M2
    value ^= value >> _S29
    value *= M3
    value ^= value >> _S32
    return value


def packet_keys(
    table: PacketTable, *, residuals: bool = True
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return (exact, content) keys, uint64, one a row.

    `content` hashes protocol, payload length, fragment offset, TCP seq, ack, flags and window or ICMP
    type, code, seq and checksum residual, and the content hash. `exact` adds the IP identification,
    which Linux NAT keeps but which may be 0, wrap, or be rewritten by other boxes. TCP fields that the
    comparable length cuts off at some point of the analysis are left out at every point, and without
    `residuals` so are the checksums, which printed captures lack. Where the data offset is cut off
    somewhere, no point's payload length can be compared; the length of the whole datagram stands for it.
    An ICMPv6 echo has the keys of the same ICMP echo: a NAT64 makes one of the other. A message that helpers
    rewrite (NAMED, KIND) may have any length.
    """
    tcp = table.protocol == TCP
    visible = table.l4_visible
    seq = table.seq
    protocol = table.protocol
    word: NDArray[np.uint64] = seq.astype(np.uint64)
    word <<= _S32
    # times true or false: several times as fast as np.where
    ack = table.ack * (tcp & (visible >= ACK_END))
    whole = visible >= FLAGS_END
    flags = table.tcp_flags * (tcp & whole)
    window = table.window * (tcp & (visible >= WINDOW_END))
    icmp = np.flatnonzero((table.protocol == ICMP) | (table.protocol == ICMPV6))
    if icmp.size:
        # type, code and residual ride where TCP has its acknowledgement number
        residual = without_length(table, icmp) * (table.residual_known[icmp] & residuals)
        protocol = protocol.copy()
        protocol[icmp], icmp_type = as_icmp(protocol[icmp], table.icmp_type[icmp])
        kind = (icmp_type.astype(np.uint32) << np.uint32(8)) | table.icmp_code[icmp]
        ack[icmp] = (kind << np.uint32(16)) | residual
    word |= ack
    word *= M1
    word ^= word >> _S29
    other: NDArray[np.uint64] = table.payload_length.astype(np.uint64)
    cut = np.flatnonzero(tcp & ~whole)
    if cut.size:
        other[cut] = table.ip_length[cut]
    message = np.flatnonzero(table.content_length >= NAMED)
    if message.size:
        other[message] = 0
    other <<= _S32
    other |= flags.astype(np.uint64) << _S16
    other |= window
    other ^= protocol.astype(np.uint64) << _S48
    place = table.fragment & np.uint16(FRAGMENT_OFFSET | MORE_FRAGMENTS)
    if place.any():
        other ^= (place.astype(np.uint64) << _S48) * M3
    other *= M2
    word ^= other
    word ^= table.content_hash
    content = mix(word)
    exact: NDArray[np.uint64] = content ^ (table.ip_id.astype(np.uint64) + np.uint64(1)) * M1
    return content, mix(exact)


def illegible(table: PacketTable) -> NDArray[np.bool_]:
    """Return which TCP and ICMP packets are cut off, here or at another point, before their sequence number."""
    numbered = (table.protocol == TCP) | (table.protocol == ICMP) | (table.protocol == ICMPV6)
    later = (table.fragment & np.uint16(FRAGMENT_OFFSET)) != 0
    result: NDArray[np.bool_] = numbered & ~later & (table.l4_visible < SEQ_END)
    return result


def without_length(table: PacketTable, rows: NDArray[np.int64] | slice) -> NDArray[np.uint16]:
    """Return checksum residuals, those of whole ICMPv6 echoes without the length that ICMP's do not hold."""
    residual: NDArray[np.uint16] = table.residual[rows]
    protocol = table.protocol[rows]
    six = np.flatnonzero((protocol == ICMPV6) & ((table.fragment[rows] & np.uint16(MORE_FRAGMENTS)) == 0))
    if six.size:
        residual = residual.copy()
        length = table.payload_length[rows][six].astype(np.int64) + _ECHO_HEADER_BYTES
        residual[six] = (residual[six].astype(np.int64) - length) % 65535
    return residual


def as_icmp(
    protocol: NDArray[np.uint8], icmp_type: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return protocols and ICMP types with ICMPv6 echoes written as ICMP's (RFC 7915 sections 4.2 and 5.2)."""
    six = protocol == ICMPV6
    request, reply = six & (icmp_type == ECHO_REQUEST_V6), six & (icmp_type == ECHO_REPLY_V6)
    kind = np.where(request, np.uint8(ECHO_REQUEST), np.where(reply, np.uint8(ECHO_REPLY), icmp_type))
    return np.where(request | reply, np.uint8(ICMP), protocol), kind


def commonplace_keys(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a key of what each of the given packets says, without anything that counts packets.

    Packets of one key carry the same payload: keep-alives, pings with a constant filling, announcements.
    An ICMP query's residual without its sequence number is the sum of its payload, even where the snaplen
    cut the payload off.
    """
    protocol = table.protocol[rows]
    length = np.where(table.content_length[rows] == KIND, np.uint32(0), table.payload_length[rows])
    word = table.content_hash[rows] ^ (length.astype(np.uint64) << _S32)
    word ^= (protocol.astype(np.uint64) << _S16) | (table.icmp_type[rows].astype(np.uint64) << np.uint64(8))
    icmp = ((protocol == ICMP) | (protocol == ICMPV6)) & table.residual_known[rows]
    if icmp.any():
        filling = (table.residual[rows].astype(np.int64) - (table.seq[rows] & np.uint32(0xFFFF))) % 65535
        word ^= np.where(icmp, filling, 0).astype(np.uint64) << _S48
    return mix(word)


def blank_echoes(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the given packets are ICMP queries whose payload is all zeros or ones by its checksum.

    An ICMPv6 echo's residual is that of the same ICMP echo, the length apart (see `decode`).
    """
    protocol, icmp_type = as_icmp(table.protocol[rows], table.icmp_type[rows])
    rest = without_length(table, rows).astype(np.int64) - (table.seq[rows] & np.uint32(0xFFFF))
    rest -= (icmp_type.astype(np.int64) << 8) | table.icmp_code[rows]
    blank: NDArray[np.bool_] = (rest % 65535 == 0) & table.residual_known[rows] & (protocol == ICMP)
    return blank


def endpoint_hash(
    version: NDArray[np.uint8], address: NDArray[np.uint32], port: NDArray[np.uint16]
) -> NDArray[np.uint64]:
    """Hash one endpoint (address and port); equal endpoints of one address book hash alike."""
    word: NDArray[np.uint64] = address.astype(np.uint64)
    word <<= _S16
    word |= port
    word ^= version.astype(np.uint64) << _S48
    word *= M1
    word ^= word >> _S29
    word *= M2
    word ^= word >> _S32
    return word


def flow_hash(table: PacketTable) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return (hash, backward): one hash for both directions of a conversation, and which one it is.

    Two hosts that query each other with one ICMP id (ping as PID 1 of two containers) have two conversations, as
    conntrack has two entries: who asks makes the difference.

    `backward` is True where the source endpoint hashes higher than the destination endpoint: the "low"
    endpoint of a flow is the one with the smaller hash, whatever the direction of the packet.
    """
    source = endpoint_hash(table.version, table.src, table.sport)
    target = endpoint_hash(table.version, table.dst, table.dport)
    backward = source > target
    low = np.minimum(source, target)
    high = np.maximum(source, target)
    low *= M3
    low ^= high
    low += table.protocol
    icmp = np.flatnonzero((table.protocol == ICMP) | (table.protocol == ICMPV6))
    if icmp.size:
        asked_by_high = backward[icmp] ^ icmp_answer_rows(table, icmp)
        # a host that queries itself asks from both ends at once
        low[icmp] += (asked_by_high & (source[icmp] != target[icmp])) * M2
    return mix(low), backward


def icmp_answer_rows(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the given ICMP or ICMPv6 rows answer a query (RFC 792, RFC 950, RFC 4443)."""
    kind = table.icmp_type[rows]
    v4 = (kind == ECHO_REPLY) | (kind == 14) | (kind == 16) | (kind == 18)
    answers: NDArray[np.bool_] = np.where(table.protocol[rows] == ICMP, v4, kind == ECHO_REPLY_V6)
    return answers


def icmp_query_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which rows are ICMP or ICMPv6 packets that carry an id (RFC 792, RFC 950, RFC 4443)."""
    v4 = table.protocol == ICMP
    v6 = table.protocol == ICMPV6
    kind = table.icmp_type
    query = (kind == ECHO_REPLY) | (kind == ECHO_REQUEST) | ((kind >= 13) & (kind <= 18))
    query6 = (kind == ECHO_REQUEST_V6) | (kind == ECHO_REPLY_V6)
    rows: NDArray[np.bool_] = (v4 & query) | (v6 & query6)
    return rows


def icmp_error_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which rows are ICMP errors: they quote a packet and have no id (RFC 792, RFC 4443)."""
    v4 = table.protocol == ICMP
    v6 = table.protocol == ICMPV6
    kind = table.icmp_type
    error = (kind == 3) | (kind == 4) | (kind == 5) | (kind == 11) | (kind == 12)
    rows: NDArray[np.bool_] = (v4 & error) | (v6 & (kind < 128))
    return rows


def has_ports(protocol: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which protocol numbers have ports at the start of their header."""
    rows: NDArray[np.bool_] = (
        (protocol == TCP)
        | (protocol == UDP)
        | (protocol == UDPLITE)
        | (protocol == SCTP)
        | (protocol == DCCP)
    )
    return rows

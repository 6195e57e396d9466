"""Evidence: how much two packets of two points agree on, in bits, and whether anything contradicts.

The figures are estimates of how hard it is for two different packets to agree by chance. They are set so
that no single thing that traffic commonly repeats (an ICMP sequence number, a keep-alive's payload, a
server's address) can carry a match alone. This module weighs; it never pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nattrace.match.keys import ACK_END, has_ports, without_length
from nattrace.table import FRAGMENT_OFFSET, ICMP, ICMPV6, KIND, NAMED, TCP, TCP_SYN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.table import AddressBook, PacketTable

#: Evidence flags; `names` spells them for reports.
(
    ICMP_SEQ,
    TCP_SEQ,
    TCP_ACK,
    PAYLOAD,
    CHECKSUM,
    IP_ID,
    SAME_SRC,
    SAME_DST,
    BINDING,
    NEAREST,
    BYTE_RANGE,
    QUOTE,
    SHIFTED,
    REWRITTEN,
) = (1 << n for n in range(14))
_NAMES = (
    "icmp-seq", "tcp-seq", "tcp-ack", "payload", "checksum", "ip-id", "same-src", "same-dst", "binding", "nearest",
    "byte-range", "quote", "shifted-numbers", "rewritten-payload",
)  # fmt: skip

#: Bits of agreement from which a pair that is unique on both sides is believed on its own: an IP
#: identification with a TCP sequence number or a payload, also where NAT changed both endpoints at once.
STRONG = 38

BITS_TCP_SEQ = 24  # 32 random bits, less what windows of nearby connections share
_BITS_TCP_ACK = 16
_BITS_ICMP_SEQ = 4  # every ping counts from 0 or 1
BITS_IP_ID = 14  # 16 bits; small counters repeat
#: TCP repeats a segment after 200 ms at the earliest (Linux TCP_RTO_MIN); closer twins are one packet.
TCP_REPEAT_NS = 100_000_000
#: By content length: 1 to 3 bytes say little, 8 and more say much unless they repeat. So does a message's name.
CONTENT_BITS = np.array([0, *[4] * 3, *[12] * 4, *[24] * (NAMED - 7)], np.int16)
CONTENT_BITS = np.append(CONTENT_BITS, np.int16(4))  # KIND
_BITS_RESIDUAL = 12  # 16 bits over the whole payload; constant payloads share it
BITS_ADDRESS = 16
BITS_PORT = 8
#: TCP options at most (RFC 9293 section 3.1): where the data offset was cut off, so much of what looks like
#: payload may be options.
_TCP_OPTION_BYTES = 40


def weigh(
    table_a: PacketTable,
    rows_a: NDArray[np.int64],
    table_b: PacketTable,
    rows_b: NDArray[np.int64],
    book: AddressBook,
    *,
    renumbered: int = 0,
) -> tuple[NDArray[np.int16], NDArray[np.uint16], NDArray[np.bool_]]:
    """Compare row rows_a[i] of one table with row rows_b[i] of the other; their content keys are equal.

    `renumbered` says whose IP identifications a box writes anew (see `renumbered`): they say nothing.

    Returns (bits, flags, conflict). A conflict is a field that Linux NAT never changes and that differs:
    both IP identifications present and different, or both checksum residuals known and different (but see
    `_clamped`). Across IP versions an endpoint is kept when one address embeds the other (RFC 6052). Where
    neither endpoint survived, only an IP identification or a TCP sequence number can vouch for the pair
    (a proxy copies payloads onto its own connection), so anything less is a conflict too. Nor is what may
    be a bare acknowledgement, its acknowledgement number cut off and without IP identification, a match.
    """

    def a(name: str) -> NDArray[Any]:
        return cast("NDArray[Any]", getattr(table_a, name)[rows_a])

    def b(name: str) -> NDArray[Any]:
        return cast("NDArray[Any]", getattr(table_b, name)[rows_b])

    # equal content keys: protocol, TCP and ICMP fields and the content are the same on both sides
    protocol = a("protocol")
    tcp = protocol == TCP
    tcp_seq = tcp & (a("seq") != 0)
    visible = np.minimum(a("l4_visible"), b("l4_visible")) >= ACK_END
    tcp_ack = tcp & (a("ack") != 0) & visible
    query = (protocol == ICMP) | (protocol == ICMPV6)
    flags = tcp_seq * np.uint16(TCP_SEQ)
    flags |= tcp_ack * np.uint16(TCP_ACK)
    flags |= query * np.uint16(ICMP_SEQ)

    # Payload and checksum residual speak of the same bytes: only the stronger of the two counts.
    content_length = a("content_length")
    both_residuals = a("residual_known") & b("residual_known")
    same_residual = a("residual") == b("residual")
    version_a, version_b = a("version"), b("version")
    same_version = version_a == version_b
    across = np.flatnonzero(~same_version)
    if across.size:
        sums = without_length(table_a, rows_a[across]), without_length(table_b, rows_b[across])
        same_residual[across] = sums[0] == sums[1]
    flags |= ((content_length > 0) & (content_length != KIND)) * np.uint16(PAYLOAD)
    flags |= (both_residuals & same_residual) * np.uint16(CHECKSUM)

    id_a, id_b = a("ip_id"), b("ip_id")
    if across.size:
        # a fragment header has 32 bits; NAT64 carries the low 16 over (RFC 7915 section 5.1.1)
        id_a[across] &= np.uint32(0xFFFF)
        id_b[across] &= np.uint32(0xFFFF)
    both_ids = (id_a != 0) & (id_b != 0)
    same_id = id_a == id_b
    vouched = both_ids & same_id
    flags |= vouched * np.uint16(IP_ID)

    dst_a, dst_b = a("dst"), b("dst")
    same_src = same_version & (a("src") == b("src"))
    same_dst = same_version & (dst_a == dst_b)
    if across.size:
        first_is_six = version_a[across] == 6
        for same, at_a, at_b in ((same_src, a("src"), b("src")), (same_dst, dst_a, dst_b)):
            one, other = at_a[across], at_b[across]
            same[across] = book.embeds(np.where(first_is_six, one, other), np.where(first_is_six, other, one))
    flags |= same_src * np.uint16(SAME_SRC)
    flags |= same_dst * np.uint16(SAME_DST)
    if renumbered:
        own_ids = (renumbered >> (same_src + 2 * same_dst)) & 1 != 0
        both_ids &= ~own_ids
        vouched = vouched & ~own_ids
        flags[own_ids] &= ~np.uint16(IP_ID)
    same_sport = same_src & (a("sport") == b("sport"))
    same_dport = same_dst & (a("dport") == b("dport"))
    ported = has_ports(protocol)

    bits = CONTENT_BITS[content_length]
    bits = np.maximum(bits, (both_residuals & same_residual) * np.int16(_BITS_RESIDUAL))
    for rows, amount in (
        (tcp_seq, BITS_TCP_SEQ), (tcp_ack, _BITS_TCP_ACK), (query, _BITS_ICMP_SEQ), (vouched, BITS_IP_ID),
        (same_src, BITS_ADDRESS), (same_dst, BITS_ADDRESS),
        (same_sport & ported, BITS_PORT), (same_dport & ported, BITS_PORT),
    ):  # fmt: skip
        bits += rows * np.int16(amount)
    # acknowledgements of one receiver all have one sequence number: without what they acknowledge,
    # only an identification tells them apart
    blind = tcp & ~visible & ~vouched
    if blind.any():
        np.minimum(bits, np.int16(STRONG - 1), out=bits, where=blind)

    conflict = both_ids & ~same_id
    if conflict.any():
        conflict &= ~_cut_anew(table_a, rows_a, table_b, rows_b)
    differ = both_residuals & ~same_residual
    message = content_length >= NAMED
    if message.any():
        # helpers write other addresses into it
        other_length = a("payload_length") != b("payload_length")
        flags |= (message & (differ | other_length)) * np.uint16(REWRITTEN)
        differ &= ~message
    if differ.any():
        differ &= ~_clamped(table_a, rows_a, table_b, rows_b, vouched)
    conflict |= differ
    conflict |= ~(same_src | same_dst) & ~vouched & ~tcp_seq
    payload_length = np.minimum(a("payload_length"), b("payload_length"))
    conflict |= blind & (payload_length <= _TCP_OPTION_BYTES)
    # Multicast and broadcast are not translated: a group address at both points must be the same one,
    # and its sender too, or two hosts are merely saying the same thing to everybody.
    group = book.is_group(version_a, dst_a) | book.is_group(version_b, dst_b)
    conflict |= group & ~(same_src & same_dst)
    return bits, flags, conflict


def _cut_anew(
    table_a: PacketTable, rows_a: NDArray[np.int64], table_b: PacketTable, rows_b: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which pairs may be one in spite of their identifications: first fragments over IPv6.

    There whoever cuts a datagram gives it a new one (RFC 8200 section 4.5, kernel: ip6_fragment). Later fragments
    say too little of their own; they follow their first one (`datagrams`).
    """
    six: NDArray[np.bool_] = (table_a.version[rows_a] == 6) & (table_b.version[rows_b] == 6)
    if six.any():
        six &= ((table_a.fragment[rows_a] | table_b.fragment[rows_b]) & np.uint16(FRAGMENT_OFFSET)) == 0
    return six


def kept_ends(
    table_a: PacketTable, rows_a: NDArray[np.int64], table_b: PacketTable, rows_b: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Return SAME_SRC and SAME_DST where row rows_a[i] of one table has the addresses of row rows_b[i] of the other."""
    same_version = table_a.version[rows_a] == table_b.version[rows_b]
    flags: NDArray[np.uint16] = (same_version & (table_a.src[rows_a] == table_b.src[rows_b])) * np.uint16(
        SAME_SRC
    )
    flags |= (same_version & (table_a.dst[rows_a] == table_b.dst[rows_b])) * np.uint16(SAME_DST)
    return flags


def _clamped(
    table_a: PacketTable,
    rows_a: NDArray[np.int64],
    table_b: PacketTable,
    rows_b: NDArray[np.int64],
    vouched: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return which pairs are SYNs whose options a router may have changed, so that their checksums differ.

    Routers clamp the MSS and strip options (kernel: xt_TCPMSS, xt_TCPOPTSTRIP). A SYN that is sent again has
    another timestamp option too: without an IP id only nearness tells the two apart.
    """
    syn = (table_a.tcp_flags[rows_a] & np.uint16(TCP_SYN)) != 0
    near = np.abs(table_b.time_ns[rows_b] - table_a.time_ns[rows_a]) <= TCP_REPEAT_NS
    result: NDArray[np.bool_] = syn & (vouched | near)
    return result


def said_bits(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.int16]:
    """Return how many of a pair's bits are for what the packets say: payload or, at least, its checksum."""
    result: NDArray[np.int16] = CONTENT_BITS[table.content_length[rows]]
    return result


def names(flags: int) -> tuple[str, ...]:
    """Spell evidence flags as the report prints them."""
    return tuple(name for n, name in enumerate(_NAMES) if flags >> n & 1)

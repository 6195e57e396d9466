"""Quotes: the packets that ICMP errors carry back, decoded like any other packet.

An error quotes the IP header and the first bytes of the packet it is about (RFC 792, RFC 1122 section 3.2.2,
RFC 1812 section 4.3.2.3, RFC 4443 section 2.4). The quote is nearly always cut short while its header claims the
whole length, so only captured bytes inside the error count. Errors are rare: they are looked up again in the raw
records, and captures without one pay for a single comparison. This module never says what a quote means.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.icmp import FRAGMENTATION_NEEDED, PACKET_TOO_BIG
from nattrace.ingest.decode import decode_ip
from nattrace.ingest.gather import gather
from nattrace.ingest.ip import read_ip
from nattrace.ingest.l4 import legible_rows
from nattrace.ingest.link import Frames, find_ip
from nattrace.ingest.tunnels import carried_packets
from nattrace.table import FRAGMENT_OFFSET, ICMP, ICMPV6, PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.source import ReadOptions, Records

#: Type, code, checksum, and four bytes whose meaning depends on the type: what stands before the quote.
ICMP_ERROR_HEADER: Final = 8

#: Errors of RFC 792: unreachable, source quench, redirect, time exceeded, parameter problem. RFC 4443 section 2.1
#: makes every ICMPv6 type below 128 an error.
_ERRORS_V4: Final = np.isin(np.arange(256), (3, 4, 5, 11, 12))
_ERRORS_V6: Final = np.arange(256) < 128

#: Types of which bytes 4 to 7 hold more than an MTU: redirects, and parameter problems of both versions.
_REDIRECT: Final = 5
_POINTER_V4, _POINTER_V6 = 12, 4
_WHOLE: Final = np.uint32(0xFFFFFFFF)
#: IPv4 and TCP header without options: what the printed fields of a quoted packet can stand for.
PRINTED_BYTES: Final = 40
#: IP bytes before a quote at least, by IP version: an IP header and the error's own.
_BEFORE_QUOTE: Final = {4: 20 + ICMP_ERROR_HEADER, 6: 40 + ICMP_ERROR_HEADER}


@dataclass(frozen=True, slots=True)
class Quotes:
    """The quotes of a batch, one row each, in no promised order; errors without a legible quote have none."""

    packets: PacketTable  #: the quoted packets; frame, time and lengths of the record are the error's own
    row: NDArray[np.int64]  #: the error's row in the batch's table
    rest: NDArray[np.uint32]  #: bytes 4 to 7 of the error: MTU, pointer or gateway by type, else 0
    l4_length: NDArray[
        np.uint16
    ]  #: bytes of the quoted packet's upper layer that the error carries on the wire

    def __len__(self) -> int:
        """Quotes."""
        return int(self.row.size)

    @classmethod
    def concatenate(cls, parts: Sequence[Quotes]) -> Quotes:
        """Return the quotes of all parts, at least one."""
        return cls(
            PacketTable.concatenate([part.packets for part in parts]),
            np.concatenate([part.row for part in parts]),
            np.concatenate([part.rest for part in parts]),
            np.concatenate([part.l4_length for part in parts]),
        )

    def first(self, at_most: int) -> Quotes:
        """Return the first `at_most` quotes in the order of the file."""
        return self.take(np.argsort(self.row, kind="stable")[: max(at_most, 0)])

    def take(self, rows: NDArray[np.int64]) -> Quotes:
        """Return the given rows."""
        return Quotes(self.packets.take(rows), self.row[rows], self.rest[rows], self.l4_length[rows])


def error_rows(table: PacketTable) -> NDArray[np.int64]:
    """Return the rows of a table that are ICMP errors and begin with their ICMP header."""
    icmp = np.flatnonzero((table.protocol == ICMP) | (table.protocol == ICMPV6))
    if not icmp.size:
        return icmp
    kind, version = table.icmp_type[icmp], table.version[icmp]
    protocol = table.protocol[icmp]
    error = (version == 4) & (protocol == ICMP) & _ERRORS_V4[kind]
    error |= (version == 6) & (protocol == ICMPV6) & _ERRORS_V6[kind]
    error &= (table.fragment[icmp] & np.uint16(FRAGMENT_OFFSET)) == 0
    rows: NDArray[np.int64] = icmp[error]
    return rows


def read_quotes(records: Records, table: PacketTable, options: ReadOptions, depth: int = 0) -> Quotes | None:
    """Return what the ICMP errors among the decoded `records` quote; None where there is no legible quote.

    `table` is what `decode` made of the same records: their packets, or those in so many tunnels (`depth`). Quotes
    without ports or id are left out.
    """
    errors = error_rows(table)
    if not errors.size:
        return None
    order = np.argsort(table.frame[errors], kind="stable")
    errors = errors[order]
    frames = table.frame[errors]
    chosen = np.flatnonzero(np.isin(records.frame, frames))
    some = replace(
        records,
        offset=records.offset[chosen],
        captured_length=records.captured_length[chosen],
        wire_length=records.wire_length[chosen],
        time_ns=records.time_ns[chosen],
        frame=records.frame[chosen],
    )
    nothing: Counter[str] = Counter()
    outer = read_ip(some.buffer, find_ip(some, slice(0, chosen.size), nothing), options.book, nothing)
    for _ in range(depth):
        carried = carried_packets(some.buffer, legible_rows(outer, nothing)[0])
        assert carried is not None  # or there were no such errors
        outer = read_ip(some.buffer, carried.frames, options.book, nothing)
    before = outer.l4_offset + ICMP_ERROR_HEADER
    outer = outer.take(outer.available > before)
    if not outer.at.size:
        return None
    before = outer.l4_offset + ICMP_ERROR_HEADER
    assert not isinstance(outer.record, slice)  # `take` has made indices of it
    within = Frames(outer.record, outer.at + before, outer.available - before, outer.ip_length - before)
    tables: list[PacketTable] = []
    records_of: list[NDArray[np.int64]] = []
    offsets: list[NDArray[np.int64]] = []
    for version, bytes_before in _BEFORE_QUOTE.items():
        own = outer.version == version
        if own.any():
            # what is comparable of an error's bytes is counted from its own IP header
            comparable = max(options.comparable_bytes - bytes_before, 0)
            if not options.comparable_content:
                comparable = max(comparable, PRINTED_BYTES)
            part, quoted = decode_ip(some, within.take(own), replace(options, comparable_bytes=comparable))
            assert not isinstance(quoted.record, slice)
            tables.append(part)
            records_of.append(quoted.record)
            offsets.append(quoted.l4_offset)
    packets, record, l4_offset = (
        PacketTable.concatenate(tables),
        np.concatenate(records_of),
        np.concatenate(offsets),
    )
    home = np.searchsorted(outer.record, record)
    legible = np.flatnonzero(packets.version == outer.version[home])
    if not legible.size:
        return None
    home = home[legible]
    # a quote of 28 bytes that is padded to 128 (RFC 4884 section 5.1) has zeros for a checksum
    packets.residual_known &= packets.checksum != 0
    rest = gather(some.buffer, outer.at[home] + outer.l4_offset[home] + 4, 4).view(">u4").astype(np.uint32)
    row = errors[np.searchsorted(frames, packets.frame[legible])]
    length = outer.ip_length[home] - before[home] - l4_offset[legible]
    return Quotes(
        packets=packets.take(legible),
        row=row,
        rest=_told(table, row, rest, printed=not options.comparable_content),
        l4_length=np.clip(length, 0, 65535).astype(np.uint16),
    )


def _told(
    table: PacketTable, row: NDArray[np.int64], rest: NDArray[np.uint32], *, printed: bool
) -> NDArray[np.uint32]:
    """Return what bytes 4 to 7 of the errors in these rows say, and where text is compared what tcpdump prints of it.

    That is the MTU. Whatever is unused, or says how long the quote is (RFC 4884 section 5), is left out: boxes that
    take extensions away change it.
    """
    kind, code, six = table.icmp_type[row], table.icmp_code[row], table.version[row] == 6
    needed = ~six & (kind == FRAGMENTATION_NEEDED[0]) & (code == FRAGMENTATION_NEEDED[1])
    too_big = six & (kind == PACKET_TOO_BIG[0])
    mask = np.where(needed, np.uint32(0xFFFF), np.where(too_big, _WHOLE, np.uint32(0)))
    if not printed:
        pointer = np.where(six & (kind == _POINTER_V6), _WHOLE, np.uint32(0))
        pointer[~six & (kind == _POINTER_V4)] = 0xFF000000
        mask |= np.where(~six & (kind == _REDIRECT), _WHOLE, pointer)
    return rest & mask

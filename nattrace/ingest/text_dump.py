"""Hex dumps under printed packets (-x, -xx, -X, -XX): the packet itself, as far as tcpdump dumped it.

A dump is believed when it holds the addresses that the line above it printed, or, where the line could not be
read, an IPv4 header with a right checksum or what must be an IPv6 header. Nothing here parses headers
further: that is `decode`'s work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.decode import decode
from nattrace.ingest.quotes import read_quotes
from nattrace.ingest.source import PADDING, Records
from nattrace.table import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.ingest.quotes import Quotes
    from nattrace.ingest.source import ReadOptions
    from nattrace.table import PacketTable

#: Bytes kept of a dump: link header, IP header and options, TCP header and options and some payload.
MAX_DUMP_BYTES = 512
#: Bytes of link header that may stand before the IP header with -xx.
_LINK_REACH = 64
#: LINKTYPE_RAW: the packet begins with its IP header (tcpdump.org/linktypes.html).
_RAW = 101


class Dump:
    """The bytes of one packet, collected line by line."""

    __slots__ = ("_damaged", "data", "dst", "frame_length", "src")

    def __init__(self) -> None:
        self.data = bytearray()
        self.src = b""  #: addresses as printed, empty where they were names
        self.dst = b""
        self.frame_length = 0
        self._damaged = False

    def add(self, line: str) -> None:
        """Take a line such as ``0x0010:  0054 8fbb 4000  .T..@.``; what does not follow on is passed over."""
        place, colon, rest = line[:120].partition(":")
        digits = rest.strip().split("  ", 1)[0]
        try:
            offset, piece = int(place, 16), bytes.fromhex(digits)[:16]
        except ValueError:
            offset, piece = -1, b""
        if offset == 0:
            # -v dumps odd parts of some protocols itself; the packet's own dump comes last
            self.data.clear()
            self._damaged = False
        if self._damaged or len(self.data) >= MAX_DUMP_BYTES:
            return
        self._damaged = not colon or offset != len(self.data)
        if not self._damaged:
            self.data += piece

    def ip_start(self) -> int | None:
        """Return where the IP header begins, None if no place fits what was printed."""
        data = bytes(self.data)
        if self.src:
            before, version = (12, 4) if len(self.src) == 4 else (8, 6)
            start = data.find(self.src + self.dst, before, _LINK_REACH + 40) - before
            return start if start >= 0 and data[start] >> 4 == version else None
        return next(
            (at for at in range(min(_LINK_REACH, max(0, len(data) - 19))) if _is_ipv4(data, at)), None
        )


def _is_ipv4(data: bytes, at: int) -> bool:
    """Return whether an IPv4 header with a right checksum begins at `at` (RFC 1071)."""
    if len(data) < at + 20:
        return False
    length = (data[at] & 15) * 4
    if data[at] >> 4 != 4 or length < 20 or at + length > len(data):
        return False
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(at, at + length, 2))
    return total % 0xFFFF == 0


def decode_dumps(
    table: PacketTable, dumps: Sequence[tuple[int, Dump]], options: ReadOptions
) -> tuple[set[int], Quotes | None]:
    """Replace rows of `table` by what their dumps decode to.

    Returns the rows whose dump could not be decoded, and what ICMP errors among the others quote. Frame and time stay
    as printed. ``captured_length`` counts the dumped bytes from the IP header on.
    """
    unread = {row for row, _ in dumps}
    starts = [(row, dump, start) for row, dump in dumps if (start := dump.ip_start()) is not None]
    if not starts:
        return unread, None
    pieces = [bytes(dump.data[start:]) for _, dump, start in starts]
    captured = np.array([len(piece) for piece in pieces], np.uint32)
    # the whole datagram, as its header says: without it a dump cut at MAX_DUMP_BYTES would look complete
    wire = np.array([max(len(piece), _claimed_length(piece)) for piece in pieces], np.uint32)
    buffer = np.frombuffer(b"".join(pieces) + bytes(PADDING), np.uint8)
    offset = np.concatenate([[0], np.cumsum(captured[:-1], dtype=np.int64)]).astype(np.int64)
    records = Records(
        point=0,
        link_type=_RAW,
        buffer=buffer,
        offset=offset,
        captured_length=captured,
        wire_length=wire,
        time_ns=np.zeros(len(pieces), np.int64),
        frame=np.array([row for row, _, _ in starts], np.uint32),
    )
    decoded, _ = decode(records, options)
    rows = decoded.frame.astype(np.int64)
    for name in COLUMNS:
        if name not in ("frame", "time_ns", "wire_length"):
            getattr(table, name)[rows] = getattr(decoded, name)
    missing = table.wire_length[rows] == 0
    table.wire_length[rows[missing]] = decoded.wire_length[missing]
    quotes = read_quotes(records, decoded, options)
    if quotes is not None:
        home = rows[quotes.row]
        quotes = replace(quotes, row=home)
        quotes.packets.frame, quotes.packets.time_ns = table.frame[home], table.time_ns[home]
    return unread - set(rows.tolist()), quotes


def _claimed_length(packet: bytes) -> int:
    if len(packet) >= 6 and packet[0] >> 4 == 6:
        return 40 + int.from_bytes(packet[4:6], "big")
    return int.from_bytes(packet[2:4], "big")

"""What printed ICMP errors quote: with -v tcpdump prints the quoted IPv4 packet on the two lines under the error.

Without -v, and of ICMPv6 at any rate, it prints no more than the quoted destination: no flow. Hex dumps hold the quote
itself (see `text_dump`). Nothing here decides what a quote means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.quotes import Quotes, error_rows
from nattrace.ingest.text_lines import read_addresses, read_ip
from nattrace.ingest.text_packet import Printed
from nattrace.table import ICMP, TCP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.table import PacketTable

_ERRORS = (3, 4, 5, 11, 12)  # RFC 792
#: A TCP header without options: where tcpdump prints the window it has seen so much.
_TCP_HEADER_BYTES = 20


def take_quoted_line(text: str, error: Printed) -> bool:
    """Take a line under a printed packet as a part of what it quotes, if it is an ICMP error; return whether it was."""
    if error.protocol != ICMP or error.icmp_type not in _ERRORS:
        return False
    if error.quote is None:
        quote = Printed()
        if not text.startswith(("IP (tos ", "(tos ")) or read_ip(text.removeprefix("IP "), quote) is not None:
            return False
        error.quote = quote
        return True
    if error.quote.addressed or " > " not in text:
        return False
    read_addresses(text, error.quote)
    return error.quote.addressed


def legible(error: Printed) -> bool:
    """Say whether what the error quotes was printed with its ports or id, and, of TCP, with its numbers."""
    quote = error.quote
    if quote is None or not quote.addressed or not quote.l4_length:
        return False
    return quote.protocol != TCP or quote.l4_length >= _TCP_HEADER_BYTES


def with_printed(
    dumped: Quotes | None,
    table: PacketTable,
    rows: Sequence[int],
    quoted: PacketTable,
    mtus: Sequence[int],
) -> Quotes | None:
    """Add to the quotes that dumps have told those that were printed: of the errors in these `rows` of a table."""
    parts = [] if dumped is None else [dumped]
    row = np.array(rows, np.int64)
    fresh = np.isin(row, error_rows(table))
    if dumped is not None:
        fresh &= ~np.isin(row, dumped.row)
    kept = np.flatnonzero(fresh)
    if kept.size:
        whole = np.full(kept.size, _TCP_HEADER_BYTES, np.uint16)
        parts.append(Quotes(quoted.take(kept), row[kept], np.array(mtus, np.uint32)[kept], whole))
    return Quotes.concatenate(parts) if parts else None

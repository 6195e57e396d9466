"""What `nattrace rewrites` prints: each packet before and after, side by side or one above the other.

Rows are printed in blocks as they come, each block a table of its own with its own header, so that any number
of rows needs the memory of one block. All captured text passes `escape.terminal`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from nattrace.model import Rewrite
from nattrace.report import human
from nattrace.report.escape import terminal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

    from nattrace.model import Sighting, Unmatched

#: Rows of one block: a header now and then does not disturb, and the first rows come soon.
ROWS_PER_BLOCK: Final = 500

_ECHO: Final = {
    ("icmp", 8): "echo request",
    ("icmp", 0): "echo reply",
    ("icmpv6", 128): "echo request",
    ("icmpv6", 129): "echo reply",
}


def write_rows_table(
    rows: Iterable[Rewrite | Unmatched], stream: TextIO, *, width: int | None = None
) -> None:
    """Write rows as tables, at most `width` columns wide where that is possible."""
    remaining = iter(rows)
    separator = ""
    while block := list(islice(remaining, ROWS_PER_BLOCK)):
        lines = _side_by_side(block)
        if width is not None and max(map(len, lines)) > width:
            lines = _stacked(block)
        stream.write(separator + "\n".join(lines) + "\n")
        separator = "\n"
    if not separator:
        stream.write("no row\n")


def _side_by_side(rows: Sequence[Rewrite | Unmatched]) -> list[str]:
    from tabulate import tabulate  # noqa: PLC0415 - takes longer to load than the rest of the command line

    headers = ["flow", "packet", "before", "after", "nat", "latency"]
    cells = [[_flow(row), _packet(_before(row)), *_seen(row), _nat(row), _latency(row)] for row in rows]
    # The header is a row like others: tabulate widens the columns of real headers by two.
    text = tabulate([headers, *cells], tablefmt="plain", disable_numparse=True)
    return [line.rstrip() for line in text.splitlines()]


def _stacked(rows: Sequence[Rewrite | Unmatched]) -> list[str]:
    lines = []
    for row in rows:
        before, after = _seen(row)
        latency = f", {_latency(row)}" if _latency(row) else ""
        lines += [
            f"{_flow(row):<5} {_packet(_before(row))}, {_nat(row)}{latency}",
            f"      {before}",
            f"   -> {after}",
        ]
    return lines


def _before(row: Rewrite | Unmatched) -> Sighting:
    return row.before if isinstance(row, Rewrite) else row.packet


def _flow(row: Rewrite | Unmatched) -> str:
    return "-" if row.flow is None else str(row.flow)


def _seen(row: Rewrite | Unmatched) -> tuple[str, str]:
    """Return where the packet was seen with which addresses, before and after."""
    if isinstance(row, Rewrite):
        return _sighting(row.before), _sighting(row.after)
    candidates = human.listed((f"{terminal(ref.point)}:{ref.frame}" for ref in row.candidates), 3)
    return _sighting(row.packet), f"{terminal(row.reason)}{f': {candidates}' if candidates else ''}"


def _sighting(packet: Sighting) -> str:
    source = human.endpoint(packet.src, packet.sport, packet.id)
    wrapped = f" in {terminal(packet.encapsulation)}" if packet.encapsulation else ""
    target = human.endpoint(packet.dst, packet.dport)
    return f"{terminal(packet.point)}:{packet.frame} {source} > {target}{wrapped}"


def _packet(packet: Sighting) -> str:
    """Return what tells the packet from others of its flow and is the same on both sides."""
    words = [terminal(packet.protocol)]
    if packet.type is not None:
        words.append(_ECHO.get((packet.protocol, packet.type), f"type {packet.type}"))
    if packet.flags is not None:
        words.append(terminal(packet.flags))
    if packet.seq is not None:
        words.append(f"seq {packet.seq}")
    if packet.length is not None and packet.type is None:
        words.append(f"length {packet.length}")
    return " ".join(words)


def _nat(row: Rewrite | Unmatched) -> str:
    if not isinstance(row, Rewrite):
        return "none"
    return f"{row.nat} {' '.join(row.changed)}" if row.nat is not None else "none"


def _latency(row: Rewrite | Unmatched) -> str:
    if not isinstance(row, Rewrite):
        return ""
    return human.NOT_MEASURABLE if row.latency_ns is None else human.duration(row.latency_ns)

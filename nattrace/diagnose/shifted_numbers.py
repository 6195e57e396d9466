"""TCP numbers that a box shifted: which flows, by how much, and which box does such things.

It speaks of what matching found; it never looks at packets or payloads.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from nattrace.model import Finding, PacketRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.nat.shifts import SequenceShift

#: Flows and packets listed in one finding.
MAX_LISTED = 100


def shifted_numbers(shifts: Sequence[SequenceShift], names: Sequence[str]) -> list[Finding]:
    """Return one finding for each hop and kind of box; `names` are those of the points."""

    def kind(shift: SequenceShift) -> tuple[str, str, bool]:
        return names[shift.from_point], names[shift.to_point], shift.whole

    found = []
    for (start, stop, whole), group in groupby(sorted(shifts, key=kind), kind):
        of_hop = list(group)
        flows = tuple(dict.fromkeys(shift.flow for shift in of_hop))
        rewritten = [shift for shift in of_hop if shift.rewritten is not None]
        count = "1 flow" if len(flows) == 1 else f"{len(flows)} flows"
        first = of_hop[0]
        where = f"between {start} and {stop}"
        if whole:
            why = (
                "from the first packet on: a box in between answers the handshake itself "
                "(SYNPROXY, a firewall's SYN defence)"
            )
        else:
            why = "from some packet on: a box in between rewrites payloads (a helper for FTP, SIP or IRC)"
        message = (
            f"TCP sequence numbers of {count} are shifted {where} {why}; "
            f"flow {first.flow}: {_amount(first, stop)}"
        )
        if len(of_hop) > len(flows):
            message += f", {len(of_hop)} shifts in all"
        packets = [
            PacketRef(point, frame)
            for shift in rewritten
            if shift.rewritten is not None
            for point, frame in zip((start, stop), shift.rewritten, strict=True)
        ]
        found.append(
            Finding(
                code="sequence-shifted",
                severity="info",
                message=message,
                flows=flows[:MAX_LISTED],
                packets=tuple(packets[:MAX_LISTED]),
            )
        )
    return found


def _amount(shift: SequenceShift, stop: str) -> str:
    """Say by how much the numbers of each direction differ."""
    parts = [
        f"{name} {abs(amount)} bytes {'higher' if amount > 0 else 'lower'}"
        for name, amount in (("original", shift.original_bytes), ("reply", shift.reply_bytes))
        if amount
    ]
    return f"{' and '.join(parts)} at {stop}"

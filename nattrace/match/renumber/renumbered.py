"""Renumbered: boxes between two points that write IP identifications of their own.

Linux NAT keeps the identification, so two different ones are two different packets. Some consumer NATs write
their own into all that they send. That is learned from packets that are one beyond doubt without it, by what the
translation kept of their ends (which is their direction through the box), and only then do identifications of
such packets contradict nothing. This module learns; it matches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.pairing import unique_pairs
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: Packets that are one beyond doubt and have two identifications, before a box is believed to write its own.
_SAMPLES = 8
#: One direction needs only so many when not one of its packets keeps its own, and the others make up the rest.
_FEW = 3
#: And so many of all such packets, at least: where identifications are kept, nothing but chance disagrees.
_SHARE = 0.95
#: Evidence that packets are one without their identification: a sequence number, what it acknowledges, an end
#: that was kept, and either the payload or the checksum over it.
_BEYOND_DOUBT = evidence.TCP_SEQ | evidence.TCP_ACK
_SAID = evidence.PAYLOAD | evidence.CHECKSUM
_ENDS_AT = 6  #: place of SAME_SRC and SAME_DST among the flags
#: Matches looked at in one step to learn that identifications are kept.
_LOOKED_AT = 4_096


@dataclass(slots=True)
class Identifications:
    """How often identifications were kept and changed between two points, by which ends were kept.

    The index is 0 for no end, 1 for the source, 2 for the destination, 3 for both.
    """

    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    changed: NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))

    def saw_matches(self, flags: NDArray[np.uint16]) -> None:
        """Learn from the evidence of matches, of which a sample is enough."""
        step = max(1, flags.size // _LOOKED_AT)
        some = flags[::step]
        some = some[(some & evidence.IP_ID) != 0]
        self.kept += step * np.bincount((some >> _ENDS_AT) & 3, minlength=4)

    def look(self, rows_a: Rows, rows_b: Rows, usual: Usual, book: AddressBook) -> None:
        """Learn from packets that found no match: those that are one beyond doubt but for the identification.

        They are no further apart than is usual, so that no repetition is taken for its original.
        """
        reach = usual.reach_ns()
        soon = evidence.TCP_REPEAT_NS if reach is None else min(reach, evidence.TCP_REPEAT_NS)
        a, b = unique_pairs(rows_a.content, rows_b.content)
        table_a, table_b = rows_a.table, rows_b.table
        good = (table_a.protocol[a] == TCP) & (table_a.ip_id[a] != 0) & (table_b.ip_id[b] != 0)
        good &= table_a.ip_id[a] != table_b.ip_id[b]
        good &= table_a.version[a] == table_b.version[b]
        good &= np.abs(table_b.time_ns[b] - table_a.time_ns[a]) <= soon
        a, b = a[good], b[good]
        if a.size < _SAMPLES:
            return
        _, flags, conflict = evidence.weigh(table_a, a, table_b, b, book, renumbered=EVERYWHERE)
        sure = ~conflict & ((flags & _BEYOND_DOUBT) == _BEYOND_DOUBT) & ((flags & _SAID) != 0)
        self.changed += np.bincount((flags[sure] >> _ENDS_AT) & 3, minlength=4)

    @property
    def renumbered(self) -> int:
        """Which packets' identifications are written anew: a bit for each index above, as `weigh` takes them."""
        few = (self.changed >= _FEW) & (self.kept == 0) & (self.changed.sum() >= _SAMPLES)
        sure = few | (self.changed >= _SAMPLES) & (self.changed >= _SHARE * (self.changed + self.kept))
        sure[0] = False  # neither end kept: nothing but the identification tells such packets from a proxy's
        return int((sure << np.arange(4)).sum())

    @property
    def are_kept(self) -> bool:
        """Whether identifications are known to be kept between the points."""
        return bool(self.kept.sum() >= _SAMPLES) and not self.changed.any()


def unnumbered(rows: Rows) -> Rows:
    """Return rows whose identifications are said to be unknown, which neither vouches for anything nor contradicts."""
    return replace(rows, table=replace(rows.table, ip_id=np.zeros_like(rows.table.ip_id)))


#: All identifications are written anew, whatever was kept of the ends.
EVERYWHERE = 0b1110

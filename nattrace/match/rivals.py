"""Rivals: what else a pair of packets could be, those that say the same and have the end that the pair kept.

This module only looks at pairs that others found, and at nothing that counts packets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import M1, mix
from nattrace.match.pairing import group_ids, nearest_distance, nearest_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows

#: What is no further apart than two taps of one host (7 to 66 us were measured) is as near as can be.
HOST_NS = 66_000
#: Nothing forwards a packet after half a minute.
_FAR_NS = 30_000_000_000
#: A nearest neighbour is clear when the runner-up is this many times further away.
_MARGIN = 8
#: What translations keep of a packet's ends, most telling first; the last is for twice NAT.
_ENDS = (("dst", "dport"), ("src", "sport"), ("dst",), ("src",), ())


@dataclass(slots=True)
class Rivals:
    """What is known of the rivals of pairs, one row a pair."""

    several: NDArray[np.bool_]  #: there are some
    nearest: NDArray[np.bool_]  #: none of them is nearer in time to either packet
    clear: NDArray[np.bool_]  #: nor nearly as near
    pairings: NDArray[np.float64]  #: pairs that a pair's kind could make, by pair of the kind

    @classmethod
    def of(
        cls,
        rows_a: Rows,
        a: NDArray[np.int64],
        rows_b: Rows,
        b: NDArray[np.int64],
        left_a: NDArray[np.bool_] | None = None,
        left_b: NDArray[np.bool_] | None = None,
    ) -> Rivals:
        """Look at pairs (row a[n] of one side, b[n] of the other); of the sides' rows only those `left` are rivals."""
        nothing = np.zeros(a.size, np.bool_)
        found = cls(nothing, nothing.copy(), nothing.copy(), np.zeros(a.size))
        table_a, table_b = rows_a.table, rows_b.table
        rest_a = np.arange(len(rows_a)) if left_a is None else np.flatnonzero(left_a)
        rest_b = np.arange(len(rows_b)) if left_b is None else np.flatnonzero(left_b)
        other = np.ones(a.size, np.bool_)
        for ends in _ENDS:
            same = other & ((table_a.version[a] == table_b.version[b]) | (len(ends) == 0))
            for end in ends:
                same &= getattr(table_a, end)[a] == getattr(table_b, end)[b]
            chosen = np.flatnonzero(same)
            if chosen.size:
                found._look(chosen, rows_a, a[chosen], rest_a, rows_b, b[chosen], rest_b, ends)
                other[chosen] = False
        return found

    def take(self, pairs: NDArray[np.bool_]) -> Rivals:
        """Return those of the given pairs."""
        return Rivals(self.several[pairs], self.nearest[pairs], self.clear[pairs], self.pairings[pairs])

    def _look(
        self,
        chosen: NDArray[np.int64],
        rows_a: Rows,
        a: NDArray[np.int64],
        rest_a: NDArray[np.int64],
        rows_b: Rows,
        b: NDArray[np.int64],
        rest_b: NDArray[np.int64],
        ends: tuple[str, ...],
    ) -> None:
        kind, group_a, group_b = group_ids(
            _said(rows_a, ends)[a], _said(rows_a, ends)[rest_a], _said(rows_b, ends)[rest_b]
        )
        time_a, time_b = rows_a.table.time_ns, rows_b.table.time_ns
        kinds = int(max(part.max(initial=0) for part in (kind, group_a, group_b))) + 1
        many_a, many_b = np.bincount(group_a, minlength=kinds), np.bincount(group_b, minlength=kinds)
        self.several[chosen] = ((many_a > 1) | (many_b > 1))[kind]
        self.pairings[chosen] = (many_a * many_b / np.maximum(np.bincount(kind, minlength=kinds), 1))[kind]
        ahead = nearest_distance(kind, time_a[a], group_b, time_b[rest_b])
        back = nearest_distance(kind, time_b[b], group_a, time_a[rest_a])
        self.nearest[chosen] = np.abs(time_b[b] - time_a[a]) <= np.minimum(ahead, back)
        x, y = nearest_pairs(
            group_a, time_a[rest_a], group_b, time_b[rest_b],
            window_ns=_FAR_NS, floor_ns=HOST_NS, margin=_MARGIN, rounds=1,
        )  # fmt: skip
        self.clear[chosen] = np.isin(a << 32 | b, rest_a[x] << 32 | rest_b[y])


def _said(rows: Rows, ends: tuple[str, ...]) -> NDArray[np.uint64]:
    """Return keys of what packets say and of one of their ends, or of no end."""
    keys = rows.content
    for salt, end in enumerate(ends, 1):
        keys = mix(keys ^ (getattr(rows.table, end).astype(np.uint64) + np.uint64(salt)) * M1)
    return keys

"""Resized: everything that may be in other packets at the other point than it was, tried kind by kind.

Called when bindings are known, with what found no equal. This module only divides the packets among the kinds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.counters import by_chance
from nattrace.match.resize.datagrams import match_datagrams
from nattrace.match.resize.pieces import Pieces
from nattrace.match.resize.streams import match_streams
from nattrace.match.resize.trains import match_trains

if TYPE_CHECKING:
    from nattrace.match.lanes import Lanes
    from nattrace.match.outcome import Matches
    from nattrace.match.resize.datagrams import Firsts
    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual


def match_pieces(
    rows_a: Rows, rows_b: Rows, lanes: Lanes, heads: Matches, firsts: Firsts, usual: Usual
) -> Pieces:
    """Return all packets matched in pieces, and the tied ones.

    `heads` are recognised beginnings among the rows, `firsts` fragments that were matched before.
    """
    streams = match_streams(rows_a, rows_b, lanes, usual)
    datagrams = match_datagrams(rows_a, rows_b, lanes.without(streams.a, streams.b), heads, firsts, usual)
    free = lanes.without(datagrams.a, datagrams.b)
    found = Pieces.concatenate([streams, datagrams, match_trains(rows_a, rows_b, free, usual)])
    # what kept its size was no match before, and is none now when its identification alone would make it one
    same = (found.shared_bytes == found.whole_a) & (found.shared_bytes == found.whole_b)
    chance = np.flatnonzero(same)
    chance = chance[by_chance(rows_a, found.a[chance], rows_b, found.b[chance])]
    return found.without(chance) if chance.size else found

"""Unique: packets whose key occurs once at each point, believed when their own evidence suffices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.l4 import fillings
from nattrace.match import evidence
from nattrace.match.keys import commonplace_keys
from nattrace.match.outcome import Matches
from nattrace.match.pairing import unique_pairs
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: TCP repeats a segment after 200 ms at the earliest (Linux TCP_RTO_MIN); closer twins are one packet.
TCP_REPEAT_NS = 100_000_000
#: Without anything else to go by, sightings of one packet are no further apart than this.
FAR_NS = 1_000_000_000


def match_unique(
    rows_a: Rows,
    open_a: NDArray[np.int64],
    rows_b: Rows,
    open_b: NDArray[np.int64],
    window_ns: int,
    usual: Usual,
    book: AddressBook,
) -> Matches:
    """Match packets whose key is unique on both sides and whose evidence suffices by itself.

    `open_a` and `open_b` are the indices of the rows that have no partner yet.
    """
    ia, ib = unique_pairs(rows_a.exact[open_a], rows_b.exact[open_b])
    first = _believe(rows_a, rows_b, open_a[ia], open_b[ib], window_ns, usual, book)
    left_a = _without(open_a, first.a, len(rows_a))
    left_b = _without(open_b, first.b, len(rows_b))
    ia, ib = unique_pairs(rows_a.content[left_a], rows_b.content[left_b])
    if not ia.size:
        return first
    second = _believe(rows_a, rows_b, left_a[ia], left_b[ib], window_ns, usual, book)
    return Matches(
        np.concatenate([first.a, second.a]),
        np.concatenate([first.b, second.b]),
        np.concatenate([first.flags, second.flags]),
    )


def _believe(
    rows_a: Rows,
    rows_b: Rows,
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    window_ns: int,
    usual: Usual,
    book: AddressBook,
) -> Matches:
    """Return which candidate pairs are believed by their own evidence."""
    if not a.size:
        return Matches(a, b, np.empty(0, np.uint16))
    bits, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, book)
    delta = rows_b.table.time_ns[b] - rows_a.table.time_ns[a]
    apart = np.abs(delta)
    good = (bits >= evidence.STRONG) & ~conflict & (apart <= window_ns)
    told_apart = (flags & evidence.IP_ID) != 0
    tcp = (flags & evidence.TCP_SEQ) != 0
    endpoint = (flags & (evidence.SAME_SRC | evidence.SAME_DST)) != 0
    repeated = np.flatnonzero(good & ~tcp & ~(told_apart & endpoint))
    if repeated.size:
        # where it must carry the match, a payload may not be what everybody says all the time
        common = commonplace(rows_a, a[repeated]) | commonplace(rows_b, b[repeated])
        good[repeated[common]] = False
    acknowledged = tcp & ((flags & evidence.TCP_ACK) != 0)
    # a segment without an IP id may be another copy of itself, but not so soon
    usual.learn(delta[good & (told_apart | (acknowledged & (apart <= TCP_REPEAT_NS)))])
    reach = usual.reach_ns()
    if reach is not None:
        limit = np.where(tcp, max(reach, TCP_REPEAT_NS), reach)
        good &= told_apart | (apart <= limit)
    else:
        good &= told_apart | tcp | (apart <= FAR_NS)
    if not good.all():
        a, b, flags = a[good], b[good], flags[good]
    return Matches(a, b, flags)


def commonplace(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each chosen row whether another packet of the window says the very same.

    A payload of equal bytes counts as said by others. Never so for TCP, where the sequence number tells
    packets apart.
    """
    if rows.said is None:
        said = np.sort(commonplace_keys(rows.table, np.flatnonzero(rows.table.protocol != TCP)))
        rows.said = said[1:][said[1:] == said[:-1]]
    result = np.zeros(chosen.size, np.bool_)
    asked = np.flatnonzero(rows.table.protocol[chosen] != TCP)
    if asked.size and rows.said.size:
        wanted = commonplace_keys(rows.table, chosen[asked])
        place = np.minimum(np.searchsorted(rows.said, wanted), rows.said.size - 1)
        result[asked] = rows.said[place] == wanted
    filled = fillings()
    hashes = rows.table.content_hash[chosen[asked]]
    result[asked] |= filled[np.minimum(np.searchsorted(filled, hashes), filled.size - 1)] == hashes
    return result


def _without(rows: NDArray[np.int64], chosen: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Return `rows` (ascending indices below `total`) without the chosen ones."""
    mask = np.zeros(total, np.bool_)
    mask[rows] = True
    mask[chosen] = False
    return np.flatnonzero(mask)

"""Unique: packets whose key occurs once at each point, believed when their own evidence suffices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.l4 import fillings
from nattrace.lookup import contains
from nattrace.match import evidence
from nattrace.match.copies import may_be_copies
from nattrace.match.counters import by_chance
from nattrace.match.evidence import TCP_REPEAT_NS
from nattrace.match.keys import blank_echoes, commonplace_keys
from nattrace.match.outcome import Matches
from nattrace.match.pairing import unique_pairs
from nattrace.match.worn import numbered_by_hand, says_nothing, worn_ids, worn_segments
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: Without anything else to go by, sightings of one packet are no further apart than this.
FAR_NS = 1_000_000_000
#: A sender that repeats itself word for word waits longer than this between two copies (SIP 500 ms, DNS 1 s,
#: the fastest games some 15 ms), and a packet stays for less in one host. Far points need votes (see `votes`).
REPEAT_NS = 10_000_000
#: So many times as many pairs of another binding outvote those that rest on an identification.
_OUTVOTED = 8
#: Windows with fewer candidates than this, or with fewer than this share of their new packets among them, are
#: looked through for identifications that do not tell packets apart. In all others they do.
_CAREFUL_ROWS = 4_096
_CAREFUL_SHARE = 0.9

#: So many TCP packets of two identifications, and such a share of all, are no accident: lost packets whose
#: repetitions were seen at the other point only are far fewer.
_CHANCE_IDS = 8
_CHANCE_SHARE = 0.25


def match_unique(
    rows_a: Rows,
    open_a: NDArray[np.int64],
    rows_b: Rows,
    open_b: NDArray[np.int64],
    window_ns: int,
    usual: Usual,
    book: AddressBook,
    fresh: int,
) -> Matches:
    """Match packets whose key is unique on both sides and whose evidence suffices by itself.

    `open_a` and `open_b` are the indices of the rows that have no partner yet; of the side that has fewer new
    ones, `fresh` were not looked at before.
    """
    ia, ib = unique_pairs(rows_a.exact[open_a], rows_b.exact[open_b])
    careful = ia.size < max(_CAREFUL_ROWS, _CAREFUL_SHARE * fresh)
    if careful and _chance_ids(rows_a, open_a, rows_b, open_b):
        told = rows_a.table.protocol[open_a[ia]] == TCP
        told |= ~(commonplace(rows_a, open_a[ia]) | commonplace(rows_b, open_b[ib]))
        ia, ib = ia[told], ib[told]
    first = _believe(rows_a, rows_b, open_a[ia], open_b[ib], window_ns, usual, book, careful=careful)
    left_a = _without(open_a, first.a, len(rows_a))
    left_b = _without(open_b, first.b, len(rows_b))
    ia, ib = unique_pairs(rows_a.content[left_a], rows_b.content[left_b])
    ia, ib = left_a[ia], left_b[ib]
    # where the identifications are equal as well, the pair has been judged
    new = rows_a.exact[ia] != rows_b.exact[ib]
    if not new.any():
        return first
    second = _believe(rows_a, rows_b, ia[new], ib[new], window_ns, usual, book, careful=careful)
    return Matches(
        np.concatenate([first.a, second.a]),
        np.concatenate([first.b, second.b]),
        np.concatenate([first.flags, second.flags]),
    )


def _chance_ids(rows_a: Rows, open_a: NDArray[np.int64], rows_b: Rows, open_b: NDArray[np.int64]) -> bool:
    """Say whether IP identifications of one TCP packet so often differ that equal ones are no evidence.

    So it is behind a box that writes its own (see `renumbered`).
    """
    a, b = unique_pairs(rows_a.content[open_a], rows_b.content[open_b])
    a, b = open_a[a], open_b[b]
    id_a, id_b = rows_a.table.ip_id[a], rows_b.table.ip_id[b]
    numbered = (rows_a.table.protocol[a] == TCP) & (id_a != 0) & (id_b != 0)
    differ = int((numbered & (id_a != id_b)).sum())
    return differ >= _CHANCE_IDS and differ >= _CHANCE_SHARE * int(numbered.sum())


def match_renumbered(
    rows_a: Rows, rows_b: Rows, window_ns: int, usual: Usual, book: AddressBook, renumbered: int
) -> Matches:
    """Match waiting packets whose key without IP identification is unique, as if they had none.

    `renumbered` says whose identifications are written anew between the points, see `evidence.weigh`.
    """
    a, b = unique_pairs(rows_a.content, rows_b.content)
    told = (rows_a.table.protocol[a] == TCP) | ~(rows_a.common[a] | rows_b.common[b])
    return _believe(
        rows_a, rows_b, a[told], b[told], window_ns, usual, book, careful=False, renumbered=renumbered
    )


def _believe(
    rows_a: Rows,
    rows_b: Rows,
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    window_ns: int,
    usual: Usual,
    book: AddressBook,
    *,
    careful: bool,
    renumbered: int = 0,
) -> Matches:
    """Return which candidate pairs are believed by their own evidence.

    `careful` has identifications of packets that say what others say looked at twice, see `worn`.
    """
    if not a.size:
        return Matches(a, b, np.empty(0, np.uint16))
    bits, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, book, renumbered=renumbered)
    delta = rows_b.table.time_ns[b] - rows_a.table.time_ns[a]
    apart = np.abs(delta)
    good = (bits >= evidence.STRONG) & ~conflict & (apart <= window_ns)
    told_apart = (flags & evidence.IP_ID) != 0
    tcp = (flags & evidence.TCP_SEQ) != 0
    endpoint = (flags & (evidence.SAME_SRC | evidence.SAME_DST)) != 0
    numbered = told_apart & endpoint
    repeated = np.flatnonzero(good & ~tcp & (~numbered | careful))
    beyond_doubt = np.ones(a.size, np.bool_)
    if repeated.size:
        # where it must carry the match, a payload may not be what everybody says all the time
        common = commonplace(rows_a, a[repeated]) | commonplace(rows_b, b[repeated])
        unsure = repeated[common]
        beyond_doubt[unsure] = False
        worn = ~numbered[unsure]
        if careful:
            worn |= worn_ids(rows_a, a[unsure]) | worn_ids(rows_b, b[unsure])
        good[unsure[worn]] = False
        if careful:
            unsure = unsure[~worn]
            good[unsure[_outvoted(rows_a, a, rows_b, b, good, unsure)]] = False
    if careful:
        told = np.flatnonzero(good & told_apart)
        good[told[by_chance(rows_a, a[told], rows_b, b[told])]] = False
        by_hand = np.flatnonzero(good & numbered_by_hand(rows_a.table)[a])
        if by_hand.size:
            x, y = a[by_hand], b[by_hand]
            alike = says_nothing(rows_a, x) | says_nothing(rows_b, y)
            worn = ~told_apart[by_hand] | worn_segments(rows_a, x) | worn_segments(rows_b, y)
            good[by_hand[alike & worn]] = False
    acknowledged = tcp & ((flags & evidence.TCP_ACK) != 0)
    # a segment without an IP id may be another copy of itself, but not so soon
    usual.learn(delta[good & beyond_doubt & (told_apart | (acknowledged & (apart <= TCP_REPEAT_NS)))])
    reach, longest = usual.reach_ns(), usual.longest_ns()
    if reach is not None and longest is not None:
        limit = np.where(tcp, longest + TCP_REPEAT_NS, min(reach, longest + REPEAT_NS))
        good &= told_apart | (apart <= limit)
    else:
        good &= told_apart | (apart <= np.where(tcp, TCP_REPEAT_NS, REPEAT_NS))
    if careful or renumbered:
        rest = np.flatnonzero(good & ~told_apart)
        may_be = may_be_copies(rows_a, a[rest], rows_b, b[rest], longest, numbered=not renumbered)
        good[rest[may_be]] = False
    if not good.all():
        a, b, flags, delta = a[good], b[good], flags[good], delta[good]
    if longest is None:
        usual.learn(delta)  # nothing was beyond doubt; what is believed is next best
    return Matches(a, b, flags)


def _outvoted(
    rows_a: Rows,
    a: NDArray[np.int64],
    rows_b: Rows,
    b: NDArray[np.int64],
    good: NDArray[np.bool_],
    unsure: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return which of the `unsure` pairs bind flows that many more good pairs bind to others at that time.

    NAT keeps one binding of a flow at a time, so a few pairs beside it share an identification by chance.
    """
    if not unsure.size:
        return np.zeros(0, np.bool_)
    rivals = np.zeros(good.size, np.bool_)
    for flow in (rows_a.flow[a], rows_b.flow[b]):
        asked = np.zeros(int(flow.max()) + 1, np.bool_)
        asked[flow[unsure]] = True
        rivals |= asked[flow]
    chosen = np.flatnonzero(good & rivals)
    time = rows_a.table.time_ns[a[chosen]]
    binding = (rows_a.flow[a[chosen]] << 32) | rows_b.flow[b[chosen]]
    bindings, member, pairs = np.unique(binding, return_inverse=True, return_counts=True)
    member = member.reshape(-1)
    first, last = np.full(bindings.size, 2**62), np.full(bindings.size, -(2**62))
    np.minimum.at(first, member, time)
    np.maximum.at(last, member, time)
    own = member[np.searchsorted(chosen, unsure)]
    result = np.zeros(unsure.size, np.bool_)
    for end in (bindings >> 32, bindings & 0xFFFFFFFF):
        order = np.lexsort((pairs, end))
        strongest = order[np.searchsorted(end[order], end, "right") - 1][own]
        at = rows_a.table.time_ns[a[unsure]]
        beside = (first[strongest] <= at) & (at <= last[strongest])
        result |= beside & (pairs[own] * _OUTVOTED < pairs[strongest])
    return result


def commonplace(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each chosen row whether another packet of the window says the very same.

    A payload of equal bytes counts as said by others, and so does one of which nothing is to be seen. Never
    so for TCP, where the sequence number tells packets apart.
    """
    if rows.said is None:
        said = np.sort(commonplace_keys(rows.table, np.flatnonzero(rows.table.protocol != TCP)))
        rows.said = said[1:][said[1:] == said[:-1]]
    result = np.zeros(chosen.size, np.bool_)
    asked = np.flatnonzero(rows.table.protocol[chosen] != TCP)
    if asked.size and rows.said.size:
        result[asked] = contains(rows.said, commonplace_keys(rows.table, chosen[asked]))
    filled = fillings()
    hashes = rows.table.content_hash[chosen[asked]]
    result[asked] |= contains(filled, hashes)
    bare = asked[rows.table.content_length[chosen[asked]] == 0]
    if bare.size:
        result[bare] |= blank_echoes(rows.table, chosen[bare]) | ~rows.table.residual_known[chosen[bare]]
    return result


def _without(rows: NDArray[np.int64], chosen: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Return `rows` (ascending indices below `total`) without the chosen ones."""
    mask = np.zeros(total, np.bool_)
    mask[rows] = True
    mask[chosen] = False
    return np.flatnonzero(mask)

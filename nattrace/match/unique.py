"""Unique: packets whose key occurs once at each point, believed when their own evidence suffices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.l4 import fillings
from nattrace.lookup import contains
from nattrace.match import evidence
from nattrace.match.counters import by_chance
from nattrace.match.evidence import TCP_REPEAT_NS
from nattrace.match.keys import blank_echoes, commonplace_keys
from nattrace.match.outcome import Matches
from nattrace.match.pairing import unique_pairs
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
#: IP identifications of a device that counts from its start are small; then many devices send the same ones.
_YOUNG_ID = 1024
_YOUNG_SEQ = 1 << 16
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

    `careful` has identifications of packets that say what others say looked at twice, see `_worn_ids`.
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
            worn |= _worn_ids(rows_a, a[unsure]) | _worn_ids(rows_b, b[unsure])
        good[unsure[worn]] = False
        if careful:
            unsure = unsure[~worn]
            good[unsure[_outvoted(rows_a, a, rows_b, b, good, unsure)]] = False
    if careful:
        told = np.flatnonzero(good & told_apart)
        good[told[by_chance(rows_a, a[told], rows_b, b[told])]] = False
        numbered_by_hand = np.flatnonzero(good & tcp & made_up(rows_a.table.seq[a]))
        if numbered_by_hand.size:
            x, y = a[numbered_by_hand], b[numbered_by_hand]
            good[numbered_by_hand[_blank_segments(rows_a, x) | _blank_segments(rows_b, y)]] = False
    acknowledged = tcp & ((flags & evidence.TCP_ACK) != 0)
    # a segment without an IP id may be another copy of itself, but not so soon
    usual.learn(delta[good & beyond_doubt & (told_apart | (acknowledged & (apart <= TCP_REPEAT_NS)))])
    reach, longest = usual.reach_ns(), usual.longest_ns()
    if reach is not None and longest is not None:
        limit = np.where(tcp, longest + TCP_REPEAT_NS, min(reach, longest + REPEAT_NS))
        good &= told_apart | (apart <= limit)
    else:
        good &= told_apart | (apart <= np.where(tcp, TCP_REPEAT_NS, REPEAT_NS))
    if not good.all():
        a, b, flags, delta = a[good], b[good], flags[good], delta[good]
    if longest is None:
        usual.learn(delta)  # nothing was beyond doubt; what is believed is next best
    return Matches(a, b, flags)


def _worn_ids(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for which chosen rows the IP identification does not tell packets apart that say the same.

    So it is for young ones (two equal bytes are filled like the packet), and where several packets
    that say the same have the same identification much more often than chance would have it: their senders
    count in step.
    """
    table = rows.table
    own_id = table.ip_id[chosen]
    worn = young_ids(own_id)
    alike = np.flatnonzero((table.protocol != TCP) & (table.ip_id != 0))
    said, place = np.unique(commonplace_keys(table, alike), return_inverse=True)
    place = place.reshape(-1)
    identity = np.unique((place.astype(np.int64) << 32) | table.ip_id[alike])
    sent = np.bincount(place, minlength=said.size)
    different = np.bincount(identity >> 32, minlength=said.size)
    by_chance = sent * (sent - 1.0) / (2 * 65536)
    in_step = sent - different > 2 + 4 * by_chance
    own = np.minimum(np.searchsorted(said, commonplace_keys(table, chosen)), max(said.size - 1, 0))
    if said.size:
        worn |= in_step[own]
    return worn


def young_ids(ip_id: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which IP identifications many devices send: those of a young counter, and two equal bytes."""
    young: NDArray[np.bool_] = (ip_id < _YOUNG_ID) | (ip_id % 0x0101 == 0)
    return young


def made_up(seq: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which TCP sequence numbers are no random ones (RFC 6528): below 2**16, or four equal bytes.

    Packets that were made by hand begin with 0, 1 or 1000, and fuzzed ones are filled with one byte.
    """
    made_up: NDArray[np.bool_] = (seq < _YOUNG_SEQ) | (seq % np.uint32(0x01010101) == 0)
    return made_up


def _blank_segments(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the chosen segments, of made up numbers, say nothing and share their IP identification."""
    table = rows.table
    filled = fillings()
    hashes = table.content_hash[chosen]
    blank = contains(filled, hashes)
    blank |= table.payload_length[chosen] == 0
    others = np.flatnonzero((table.protocol == TCP) & made_up(table.seq))
    ids, count = np.unique(table.ip_id[others], return_counts=True)
    own = table.ip_id[chosen]
    shared = (count[np.searchsorted(ids, own)] > 1) | (own % 0x0101 == 0)
    result: NDArray[np.bool_] = blank & shared
    return result


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

    A payload of equal bytes counts as said by others, and so does one of which nothing is to be seen. Never so for TCP, where the sequence number tells
    packets apart.
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

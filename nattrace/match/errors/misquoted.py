"""ICMP errors that a middlebox translated wrongly: paired by what the fault leaves alone.

A translator has to change an error's outer header and the quote inside it alike (RFC 5508 section 7, RFC 6146
section 3.4). One that forgets half of the work makes errors that the host ignores; at the far side they quote a
flow that is not there. Such an error is paired only when it is alone with all else that it says, and when every
address and port of its quote is the one before or the one after the flow's translation.

Nor is there the flow that a right error quotes at a bridge which shows packets after half of their translation and
errors after all of it (bridge netfilter). Of that flow the bridge shows one end, and Linux sends the error in the
name of the other. Nothing else is guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.match import evidence
from nattrace.match.errors.icmp_errors import (
    BROKEN,
    NO_FAULT,
    QUOTE_UNTRANSLATED,
    UNTRANSLATED,
    WHOLE,
    ErrorPairs,
    Located,
    error_key,
)
from nattrace.match.keys import M1, M2, endpoint_hash, has_ports, mix
from nattrace.match.pairing import unique_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.flows import Flows

#: How far apart two sightings may be where no binding vouches for them.
_REACH_NS: Final = 10_000_000


def pair_broken(a: Located, b: Located) -> ErrorPairs:
    """Pair errors of one binding whose quotes differ in what NAT never changes, by the errors' own IP id.

    The id has to be there, and type, code and id alone in the binding on both sides.
    """
    keys = []
    for side in (a, b):
        packets = side.errors.packets
        word = packets.icmp_type.astype(np.uint64) << np.uint64(56)
        word |= packets.icmp_code.astype(np.uint64) << np.uint64(48)
        word |= packets.ip_id.astype(np.uint64)
        keys.append(mix((word * M1)[side.row] ^ side.lane() * M2))
    first, second = unique_pairs(*keys)
    row_a, row_b = a.row[first], b.row[second]
    one, two = a.errors.packets, b.errors.packets
    good = (one.ip_id[row_a] != 0) & (np.abs(two.time_ns[row_b] - one.time_ns[row_a]) <= _REACH_NS)
    for errors, rows in ((a.errors, row_a), (b.errors, row_b)):
        good &= errors.packets.dst[rows] == errors.quoted.src[rows]
        # an error on several edges is none's
        good &= np.bincount(rows, minlength=1)[rows] == 1
    flags = np.full(first.size, evidence.BINDING | evidence.IP_ID, np.uint16)
    fault = np.full(first.size, BROKEN, np.uint8)
    return ErrorPairs(row_a, row_b, a.edge[first], a.backward[first], flags, fault).take(good)


def pair_untranslated(
    right: Located,
    stray: NDArray[np.int64],
    far: tuple[Errors, Flows, NDArray[np.int64]],
    edges: Edges,
    *,
    right_is_a: bool,
) -> ErrorPairs:
    """Pair errors that quote a known flow with errors of the other point that quote none of theirs.

    `right` are unpaired errors on their edges, `stray` rows of the other point's errors; `far` are these errors,
    the other point's flows, and which of them each edge leads to.
    """
    errors, flows, edge_flow = far
    sole, several = _latest(right, edges, right_is_a=right_is_a)
    found: list[ErrorPairs] = []
    for end in ("dst", "src", None):
        if not sole.size or not stray.size:
            break
        near = right.row[sole]
        first, second = unique_pairs(_kept_key(right.errors, near, end), _kept_key(errors, stray, end))
        place, other = sole[first], stray[second]
        mine = right.row[place]
        time, other_time = right.errors.packets.time_ns[mine], errors.packets.time_ns[other]
        fault, possible = _judge(right, place, errors, other, flows, edge_flow, edges, right_is_a=right_is_a)
        possible &= np.abs(other_time - time) <= _REACH_NS
        possible &= (fault == NO_FAULT) | ~several[place]
        if end is None:  # nothing of the tuple is the same: the packets themselves have to say more
            quoted = errors.quoted
            possible &= (quoted.ip_id[other] != 0) | (errors.quoted_seq()[other] != 0)
        place, mine, other, fault = place[possible], mine[possible], other[possible], fault[possible]
        flags = np.full(place.size, evidence.QUOTE, np.uint16)
        flags |= (errors.packets.ip_id[other] != 0) * np.uint16(evidence.IP_ID)
        pair = (mine, other) if right_is_a else (other, mine)
        found.append(ErrorPairs(*pair, right.edge[place], right.backward[place], flags, fault))
        sole, stray = np.setdiff1d(sole, place), np.setdiff1d(stray, other)
    return ErrorPairs.concatenate(found)


def _latest(right: Located, edges: Edges, *, right_is_a: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the place of each error, on the binding that was made last before it, and which have several."""
    made = (edges.first_ns if right_is_a else edges.first_b_ns)[right.edge]
    late = made > right.errors.packets.time_ns[right.row]
    order = np.lexsort((made, ~late, right.row))
    row = right.row[order]
    last = np.flatnonzero(np.append(row[1:] != row[:-1], True)) if row.size else order
    several: NDArray[np.bool_] = np.bincount(right.row, minlength=1)[right.row] > 1
    return np.sort(order[last]), several


def _kept_key(errors: Errors, rows: NDArray[np.int64], end: str | None) -> NDArray[np.uint64]:
    """Return keys of everything that even a careless translator leaves alone, with one end of the quote or none."""
    key = error_key(errors, WHOLE)[rows]
    if end is not None:
        q = errors.quoted
        port = q.sport if end == "src" else q.dport
        key ^= endpoint_hash(q.version[rows], getattr(q, end)[rows], port[rows])
    return mix(key)


def _judge(
    right: Located,
    place: NDArray[np.int64],
    errors: Errors,
    other: NDArray[np.int64],
    flows: Flows,
    edge_flow: NDArray[np.int64],
    edges: Edges,
    *,
    right_is_a: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return what is wrong with the strays `other`, and whether they can be the errors at `place` at all."""
    mine = right.errors.quoted
    rows = right.row[place]
    edge = right.edge[place]
    flow = edge_flow[edge]
    # the direction that the quote has at the far point
    backward = right.backward[place] ^ edges.swap[edge] if right_is_a else right.backward[place]
    low, high = (
        (flows.low_address[flow], flows.low_port[flow]),
        (flows.high_address[flow], flows.high_port[flow]),
    )
    quoted = errors.quoted
    ends = []
    columns: tuple[tuple[str, str, tuple[NDArray[Any], ...], tuple[NDArray[Any], ...]], ...]
    columns = (("src", "sport", high, low), ("dst", "dport", low, high))
    fits = right.errors.packets.dst[rows] == mine.src[rows]
    possible = fits.copy()
    for address, port, near, far in columns:
        after = [np.where(backward, near[n], far[n]) for n in (0, 1)]
        before = getattr(mine, address)[rows], getattr(mine, port)[rows]
        here = getattr(quoted, address)[other], getattr(quoted, port)[other]
        translated = (here[0] == after[0]) & (here[1] == after[1])
        kept = (here[0] == before[0]) & (here[1] == before[1])
        mixed = ((here[0] == after[0]) | (here[0] == before[0])) & (
            (here[1] == after[1]) | (here[1] == before[1])
        )
        possible &= mixed
        ends.append((translated, kept, after[0], before[0]))
    (src_done, src_kept, src_after, src_before), (dst_done, dst_kept, dst_after, dst_before) = ends
    to, sender = errors.packets.dst[other], errors.packets.src[other]
    possible &= (to == src_after) | (to == src_before)
    router = right.errors.packets.src[rows]
    possible &= (sender == router) | (sender == dst_after) | (sender == dst_before)
    # both ends whole, each before or after, and the outer header with them: a sighting in mid-translation
    outer_as_quote = (to == quoted.src[other]) & ((sender == quoted.dst[other]) | (router != dst_before))
    whole = (src_done | src_kept) & (dst_done | dst_kept)
    untouched = src_kept & dst_kept & (to == src_before) & (sender == router)
    fault = np.where(whole & outer_as_quote, NO_FAULT, QUOTE_UNTRANSLATED)
    fault = np.where(untouched, UNTRANSLATED, fault)
    # an id changes with either end
    echo = ~has_ports(quoted.protocol[other])
    src_there = src_done | (echo & (quoted.src[other] == src_after))
    dst_there = dst_done | (echo & (quoted.dst[other] == dst_after))
    in_name = (to == quoted.src[other]) & (sender == quoted.dst[other])
    # two words of their own, and an end that was kept: what `binding` asks for
    numbered = errors.packets.ip_id[other] != 0
    numbered &= (quoted.ip_id[other] != 0) | (errors.quoted_seq()[other] != 0)
    halfway = fits & ~possible & (src_there ^ dst_there) & in_name & numbered
    return np.where(halfway, NO_FAULT, fault).astype(np.uint8), possible | halfway

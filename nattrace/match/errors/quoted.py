"""ICMP errors of two points, paired through the packets that they quote.

The quoted packet went the other way, so the error's flow is the quote's, and the flow's edge says which flow it is
at the other point: there the same error quotes that flow. Inside an edge two sightings of one error agree on type,
code, MTU and everything in the quote that NAT leaves alone; the outer header only has to lead to the host that is
quoted. What the edge does not pair but the rest of the error vouches for was translated wrongly: a fault. Nothing
here makes bindings or knows which point comes first.
Kernel: nf_nat_icmp_reply_translation, nf_conntrack_icmp_error; RFC 5508 section 7, RFC 6146 section 3.4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.match import evidence
from nattrace.match.errors.icmp_errors import (
    BROKEN,
    CHECKED,
    EXACT,
    LOOSE,
    NO_FAULT,
    OUTER_UNTRANSLATED,
    WHOLE,
    ErrorPairs,
    Located,
    error_key,
)
from nattrace.match.errors.misquoted import pair_broken, pair_untranslated
from nattrace.match.errors.translated import in_common
from nattrace.match.keys import M2, flow_hash, mix
from nattrace.match.lanes import edge_of
from nattrace.match.pairing import group_ids, nearest_pairs, unique_pairs
from nattrace.match.ties import CANDIDATES, TIE_WINDOW_NS
from nattrace.match.votes import FLOOR_NS, MARGIN
from nattrace.table import TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.flows import Flows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: Errors that are alone with what they say may be this far apart, as other packets inside a binding.
_UNIQUE_REACH_NS: Final = 10_000_000
#: Those without any IP identification must be about as far apart as is usual: half as far again, plus what one
#: interrupt more or less makes; or so far where nothing is known of the two points.
_FLOOR_NS: Final = 20_000
_WINDOW_NS: Final = 1_000_000
#: A flow with more bindings than this over time (ports reused in a scan) is on the one around the error only.
_BINDINGS_TRIED: Final = 8
#: A quoted payload of fewer bytes says little, see `evidence`.
_SAYING_BYTES: Final = 8
#: Other than latencies of one host, two clocks: then any direction tells how far apart the points' times are.
_CLOCKS_APART_NS: Final = 1_000_000
#: The kernel leaves the checksum of a quoted TCP header alone that is not there as a whole (tcp_manip_pkt).
_WHOLE_TCP_HEADER: Final = 20


def flows_of_quotes(errors: Errors, flows: Flows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the flow that each error's quote belongs to at its point, -1 for none, and the quote's direction."""
    key, backward = flow_hash(errors.quoted)
    found = np.full(key.size, -1, np.int64)
    if len(flows) and key.size:
        order = np.argsort(flows.hash)
        place = np.minimum(np.searchsorted(flows.hash[order], key), order.size - 1)
        same = flows.hash[order[place]] == key
        found[same] = order[place[same]]
    return found, backward


def pair_errors(
    errors_a: Errors,
    errors_b: Errors,
    flows_a: Flows,
    flows_b: Flows,
    edges: Edges,
    usual: Usual,
    book: AddressBook,
    clock_bound_ns: int = 0,
    *,
    renumbered: bool = False,
) -> tuple[ErrorPairs, NDArray[np.uint32], NDArray[np.uint32]]:
    """Pair the errors of two points; flows and edges are merged ones, clocks differ by `clock_bound_ns` at most.

    `renumbered` where a box between the points writes IP identifications of its own, which then say nothing.
    Returns the pairs, and for the rows of either side the frames of the errors that an unpaired one could be, 0 for
    none; shape (rows, CANDIDATES).
    """
    if renumbered:
        errors_a, errors_b = errors_a.without_ids(), errors_b.without_ids()
    side_a, side_b = _locate(errors_a, flows_a, edges, 0), _locate(errors_b, flows_b, edges, 1)
    across = flows_a.version[edges.flow_a] != flows_b.version[edges.flow_b]
    free_a, free_b = np.ones(len(errors_a), np.bool_), np.ones(len(errors_b), np.bool_)
    lost_a, lost_b = free_a.copy(), free_b.copy()
    lost_a[side_a.row] = lost_b[side_b.row] = False
    parts: list[ErrorPairs] = []

    def open_sides(chosen: NDArray[np.bool_]) -> tuple[Located, Located]:
        return (
            side_a.take(free_a[side_a.row] & chosen[side_a.edge]),
            side_b.take(free_b[side_b.row] & chosen[side_b.edge]),
        )

    def take_in(found: ErrorPairs) -> None:
        parts.append(found)
        free_a[found.a] = free_b[found.b] = False

    if across.any():
        either_a, either_b = in_common(errors_a, book), in_common(errors_b, book)
        for level in (EXACT, CHECKED):
            a, b = open_sides(across)
            a, b = replace(a, errors=either_a), replace(b, errors=either_b)
            take_in(_pair_level(a, b, level, edges, usual, clock_bound_ns, across=True))
    for level in (EXACT, CHECKED, WHOLE, LOOSE):
        take_in(_pair_level(*open_sides(~across), level, edges, usual, clock_bound_ns))
    take_in(pair_broken(*open_sides(~across)))
    for right_is_a in (True, False):
        a, b = open_sides(~across)
        if right_is_a:
            stray, far = np.flatnonzero(lost_b & free_b), (errors_b, flows_b, edges.flow_b)
        else:
            stray, far = np.flatnonzero(lost_a & free_a), (errors_a, flows_a, edges.flow_a)
        take_in(pair_untranslated(a if right_is_a else b, stray, far, edges, right_is_a=right_is_a))
    # what has no equal across IP versions may have been dropped there: it could be nothing else
    strays = np.flatnonzero(lost_a & free_a), np.flatnonzero(lost_b & free_b)
    return ErrorPairs.concatenate(parts), *_tied(*open_sides(~across), strays)


# ----------------------------------------------------------------------------------------------------


def _locate(errors: Errors, flows: Flows, edges: Edges, side: int) -> Located:
    """Find the edges of the flows that the errors quote."""
    flow, backward = flows_of_quotes(errors, flows)
    edge_flow = edges.flow_a if side == 0 else edges.flow_b
    order = np.argsort(edge_flow, kind="stable")
    owner = edge_flow[order]
    low, high = np.searchsorted(owner, flow, "left"), np.searchsorted(owner, flow, "right")
    count = np.where(flow >= 0, high - low, 0)
    many = np.flatnonzero(count > _BINDINGS_TRIED)
    count[many] = 0
    row = np.repeat(np.arange(flow.size), count)
    offset = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
    edge = order[np.repeat(low, count) + offset]
    if many.size:
        of_many = edge_of(flow[many], errors.packets.time_ns[many], side, edges)
        row = np.concatenate([row, many[of_many >= 0]])
        edge = np.concatenate([edge, of_many[of_many >= 0]])
    turned = backward[row] ^ edges.swap[edge] if side else backward[row]
    return Located(errors, row, edge, turned)


def _pair_level(
    a: Located,
    b: Located,
    level: int,
    edges: Edges,
    usual: Usual,
    clock_bound_ns: int,
    *,
    across: bool = False,
) -> ErrorPairs:
    """Pair what is equal on one level: alone with it in its lane, or clearly nearest in time.

    `across` IP versions, with errors as they are in either (see `translated`).
    """
    key_a = mix(error_key(a.errors, level)[a.row] ^ a.lane() * M2)
    key_b = mix(error_key(b.errors, level)[b.row] ^ b.lane() * M2)
    time_a = a.errors.packets.time_ns[a.row] + _shift_ns(edges, a.edge, ~a.backward)
    time_b = b.errors.packets.time_ns[b.row]
    first, second = unique_pairs(key_a, key_b)
    longest = usual.longest_ns()
    window_ns = _WINDOW_NS if longest is None else longest + longest // 2 + _FLOOR_NS
    window_ns += clock_bound_ns
    # without an identification or a payload of its own it may be another one that quotes the same packet sent again
    usual_ns = np.maximum(2 * _latency_ns(edges, a.edge[first]) + _FLOOR_NS, window_ns)
    told = _numbered(a.errors, a.row[first])
    if not told.all():
        told |= _said_once(a.errors)[a.row[first]] & _said_once(b.errors)[b.row[second]]
    reach_ns = np.where(told, _UNIQUE_REACH_NS, usual_ns)
    soon = np.abs(time_b[second] - time_a[first]) <= reach_ns
    first, second = first[soon], second[soon]
    rest_a, rest_b = np.ones(a.row.size, np.bool_), np.ones(b.row.size, np.bool_)
    rest_a[first] = rest_b[second] = False
    left_a, left_b = np.flatnonzero(rest_a), np.flatnonzero(rest_b)
    if left_a.size and left_b.size:
        group_a, group_b = group_ids(key_a[left_a], key_b[left_b])
        near_a, near_b = nearest_pairs(
            group_a, time_a[left_a], group_b, time_b[left_b],
            window_ns=window_ns,
            floor_ns=FLOOR_NS if longest is None else max(longest // 2, FLOOR_NS),
            margin=MARGIN, rounds=4,
        )  # fmt: skip
        first, second = np.concatenate([first, left_a[near_a]]), np.concatenate([second, left_b[near_b]])
    return _judged(a, b, first, second, across=across)


def _judged(
    a: Located, b: Located, first: NDArray[np.int64], second: NDArray[np.int64], *, across: bool
) -> ErrorPairs:
    """Say what speaks for each pair, and drop those that something speaks against."""
    # an error on several edges may find a different partner on each: then it is none's
    sole = (np.bincount(a.row[first])[a.row[first]] == 1) & (np.bincount(b.row[second])[b.row[second]] == 1)
    first, second = first[sole], second[sole]
    row_a, row_b = a.row[first], b.row[second]
    one, two = a.errors.packets, b.errors.packets
    quote_a, quote_b = a.errors.quoted, b.errors.quoted
    id_a, id_b = one.ip_id[row_a], two.ip_id[row_b]
    both_ids = (id_a != 0) & (id_b != 0)
    known = quote_a.residual_known[row_a] & quote_b.residual_known[row_b]
    same_sum = quote_a.residual[row_a] == quote_b.residual[row_b]
    short = (quote_a.protocol[row_a] == TCP) & (a.errors.l4_length[row_a] < _WHOLE_TCP_HEADER)
    differing = known & ~same_sum & ~short
    # what differs in its checksum is another packet, unless something else says that it is this one
    vouched = both_ids & (id_a == id_b)
    seq = a.errors.quoted_seq()[row_a]
    vouched |= (quote_a.ip_id[row_a] != 0) | ((quote_a.protocol[row_a] == TCP) & (seq != 0))
    other_content = quote_a.content_length[row_a] == quote_b.content_length[row_b]
    other_content &= quote_a.content_hash[row_a] != quote_b.content_hash[row_b]
    refused = (both_ids & (id_a != id_b)) | (differing & ~vouched) | (other_content & ~vouched)
    flags = np.full(first.size, evidence.QUOTE | evidence.BINDING, np.uint16)
    flags |= (both_ids & (id_a == id_b)) * np.uint16(evidence.IP_ID)
    flags |= (known & same_sum) * np.uint16(evidence.CHECKSUM)
    flags |= (one.src[row_a] == two.src[row_b]) * np.uint16(evidence.SAME_SRC)
    flags |= (one.dst[row_a] == two.dst[row_b]) * np.uint16(evidence.SAME_DST)
    fault = np.where(differing | other_content, BROKEN, NO_FAULT).astype(np.uint8)
    # a router keeps its address or, with Linux, takes the one that the quoted host is known by
    own_a, own_b = one.src[row_a] == quote_a.dst[row_a], two.src[row_b] == quote_b.dst[row_b]
    same_router = one.src[row_a] == two.src[row_b]
    # a router without an address of the other IP version gets the translator's
    one_router = same_router | own_a | own_b | across
    outer = outer_fits(a.errors, row_a) != outer_fits(b.errors, row_b)
    fault[outer | (same_router & (own_a != own_b) & (not across))] = OUTER_UNTRANSLATED
    alike = (quote_a.ttl[row_a] == quote_b.ttl[row_b]) & (
        quote_a.ip_length[row_a] == quote_b.ip_length[row_b]
    )
    refused |= ~one_router | ~(alike | vouched)
    refused |= ~outer_fits(a.errors, row_a) & ~outer_fits(b.errors, row_b)
    return ErrorPairs(row_a, row_b, a.edge[first], a.backward[first], flags, fault).take(~refused)


def _numbered(errors: Errors, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which errors have an IP identification, or quote one."""
    numbered: NDArray[np.bool_] = (errors.packets.ip_id[rows] != 0) | (errors.quoted.ip_id[rows] != 0)
    return numbered


def _said_once(errors: Errors) -> NDArray[np.bool_]:
    """Say which errors quote a payload that no other error of their point quotes."""
    quoted = errors.quoted
    _, place, count = np.unique(quoted.content_hash, return_inverse=True, return_counts=True)
    alone: NDArray[np.bool_] = (count[place.reshape(-1)] == 1) & (quoted.content_length >= _SAYING_BYTES)
    return alone


def outer_fits(errors: Errors, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which errors are addressed to the host whose packet they quote."""
    fits: NDArray[np.bool_] = errors.packets.dst[rows] == errors.quoted.src[rows]
    return fits


def _latency_ns(edges: Edges, edge: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how far apart the packets of each edge were on average; 0 where that is two clocks, and no latency."""
    count = edges.forward[edge] + edges.backward[edge]
    apart = np.abs(edges.delta_forward[edge]) + np.abs(edges.delta_backward[edge])
    mean: NDArray[np.int64] = apart // np.maximum(count, 1)
    return np.where(mean <= _CLOCKS_APART_NS, mean, 0)


def _shift_ns(edges: Edges, edge: NDArray[np.int64], backward: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return by how much the second point is usually later in each edge and direction; 0 where unknown."""
    if not edge.size:
        return np.empty(0, np.int64)
    count = np.where(backward, edges.backward[edge], edges.forward[edge])
    total = np.where(backward, edges.delta_backward[edge], edges.delta_forward[edge])
    other = np.where(backward, edges.forward[edge], edges.backward[edge])
    other_total = np.where(backward, edges.delta_forward[edge], edges.delta_backward[edge])
    mean = total // np.maximum(count, 1)
    other_mean = other_total // np.maximum(other, 1)
    apart = np.where(np.abs(other_mean) > _CLOCKS_APART_NS, other_mean, 0)
    return np.where(count > 0, mean, apart)


def _tied(
    a: Located, b: Located, strays: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the frames of the other side's errors that each unpaired error could be; shape (rows, CANDIDATES).

    The first candidates within TIE_WINDOW_NS, 0 where there are fewer: a row of zeros has none. Where no error of its
    binding could be it, one of the other side's `strays` may, which quote flows that their point does not show.
    """
    found = []
    for own, other, stray in ((a, b, strays[1]), (b, a, strays[0])):
        frames = np.zeros((len(own.errors), CANDIDATES), np.uint32)
        _note(frames, own.errors, own.row, _tie_key(own), other.errors, other.row, _tie_key(other))
        rest = own.row[~frames[own.row].any(axis=1)]
        keys = error_key(own.errors, LOOSE)[rest], error_key(other.errors, LOOSE)[stray]
        _note(frames, own.errors, rest, keys[0], other.errors, stray, keys[1])
        found.append(frames)
    return found[0], found[1]


def _note(
    frames: NDArray[np.uint32],
    errors: Errors,
    rows: NDArray[np.int64],
    keys: NDArray[np.uint64],
    others: Errors,
    other_rows: NDArray[np.int64],
    other_keys: NDArray[np.uint64],
) -> None:
    """Put into `frames` the first of the others' errors that have the key of each of these rows, and are near."""
    if not rows.size or not other_rows.size:
        return
    group, other_group = group_ids(keys, other_keys)
    time, other_time = errors.packets.time_ns[rows], others.packets.time_ns[other_rows]
    order = np.lexsort((other_time, other_group))
    rival = other_group[order]
    low, high = np.searchsorted(rival, group, "left"), np.searchsorted(rival, group, "right")
    for n in range(CANDIDATES):
        place = np.minimum(low + n, order.size - 1)
        apart = np.abs(other_time[order[place]] - time)
        good = (low + n < high) & (apart <= TIE_WINDOW_NS)
        frames[rows[good], n] = others.packets.frame[other_rows[order[place]]][good]


def _tie_key(side: Located) -> NDArray[np.uint64]:
    """Return keys that are equal where two errors could be one, if boxes write IP identifications of their own."""
    return mix(error_key(side.errors, LOOSE)[side.row] ^ side.lane() * M2)

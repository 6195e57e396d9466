"""Flows bound by the ICMP errors about them, where no packet of their own says enough.

The probes of a traceroute say all the same, each from a port of its own, and without an IP identification nothing
tells one from the other. The error that answers a probe does: it has an identification, and it quotes the ports. Two
errors are believed to be one by their own evidence, in bits as in `match.evidence`; what a device repeats counts for
nothing. What is bound so is no match yet: it says where the flows' packets are to be looked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.match import evidence
from nattrace.match.edges import Edges, group_edges
from nattrace.match.errors.icmp_errors import CHECKED, error_key
from nattrace.match.errors.quoted import flows_of_quotes, outer_fits
from nattrace.match.errors.translated import in_common
from nattrace.match.keys import commonplace_keys, endpoint_hash, flow_hash, has_ports, mix
from nattrace.match.lanes import Lanes
from nattrace.match.outcome import Matches
from nattrace.match.pairing import unique_pairs
from nattrace.match.unique import REPEAT_NS
from nattrace.match.worn import made_up, young_ids
from nattrace.table import TCP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.flows import Flows
    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: A quoted payload has to say so many bits to be a word of its own.
_BITS_SAID: Final = 24
#: Ports that Linux chooses from (ip_local_port_range).
_EPHEMERAL_PORTS: Final = 28_232
#: Between points of one host packets take less than this, also those that conntrack has to make an entry for.
_NEAR_NS: Final = 1_000_000
#: What the words of `_own_words` weigh, in bits.
_WORD_BITS: Final = np.array(
    [evidence.BITS_IP_ID, evidence.BITS_IP_ID, evidence.BITS_TCP_SEQ, _BITS_SAID], np.int64
)
#: Numbers that are repeated so many times as often as chance has it tell nothing apart.
_OFTENER: Final = 4


def match_quoted(
    rows_a: Rows,
    rows_b: Rows,
    flows: tuple[Flows, Flows],
    members: tuple[NDArray[np.int64], NDArray[np.int64]],
    bound: Edges,
    book: AddressBook,
) -> Matches:
    """Match the packets that the errors quote which have `bound` their flows: the only one of its direction.

    Nothing else can be what is quoted at both points. `members` map flow numbers to places in `flows`.
    """
    lanes = Lanes.of(rows_a, rows_b, *members, bound)
    chosen, keys = [], []
    for rows, at, member, lane in zip(
        (rows_a, rows_b), flows, members, (lanes.lane_a, lanes.lane_b), strict=True
    ):
        flow = member[rows.flow]
        single = np.where(rows.backward, at.backward[flow], at.forward[flow]) == 1
        chosen.append(np.flatnonzero(single & (lane >= 0)))
        keys.append(mix(lane[chosen[-1]].astype(np.uint64) ^ rows.content[chosen[-1]]))
    first, second = unique_pairs(*keys)
    a, b = chosen[0][first], chosen[1][second]
    _, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, book)
    flags |= np.uint16(evidence.BINDING | evidence.QUOTE)
    return Matches(a[~conflict], b[~conflict], flags[~conflict])


@dataclass(slots=True)
class _Quoting:
    """What the errors of one point quote."""

    rows: NDArray[np.int64]  #: errors about flows that nothing binds
    flow: NDArray[np.int64]  #: of every error, see `flows_of_quotes`
    backward: NDArray[np.bool_]

    @classmethod
    def of(cls, errors: Errors, flows: Flows, bound: NDArray[np.signedinteger]) -> _Quoting:
        """Look up the flows of a point's errors; `bound` are those that have an edge."""
        flow, backward = flows_of_quotes(errors, flows)
        free = (flow >= 0) & ~np.isin(flow, bound)
        return cls(np.flatnonzero(free & outer_fits(errors, np.arange(len(errors)))), flow, backward)


def bind_by_errors(
    errors: tuple[Errors, Errors],
    flows: tuple[Flows, Flows],
    edges: Edges,
    usual: Usual,
    book: AddressBook,
    *,
    renumbered: bool = False,
) -> Edges:
    """Return edges between flows of two points that have none yet, told by errors that both points show.

    `flows` and `edges` are merged. Each edge's counts and deltas are those of the errors, which went against the
    quoted packets. `renumbered` where a box between the points writes IP identifications of its own.
    """
    if renumbered:
        errors = errors[0].without_ids(), errors[1].without_ids()
    quoting = [
        _Quoting.of(own, at, bound)
        for own, at, bound in zip(errors, flows, (edges.flow_a, edges.flow_b), strict=True)
    ]
    if not quoting[0].rows.size or not quoting[1].rows.size:
        return Edges.empty()
    pairs = [_believed(errors, flows, quoting, usual)]
    versions = [own.packets.version[q.rows] for own, q in zip(errors, quoting, strict=True)]
    for version in (4, 6):
        if (versions[0] == version).any() and (versions[1] == 10 - version).any():
            either = in_common(errors[0], book), in_common(errors[1], book)
            across = [
                replace(q, rows=q.rows[of == v])
                for q, of, v in zip(quoting, versions, (version, 10 - version), strict=True)
            ]
            pairs.append(_believed(either, flows, across, usual))
    a, b = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
    sole = np.flatnonzero(_unanimous(quoting[0].flow[a], quoting[1].flow[b]))
    a, b = a[sole], b[sole]
    flow_a, flow_b = quoting[0].flow[a], quoting[1].flow[b]
    back_a, back_b = quoting[0].backward[a], quoting[1].backward[b]
    time = errors[0].packets.time_ns[a]
    return group_edges(
        flow_a, flow_b, back_a != back_b, ~back_a, time,
        np.zeros(a.size, np.int64), errors[1].packets.time_ns[b] - time, np.full(a.size, evidence.QUOTE, np.uint16),
    )[0]  # fmt: skip


def _believed(
    errors: tuple[Errors, Errors], flows: tuple[Flows, Flows], quoting: Sequence[_Quoting], usual: Usual
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of errors that are one: alone with what they say on both sides, and saying enough."""
    own_a, own_b = (_own_words(each) for each in errors)
    rows_a, rows_b = (each.rows for each in quoting)
    reach_ns = (usual.longest_ns() or 0) + REPEAT_NS
    pairs = []
    for end, port in (("dst", "dport"), ("src", "sport")):
        keys = _key(errors[0], rows_a, end, port), _key(errors[1], rows_b, end, port)
        first, second = unique_pairs(*keys)
        a, b = rows_a[first], rows_b[second]
        told = own_a[:, a] & own_b[:, b]
        bits = told.T @ _WORD_BITS + evidence.BITS_ADDRESS
        bits += evidence.BITS_PORT * (getattr(errors[0].quoted, port)[a] != 0)
        good = told.any(axis=0) & _possible(errors, a, b, bits, reach_ns)
        pairs.append((a[good], b[good]))
        rows_a, rows_b = np.setdiff1d(rows_a, a[good]), np.setdiff1d(rows_b, b[good])
    pairs.append(_quiet(errors, flows, quoting, rows_a, rows_b, usual))
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


def _quiet(
    errors: tuple[Errors, Errors],
    flows: tuple[Flows, Flows],
    quoting: Sequence[_Quoting],
    rows_a: NDArray[np.int64],
    rows_b: NDArray[np.int64],
    usual: Usual,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return errors without a word of their own that keep one endpoint and both ports, while no other is like them.

    A translator keeps ports where it can, but two hosts may use one port: no two hosts may do so towards that
    target, no error at either point may agree in all but the port that is free to change within reach, and packet
    and error must be about as far apart as usual, the one inside the other as on a path.
    """
    longest = usual.longest_ns() or 0
    near_ns = max(longest + longest // 2, _NEAR_NS)
    clear, keys = [], []
    for each, rows in zip(errors, (rows_a, rows_b), strict=True):
        q = each.quoted
        key = _key(each, rows, "dst", "dport")
        ported = np.flatnonzero(has_ports(q.protocol) & (q.sport != 0) & (q.dport != 0))
        own = np.zeros(len(each), np.bool_)
        own[ported] = ~_in_step(
            q.dst[ported], q.sport[ported], q.src[ported].astype(np.uint64), _EPHEMERAL_PORTS
        )
        clear.append(own[rows] & _apart(key, each.packets.time_ns[rows], longest + REPEAT_NS))
        keys.append(mix(key ^ q.sport[rows]))
    first, second = unique_pairs(*keys)
    keep = clear[0][first] & clear[1][second]
    a, b = rows_a[first[keep]], rows_b[second[keep]]
    # the quoted packet and the error agree in one endpoint and both ports
    bits = np.full(a.size, 2 * (evidence.BITS_ADDRESS + 2 * evidence.BITS_PORT))
    good = _possible(errors, a, b, bits, near_ns)
    there = flows[1].first_ns[quoting[1].flow[b]] - flows[0].first_ns[quoting[0].flow[a]]
    back = errors[1].packets.time_ns[b] - errors[0].packets.time_ns[a]
    good &= (np.abs(there) <= near_ns) & (np.sign(there) * np.sign(back) <= 0)
    return a[good], b[good]


def _possible(
    errors: tuple[Errors, Errors],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    bits: NDArray[np.int64],
    reach_ns: int,
) -> NDArray[np.bool_]:
    """Return which pairs nothing contradicts, and which say enough together with the router that sent them."""
    one, two = errors[0].packets, errors[1].packets
    quote_a, quote_b = errors[0].quoted, errors[1].quoted
    end_a, end_b = one.src[a] == quote_a.dst[a], two.src[b] == quote_b.dst[b]
    same_router = one.src[a] == two.src[b]
    possible: NDArray[np.bool_] = (
        bits + evidence.BITS_ADDRESS * (same_router & ~end_a & ~end_b) >= evidence.STRONG
    )
    possible &= (same_router & (end_a == end_b)) | (end_a & end_b)
    possible &= np.abs(two.time_ns[b] - one.time_ns[a]) <= reach_ns
    known = quote_a.residual_known[a] & quote_b.residual_known[b]
    possible &= ~known | (quote_a.residual[a] == quote_b.residual[b])
    return possible


def _apart(key: NDArray[np.uint64], time_ns: NDArray[np.int64], reach_ns: int) -> NDArray[np.bool_]:
    """Return which rows have no other row of their key within reach."""
    order = np.lexsort((time_ns, key))
    close = (key[order[1:]] == key[order[:-1]]) & (np.diff(time_ns[order]) <= reach_ns)
    crowded = np.zeros(key.size, np.bool_)
    crowded[order[1:][close]] = crowded[order[:-1][close]] = True
    return ~crowded


def _key(errors: Errors, rows: NDArray[np.int64], end: str, port: str) -> NDArray[np.uint64]:
    """Return keys of what a translator leaves alone in an error, and one end of its quote."""
    q = errors.quoted
    kept = endpoint_hash(q.version[rows], getattr(q, end)[rows], getattr(q, port)[rows])
    return mix(error_key(errors, CHECKED)[rows] ^ kept)


def _own_words(errors: Errors) -> NDArray[np.bool_]:
    """Return what of each error tells it from all others of its point; shape (words, errors), see _WORD_BITS."""
    packets, quoted = errors.packets, errors.quoted
    flow, _ = flow_hash(quoted)
    # a router that numbers its errors does so one by one; some write one number into all
    own = (packets.ip_id != 0) & ~_in_step(packets.src, packets.ip_id, flow, 1 << 16)
    numbered = (quoted.ip_id != 0) & ~young_ids(quoted.ip_id)
    numbered &= ~_in_step(quoted.dst, quoted.ip_id, flow, 1 << 16)
    seq = errors.quoted_seq()
    tcp = (quoted.protocol == TCP) & (seq != 0)
    sequenced = tcp & ~made_up(seq) & ~_in_step(quoted.dst, seq, flow, 1 << 32)
    said = commonplace_keys(quoted, np.arange(len(errors)))
    telling = ~tcp & (evidence.CONTENT_BITS[quoted.content_length] >= _BITS_SAID) & ~_shared(said, flow)
    return np.stack([own, numbered, sequenced, telling])


def _in_step(
    device: NDArray[np.uint32],
    number: NDArray[np.unsignedinteger],
    flow: NDArray[np.uint64],
    numbers: int,
) -> NDArray[np.bool_]:
    """Return which rows are of a device that gives packets of several flows one number, more often than by chance.

    `numbers` is how many different ones there are. Hosts that send to one device and count in step count as one.
    """
    value = (device.astype(np.uint64) << np.uint64(32)) | number
    groups = np.unique(np.stack([value, flow]), axis=1)[0]
    own = groups >> np.uint64(32)
    devices, start, sent = np.unique(own, return_index=True, return_counts=True)
    again = np.concatenate([[0], np.cumsum(groups[1:] == groups[:-1])])
    repeated = again[start + sent - 1] - again[start]
    by_chance = sent * (sent - 1.0) / (2 * numbers)
    in_step = repeated > _OFTENER * by_chance
    result: NDArray[np.bool_] = in_step[np.searchsorted(devices, device)]
    return result


def _shared(value: NDArray[np.uint64], flow: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows have a value that rows of another flow have as well."""
    groups = np.unique(np.stack([value, flow]), axis=1)[0]
    return np.isin(value, groups[1:][groups[1:] == groups[:-1]])


def _unanimous(flow_a: NDArray[np.int64], flow_b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which pairs are of two flows that no pair joins with a third."""
    both = np.unique(np.stack([flow_a, flow_b]), axis=1)
    result = np.ones(flow_a.size, np.bool_)
    for flow, column in ((flow_a, both[0]), (flow_b, both[1])):
        known, count = np.unique(column, return_counts=True)
        result &= count[np.searchsorted(known, flow)] == 1
    return result

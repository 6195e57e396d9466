"""Conversations: flows with their path, their translations and what became of their packets, as columns.

This is the end of the line before the report: everything a report says about flows is a column here, and
`Flow` objects are made from a row only when somebody looks at one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.match.errors.silent import silent
from nattrace.nat.error_counts import ErrorCounts
from nattrace.nat.hops import HopCounts, Onward, count_hops, with_sent_samples
from nattrace.nat.lifetimes import divide
from nattrace.nat.orientation import opening_side
from nattrace.nat.paths import Hops, direct, ends, follow, without_shortcuts
from nattrace.table import ICMP, ICMPV6

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.flows import Flows
    from nattrace.nat.encapsulations import Encapsulations
    from nattrace.nat.hops import Coverage, PairEvidence
    from nattrace.nat.icmp_answered import IcmpAnswers
    from nattrace.nat.lifetimes import Division
    from nattrace.table import AddressBook

    _Column = NDArray[np.uint8]

#: `Conversations.status`
TRANSLATED, UNTRANSLATED, LOST_FLOW, ONE_SIDED, AMBIGUOUS_FLOW = range(5)
STATUS_NAMES = ("translated", "untranslated", "lost", "one-sided", "ambiguous")

#: Bits of `Conversations.changed`, in the order in which the report names them.
CHANGED_SRC, CHANGED_DST, CHANGED_SPORT, CHANGED_DPORT, CHANGED_ID = 1, 2, 4, 8, 16


@dataclass(slots=True)
class Tuples:
    """Addresses and ports of one direction, one row each."""

    src: NDArray[np.uint32]
    dst: NDArray[np.uint32]
    sport: NDArray[np.uint16]
    dport: NDArray[np.uint16]

    def take(self, rows: NDArray[Any] | slice) -> Tuples:
        """Return the given rows."""
        return Tuples(self.src[rows], self.dst[rows], self.sport[rows], self.dport[rows])


@dataclass(slots=True)
class Conversations:
    """All conversations of an analysis, in the order of their ids (id = row + 1)."""

    version: NDArray[np.uint8]
    protocol: NDArray[np.uint8]
    status: NDArray[np.int8]
    point: NDArray[np.int64]  #: path[0]
    flow: NDArray[np.int64]  #: merged flow index at path[0]
    initiator: Tuples  #: as first sent, at path[0]
    packets_original: NDArray[np.int64]  #: at path[0]
    packets_reply: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    last_ns: NDArray[np.int64]
    hop_start: NDArray[np.int64]  #: shape (rows + 1,): row's hops are steps[hop_start[r]:hop_start[r + 1]]
    steps: NDArray[np.int64]  #: indices into the hop columns below
    hops: Hops
    before: Tuples  #: per hop, original direction, at its from_point
    after: Tuples  #: per hop, original direction, at its to_point
    version_of_hop: NDArray[np.uint8]  #: at its from_point
    protocol_of_hop: NDArray[np.uint8]  #: at its from_point
    version_after: NDArray[np.uint8]  #: per hop at its to_point: another one behind a NAT64
    protocol_after: NDArray[np.uint8]
    changed: NDArray[np.uint8]  #: per hop
    counts: HopCounts  #: per hop
    flow_of_hop: NDArray[np.int64]  #: row of the conversation that uses a hop, -1 for none
    division: Division | None  #: which piece of a hop that conversations share a packet belongs to
    encapsulations: Encapsulations | None = None  #: None where no point shows a packet in a tunnel
    errors: ErrorCounts = field(default_factory=ErrorCounts.none)  #: filled in when all else is known

    def __len__(self) -> int:
        """Conversations."""
        return int(self.protocol.size)


def build(
    points: int,
    flows: Sequence[Flows],
    pairs: Mapping[tuple[int, int], PairEvidence],
    coverage: Coverage,
    book: AddressBook,
    found_at: Mapping[tuple[int, int], NDArray[np.bool_]],
    homes: Sequence[int] = (),
    answers: IcmpAnswers | None = None,
) -> Conversations:
    """Assemble the conversations of `points` points from merged flows and the evidence of every pair.

    `found_at` says by (point, other point) which packet numbers were matched between the two;
    `homes` says which points are layers of one capture, see `order`; `answers` what ICMP errors speak of.
    """
    edges: dict[tuple[int, int], Edges] = {key: pair.edges for key, pair in pairs.items()}
    directed = direct(edges, flows, {key: pair.clock_bound_ns for key, pair in pairs.items()}, homes)
    pairs = {key: with_sent_samples(pairs[key], number, directed) for number, key in enumerate(sorted(pairs))}
    hops = without_shortcuts(directed, flows)
    evidence = [pairs[key] for key in sorted(pairs)]
    hops, blocks, division = divide(hops, follow(hops, flows), evidence, ends(hops, flows))
    before, after, (version, version_after), (protocol, protocol_after) = _tuples(hops, flows)
    onward = Onward(directed, found_at)
    other_version = version != version_after
    counts = count_hops(hops, pairs, coverage, onward, division, other_version, answers)
    changed = _changed(before, after, protocol, version != version_after)

    block_rows = [len(block) for block in blocks]
    lonely_point, lonely_flow = _lonely(points, flows, hops)
    rows = sum(block_rows) + lonely_point.size
    length = np.concatenate(
        [np.full(n, block.shape[1]) for n, block in zip(block_rows, blocks, strict=True)]
        + [np.zeros(lonely_point.size, np.int64)]
    ).astype(np.int64)
    steps = np.concatenate([block.reshape(-1) for block in blocks] + [np.empty(0, np.int64)]).astype(np.int64)
    start = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    head = steps[start[:-1][length > 0]] if steps.size else np.empty(0, np.int64)

    lonely = _lonely_columns(lonely_point, lonely_flow, flows)
    first_hop = before.take(head)
    heads = _head_columns(hops, head, flows, counts)
    any_change = np.zeros(rows, np.bool_)
    if steps.size:
        owner = np.repeat(np.arange(rows), length)
        any_change = np.bincount(owner, changed[steps] != 0, rows) > 0
    status = np.full(rows, UNTRANSLATED, np.int8)
    status[any_change] = TRANSLATED
    status[head.size :] = _lonely_status(
        lonely, lonely_point, lonely_flow, hops, before, protocol, counts, coverage, answers, other_version
    )

    joined = Conversations(
        version=np.concatenate([version[head], lonely.version]),
        protocol=np.concatenate([protocol[head], lonely.protocol]),
        status=status,
        point=np.concatenate([hops.from_point[head], lonely_point]),
        flow=np.concatenate([hops.from_flow[head], lonely_flow]),
        initiator=Tuples(
            *(
                np.concatenate([getattr(first_hop, f), getattr(lonely.tuples, f)])
                for f in ("src", "dst", "sport", "dport")
            )
        ),
        packets_original=np.concatenate([heads[0], lonely.original]),
        packets_reply=np.concatenate([heads[1], lonely.reply]),
        first_ns=np.concatenate([heads[2], lonely.first_ns]),
        last_ns=np.concatenate([heads[3], lonely.last_ns]),
        hop_start=start,
        steps=steps,
        hops=hops,
        before=before,
        after=after,
        version_of_hop=version,
        protocol_of_hop=protocol,
        version_after=version_after,
        protocol_after=protocol_after,
        changed=changed,
        counts=counts,
        flow_of_hop=np.empty(0, np.int64),
        division=division,
    )
    return _in_order(joined, length, book)


@dataclass(slots=True)
class _Lonely:
    """Columns of flows that were seen at one point only."""

    version: NDArray[np.uint8]
    protocol: NDArray[np.uint8]
    tuples: Tuples
    original: NDArray[np.int64]
    reply: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    last_ns: NDArray[np.int64]


def _oriented(flows: Flows, rows: NDArray[np.int64], forward: NDArray[np.bool_]) -> Tuples:
    """Return the tuples of the given flows: low to high where `forward`, else high to low."""
    low_a, low_p = flows.low_address[rows], flows.low_port[rows]
    high_a, high_p = flows.high_address[rows], flows.high_port[rows]
    return Tuples(
        np.where(forward, low_a, high_a), np.where(forward, high_a, low_a),
        np.where(forward, low_p, high_p), np.where(forward, high_p, low_p),
    )  # fmt: skip


def _tuples(
    hops: Hops, flows: Sequence[Flows]
) -> tuple[Tuples, Tuples, tuple[_Column, _Column], tuple[_Column, _Column]]:
    """Return (before, after, IP versions, protocols) of every hop, in the original direction.

    Versions and protocols are pairs of columns: before, after.
    """
    size = len(hops)
    before = Tuples(np.zeros(size, np.uint32), np.zeros(size, np.uint32),
                    np.zeros(size, np.uint16), np.zeros(size, np.uint16))  # fmt: skip
    after = Tuples(*(getattr(before, f).copy() for f in ("src", "dst", "sport", "dport")))
    versions = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    protocols = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for point, at in enumerate(flows):
        for side, flow, forward, target in (
            (hops.from_point, hops.from_flow, hops.forward, before),
            (hops.to_point, hops.to_flow, hops.forward ^ hops.swap, after),
        ):
            here = np.flatnonzero(side == point)
            oriented = _oriented(at, flow[here], forward[here])
            for f in ("src", "dst", "sport", "dport"):
                getattr(target, f)[here] = getattr(oriented, f)
            end = int(target is after)
            versions[end][here], protocols[end][here] = at.version[flow[here]], at.protocol[flow[here]]
    return before, after, versions, protocols


def _changed(
    before: Tuples, after: Tuples, protocol: NDArray[np.uint8], across: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Return per hop which fields of the original direction differ; `across` IP versions both addresses do."""
    icmp = (protocol == ICMP) | (protocol == ICMPV6)
    port, other_port = before.sport != after.sport, before.dport != after.dport
    bits = (across | (before.src != after.src)) * CHANGED_SRC
    bits += (across | (before.dst != after.dst)) * CHANGED_DST
    bits += np.where(icmp, port * CHANGED_ID, port * CHANGED_SPORT + other_port * CHANGED_DPORT)
    result: NDArray[np.uint8] = bits.astype(np.uint8)
    return result


def nat_kind(changed: int) -> str | None:
    """Name a change as conntrack would: snat, dnat, both, or None for no change.

    An ICMP id serves both directions; a changed id alone, or with the source, is source NAT's doing.
    """
    source = changed & (CHANGED_SRC | CHANGED_SPORT)
    target = changed & (CHANGED_DST | CHANGED_DPORT)
    if changed & CHANGED_ID and not target:
        source |= CHANGED_ID
    if source and target:
        return "snat+dnat"
    return "snat" if source else "dnat" if target else None


def changed_fields(changed: int) -> tuple[str, ...]:
    """Name the fields of a change in the report's order: src, dst, sport, dport, id."""
    names = ("src", "dst", "sport", "dport", "id")
    return tuple(name for bit, name in enumerate(names) if changed >> bit & 1)


def _lonely(points: int, flows: Sequence[Flows], hops: Hops) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (point, flow) of all flows that no hop touches, but silent ones."""
    which_point, which_flow = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for point in range(points):
        alone = ~silent(flows[point])
        alone[hops.from_flow[hops.from_point == point]] = False
        alone[hops.to_flow[hops.to_point == point]] = False
        rows = np.flatnonzero(alone)
        which_point.append(np.full(rows.size, point))
        which_flow.append(rows)
    return np.concatenate(which_point), np.concatenate(which_flow)


def _lonely_columns(
    which_point: NDArray[np.int64], which_flow: NDArray[np.int64], flows: Sequence[Flows]
) -> _Lonely:
    parts: list[_Lonely] = []
    for point, at in enumerate(flows):
        rows = which_flow[which_point == point]
        forward = opening_side(at)[rows]
        parts.append(
            _Lonely(
                at.version[rows],
                at.protocol[rows],
                _oriented(at, rows, forward),
                np.where(forward, at.forward[rows], at.backward[rows]),
                np.where(forward, at.backward[rows], at.forward[rows]),
                at.first_ns[rows],
                at.last_ns[rows],
            )
        )

    def joined(get: Any) -> Any:
        return np.concatenate([get(p) for p in parts]) if parts else np.empty(0, np.int64)

    return _Lonely(
        joined(lambda p: p.version), joined(lambda p: p.protocol),
        Tuples(joined(lambda p: p.tuples.src), joined(lambda p: p.tuples.dst),
               joined(lambda p: p.tuples.sport), joined(lambda p: p.tuples.dport)),
        joined(lambda p: p.original), joined(lambda p: p.reply),
        joined(lambda p: p.first_ns), joined(lambda p: p.last_ns),
    )  # fmt: skip


def _head_columns(
    hops: Hops, head: NDArray[np.int64], flows: Sequence[Flows], counts: HopCounts
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (original packets, reply packets, first, last) at the first point of every path.

    Where one flow at that point has several bindings one after the other, its packets are divided among
    them: those matched through the binding, and those unmatched in its lifetime.
    """
    original, reply = np.zeros(head.size, np.int64), np.zeros(head.size, np.int64)
    first, last = np.zeros(head.size, np.int64), np.zeros(head.size, np.int64)
    for point, at in enumerate(flows):
        here = np.flatnonzero(hops.from_point[head] == point)
        hop = head[here]
        rows, forward = hops.from_flow[hop], hops.forward[hop]
        original[here] = np.where(forward, at.forward[rows], at.backward[rows])
        reply[here] = np.where(forward, at.backward[rows], at.forward[rows])
        first[here], last[here] = at.first_ns[rows], at.last_ns[rows]
        several = np.flatnonzero(np.bincount(rows, minlength=len(at))[rows] > 1)
        at_these, these = here[several], hop[several]
        original[at_these] = counts.matched[these, 0] + counts.missing[these, 0]
        reply[at_these] = counts.matched[these, 1] + counts.unseen[these, 0, 1]
        first[at_these], last[at_these] = hops.first_ns[these], hops.last_ns[these]
    return original, reply, first, last


def _lonely_status(
    lonely: _Lonely,
    which_point: NDArray[np.int64],
    which_flow: NDArray[np.int64],
    hops: Hops,
    before: Tuples,
    hop_protocol: NDArray[np.uint8],
    counts: HopCounts,
    coverage: Coverage,
    answers: IcmpAnswers | None,
    other_version: NDArray[np.bool_],
) -> NDArray[np.int8]:
    """Tell lost flows and ambiguous ones from those that simply never pass the other points.

    Lost is said only of a flow that nobody answered, not even with an ICMP error, and whose like is known to
    pass: the same protocol, from the same source or to the same destination, crossed from here to a point
    that was capturing all the while. A hop to the `other_version` of IP proves nothing where packets were cut
    off, see `count_hops`.
    """
    status = np.full(which_point.size, ONE_SIDED, np.int8)
    for point in np.unique(which_point):
        here = np.flatnonzero(which_point == point)
        tied = counts.tied_flows.get(int(point))
        if tied is not None:
            status[here[np.isin(which_flow[here], tied)]] = AMBIGUOUS_FLOW
        for other in np.unique(hops.to_point[hops.from_point == point]):
            passing = (hops.from_point == point) & (hops.to_point == other)
            if coverage.cut_off:
                passing &= ~other_version
            lost = (lonely.reply[here] == 0) & (status[here] == ONE_SIDED)
            lost &= coverage.sure(int(other), lonely.first_ns[here])
            lost &= coverage.sure(int(other), lonely.last_ns[here])
            if not lost.any():
                continue
            alike = np.zeros(here.size, np.bool_)
            for end in ("src", "dst"):
                key = getattr(before, end)[passing].astype(np.uint64) << np.uint64(8) | hop_protocol[passing]
                own = (
                    getattr(lonely.tuples, end)[here].astype(np.uint64) << np.uint64(8)
                    | lonely.protocol[here]
                )
                # few have nobody: the many are looked up among them, and not sorted
                wanted, place = np.unique(own, return_inverse=True)
                at = np.minimum(np.searchsorted(wanted, key), wanted.size - 1)
                crossed = np.zeros(wanted.size, np.bool_)
                crossed[at[wanted[at] == key]] = True
                alike |= crossed[place.reshape(-1)]
            lost &= alike
            if answers is not None:
                lost &= ~answers.spoken_of(int(point), which_flow[here])
                lost &= ~answers.unread[int(point)].may_answer(
                    lonely.version[here], lonely.tuples.src[here], lonely.first_ns[here], lonely.last_ns[here]
                )
            status[here[lost]] = LOST_FLOW
    return status


def _full_order(
    c: Conversations, rows: NDArray[np.int64], length: NDArray[np.int64], book: AddressBook
) -> NDArray[np.int64]:
    """Order those conversations that began at the same instant as another: then their addresses decide."""
    src_rank, dst_rank = (book.rank(c.version[rows], end[rows]) for end in (c.initiator.src, c.initiator.dst))
    onward: list[NDArray[Any]] = []
    # conversations that part ways at a later hop (its binding was renewed) differ in nothing before it
    for depth in range(int(length[rows].max(initial=0))):
        out = np.zeros((6, rows.size), np.int64)
        with_hops = np.flatnonzero(length[rows] > depth)
        hop = c.steps[c.hop_start[rows[with_hops]] + depth]
        after = c.after.take(hop)
        version = c.version_after[hop]
        out[0, with_hops] = c.hops.to_point[hop]
        out[1, with_hops] = c.hops.first_ns[hop]
        out[2, with_hops] = book.rank(version, after.src)
        out[3, with_hops] = after.sport
        out[4, with_hops] = book.rank(version, after.dst)
        out[5, with_hops] = after.dport
        onward.extend(out)
    order = np.lexsort(
        (
            *onward[::-1],
            c.point[rows],
            c.initiator.dport[rows],
            dst_rank,
            c.initiator.sport[rows],
            src_rank,
            c.protocol[rows],
            c.first_ns[rows],
        )
    )
    return rows[order]


def _in_order(c: Conversations, length: NDArray[np.int64], book: AddressBook) -> Conversations:
    """Return the conversations in the order of their ids: by first packet, then by addresses as numbers."""
    order = np.argsort(c.first_ns, kind="stable")
    same = np.diff(c.first_ns[order]) == 0
    if same.any():
        tied = np.append(same, False) | np.append(False, same)
        order[tied] = _full_order(c, order[tied], length, book)
    new_length = length[order]
    start = np.concatenate([[0], np.cumsum(new_length)]).astype(np.int64)
    offset = np.arange(int(new_length.sum())) - np.repeat(start[:-1], new_length)
    steps = c.steps[np.repeat(c.hop_start[:-1][order], new_length) + offset]
    flow_of_hop = np.full(len(c.hops), -1, np.int64)
    owner = np.repeat(np.arange(order.size), new_length)
    flow_of_hop[steps[::-1]] = owner[::-1]
    return Conversations(
        version=c.version[order], protocol=c.protocol[order], status=c.status[order], point=c.point[order], flow=c.flow[order],
        initiator=c.initiator.take(order), packets_original=c.packets_original[order],
        packets_reply=c.packets_reply[order], first_ns=c.first_ns[order], last_ns=c.last_ns[order],
        hop_start=start, steps=steps, hops=c.hops, before=c.before, after=c.after,
        version_of_hop=c.version_of_hop, protocol_of_hop=c.protocol_of_hop,
        version_after=c.version_after, protocol_after=c.protocol_after, changed=c.changed,
        counts=c.counts, flow_of_hop=flow_of_hop, division=c.division,
    )  # fmt: skip

"""ICMP errors in the report: the conversation that each of them is about, what crossed, and what is wrong with it.

Takes the pairs that `match.quoted` finds between two points and says, with the hops' directions known, which way
an error went, which flow it belongs to, and what became of the others. It pairs nothing itself, and errors count
neither as packets of their flow nor as crossings, as in conntrack.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.icmp import FRAGMENTATION_NEEDED, PACKET_TOO_BIG
from nattrace.match.errors.icmp_errors import NO_FAULT, Errors
from nattrace.match.errors.quoted import flows_of_quotes, pair_errors
from nattrace.match.errors.silent import silent
from nattrace.match.errors.translated import meaning
from nattrace.match.lanes import edge_of
from nattrace.match.ties import CANDIDATES
from nattrace.nat.error_counts import ErrorCounts
from nattrace.nat.hops import AMBIGUOUS, LOST, NOT_SEEN_UPSTREAM, REASON_NAMES
from nattrace.table import ICMP, ICMPV6

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.errors.icmp_errors import ErrorPairs
    from nattrace.match.errors.unread import Unread
    from nattrace.match.flows import Flows
    from nattrace.match.intake import LayerInfo
    from nattrace.match.usual import Usual
    from nattrace.nat.conversations import Conversations
    from nattrace.nat.hops import Coverage, PairEvidence
    from nattrace.table import AddressBook

#: Reason of an error of which no more is known: its flow is unknown, or nothing proves that it should be elsewhere.
ICMP_ERROR = 7
ERROR_REASONS = REASON_NAMES | {ICMP_ERROR: "icmp-error"}
#: How much later than other packets an error may be seen that is not told from its like; nobody queues them longer.
_UNREAD_REACH_NS: Final = 1_000_000_000


@dataclass(slots=True)
class CrossedErrors:
    """The errors that two neighbouring points both saw: rows of either point's errors, and their hops."""

    points: tuple[int, int]
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    hop: NDArray[np.int64]
    backward: NDArray[np.bool_]  #: the error itself went backward at the first point
    reply: NDArray[np.bool_]  #: the error went the way of the replies
    flags: NDArray[np.uint16]
    fault: NDArray[np.uint8]


@dataclass(slots=True)
class MissingErrors:
    """Errors sent into a hop that never arrived while its far point recorded: rows of the sending point's errors."""

    point: int
    other: int
    row: NDArray[np.int64]
    conversation: NDArray[np.int64]
    proven: (
        bool  #: False: the other point shows no ICMP of their IP version at all; its filter may leave it out
    )


@dataclass(slots=True)
class _Absent:
    """Errors of one point whose absence at the other one says something: rows of the point's errors."""

    point: int
    other: int
    row: NDArray[np.int64]
    reason: NDArray[np.uint8]
    version: NDArray[np.uint8]  #: the IP version that they would have at the other point


@dataclass(slots=True)
class ErrorOutcome:
    """What became of all ICMP errors. Lists are by point number, arrays by row of the point's errors."""

    homes: list[int]  #: the first layer of each layer's point
    errors: list[Errors]
    reason: list[NDArray[np.uint8]]  #: 0 for matched, else a key of ERROR_REASONS
    conversation: list[NDArray[np.int64]]  #: row of the conversation, -1 for none
    direction: list[
        NDArray[np.int8]
    ]  #: 0: as the conversation's original packets, 1: as its replies, -1: unknown
    candidates: list[
        NDArray[np.uint32]
    ]  #: frames that an ambiguous error could be, 0 for none; see `pair_errors`
    rival: list[NDArray[np.int64]]  #: the point of these
    crossed: list[CrossedErrors] = field(default_factory=list)
    missing: list[MissingErrors] = field(default_factory=list)
    #: by layer: the errors that say what became of packets which were seen no further
    answering: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    #: by layer: errors without a legible quote, and packets of which nothing is known for that reason
    unread: dict[int, tuple[int, int]] = field(default_factory=dict)

    def matched(self, point: int) -> int:
        """Return how many errors of a point were matched."""
        return int((self.reason[point] == 0).sum())

    def count_unmatched(self, point: int, into: Counter[str]) -> None:
        """Add up the errors of a point that were not matched, by reason."""
        for code, name in ERROR_REASONS.items():
            if count := int((self.reason[point] == code).sum()):
                into[name] += count


def by_layer(
    errors: Sequence[Errors],
    flows: Sequence[Flows],
    pairs: Mapping[tuple[int, int], PairEvidence],
    infos: Sequence[LayerInfo],
) -> list[Errors]:
    """Divide each point's errors among its layers: an error belongs where its quote's flow is, bound if possible.

    `errors` are given at the first layer of each depth of a point, and stay at that depth.
    """
    kin = [(each.home, each.layer.depth) for each in infos]
    if len(set(kin)) == len(kin):
        return list(errors)
    divided = [Errors.empty() for _ in flows]
    for home, own in enumerate(errors):
        if not len(own):
            continue
        layers = [layer for layer, at in enumerate(kin) if at == kin[home]]
        rank, place = np.zeros(len(own), np.int64), np.full(len(own), home)
        for layer in layers:
            flow, _ = flows_of_quotes(own, flows[layer])
            bound = np.zeros(len(flows[layer]) + 1, np.bool_)  # one more, for the -1 of no flow
            for (i, j), pair in pairs.items():
                if layer in (i, j):
                    bound[pair.edges.flow_a if layer == i else pair.edges.flow_b] = True
            bound[-1] = False
            shown = np.append(~silent(flows[layer]), False)
            better = shown[flow].astype(np.int64) + bound[flow]
            place[better > rank] = layer
            rank = np.maximum(rank, better)
        for layer in layers:
            divided[layer] = own.take(np.flatnonzero(place == layer))
    return divided


def resolve_errors(
    errors: Sequence[Errors],
    unread: Sequence[Unread],
    flows: Sequence[Flows],
    pairs: Mapping[tuple[int, int], PairEvidence],
    usual: Mapping[tuple[int, int], tuple[Usual, bool]],
    conversations: Conversations,
    hop_of_edge: Mapping[tuple[int, int], NDArray[np.int64]],
    conversation_of: Sequence[NDArray[np.int64]],
    coverage: Coverage,
    layers: Sequence[LayerInfo],
    book: AddressBook,
) -> ErrorOutcome:
    """Match the errors of all points, find their conversations, and leave the counts in `conversations`.

    `unread` are errors that cannot be matched: what is missing at their point may be among them.
    `usual` says by pair of points how long packets take, and whether a box writes IP identifications of its own;
    `hop_of_edge` gives the hop of every merged edge of a pair of points, -1 for none; `conversation_of` the
    (first) conversation of every merged flow of a point.
    """
    quoted = [flows_of_quotes(own, at) for own, at in zip(errors, flows, strict=True)]
    outcome = ErrorOutcome(
        homes=[each.home for each in layers],
        errors=list(errors),
        reason=[np.full(len(own), ICMP_ERROR, np.uint8) for own in errors],
        conversation=[np.full(len(own), -1, np.int64) for own in errors],
        direction=[np.full(len(own), -1, np.int8) for own in errors],
        candidates=[np.zeros((len(own), CANDIDATES), np.uint32) for own in errors],
        rival=[np.full(len(own), -1, np.int64) for own in errors],
    )
    for point, (flow, _) in enumerate(quoted):
        known = np.flatnonzero(flow >= 0)
        owner = conversation_of[point][flow[known]]
        known, owner = known[owner >= 0], owner[owner >= 0]
        outcome.conversation[point][known] = owner
        begins = conversations.point[owner] == point
        known, owner = known[begins], owner[begins]
        initiator, quote = conversations.initiator.take(owner), errors[point].quoted
        opening = (initiator.src == quote.src[known]) & (initiator.sport == quote.sport[known])
        outcome.direction[point][known] = opening
    hears = _hearing(errors, flows, outcome.homes)
    matched = [np.zeros(len(own), np.bool_) for own in errors]
    beyond = [np.zeros(len(own), np.bool_) for own in errors]
    absent: list[_Absent] = []
    for i, j in sorted(pairs):
        if not len(errors[i]) and not len(errors[j]):
            continue
        pair, hop = pairs[i, j], hop_of_edge[i, j]
        usual_ns, renumbered = usual[i, j]
        found, near_i, near_j = pair_errors(
            errors[i],
            errors[j],
            flows[i],
            flows[j],
            pair.edges,
            usual_ns,
            book,
            pair.clock_bound_ns or 0,
            renumbered=renumbered,
        )
        matched[i][found.a] = matched[j][found.b] = True
        across = flows[i].version[pair.edges.flow_a] != flows[j].version[pair.edges.flow_b]
        skipping = hop[found.edge] < 0
        beyond[i][found.a[skipping]] = beyond[j][found.b[skipping]] = True
        tied_i, tied_j = near_i.any(axis=1), near_j.any(axis=1)
        outcome.reason[i][tied_i] = outcome.reason[j][tied_j] = AMBIGUOUS
        for point, other, tied, near in ((i, j, tied_i, near_i), (j, i, tied_j, near_j)):
            outcome.candidates[point][tied] = near[tied]
            outcome.rival[point][tied] = other
        _cross(outcome, (i, j), found, hop, conversations)
        for side, (point, other, rows, tied) in enumerate(((i, j, found.a, tied_i), (j, i, found.b, tied_j))):
            alone = np.ones(len(errors[point]), np.bool_)
            alone[rows] = False
            alone[tied] = False
            rest = np.flatnonzero(alone & (quoted[point][0] >= 0))
            times = errors[point].packets.time_ns[rest]
            rest = rest[~unread[other].near(times, pair.margin_ns + _UNREAD_REACH_NS)]
            if across.any():
                # not every error has a like in the other IP version, and longer headers leave less of it
                whole = not coverage.cut_off
                gone = np.isin(quoted[point][0], (pair.edges.flow_b if side else pair.edges.flow_a)[across])
                rest = rest[~gone[rest] | (whole & (meaning(errors[point])[rest] > 0))]
            absent.append(
                _absent(
                    outcome, rest, quoted[point], pair, hop, conversations, coverage, (point, other, side)
                )
            )
    _conclude(outcome, matched, beyond, absent, hears)
    conversations.errors = _counted(outcome, conversations)
    return outcome


def _hearing(errors: Sequence[Errors], flows: Sequence[Flows], homes: Sequence[int]) -> list[dict[int, bool]]:
    """Say for each layer and IP version whether its point shows any ICMP: a filter may leave it out."""
    heard = [{4: False, 6: False} for _ in homes]
    for layer, home in enumerate(homes):
        at, packets = flows[layer], errors[layer].packets
        for version, protocol in ((4, ICMP), (6, ICMPV6)):
            if (packets.version == version).any() or (at.protocol == protocol).any():
                heard[home][version] = True
    return [heard[home] for home in homes]


def _cross(
    outcome: ErrorOutcome,
    points: tuple[int, int],
    found: ErrorPairs,
    hop_of_edge: NDArray[np.int64],
    c: Conversations,
) -> None:
    """Note the pairs of one pair of points that are crossings of a hop, and whose they are."""
    hop = hop_of_edge[found.edge]
    kept = hop >= 0
    found, hop = found.take(kept), hop[kept]
    if not hop.size:
        return
    forward_a = c.hops.forward[hop] ^ (c.hops.reverse[hop] & c.hops.swap[hop])
    backward = ~found.backward
    reply = backward == forward_a
    if c.division is not None:
        i, j = points
        time_a = outcome.errors[i].packets.time_ns[found.a]
        time_b = outcome.errors[j].packets.time_ns[found.b]
        hop = c.division.piece(
            hop, reply, np.where(c.hops.reverse[hop], time_b, time_a), np.zeros(hop.size, np.bool_)
        )
    owner = c.flow_of_hop[hop]
    for point, rows in zip(points, (found.a, found.b), strict=True):
        outcome.conversation[point][rows] = owner
        outcome.direction[point][rows] = reply
    outcome.crossed.append(
        CrossedErrors(points, found.a, found.b, hop, backward, reply, found.flags, found.fault)
    )


def _absent(
    outcome: ErrorOutcome,
    rows: NDArray[np.int64],
    quoted: tuple[NDArray[np.int64], NDArray[np.bool_]],
    pair: PairEvidence,
    hop_of_edge: NDArray[np.int64],
    c: Conversations,
    coverage: Coverage,
    where: tuple[int, int, int],
) -> _Absent:
    """Say what the errors `rows` of one point prove by not being at the other one."""
    point, other, side = where
    edges: Edges = pair.edges
    flow, time = quoted[0][rows], outcome.errors[point].packets.time_ns[rows]
    edge = edge_of(flow, time, side, edges)
    hop = np.where(edge >= 0, hop_of_edge[np.maximum(edge, 0)], -1) if len(edges) else edge
    rows, time, hop = rows[hop >= 0], time[hop >= 0], hop[hop >= 0]
    if not rows.size:
        return _Absent(point, other, rows, np.empty(0, np.uint8), np.empty(0, np.uint8))
    reverse, swap = c.hops.reverse[hop], c.hops.swap[hop]
    forward = c.hops.forward[hop] ^ (swap & (reverse if side == 0 else ~reverse))
    reply = ~quoted[1][rows] == forward
    at_to = c.hops.to_point[hop] == point
    if c.division is not None:
        hop = c.division.piece(hop, reply, time, at_to)
    outcome.conversation[point][rows] = c.flow_of_hop[hop]
    outcome.direction[point][rows] = reply
    sure = coverage.sure(other, time) & coverage.sure(other, time + pair.margin_ns)
    sure &= coverage.sure(other, time - pair.margin_ns) & coverage.unparted(c.hops)[hop]
    reason = np.where(reply == at_to, LOST, NOT_SEEN_UPSTREAM).astype(np.uint8)
    version = np.where(at_to, c.version_of_hop[hop], c.version_after[hop])
    return _Absent(point, other, rows[sure], reason[sure], version[sure])


def _conclude(
    outcome: ErrorOutcome,
    matched: Sequence[NDArray[np.bool_]],
    beyond: Sequence[NDArray[np.bool_]],
    absent: Sequence[_Absent],
    hears: Sequence[dict[int, bool]],
) -> None:
    """Give every error its reason; what one pair of points matched is matched, what another ties is ambiguous."""
    for each in absent:
        point, other = each.point, each.other
        open_rows = ~beyond[point][each.row]  # what was seen further along passed the other point unseen
        for proven in (True, False):
            heard = np.where(each.version == 4, hears[other][4], hears[other][6]) == proven
            rows, reason = each.row[heard & open_rows], each.reason[heard & open_rows]
            known = outcome.reason[point][rows]
            gone = (reason == LOST) & (known != AMBIGUOUS)
            if proven:
                # where one neighbour proves a loss and the other that it came from nowhere, it was lost
                telling = gone | (known == ICMP_ERROR)
                outcome.reason[point][rows[telling]] = reason[telling]
            lost = rows[gone]
            if lost.size:
                owner = outcome.conversation[point][lost]
                outcome.missing.append(MissingErrors(point, other, lost, owner, proven))
    for point, rows_matched in enumerate(matched):
        outcome.reason[point][rows_matched] = 0


def _counted(outcome: ErrorOutcome, c: Conversations) -> ErrorCounts:
    """Count the errors of every conversation, each once: at the point nearest to the path's beginning."""
    columns: list[NDArray[np.int64]] = []
    for point, own in enumerate(outcome.errors):
        counted = outcome.conversation[point] >= 0
        for crossing in outcome.crossed:
            if point in crossing.points:
                mine = crossing.a if crossing.points[0] == point else crossing.b
                arrived = c.hops.to_point[crossing.hop] == point
                counted[mine[arrived]] = False
        rows = np.flatnonzero(counted)
        if not rows.size:
            continue
        kind, code = own.packets.icmp_type[rows], own.packets.icmp_code[rows]
        version = own.packets.version[rows]
        told: list[NDArray[Any]] = [outcome.conversation[point][rows], version, kind, code, mtu_of(own, rows)]
        columns.append(np.stack(told, axis=1).astype(np.int64))
    if not columns:
        return ErrorCounts.none()
    distinct, count = np.unique(np.concatenate(columns), axis=0, return_counts=True)
    conversation, version, kind, code, mtu = distinct.T
    return ErrorCounts(conversation, version, kind, code, mtu, count)


def mtu_of(errors: Errors, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the MTU that each error names (RFC 1191 section 4, RFC 4443 section 3.2), -1 for none."""
    packets = errors.packets
    kind, code, version = packets.icmp_type[rows], packets.icmp_code[rows], packets.version[rows]
    rest = errors.rest[rows].astype(np.int64)
    needed = (version == 4) & (kind == FRAGMENTATION_NEEDED[0]) & (code == FRAGMENTATION_NEEDED[1])
    too_big = (version == 6) & (kind == PACKET_TOO_BIG[0])
    mtu = np.where(needed, rest & 0xFFFF, np.where(too_big, rest, 0))
    return np.where(mtu > 0, mtu, -1)


def faulty(crossed: CrossedErrors) -> NDArray[np.int64]:
    """Return the rows of crossings whose error was translated wrongly."""
    return np.flatnonzero(crossed.fault != NO_FAULT)

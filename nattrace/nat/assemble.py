"""From what the matcher found to conversations, reasons and totals: merge the parts, number, count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.edges import merge_edges, without_instants
from nattrace.match.errors.silent import silent
from nattrace.match.outcome import Unmatched
from nattrace.match.prepare import carriers
from nattrace.match.resize.pieces import Resized
from nattrace.nat.conversations import Conversations, build
from nattrace.nat.encapsulations import name_encapsulations
from nattrace.nat.hops import ONE_SIDED, REASON_NAMES, Coverage, PairEvidence
from nattrace.nat.icmp_answered import IcmpAnswers
from nattrace.nat.icmp_errors import by_layer, resolve_errors
from nattrace.nat.shifts import SequenceShift, sequence_shifts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.source import PointInfo
    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.errors.unread import Unread
    from nattrace.match.flows import Flows
    from nattrace.match.intake import LayerInfo
    from nattrace.match.pair import PairState
    from nattrace.match.windows import Matcher
    from nattrace.nat.icmp_errors import ErrorOutcome
    from nattrace.table import AddressBook


@dataclass(slots=True)
class Assembly:
    """Everything about an analysis that the report is made of. Lists and dicts are by point number."""

    conversations: Conversations
    edges: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]  #: see `Rewrites.edges`
    reasons: dict[int, NDArray[np.uint8]]  #: reason code of every packet number, 0 for matched
    flow_rows: dict[int, NDArray[np.int64]]  #: conversation row of every flow, by its number
    merged_flow: dict[int, NDArray[np.int64]]  #: place of every flow number among the ordered flows
    matched: list[int]
    unmatched: list[Counter[str]]
    errors: ErrorOutcome | None  #: None where no point saw an ICMP error
    shifts: list[SequenceShift]


def assemble(
    matcher: Matcher,
    layers: Sequence[LayerInfo],
    book: AddressBook,
    spans: Sequence[tuple[int | None, int | None]],
    clock_bound: Callable[[int, int], int | None],
    *,
    cut_off: bool = False,
) -> Assembly:
    """Merge all partial results of a matcher that has finished; `layers` says whose packets its points are.

    Packets in tunnels count as their carriers: a carrier is matched when what it carries is. `spans` says of
    every layer when the first and last packet of its point was seen, on the reference clock (ns), `clock_bound`
    by how much two layers' clocks may still differ (ns; None: unknown). `cut_off` when some capture has no whole
    packets.
    """
    merged = [state.ordered_flows() for state in matcher.points]
    flows = [flow for flow, _ in merged]
    coverage = replace(_coverage(flows, layers, spans), cut_off=cut_off)
    pairs: dict[tuple[int, int], PairEvidence] = {}
    partial: dict[tuple[int, int], NDArray[np.int64]] = {}
    for (i, j), state in matcher.pairs.items():
        pairs[i, j], partial[i, j] = _evidence(state, merged[i][1], merged[j][1], clock_bound(i, j))
        if state.one_capture and not _one_socket(layers[i], layers[j]):
            without_instants(pairs[i, j].edges)
    found_at = {
        (point, other): matcher.points[point].found_at(other)
        for pair in pairs
        for point, other in (pair, pair[::-1])
    }
    own_errors: list[Errors] = []
    answers = None
    if any(len(at.errors) or len(at.unread) for at in matcher.points):
        unread = _unread(matcher, layers)
        own_errors = by_layer([at.errors for at in matcher.points], flows, pairs, layers)
        answers = IcmpAnswers.of(own_errors, unread, flows)
    homes = [each.home for each in layers]
    conversations = build(len(layers), flows, pairs, coverage, book, found_at, homes, answers)
    conversations.encapsulations = name_encapsulations(conversations, flows)
    edges = {}
    for number, key in enumerate(sorted(pairs)):
        hop_of_edge = np.full(len(pairs[key].edges), -1, np.int64)
        mine = np.flatnonzero(conversations.hops.pair == number)
        # a divided hop stands before its pieces
        hop_of_edge[conversations.hops.edge[mine[::-1]]] = mine[::-1]
        edges[key] = (partial[key], hop_of_edge)

    reasons: dict[int, NDArray[np.uint8]] = {}
    matched: list[int] = []
    unmatched: list[Counter[str]] = []
    for point, at in enumerate(matcher.points):
        reason = np.full(at.decoded, ONE_SIDED, np.uint8)
        for numbers, codes in conversations.counts.reasons.get(point, ()):
            np.maximum.at(reason, numbers, codes)
        reason[at.matched] = 0
        reasons[point] = reason
    _count_carried(reasons, layers)
    conversation_of = [_conversation_of(conversations, point, len(flow)) for point, flow in enumerate(flows)]
    flow_rows = {point: conversation_of[point][member] for point, (_, member) in enumerate(merged)}
    merged_flow = {point: member for point, (_, member) in enumerate(merged)}
    errors = None
    if answers is not None:
        errors = resolve_errors(
            own_errors,
            answers.unread,
            flows,
            pairs,
            {
                key: (state.usual, state.identifications.renumbered != 0)
                for key, state in matcher.pairs.items()
            },
            conversations,
            {key: hop_of_edge for key, (_, hop_of_edge) in edges.items()},
            conversation_of,
            coverage,
            layers,
            book,
        )
        errors.answering = answers.last_word(reasons)
        errors.unread = {
            n: (answers.unread[n].illegible, count) for n, count in answers.in_doubt(reasons).items()
        }
        _count_carried_errors(reasons, layers, errors)
    for point, reason in reasons.items():
        if layers[point].layer.depth:
            matched.append(0)
            unmatched.append(Counter())
            continue
        count = np.bincount(reason, minlength=max(REASON_NAMES) + 1)
        matched.append(int(count[0]))
        unmatched.append(Counter({name: int(count[c]) for c, name in REASON_NAMES.items() if count[c]}))
        if errors is not None:
            matched[point] += errors.matched(point)
            errors.count_unmatched(point, unmatched[point])
    shifts: list[SequenceShift] = []
    if any(state.shifts for state in matcher.pairs.values()):
        hop_of_edges = {key: hop_of_edge for key, (_, hop_of_edge) in edges.items()}
        shifts = sequence_shifts(matcher.pairs, merged_flow, hop_of_edges, conversations)
    return Assembly(conversations, edges, reasons, flow_rows, merged_flow, matched, unmatched, errors, shifts)


def _unread(matcher: Matcher, layers: Sequence[LayerInfo]) -> list[Unread]:
    """Return by layer the errors without a legible quote that could be about its packets: those of its depth."""
    first = {
        (each.home, each.layer.depth): matcher.points[number].unread
        for number, each in enumerate(layers)
        if not each.layer.turn
    }
    return [first[each.home, each.layer.depth] for each in layers]


def _count_carried(reasons: dict[int, NDArray[np.uint8]], layers: Sequence[LayerInfo]) -> None:
    """Take every packet for matched that carries a matched one."""
    for number, each in enumerate(layers):
        if each.carrier is not None:
            _count_carriers(reasons, layers, each.home, each.carrier[reasons[number] == 0])


def _count_carried_errors(
    reasons: dict[int, NDArray[np.uint8]], layers: Sequence[LayerInfo], errors: ErrorOutcome
) -> None:
    """Take every packet for matched that carries a matched ICMP error."""
    for number, each in enumerate(layers):
        if each.layer.depth:
            found = errors.errors[number].carrier[errors.reason[number] == 0]
            _count_carriers(reasons, layers, each.home, found)


def _count_carriers(
    reasons: dict[int, NDArray[np.uint8]], layers: Sequence[LayerInfo], home: int, found: NDArray[np.int64]
) -> None:
    """Take the carriers `found` of a point for matched."""
    for layer, each in enumerate(layers):
        if each.home == home and not each.layer.depth:
            reasons[layer][carriers(found, each.layer.turn)] = 0


def _one_socket(first: LayerInfo, second: LayerInfo) -> bool:
    """Say whether packets of one instant stand in the order in which the kernel showed them.

    So they do in a capture of `any`, which numbers the interfaces; other files have been put together from several
    sockets' packets, and layers of one point have an order of their own.
    """
    return first.info.link_type == second.info.link_type == "LINUX_SLL2" and first.home != second.home


def _coverage(
    flows: Sequence[Flows], layers: Sequence[LayerInfo], spans: Sequence[tuple[int | None, int | None]]
) -> Coverage:
    """Say when each layer was provably being recorded.

    A file that shows packets several times may have been put together from captures of different lengths, so
    each of its layers speaks for the time of its own packets only.
    """
    infos = [each.info for each in layers]
    turns = {id(each.info) for each in layers if each.layer.turn}
    first = [2**62 if span[0] is None else span[0] for span in spans]
    last = [-(2**62) if span[1] is None else span[1] for span in spans]
    for number, (info, at) in enumerate(zip(infos, flows, strict=True)):
        if id(info) in turns and len(at):
            first[number], last[number] = int(at.first_ns.min()), int(at.last_ns.max())
    return Coverage(
        first_ns=np.array(first, np.int64),
        last_ns=np.array(last, np.int64),
        complete=np.array([not p.dropped_by_kernel for p in infos], np.bool_),
        home=[each.home for each in layers],
        parted=_parted(flows, infos),
    )


def _parted(flows: Sequence[Flows], infos: Sequence[PointInfo]) -> list[NDArray[np.int64]]:
    """Return by layer which flows need not show all of their packets there.

    Others are at another layer of the same point, or the point shows nothing but the errors about them.
    """
    layers: dict[int, list[int]] = {}
    for number, info in enumerate(infos):
        layers.setdefault(id(info), []).append(number)
    parted = [np.flatnonzero(silent(at)) for at in flows]
    for several in layers.values():
        for one in several if len(several) > 1 else ():
            others = np.concatenate([flows[other].hash for other in several if other != one])
            parted[one] = np.union1d(parted[one], np.flatnonzero(np.isin(flows[one].hash, others)))
    return parted


def _conversation_of(c: Conversations, point: int, flows: int) -> NDArray[np.int64]:
    """Return the (first) conversation row of every merged flow at a point."""
    rows = np.full(flows, -1, np.int64)
    for at, flow in ((c.hops.to_point, c.hops.to_flow), (c.hops.from_point, c.hops.from_flow)):
        here = np.flatnonzero(at == point)
        rows[flow[here]] = c.flow_of_hop[here]
    starting = np.flatnonzero(c.point == point)[::-1]
    rows[c.flow[starting]] = starting
    return rows


def _evidence(
    state: PairState, flows_a: NDArray[np.int64], flows_b: NDArray[np.int64], clock_bound_ns: int | None
) -> tuple[PairEvidence, NDArray[np.int64]]:
    """Merge one pair's parts; return them and the merged edge of every partial edge."""
    edges, member = merge_edges(state.edges, flows_a, flows_b)
    state.follow_edges(member)
    return (
        PairEvidence(
            edges=edges,
            sample_lane=state.sample_lane,
            sample_delta=state.sample_delta,
            sample_time=state.sample_time,
            unmatched=(
                Unmatched.concatenate(state.unmatched_a, flows_a),
                Unmatched.concatenate(state.unmatched_b, flows_b),
            ),
            margin_ns=state.usual.reach_ns() or 0,
            clock_bound_ns=clock_bound_ns,
            resized=Resized.concatenate(state.resized),
        ),
        member,
    )

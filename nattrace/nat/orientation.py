"""Orientation: which side opened each conversation, decided once for all edges that carry it.

A conversation's flows at several points are joined by edges. What one point knows (a SYN, an echo request, a
system port) holds at all of them, so edges that share a flow while it is alive vote together. Nothing here
knows which point comes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.flows import HIGH_OPENED, LOW_OPENED
from nattrace.table import TCP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.flows import Flows

#: Two bindings of one path are in use together when their packets are no further apart than this.
SLACK_NS = 2_000_000_000

#: Ports below 1024 belong to servers (IANA system ports); Linux clients pick ports from 32768 up.
_SYSTEM_PORTS, _EPHEMERAL_PORTS = 1024, 32768

#: Rounds of joining edges; each halves the longest chain at least, so that this is never reached.
_ROUNDS = 64


def original_is_forward(flows: Flows) -> NDArray[np.int8]:
    """Return for each flow at one point +1 (low opened it), -1 (high opened it), 0 (nothing says so)."""
    opened = np.zeros(len(flows), np.int8)
    opened[flows.hint == LOW_OPENED] = 1
    opened[flows.hint == HIGH_OPENED] = -1
    return opened


def _by_port(flows: Flows) -> NDArray[np.int8]:
    """Return +1 where only the high endpoint has a server's port, -1 where only the low one has, else 0."""
    guess = (flows.high_port < _SYSTEM_PORTS).astype(np.int8) - (flows.low_port < _SYSTEM_PORTS)
    # a TCP conversation without its handshake was open before the capture: the first packet says nothing
    late = (guess == 0) & (flows.protocol == TCP)
    ephemeral = (flows.low_port >= _EPHEMERAL_PORTS).astype(np.int8) - (flows.high_port >= _EPHEMERAL_PORTS)
    guess[late] = ephemeral[late]
    ported = (flows.low_port != 0) | (flows.high_port != 0)
    same = flows.low_port == flows.high_port  # ICMP ids, NTP, IKE
    result: NDArray[np.int8] = np.where(ported & ~same, guess, 0).astype(np.int8)
    return result


def opening_side(flows: Flows) -> NDArray[np.bool_]:
    """Return for each flow whether the original direction is forward, from this point's packets alone."""
    opened = original_is_forward(flows)
    opened = np.where(opened == 0, _by_port(flows), opened)
    result: NDArray[np.bool_] = np.where(opened == 0, ~flows.first_backward, opened > 0)
    return result


def originals_forward(
    pairs: Sequence[tuple[tuple[int, int], Edges]], flows: Sequence[Flows]
) -> list[NDArray[np.bool_]]:
    """Return for each pair's edges whether the original direction is forward at their first point.

    Pairs come as ((first point, second point), edges). Votes count in this order: opening packets, ports,
    and then whichever packet was first anywhere.
    """
    if not pairs:
        return []
    turns, hints, ports, firsts, earliest = [], [], [], [], []
    for (i, j), edges in pairs:
        at_a, at_b, a, b = flows[i], flows[j], edges.flow_a, edges.flow_b
        turn = np.where(edges.swap, -1, 1)
        turns.append(turn)
        hints.append(original_is_forward(at_a)[a] + original_is_forward(at_b)[b] * turn)
        ports.append(_by_port(at_a)[a] + _by_port(at_b)[b] * turn)
        began_a, began_b = at_a.first_ns[a], at_b.first_ns[b]
        first_a = np.where(at_a.first_backward[a], -1, 1)
        first_b = np.where(at_b.first_backward[b], -1, 1) * turn
        firsts.append(np.where(began_a <= began_b, first_a, first_b))
        earliest.append(np.minimum(began_a, began_b))
    hint, port, first = (np.concatenate(votes).astype(np.int64) for votes in (hints, ports, firsts))
    leader, sign = _together(pairs, np.concatenate(turns), flows)
    if leader is not None:
        hint, port = (np.bincount(leader, votes * sign, hint.size)[leader] * sign for votes in (hint, port))
        order = np.lexsort((np.concatenate(earliest), leader))
        starts = np.flatnonzero(np.diff(leader[order], prepend=-1))
        of_leader = np.zeros(hint.size, np.int64)
        of_leader[leader[order[starts]]] = (first * sign)[order[starts]]
        first = of_leader[leader] * sign
    vote = np.where(hint != 0, hint, np.where(port != 0, port, first)) > 0
    return np.split(vote, np.cumsum([len(edges) for _, edges in pairs])[:-1])


def _together(
    pairs: Sequence[tuple[tuple[int, int], Edges]], turn: NDArray[np.int64], flows: Sequence[Flows]
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """Group the edges that carry one conversation: they share a flow and are alive at the same time.

    Returns (leader, sign): the group's first edge, and +1 where forward means the same as at that edge, -1
    where it means the opposite. The leader is None where every edge is alone.
    """
    base = np.concatenate([[0], np.cumsum([len(f) for f in flows])]).astype(np.int64)
    edge = np.arange(turn.size)
    node = np.concatenate(
        [base[i] + e.flow_a for (i, _), e in pairs] + [base[j] + e.flow_b for (_, j), e in pairs]
    )
    if np.bincount(node, minlength=1).max(initial=0) <= 1:
        return None, np.ones(turn.size, np.int64)
    member, sense = np.concatenate([edge, edge]), np.concatenate([np.ones_like(turn), turn])
    began = np.concatenate([e.first_ns for _, e in pairs] + [e.first_b_ns for _, e in pairs])
    ended = np.concatenate([e.last_ns for _, e in pairs] + [e.last_b_ns for _, e in pairs])
    order = np.lexsort((began, node))
    node, member, sense, began, ended = (c[order] for c in (node, member, sense, began, ended))
    # how late any edge of the flow that began before lived: a running maximum that starts anew at each flow
    by_end = np.argsort(ended, kind="stable")
    rank = np.empty(node.size, np.int64)
    rank[by_end] = np.arange(node.size)
    flow = np.cumsum(np.diff(node, prepend=node[:1]) != 0)
    latest = ended[by_end[np.maximum.accumulate(flow * node.size + rank) % node.size]]
    linked = np.flatnonzero((node[1:] == node[:-1]) & (began[1:] <= latest[:-1] + SLACK_NS))
    return _joined(turn.size, member[linked], member[linked + 1], sense[linked] * sense[linked + 1])


def _joined(
    size: int, one: NDArray[np.int64], other: NDArray[np.int64], sense: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (leader, sign) of every item, given links: the lowest item that links lead to, and the way there."""
    leader, sign = np.arange(size), np.ones(size, np.int64)
    for _ in range(_ROUNDS):
        low, high = np.minimum(leader[one], leader[other]), np.maximum(leader[one], leader[other])
        apart = np.flatnonzero(low != high)
        if not apart.size:
            break
        # each leader follows the lowest one that a link shows it
        order = apart[np.lexsort((low[apart], high[apart]))]
        chosen = order[np.flatnonzero(np.diff(high[order], prepend=-1))]
        leader[high[chosen]] = low[chosen]
        sign[high[chosen]] = (sign[one] * sense * sign[other])[chosen]
        for _ in range(_ROUNDS):
            onward = leader[leader]
            if (onward == leader).all():
                break
            sign *= np.where(onward == leader, 1, sign[leader])
            leader = onward
    return leader, sign

"""Walk: TCP streams without IP identifications whose payloads a helper rewrites, packet by packet.

Over IPv6 nothing but numbers says which packet is which, and each rewritten payload shifts all numbers behind it.
So a bound flow is followed from its first open packet, in the order of time, both directions at once (`steps`). Flows
in which nothing of the kind begins are never walked: this costs a step of Python a packet.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.keys import FLAGS_END, M1, M2, mix
from nattrace.match.pairing import group_ids, unique_pairs
from nattrace.match.renumber.anchors import ANCHORS, FLAGS, GROWTH_BYTES, SOON_NS, legible
from nattrace.match.renumber.steps import Steps
from nattrace.match.renumber.ways import Packet, There, Way

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows

_S32, _S48 = np.uint64(32), np.uint64(48)


@dataclass(slots=True)
class Walked:
    """What was found of flows that were walked; pairs are of shape (2, n): rows of the first point, of the second."""

    pairs: NDArray[np.int64]  #: one packet by the numbers of all that came before them
    #: perhaps one packet, behind bytes that one of the captures missed
    possible: NDArray[np.int64]
    #: the first point's rows behind such bytes: nobody knows where they are in the other's numbers
    unknown: NDArray[np.int64]
    rows: NDArray[np.int64]  #: all of the first point, in which equal numbers alone prove nothing

    def __add__(self, other: Walked) -> Walked:
        """Return what was found of both."""
        return Walked(
            np.concatenate([self.pairs, other.pairs], axis=1),
            np.concatenate([self.possible, other.possible], axis=1),
            np.concatenate([self.unknown, other.unknown]),
            np.concatenate([self.rows, other.rows]),
        )


def walk(
    rows_a: Rows,
    rows_b: Rows,
    lanes: Lanes,
    edges: Edges,
    begun: dict[int, list[tuple[int, int]]] | None = None,
) -> Walked:
    """Follow all flows in which something was rewritten; `lanes` are the rows' in `edges`.

    `begun` says what shifts of both directions the edges are known to have, the first ones first. Without it they
    begin unshifted.
    """
    sides = []
    for rows, lane in ((rows_a, lanes.lane_a), (rows_b, lanes.lane_b)):
        table = rows.table
        usable = legible(table, np.arange(len(rows))) & (table.ip_id == 0) & (table.l4_visible >= FLAGS_END)
        sides.append(np.flatnonzero(usable & (lane >= 0)))
    a, b = sides
    if begun is None:
        changed = _rewritten(rows_a, a, rows_b, b, lanes)
    else:
        # a proxy repeats the client's handshake in its own: only behind that anything crosses
        a = a[rows_a.table.time_ns[a] >= edges.first_ns[lanes.lane_a[a] >> 1]]
        b = b[rows_b.table.time_ns[b] >= edges.first_b_ns[lanes.lane_b[b] >> 1]]
        changed = np.array([edge for edge, shifts in begun.items() if len(shifts) > 1], np.int64)
    started = np.union1d(changed, _parted(rows_a, a, rows_b, b, lanes, edges))
    if begun is not None:
        started = started[np.isin(started, list(begun))]
    nothing = np.empty((2, 0), np.int64)
    if not started.size:
        return Walked(nothing, nothing, a[:0], a[:0])
    surely = set() if begun else set(changed.tolist())
    a = a[np.isin(lanes.lane_a[a] >> 1, started)]
    b = b[np.isin(lanes.lane_b[b] >> 1, started)]
    here, others = _flows(rows_a, a, lanes.lane_a, lanes.due_a), _flows(rows_b, b, lanes.lane_b, lanes.due_b)
    pairs: list[tuple[int, int]] = []
    possible: list[tuple[int, int]] = []
    unknown: list[int] = []
    every: list[int] = []
    for edge, packets in here.items():
        there = There(others[edge])
        forward, backward = begun[edge][0] if begun else (0, 0)
        steps = Steps(there, (Way.of(forward), Way.of(backward)))
        steps.follow(packets)
        if steps.told < ANCHORS:
            if edge in surely:
                every += [packet.row for packet in packets]
            if not steps.shifted_acks:
                # what was only cut by offload, or missed, may look so
                continue
            # that something was rewritten is all that is known
            steps = Steps(there, (Way.of(forward), Way.of(backward)), unknown=packets)
        every += [packet.row for packet in packets]
        pairs += [(packet.row, other.row) for packet, other in steps.pairs]
        unknown += [packet.row for packet in steps.unknown]
        possible += [
            (packet.row, other.row) for packet in steps.unknown for other, _ in steps.possible(packet)
        ]
    found = np.array(pairs, np.int64).reshape(-1, 2).T
    # what has its equal was refused for a reason, or waits for its turn
    found = found[:, rows_a.content[found[0]] != rows_b.content[found[1]]]
    return Walked(
        found,
        np.array(possible, np.int64).reshape(-1, 2).T,
        np.array(unknown, np.int64),
        np.array(every, np.int64),
    )


def _rewritten(
    rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64], lanes: Lanes
) -> NDArray[np.int64]:
    """Return the edges in which some packet has the same numbers at both points, and a little more or less data."""
    keys = []
    for rows, which, lane in ((rows_a, a, lanes.lane_a), (rows_b, b, lanes.lane_b)):
        table = rows.table
        word = table.seq[which].astype(np.uint64) << _S32 | table.ack[which]
        flags = (table.tcp_flags[which] & FLAGS).astype(np.uint64) << _S48
        keys.append(mix(mix(word) ^ (lane[which].astype(np.uint64) | flags) * M2 ^ M1))
    i, j = unique_pairs(*keys)
    a, b = a[i], b[j]
    growth = (rows_b.table.payload_length[b] - rows_a.table.payload_length[a]).view(np.int32)
    grown = (growth != 0) & (np.abs(growth) <= GROWTH_BYTES)
    grown &= np.abs(rows_b.table.time_ns[b] - rows_a.table.time_ns[a]) <= SOON_NS
    return np.unique(lanes.lane_a[a[grown]] >> 1)


def _parted(
    rows_a: Rows, a: NDArray[np.int64], rows_b: Rows, b: NDArray[np.int64], lanes: Lanes, edges: Edges
) -> NDArray[np.int64]:
    """Return the edges of which both points have packets, and from some time on not one with the same numbers.

    So it looks where the first packet that was rewritten is one that a capture missed.
    """
    many = np.ones(len(edges), np.bool_)
    for rows, which, lane, last_ns in (
        (rows_a, a, lanes.lane_a, edges.last_ns), (rows_b, b, lanes.lane_b, edges.last_b_ns),
    ):  # fmt: skip
        edge = lane[which] >> 1
        behind = edge[rows.table.time_ns[which] > last_ns[edge]]
        many &= np.bincount(behind, minlength=len(edges)) >= ANCHORS
    return np.flatnonzero(many)


def _flows(
    rows: Rows, which: NDArray[np.int64], lane: NDArray[np.int64], due_ns: NDArray[np.int64]
) -> dict[int, list[Packet]]:
    """Return the packets of each edge."""
    table = rows.table
    flags = table.tcp_flags & FLAGS
    columns = (
        lane & 1, table.time_ns, due_ns, table.seq, table.ack, flags, table.payload_length, table.content_hash, table.content_length,
    )  # fmt: skip
    found: dict[int, list[Packet]] = defaultdict(list)
    edge = lane[which] >> 1
    (same,) = group_ids(mix(table.content_hash[which] ^ edge.astype(np.uint64) * M1))
    repeated = (np.bincount(same)[same] > 1).tolist()
    listed = (column[which].tolist() for column in columns)
    for each, *fields in zip(edge.tolist(), which.tolist(), *listed, repeated, strict=True):
        found[each].append(Packet(*fields))
    return found

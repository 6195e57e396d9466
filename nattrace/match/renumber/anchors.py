"""Anchors: TCP packets that still agree although a box changed their numbers or options, and what they teach.

SYNPROXY and the FTP and SIP helpers shift sequence and acknowledgement numbers by a constant (kernel:
nf_ct_seq_adjust); routers take options away. An anchor is a pair of packets with equal IP id, length, flags, one
equal end (address and port) and one equal number. Several anchors of two flows, without dissent, say by how much
the flows' numbers differ. This module learns; `shifted` matches with what was learned.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.lookup import contains
from nattrace.match.edges import edge_keys
from nattrace.match.keys import ACK_END, FLAGS_END, M1, M2, M3, SEQ_END, endpoint_hash, mix
from nattrace.match.lanes import edge_of
from nattrace.match.pairing import group_ids, unique_pairs
from nattrace.match.ties import TIE_WINDOW_NS
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, TCP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.edges import Edges
    from nattrace.match.rows import Rows
    from nattrace.table import PacketTable

#: Anchors with different numbers that bind two flows by themselves: four pairs of 32-bit numbers that all differ
#: by the same is no chance, and a connection of one request and one answer still has as many.
ANCHORS = 4
#: Anchors that tell a shift between flows that other packets bind already.
ANCHORS_BOUND = 2
#: Share of a flow's anchors that must agree on its partner; the rest is chance.
_SHARE = 0.9

#: Packets on their way when a shift begins may still cross unshifted: a round trip of a long path.
_IN_FLIGHT_NS = 1_000_000_000
#: A packet without an IP id is its other self only this soon: TCP repeats nothing within 200 ms.
SOON_NS = 10_000_000

#: Helpers make a payload longer or shorter by less than this; whole segments are longer (RFC 9293 section 3.7.1).
GROWTH_BYTES = 256

#: TCP flags that routers leave alone; those of ECN they may clear (kernel: xt_ECN).
FLAGS = np.uint16(0x03F)
#: Bytes of TCP options at most (RFC 9293 section 3.1).
_TCP_OPTION_BYTES = 40
_S16, _S32 = np.uint64(16), np.uint64(32)
#: Places of the table by which most keys are seen to be nobody's: in the second-level cache as bytes.
_MARKS = 1 << 18


@dataclass(slots=True)
class Anchors:
    """Pairs of packets that vouch for a shift, one row each; the columns are of one length.

    Forward and backward are those of the first point. A shift is the second point's number minus the first
    point's, modulo 2**32: what is added to the bytes of one direction is added to the acknowledgements of the other.
    """

    a: NDArray[np.int64]  #: row at the first point
    b: NDArray[np.int64]
    sure: NDArray[np.bool_]  #: has an IP identification, or was found by all numbers before it (see `walk`)
    back: NDArray[np.bool_]  #: goes backward
    growth: NDArray[np.uint32]  #: how much longer its payload is at the second point, modulo 2**32
    alike: NDArray[np.bool_]  #: begins with the same options and bytes
    time_ns: NDArray[np.int64]  #: at the first point
    flow_a: NDArray[np.int64]  #: merged flow
    flow_b: NDArray[np.int64]
    swap: NDArray[np.bool_]
    forward: NDArray[np.uint32]  #: shift of the forward direction's sequence numbers
    backward: NDArray[np.uint32]
    number: NDArray[np.uint64]  #: what tells anchors with different numbers apart
    acknowledged: NDArray[np.bool_]  #: the acknowledgement numbers are there to be compared
    bound: NDArray[np.bool_]  #: other packets bind the two flows
    unshifted: NDArray[np.bool_]  #: and show both numbers unshifted

    def __len__(self) -> int:
        """Anchors."""
        return int(self.a.size)

    def take(self, rows: NDArray[Any]) -> Anchors:
        """Return the given rows: indices or a mask."""
        return Anchors(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def moved(self) -> NDArray[np.bool_]:
        """Which anchors vouch for a shift at all; the others' options differ."""
        result: NDArray[np.bool_] = (self.forward != 0) | (self.backward != 0)
        return result

    @property
    def forward_after(self) -> NDArray[np.uint32]:
        """Shift of the forward direction's numbers behind the anchor, whose payload a helper may have rewritten."""
        return self.forward + np.where(self.back, np.uint32(0), self.growth)

    @property
    def backward_after(self) -> NDArray[np.uint32]:
        """Shift of the backward direction's numbers behind the anchor."""
        return self.backward + np.where(self.back, self.growth, np.uint32(0))


def worth_waiting(
    table: PacketTable, rows: NDArray[np.int64], others: Sequence[tuple[PacketTable, NDArray[np.int64]]]
) -> NDArray[np.bool_]:
    """Return which of the given rows may be another point's packets, numbered otherwise or with other options.

    `others` are tables of the other point, each with the rows of it that have no partner. The test is cheap and
    generous: one equal number and the same length, or one equal end and the same IP id, or one equal end and data.
    """
    result = np.zeros(rows.size, np.bool_)
    mine = np.flatnonzero(legible(table, rows))
    if not mine.size:
        return result
    table, others = comparable(table), [(comparable(other), which) for other, which in others]
    theirs = [keys for other, which in others for keys in _partial_keys(other, which[legible(other, which)])]
    known = np.sort(np.concatenate(theirs)) if theirs else np.empty(0, np.uint64)
    if known.size:
        # a look at some of the bits spares most keys the search
        marks = np.zeros(_MARKS, np.bool_)
        marks[known % np.uint64(_MARKS)] = True
        for keys in _partial_keys(table, rows[mine]):
            likely = np.flatnonzero(marks[keys % np.uint64(_MARKS)] & (keys != 0))
            result[mine[likely]] |= contains(known, keys[likely])
    return result


def comparable(table: PacketTable) -> PacketTable:
    """Return the table with those TCP fields 0 that some point of the analysis cut off.

    Where the data offset is among them, options count as payload.
    """
    visible = table.l4_visible
    cut = (table.protocol == TCP) & (visible < FLAGS_END)
    if not cut.any():
        return table
    behind = table.ip_length - np.where(table.version == 6, np.uint32(60), np.uint32(40))
    return replace(
        table,
        ack=np.where(cut & (visible < ACK_END), np.uint32(0), table.ack),
        tcp_flags=np.where(cut, np.uint16(0), table.tcp_flags),
        payload_length=np.where(cut, behind, table.payload_length),
    )


def empty_bytes(table: PacketTable) -> NDArray[np.uint32]:
    """Return how long the payload of a packet without data may look: where the data offset was cut off, options do."""
    return np.where(table.l4_visible < FLAGS_END, np.uint32(_TCP_OPTION_BYTES), np.uint32(0))


def legible(table: PacketTable, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows are whole TCP packets of which the sequence number at least is there."""
    result: NDArray[np.bool_] = (table.protocol[rows] == TCP) & (table.l4_visible[rows] >= SEQ_END)
    result &= (table.fragment[rows] & np.uint16(MORE_FRAGMENTS | FRAGMENT_OFFSET)) == 0
    return result


def ends(table: PacketTable, rows: NDArray[np.int64]) -> list[NDArray[np.uint64]]:
    """Return keys of both ends of packets, address and port: source, destination."""
    version = table.version[rows]
    return [
        endpoint_hash(version, table.src[rows], table.sport[rows]),
        endpoint_hash(version, table.dst[rows], table.dport[rows]) ^ M2,
    ]


def _partial_keys(table: PacketTable, rows: NDArray[np.int64]) -> list[NDArray[np.uint64]]:
    """Return keys of which two packets share one when they may be shifted selves; 0 is no key."""
    length = table.payload_length[rows].astype(np.uint64)
    ip_id = table.ip_id[rows]
    seq, ack = (getattr(table, name)[rows].astype(np.uint64) << _S32 | length for name in ("seq", "ack"))
    keys = [
        mix(seq * M1),
        mix(ack * M3),
        *(mix(end ^ ip_id.astype(np.uint64) * M1) for end in ends(table, rows)),
    ]
    # data that offload cut as well has neither length nor IP id in common
    data = table.payload_length[rows] > empty_bytes(table)[rows]
    return keys + [np.where(data, mix(end * M3), np.uint64(0)) for end in ends(table, rows)]


def find_anchors(
    rows_a: Rows,
    rows_b: Rows,
    flows_a: NDArray[np.int64],
    flows_b: NDArray[np.int64],
    edges: Edges,
    unshifted_edges: int,
    walked: NDArray[np.int64],
    doubtful: NDArray[np.int64],
) -> tuple[Anchors, Anchors]:
    """Return the anchors between two points' rows that agree on something, and those that do not.

    `flows_a` and `flows_b` map the rows' flow numbers to flows in order, of which `edges` says what is bound; so
    many of them, the first ones, by packets with unshifted numbers. `walked`, of shape (2, n), are pairs found
    otherwise, without IP ids, of which no others are believed of the first point's `doubtful` rows (see `walk`).
    """
    chosen = [np.flatnonzero(legible(r.table, np.arange(len(r)))) for r in (rows_a, rows_b)]
    # what has its equal at the other point was refused for a reason, or waits for its turn
    alone = [np.isin(r.content[which], o.content, invert=True)
             for r, which, o in zip((rows_a, rows_b), chosen, (rows_b, rows_a), strict=True)]  # fmt: skip
    chosen = [which[mask] for which, mask in zip(chosen, alone, strict=True)]
    pairs = [walked]
    keys = [_anchor_keys(rows.table, which) for rows, which in zip((rows_a, rows_b), chosen, strict=True)]
    keys[0].append(_bound_keys(rows_a, chosen[0], flows_a, 0, edges))
    keys[1].append(_bound_keys(rows_b, chosen[1], flows_b, 1, edges))
    for key_a, key_b in zip(*keys, strict=True):
        a, b = unique_pairs(key_a, key_b)
        pairs.append(np.stack([chosen[0][a], chosen[1][b]]))
    a, b = np.unique(np.concatenate(pairs, axis=1), axis=1)
    table_a, table_b = rows_a.table, rows_b.table
    # without an IP id only data has a number of its own, only soon: it may be sent again, and only once said
    apart = np.abs(table_b.time_ns[b] - table_a.time_ns[a])
    sure = (table_a.ip_id[a] != 0) | np.isin(a << 32 | b, walked[0] << 32 | walked[1])
    data = table_a.payload_length[a] > empty_bytes(table_a)[a]
    data &= np.isin(a, doubtful, invert=True) & ~_repeated(rows_a, chosen[0], flows_a)[a]
    good = np.where(sure, apart <= TIE_WINDOW_NS, (apart <= SOON_NS) & data)
    a, b, sure = a[good], b[good], sure[good]
    growth = table_b.payload_length[b] - table_a.payload_length[a]
    alike = table_a.content_hash[a] == table_b.content_hash[b]
    nothing = np.zeros(a.size, np.bool_)
    back_a = rows_a.backward[a]
    seq, ack = table_b.seq[b] - table_a.seq[a], table_b.ack[b] - table_a.ack[a]
    found = Anchors(
        a, b, sure, back_a, growth, alike, table_a.time_ns[a],
        flows_a[rows_a.flow[a]], flows_b[rows_b.flow[b]], back_a != rows_b.backward[b],
        np.where(back_a, ack, seq), np.where(back_a, seq, ack),
        (table_a.seq[a].astype(np.uint64) << _S32) | table_a.ack[a],
        np.minimum(table_a.l4_visible[a], table_b.l4_visible[b]) >= ACK_END, nothing, nothing,
    )  # fmt: skip
    agreed, shown = _agreeing(found, edges, unshifted_edges)
    return found.take(agreed), found.take(~agreed & ~shown)


def _repeated(rows: Rows, which: NDArray[np.int64], flows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each row whether others of the given ones say the same in its flow."""
    result = np.zeros(len(rows), np.bool_)
    flow = flows[rows.flow[which]].astype(np.uint64)
    _, place, count = np.unique(
        mix(rows.table.content_hash[which] ^ flow * M1), return_inverse=True, return_counts=True
    )
    result[which] = (count > 1)[place.reshape(-1)]
    return result


def _bound_keys(
    rows: Rows, which: NDArray[np.int64], flows: NDArray[np.int64], side: int, edges: Edges
) -> NDArray[np.uint64]:
    """Return one more key: binding, direction, IP id and flags, where numbers may be shifted and payloads rewritten.

    Packets without binding or IP id get keys that no other packet has.
    """
    table = rows.table
    edge = edge_of(flows[rows.flow[which]], table.time_ns[which], side, edges)
    back = rows.backward[which].copy()
    if side:
        bound = edge >= 0
        back[bound] ^= edges.swap[edge[bound]]
    word = (table.tcp_flags[which] & FLAGS).astype(np.uint64) << _S32 | table.ip_id[which]
    lane = (edge.astype(np.uint64) << np.uint64(1)) | back
    keys = mix(mix(word * M3) ^ lane * M1)
    nothing = (edge < 0) | (table.ip_id[which] == 0)
    own = np.arange(2 * which.size, dtype=np.uint64)[side::2]
    return np.where(nothing, mix(own * M2 ^ M3), keys)


def _anchor_keys(table: PacketTable, rows: NDArray[np.int64]) -> list[NDArray[np.uint64]]:
    """Return four keys of each packet: all that anchors share, with either end and either number."""
    word = (table.payload_length[rows].astype(np.uint64) << _S32) | table.ip_id[rows]
    word ^= (table.tcp_flags[rows] & FLAGS).astype(np.uint64) << (_S32 + _S16)
    return [
        mix(end ^ mix(word * M3 ^ getattr(table, name)[rows].astype(np.uint64) * salt))
        for end in ends(table, rows)
        for name, salt in (("seq", M1), ("ack", M2))
    ]


def _agreeing(
    found: Anchors, edges: Edges, unshifted_edges: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which anchors others agree with, and of which others only the beginning; note what binds their flows.

    In flows that are bound, to each other, an anchor needs others that say the same of the numbers it begins with,
    acknowledges and ends with, or these are unshifted. Flows that nothing binds need enough anchors of one
    shift. Nearly no anchor of a flow may contradict; and a shift, once begun, shifts all that follows: what crosses
    unshifted contradicts it.
    """
    if not len(found):
        return np.zeros(0, np.bool_), np.zeros(0, np.bool_)
    flow_a, flow_b = (
        np.concatenate([found.flow_a, edges.flow_a]),
        np.concatenate([found.flow_b, edges.flow_b]),
    )
    keys = edge_keys(flow_a, flow_b, np.concatenate([found.swap, edges.swap]))
    pair, known = keys[: len(found)], keys[len(found) :]
    unshifted_ns = np.full(len(found), -(2**62))
    if len(edges):
        order = np.argsort(known)
        place = order[np.minimum(np.searchsorted(known, pair, sorter=order), known.size - 1)]
        found.bound = known[place] == pair
        # where acknowledgement numbers are cut off, packets of one direction show the numbers of that one only
        other_way = (found.forward != 0) & (edges.forward[place] == 0)
        other_way |= (found.backward != 0) & (edges.backward[place] == 0)
        found.unshifted = found.bound & (place < unshifted_edges) & (found.acknowledged | ~other_way)
        unshifted_ns[found.unshifted] = edges.last_ns[place[found.unshifted]]
    taken = np.isin(found.flow_a, edges.flow_a) | np.isin(found.flow_b, edges.flow_b)
    contradicted = found.moved & (found.time_ns < unshifted_ns - _IN_FLIGHT_NS)
    (relation,) = group_ids(mix(pair ^ mix((found.forward.astype(np.uint64) << _S32) | found.backward)))
    count = _said(relation.astype(np.uint64), found.number)
    refused = np.bincount(relation, contradicted)[relation] > 0
    begins, ends_ = _supported(found, pair)
    alike = np.where(found.sure, begins & ends_, count >= ANCHORS_BOUND)
    good = np.where(found.bound, alike, (count >= ANCHORS) & ~taken) & ~refused
    (both,) = group_ids(pair)
    votes = np.bincount(both)[both]
    for flow in (found.flow_a, found.flow_b):
        (own,) = group_ids(flow.astype(np.uint64))
        good &= votes >= _SHARE * np.bincount(own)[own]
    agreed: NDArray[np.bool_] = good
    # the beginning of a packet that was cut as well: it is matched by its bytes
    cut = found.alike | (np.abs(found.growth.view(np.int32)) > GROWTH_BYTES)
    shown = found.bound & found.sure & begins & ~ends_ & ~refused & cut
    return agreed, shown


def _said(what: NDArray[np.uint64], number: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return by how many different numbers each thing is said."""
    (thing,) = group_ids(what)
    distinct = np.unique(np.stack([thing, number.view(np.int64)]), axis=1)[0]
    return np.bincount(distinct, minlength=int(thing.max()) + 1)[thing]


def _supported(found: Anchors, pair: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return for which anchors others support the shifts of their numbers, and the shift behind their payload.

    A shift of one direction's bytes is said by those that begin, end or acknowledge there.
    """
    (both,) = group_ids(pair)
    stream = both.astype(np.uint64) << np.uint64(1)
    own, other = stream | found.back, stream | ~found.back
    seq = np.where(found.back, found.backward, found.forward)
    ack = np.where(found.back, found.forward, found.backward)
    grown = found.growth != 0
    shifts = [seq, ack, seq + found.growth]
    begun, acknowledged, ended = (
        way << _S32 | shift for way, shift in zip((own, other, own), shifts, strict=True)
    )
    count = np.split(_said(np.concatenate([begun, acknowledged, ended]), np.tile(found.number, 3)), 3)
    begins, acknowledges = (
        (times >= ANCHORS_BOUND) | (found.unshifted & (shift == 0))
        for times, shift in zip(count[:2], shifts[:2], strict=True)
    )
    # two super-frames of one size end alike beyond their first segments: what begins there must say so
    behind = np.isin(ended, np.concatenate([begun, acknowledged])) | (found.unshifted & (shifts[2] == 0))
    return begins & (acknowledges | ~found.acknowledged), np.where(grown, behind, begins)

"""Streams: TCP data that was cut or merged on the way, matched by byte range inside flows with known bindings.

Segmentation offload hands one super-frame to the card, which cuts it (kernel: tcp_gso_segment, inet_gso_segment);
receive offload merges segments again (tcp_gro_receive), at other places. What all pieces of one transmission
share: acknowledgement number, window and flags, but for FIN and PSH (the last piece only) and CWR (the first).
IP identifications count up by one a segment, or are all the same. This module never binds flows, and never
decides between two transmissions of the same bytes that nothing tells apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.evidence import TCP_REPEAT_NS
from nattrace.match.keys import ACK_END, FLAGS_END, M1, WINDOW_END, mix
from nattrace.match.pairing import group_ids
from nattrace.match.resize.pieces import Pieces
from nattrace.match.resize.ranges import Ranges, decide, overlapping
from nattrace.match.unique import FAR_NS
from nattrace.match.votes import MARGIN
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import PacketTable

#: Flags that a piece may have and its neighbour not (RFC 9293 section 3.1, RFC 3168 section 6.1.2).
FIN, PSH, CWR = 0x001, 0x008, 0x080
_PIECE_FLAGS = FIN | PSH | CWR
#: What one segment carries at least, unless it is the last one (Linux TCP_MIN_MSS).
_SEGMENT_BYTES = 88
#: Two transmissions of the same bytes closer than this are not told apart by time.
_FLOOR_NS = 10_000
#: With identifications that agree, a piece may be this late: see REACH_NS.
_VOUCHED_NS = 30_000_000_000
_DATA_OFFSET_END = 13


def stream_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets carry TCP data that can be cut and merged.

    Where the data offset was cut off, options would pass for data: no row then.
    """
    rows: NDArray[np.bool_] = (table.protocol == TCP) & (table.payload_length > 0)
    rows &= table.l4_visible >= _DATA_OFFSET_END
    rows &= (table.fragment & np.uint16(FRAGMENT_OFFSET | MORE_FRAGMENTS)) == 0
    return rows


def same_transmission_word(table: PacketTable) -> NDArray[np.uint64]:
    """Return what all pieces of one transmission share: acknowledgement number, window, flags; as far as visible."""
    visible = table.l4_visible
    word = np.where(visible >= ACK_END, table.ack, np.uint32(0)).astype(np.uint64) << np.uint64(32)
    flags = table.tcp_flags & np.uint16(~_PIECE_FLAGS & 0xFFF)
    word |= np.where(visible >= FLAGS_END, flags, np.uint16(0)).astype(np.uint64) << np.uint64(16)
    word |= np.where(visible >= WINDOW_END, table.window, np.uint16(0))
    return word


def match_streams(rows_a: Rows, rows_b: Rows, lanes: Lanes, usual: Usual) -> Pieces:
    """Return pairs of packets of one lane that carry the same bytes of one transmission, and what is tied.

    Rows without a lane, and those that are no TCP data, are left alone.
    """
    a = np.flatnonzero((lanes.lane_a >= 0) & stream_rows(rows_a.table))
    b = np.flatnonzero((lanes.lane_b >= 0) & stream_rows(rows_b.table))
    if not a.size or not b.size:
        return Pieces.none()
    found = _match(rows_a.take(a), rows_b.take(b), lanes.take(a, b), usual)
    return found.of_rows(a, b)


def _match(rows_a: Rows, rows_b: Rows, lanes: Lanes, usual: Usual) -> Pieces:
    a, b = rows_a.table, rows_b.table
    start_a, start_b = _offsets(a, b, lanes)
    group_a, group_b = group_ids(*(
        mix(same_transmission_word(table) ^ lane.astype(np.uint64) * M1) for table, lane in ((a, lanes.lane_a), (b, lanes.lane_b))
    ))  # fmt: skip
    stop_a, stop_b = start_a + a.payload_length, start_b + b.payload_length
    i, j, crowded = overlapping(Ranges(group_a, start_a, stop_a), Ranges(group_b, start_b, stop_b))
    apart = np.abs(lanes.due_b[j] - lanes.due_a[i])
    ahead = start_b[j] - start_a[i]
    vouched, sure, refuted = _identifications(a, i, b, j, ahead, lanes)
    same_start = (ahead == 0) & (a.content_length[i] == b.content_length[j]) & (a.content_length[i] > 0)
    refuted |= same_start & (a.content_hash[i] != b.content_hash[j])
    refuted |= ~vouched & _cut_inside_a_segment(start_a[i], stop_a[i], start_b[j], stop_b[j])
    refuted |= _fin_inside(a.tcp_flags[i], stop_a[i], b.tcp_flags[j], stop_b[j])
    reach = usual.reach_ns()
    limit = FAR_NS if reach is None else max(reach, TCP_REPEAT_NS)
    refuted |= apart > np.where(sure, _VOUCHED_NS, limit)
    possible = np.flatnonzero(~refuted)
    i, j, apart = i[possible], j[possible], apart[possible]
    vouched, same_start = vouched[possible], same_start[possible]
    low, high = np.maximum(start_a[i], start_b[j]), np.minimum(stop_a[i], stop_b[j])
    taken, contested = decide(i, j, low, high, apart, floor=_FLOOR_NS, margin=MARGIN, rounds=4)
    # packets of one size that are alike in everything were refused before, by time: they stay so
    alike = (rows_a.content[i] == rows_b.content[j]) & ~vouched
    contested |= taken & alike
    taken &= ~alike
    flags = np.full(i.size, evidence.TCP_SEQ | evidence.BYTE_RANGE | evidence.BINDING, np.uint16)
    seen = (a.ack[i] != 0) & (np.minimum(a.l4_visible[i], b.l4_visible[j]) >= ACK_END)
    flags |= seen * np.uint16(evidence.TCP_ACK)
    flags |= vouched * np.uint16(evidence.IP_ID)
    flags |= same_start * np.uint16(evidence.PAYLOAD)
    flags |= evidence.kept_ends(a, i, b, j)
    return Pieces(
        i[taken], j[taken], (high - low)[taken], (stop_a - start_a)[i[taken]], (stop_b - start_b)[j[taken]],
        flags[taken],
        np.setdiff1d(np.concatenate([i[contested], crowded]), i[taken]),
        np.setdiff1d(j[contested], j[taken]),
    )  # fmt: skip


def _offsets(a: PacketTable, b: PacketTable, lanes: Lanes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each packet's sequence number without wraps, counted alike for both sides of a lane.

    All packets of a lane in the order of time: from one to the next the sequence number moves by less than
    2**31 (RFC 9293 section 3.4), forward or back.
    """
    lane = np.concatenate([lanes.lane_a, lanes.lane_b])
    seq = np.concatenate([a.seq, b.seq])
    order = np.lexsort((np.concatenate([lanes.due_a, lanes.due_b]), lane))
    ordered = seq[order]
    step = np.zeros(seq.size, np.int64)
    step[1:] = (ordered[1:] - ordered[:-1]).view(np.int32)
    beginning = np.ones(seq.size, np.bool_)
    beginning[1:] = lane[order][1:] != lane[order][:-1]
    step[beginning] = 0
    offset = np.empty(seq.size, np.int64)
    offset[order] = np.cumsum(step)
    return offset[: len(a)], offset[len(a) :]


def _identifications(
    a: PacketTable,
    i: NDArray[np.int64],
    b: PacketTable,
    j: NDArray[np.int64],
    ahead: NDArray[np.int64],
    lanes: Lanes,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where the IP identifications vouch for a pair, where beyond doubt, and where they contradict it.

    `ahead` is how many bytes the second's data begins after the first's. A segment that begins k segment sizes
    into a super-frame has the super-frame's identification plus k (kernel: inet_gso_segment), or all have the
    same one (SKB_GSO_TCP_FIXEDID). An identification that is 0 at one point only says nothing.
    """
    id_a, id_b = a.ip_id[i], b.ip_id[j]
    count = (id_b - id_a).astype(np.uint16).view(np.int16).astype(np.int64)
    size = ahead // np.where(count == 0, 1, count)
    steps = (count != 0) & (size > 0) & (size * count == ahead)
    # the size that position and count give must be the size of segments, or it is chance
    length_a, length_b = a.payload_length.astype(np.int64), b.payload_length.astype(np.int64)
    stop = ahead + length_b[j] - length_a[i]
    ends_first = np.where(stop < 0, length_b[j], np.where(stop > 0, length_a[i], 0))
    steps &= ends_first % np.maximum(size, 1) == 0
    largest, common = _segment_sizes(size, steps, lanes.lane_a[i], lanes, length_a, length_b)
    fits = (steps & (largest | common)) | (count == 0)
    none = (id_a == 0) & (id_b == 0)
    either = (id_a == 0) | (id_b == 0)
    sure = (steps & common) | ((count == 0) & (ahead == 0))
    return fits & ~none, sure & ~none, ~fits & ~either


def _segment_sizes(
    size: NDArray[np.int64],
    possible: NDArray[np.bool_],
    lane: NDArray[np.int64],
    lanes: Lanes,
    length_a: NDArray[np.int64],
    length_b: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which sizes are the largest of their lane, and which are common: above half of it and seen.

    Of all sizes that the pairs of a lane give, those by chance are too small: between a packet and a later
    transmission of its bytes more segments were sent than the bytes account for. Seen is a size that some
    packet of the lane has.
    """
    if not size.size:
        return possible, possible
    largest = np.zeros(int(lane.max()) + 1, np.int64)
    np.maximum.at(largest, lane[possible], size[possible])
    seen = np.concatenate([(lanes.lane_a << 32) | length_a, (lanes.lane_b << 32) | length_b])
    common = np.isin((lane << 32) | np.maximum(size, 0), seen) & (size * 2 > largest[lane])
    return size == largest[lane], common


def _cut_inside_a_segment(
    start_a: NDArray[np.int64],
    stop_a: NDArray[np.int64],
    start_b: NDArray[np.int64],
    stop_b: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return where one packet begins or ends inside the other one's first segment, as none does that offload cut.

    So it looks where a helper shifted numbers by a few bytes.
    """
    ahead = np.abs(start_b - start_a)
    longer = np.where(stop_a > stop_b, start_a, start_b)
    inside = np.minimum(stop_a, stop_b) - longer
    result: NDArray[np.bool_] = (ahead != 0) & (ahead < _SEGMENT_BYTES)
    result |= (stop_a != stop_b) & (inside < _SEGMENT_BYTES)
    return result


def _fin_inside(
    flags_a: NDArray[np.uint16],
    stop_a: NDArray[np.int64],
    flags_b: NDArray[np.uint16],
    stop_b: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return where one packet ends the stream and the other goes on, or ends at the same byte without ending it."""
    fin_a, fin_b = (flags_a & FIN) != 0, (flags_b & FIN) != 0
    inside = (fin_a & (stop_a < stop_b)) | (fin_b & (stop_b < stop_a))
    result: NDArray[np.bool_] = inside | ((stop_a == stop_b) & (fin_a != fin_b))
    return result

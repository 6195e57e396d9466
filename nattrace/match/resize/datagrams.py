"""Datagrams: fragments matched with the whole datagram, or with fragments of other sizes, inside known bindings.

Conntrack puts datagrams together before it translates them, and the kernel cuts them again where they leave: what
is one packet at one point is several at another (nf_defrag_ipv4, ip_do_fragment; bridge netfilter). Over IPv4 all
pieces keep the datagram's identification (RFC 791 section 3.2). Over IPv6 whoever cuts gives a new one (RFC 8200
section 4.5, kernel: ip6_fragment), so there the first pieces must have been recognised (`heads`). This module
never puts datagrams together, and never decides between two that nothing tells apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.keys import M1, M2, mix
from nattrace.match.pairing import group_ids
from nattrace.match.resize.pieces import Pieces
from nattrace.match.resize.ranges import Ranges, decide, overlapping
from nattrace.match.unique import FAR_NS
from nattrace.match.votes import MARGIN
from nattrace.table import FRAGMENT_OFFSET, ICMP, ICMPV6, MORE_FRAGMENTS, UDP, UDPLITE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.outcome import Matches
    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import PacketTable

#: Two datagrams of one identification closer than this are not told apart by time.
_FLOOR_NS = 10_000
#: Nor are pieces further apart than this, or than is usual between the points: identifications come round.
_REACH_NS = 10_000_000
_HEADER_BYTES = 8  # of UDP (RFC 768) and ICMP (RFC 792, RFC 4443)


@dataclass(slots=True)
class Firsts:
    """First fragments matched as they are, with other identifications at the two points: pairs, row by row."""

    rows_a: Rows
    rows_b: Rows
    lane: NDArray[np.int64]

    @classmethod
    def among(cls, rows_a: Rows, rows_b: Rows, found: Matches) -> tuple[Rows, Rows] | None:
        """Return those among matched packets; None where there are none."""
        # hardly ever is there one, so look at one column first
        cut = np.flatnonzero(rows_a.table.fragment[found.a] & np.uint16(MORE_FRAGMENTS))
        if not cut.size:
            return None
        a, b = found.a[cut], found.b[cut]
        anew = rows_a.table.ip_id[a] != rows_b.table.ip_id[b]
        return (rows_a.take(a[anew]), rows_b.take(b[anew])) if anew.any() else None


def fragment_rows(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets are fragments, first ones included."""
    rows: NDArray[np.bool_] = (table.fragment & np.uint16(FRAGMENT_OFFSET | MORE_FRAGMENTS)) != 0
    return rows


def datagram_ids(table: PacketTable) -> NDArray[np.uint64]:
    """Return protocol and identification of each packet as one number; 0 without an identification."""
    word = (table.ip_id.astype(np.uint64) << np.uint64(8)) | table.protocol
    return np.where(table.ip_id != 0, word, np.uint64(0))


def ip_payload_bytes(table: PacketTable) -> NDArray[np.int64]:
    """Return the bytes behind each packet's IP headers; those without IPv4 options, for TCP and rare protocols."""
    length = table.payload_length.astype(np.int64)
    later = (table.fragment & np.uint16(FRAGMENT_OFFSET)) != 0
    short = np.isin(table.protocol, np.array([UDP, UDPLITE, ICMP, ICMPV6], np.uint8))
    headers = np.where(table.version == 6, 40 + 8 * fragment_rows(table), 20)
    whole = np.maximum(table.ip_length.astype(np.int64) - headers, length)
    return np.where(later, length, np.where(short, length + _HEADER_BYTES, whole))


def match_datagrams(
    rows_a: Rows, rows_b: Rows, lanes: Lanes, heads: Matches, firsts: Firsts, usual: Usual
) -> Pieces:
    """Return pairs of packets of one lane that hold the same bytes of one datagram, and what is tied.

    `heads` are first pieces recognised by what they say, `firsts` those that were matched before. Rows without
    a lane are left alone.
    """
    cut_a, cut_b = fragment_rows(rows_a.table), fragment_rows(rows_b.table)
    if not cut_a.any() and not cut_b.any():
        return Pieces.none()
    name_a, name_b = _names(rows_a, lanes.lane_a), _names(rows_b, lanes.lane_b)
    chosen = np.flatnonzero(cut_a[heads.a] | cut_b[heads.b])
    _link(name_a, heads.a[chosen], name_b, heads.b[chosen], firsts)
    a = np.flatnonzero((name_a != 0) & (cut_a | np.isin(name_a, name_b[cut_b])))
    b = np.flatnonzero((name_b != 0) & (cut_b | np.isin(name_b, name_a[cut_a])))
    if not a.size or not b.size:
        return Pieces.none()
    groups = group_ids(name_a[a], name_b[b])
    return _match(rows_a.take(a), rows_b.take(b), groups, lanes.take(a, b), usual).of_rows(a, b)


def _names(rows: Rows, lane: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return what names each packet's datagram inside its point; 0 for none."""
    ids = datagram_ids(rows.table)
    name = mix(ids ^ ((lane + 1).astype(np.uint64) * M1))
    name[(ids == 0) | (lane < 0)] = 0
    return name


def _link(
    name_a: NDArray[np.uint64],
    heads_a: NDArray[np.int64],
    name_b: NDArray[np.uint64],
    heads_b: NDArray[np.int64],
    firsts: Firsts,
) -> None:
    """Give both sides' packets of a recognised datagram one name where their identifications differ, in place.

    A name that several first pieces claim is left as it is: the identification came round again.
    """
    old_a = np.concatenate([name_a[heads_a], _names(firsts.rows_a, firsts.lane)])
    old_b = np.concatenate([name_b[heads_b], _names(firsts.rows_b, firsts.lane)])
    kept = np.flatnonzero((old_a != old_b) & _single(old_a) & _single(old_b))
    if not kept.size:
        return
    common = mix((np.arange(old_a.size) + 1).astype(np.uint64) * M2)
    whole = kept[kept < heads_a.size]
    for names, old, rows in ((name_a, old_a, heads_a), (name_b, old_b, heads_b)):
        order = kept[np.argsort(old[kept])]
        place = order[np.minimum(np.searchsorted(old[order], names), order.size - 1)]
        same = (old[place] == names) & (names != 0)
        names[same] = common[place[same]]
        names[rows[whole]] = common[whole]


def _single(names: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which names occur once; packets without a name have none to share."""
    _, inverse, count = np.unique(names, return_inverse=True, return_counts=True)
    result: NDArray[np.bool_] = (count[inverse.reshape(-1)] == 1) | (names == 0)
    return result


def _match(rows_a: Rows, rows_b: Rows, groups: list[NDArray[np.int64]], lanes: Lanes, usual: Usual) -> Pieces:
    a, b = rows_a.table, rows_b.table
    length_a, length_b = ip_payload_bytes(a), ip_payload_bytes(b)
    start_a, start_b = _offset_bytes(a), _offset_bytes(b)
    stop_a, stop_b = start_a + length_a, start_b + length_b
    i, j, crowded = overlapping(Ranges(groups[0], start_a, stop_a), Ranges(groups[1], start_b, stop_b))
    cut_a, cut_b = fragment_rows(a), fragment_rows(b)
    apart = np.abs(lanes.due_b[j] - lanes.due_a[i])
    same_start = (start_a[i] == start_b[j]) & (a.content_length[i] == b.content_length[j])
    same_start &= a.content_length[i] > 0
    refuted = same_start & (a.content_hash[i] != b.content_hash[j])
    # the checksum of a first piece is over the whole datagram, like that of the datagram
    both_sums = a.residual_known[i] & b.residual_known[j]
    refuted |= both_sums & (a.residual[i] != b.residual[j])
    refuted |= _beyond_end(a, i, stop_a, b, j, stop_b) | _beyond_end(b, j, stop_b, a, i, stop_a)
    reach = usual.reach_ns()
    refuted |= (apart > (FAR_NS if reach is None else max(reach, _REACH_NS))) | ~(cut_a[i] | cut_b[j])
    possible = np.flatnonzero(~refuted)
    i, j, apart, same_start, both_sums = (
        i[possible],
        j[possible],
        apart[possible],
        same_start[possible],
        both_sums[possible],
    )
    low, high = np.maximum(start_a[i], start_b[j]), np.minimum(stop_a[i], stop_b[j])
    taken, contested = decide(i, j, low, high, apart, floor=_FLOOR_NS, margin=MARGIN, rounds=4)
    same_id = (a.ip_id[i] == b.ip_id[j]) & (a.ip_id[i] != 0)
    flags = np.full(i.size, evidence.BYTE_RANGE | evidence.BINDING, np.uint16)
    flags |= same_id * np.uint16(evidence.IP_ID)
    flags |= same_start * np.uint16(evidence.PAYLOAD)
    flags |= both_sums * np.uint16(evidence.CHECKSUM)
    flags |= evidence.kept_ends(a, i, b, j)
    return Pieces(
        i[taken], j[taken], (high - low)[taken], length_a[i[taken]], length_b[j[taken]], flags[taken],
        np.setdiff1d(np.concatenate([i[contested], crowded]), i[taken]),
        np.setdiff1d(j[contested], j[taken]),
    )  # fmt: skip


def _offset_bytes(table: PacketTable) -> NDArray[np.int64]:
    return (table.fragment & np.uint16(FRAGMENT_OFFSET)).astype(np.int64) * 8


def _beyond_end(
    table: PacketTable,
    rows: NDArray[np.int64],
    stop: NDArray[np.int64],
    other: PacketTable,
    other_rows: NDArray[np.int64],
    other_stop: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return where one packet ends its datagram and the other goes on behind that, or ends it elsewhere."""
    last = (table.fragment[rows] & np.uint16(MORE_FRAGMENTS)) == 0
    also_last = (other.fragment[other_rows] & np.uint16(MORE_FRAGMENTS)) == 0
    ahead = other_stop[other_rows] - stop[rows]
    result: NDArray[np.bool_] = last & ((ahead > 0) | (~also_last & (ahead == 0)))
    return result

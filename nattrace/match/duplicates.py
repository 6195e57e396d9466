"""Duplicates: a packet that one point recorded twice, with nothing changed.

Two taps on one path, a mirror port that shows both ways, a capture merged with itself: one packet, told once. Senders
repeat themselves too, and then there are two packets. An IP identification tells the two cases apart; without one,
only what nobody sends twice so soon, or whether the point records everything twice. This module compares packets
of one point in one flow; it never matches packets of different points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.ingest.l4 import fillings
from nattrace.lookup import occurrences
from nattrace.match import evidence
from nattrace.match.flows import sorted_groups
from nattrace.match.keys import ACK_END, commonplace_keys, flow_hash, icmp_query_rows, mix
from nattrace.table import TCP, TCP_SYN, UDP, PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.rows import Rows
    from nattrace.table import AddressBook

#: An unchanged packet is one and the same only when seen again this soon: a sender that repeats itself (TCP
#: tail loss probe: two round trips, at least 10 ms; RFC 8985) takes longer, and gives it another IP id.
UNCHANGED_NS = 10_000_000
#: Two records of one packet without IP id are no further apart. TCP sends no byte twice so soon: it must hear of a
#: loss first (RFC 8985 section 6.2), which takes a round trip through both hosts' stacks.
_AT_ONCE_NS = 20_000
#: One file shows a packet unchanged so often at most (veth, bridge, tunnel, uplink); who floods numbers nothing.
_MOST_RECORDS = 4
#: What a sender may well repeat is a record only at a point that has so large a share twice of what nobody repeats:
#: there a packet that was sent twice stands four times.
_TWICE_SHARE = 0.9


def duplicates(
    rows: Rows,
    hashes: NDArray[np.uint64],
    backward: NDArray[np.bool_],
    everything: Sequence[Rows],
    book: AddressBook,
) -> NDArray[np.int64]:
    """Return which rows repeat an earlier one of their flow and direction unchanged: indices, ascending.

    `rows` are those among `everything` of which there are others of the same exact key close in time; `hashes` and
    `backward` are their `flow_hash`. A translated sighting may stand between the two.
    """
    table = rows.table
    first, second, _, extent = repeated(rows.exact ^ mix((hashes << np.uint64(1)) | backward))
    same_way = (hashes[first] == hashes[second]) & (backward[first] == backward[second])
    first, second, extent = first[same_way], second[same_way], extent[same_way]
    _, flags, conflict = evidence.weigh(table, first, table, second, book)
    apart = np.abs(table.time_ns[second] - table.time_ns[first])
    tcp = (flags & (evidence.TCP_SEQ | evidence.TCP_ACK)) == (evidence.TCP_SEQ | evidence.TCP_ACK)
    vouched = (flags & evidence.IP_ID) != 0
    passed = table.ttl[first] != table.ttl[second]
    # nobody repeats a SYN within a second (RFC 6298), so two at once need no IP id to be one
    syn = (table.tcp_flags[first] & np.uint16(TCP_SYN)) != 0
    at_once = ~passed & (apart <= _AT_ONCE_NS)
    soon = ~conflict & (apart <= UNCHANGED_NS)
    udp = (table.protocol[first] == UDP) & ~passed
    # a look at whole chunks, for few packets: datagrams that repeat themselves have no identifications mostly
    if (udp & vouched & soon).any():
        trains = _in_trains(rows, everything)
        vouched &= ~(udp & (trains[first] | trains[second]))
    once = vouched | syn | (passed & tcp)
    once |= at_once & (extent <= _MOST_RECORDS) & _sent_once(table)[first]
    unchanged = soon & once
    told = np.unique(second[unchanged])
    unsure = at_once & ~conflict & ~unchanged & (extent == 2) & table.residual_known[first]
    unsure &= udp | (table.protocol[first] == TCP)
    if unsure.any() and _records_all_twice(everything, int((unchanged & at_once).sum())):
        second = second[unsure]
        told = np.union1d(told, second[~_said_by_others(table, second, everything)])
    return told


def repeated(
    keys: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return consecutive packets of equal key (first, second), a number for that key, and how many have it."""
    order, starts = sorted_groups(keys)
    size = np.diff(np.append(starts, order.size))
    group = np.repeat(np.arange(starts.size), size)
    place = np.flatnonzero(group[1:] == group[:-1])
    return order[place], order[place + 1], group[place], size[group[place]]


def _sent_once(table: PacketTable) -> NDArray[np.bool_]:
    """Return which packets carry numbers of their own that their sender uses again only after a round trip."""
    numbered = (table.seq != 0) & (table.ack != 0) & (table.l4_visible >= ACK_END)
    segment = (table.protocol == TCP) & numbered & (table.payload_length > 0)
    result: NDArray[np.bool_] = segment | icmp_query_rows(table)
    return result


def _said_by_others(
    table: PacketTable, chosen: NDArray[np.int64], everything: Sequence[Rows]
) -> NDArray[np.bool_]:
    """Return which of the chosen packets, each of which is there twice, say what others say as well.

    TCP's numbers make its packets say something of their own.
    """
    said = [commonplace_keys(part.table, np.arange(len(part))) for part in everything]
    keys = np.sort(np.concatenate(said))
    own = commonplace_keys(table, chosen)
    often = occurrences(keys, own) > 2
    result: NDArray[np.bool_] = (often | np.isin(table.content_hash[chosen], fillings())) & (
        table.protocol[chosen] != TCP
    )
    return result


def _in_trains(rows: Rows, everything: Sequence[Rows]) -> NDArray[np.bool_]:
    """Return which rows, datagrams, begin like others around them that UDP_SEGMENT may have cut with them.

    Those leave in one loop. Their identifications count up from the large datagram's, and the next one's begin one
    higher (kernel: inet_gso_segment), so that of two trains of one content they repeat themselves; cards that cut may
    also give all the same.
    """
    from nattrace.match.resize.trains import LONGEST_TRAIN, TRAIN_GAP_NS  # noqa: PLC0415 - seldom needed, dear to load

    said = rows.table.content_hash[rows.table.protocol == UDP]
    tables = [part.table for part in everything]
    alike = PacketTable.concatenate(
        [table.take((table.protocol == UDP) & np.isin(table.content_hash, said)) for table in tables]
    )
    hashes, backward = flow_hash(alike)
    sender = mix(alike.content_hash ^ mix((hashes << np.uint64(1)) | backward))
    order = np.lexsort((alike.time_ns, sender))
    sender, time, ip_id = sender[order], alike.time_ns[order], alike.ip_id[order].astype(np.int64)
    together = (sender[1:] == sender[:-1]) & (np.diff(time) <= TRAIN_GAP_NS)
    burst = np.append(0, np.cumsum(~together))
    step = np.diff(ip_id) % 65536
    trains = np.bincount(burst[1:][together & (step > 0) & (step < LONGEST_TRAIN)], minlength=burst.size) > 0
    inside = trains[burst]
    # of records of one packet there are a few
    _, member, count = np.unique(np.stack([burst, ip_id]), axis=1, return_inverse=True, return_counts=True)
    inside |= np.isin(sender, sender[count[member.reshape(-1)] > _MOST_RECORDS])
    result: NDArray[np.bool_] = np.isin(rows.table.frame, alike.frame[order[inside]])
    return result


def _records_all_twice(everything: Sequence[Rows], doubled: int) -> bool:
    """Say whether nearly all packets that nobody sends twice at once are there twice: `doubled` of them are."""
    told_apart = sum(int(((part.table.ip_id != 0) | _sent_once(part.table)).sum()) for part in everything)
    return doubled > 0 and doubled >= _TWICE_SHARE * (told_apart - doubled)

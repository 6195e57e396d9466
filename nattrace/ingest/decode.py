"""From raw records to a packet table, without a Python step per packet.

It reads link, IP and upper-layer headers of whole blocks of records with numpy, and of the packets that these
carry in tunnels (`tunnels` finds them). It never touches files, never reassembles and never raises for what a
record holds: what is no row is a count.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.ingest.ip import read_ip
from nattrace.ingest.l4 import legible_rows, read_l4
from nattrace.ingest.link import find_ip
from nattrace.ingest.source import Inner
from nattrace.ingest.tunnels import TUNNEL_DEPTH_LIMIT, carried_packets
from nattrace.table import ALL_BYTES, COLUMNS, AddressBook, PacketTable

if TYPE_CHECKING:
    from nattrace.ingest.ip import Datagrams
    from nattrace.ingest.link import Frames
    from nattrace.ingest.source import ReadOptions, Records

#: Records decoded together: enough that numpy's cost per call vanishes, few enough that matrices of some 100
#: bytes a record stay in a 2 MiB cache. Measured: a quarter as many cost a third more, 4 times as many gain nothing.
BLOCK_RECORDS: Final = 16384


def decode(
    records: Records, options: ReadOptions, inner: list[list[Inner]] | None = None
) -> tuple[PacketTable, Counter[str]]:
    """Return the rows of all records that carry IP, in record order, and why each other record is no row.

    Rows plus counts equal the records. Reasons: ``truncated`` (cut off before ports or id), ``bad-ip-header``,
    ``ip-version``, ``ip-extension-limit``, ``not-ip``, ``link-depth``, ``link-type-N``, and by name where the
    frame says what it is: ``arp``, ``rarp``, ``lldp``, ``eapol``, ``pppoe-discovery``, ``llc``, ``mpls``.

    Columns that need more words than `PacketTable` has for them:

    ``content_hash`` covers up to 32 bytes that NAT never rewrites, inside captured length, IP length and
    ``options.comparable_bytes``: TCP from byte 20 (options and payload), a TCP SYN from the end of its
    header, UDP, UDP-Lite, DCCP and ICMP queries from byte 8 (SIP: what names the message), other ICMP from
    byte 4, SCTP from byte 12, PPTP's GRE from behind its call id, later fragments and unknown protocols from
    their first byte, ICMP errors nothing.

    ``residual`` is the complement of the L4 checksum less addresses, ports and id, modulo 65535 (RFC 1071), 0
    to 65534: what protocol, length and all untouched bytes sum up to. It is the same before and after NAT even
    where the capture cut the payload off. ``residual_known`` is False for no checksum (UDP 0, other protocols,
    later fragments), CRCs (SCTP), checksums cut off or left to the network card (they equal the pseudo-header
    sum), ICMP errors (NAT rewrites the quote) and IPv6 routing headers (the sum is over another destination).

    An ICMPv6 echo has the residual that the same ICMP echo has (no next header, ICMP's type), because NAT64 makes one
    of the other; only the length of its datagram is in it as well, which a fragment does not tell.

    ``payload_length`` takes a TCP header whose data offset was cut off as 20 bytes.

    Packets that packets carry are added to `inner`, when it is given: a list by depth, from 1, of their parts
    in record order.
    """
    skipped: Counter[str] = Counter()
    total = records.offset.size
    table = _uninitialised(total)
    filled = 0
    for start in range(0, total, BLOCK_RECORDS):
        frames = find_ip(records, slice(start, min(start + BLOCK_RECORDS, total)), skipped)
        rows = read_ip(records.buffer, frames, options.book, skipped)
        block = _part(table, filled, filled + rows.at.size)
        rows, block = _fill(records, rows, options, block, skipped)
        filled += len(block)
        if inner is not None:
            _add_carried(records, rows, block, options, inner)
    return _part(table, 0, filled), skipped


def decode_ip(records: Records, frames: Frames, options: ReadOptions) -> tuple[PacketTable, Datagrams]:
    """Return rows for IP headers anywhere in the records, as `decode` would, and where each of them lies.

    For packets inside packets: what a tunnel carries, what an ICMP error quotes. Positions that hold no legible
    IP packet are simply left out. `frames.record` must be indices into the columns of `records`, not a slice.
    """
    nothing: Counter[str] = Counter()
    rows = read_ip(records.buffer, frames, options.book, nothing)
    rows, table = _fill(records, rows, options, _uninitialised(rows.at.size), nothing)
    return table, rows


def _add_carried(
    records: Records, rows: Datagrams, table: PacketTable, options: ReadOptions, inner: list[list[Inner]]
) -> None:
    """Decode the packets that the given ones carry, those that these carry, and so on."""
    for depth in range(TUNNEL_DEPTH_LIMIT):
        carried = carried_packets(records.buffer, rows, table.sport, table.dport)
        if carried is None:
            return
        table, rows = decode_ip(records, carried.frames, options)
        if not len(table):
            return
        wrap = carried.wrap[np.isin(carried.frames.at, rows.at)]
        if depth == len(inner):
            inner.append([])
        inner[depth].append(Inner(table, wrap))


def _fill(
    records: Records, rows: Datagrams, options: ReadOptions, table: PacketTable, skipped: Counter[str]
) -> tuple[Datagrams, PacketTable]:
    """Fill the table's columns from its row 0 on; return the legible rows and the part of the table, filled."""
    rows, table = read_l4(records.buffer, rows, options, table, skipped)
    table.frame[:] = records.frame[rows.record]
    table.time_ns[:] = records.time_ns[rows.record]
    table.captured_length[:] = records.captured_length[rows.record]
    table.wire_length[:] = records.wire_length[rows.record]
    for name in ("version", "src", "dst", "protocol", "ttl", "ip_id", "fragment", "ip_length"):
        getattr(table, name)[:] = getattr(rows, name)
    return rows, table


def comparable_bytes(records: Records) -> int:
    """Return the fewest IP bytes, from the IP header on, that any cut-off record holds; 65535 if none is cut.

    A record is cut off when it is shorter than the wire had it and holds less than its IP length; records that
    are no row for `decode` do not count. A tunnel leaves fewer bytes of the packet that it carries, and these
    count as well.
    """
    fewest = ALL_BYTES
    cut = records.captured_length < records.wire_length
    for start in range(0, records.offset.size, BLOCK_RECORDS):
        block = slice(start, min(start + BLOCK_RECORDS, records.offset.size))
        if not cut[block].any():
            continue
        frames = find_ip(records, block, Counter())
        frames = frames.take(cut[frames.record])
        rows = read_ip(records.buffer, frames, AddressBook(), Counter())
        for _ in range(TUNNEL_DEPTH_LIMIT + 1):
            rows, _ = legible_rows(rows, Counter())
            held = rows.available[rows.available < rows.ip_length]
            fewest = min(fewest, int(held.min(initial=ALL_BYTES)))
            carried = carried_packets(records.buffer, rows)
            if carried is None:
                break
            rows = read_ip(records.buffer, carried.frames, AddressBook(), Counter())
    return fewest


def tunnel_header_bytes(records: Records) -> int:
    """Return how far into its record the IP header of a carried packet begins at most; 0 if none is carried."""
    furthest = 0
    for start in range(0, records.offset.size, BLOCK_RECORDS):
        block = slice(start, min(start + BLOCK_RECORDS, records.offset.size))
        rows = read_ip(records.buffer, find_ip(records, block, Counter()), AddressBook(), Counter())
        for _ in range(TUNNEL_DEPTH_LIMIT):
            rows, _ = legible_rows(rows, Counter())
            carried = carried_packets(records.buffer, rows)
            if carried is None:
                break
            furthest = max(furthest, int(carried.offset(records.offset).max(initial=0)))
            rows = read_ip(records.buffer, carried.frames, AddressBook(), Counter())
    return furthest


def _part(table: PacketTable, start: int, stop: int) -> PacketTable:
    """Return rows of the table, sharing memory; the table itself where that is all of it, which is common."""
    return table if stop - start == len(table) else table.take(slice(start, stop))


def _uninitialised(rows: int) -> PacketTable:
    """Return a table of `rows` rows that hold anything."""
    return PacketTable(**{name: np.empty(rows, dtype) for name, dtype in COLUMNS.items()})

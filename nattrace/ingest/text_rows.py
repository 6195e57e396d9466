"""Printed packets as rows of the packet table: only the columns that text fills, as plain integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.table import COLUMNS, TCP, PacketTable

if TYPE_CHECKING:
    from nattrace.ingest.source import ReadOptions
    from nattrace.ingest.text_packet import Printed
    from nattrace.ingest.text_sequence import SequenceNumbers

#: The columns that text fills, in the order in which `row_of` gives them; all others are 0.
_COLUMNS = (
    "frame", "time_ns", "wire_length", "version", "src", "dst", "protocol", "ttl", "ip_id", "fragment",
    "ip_length", "sport", "dport", "icmp_type", "icmp_code", "seq", "ack", "tcp_flags", "window", "checksum",
    "residual", "residual_known", "payload_length", "l4_visible",
)  # fmt: skip
ROW_WIDTH = len(_COLUMNS)


def row_of(
    packet: Printed, frame: int, time_ns: int, sequence: SequenceNumbers, options: ReadOptions
) -> tuple[int, ...]:
    """Return a printed packet, or what it quotes, as a row; its TCP numbers are those of the run's connections."""
    seq, ack = packet.seq or 0, 0
    if packet.protocol == TCP:
        seq, ack = sequence.absolute(
            packet.src_text, packet.dst_text, packet.tcp_flags, packet.seq, packet.ack
        )
    residual = 0
    if packet.checksum is not None and packet.checksum_correct:
        residual = _residual(packet)
    if packet.version == 6:
        src, dst = options.book.handle(packet.src), options.book.handle(packet.dst)
    else:
        src, dst = int.from_bytes(packet.src, "big"), int.from_bytes(packet.dst, "big")
    return (
        frame, time_ns, packet.frame_length, packet.version, src, dst, packet.protocol or 0,
        packet.ttl, packet.ip_id, packet.fragment, packet.ip_length, packet.sport, packet.dport,
        packet.icmp_type, packet.icmp_code, seq, ack, packet.tcp_flags, packet.window, packet.checksum or 0,
        residual, packet.checksum_correct, packet.payload_length, packet.l4_length,
    )  # fmt: skip


def table_of(rows: list[int]) -> PacketTable:
    """Return such rows as a table."""
    values = np.array(rows, np.int64).reshape(-1, ROW_WIDTH)
    table = PacketTable.empty(len(values))
    for name, column in zip(_COLUMNS, values.T, strict=True):
        setattr(table, name, column.astype(COLUMNS[name]))
    return table


def _residual(packet: Printed) -> int:
    """Return the checksum residual as `decode` defines it, from a TCP checksum that tcpdump found correct."""
    assert packet.checksum is not None
    addresses = packet.src + packet.dst
    words = sum(int.from_bytes(addresses[at : at + 2], "big") for at in range(0, len(addresses), 2))
    return ((packet.checksum ^ 0xFFFF) - words - packet.sport - packet.dport) % 65535

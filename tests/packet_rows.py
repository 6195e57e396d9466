"""Packet tables from plain dictionaries or from a pcap, for tests of single matching steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nattrace.ingest import ReadOptions, open_capture, parse_sources
from nattrace.table import COLUMNS, PacketTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def table(rows: Sequence[Mapping[str, Any]]) -> PacketTable:
    """Return a table with the given fields; what a row does not name is 0."""
    made = PacketTable.empty(len(rows))
    for name in COLUMNS:
        for number, row in enumerate(rows):
            getattr(made, name)[number] = row.get(name, 0)
    unknown = {name for row in rows for name in row} - set(COLUMNS)
    assert not unknown, unknown
    return made


def decoded(path: Path) -> PacketTable:
    """Decode a file with nattrace's own reader; nothing else of the engine has touched the rows."""
    options = ReadOptions()
    opened = open_capture(parse_sources([str(path)])[0], options)
    return PacketTable.concatenate([batch.table for batch in opened.batches(options)])

"""Whether a capture's files hold all packets that tcpdump counted: a full disk swallows some, and it does not notice.

Only the headers of records are read, never a packet.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace.bundle.manifest import PointEntry

_FILE_HEADER_BYTES: Final = 24
_RECORD_HEADER_BYTES: Final = 16


def counted(point: PointEntry, folder: Path) -> PointEntry:
    """Return the point, with a problem when its files in `folder` hold fewer packets than tcpdump counted."""
    captured = None if point.counters is None else point.counters.captured
    if captured is None or point.problem is not None:
        return point
    held = sum(records_in(folder / file) for file in point.files)
    if held >= captured:
        return point
    problem = f"tcpdump counted {captured} packets and wrote {held}: was the disk full?"
    return replace(point, problem=problem)


def records_in(file: Path) -> int:
    """Return how many whole records a pcap file has, as far as its record headers can be followed."""
    size = file.stat().st_size
    if size < _FILE_HEADER_BYTES:
        return 0
    count = 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = "<" if data[0] in {0x4D, 0xD4} else ">"
        captured_length = struct.Struct(f"{order}8xI4x")
        at = _FILE_HEADER_BYTES
        while at + _RECORD_HEADER_BYTES <= size:
            at += _RECORD_HEADER_BYTES + captured_length.unpack_from(data, at)[0]
            count += at <= size
    return count

"""Ingest: from files, pipes and printed text to packet tables, one point at a time.

The room's public names. It reads and decodes; it never compares points, and it imports nothing of the rooms
behind it.
"""

from nattrace.ingest.again import Bookmark
from nattrace.ingest.opening import open_capture, parse_sources
from nattrace.ingest.points import unique_names
from nattrace.ingest.source import Batch, Capture, PointInfo, ReadOptions, Source

__all__ = [
    "Batch",
    "Bookmark",
    "Capture",
    "PointInfo",
    "ReadOptions",
    "Source",
    "open_capture",
    "parse_sources",
    "unique_names",
]

"""What ingest hands on: sources, points, batches and the options every reader obeys. Data only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from nattrace.ingest.openings import Openings
from nattrace.table import AddressBook, PacketTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from nattrace.ingest.archive import Member
    from nattrace.ingest.quotes import Quotes
    from nattrace.model import Comment


@dataclass(frozen=True, slots=True)
class PointFacts:
    """What a bundle's manifest knows of a point and its pcap file cannot say."""

    interface: str | None
    dropped_by_kernel: int | None
    clock: str | None = None  #: a name for the clock of the host that captured it, where that is known


@dataclass(frozen=True, slots=True)
class Source:
    """One SOURCE argument: a path or an open binary file, and the point name given with NAME=, if any.

    `files` in order are one observation point (tcpdump -C/-G rotation); normally there is just one. A point
    of a bundle has its name from the manifest, with `facts`; the user did not give that name.
    """

    files: tuple[Path | Member | BinaryIO, ...]
    name: str | None = None
    facts: PointFacts | None = None


@dataclass(slots=True)
class ReadOptions:
    """How to decode, the same for every source of one analysis."""

    book: AddressBook = field(default_factory=AddressBook)
    #: IP bytes (header included) that every point has of every packet; hashes look no further.
    comparable_bytes: int = 65535
    #: False when one source (printed text) has no bytes at all: then `content_length` is 0 everywhere.
    comparable_content: bool = True
    #: The day, as ns since 1970, that printed times of day without a date are taken to belong to.
    day_ns: int = 0
    #: ``native`` or ``tshark``: who decodes link layers that nattrace does not know.
    dissector: str = "native"


@dataclass(slots=True)
class PointInfo:
    """What is known of one observation point; counts grow while its packets are read."""

    name: str
    file: str
    interface: str | None = None
    link_type: str = "UNKNOWN"
    snaplen: int | None = None
    packets: int = 0
    decoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_ns: int | None = None
    last_ns: int | None = None
    truncated: bool = False
    dropped_by_kernel: int | None = None
    comments: list[Comment] = field(default_factory=list)
    dated: bool = True
    named: bool = False  #: the user gave the name with NAME=, so it is never changed to make names unique
    damage: str | None = None  #: what is wrong with the file and at which byte, when `truncated`
    openings: Openings = field(default_factory=Openings)  #: how TCP connections begin and end here


@dataclass(frozen=True, slots=True)
class Records:
    """Raw records of one point that lie in one buffer: what a file reader gives to `decode`."""

    point: int  #: index into Capture.points
    link_type: int  #: LINKTYPE_ number (tcpdump.org/linktypes.html)
    buffer: NDArray[np.uint8]  #: file bytes, followed by at least PADDING bytes that are no record's data
    offset: NDArray[np.int64]  #: index of each packet's first byte (its link header) in `buffer`
    captured_length: NDArray[np.uint32]  #: bytes of the packet in `buffer`
    wire_length: NDArray[np.uint32]
    time_ns: NDArray[np.int64]
    frame: NDArray[np.uint32]  #: 1-based position in the file


#: Readable bytes after the last record of `Records.buffer`, so that fixed-size gathers need no bounds test.
PADDING = 256


@dataclass(frozen=True, slots=True)
class Inner:
    """Packets that other packets carry in tunnels, one row each."""

    table: PacketTable  #: frame, time and lengths are those of the carrier
    wrap: NDArray[np.uint64]  #: what carries each of them, see `nattrace.encapsulation`
    quotes: Quotes | None = None  #: what ICMP errors of `table` quote

    @classmethod
    def concatenate(cls, parts: Sequence[Inner]) -> Inner:
        """Return the rows of all parts, at least one, in order."""
        return cls(
            PacketTable.concatenate([part.table for part in parts]),
            np.concatenate([part.wrap for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded rows of one point, in file order; a capture yields batches of its points in turn."""

    point: int  #: index into Capture.points
    table: PacketTable
    #: what ICMP errors of `table` quote; None where nothing is quoted
    quotes: Quotes | None = None
    #: packets that packets of `table` carry in tunnels, in file order; by depth, from 1
    inner: tuple[Inner, ...] = ()


class Capture(Protocol):
    """An opened source. `points` may grow (pcapng interfaces, SLL2 ifindexes) until `batches` is exhausted."""

    points: list[PointInfo]

    def comparable_bytes(self) -> int:
        """IP bytes that this capture holds of its most truncated packet (looks at the first chunk only)."""

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        """Decode the packets, in file order, in batches of up to some ten thousand rows; may be called once."""

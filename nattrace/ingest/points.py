"""The points of one capture: found or made as their packets turn up, named, and kept distinct.

Sorts rows into points and keeps names, drop counts and comments; it never reads a file or decodes a packet
beyond the interface index of a Linux cooked header (SLL2).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from nattrace.errors import InputError
from nattrace.ingest.chunks import gather
from nattrace.ingest.linktypes import LINUX_SLL2, link_type_name
from nattrace.ingest.source import PointInfo, Records

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from numpy.typing import NDArray

    from nattrace.model import Comment

#: Points of one capture. A host has some hundred interfaces; each point costs a decoder call a chunk, so a
#: file that names a new interface in every packet must not set the pace.
MAX_POINTS = 1024

#: Comments kept of one capture, and their bytes in all: far above what people type, and a bound on memory.
MAX_COMMENTS = 10_000
MAX_COMMENT_BYTES = 1 << 20

#: LINKTYPE_LINUX_SLL2: protocol, reserved, interface index, ... (tcpdump.org/linktypes/LINKTYPE_LINUX_SLL2.html).
_SLL2 = np.dtype({"names": ["ifindex"], "formats": [">u4"], "offsets": [4], "itemsize": 8})


@dataclass(slots=True)
class Interface:
    """An interface as a capture file describes it: one a pcap file, any number a pcapng section."""

    ordinal: int  #: 0-based position among the interfaces of the whole file, as Wireshark numbers them
    link_type: int  #: LINKTYPE_ number
    name: str | None = None
    occurrence: int = 0  #: how many interfaces of the same section bore this name before
    snaplen: int | None = None
    resolution: int = 6  #: if_tsresol as it stands in the file
    offset_s: int = 0  #: if_tsoffset
    dropped: int | None = None  #: packets that the kernel dropped, as far as the section says
    comments: list[Comment] = field(default_factory=list)  #: waiting for the point to exist
    point: int | None = None  #: index of its (first) point, once it has one

    @property
    def is_cooked(self) -> bool:
        """Whether it is an `any` capture, whose packets belong to one point per interface index."""
        return self.link_type == LINUX_SLL2


@dataclass(frozen=True, slots=True)
class Rows:
    """Packets of one interface inside one buffer; the columns of `Records` without the point."""

    buffer: NDArray[np.uint8]
    offset: NDArray[np.int64]
    captured_length: NDArray[np.uint32]
    wire_length: NDArray[np.uint32]
    time_ns: NDArray[np.int64]
    frame: NDArray[np.uint32]


class PointList:
    """The points of one capture. `points` grows; a point keeps its index but may still be renamed."""

    def __init__(self, base: str, file: str, *, named: bool) -> None:
        self.points: list[PointInfo] = []
        self._base = base
        self._file = file
        self._named = named
        self._index: dict[Hashable, int] = {}
        self._interfaces: list[Interface] = []  # of each point, the first that it was made for
        self._ifindex: list[int | None] = []
        self._comments = 0
        self._comment_bytes = 0

    def place(self, interface: Interface, rows: Rows) -> list[Records]:
        """Return the rows as Records of their points: one for the interface, or one per SLL2 ifindex."""
        if not interface.is_cooked:
            return [self._records(self.point_of(interface), interface, rows)]
        indexes = gather(rows.buffer, rows.offset, _SLL2)["ifindex"].astype(np.uint32)
        # A header cut before its ifindex says nothing: 0, which no interface has (if_nametoindex(3)).
        indexes[rows.captured_length < _SLL2.itemsize] = 0
        found = np.unique(indexes)
        if found.size == 1:
            return [self._records(self.point_of(interface, int(found[0])), interface, rows)]
        placed = []
        for ifindex in found:
            of = np.flatnonzero(indexes == ifindex)
            part = Rows(
                rows.buffer,
                rows.offset[of],
                rows.captured_length[of],
                rows.wire_length[of],
                rows.time_ns[of],
                rows.frame[of],
            )
            placed.append(self._records(self.point_of(interface, int(ifindex)), interface, part))
        return placed

    def point_of(self, interface: Interface, ifindex: int | None = None) -> int:
        """Return the index of the interface's point, making it when it is new.

        Raises InputError beyond MAX_POINTS.
        """
        if interface.point is not None and ifindex is None:
            return interface.point
        who: Hashable = interface.ordinal
        if interface.name is not None:
            who = (interface.name, interface.occurrence)
        key = (who, interface.link_type, ifindex)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = self._add(interface, ifindex)
        if interface.point is None:
            interface.point = index
            for comment in interface.comments:
                self.points[index].comments.append(comment)
            interface.comments.clear()
            if interface.dropped is not None:
                self.points[index].dropped_by_kernel = (
                    self.points[index].dropped_by_kernel or 0
                ) + interface.dropped
        return index

    def count_drops(self, interface: Interface, dropped: int) -> None:
        """Take `dropped` as the interface's kernel drop count; a later count replaces an earlier one."""
        if interface.point is not None:
            info = self.points[interface.point]
            info.dropped_by_kernel = (info.dropped_by_kernel or 0) - (interface.dropped or 0) + dropped
        interface.dropped = dropped

    def comment(self, interface: Interface, frame: int | None, text: bytes) -> None:
        """Keep a comment, as long as MAX_COMMENTS and MAX_COMMENT_BYTES allow."""
        if self._comments == MAX_COMMENTS or self._comment_bytes + len(text) > MAX_COMMENT_BYTES:
            return
        self._comments += 1
        self._comment_bytes += len(text)
        from nattrace.model import Comment  # noqa: PLC0415 - most captures have no comments

        kept = Comment(frame, text.decode("utf-8", "replace"))
        if interface.point is None:
            interface.comments.append(kept)
        else:
            self.points[interface.point].comments.append(kept)

    def ensure_one(self) -> None:
        """Make sure that even a capture without any interface is a point, of link type UNKNOWN."""
        if not self.points:
            self.points.append(PointInfo(self._base, self._file, named=self._named))

    def _add(self, interface: Interface, ifindex: int | None) -> int:
        if len(self.points) == MAX_POINTS:
            raise InputError(
                f"{self._file}: more than {MAX_POINTS} interfaces; filter the capture to the ones of interest"
            )
        self.points.append(
            PointInfo(
                name=self._base,
                file=self._file,
                interface=interface.name,
                link_type=link_type_name(interface.link_type),
                snaplen=interface.snaplen,
                named=self._named,
            )
        )
        self._interfaces.append(interface)
        self._ifindex.append(ifindex)
        self._rename()
        return len(self.points) - 1

    def _rename(self) -> None:
        # Names depend on how many interfaces there are, so a second one renames the first.
        distinct = {id(interface) for interface in self._interfaces}
        seen = Counter(i.name for i, x in zip(self._interfaces, self._ifindex, strict=True) if x is None)
        for info, interface, ifindex in zip(self.points, self._interfaces, self._ifindex, strict=True):
            name = self._base
            if len(distinct) > 1:
                if interface.name is None:
                    name = f"{self._base}:{interface.ordinal}"
                else:
                    name = f"{self._base}:{interface.name}" if self._named else interface.name
                    if seen[interface.name] > 1:
                        name = f"{name}:{interface.ordinal}"
            info.name = name if ifindex is None else f"{name}:{ifindex}"

    @staticmethod
    def _records(point: int, interface: Interface, rows: Rows) -> Records:
        return Records(
            point=point,
            link_type=interface.link_type,
            buffer=rows.buffer,
            offset=rows.offset,
            captured_length=rows.captured_length,
            wire_length=rows.wire_length,
            time_ns=rows.time_ns,
            frame=rows.frame,
        )


def merge_records(parts: list[Records]) -> list[Records]:
    """Join the parts, all of one buffer, that belong to one point, so that each point is decoded once a chunk.

    A file of many small sections would otherwise cost a decoder call for each.
    """
    of_point: dict[int, list[Records]] = {}
    for part in parts:
        of_point.setdefault(part.point, []).append(part)
    if len(of_point) == len(parts):
        return parts
    return [
        Records(
            point=point,
            link_type=mine[0].link_type,
            buffer=mine[0].buffer,
            offset=np.concatenate([part.offset for part in mine]),
            captured_length=np.concatenate([part.captured_length for part in mine]),
            wire_length=np.concatenate([part.wire_length for part in mine]),
            time_ns=np.concatenate([part.time_ns for part in mine]),
            frame=np.concatenate([part.frame for part in mine]),
        )
        for point, mine in of_point.items()
    ]


def unique_names(points: Sequence[PointInfo]) -> list[str]:
    """Return a name for each point, all different, whatever the order in which the points are given.

    A name that no other point has stays as it is, and so does one that the user gave. Points whose names
    collide are told apart by the folders of their files (``a/eth0``, ``b/eth0``); points of one and the same
    file, or of unnamed streams, by a number in the order of their first packets (``eth0#2``).
    """
    order = sorted(range(len(points)), key=lambda i: _identity(points[i]))
    names = [p.name for p in points]
    # Point names win over made-up ones: reserve every name that is not in dispute before inventing.
    count = Counter(names)
    taken = {name for name in names if count[name] == 1}
    for name in sorted(n for n, times in count.items() if times > 1):
        group = [i for i in order if points[i].name == name]
        folders = [PurePath(points[i].file).parts[:-1] for i in group]
        given = next((i for i in group if points[i].named), None)
        if given is not None:
            taken.add(name)
        for i, parts in zip(group, folders, strict=True):
            if i != given:
                names[i] = _free_name(name, parts, folders, taken)
                taken.add(names[i])
    return names


def _identity(point: PointInfo) -> tuple[object, ...]:
    return (
        not point.named,
        point.file,
        point.interface or "",
        point.first_ns is None,
        point.first_ns or 0,
        point.packets,
    )


def _free_name(name: str, parts: tuple[str, ...], others: Iterable[tuple[str, ...]], taken: set[str]) -> str:
    for depth in range(1, len(parts) + 1):
        if sum(other[-depth:] == parts[-depth:] for other in others) == 1:
            candidate = "/".join([*parts[-depth:], name])
            if candidate not in taken:
                return candidate
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}#{number}"
    return candidate

"""The pcapng file format: sections, interfaces and packet blocks as columns.

Walks blocks and never looks inside a packet. Formats: draft-ietf-opsawg-pcapng; where a file breaks its
rules, what libpcap's sf-pcapng.c and Wireshark's wiretap/pcapng.c do.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from nattrace.errors import InputError
from nattrace.ingest.chunks import ChunkBuffer, gather
from nattrace.ingest.linktypes import link_type_of
from nattrace.ingest.pcapng_blocks import BLOCK_OVERHEAD, LAYOUTS, MAX_BLOCK_BYTES, padded, walk_blocks
from nattrace.ingest.pcapng_fields import (
    COMMENT,
    EPB_DROPCOUNT,
    IF_NAME,
    IF_TSOFFSET,
    IF_TSRESOL,
    ISB_IFDROP,
    options,
    rows_with_options,
    timestamps_ns,
)
from nattrace.ingest.points import Interface, PointList, Rows, merge_records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nattrace.ingest.chunks import Readable
    from nattrace.ingest.source import Records

MAGIC = b"\x0a\x0d\x0d\x0a"  #: block type of a section header, the same in both byte orders

_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE, _STATISTICS, _ENHANCED = 0x0A0D0D0A, 1, 2, 3, 5, 6

#: Blocks that are no packets but that Wireshark numbers as frames: systemd journal entries, custom blocks and
#: Sysdig events (wiretap/pcapng.c). They take a frame number here too, or later frames would not agree.
_OTHER_FRAMES = np.array([0x9, 0xBAD, 0x40000BAD, 0x204, 0x208, 0x216, 0x221, 0x222, 0x223], np.int64)

_BYTE_ORDER_MAGIC = {b"\x1a\x2b\x3c\x4d": ">", b"\x4d\x3c\x2b\x1a": "<"}

_SECTION_BYTES, _INTERFACE_BYTES, _STATISTICS_BYTES = 28, 20, 24  # the smallest, without options

#: An if_snaplen of 0 means no limit.
_NO_SNAPLEN = 0xFFFF_FFFF

#: The obsolete packet block's drop count when the writer did not know it.
_DROPS_UNKNOWN = 0xFFFF


class PcapngReader:
    """Reads one pcapng file, forward only, every section of it.

    Parameters
    ----------
    stream
        The file, at its first byte.
    label
        The file's name in messages.
    points
        Where the packets' points are kept.
    frames
        Packets before this file, when it continues a rotated capture.

    Raises
    ------
    InputError
        The first section header is cut or of an unknown version.
    """

    def __init__(self, stream: Readable, label: str, points: PointList, frames: int = 0) -> None:
        self._buffer = ChunkBuffer(stream, label)
        self._label = label
        self._points = points
        self.frames = frames  #: frame number of the last packet read
        self.damage: str | None = None  #: the first thing that is wrong with the file
        self._stopped = False
        self._layout = LAYOUTS["<"]
        self._interfaces: list[Interface] = []  # of the current section
        self._names: dict[str, int] = {}  # interface name to how often the current section used it
        self._ordinal = 0
        self._first_interface: Interface | None = None
        self._section_comments: list[bytes] = []

    def chunks(self) -> Iterator[list[Records]]:
        """Yield the records of one chunk at a time; the buffer they lie in is reused for the next one."""
        consumed = 0
        buffer = self._buffer
        began = False
        while not self._stopped and buffer.refill(consumed):
            records, consumed = self._read_buffer()
            if not began and not self._stopped and self._ordinal == 0 and consumed == 0:
                # The first block is longer than a chunk; go on until it is whole.
                continue
            began = True
            if records:
                yield merge_records(records)
        if not self._stopped and buffer.length:
            if buffer.position == 0 and not began:
                raise InputError(
                    f"{self._label}: ends at byte {buffer.length}, inside its section header block;"
                    " the file was cut, capture or copy it again"
                )
            self._note(f"ends inside the block at byte {buffer.position}")
        if not self._points.points and self._first_interface is not None:
            self._points.point_of(self._first_interface)

    def _read_buffer(self) -> tuple[list[Records], int]:
        """Read all complete blocks; return their packets and how many bytes they took."""
        records: list[Records] = []
        start = 0
        while not self._stopped:
            order = self._section_order(start)
            if order is not None:
                self._layout = LAYOUTS[order]
            elif self._stopped or self._buffer.length - start < BLOCK_OVERHEAD:
                break
            next_start = self._read_blocks(start, records)
            if next_start == start:
                break
            start = next_start
        return records, start

    def _section_order(self, at: int) -> str | None:
        """Return the byte order that a section header at this offset declares; None if there is no such."""
        head = bytes(self._buffer.view[at : at + BLOCK_OVERHEAD])
        if len(head) < BLOCK_OVERHEAD or head[:4] != MAGIC:
            return None
        order = _BYTE_ORDER_MAGIC.get(head[8:])
        if order is None:
            self._refuse_section(at, f"has {head[8:].hex()} for a byte-order magic")
        return order

    def _read_blocks(self, start: int, records: list[Records]) -> int:
        """Read the complete blocks from `start` in the current byte order; return where reading goes on.

        Stops early, without consuming it, at a section header of the other byte order.
        """
        blocks = walk_blocks(self._buffer.data, self._buffer.view, self._layout, start)
        offsets, types, lengths = blocks.offset, blocks.type, blocks.length
        good, bad, resume = offsets.size, blocks.error, blocks.resume
        changes_order = False
        previous = 0
        for i in np.flatnonzero(types == _SECTION).tolist():
            at = int(offsets[i])
            order = self._section_order(at)
            if order != self._layout.order:
                good, bad, resume = i, None, at
                changes_order = True
                break
            records += self._packets(offsets[previous:i], types[previous:i], lengths[previous:i])
            self._begin_section(at, int(lengths[i]))
            if self._stopped:
                return at
            previous = i + 1
        records += self._packets(offsets[previous:good], types[previous:good], lengths[previous:good])
        if bad is not None and not self._stopped:
            # Read in the wrong byte order, the section header that changes it has an absurd length.
            order = self._section_order(resume)
            if order is None or order == self._layout.order:
                self._stop(f"the block at byte {self._buffer.position + resume} {bad}")
        elif not changes_order:
            self._check_incomplete(resume)
        return resume

    def _check_incomplete(self, at: int) -> None:
        """Refuse an impossible length before waiting for its bytes."""
        if self._buffer.length - at < BLOCK_OVERHEAD or self._section_order(at) not in (
            None,
            self._layout.order,
        ):
            return
        length = self._layout.length_of(self._buffer.view, at + 4)[0]
        if not BLOCK_OVERHEAD <= length <= MAX_BLOCK_BYTES:
            self._stop(f"the block at byte {self._buffer.position + at} claims {length} bytes")

    def _begin_section(self, at: int, length: int) -> None:
        if length < _SECTION_BYTES:
            return self._refuse_section(at, f"has only {length} bytes")
        major, minor = struct.unpack_from(f"{self._layout.order}HH", self._buffer.view, at + 12)
        if (major, minor) not in ((1, 0), (1, 2)):  # 1.2 is 1.0 by another name, says the draft
            return self._refuse_section(at, f"is of the unknown version {major}.{minor}")
        self._interfaces = []
        self._names = {}
        for code, value in self._options(at + 24, at + length - 4):
            if code == COMMENT:
                self._section_comments.append(value)
        return None

    def _options(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        found, complete = options(self._buffer.view, start, end, self._layout.order)
        if not complete:
            self._note(f"an option at byte {self._buffer.position + start} or after is longer than its block")
        return iter(found)

    def _begin_interface(self, at: int, length: int) -> bool:
        """Add an interface to the section; False when the block is too short to be one."""
        if length < _INTERFACE_BYTES:
            # The next interfaces would get wrong numbers, and their packets wrong points.
            self._stop(f"the interface block at byte {self._buffer.position + at} has only {length} bytes")
            return False
        order = self._layout.order
        link_field, _, snaplen = struct.unpack_from(f"{order}HHI", self._buffer.view, at + 8)
        interface = Interface(self._ordinal, link_type_of(link_field), snaplen=snaplen or None)
        for comment in self._section_comments:
            self._points.comment(interface, None, comment)
        self._section_comments = []
        for code, value in self._options(at + 16, at + length - 4):
            if code == COMMENT:
                self._points.comment(interface, None, value)
            elif code == IF_NAME:
                interface.name = value.rstrip(b"\0").decode("utf-8", "replace") or None
            elif code == IF_TSRESOL and value:
                interface.resolution = value[0]
            elif code == IF_TSOFFSET and len(value) == 8:
                interface.offset_s = struct.unpack(f"{order}q", value)[0]
        if interface.name is not None:
            interface.occurrence = self._names.get(interface.name, 0)
            self._names[interface.name] = interface.occurrence + 1
        self._ordinal += 1
        self._interfaces.append(interface)
        if self._first_interface is None:
            self._first_interface = interface
        if interface.name is not None and not interface.is_cooked:
            # An interface that somebody took the trouble to name is a point even when it saw nothing.
            self._points.point_of(interface)
        return True

    def _read_statistics(self, at: int, length: int) -> None:
        if length < _STATISTICS_BYTES:
            return
        order = self._layout.order
        number = struct.unpack_from(f"{order}I", self._buffer.view, at + 8)[0]
        if number >= len(self._interfaces):
            return
        interface = self._interfaces[number]
        for code, value in self._options(at + 20, at + length - 4):
            if code == COMMENT:
                self._points.comment(interface, None, value)
            elif code == ISB_IFDROP and len(value) == 8:
                self._points.count_drops(interface, struct.unpack(f"{order}Q", value)[0])

    def _packets(
        self, offsets: NDArray[np.int64], types: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> list[Records]:
        """Read blocks of one section, no section header among them; return the packets, point by point."""
        if not offsets.size:
            return []
        # Interfaces first: a packet may only name one that was described before it.
        described = np.full(offsets.size, len(self._interfaces), np.int64)
        enhanced = types == _ENHANCED
        if enhanced.all():
            first = self.frames + 1
            self.frames += offsets.size
            frames = np.arange(first, first + offsets.size, dtype=np.uint32)
            return self._packet_rows(offsets, types, lengths, described, frames)
        for i in np.flatnonzero(types == _INTERFACE).tolist():
            if not self._begin_interface(int(offsets[i]), int(lengths[i])):
                offsets, types, lengths, described = offsets[:i], types[:i], lengths[:i], described[:i]
                break
            described[i:] += 1
        is_packet = (types == _ENHANCED) | (types == _OLD_PACKET) | (types == _SIMPLE)
        is_frame = is_packet
        rest = ~(is_packet | (types == _INTERFACE) | (types == _STATISTICS))
        if rest.any():  # looked up only where there is something unusual: a file may be all small sections
            is_frame = is_packet | np.isin(types, _OTHER_FRAMES)
        numbers = (self.frames + np.cumsum(is_frame)).astype(np.uint32)
        self.frames += int(np.count_nonzero(is_frame))
        records: list[Records] = []
        kept = np.flatnonzero(is_packet)
        if kept.size:
            records = self._packet_rows(
                offsets[kept], types[kept], lengths[kept], described[kept], numbers[kept]
            )
        for i in np.flatnonzero(types == _STATISTICS).tolist():
            self._read_statistics(int(offsets[i]), int(lengths[i]))
        return records

    def _packet_rows(
        self,
        at: NDArray[np.int64],
        types: NDArray[np.int64],
        lengths: NDArray[np.int64],
        described: NDArray[np.int64],
        frames: NDArray[np.uint32],
    ) -> list[Records]:
        rows = gather(self._buffer.data, at, self._layout.packet)
        interface = rows["interface"].astype(np.int64)
        captured = rows["captured"].astype(np.int64)
        wire = rows["wire"].astype(np.uint32)
        data = at + 28
        room = padded(lengths) - 32
        old, simple = types == _OLD_PACKET, types == _SIMPLE
        if old.any():
            fields = gather(self._buffer.data, at, self._layout.old_packet)
            interface = np.where(old, fields["interface"], interface)
        has_simple = bool(simple.any())
        if has_simple:
            # Original length, data; the interface is the section's first, the time is unknown.
            interface[simple] = 0
            wire = np.where(simple, rows["interface"], wire).astype(np.uint32)
            data = np.where(simple, at + 12, data)
            room = np.where(simple, room + 16, room)
            first = self._interfaces[0].snaplen if self._interfaces else None
            cut = np.minimum(np.minimum(wire, room), first or _NO_SNAPLEN)
            captured = np.where(simple, cut, captured)
        sound = (interface < described) & (captured <= room) & (room >= 0)
        all_sound = bool(sound.all())
        if not all_sound:
            bad = int(np.argmin(sound))
            where = f"the packet block at byte {self._buffer.position + int(at[bad])}"
            if interface[bad] >= described[bad]:
                self._note(f"{where} names interface {interface[bad]} of {described[bad]}")
            else:
                self._note(f"{where} claims {captured[bad]} bytes of {max(0, int(room[bad]))}")
        # Most sections have one interface, and all that follows is then done once for the whole chunk.
        if all_sound and int(interface.min()) == int(interface.max()):
            choices: list[tuple[int, NDArray[np.int64] | slice]] = [(int(interface[0]), slice(None))]
        else:
            numbers = np.unique(interface[sound]).tolist()
            choices = [(number, np.flatnonzero(sound & (interface == number))) for number in numbers]
        records: list[Records] = []
        for number, chosen in choices:
            found = self._interfaces[number]
            time_ns = timestamps_ns(
                rows["high"][chosen], rows["low"][chosen], found.resolution, found.offset_s
            )
            if has_simple:
                time_ns[simple[chosen]] = 0
            records += self._points.place(
                found,
                Rows(
                    buffer=self._buffer.data,
                    offset=data[chosen],
                    captured_length=captured[chosen].astype(np.uint32),
                    wire_length=wire[chosen],
                    time_ns=time_ns,
                    frame=frames[chosen],
                ),
            )
        if old.any():
            self._count_old_drops(interface[old & sound], fields["drops"][old & sound])
        self._packet_options(at, lengths, interface, captured, sound & ~simple, frames)
        return records

    def _count_old_drops(self, interface: NDArray[np.int64], drops: NDArray[np.uint16]) -> None:
        known = drops != _DROPS_UNKNOWN
        for number in np.unique(interface[known]).tolist():
            found = self._interfaces[number]
            total = int(drops[known & (interface == number)].sum(dtype=np.int64))
            self._points.count_drops(found, (found.dropped or 0) + total)

    def _packet_options(
        self,
        at: NDArray[np.int64],
        lengths: NDArray[np.int64],
        interface: NDArray[np.int64],
        captured: NDArray[np.int64],
        wanted: NDArray[np.bool_],
        frames: NDArray[np.uint32],
    ) -> None:
        """Keep packet comments and drop counts; packets that have neither cost no Python step."""
        start = at + 28 + padded(captured)
        end = at + padded(lengths) - 4
        candidates = np.flatnonzero(wanted & (start + 4 <= end))
        if not candidates.size:
            return
        candidates = candidates[
            rows_with_options(
                self._buffer.data,
                start[candidates],
                end[candidates],
                self._layout.order,
                (COMMENT, EPB_DROPCOUNT),
            )
        ]
        for i in candidates.tolist():
            found = self._interfaces[int(interface[i])]
            for code, value in self._options(int(start[i]), int(end[i])):
                if code == COMMENT:
                    self._points.comment(found, int(frames[i]), value)
                elif code == EPB_DROPCOUNT and len(value) == 8:
                    drops = struct.unpack(f"{self._layout.order}Q", value)[0]
                    self._points.count_drops(found, (found.dropped or 0) + drops)

    def _note(self, what: str) -> None:
        if self.damage is None:
            self.damage = what

    def _refuse_section(self, at: int, what: str) -> None:
        where = self._buffer.position + at
        if where == 0:
            # Nothing was read yet, so there is nothing to report on.
            raise InputError(f"{self._label}: byte 0: the section header {what}; is it damaged, or too new?")
        self._stop(f"the section header at byte {where} {what}")

    def _stop(self, what: str) -> None:
        self._note(what)
        self._stopped = True

"""The pcap file format, every variant that libpcap reads: records as columns.

Walks record headers and never looks inside a packet. Formats: draft-ietf-opsawg-pcap, pcap-savefile(5) and
libpcap's sf-pcap.c for the variants that neither describes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from nattrace.errors import InputError
from nattrace.ingest.chunks import ChunkBuffer, gather
from nattrace.ingest.linktypes import link_type_name, link_type_of, max_packet_bytes
from nattrace.ingest.points import Interface, PointList, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nattrace.ingest.chunks import Readable
    from nattrace.ingest.source import Records

FILE_HEADER_BYTES = 24

_MICROSECONDS, _NANOSECONDS, _MODIFIED = 0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34

#: Magic number as the first four bytes stand in the file, to (byte order, ns per sub-second unit, header bytes).
#: The modified format of Alexey Kuznetsov's patch adds ifindex, protocol and packet type: 24 bytes a record.
_VARIANTS = {
    struct.pack(f"{order}I", magic): (order, unit_ns, header_bytes)
    for magic, unit_ns, header_bytes in (
        (_MICROSECONDS, 1000, 16),
        (_NANOSECONDS, 1, 16),
        (_MODIFIED, 1000, 24),
    )
    for order in "<>"
}

MAGICS = frozenset(_VARIANTS)

_LENGTH_AT = 8  # captured length: after seconds and sub-seconds

#: Bytes looked through in one leap: they stay in the second-level cache.
_LEAP_BYTES = 1 << 18
#: A leap over fewer records than this costs more than it saves; a walk goes on from there.
_WORTH_LEAPING = 256


class PcapReader:
    """Reads one pcap file, forward only.

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
        The header is cut or of an unknown version.
    """

    def __init__(self, stream: Readable, label: str, points: PointList, frames: int = 0) -> None:
        self._buffer = ChunkBuffer(stream, label)
        self._points = points
        self.frames = frames  #: frame number of the last packet read
        self.damage: str | None = None  #: what is wrong with the file after the last good record
        self._buffer.refill(0)
        if self._buffer.length < FILE_HEADER_BYTES:
            raise InputError(
                f"{label}: ends at byte {self._buffer.length}, inside the {FILE_HEADER_BYTES}-byte pcap header;"
                " capture again and let tcpdump end in peace (or use -U)"
            )
        head = bytes(self._buffer.view[:FILE_HEADER_BYTES])
        order, self._unit_ns, self._header_bytes = _VARIANTS[head[:4]]
        major, minor, _, _, snaplen, link_field = struct.unpack(f"{order}HHiIII", head[4:])
        # libpcap refuses 2.5 and later, Wireshark reads them as 2.4; nobody has ever written them in earnest.
        if major != 2 and (major, minor) != (543, 0):
            raise InputError(
                f"{label}: byte 4: pcap version {major}.{minor} is unknown (2.x is read); is it damaged?"
            )
        self._order = order
        link_type = link_type_of(link_field)
        self._max_bytes = max_packet_bytes(link_type)
        self._interface = Interface(0, link_type, snaplen=snaplen or None)
        # Before version 2.3 the two lengths stood in the other order, DG/UX's 543.0 kept that, and in 2.3
        # either happens: the captured length is then the smaller one (sf-pcap.c, pcap_check_header).
        self._either_order = (major, minor) == (2, 3)
        self._swapped = major == 543 or minor < 3
        names = ["seconds", "fraction", "captured", "wire"]
        if self._swapped:
            names[2:] = ["wire", "captured"]
        self._record = np.dtype([(name, f"{order}u4") for name in names])
        self.link_type_name = link_type_name(link_type)

    def chunks(self) -> Iterator[list[Records]]:
        """Yield the records of one chunk at a time; the buffer they lie in is reused for the next one."""
        consumed = FILE_HEADER_BYTES
        buffer = self._buffer
        first = True
        while True:
            # The header was read together with the first chunk.
            if not first and not buffer.refill(consumed):
                if buffer.length:
                    self.damage = f"ends inside the record at byte {buffer.position}"
                break
            offsets, consumed = self._walk(consumed if first else 0)
            first = False
            records = self._read(offsets)
            if records:
                yield records
            if self.damage is None:
                self._check_incomplete(consumed)
            if self.damage is not None:
                break
        if not self._points.points:
            self._points.point_of(self._interface)

    def _walk(self, start: int) -> tuple[NDArray[np.int64], int]:
        """Return the offsets of the complete records in the buffer, and where the first incomplete one begins."""
        view, end = self._buffer.view, self._buffer.length
        header_bytes = self._header_bytes
        length_at = _LENGTH_AT + 4 * self._swapped
        runs: list[NDArray[np.int64]] = []
        while not self._either_order:
            run, start = self._leap(start)
            runs.append(run)
            if run.size < _WORTH_LEAPING:
                break
        length_of = struct.Struct(f"{self._order}I").unpack_from
        lengths_of = struct.Struct(f"{self._order}II").unpack_from

        def positions() -> Iterator[int]:
            # No end test: unpack_from raises beyond the view, which also stops at an absurd length.
            # This is the one loop over packets in all of nattrace, at some 80 ns a turn; leaps take half of that.
            position = start + length_at
            try:
                while True:
                    yield position
                    position += length_of(view, position)[0] + header_bytes
            except struct.error:
                return

        def positions_either_order() -> Iterator[int]:
            position = start + length_at
            try:
                while True:
                    yield position
                    position += min(lengths_of(view, position)) + header_bytes
            except struct.error:
                return

        offsets = np.fromiter(positions_either_order() if self._either_order else positions(), np.int64)
        offsets -= length_at
        # The last position is the first whose length is not in the buffer. The record before it may run past
        # the end; every earlier one is followed by a length that was read, so it is complete.
        stop = int(offsets[-1])
        offsets = offsets[:-1]
        if stop > end:
            stop = int(offsets[-1])
            offsets = offsets[:-1]
        return np.concatenate([*runs, offsets]), stop

    def _leap(self, start: int) -> tuple[NDArray[np.int64], int]:
        """Return the offsets of complete records that follow each other from `start` on, and where the last one ends.

        Records of one second begin with the same four bytes. Nearly all places where these stand are records, and
        their lengths say which ones follow each other: the first that does not ends the leap.
        """
        data, end = self._buffer.data, self._buffer.length
        heads = data[start : max(min(start + _LEAP_BYTES, end - self._header_bytes + 1), start)]
        same = heads == data[start]
        same &= data[start + 1 : start + 1 + heads.size] == data[start + 1]
        at = np.flatnonzero(same) + start
        headers = gather(data, at, self._record)
        of_second = headers["seconds"] == headers["seconds"][:1]
        at = at[of_second]
        ends = at + headers["captured"][of_second] + self._header_bytes
        broken = np.flatnonzero(at[1:] != ends[:-1])
        found = int(broken[0]) + 1 if broken.size else at.size
        if found and ends[found - 1] > end:
            found -= 1
        return at[:found], int(ends[found - 1]) if found else start

    def _read(self, offsets: NDArray[np.int64]) -> list[Records]:
        if not offsets.size:
            return []
        rows = gather(self._buffer.data, offsets, self._record)
        captured = rows["captured"].astype(np.uint32)
        wire = rows["wire"].astype(np.uint32)
        if self._either_order:
            captured, wire = np.minimum(captured, wire), np.maximum(captured, wire)
        good = offsets.size
        if int(captured.max()) > self._max_bytes:
            good = int(np.argmax(captured > self._max_bytes))
            self._refuse(int(offsets[good]), int(captured[good]))
        time_ns = rows["seconds"][:good].astype(np.int64)
        time_ns *= 1_000_000_000
        fraction = rows["fraction"][:good].astype(np.int64)
        fraction *= self._unit_ns
        time_ns += fraction
        first = self.frames + 1
        self.frames += good
        if not good:
            return []
        return self._points.place(
            self._interface,
            Rows(
                buffer=self._buffer.data,
                offset=offsets[:good] + self._header_bytes,
                captured_length=captured[:good],
                wire_length=wire[:good],
                time_ns=time_ns,
                frame=np.arange(first, first + good, dtype=np.uint32),
            ),
        )

    def _check_incomplete(self, start: int) -> None:
        """Refuse an impossible length before waiting for its bytes."""
        rest = self._buffer.view[start:]
        if len(rest) >= self._record.itemsize:
            captured = min(
                struct.unpack_from(f"{self._order}II", rest, _LENGTH_AT)
                if self._either_order
                else struct.unpack_from(f"{self._order}I", rest, _LENGTH_AT + 4 * self._swapped)
            )
            if captured > self._max_bytes:
                self._refuse(start, captured)

    def _refuse(self, offset: int, captured: int) -> None:
        self.damage = (
            f"the record at byte {self._buffer.position + offset} claims {captured} bytes,"
            f" more than a {self.link_type_name} packet can have ({self._max_bytes})"
        )

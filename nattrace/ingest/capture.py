"""Capture files as captures: the files of one source, read one after the other and decoded.

Connects readers, points and the decoder, and counts; it never interprets bytes itself.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from nattrace.errors import InputError
from nattrace.ingest.archive import Member, MemberStream
from nattrace.ingest.compressed import MAX_DEPTH, DecompressedStream, compression_of
from nattrace.ingest.decode import comparable_bytes, decode, tunnel_header_bytes
from nattrace.ingest.link import LINK_HEADER_BYTES
from nattrace.ingest.pcap import MAGICS as PCAP_MAGICS
from nattrace.ingest.pcap import PcapReader
from nattrace.ingest.pcapng import MAGIC as PCAPNG_MAGIC
from nattrace.ingest.pcapng import PcapngReader
from nattrace.ingest.points import PointList
from nattrace.ingest.quotes import read_quotes
from nattrace.ingest.source import Batch, Inner

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from nattrace.ingest.chunks import Readable
    from nattrace.ingest.source import ReadOptions, Records

#: Bytes looked at to tell what a file is: a tar archive's magic is the last of them, at byte 257, and text
#: is judged by its first lines.
SNIFF_BYTES = 512

#: IP bytes of a packet that no capture cut; the largest datagram there is.
_ALL_BYTES = 65535

#: A snaplen from which on every header that matching looks at is whole, behind four tunnels as well.
_AMPLE_SNAPLEN = 1024


class InputStream(io.RawIOBase):
    """A file whose first bytes were already looked at: gives them again, then the rest."""

    def __init__(self, source: Readable, label: str, *, owned: BinaryIO | io.RawIOBase | None = None) -> None:
        """Take a source; closing this stream closes `owned`, which is None for what the caller opened."""
        super().__init__()
        self._owned = owned
        self._label = label
        head = bytearray(SNIFF_BYTES)
        size = 0
        try:
            # One read of the system at a time: a buffered reader's readinto waits until it is full, and an
            # interrupt that arrives between two of its reads waits with it.
            self._read = getattr(source, "readinto1", source.readinto)
            while size < SNIFF_BYTES and (got := self._read(memoryview(head)[size:])):
                size += got
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{label}: cannot be read: {error}") from error
        self.head = bytes(head[:size])
        self._pending = memoryview(self.head)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: object, /) -> int | None:
        """Fill the buffer: from the first bytes while there are some, then from the file."""
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if not self._pending:
            return cast("int | None", self._read(target))
        size = min(len(target), len(self._pending))
        target[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def close(self) -> None:
        """Close the file, unless the caller opened it."""
        if self._owned is not None:
            self._owned.close()
        super().close()


@dataclass(slots=True)
class OpenFile:
    """A file opened, with its compression removed: what a format reader starts from."""

    label: str
    stream: InputStream
    compressed: DecompressedStream | None
    member: MemberStream | None = None

    @property
    def damage(self) -> str | None:
        """What is wrong with the archive or the compressed stream around it, as far as it was read."""
        outside = self.member.damage if self.member is not None else None
        return outside or (self.compressed.damage if self.compressed is not None else None)

    def close(self) -> None:
        """Close the file, unless the caller opened it."""
        self.stream.close()


def label_of(file: Path | Member | BinaryIO) -> str:
    """Return what messages and reports call a file: its path as given, or ``-`` for a stream without one."""
    if isinstance(file, Path):
        return str(file)
    if isinstance(file, Member):
        return file.label
    name = getattr(file, "name", None)
    return name if isinstance(name, str) and name != "<stdin>" else "-"


def open_file(file: Path | Member | BinaryIO) -> OpenFile:
    """Open a file and take off its compression, found by magic bytes and never by suffix.

    At most MAX_DEPTH compressions are taken off; what is compressed still is so in ``stream.head``.

    Raises
    ------
    InputError
        The file is missing, not readable, or opened as text.
    """
    label = label_of(file)
    owned: BinaryIO | MemberStream | None = None
    if isinstance(file, Member):
        owned = file.open()
    elif isinstance(file, Path):
        try:
            owned = file.open("rb", buffering=0)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{label}: {reason}") from error
    stream = InputStream(cast("Readable", owned or file), label, owned=owned)
    compressed = None
    for _ in range(MAX_DEPTH):
        if compression_of(stream.head) is None:
            break
        compressed = DecompressedStream(stream, stream.head, compressed)
        stream = InputStream(compressed, label, owned=compressed)
    return OpenFile(label, stream, compressed, owned if isinstance(owned, MemberStream) else None)


class _Files:
    """The files of one source and what was wrong with them; `chunks` reads them one after the other."""

    def __init__(self, files: tuple[Path | Member | BinaryIO, ...], points: PointList) -> None:
        self._files = files
        self._points = points
        self.damage: list[str] = []

    def chunks(self, opened: OpenFile) -> Generator[list[Records], None, None]:
        """Yield the records of all files, a chunk at a time; `opened` is the first file."""
        frames = 0
        try:
            for number, file in enumerate(self._files):
                if number:
                    opened = open_file(file)
                reader = self._reader(opened, frames)
                yield from reader.chunks()
                opened.close()
                frames = reader.frames
                damage = opened.damage or reader.damage
                if damage is not None:
                    self.damage.append(damage if len(self._files) == 1 else f"{opened.label}: {damage}")
        finally:
            opened.close()

    def _reader(self, opened: OpenFile, frames: int) -> PcapReader | PcapngReader:
        head = opened.stream.head
        if is_pcap(head):
            return PcapReader(opened.stream, opened.label, self._points, frames)
        if is_pcapng(head):
            return PcapngReader(opened.stream, opened.label, self._points, frames)
        raise InputError(
            f"{opened.label}: byte 0: no pcap or pcapng file, unlike the first of its point;"
            " give it a NAME= of its own"
        )


class FileCapture:
    """The pcap or pcapng files of one source, in order, as one capture.

    Frame numbers go on from one file to the next, as they do when the files are merged.

    Parameters
    ----------
    files
        The files of a rotated capture in the order of their packets; normally just one.
    first
        The first of them, already opened; closed when it is read.
    base
        The point's name, or the start of the names when there are several.
    named
        Whether the user gave that name.

    Raises
    ------
    InputError
        The first file is damaged before its first record.
    """

    def __init__(
        self, files: tuple[Path | Member | BinaryIO, ...], first: OpenFile, base: str, *, named: bool
    ) -> None:
        label = first.label if len(files) == 1 else f"{first.label} (+{len(files) - 1})"
        points = PointList(base, label, named=named)
        self.points = points.points  #: grows as interfaces turn up
        self._files = _Files(files, points)
        # A generator that does not know this object, so that dropping the capture closes the file at once.
        self._chunks = self._files.chunks(first)
        # The first chunk says which points there are and how far packets were cut. It stays in its buffer
        # until `batches` asks for the next one, so a pipe needs no second pass.
        self._first_chunk: list[Records] | None = next(self._chunks, None)
        points.ensure_one()

    @property
    def link_types(self) -> frozenset[int]:
        """LINKTYPE_ numbers in the first chunk."""
        return frozenset(records.link_type for records in self.first_records())

    def first_records(self) -> list[Records]:
        """Return the records of the first chunk, without using them up."""
        return self._first_chunk or []

    def comparable_bytes(self) -> int:
        """Return the IP bytes that this capture holds of its most truncated packet, 65535 if none is cut.

        Looks at the first chunk, and at the snaplens in the headers: one cuts every packet alike, even when
        no packet of the first chunk is long enough to show it. A snaplen that the chunk's packets exceed
        means nothing.
        """
        found = [_ALL_BYTES]
        for records in self.first_records():
            found.append(comparable_bytes(records))
            snaplen, header = self.points[records.point].snaplen, LINK_HEADER_BYTES.get(records.link_type)
            if snaplen and header is not None and int(records.captured_length.max(initial=0)) <= snaplen:
                if snaplen < _AMPLE_SNAPLEN:
                    header = max(header, tunnel_header_bytes(records))
                found.append(max(snaplen - header, 0))
        return min(found)

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        """Decode the packets in file order, a chunk at a time; to be called once.

        Raises InputError when the file system fails or the capture holds too many interfaces.
        """
        for records in self.records():
            inner: list[list[Inner]] = []
            table, skipped = decode(records, options, inner)
            info = self.points[records.point]
            info.decoded += len(table)
            info.skipped.update(skipped)
            info.openings.note(records, table)
            yield Batch(
                records.point,
                table,
                quotes=read_quotes(records, table, options),
                inner=tuple(
                    replace(part, quotes=read_quotes(records, part.table, options, depth))
                    for depth, part in enumerate(map(Inner.concatenate, inner), 1)
                ),
            )

    def records(self) -> Iterator[Records]:
        """Give the packets as raw records, valid until the next ones; `batches` decodes these.

        Counts packets, times and damage in `points`, and closes the file at the end.
        """
        try:
            chunk = self._first_chunk
            self._first_chunk = None
            while chunk is not None:
                for records in chunk:
                    self._count(records)
                    yield records
                chunk = next(self._chunks, None)
            self._conclude()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file that is open; for a capture whose packets are not wanted after all."""
        self._chunks.close()

    def _count(self, records: Records) -> None:
        info = self.points[records.point]
        info.packets += records.frame.size
        # Simple packet blocks have no time; 0 stands for it and is no instant of theirs.
        times = records.time_ns if records.time_ns.all() else records.time_ns[records.time_ns != 0]
        if times.size:
            first, last = int(times.min()), int(times.max())
            info.first_ns = first if info.first_ns is None else min(info.first_ns, first)
            info.last_ns = last if info.last_ns is None else max(info.last_ns, last)

    def _conclude(self) -> None:
        for info in self.points:
            info.openings.conclude()
            if self._files.damage:
                info.truncated = True
                info.damage = self._files.damage[0]
            info.dated = info.first_ns is not None or not info.packets


def is_pcap(head: bytes) -> bool:
    """Tell whether a file that begins so is a pcap file."""
    return head[:4] in PCAP_MAGICS


def is_pcapng(head: bytes) -> bool:
    """Tell whether a file that begins so is a pcapng file."""
    return head.startswith(PCAPNG_MAGIC)

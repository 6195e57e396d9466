"""Compressed captures as plain byte streams: gzip, bzip2, xz and zstandard, by their magic bytes.

Decompresses forward in bounded pieces, so memory does not depend on the file; never seeks and never writes.
A cut or corrupt stream gives what could be read before the damage, and says so in `damage`.
"""

from __future__ import annotations

import bz2
import io
import lzma
import sys
import zlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from nattrace.ingest.chunks import Readable

#: Formats inside formats that are opened: a .gz that was compressed again by a ticket system is real,
#: more layers only ever come from somebody who wants to know what happens.
MAX_DEPTH = 2

#: Bytes that any file may decompress to. Beyond them the ratio counts: captures of real traffic shrink 2 to
#: 30 times, a million identical packets 500 times (and fit the free amount), deflate's worst is 1032.
FREE_BYTES = 256 << 20
MAX_RATIO = 200

#: Bytes after which no stream is read on: 600 million packets at snaplen 96, an hour of decoding.
MAX_BYTES = 64 << 30

#: xz -9 needs 65 MiB; zstd refuses windows over 128 MiB without --long, and so do we.
_MEMORY_BYTES = 128 << 20

_INPUT_BYTES = 64 << 10
_OUTPUT_BYTES = 256 << 10


class _Decompressor(Protocol):
    """What bz2, lzma and compression.zstd call a decompressor; the other two are adapted to it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's object in the shape of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full answer may leave more inside zlib even when it has taken all input.
        self.needs_input = not self._inner.unconsumed_tail and len(out) < max_length
        return out


class _Zstandard:
    """The zstandard package, fed in pieces so small that their output stays bounded."""

    #: zstd's densest block is 4 bytes for 128 KiB (RFC 8878 section 3.1.1.2): 512 bytes give 16 MiB at most.
    _PIECE_BYTES = 512

    def __init__(self) -> None:
        import zstandard  # noqa: PLC0415 - 3.14 has its own, and most captures are not compressed

        self._inner = zstandard.ZstdDecompressor(max_window_size=_MEMORY_BYTES).decompressobj()
        self._error = zstandard.ZstdError
        self._waiting = b""
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data) + self._waiting

    def decompress(self, data: bytes, max_length: int) -> bytes:
        waiting = memoryview(self._waiting + data)
        out: list[bytes] = []
        size = 0
        while waiting and not self.eof and size < max_length:
            try:
                out.append(self._inner.decompress(bytes(waiting[: self._PIECE_BYTES])))
            except self._error as error:
                raise zlib.error(str(error)) from error
            size += len(out[-1])
            waiting = waiting[self._PIECE_BYTES :]
        self._waiting = bytes(waiting)
        self.needs_input = not self._waiting
        return b"".join(out)


def _zstandard() -> _Decompressor:
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415 - new in 3.14

        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})
    return _Zstandard()


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)


_FORMATS: dict[bytes, tuple[str, Callable[[], _Decompressor]]] = {
    b"\x1f\x8b": ("gzip", _Gzip),
    b"BZh": ("bzip2", bz2.BZ2Decompressor),
    b"\xfd7zXZ\x00": ("xz", _xz),
    b"\x28\xb5\x2f\xfd": ("zstandard", _zstandard),
}

#: compression.zstd has an error class of its own that derives from Exception only.
_ERRORS: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError

    _ERRORS = (*_ERRORS, ZstdError)


def compression_of(head: bytes) -> str | None:
    """Return the compression that a file's first bytes announce: gzip, bzip2, xz, zstandard, or None."""
    return next((name for magic, (name, _) in _FORMATS.items() if head.startswith(magic)), None)


class DecompressedStream(io.RawIOBase):
    """The plain bytes of a compressed stream, all its members one after the other.

    Reading never raises for what is in the stream: it ends, and `damage` says why, as one phrase.
    """

    def __init__(self, source: Readable, head: bytes, outer: DecompressedStream | None = None) -> None:
        """Take the compressed `source`, whose first bytes are `head` and are still to be read from it.

        `outer` is the stream that `source` comes out of, when it was compressed twice.
        """
        super().__init__()
        self._source = source
        self._outer = outer
        self._magic, (self._name, self._new) = next(
            (magic, made) for magic, made in _FORMATS.items() if head.startswith(magic)
        )
        self._inner = self._new()
        self._input = memoryview(bytearray(_INPUT_BYTES))
        self._ready = memoryview(b"")
        self._finished = False
        self.read_bytes = 0  #: compressed bytes taken
        self.plain_bytes = 0  #: plain bytes made
        self.damage: str | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes taken from the outermost layer, which is what a ratio has to be measured against."""
        return self._outer.file_bytes if self._outer is not None else self.read_bytes

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: object, /) -> int:
        """Fill the buffer as far as one decompressed piece reaches; 0 at the end or at the damage."""
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._ready:
            if self._finished:
                return 0
            self._ready = memoryview(self._next_piece())
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        """Close the source too, when it is a stream of ours."""
        if isinstance(self._source, io.RawIOBase):
            self._source.close()
        super().close()

    def _next_piece(self) -> bytes:
        try:
            data = b""
            if self._inner.eof:
                return self._next_member()
            if self._inner.needs_input:
                data = self._take()
                if not data:
                    return self._end_of_input()
            piece = self._inner.decompress(data, _OUTPUT_BYTES)
        except _ERRORS as error:
            what = str(error) or type(error).__name__
            self._end(f"the {self._name} stream is corrupt after {self.plain_bytes} plain bytes: {what}")
            return b""
        self.plain_bytes += len(piece)
        if self.plain_bytes > FREE_BYTES and self.plain_bytes > MAX_RATIO * self.file_bytes:
            self._end(
                f"the {self._name} stream grows more than {MAX_RATIO} times after {self.plain_bytes} bytes;"
                " decompress it yourself if it can be trusted"
            )
        elif self.plain_bytes > MAX_BYTES:
            self._end(f"the {self._name} stream is larger than {MAX_BYTES >> 30} GiB; decompress it yourself")
        return piece

    def _take(self) -> bytes:
        size = self._source.readinto(self._input) or 0
        self.read_bytes += size
        return bytes(self._input[:size])

    def _end_of_input(self) -> bytes:
        inside = self._outer.damage if self._outer is not None else None
        self._end(inside or f"the {self._name} stream is cut after {self.plain_bytes} plain bytes")
        return b""

    def _next_member(self) -> bytes:
        """Start on the member that follows (``cat a.gz b.gz``); other bytes after the last are no one's."""
        rest = self._inner.unused_data
        while True:
            rest = rest.lstrip(b"\0")  # xz and tapes pad with zeros
            if len(rest) >= len(self._magic):
                break
            more = self._take()
            if not more:
                self._finished = True
                return b""
            rest += more
        if not rest.startswith(self._magic):
            self._finished = True
            return b""
        self._inner = self._new()
        piece = self._inner.decompress(rest, _OUTPUT_BYTES)
        self.plain_bytes += len(piece)
        return piece

    def _end(self, damage: str) -> None:
        self.damage = damage
        self._finished = True

"""The headers of a tar stream: which files it holds and where their bytes lie.

Reads POSIX ustar (IEEE 1003.1-2017, pax: "ustar Interchange Format"), the pax records ``path`` and ``size``, and
GNU long names. Sparse files and links are passed over. It reads forward only and never extracts; Python's own
tarfile is not used because it reads a pax header of any claimed size into memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nattrace.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nattrace.ingest.chunks import Readable

BLOCK_BYTES: Final = 512

#: Bytes of a pax header or a GNU long name. Linux paths have at most 4096 bytes; pax keeps some more there.
_MAX_EXTENSION_BYTES: Final = 1 << 16

#: Bytes that a stream may claim for one member: 64 GiB, as much as a compressed stream is read.
_MAX_MEMBER_BYTES: Final = 64 << 30

_SKIP_BYTES: Final = 1 << 20

_REGULAR: Final = frozenset(b"0\x007")
_GNU_LONG_NAME, _PAX, _PAX_GLOBAL = ord("L"), ord("x"), ord("g")


def is_tar(head: bytes) -> bool:
    """Tell whether a file that begins so is a tar archive: the magic at byte 257 and the header's checksum."""
    return head[257:262] == b"ustar" and len(head) >= BLOCK_BYTES and _checksum_holds(head[:BLOCK_BYTES])


def walk(stream: Readable, label: str) -> Iterator[tuple[str, int, int]]:
    """Give name, size and offset of every regular file of a tar stream, in bytes from its beginning.

    A stream that ends inside a member ends the walk: the members before it are whole, and that one is given too.
    Raises InputError where a header is damaged.
    """
    reader = _Reader(stream)
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        at = reader.position
        header = reader.take(BLOCK_BYTES)
        if len(header) < BLOCK_BYTES or not any(header):
            return  # the end: two blocks of zeros, or no more bytes
        if not _checksum_holds(header):
            raise InputError(f"{label}: byte {at}: damaged tar header; unpack it and give the capture files")
        size = _number(header[124:136])
        if "size" in pax and header[156] in _REGULAR:
            size = int(pax["size"]) if pax["size"].isdecimal() and len(pax["size"]) < 19 else -1
        if not 0 <= size <= _MAX_MEMBER_BYTES:
            raise InputError(f"{label}: byte {at}: a member of impossible size; pack it again")
        padded = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        kind = header[156]
        if kind in (_GNU_LONG_NAME, _PAX, _PAX_GLOBAL):
            if size > _MAX_EXTENSION_BYTES:
                raise InputError(f"{label}: byte {at}: a name of {size} bytes; pack it again")
            data = reader.take(padded)[:size]
            if kind == _GNU_LONG_NAME:
                long_name = _text(data)
            elif kind == _PAX:
                pax = _pax_records(data)
            continue
        if kind in _REGULAR:
            # star and GNU tar mark sparse files so that their stored bytes are not the file's bytes.
            if not any(key.startswith("GNU.sparse") for key in pax):
                yield pax.get("path") or long_name or _name(header), size, reader.position
            reader.skip(padded)
        else:
            # Links and devices have no bytes, whatever their size field says; other kinds do.
            reader.skip(0 if kind in b"123456" else padded)
        long_name, pax = None, {}


class _Reader:
    """A forward stream with its position."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._scratch = memoryview(bytearray(_SKIP_BYTES))
        self.position = 0

    def take(self, size_bytes: int) -> bytes:
        taken = bytearray()
        while len(taken) < size_bytes and (got := self._read(size_bytes - len(taken))):
            taken += self._scratch[:got]
        return bytes(taken)

    def skip(self, size_bytes: int) -> None:
        while size_bytes and (got := self._read(size_bytes)):
            size_bytes -= got

    def _read(self, at_most: int) -> int:
        try:
            got = self._stream.readinto(self._scratch[: min(at_most, _SKIP_BYTES)]) or 0
        except (OSError, ValueError):
            return 0  # what lies behind is missing, as if the file were cut here
        self.position += got
        return got


def _checksum_holds(header: bytes) -> bool:
    claimed = _number(header[148:156])
    return claimed == sum(header[:148]) + sum(header[156:]) + 8 * 0x20


def _number(field: bytes) -> int:
    """Return a numeric field: octal digits, or base 256 where the first bit is set (GNU tar); -1 for neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    return (
        int(digits, 8) if digits and all(0x30 <= digit <= 0x37 for digit in digits) else (-1 if digits else 0)
    )


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    r"""Return the records ``LENGTH KEY=VALUE\n`` of a pax header; reading ends at the first that is none."""
    records: dict[str, str] = {}
    while data:
        digits, space, _ = data[:21].partition(b" ")
        if not space or not digits.isdigit():
            break
        length = int(digits)
        record = data[len(digits) + 1 : length]
        if length > len(data) or length <= len(digits) + 1 or not record.endswith(b"\n"):
            break
        key, _, value = record[:-1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records

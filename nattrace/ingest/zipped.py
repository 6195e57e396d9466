"""Zip archives (PKWARE APPNOTE.TXT): their directory, and members as streams. Never extracts, never decrypts."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, Final

from nattrace.errors import InputError
from nattrace.ingest.compressed import FREE_BYTES, MAX_RATIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Bytes of an archive's directory: 10,000 entries with long names. Python makes an object of each.
_MAX_DIRECTORY_BYTES: Final = 4 << 20
#: End of central directory record: signature, 4 counts, size, offset, length of the comment (APPNOTE 4.3.16).
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")
_LONGEST_COMMENT: Final = 65535
_PIECE_BYTES: Final = 1 << 18


def entries(path: Path) -> Iterator[tuple[str, int]]:
    """Give name and size in bytes of every file in the archive; InputError where its directory is damaged."""
    with _open_zip(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size


def open_member(path: Path, name: str) -> io.RawIOBase:
    """Open the file `name` in the archive as a stream; InputError where it cannot be read safely."""
    archive = _open_zip(path)
    try:
        info = archive.getinfo(name)
        # Only deflate gives its output in pieces that zipfile bounds.
        if info.flag_bits & 1 or info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            what = "is encrypted" if info.flag_bits & 1 else "uses a rare compression"
            raise InputError(f"{path}/{name}: {what}; unpack it and give the capture files")  # noqa: TRY301
        if info.file_size > FREE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
            raise InputError(  # noqa: TRY301
                f"{path}/{name}: grows more than {MAX_RATIO} times; unpack it yourself if it can be trusted"
            )
        return _ZipMember(archive, archive.open(info))
    except InputError:
        archive.close()
        raise
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        archive.close()
        raise InputError(f"{path}/{name}: {error}; unpack the archive and give the capture files") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive whose directory is of a sensible size: zipfile reads all of it at once."""
    unreadable = f"{path}: a zip archive; unpack it and give the capture files"
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _END_OF_DIRECTORY.size - _LONGEST_COMMENT))
            tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END_OF_DIRECTORY.size:
            raise InputError(f"{unreadable} (it is cut: its directory is missing)")
        directory_bytes = _END_OF_DIRECTORY.unpack_from(tail, at)[5]
        # A zip64 archive has 0xffffffff here. Its directory is beyond any limit as well.
        if directory_bytes > _MAX_DIRECTORY_BYTES:
            raise InputError(f"{unreadable} (its directory has {directory_bytes} bytes)")
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InputError(f"{unreadable} (its directory is damaged: {error})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


class _ZipMember(io.RawIOBase):
    """A zip member that closes its archive with itself."""

    def __init__(self, archive: zipfile.ZipFile, stream: IO[bytes]) -> None:
        super().__init__()
        self._archive = archive
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        try:
            piece = self._stream.read(min(len(target), _PIECE_BYTES))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise OSError(str(error)) from error
        target[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        self._archive.close()
        super().close()

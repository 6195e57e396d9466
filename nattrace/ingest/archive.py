"""Archives (.tar with any compression, .zip) as lists of members that are read in place.

Nothing is ever extracted: a member is opened as a stream of its own, which starts at the archive's beginning where
the compression leaves no other way. Links, devices and folders inside an archive are no members. What a header
claims is checked against what is there; names are only compared, never used as paths.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from nattrace.errors import InputError
from nattrace.ingest.tar import is_tar, walk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nattrace.ingest.chunks import Readable

    Damage = Callable[[], str | None]

#: Members of an archive that are looked at. A bundle has a few for each point.
MAX_MEMBERS: Final = 10_000

ZIP_MAGIC: Final = b"PK\x03\x04"
_EMPTY_ZIP_MAGIC: Final = b"PK\x05\x06"
_SKIP_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside an archive. It may be opened any number of times; every stream is independent."""

    archive: Path
    name: str
    size_bytes: int
    offset: int | None  #: of its first byte in the tar stream; None in a zip archive

    @property
    def label(self) -> str:
        """What messages and reports call it: the archive's path and its name inside."""
        return f"{self.archive}/{self.name}"

    def open(self) -> MemberStream:
        """Open the member; InputError when the archive cannot be read any more."""
        if self.offset is None:
            from nattrace.ingest.zipped import open_member  # noqa: PLC0415 - zipfile takes 5 ms to load

            return MemberStream(open_member(self.archive, self.name), self.size_bytes, None)
        from nattrace.ingest.capture import open_file  # noqa: PLC0415 - which opens members in turn

        opened = open_file(self.archive)
        stream = MemberStream(opened.stream, self.size_bytes, lambda: opened.damage)
        stream.skip(self.offset)
        return stream


class MemberStream(io.RawIOBase):
    """The bytes of one member. Reading ends at damage, and `damage` says what it was."""

    def __init__(self, source: Readable, size_bytes: int, damage_of: Damage | None) -> None:
        super().__init__()
        self._source = source
        self._left = size_bytes
        self._damage_of = damage_of
        self._damage: str | None = None

    @property
    def damage(self) -> str | None:
        """What was wrong with the archive, as far as it was read; None while nothing was."""
        return self._damage

    def readable(self) -> bool:
        """Return True."""
        return True

    def skip(self, size_bytes: int) -> None:
        """Pass over bytes that lie before the member."""
        scratch = memoryview(bytearray(min(size_bytes, _SKIP_BYTES)))
        while size_bytes:
            got = self._read(scratch[: min(size_bytes, _SKIP_BYTES)])
            if not got:
                self._left = 0
                return
            size_bytes -= got

    def readinto(self, buffer: object, /) -> int:
        """Fill the buffer as far as one read reaches; 0 at the member's end or at damage."""
        target = memoryview(buffer).cast("B")[: self._left]  # type: ignore[arg-type]
        if not target:
            return 0
        got = self._read(target)
        self._left -= got
        return got

    def close(self) -> None:
        """Close the archive too."""
        cast("io.IOBase", self._source).close()
        super().close()

    def _read(self, target: memoryview) -> int:
        try:
            got = self._source.readinto(target) or 0
        except (OSError, ValueError) as error:
            self._damage = f"the archive is damaged inside it: {error}"
            self._left = 0
            return 0
        if not got and self._damage is None:
            outside = self._damage_of() if self._damage_of is not None else None
            self._damage = outside or "the archive ends inside it"
        return got


def is_archive(path: Path) -> bool:
    """Tell by its first bytes whether a regular file is an archive; pipes are not touched."""
    if not path.is_file():
        return False
    from nattrace.ingest.capture import open_file  # noqa: PLC0415 - which opens members in turn

    try:
        opened = open_file(path)
    except InputError:
        return False
    opened.close()
    return _is_zip(opened.stream.head) or is_tar(opened.stream.head)


def members_of(path: Path) -> list[Member]:
    """Return the regular files in an archive, in its order; of several with one name the last, as tar would.

    Raises
    ------
    InputError
        The archive has no readable directory, no member, or more than MAX_MEMBERS.
    """
    from nattrace.ingest.capture import open_file  # noqa: PLC0415 - which opens members in turn

    opened = open_file(path)
    try:
        if _is_zip(opened.stream.head):
            from nattrace.ingest.zipped import entries  # noqa: PLC0415 - zipfile takes 5 ms to load

            found = (Member(path, name, size_bytes, None) for name, size_bytes in entries(path))
        else:
            found = (
                Member(path, name.removeprefix("./"), size_bytes, offset)
                for name, size_bytes, offset in walk(opened.stream, str(path))
            )
        members: dict[str, Member] = {}
        for number, member in enumerate(found):
            if number == MAX_MEMBERS:
                raise InputError(
                    f"{path}: more than {MAX_MEMBERS} files; unpack it and give the capture files"
                )
            members[member.name] = member
    finally:
        opened.close()
    if not members:
        raise InputError(f"{path}: {opened.damage or 'an archive without files'}; pack it again")
    return list(members.values())


def _is_zip(head: bytes) -> bool:
    return head.startswith((ZIP_MAGIC, _EMPTY_ZIP_MAGIC))

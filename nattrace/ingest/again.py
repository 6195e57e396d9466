"""Again: whether sources can be read a second time, and reading them again from where they began.

A regular file can; a pipe, a FIFO or a process substitution cannot. An open file is set back to where it stood
when it was given. Nothing here reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nattrace.ingest.archive import Member
from nattrace.ingest.capture import label_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.ingest.source import Source


class Bookmark:
    """Where the files of some sources begin; to be made before they are opened."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._starts: list[tuple[BinaryIO, int]] = []
        self.lost: list[str] = []  #: labels of the files that can be read only once
        for source in sources:
            for file in source.files:
                if isinstance(file, Member):
                    continue  # its archive is a regular file
                if isinstance(file, Path):
                    if not file.is_file():  # follows links: /dev/stdin may be a file or a pipe
                        self.lost.append(str(file))
                    continue
                start = _place(file)
                if start is None:
                    self.lost.append(label_of(file))
                else:
                    self._starts.append((file, start))

    def rewind(self) -> bool:
        """Set the open files back; False when some source cannot be read again."""
        if self.lost:
            return False
        try:
            for file, start in self._starts:
                file.seek(start)
        except (OSError, ValueError):
            return False
        return True


def _place(file: BinaryIO) -> int | None:
    """Return where an open file stands; None where it cannot be set back."""
    try:
        return file.tell() if file.seekable() else None
    except (AttributeError, OSError, ValueError):
        return None

"""A file that is written whole or not at all.

The text goes to a temporary file beside the target, which takes the target's place in one step when all of it
is written; an interrupt or a full disk leaves the target as it was and no temporary file. Never follows a
file that somebody else may have put in its way, and never replaces a device or a pipe.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Open `path` for UTF-8 text with LF line ends; it appears, complete, when the block ends without error.

    A symbolic link stays one: its target is replaced. A device or pipe (``/dev/stdout``, ``/dev/null``) cannot
    be replaced and is written directly. An existing file keeps its permissions; a new one has those of the
    umask. OSError names `path`, never the temporary file, which is gone by then.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with target.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
        return
    # The target's own name may be as long as a name can be (255 bytes), so it is no part of this one.
    temporary = target.parent / f".nattrace-{os.urandom(8).hex()}.tmp"
    # O_EXCL: the name is new, and nobody else's link.
    with _errors_naming(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as stream:  # noqa: PTH123 - a descriptor
            yield stream
        with _errors_naming(path):
            if mode is not None:
                temporary.chmod(stat.S_IMODE(mode))
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def _errors_naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

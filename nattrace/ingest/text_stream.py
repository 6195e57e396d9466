"""Lines of a byte stream: decoded, freed of quoting and colours, and never longer than a limit.

Reads forward only and keeps one line; it knows nothing of packets.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nattrace.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

#: Bytes of a line that are read; the rest of it is passed over. tcpdump's longest (SMB, BGP) stay under 16 KiB.
MAX_LINE_BYTES = 1 << 16
_READ_BYTES = 1 << 16
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_QUOTE = re.compile(r"(?:> ?){1,16}")


def read_lines(stream: BinaryIO, label: str) -> Iterator[str]:
    """Yield the lines of a binary stream, without line ends, BOM and colours, at most MAX_LINE_BYTES of each.

    Bytes that are not UTF-8 become U+FFFD. Raises InputError when reading fails.
    """
    pending = b""
    overlong = False  # the rest of an overlong line is still to come
    position = 0
    while True:
        try:
            block = stream.read(_READ_BYTES)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{label}: reading fails after byte {position}: {error}") from error
        if not block:
            break
        if not position:
            block = block.removeprefix(b"\xef\xbb\xbf")
        position += len(block)
        lines = (pending + block).split(b"\n")
        pending = lines.pop()
        if overlong and lines:
            lines.pop(0)
            overlong = False
        for line in lines:
            yield _text(line)
        if overlong:
            pending = b""
        elif len(pending) > MAX_LINE_BYTES:
            yield _text(pending)
            pending, overlong = b"", True
    if pending and not overlong:
        yield _text(pending)


def _text(line: bytes) -> str:
    text = line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r\n")
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    if text.startswith(">") and (quote := _QUOTE.match(text)) is not None:
        text = text[quote.end() :]
    return text

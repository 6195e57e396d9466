"""From command-line arguments to opened captures: which files, which points, which format.

Formats are told by magic bytes, never by suffix. Nothing is read twice except the first packet's time of
rotated files, and nothing that came from a pipe is read twice at all.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nattrace.errors import InputError, UsageError
from nattrace.ingest.archive import Member, is_archive
from nattrace.ingest.capture import FileCapture, is_pcap, is_pcapng, label_of, open_file
from nattrace.ingest.compressed import compression_of
from nattrace.ingest.link import KNOWN_LINK_TYPES
from nattrace.ingest.source import Capture, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.ingest.capture import OpenFile
    from nattrace.ingest.source import PointFacts, ReadOptions

#: Suffixes that are no part of a point's name: formats, then compressions around them.
_FORMAT_SUFFIXES = frozenset({".pcap", ".pcapng", ".cap", ".ntar", ".dump", ".dmp", ".txt", ".log"})
_COMPRESSION_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})

#: Formats that are recognised only to say what to do with them: magic, offset, name, advice.
_FOREIGN = (
    (b"snoop\0\0\0", 0, "a snoop capture", "convert it: editcap -F pcap IN OUT"),
    (b"RTSS", 0, "a Network Monitor capture", "convert it: editcap -F pcap IN OUT"),
    (b"GMBU", 0, "a Network Monitor capture", "convert it: editcap -F pcap IN OUT"),
    (b"PK\x03\x04", 0, "a zip archive", "save it to a file and give its path"),
    (b"ustar", 257, "a tar archive", "unpack it and give the capture files"),
    (b"\x04\x22\x4d\x18", 0, "lz4-compressed", "decompress it first: unlz4 IN OUT"),
    (b"\x1f\x9d", 0, "compress(1) output", "decompress it first: uncompress IN"),
    (b"\xcb\xc3\xb2\xa1", 0, "a BPF program, not packets", "give the capture it was made for"),
)

#: Control characters that printed text has: tab, line ends, form feed, escape (coloured output).
_TEXT_CONTROLS = frozenset(b"\t\n\r\x0c\x1b")


def parse_sources(
    arguments: Sequence[str | os.PathLike[str] | BinaryIO], notes: list[str] | None = None
) -> list[Source]:
    """Return the sources that the arguments name, in their order.

    An argument is PATH, NAME=PATH (unless a file of that whole name exists), ``-`` for standard input, or an
    open binary file; PATH may be a bundle, or a folder or archive that holds capture files. Several arguments
    with the same NAME= are the rotated files of one point. What bundles say is wrong with them is appended to
    `notes`, one line each.

    Raises
    ------
    UsageError
        No argument at all, standard input twice, or an empty NAME or PATH.
    InputError
        A file does not exist, a folder or an archive holds no capture, or a manifest cannot be right.
    """
    if not arguments:
        raise UsageError("no source given; name a capture file, or - for standard input")
    sources: list[Source] = []
    named: dict[str, int] = {}
    stdin_used = False
    for argument in arguments:
        name: str | None = None
        files: list[Path | Member | BinaryIO]
        if isinstance(argument, (str, os.PathLike)):
            text = os.fspath(argument)
            if isinstance(argument, str):
                name, text = split_name(text)
            if text == "-":
                if stdin_used:
                    raise UsageError("-: standard input can be only one source")
                stdin_used = True
                buffer = getattr(sys.stdin, "buffer", None)
                if buffer is None:  # started with <&-
                    raise UsageError("-: standard input is closed; give a file")
                files = [buffer]
            elif (archived := _archived(text)) is not None:
                from nattrace.ingest.bundles import sources_of  # noqa: PLC0415 - most sources are single files

                found = sources_of(archived, name, [] if notes is None else notes)
                if name is None or found[0].facts is not None:
                    sources += found
                    continue
                files = list(found[0].files)
            else:
                files = [Path(text)]
        else:
            files = [argument]
        if name is None:
            sources += [Source((file,)) for file in files]
        elif name in named:
            index = named[name]
            sources[index] = Source((*sources[index].files, *files), name)
        else:
            named[name] = len(sources)
            sources.append(Source(tuple(files), name))
    return sources


def split_name(argument: str) -> tuple[str | None, str]:
    """Return NAME and PATH of NAME=PATH, or None and the whole; UsageError where one of the two is empty."""
    name, equals, path = argument.partition("=")
    if not equals or "/" in name or _exists(argument):
        return None, argument
    if not name or not path:
        raise UsageError(f"{argument}: expected NAME=PATH, such as eth0=capture.pcap")
    return name, path


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long a name, a NUL byte
        return False


def _archived(text: str) -> Path | None:
    """Return the folder or archive at a path, None where there is something else; InputError for nothing."""
    if not _exists(text):
        raise InputError(f"{text}: no such file; give a capture file, NAME=FILE or -")
    path = Path(text)
    return path if path.is_dir() or is_archive(path) else None


def open_capture(source: Source, options: ReadOptions) -> Capture:
    """Open a source and find out by its first bytes what it is.

    Reads up to one chunk, so that the points of a small capture are known at once. With the dissector
    ``tshark``, files with a link type that nattrace does not decode are handed to tshark.

    Raises
    ------
    InputError
        A file is missing, empty, of an unknown format, or damaged before its first record.
    MissingToolError
        tshark was asked for and is not there.
    """
    files = source.files if len(source.files) == 1 else _in_order_of_time(source.files)
    opened = open_file(files[0])
    base = source.name or stem_of(files[0])
    try:
        head = opened.stream.head
        if is_pcap(head) or is_pcapng(head):
            capture = FileCapture(files, opened, base, named=source.name is not None and source.facts is None)
            _state(source.facts, capture)
            if options.dissector == "tshark" and not capture.link_types <= KNOWN_LINK_TYPES:
                capture.close()
                return _open_tshark(files, base, opened.label)
            return capture
        if len(files) == 1 and _is_text(head):
            return _open_text(opened, source.name)
        raise _unreadable(opened)  # noqa: TRY301 - the file is closed on every way out
    except BaseException:
        opened.close()
        raise


def _state(facts: PointFacts | None, capture: FileCapture) -> None:
    """Add what the manifest knows and the file does not; one file of several interfaces speaks for itself."""
    if facts is None or len(capture.points) != 1:
        return
    (info,) = capture.points
    info.interface = info.interface or facts.interface
    if info.dropped_by_kernel is None:
        info.dropped_by_kernel = facts.dropped_by_kernel


def _open_text(opened: OpenFile, name: str | None) -> Capture:
    from nattrace.ingest.text import TextCapture  # noqa: PLC0415 - most sources are not text

    label = "stdin" if opened.label == "-" else opened.label
    return TextCapture(io.BufferedReader(opened.stream), name, label)


def _open_tshark(files: tuple[Path | Member | BinaryIO, ...], base: str, label: str) -> Capture:
    from nattrace.ingest.tshark import TsharkCapture  # noqa: PLC0415 - loads pyshark, and on request only

    if len(files) > 1 or not isinstance(files[0], Path):
        raise InputError(
            f"{label}: tshark reads single files only; save it to a file, or merge with mergecap"
        )
    return TsharkCapture(files[0], base, label)


def _in_order_of_time(files: tuple[Path | Member | BinaryIO, ...]) -> tuple[Path | Member | BinaryIO, ...]:
    """Sort the files of a rotated capture by their first packet; files without packets come first."""

    def key(file: Path | Member | BinaryIO) -> tuple[int, str]:
        return (_first_time_ns(file), label_of(file))

    if not all(isinstance(file, (Path, Member)) for file in files):
        return files  # a stream cannot be looked at without using it up: the given order counts
    return tuple(sorted(files, key=key))


def _first_time_ns(file: Path | Member | BinaryIO) -> int:
    opened = open_file(file)
    if not is_pcap(opened.stream.head) and not is_pcapng(opened.stream.head):
        opened.close()
        raise _unreadable(opened)
    capture = FileCapture((file,), opened, "", named=False)
    try:
        return min((int(records.time_ns[0]) for records in capture.first_records()), default=0)
    finally:
        capture.close()


def stem_of(file: Path | Member | BinaryIO) -> str:
    """Return the point name that a file gives: its own without the suffixes of formats and compressions."""
    label = label_of(file)
    if label == "-":
        return "stdin" if file is getattr(sys.stdin, "buffer", None) else "stream"
    path = Path(label)
    for suffixes in (_COMPRESSION_SUFFIXES, _FORMAT_SUFFIXES):
        if path.suffix.lower() in suffixes:
            path = path.with_suffix("")
    return path.name or label


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, as PowerShell redirects output
        return True
    if any(byte < 0x20 and byte not in _TEXT_CONTROLS for byte in head):
        return False
    # Printed captures are ASCII but for a name or a comment here and there, in whatever encoding.
    return sum(byte < 0x80 for byte in head) > 0.7 * len(head)


def _unreadable(opened: OpenFile) -> InputError:
    return InputError(f"{opened.label}: {_complaint(opened)}")


def _complaint(opened: OpenFile) -> str:
    """Say what a file is that cannot be read, and what to do about it."""
    head = opened.stream.head
    if not head:
        if opened.damage is not None:
            return f"{opened.damage}; copy or compress it again"
        return "byte 0: the file is empty; tcpdump writes its header late, give it -U and stop it with ctrl-C"
    for magic, offset, what, advice in _FOREIGN:
        if head.startswith(magic, offset):
            return f"byte {offset}: {what}; {advice}"
    if compression_of(head):
        return "byte 0: compressed once more; decompress it before reading"
    if len(head) < 4:
        return f"ends at byte {len(head)}, too short for a capture; capture or copy it again"
    if _is_text(head):
        return "byte 0: printed text among several files of one point; give it a NAME= of its own"
    return f"byte 0: {head[:4].hex()} begins no capture format; give pcap, pcapng or tcpdump's printed text"

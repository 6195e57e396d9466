"""Folders, archives and bundles as sources: which of their files are captures, and of which points.

With a ``manifest.json`` of nattrace's (`nattrace.bundle.manifest`) the manifest says it; without one every file
that begins like a capture is a point of its own. ``context/`` is not looked at. Names in a manifest never lead
out of the bundle: not by ``..``, not by an absolute path, not by a symbolic link.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from nattrace.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest
from nattrace.errors import InputError
from nattrace.ingest.archive import Member, members_of
from nattrace.ingest.capture import is_pcap, is_pcapng, open_file
from nattrace.ingest.source import PointFacts, Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from nattrace.bundle.manifest import Manifest, PointEntry

#: How deep in an archive its manifest may lie: ``tar czf b.tar.gz bundle/`` puts one folder around it.
_MANIFEST_DEPTH: Final = 2


def sources_of(path: Path, name: str | None, notes: list[str]) -> list[Source]:
    """Return the sources that a folder or an archive holds.

    `name` is what stood before ``NAME=``: it goes before the names of a bundle's points, and makes the captures
    of a plain folder or archive the rotated files of one point. What a bundle says is wrong with itself is
    appended to `notes`, one line each.

    Raises
    ------
    InputError
        It cannot be read, holds no capture, or its manifest cannot be right.
    """
    if path.is_dir():
        files: list[Path | Member] = [*_files_in(path)]
        manifest = _manifest_at(path / MANIFEST_NAME)
        if manifest is not None:
            return _from_manifest(manifest, path, _in_folder(path), name, notes)
        what = "a folder"
    else:
        members = members_of(path)
        found = _manifest_among(members, path)
        if found is not None:
            return _from_manifest(found[0], path, _in_archive(members, found[1]), name, notes)
        files = [*sorted(members, key=lambda member: member.name)]
        what = "an archive"
    captures = tuple(file for file in files if _looks_captured(file))
    if not captures:
        raise InputError(f"{path}: {what} without pcap or pcapng files; name the files to read")
    return [Source(captures, name)] if name is not None else [Source((file,)) for file in captures]


def _files_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error


def _looks_captured(file: Path | Member) -> bool:
    try:
        opened = open_file(file)
    except InputError:
        return False
    opened.close()
    return is_pcap(opened.stream.head) or is_pcapng(opened.stream.head)


def _manifest_at(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return parse_manifest(data, str(path))


def _manifest_among(members: list[Member], path: Path) -> tuple[Manifest, PurePosixPath] | None:
    """Return the archive's manifest and the folder that it lies in."""
    found: list[tuple[Manifest, PurePosixPath]] = []
    for member in members:
        inside = PurePosixPath(member.name)
        if inside.name != MANIFEST_NAME or len(inside.parts) > _MANIFEST_DEPTH:
            continue
        opened = open_file(member)
        data = bytearray()
        piece = bytearray(1 << 16)
        while len(data) <= MAX_MANIFEST_BYTES and (got := opened.stream.readinto(piece)):
            data += piece[:got]
        opened.close()
        manifest = parse_manifest(bytes(data), member.label)
        if manifest is not None:
            found.append((manifest, inside.parent))
    if len(found) > 1:
        raise InputError(f"{path}: {len(found)} bundles in one archive; unpack it and give the one to read")
    return found[0] if found else None


def _in_folder(folder: Path) -> Callable[[str], Path | None]:
    root = folder.resolve()

    def find(name: str) -> Path | None:
        try:
            path = (root / name).resolve()
            inside = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
            return None
        return folder / name if inside else None

    return find


def _in_archive(members: list[Member], folder: PurePosixPath) -> Callable[[str], Member | None]:
    by_name = {str(PurePosixPath(member.name)): member for member in members}
    return lambda name: by_name.get(str(folder / name))


def _from_manifest(
    manifest: Manifest,
    path: Path,
    find: Callable[[str], Path | Member | None],
    prefix: str | None,
    notes: list[str],
) -> list[Source]:
    sources = []
    for point in manifest.points:
        name = point.name if prefix is None else f"{prefix}:{point.name}"
        files = [find(file) for file in point.files]
        gone = [file for file, there in zip(point.files, files, strict=True) if there is None]
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            notes.append(f"{path}: point {name}: {gone[0]}{more} is not in the bundle")
        elif not files:
            notes.append(f"{path}: point {name}: nothing was captured")
        if point.problem is not None:
            notes.append(f"{path}: point {name}: {point.problem}")
        there = tuple(file for file in files if file is not None)
        if there:
            # a bundle that names its host was captured there, and a host has one clock
            sources.append(Source(there, name, _facts(point, None if manifest.host is None else str(path))))
    if not sources:
        raise InputError(f"{path}: none of the manifest's {len(manifest.points)} points has a capture in it")
    return sources


def _facts(point: PointEntry, clock: str | None) -> PointFacts:
    counters = point.counters
    return PointFacts(point.interface, None if counters is None else counters.dropped_by_kernel, clock)

"""Bundles written: the manifest as text, and a bundle put together from files that somebody captured by hand.

Files are copied as they are, never changed, moved or linked. The manifest is written last, so a folder without
one is no bundle; nothing that exists is overwritten.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nattrace import __version__
from nattrace.bundle.counters import counters_in, interface_in
from nattrace.bundle.manifest import CONTEXT_FOLDER, MANIFEST_NAME, SCHEMA, Manifest, PointEntry
from nattrace.errors import InputError, UsageError
from nattrace.ingest.capture import is_pcap, is_pcapng, open_file
from nattrace.ingest.opening import split_name, stem_of
from nattrace.report.instants import iso_utc
from nattrace.report.output import whole_file

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

#: When a piece of context was taken: before, during or after the capture.
PHASES: Final = ("before", "during", "after")

#: Names of context files without phase and suffix; ``capture`` writes them, and they are recognised by it.
CONTEXT_NAMES: Final = (
    "links",
    "addresses",
    "routes",
    "rules",
    "iptables-save",
    "ip6tables-save",
    "nft",
    "conntrack",
    "conntrack-events",
    "docker-networks",
    "docker-containers",
)

#: Bytes of a file of tcpdump's messages that are looked at: its last lines are the counters.
_LOG_BYTES: Final = 1 << 16


def manifest_text(manifest: Manifest) -> str:
    """Return the manifest as JSON text, the same for the same manifest."""
    workload = manifest.workload
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "generator": {"name": "nattrace", "version": manifest.version},
        "host": manifest.host,
        "kernel": manifest.kernel,
        "start": None if manifest.start_ns is None else iso_utc(manifest.start_ns),
        "stop": None if manifest.stop_ns is None else iso_utc(manifest.stop_ns),
        "stopped_by": manifest.stopped_by,
        "workload": workload and {"command": list(workload.command), "exit_code": workload.exit_code},
        "points": [_point(point) for point in manifest.points],
        "context": dict(sorted(manifest.context.items())),
        "missing": [
            {"what": each.what, "reason": each.reason, "needs": each.needs} for each in manifest.missing
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest of the bundle in `folder`, whole or not at all."""
    with whole_file(folder / MANIFEST_NAME) as stream:
        stream.write(manifest_text(manifest))


def new_folder(path: str | Path) -> Path:
    """Make the folder of a new bundle; UsageError when there is something already."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: no folder for a bundle: {reason}") from error
    if used:
        raise UsageError(f"{path}: not empty; give a new folder for the bundle")
    return folder


def assemble(files: Sequence[str], path: str | Path) -> Manifest:
    """Make a bundle in the folder `path` from captures, tcpdump's messages and context files.

    Parameters
    ----------
    files
        Captures as PATH or NAME=PATH, several with one NAME being rotated files of one point; files with what
        tcpdump printed on stderr, which belong to the point of the same name or interface; context files by
        their names (CONTEXT_NAMES), in a folder called ``before``, ``during`` or ``after`` if they were taken so.
        A folder stands for the files in it.
    path
        A new or empty folder.

    Raises
    ------
    UsageError
        A file is none of these, or the folder is in use.
    InputError
        A file does not exist or cannot be read, or there is no capture among them.
    """
    captures: dict[str, list[Path]] = {}
    logs: dict[str, str] = {}
    context: dict[str, Path] = {}
    for argument in _spread(files):
        name, text = split_name(argument)
        file = Path(text)
        opened = open_file(file)
        opened.close()
        head = opened.stream.head
        what = _context_name(file)
        if is_pcap(head) or is_pcapng(head):
            key = name or stem_of(file)
            if name is None and key in captures:
                raise UsageError(f"{text}: a second point called {key}; give one of them as NAME={text}")
            captures.setdefault(key, []).append(file)
        elif what is not None:
            context[what] = file
        elif b"listening on" in head or b"packets captured" in head or b"packet captured" in head:
            logs[name or stem_of(file)] = file.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace")
        else:
            raise UsageError(
                f"{text}: no capture, no tcpdump messages, no context file (one called such as iptables-save.txt)"
            )
    if not captures:
        raise InputError("no capture among the files; a bundle needs at least one")
    folder = new_folder(path)
    points = [_copied_point(name, captures[name], logs, captures, folder) for name in sorted(captures)]
    for what, file in context.items():
        target = folder / CONTEXT_FOLDER / f"{what}{file.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    manifest = Manifest(
        points=tuple(points),
        version=__version__,
        context={what: f"{CONTEXT_FOLDER}/{what}{file.suffix}" for what, file in context.items()},
    )
    write_manifest(manifest, folder)
    return manifest


def _spread(files: Sequence[str]) -> list[str]:
    """Replace folders by the files in them and in their context folders."""
    spread: list[str] = []
    for argument in files:
        folder = Path(argument)
        try:
            if not folder.is_dir():
                spread.append(argument)
                continue
            within = [folder, *(folder / phase for phase in PHASES), folder / CONTEXT_FOLDER]
            within += [folder / CONTEXT_FOLDER / phase for phase in PHASES]
            spread += [
                str(file)
                for each in within
                if each.is_dir()
                for file in sorted(each.iterdir())
                if file.is_file()
            ]
        except (OSError, ValueError) as error:
            raise InputError(f"{argument}: {error}") from error
    return spread


def _context_name(file: Path) -> str | None:
    """Return what a context file holds, with the phase if its folder says one; None for any other file."""
    if file.stem not in CONTEXT_NAMES or file.suffix not in {".json", ".txt"}:
        return None
    return f"{file.parent.name}/{file.stem}" if file.parent.name in PHASES else file.stem


def _copied_point(
    name: str, files: list[Path], logs: dict[str, str], names: Container[str], folder: Path
) -> PointEntry:
    targets = []
    for file in files:
        target = folder / file.name
        number = 1
        while target.exists() or target.name == MANIFEST_NAME:
            number += 1
            target = folder / f"{file.stem}-{number}{file.suffix}"
        shutil.copyfile(file, target)
        targets.append(target.name)
    point = PointEntry(name=name, files=tuple(targets))
    for key, said in logs.items():
        if key == name or (key not in names and interface_in(said) == name):
            point = replace(point, interface=interface_in(said), counters=counters_in(said))
    return point


def _point(point: PointEntry) -> dict[str, Any]:
    counters = point.counters
    return {
        "name": point.name,
        "files": list(point.files),
        "interface": point.interface,
        "ifindex": point.ifindex,
        "namespace": point.namespace,
        "container": point.container,
        "filter": point.filter,
        "snaplen": point.snaplen,
        "counters": counters
        and {
            "captured": counters.captured,
            "received_by_filter": counters.received_by_filter,
            "dropped_by_kernel": counters.dropped_by_kernel,
            "dropped_by_interface": counters.dropped_by_interface,
        },
        "command": None if point.command is None else list(point.command),
        "problem": point.problem,
    }

"""``manifest.json`` of a bundle, schema ``nattrace/bundle/1``: its types and its reader.

A manifest is hostile input like any capture: every value is checked for its type and size before it is used, and
names of files are only ever taken relative to the bundle. This module opens no file and interprets no path.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nattrace.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCHEMA: Final = "nattrace/bundle/1"
#: What every version's schema name begins with; another JSON file called manifest.json has no such name.
_SCHEMA_FAMILY: Final = "nattrace/bundle/"
MANIFEST_NAME: Final = "manifest.json"
CONTEXT_FOLDER: Final = "context"

#: Bytes of a manifest. One with 1,000 points of 100 rotated files each has 5 MB.
MAX_MANIFEST_BYTES: Final = 16 << 20
#: Points of a bundle, as many as of one capture file (`ingest.points.MAX_POINTS`).
MAX_POINTS: Final = 1024
#: Rotated files of one point: a day in files of 10 s.
MAX_FILES: Final = 10_000
#: Characters of a name or a message that is kept; Linux allows 255 bytes for a file name, 15 for an interface.
MAX_TEXT: Final = 4096

_T = TypeVar("_T")

_INSTANT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Counters:
    """What tcpdump said when it ended (pcap_stats(3PCAP)); None where it said nothing."""

    captured: int | None = None
    received_by_filter: int | None = None
    dropped_by_kernel: int | None = None
    dropped_by_interface: int | None = None


@dataclass(frozen=True, slots=True)
class PointEntry:
    """One observation point of a bundle. `files` are relative to the bundle, in the order of their packets."""

    name: str
    files: tuple[str, ...]
    interface: str | None = None
    ifindex: int | None = None
    namespace: str | None = None  #: ``host``, ``container:NAME`` or ``netns:PATH``
    container: str | None = None  #: the container whose traffic the interface carries, where that is known
    filter: str | None = None  #: the capture filter as pcap-filter(7) reads it; "" is none at all
    snaplen: int | None = None
    counters: Counters | None = None
    command: tuple[str, ...] | None = None
    problem: str | None = None  #: what went wrong while it was captured, as one line


@dataclass(frozen=True, slots=True)
class Missing:
    """A piece of context that could not be had, why, and the right or tool that it needs."""

    what: str
    reason: str
    needs: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """The command that ran while the points captured."""

    command: tuple[str, ...]
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself. Instants are ns since 1970 in UTC; None is unknown."""

    points: tuple[PointEntry, ...]
    version: str | None = None  #: of the nattrace that wrote it
    host: str | None = None
    kernel: str | None = None
    start_ns: int | None = None
    stop_ns: int | None = None
    stopped_by: str | None = (
        None  #: ``workload``, ``duration``, ``count``, ``size``, ``signal`` or ``failure``
    )
    workload: Workload | None = None
    context: Mapping[str, str] = field(default_factory=dict)  #: what -> file relative to the bundle
    missing: tuple[Missing, ...] = ()


def parse_manifest(data: bytes, label: str) -> Manifest | None:
    """Return the manifest that `data` holds, or None when it is some other program's ``manifest.json``.

    Unknown fields are ignored, so that later versions may add some.

    Raises
    ------
    InputError
        It is a bundle's manifest, but of another version, or a field has a value that it cannot have. The
        message begins with `label`.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise InputError(f"{label}: larger than {MAX_MANIFEST_BYTES >> 20} MiB, which no manifest is")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        if _SCHEMA_FAMILY.encode() not in data:
            return None
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise InputError(f"{label}: no JSON: {reason}; give the capture files themselves") from error
    if not isinstance(document, dict):
        return None
    schema = document.get("schema")
    if not isinstance(schema, str) or not schema.startswith(_SCHEMA_FAMILY):
        return None
    if schema != SCHEMA:
        raise InputError(f"{label}: schema {schema[:40]!r}, this version reads {SCHEMA}; update nattrace")
    return _manifest(_Fields(document, label, ""))


def _manifest(fields: _Fields) -> Manifest:
    points = tuple(_point(each) for each in fields.objects("points", MAX_POINTS))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise fields.wrong("points", f"two are called {name!r}")
    workload = fields.inner("workload")
    return Manifest(
        points=points,
        version=None if (made := fields.inner("generator")) is None else made.text("version"),
        host=fields.text("host"),
        kernel=fields.text("kernel"),
        start_ns=fields.instant("start"),
        stop_ns=fields.instant("stop"),
        stopped_by=fields.text("stopped_by"),
        workload=None if workload is None else _workload(workload),
        context=fields.text_map("context"),
        missing=tuple(
            Missing(each.text("what") or "?", each.text("reason") or "?", each.text("needs"))
            for each in fields.objects("missing", MAX_FILES)
        ),
    )


def _point(fields: _Fields) -> PointEntry:
    name = fields.text("name")
    if not name:
        raise fields.wrong("name", "a point needs one")
    counters = fields.inner("counters")
    return PointEntry(
        name=name,
        files=fields.texts("files", MAX_FILES) or (),
        interface=fields.text("interface"),
        ifindex=fields.count("ifindex"),
        namespace=fields.text("namespace"),
        container=fields.text("container"),
        filter=fields.text("filter"),
        snaplen=fields.count("snaplen"),
        counters=None if counters is None else _counters(counters),
        command=fields.texts("command", MAX_FILES),
        problem=fields.text("problem"),
    )


def _workload(fields: _Fields) -> Workload:
    return Workload(fields.texts("command", MAX_FILES) or (), fields.integer("exit_code"))


def _counters(fields: _Fields) -> Counters:
    return Counters(
        captured=fields.count("captured"),
        received_by_filter=fields.count("received_by_filter"),
        dropped_by_kernel=fields.count("dropped_by_kernel"),
        dropped_by_interface=fields.count("dropped_by_interface"),
    )


class _Fields:
    """One JSON object of a manifest; every access checks the type and says where it is wrong."""

    def __init__(self, document: dict[str, Any], label: str, where: str) -> None:
        self._document, self._label, self._where = document, label, where

    def wrong(self, name: str, what: str) -> InputError:
        where = f"{self._where}{name}"
        return InputError(f"{self._label}: {where}: {what}; give the capture files themselves")

    def text(self, name: str) -> str | None:
        return self._as(name, self._document.get(name), str, "text", lambda text: len(text) <= MAX_TEXT)

    def integer(self, name: str) -> int | None:
        return self._as(name, self._document.get(name), int, "an integer", lambda n: -(2**63) <= n < 2**63)

    def count(self, name: str) -> int | None:
        return self._as(name, self._document.get(name), int, "a count", lambda n: 0 <= n < 2**63)

    def instant(self, name: str) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        found = _INSTANT.fullmatch(text)
        try:
            second = datetime.fromisoformat(found[1] if found is not None else "").replace(tzinfo=UTC)
        except ValueError as error:
            raise self.wrong(
                name, f"{text[:40]!r} is no instant such as 2026-11-23T16:25:55.280741000Z"
            ) from error
        decimals = found[2] if found is not None else None
        return int(second.timestamp()) * 10**9 + int((decimals or "0").ljust(9, "0"))

    def texts(self, name: str, at_most: int) -> tuple[str, ...] | None:
        values = self._as(name, self._document.get(name), list, "a list", lambda found: len(found) <= at_most)
        if values is None:
            return None
        if not all(isinstance(value, str) and len(value) <= MAX_TEXT for value in values):
            raise self.wrong(name, "not a list of texts")
        return tuple(values)

    def text_map(self, name: str) -> dict[str, str]:
        values = self._as(
            name, self._document.get(name), dict, "an object", lambda found: len(found) <= MAX_FILES
        )
        if not all(isinstance(value, str) and len(value) <= MAX_TEXT for value in (values or {}).values()):
            raise self.wrong(name, "not an object of texts")
        return dict(values or {})

    def inner(self, name: str) -> _Fields | None:
        value = self._as(name, self._document.get(name), dict, "an object", lambda _: True)
        return None if value is None else _Fields(value, self._label, f"{self._where}{name}.")

    def objects(self, name: str, at_most: int) -> list[_Fields]:
        values = self._as(name, self._document.get(name), list, "a list", lambda found: len(found) <= at_most)
        if not all(isinstance(value, dict) for value in values or ()):
            raise self.wrong(name, "not a list of objects")
        return [
            _Fields(value, self._label, f"{self._where}{name}[{number}].")
            for number, value in enumerate(values or ())
        ]

    def _as(
        self, name: str, value: object, kind: type[_T], what: str, holds: Callable[[Any], bool]
    ) -> _T | None:
        if value is None:
            return None
        if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
            raise self.wrong(name, f"not {what} of a sensible size")
        return value

"""One row for each packet: what `nattrace rewrites` streams as JSON lines and as CSV.

A rewrite has a packet before and a packet after; a crossing that changed nothing has ``"nat": null``; a packet
without a crossing (lost, ambiguous, seen at one point only) has ``"after": null``, the reason and the
candidates. Rows are written as they come: nothing here sorts, counts or keeps them.
"""

from __future__ import annotations

import csv
import json
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from nattrace.model import Rewrite
from nattrace.report.escape import csv_cell, json_string, well_formed
from nattrace.report.instants import iso_utc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from nattrace.model import Sighting, Unmatched

#: Rows joined into one write.
ROWS_PER_WRITE = 256

#: Fields after the addresses, in the order in which every row gives them.
_FIELDS: Final = ("sport", "dport", "type", "code", "id", "seq", "ack", "flags", "length")

#: Fields that a row of the protocol always has, null where the capture cut them off.
_FIELDS_OF: Final = {
    "icmp": frozenset({"type", "code", "id", "seq"}),
    "icmpv6": frozenset({"type", "code", "id", "seq"}),
    "tcp": frozenset({"sport", "dport", "seq", "ack", "flags", "length"}),
    "udp": frozenset({"sport", "dport", "length"}),
    "udplite": frozenset({"sport", "dport", "length"}),
    "sctp": frozenset({"sport", "dport", "length"}),
    "dccp": frozenset({"sport", "dport", "length"}),
}

_SIGHTING_COLUMNS: Final = (
    "point", "frame", "time", "src", "sport", "dst", "dport", "id", "ttl", "ip_id"
)  # fmt: skip

#: Header of the CSV form: what both packets share once, what NAT may change for each side.
CSV_COLUMNS: Final = (
    "flow", "direction", "nat", "changed", "latency_ns", "protocol", "type", "code", "seq", "ack", "flags", "length",
    *(f"before_{name}" for name in _SIGHTING_COLUMNS),
    *(f"after_{name}" for name in _SIGHTING_COLUMNS),
    "evidence", "reason", "candidates", "before_encapsulation", "after_encapsulation",
)  # fmt: skip


def rewrite_dict(row: Rewrite | Unmatched) -> dict[str, Any]:
    """Return a row as plain dictionaries, keys in the order of the row schema."""
    if isinstance(row, Rewrite):
        return {
            "flow": row.flow,
            "direction": row.direction,
            "nat": row.nat,
            "changed": list(row.changed),
            "latency_ns": row.latency_ns,
            "before": sighting_dict(row.before),
            "after": sighting_dict(row.after),
            "evidence": list(row.evidence),
        }
    return {
        "flow": row.flow,
        "direction": row.direction,
        "nat": None,
        "changed": [],
        "latency_ns": None,
        "before": sighting_dict(row.packet),
        "after": None,
        "evidence": [],
        "reason": row.reason,
        "candidates": [{"point": well_formed(ref.point), "frame": ref.frame} for ref in row.candidates],
    }


def sighting_dict(sighting: Sighting) -> dict[str, Any]:
    """Return one packet at one point, with the fields that its protocol has."""
    expected = _FIELDS_OF.get(sighting.protocol, frozenset())
    found: dict[str, Any] = {
        "point": well_formed(sighting.point),
        "frame": sighting.frame,
        "time": None if sighting.time is None else iso_utc(sighting.time),
        "protocol": sighting.protocol,
        "src": sighting.src,
        "dst": sighting.dst,
    }
    for name in _FIELDS:
        value = getattr(sighting, name)
        if value is not None or name in expected:
            found[name] = value
    found |= {"ttl": sighting.ttl, "ip_id": sighting.ip_id}
    if sighting.encapsulation is not None:
        found["encapsulation"] = sighting.encapsulation
    return found


def write_jsonl(rows: Iterable[Rewrite | Unmatched], stream: TextIO) -> None:
    """Write one JSON object a line, as rows come; OSError is the stream's."""
    remaining = iter(rows)
    while batch := list(islice(remaining, ROWS_PER_WRITE)):
        stream.write("\n".join(map(row_json, batch)) + "\n")


def row_json(row: Rewrite | Unmatched) -> str:
    """Return the text of `json.dumps(rewrite_dict(row))`, several times faster for a rewrite.

    As in `json.flow_json`, addresses, protocol and flags are written as they are: they are nattrace's own text.
    """
    if not isinstance(row, Rewrite):
        return json.dumps(rewrite_dict(row))
    nat = "null" if row.nat is None else f'"{row.nat}"'
    latency = "null" if row.latency_ns is None else row.latency_ns
    return (
        f'{{"flow": {row.flow}, "direction": "{row.direction}", "nat": {nat}, "changed": {_names(row.changed)}, '
        f'"latency_ns": {latency}, "before": {_sighting_json(row.before)}, "after": {_sighting_json(row.after)}, '
        f'"evidence": {_names(row.evidence)}}}'
    )


def write_csv(rows: Iterable[Rewrite | Unmatched], stream: TextIO) -> None:
    """Write a header and one line a row (RFC 4180, lines ending in LF as Unix tools want them).

    Lists are words separated by spaces; candidates are ``POINT:FRAME``. Absent is an empty cell.
    """
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_cells(row) for row in rows)


def _cells(row: Rewrite | Unmatched) -> list[object]:
    """Return the cells of one row; the csv module writes None as an empty cell."""
    if isinstance(row, Rewrite):
        packet, after = row.before, row.after
        nat, changed, latency_ns = row.nat, " ".join(row.changed), row.latency_ns
        tail: tuple[object, ...] = (" ".join(row.evidence), None, None)
    else:
        packet, after = row.packet, None
        nat, changed, latency_ns = None, "", None
        candidates = " ".join(f"{ref.point}:{ref.frame}" for ref in row.candidates)
        tail = (None, csv_cell(row.reason), csv_cell(candidates))
    shared = (packet.protocol, packet.type, packet.code, packet.seq, packet.ack, packet.flags, packet.length)
    sides = (*_side(packet), *(_side(after) if after is not None else (None,) * len(_SIGHTING_COLUMNS)))
    wraps = (packet.encapsulation, after.encapsulation if after is not None else None)
    return [row.flow, row.direction, nat, changed, latency_ns, *shared, *sides, *tail, *wraps]


def _side(sighting: Sighting) -> Iterator[object]:
    for name in _SIGHTING_COLUMNS:
        value = getattr(sighting, name)
        if value is not None and name == "time":
            yield iso_utc(value)
        elif name == "point":
            yield csv_cell(value)
        else:
            yield value


def _sighting_json(sighting: Sighting) -> str:
    time = "null" if sighting.time is None else f'"{iso_utc(sighting.time)}"'
    ttl = "null" if sighting.ttl is None else sighting.ttl
    ip_id = "null" if sighting.ip_id is None else sighting.ip_id
    wrapped = "" if sighting.encapsulation is None else f', "encapsulation": "{sighting.encapsulation}"'
    expected = _FIELDS_OF.get(sighting.protocol, frozenset())
    fields = ""
    for name in _FIELDS:
        value = getattr(sighting, name)
        if value is not None:
            fields += f'"{name}": "{value}", ' if name == "flags" else f'"{name}": {value}, '
        elif name in expected:
            fields += f'"{name}": null, '
    return (
        f'{{"point": {_point_json(sighting.point)}, "frame": {sighting.frame}, "time": {time}, '
        f'"protocol": "{sighting.protocol}", "src": "{sighting.src}", "dst": "{sighting.dst}", '
        f'{fields}"ttl": {ttl}, "ip_id": {ip_id}{wrapped}}}'
    )


@lru_cache(maxsize=4096)
def _point_json(name: str) -> str:
    return json_string(name)


@lru_cache(maxsize=4096)
def _names(names: tuple[str, ...]) -> str:
    return json.dumps(names)

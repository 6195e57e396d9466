"""The report as JSON, ``nattrace/report/1``: the format that scripts hang on.

`report_dict` says what the report holds, `write_json` writes the same as text: one point, flow and finding a
line, in ASCII, the same bytes for the same report. Flows are many, so their text is put together by
f-strings; the tests hold it equal to `json.dumps` of the dictionary. Nothing here decides or computes.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from nattrace.report.escape import json_string, well_formed
from nattrace.report.instants import iso_utc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import TextIO

    from nattrace.model import (
        Accounting,
        Clock,
        Crossing,
        Endpoint,
        Finding,
        Flow,
        IcmpErrors,
        Latency,
        Point,
        Rule,
        Segments,
        Translation,
        Tuple,
    )
    from nattrace.report.view import ReportView

SCHEMA = "nattrace/report/1"

#: Flows joined into one write: large enough that the stream costs nothing, small enough to hold no memory.
FLOWS_PER_WRITE = 1024

#: Texts of point names, paths and rules that are kept; a report has a handful of each.
CACHED_TEXTS = 4096

NO_LATENCY = '{"measurable": false, "min_ns": null, "median_ns": null, "p99_ns": null, "max_ns": null}'


def report_dict(data: ReportView) -> dict[str, Any]:
    """Return the report as plain dictionaries, lists, strings and numbers, keys in the order of the schema."""
    undated = undated_points(data.points)
    return {
        "schema": SCHEMA,
        "generator": {"name": "nattrace", "version": data.version},
        "points": [point_dict(point) for point in data.points],
        "flows": [flow_dict(flow, undated) for flow in data.flows],
        "findings": [finding_dict(finding) for finding in data.findings],
        "accounting": accounting_dict(data.accounting),
    }


def write_json(data: ReportView, stream: TextIO) -> None:
    """Write the report as JSON text, streaming the flows; OSError is the stream's."""
    undated = undated_points(data.points)
    generator = json.dumps({"name": "nattrace", "version": data.version})
    stream.write(f'{{"schema": "{SCHEMA}",\n"generator": {generator},\n"points": [')
    _write_lines(stream, (json.dumps(point_dict(point)) for point in data.points))
    stream.write('],\n"flows": [')
    texts = getattr(data.flows, "json_texts", None)
    if texts is None:
        _write_lines(stream, (flow_json(flow, undated) for flow in data.flows))
    else:
        stream.writelines(texts(undated))
        stream.write("\n" if len(data.flows) else "")
    stream.write('],\n"findings": [')
    _write_lines(stream, (json.dumps(finding_dict(finding)) for finding in data.findings))
    stream.write(f'],\n"accounting": {json.dumps(accounting_dict(data.accounting))}}}\n')


def undated_points(points: Iterable[Point]) -> frozenset[str]:
    """Return the names of the points whose instants are times of day only and are therefore never printed."""
    return frozenset(point.name for point in points if not point.dated)


def point_dict(point: Point) -> dict[str, Any]:
    """Return one observation point."""
    clock = point.clock
    return {
        "name": well_formed(point.name),
        "file": well_formed(point.file),
        "interface": None if point.interface is None else well_formed(point.interface),
        "link_type": well_formed(point.link_type),
        "snaplen": point.snaplen,
        "packets": point.packets,
        "decoded": point.decoded,
        "skipped": _counts(point.skipped),
        "first": iso_utc(point.first) if point.dated and point.first is not None else None,
        "last": iso_utc(point.last) if point.dated and point.last is not None else None,
        "truncated": point.truncated,
        "dropped_by_kernel": point.dropped_by_kernel,
        "clock": {
            "reference": well_formed(clock.reference),
            "offset_ns": clock.offset_ns,
            # JSON has no infinity and no NaN.
            "drift_ppm": clock.drift_ppm if math.isfinite(clock.drift_ppm) else None,
            "bound_ns": clock.bound_ns,
            **_more_of_clock(clock, dated=point.dated),
        },
        "comments": [{"frame": c.frame, "text": well_formed(c.text)} for c in point.comments],
        "dated": point.dated,
    }


def _more_of_clock(clock: Clock, *, dated: bool) -> dict[str, Any]:
    """Return what only a clock of its own has: the instant of its offset, and its steps."""
    if clock.at is None:
        return {}
    steps = [
        {
            "at": iso_utc(step.at) if dated else None,
            "offset_ns": step.offset_ns,
            "drift_ppm": step.drift_ppm if math.isfinite(step.drift_ppm) else None,
        }
        for step in clock.steps
    ]
    return {"at": iso_utc(clock.at) if dated else None} | ({"steps": steps} if steps else {})


def flow_dict(flow: Flow, undated: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return one flow; its instants are null when a point of its path is `undated`."""
    dated = undated.isdisjoint(flow.path)
    found: dict[str, Any] = {
        "id": flow.id,
        "protocol": flow.protocol,
        "status": flow.status,
        "path": [well_formed(name) for name in flow.path],
        "initiator": tuple_dict(flow.initiator),
        "translations": [translation_dict(each, dated=dated) for each in flow.translations],
        "packets": {"original": flow.packets_original, "reply": flow.packets_reply},
        "crossings": [crossing_dict(crossing) for crossing in flow.crossings],
        "first": iso_utc(flow.first) if dated else None,
        "last": iso_utc(flow.last) if dated else None,
        "endpoints": {
            "initiator": _endpoint_dict(flow.endpoint_initiator),
            "responder": _endpoint_dict(flow.endpoint_responder),
        },
        "icmp_errors": [_icmp_errors_dict(errors) for errors in flow.icmp_errors],
    }
    if flow.encapsulation is not None:
        found["encapsulation"] = list(flow.encapsulation)
    return found


def tuple_dict(addresses: Tuple) -> dict[str, Any]:
    """Return a TUPLE: addresses with ports, with an ICMP id, or alone, as the protocol has them."""
    found: dict[str, Any] = {"src": addresses.src, "dst": addresses.dst}
    if addresses.sport is not None or addresses.dport is not None:
        found |= {"sport": addresses.sport, "dport": addresses.dport}
    elif addresses.id is not None:
        found["id"] = addresses.id
    return found


def translation_dict(translation: Translation, *, dated: bool = True) -> dict[str, Any]:
    """Return what one NAT hop did to a flow; its instants are null when a point of the path has no dates."""
    first, last = translation.first, translation.last
    return {
        "from": well_formed(translation.from_point),
        "to": well_formed(translation.to_point),
        "nat": translation.nat,
        "changed": list(translation.changed),
        "original": tuple_dict(translation.original),
        "reply": tuple_dict(translation.reply),
        "rule": _rule_dict(translation.rule),
        "first": iso_utc(first) if dated and first is not None else None,
        "last": iso_utc(last) if dated and last is not None else None,
    }


def crossing_dict(crossing: Crossing) -> dict[str, Any]:
    """Return what became of one direction of a flow between two points."""
    return {
        "from": well_formed(crossing.from_point),
        "to": well_formed(crossing.to_point),
        "direction": crossing.direction,
        "matched": crossing.matched,
        "lost": crossing.lost,
        "unknowable": crossing.unknowable,
        "ambiguous": crossing.ambiguous,
        "latency": _latency_dict(crossing.latency),
        "segments": _segments_dict(crossing.segments),
    }


def finding_dict(finding: Finding) -> dict[str, Any]:
    """Return one finding."""
    return {
        "code": finding.code,
        "severity": finding.severity,
        "message": well_formed(finding.message),
        "flows": list(finding.flows),
        "packets": [{"point": well_formed(ref.point), "frame": ref.frame} for ref in finding.packets],
        "advice": None if finding.advice is None else well_formed(finding.advice),
    }


def accounting_dict(accounting: Accounting) -> dict[str, Any]:
    """Return where every packet went."""
    return {
        "packets": accounting.packets,
        "matched": accounting.matched,
        "unmatched": _counts(accounting.unmatched),
        "skipped": _counts(accounting.skipped),
    }


def flow_json(flow: Flow, undated: frozenset[str] = frozenset()) -> str:
    """Return the text of `json.dumps(flow_dict(flow, undated))`, several times faster.

    Addresses, protocol and status are written as they are: they are nattrace's own text, of ASCII letters,
    digits, dots, colons and signs, never a text of the capture.
    """
    path, dated = _path_json(flow.path, undated)
    first = last = "null"
    if dated:
        first, last = f'"{iso_utc(flow.first)}"', f'"{iso_utc(flow.last)}"'
    translations = ", ".join([_translation_json(each, dated) for each in flow.translations])
    crossings = ", ".join([_crossing_json(crossing) for crossing in flow.crossings])
    initiator, responder = flow.endpoint_initiator, flow.endpoint_responder
    return (
        f'{{"id": {flow.id}, "protocol": "{flow.protocol}", "status": "{flow.status}", "path": {path}, '
        f'"initiator": {_tuple_json(flow.initiator)}, "translations": [{translations}], '
        f'"packets": {{"original": {flow.packets_original}, "reply": {flow.packets_reply}}}, '
        f'"crossings": [{crossings}], "first": {first}, "last": {last}, "endpoints": '
        f'{{"initiator": {"null" if initiator is None else json.dumps(_endpoint_dict(initiator))}, '
        f'"responder": {"null" if responder is None else json.dumps(_endpoint_dict(responder))}}}, '
        f'"icmp_errors": {icmp_errors_json(flow.icmp_errors)}{encapsulation_json(flow.encapsulation)}}}'
    )


def encapsulation_json(encapsulation: tuple[str | None, ...] | None) -> str:
    """Return the member that says what wraps a flow's packets, with its comma; "" where nothing does."""
    return "" if encapsulation is None else f', "encapsulation": {json.dumps(encapsulation)}'


def icmp_errors_json(errors: Iterable[IcmpErrors]) -> str:
    """Return the text of a flow's ``icmp_errors``."""
    return json.dumps([_icmp_errors_dict(each) for each in errors])


def _tuple_json(addresses: Tuple) -> str:
    sport, dport = addresses.sport, addresses.dport
    if sport is not None and dport is not None:
        return f'{{"src": "{addresses.src}", "dst": "{addresses.dst}", "sport": {sport}, "dport": {dport}}}'
    if sport is None and dport is None and addresses.id is not None:
        return f'{{"src": "{addresses.src}", "dst": "{addresses.dst}", "id": {addresses.id}}}'
    return json.dumps(tuple_dict(addresses))


def _translation_json(translation: Translation, dated: bool) -> str:
    head = _translation_head(
        translation.from_point, translation.to_point, translation.nat, translation.changed
    )
    rule = "null" if translation.rule is None else _rule_json(translation.rule)
    first, last = (
        f'"{iso_utc(instant)}"' if dated and instant is not None else "null"
        for instant in (translation.first, translation.last)
    )
    return (
        f'{head}"original": {_tuple_json(translation.original)}, "reply": {_tuple_json(translation.reply)}, '
        f'"rule": {rule}, "first": {first}, "last": {last}}}'
    )


def _crossing_json(crossing: Crossing) -> str:
    latency = crossing.latency
    minimum, median, p99, maximum = latency.min_ns, latency.median_ns, latency.p99_ns, latency.max_ns
    if minimum is None or median is None or p99 is None or maximum is None:
        figures = json.dumps(_latency_dict(latency)) if _has_figures(latency) else NO_LATENCY
    else:
        measurable = "true" if latency.measurable else "false"
        figures = f'{{"measurable": {measurable}, "min_ns": {minimum}, "median_ns": {median}, "p99_ns": {p99}, "max_ns": {maximum}}}'
    return (
        f'{_crossing_head(crossing.from_point, crossing.to_point, crossing.direction)}"matched": {crossing.matched}, '
        f'"lost": {crossing.lost}, "unknowable": {crossing.unknowable}, "ambiguous": {crossing.ambiguous}, '
        f'"latency": {figures}, "segments": {json.dumps(_segments_dict(crossing.segments))}}}'
    )


def _has_figures(latency: Latency) -> bool:
    figures = (latency.min_ns, latency.median_ns, latency.p99_ns, latency.max_ns)
    return latency.measurable or figures != (None, None, None, None)


@lru_cache(maxsize=CACHED_TEXTS)
def _path_json(path: tuple[str, ...], undated: frozenset[str]) -> tuple[str, bool]:
    return f"[{', '.join(map(json_string, path))}]", undated.isdisjoint(path)


@lru_cache(maxsize=CACHED_TEXTS)
def _translation_head(from_point: str, to_point: str, nat: str, changed: tuple[str, ...]) -> str:
    fields = json.dumps(list(changed))
    return f'{{"from": {json_string(from_point)}, "to": {json_string(to_point)}, "nat": "{nat}", "changed": {fields}, '


@lru_cache(maxsize=CACHED_TEXTS)
def _crossing_head(from_point: str, to_point: str, direction: str) -> str:
    return f'{{"from": {json_string(from_point)}, "to": {json_string(to_point)}, "direction": "{direction}", '


@lru_cache(maxsize=CACHED_TEXTS)
def _rule_json(rule: Rule) -> str:
    return json.dumps(_rule_dict(rule))


def _rule_dict(rule: Rule | None) -> dict[str, Any] | None:
    if rule is None:
        return None
    return {
        "text": well_formed(rule.text),
        "table": well_formed(rule.table),
        "chain": well_formed(rule.chain),
        "number": rule.number,
    }


def _latency_dict(latency: Latency) -> dict[str, Any]:
    return {
        "measurable": latency.measurable,
        "min_ns": latency.min_ns,
        "median_ns": latency.median_ns,
        "p99_ns": latency.p99_ns,
        "max_ns": latency.max_ns,
    }


def _segments_dict(segments: Segments | None) -> dict[str, int] | None:
    if segments is None:
        return None
    return {
        "before": segments.before,
        "after": segments.after,
        "bytes": segments.bytes,
        "missing_bytes": segments.missing_bytes,
    }


def _icmp_errors_dict(errors: IcmpErrors) -> dict[str, Any]:
    return {
        "type": errors.type,
        "code": errors.code,
        "name": errors.name,
        "mtu": errors.mtu,
        "count": errors.count,
    }


def _endpoint_dict(endpoint: Endpoint | None) -> dict[str, Any] | None:
    if endpoint is None:
        return None
    return {
        "container": _text_or_none(endpoint.container),
        "network": _text_or_none(endpoint.network),
        "image": _text_or_none(endpoint.image),
        "labels": {well_formed(name): well_formed(value) for name, value in sorted(endpoint.labels.items())},
    }


def _text_or_none(text: str | None) -> str | None:
    return None if text is None else well_formed(text)


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by reason, by name, so that the order of reading does not show."""
    return {well_formed(reason): counts[reason] for reason in sorted(counts)}


def _write_lines(stream: TextIO, items: Iterable[str]) -> None:
    """Write JSON values one a line, separated by commas, after an opening bracket that is already written."""
    remaining = iter(items)
    separator = "\n"
    while batch := list(islice(remaining, FLOWS_PER_WRITE)):
        stream.write(separator + ",\n".join(batch))
        separator = ",\n"
    if separator != "\n":
        stream.write("\n")

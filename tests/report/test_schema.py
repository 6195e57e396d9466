from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from nattrace.model import Clock, ClockStep
from nattrace.report.json import report_dict
from nattrace.report.rows import rewrite_dict
from nattrace.report.schema import SCHEMA_FILES, schema_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from nattrace.model import ReportData, Rewrite, Unmatched


def closed(schema: Any) -> Any:
    """The schema with every object closed: our own output holds nothing that the schema does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if inner.get("type") == "object" and "properties" in inner:
        inner["additionalProperties"] = False
    return inner


def validator(name: Any) -> Any:
    return jsonschema.Draft202012Validator(closed(json.loads(schema_text(name))))


@pytest.mark.parametrize("name", SCHEMA_FILES)
def test_a_schema_is_one(name: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text(name)))


def test_the_report_obeys_its_schema(docker_ping: ReportData) -> None:
    validator("report").validate(report_dict(docker_ping))


def test_a_clock_of_its_own_obeys_the_schema(docker_ping: ReportData) -> None:
    steps = (ClockStep(1_700_000_060 * 10**9, -5 * 10**9, 27.5),)
    clock = Clock("docker0", 3600 * 10**9, 27.0, 35_000, 1_700_000_000 * 10**9, steps)
    inside, outside = docker_ping.points
    found = report_dict(replace(docker_ping, points=(inside, replace(outside, clock=clock))))
    validator("report").validate(found)
    assert found["points"][1]["clock"] == {
        "reference": "docker0", "offset_ns": 3600 * 10**9, "drift_ppm": 27.0, "bound_ns": 35_000,
        "at": "2023-11-14T22:13:20.000000000Z",
        "steps": [{"at": "2023-11-14T22:14:20.000000000Z", "offset_ns": -5 * 10**9, "drift_ppm": 27.5}],
    }  # fmt: skip
    unknown = replace(clock, bound_ns=None, drift_ppm=float("inf"), steps=())
    found = report_dict(replace(docker_ping, points=(replace(outside, clock=unknown, dated=False),)))
    validator("report").validate(found)
    assert found["points"][0]["clock"]["at"] is None


def test_rows_obey_their_schema(rewrite: Rewrite, unmatched: Unmatched) -> None:
    validator("rewrites").validate(rewrite_dict(rewrite))
    validator("rewrites").validate(rewrite_dict(unmatched))


def test_additions_are_welcome_to_readers(docker_ping: ReportData) -> None:
    report = report_dict(docker_ping)
    report["flows"][0]["colour"] = "blue"
    jsonschema.Draft202012Validator(json.loads(schema_text())).validate(report)


def without(*path: Any) -> Callable[[Any], None]:
    def change(report: Any) -> None:
        for key in path[:-1]:
            report = report[key]
        del report[path[-1]]

    return change


def with_value(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(report: Any) -> None:
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("schema"),
        without("points", 0, "clock", "bound_ns"),
        without("flows", 0, "endpoints"),
        without("flows", 0, "initiator", "src"),
        without("accounting", "skipped"),
        with_value("nattrace/report/2", "schema"),
        with_value("2026-11-23T16:25:55Z", "flows", 0, "first"),
        with_value(1795451155280642000, "flows", 0, "first"),
        with_value("gone", "flows", 0, "status"),
        with_value("masquerade", "flows", 0, "translations", 0, "nat"),
        with_value([], "flows", 0, "translations"),
        with_value([], "flows", 0, "path"),
        with_value(["source"], "flows", 0, "translations", 0, "changed"),
        with_value({"src": "192.0.2.1", "dst": "192.0.2.2", "sport": 1}, "flows", 0, "initiator"),
        with_value({"src": "192.0.2.1", "dst": "192.0.2.2", "id": 65536}, "flows", 0, "initiator"),
        with_value(False, "flows", 0, "crossings", 0, "latency", "measurable"),
        with_value(None, "flows", 0, "crossings", 0, "latency", "median_ns"),
        with_value(-1, "flows", 0, "crossings", 0, "lost"),
        with_value("fatal", "findings", 0, "severity"),
        with_value("Bad Code", "findings", 0, "code"),
        with_value(0, "findings", 0, "packets", 0, "frame"),
        with_value({"arp": "3"}, "accounting", "skipped"),
    ],
)
def test_a_mistake_is_caught(docker_ping: ReportData, change: Callable[[Any], None]) -> None:
    report = deepcopy(report_dict(docker_ping))
    change(report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json.loads(schema_text())).validate(report)


@pytest.mark.parametrize(
    "change",
    [
        without("evidence"),
        without("before", "seq"),
        with_value(None, "after"),
        with_value("tcp", "before", "protocol"),
        with_value(None, "flow"),
        with_value(0, "before", "frame"),
        with_value("now", "after", "time"),
        with_value(["ttl"], "changed"),
    ],
)
def test_a_mistake_in_a_row_is_caught(rewrite: Rewrite, change: Callable[[Any], None]) -> None:
    row = deepcopy(rewrite_dict(rewrite))
    change(row)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json.loads(schema_text("rewrites"))).validate(row)

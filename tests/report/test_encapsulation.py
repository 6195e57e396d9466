"""Reports of packets in tunnels: every format says what wraps them, and says nothing where nothing does."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import jsonschema
import pytest

import nattrace
from nattrace.model import Rewrite
from nattrace.report.arrow import to_table
from nattrace.report.json import flow_dict, flow_json, write_json
from nattrace.report.rows import rewrite_dict, row_json, write_csv
from nattrace.report.rows_table import write_rows_table
from nattrace.report.schema import schema_text
from nattrace.report.table import write_table

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lab"
PATH = [None, "vxlan 42", None]


@pytest.fixture(scope="module")
def overlay() -> nattrace.Report:
    return nattrace.analyze(*sorted((FIXTURES / "overlay_vxlan").glob("*.pcap")))


def test_a_flow_says_it_beside_its_path_in_json(overlay: nattrace.Report) -> None:
    stream = io.StringIO()
    write_json(overlay, stream)
    report = json.loads(stream.getvalue())

    jsonschema.validate(report, json.loads(schema_text("report")))
    wrapped = [flow for flow in report["flows"] if "encapsulation" in flow]
    assert len(wrapped) == 6
    for flow in wrapped:
        assert flow["path"] == ["docker0", "mid0", "eth0"]
        assert flow["encapsulation"] == PATH
    assert len(report["flows"]) > 6  # the carriers are flows too, and wrapped in nothing


def test_the_fast_writer_writes_what_the_dictionary_says(overlay: nattrace.Report) -> None:
    for flow in overlay.flows:
        assert flow_json(flow) == json.dumps(flow_dict(flow))
    stream = io.StringIO()
    write_json(overlay, stream)
    for flow in overlay.flows:
        assert json.dumps(flow_dict(flow)) in stream.getvalue()


def test_rows_say_it_of_each_sighting(overlay: nattrace.Report) -> None:
    rows = [row for row in overlay.rewrites.all() if isinstance(row, Rewrite)]
    schema = json.loads(schema_text("rewrites"))
    for row in rows:
        as_json = json.loads(row_json(row))
        assert as_json == rewrite_dict(row)
        jsonschema.validate(as_json, schema)
        for side in ("before", "after"):
            assert as_json[side].get("encapsulation") == (
                "vxlan 42" if as_json[side]["point"] == "mid0" else None
            )

    stream = io.StringIO()
    write_csv(rows, stream)
    for line in csv.DictReader(stream.getvalue().splitlines()):
        for side in ("before", "after"):
            assert line[f"{side}_encapsulation"] == ("vxlan 42" if line[f"{side}_point"] == "mid0" else "")


def test_arrow_columns_have_it(overlay: nattrace.Report) -> None:
    compute = pytest.importorskip("pyarrow.compute", reason="needs pyarrow")
    rows = list(overlay.rewrites.all())
    table = to_table(rows)
    for side, sightings in (
        ("before", [row.before if isinstance(row, Rewrite) else row.packet for row in rows]),
        ("after", [row.after if isinstance(row, Rewrite) else None for row in rows]),
    ):
        column = compute.struct_field(table.column(side), "encapsulation").to_pylist()
        assert column == [None if each is None else each.encapsulation for each in sightings]
    assert "vxlan 42" in column


def test_tables_say_it_beside_the_addresses(overlay: nattrace.Report) -> None:
    stream = io.StringIO()
    write_table(overlay, stream)
    lines = [line for line in stream.getvalue().splitlines() if " in vxlan 42" in line]
    assert len(lines) == 6
    assert all("-> same in vxlan 42" in line for line in lines)

    stream = io.StringIO()
    write_rows_table(overlay.rewrites.all(), stream)
    for line in stream.getvalue().splitlines():
        wrapped = line.count(" in vxlan 42")
        carried = sum(f"mid0:{n} 172.17" in line or f"mid0:{n} 198.51" in line for n in range(1, 200))
        assert wrapped == carried

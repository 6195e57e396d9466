"""Arrow tables and Parquet files hold what the JSON rows hold."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nattrace import MissingToolError, analyze
from nattrace.cli import main
from nattrace.report.rows import row_json

TESTS = Path(__file__).parents[1]
PING = [str(TESTS / "fixtures" / "docker-ping" / f"{name}.pcap") for name in ("docker0", "eth0")]
LOSSY = [
    str(TESTS / "fixtures" / "lab" / "dropped_in_forward" / f"{name}.pcap") for name in ("docker0", "eth0")
]


def without_nulls(value: Any) -> Any:
    """Drop what a JSON row leaves out and Arrow spells as null."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None and k != "time"}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def test_columns_are_those_of_the_json_rows() -> None:
    rewrites = analyze(*PING).rewrites
    table = rewrites.to_arrow()
    rows = [json.loads(row_json(row)) for row in rewrites]
    assert table.num_rows == len(rows) == 40
    assert without_nulls(table.to_pylist()) == without_nulls(rows)
    times = table["before"].combine_chunks().field("time").cast(pa.int64()).to_pylist()
    assert times == [row.before.time for row in rewrites]


def test_parquet_holds_losses_too(tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    assert main(["rewrites", *LOSSY, "--all", "-o", str(out)]) == 0
    table = pq.read_table(out)
    report = analyze(*LOSSY)
    assert table.num_rows == len(list(report.rewrites.all()))
    assert table["reason"].to_pylist().count("lost") == report.accounting.unmatched["lost"] > 0


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def no_pyarrow(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return load(name, *rest)

    rewrites = analyze(*PING).rewrites
    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(MissingToolError, match=r"nattrace\[arrow\]"):
        rewrites.to_arrow()

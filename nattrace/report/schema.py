"""The JSON Schemas (draft 2020-12) that ship with the package, of the report and of the rewrite rows."""

from __future__ import annotations

from importlib.resources import files
from typing import Final, Literal

SchemaName = Literal["report", "rewrites"]

#: What a schema describes to the file that holds it.
SCHEMA_FILES: Final[dict[SchemaName, str]] = {
    "report": "report-1.schema.json",
    "rewrites": "rewrite-1.schema.json",
}


def schema_text(name: SchemaName = "report") -> str:
    """Return the JSON Schema of the report, or of one line of ``rewrites -f jsonl``, as it stands in its file."""
    return files("nattrace.report").joinpath(SCHEMA_FILES[name]).read_text(encoding="utf-8")

"""The JSON Schemas (draft 2020-12) that ship with the package, of the report, the rewrite rows and the manifest."""

from __future__ import annotations

from importlib.resources import files
from typing import Final, Literal

SchemaName = Literal["report", "rewrites", "bundle"]

#: What a schema describes to the package and the file that hold it.
SCHEMA_FILES: Final[dict[SchemaName, tuple[str, str]]] = {
    "report": ("nattrace.report", "report-1.schema.json"),
    "rewrites": ("nattrace.report", "rewrite-1.schema.json"),
    "bundle": ("nattrace.bundle", "bundle-1.schema.json"),
}


def schema_text(name: SchemaName = "report") -> str:
    """Return the JSON Schema of the report, of one line of ``rewrites -f jsonl``, or of a bundle's manifest, as it stands in its file."""
    package, file = SCHEMA_FILES[name]
    return files(package).joinpath(file).read_text(encoding="utf-8")

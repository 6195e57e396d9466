"""Reports as text: one renderer a file, and the table of formats that commands and `Report.write` share.

Renderers are functions from the types of `nattrace.model` to a text stream. They open no file (`output` does
that for all of them), ask for no clock and look at no environment: the same report gives the same bytes.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Final, Literal, TypeVar, get_args

from nattrace.errors import UsageError
from nattrace.report.escape import terminal
from nattrace.report.output import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import TextIO

    from nattrace.model import Rewrite, Unmatched
    from nattrace.report.view import ReportView

ReportFormat = Literal["table", "json"]
RowFormat = Literal["table", "jsonl", "csv", "parquet"]

_Format = TypeVar("_Format", bound=str)

__all__ = [
    "REPORT_FORMATS",
    "REPORT_SUFFIXES",
    "ROW_FORMATS",
    "ROW_SUFFIXES",
    "ReportFormat",
    "RowFormat",
    "report_format",
    "row_format",
    "save_report",
    "whole_file",
    "write_report",
    "write_rows",
]

REPORT_FORMATS: Final[tuple[ReportFormat, ...]] = get_args(ReportFormat)
ROW_FORMATS: Final[tuple[RowFormat, ...]] = get_args(RowFormat)

#: File suffix to format, for reports and for rows.
REPORT_SUFFIXES: Final[Mapping[str, ReportFormat]] = {".txt": "table", ".json": "json"}
ROW_SUFFIXES: Final[Mapping[str, RowFormat]] = {
    ".txt": "table",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}


def report_format(path: str | Path) -> ReportFormat:
    """Return the format that the suffix of `path` asks for; UsageError names the choices."""
    return _by_suffix(path, REPORT_SUFFIXES)


def row_format(path: str | Path) -> RowFormat:
    """Return the format of rewrite rows that the suffix of `path` asks for; UsageError names the choices."""
    return _by_suffix(path, ROW_SUFFIXES)


def write_report(
    data: ReportView,
    stream: TextIO,
    format: ReportFormat,  # noqa: A002 - the word of the command line and of Report.write
    *,
    limit: int | None = None,
    width: int | None = None,
) -> None:
    """Write a report to a text stream; `limit` (flows shown a path, 0 for all) and `width` are the table's."""
    if format == "json":
        from nattrace.report.json import write_json  # noqa: PLC0415 - each command loads its own renderer

        write_json(data, stream)
    elif format == "table":
        from nattrace.report.table import FLOWS_SHOWN, write_table  # noqa: PLC0415

        write_table(data, stream, limit=FLOWS_SHOWN if limit is None else limit, width=width)
    else:
        raise UsageError(f"unknown report format {format!r}: choose from {', '.join(REPORT_FORMATS)}")


def write_rows(
    rows: Iterable[Rewrite | Unmatched],
    stream: TextIO,
    format: RowFormat,  # noqa: A002
    *,
    width: int | None = None,
) -> None:
    """Write rewrite rows to a text stream as they come."""
    if format == "jsonl":
        from nattrace.report.rows import write_jsonl  # noqa: PLC0415

        write_jsonl(rows, stream)
    elif format == "csv":
        from nattrace.report.rows import write_csv  # noqa: PLC0415

        write_csv(rows, stream)
    elif format == "table":
        from nattrace.report.rows_table import write_rows_table  # noqa: PLC0415

        write_rows_table(rows, stream, width=width)
    elif format == "parquet":
        from nattrace.report.arrow import write_parquet  # noqa: PLC0415

        binary = getattr(stream, "buffer", None)
        if binary is None:
            raise UsageError("parquet is no text: write it to a file or a pipe")
        write_parquet(rows, binary)
    else:
        raise UsageError(f"unknown row format {format!r}: choose from {', '.join(ROW_FORMATS)}")


def save_report(
    data: ReportView,
    path: str | Path,
    format: ReportFormat | None = None,  # noqa: A002
) -> None:
    """Write a report to the file `path`, whole or not at all; its suffix picks the format unless one is given.

    Raises UsageError for a suffix without a format, OSError when the file cannot be written.
    """
    chosen = format or report_format(path)
    with whole_file(path) as stream:
        write_report(data, stream, chosen)


def _by_suffix(path: str | Path, suffixes: Mapping[str, _Format]) -> _Format:
    suffix = PurePath(path).suffix.lower()
    if suffix not in suffixes:
        choices = ", ".join(f"{known} ({name})" for known, name in suffixes.items())
        raise UsageError(
            f"{terminal(str(path))}: no format goes by this suffix; name the file {choices}, or say -f"
        )
    return suffixes[suffix]

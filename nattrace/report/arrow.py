"""Rewrite rows as Arrow columns and as Parquet: the shape of a JSON row, with instants as timestamps.

pyarrow is an extra (``pip install nattrace[arrow]``) and is loaded only when asked for. Nothing here decides or
computes; rows are taken as they come, a batch at a time.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from nattrace.errors import MissingToolError
from nattrace.model import Rewrite, Unmatched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

#: Rows of one record batch.
_BATCH_ROWS = 16_384


def to_table(rows: Iterable[Rewrite | Unmatched]) -> Any:
    """Return the rows as a `pyarrow.Table`; `before` and `after` are structs. MissingToolError without pyarrow."""
    pa = _pyarrow()
    schema = _schema(pa)
    return pa.Table.from_batches(_batches(pa, schema, rows), schema)


def write_parquet(rows: Iterable[Rewrite | Unmatched], stream: BinaryIO) -> None:
    """Write the rows as Parquet, a row group a batch. MissingToolError without pyarrow; OSError is the stream's."""
    pa = _pyarrow()
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    schema = _schema(pa)
    with parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for batch in _batches(pa, schema, rows):
            writer.write_batch(batch)


def _pyarrow() -> Any:
    try:
        import pyarrow  # noqa: PLC0415, ICN001 - an extra
    except ImportError as error:
        raise MissingToolError("Arrow and Parquet need pyarrow: pip install 'nattrace[arrow]'") from error
    return pyarrow


def _schema(pa: Any) -> Any:
    text, number, texts = pa.string(), pa.int64(), pa.list_(pa.string())
    numbers = ("ttl", "ip_id", "sport", "dport", "type", "code", "id", "seq", "ack")
    sighting = pa.struct(
        [
            ("point", text),
            ("frame", number),
            ("time", pa.timestamp("ns", tz="UTC")),
            ("protocol", text),
            ("src", text),
            ("dst", text),
            *((name, number) for name in numbers),
            ("flags", text),
            ("length", number),
            ("encapsulation", text),
        ]
    )
    candidate = pa.struct([("point", text), ("frame", number)])
    return pa.schema(
        [
            ("flow", number),
            ("direction", text),
            ("nat", text),
            ("changed", texts),
            ("latency_ns", number),
            ("before", sighting),
            ("after", sighting),
            ("evidence", texts),
            ("reason", text),
            ("candidates", pa.list_(candidate)),
        ]
    )


def _batches(pa: Any, schema: Any, rows: Iterable[Rewrite | Unmatched]) -> Iterator[Any]:
    remaining = iter(rows)
    while batch := [_columns(row) for row in islice(remaining, _BATCH_ROWS)]:
        yield pa.RecordBatch.from_pylist(batch, schema=schema)


def _columns(row: Rewrite | Unmatched) -> dict[str, Any]:
    found = asdict(row)
    if isinstance(row, Unmatched):
        found["before"] = found.pop("packet")
    return found

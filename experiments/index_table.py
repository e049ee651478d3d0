"""The index as an Arrow table: one row a finished cell, its columns typed alike whatever was read first."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .study import cells_schema

__all__ = ["STAMPS", "Row", "index_bytes", "joined", "read_index"]

STAMPS = ("summary_mtime_ns", "summary_size")
Row = dict[str, Any]
_FORMAT_KEY, _FORMAT = b"speccert_index", b"1"  # raise it when the meaning of a column changes


def read_index(path: Path) -> Any:
    """The index on disk; None where it is missing, damaged, or of another version of this program."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException, ValueError):
        return None
    types = dict(zip(table.schema.names, table.schema.types, strict=True))
    is_ours = (table.schema.metadata or {}).get(_FORMAT_KEY) == _FORMAT and _types().items() <= types.items()
    return table.replace_schema_metadata(None) if is_ours else None


def index_bytes(table: Any) -> bytes:
    """The index as a file."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_FORMAT_KEY: _FORMAT}), buffer)
    return buffer.getvalue()


def joined(kept: Any, new: Sequence[Row]) -> Any:
    """An Arrow table of old and new rows, over all their columns; None where a column has changed its kind."""
    import pyarrow as pa

    if not new and kept is not None:
        return kept
    old = {} if kept is None else dict(zip(kept.schema.names, kept.schema.types, strict=True))
    kinds = _types()
    names = dict.fromkeys([*kinds, *(key for row in new for key in row)])
    columns = {name: _column([row.get(name) for row in new], kinds.get(name), old.get(name)) for name in names}
    fresh = pa.table(columns)
    if kept is None or not kept.num_rows:
        return fresh
    if any(name in old and not _fit(old[name], column.type) for name, column in columns.items()):
        return None
    return pa.concat_tables([kept, fresh], promote_options="permissive")


@functools.cache
def _types() -> dict[str, Any]:
    """Types of the columns that every index has."""
    import pyarrow as pa

    schema = cells_schema()
    return {**dict(zip(schema.names, schema.types, strict=True)), **dict.fromkeys(STAMPS, pa.int64())}


def _column(values: Sequence[Any], kind: Any, old: Any) -> Any:
    """Values of one key as an array of `kind`, or where there is none of the kind that fits them all."""
    import pyarrow as pa

    kind = kind or _kind(values, old)
    converters: dict[Any, Callable[[Any], Any]] = {pa.float64(): float, pa.string(): str}
    if convert := converters.get(kind):
        values = [None if value is None else convert(value) for value in values]
    return pa.array(values, kind)


def _kind(values: Sequence[Any], old: Any) -> Any:
    """Numbers, truth values or text; what was text before, since kinds were mixed, stays it."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.null()
    if old == pa.string():
        return old
    if kinds == {list}:
        return pa.list_(pa.string())
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int} and all(value is None or abs(value) <= 2**53 for value in values):
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.string()


def _fit(one: Any, other: Any) -> bool:
    """Whether columns of two types can be joined to what they would have been at once."""
    import pyarrow as pa

    return one == other or pa.null() in (one, other) or {one, other} == {pa.int64(), pa.float64()}

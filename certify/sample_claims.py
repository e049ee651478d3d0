"""The certified samples of a certificate: their digest, and their Parquet form for large numbers of them."""

from __future__ import annotations

import hashlib
import io
import math
import struct
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .claims import CertificateError, SampleClaim

_HEAD = b"speccert-samples-1\n"
_ROW = struct.Struct("<q32sqqdd")
_PREFIX = "sha256:"
_COLUMNS = tuple(field.name for field in fields(SampleClaim))


def samples_digest(samples: Sequence[SampleClaim]) -> str:
    """SHA-256 over the rows in order, each as little-endian int64, 32 bytes, int64, int64, float64, float64."""
    found = hashlib.sha256(_HEAD)
    for row in samples:
        found.update(_ROW.pack(row.index, _hash(row), row.label, row.prediction, row.margin, row.radius))
    return f"{_PREFIX}{found.hexdigest()}"


def check_samples(samples: Sequence[SampleClaim], classes: int, place: str) -> None:
    """Raise CertificateError where a row can't be: indices out of order, classes that are none, no number."""
    before = -1
    for position, row in enumerate(samples):
        if not before < row.index:
            raise CertificateError(f"{place}[{position}]: expected an index above {before}, got {row.index}")
        if not (0 <= row.label < classes and 0 <= row.prediction < classes):
            raise CertificateError(
                f"{place}[{position}]: expected classes 0..{classes - 1}, got label {row.label} and prediction "
                f"{row.prediction}"
            )
        if not (row.margin < math.inf and row.radius >= 0):
            raise CertificateError(
                f"{place}[{position}]: expected a margin and a radius >= 0, got {row.margin} and {row.radius}"
            )
        before = row.index


def to_parquet(samples: Sequence[SampleClaim]) -> bytes:
    """The rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in samples] for name in _COLUMNS}
    columns["input"] = [_hash(row) for row in samples]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_schema()), buffer, use_dictionary=False)
    return buffer.getvalue()


def from_parquet(content: bytes, place: str) -> tuple[SampleClaim, ...]:
    """The rows of a Parquet file; raises CertificateError where it holds anything else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError) as error:
        raise CertificateError(f"{place}: no Parquet file ({str(error).splitlines()[0]})") from error
    if table.schema.remove_metadata() != _schema() or any(column.null_count for column in table.columns):
        columns = ", ".join(f"{field.name} {field.type}" for field in _schema())
        raise CertificateError(f"{place}: expected the columns {columns}, without gaps")
    rows = zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True)
    return tuple(SampleClaim(index, _PREFIX + found.hex(), *rest) for index, found, *rest in rows)


def _hash(row: SampleClaim) -> bytes:
    return bytes.fromhex(row.input.removeprefix(_PREFIX))


def _schema() -> Any:
    import pyarrow as pa

    kinds = (pa.int64(), pa.binary(32), pa.int64(), pa.int64(), pa.float64(), pa.float64())
    columns = zip(_COLUMNS, kinds, strict=True)
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])

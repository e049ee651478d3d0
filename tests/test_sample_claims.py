import dataclasses
import hashlib
import io
import math
import struct

import pandas as pd
import pytest
from certificates import samples

from speccert.certify.claims import CertificateError
from speccert.certify.sample_claims import check_samples, from_parquet, samples_digest, to_parquet


def test_the_digest_is_that_of_the_packed_rows():
    rows = samples(20)
    packed = b"speccert-samples-1\n"
    for row in rows:
        packed += struct.pack("<q", row.index) + bytes.fromhex(row.input[7:])
        packed += struct.pack("<qqdd", row.label, row.prediction, row.margin, row.radius)
    assert samples_digest(rows) == "sha256:" + hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize("count", [1, 500])
def test_parquet_round_trip(count):
    rows = samples(count)
    assert from_parquet(to_parquet(rows), "rows") == rows


def stored(**changes):
    frame = pd.read_parquet(io.BytesIO(to_parquet(samples(5)))).assign(**changes)
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows: no Parquet file"),
        (b"PAR1", "rows: no Parquet file"),
        (to_parquet(samples(5))[:-20], "rows: no Parquet file"),
        (stored(more=1), "rows: expected the columns index int64, input fixed_size_binary"),
        (stored(radius=None), "rows: expected the columns"),
        (stored(label=1.0), "rows: expected the columns"),
    ],
)
def test_other_content_is_refused(content, message):
    with pytest.raises(CertificateError, match=message) as raised:
        from_parquet(content, "rows")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 0}, r"rows\[1\]: expected an index above 0, got 0"),
        ({"index": -1}, r"rows\[1\]: expected an index above 0, got -1"),
        ({"label": 3}, r"rows\[1\]: expected classes 0..2, got label 3 and prediction 1"),
        ({"prediction": -1}, r"rows\[1\]: expected classes 0..2, got label 1 and prediction -1"),
        ({"margin": math.nan}, r"rows\[1\]: expected a margin"),
        ({"margin": math.inf}, r"rows\[1\]: expected a margin"),
        ({"radius": math.nan}, r"rows\[1\]: expected a margin and a radius >= 0"),
        ({"radius": -1e-300}, r"rows\[1\]: expected a margin and a radius >= 0"),
    ],
)
def test_rows_that_cannot_be_are_refused(change, message):
    rows = list(samples(3))
    check_samples(rows, 3, "rows")
    rows[1] = dataclasses.replace(rows[1], **change)
    with pytest.raises(CertificateError, match=message):
        check_samples(rows, 3, "rows")

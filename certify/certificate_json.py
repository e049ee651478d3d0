"""The parts of a certificate as JSON values, and the strict readers of these; see docs/certificate.schema.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import strict_json as strict
from .claims import (
    ArithmeticClaim,
    AssumptionClaim,
    CertificateError,
    ConstantClaim,
    Matrix,
    ModelClaim,
    NormClaim,
    PieceClaim,
    RelaxationClaim,
    RunClaim,
    SampleClaim,
)

FORMAT, VERSION = "speccert-certificate", 2
SIDE = ".samples.parquet"  # end of the name of a file with many samples
_TORUS = "torus"


def matrix_json(matrix: Matrix) -> list[list[float | str]]:
    """A matrix as JSON."""
    return [[strict.plain(entry) for entry in row] for row in matrix]


def norm_json(claim: NormClaim) -> dict[str, Any]:
    """All bounds in one norm as JSON."""
    return {
        "upper": strict.plain(claim.upper),
        "runs": [{"end": run.end, "parts": list(run.parts), **_piece_json(run)} for run in claim.runs],
        "constants": [{"node": one.node, "upper": strict.plain(one.upper)} for one in claim.constants],
        "last_constant": strict.plain(claim.last_constant),
        "pairwise": matrix_json(claim.pairwise),
    }


def relaxation_json(claim: RelaxationClaim) -> dict[str, Any]:
    """A relaxation as JSON."""
    return {
        "norm": claim.norm,
        "start": claim.start,
        "end": claim.end,
        "pair": None if claim.pair is None else list(claim.pair),
        "start_constant": strict.plain(claim.start_constant),
        "upper": strict.plain(claim.upper),
        "multipliers": [[strict.plain(value) for value in row] for row in claim.multipliers],
        "weights": None if claim.weights is None else [strict.plain(value) for value in claim.weights],
        "method": claim.method,
    }


def _piece_json(piece: PieceClaim) -> dict[str, Any]:
    lower = {"lower": strict.plain(piece.lower)} if isinstance(piece, RunClaim) else {}
    return {
        "kind": piece.kind,
        "in": list(piece.in_shape),
        "out": list(piece.out_shape),
        **lower,
        "upper": strict.plain(piece.upper),
        "method": piece.method,
        _TORUS: None if piece.torus is None else [list(axis) for axis in piece.torus],
        "pieces": [_piece_json(part) for part in piece.pieces],
    }


def _piece(value: Any, place: str) -> PieceClaim:
    return PieceClaim(**_piece_fields(strict.fields(_PIECE)(value, place), place))


def _run(value: Any, place: str) -> RunClaim:
    return RunClaim(**_piece_fields(strict.fields(_RUN)(value, place), place))


def _piece_fields(found: dict[str, Any], place: str) -> dict[str, Any]:
    if (found[_TORUS] is not None) != (found["method"] == _TORUS and not found["pieces"]):
        raise CertificateError(f"{place}.torus: expected sides for the method {_TORUS!r}, and null for every other")
    shapes = {"in_shape": found.pop("in"), "out_shape": found.pop("out")}
    return {**found, **shapes}


def _axis(value: Any, place: str) -> tuple[int, int, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise CertificateError(f"{place}: expected [side, stride, twist]")
    twist: float = strict.choice(0.0, 0.5)(strict.number(value[2], place), place)
    return strict.count(1)(value[0], place), strict.count(1)(value[1], place), twist


def _pair(value: Any, place: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise CertificateError(f"{place}: expected two classes")
    return strict.count()(value[0], place), strict.count()(value[1], place)


def _record(kind: Any, readers: dict[str, strict.Reader[Any]]) -> strict.Reader[Any]:
    read = strict.fields(readers)
    return lambda value, place: kind(**read(value, place))


def _sample_fields(value: Any, place: str) -> dict[str, Any]:
    stored: dict[str, strict.Reader[Any]] = {"rows": strict.items(_SAMPLE, 1)}
    if isinstance(value, dict) and "rows" not in value:
        stored = {"file": _file_name, "sha256": strict.digest}
    return strict.fields({"count": strict.count(1), "digest": strict.digest, **stored})(value, place)


def _file_name(value: Any, place: str) -> str:
    name = strict.text(value, place)
    if not name.endswith(SIDE) or Path(name).name != name or "\\" in name or "\0" in name:
        raise CertificateError(f"{place}: expected the plain name of a file NAME{SIDE}")
    return name


def _bounds(value: Any, place: str) -> dict[str, NormClaim]:
    if not isinstance(value, dict) or not value.keys() <= {"l2", "linf", "l1"}:
        raise CertificateError(f"{place}: expected an object of norms l2, linf and l1")
    return {norm: _NORM(found, f"{place}.{norm}") for norm, found in value.items()}


_SHAPE = strict.items(strict.count(1))
_MATRIX = strict.items(strict.items(strict.bound))
_PIECE: dict[str, strict.Reader[Any]] = {
    "kind": strict.text,
    "in": _SHAPE,
    "out": _SHAPE,
    "upper": strict.bound,
    "method": strict.text,
    _TORUS: strict.nullable(strict.items(_axis, 1)),
    "pieces": strict.items(_piece),
}
_RUN = {"end": strict.text, "parts": strict.items(strict.text), "lower": strict.bound, **_PIECE}
_NORM = _record(
    NormClaim,
    {
        "upper": strict.bound,
        "runs": strict.items(_run),
        "constants": strict.items(_record(ConstantClaim, {"node": strict.text, "upper": strict.bound}), 1),
        "last_constant": strict.bound,
        "pairwise": _MATRIX,
    },
)
_RELAXATION = _record(
    RelaxationClaim,
    {
        "norm": strict.choice("l2", "linf", "l1"),
        "start": strict.text,
        "end": strict.text,
        "pair": strict.nullable(_pair),
        "start_constant": strict.positive,
        "upper": strict.positive,
        "multipliers": strict.items(strict.items(strict.positive)),
        "weights": strict.nullable(strict.items(strict.positive)),
        "method": strict.text,
    },
)
_SAMPLE = _record(
    SampleClaim,
    {
        "index": strict.count(),
        "input": strict.digest,
        "label": strict.count(),
        "prediction": strict.count(),
        "margin": strict.lower_bound,
        "radius": strict.bound,
    },
)
_MODEL = {
    "digest": strict.digest,
    "input_shape": _SHAPE,
    "classes": strict.count(2),
    "dtype": strict.choice("float64", "float32", "float16", "bfloat16"),
}
_ARITHMETIC = {
    "name": strict.choice("real", "float64", "float32", "float16", "bfloat16"),
    **dict.fromkeys(("unit", "accumulation", "tiny", "huge"), strict.bound),
}


read_certificate = strict.fields(
    {
        "format": strict.choice(FORMAT),
        "version": strict.choice(VERSION),
        "speccert": strict.text,
        "model": _record(ModelClaim, _MODEL),
        "norm": strict.choice("l2", "linf", "l1"),
        "method": strict.text,
        "arithmetic": _record(ArithmeticClaim, _ARITHMETIC),
        "assumptions": strict.items(
            _record(AssumptionClaim, {"id": strict.text, "text": strict.text}),
        ),
        "bounds": _bounds,
        "relaxations": strict.items(_RELAXATION),
        "pairwise": _MATRIX,
        "lipschitz": strict.bound,
        "samples": _sample_fields,
    }
)

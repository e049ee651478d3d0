"""Certificates as files: JSON read strictly and written whole, with many samples in a Parquet file beside it.

The format is that of docs/certificate.schema.json; floats survive the round trip to the last bit. Nothing here computes
a bound: the independent checker reads certificates with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import strict_json as strict
from .certificate_json import FORMAT, SIDE, VERSION, matrix_json, norm_json, read_certificate, relaxation_json
from .claims import (
    ArithmeticClaim,
    AssumptionClaim,
    CertificateError,
    Matrix,
    ModelClaim,
    NormClaim,
    RelaxationClaim,
    SampleClaim,
)
from .sample_claims import check_samples, from_parquet, samples_digest, to_parquet

_INLINE = 200  # samples that the JSON file holds itself


@dataclass(frozen=True)
class Certificate:
    """What is claimed of a model and of samples, with everything that a proof of it needs beyond these.

    Attributes:
        speccert: version of the program that made it.
        model: which model.
        norm: of the radii, "l2", "linf" or "l1".
        method: of the bound.
        arithmetic: in which the network runs.
        assumptions: on the executing machine.
        bounds: the product of factors per norm: "l2" always, and `norm`.
        relaxations: tighter constants, in these norms, which set entries of the next two.
        pairwise: [K][K] in `norm`: the smallest of its own bounds and of those which follow from l2.
        lipschitz: bound of the map to all logits, `norm` on both sides.
        samples: the certified samples.
    """

    speccert: str
    model: ModelClaim
    norm: str
    method: str
    arithmetic: ArithmeticClaim
    assumptions: tuple[AssumptionClaim, ...]
    bounds: Mapping[str, NormClaim]
    relaxations: tuple[RelaxationClaim, ...]
    pairwise: Matrix
    lipschitz: float
    samples: tuple[SampleClaim, ...]

    def save(self, path: str | Path) -> Path:
        """Write the certificate, and for more than 200 samples NAME.samples.parquet beside it, whole or not at all.

        Raises:
            CertificateError: another kind of file is there, the folder cannot be written, the disk is full.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise CertificateError(f"{path}: expected a file name that ends in .json")
        side = path.with_name(path.stem + SIDE)
        many = to_parquet(self.samples) if len(self.samples) > _INLINE else None
        contents = {} if many is None else {side: many}
        check_replaceable(path, *contents)
        _write_together({**contents, path: self._text(side.name, many).encode()})
        return path

    def _text(self, side: str, many: bytes | None) -> str:
        samples: dict[str, Any] = {"count": len(self.samples), "digest": samples_digest(self.samples)}
        if many is None:
            samples["rows"] = [_plain(asdict(row)) for row in self.samples]
        else:
            samples |= {"file": side, "sha256": f"sha256:{hashlib.sha256(many).hexdigest()}"}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "speccert": self.speccert,
            "model": {**vars(self.model), "input_shape": list(self.model.input_shape)},
            "norm": self.norm,
            "method": self.method,
            "arithmetic": _plain(vars(self.arithmetic)),
            "assumptions": [vars(one) for one in self.assumptions],
            "bounds": {norm: norm_json(bounds) for norm, bounds in self.bounds.items()},
            "relaxations": [relaxation_json(one) for one in self.relaxations],
            "pairwise": matrix_json(self.pairwise),
            "lipschitz": strict.plain(self.lipschitz),
            "samples": samples,
        }
        return strict.layout(content) + "\n"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: strict.plain(value) if isinstance(value, float) else value for key, value in values.items()}


def load_certificate(path: str | Path) -> Certificate:
    """Read a certificate and the samples beside it; what it claims is not checked here.

    Raises:
        CertificateError: a file that is missing, damaged, of another format or version, or not strictly of the form.
    """
    path = Path(path)
    content = _parsed(path, _read(path))
    try:
        return _certificate(content, path.parent)
    except ValueError as error:
        raise CertificateError(f"{path}: {error}") from error
    except RecursionError as error:
        raise CertificateError(f"{path}: nested too deeply") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return strict.parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CertificateError(f"{path}: expected a certificate in JSON, got a file that is no UTF-8 text") from error
    except ValueError as error:
        raise CertificateError(f"{path}: expected a certificate in JSON ({error})") from error


def _certificate(content: Any, folder: Path) -> Certificate:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CertificateError(f"expected a certificate of format {FORMAT!r}, got {found!r:.60}")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise CertificateError(f"expected version {VERSION} of the format, got {content.get('version')!r:.60}")
    found = read_certificate(content, "")
    samples = _samples(found.pop("samples"), found["model"].classes, folder)
    del found["format"], found["version"]
    certificate = Certificate(**found, samples=samples)
    _check_whole(certificate)
    return certificate


def _check_whole(certificate: Certificate) -> None:
    """Raise CertificateError where parts do not fit each other."""
    norms, classes = {"l2", certificate.norm}, certificate.model.classes
    if set(certificate.bounds) != norms:
        raise CertificateError(f"bounds: expected {' and '.join(sorted(norms))}, got {', '.join(certificate.bounds)}")
    matrices = {"pairwise": certificate.pairwise}
    for norm, claim in certificate.bounds.items():
        place = f"bounds.{norm}"
        matrices[f"{place}.pairwise"] = claim.pairwise
        _check_distinct([run.end for run in claim.runs], f"{place}.runs")
        _check_distinct([constant.node for constant in claim.constants], f"{place}.constants")
    for position, one in enumerate(certificate.relaxations):
        place = f"relaxations[{position}]"
        if one.norm not in norms:
            raise CertificateError(f"{place}.norm: expected {' or '.join(sorted(norms))}, got {one.norm}")
        if one.pair is not None and not (max(one.pair) < classes and one.pair[0] != one.pair[1]):
            raise CertificateError(f"{place}.pair: expected two of the classes 0..{classes - 1}, got {list(one.pair)}")
    _check_distinct([one.id for one in certificate.assumptions], "assumptions")
    for place, matrix in matrices.items():
        if len(matrix) != classes or any(len(row) != classes for row in matrix):
            raise CertificateError(f"{place}: expected {classes} rows of {classes} numbers")


def _check_distinct(names: list[str], place: str) -> None:
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise CertificateError(f"{place}: {twice[0]!r} appears twice")


def _samples(found: dict[str, Any], classes: int, folder: Path) -> tuple[SampleClaim, ...]:
    if "rows" in found:
        samples, place = found["rows"], "samples.rows"
    else:
        path = folder / found["file"]
        content = _read(path)
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != found["sha256"]:
            raise CertificateError(f"samples.sha256: {path.name} has another content than was certified")
        samples, place = from_parquet(content, path.name), path.name
    if len(samples) != found["count"]:
        raise CertificateError(f"samples.count: expected {len(samples)} as there are in {place}, got {found['count']}")
    check_samples(samples, classes, place)
    if samples_digest(samples) != found["digest"]:
        raise CertificateError(f"samples.digest: {place} holds other samples than were certified")
    return tuple(samples)


def check_replaceable(path: Path, *sides: Path) -> None:
    """Raise CertificateError where a certificate at `path`, with files at `sides`, would destroy others' files."""
    if path.exists():
        try:
            content = strict.parse(path.read_bytes().decode("utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CertificateError(f"{path}: is there already and is no certificate; nothing was written")
    for side in sides:
        if side.exists():
            from_parquet(_read(side), f"{side}: is there already; nothing was written")


def _write_together(contents: Mapping[Path, bytes]) -> None:
    """Write all files under temporary names, then rename them in order: a full disk leaves none of them."""
    temporary = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in contents}
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            temporary[path].replace(path)
    except OSError as error:
        raise CertificateError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        for left in temporary.values():
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)

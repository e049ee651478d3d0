"""Certificates as files: `certify bound --certificate`, `certify run --certificate`, `certify verify`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from torch import nn

from .. import __version__
from ..certify import Certificate, CertificateError, certify, load_certificate
from ..certify.arithmetic import arithmetic_for, check_arithmetic
from ..certify.certificate_file import check_replaceable
from ..certify.digests import input_digests, model_digest
from ..certify.graph import trace
from ..certify.rules import leaf_types
from .bound_stage import BoundRequest
from .cell import cell_data, load_model
from .config import CellConfig, ConfigError
from .data import Dataset
from .spec import RunSpec
from .stages import Opened
from .store import RunFolder
from .sweep import CellError

if TYPE_CHECKING:
    from ..certify.checker import Verdict

__all__ = ["certify_cells", "certify_one", "certifying", "check_name", "check_request", "verify_one"]

_TAKEN = ("config.json", "summary.json", "bounds.json", "failed.json")  # of a run folder


def check_request(opened: Opened, path: Path, arithmetic: str | None, samples: int | None) -> None:
    """Raise ValueError, before anything is computed, where `certify_one` could not do what is asked of it."""
    count = len(opened.data.test.x)
    if samples is not None and not 1 <= samples <= count:
        raise ConfigError(f"samples: expected 1 to {count}, as many as there are test samples; got {samples}")
    check_arithmetic(arithmetic)
    check_replaceable(path)


def certify_one(
    opened: Opened,
    path: Path,
    request: BoundRequest,
    *,
    console: Console,
) -> Certificate:
    """Certify the first test samples as requested (all where not told), write the certificate, and say what it holds.

    Raises:
        ConfigError: more samples than there are, or none.
        CertificateError: a file that must not be overwritten or cannot be written.
    """
    check_request(opened, path, request.arithmetic, request.samples)
    x, y = (part[: request.samples] for part in (opened.data.test.x, opened.data.test.y))
    arithmetic = request.arithmetic or opened.config.arithmetic
    made = certify(opened.model, x, y, request.norm, request.method, arithmetic, budget=request.seconds)
    console.out(f"{made.save(path)}: {_described(made)}", highlight=False)
    return made


def verify_one(path: Path, opened: Opened, *, console: Console) -> Verdict:
    """Check a certificate of test samples with the independent checker, and say what came out.

    Raises:
        CertificateError: a file that is no certificate.
    """
    from ..certify.checker import verify

    data = opened.data.test
    with console.status("reading") as status:  # shows nothing where the output is no terminal
        verdict = verify(load_certificate(path), opened.model, data.x, data.y, report=status.update)
    console.out(verdict.message, highlight=False)
    return verdict


def check_name(name: str, *, wait: bool = True) -> None:
    """Raise ConfigError where `name` can't be a certificate's file in each run folder, or nobody waits for the runs."""
    if not wait:
        raise ConfigError("certificate: made when the cells are finished, so that the run has to wait for them")
    if Path(name).name != name or not name.endswith(".json") or name.startswith(".") or name in _TAKEN:
        raise ConfigError(
            f"certificate: expected a file name without a folder that ends in .json, none of {', '.join(_TAKEN)}; got "
            f"{name!r}"
        )


@contextlib.contextmanager
def certifying(
    spec: RunSpec, output: Path, name: str | None, *, data_root: Path | None, console: Console
) -> Iterator[None]:
    """After the run of `spec` in it, certificates go into the finished cells' folders; none where `name` is None.

    Raises:
        ConfigError: before the run, where a cell's radii are local ones.
    """
    if name is not None and any(cell.bound == "local" for cell in spec.cells()):
        raise ConfigError("certificate: can't hold local radii; give another bound, such as auto")
    try:
        yield
    except CellError:
        if name is not None:  # the cells that did not fail are finished
            with contextlib.suppress(ValueError):  # has been said; the failed cells are what matters
                certify_cells(spec, output, name, data_root=data_root, console=console)
        raise
    if name is not None:
        certify_cells(spec, output, name, data_root=data_root, console=console)


def certify_cells(spec: RunSpec, output: Path, name: str, *, data_root: Path | None, console: Console) -> None:
    """Certify all test samples of each finished cell of `spec` in NAME in its folder, from its checkpoint; a line each.

    A certificate that is there and still fits the model, the samples and the settings is kept. Proofs and predictions
    are made on the CPU, wherever the cell was trained.

    Raises:
        ValueError: after all others are done, the first cell that could not be certified, with the reason.
    """
    root = data_root if data_root is not None else spec.execution.get("data_root")
    problems = []
    for cell in spec.cells():
        folder = RunFolder.of(output, cell)
        if not folder.is_finished:
            continue
        try:
            line = _certify_cell(folder, cell, folder.path / name, root)
        except ValueError as error:
            line = f"no certificate ({error})"
            problems.append(f"{folder.id}: {error}")
        console.out(f"{folder.id}: {line}", highlight=False)
    if problems:
        further = f" (and {len(problems) - 1} more cells)" if len(problems) > 1 else ""
        raise ValueError(f"cell {problems[0]}{further}")


def _certify_cell(folder: RunFolder, cell: CellConfig, path: Path, data_root: str | Path | None) -> str:
    data = cell_data(cell, data_root)
    model = load_model(folder, data)
    if (found := _fitting(path, cell, data, model)) is not None:
        return f"{path.name} is kept: {_described(found)}"
    check_replaceable(path)
    made = certify(
        model, data.test.x, data.test.y, cell.norm, cell.bound, cell.arithmetic, budget=cell.bound_budget
    )  # fmt: skip
    made.save(path)
    return f"{path.name}: {_described(made)}"


def _fitting(path: Path, cell: CellConfig, data: Dataset, model: nn.Module) -> Certificate | None:
    """The certificate at `path` if it is of this very model, these samples and settings."""
    try:
        found = load_certificate(path)
    except CertificateError:
        return None
    digest = model_digest(trace(model, data.input_shape, leaf_types()))
    arithmetic = arithmetic_for(model, cell.arithmetic).name
    settings = (found.speccert, found.model.digest, found.norm, found.method, found.arithmetic.name)
    if settings != (__version__, digest, cell.norm, cell.bound, arithmetic):
        return None
    rows = list(zip(input_digests(data.test.x), data.test.y.tolist(), strict=True))
    return found if [(row.input, row.label) for row in found.samples] == rows else None


def _described(certificate: Certificate) -> str:
    rows = certificate.samples
    correct = sum(row.label == row.prediction for row in rows) / len(rows)
    mean = math.fsum(row.radius for row in rows) / len(rows)
    return (
        f"{len(rows)} samples, {100 * correct:.1f} % correct, mean certified {certificate.norm} radius {mean:.4g}, "
        f"{certificate.arithmetic.name} arithmetic"
    )

"""The independent checker of certificates: everything that one claims is proved again, in exact and ball arithmetic.

It shares no code with what makes the bounds: from this package it takes the reading of files, the digests and the
tracing of the model. Its tables of operations are its own; matrices are proved in integers, scalars in Arb balls.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flint import arb, ctx
from torch import Tensor, nn

from ..certificate_file import Certificate, load_certificate
from ..claims import CertificateError, SampleClaim
from ..digests import input_digests, model_digest
from ..graph import check_model, check_replay, floating_like
from .balls import PRECISION
from .bounds import check_bounds, check_final, row_differences
from .deviation import Deviation
from .invalid import Invalid, stage
from .network import Network, plain_copy, read, traced
from .relaxations import check_relaxations
from .rounds import FORMATS
from .samples import Passed, Radii, entry_rounds, forward

_READING = 1e-3  # of the largest logit: far above rounding, far below what another layer would do
_METHODS = ("product", "closed-form", "lipsdp", "lipsdp-layer", "lipsdp-first-order", "auto")
_NAMES = {number.dtype: name for name, number in FORMATS.items() if number.dtype is not None}


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check.

    Attributes:
        valid: whether every claim was proved.
        claim: the first that was not, e.g. "run fc2 (l2)" or "radius 17"; empty for a valid certificate.
        message: one line for people.
        counts: how many claims of each kind were proved.
    """

    valid: bool
    claim: str
    message: str
    counts: Mapping[str, int] = field(default_factory=dict)


def verify(
    certificate: Certificate | str | Path,
    model: nn.Module,
    x: Tensor,  # [N, *input_shape], the data that the samples are from
    y: Tensor | None = None,  # [N] integers
    *,
    report: Callable[[str], None] | None = None,
) -> Verdict:
    """Prove every claim of a certificate again, for this model and these data.

    In order: model digest, input shape and classes; inputs and labels of all samples; the arithmetic's constants and
    assumptions; the norm of every affine run; the constants of all tensors; the relaxations; the constants of pairs of
    classes; margins, predictions and radii. The first that cannot be proved ends the check. Nothing in the file is
    trusted: a claim that is true but that the checker cannot prove is invalid too.

    Args:
        certificate: as read, or the file.
        model: the certified model, in eval mode.
        x: the data; a sample's index is its position there.
        y: the labels of the data; None takes the certificate's.
        report: told what is done, now and then.
    """
    counts: dict[str, int] = {}
    with ctx.workprec(PRECISION), torch.no_grad():
        try:
            with stage("format"):
                found = certificate if isinstance(certificate, Certificate) else load_certificate(certificate)
            _check(found, model, x, y, counts, report or (lambda text: None))
        except CertificateError as error:
            return Verdict(False, "format", f"invalid: format: {error}", counts)
        except Invalid as error:
            return Verdict(False, error.claim, f"invalid: {error.claim}: {error}", counts)
    return Verdict(True, "", _summary(found, counts, len(x)), counts)


def _summary(certificate: Certificate, counts: Mapping[str, int], size: int) -> str:
    certified = sum(row.radius > 0 for row in certificate.samples)
    runs, constants = counts.get("runs", 0), counts["constants"]
    proved = f"{runs} norms and {constants} constants"
    if "relaxations" in counts:
        proved = f"{runs} norms, {constants} constants and {counts['relaxations']} relaxations"
    return (
        f"valid: {counts['samples']} of {size} samples, {certified} with a radius > 0 in {certificate.norm}, "
        f"{certificate.arithmetic.name} arithmetic; {proved} proved"
    )


def _check(
    certificate: Certificate,
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    counts: dict[str, int],
    report: Callable[[str], None],
) -> None:
    with stage("model"):
        here = _check_identity(certificate, model, x, y)
    with stage("samples"):
        chosen = _check_samples(certificate, x, y)
    with stage("arithmetic"):
        _check_arithmetic(certificate)
    with stage("model"):
        network, dtype = _executed(certificate, here)
    for norm in dict.fromkeys(("l2", certificate.norm)):
        with stage(f"bounds {norm}"):
            if norm not in certificate.bounds:
                raise Invalid(f"bounds {norm}", "missing")
            check_bounds(network, certificate.bounds[norm], norm, counts, report)
    with stage("relaxations"):
        check_relaxations(network, certificate, counts, report)
    with stage("pairwise"):
        check_final(certificate, math.prod(network.nodes[0].shape))
    with stage("samples"):
        _check_rows(certificate, network, chosen, dtype, counts, report)


def _check_identity(certificate: Certificate, model: nn.Module, x: Tensor, y: Tensor | None) -> nn.Module:
    """The model on the CPU, found to be the certified one."""
    claim = certificate.model
    if certificate.method not in _METHODS or certificate.norm not in ("l2", "linf", "l1"):
        raise Invalid("format", f"the checker knows no {certificate.method} bound in {certificate.norm}")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor | None) or x.layout != torch.strided or x.is_meta:
        raise Invalid("samples", "expected data and labels as dense tensors")
    if not x.is_floating_point() or x.dim() < 1 or len(x) == 0:
        raise Invalid("samples", f"expected floating-point data, got {x.dtype} of shape {tuple(x.shape)}")
    if tuple(x.shape[1:]) != tuple(claim.input_shape):
        raise Invalid("input shape", f"certified for {tuple(claim.input_shape)}, the data have {tuple(x.shape[1:])}")
    check_model(model)
    here = copy.deepcopy(model).cpu()
    graph = traced(here, tuple(claim.input_shape))
    check_replay(graph)
    found = model_digest(graph)
    if found != claim.digest:
        foreign = traced(here, tuple(claim.input_shape), foreign=True)
        if model_digest(foreign) == claim.digest:
            read(foreign)  # says which layer it has no rule for
        raise Invalid("model digest", f"certified {claim.digest}, this model has {found}")
    if graph.shapes[graph.output] != (claim.classes,):
        raise Invalid("classes", f"certified {claim.classes}, the model gives {graph.shapes[graph.output]}")
    dtype = str(floating_like(here).dtype).removeprefix("torch.")
    if dtype != claim.dtype:
        raise Invalid("model dtype", f"certified {claim.dtype}, the model has {dtype}")
    return here


def _check_samples(certificate: Certificate, x: Tensor, y: Tensor | None) -> Tensor:
    """The certified samples out of the data, found to be the certified ones."""
    rows, classes = certificate.samples, certificate.model.classes
    if not rows:
        raise Invalid("samples", "expected at least one")
    for before, row in itertools.pairwise((None, *rows)):
        if row is None or not 0 <= row.index < len(x) or (before is not None and row.index <= before.index):
            raise Invalid(
                "samples", f"index {row.index if row else None}: expected increasing positions below {len(x)}"
            )
        if not (0 <= row.label < classes and 0 <= row.prediction < classes):
            raise Invalid(f"label {row.index}", f"expected classes below {classes}")
    chosen = x[torch.tensor([row.index for row in rows])].cpu()
    for row, digest in zip(rows, input_digests(chosen), strict=True):
        if row.input != digest:
            raise Invalid(f"input {row.index}", f"certified {row.input}, the data have {digest}")
    if y is not None:
        if y.shape[:1] != x.shape[:1] or y.dim() != 1 or y.is_floating_point():
            raise Invalid("samples", f"expected {len(x)} integer labels, got {y.dtype} of shape {tuple(y.shape)}")
        for row in rows:
            if int(y[row.index]) != row.label:
                raise Invalid(f"label {row.index}", f"certified {row.label}, the data have {int(y[row.index])}")
    return chosen


def _check_arithmetic(certificate: Certificate) -> None:
    claim = certificate.arithmetic
    number = FORMATS.get(claim.name)
    if number is None:
        raise Invalid("arithmetic", f"expected one of {', '.join(FORMATS)}; got {claim.name!r}")
    for name in ("unit", "accumulation", "tiny", "huge"):
        if getattr(claim, name) != getattr(number, name):
            raise Invalid(
                "arithmetic", f"{name} of {claim.name} is {getattr(number, name)!r}, got {getattr(claim, name)!r}"
            )
    given = [one.id for one in certificate.assumptions]
    if sorted(given) != sorted(number.assumptions) or any(not one.text.strip() for one in certificate.assumptions):
        raise Invalid("assumptions", f"{claim.name} needs {', '.join(number.assumptions)}; got {', '.join(given)}")


def _executed(certificate: Certificate, model: nn.Module) -> tuple[Network, torch.dtype]:
    """The network whose weights are those that run, and the type of its inputs."""
    kinds = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} or {torch.float32}
    if not kinds <= set(_NAMES) or {torch.float16, torch.bfloat16} <= kinds:
        raise Invalid("model", f"expected tensors of one floating-point type, got {', '.join(map(str, kinds))}")
    own = max((_NAMES[kind] for kind in kinds), key=lambda name: FORMATS[name].unit)
    name = certificate.arithmetic.name
    rounded = None if name in (own, "real") else FORMATS[name].dtype
    plain = plain_copy(model, rounded)
    graph = traced(plain, certificate.model.input_shape)
    check_replay(graph)
    network = read(graph)
    _check_reading(network, plain, graph.sample)
    return network, rounded or floating_like(model).dtype


def _check_reading(network: Network, model: nn.Module, sample: Tensor) -> None:
    """A cross-check of the checker's tables: the model itself, run in float64, gives about the same logits."""
    logits = copy.deepcopy(model).double()(sample.double())
    allowed = _READING * float(logits.abs().max())
    for row, passed in zip(logits, forward(network, sample, lambda text: None), strict=True):
        for value, ball in zip(row.tolist(), passed.logits, strict=True):
            if not abs(arb(value) - ball) <= allowed + passed.radius + arb(1e-300):
                read_so = float(ball.mid())
                raise Invalid("model", f"it computes {value:.6g} in float64 where its layers say {read_so:.6g}")


def _check_rows(
    certificate: Certificate,
    network: Network,
    x: Tensor,
    dtype: torch.dtype,
    counts: dict[str, int],
    report: Callable[[str], None],
) -> None:
    l2, size = certificate.bounds["l2"], math.prod(network.nodes[0].shape)
    runs = {run.end: run.upper for run in l2.runs}
    anchors = {constant.node: constant.upper for constant in l2.constants}
    stretch = arb(size).sqrt() if certificate.norm == "linf" else arb(1)
    pairwise = [[arb(value) for value in row] for row in certificate.pairwise]
    differences = row_differences(network, "l2")

    def radii(name: str) -> Radii:
        deviation = Deviation(network, runs, anchors, FORMATS[name])
        rounds = name != "real" and entry_rounds(x, dtype)
        return Radii(deviation, pairwise, differences, stretch, rounds=rounds)

    proof = radii(certificate.arithmetic.name)
    runner = radii(_NAMES[dtype]) if certificate.arithmetic.name == "real" else proof
    for row, passed in zip(certificate.samples, forward(network, x, report), strict=True):
        _check_row(row, proof, runner, passed)
        counts["samples"] = counts.get("samples", 0) + 1


def _check_row(row: SampleClaim, proof: Radii, runner: Radii, passed: Passed) -> None:
    margin = proof.margin(passed, row.label)
    if not margin >= arb(row.margin):
        shown = float(margin.lower())
        raise Invalid(f"margin {row.index}", f"claimed {row.margin!r}, the checker proves {shown:.17g}")
    centre = proof.at_centre(passed)
    if runner.refuted(passed, centre if runner is proof else runner.at_centre(passed), row.prediction):
        raise Invalid(f"prediction {row.index}", f"claimed {row.prediction}, the network surely gives another class")
    problem = proof.problem(passed, centre, row)
    if problem:
        raise Invalid(f"radius {row.index}", problem)

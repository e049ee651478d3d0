"""Certificates from models and samples: proved bounds, margins and radii gathered into one checkable object."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import __version__
from .arithmetic import assumptions, proving
from .certificate_file import Certificate
from .certifier import Certifier, Margins, Radii
from .checker.relaxations import refused_starts
from .claims import (
    ArithmeticClaim,
    AssumptionClaim,
    ConstantClaim,
    Matrix,
    ModelClaim,
    NormClaim,
    PieceClaim,
    RelaxationClaim,
    RunClaim,
    SampleClaim,
)
from .digests import input_digests, model_digest
from .graph import check_model, floating_like, trace
from .inequality import Relaxation
from .linear import LinearMap, NormBounds
from .lipschitz import LipschitzBound, NormRecord, Run, by_relaxations
from .rules import leaf_types


def certify(
    model: nn.Module,
    x: Tensor,  # [B, *input_shape], raw inputs
    y: Tensor | None = None,  # [B] int64; the prediction where None
    norm: str = "l2",
    method: str = "product",
    arithmetic: str | None = None,
    *,
    index: Sequence[int] | None = None,
    budget: float = 60.0,
) -> Certificate:
    """Certify samples: a radius each, with everything that an independent proof of it needs.

    A sample's radius r is such that no representable input closer than r, in `norm` and raw units, is classified
    otherwise than `y` by the network run in `arithmetic`, under the assumptions that the certificate names. Bounds are
    proved and predictions made on the CPU. See `certified_radii` for the formula, docs/certificates.md for the content.
    Relaxations that are too large for the checker are left out, and so is what they would add to a radius.

    Args:
        model: any module whose operations have rules, in eval mode.
        x: the samples.
        y: the classes to certify.
        norm: "l2", "linf" or "l1".
        method: of the bound, as in `lipschitz`; radii by "local" can't be stored.
        arithmetic: "float64", "float32", "float16", "bfloat16" or "real"; that of the model where None.
        index: positions of the samples in the data that they are from, increasing; 0, 1, ... where None.
        budget: seconds that a method other than "product" may take, about.

    Raises:
        ValueError: as `certified_radii`; an index that does not fit; the method "local".
    """
    if method == "local":
        raise ValueError(
            'method: a certificate can\'t hold radii by "local"; expected one of the others, such as "auto"'
        )
    shape = tuple(x.shape[1:])
    check_model(model)
    positions = _positions(len(x), index)
    here, x = copy.deepcopy(model).cpu(), x.detach().cpu()
    certifier = Certifier(here, shape, arithmetic, norm=norm, method=method, budget=budget)
    margins = certifier.margins(x, None if y is None else y.cpu())
    bound, run = _checkable(certifier), certifier.executed.arithmetic
    return Certificate(
        speccert=__version__,
        model=_model_claim(here, shape, len(bound.pairwise)),
        norm=norm,
        method=method,
        arithmetic=ArithmeticClaim(**vars(run)),
        assumptions=tuple(AssumptionClaim(one.id, one.text) for one in assumptions(run)),
        bounds={name: _norm_claim(bound.records[name]) for name in dict.fromkeys(("l2", norm))},
        relaxations=tuple(map(_relaxation_claim, bound.relaxations)),
        pairwise=_matrix(bound.pairwise),
        lipschitz=bound.upper,
        samples=_sample_claims(positions, x, margins, certifier.radii(margins, bound)),
    )


@proving()
def _checkable(certifier: Certifier) -> LipschitzBound:
    """The bound without the relaxations that the checker can't take, which leaves the product's constants there."""
    bound = certifier.bound
    starts = {one.start for one in bound.relaxations}
    refused = refused_starts(certifier.executed.model, bound.input_shape, starts) if starts else frozenset()
    if not refused:
        return bound
    return by_relaxations(bound, [one for one in bound.relaxations if one.start not in refused])


def _positions(count: int, index: Sequence[int] | None) -> list[int]:
    positions = list(range(count)) if index is None else [int(position) for position in index]
    if len(positions) != count or positions != sorted({*positions}) or min(positions, default=0) < 0:
        raise ValueError(f"index: expected {count} increasing integers >= 0, got {positions[:5]}")
    return positions


def _model_claim(model: nn.Module, shape: tuple[int, ...], classes: int) -> ModelClaim:
    digest = model_digest(trace(model, shape, leaf_types()))
    return ModelClaim(digest, shape, classes, str(floating_like(model).dtype).removeprefix("torch."))


def _sample_claims(positions: list[int], x: Tensor, margins: Margins, radii: Radii) -> tuple[SampleClaim, ...]:
    columns = (margins.label, margins.prediction, margins.lowest, radii.radius)
    rows = zip(positions, input_digests(x), *(column.tolist() for column in columns), strict=True)
    return tuple(SampleClaim(*row) for row in rows)


def _norm_claim(record: NormRecord) -> NormClaim:
    return NormClaim(
        record.upper,
        tuple(_run_claim(run) for run in record.runs),
        tuple(ConstantClaim(node, upper) for node, upper in record.constants),
        record.last_constant,
        _matrix(record.pairwise),
    )


def _relaxation_claim(one: Relaxation) -> RelaxationClaim:
    weights = None if one.norm != "linf" or one.weights is None else tuple(one.weights.tolist())
    multipliers = tuple(tuple(row.tolist()) for row in one.multipliers)
    return RelaxationClaim(
        one.norm, one.start, one.end, one.pair, one.start_constant, one.upper, multipliers, weights, one.method
    )


def _run_claim(run: Run) -> RunClaim:
    piece = _piece_claim(run.operator, run.bounds)
    return RunClaim(**vars(piece), end=run.end, parts=run.parts, lower=run.bounds.lower)


def _piece_claim(linear: LinearMap, bounds: NormBounds) -> PieceClaim:
    pieces = tuple(_piece_claim(part, inner) for part, inner in bounds.pieces)
    shapes = (tuple(linear.in_shape), tuple(linear.out_shape))
    return PieceClaim(type(linear).__name__, *shapes, bounds.upper, bounds.method, bounds.torus or None, pieces)


def _matrix(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.to(torch.float64).tolist())

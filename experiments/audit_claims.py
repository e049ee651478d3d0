"""What tools with known mistakes would claim of a model, computed afresh, beside what is proved and attained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..certify import NormBounds, estimate_norm
from ..certify.convolution import Convolution, Transposed
from ..certify.linear import Dense, Diagonal, LinearMap
from ..certify.spectral import bracket
from ..models.constraints import SpectralConstraint
from .audit_graph import Layer, Operation, Run

__all__ = ["Claim", "layer_claims", "operation_claims", "run_claims", "worst_of_each"]

RESHAPED = "takes the reshaped kernel's norm"
KERNEL_GRID = "takes the FFT on the kernel's grid, not the picture's"
GROUPS = "multiplies the norms of a convolution's groups"
ZERO_PADDING = "takes every padding for zeros"
BATCH_NORM = "counts batch normalisation as 1"
VARIANCE = "takes the variance for its root in batch normalisation"
NO_NORMALISATION = "leaves the input normalisation out"
LARGEST_STD = "divides by the largest std of the channels"
UNKNOWN_LAYER = "counts a layer that it does not know as 1"
STORED = "reads the stored tensor, not the parametrized weight"
PROMISE = "believes what the parametrization promises"
GRAM32 = "computes the norm in float32"
POWER = "takes 10 power iterations for a bound"
POWER_ONES = "starts power iteration at all ones (100 steps)"
MAX_POOL = "counts overlapping max pooling as 1"
ACTIVATION = "counts every activation as 1"

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PROMISES = {"_SpectralNorm": 1.0, "_Orthogonal": 1.0}  # torch's own parametrizations
_FLOAT32_SIDE = 1024
_ONES_SIDE = 4096
_ATTAINED = ("LeakyReLU", "ELU", "GELU", "gelu", "SiLU", "silu")  # besides max pooling: slopes taken at some point


@dataclass(frozen=True)
class Claim:
    """A constant that a mistaken method gives.

    Attributes:
        method: what such a tool does.
        place: the layer, run or part of the model.
        claimed: its constant.
        attained: a lower estimate of the true one, attained at some input (0 where none is known).
        proved: the proved upper bound.
        also: further places where the same method claims less than is attained.
    """

    method: str
    place: str
    claimed: float
    attained: float
    proved: float
    also: int = 0

    @property
    def excess(self) -> float:
        """Factor by which radii from this constant are too large, at least; 1 where none is known to be."""
        if self.attained <= self.claimed:
            return 1.0
        return self.attained / self.claimed if self.claimed > 0 else math.inf

    @property
    def verdict(self) -> str:
        """ "too small" (below an attained value), "not proved" (below the proved bound) or "safe here"."""
        if self.attained > self.claimed:
            return "too small"
        return "not proved" if self.claimed < self.proved else "safe here"


def worst_of_each(claims: Iterable[Claim]) -> list[Claim]:
    """Of each method the claim that is furthest below what is attained, with the number of other such places."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.method, []).append(claim)
    return [_worst(group) for group in groups.values()]


def _worst(group: list[Claim]) -> Claim:
    worst = max(group, key=lambda claim: (claim.excess, claim.proved / claim.claimed if claim.claimed else math.inf))
    return replace(worst, also=sum(claim is not worst and claim.excess > 1 for claim in group))


def layer_claims(
    layers: Iterable[Layer], norm: str, bounds_of: Callable[[Layer], NormBounds | None]
) -> Iterator[Claim]:
    """The claims on single affine layers; `bounds_of` gives a layer's proved bracket, where it has one."""
    for layer in layers:
        bounds = bounds_of(layer)
        if bounds is not None:
            for method, claimed in _claimed(layer, norm):
                yield Claim(method, layer.place, claimed, bounds.lower, bounds.upper)


def _claimed(layer: Layer, norm: str) -> Iterator[tuple[str, float]]:
    linear, module = layer.linear, layer.module
    if isinstance(module, _BATCH_NORMS):
        yield BATCH_NORM, 1.0
        yield VARIANCE, _over_variance(module)
    elif isinstance(linear, Diagonal) and layer.first:
        scale = linear.scale.abs()
        if float(scale.max()) != 1.0:
            yield NO_NORMALISATION, 1.0
        if float(scale.min()) < float(scale.max()):
            yield LARGEST_STD, float(scale.min())
    elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        if norm == "l2":
            yield from _euclidean(linear)
        yield from _of_parametrization(layer, norm)
    elif not isinstance(linear, Dense):
        yield UNKNOWN_LAYER, 1.0


def _over_variance(module: Any) -> float:
    variance = module.running_var.double() + module.eps
    weight = torch.ones_like(variance) if module.weight is None else module.weight.detach().double()
    return float((weight / variance).abs().max())


def _euclidean(linear: LinearMap) -> Iterator[tuple[str, float]]:
    if isinstance(linear, Dense) and min(linear.weight.shape) <= _FLOAT32_SIDE:
        yield GRAM32, _gram_norm(linear.weight.float())
    if isinstance(linear, Transposed):
        yield RESHAPED, _gram_norm(linear.weight.transpose(0, 1).flatten(1))
    if not isinstance(linear, Convolution):
        return
    weight = linear.weight
    yield RESHAPED, _gram_norm(weight.flatten(1))
    if linear.groups > 1:
        yield GROUPS, math.prod(bracket(group).upper for group in _groups(linear))
    elif all(s == 1 for s in (*linear.stride, *linear.dilation)):
        symbol = torch.fft.fftn(weight, dim=list(range(2, weight.dim())))
        yield KERNEL_GRID, _gram_norm(symbol.flatten(2).permute(2, 0, 1))
    if linear.padding_mode != "zeros":
        yield ZERO_PADDING, bracket(replace(linear, padding_mode="zeros")).upper


def _gram_norm(matrix: Tensor) -> float:
    gram = matrix @ matrix.mH if matrix.shape[-2] <= matrix.shape[-1] else matrix.mH @ matrix
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[..., -1].max())))


def _groups(linear: Convolution) -> list[Convolution]:
    in_shape = (linear.in_shape[0] // linear.groups, *linear.in_shape[1:])
    return [replace(linear, weight=part, in_shape=in_shape, groups=1) for part in linear.weight.chunk(linear.groups)]


def _of_parametrization(layer: Layer, norm: str) -> Iterator[tuple[str, float]]:
    if layer.module is None or not parametrize.is_parametrized(layer.module, "weight"):
        return
    listed = layer.module.parametrizations.weight  # type: ignore[union-attr]
    stored = getattr(listed, "original", None)
    weight = layer.linear.weight  # type: ignore[attr-defined]
    if isinstance(stored, Tensor) and stored.shape == weight.shape and not torch.equal(stored.to(weight), weight):
        yield STORED, bracket(replace(layer.linear, weight=stored.detach().to(weight)), norm).upper  # type: ignore[type-var]
    last = listed[-1]  # type: ignore[index]
    promise = last.threshold if isinstance(last, SpectralConstraint) else _PROMISES.get(type(last).__name__)
    if promise is not None and norm == "l2":
        yield PROMISE, float(promise)


def run_claims(runs: Iterable[tuple[Run, NormBounds]], norm: str) -> Iterator[Claim]:
    """Power iteration on each affine run, which approaches its norm from below."""
    if norm != "l2":
        return
    for run, bounds in runs:
        place = " + ".join(run.parts)
        yield Claim(POWER, place, float(estimate_norm(run.linear, None, 10)[0]), bounds.lower, bounds.upper)
        if math.prod(run.linear.in_shape) <= _ONES_SIDE:
            ones = torch.ones(1, *run.linear.in_shape, dtype=torch.float64)
            claimed = float(estimate_norm(run.linear, ones / ones.norm(), 100)[0])
            if claimed < 0.9 * bounds.lower:  # a slow approach is the case above; this one never arrives
                yield Claim(POWER_ONES, place, claimed, bounds.lower, bounds.upper)


def operation_claims(operations: Iterable[Operation]) -> Iterator[Claim]:
    """Operations whose factor is above 1, counted as 1."""
    for operation in operations:
        if operation.factor is None or operation.factor <= 1:
            continue
        pool = operation.kind.lower().replace("_", "").startswith("maxpool")
        attained = operation.factor * (1 - 1e-9) if pool or operation.kind in _ATTAINED else 0.0
        yield Claim(MAX_POOL if pool else ACTIVATION, operation.place, 1.0, attained, operation.factor)

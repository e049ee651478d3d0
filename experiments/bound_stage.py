"""`certify bound`: brackets of a model's Lipschitz constants, method by method, and radii by local bounds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..certify import Certifier, LipschitzBound, lipschitz
from ..certify.execution import executed
from ..certify.graph import floating_like
from ..certify.local import local_radii
from .config import BOUNDS, NORMS, RULES, ConfigError, canonical
from .stages import Opened

__all__ = ["BoundRequest", "bound_one"]

SOLVERS = ("built-in", "clarabel", "scs", "mosek")
_SOLVED = ("lipsdp", "lipsdp-layer")  # methods that take a solver
_POINTS = 256  # test samples that the search for large Jacobians starts from
_WIDE = 100  # characters of the table of methods
_SAMPLES = 100  # whose radii are compared, unless told otherwise


@dataclass(frozen=True)
class BoundRequest:
    """What `certify bound` is asked for.

    Args:
        norm: "l2", "linf" or "l1".
        method: of `lipschitz`.
        budget: a duration such as "90", "90s" or "2m".
        solver: of "lipsdp" and "lipsdp-layer".
        samples: for the method "local", of how many test samples to compare the radii.
        arithmetic: for the method "local", that of the radii; None is that of the model's settings.

    Raises:
        ConfigError: names every bad value in one line.
    """

    norm: str = "l2"
    method: str = "product"
    budget: str = "60"
    solver: str | None = None
    samples: int | None = None
    arithmetic: str | None = None

    def __post_init__(self) -> None:
        test, expected = RULES["bound_budget"]
        problems = [
            f"{name}: expected one of {', '.join(known)}; got {value!r}"
            for name, value, known in (("norm", self.norm, NORMS), ("method", self.method, BOUNDS))
            if value not in known
        ]
        if not test(self.seconds):
            problems.append(f"budget: expected {expected}; got {self.budget!r}")
        if self.solver is not None and self.solver not in SOLVERS:
            problems.append(f"solver: expected one of {', '.join(SOLVERS)}; got {self.solver!r}")
        elif self.solver is not None and self.method not in _SOLVED:
            problems.append(f"solver: for the methods {' and '.join(_SOLVED)}; got the method {self.method}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def seconds(self) -> float:
        """The budget."""
        found: float = canonical("bound_budget", self.budget)
        return found


def bound_one(opened: Opened, request: BoundRequest, *, console: Console) -> LipschitzBound:
    """Print brackets of the affine runs, what each method gave, and the brackets of the network and of its pairs.

    For the method "local" also the median radii of test samples by global and by local bounds. What the lower ends are:
    the largest Jacobian norms that were found.

    Raises:
        ConfigError: more samples than there are, or none.
        ValueError: a model that can't be bounded; a solver that is not installed.
    """
    samples = _checked_samples(opened, request) if request.method == "local" else 0
    model = _as_executed(opened, request) if samples else opened.model
    points = opened.data.test.x[:_POINTS].to(floating_like(model))
    with console.status(f"{request.method}, up to {request.seconds:g} s"):  # nothing where it is no terminal
        found = lipschitz(
            model, opened.data.input_shape, request.method, request.norm, points=points, budget=request.seconds,
            solver=request.solver,
        )  # fmt: skip
    console.out(f"{opened.name}: {request.norm} norms", highlight=False)
    console.print(_layers(found))
    if len(found.attempts) > 1:
        methods = _methods(found)
        methods.width = _WIDE if console.width < _WIDE else None
        console.print(methods, crop=False)  # a narrow terminal breaks lines, and nothing is cut
    console.out(_brackets(found, request.method), highlight=False)
    if samples:
        console.out(_radii(opened, model, found, request, samples), highlight=False)
    return found


def _checked_samples(opened: Opened, request: BoundRequest) -> int:
    count = len(opened.data.test.x)
    samples = min(_SAMPLES, count) if request.samples is None else request.samples
    if not 1 <= samples <= count:
        raise ConfigError(f"samples: expected 1 to {count}, as many as there are test samples; got {samples}")
    return samples


def _as_executed(opened: Opened, request: BoundRequest) -> nn.Module:
    """The network in the arithmetic of the radii."""
    arithmetic = request.arithmetic or opened.config.arithmetic
    network = executed(opened.model, arithmetic)
    return network.model if network.rounded else opened.model


def _layers(found: LipschitzBound) -> Table:
    table = Table()
    table.add_column("layers", overflow="fold")
    for column in ("lower", "upper", "upper / lower"):
        table.add_column(column, justify="right")
    table.add_column("method", overflow="fold")
    for layer in found.layers:
        ratio = f"{layer.upper / layer.lower:.4f}" if layer.lower else "-"
        table.add_row(layer.name, f"{layer.lower:.6g}", f"{layer.upper:.6g}", ratio, layer.method)
    return table


def _methods(found: LipschitzBound) -> Table:
    """A row a method: its bounds, how far they are above the lower estimates, its time, and whether they are proved."""
    table = Table()
    table.add_column("method", no_wrap=True)
    for column in ("upper", "tightness", "largest pair", "tightness", "seconds"):
        table.add_column(column, justify="right")
    for column in ("proof", "note"):
        table.add_column(column, overflow="fold")
    pair = float(_lower_pairs(found).max())
    for one in found.attempts:
        table.add_row(
            one.method,
            _number(one.upper),
            _ratio(one.upper, found.lower),
            _number(one.pair_upper),
            _ratio(one.pair_upper, pair),
            f"{one.seconds:.1f}",
            "proved" if one.proved else "not proved",
            one.note,
        )
    return table


def _lower_pairs(found: LipschitzBound) -> Tensor:
    return torch.zeros_like(found.pairwise) if found.lower_pairwise is None else found.lower_pairwise


def _brackets(found: LipschitzBound, method: str) -> str:
    different = ~torch.eye(len(found.pairwise), dtype=torch.bool)
    upper, lower = found.pairwise[different], _lower_pairs(found)[different]
    known = lower > 0
    spread = ""
    if bool(known.any()):
        ratios = upper[known] / lower[known]
        spread = f" (tightness {float(ratios.min()):.4g} to {float(ratios.max()):.4g})"
    return (
        f"Lipschitz constant ({found.norm}): {found.lower:.6g} <= L <= {found.upper:.6g} "
        f"(tightness {_ratio(found.upper, found.lower)}, {method})\n"
        f"largest pair of logits: {float(lower.max()):.6g} <= L <= {float(upper.max()):.6g} "
        f"(tightness {_ratio(float(upper.max()), float(lower.max()))})\n"
        f"all pairs: {float(lower.min()):.6g} to {float(lower.max()):.6g} <= L <= {float(upper.min()):.6g} to "
        f"{float(upper.max()):.6g}{spread}"
    )


def _radii(opened: Opened, model: nn.Module, found: LipschitzBound, request: BoundRequest, samples: int) -> str:
    """Median radii of the first test samples, by constants of the whole space and by bounds over balls around them."""
    exact = (request.arithmetic or opened.config.arithmetic) == "real"
    certifier = Certifier(model, opened.data.input_shape, "real" if exact else None, norm=found.norm, bound=found)
    x, y = (part[:samples].to(floating_like(model).device) for part in (opened.data.test.x, opened.data.test.y))
    margins = certifier.margins(x, y)
    whole, local = certifier.radii(margins), local_radii(certifier, x, margins, budget=request.seconds)
    right = margins.prediction == margins.label
    counts = Counter(name for name, correct in zip(local.method, right.tolist(), strict=True) if correct)
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return (
        f"certified {found.norm} radii of the first {samples} test samples ({int(right.sum())} classified correctly):\n"
        f"    median {float(whole.radius.median()):.4g} by constants of the whole space\n"
        f"    median {float(local.radius.median()):.4g} by local bounds ({told or 'none'})"
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "-"


def _ratio(upper: float, lower: float) -> str:
    return f"{upper / lower:.4g}" if lower > 0 and math.isfinite(upper) else "-"

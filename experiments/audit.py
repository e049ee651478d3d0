"""`certify audit-model`: how each layer of a model is bounded, what is assumed, and which mistakes it exposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..certify import LipschitzBound, NormBounds, lipschitz
from ..certify.graph import Graph, eval_mode, floating_like, trace
from ..certify.linear import LinearMap, check_norm
from ..certify.rules import leaf_types
from ..certify.spectral import bracket
from .audit_claims import Claim, layer_claims, operation_claims, run_claims, worst_of_each
from .audit_execution import execution_of
from .audit_graph import Layer, Met, Run, meet, same_map
from .audit_network import PAIR_FACTOR, network_claims
from .audit_problems import Problem, problem_of_error, problem_of_failure, problems_of_state, problems_of_trace
from .audit_rows import Audit, NetworkRow, OperationRow, RunRow

__all__ = ["audit_model"]

Result = TypeVar("Result")
_POINTS = 256
_JACOBIAN = 1 << 26  # numbers in the Jacobians that are taken at once


def audit_model(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    norm: str = "l2",
    points: Tensor | None = None,  # [B, *input_shape]
    name: str = "the model",
) -> Audit:
    """Audit a model: its runs and their bounds, its other operations, and what mistaken methods would claim of it.

    A model that can't be bounded is no error: all reasons found are in `problems`.

    Args:
        model: any module; it is left as it was found.
        input_shape: shape of one input, without the batch.
        norm: "l2", "linf" or "l1".
        points: inputs at which lower estimates are taken, e.g. test samples; random ones in [0, 1] where None.
        name: what to call the model.

    Raises:
        ValueError: an unknown norm.
    """
    check_norm(norm)
    shape, like = tuple(input_shape), floating_like(model)
    points = random_points(shape) if points is None else points[:_POINTS]
    problems, parts = problems_of_state(model), {}
    with eval_mode(model):
        try:
            graph = trace(model, shape, leaf_types())
        except ValueError as error:
            problems += problems_of_trace(model, error)
        else:
            parts = _of_graph(graph, norm, points.to(like), problems)
    dtype = str(like.dtype).removeprefix("torch.")
    return Audit(name, shape, norm, dtype, tuple(problems), **parts)


def random_points(shape: tuple[int, ...]) -> Tensor:  # [32, *shape]
    """Inputs in [0, 1] where there is no data."""
    return torch.rand(32, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _of_graph(graph: Graph, norm: str, points: Tensor, problems: list[Problem]) -> dict[str, Any]:
    """The parts of an audit that need the graph; adds to `problems`."""
    met, finite = meet(graph, norm), not any(problem.kind == "weights" for problem in problems)
    problems += [problem_of_failure(failure) for failure in met.failures]
    shape = graph.sample.shape[1:]
    few = points[: max(1, _JACOBIAN // (math.prod(shape) * math.prod(graph.shapes[graph.output])))]
    bound = None if problems else _tried(lambda: lipschitz(graph.model, shape, norm=norm, points=few), problems)
    rounding = None if bound is None else _tried(lambda: execution_of(graph.model, bound, points), problems)
    execution, of_samples = (None, []) if rounding is None else (rounding[0], [rounding[1]])
    operations = tuple(OperationRow(o.place, o.kind, o.rule, o.factor) for o in met.operations)
    if not finite:
        return {"operations": operations}
    brackets = _brackets(met, norm, bound)
    return {
        "runs": tuple(_run_row(run, brackets[run.end]) for run in met.runs if run.parts and run.end in brackets),
        "operations": operations,
        "network": None if bound is None else _network(bound),
        "execution": execution,
        "claims": tuple(_claims(graph, met, brackets, norm, bound, few) + of_samples),
    }


def _tried(function: Callable[[], Result], problems: list[Problem]) -> Result | None:
    """The function's result; where it refuses the model, None and a problem more."""
    try:
        return function()
    except ValueError as error:
        problems.append(problem_of_error(error))
        return None


def _brackets(met: Met, norm: str, bound: LipschitzBound | None) -> dict[str, NormBounds]:
    """The bracket of each run by its end, from the bound where there is one."""
    if bound is not None:
        return {run.end: run.bounds for run in bound.records[norm].runs}
    found = {run.end: _bracket(run.linear, norm) for run in met.runs}
    return {end: bounds for end, bounds in found.items() if bounds is not None}


def _bracket(linear: LinearMap, norm: str) -> NormBounds | None:
    """The bracket of a map by itself, None where only the run that it folds into has one, or nothing has."""
    try:
        return bracket(linear, norm)
    except ValueError:
        return None


def _run_row(run: Run, bounds: NormBounds) -> RunRow:
    linear = run.linear
    kind = type(linear).__name__
    return RunRow(run.parts, kind, linear.in_shape, linear.out_shape, bounds.method, bounds.lower, bounds.upper)


def _network(bound: LipschitzBound) -> NetworkRow:
    pairs = bound.pairwise[~torch.eye(len(bound.pairwise), dtype=torch.bool)]
    highest = float(pairs.max())
    gain = PAIR_FACTOR[bound.norm] * bound.upper / highest if highest else math.inf
    return NetworkRow(bound.lower, bound.upper, float(pairs.min()), highest, gain)


def _claims(
    graph: Graph,
    met: Met,
    brackets: dict[str, NormBounds],
    norm: str,
    bound: LipschitzBound | None,
    points: Tensor,
) -> list[Claim]:
    alone = {run.parts[0]: run for run in met.runs if len(run.parts) == 1 and run.end in brackets}
    own: dict[str, NormBounds | None] = {}

    def bounds_of(layer: Layer) -> NormBounds | None:
        if layer.place not in own:
            run = alone.get(layer.place)
            same = run is not None and same_map(run.linear, layer.linear)
            own[layer.place] = brackets[run.end] if same and run is not None else _bracket(layer.linear, norm)
        return own[layer.place]

    found = [
        *layer_claims(met.layers, norm, bounds_of),
        *run_claims([(run, brackets[run.end]) for run in met.runs if run.parts and run.end in brackets], norm),
        *operation_claims(met.operations),
        *network_claims(
            graph,
            met,
            norm,
            bound=bound,
            norm_of=lambda run: brackets[run.end].upper if run.end in brackets else 1.0,
            bounds_of=bounds_of,
            points=points,
        ),
    ]
    return worst_of_each(found)

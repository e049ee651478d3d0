"""Claims of mistaken methods on a network as a whole, beside its proved bounds and what its Jacobian attains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..certify import LipschitzBound, NormBounds, jacobians, largest_jacobian_norm
from ..certify.graph import Graph, floating_like, type_name
from ..certify.rules import Call, rule_for
from ..certify.spectral import bracket
from .audit_claims import Claim
from .audit_graph import Failure, Layer, Met, Run, constant_of
from .audit_problems import parent_with_rule

__all__ = ["PAIR_FACTOR", "network_claims"]

CHAIN = "multiplies all layers as if they were a chain"
PAIR = "divides margins by L, as if only one logit could move"
UNKNOWN = "counts what it does not know as 1"
SUBCLASS = "takes a subclass for its parent"
_DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}
PAIR_FACTOR = {"l2": math.sqrt(2), "linf": 2.0, "l1": 1.0}  # times L: what bounds any pair of logits


def network_claims(
    graph: Graph,
    met: Met,
    norm: str,
    *,
    bound: LipschitzBound | None,
    norm_of: Callable[[Run], float],
    bounds_of: Callable[[Layer], NormBounds | None],
    points: Tensor,  # [B, *input_shape]
) -> Iterator[Claim]:
    """The claims that need the whole graph; for a model without a bound, what counting 1 for the unknown gives."""
    if bound is not None:
        yield from _of_joins(met, bound, bounds_of)
        if norm != "l1":
            yield _of_pairs(graph.model, bound, points)
        return
    if met.failures:
        claimed = constant_of(graph, norm, norm_of, lambda operation: operation.factor or 1.0)
        yield Claim(UNKNOWN, "the network", claimed, _attained(graph.model, points, norm), math.inf)
        for failure in met.failures:
            yield from _of_subclass(failure, norm)


def _of_joins(met: Met, bound: LipschitzBound, bounds_of: Callable[[Layer], NormBounds | None]) -> Iterator[Claim]:
    brackets = [bounds_of(layer) for layer in met.layers]
    if any(operation.rule in ("sum", "concat") for operation in met.operations) and None not in brackets:
        layers = math.prod(bounds.upper for bounds in brackets if bounds is not None)
        factors = math.prod(operation.factor or 1.0 for operation in met.operations if operation.rule == "factor")
        yield Claim(CHAIN, "the network", layers * factors, bound.lower, bound.upper)


def _of_pairs(model: nn.Module, bound: LipschitzBound, points: Tensor) -> Claim:
    """L bounds one logit's change; the margin of a pair may change by up to `PAIR_FACTOR` times as much."""
    rows = jacobians(model, points[:64]).double()  # [B, K, D]
    dual = _DUAL[bound.norm]
    attained = max(
        float(torch.linalg.vector_norm(rows - rows[:, k : k + 1], ord=dual, dim=2).max()) for k in range(rows.shape[1])
    )
    proved = float(bound.pairwise.max())
    return Claim(PAIR, "the worst pair of logits", bound.upper, min(attained, proved), proved)


def _attained(model: nn.Module, points: Tensor, norm: str) -> float:
    """The largest Jacobian norm on the points, 0 where it can't be had."""
    try:
        return largest_jacobian_norm(model, points, norm)
    except (ValueError, RuntimeError, IndexError, TypeError):
        return 0.0


def _of_subclass(failure: Failure, norm: str) -> Iterator[Claim]:
    module = failure.module
    parent = None if module is None else parent_with_rule(module)
    if module is None or parent is None:
        return
    rule = rule_for(parent, failure.place, type_name(module))
    call = Call(failure.place, module, (), {}, failure.in_shape, failure.in_shape)
    if rule.linear is not None:
        claimed = bracket(rule.linear(call), norm).upper
    elif rule.factor is not None:
        claimed = rule.factor(call, norm)
    yield Claim(SUBCLASS, failure.place, claimed, _attained_by(module, failure.in_shape, norm), math.inf)


def _attained_by(module: nn.Module, in_shape: tuple[int, ...], norm: str) -> float:
    points = torch.randn(16, *in_shape, generator=torch.Generator().manual_seed(0)).to(floating_like(module))
    flat = nn.Sequential(module, nn.Flatten())
    return _attained(flat, points, norm)

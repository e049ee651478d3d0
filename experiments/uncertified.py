"""Models that can be attacked but not certified: why, and what stands in for their certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..certify import NORMS
from ..certify.graph import check_finite_state, check_unchanged, floating_like, trace, type_name
from ..certify.rules import leaf_types, rounding_for
from ..certify.walk import CONCATS, SUMS, structure
from .audit_graph import meet
from .audit_problems import problems_of_trace

__all__ = ["uncertified_rows", "why_uncertified"]


def why_uncertified(model: nn.Module, input_shape: tuple[int, ...], norm: str) -> str | None:
    """In one line, what in the structure of a model no certificate covers, though it can be attacked.

    That is a hook or a replaced forward, a forward that torch.fx can't follow or whose steps are not tensors of
    floats with the batch first (tuples, integers, coarser floats), an operation without a Lipschitz rule or used in
    another way than its rule covers, or one without a rounding rule. None where there is no such thing: what else a
    certificate refuses (training mode, a shape that does not fit, outputs that depend on the other samples of a batch)
    is wrong for an attack too.

    Raises:
        ValueError: NaN or infinite weights.
    """
    check_finite_state(model)
    if any(module.training for module in model.modules()):
        return None
    return next(_reasons(model, input_shape, norm), None)


def _reasons(model: nn.Module, input_shape: tuple[int, ...], norm: str) -> Iterator[str]:
    for name, module in model.named_modules():
        yield from _refusal(partial(check_unchanged, module, f"{name or 'the model'} ({type_name(module)})"))
    try:
        graph = trace(model, input_shape, leaf_types())
    except ValueError as error:
        found = problems_of_trace(model, error)
        yield from (f"{one.place}: {one.problem}" for one in found if one.place != "the model")
        if _is_classifier(model, input_shape):  # else of a wrong shape, or samples that mix
            yield str(error)
        return
    failures = meet(graph, norm).failures
    yield from (failure.message for failure in failures)
    if failures:
        return
    walk = structure(graph)
    for node in graph.shapes:
        if node.op != "placeholder" and walk.operation_of(node)[0] not in (*SUMS, *CONCATS):
            operation, title = walk.operation_of(node)
            yield from _refusal(partial(rounding_for, operation, walk.call_of(node), title))


@torch.no_grad()
def _is_classifier(model: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Whether it gives each sample of a batch a row of logits, the same as alone or, where random, others each time."""
    x = torch.rand(3, *input_shape, generator=torch.Generator().manual_seed(0)).to(floating_like(model))
    with torch.random.fork_rng():
        try:
            found, again, alone = model(x), model(x), [model(one[None]) for one in x]
        except (RuntimeError, ValueError, TypeError, LookupError):
            return False
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(x):
        return False
    return not torch.equal(found, again) or torch.allclose(found, torch.cat(alone), rtol=1e-3, atol=1e-3)


def _refusal(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ValueError as error:
        yield str(error)


def uncertified_rows(logits: Tensor, y: Tensor) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """The rows of samples of which nothing is certified, and their radii by norm, which are 0."""
    logits, label = logits.double().cpu(), y.cpu()
    rivals = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    radii = {norm: torch.zeros(len(label), dtype=torch.float64) for norm in NORMS}
    columns: dict[str, Any] = {
        "index": range(len(label)),
        "label": label.numpy(),
        "prediction": logits.argmax(1).numpy(),
        "margin": (logits.gather(1, label[:, None]).squeeze(1) - rivals).numpy(),
        **{f"radius_{norm}": radius.numpy() for norm, radius in radii.items()},
    }
    return pd.DataFrame(columns), radii

"""Why a model can't be bounded: everything at once, each with its place and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

from ..certify.graph import check_unchanged, plain_type, type_name
from ..certify.rules import leaf_types
from .audit_graph import Failure

__all__ = [
    "Problem",
    "parent_with_rule",
    "problem_of_error",
    "problem_of_failure",
    "problems_of_state",
    "problems_of_trace",
]

_TRACE_ERRORS = (
    *(fx.proxy.TraceError, TypeError, RuntimeError, NameError),
    *(AttributeError, ValueError, IndexError, KeyError, AssertionError),
)
_OLD_HOOKS = {"SpectralNorm": "spectral_norm", "WeightNorm": "weight_norm"}
_STATISTICS = "its constant is of the order 1 / sqrt(eps), which no radius survives; use batch normalisation"
_ORDER = "certify the logits in front of it, whose order it keeps"
_HINTS = {
    "Softmax": _ORDER,
    "LogSoftmax": _ORDER,
    "softmax": _ORDER,
    "log_softmax": _ORDER,
    "LayerNorm": _STATISTICS,
    "GroupNorm": _STATISTICS,
    "InstanceNorm1d": _STATISTICS,
    "InstanceNorm2d": _STATISTICS,
    "RMSNorm": _STATISTICS,
    "MultiheadAttention": "dot-product attention has no finite Lipschitz constant; use another layer",
    "Embedding": "takes indices and not numbers; certify the model from its embeddings on",
}


@dataclass(frozen=True)
class Problem:
    """One reason why a model can't be certified: where, what was found, and what to do.

    `kind` is "state" (mode, hooks), "weights" (no finite numbers), "trace", "rule" or "other".
    """

    place: str
    problem: str
    remedy: str
    kind: str = "state"


def problems_of_state(model: nn.Module) -> list[Problem]:
    """Training mode, hooks, replaced forwards, NaN or infinite weights, weights that change between two reads."""
    found = [problem for name, module in model.named_modules() for problem in _of_module(name, module)]
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        found.insert(0, Problem(_some(training), "in training mode", "call model.eval() before certifying"))
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        found.append(
            Problem("torch", "global forward hooks are set", "remove them: they can change any layer's output")
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            text = f"{count} of {tensor.numel()} numbers are NaN or infinite"
            found.append(Problem(name, text, "load a checkpoint of a training that did not diverge", "weights"))
    return found


def _of_module(name: str, module: nn.Module) -> Iterator[Problem]:
    place = name or "the model"
    old = [
        _OLD_HOOKS[kind] for hook in module._forward_pre_hooks.values() if (kind := type(hook).__name__) in _OLD_HOOKS
    ]
    if old:
        text = f"torch.nn.utils.{old[0]} works through a hook, which no rule sees"
        yield Problem(place, text, f"use torch.nn.utils.parametrizations.{old[0]}, which this tool reads")
        return
    try:
        check_unchanged(module, place)
    except ValueError as error:
        text = str(error).removeprefix(f"{place}: ")
        yield Problem(place, text, "write what it does into a module's forward, and give new modules a rule")
    if parametrize.is_parametrized(module) and not module.training:
        for weight in module.parametrizations:  # type: ignore[union-attr]
            if not torch.equal(getattr(module, weight), getattr(module, weight)):
                text = f"its {weight} differs between two reads"
                yield Problem(place, text, "make the parametrization deterministic in eval mode")


def problems_of_trace(model: nn.Module, error: ValueError) -> list[Problem]:
    """The innermost modules that torch.fx can't follow, or the error of the whole model."""
    leaves = leaf_types()
    broken: dict[str, str] = {}
    for name, module in model.named_modules():
        if plain_type(module) not in leaves and not type(module).__module__.startswith("torch.nn"):
            reason = _refusal_of_fx(module)
            if reason is not None:
                broken[name] = reason
    inner = {
        name: text
        for name, text in broken.items()
        if not any(other != name and other.startswith(f"{name}." if name else "") for other in broken)
    }
    remedy = "write its forward without steps that depend on data, or give its type a rule with register_rule"
    if not inner:
        return [Problem("the model", str(error), "mend this first: nothing behind it could be looked at", "trace")]
    found = []
    for name, text in inner.items():
        module = model.get_submodule(name)
        place = f"{name or 'the model'} ({type_name(module)})"
        found.append(Problem(place, f"can't be traced: {text}{_inherits_nothing(module)}", remedy, "trace"))
    return found


def _refusal_of_fx(module: nn.Module) -> str | None:
    """Why torch.fx can't trace a module by itself; None where it can."""
    before = set(vars(module))
    try:
        fx.Tracer().trace(module)
    except _TRACE_ERRORS as reason:
        return (str(reason).strip() or type(reason).__name__).splitlines()[0]
    finally:  # torch.fx stores tensors that are no parameter or buffer as attributes
        for name in set(vars(module)) - before:
            delattr(module, name)
    return None


def problem_of_failure(failure: Failure) -> Problem:
    """What to do about an operation of the graph that has no bound."""
    place, kind = failure.place, failure.kind
    text = failure.message.removeprefix(f"{place}: ")
    if "no Lipschitz rule" not in text:
        return Problem(
            place, text, "give it what is expected, or write it as a module of your own with a rule", "other"
        )
    text = f"{kind}: no Lipschitz rule{_inherits_nothing(failure.module)}"
    fallback = f"register_rule({kind}, factor=... or linear=...), or build the model from what has a rule"
    return Problem(place, text, _HINTS.get(kind, fallback), "rule")


def problem_of_error(error: ValueError) -> Problem:
    """The refusal of a model whose operations all have Lipschitz rules."""
    text = str(error)
    if "no rounding rule" in text:
        place, _, rest = text.partition(": ")
        remedy = 'give its rule one with register_rule(..., rounding=...), or certify it with arithmetic "real"'
        return Problem(place, rest.partition(";")[0], remedy, "rule")
    return Problem("the model", text, "mend this first", "other")


def _inherits_nothing(module: nn.Module | None) -> str:
    """What to add to a problem where a parent of the module's type has a rule."""
    parent = None if module is None else parent_with_rule(module)
    return "" if parent is None else f"; a subclass of {parent.__name__} inherits no rule, since its forward may differ"


def parent_with_rule(module: nn.Module) -> type[nn.Module] | None:
    """The nearest base class that has a rule, which the module's own type does not inherit."""
    leaves = leaf_types()
    return next((base for base in plain_type(module).__mro__[1:] if base in leaves), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

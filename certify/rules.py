"""The open registry: which operation has which Lipschitz rule.

An operation is an exact module type, a function, or a tensor method's name. Its rule is either *linear* (it gives the
operator, which neighbours may fold into) or a *factor* (a Lipschitz constant per norm). Nothing is inherited: a
subclass with its own forward needs its own rule, and an operation without a rule is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .graph import plain_type, type_name
from .linear import LinearMap

Operation = type[nn.Module] | Callable[..., Any] | str
Value = TypeVar("Value")


@dataclass(frozen=True)
class Call:
    """One use of an operation in a model, as its rule sees it."""

    place: str  # name of the module or node
    module: nn.Module | None
    args: tuple[Any, ...]  # after the tensor input(s); constants are values
    kwargs: dict[str, Any]
    in_shape: tuple[int, ...]  # of the first tensor input, without the batch
    out_shape: tuple[int, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument after the tensor input, given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Rounding:
    """How an executed operation comes to its result; `local_errors` makes it an error bound. Norms are l2.

    Attributes:
        kind: "exact": it moves numbers or copies them. "steps": each result takes at most `terms` roundings of numbers
            whose norm is at most gain * ||input|| + offset; 0 where it only picks among its inputs (a maximum).
            "dot": each result is a sum of at most `terms` products of inputs and weights, bias included, in any order.
        terms: see kind.
        gain: see kind; None takes the norm of the operator with absolute entries. Not used by "dot".
        offset: see kind; for "dot" the norm of the bias over all outputs.
        repeats: for "dot", how often one input may enter one result (padding that repeats pixels).
        partials: further sums of every result that half types store (see `local_errors`).
        wide: whether half types sum its products in float32; where not, every sum rounds as what is stored.
        jump: norm of what separates the function itself from the one that its Lipschitz rule is about.
        reach: intermediate numbers are at most max(reach, gain) * ||input|| + offset + peak: a mean of n numbers sums
            them before it divides, which reaches sqrt(n).
        peak: see reach; inf refuses a certificate.
    """

    kind: str
    terms: int = 0
    gain: float | None = None
    offset: float = 0.0
    repeats: int = 1
    partials: int = 0
    wide: bool = True
    jump: float = 0.0
    reach: float = 1.0
    peak: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "steps", "dot"):
            raise ValueError(f"kind: expected exact, steps or dot, got {self.kind!r}")
        numbers = (self.terms, self.gain or 0.0, self.offset, self.repeats, self.partials, self.jump)
        if not all(number >= 0 for number in (*numbers, self.reach, self.peak)):
            raise ValueError(f"Rounding: expected numbers >= 0, got {(*numbers, self.reach, self.peak)}")


EXACT = Rounding("exact")


@dataclass(frozen=True)
class Rule:
    """Exactly one of `linear` (an affine operation's operator) and `factor` (a Lipschitz constant in a norm)."""

    linear: Callable[[Call], LinearMap] | None = None
    factor: Callable[[Call, str], float] | None = None


_RULES: dict[Operation, Rule] = {}
_ROUNDINGS: dict[Operation, Callable[[Call], Rounding]] = {}


def register_rule(
    *operations: Operation,
    linear: Callable[[Call], LinearMap] | None = None,
    factor: Callable[[Call, str], float] | float | None = None,
    rounding: Callable[[Call], Rounding] | Rounding | None = None,
) -> None:
    """Give operations a Lipschitz rule, and a rule for the rounding of their results.

    Args:
        operations: exact module types, functions such as torch.relu, or tensor method names.
        linear: for an affine operation, the function from its call to the operator (without the constant part).
        factor: for any other operation, an upper bound of its Lipschitz constant: a number for all norms, or a function
            of the call and the norm ("l2", "linf", "l1").
        rounding: how the executed operation rounds, or a function from its call to that. Without it, a model with the
            operation has Lipschitz bounds but no certified radii.

    Raises:
        ValueError: none or both of `linear` and `factor`, a factor that is no number >= 0, or an operation that has a
            rule already.
    """
    if (linear is None) == (factor is None):
        raise ValueError("register_rule: expected exactly one of linear= and factor=")
    known = [operation for operation in operations if operation in _RULES]
    if known:
        raise ValueError(f"register_rule: {', '.join(map(str, known))} has a rule already")
    if isinstance(factor, (int, float)):
        if not 0 <= factor < math.inf:
            raise ValueError(f"register_rule: expected a finite factor >= 0, got {factor}")
        constant = float(factor)
        rule = Rule(factor=lambda call, norm: constant)
    else:
        rule = Rule(linear=linear, factor=factor)
    _RULES.update(dict.fromkeys(operations, rule))
    if rounding is not None:
        register_rounding(*operations, rounding=rounding)


def enter(
    table: dict[Operation, Callable[[Call], Value]],
    operations: Sequence[Operation],
    value: Callable[[Call], Value] | Value,
    refusal: str,
) -> None:
    """Enter operations into a table of functions of their call; `value` may be one value for all calls.

    Raises:
        ValueError: operations that the table has already: "<refusal>" with {} for them.
    """
    known = [operation for operation in operations if operation in table]
    if known:
        raise ValueError(refusal.format(", ".join(map(str, known))))
    function: Callable[[Call], Value] = value if callable(value) else lambda call: value
    table.update(dict.fromkeys(operations, function))


def register_rounding(*operations: Operation, rounding: Callable[[Call], Rounding] | Rounding) -> None:
    """Give operations the rule for the rounding of their results, apart from their Lipschitz rule.

    Raises:
        ValueError: an operation that has one already.
    """
    enter(_ROUNDINGS, operations, rounding, "register_rounding: {} has a rounding rule already")


def rounding_for(operation: Operation, call: Call, name: str) -> Rounding:
    """How a call rounds; ValueError that names the place and the way out where there is no rule."""
    found = _ROUNDINGS.get(operation)
    if found is None:
        raise ValueError(
            f"{call.place}: no rounding rule for {name}, so that no radius can be proved; give "
            "speccert.certify.register_rule one with rounding="
        )
    return found(call)


def rule_for(operation: Operation, place: str, name: str) -> Rule:
    """The rule of an operation; ValueError that names the place and the way to register one where there is none."""
    found = _RULES.get(operation)
    if found is None:
        raise ValueError(
            f"{place}: no Lipschitz rule for {name}; register one with speccert.certify.register_rule, "
            "or build the model from operations that have one"
        )
    return found


def leaf_types() -> frozenset[type[nn.Module]]:
    """Module types that have a rule: the tracer does not look inside these."""
    return frozenset(operation for operation in _RULES if isinstance(operation, type))


def linear_map_of(layer: nn.Module, input_shape: tuple[int, ...]) -> LinearMap:
    """The operator of one affine layer on inputs of `input_shape`; ValueError where it has no linear rule."""
    rule = rule_for(plain_type(layer), "layer", type_name(layer))
    if rule.linear is None:
        raise ValueError(f"layer: expected an affine layer, got {type_name(layer)}, whose rule is a Lipschitz factor")
    return rule.linear(Call("layer", layer, (), {}, input_shape, ()))


def probe_shape(function: Callable[[Tensor], Tensor], in_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a function gives, without the batch, found on zeros; ValueError where the input does not fit."""
    try:
        with torch.no_grad():
            return tuple(function(torch.zeros(1, *in_shape)).shape[1:])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"input_shape: {in_shape} does not fit: {str(error).splitlines()[0]}") from error

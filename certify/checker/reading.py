"""One use of an operation in a graph, as the checker's tables see it, and what they make of an affine one."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from flint import arb, fmpq
from torch import nn

from .balls import Fixed, euclidean
from .maps import Linear, Shape
from .rounds import EXACT, Rounds


def real_name(target: Any) -> str:
    """The qualified name of a type, empty where what lies there is another one."""
    found: Any = sys.modules.get(getattr(target, "__module__", ""))
    for part in getattr(target, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    return f"{target.__module__}.{target.__qualname__}" if found is target else ""


@dataclass(frozen=True)
class Reading:
    """One use of an operation of one moving tensor; arguments after that tensor, constants as values."""

    place: str
    title: str
    source: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_shape: Shape
    out_shape: Shape

    @property
    def layer(self) -> Any:
        """The module, untyped."""
        return self.module

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def refused(self, what: str) -> ValueError:
        """The error for a use that the table does not cover."""
        return ValueError(f"{self.place}: the checker has no rule for {self.title} with {what}")


@dataclass(frozen=True)
class Affine:
    """x -> linear(x) + offset."""

    linear: Linear
    offset: Fixed | None = None
    rounds: Rounds = EXACT


def tuple_of(value: Any, count: int) -> tuple[Any, ...]:
    """One number for all axes, or one each."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * count


def spread(offset: Fixed | None, shape: Shape) -> arb:
    """l2 norm of a constant broadcast to `shape`."""
    if offset is None:
        return arb(0)
    count = arb(fmpq(math.prod(shape), max(1, offset.mant.size)))
    return euclidean(offset.reshape(1, -1))[0] * count.sqrt()


def greatest(values: Any) -> arb:
    """The largest of balls, at least 0."""
    found = arb(0)
    for value in values:
        found = found.max(value)
    return found

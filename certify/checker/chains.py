"""Linear maps made of others: chains, sums and concatenations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flint import fmpz

from .balls import Fixed, plus
from .maps import Linear, Shape


@dataclass(frozen=True)
class Chain(Linear):
    """`maps` one after another, first map first; the identity for none."""

    maps: tuple[Linear, ...]
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        """Shape that the last map gives."""
        return self.maps[-1].out_shape if self.maps else self.in_shape

    @cached_property
    def steps(self) -> tuple[Linear, ...]:
        """The maps, those of chains and sums inside it too."""
        return tuple(step for linear in self.maps for step in _steps(linear))

    @cached_property
    def cost(self) -> int:
        """See `cost_of`."""
        return sum(map(cost_of, self.maps))

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        for linear in self.maps:
            x = linear.apply(x)
        return x

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        for linear in reversed(self.maps):
            y = linear.adjoint(y)
        return y

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return Chain(tuple(linear.magnitude() for linear in self.maps), self.in_shape)

    @property
    def moves_only(self) -> bool:
        """See `Linear.moves_only`."""
        return all(linear.moves_only for linear in self.maps)


@dataclass(frozen=True)
class Sum(Linear):
    """first + second, maps of one input."""

    first: Linear
    second: Linear

    @property
    def in_shape(self) -> Shape:  # type: ignore[override]
        """Shape that both take."""
        return self.first.in_shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        """Shape that both give."""
        return self.first.out_shape

    @cached_property
    def parts(self) -> tuple[Chain, Chain, Chain]:
        """What both begin with, and what of each follows."""
        before, (first, second) = _split((self.first, self.second))
        return before, first, second

    @cached_property
    def steps(self) -> tuple[Linear, ...]:
        """What both begin with, and the sum of what follows."""
        before, first, second = self.parts
        return (*before.maps, Sum(first, second)) if before.maps else (self,)

    @cached_property
    def cost(self) -> int:
        """See `cost_of`."""
        return sum(part.cost for part in self.parts)

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        before, first, second = self.parts
        x = before.apply(x)
        return plus(first.apply(x), second.apply(x))

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        before, first, second = self.parts
        return before.adjoint(plus(first.adjoint(y), second.adjoint(y)))

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        before, first, second = self.parts
        return Chain((before.magnitude(), Sum(first.magnitude(), second.magnitude())), self.in_shape)


@dataclass(frozen=True)
class Concat(Linear):
    """Maps of one input, joined along an axis (counted without the batch)."""

    maps: tuple[Linear, ...]
    axis: int
    out_shape: Shape

    @property
    def in_shape(self) -> Shape:  # type: ignore[override]
        """Shape that every map takes."""
        return self.maps[0].in_shape

    @cached_property
    def parts(self) -> tuple[Chain, tuple[Chain, ...]]:
        """What all maps begin with, and what of each follows."""
        return _split(self.maps)

    @cached_property
    def steps(self) -> tuple[Linear, ...]:
        """What all begin with, and the concatenation of what follows."""
        before, maps = self.parts
        return (*before.maps, Concat(maps, self.axis, self.out_shape)) if before.maps else (self,)

    @cached_property
    def cost(self) -> int:
        """See `cost_of`."""
        before, maps = self.parts
        return before.cost + sum(part.cost for part in maps)

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        before, maps = self.parts
        x = before.apply(x)
        return concatenated([linear.apply(x) for linear in maps], self.axis)

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        before, maps = self.parts
        ends = list(itertools.accumulate(linear.out_shape[self.axis] for linear in maps))[:-1]
        pieces = np.split(y.mant, ends, self.axis + 1)
        pulls = [linear.adjoint(y.moved(piece)) for linear, piece in zip(maps, pieces, strict=True)]
        total = pulls[0]
        for pull in pulls[1:]:
            total = plus(total, pull)
        return before.adjoint(total)

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        before, maps = self.parts
        inner = Concat(tuple(linear.magnitude() for linear in maps), self.axis, self.out_shape)
        return Chain((before.magnitude(), inner), self.in_shape)


def _steps(linear: Linear) -> tuple[Linear, ...]:
    """Maps that it is made of, one after another."""
    return linear.steps if isinstance(linear, Chain | Sum | Concat) else (linear,)


def cost_of(linear: Linear) -> int:
    """How many maps are evaluated for it."""
    return linear.cost if isinstance(linear, Chain | Sum | Concat) else 1


def _split(maps: Sequence[Linear]) -> tuple[Chain, tuple[Chain, ...]]:
    """The very maps that all begin with, and what of each follows.

    Evaluated once and not once for each: a chain of sums would otherwise take twice the time with every sum.
    """
    steps = [_steps(linear) for linear in maps]
    count = 0
    while all(count < len(one) and one[count] is steps[0][count] for one in steps):
        count += 1
    before = Chain(steps[0][:count], maps[0].in_shape)
    return before, tuple(Chain(one[count:], before.out_shape) for one in steps)


def concatenated(parts: list[Fixed], axis: int) -> Fixed:
    """Tensors [B, ...] joined along an axis counted without the batch."""
    exp = min(part.exp for part in parts)
    mants = [part.mant << (part.exp - exp) if part.exp > exp else part.mant for part in parts]
    err = max((part.err << (part.exp - exp) for part in parts), default=fmpz(0))
    return Fixed(np.concatenate(mants, axis + 1), exp, err)

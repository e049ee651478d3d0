"""Linear maps made of others: chains, sums and concatenations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

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

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        return plus(self.first.apply(x), self.second.apply(x))

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        return plus(self.first.adjoint(y), self.second.adjoint(y))

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return Sum(self.first.magnitude(), self.second.magnitude())


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

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        return concatenated([linear.apply(x) for linear in self.maps], self.axis)

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        ends = list(itertools.accumulate(linear.out_shape[self.axis] for linear in self.maps))[:-1]
        parts = np.split(y.mant, ends, self.axis + 1)
        pulls = [linear.adjoint(y.moved(part)) for linear, part in zip(self.maps, parts, strict=True)]
        total = pulls[0]
        for pull in pulls[1:]:
            total = plus(total, pull)
        return total

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return replace(self, maps=tuple(linear.magnitude() for linear in self.maps))


def concatenated(parts: list[Fixed], axis: int) -> Fixed:
    """Tensors [B, ...] joined along an axis counted without the batch."""
    exp = min(part.exp for part in parts)
    mants = [part.mant << (part.exp - exp) if part.exp > exp else part.mant for part in parts]
    err = max((part.err << (part.exp - exp) for part in parts), default=fmpz(0))
    return Fixed(np.concatenate(mants, axis + 1), exp, err)

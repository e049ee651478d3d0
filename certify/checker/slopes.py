"""The checker's own description of activations for relaxations: between which slopes each number moves.

An activation is phi(v) = P v + Q psi(R v) with linear maps P (`skip`), Q (`after`) and R (`before`). Every difference
quotient of psi, which acts on each number by itself, is in [low, high]; in a group, ||psi(u) - psi(u')|| <= ||u - u'||.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flint import arb, fmpz

from .balls import Fixed, aligned, integers
from .chains import Chain, Sum
from .maps import Gather, Linear, Scale, Shape, Windows, identity

GRID = 26  # slopes are multiples of 2^-26, rounded outward: part of the format


@dataclass(frozen=True)
class Slopes:
    """One activation, see the module.

    Attributes:
        low: least slope of psi, in units of 2^-26.
        high: largest slope.
        shape: of the numbers that psi acts on.
        before: R; None is the identity.
        after: Q; None is the identity.
        skip: P; None is zero.
        group: how many neighbours along the first axis share one condition; 1: none do.
    """

    low: int
    high: int
    shape: Shape
    before: Linear | None = None
    after: Linear | None = None
    skip: Linear | None = None
    group: int = 1

    @property
    def conditions(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Which multiplier each number has: one each, or one per group and place."""
        groups = np.arange(self.shape[0] // self.group * int(np.prod(self.shape[1:], dtype=np.int64)))
        return np.repeat(groups.reshape(-1, 1, *self.shape[1:]), self.group, 1).reshape(-1)


def between(low: arb, high: arb) -> Callable[[Shape], Slopes]:
    """Slopes of an elementwise function on tensors of any shape, outward on the grid."""
    first, last = (low * 2**GRID).lower().floor(), (high * 2**GRID).upper().ceil()
    return lambda shape: Slopes(int(first.unique_fmpz()), int(last.unique_fmpz()), shape)


def unit_slopes(shape: Shape) -> Slopes:
    """What rises, and at most as fast as the identity."""
    return Slopes(0, 1 << GRID, shape)


def absolute_slopes(shape: Shape) -> Slopes:
    """|x|, and all else that never stretches."""
    return Slopes(-1 << GRID, 1 << GRID, shape)


def pairs_sorted(shape: Shape) -> Slopes:
    """max, min = (a + b) / 2 +- |a - b| / 2 of channels i and i + C / 2."""
    first, second, both = _halves(shape)
    half = Fixed(integers([fmpz(1)], ()), -1)
    signs = Fixed(integers([fmpz(1), fmpz(-1)], (2,)).repeat(shape[0] // 2), -1)
    before = Sum(first, _scaled(second, Fixed(integers([fmpz(-1)], ()), 0)))
    after = _scaled(both, signs.reshape(shape[0], *(1 for _ in shape[1:])))
    skip = _scaled(Chain((Sum(first, second), both), shape), half)
    return Slopes(-1 << GRID, 1 << GRID, before.out_shape, before, after, skip)


def groups_sorted(shape: Shape, size: int) -> Slopes:
    """The mean of each group, and the rest sorted: which has a mean of 0 before and after, and is never stretched."""
    bits, count = 128, math.prod(shape)
    exact, missing = divmod(1 << bits, size)
    weight = Fixed(integers([fmpz(exact)] * count, (count,)), -bits, fmpz(int(missing > 0)))
    places = np.arange(count).reshape(shape[0] // size, size, -1)
    index = np.repeat(places.transpose(0, 2, 1)[:, None], size, 1).reshape(count, size)
    flat, numbers = (1, count), np.arange(count)
    mean = Chain(
        (Gather(numbers, shape, flat), Windows(index, weight, flat, flat), Gather(numbers, flat, shape)), shape
    )
    rest = Sum(identity(shape), _scaled(mean, Fixed(integers([fmpz(-1)], ()), 0)))
    return Slopes(-1 << GRID, 1 << GRID, shape, rest, rest, mean, size)


def reflected(shape: Shape, sines: Fixed, cosines: Fixed) -> Slopes:
    """(a, b) + (-sin, cos) 2 min(sin a - cos b, 0), of channels i and i + C / 2; angles' shape [C / 2, 1, ..]."""
    first, second, both = _halves(shape)
    before = Sum(_scaled(first, sines), _scaled(second, cosines.moved(-cosines.mant)))
    turned = aligned(sines.moved(-sines.mant), cosines)
    factor = Fixed(np.concatenate([one.mant for one in turned]), turned[0].exp, max(one.err for one in turned))
    return Slopes(0, 2 << GRID, before.out_shape, before, _scaled(both, factor), identity(shape))


def _halves(shape: Shape) -> tuple[Gather, Gather, Gather]:
    """The first half of the channels, the second one, and what puts one half into both places."""
    half: Shape = (shape[0] // 2, *shape[1:])
    numbers = np.arange(math.prod(half))
    return (
        Gather(numbers, shape, half),
        Gather(numbers + len(numbers), shape, half),
        Gather(np.concatenate([numbers, numbers]), half, shape),
    )


def _scaled(linear: Linear, factor: Fixed) -> Linear:
    return Chain((linear, Scale(factor, linear.out_shape)), linear.in_shape)

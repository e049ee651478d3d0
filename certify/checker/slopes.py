"""The checker's own description of activations for relaxations: between which slopes each number moves.

An activation is phi(v) = P v + Q psi(R v) with linear maps P (`skip`), Q (`after`) and R (`before`). Every difference
quotient of psi, which acts on each number by itself, is in [low, high]; in a group, ||psi(u) - psi(u')|| <= ||u - u'||.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flint import arb, fmpz

from .balls import Fixed, integers
from .chains import Chain
from .convolution import Convolution
from .maps import Dense, Gather, Linear, Shape

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
    half = shape[0] // 2
    one = np.eye(half, dtype=np.int64)
    before = _mixed(_whole(np.hstack([one, -one])), shape)
    after = _mixed(_whole(np.vstack([one, -one]), -1), before.out_shape)
    skip = _mixed(_whole(np.vstack([np.hstack([one, one])] * 2), -1), shape)
    return Slopes(-1 << GRID, 1 << GRID, before.out_shape, before, after, skip)


def groups_sorted(shape: Shape, size: int) -> Slopes:
    """The mean of each group, and the rest sorted: which has a mean of 0 before and after, and is never stretched."""
    bits = 128
    mean = np.kron(np.eye(shape[0] // size, dtype=np.int64), np.ones((size, size), dtype=np.int64)).astype(object)
    exact, missing = divmod(1 << bits, size)
    err = fmpz(int(missing > 0))
    skip = Fixed(integers([fmpz(int(v)) * exact for v in mean.reshape(-1)], mean.shape), -bits, err)
    one = np.eye(shape[0], dtype=np.int64)
    whole = integers([fmpz(int(v)) << bits for v in one.reshape(-1)], one.shape)
    rest = _mixed(Fixed(whole - skip.mant, -bits, err), shape)
    return Slopes(-1 << GRID, 1 << GRID, shape, rest, rest, _mixed(skip, shape), size)


def reflected(shape: Shape, sines: Fixed, cosines: Fixed) -> Slopes:
    """(a, b) + (-sin, cos) 2 min(sin a - cos b, 0), of channels i and i + C / 2."""
    sine, cosine = _diagonal(sines), _diagonal(cosines)
    before = _mixed(_beside(sine, cosine.moved(-cosine.mant), 1), shape)
    after = _mixed(_beside(sine.moved(-sine.mant), cosine, 0), before.out_shape)
    places = Gather(np.arange(int(np.prod(shape, dtype=np.int64))), shape, shape)
    return Slopes(0, 2 << GRID, before.out_shape, before, after, places)


def _whole(values: np.ndarray[tuple[int, ...], np.dtype[np.int64]], exp: int = 0) -> Fixed:
    return Fixed(integers([fmpz(v) for v in values.reshape(-1).tolist()], values.shape), exp)


def _diagonal(values: Fixed) -> Fixed:
    flat = values.mant.reshape(-1)
    found = integers([fmpz(0)] * len(flat) ** 2, (len(flat), len(flat)))
    found[np.arange(len(flat)), np.arange(len(flat))] = flat
    return Fixed(found, values.exp, values.err)


def _beside(first: Fixed, second: Fixed, axis: int) -> Fixed:
    """Two matrices joined, in one unit."""
    exp = min(first.exp, second.exp)
    parts = [part.mant << (part.exp - exp) for part in (first, second)]
    err = max(part.err << (part.exp - exp) for part in (first, second))
    return Fixed(np.concatenate(parts, axis), exp, err)


def _mixed(weight: Fixed, shape: Shape) -> Linear:
    """A matrix applied to the channels at every place."""
    if len(shape) == 1:
        return Dense(weight, shape)
    places = int(np.prod(shape[1:], dtype=np.int64))
    channels = weight.shape[0]
    flat, image = (shape[0], places), (channels, places)
    into = Gather(np.arange(shape[0] * places), shape, flat)
    mixing = Convolution(weight.reshape(*weight.shape, 1), flat, image, (1,), ((0, 0),), (1,))
    out = Gather(np.arange(channels * places), image, (channels, *shape[1:]))
    return Chain((into, mixing, out), shape)

"""The checker's own table of operations that pick or mix several entries: maxima, sorting, reflections."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import arb, fmpz

from .balls import Fixed, aligned, balls, fixed, from_balls, plus, times, zeros
from .convolution import Convolution, pad_places
from .maps import Indices, Shape
from .reading import Reading, tuple_of
from .rounds import Rounds
from .slopes import Slopes, groups_sorted, pairs_sorted, reflected

NOTHING = zeros(())
_HOUSEHOLDER = 34  # units: a sine and a cosine right to 4, and the 10 operations after them


@dataclass(frozen=True)
class Activation:
    """An operation that is no affine map: values, Lipschitz factor per norm, rounding, slopes where it has such."""

    apply: Callable[[Fixed], Fixed]
    factor: Callable[[str], arb]
    rounds: Rounds
    slopes: Slopes | None = None


def one(norm: str) -> arb:
    """The factor of what never stretches, in every norm."""
    return arb(1)


def pick(apply: Callable[[Fixed], Fixed], slopes: Callable[[Shape], Slopes]) -> Callable[[Reading], Activation]:
    """What takes each result from among its inputs or their absolute values, without rounding."""
    return lambda use: Activation(apply, one, Rounds("steps", 0, gain=arb(1)), slopes(use.in_shape))


def _sorted_pairs(x: Fixed) -> Fixed:
    first, second = np.split(x.mant, 2, 1)
    return x.moved(np.concatenate([np.maximum(first, second), np.minimum(first, second)], 1))


def max_min(use: Reading) -> Activation:
    """Sorted pairs of channels i and i + C / 2, the larger one first."""
    if use.in_shape[0] % 2:
        raise use.refused(f"inputs {use.in_shape}")
    return pick(_sorted_pairs, pairs_sorted)(use)


def group_sort(use: Reading) -> Activation:
    """Sorted groups of neighbouring channels."""
    size = int(use.layer.group_size)
    if size < 1 or use.in_shape[0] % size:
        raise use.refused(f"inputs {use.in_shape}")

    def apply(x: Fixed) -> Fixed:
        groups = x.mant.reshape(len(x.mant), -1, size, *x.shape[2:])
        return x.moved(np.sort(groups, axis=2).reshape(x.shape))

    return pick(apply, lambda shape: groups_sorted(shape, size))(use)


def householder(use: Reading) -> Activation:
    """y = z - 2 v min(v^T z, 0) on pairs, v = (sin(t / 2), -cos(t / 2)); factor in linf and l1 |cos t| + |sin t|."""
    angles = balls(fixed(use.layer.angle))
    if use.in_shape[0] != 2 * len(angles):
        raise use.refused(f"inputs {use.in_shape}")
    shape = (len(angles), *(1,) * (len(use.in_shape) - 1))
    sines = from_balls([(t / 2).sin() for t in angles], shape)
    cosines = from_balls([(t / 2).cos() for t in angles], shape)

    def apply(x: Fixed) -> Fixed:
        first, second = (x.moved(part) for part in np.split(x.mant, 2, 1))
        inner = plus(times(sines, first), times(cosines, second), -1)
        below = Fixed(np.minimum(inner.mant, NOTHING) * 2, inner.exp, inner.err * 2)
        parts = aligned(plus(first, times(sines, below), -1), plus(second, times(cosines, below)))
        err = max(part.err for part in parts)
        return Fixed(np.concatenate([part.mant for part in parts], 1), parts[0].exp, err)

    def factor(norm: str) -> arb:
        if norm == "l2":
            return arb(1)
        found = arb(0)
        for angle in angles:
            found = found.max(abs(angle.cos()) + abs(angle.sin()))
        return found

    slopes = reflected(use.in_shape, sines, cosines)
    return Activation(apply, factor, Rounds("steps", _HOUSEHOLDER, gain=arb(1), peak=arb(2)), slopes)


def max_pool(use: Reading) -> Activation:
    """Maxima of windows; l1: the largest number of windows over one pixel, l2: its root, linf: 1."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = (None, None, 0, 1, False, False)
    if use.module is not None:
        values = [getattr(use.layer, name, default) for name, default in zip(names, defaults, strict=True)]
    else:
        values = [use.argument(i, name, default) for i, (name, default) in enumerate(zip(names, defaults, strict=True))]
    kernel, stride, padding, dilation, _, indices = values
    dims = len(use.in_shape) - 1
    if indices or dims not in (1, 2, 3) or use.in_shape[0] != use.out_shape[0]:
        raise use.refused("indices or without channels")
    stride = kernel if stride is None or stride == () else stride
    kernel, stride, padding, dilation = (tuple_of(v, dims) for v in (kernel, stride, padding, dilation))
    reads = []
    for axis in range(dims):
        places: Indices = np.arange(use.out_shape[axis + 1]) * stride[axis] - padding[axis]
        places = places + (np.arange(kernel[axis]) * dilation[axis])[:, None]
        reads.append(pad_places(places, use.in_shape[axis + 1], "zeros"))
    overlap = math.prod(int(np.bincount(read[read >= 0]).max()) for read in reads)
    table = _window_table(use, kernel, stride, padding, dilation)
    factors = {"linf": arb(1), "l1": arb(overlap), "l2": arb(overlap).sqrt()}

    def apply(x: Fixed) -> Fixed:
        flat = x.mant.reshape(len(x.mant), use.in_shape[0], -1)
        lowest = fmpz(flat.min()) if flat.size else fmpz(0)
        extended = np.concatenate([flat, np.full((*flat.shape[:2], 1), lowest, dtype=object)], 2)
        return x.moved(extended[:, :, table].max(2).reshape(len(flat), *use.out_shape))

    return Activation(apply, factors.__getitem__, Rounds("steps", 0, gain=arb(1)))


def _window_table(use: Reading, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Indices:
    pads = tuple((p, p) for p in padding)
    shape = Convolution(
        Fixed(np.empty((1, 1, *kernel), dtype=object), 0), use.in_shape, use.out_shape, stride, pads, dilation
    )
    return shape.table

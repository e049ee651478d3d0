"""Linear maps as matrices, and the sums of their absolute entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
from flint import arb, fmpz

from .balls import Fixed, balls, largest, scaled, zeros
from .convolution import Convolution
from .maps import Gather, Linear, Scale, Shape, ones

_SIDE = 2048  # of a matrix that is made entry by entry, its smaller one
_ENTRIES = 1 << 24
_AT_ONCE = 1 << 20  # entries of basis vectors


class Refused(Exception):
    """A claim that could not be proved: what was claimed, and what could be proved or is the case."""


def greatest_sum(part: Linear, norm: str) -> arb:
    """The largest row sum (linf) or column sum (l1) of the absolute matrix."""
    absolute = part.magnitude()
    found = absolute.apply(ones(part.in_shape)) if norm == "linf" else absolute.adjoint(ones(part.out_shape))
    return scaled(largest(found.mant) + found.err, found.exp)


def absolute_norm(part: Linear) -> arb:
    """Upper bound of the absolute matrix' l2 norm: root of the largest row sum times the largest column sum."""
    return (greatest_sum(part, "linf") * greatest_sum(part, "l1")).sqrt()


def inverse_norm(part: Linear) -> arb:
    """Upper bound of the norm of the inverse, infinite where none is known."""
    if isinstance(part, Gather) and part.moves_only and math.prod(part.in_shape) == math.prod(part.out_shape):
        return arb(1) if bool((part.index >= 0).all()) else arb.pos_inf()
    if not isinstance(part, Scale):
        return arb.pos_inf()
    least = reduce(arb.min, (abs(ball) for ball in balls(part.factor)))
    return 1 / least if least > 0 else arb.pos_inf()


def materialised(linear: Linear) -> Fixed:
    """The matrix [outputs, inputs] of a map, its transpose where that is less work; Refused where it is too large."""
    inputs, outputs = math.prod(linear.in_shape), math.prod(linear.out_shape)
    within_limits(inputs, outputs)
    if isinstance(linear, Convolution):
        return _convolution_matrix(linear)
    if inputs <= outputs:
        return _images(linear.apply, linear.in_shape, outputs, transpose=True)
    return _images(linear.adjoint, linear.out_shape, inputs, transpose=False)


def within_limits(inputs: int, outputs: int) -> None:
    """Refused where a matrix of that size is too large."""
    if min(inputs, outputs) > _SIDE or inputs * outputs > _ENTRIES:
        raise Refused(f"a matrix of {outputs} x {inputs} is too large for the checker")


def rows_of(linear: Linear) -> Fixed:
    """The matrix [outputs, inputs], by one adjoint per output."""
    return _images(linear.adjoint, linear.out_shape, math.prod(linear.in_shape), transpose=False)


def _images(function: Callable[[Fixed], Fixed], shape: Shape, width: int, *, transpose: bool) -> Fixed:
    size = math.prod(shape)
    step = max(1, _AT_ONCE // max(size, width, 1))
    parts = []
    for start in range(0, size, step):
        stop = min(size, start + step)
        basis = zeros((stop - start, size))
        basis[np.arange(stop - start), np.arange(start, stop)] = fmpz(1)
        image = function(Fixed(basis.reshape(stop - start, *shape), 0))
        parts.append(image.reshape(stop - start, width))
    exp = min(part.exp for part in parts)
    mant = np.concatenate([part.mant << (part.exp - exp) for part in parts])
    err = max(part.err << (part.exp - exp) for part in parts)
    return Fixed(mant.T if transpose else mant, exp, err)


def _convolution_matrix(convolution: Convolution) -> Fixed:
    """Entry by entry: weight[o, i, t] where output place p reads input place q by tap t, summed where taps meet."""
    places, pixels = convolution.table.shape[1], math.prod(convolution.in_shape[1:])
    outputs, inputs = convolution.out_shape[0], convolution.in_shape[0]
    matrix = zeros((places, pixels, outputs, inputs))
    weight = convolution.weight.mant.reshape(*convolution.weight.shape[:2], -1)
    rows, columns = outputs // convolution.groups, inputs // convolution.groups
    for group in range(convolution.groups):
        own = slice(group * rows, (group + 1) * rows), slice(group * columns, (group + 1) * columns)
        for tap, read in enumerate(convolution.table):
            used = np.flatnonzero(read >= 0)
            matrix[used, read[used], own[0], own[1]] += weight[own[0], :, tap]
    err = convolution.weight.err * len(convolution.table)
    shape = (outputs * places, inputs * pixels)
    return Fixed(matrix.transpose(2, 0, 3, 1).reshape(shape), convolution.weight.exp, err)

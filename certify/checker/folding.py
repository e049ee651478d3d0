"""Chains of linear maps in which scalings are absorbed by their neighbours."""

from __future__ import annotations

import numpy as np
from flint import fmpz

from .balls import Fixed, integers, plus, times
from .chains import Chain, Sum
from .convolution import Convolution
from .maps import Dense, Gather, Linear, Scale, Shape


def folded(linear: Linear) -> list[Linear]:
    """The chain of maps that are left when scalings are absorbed by their neighbours and pure moves are left out."""
    found: list[Linear] = []
    for part in linear.maps if isinstance(linear, Chain) else (linear,):
        part = _folded_sum(part) if isinstance(part, Sum) else part
        merged = _fused(found[-1], part) if found else None
        if merged is not None:
            found[-1] = merged
        elif not (isinstance(part, Gather) and part.passes and part.in_shape == part.out_shape):
            found.append(part)
    return [part for part in found if not part.moves_only]


def _folded_sum(linear: Sum) -> Linear:
    sides = [_single(linear.first), _single(linear.second)]
    for side, other in (sides, reversed(sides)):
        if isinstance(other, Scale) and isinstance(side, Scale):
            return Scale(plus(side.factor, other.factor), side.in_shape)
        channels = other.channels if isinstance(other, Scale) else None
        centred = side.with_centre(channels) if isinstance(side, Convolution) and channels is not None else None
        if centred is not None:
            return centred
    return linear


def _single(linear: Linear) -> Linear | None:
    """The one map that a chain comes to; the identity as a factor of one."""
    if isinstance(linear, Sum):
        linear = _folded_sum(linear)
    maps = linear.maps if isinstance(linear, Chain) else (linear,)
    if all(isinstance(m, Gather) and m.passes and m.in_shape == m.out_shape for m in maps):
        return Scale(Fixed(integers([fmpz(1)], ()), 0), linear.in_shape)
    if any(part.moves_only and not (isinstance(part, Gather) and part.passes) for part in maps):
        return None
    shapes_kept = all(not isinstance(m, Gather) or m.in_shape == m.out_shape for m in maps)
    found = folded(linear)
    return found[0] if len(found) == 1 and shapes_kept else None


def _fused(first: Linear, last: Linear) -> Linear | None:
    """`last` after `first` as one map, where a scaling is absorbed."""
    if isinstance(first, Scale) and isinstance(last, Scale):
        return Scale(times(first.factor, last.factor), first.in_shape)
    if isinstance(first, Scale) and isinstance(last, Dense) and len(last.in_shape) == 1:
        return Dense(times(last.weight, _along(first, first.in_shape).reshape(1, -1)), first.in_shape)
    if isinstance(first, Dense) and isinstance(last, Scale) and len(last.in_shape) == 1:
        return Dense(times(first.weight, _along(last, last.in_shape).reshape(-1, 1)), first.in_shape)
    if isinstance(first, Scale) and isinstance(last, Convolution) and first.channels is not None:
        return last.scaled_inputs(first.channels)
    if isinstance(first, Convolution) and isinstance(last, Scale) and last.channels is not None:
        return first.scaled_outputs(last.channels)
    return None


def _along(scale: Scale, shape: Shape) -> Fixed:
    return scale.factor.moved(np.broadcast_to(scale.factor.mant, shape))

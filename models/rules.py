"""Lipschitz rules of this package's layers, registered when ``speccert.models`` is imported.

`Residual` needs none: the tracer looks inside it and sums its two branches.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..certify.linear import Diagonal, LinearMap, identity, rounding_slack
from ..certify.rounding import gamma, up_add, up_mul, up_sqrt
from ..certify.rules import Call, register_rule
from ..certify.slopes import Slopes, mixed_channels, register_slopes
from .activations import Abs, GroupSort, Householder, MaxMin
from .layers import Normalize

__all__: list[str] = []

# Roundings of |cos t| + |sin t| in float64: one of the sum, and a cosine and sine right to 2 units in the last place.
_ROUNDINGS = 8

# Norm of what the matrices of activations may miss: their blocks of 1 / n, sines and cosines are right to 8 units.
_SLACK = 2.0**-48


def _householder(call: Call, norm: str) -> float:
    """1 in l2; in linf and l1 the largest |cos t| + |sin t| over the pairs, since the reflection is symmetric."""
    if norm == "l2":
        return 1.0
    if not isinstance(call.module, Householder):
        raise ValueError(f"{call.place}: expected a Householder layer, got {type(call.module).__name__}")
    angle = call.module.angle.detach().double()
    largest = float((angle.cos().abs() + angle.sin().abs()).max())
    return min(up_mul(largest, up_add(1.0, gamma(_ROUNDINGS))), up_sqrt(2.0))


def _normalize(call: Call) -> LinearMap:
    """x / std; 1 / std is taken in float64, where a float32 reciprocal may round below the true one."""
    if not isinstance(call.module, Normalize):
        raise ValueError(f"{call.place}: expected a Normalize layer, got {type(call.module).__name__}")
    channels = max(len(call.module.mean), len(call.module.std))
    if channels not in (1, call.in_shape[0]):
        raise ValueError(f"{call.place}: expected inputs of {channels} channels, got {call.in_shape}")
    scale = call.module.std.double().reciprocal()
    linear = Diagonal(scale.reshape(-1, *[1] * (len(call.in_shape) - 1)), call.in_shape)
    return replace(linear, slack=rounding_slack(linear))


def _maxmin_slopes(call: Call) -> Slopes:
    """max, min = (a + b) / 2 +- |a - b| / 2: all coefficients are exact."""
    half = torch.eye(call.in_shape[0] // 2, dtype=torch.float64)
    before = mixed_channels(torch.cat([half, -half], 1), call.in_shape)
    after = mixed_channels(torch.cat([half, -half]) / 2, before.out_shape)
    skip = mixed_channels(torch.cat([torch.cat([half, half], 1)] * 2) / 2, call.in_shape)
    return Slopes("abs", -1.0, 1.0, before.out_shape, before, after, skip)


def _groupsort_slopes(call: Call) -> Slopes:
    """Sorting keeps a group's mean and does not lengthen what is left without it (Pauli et al. 2024, Lemma 3)."""
    if not isinstance(call.module, GroupSort):
        raise ValueError(f"{call.place}: expected a GroupSort layer, got {type(call.module).__name__}")
    size, channels = call.module.group_size, call.in_shape[0]
    unit = torch.eye(channels // size, dtype=torch.float64)
    mean = torch.kron(unit, torch.full((size, size), 1 / size, dtype=torch.float64))
    rest = mixed_channels(torch.eye(channels, dtype=torch.float64) - mean, call.in_shape, _SLACK)
    return Slopes("sort", -1.0, 1.0, None, rest, rest, mixed_channels(mean, call.in_shape, _SLACK), size)


def _householder_slopes(call: Call) -> Slopes:
    """(a, b) + (-sin, cos) 2 min(sin a - cos b, 0), sines and cosines of the halved angles as float64 gives them."""
    if not isinstance(call.module, Householder):
        raise ValueError(f"{call.place}: expected a Householder layer, got {type(call.module).__name__}")
    half = call.module.angle.detach().to("cpu", torch.float64) / 2
    sin, cos = torch.diag(half.sin()), torch.diag(half.cos())
    before = mixed_channels(torch.cat([sin, -cos], 1), call.in_shape, _SLACK)
    after = mixed_channels(torch.cat([-sin, cos]), before.out_shape, _SLACK)
    return Slopes("twice-negative", 0.0, 2.0, before.out_shape, before, after, identity(call.in_shape))


register_rule(Abs, GroupSort, MaxMin, factor=1.0)
register_slopes(Abs, slopes=Slopes("abs", -1.0, 1.0))
register_slopes(MaxMin, slopes=_maxmin_slopes)
register_slopes(GroupSort, slopes=_groupsort_slopes)
register_slopes(Householder, slopes=_householder_slopes)
register_rule(Householder, factor=_householder)
register_rule(Normalize, linear=_normalize)

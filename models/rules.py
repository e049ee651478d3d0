"""Lipschitz rules of this package's layers, registered when ``speccert.models`` is imported.

`Residual` needs none: the tracer looks inside it and sums its two branches.
"""

from __future__ import annotations

import math

from ..certify.linear import Diagonal, LinearMap
from ..certify.rules import Call, register_rule
from .activations import Abs, GroupSort, Householder, MaxMin
from .layers import Normalize

__all__: list[str] = []

_UP = 1 + 1e-12  # covers the rounding of a cosine, a sine and their sum in float64


def _householder(call: Call, norm: str) -> float:
    """1 in l2; in linf and l1 the largest |cos t| + |sin t| over the pairs, since the reflection is symmetric."""
    if norm == "l2":
        return 1.0
    if not isinstance(call.module, Householder):
        raise ValueError(f"{call.place}: expected a Householder layer, got {type(call.module).__name__}")
    angle = call.module.angle.detach().double()
    return min(float((angle.cos().abs() + angle.sin().abs()).max()) * _UP, math.sqrt(2) * _UP)


def _normalize(call: Call) -> LinearMap:
    """x / std; 1 / std is taken in float64, where a float32 reciprocal may round below the true one."""
    if not isinstance(call.module, Normalize):
        raise ValueError(f"{call.place}: expected a Normalize layer, got {type(call.module).__name__}")
    channels = max(len(call.module.mean), len(call.module.std))
    if channels not in (1, call.in_shape[0]):
        raise ValueError(f"{call.place}: expected inputs of {channels} channels, got {call.in_shape}")
    scale = call.module.std.double().reciprocal()
    return Diagonal(scale.reshape(-1, *[1] * (len(call.in_shape) - 1)), call.in_shape)


register_rule(Abs, GroupSort, MaxMin, factor=1.0)
register_rule(Householder, factor=_householder)
register_rule(Normalize, linear=_normalize)

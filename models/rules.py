"""Lipschitz rules of this package's layers, registered when ``speccert.models`` is imported.

`Residual` needs none: the tracer looks inside it and sums its two branches.
"""

from __future__ import annotations

from dataclasses import replace

from ..certify.linear import Diagonal, LinearMap, rounding_slack
from ..certify.rounding import gamma, up_add, up_mul, up_sqrt
from ..certify.rules import Call, register_rule
from .activations import Abs, GroupSort, Householder, MaxMin
from .layers import Normalize

__all__: list[str] = []

# Roundings of |cos t| + |sin t| in float64: one of the sum, and a cosine and sine right to 2 units in the last place.
_ROUNDINGS = 8


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


register_rule(Abs, GroupSort, MaxMin, factor=1.0)
register_rule(Householder, factor=_householder)
register_rule(Normalize, linear=_normalize)

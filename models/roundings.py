"""How this package's layers round, registered when ``speccert.models`` is imported; the counterpart of `rules`.

`Residual` needs none: the tracer looks inside it.
"""

from __future__ import annotations

from ..certify.rounding_rules import PICKS, spread_norm
from ..certify.rules import Call, Rounding, register_rounding
from .activations import Abs, GroupSort, Householder, MaxMin
from .layers import Normalize

__all__: list[str] = []

_TRIGONOMETRIC = 4  # units by which the sine and cosine of half an angle may err


def _normalize(call: Call) -> Rounding:
    """A difference and a quotient; one rounding more for a product with the reciprocal."""
    if not isinstance(call.module, Normalize):
        raise ValueError(f"{call.place}: expected a Normalize layer, got {type(call.module).__name__}")
    mean, std = call.module.mean.detach().double(), call.module.std.detach().double()
    offset = spread_norm(mean / std, call.out_shape) * (1 + 2.0**-40)  # covers the rounding of the quotients
    return Rounding("steps", 3, offset=offset, peak=float(mean.abs().max()))


def _householder(call: Call) -> Rounding:
    """y = z - 2 v min(v^T z, 0) with v right to k units: at most 6 k + 10 units of ||z||, pair by pair.

    With q = |v_1 a| + |v_2 b| <= ||z||, b = 2 min(v^T z, 0) errs by 2 k (|a| + |b|) + 4 q <= (2 sqrt(2) k + 4) ||z||
    units; times |v| = 1, plus sqrt(2) k 2 q for v, 2 q for the product and ||z|| + 2 q for the difference.
    """
    return Rounding("steps", 6 * _TRIGONOMETRIC + 10, 1.0, peak=2.0)


register_rounding(Abs, GroupSort, MaxMin, rounding=PICKS)
register_rounding(Householder, rounding=_householder)
register_rounding(Normalize, rounding=_normalize)

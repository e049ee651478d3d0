"""Activations as slope-restricted numbers: what bounds tighter than a product of factors know of them.

An activation is phi(v) = P v + Q psi(R v), with linear maps P, Q and R and a psi that acts on each number by itself
with every difference quotient in [low, high], or, where the numbers of a group are *tied*, on the group with
||psi(u) - psi(u')|| <= ||u - u'||. P is absent and Q and R are identities for an elementwise activation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .convolution import Convolution
from .layer_rules import GELU, GELU_TANH, SILU, _gelu
from .linear import Chain, Dense, LinearMap, Reindex
from .rules import Call, Operation, enter

_GRID = 2.0**26  # slopes are widened to multiples of 1 / this, so that their sums and products are exact
_STEEPEST = 2.0**20


@dataclass(frozen=True)
class Slopes:
    """One activation, see the module.

    Attributes:
        kind: what psi is, by name ("relu", "abs", ...): where it is known over an interval, local bounds use that.
        low: least slope of psi.
        high: largest slope.
        shape: of the numbers that psi acts on; None is that of the tensor.
        before: R; None is the identity.
        after: Q; None is the identity.
        skip: P; None is zero.
        group: how many neighbours along the first axis share one condition; 1: none do.
        parameter: what else defines psi, such as the slope of a leaky ReLU.
    """

    kind: str
    low: float
    high: float
    shape: tuple[int, ...] | None = None
    before: LinearMap | None = None
    after: LinearMap | None = None
    skip: LinearMap | None = None
    group: int = 1
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if not -_STEEPEST <= self.low <= self.high <= _STEEPEST:
            raise ValueError(f"Slopes: expected -2^20 <= low <= high <= 2^20, got {self.low} and {self.high}")
        if self.group > 1 and not (self.low <= -1 and self.high >= 1):
            raise ValueError(f"Slopes: expected slopes of [-1, 1] at least in a group, got {self.low} and {self.high}")
        object.__setattr__(self, "low", math.floor(self.low * _GRID) / _GRID)
        object.__setattr__(self, "high", math.ceil(self.high * _GRID) / _GRID)


_SLOPES: dict[Operation, Callable[[Call], Slopes | None]] = {}


def register_slopes(*operations: Operation, slopes: Callable[[Call], Slopes | None] | Slopes) -> None:
    """Give activations a description that LipSDP and local bounds use; without one they take the Lipschitz factor.

    Args:
        operations: exact module types, functions such as torch.relu, or tensor method names.
        slopes: the description, or a function from the call to it; None where there is none.

    Raises:
        ValueError: an operation that has one already.
    """
    enter(_SLOPES, operations, slopes, "register_slopes: {} has slopes already")


def slopes_of(operation: Operation, call: Call) -> Slopes | None:
    """The description of a call, None where there is none."""
    found = _SLOPES.get(operation)
    return None if found is None else found(call)


def mixed_channels(
    weight: Tensor,  # [out, in]
    shape: tuple[int, ...],
    slack: float = 0.0,
) -> LinearMap:
    """The same matrix, within `slack` of the true one, applied to the channels at every place of a tensor."""
    if len(shape) == 1:
        return Dense(weight, shape, slack)
    places = math.prod(shape[1:])
    flat, image = (shape[0], places), (weight.shape[0], *shape[1:])
    mixed = Convolution(weight[:, :, None], flat, (1,), ((0, 0),), (1,), 1, "zeros", slack)
    return Chain(
        (
            Reindex(lambda x: x.reshape(x.shape[0], *flat), shape, flat),
            mixed,
            Reindex(lambda x: x.reshape(x.shape[0], *image), mixed.out_shape, image),
        )
    )


def _argument(call: Call, position: int, name: str, default: Any) -> Any:
    return getattr(call.module, name) if call.module is not None else call.argument(position, name, default)


def _leaky(call: Call) -> Slopes | None:
    slope = float(_argument(call, 0, "negative_slope", 0.01))
    if abs(slope) > _STEEPEST:
        return None
    return Slopes("leaky-relu", min(1.0, slope), max(1.0, slope), parameter=slope)


def _elu(call: Call) -> Slopes | None:
    alpha = float(_argument(call, 0, "alpha", 1.0))
    if abs(alpha) > _STEEPEST:
        return None
    return Slopes("elu", min(0.0, alpha), max(1.0, alpha), parameter=alpha)


def _gelu_slopes(call: Call) -> Slopes:
    # f'(v) + f'(-v) = 1, so that the least slope is 1 - the largest
    exact = _gelu(call, "l2") == GELU
    largest = GELU if exact else GELU_TANH
    return Slopes("gelu" if exact else "gelu-tanh", 1 - largest, largest)


register_slopes(nn.ReLU, torch.relu, functional.relu, "relu", slopes=Slopes("relu", 0.0, 1.0))
register_slopes(torch.abs, operator.abs, "abs", slopes=Slopes("abs", -1.0, 1.0))
register_slopes(nn.ReLU6, nn.Hardtanh, slopes=Slopes("clamp", 0.0, 1.0))
register_slopes(nn.Tanh, torch.tanh, functional.tanh, "tanh", slopes=Slopes("tanh", 0.0, 1.0))
register_slopes(nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid", slopes=Slopes("sigmoid", 0.0, 0.25))
register_slopes(nn.Softplus, functional.softplus, slopes=Slopes("softplus", 0.0, 1.0))
for _kind in (nn.Softsign, nn.Softshrink, nn.LogSigmoid, nn.Tanhshrink):
    register_slopes(_kind, slopes=Slopes(_kind.__name__.lower(), 0.0, 1.0))
register_slopes(nn.LeakyReLU, slopes=_leaky)
register_slopes(nn.ELU, slopes=_elu)
register_slopes(nn.GELU, functional.gelu, slopes=_gelu_slopes)
register_slopes(nn.SiLU, functional.silu, slopes=Slopes("silu", 1 - SILU, SILU))

"""A network with its kinks rounded off, whose Jacobian has a gradient: it leads a search, and proves nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LEAST = 1e-300


class Smoothed(TorchFunctionMode):
    """Within it, kinks of torch's own functions have a width: max(v, 0) is w log(1 + exp(v / w)), all others follow.

    Each w is `width` times the mean size of the numbers that the function gets, a constant to autograd. Functions that
    are not known here keep their kinks.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self._width = width

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The smooth function in place of `func`, where there is one."""
        smooth = _SMOOTH.get(func)
        if smooth is None:
            return func(*args, **(kwargs or {}))
        return smooth(
            self._positive, *args, **{key: value for key, value in (kwargs or {}).items() if key != "inplace"}
        )

    def _positive(self, v: Tensor) -> Tensor:
        width = (self._width * v.detach().abs().mean()).clamp_min(_LEAST)
        return width * functional.softplus(v / width)


_Positive = Callable[[Tensor], Tensor]


def _relu(positive: _Positive, v: Tensor) -> Tensor:
    return positive(v)


def _leaky(positive: _Positive, v: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * v + (1 - negative_slope) * positive(v)


def _absolute(positive: _Positive, v: Tensor) -> Tensor:
    return 2 * positive(v) - v


def _larger(positive: _Positive, v: Tensor, other: Tensor) -> Tensor:
    return other + positive(v - other)


def _smaller(positive: _Positive, v: Tensor, other: Tensor) -> Tensor:
    return v - positive(v - other)


def _between(positive: _Positive, v: Tensor, min: Any = None, max: Any = None) -> Tensor:
    lower = v if min is None else min + positive(v - min)
    return lower if max is None else lower - positive(lower - max)


def _hardtanh(positive: _Positive, v: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return _between(positive, v, min_val, max_val)


_SMOOTH: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    functional.leaky_relu: _leaky,
    **dict.fromkeys((torch.abs, Tensor.abs, Tensor.__abs__, operator.abs), _absolute),
    **dict.fromkeys((torch.maximum, Tensor.maximum), _larger),
    **dict.fromkeys((torch.minimum, Tensor.minimum), _smaller),
    **dict.fromkeys((torch.clamp, Tensor.clamp), _between),
    torch.clamp_min: lambda positive, v, min: _between(positive, v, min),
    Tensor.clamp_min: lambda positive, v, min: _between(positive, v, min),
    functional.hardtanh: _hardtanh,
    functional.relu6: lambda positive, v: _between(positive, v, 0.0, 6.0),
}

"""How torch's own layers, functions and tensor methods round; the counterpart of `layer_rules`.

Units stated for smooth functions were measured against exact values on the CPU (at most 2 units, GELU 5) and leave room
for GPUs, whose documentation states 1 to 2 ulps (2 to 4 units) for each elementary function.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rounding import norm_up, up_add, up_div, up_mul, up_sqrt
from .rules import EXACT, Call, Rounding, register_rounding

SMOOTH = 8  # units: tanh, sigmoid, softplus, ... of the size stated by their rule
GELU = 16
LOG_2 = 0.6931471805599454  # rounded up
_JUMP = 2.07e-9  # exceeds log(1 + exp(-20)), torch's softplus jumps by it at the threshold
_COEFFICIENT = 12  # roundings of (x - mean) * (weight / sqrt(var + eps)) + bias in any of the usual forms
_SMALLEST_VARIANCE = 2.0**-40  # products in any order of the factors then stay far from underflow


def _pairs(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def spread_norm(
    values: Tensor,  # broadcasts to shape
    shape: tuple[int, ...],
) -> float:
    """Upper bound of the l2 norm of `values` broadcast to `shape`."""
    count = max(1, values.numel())
    size = float(norm_up(values.detach().double().flatten())) if values.numel() else 0.0
    return up_mul(size, up_sqrt(float(math.ceil(math.prod(shape) / count))))


def _filled(value: float, shape: tuple[int, ...]) -> float:
    """Upper bound of the norm of a tensor of `shape` filled with a number."""
    return up_mul(abs(value), up_sqrt(float(math.prod(shape))))


def _dot(call: Call, products: int, bias: Tensor | None, **more: Any) -> Rounding:
    if bias is None:
        return Rounding("dot", products, **more)
    return Rounding("dot", products + 1, offset=spread_norm(bias, call.out_shape), **more)


def _linear(call: Call) -> Rounding:
    layer: Any = call.module
    return _dot(call, call.in_shape[-1], layer.bias)


def _linear_function(call: Call) -> Rounding:
    return _dot(call, call.in_shape[-1], call.argument(1, "bias"))


def _taps(call: Call) -> int:
    layer: Any = call.module
    return math.prod(layer.kernel_size)


def _convolution(call: Call) -> Rounding:
    layer: Any = call.module
    repeats = 1 if layer.padding_mode == "zeros" else _taps(call)
    return _dot(call, _taps(call) * layer.in_channels // layer.groups, layer.bias, repeats=repeats)


def _transposed(call: Call) -> Rounding:
    layer: Any = call.module
    products = _taps(call) * layer.in_channels // layer.groups
    return _dot(call, products, layer.bias, partials=2 * _taps(call))


def _batch_norm(call: Call) -> Rounding:
    layer: Any = call.module
    mean, variance = layer.running_mean.detach().double(), layer.running_var.detach().double()
    if layer.running_mean.numel() == 0 or float(variance.min()) + layer.eps < _SMALLEST_VARIANCE:
        return Rounding("steps", _COEFFICIENT, peak=math.inf)
    scale = (variance + layer.eps).rsqrt().abs()
    constant = mean.abs() * (scale if layer.weight is None else scale * layer.weight.detach().double().abs())
    if layer.bias is not None:
        constant = constant + layer.bias.detach().double().abs()
    offset = up_mul(spread_norm(constant, call.out_shape), 1 + 2.0**-40)  # a few roundings of each entry
    peak = up_add(float(mean.abs().max()), float(variance.max()))
    return Rounding("steps", _COEFFICIENT, offset=offset, peak=peak)


def _average(count: int, *, wide: bool = True) -> Rounding:
    """The sum over `count` numbers, before it is divided at most sqrt(count) ||input||, and two roundings more."""
    return Rounding("dot", count + 2, reach=up_sqrt(float(count)), wide=wide)


def _pool(call: Call) -> Rounding:
    kernel = call.argument(0, "kernel_size") if call.module is None else getattr(call.module, "kernel_size", None)
    return _average(math.prod(_pairs(kernel, len(call.in_shape) - 1)))


def _adaptive_pool(call: Call) -> Rounding:
    axes = zip(call.in_shape[1:], call.out_shape[1:], strict=True)
    windows = [max(-(-(i + 1) * n // o) - i * n // o for i in range(o)) for n, o in axes]
    return _average(math.prod(windows), wide=len(windows) < 3)  # torch sums the 3d one in the half type itself


def _mean(call: Call) -> Rounding:
    axes = _pairs(call.argument(0, "dim"), 1)
    sizes = [call.in_shape[axis % (len(call.in_shape) + 1) - 1] for axis in axes]
    return _average(math.prod(sizes))


def _smooth(
    units: int = SMOOTH,
    gain: float = 1.0,
    level: float = 0.0,
) -> Callable[[Call], Rounding]:
    """A function that errs by at most `units` units of gain * |x| + level, entry by entry."""
    return lambda call: Rounding("steps", units, gain, _filled(level, call.out_shape))


def _softplus(call: Call) -> Rounding:
    beta = float(call.argument(0, "beta", 1) if call.module is None else getattr(call.module, "beta", 1.0))
    level, jump = up_div(LOG_2, beta), up_div(_JUMP, beta)
    shape = call.out_shape
    return Rounding("steps", SMOOTH, 1.0, _filled(level, shape), jump=_filled(jump, shape), peak=beta)


def _elu(call: Call) -> Rounding:
    """exp(x) - 1 errs by units of 1, not of its size."""
    alpha = abs(float(getattr(call.module, "alpha", 1.0)))
    return Rounding("steps", SMOOTH, max(1.0, alpha), _filled(alpha, call.out_shape))


def _leaky(call: Call) -> Rounding:
    slope = abs(float(getattr(call.module, "negative_slope", 0.01)))
    return Rounding("steps", 2, max(1.0, slope))


def _clamp(call: Call) -> Rounding:
    """Only the conversion of the two ends rounds."""
    layer: Any = call.module
    if (layer.min_val, layer.max_val) == (0.0, 6.0):
        return PICKS
    ends = [abs(float(end)) for end in (layer.min_val, layer.max_val) if math.isfinite(end)]
    return Rounding("steps", 1, 0.0, _filled(max(ends, default=0.0), call.out_shape))


def _shrink(call: Call) -> Rounding:
    level = abs(float(getattr(call.module, "lambd", 0.5)))
    return Rounding("steps", 2, 1.0, _filled(level, call.out_shape))


PICKS = Rounding("steps", 0, 1.0)  # takes one of its inputs, or its absolute value

register_rounding(nn.Linear, rounding=_linear)
register_rounding(functional.linear, rounding=_linear_function)
register_rounding(nn.Conv1d, nn.Conv2d, nn.Conv3d, rounding=_convolution)
register_rounding(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, rounding=_transposed)
register_rounding(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, rounding=_batch_norm)
register_rounding(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, rounding=_pool)
register_rounding(functional.avg_pool1d, functional.avg_pool2d, rounding=_pool)
register_rounding(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, rounding=_adaptive_pool)
register_rounding("mean", torch.mean, rounding=_mean)
register_rounding(
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, "contiguous", "clone"),
    *(torch.flatten, "flatten", "view", "reshape", torch.reshape, "unflatten", "squeeze", "unsqueeze"),
    *(operator.neg, torch.neg, "neg"),
    rounding=EXACT,
)
register_rounding(operator.mul, torch.mul, "mul", rounding=Rounding("steps", 2))
register_rounding(operator.truediv, torch.div, "div", rounding=Rounding("steps", 3))
register_rounding(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, functional.max_pool1d, functional.max_pool2d),
    *(nn.ReLU, torch.relu, functional.relu, "relu", torch.abs, operator.abs, "abs"),
    rounding=PICKS,
)
register_rounding(nn.Hardtanh, nn.ReLU6, rounding=_clamp)
register_rounding(nn.LeakyReLU, rounding=_leaky)
register_rounding(nn.ELU, rounding=_elu)
register_rounding(nn.Softshrink, rounding=_shrink)
register_rounding(nn.Tanh, torch.tanh, functional.tanh, "tanh", nn.Softsign, nn.Tanhshrink, rounding=_smooth(10))
register_rounding(nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid", rounding=_smooth(SMOOTH, 0.25, 0.5))
register_rounding(nn.LogSigmoid, rounding=_smooth(SMOOTH, 1.0, LOG_2))
register_rounding(nn.Softplus, functional.softplus, rounding=_softplus)
register_rounding(nn.GELU, functional.gelu, rounding=_smooth(GELU))
register_rounding(nn.SiLU, functional.silu, rounding=_smooth())

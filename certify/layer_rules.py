"""Rules of torch's own layers, functions and tensor methods."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .convolution import PADDING_MODES, Convolution, Transposed
from .graph import plain_type
from .linear import Channelwise, Dense, Diagonal, LinearMap, Reindex, identity, rounding_slack
from .rounding import up_sqrt
from .rules import Call, probe_shape, register_rule

# sup |f'| of smooth activations, rounded up in the last digit; tests re-derive them by maximisation.
GELU = 1.128904145186
GELU_TANH = 1.128993068659
SILU = 1.099839320129

# Spatial axes that a layer takes.
_POOL_DIMS: dict[type[nn.Module], int] = {
    kind: dims
    for dims, kinds in enumerate(
        (
            (nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.MaxPool1d),
            (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d),
            (nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.MaxPool3d),
        ),
        start=1,
    )
    for kind in kinds
}
_BATCH_NORM_DIMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (0, 1),
    nn.BatchNorm2d: (2,),
    nn.BatchNorm3d: (3,),
}


def _module(call: Call) -> Any:
    return call.module


def _linear(call: Call) -> LinearMap:
    weight = _module(call).weight
    if not call.in_shape or call.in_shape[-1] != weight.shape[1]:
        raise ValueError(f"{call.place}: expected inputs whose last axis is {weight.shape[1]}, got {call.in_shape}")
    return Dense(weight, call.in_shape)


def _linear_function(call: Call) -> LinearMap:
    return Dense(call.argument(0, "weight"), call.in_shape)


def _pairs(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def _check_spatial(call: Call, dims: int, channels: int) -> None:
    if len(call.in_shape) != dims + 1 or call.in_shape[0] != channels:
        raise ValueError(
            f"{call.place}: expected inputs of {channels} channels and {dims} spatial axes, got {call.in_shape}"
        )


def _check_pool(call: Call) -> None:
    """Without this a batch of pictures that lack the channel axis would pass as one picture of many channels."""
    dims = _POOL_DIMS[plain_type(_module(call))]
    if len(call.in_shape) != dims + 1:
        raise ValueError(f"{call.place}: expected inputs of channels and {dims} spatial axes, got {call.in_shape}")


def _convolution(call: Call) -> LinearMap:
    layer = _module(call)
    dims = len(layer.kernel_size)
    _check_spatial(call, dims, layer.in_channels)
    if layer.padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{call.place}: expected a padding mode of {', '.join(PADDING_MODES)}, got {layer.padding_mode}"
        )
    padding = _paddings(layer.padding, layer.kernel_size, layer.dilation)
    reach = {"reflect": 1, "circular": 0}.get(layer.padding_mode, -math.inf)
    if any(max(pad) + reach > size for pad, size in zip(padding, call.in_shape[1:], strict=True)):
        raise ValueError(
            f"{call.place}: expected less {layer.padding_mode} padding than the input, got {call.in_shape}"
        )
    linear = Convolution(
        layer.weight, call.in_shape, layer.stride, padding, layer.dilation, layer.groups, layer.padding_mode
    )
    _check_image(call, linear.out_shape)
    return linear


def _check_image(call: Call, shape: tuple[int, ...]) -> None:
    if min(shape[1:]) < 1:
        raise ValueError(f"{call.place}: expected inputs that the kernel fits into, got {call.in_shape}")


def _paddings(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis; torch's "same" puts the odd pixel behind."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _pairs(padding, len(kernel)))


def _transposed(call: Call) -> LinearMap:
    layer = _module(call)
    dims = len(layer.kernel_size)
    _check_spatial(call, dims, layer.in_channels)
    padding = tuple((p, p) for p in layer.padding)
    axes = zip(
        call.in_shape[1:],
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.kernel_size,
        layer.output_padding,
        strict=True,
    )
    image = (layer.out_channels, *((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, s, p, d, k, o in axes))
    _check_image(call, image)
    return Transposed(
        layer.weight, call.in_shape, image, layer.stride, padding, layer.output_padding, layer.dilation, layer.groups
    )


def _rounded(linear: Diagonal | Convolution, roundings: int) -> LinearMap:
    """The map, with the slack of entries that took `roundings` operations in float64 to compute."""
    return replace(linear, slack=rounding_slack(linear, roundings))


def _batch_norm(call: Call) -> LinearMap:
    layer = _module(call)
    if layer.running_var is None:
        raise ValueError(f"{call.place}: expected running statistics; without them eval mode normalises by the batch")
    if len(call.in_shape) - 1 not in _BATCH_NORM_DIMS[plain_type(layer)] or call.in_shape[0] != layer.num_features:
        raise ValueError(f"{call.place}: expected inputs of {layer.num_features} channels, got {call.in_shape}")
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    return _rounded(Diagonal(scale.reshape(-1, *(1 for _ in call.in_shape[1:])), call.in_shape), 8)


def _average_pool(call: Call) -> LinearMap:
    _check_pool(call)
    layer = _module(call)
    dims = len(call.in_shape) - 1
    kernel, padding = _pairs(layer.kernel_size, dims), _pairs(layer.padding, dims)
    stride = _pairs(layer.stride, dims)
    plain = layer.count_include_pad or not any(padding)
    if not plain or layer.ceil_mode or getattr(layer, "divisor_override", None):
        return _channelwise(layer.forward, call)
    share = torch.full((call.in_shape[0], 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
    linear = Convolution(
        share, call.in_shape, stride, tuple((p, p) for p in padding), (1,) * dims, groups=call.in_shape[0]
    )
    _check_image(call, linear.out_shape)
    return _rounded(linear, 1)


def _channelwise(function: Callable[[Tensor], Tensor], call: Call) -> LinearMap:
    return Channelwise(function, call.in_shape, probe_shape(function, call.in_shape))


def _adaptive_pool(call: Call) -> LinearMap:
    _check_pool(call)
    return _channelwise(_module(call).forward, call)


def _max_pool(call: Call, norm: str) -> float:
    """linf 1; l1 the largest number m of windows over one pixel; l2 its root (an output is one input of its window)."""
    _check_pool(call)
    layer = _module(call)
    dims = len(call.in_shape) - 1
    axes = zip(
        call.in_shape[1:],
        call.out_shape[1:],
        _pairs(layer.kernel_size, dims),
        _pairs(layer.stride, dims),
        _pairs(layer.padding, dims),
        _pairs(layer.dilation, dims),
        strict=True,
    )
    windows = math.prod(_windows_over_pixel(*axis) for axis in axes)
    return {"linf": 1.0, "l2": 1.0 if windows == 1 else up_sqrt(windows), "l1": float(windows)}[norm]


def _windows_over_pixel(size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    reads = torch.arange(outputs)[:, None] * stride + torch.arange(kernel) * dilation - padding
    inside = reads[(reads >= 0) & (reads < size)]
    return int(torch.bincount(inside).max()) if inside.numel() else 0


def _reindex(function: Callable[[Tensor], Tensor], call: Call) -> LinearMap:
    return Reindex(function, call.in_shape, call.out_shape or probe_shape(function, call.in_shape))


def _forward_reindex(call: Call) -> LinearMap:
    return _reindex(_module(call).forward, call)


def _reshape(call: Call) -> LinearMap:
    shape = call.out_shape
    if any(isinstance(value, torch.dtype) for value in (*call.args, *call.kwargs.values())):
        raise ValueError(f"{call.place}: expected a new shape, got a new type for the same bits")
    return _reindex(lambda x: x.reshape(x.shape[0], *shape), call)


def _identity(call: Call) -> LinearMap:
    return identity(call.in_shape)


def _zero_pad(call: Call) -> LinearMap:
    if any(p < 0 for p in _pairs(_module(call).padding, 1)):
        raise ValueError(f"{call.place}: expected padding >= 0, got {_module(call).padding}")
    return _forward_reindex(call)


def _is_exact(value: Any, converted: Tensor) -> bool:
    """Whether float64 holds a number or tensor exactly, as it does but for integers beyond 2^53."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or bool((converted.to(value.dtype) == value).all())
    return not isinstance(value, int) or int(float(value)) == value


def _scale(invert: bool) -> Callable[[Call], LinearMap]:
    def build(call: Call) -> LinearMap:
        values = [*call.args, *call.kwargs.values()]
        if len(values) != 1 or call.kwargs.keys() - {"input", "other"}:
            raise ValueError(f"{call.place}: expected a tensor and a factor without further arguments")
        factor = torch.as_tensor(values[0], dtype=torch.float64)
        if not _is_exact(values[0], factor):
            raise ValueError(f"{call.place}: expected a factor that float64 holds exactly, got {values[0]}")
        if factor.dim() == len(call.in_shape) + 1 and factor.shape[0] == 1:
            factor = factor[0]  # an axis for the batch
        inner = call.in_shape[len(call.in_shape) - factor.dim() :] if factor.dim() <= len(call.in_shape) else ()
        if len(inner) != factor.dim() or any(f not in (1, n) for f, n in zip(factor.shape, inner, strict=True)):
            raise ValueError(f"{call.place}: expected a factor for inputs {call.in_shape}, got {tuple(factor.shape)}")
        if invert:
            return _rounded(Diagonal(factor.reciprocal(), call.in_shape), 1)
        return Diagonal(factor, call.in_shape)

    return build


def _negate(call: Call) -> LinearMap:
    return Diagonal(torch.tensor(-1.0), call.in_shape)


def _mean(call: Call) -> LinearMap:
    axes, keep = call.argument(0, "dim"), call.argument(1, "keepdim", False)
    if len(call.args) > 2 or call.kwargs.keys() - {"dim", "keepdim"}:
        raise ValueError(f"{call.place}: expected a mean with no arguments but dim and keepdim")
    if axes is None or any(axis % (len(call.in_shape) + 1) in (0, 1) for axis in _pairs(axes, 1)):
        raise ValueError(f"{call.place}: expected a mean over axes behind the channels, got dim={axes}")
    return _channelwise(lambda x: x.mean(axes, keepdim=keep), call)


def _leaky(call: Call, norm: str) -> float:
    return max(1.0, abs(_finite(call, "negative_slope")))


def _elu(call: Call, norm: str) -> float:
    return max(1.0, abs(_finite(call, "alpha")))


def _finite(call: Call, name: str) -> float:
    value = float(getattr(_module(call), name))
    if not math.isfinite(value):
        raise ValueError(f"{call.place}: expected a finite {name}, got {value}")
    return value


def _gelu(call: Call, norm: str) -> float:
    kind = _module(call).approximate if call.module is not None else call.kwargs.get("approximate", "none")
    return GELU if kind == "none" else GELU_TANH


def _softplus(call: Call, norm: str) -> float:
    threshold = _module(call).threshold if call.module is not None else call.argument(1, "threshold", 20)
    beta = _module(call).beta if call.module is not None else call.argument(0, "beta", 1)
    if beta < 0.1:
        raise ValueError(f"{call.place}: expected a softplus beta >= 0.1, got {beta}: the jump at the threshold grows")
    if not 20 <= threshold <= 80:
        raise ValueError(
            f"{call.place}: expected a softplus threshold in [20, 80], got {threshold}: below, the function jumps; "
            "above, exp(beta x) may overflow"
        )
    return 1.0


def _from_arguments(kind: type[nn.Module]) -> Callable[[Call], Call]:
    """A functional pool's call as that of its module, which takes the same arguments."""
    return lambda call: replace(call, module=kind(*call.args, **call.kwargs))


def _average_pool_function(kind: type[nn.Module]) -> Callable[[Call], LinearMap]:
    return lambda call: _average_pool(_from_arguments(kind)(call))


def _max_pool_function(kind: type[nn.Module]) -> Callable[[Call, str], float]:
    return lambda call, norm: _max_pool(_from_arguments(kind)(call), norm)


register_rule(nn.Linear, linear=_linear)
register_rule(functional.linear, linear=_linear_function)
register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, linear=_convolution)
register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, linear=_transposed)
register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, linear=_batch_norm)
register_rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, linear=_average_pool)
register_rule(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, linear=_adaptive_pool)
register_rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, factor=_max_pool)
register_rule(functional.avg_pool1d, linear=_average_pool_function(nn.AvgPool1d))
register_rule(functional.avg_pool2d, linear=_average_pool_function(nn.AvgPool2d))
register_rule(functional.max_pool1d, factor=_max_pool_function(nn.MaxPool1d))
register_rule(functional.max_pool2d, factor=_max_pool_function(nn.MaxPool2d))
register_rule(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, linear=_forward_reindex)
register_rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, linear=_zero_pad)
register_rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, linear=_identity)
register_rule("contiguous", "clone", linear=_identity)
register_rule(
    torch.flatten, "flatten", "view", "reshape", torch.reshape, "unflatten", "squeeze", "unsqueeze", linear=_reshape
)
register_rule(operator.mul, torch.mul, "mul", linear=_scale(invert=False))
register_rule(operator.truediv, torch.div, "div", linear=_scale(invert=True))
register_rule(operator.neg, torch.neg, "neg", linear=_negate)
register_rule("mean", torch.mean, linear=_mean)
register_rule(
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.Softshrink, nn.LogSigmoid, nn.Tanhshrink),
    *(torch.relu, functional.relu, "relu", torch.tanh, functional.tanh, "tanh", torch.abs, operator.abs, "abs"),
    factor=1.0,
)
register_rule(nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid", factor=0.25)
register_rule(nn.Softplus, functional.softplus, factor=_softplus)
register_rule(nn.LeakyReLU, factor=_leaky)
register_rule(nn.ELU, factor=_elu)
register_rule(nn.GELU, functional.gelu, factor=_gelu)
register_rule(nn.SiLU, functional.silu, factor=SILU)

"""The checker's own table of affine operations: the exact map, offset and rounding of each use in a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flint import arb
from torch import Tensor, nn
from torch.nn import functional

from .balls import Fixed, balls, fixed, from_balls, rational
from .convolution import Convolution, Transposed
from .maps import Dense, Gather, Scale, identity
from .pools import adaptive_pool, average_pool, mean
from .reading import Affine, Reading, greatest, real_name, spread, tuple_of
from .rounds import Rounds

_BATCH_NORM_ROUNDINGS = 12
_SMALLEST_VARIANCE = arb(2) ** -40
_BATCH_NORM_AXES = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}


def affine_for(target: Any, use: Reading) -> Affine | None:
    """The affine operation of this use, None where the table has none of that type."""
    rule = _TABLE.get(target) or (_normalize if real_name(target) == "speccert.models.layers.Normalize" else None)
    return None if rule is None else rule(use)


def _channel_offset(bias: Tensor | None, axes: int) -> Fixed | None:
    return None if bias is None else fixed(bias).reshape(-1, *(1,) * axes)


def _dot(use: Reading, count: int, offset: Fixed | None, **more: int) -> Rounds:
    return Rounds("dot", count + (offset is not None), offset=spread(offset, use.out_shape), **more)  # type: ignore[arg-type]


def _dense(use: Reading, weight: Tensor, bias: Tensor | None) -> Affine:
    if not use.in_shape or weight.dim() != 2 or use.in_shape[-1] != weight.shape[1]:
        raise use.refused(f"inputs {use.in_shape}")
    offset = None if bias is None else fixed(bias)
    return Affine(Dense(fixed(weight), use.in_shape), offset, _dot(use, weight.shape[1], offset))


def _linear(use: Reading) -> Affine:
    return _dense(use, use.layer.weight, use.layer.bias)


def _linear_function(use: Reading) -> Affine:
    return _dense(use, use.argument(0, "weight"), use.argument(1, "bias"))


def _spatial(use: Reading, channels: int, dims: int) -> None:
    if len(use.in_shape) != dims + 1 or use.in_shape[0] != channels:
        raise use.refused(f"inputs {use.in_shape}")


def _convolution(use: Reading) -> Affine:
    layer, dims = use.layer, len(use.layer.kernel_size)
    _spatial(use, layer.in_channels, dims)
    if layer.padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise use.refused(f"padding mode {layer.padding_mode!r}")
    padding = _padding(use)
    most = {"reflect": -1, "circular": 0}.get(layer.padding_mode, math.inf)
    if any(max(pad) > size + most for pad, size in zip(padding, use.in_shape[1:], strict=True)):
        raise use.refused("more padding than input")
    sizes = zip(use.in_shape[1:], padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    image = tuple((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, d, k, s in sizes)
    linear = Convolution(
        fixed(layer.weight),
        use.in_shape,
        (layer.out_channels, *image),
        tuple(layer.stride),
        padding,
        tuple(layer.dilation),
        layer.groups,
        layer.padding_mode,
    )
    offset, taps = _channel_offset(layer.bias, dims), math.prod(layer.kernel_size)
    repeats = 1 if layer.padding_mode == "zeros" else taps
    return Affine(linear, offset, _dot(use, taps * layer.in_channels // layer.groups, offset, repeats=repeats))


def _padding(use: Reading) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis; "same" has its odd pixel behind."""
    layer = use.layer
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same":
        return tuple((span // 2, span - span // 2) for span in spans)
    if layer.padding == "valid":
        return tuple((0, 0) for _ in spans)
    return tuple((p, p) for p in tuple_of(layer.padding, len(spans)))


def _transposed(use: Reading) -> Affine:
    layer, dims = use.layer, len(use.layer.kernel_size)
    _spatial(use, layer.in_channels, dims)
    padding = tuple((p, p) for p in layer.padding)
    spans = tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    axes = list(zip(use.in_shape[1:], layer.stride, layer.padding, spans, layer.output_padding, strict=True))
    image = (layer.out_channels, *((n - 1) * s - 2 * p + span + o + 1 for n, s, p, span, o in axes))
    sizes = zip(image[1:], layer.padding, spans, layer.stride, strict=True)
    outputs = (layer.in_channels, *((n + 2 * p - span - 1) // s + 1 for n, p, span, s in sizes))
    forward = Convolution(
        fixed(layer.weight), image, outputs, tuple(layer.stride), padding, tuple(layer.dilation), layer.groups
    )
    offset, taps = _channel_offset(layer.bias, dims), math.prod(layer.kernel_size)
    rounds = _dot(use, taps * layer.in_channels // layer.groups, offset, partials=2 * taps)
    return Affine(Transposed(forward, use.in_shape), offset, rounds)


def _batch_norm(use: Reading) -> Affine:
    layer, axes = use.layer, len(use.in_shape) - 1
    if layer.running_mean is None or layer.running_var is None:
        raise use.refused("the statistics of the batch")
    allowed = next(counts for kind, counts in _BATCH_NORM_AXES.items() if isinstance(layer, kind))
    if axes not in allowed or use.in_shape[0] != layer.num_features:
        raise use.refused(f"inputs {use.in_shape}")
    mean, variance = balls(fixed(layer.running_mean)), balls(fixed(layer.running_var))
    spreads = [v + rational(float(layer.eps)) for v in variance]
    if any(not s > 0 for s in spreads):
        raise use.refused("a variance that is not positive")
    weight = [arb(1)] * len(mean) if layer.weight is None else balls(fixed(layer.weight))
    bias = [arb(0)] * len(mean) if layer.bias is None else balls(fixed(layer.bias))
    scale = [w / s.sqrt() for w, s in zip(weight, spreads, strict=True)]
    shape = (len(mean), *(1,) * axes)
    offset = from_balls([b - m * s for b, m, s in zip(bias, mean, scale, strict=True)], shape)
    sizes = from_balls([abs(m * s) + abs(b) for b, m, s in zip(bias, mean, scale, strict=True)], shape)
    rounds = Rounds("steps", _BATCH_NORM_ROUNDINGS, offset=spread(sizes, use.out_shape))
    peak = greatest(abs(m) for m in mean) + greatest(variance)
    if any(not s >= _SMALLEST_VARIANCE for s in spreads):
        peak = arb.pos_inf()
    return Affine(Scale(from_balls(scale, shape), use.in_shape), offset, replace(rounds, peak=peak))


def _normalize(use: Reading) -> Affine:
    mean, std = balls(fixed(use.layer.mean)), balls(fixed(use.layer.std))
    channels = max(len(mean), len(std))
    if channels not in (1, use.in_shape[0]):
        raise use.refused(f"inputs {use.in_shape}")
    if any(not s > 0 for s in std):
        raise use.refused("a std that is not positive")
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    shape = (channels, *(1,) * (len(use.in_shape) - 1))
    offset = from_balls([-m / s for m, s in zip(mean, std, strict=True)], shape)
    scale = from_balls([1 / s for s in std], shape)
    rounds = Rounds("steps", 3, offset=spread(offset, use.out_shape), peak=greatest(abs(m) for m in mean))
    return Affine(Scale(scale, use.in_shape), offset, rounds)


def _factor(invert: bool) -> Callable[[Reading], Affine]:
    def build(use: Reading) -> Affine:
        values = [*use.args, *use.kwargs.values()]
        if (
            len(values) != 1
            or use.kwargs.keys() - {"input", "other"}
            or not isinstance(values[0], Tensor | int | float)
        ):
            raise use.refused("further arguments")
        tensor = torch.as_tensor(values[0], dtype=torch.float64)
        if tensor.dim() == len(use.in_shape) + 1 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.dim() > len(use.in_shape) or torch.broadcast_shapes(tensor.shape, use.in_shape) != use.in_shape:  # type: ignore[no-untyped-call]
            raise use.refused(f"a factor of shape {tuple(tensor.shape)}")
        factor = fixed(tensor)
        if invert:
            if not bool((tensor != 0).all()):
                raise use.refused("a division by zero")
            factor = from_balls([1 / ball for ball in balls(factor)], tuple(tensor.shape))
        return Affine(Scale(factor, use.in_shape), None, Rounds("steps", 3 if invert else 2))

    return build


def _negation(use: Reading) -> Affine:
    return Affine(Scale(fixed(torch.tensor(-1.0)), use.in_shape))


def _same(use: Reading) -> Affine:
    return Affine(identity(use.in_shape))


def _reshape(use: Reading) -> Affine:
    if math.prod(use.in_shape) != math.prod(use.out_shape) or any(
        isinstance(value, torch.dtype) for value in (*use.args, *use.kwargs.values())
    ):
        raise use.refused("a new type")
    return Affine(Gather(np.arange(math.prod(use.in_shape)), use.in_shape, use.out_shape))


def _moved(use: Reading) -> Affine:
    """Where each entry goes, read off from numbered entries."""
    count = math.prod(use.in_shape)
    numbered = torch.arange(1, count + 1, dtype=torch.float64).reshape(1, *use.in_shape)
    with torch.no_grad():
        found = use.layer(numbered).flatten()
    if not bool(((found == found.round()) & (found >= 0) & (found <= count)).all()):
        raise use.refused("a layer that does more than move entries")
    index = found.numpy().astype(np.int64) - 1
    return Affine(Gather(index, use.in_shape, use.out_shape))


def _zero_pad(use: Reading) -> Affine:
    if any(p < 0 for p in tuple_of(use.layer.padding, 1)):
        raise use.refused("negative padding")
    if getattr(use.layer, "value", 0.0) != 0:
        raise use.refused(f"padding by {use.layer.value}")
    return _moved(use)


def _entries() -> dict[Any, Callable[[Reading], Affine]]:
    rows: list[tuple[tuple[Any, ...], Callable[[Reading], Affine]]] = [
        ((nn.Linear,), _linear),
        ((functional.linear,), _linear_function),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
        ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
        ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
        ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, functional.avg_pool1d, functional.avg_pool2d), average_pool),
        ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), adaptive_pool),
        ((nn.Flatten, nn.Unflatten), _reshape),
        ((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), _moved),
        ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _zero_pad),
        ((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _same),
        (("contiguous", "clone"), _same),
        ((torch.flatten, torch.reshape, "flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), _reshape),
        ((operator.mul, torch.mul, "mul"), _factor(invert=False)),
        ((operator.truediv, torch.div, "div"), _factor(invert=True)),
        ((operator.neg, torch.neg, "neg"), _negation),
        (("mean", torch.mean), mean),
    ]
    return {target: rule for targets, rule in rows for target in targets}


_TABLE = _entries()

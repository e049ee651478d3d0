"""Convolutions as linear maps: any stride, padding, dilation, groups and padding mode, transposed or not.

The l2 bound is that of a circular convolution on a torus, of which the layer is a compression (Sedghi, Gupta, Long,
"The singular values of convolutional layers", ICLR 2019, for the circular case); a stride joins the frequencies that it
aliases. The torus may be twisted: with x[t + N] = -x[t] instead of x[t + N] = x[t] the argument holds unchanged, since
zero padding never reads across the seam, and the half-shifted frequencies often give a smaller bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .linear import SAFETY, Diagonal, LinearMap, NormBounds, largest_norm

_CHUNK_ENTRIES = 1 << 18  # complex numbers of one batch of frequency blocks: 4 MB, which stays in the cache
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Convolution(LinearMap):
    """A convolution without its bias, on its real input size.

    `padding` holds (before, after) per spatial axis. The transposed convolution of the same numbers is `Transposed`.
    """

    weight: Tensor  # [c_out, c_in / groups, *kernel]
    in_shape: tuple[int, ...]  # (c_in, *spatial)
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def spans(self) -> tuple[int, ...]:
        """Reach of the kernel less one, dilation * (k - 1), per axis."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(c_out, *spatial)."""
        axes = zip(self.in_shape[1:], self.padding, self.spans, self.stride, strict=True)
        return (self.weight.shape[0], *((n + sum(pad) - span - 1) // s + 1 for n, pad, span, s in axes))

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        pads = [p for pad in reversed(self.padding) for p in pad]
        if any(pads):
            x = functional.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        convolve = _CONVOLVE[len(self.stride)]
        return convolve(x, self.weight, None, self.stride, 0, self.dilation, self.groups)

    def adjoint(self, y: Tensor) -> Tensor:
        """See `LinearMap.adjoint`; for symmetric zero padding the transposed convolution, at half the cost."""
        if self.padding_mode != "zeros" or any(before != after for before, after in self.padding):
            return super().adjoint(y)
        before = tuple(pad[0] for pad in self.padding)
        axes = zip(self.in_shape[1:], self.padding, self.spans, self.stride, strict=True)
        unread = tuple((n + sum(pad) - span - 1) % s for n, pad, span, s in axes)
        transpose = _TRANSPOSE[len(self.stride)]
        return transpose(y, self.weight, None, self.stride, before, unread, self.groups, self.dilation)

    def fused(self, first: LinearMap) -> LinearMap | None:
        """Absorbs a diagonal map that is constant over each channel."""
        scale = channel_scale(first)
        if scale is None:
            return None
        per_group = scale.reshape(self.groups, 1, -1).expand(-1, self.weight.shape[0] // self.groups, -1)
        factor = per_group.reshape(*self.weight.shape[:2], *(1 for _ in self.stride))
        return replace(self, weight=self.weight * factor)

    def followed_by(self, last: LinearMap) -> LinearMap | None:
        """Absorbs a factor per output channel, e.g. batch normalisation in eval mode."""
        scale = channel_scale(last)
        if scale is None:
            return None
        return replace(self, weight=self.weight * scale.reshape(-1, *(1 for _ in self.weight.shape[1:])))

    def plus(self, other: LinearMap) -> LinearMap | None:
        """Adds a channel-wise diagonal map: the identity of a residual block is a kernel with a one at its centre."""
        scale = channel_scale(other)
        if scale is None or any(s != 1 for s in self.stride) or self.in_shape != self.out_shape:
            return None
        centre = self._centre()
        if centre is None:
            return None
        weight = self.weight.clone()
        channels = torch.arange(weight.shape[0], device=weight.device)
        index = (channels, channels % weight.shape[1], *(torch.full_like(channels, c) for c in centre))
        weight[index] = weight[index] + scale
        return replace(self, weight=weight)

    def _centre(self) -> tuple[int, ...] | None:
        """Tap that reads the pixel itself, where there is one."""
        if any(before % d for (before, _), d in zip(self.padding, self.dilation, strict=True)):
            return None
        centre = tuple(before // d for (before, _), d in zip(self.padding, self.dilation, strict=True))
        return centre if all(c < k for c, k in zip(centre, self.weight.shape[2:], strict=True)) else None

    def _structured(self, norm: str) -> NormBounds:
        upper = torus_bound(self) if norm == "l2" else self._absolute_sums(norm)
        return NormBounds(0.0, upper * (1 + SAFETY), "torus" if norm == "l2" else "absolute sums")

    def _absolute_sums(self, norm: str) -> float:
        """linf: the largest sum over an output channel's taps; l1: over those of an input channel, times repeats."""
        weight = self.weight.abs().flatten(2).sum(2)  # [c_out, c_in / groups]
        if norm == "linf":
            return float(weight.sum(1).max())
        columns = weight.reshape(self.groups, -1, weight.shape[1]).sum(1)
        return float(columns.max()) * math.prod(_repeats(self, axis) for axis in range(len(self.stride)))


@dataclass(frozen=True)
class Transposed(LinearMap):
    """The adjoint of a zero-padded convolution, with at most its outputs: nn.ConvTranspose1d/2d/3d without bias.

    `forward` is the convolution from `image_shape`; `in_shape` may be smaller than its output (output_padding >=
    stride), which makes this map a restriction of the adjoint: its norm is at most that of `forward`.
    """

    weight: Tensor  # [c_in, c_out / groups, *kernel]
    in_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape given as `image_shape`."""
        return self.image_shape

    @property
    def forward(self) -> Convolution:
        """The convolution of which this is the adjoint."""
        return Convolution(self.weight, self.image_shape, self.stride, self.padding, self.dilation, self.groups)

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        transpose = _TRANSPOSE[len(self.stride)]
        before = tuple(pad[0] for pad in self.padding)
        return transpose(x, self.weight, None, self.stride, before, self.output_padding, self.groups, self.dilation)

    def _structured(self, norm: str) -> NormBounds:
        return self.forward._structured({"l2": "l2", "linf": "l1", "l1": "linf"}[norm])


def channel_scale(linear: LinearMap) -> Tensor | None:
    """The factor per channel [C] of a diagonal map that is constant over each channel, else None."""
    if not isinstance(linear, Diagonal):
        return None
    scale, dims = linear.scale, len(linear.in_shape)
    scale = scale.reshape((1,) * (dims - scale.dim()) + tuple(scale.shape))
    if any(size != 1 for size in scale.shape[1:]):
        return None
    return scale.flatten().expand(linear.in_shape[0])


def torus_bound(convolution: Convolution) -> float:
    """Upper bound of the l2 norm from frequency blocks on a torus; the smallest over the allowed twists.

    With side N (a multiple of the stride s) the operator is block-diagonal: the s aliased frequencies of an axis join
    in blocks c_out x (c_in * s), scaled by s^(-1/2). Grouped: the maximum over groups. Reflect and replicate padding:
    the unpadded convolution times the norm of the padding map, the root of the most often repeated pixel's count.
    """
    dims = len(convolution.stride)
    factor = math.sqrt(math.prod(_repeats(convolution, axis) for axis in range(dims)))
    scale = float(convolution.weight.abs().max()) if convolution.weight.numel() else 0.0
    if scale == 0.0:
        return 0.0
    scaled = replace(convolution, weight=convolution.weight / scale)
    sides = [_torus(convolution, axis) for axis in range(dims)]
    twists = (0.0,) if convolution.padding_mode == "circular" else (0.0, 0.5)
    best = math.inf
    for twist in itertools.product(twists, repeat=dims):
        best = min(best, _largest_block(scaled, sides, twist, best))
    return best * scale * factor


def _torus(convolution: Convolution, axis: int) -> tuple[int, int]:
    """Side of the torus and the stride that its aliasing uses (1 where the stride does not divide a circular side)."""
    size, stride = convolution.in_shape[axis + 1], convolution.stride[axis]
    before, after = convolution.padding[axis]
    if convolution.padding_mode == "circular":
        return size, stride if size % stride == 0 else 1
    if convolution.padding_mode != "zeros":  # the unpadded convolution on the padded picture
        size, before, after = size + before + after, 0, 0
    outputs = convolution.out_shape[axis + 1]
    side = max(size + max(before, after), stride * (outputs - 1) + 1)
    return -(-side // stride) * stride, stride


def _repeats(convolution: Convolution, axis: int) -> int:
    """How often the padding repeats one pixel: 1 for zeros; for circular padding, outputs at one place of the torus."""
    size, stride = convolution.in_shape[axis + 1], convolution.stride[axis]
    if convolution.padding_mode == "zeros":
        return 1
    if convolution.padding_mode == "circular":
        places = torch.arange(convolution.out_shape[axis + 1]) * stride % size
        return int(torch.bincount(places).max())
    index = torch.arange(size, dtype=torch.float64).reshape(1, 1, -1)
    padded = functional.pad(index, convolution.padding[axis], mode=convolution.padding_mode)
    return int(torch.bincount(padded.flatten().long()).max())


def _largest_block(
    convolution: Convolution, sides: list[tuple[int, int]], twist: tuple[float, ...], give_up: float
) -> float:
    """The largest block norm over all frequencies; stops early once it exceeds `give_up`."""
    largest = 0.0
    for blocks in _frequency_blocks(convolution, sides, twist):
        largest = largest_norm(blocks, largest, give_up)
        if largest >= give_up:
            break
    return largest


def _frequency_blocks(
    convolution: Convolution, sides: list[tuple[int, int]], twist: tuple[float, ...]
) -> Iterator[Tensor]:
    """Batches of blocks [..., c_out / groups, c_in / groups * aliases], half of the torus (the rest is conjugate).

    Low base frequencies come first: trained kernels peak there, which lets a hopeless twist be given up early.
    """
    weight, groups = convolution.weight, convolution.groups
    weight = weight.reshape(groups, -1, *weight.shape[1:]).to(torch.complex128)
    dims = len(sides)
    phases = [_phases(convolution, axis, *sides[axis], twist[axis], half=axis == dims - 1) for axis in range(dims)]
    per_first = weight.shape[0] * weight.shape[1] * weight.shape[2] * phases[0].shape[1]
    per_first *= math.prod(p.shape[0] * p.shape[1] for p in phases[1:])
    step = max(1, _CHUNK_ENTRIES // per_first)
    for start in range(0, phases[0].shape[0], step):
        symbol = weight
        for phase in (phases[0][start : start + step], *phases[1:]):
            symbol = torch.tensordot(
                symbol, phase, dims=([3], [2])
            )  # moves a kernel axis into (base, alias) at the end
        axes = list(range(3, 3 + 2 * dims))
        symbol = symbol.permute(0, *axes[::2], 1, 2, *axes[1::2])
        yield symbol.reshape(-1, weight.shape[1], weight.shape[2] * math.prod(p.shape[1] for p in phases))


def _phases(convolution: Convolution, axis: int, side: int, stride: int, twist: float, *, half: bool) -> Tensor:
    """Unit phases [base, alias, tap] of one axis, scaled by stride^(-1/2)."""
    period = side // stride
    bases = range((period + 1) // 2 if twist else period // 2 + 1) if half else range(period)
    base = torch.tensor(list(bases), dtype=torch.float64)
    alias = torch.arange(stride, dtype=torch.float64) * period
    taps = torch.arange(convolution.weight.shape[axis + 2], dtype=torch.float64) * convolution.dilation[axis]
    frequency = (base[:, None] + alias + twist) * (-2 * math.pi / side)
    phases = torch.polar(torch.full((), 1 / math.sqrt(stride), dtype=torch.float64), frequency[..., None] * taps)
    return phases.to(convolution.weight.device)

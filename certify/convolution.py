"""Convolutions as linear maps: any stride, padding, dilation, groups and padding mode, transposed or not.

The l2 bound is that of a circular convolution on a torus, of which the layer is a compression (Sedghi, Gupta, Long,
"The singular values of convolutional layers", ICLR 2019, for the circular case); a stride joins the frequencies that it
aliases. The torus may be twisted: with x[t + N] = -x[t] instead of x[t + N] = x[t] the argument holds unchanged, since
zero padding never reads across the seam, and the half-shifted frequencies often give a smaller bound. `torus` proves
the norm on the torus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .linear import Diagonal, LinearMap, NormBounds, converted, product_slack, sum_slack
from .power import starting_vector
from .rounding import down_add, down_div, down_mul, gamma, largest_entry, norm_up, sum_up, up_mul, up_sqrt
from .torus import Torus, torus_norm

_LANCZOS_STEPS = 16
_LANCZOS_GAIN = 3e-4  # of the squared norm, in one step
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
    slack: float = 0.0

    @property
    def spans(self) -> tuple[int, ...]:
        """Reach of the kernel less one, dilation * (k - 1), per axis."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(c_out, *spatial)."""
        axes = zip(self.in_shape[1:], self.padding, self.spans, self.stride, strict=True)
        return (self.weight.shape[0], *((n + sum(pad) - span - 1) // s + 1 for n, pad, span, s in axes))

    @property
    def terms(self) -> int:
        """Taps times input channels of one output."""
        return math.prod(self.weight.shape[1:])

    @property
    def adjoint_terms(self) -> int:
        """Taps times output channels of one input, and the copies that padding makes of a pixel."""
        copies = math.prod(_copies(self, axis) for axis in range(len(self.stride)))
        return math.prod(self.weight.shape[2:]) * self.weight.shape[0] // self.groups + copies - 1

    @property
    def matrix_terms(self) -> int:
        """None where every tap has its own entry; taps that read copies of one pixel are added up."""
        return 0 if self.padding_mode == "zeros" else self.weight[0, 0].numel()

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
        held = replace(self, weight=self.weight * factor)
        return replace(held, slack=product_slack(held, first, self))

    def followed_by(self, last: LinearMap) -> LinearMap | None:
        """Absorbs a factor per output channel, e.g. batch normalisation in eval mode."""
        scale = channel_scale(last)
        if scale is None:
            return None
        held = replace(self, weight=self.weight * scale.reshape(-1, *(1 for _ in self.weight.shape[1:])))
        return replace(held, slack=product_slack(held, self, last))

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
        held = replace(self, weight=weight)
        return replace(held, slack=sum_slack(held, self, other))

    def _centre(self) -> tuple[int, ...] | None:
        """Tap that reads the pixel itself, where there is one."""
        if any(before % d for (before, _), d in zip(self.padding, self.dilation, strict=True)):
            return None
        centre = tuple(before // d for (before, _), d in zip(self.padding, self.dilation, strict=True))
        return centre if all(c < k for c, k in zip(centre, self.weight.shape[2:], strict=True)) else None

    def _structured(self, norm: str) -> NormBounds:
        return _bracket(self, self, norm)

    def _absolute(self, norm: str) -> float:
        """linf: the largest sum over an output channel's taps; l1: over those of an input channel, times repeats."""
        if norm == "linf":
            return float(sum_up(self.weight.flatten(1)).max())
        columns = self.weight.reshape(self.groups, -1, *self.weight.shape[1:]).transpose(1, 2).flatten(2)
        repeats = math.prod(_repeats(self, axis) for axis in range(len(self.stride)))
        return up_mul(float(sum_up(columns).max()), float(repeats))


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
    slack: float = 0.0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape given as `image_shape`."""
        return self.image_shape

    @property
    def forward(self) -> Convolution:
        """The convolution of which this is the adjoint."""
        return Convolution(self.weight, self.image_shape, self.stride, self.padding, self.dilation, self.groups)

    @property
    def terms(self) -> int:
        """Taps times input channels of one output."""
        return self.forward.adjoint_terms

    @property
    def adjoint_terms(self) -> int:
        """Taps times output channels of one input."""
        return self.forward.terms

    @property
    def matrix_terms(self) -> int:
        """None: every tap has its own entry."""
        return 0

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        transpose = _TRANSPOSE[len(self.stride)]
        before = tuple(pad[0] for pad in self.padding)
        return transpose(x, self.weight, None, self.stride, before, self.output_padding, self.groups, self.dilation)

    def _structured(self, norm: str) -> NormBounds:
        return _bracket(self, self.forward, norm)

    def _absolute(self, norm: str) -> float:
        return self.forward._absolute("l1" if norm == "linf" else "linf")


def channel_scale(linear: LinearMap) -> Tensor | None:
    """The factor per channel [C] of a diagonal map that is constant over each channel, else None."""
    if not isinstance(linear, Diagonal):
        return None
    scale, dims = linear.scale, len(linear.in_shape)
    scale = scale.reshape((1,) * (dims - scale.dim()) + tuple(scale.shape))
    if any(size != 1 for size in scale.shape[1:]):
        return None
    return scale.flatten().expand(linear.in_shape[0])


def _bracket(linear: Convolution | Transposed, convolution: Convolution, norm: str) -> NormBounds:
    """Bracket of a float64 map, slack included; `convolution` is the map itself or what it is the adjoint of."""
    if norm != "l2":
        return NormBounds(0.0, linear.absolute(norm), "absolute sums")
    torus = torus_of(convolution)
    lower = _attained(linear, torus)
    bounds = NormBounds(min(lower, torus.upper), torus.upper, "torus", torus=torus.axes)
    return bounds.widened(linear.slack)


def torus_bound(convolution: Convolution) -> float:
    """Proved upper bound of the l2 norm from frequency blocks on a torus; see `torus_of`."""
    return torus_of(convolution).upper


def torus_of(convolution: Convolution) -> Torus:
    """Proved upper bound of the l2 norm from frequency blocks on a torus, of which the map is a compression.

    Zero padding: a torus that no window wraps around; grouped: the maximum over groups. Reflect and replicate padding:
    the unpadded convolution times the norm of the padding map, the root of the most often repeated pixel's count.
    """
    dims = len(convolution.stride)
    factor = up_sqrt(float(math.prod(_repeats(convolution, axis) for axis in range(dims))))
    torus = torus_norm(
        convolution.weight,
        convolution.groups,
        convolution.dilation,
        [_torus(convolution, axis) for axis in range(dims)],
        twisted=convolution.padding_mode != "circular",
    )
    steps = (stride // joined for stride, (_, joined, _) in zip(convolution.stride, torus.axes, strict=True))
    angles = tuple(angle * step for angle, step in zip(torus.angles, steps, strict=True))
    return replace(torus, upper=up_mul(torus.upper, factor), angles=angles)


@torch.no_grad()
def _attained(linear: Convolution | Transposed, torus: Torus) -> float:
    """Lower bound of the norm of a float64 map: ||A v|| / ||v|| of a vector found in float32.

    The weights are scaled by a power of two, so that neither A v nor its square under- or overflows. A v errs by at
    most gamma_n || |A| |v| ||, n = `terms`; its norm, a sum of N squares, by gamma_(N + 2) relative.
    """
    largest = largest_entry(linear.weight)
    if largest == 0.0:
        return 0.0
    scale = 2.0 ** max(-1000, min(1000, -math.frexp(largest)[1]))
    scaled = replace(linear, weight=linear.weight * scale, slack=0.0)
    single = converted(scaled, lambda tensor: tensor.float())
    if isinstance(linear, Transposed):
        start = _plane_wave(torus, linear.in_shape)
    else:
        start = single.adjoint(_plane_wave(torus, linear.out_shape))
    vector = _top_vector(single, start).double()
    image = scaled.apply(vector).flatten()
    length = float(norm_up(vector.flatten()))
    rounding = up_mul(gamma(scaled.terms + 1), scaled.absolute("l2"), length)
    attained = down_mul(float(image.norm()), down_add(1.0, -gamma(image.numel() + 4)))
    return down_div(max(0.0, down_add(attained, -rounding)), up_mul(length, scale))


def _plane_wave(torus: Torus, shape: tuple[int, ...]) -> Tensor:  # [1, *shape] float32
    """The torus's own top vector on the real outputs, faded towards the edges as top vectors of padded maps are."""
    wave = torus.wave
    for angle, size in zip(torus.angles, shape[1:], strict=True):
        place = torch.arange(size, dtype=torch.float32)
        wave = wave[..., None] * torch.polar(torch.sin(math.pi * (place + 0.5) / size), angle * place)
    return wave.real[None].contiguous()


def _top_vector(linear: LinearMap, start: Tensor) -> Tensor:  # [1, *in_shape]
    """A vector near the top right singular one: Lanczos steps on A^T A, reorthogonalised, until they gain little."""
    length = start.norm()
    start = start / length if length > 0 else starting_vector(linear.in_shape, start)
    steps = min(_LANCZOS_STEPS, start.numel())
    basis, small = start.new_zeros(steps, start.numel()), start.new_zeros(steps, steps)
    basis[0], value = start.flatten(), 0.0
    for step in range(steps):
        image = linear.adjoint(linear.apply(basis[step].reshape(start.shape))).flatten()
        small[step, step] = basis[step] @ image
        for _ in range(2):  # once leaves what rounding then enlarges step by step
            image = image - (basis[: step + 1] @ image) @ basis[: step + 1]
        rest = float(image.norm())
        values, vectors = torch.linalg.eigh(small[: step + 1, : step + 1])
        gain, value = float(values[-1]) - value, float(values[-1])
        if step + 1 == steps or rest <= _LANCZOS_GAIN * value or (step and gain <= _LANCZOS_GAIN * value):
            break
        small[step, step + 1] = small[step + 1, step] = rest
        basis[step + 1] = image / rest
    top: Tensor = vectors[:, -1] @ basis[: step + 1]
    return top.reshape(start.shape)


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
    return _copies(convolution, axis)


def _copies(convolution: Convolution, axis: int) -> int:
    """How often one pixel stands in the padded picture, along one axis."""
    if convolution.padding_mode == "zeros":
        return 1
    index = torch.arange(convolution.in_shape[axis + 1], dtype=torch.float64).reshape(1, 1, -1)
    padded = functional.pad(index, convolution.padding[axis], mode=convolution.padding_mode)
    return int(torch.bincount(padded.flatten().long()).max())

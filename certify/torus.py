"""Proved norm of a convolution on a torus, from one small Hermitian matrix per frequency.

A strided convolution is one of stride 1 on the s phases of its input (pixel unshuffle, an isometry). On a torus of
periods M, with x[t + M] = e^(2 pi i tau) x[t], that one is block-diagonal: block K(f) = sum_t K_t e^(i f t), with
f = 2 pi (b + tau) / M for b = 0..M-1 per axis. Its norm is the root of the largest eigenvalue over f of the Gram matrix
G(f) = K(f) K(f)^H on whichever side is smaller (the other side's K_t are the transposes; see `grams`). Conjugate
frequencies share their eigenvalues.

What is computed, and proved with every rounding counted (see `Grams.error` and `rounding.proved_below`):
the Frobenius norm rules out most frequencies of a trained kernel before any matrix is formed, a Cholesky factorisation
in complex64 most of the others, and one in complex128 settles those that decide. Power iterations and eigenvalues only
propose where to try.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grams import Grams, scaled_weight, stride_one
from .rounding import cholesky_factor, proved_below, unit, up_add, up_div, up_mul, up_sqrt

_TOLERANCE = 1e-10  # relative room between the largest eigenvalue and what is proved
_SOLVED_AT_ONCE = 4
_SOLVED_SIZE = 128  # largest blocks of which several are solved at once
_ATTEMPTS = 60
_SAMPLES = 16  # frequencies at which the largest eigenvalue is estimated first
_POWER_STEPS = 16
_SAMPLE_ROUNDING = 1e-5
_SMALL = 1e-30
_RISE = 1e-3  # complex64 is given up where most blocks pass it by although the level was right to this share
_MAX_SHARE = 0.25  # complex64 is not tried where its rounding could take this share of an eigenvalue

# All twists are tried up to this many frequencies or multiplications of one torus; above them a twist gains too little.
_ALL_TWISTS = 100
_ALL_TWISTS_PRODUCTS = 2e7

_TINY = torch.finfo(torch.float64).tiny

Axis = tuple[int, int, float]  # side of the torus, stride whose aliased frequencies join, twist (0 or 1/2)


@dataclass(frozen=True)
class Torus:
    """A proved bound and the torus that it is the norm of: per spatial axis side, aliasing stride and twist.

    `wave` and `angles` describe an output near the top left singular one, the real part of wave_c e^(i angles t) for
    output channel c at place t: an estimate.
    """

    upper: float
    axes: tuple[Axis, ...]
    wave: Tensor  # [c_out] complex64
    angles: tuple[float, ...]


@torch.no_grad()
def torus_norm(
    weight: Tensor,  # [c_out, c_in / groups, *kernel], finite
    groups: int,
    dilation: Sequence[int],
    sides: Sequence[tuple[int, int]],  # side and stride per axis; the stride divides the side
    *,
    twisted: bool,
) -> Torus:
    """Proved upper bound of the norm of the convolution on the torus; the least over twists where `twisted` permits.

    The weights are scaled by a power of two, exactly but for numbers below 2^-1022, which are counted.
    """
    weight = weight.detach().to("cpu", torch.float64)
    scaled, scale = scaled_weight(weight)
    strides = [stride for _, stride in sides]
    if scale == 0.0:
        axes = tuple((side, stride, 0.0) for side, stride in sides)
        return Torus(0.0, axes, torch.ones(len(weight), dtype=torch.complex64), (0.0,) * len(sides))
    kernel, units = stride_one(scaled.reshape(groups, -1, *scaled.shape[1:]), strides, dilation)
    grams = Grams.of(kernel, units, [side // stride for side, stride in sides])
    twist, peak = _least(grams, _twists(grams, twisted))
    lost = up_mul(float(weight.numel()), _TINY)
    axes = tuple((side, stride, part) for (side, stride), part in zip(sides, twist, strict=True))
    return Torus(
        up_div(up_add(up_sqrt(peak.proved), lost), scale), axes, *_wave(grams, kernel, units, peak, len(weight))
    )


def _twists(grams: Grams, twisted: bool) -> list[tuple[float, ...]]:
    """The twists to try: all that differ on a small torus, else the one whose Frobenius norms are smallest."""
    choices = [(0.0, 0.5) if twisted and period > 1 else (0.0,) for period in grams.periods]
    twists = list(itertools.product(*choices))
    if len(twists) == 1:
        return twists
    largest = [float(grams.frobenius(grams.frequencies(twist)).max()) for twist in twists]
    order = [twist for _, twist in sorted(zip(largest, twists, strict=True))]
    count = len(grams.frequencies(order[0]))
    small = count <= _ALL_TWISTS or count * grams.groups * grams.size**3 <= _ALL_TWISTS_PRODUCTS
    return order if small else order[:1]


def _least(grams: Grams, twists: list[tuple[float, ...]]) -> tuple[tuple[float, ...], _Peak]:
    """The twist of least proved eigenvalue; one that turns out worse than the best so far is given up."""
    best, least = twists[0], _Peak(0.0, math.inf)
    for twist in twists:
        peak = _largest(grams, grams.frequencies(twist), least.proved)
        if peak.proved < least.proved:
            best, least = twist, peak
    return best, least


@dataclass
class _Peak:
    """The largest eigenvalue found, an estimate, what is proved of all blocks seen, and where the largest is."""

    value: float
    proved: float = 0.0
    frequency: Tensor | None = None  # [axes]
    group: int = 0

    def prove(self, bounds: Tensor, error: float = 0.0) -> None:  # [...] float64
        """Take proved bounds of blocks into account that hold up to `error`."""
        if bounds.numel():
            self.proved = max(self.proved, up_add(float(bounds.max()), error))


def _largest(grams: Grams, frequencies: Tensor, give_up: float) -> _Peak:
    """The largest eigenvalue over the frequencies; nothing is proved (inf) where it is above `give_up`."""
    frobenius = grams.frobenius(frequencies)  # [F, groups]
    peak = _Peak(_sampled(grams, frequencies))
    single = _share(grams.size, torch.complex64) <= _MAX_SHARE
    for numbers in torch.split(frobenius.amax(1).argsort(descending=True), grams.batch):
        level = peak.value * (1 + _TOLERANCE)
        wanted = frobenius[numbers] > level
        peak.prove(frobenius[numbers][~wanted])
        rows = wanted.any(1)
        numbers, wanted = numbers[rows], wanted[rows]
        if not len(numbers):  # nor are there any later, whose norms are smaller
            break
        phases = grams.phases(frequencies[numbers])
        left = _screened(grams, phases, wanted, peak) if single else wanted
        rows = left.any(1)
        if bool(rows.any()):
            _settle(grams, phases[rows], left[rows], frequencies[numbers[rows]], peak)
            hopeless = 2 * int(left.sum()) > int(wanted.sum()) and peak.value <= level * (1 + _RISE)
            single = single and not hopeless
        if peak.value >= give_up:
            return _Peak(peak.value, math.inf)
    return peak


def _sampled(grams: Grams, frequencies: Tensor) -> float:
    """An estimate from below of the largest eigenvalue, by power steps at some frequencies."""
    chosen = frequencies[:: -(-len(frequencies) // _SAMPLES)]
    blocks = grams.blocks(grams.phases(chosen), torch.complex64).flatten(0, 1)
    value = float(_power_steps(blocks)[1].max())
    return max(value * (1 - _SAMPLE_ROUNDING), grams.error(torch.complex128))


def _power_steps(blocks: Tensor) -> tuple[Tensor, Tensor]:  # [B, n, n] -> [B, n], [B]
    """Vectors near the top eigenvectors, and their lengths under the blocks."""
    start = torch.randn(blocks.shape[-1], 1, generator=torch.Generator().manual_seed(0)).to(blocks.dtype)
    vectors = start.expand(len(blocks), -1, 1)
    for _ in range(_POWER_STEPS):
        vectors = blocks @ (vectors / vectors.norm(dim=1, keepdim=True).clamp_min(_SMALL))
    return vectors[..., 0], vectors[..., 0].norm(dim=1)


def _share(size: int, dtype: torch.dtype) -> float:
    """The share of the level that a proof of a block of this size loses to rounding at most."""
    return size * (cholesky_factor(size, dtype) + unit(dtype))


def _screened(grams: Grams, phases: Tensor, wanted: Tensor, peak: _Peak) -> Tensor:  # [F, groups] -> [F, groups]
    """Which blocks are left of those `wanted` once a factorisation in complex64 has proved what lies below the peak."""
    error = grams.error(torch.complex64)
    tried = (peak.value - error) / (1 + 1.01 * _share(grams.size, torch.complex64))
    if tried <= 0:
        return wanted
    bounds = proved_below(_chosen(grams.blocks(phases, torch.complex64), wanted), tried)
    proved = bounds < math.inf
    peak.prove(bounds[proved], error)
    left = wanted.clone()
    left[wanted] = ~proved
    return left


def _chosen(blocks: Tensor, wanted: Tensor) -> Tensor:
    return blocks.flatten(0, 1) if bool(wanted.all()) else blocks[wanted]


def _settle(grams: Grams, phases: Tensor, wanted: Tensor, frequencies: Tensor, peak: _Peak) -> None:
    """Prove the `wanted` blocks in complex128, where the peak rises to the largest eigenvalue among them."""
    blocks, places = _chosen(grams.blocks(phases, torch.complex128), wanted), wanted.nonzero()
    room = _TOLERANCE
    for _ in range(_ATTEMPTS):
        bounds = proved_below(blocks, peak.value * (1 + room))
        proved = bounds < math.inf
        peak.prove(bounds[proved], grams.error(torch.complex128))
        blocks, places = blocks[~proved], places[~proved]
        if not len(blocks):
            return
        count = min(len(blocks), _SOLVED_AT_ONCE if grams.size <= _SOLVED_SIZE else 1)
        first = torch.view_as_real(blocks).square().flatten(1).sum(1).topk(count).indices
        top, place = torch.linalg.eigvalsh(blocks[first])[:, -1].max(0)
        if float(top) > peak.value:
            row, peak.group = places[first[place]].tolist()
            peak.value, peak.frequency = float(top), frequencies[row]
        else:
            room *= 8
    raise ArithmeticError(f"no proof of the norms of {len(blocks)} matrices of size {grams.size}")


def _wave(
    grams: Grams, kernel: Tensor, units: Sequence[int], peak: _Peak, channels: int
) -> tuple[Tensor, tuple[float, ...]]:
    """Wave and angles of the peak's top left singular vector, see `Torus`; a flat wave where no peak was found."""
    if peak.frequency is None:
        return torch.ones(channels, dtype=torch.complex64), (0.0,) * len(units)
    block = grams.blocks(grams.phases(peak.frequency[None]), torch.complex64)[:, peak.group]
    vector = _power_steps(block.tril() + block.tril(-1).mH)[0][0]
    angles = [math.pi * int(part) / period for part, period in zip(peak.frequency, grams.periods, strict=True)]
    part = kernel[peak.group].to(vector.dtype)  # [size, inner, *taps]
    if channels != grams.groups * grams.size:  # on the inputs' side: the image of the conjugate vector
        for angle, unit_step, taps in zip(reversed(angles), reversed(units), reversed(part.shape[2:]), strict=True):
            turns = angle * unit_step * torch.arange(taps, dtype=torch.float64)
            part = part @ torch.polar(torch.ones_like(turns), turns).to(part.dtype)
        vector = vector.conj() @ part
    wave = vector.new_zeros(grams.groups, channels // grams.groups)
    wave[peak.group] = vector
    return wave.flatten(), tuple(angles)

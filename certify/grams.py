"""Gram matrices of a convolution's frequency blocks, with bounds of every rounding in them.

With K(f) = sum_t K_t e^(i f t) the block of frequency f of a convolution of stride 1 on a torus (see `torus`),

    G(f) = K(f) K(f)^H = P_0 + sum over half of the lags l of [cos(f l) P_l + i sin(f l) Q_l],
    P_l, Q_l = R_l +- R_l^T,   R_l = sum_t K_(t+l) K_t^T.

All of P_l and Q_l are real and the same for every frequency, so that a batch of G(f) is two real matrix products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .rounding import gamma, largest_entry, norm_up, sum_up, unit, up, up_add, up_mul

_CHUNK_ENTRIES = 1 << 18  # complex numbers of one batch of Gram matrices: 2 MB in complex64, which stays in the cache
_LARGE_ENTRIES = 1 << 21  # the same for large matrices, of which a few are formed at once
_LARGE_BATCH = 8
_PHASE_ENTRIES = 1 << 20

_TINY = torch.finfo(torch.float64).tiny


def scaled_weight(weight: Tensor) -> tuple[Tensor, float]:
    """The weights times 2^e, |e| <= 1000, such that the norms of the taps sum to about 1; 0 for no or zero weights."""
    largest = largest_entry(weight)
    if largest == 0.0:
        return weight, 0.0
    first = max(-1000, min(1000, -math.frexp(largest)[1]))
    taps = norm_up((weight * 2.0**first).flatten(2).movedim(2, 0).flatten(1))
    scale = 2.0 ** max(-1000, min(1000, first - math.frexp(float(taps.sum()))[1]))
    return weight * scale, scale


def stride_one(
    kernel: Tensor,  # [groups, out, in, *kernel]
    strides: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """The kernel of stride 1 on the phases of the input, smaller side first, and the step between taps per axis."""
    units = []
    for axis, (stride, step) in enumerate(zip(strides, dilation, strict=True), start=3):
        units.append(step if stride == 1 else 1)
        if stride == 1:
            continue
        taps = torch.arange(kernel.shape[axis]) * step
        shape = list(kernel.shape)
        shape[axis] = (int(taps[-1]) // stride + 1) * stride
        spread = kernel.new_zeros(shape).index_copy_(axis, taps, kernel)
        kernel = spread.reshape(*shape[:axis], -1, stride, *shape[axis + 1 :]).movedim(axis + 1, 3).flatten(2, 3)
    kernel = kernel[:, :, kernel.transpose(1, 2).flatten(3).ne(0).any(3).any(2).any(0)]  # phases that no tap reads
    return (kernel.transpose(1, 2) if kernel.shape[2] < kernel.shape[1] else kernel), units


def _half_lags(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The lag 0 and one of each pair l, -l."""
    for lag in itertools.product(*(range(1 - size, size) for size in shape)):
        if lag >= (0,) * len(lag):
            yield lag


@lru_cache(maxsize=64)
def _roots(period: int) -> Tensor:  # [2 * period] complex128
    """e^(i pi j / period), right to 34 u in modulus.

    The argument, at most 2 pi, has three roundings, so that it errs by at most 19 u; the C library's sine and cosine
    are taken to be right to 4 ulps, that is 4 u (common libraries keep 1): sqrt(2) (19 + 4) u < 34 u.
    """
    angles = [j * math.pi / period for j in range(2 * period)]
    return torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles], dtype=torch.complex128)


@dataclass(frozen=True)
class Grams:
    """The matrices P_l and Q_l of all groups, and the periods on which they are summed to Gram matrices G(f)."""

    even: Tensor  # P, [lags, groups * size * size] float64
    odd: Tensor  # Q, likewise
    lags: Tensor  # [lags, axes] int64, in points of the torus
    periods: tuple[int, ...]  # 1 for an axis of one tap, all of whose frequencies are alike
    groups: int
    size: int
    inner: int  # length of the inner products of R_l
    spread: float  # at least (sum_t ||K_t||_F)^2 of every group

    @classmethod
    def of(cls, kernel: Tensor, units: Sequence[int], periods: Sequence[int]) -> Grams:
        """From a kernel [groups, size, inner, *taps] of stride 1; `units` are the steps between its taps."""
        groups, size, width = kernel.shape[:3]
        taps = kernel.shape[3:]
        moved = kernel.movedim(2, -1)  # [groups, size, *taps, width]
        even, odd, lags = [], [], list(_half_lags(taps))
        for lag in lags:
            late = tuple(slice(max(0, step), n + min(0, step)) for step, n in zip(lag, taps, strict=True))
            early = tuple(slice(max(0, -step), n - max(0, step)) for step, n in zip(lag, taps, strict=True))
            late_taps, early_taps = (moved[:, :, *part].flatten(2) for part in (late, early))
            product = late_taps @ early_taps.mT
            half = 1.0 if any(lag) else 0.5
            even.append(((product + product.mT) * half).flatten())
            odd.append(((product - product.mT) * half).flatten())
        norms = sum_up(norm_up(kernel.flatten(3).permute(0, 3, 1, 2).flatten(2)))
        return cls(
            even=torch.stack(even),
            odd=torch.stack(odd),
            lags=torch.tensor(lags) * torch.tensor(units),
            periods=tuple(period if n > 1 else 1 for period, n in zip(periods, taps, strict=True)),
            groups=groups,
            size=size,
            inner=width * math.prod(taps),
            spread=up_mul(float(norms.max()), float(norms.max())),
        )

    def error(self, dtype: torch.dtype) -> float:
        """Upper bound of ||computed G(f) - G(f)||_2 (of either triangle), G(f) computed in complex64 or complex128.

        With T = sum_t ||K_t||_F: sum_l ||R_l||_F <= T^2 over all lags, an inner product of length k errs by gamma_k
        (ASNA, section 3.1) and P_l, Q_l add one rounding, so that over half of the lags
            sum ||P_l computed - P_l||_F <= gamma_(k+1) T^2,  sum ||P_l computed||_F <= (1 + gamma_(k+1)) T^2,
        and the same for Q_l. A conversion to float32 adds u' to both P and the phases; a phase errs by e = gamma_(40 d)
        (`_roots`, and 3 u for each complex product of d axes: ASNA, Lemma 3.5; Brent, Percival and Zimmermann 2007);
        the sum over h lags adds gamma'_h. Real and imaginary part together at most double each of these.
        """
        count, single = len(self.lags), unit(dtype) if dtype == torch.complex64 else 0.0
        total = up_mul(self.spread, up_add(1.0, gamma(self.inner + 1)))
        matrices = up_add(up_mul(self.spread, gamma(self.inner + 1)), up_mul(total, single))
        total = up_mul(total, up_add(1.0, single))
        phases = up_add(gamma(40 * len(self.periods)), up_mul(2.0, single))
        summed = up_mul(gamma(count, unit(dtype)), up_add(1.0, phases))
        tiny = torch.finfo(dtype).tiny
        lost = up_mul(8.0 * (self.inner + count), float(count), float(self.size), tiny)  # underflow
        return up_add(up_mul(2.0, up_add(matrices, up_mul(total, up_add(phases, summed)))), lost)

    def frequencies(self, twist: Sequence[float]) -> Tensor:  # [F, axes] int64
        """2 (b + tau) for every frequency, one of each conjugate pair."""
        halved = max((axis for axis, period in enumerate(self.periods) if period > 1), default=-1)
        axes = []
        for axis, (period, tau) in enumerate(zip(self.periods, twist, strict=True)):
            count = ((period + 1) // 2 if tau else period // 2 + 1) if axis == halved else period
            axes.append(2 * torch.arange(count) + int(2 * tau))
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))

    def phases(self, frequencies: Tensor) -> Tensor:  # [F, axes] -> [F, lags] complex128
        """e^(i f l), from exact integer multiples of pi / M."""
        phase = torch.ones((), dtype=torch.complex128)
        for axis, period in enumerate(self.periods):
            index = frequencies[:, axis, None] * self.lags[:, axis] % (2 * period)
            phase = phase * _roots(period)[index] if period > 1 else phase
        return phase.expand(len(frequencies), len(self.lags))

    def frobenius(self, frequencies: Tensor) -> Tensor:  # [F, axes] -> [F, groups] float64
        """Upper bounds of ||G(f)||_F, as quadratic forms in the cosines and sines: no G(f) is formed.

        The forms' matrices <P_l, P_l'> and the forms err by at most gamma_(n^2 + 2 h + 4) (sum_l ||P_l||_F)^2.
        """
        length, count = self.size**2, len(self.lags)
        if length < count:  # large kernels of few channels: the matrices themselves are cheaper
            step = max(1, _PHASE_ENTRIES // (count + length * self.groups))
            parts = [self._norms(part) for part in torch.split(frequencies, step)]
            return up(torch.cat(parts) + self.error(torch.complex128))
        even, odd = self._products
        total = up_mul(self.spread, 1 + 2 * gamma(self.inner + 1), 1 + 2 * gamma(40 * len(self.periods)))
        lost = up_mul(4.0 * (length + count), float(count), float(count), _TINY)
        rounding = up_add(up_mul(2.0, gamma(length + 2 * count + 4), total, total), lost)
        squares = []
        for part in torch.split(frequencies, max(1, _PHASE_ENTRIES // (count * self.groups))):
            phases = self.phases(part)
            squares.append(_forms(even, phases.real) + _forms(odd, phases.imag))
        square = up(torch.cat(squares, 1).clamp_min(0.0) + rounding)
        return up(up(square.sqrt()) + self.error(torch.complex128)).T

    def _norms(self, frequencies: Tensor) -> Tensor:  # [F, axes] -> [F, groups]
        blocks = torch.view_as_real(self.blocks(self.phases(frequencies), torch.complex128))
        return norm_up(blocks.flatten(2))

    @cached_property
    def _products(self) -> list[Tensor]:  # 2 times [groups, lags, lags]
        """<P_l, P_l'> and <Q_l, Q_l'>."""
        parts = (part.reshape(len(self.lags), self.groups, -1).transpose(0, 1) for part in (self.even, self.odd))
        return [part @ part.mT for part in parts]

    @cached_property
    def _single(self) -> Tensor:
        """P and Q in float32, laid out so that one real product gives complex matrices."""
        pairs = torch.zeros(2, len(self.lags), self.even.shape[1], 2, dtype=torch.float32)
        pairs[0, :, :, 0], pairs[1, :, :, 1] = self.even, self.odd
        return pairs.flatten(0, 1).flatten(1)

    def blocks(self, phases: Tensor, dtype: torch.dtype) -> Tensor:  # [F, lags] -> [F, groups, size, size]
        """G(f), in complex64 or complex128; of each only the lower triangle is to be read."""
        if dtype == torch.complex64:
            parts = torch.cat([phases.real, phases.imag], 1).float() @ self._single
            flat = torch.view_as_complex(parts.reshape(len(parts), -1, 2))
        else:
            flat = torch.complex(phases.real @ self.even, phases.imag @ self.odd)
        return flat.reshape(-1, self.groups, self.size, self.size)

    @property
    def batch(self) -> int:
        """Frequencies whose matrices are formed at once."""
        entries = self.groups * self.size**2
        return max(1, _CHUNK_ENTRIES // entries, min(_LARGE_BATCH, _LARGE_ENTRIES // entries))


def _forms(matrices: Tensor, vectors: Tensor) -> Tensor:  # [groups, h, h], [F, h] -> [groups, F]
    return (vectors @ matrices).mul_(vectors).sum(2)

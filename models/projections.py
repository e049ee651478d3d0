"""Pure functions from a free weight to one of bounded spectral norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class _ClipSingularValues(torch.autograd.Function):
    """U min(S, c) V^H with a backward pass by divided differences, which stay bounded where singular values meet."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, ceiling: float) -> Tensor:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        ctx.save_for_backward(left, values, right)
        ctx.ceiling = ceiling
        excess = (values - ceiling).clamp_min(0)
        clipped: Tensor = matrix - (left * excess.unsqueeze(-2)) @ right
        return clipped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        left, values, right = ctx.saved_tensors
        gradient = gradients[0]
        symmetric, skew, ratio = _divided_differences(values, ctx.ceiling)
        rows = left.mH @ gradient
        core = rows @ right.mH
        result = left @ (symmetric * (core + core.mH) / 2 + skew * (core - core.mH) / 2) @ right
        if gradient.shape[-1] > gradient.shape[-2]:
            result = result + (left * ratio.unsqueeze(-2)) @ (rows - core @ right)
        elif gradient.shape[-2] > gradient.shape[-1]:
            result = result + (gradient @ right.mH - left @ core) @ (ratio.unsqueeze(-1) * right)
        return result, None


def _divided_differences(values: Tensor, ceiling: float) -> tuple[Tensor, Tensor, Tensor]:
    """(f(a) - f(b)) / (a - b), (f(a) + f(b)) / (a + b) and f(a) / a for f(s) = min(s, ceiling)."""
    tiny = torch.finfo(values.dtype).tiny
    clipped = values.clamp_max(ceiling)
    slope = (values < ceiling).to(values)
    gap, rise = values[..., :, None] - values[..., None, :], clipped[..., :, None] - clipped[..., None, :]
    symmetric = torch.where(gap.abs() > tiny, rise / torch.where(gap.abs() > tiny, gap, 1.0), slope[..., :, None])
    total, sums = values[..., :, None] + values[..., None, :], clipped[..., :, None] + clipped[..., None, :]
    skew = torch.where(total > tiny, sums / total.clamp_min(tiny), 1.0)
    return symmetric, skew, torch.where(values > tiny, clipped / values.clamp_min(tiny), 1.0)


def clip_singular_values(
    matrix: Tensor,  # [..., m, n], real or complex
    ceiling: float,
) -> Tensor:  # [..., m, n]
    """The nearest matrix (in Frobenius norm) of spectral norm at most `ceiling`: U min(S, ceiling) V^H.

    Differentiable; the derivative is that of Daleckii and Krein for f(s) = min(s, ceiling), bounded by 1.
    """
    result: Tensor = _ClipSingularValues.apply(matrix, ceiling)  # type: ignore[no-untyped-call]
    return result


def clip_convolution(
    weight: Tensor,  # [c_out, c_in / groups, *kernel]
    ceiling: float,
    sides: tuple[int, ...],
    groups: int = 1,
) -> Tensor:  # as weight
    """Clip each frequency block of the circular convolution on a torus, then cut the kernel back to its support.

    Sedghi, Gupta, Long (ICLR 2019). Cutting undoes some of the clipping, so the result must be bounded anew.
    """
    kernel = weight.shape[2:]
    axes = tuple(range(-len(kernel), 0))
    sides = tuple(max(side, size) for side, size in zip(sides, kernel, strict=True))
    symbol = torch.fft.fftn(weight.reshape(groups, -1, *weight.shape[1:]), s=sides, dim=axes)
    blocks = symbol.movedim((1, 2), (-2, -1))
    clipped = clip_singular_values(blocks, ceiling).movedim((-2, -1), (1, 2))
    full: Tensor = torch.fft.ifftn(clipped, dim=axes).real
    for axis, size in enumerate(kernel, start=full.dim() - len(kernel)):
        full = full.narrow(axis, 0, size)
    return full.reshape(weight.shape)


def cayley(
    weight: Tensor,  # [m, n]
) -> Tensor:  # [m, n], orthonormal columns (m >= n) or rows (m < n)
    """Cayley transform of a free matrix: for m >= n, weight = [U; V], A = U - U^T + V^T V,

        Q = [(I - A)(I + A)^-1; -2 V (I + A)^-1],    Q^T Q = I.

    Trockman, Kolter, "Orthogonalizing convolutional layers with the Cayley transform", ICLR 2021.
    """
    if weight.shape[0] < weight.shape[1]:
        return cayley(weight.T).T
    size = weight.shape[1]
    upper, lower = weight[:size], weight[size:]
    identity = torch.eye(size, dtype=weight.dtype, device=weight.device)
    skewed = upper - upper.T + lower.T @ lower
    # (I - A)(I + A)^-1 = 2 (I + A)^-1 - I, so one solve gives both parts
    inverse = torch.linalg.solve(identity + skewed, identity)
    return torch.cat([2 * inverse - identity, -2 * lower @ inverse])


def bjorck(
    weight: Tensor,  # [m, n]
    iterations: int = 20,
) -> Tensor:  # [m, n], nearly orthonormal columns or rows
    """Newton-Schulz iteration W <- W (3 I - W^T W) / 2 towards the polar factor, from a start of norm at most 1.

    Bjorck, Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", 1971. Every iterate
    keeps the norm at most 1; the singular values approach 1 from below.
    """
    product = weight.abs().sum(0).max() * weight.abs().sum(1).max()  # ||W||_2^2 <= ||W||_1 ||W||_inf
    result = weight / product.clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
    for _ in range(iterations):
        result = newton_schulz(result)
    return result


def newton_schulz(
    weight: Tensor,  # [m, n]
) -> Tensor:  # [m, n]
    """One step (3 W - W W^T W) / 2: singular values s in (0, sqrt(3)) become s (3 - s^2) / 2, nearer to 1."""
    if weight.shape[0] < weight.shape[1]:
        return 1.5 * weight - 0.5 * (weight @ weight.T) @ weight
    return 1.5 * weight - 0.5 * weight @ (weight.T @ weight)


def almost_orthogonal(
    weight: Tensor,  # [c_out, c_in / groups, *kernel]
    groups: int = 1,
) -> Tensor:  # as weight
    """AOL: divide input channel c by sqrt(d_c), d_c = sum over b and offsets of |sum_a W_ac * W_ab|; norm at most 1.

    Holds for zero and circular padding, any stride and dilation. Prach, Lampert, "Almost-orthogonal layers for
    efficient general-purpose Lipschitz networks", ECCV 2022, Theorem 2.
    """
    kernel = weight.shape[2:]
    channels = weight.shape[1]
    by_input = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)  # [g, c_in / g, c_out / g, *kernel]
    convolve = _CONVOLVE[len(kernel)]
    correlate = [convolve(part, part, padding=tuple(k - 1 for k in kernel)) for part in by_input]
    sums = torch.stack([part.abs().flatten(1).sum(1) for part in correlate])  # [g, c_in / g]
    factor = torch.where(sums > 0, sums.clamp_min(torch.finfo(weight.dtype).tiny).rsqrt(), 0.0)
    grouped = weight.reshape(groups, -1, *weight.shape[1:]) * factor.reshape(groups, 1, channels, *(1 for _ in kernel))
    return grouped.reshape(weight.shape)

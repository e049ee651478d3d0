"""Outward rounding and proofs in float64: sums, norms, and spectral norms by Cholesky factorisation.

Everything here rests on the standard model, fl(a op b) = (a op b)(1 + d), |d| <= u, plus at most the smallest normal
number where a result underflows, for +, -, *, / and the square root, and on matrix products and factorisations that
are made of these operations in any order, with or without fused multiply-add (no Strassen, no products of fewer
multiplications). References: Higham, "Accuracy and stability of numerical algorithms", 2nd ed. (ASNA), and Rump,
"Verification of positive definiteness", BIT 46, 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

UNIT = 2.0**-53  # of float64
ROOT_2 = 1.4142135623730951  # rounded up

# Roundings allowed to a Cholesky entry beyond its inner product: the square root or division, one more where a library
# multiplies by a rounded reciprocal, and some to spare.
_CHOLESKY_EXTRA = 4

_GRAM_STEP = 512  # columns of one block of a Gram matrix, of which only one triangle is multiplied out
_NORM_STEP = 1024  # rows whose squares are held at once
_SOLVED_WHOLE = 256  # largest Gram matrix whose eigenvalues are found all at once
_LANCZOS_STEPS = 400
_ATTEMPTS = 60  # each widens the shift by 8: far beyond any float64 number


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff of a real or complex floating type: 2^-53 for float64, 2^-24, 2^-11 (float16), 2^-8 (bfloat16)."""
    return float(torch.finfo(dtype).eps) / 2


def gamma(n: int, u: float = UNIT) -> float:
    """n u / (1 - n u), rounded up: the relative error of n roundings (ASNA, Lemma 3.1); inf where n u >= 1."""
    total = up_mul(float(n), u)
    return up_div(total, down_add(1.0, -total)) if total < 1 else math.inf


def up_add(*terms: float) -> float:
    """An upper bound of the sum; exact zeros change nothing."""
    total = 0.0
    for term in terms:
        if term != 0.0:
            total = math.nextafter(total + term, math.inf) if total != 0.0 else term
    return total


def down_add(*terms: float) -> float:
    """A lower bound of the sum."""
    return -up_add(*(-term for term in terms))


def up_mul(*factors: float) -> float:
    """An upper bound of the product of factors >= 0; an exact 0 gives 0 (times infinity too), 1 changes nothing."""
    if 0.0 in factors:
        return 0.0
    total = 1.0
    for factor in factors:
        if factor != 1.0:
            total = math.nextafter(total * factor, math.inf) if total != 1.0 else factor
    return total


def down_mul(*factors: float) -> float:
    """A lower bound, at least 0, of the product of factors >= 0."""
    if 0.0 in factors:
        return 0.0
    total = 1.0
    for factor in factors:
        if factor != 1.0:
            total = max(0.0, math.nextafter(total * factor, 0.0)) if total != 1.0 else factor
    return total


def up_div(a: float, b: float) -> float:
    """An upper bound of a / b, a >= 0 and b >= 0: 0 for an exact a = 0, infinity for b = 0."""
    if a == 0.0:
        return 0.0
    return math.nextafter(a / b, math.inf) if b > 0 else math.inf


def down_div(a: float, b: float) -> float:
    """A lower bound, at least 0, of a / b, a >= 0 and b > 0."""
    return 0.0 if a == 0.0 else max(0.0, math.nextafter(a / b, 0.0))


def up_sqrt(a: float) -> float:
    """An upper bound of the square root of a >= 0."""
    return math.nextafter(math.sqrt(a), math.inf) if a > 0 else math.sqrt(a)


def down_sqrt(a: float) -> float:
    """A lower bound of the square root of a >= 0."""
    return math.nextafter(math.sqrt(a), 0.0)


def up(values: Tensor) -> Tensor:
    """The next larger numbers, elementwise: what makes the result of one rounded operation an upper bound."""
    return torch.nextafter(values, torch.full_like(values, math.inf))


def down(values: Tensor) -> Tensor:
    """The next smaller numbers, elementwise."""
    return torch.nextafter(values, torch.full_like(values, -math.inf))


def power_of_two(values: Tensor) -> float:
    """A power of two 2^e, |e| <= 1000, by which to multiply so that the largest |value| is in [1/2, 1) or near it.

    1 where the largest is between 2^-200 and 2^200, whose squares neither over- nor underflow harmfully, and for no
    values at all.
    """
    largest = float(largest_entry(values))
    if largest == 0.0 or 2.0**-200 < largest < 2.0**200 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** max(-1000, min(1000, -math.frexp(largest)[1]))


def inverse_roots(
    values: Tensor,  # [n] > 0, between 2^-2000 and 2^2000
) -> Tensor:  # [n] float64
    """About values^(-1/2), a power of two each, by which products are exact."""
    exponents = -(torch.log2(values.detach().cpu().double()) / 2).round().to(torch.int64)
    return torch.from_numpy(np.ldexp(np.ones(len(exponents)), exponents.numpy()))


def covering(
    rows: Tensor,  # [m, n] H, float64
    error: float,
) -> Tensor | None:  # [m, m]
    """R with R R^T >= M M^T for every M within `error` of H in l2; None for numbers far from 1, or where it fails.

    Then M = R K for a K of norm at most 1 (Douglas 1966): R y, ||y|| <= r, stands for all M x, ||x|| <= r. R is the
    Cholesky factor of fl(H H^T) + s I, with s above all errors: gamma ||H||_F^2 of the product, c tr of the
    factorisation (see `cholesky_factor`), 2 ||H|| e + e^2 of the matrix itself.
    """
    count, length = rows.shape
    if not 2.0**-200 < largest_entry(rows) < 2.0**200:
        return None
    size = float(norm_up(rows.flatten()))
    apart = up_add(up_mul(up_add(gamma(length), 4 * UNIT), size, size), up_mul(2.0, size, error), up_mul(error, error))
    shift = up_mul(2.0, up_add(apart, up_mul(2 * cholesky_factor(count, torch.float64), size, size)))
    gram = rows @ rows.T
    gram.diagonal().add_(shift)
    needed = up_add(apart, up_mul(cholesky_factor(count, torch.float64), float(sum_up(gram.diagonal()))))
    needed = up_add(needed, up_mul(2 * UNIT, largest_entry(gram.diagonal())))
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    fine = int(failed) == 0 and bool(torch.isfinite(factor).all()) and needed <= shift
    return factor if fine else None


def largest_entry(values: Tensor) -> float:
    """max |value|, of real and imaginary parts, exactly; 0 for no values."""
    parts = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    if not parts.numel():
        return 0.0
    low, high = torch.aminmax(parts.detach())
    return max(abs(float(low)), abs(float(high)))


def sum_up(values: Tensor, dim: int = -1) -> Tensor:
    """Upper bounds of the sums of |values| along `dim`, in float64 on the values' device.

    A sum of n non-negative terms, in any order, is at least (1 - u)^n times the exact one (ASNA, section 4.2).
    """
    return _sum_up(values, dim, squared=False)


def norm_up(values: Tensor, dim: int = -1) -> Tensor:
    """Upper bounds of the Euclidean norms along `dim`, in float64; see `sum_up`."""
    return _sum_up(values, dim, squared=True)


def _sum_up(values: Tensor, dim: int, *, squared: bool) -> Tensor:
    values = values.detach().double()
    scale, count = power_of_two(values), values.shape[dim]
    scaled = values if scale == 1.0 else values * scale
    total = (scaled * scaled if squared else scaled.abs()).sum(dim)
    nothing = (values == 0).all(dim) if bool((total == 0).any()) else torch.zeros_like(total, dtype=torch.bool)
    lost = up_mul(4.0 * count, torch.finfo(torch.float64).tiny)  # underflow of scaling and of squares
    total = up(up(total * math.nextafter(1 + gamma(count + 1), math.inf)) + lost)
    total = up(total.sqrt()) if squared else total
    return torch.where(nothing, torch.zeros_like(total), up(total / scale))


def dot_factor(
    length: int,
    dtype: torch.dtype,
) -> float:
    """f such that a computed inner product of `length` terms errs by at most f |x||y|, underflow apart.

    Real: gamma_length (ASNA, section 3.1). Complex: each part is a real inner product of twice the length whose terms'
    magnitudes sum to at most |x||y|, so that the modulus errs by at most sqrt(2) gamma_(2 length).
    """
    if dtype.is_complex:
        return up_mul(up_sqrt(2.0), gamma(2 * length, unit(dtype)))
    return gamma(length, unit(dtype))


def cholesky_factor(size: int, dtype: torch.dtype) -> float:
    """c such that a Cholesky factorisation of B that runs to its end proves lambda_min(B) >= -c tr(B).

    With R the computed factor, |R^H R - B| <= f |R|^H |R|, f = `dot_factor(size + few)` (ASNA, Theorem 10.3, for any
    order of the inner products, blocked or not, solved by substitution), so that
    ||R||_F^2 = tr(R^H R) <= tr(B) / (1 - f) and ||R^H R - B||_2 <= f / (1 - f) tr(B); R^H R is positive semidefinite
    (Rump 2006, Corollary 2.4).
    """
    factor = dot_factor(size + _CHOLESKY_EXTRA, dtype)
    return up_div(factor, down_add(1.0, -factor)) if factor < 1 else math.inf


def proved_below(
    gram: Tensor,  # [..., n, n], real symmetric or complex Hermitian; the lower triangle is read
    level: Tensor | float,  # [...], tried as an upper bound of the largest eigenvalue; rounded to the blocks' precision
) -> Tensor:  # [...] float64
    """Proved upper bounds of the largest eigenvalues: `level` and the proof's own rounding, or inf where it fails.

    B = fl(t I - G) is exact off its diagonal and right to u |b_ii| on it; a completed factorisation then gives
    lambda_max(G) <= t + c tr(B) + u max b_ii with c of `cholesky_factor`, plus underflow. The entries should be
    scaled to a moderate size. Errors of G itself, as a product, are the caller's.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal = diagonal.real if gram.is_complex() else diagonal
    return _below(-gram, diagonal.clone(), level)


def _below(minus: Tensor, diagonal: Tensor, level: Tensor | float) -> Tensor:
    """See `proved_below`; `minus` is -G and gets B's diagonal, `diagonal` is that of G."""
    size = minus.shape[-1]
    if not diagonal.numel():
        return torch.zeros(minus.shape[:-2], dtype=torch.float64)
    info = torch.finfo(diagonal.dtype)
    start = torch.as_tensor(level, dtype=diagonal.dtype, device=diagonal.device).expand(minus.shape[:-2])
    shifted = start[..., None] - diagonal
    minus.diagonal(dim1=-2, dim2=-1).copy_(shifted)
    factor, failed = torch.linalg.cholesky_ex(minus)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    pivots = pivots.real if pivots.is_complex() else pivots
    done = (failed == 0) & ((pivots > 0) & (pivots < math.inf)).all(-1)
    del factor, pivots
    trace = sum_up(shifted)
    rounding = up(trace * up_add(cholesky_factor(size, minus.dtype), unit(minus.dtype)))
    lost = up(up(1 + trace) * up_mul(8.0 * size, float(size), float(info.tiny)))
    upper = up(up(start.double() + rounding) + lost)
    return torch.where(done, upper, torch.full_like(upper, math.inf))


@dataclass(frozen=True)
class Proof:
    """`lower <= norm <= upper`, both with every rounding taken into account."""

    lower: float
    upper: float


def proved_norm(
    matrix: Tensor,  # [m, n], any real floating type, anywhere; converted to float64 on the CPU
) -> Proof:
    """Bracket of the spectral norm of a matrix, proved by one Cholesky factorisation.

    On the smaller side, scaled by a power of two: G = fl(W^T W) errs by at most gamma_k ||W||_F^2 in norm, k the inner
    length, and `proved_below` bounds its largest eigenvalue; an estimate of that eigenvalue only proposes where to try.
    The lower end is ||W v|| / ||v|| of one vector, less the rounding of both. Relative width: some 1e-9 at n = 4096.

    Raises:
        ValueError: NaN, infinite or complex entries.
        ArithmeticError: no factorisation runs to its end, which only numbers far beyond the tested range could cause.
    """
    if matrix.is_complex():
        raise ValueError(f"matrix: expected real numbers, got {matrix.dtype}")
    matrix = matrix.detach().to("cpu", torch.float64)
    if not math.isfinite(largest_entry(matrix)):
        raise ValueError("matrix: expected finite numbers; got NaN or infinity")
    scale = power_of_two(matrix)
    scaled = matrix if scale == 1.0 else matrix * scale
    if largest_entry(scaled) == 0.0:
        return Proof(0.0, 0.0)
    scaled = scaled if scaled.shape[0] >= scaled.shape[1] else scaled.T
    lower, upper = _scaled_norm(scaled)
    lost = up_mul(float(matrix.numel()), torch.finfo(torch.float64).tiny)  # entries that scaling makes too small
    return Proof(down_div(max(0.0, down_add(lower, -lost)), scale), up_div(up_add(upper, lost), scale))


def _scaled_norm(matrix: Tensor) -> tuple[float, float]:
    """Bracket of the norm of a matrix [k, n], k >= n, that needs no scaling."""
    length, size = matrix.shape
    parts = [norm_up(matrix[start : start + _NORM_STEP]) for start in range(0, length, _NORM_STEP)]
    frobenius = float(norm_up(torch.cat(parts)))
    error = up_mul(dot_factor(length, matrix.dtype), frobenius, frobenius)
    error = up_add(error, up_mul(2.0 * length, float(size), torch.finfo(matrix.dtype).tiny))
    gram = _gram(matrix)
    allowance = error / 8 + 8 * UNIT * frobenius * frobenius
    estimate, vector = _top_pair(gram, allowance)
    lower = _attained(matrix, vector, frobenius)
    diagonal = gram.diagonal().clone()
    minus = gram.neg_()
    for attempt in range(_ATTEMPTS):
        level = estimate + allowance * 8.0**attempt
        top = float(_below(minus, diagonal, level))
        if top < math.inf:
            return lower, max(lower, up_sqrt(up_add(top, error)))
    raise ArithmeticError(f"no proof of the norm of a matrix of shape {tuple(matrix.shape)}")


def _gram(matrix: Tensor) -> Tensor:
    """matrix^T matrix, symmetric: one triangle is multiplied out by blocks and mirrored."""
    size = matrix.shape[1]
    gram = matrix.new_empty(size, size)
    for start in range(0, size, _GRAM_STEP):
        columns = slice(start, min(start + _GRAM_STEP, size))
        torch.mm(matrix[:, start:].T, matrix[:, columns], out=gram[start:, columns])
        gram[columns, columns.stop :] = gram[columns.stop :, columns].T
    return gram


def _attained(matrix: Tensor, vector: Tensor, frobenius: float) -> float:
    """A lower bound of the norm: ||W v|| / ||v||, its rounding taken off."""
    image, length = float((matrix @ vector).square().sum().sqrt()), float(norm_up(vector))
    rounding = up_mul(gamma(sum(matrix.shape) + 8), up_add(image, up_mul(2.0, frobenius, length)))
    tiny = up_mul(8.0 * matrix.numel(), 2.0**-511)  # underflow of squares, whose root is taken
    return down_div(max(0.0, down_add(image, -rounding, -tiny)), length)


def _top_pair(gram: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """An estimate of the largest eigenvalue to about `tolerance`, never a bound, and its vector."""
    if gram.shape[0] <= _SOLVED_WHOLE:
        values, vectors = torch.linalg.eigh(gram)
        return float(values[-1]), vectors[:, -1]
    return _lanczos(gram, tolerance)


def _lanczos(gram: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """The largest Ritz pair after Lanczos steps with full reorthogonalisation (Golub and Van Loan, section 10.1)."""
    size = gram.shape[0]
    basis = gram.new_zeros(_LANCZOS_STEPS + 1, size)
    small = gram.new_zeros(_LANCZOS_STEPS + 1, _LANCZOS_STEPS + 1)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis[0] = start / start.norm()
    step = 0
    while True:
        image = gram @ basis[step]
        known = basis[: step + 1]
        small[step, step] = basis[step] @ image
        for _ in range(2):
            image = image - known.T @ (known @ image)
        rest = float(image.norm())
        step += 1
        last = step == min(_LANCZOS_STEPS, size) or rest <= tolerance
        if last or step % 10 == 0:
            values, vectors = torch.linalg.eigh(small[:step, :step])
            residual = rest * abs(float(vectors[-1, -1]))
            gap = float(values[-1] - values[-2]) if step > 1 else 0.0
            if last or min(residual, residual * residual / max(gap, residual)) <= tolerance / 2:
                return float(values[-1]), basis[:step].T @ vectors[:, -1]
        small[step, step - 1] = small[step - 1, step] = rest
        basis[step] = image / rest

"""Exact re-proof of spectral norms: s^2 I - M^H M >= 0 for a matrix or a frequency block of integers.

With R any upper triangular matrix (an approximate Cholesky factor from floating point), D = s^2 I - M^H M - R^H R is
taken exactly in integers; D is positive semidefinite where each diagonal entry is at least the sum of the others in its
row (Gershgorin), and then so is s^2 I - M^H M = D + R^H R. Small matrices whose claim is too tight for that get an
L D L^H factorisation in Arb balls, of which every pivot must be positive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from flint import arb, ctx, fmpz, fmpz_mat
from numpy.typing import NDArray

from .balls import Fixed, absolute, aligned, approximate, largest, length, matrix, scaled

_SHORT = 61  # bits of the integers of a large matrix: those that FLINT holds in one word
_BALLS = 64  # sides up to which balls may decide
_BALL_BITS = 256
_MARGINS = (0.5, 2.0, 8.0, 64.0)  # what the factor leaves to the residual, in units of n * 2^-52


@dataclass(frozen=True)
class Block:
    """A real or complex matrix, `re + i im`, in one unit 2^exp, within `err` units in each part of each entry."""

    re: fmpz_mat
    im: fmpz_mat | None
    exp: int
    err: fmpz
    guess: NDArray[np.complex128] | NDArray[np.float64]

    @property
    def spread(self) -> arb:
        """Upper bound of the spectral norm of what the entries' errors can add."""
        parts = 2 if self.im is not None else 1
        return scaled(self.err, self.exp) * arb(parts * int(self.re.nrows()) * int(self.re.ncols())).sqrt()


def block(re: Fixed, im: Fixed | None = None) -> Block:
    """A matrix [m, n] with its smaller side as columns (the norm is the same), in short integers where it is large."""
    parts = _of_one_word(
        aligned(re) if im is None else aligned(re, im), shorten=min(re.shape) > _BALLS or im is not None
    )
    guess = approximate(parts[0]) if im is None else approximate(parts[0]) + 1j * approximate(parts[1])
    err = max(part.err for part in parts)
    mants = [part.mant for part in parts]
    if re.shape[0] < re.shape[1]:
        mants, guess = [mant.T for mant in mants], guess.T
    return Block(matrix(mants[0]), matrix(mants[1]) if im is not None else None, parts[0].exp, err, guess)


def _of_one_word(parts: list[Fixed], *, shorten: bool) -> list[Fixed]:
    """Parts of one block and one unit in integers of one word: the factor is rounded to the same unit."""
    excess = max(length(largest(part.mant)) for part in parts) - _SHORT
    if excess < 0:
        return [Fixed(p.mant << -excess, p.exp + excess, p.err << -excess) for p in parts]
    if not shorten:
        return parts
    return [Fixed(p.mant >> excess, p.exp + excess, (p.err >> excess) + 2) for p in parts]


def proves_below(matrix_block: Block, bound: arb) -> bool:
    """Whether the spectral norm is proved to be at most `bound` (its lower end)."""
    with ctx.workprec(_BALL_BITS):
        side = int(matrix_block.re.ncols())
        if side == 0 or int(matrix_block.re.nrows()) == 0:
            return not bool(bound < 0)
        unit = arb(2) ** -matrix_block.exp
        level = (bound - matrix_block.spread) * unit  # in units of the entries
        if not level >= 0:
            return False
        square = _floor(level * level)
        gram_re, gram_im = _gram(matrix_block.re, matrix_block.im)
        if _dominant(square, gram_re, gram_im, None, None):
            return True
        factors = (_factor(matrix_block, square, margin) for margin in _MARGINS)
        if any(f is not None and _dominant(square, gram_re, gram_im, *f) for f in factors):
            return True
        return side <= _BALLS and _pivots_positive(square, gram_re, gram_im)


def _floor(ball: arb) -> fmpz:
    man, power = ball.lower().man_exp()
    return man << int(power) if power >= 0 else man >> int(-power)


def _gram(re: fmpz_mat, im: fmpz_mat | None) -> tuple[fmpz_mat, fmpz_mat | None]:
    """M^H M, exactly."""
    if im is None:
        return re.transpose() * re, None
    cross = re.transpose() * im
    return re.transpose() * re + im.transpose() * im, cross - cross.transpose()


def _factor(matrix_block: Block, square: fmpz, margin: float) -> tuple[fmpz_mat, fmpz_mat | None] | None:
    """About the Cholesky factor of (1 - delta) s^2 I - M^H M in units of the entries; None where there is none."""
    side, level = matrix_block.guess.shape[1], arb(square).sqrt()
    guess = np.ascontiguousarray(matrix_block.guess)
    scaled_guess = np.ldexp(guess.view(np.float64), -_exponent(matrix_block.guess)).view(guess.dtype)
    unit = float(level * arb(2) ** (matrix_block.exp - _exponent(matrix_block.guess)))  # s in units of the guess
    if not math.isfinite(unit):
        return None
    gram = scaled_guess.conj().T @ scaled_guess
    shifted = unit**2 * (1 - margin * side * 2.0**-52) * np.eye(side) - gram
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(shifted), upper=True)
    if int(info) != 0 or not bool(torch.isfinite(torch.view_as_real(factor) if factor.is_complex() else factor).all()):
        return None
    power = _exponent(matrix_block.guess) - matrix_block.exp
    values = factor.numpy()
    real = _rounded(values.real, power)
    return real, None if matrix_block.im is None else _rounded(values.imag, power)


def _exponent(values: NDArray[np.complex128] | NDArray[np.float64]) -> int:
    top = float(np.abs(values).max())
    return int(math.frexp(top)[1]) if top else 0


def _rounded(values: NDArray[np.float64], power: int) -> fmpz_mat:
    """values * 2^power rounded to integers."""
    fractions, exponents = np.frexp(values.reshape(-1))
    mantissas, shifts = np.ldexp(fractions, 53).astype(np.int64), exponents.astype(np.int64) - 53 + power
    if int(shifts.max(initial=0)) <= 8:
        rounded = np.rint(np.ldexp(values, power)).astype(np.int64).reshape(-1).tolist()
    else:
        pairs = zip(mantissas.tolist(), shifts.tolist(), strict=True)
        rounded = [m << s if s >= 0 else m >> -s for m, s in pairs]
    rows, columns = values.shape
    return fmpz_mat(rows, columns, rounded)


def _dominant(
    square: fmpz, gram_re: fmpz_mat, gram_im: fmpz_mat | None, factor_re: fmpz_mat | None, factor_im: fmpz_mat | None
) -> bool:
    """Whether D = square * I - gram - R^H R has no row in which the others' absolute sum exceeds the diagonal entry."""
    side = int(gram_re.nrows())
    rest_re, rest_im = gram_re, gram_im
    if factor_re is not None:
        part_re, part_im = _gram(factor_re, factor_im)
        rest_re = gram_re + part_re
        rest_im = None if gram_im is None or part_im is None else gram_im + part_im
    others = None if rest_im is None else rest_im.entries()
    entries = rest_re.entries()
    for row in range(side):
        values = entries[row * side : (row + 1) * side]
        diagonal = square - values[row]
        total = sum(map(abs, values), fmpz(0)) - abs(values[row])
        if others is not None:
            total += sum(map(abs, others[row * side : (row + 1) * side]), fmpz(0))
        if diagonal < total:
            return False
    return True


def _pivots_positive(square: fmpz, gram_re: fmpz_mat, gram_im: fmpz_mat | None) -> bool:
    """Whether square * I - gram is positive definite, by an L D L^H factorisation in balls."""
    rows = _real_form(square, gram_re, gram_im)
    for k, pivot_row in enumerate(rows):
        pivot = pivot_row[k]
        if not pivot > 0:
            return False
        for i in range(k + 1, len(rows)):
            ratio = rows[i][k] / pivot
            if not ratio.is_zero():
                rows[i] = [
                    a - ratio * b if j > k else a for j, (a, b) in enumerate(zip(rows[i], pivot_row, strict=True))
                ]
    return True


def _real_form(square: fmpz, gram_re: fmpz_mat, gram_im: fmpz_mat | None) -> list[list[arb]]:
    """square * I - gram; for a complex gram the real matrix [[re, -im], [im, re]], definite exactly where that is."""
    re, side = gram_re.tolist(), int(gram_re.nrows())
    top = [[arb((square if i == j else fmpz(0)) - re[i][j]) for j in range(side)] for i in range(side)]
    if gram_im is None:
        return top
    im = gram_im.tolist()
    upper = [row + [arb(v) for v in im[i]] for i, row in enumerate(top)]
    lower = [[arb(-v) for v in im[i]] + row for i, row in enumerate(top)]
    return upper + lower


def guessed_norm(matrix_block: Block) -> float:
    """The spectral norm, about: what a failed proof tells."""
    if not matrix_block.guess.size:
        return 0.0
    return float(np.linalg.norm(matrix_block.guess, 2))


def absolute_sum(dense: Fixed, norm: str) -> arb:
    """linf: the largest row sum of |matrix|; l1: the largest column sum. Upper bounds."""
    sums = absolute(dense).mant.sum(1 if norm == "linf" else 0)
    return scaled(reduce(max, sums, fmpz(0)), dense.exp)

"""Operator norms in exact arithmetic: rational matrices, and positive definiteness decided in Arb balls."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import flint
import torch

_BITS = 400


def rational(matrix):  # [m, n] tensor -> rows of Fractions
    return [[Fraction(value) for value in row] for row in matrix.double().tolist()]


def product(last, first):
    columns = list(zip(*first, strict=True))
    return [
        [sum((a * b for a, b in zip(row, column, strict=True) if a and b), Fraction(0)) for column in columns]
        for row in last
    ]


def total(a, b):
    return [[p + q for p, q in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]


def unit(size):
    return [[Fraction(int(i == j)) for j in range(size)] for i in range(size)]


def scaled(rows, factors):
    """The rows times one factor each."""
    return [[value * factor for value in row] for row, factor in zip(rows, factors, strict=True)]


def _square(matrix):
    """A A^T or A^T A, whichever is smaller."""
    rows = matrix if len(matrix) <= len(matrix[0]) else list(zip(*matrix, strict=True))
    return [[sum((a * b for a, b in zip(u, v, strict=True) if a and b), Fraction(0)) for v in rows] for u in rows]


def bounded_by(matrix, upper, norm="l2"):
    """Whether ||matrix|| <= upper for the exact matrix, without rounding; in l2 by LDL^T of upper^2 I - A A^T.

    A matrix with a norm within 1e-60 relative of `upper` counts as bounded.
    """
    if upper == math.inf:
        return True
    if norm != "l2":
        rows = matrix if norm == "linf" else list(zip(*matrix, strict=True))
        return max(sum(abs(value) for value in row) for row in rows) <= Fraction(upper)
    gram = _square(matrix)
    if not any(map(any, gram)):
        return True
    with flint.ctx.workprec(_BITS):
        level = _ball(Fraction(upper) ** 2 * (1 + Fraction(1, 10**60)))
        size = len(gram)
        rest = [[(level if i == j else flint.arb(0)) - _ball(gram[i][j]) for j in range(size)] for i in range(size)]
        return _positive(rest)


def _ball(value):
    return flint.arb(flint.fmpq(value.numerator, value.denominator))


def _positive(rest):
    size = len(rest)
    for k in range(size):
        pivot = rest[k][k]
        if not pivot > 0:
            return False
        for i in range(k + 1, size):
            if rest[i][k] == 0:
                continue
            factor = rest[i][k] / pivot
            for j in range(k + 1, i + 1):
                rest[i][j] = rest[i][j] - factor * rest[j][k]
    return True


def root(value):
    """A rational within 1e-100 relative of the square root."""
    shift = 400 + 2 * max(0, value.denominator.bit_length())
    return Fraction(math.isqrt((value.numerator << (2 * shift)) // value.denominator), 1 << shift)


@torch.no_grad()
def entries(layer, shape):
    """The rational matrix of an affine layer, by unit vectors and without its bias, which would round the entries.

    Exact where each matrix entry is one weight, or a sum that float64 holds exactly.
    """
    size = math.prod(shape)
    exact = copy.deepcopy(layer).double()
    if getattr(exact, "bias", None) is not None:
        exact.bias.zero_()
    return rational(exact(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).T)

"""Exact and enclosing numbers of the checker: tensors of integers with a common exponent and a common error.

A `Fixed` stands for every real tensor t with |t - mant * 2^exp| <= err * 2^exp in each entry. Integers are FLINT's, of
any length, so that sums and products are exact; only `trimmed` rounds, and says so in `err`. Scalars are Arb balls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from flint import arb, fmpq, fmpz, fmpz_mat
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.object_]

PRECISION = 128  # bits of Arb's balls
BITS = 128  # of the integers of a Fixed, at least, before it is trimmed
_SLACK = 40  # bits that integers may grow over BITS before a trim
_ZERO = fmpz(0)


@dataclass(frozen=True)
class Fixed:
    """Real tensors within `err` units of `mant`, in units of 2^exp."""

    mant: Integers
    exp: int
    err: fmpz = _ZERO

    def __post_init__(self) -> None:
        mant: Any = self.mant
        if not isinstance(mant, np.ndarray):  # numpy makes single numbers of arrays without axes
            object.__setattr__(self, "mant", integers([mant], ()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.mant.shape)

    def reshape(self, *shape: int) -> Fixed:
        """The same entries in another shape."""
        return replace(self, mant=self.mant.reshape(*shape))

    def moved(self, mant: Integers) -> Fixed:
        """The tensor whose entries are taken out of this one (views, gathers): the same unit and error."""
        return replace(self, mant=mant)

    @property
    def radius(self) -> arb:
        """Largest deviation of an entry."""
        return scaled(self.err, self.exp)


def integers(values: Sequence[Any], shape: tuple[int, ...]) -> Integers:
    """An object array of FLINT integers."""
    flat = np.empty(len(values), dtype=object)
    flat[:] = values
    return flat.reshape(shape)


def zeros(shape: tuple[int, ...]) -> Integers:
    """An object array of zeros."""
    return np.full(shape, _ZERO, dtype=object)


def scaled(value: fmpz, exp: int) -> arb:
    """value * 2^exp as a ball, exactly where it fits the precision."""
    return arb(value) * arb(2) ** exp


def rational(value: float) -> fmpq:
    """A finite float as the rational number that it is."""
    top, bottom = value.as_integer_ratio()
    return fmpq(top, bottom)


def fixed(tensor: Tensor, bits: int = BITS) -> Fixed:
    """A floating tensor as integers: exactly, but for entries more than `bits` below the largest (err = 1).

    Raises:
        ValueError: NaN or infinity.
    """
    values = tensor.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ValueError("expected finite numbers; got NaN or infinity")
    fractions, exponents = np.frexp(values)
    mantissas = np.ldexp(fractions, 53).astype(np.int64).reshape(-1)
    trailing = _trailing_zeros(mantissas)
    powers = exponents.astype(np.int64).reshape(-1) - 53 + trailing
    mantissas >>= trailing
    used = mantissas != 0
    if not used.any():
        return Fixed(zeros(values.shape), 0)
    top = int((exponents.reshape(-1)[used]).max())
    exp = max(int(powers[used].min()), top - bits)
    shifts = np.where(used, powers - exp, 0)
    err = fmpz(int(bool((shifts < 0).any())))
    if top - exp <= 62 and not err:
        return Fixed(integers([fmpz(v) for v in (mantissas << shifts).tolist()], values.shape), exp)
    pairs = zip(mantissas.tolist(), shifts.tolist(), strict=True)
    return Fixed(integers([fmpz(m << s if s >= 0 else m >> -s) for m, s in pairs], values.shape), exp, err)


def _trailing_zeros(mantissas: NDArray[np.int64]) -> NDArray[np.int64]:
    lowest = mantissas & -mantissas
    zeros_below: NDArray[np.int64] = np.frexp(np.maximum(lowest, 1).astype(np.float64))[1].astype(np.int64) - 1
    return zeros_below


def from_balls(balls: Sequence[arb], shape: tuple[int, ...], bits: int = BITS) -> Fixed:
    """Arb balls as one Fixed; ValueError where a ball is not finite."""
    if not all(ball.is_finite() for ball in balls):
        raise ValueError("expected finite numbers; got a ball without bound")
    exp = max((exponent_of(ball) for ball in balls), default=0) - bits
    mantissas = [_shifted(*ball.mid().man_exp(), exp) for ball in balls]
    radius = reduce(arb.max, (ball.rad() for ball in balls), arb(0))
    return Fixed(integers(mantissas, shape), exp, ceiling(radius * arb(2) ** -exp) + 1)


def _shifted(man: fmpz, power: fmpz, exp: int) -> fmpz:
    """man * 2^power in units of 2^exp, rounded down."""
    shift = int(power) - exp
    return man << shift if shift >= 0 else man >> -shift


def exponent_of(ball: arb) -> int:
    """An e with |ball| <= 2^e (0 for zero)."""
    upper = ball.abs_upper()
    if upper.is_zero():
        return 0
    man, exp = upper.man_exp()
    return int(abs(int(man)).bit_length() + int(exp)) + 1


def ceiling(ball: arb) -> fmpz:
    """The least integer that is surely not below the ball."""
    man, power = ball.upper().man_exp()
    return -_shifted(-man, power, 0)


def balls(tensor: Fixed) -> list[arb]:
    """Each entry as a ball, flat."""
    unit, radius = arb(2) ** tensor.exp, tensor.radius
    if tensor.err == 0:
        return [arb(v) * unit for v in tensor.mant.reshape(-1)]
    spread = arb(0, radius.abs_upper())
    return [arb(v) * unit + spread for v in tensor.mant.reshape(-1)]


def largest(values: Integers) -> fmpz:
    """max |value|, 0 for none."""
    flat = values.reshape(-1)
    return max(fmpz(flat.max()), -fmpz(flat.min())) if len(flat) else _ZERO


def trimmed(tensor: Fixed, bits: int = BITS, slack: int = _SLACK) -> Fixed:
    """The tensor with integers of at most `bits` bits, where they have more than `bits + slack`; outward."""
    excess = length(largest(tensor.mant)) - bits
    if excess <= slack:
        return tensor
    return Fixed(tensor.mant >> excess, tensor.exp + excess, (tensor.err >> excess) + 2)


def length(value: fmpz) -> int:
    """Bits of |value|."""
    return int(abs(int(value))).bit_length()


def aligned(*tensors: Fixed) -> list[Fixed]:
    """The tensors in the smallest of their units."""
    exp = min(tensor.exp for tensor in tensors)
    return [t if t.exp == exp else Fixed(t.mant << (t.exp - exp), exp, t.err << (t.exp - exp)) for t in tensors]


def plus(first: Fixed, second: Fixed, sign: int = 1) -> Fixed:
    """first + sign * second, broadcasting."""
    a, b = aligned(first, second)
    total = a.mant + b.mant if sign > 0 else a.mant - b.mant
    return trimmed(Fixed(total, a.exp, a.err + b.err))


def times(first: Fixed, second: Fixed) -> Fixed:
    """The entrywise product, broadcasting."""
    err = first.err * (largest(second.mant) + second.err) + second.err * largest(first.mant)
    return trimmed(Fixed(first.mant * second.mant, first.exp + second.exp, err))


def product(first: Fixed, second: Fixed) -> Fixed:
    """The matrix product [m, n] @ [n, k]."""
    (m, n), k = first.shape, second.shape[1]
    mant = integers((matrix(first.mant) * matrix(second.mant)).entries(), (m, k))
    err = _ZERO
    if first.err or second.err:
        rows = largest(abs(first.mant).sum(1)) if n else _ZERO
        columns = largest(abs(second.mant).sum(0)) if n else _ZERO
        err = second.err * rows + first.err * (columns + n * second.err)
    return trimmed(Fixed(mant, first.exp + second.exp, err))


def matrix(entries: Integers) -> fmpz_mat:
    """A two-axis array as a FLINT matrix."""
    rows, columns = entries.shape
    return fmpz_mat(rows, columns, entries.reshape(-1).tolist())


def euclidean(tensor: Fixed) -> list[arb]:
    """Upper bound of the l2 norm of each row of [B, ...]."""
    flat = tensor.mant.reshape(len(tensor.mant), -1)
    squares = (flat * flat).sum(1) if flat.shape[1] else np.full(len(flat), _ZERO, dtype=object)
    spread = tensor.radius * arb(flat.shape[1]).sqrt()
    unit = arb(2) ** tensor.exp
    return [arb(value).sqrt() * unit + spread for value in squares]


def absolute(tensor: Fixed) -> Fixed:
    """Upper bounds of the entries' absolute values, without error."""
    return Fixed(abs(tensor.mant) + tensor.err, tensor.exp)


def approximate(tensor: Fixed) -> NDArray[np.float64]:
    """The entries as float64, about: for guesses that a proof checks afterwards."""
    excess = max(0, length(largest(tensor.mant)) - 62)
    short = (tensor.mant >> excess) if excess else tensor.mant
    values = np.array([int(v) for v in short.reshape(-1)], dtype=np.float64)
    found: NDArray[np.float64] = np.ldexp(values, tensor.exp + excess).reshape(tensor.shape)
    return found

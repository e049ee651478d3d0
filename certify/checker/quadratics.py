"""The quadratic form whose sign proves a relaxation, in exact integers, rows and columns scaled by powers of two.

    F = Q - C^T C + sum over k of [xi_k^T D_k xi_k - 2 xi_k^T c D_k u_k + u_k^T a b D_k u_k],  u_k = sum of A_kl xi_l,

with c = (a + b) / 2. A bracket is minus the sum of d (xi - a u)(b u - xi), which is not negative for differences of
numbers with slopes in [a, b] and multipliers d >= 0. So where F >= 0, ||change of the end||^2 <= xi_0^T Q xi_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flint import arb, fmpz, fmpz_mat
from numpy.typing import NDArray

from .balls import Fixed, Integers, ceiling, integers, matrix, scaled
from .definite import UNIT, Place, Symmetric
from .parts import Layer, Part
from .slopes import GRID

_RANGE = 100  # powers of two that scales of one group may differ by

Powers = NDArray[np.int64]


class Dyadic:
    """Floats > 0 as mant * 2^exp, and for each x a power t with x 4^t between 1/2 and 2."""

    def __init__(self, values: Sequence[float]) -> None:
        fractions, powers = np.frexp(np.array(values, dtype=np.float64))
        whole = np.ldexp(fractions, 53).astype(np.int64).tolist()
        self.mant = integers([fmpz(value) for value in whole], (len(whole),))
        self.exp: Powers = powers.astype(np.int64) - 53
        scale: Powers = -(powers.astype(np.int64) // 2)
        self.scale: Powers = scale.clip(max=int(scale.min(initial=0)) + _RANGE)


class Quadratic:
    """F but for Q, with a row and column 2^t as large for each number.

    Args:
        part: of the network.
        multipliers: per layer, one for each of its conditions.
        pair: the two logits whose difference is the end; all of them where None.
        powers: t of the numbers at the start; those of the others follow from d.
    """

    def __init__(
        self, part: Part, multipliers: Sequence[Sequence[float]], pair: tuple[int, int] | None, powers: Powers
    ) -> None:
        self._sizes = part.sizes
        given = [
            Dyadic([row[i] for i in layer.conditions]) for layer, row in zip(part.layers, multipliers, strict=True)
        ]
        self._powers = [powers, *(one.scale for one in given)]
        self._blocks: dict[Place, fmpz_mat] = {}
        self._spread = [[fmpz(0)] * size for size in part.sizes]
        for k, (layer, held) in enumerate(zip(part.layers, given, strict=True), start=1):
            self._layer(k, layer, held)
        end = part.end if pair is None else {source: _difference(one, pair) for source, one in part.end.items()}
        self._squares(end, integers([fmpz(-1)] * len(next(iter(end.values())).mant), (-1,)), 0)

    def symmetric(self, first: fmpz_mat) -> Symmetric:
        """The matrix with Q as `first`, scaled, in units of 2^-112."""
        blocks = dict(self._blocks)
        blocks[0, 0] = blocks[0, 0] + first if (0, 0) in blocks else first
        return Symmetric(self._sizes, blocks, self._spread)

    def _layer(self, k: int, layer: Layer, held: Dyadic) -> None:
        self._put(k, k, diagonal(shifted(held.mant, held.exp + 2 * held.scale + 2 * UNIT)), 1)
        middle, bend = layer.low + layer.high, layer.low * layer.high  # c and a b, times 2^(GRID + 1) and 2^(2 GRID)
        exp = held.exp - GRID - 1
        for source, one in layer.rows.items():
            if middle:
                self._add(k, source, one.mant * (held.mant * fmpz(-middle))[:, None], exp[:, None] + one.exp)
            if middle and one.err:
                sizes = [scaled(abs(middle) * m, int(e)) for m, e in zip(held.mant, exp, strict=True)]
                self._err(k, source, sizes, [one.radius] * self._sizes[source])
        if bend:
            base = int(held.exp.min())
            lifts = integers([fmpz(bend) << int(e) - base for e in held.exp], (-1,))
            self._squares(layer.rows, held.mant * lifts, base - 2 * GRID)

    def _squares(self, rows: Mapping[int, Fixed], factor: Integers, exp: int) -> None:
        """Add u^T diag(factor 2^exp) u, u the sum of what the rows give."""
        for high, first in rows.items():
            for low, second in rows.items():
                if low <= high:
                    self._square(high, low, first, second, factor, exp)

    def _square(self, k: int, low: int, first: Fixed, second: Fixed, factor: Integers, exp: int) -> None:
        found = matrix(first.mant.T * factor[None, :]) * matrix(second.mant)
        power = first.exp + second.exp + exp
        self._add(k, low, integers(found.entries(), (self._sizes[k], self._sizes[low])), np.array([[power]]))
        if not (first.err or second.err):
            return
        weights = abs(factor)
        left, right = ((abs(one.mant) * weights[:, None]).sum(0) for one in (first, second))
        more = second.err * fmpz(weights.sum())
        self._err(k, low, [arb(1)] * len(left), [scaled(first.err * (value + more), power) for value in right])
        self._err(k, low, [scaled(second.err * value, power) for value in left], [arb(1)] * len(right))

    def _add(self, k: int, low: int, mant: Integers, exps: Powers) -> None:
        """Add entries mant * 2^exps to a block, scaled, and rounded down to the unit."""
        shifts = exps + self._powers[k][:, None] + self._powers[low][None, :] + 2 * UNIT
        rows, columns = mant.shape
        self._put(k, low, fmpz_mat(rows, columns, shifted(mant, shifts)), columns)
        if low < k:
            self._spread[low] = [total + rows for total in self._spread[low]]

    def _put(self, k: int, low: int, block: fmpz_mat, rounded: int) -> None:
        """Add a block, of which so many entries in a row are rounded."""
        self._blocks[k, low] = self._blocks[k, low] + block if (k, low) in self._blocks else block
        self._spread[k] = [total + rounded for total in self._spread[k]]

    def _err(self, k: int, low: int, rows: Sequence[arb], columns: Sequence[arb]) -> None:
        """Entry (i, j) of a block may be off by rows[i] * columns[j], before it is scaled."""
        high = [value * arb(2) ** int(t) for value, t in zip(rows, self._powers[k], strict=True)]
        wide = [value * arb(2) ** int(t) for value, t in zip(columns, self._powers[low], strict=True)]
        sides = [(k, high, wide)] if low == k else [(k, high, wide), (low, wide, high)]
        for group, own, others in sides:
            total = sum(others, arb(0)) * arb(2) ** (2 * UNIT)
            pairs = zip(self._spread[group], own, strict=True)
            self._spread[group] = [found + ceiling(value * total) for found, value in pairs]


def shifted(mant: Integers, shifts: Powers) -> list[fmpz]:
    """mant * 2^shifts, flat, rounded down."""
    pairs = zip(mant.reshape(-1).tolist(), shifts.reshape(-1).tolist(), strict=True)
    return [m << s if s >= 0 else m >> -s for m, s in pairs]


def diagonal(values: Sequence[fmpz]) -> fmpz_mat:
    """The matrix with these numbers on the diagonal."""
    found = fmpz_mat(len(values), len(values))
    for i, value in enumerate(values):
        found[i, i] = value
    return found


def _difference(rows: Fixed, pair: tuple[int, int]) -> Fixed:
    """The row of the difference of two."""
    return Fixed((rows.mant[pair[0]] - rows.mant[pair[1]])[None], rows.exp, 2 * rows.err)

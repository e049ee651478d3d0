"""A wide start replaced by a narrow one: only the rows that act on it matter.

With M all rows that act on xi_0, v = M xi_0 and G any matrix with M W M^T <= G G^T, W = diag(w) > 0, each v is G y with
||y||^2 <= xi_0^T W^-1 xi_0. What is proved for all y with the rows of G in place of those of M holds for all xi_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from flint import arb, fmpz, fmpz_mat

from .balls import Fixed, aligned, ceiling, exponent_of, integers, length, matrix, zeros
from .definite import UNIT, floats, whole
from .matrices import Refused
from .parts import Part
from .quadratics import Powers, shifted

_GAPS = tuple(2.0**-power for power in range(48, 20, -3))  # what G adds to the diagonal, relative to it
_RANGE = 20  # powers of two that scales of rows may differ by
_WEIGHT_BITS = 120  # of the largest weight
_MOST = 16.0  # of the scaled factor's entries


def narrowed(part: Part, weights: Sequence[float] | None) -> Part:
    """The part with y as its start; the part itself where that is no narrower.

    Args:
        part: of the network.
        weights: 1 / w per number of the start, > 0; ones where None.
    """
    rows = stacked(part)
    if rows is None or len(rows.mant) >= part.sizes[0]:
        return part
    return _with_start(part, _factor(rows, weights))


def selected(part: Part) -> tuple[Part, Fixed | None]:
    """The part with v as its start, and M; the part itself and None where v is no narrower."""
    rows = stacked(part)
    if rows is None or len(rows.mant) >= part.sizes[0]:
        return part, None
    unit = zeros((len(rows.mant), len(rows.mant)))
    unit[np.arange(len(unit)), np.arange(len(unit))] = fmpz(1)
    return _with_start(part, Fixed(unit, 0)), rows


def stacked(part: Part) -> Fixed | None:
    """All rows that act on the start, those of layers first; None where there are none."""
    found = [one[0] for one in (*(layer.rows for layer in part.layers), part.end) if 0 in one]
    if not found:
        return None
    parts = aligned(*found)
    return Fixed(np.concatenate([one.mant for one in parts]), parts[0].exp, max(one.err for one in parts))


def _with_start(part: Part, rows: Fixed) -> Part:
    """The part with these rows in the order of `stacked`."""
    position, layers = 0, []
    for layer in part.layers:
        if 0 in layer.rows:
            count = len(layer.rows[0].mant)
            own = rows.moved(rows.mant[position : position + count])
            layer, position = replace(layer, rows={**layer.rows, 0: own}), position + count
        layers.append(layer)
    end = {**part.end, 0: rows.moved(rows.mant[position:])} if 0 in part.end else part.end
    return replace(part, sizes=(rows.mant.shape[1], *part.sizes[1:]), layers=tuple(layers), end=end)


def _factor(rows: Fixed, weights: Sequence[float] | None) -> Fixed:
    """G, found with rows and columns scaled by powers of two."""
    gram, exp, spread = _gram(rows, weights)
    size = len(spread)
    lengths = np.array([length(gram[i, i]) for i in range(size)], dtype=np.int64)
    powers: Powers = -((lengths.clip(min=int(lengths.max()) - 2 * _RANGE) + exp) // 2)
    top = int(powers.max())
    shifts = powers[:, None] + powers[None, :] + exp + 2 * UNIT
    scaled = fmpz_mat(size, size, shifted(integers(gram.entries(), (size, size)), shifts))
    sums = [
        size + ceiling(value * arb(2) ** (exp + 2 * UNIT + top + int(t)))
        for value, t in zip(spread, powers, strict=True)
    ]
    for gap in _GAPS:
        found = _dominating(scaled, sums, gap)
        if found is not None:
            lifts = integers([fmpz(1) << top - int(t) for t in powers], (size, 1))
            return Fixed(integers(found.entries(), (size, size)) * lifts, -UNIT - top)
    raise Refused("the rows that act on the start have no factor that the checker can prove")


def _gram(rows: Fixed, weights: Sequence[float] | None) -> tuple[fmpz_mat, int, list[arb]]:
    """M W M^T in integers of a unit 2^exp, exp, and by how many units the sum of each true row may differ.

    W is rounded up, which only makes the ellipsoid larger.
    """
    count, width = rows.mant.shape
    exp, factor = 2 * rows.exp, integers([fmpz(1)] * width, (-1,))
    if weights is not None:
        inverse = [1 / arb(value) for value in weights]
        power = max(map(exponent_of, inverse)) - _WEIGHT_BITS
        factor = integers([ceiling(ball * arb(2) ** -power) for ball in inverse], (-1,))
        exp += power
    found = matrix(rows.mant * factor[None, :]) * matrix(rows.mant.T)
    sums = (abs(rows.mant) * factor[None, :]).sum(1)
    more = fmpz(sums.sum()) + count * rows.err * fmpz(factor.sum())
    return found, exp, [arb(rows.err * (count * own + more)) for own in sums]


def _dominating(gram: fmpz_mat, sums: Sequence[fmpz], gap: float) -> fmpz_mat | None:
    """A factor G for which G G^T - gram is diagonally dominant, by more than the sums given."""
    size = len(sums)
    guess = floats(gram)
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy((guess + guess.T) / 2 + gap * np.eye(size)))
    if int(info) != 0 or not bool((factor.abs() < _MOST).all()):
        return None
    found = whole(factor.numpy())
    rest = found * found.transpose() - gram
    entries = list(map(abs, rest.entries()))
    for i in range(size):
        others = sum(entries[i * size : (i + 1) * size], fmpz(0)) - entries[i * size + i]
        if rest[i, i] < others + sums[i]:
            return None
    return found

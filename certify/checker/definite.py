"""Exact proof that a symmetric matrix in blocks is positive semidefinite.

As in `norms`: with R any upper triangular matrix, from a floating-point factorisation that starts at the last block,
the residual F - R^T R is taken exactly in integers, and F is positive semidefinite where each diagonal entry of the
residual is at least the sum of the others in its row, with what the entries' errors can add (Gershgorin).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flint import fmpz, fmpz_mat
from numpy.typing import NDArray

UNIT = 56  # a factor's entries are multiples of 2^-56, those of the matrix of 2^-112
_NOISE = 2.0**-51  # of a factor found in float64, per row of the matrix, about
_MARGINS = (64.0, 8.0, 1.0, 2.0**-3, 2.0**-6)  # what the factor leaves to the residual, in units of what that needs
_LEAST = 2.0**-44  # the same where only an estimate is wanted
_LARGEST = 2.0**5  # of a factor's entries, so that they fit a word

Array = NDArray[np.float64]
Place = tuple[int, int]


@dataclass(frozen=True)
class Symmetric:
    """A symmetric matrix whose diagonal is about 1.

    Attributes:
        sizes: of the groups that rows and columns fall into.
        blocks: (k, l) with k >= l, in units of 2^-112; zero where there is none.
        spread: per group and row, by how many units the sum of absolute values of the true row may differ.
    """

    sizes: tuple[int, ...]
    blocks: Mapping[Place, fmpz_mat]
    spread: Sequence[Sequence[fmpz]]

    def guess(self) -> dict[Place, Array]:
        """The blocks as floats, about."""
        return {place: floats(block) for place, block in self.blocks.items()}


def floats(block: fmpz_mat) -> Array:
    """A block as floats, about."""
    values = [float(int(value)) if value else 0.0 for value in block.entries()]
    found: Array = np.ldexp(np.array(values, dtype=np.float64), -2 * UNIT)
    return found.reshape(int(block.nrows()), int(block.ncols()))


def semidefinite(matrix: Symmetric) -> bool:
    """Whether the matrix is proved to be positive semidefinite."""
    guess = matrix.guess()
    spread = max((float(int(units)) for rows in matrix.spread for units in rows), default=0.0)
    needed = spread * 2.0 ** (-2 * UNIT) + sum(matrix.sizes) * _NOISE
    for margin in _MARGINS:
        factor = _factored(guess, matrix.sizes, margin * needed)
        if factor is not None:
            return _dominant(matrix, {place: whole(block) for place, block in factor.items()})
    return False


def _factored(guess: Mapping[Place, Array], sizes: Sequence[int], margin: float) -> dict[Place, Array] | None:
    """R with guess - margin I = R^T R about, R_mk upper triangular for m = k."""
    found = _eliminated(guess, sizes, margin, 0)
    if found is None or not all(bool((np.abs(block) <= _LARGEST).all()) for block in found[0].values()):
        return None
    return found[0]


def least_first(matrix: Symmetric) -> Array | None:
    """About the least block that must be added to the first group's to make the matrix positive semidefinite."""
    found, size = _eliminated(matrix.guess(), matrix.sizes, _LEAST, 1), matrix.sizes[0]
    return None if found is None else -found[1].get((0, 0), np.zeros((size, size)))


@np.errstate(all="ignore")  # what overflows gives no factor, or one that proves nothing
def _eliminated(
    guess: Mapping[Place, Array], sizes: Sequence[int], margin: float, first: int
) -> tuple[dict[Place, Array], dict[Place, Array]] | None:
    """The factor's rows from the last group to `first`, and what is left of the blocks."""
    left, factor = dict(guess), dict[Place, Array]()
    for m in reversed(range(first, len(sizes))):
        root = _root(left.get((m, m), np.zeros((sizes[m], sizes[m]))) - margin * np.eye(sizes[m]))
        if root is None:
            return None
        factor[m, m] = root.numpy()
        for k in range(m):
            if (m, k) in left:
                solved = torch.linalg.solve_triangular(root.T, torch.from_numpy(left[m, k]), upper=False)
                factor[m, k] = solved.numpy()
        _eliminate(left, factor, m)
    return factor, left


def _root(block: Array) -> torch.Tensor | None:
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy((block + block.T) / 2), upper=True)
    return factor if int(info) == 0 and bool(torch.isfinite(factor).all()) else None


def _eliminate(left: dict[Place, Array], factor: Mapping[Place, Array], m: int) -> None:
    """Take R_m^T R_m off the groups before m."""
    used = [k for k in range(m) if (m, k) in factor]
    for k in used:
        for low in used:
            if low <= k:
                change = factor[m, k].T @ factor[m, low]
                left[k, low] = left[k, low] - change if (k, low) in left else -change


def whole(block: Array) -> fmpz_mat:
    """A block in units of 2^-56, rounded; entries below 2^7."""
    rows, columns = block.shape
    return fmpz_mat(rows, columns, np.rint(np.ldexp(block, UNIT)).astype(np.int64).reshape(-1).tolist())


def _dominant(matrix: Symmetric, factor: Mapping[Place, fmpz_mat]) -> bool:
    """Whether matrix - R^T R is diagonally dominant, which makes it positive semidefinite."""
    sums = [list(map(fmpz, rows)) for rows in matrix.spread]
    diagonals = []
    transposed = {place: block.transpose() for place, block in factor.items()}
    for k, size in enumerate(matrix.sizes):
        for low in range(k + 1):
            residual = _residual(matrix, factor, transposed, k, low)
            if residual is None:
                continue
            entries, width = list(map(abs, residual.entries())), matrix.sizes[low]
            _add_rows(sums[k], entries, width)
            if low < k:
                _add_columns(sums[low], entries, width)
            else:
                own = [residual[i, i] for i in range(size)]
                sums[k] = [total - abs(value) for total, value in zip(sums[k], own, strict=True)]
                diagonals.append(own)
    groups = zip(diagonals, sums, strict=True)
    return all(value >= total for own, rows in groups for value, total in zip(own, rows, strict=True))


def _residual(
    matrix: Symmetric, factor: Mapping[Place, fmpz_mat], transposed: Mapping[Place, fmpz_mat], k: int, low: int
) -> fmpz_mat | None:
    found = matrix.blocks.get((k, low))
    for m in range(k, len(matrix.sizes)):
        if (m, k) in factor and (m, low) in factor:
            change = transposed[m, k] * factor[m, low]
            found = -change if found is None else found - change
    return found


def _add_rows(sums: list[fmpz], entries: list[fmpz], width: int) -> None:
    for row in range(len(sums)):
        sums[row] += sum(entries[row * width : (row + 1) * width], fmpz(0))


def _add_columns(sums: list[fmpz], entries: list[fmpz], width: int) -> None:
    for column in range(width):
        sums[column] += sum(entries[column::width], fmpz(0))

"""The linear maps of a `Form` as bounds over balls use them: batched, with bounds of their rounding and row norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .convolution import Convolution, Transposed
from .linear import Chain, Concat, Dense, Diagonal, LinearMap, Reindex, Sum, converted, float64
from .neurons import Term
from .rounding import (
    covering,
    gamma,
    norm_up,
    proved_norm,
    sum_up,
    up,
    up_add,
    up_mul,
    up_sqrt,
)

_HELD = 1 << 21  # entries of a matrix that is multiplied out
_SPARSE = 6  # a map of so many times fewer products than its matrix is faster
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Edge:
    """A linear map A from one group's numbers.

    Attributes:
        source: the group.
        linear: the map where it is faster than its matrix.
        matrix: [out, in] the same as a matrix, where it is small; None with `linear` None is the identity.
        sizes: (in, out).
        error: a product with A or its transpose errs by at most this times the argument's norm, and by `lost` (l2).
        lost: see `error`.
        rows: [out] upper bounds of the rows' norms: the dual of the ball's for group 0, else l2.
        norm: upper bound of the norm to l2, from the ball's for group 0, else from l2.
        absolute: the map of absolute entries along every path, where `matrix` is None and it is known.
        deviation: at least ||A - what the tensors hold|| in l2.
    """

    source: int
    linear: LinearMap | None
    matrix: Tensor | None
    sizes: tuple[int, int]
    error: float
    lost: float
    rows: Tensor
    norm: float
    absolute: LinearMap | None = None
    deviation: float = 0.0

    def down(self, functionals: Tensor) -> Tensor:  # [T, out] -> [T, in]
        """A^T m, m along the rows."""
        if self.linear is None:
            return functionals if self.matrix is None else functionals @ self.matrix
        return self.linear.adjoint(functionals.reshape(-1, *self.linear.out_shape)).flatten(1)

    def unit_rows(self, positions: Tensor) -> Tensor:  # [T] -> [T, in]
        """Rows of A."""
        if self.matrix is not None:
            return self.matrix[positions]
        units = torch.zeros(len(positions), self.sizes[1], dtype=torch.float64)
        return self.down(units.scatter_(1, positions[:, None], 1.0))

    def up(self, numbers: Tensor) -> Tensor:  # [B, in] -> [B, out]
        """A d, d along the rows."""
        if self.matrix is not None:
            return numbers @ self.matrix.T
        if self.linear is None:
            return numbers
        return self.linear.apply(numbers.reshape(-1, *self.linear.in_shape)).flatten(1)

    def reach(self, sizes: Tensor) -> Tensor | None:  # [B, in] >= 0 -> [B, out]
        """Upper bounds of |A d| for all |d| <= sizes; None where |A| is not known."""
        if self.matrix is not None:
            found = sizes @ self.matrix.abs().T
        elif self.linear is None:
            return sizes
        elif self.absolute is not None:
            found = self.absolute.apply(sizes.reshape(-1, *self.absolute.in_shape)).flatten(1)
        else:
            return None
        length = norm_up(sizes, 1)[:, None]
        return found * (1 + 2 * gamma(sum(self.sizes) + 8)) + length * self.deviation + self.lost


def edge(
    term: Term,
    size: int,  # of the source
    norm: str,
) -> Edge:
    """The edge of a term; `norm` is that of the ball for group 0, which decides the norms of rows."""
    norm = norm if term.source == 0 else "l2"
    if term.operator is None:
        ones = torch.ones(size, dtype=torch.float64)
        return Edge(term.source, None, None, (size, size), 0.0, 0.0, ones, _to_l2(1.0, size, norm))
    linear = float64(term.operator)
    sizes = math.prod(linear.in_shape), math.prod(linear.out_shape)
    if held(linear):
        return _held(term.source, linear, sizes, norm)
    found = Edge(
        *(term.source, linear, None, sizes, _error(linear), linear.underflow("l2")),
        rows=torch.zeros(0),
        norm=_to_l2(linear.bounds("l2").upper, sizes[0], norm),
        absolute=_absolute(linear),
        deviation=linear.deviation("l2"),
    )
    return replace(found, rows=_rows(found, linear, norm))


def held(linear: LinearMap) -> bool:
    """Whether its edge holds a matrix."""
    entries = math.prod(linear.in_shape) * math.prod(linear.out_shape)
    return entries <= _HELD or isinstance(linear, Dense)


def _held(source: int, linear: LinearMap, sizes: tuple[int, int], norm: str) -> Edge:
    units = torch.eye(min(sizes), dtype=torch.float64)
    if isinstance(linear, Dense) and len(linear.in_shape) == 1:
        matrix = linear.weight
    elif sizes[0] > sizes[1]:
        matrix = linear.adjoint(units.reshape(-1, *linear.out_shape)).flatten(1)
    else:
        matrix = linear.apply(units.reshape(-1, *linear.in_shape)).flatten(1).T.contiguous()
    found = _of_matrix(source, matrix, linear.matrix_error("l2"), linear.matrix_error(norm), norm)
    if linear.terms * _SPARSE > sizes[0]:
        return found
    return replace(
        found, linear=linear, error=max(found.error, _error(linear)), lost=found.lost + linear.underflow("l2")
    )


def _error(linear: LinearMap) -> float:
    rounding = up_mul(gamma(max(linear.terms, linear.adjoint_terms)), linear.absolute("l2"))
    return up_add(rounding, linear.deviation("l2"))


def _of_matrix(source: int, matrix: Tensor, deviation: float, row_error: float, norm: str) -> Edge:
    sizes = (matrix.shape[1], matrix.shape[0])
    rounding = up_mul(gamma(max(sizes)), _absolute_norm(matrix))
    lost = up_mul(float(max(sizes)), float(sum(sizes)), 2 * _TINY)
    rows = up(_dual_norms(matrix, norm) + row_error)
    # from l1: a vertex of the ball is stretched most
    whole = float(norm_up(matrix, 0).max()) if norm == "l1" else _to_l2(proved_norm(matrix).upper, sizes[0], norm)
    whole = up_add(whole, _to_l2(deviation, sizes[0], norm))
    return Edge(source, None, matrix, sizes, up_add(rounding, deviation), lost, rows, whole, deviation=deviation)


def _to_l2(constant: float, size: int, norm: str) -> float:
    """The constant from a ball in `norm`, of one that is from l2."""
    return up_mul(constant, up_sqrt(float(size))) if norm == "linf" else constant


def _absolute_norm(matrix: Tensor) -> float:
    """At least the l2 norm of |matrix|."""
    return up_sqrt(up_mul(float(sum_up(matrix, 0).max()), float(sum_up(matrix, 1).max())))


def _dual_norms(rows: Tensor, norm: str) -> Tensor:
    """Upper bounds of the norms of rows that are dual to `norm`."""
    if norm == "l1":
        return rows.abs().amax(1)
    return norm_up(rows, 1) if norm == "l2" else sum_up(rows, 1)


def _rows(found: Edge, linear: LinearMap, norm: str) -> Tensor:
    """Row norms without the rows, whose number makes them too slow: the least of what bounds them.

    |(A d)_i| <= ||A d||; with |A| known, <= (|A| 1)_i in every ball, which in linf is the norm itself. The rows of a
    zero-padded convolution hold different taps: (sum of w^2)^(1/2), or in l1 the largest |w|.
    """
    rows = torch.full((found.sizes[1],), found.norm, dtype=torch.float64)
    sums = found.reach(torch.ones(1, found.sizes[0], dtype=torch.float64))
    if sums is not None:
        rows = torch.fmin(rows, up(sums[0]))
    if norm == "linf" or not isinstance(linear, Convolution) or linear.padding_mode != "zeros":
        return rows
    if norm == "l1":
        taps = linear.weight.abs().flatten(1).amax(1)
        own = taps.repeat_interleave(math.prod(linear.out_shape[1:]))
    else:
        ones = torch.ones(1, *linear.in_shape, dtype=torch.float64)
        squares = replace(linear, weight=linear.weight.square(), slack=0.0).apply(ones).flatten()
        own = squares.sqrt() * (1 + 2 * gamma(linear.terms + 8)) + up_sqrt(float(linear.terms)) * 2.0**-510
    return torch.fmin(rows, up(own + linear.deviation(norm)))


def _absolute(linear: LinearMap) -> LinearMap | None:
    """The map of absolute entries, path by path; None for maps of unknown structure."""
    if isinstance(linear, (Chain, Sum, Concat)):
        if any(_absolute(part) is None for part in linear.maps):
            return None
    elif not isinstance(linear, (Dense, Diagonal, Convolution, Transposed, Reindex)):
        return None
    return converted(linear, torch.abs)


def reduced(edges: Sequence[Edge]) -> list[Edge]:
    """In l2: the same maps from fewer numbers than the start has, where all of them give fewer.

    With M the rows of all of them M d, ||d|| <= r, is R d' for a ||d'|| <= r, see `rounding.covering`.
    """
    matrices = [one.matrix for one in edges if one.matrix is not None]
    if len(matrices) < len(edges) or not edges:
        return list(edges)
    joined = torch.cat(matrices)
    if joined.shape[0] >= joined.shape[1]:
        return list(edges)
    factor = covering(joined, up_mul(up_sqrt(float(len(edges))), max(one.deviation for one in edges)))
    if factor is None:
        return list(edges)
    parts = torch.split(factor, [one.sizes[1] for one in edges])
    return [_of_matrix(0, part.contiguous(), 0.0, 0.0, "l2") for part in parts]

"""A primal-dual interior-point method for LipSDP, whose steps take O(N^3) for N numbers.

The program is that of `semidefinite`, in its dual form. Directions are those of Helmberg, Rendl, Vanderbei and
Wolkowicz (HKM) with Mehrotra's corrector, as in Borchers, "CSDP" (1999), and the steps' matrix tr(A_i X A_j Z^-1) needs
no more than X and Z^-1 between the p and q, since each A_i has rank 2. General solvers do not see this and need O(N^4)
to O(N^6). Z stays positive definite, so that every iterate is a proposal; what it proves is for `inequality.prove`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .neurons import Neurons
from .semidefinite import System

_MOST_STEPS = 100
_NEAR = 0.95  # share of the way to the boundary
_SHORTER = 0.87
_SHORTEST = 1e-5
_SMALL_RESIDUAL = 1e-6


@dataclass(eq=False)
class _Point:
    x: Tensor  # [N, N] primal matrix
    slack: Tensor  # primal numbers of y >= 0
    y: Tensor
    z: Tensor  # F(y)

    def gap(self) -> float:
        """<X, Z> + slack . y."""
        return float((self.x * self.z).sum()) + float(self.slack @ self.y)

    def moved(self, by: _Point, primal: float, dual: float) -> _Point:
        """One step of given lengths."""
        return _Point(
            self.x + primal * by.x, self.slack + primal * by.slack, self.y + dual * by.y, self.z + dual * by.z
        )


def minimise(
    net: Neurons,
    start: Sequence[Tensor],
    norm: str,
    deadline: float,
    tolerance: float = 1e-9,
) -> tuple[Tensor, list[Tensor]]:
    """Weights and multipliers that minimise the sum of the weights, to `tolerance` relative unless time runs out.

    Args:
        net: the network; all numbers of moderate size.
        start: multipliers for which F >= 0 for some weights.
        norm: "l2", one weight, or "linf", one for each number of the start.
        deadline: `time.monotonic()` at which to stop with what there is.
        tolerance: between the sum of the weights and the primal objective.

    Raises:
        ValueError: multipliers for which no weights are enough.
    """
    size = net.sizes[0]
    tied = torch.arange(size) if norm == "linf" else torch.zeros(size, dtype=torch.int64)
    scale = inside(net, start, tied)
    system = System(net, tied, scale)
    y = _Method(system, scale[: system.weights] / scale[: system.weights].sum()).run(deadline, tolerance) * scale
    return y[: system.weights], list(torch.split(y[system.weights :], [layer.multipliers for layer in net.layers]))


def inside(net: Neurons, multipliers: Sequence[Tensor], tied: Tensor) -> Tensor:
    """Equal weights, twice what makes F > 0 but for a power of two, and the multipliers.

    Raises:
        ValueError: multipliers for which no weights are enough.
    """
    count = int(tied.max()) + 1
    y = torch.cat([torch.ones(count, dtype=torch.float64), *multipliers])
    system = System(net, tied, torch.ones_like(y))
    y[:count] = max(float(system.end.diagonal().sum()) * 1e-6, 1e-200)
    while _factor(system.matrix(y)) is None:
        y[:count] *= 2
        if not float(y[0]) < 1e200:
            raise ValueError(
                "multipliers: expected some for which the inequality holds; no weights of the start are enough"
            )
    y[:count] *= 2
    return y


class _Method:
    def __init__(self, system: System, objective: Tensor) -> None:
        self._system = system
        self._wanted = torch.zeros(system.count, dtype=torch.float64)  # b: minimise -b . y
        self._wanted[: system.weights] = -objective

    def run(self, deadline: float, tolerance: float) -> Tensor:
        """The last y; each has F(y) > 0, and y = 1 is the first."""
        point = self._first()
        for _ in range(_MOST_STEPS):
            upper, lower = -float(self._wanted @ point.y), float((self._system.end * point.x).sum())
            residual = float(self._residual(point).abs().max())
            close = residual < _SMALL_RESIDUAL and upper - lower <= tolerance * upper
            if close or time.monotonic() > deadline:
                break
            after = self._step(point)
            if after is None:
                break
            point = after
        return point.y

    def _first(self) -> _Point:
        system = self._system
        y = torch.ones(system.count, dtype=torch.float64)
        z = system.matrix(y)
        factor = _factor(z)
        assert factor is not None
        inverse = torch.cholesky_inverse(factor)
        mean = 1 / float(inverse.diagonal()[system.start].sum())
        return _Point(mean * inverse, mean / y, y, z)

    def _residual(self, point: _Point) -> Tensor:
        return self._wanted - self._system.products(point.x) + point.slack

    def _step(self, point: _Point) -> _Point | None:
        """None where rounding leaves no direction in which to go."""
        system, total = self._system, self._system.size + self._system.count
        factor = _factor(point.z)
        if factor is None:
            return None
        inverse = torch.cholesky_inverse(factor)
        matrix = system.steps_matrix(point.x, inverse)
        matrix.diagonal().add_(point.slack / point.y)
        solver = _Equations(matrix)
        if not solver.fine:
            return None
        none = _Point(torch.zeros_like(point.x), torch.zeros_like(point.y), point.y, point.z)
        guess = self._direction(point, inverse, solver, 0.0, none)
        ends = point.moved(guess, *_lengths(point, guess))
        before = point.gap() / total
        centring = min(1.0, max(ends.gap() / total / before, 1e-3) ** 2)
        product = guess.x @ guess.z @ inverse
        corrector = _Point((product + product.T) / 2, guess.slack * guess.y / point.y, point.y, point.z)
        chosen = self._direction(point, inverse, solver, centring * before, corrector)
        primal, dual = _lengths(point, chosen)
        if max(primal, dual) < _SHORTEST or not math.isfinite(float(chosen.y.sum())):
            return None
        after = point.moved(chosen, primal, dual)
        after.z = system.matrix(after.y)
        return after if _factor(after.z) is not None else None

    def _direction(self, point: _Point, inverse: Tensor, solver: _Equations, mean: float, corrector: _Point) -> _Point:
        """Towards X Z = mean I: X + dX = mean Z^-1 + sym(X sum(dy_i A_i) Z^-1) - corrector, feasible in the primal."""
        slack = mean / point.y - corrector.slack
        dy = solver.solve(self._wanted - self._system.products(mean * inverse - corrector.x) + slack)
        change = self._system.combined(dy)
        product = point.x @ change @ inverse
        dx = mean * inverse - point.x + (product + product.T) / 2 - corrector.x
        return _Point(dx, slack - point.slack - point.slack * dy / point.y, dy, -change)


class _Equations:
    """A positive definite system, scaled to a diagonal of ones, with one step of refinement."""

    def __init__(self, matrix: Tensor) -> None:
        self._scale = matrix.diagonal().rsqrt()
        self._matrix = matrix * self._scale[:, None] * self._scale
        shift = 1e-15 * torch.eye(len(matrix), dtype=torch.float64)
        self._factor = _factor(self._matrix + shift)
        self.fine = self._factor is not None

    def solve(self, right: Tensor) -> Tensor:
        assert self._factor is not None
        right = (right * self._scale)[:, None]
        found = torch.cholesky_solve(right, self._factor)
        found += torch.cholesky_solve(right - self._matrix @ found, self._factor)
        return found[:, 0] * self._scale


def _factor(matrix: Tensor) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor if int(failed) == 0 and math.isfinite(float(factor.diagonal().sum())) else None


def _lengths(point: _Point, by: _Point) -> tuple[float, float]:
    """How far to go in the primal and in the dual."""
    return _length(point.x, by.x, point.slack, by.slack), _length(point.z, by.z, point.y, by.y)


def _length(matrix: Tensor, change: Tensor, values: Tensor, changes: Tensor) -> float:
    falling = changes < 0
    longest = float((-values[falling] / changes[falling]).min()) if bool(falling.any()) else math.inf
    length = min(1.0, _NEAR * longest)
    while length > _SHORTEST / 2 and _factor(matrix + length / _NEAR * change) is None:
        length *= _SHORTER
    return length

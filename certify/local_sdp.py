"""Lipschitz constants from a centre over a ball by a semidefinite inequality with the slopes of that ball.

Over the ball each activation is d_i = a_i t_i + e_i with |e_i| <= h_i |t_i| (`local_slopes.Lines.cone`), h_i = 0
wherever its slope is fixed. All numbers are then linear in the start's y and the e of the other neurons: t = T (y, e),
and a margin changes by g . (y, e). For multipliers m_i > 0, if for all vectors

    c ||y||^2 + sum m_i e_i^2 - sum m_i h_i^2 (T (y, e))_i^2 - (g . (y, e))^2 >= 0,

then |g . (y, e)| <= sqrt(c) ||y|| from the centre: LipSDP (Fazlyab et al. 2019) with the slopes of secants from the
centre, where they are narrowest, and without the neurons that the ball fixes.

The inequality is proved by `rounding.proved_below`, after scaling by powers of two: T and g, products of the network's
matrices, come with bounds of every column's error, and so does their Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .edges import Edge
from .preactivations import Enclosure, Region
from .rounding import UNIT, cholesky_factor, gamma, inverse_roots, proved_below, up_sqrt

_SIDE = 768  # most numbers of the start and loose neurons
_STEPS = (4, 3)  # of the multipliers, from nothing and from those of another ball
_VECTORS, _ITERATIONS = 4, 40  # of the search for the largest eigenvalue
_DAMPING = 0.5
_WIDE = 1 + 2.0**-30  # covers the rounding of error bounds themselves
_RAISED = (1e-5, 1e-3, 3e-2)  # by how much the estimate of c is raised until the proof succeeds


def suits(enclosure: Enclosure) -> bool:
    """Whether the network's edges are matrices, its numbers not tied and its balls of l2."""
    edges = [one for group in (*enclosure.layers, enclosure.end) for one in group]
    plain = all(one.matrix is not None or one.linear is None for one in edges)
    return plain and enclosure.norm == "l2" and enclosure.start < _SIDE and not enclosure.tied


@dataclass(frozen=True, eq=False)
class Quadratic:
    """One sample's ball, with columns for y and for the e of every loose neuron.

    Attributes:
        sizes: how many columns are those of y, and of the e of each activation.
        rows: [U, start + U] T of the loose neurons.
        row_errors: [U, start + U] bounds of the column norms of the errors of T over the neurons of one activation.
        widths: [U] h.
        end: [K, start + U] the changes of the end.
        end_errors: [start + U] bounds of the column norms of its errors.
        neurons: [U] positions of the loose neurons among all.
    """

    sizes: tuple[int, ...]
    rows: Tensor
    row_errors: Tensor
    widths: Tensor
    end: Tensor
    end_errors: Tensor
    neurons: Tensor

    @classmethod
    def of(cls, enclosure: Enclosure, found: Region, sample: int) -> Quadratic | None:
        """None where there are too many numbers."""
        cones = [tuple(part[sample] for part in drawn.cone) for drawn in found.lines]
        loose = [(width > 0).nonzero()[:, 0] for _, width in cones]
        start = enclosure.start
        side = start + sum(len(part) for part in loose)
        if side > _SIDE or not all(bool(torch.isfinite(torch.cat(cone)).all()) for cone in cones):
            return None
        maps = [(torch.eye(start, side, dtype=torch.float64), torch.zeros(side, dtype=torch.float64))]
        rows, errors, first = [], [], start
        for edges, (slopes, _), part in zip(enclosure.layers, cones, loose, strict=True):
            t, error = _image(edges, maps)
            rows.append(t[part])
            errors.append(error.expand(len(part), -1))
            d = slopes[:, None] * t
            error = (error * slopes.abs().max() + 2 * UNIT * _columns(d)) * _WIDE
            d[part, first + torch.arange(len(part))] += 1.0  # exact: these columns are still empty
            maps.append((d, error))
            first += len(part)
        end, end_error = _image(enclosure.end, maps)
        offsets = torch.tensor([0, *enclosure.sizes[1:]]).cumsum(0).tolist()
        return cls(
            (start, *(len(part) for part in loose)),
            torch.cat(rows),
            torch.cat(errors),
            torch.cat([widths[part] for (_, widths), part in zip(cones, loose, strict=True)]),
            end,
            end_error,
            torch.cat([part + offset for part, offset in zip(loose, offsets, strict=False)]),
        )

    def constant(self, first: int, second: int, warm: Tensor | None = None) -> tuple[float, Tensor | None]:
        """A proved constant of the difference of two numbers of the end, inf where there is none, and the multipliers.

        Args:
            first: number of the end.
            second: the other.
            warm: multipliers of all neurons to start from, NaN where none is known.
        """
        g = self.end[first] - self.end[second]
        if not bool(g.any()):
            return math.inf, None
        scaled = self.widths[:, None] * self.rows
        value, multipliers = _descended(self.sizes, scaled, g, None if warm is None else warm[self.neurons])
        for raised in _RAISED:
            if value < math.inf and self._proved(g, multipliers, value * (1 + raised)):
                return up_sqrt(value * (1 + raised)), multipliers
        return math.inf, None

    def _proved(self, g: Tensor, multipliers: Tensor, value: float) -> bool:
        """Whether the inequality holds for c = value."""
        diagonal = torch.cat([torch.full((self.sizes[0],), value, dtype=torch.float64), multipliers])
        scales = inverse_roots(diagonal)
        diagonal = diagonal * scales * scales
        roots = multipliers.sqrt() * self.widths * (1 + 2.0**-50)
        stacked = torch.cat([roots[:, None] * self.rows, g[None]]) * scales
        if not bool(torch.isfinite(stacked).all()) or float(scales.max()) > 2.0**100 or float(scales.min()) < 2.0**-100:
            return False
        size = float(torch.linalg.vector_norm(stacked)) * _WIDE
        # columns of one activation's errors, times its largest root: once a row counts more than enough
        missed = torch.linalg.vector_norm(roots[:, None] * self.row_errors * scales)
        ends = torch.linalg.vector_norm((1.5 * self.end_errors + 2 * UNIT * g.abs()) * scales)
        missed = float(missed + ends) * _WIDE + 4 * UNIT * size
        error = 2 * size * missed + missed * missed + gamma(len(stacked) + 8) * size * size
        error = (error + 4 * UNIT * float(diagonal.max())) * _WIDE + 2.0**-400
        gram = stacked.T @ stacked
        gram.diagonal().sub_(diagonal)
        level = -(error + 2 * cholesky_factor(len(gram), torch.float64) * float(diagonal.sum()))
        return float(proved_below(gram, level)) <= -error


def _image(edges: list[Edge], maps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A d summed over the edges, and bounds of its columns' errors."""
    total, missed = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one in edges:
        d, error = maps[one.source]
        image = d if one.matrix is None else one.matrix @ d
        total = total + image
        missed = missed + one.error * (_columns(d) + error) + one.norm * error + one.lost + 2 * UNIT * _columns(total)
    return total, missed * _WIDE


def _columns(matrix: Tensor) -> Tensor:
    """Upper bounds of the columns' norms."""
    found: Tensor = torch.linalg.vector_norm(matrix, dim=0) * _WIDE + 2.0**-500
    return found


def _descended(sizes: Sequence[int], scaled: Tensor, g: Tensor, warm: Tensor | None) -> tuple[float, Tensor]:
    """The least c found, an estimate, and its multipliers.

    At the best multipliers the maximising (y, e) has |e_i| = h_i |t_i|, and a multiplier that is too small lets |e_i|
    be larger: each is multiplied by a power of that quotient.
    """
    start = sizes[0]
    basis = torch.randn(start, min(start, _VECTORS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([g[:start, None], basis[:, 1:] * (g.norm() / start)], 1))[0]
    y = basis[:, 0]
    multipliers = _first(sizes, scaled, g, y) if warm is None or bool(warm.isnan().any()) else warm
    if warm is not None:
        multipliers = torch.where(warm.isnan(), multipliers, warm)
    best, kept, quotient, damping = math.inf, multipliers, torch.ones_like(multipliers), _DAMPING
    for _ in range(_STEPS[warm is not None]):
        found = _maximised(start, scaled, g, multipliers, basis)
        if found is not None and found[0] < best:
            (best, basis, e), kept = found, multipliers
            t = (scaled @ torch.cat([basis[:, -1], e])).abs()
            quotient = (e.abs() / t.clamp_min(1e-300)).clamp(0.25, 4.0)
        elif best < math.inf:
            damping /= 3  # too far from the best
        else:
            multipliers = _first(sizes, scaled, g, y)
            continue
        multipliers = kept * quotient**damping
    return best, kept


def _first(sizes: Sequence[int], scaled: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """Multipliers for which there is a maximum, chosen from the last activation to the first.

    With Q the quadratic form that is left of later ones, m_i w_i = sum_j |Q_ij| w_j + |Q_iy y| for any weights w > 0
    makes diag(m) - Q diagonally dominant; for w_i near the |e_i| of the maximum it is near the condition for that.
    """
    start = sizes[0]
    reach = (scaled[:, :start] @ y).abs() * 0.65 + scaled.norm(dim=1) * 0.35
    reach = reach.clamp_min(1e-3 * float(reach.mean()) + 1e-200) if len(reach) else reach
    left, floor = g[:, None] * g, 1e-8 * float(g.square().sum()) / max(len(reach), 1)
    found: list[Tensor] = []
    for size in reversed(sizes[1:]):
        inner = len(left) - size
        own, across, weights = left[inner:, inner:], left[inner:, :inner], reach[inner - start : inner - start + size]
        around = own.abs() @ weights
        chosen = (1.1 * around + (across[:, :start] @ y).abs()) / weights
        chosen = torch.maximum(chosen, floor / weights.square())
        factor, _ = torch.linalg.cholesky_ex(torch.diag(chosen) - own)
        solved = torch.linalg.solve_triangular(factor, across, upper=False)
        rows = chosen.sqrt()[:, None] * scaled[inner - start : inner - start + size, :inner]
        left = left[:inner, :inner] + solved.T @ solved + rows.T @ rows
        found.append(chosen)
    return torch.cat(found[::-1])


def _maximised(
    start: int, scaled: Tensor, g: Tensor, multipliers: Tensor, basis: Tensor
) -> tuple[float, Tensor, Tensor] | None:
    """The largest of (g . v)^2 + sum m (h^2 t^2 - e^2) over ||y|| = 1 by subspace iteration from `basis` [start, b].

    An estimate from below, the Ritz vectors (that of the largest last) and the e of the largest.
    """
    stacked = torch.cat([multipliers.sqrt()[:, None] * scaled, g[None]])
    gram = stacked.T @ stacked
    factor, failed = torch.linalg.cholesky_ex(torch.diag(multipliers) - gram[start:, start:])
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return None
    solved = torch.linalg.solve_triangular(factor, gram[start:, :start], upper=False)
    value, own = 0.0, gram[:start, :start]
    for _ in range(_ITERATIONS):
        image = own @ basis + solved.T @ (solved @ basis)
        values, vectors = torch.linalg.eigh(basis.T @ image)
        last, value = value, float(values[-1])
        if not 0 < value < math.inf:
            return None
        if value - last <= 1e-6 * value:
            basis = basis @ vectors
            break
        basis = torch.linalg.qr(image @ vectors)[0]
    e = torch.linalg.solve_triangular(factor.T, solved @ basis[:, -1:], upper=True)[:, 0]
    return value, basis, e

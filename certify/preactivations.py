"""Bounds of every number of a network over a ball, as differences from the centre, by linear relaxation.

A `Form` in differences from the centre: t_k = sum over l of A_kl d_l, d_k = psi_k(u_k + t_k) - psi_k(u_k), and
||d_0|| <= r. Each activation lies between two lines over its range (`local_slopes`), so that a linear functional
sum_l c_l . d_l is bounded from its end: c_k . d_k <= m_k . t_k + a constant, where m_k has the slope of the upper or of
the lower line by the sign of c_k; then c_l += A_kl^T m_k, and at last c_0 . d_0 <= ||c_0||_* r (Zhang et al. 2018,
"Efficient neural network robustness certification with general activation functions"). Ranges are the smallest of
this, of interval arithmetic and of norms.

Rounding: m_k and c_l are floats that one may choose, and what the chosen ones miss of the exact ones is bounded: a
product A^T m by (gamma_n || |A| || + deviation) ||m|| in l2, which changes the functional by that times a bound of
||d_l||. Constants are sums of numbers >= 0, rounded up as a whole.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .edges import Edge, edge, reduced
from .local_slopes import Lines, Range, lines
from .neurons import Form, Term
from .rounding import UNIT, gamma, norm_up, up_sqrt
from .rules import Call
from .slopes import Slopes

_AT_ONCE = 1 << 18  # entries of a batch of functionals
_FLOOR = 2.0**-960  # above underflow


class Late(Exception):
    """The deadline has passed; nothing is wrong."""


@dataclass(frozen=True, eq=False)
class Centre:
    """Per activation the numbers u [B, n] at the centres, as computed, and [B] what they may be off in l2."""

    numbers: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]

    def at(self, samples: Tensor) -> Centre:
        """Some of the centres."""
        return Centre(tuple(one[samples] for one in self.numbers), tuple(one[samples] for one in self.errors))


@dataclass(frozen=True, eq=False)
class Region:
    """What holds over the balls of a batch.

    Attributes:
        radius: [B] of the balls, in their norm.
        sizes: per group [B] at least the l2 norm of d.
        moves: per activation [B] at least the l2 norm of t.
        growth: per activation [B] at least that norm per unit of the distance from the centre.
        ranges: per activation the range of its numbers.
        lines: per activation its lines.
    """

    radius: Tensor
    sizes: list[Tensor]
    moves: list[Tensor] = field(default_factory=list)
    growth: list[Tensor] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    lines: list[Lines] = field(default_factory=list)

    def at(self, samples: Tensor) -> Region:
        """Of some of the samples."""
        return Region(
            self.radius[samples],
            [one[samples] for one in self.sizes],
            [one[samples] for one in self.moves],
            [one[samples] for one in self.growth],
            [],
            [one.at(samples) for one in self.lines],
        )


class Enclosure:
    """The form of a network, ready for bounds over balls of one norm around its start.

    Args:
        form: from the tensor that the balls are in.
        calls: of its activations.
        norm: "l2", "linf" or "l1" of the balls.
        deadline: of `time.monotonic`; from then on everything raises `Late` within a piece of its work.
    """

    def __init__(self, form: Form, calls: Sequence[Call], norm: str, deadline: float = math.inf) -> None:
        self.norm, self.sizes, self.deadline = norm, form.sizes, deadline
        self._slopes = [one.slopes for one in form.activations]
        self._shapes, self._calls = [one.shape for one in form.activations], list(calls)
        self.layers = [self._edges(one.terms) for one in form.activations]
        self.end = self._edges(form.terms)
        if norm == "l2":
            self._reduce()
        self.tied = any(slopes.group > 1 for slopes in self._slopes)
        starts = [one.sizes[0] for group in (*self.layers, self.end) for one in group if one.source == 0]
        self.start = starts[0] if starts else form.sizes[0]
        # from the ball's norm to l2
        self.stretch = up_sqrt(float(form.sizes[0])) if norm == "linf" else 1.0

    def check(self) -> None:
        """Raise `Late` past the deadline."""
        if time.monotonic() >= self.deadline:
            raise Late

    def _edges(self, terms: Sequence[Term]) -> list[Edge]:
        found = []
        for term in terms:
            self.check()
            found.append(edge(term, self.sizes[term.source], self.norm))
        return found

    def _reduce(self) -> None:
        groups = [*self.layers, self.end]
        fewer = iter(reduced([one for group in groups for one in group if one.source == 0]))
        for group in groups:
            group[:] = [next(fewer) if one.source == 0 else one for one in group]

    def region(
        self,
        centre: Centre,
        radius: Tensor,  # [B]
    ) -> Region:
        """Ranges and lines of every activation over the balls."""
        found = Region(radius, [radius * self.stretch * (1 + 2.0**-50)])
        for position, edges in enumerate(self.layers):
            self.check()
            found.growth.append(self._growth(edges, found))
            low, high = self._direct(edges, found)
            own = Range(centre.numbers[position], centre.errors[position][:, None], low, high)
            drawn = self._lines(position, own)
            if any(one.source for one in edges):
                loose = drawn.loose
                if drawn.order is not None:  # places, not numbers, are loose
                    loose = loose.any(1, keepdim=True).expand_as(loose)
                own = self._tightened(edges, own, loose, found)
                drawn = self._lines(position, own)
            found.ranges.append(own)
            found.lines.append(drawn)
            furthest = found.growth[-1] * radius * (1 + 2.0**-50)
            found.moves.append(_smaller(furthest, _length(own.low, own.high)))
            found.sizes.append(_smaller(furthest * drawn.steepest, _length(drawn.least, drawn.most)))
        return found

    def _growth(self, edges: Sequence[Edge], found: Region) -> Tensor:
        """||t|| per unit of the distance, by norms."""
        total = torch.zeros_like(found.radius)
        for one in edges:
            before = found.growth[one.source - 1] * found.lines[one.source - 1].steepest if one.source else 1.0
            total = total + one.norm * before
        return total * (1 + 2.0**-40)

    def activation(self, position: int) -> tuple[Slopes, Call]:
        """What one of the activations is."""
        return self._slopes[position], self._calls[position]

    def _lines(self, position: int, own: Range) -> Lines:
        return lines(self._slopes[position], self._calls[position], self._shapes[position], own)

    def _direct(self, edges: Sequence[Edge], found: Region) -> tuple[Tensor, Tensor]:
        """By the rows' norms and by intervals."""
        low, high = torch.zeros(()), torch.zeros(())
        for one in edges:
            size = found.radius if one.source == 0 else found.sizes[one.source]
            reach = size[:, None] * one.rows
            least, most = -reach, reach
            if one.source:
                before = found.lines[one.source - 1]
                middle = (before.least + before.most) / 2
                half = (before.most - before.least) / 2 * (1 + 2.0**-50) + middle.abs() * 2.0**-50
                width = one.reach(half)
                if width is not None:
                    shifted = one.up(middle)
                    width = width + (one.error * norm_up(middle, 1) + one.lost)[:, None]
                    width = width + (shifted.abs() + width) * 2.0**-50
                    least, most = _larger(shifted - width, least), _smaller(shifted + width, most)
            low, high = low + least.clamp_max(0.0), high + most.clamp_min(0.0)
        room = 1 + 2.0**-40  # the rounding of a few products, and of sums of terms of like sign
        return low * room, high * room

    def _tightened(self, edges: Sequence[Edge], own: Range, loose: Tensor, found: Region) -> Range:
        """The range with the linear relaxation's bounds where an activation's lines are apart."""
        low, high = own.low.clone(), own.high.clone()
        counts, positions = loose.sum(1), loose.long().argsort(dim=1, descending=True, stable=True)
        width = max(*self.sizes, 1)
        for samples in _batches(counts, width):
            part = found.at(samples)
            lost = _total((one.error + one.lost) * part.sizes[one.source] for one in edges)[:, None]
            for numbers in torch.split(positions[samples, : int(counts[samples].max())], max(1, _AT_ONCE // width), 1):
                shape = (len(samples), numbers.shape[1], -1)
                rows = {one.source: one.unit_rows(numbers.flatten()).reshape(shape) for one in edges}
                fixed, slope = self.functional({k: torch.cat([c, -c], 1) for k, c in rows.items()}, part)
                tops = (fixed + lost + slope * part.radius[:, None]) * (1 + 2.0**-40)
                most, least = tops.chunk(2, 1)
                index = samples[:, None], numbers
                high[index], low[index] = _smaller(most, high[index]), _larger(-least, low[index])
        return Range(own.centre, own.error, low, high)

    def functional(
        self,
        coefficients: dict[int, Tensor],  # by group [B, T, n]
        found: Region,
    ) -> tuple[Tensor, Tensor]:
        """(constant, slope), [B, T] each: sum_l c_l . d_l <= constant + slope rho in every ball of rho <= radius."""
        total, left = torch.zeros((), dtype=torch.float64), dict(coefficients)
        slope = torch.zeros((), dtype=torch.float64)
        for group in range(len(found.lines), 0, -1):
            if group not in left:
                continue
            self.check()
            c, drawn, growth = left.pop(group), found.lines[group - 1], found.growth[group - 1]
            size = _norms(c)
            c, fixed, steep = _relaxed(c, size, drawn, growth, found.radius)
            length = size * drawn.steepest[:, None] * (1 + 2.0**-40)
            total = total + fixed + (8 * UNIT * length + _FLOOR) * found.moves[group - 1][:, None]
            slope = slope + steep
            for one in self.layers[group - 1]:
                source, image = found.sizes[one.source][:, None], one.down(c.flatten(0, 1)).reshape(*c.shape[:2], -1)
                total = total + (one.error * length + one.lost) * source
                if one.source in left:
                    image = left[one.source] + image
                    total = total + 2 * UNIT * _norms(image) * source
                left[one.source] = image
        slope = slope + (_dual_norms(left[0], self.norm) if 0 in left else torch.zeros_like(total))
        return total * (1 + 2.0**-40), slope * (1 + 2.0**-40)

    def differences(
        self,
        rows: Tensor,  # [B, T, K] functionals of the end
        found: Region,
    ) -> tuple[Tensor, Tensor]:
        """As `functional`, for functionals of the end."""
        left, total, size = {}, torch.zeros((), dtype=torch.float64), _norms(rows)
        for one in self.end:
            left[one.source] = one.down(rows.flatten(0, 1)).reshape(*rows.shape[:2], -1)
            total = total + (one.error * size + one.lost) * found.sizes[one.source][:, None]
        fixed, slope = self.functional(left, found)
        return (fixed + total) * (1 + 2.0**-40), slope


def _batches(counts: Tensor, width: int) -> Iterator[Tensor]:
    """Positions of samples with anything to do, in batches of like counts."""
    order = counts.argsort()
    order = order[counts[order] > 0]
    first = 0
    while first < len(order):
        last = first + 1
        while last < len(order) and (last + 1 - first) * int(counts[order[last]]) * width <= _AT_ONCE:
            last += 1
        yield order[first:last]
        first = last


def _relaxed(c: Tensor, size: Tensor, drawn: Lines, growth: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m [B, T, n], the constant and the slope [B, T] of one activation; the better of two ways for each functional.

    By lines: with c_i > 0 the slope is the middle plus half the difference, else less that; what this misses of the two
    slopes is in the caller's account. Constants err by gamma_n of the sum of absolute values. By cones: c . d differs
    from (c a) . t by at most ||c h|| ||t||, and ||t|| is at most `growth` times the distance.
    """
    flat = c.abs()
    middle, half, room = drawn.constants
    fixed = (c @ middle[:, :, None] + flat @ half[:, :, None])[..., 0]
    fixed = fixed.clamp_min(0.0) + size * room[:, None]
    middle_slope, half_slope = drawn.slopes
    moved = torch.addcmul(c * middle_slope[:, None], flat, half_slope[:, None])
    inner, width = drawn.cone
    steep = _norms(c * width[:, None]) * growth[:, None] * (1 + 2.0**-40)
    narrow = steep * radius[:, None] < fixed
    moved = torch.where(narrow[..., None], c * inner[:, None], moved)
    if drawn.order is not None:
        moved = torch.zeros_like(moved).scatter_add_(2, drawn.order[:, None].expand_as(moved), moved)
    return moved, torch.where(narrow, 0.0, fixed), torch.where(narrow, steep, 0.0)


def _total(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _norms(rows: Tensor) -> Tensor:
    """Upper bounds of l2 norms along the last axis: squares may underflow, 2^-511 each, or overflow to infinity."""
    count = rows.shape[-1]
    found: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return found * (1 + 2 * gamma(count + 8)) + math.sqrt(count) * 2.0**-510


def _length(low: Tensor, high: Tensor) -> Tensor:
    """[B] upper bounds of the l2 norms of numbers between two [B, n]."""
    return norm_up(torch.maximum(-low, high), 1)


def _smaller(first: Tensor, second: Tensor) -> Tensor:
    """The smaller bound; the second where the first is none (NaN)."""
    return torch.where(first < second, first, second)


def _larger(first: Tensor, second: Tensor) -> Tensor:
    return torch.where(first > second, first, second)


def _dual_norms(rows: Tensor, norm: str) -> Tensor:
    if norm == "l1":
        return rows.abs().amax(-1)
    return _norms(rows) if norm == "l2" else rows.abs().sum(-1) * (1 + 2 * gamma(rows.shape[-1] + 8))

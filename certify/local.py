"""Radii from bounds that hold near a sample only: never smaller than those from the constants of the whole space.

On the ball of radius r around a sample x the margin of the label over class j falls by at most a_j + s_j rho at
distance rho <= r, by linear relaxation over that ball (see `preactivations`), or, with a_j = 0, by a semidefinite
inequality with the slopes that this relaxation leaves (see `local_sdp`). Class j can therefore not win within

    min(r, (m_j - D_j(0) - a_j) / (s_j + D_j'))

(m_j and D_j as in `Certifier.radii`), nor within its global radius; the radius of the sample is the least over the
classes. Every ball tried gives such a radius, whether or not all of it is proved, and the best r is sought by secants.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arithmetic import proving
from .certifier import Certifier, Margins, Radii, ratio
from .edges import held
from .linear import Dense, float64
from .lipschitz import LipschitzBound
from .local_sdp import Quadratic, suits
from .neurons import Form, NoForm, Term, form
from .preactivations import Centre, Enclosure, Late, Region
from .rounding import down, gamma, norm_up, up, up_mul
from .walk import Walk, structure

METHODS = ("global", "crown", "lipsdp")
_CLOSE = 1e-2  # relative width of a bracket that is not narrowed further
_BALLS = 3  # most that the semidefinite inequality tries a sample
_SPEED = 2e8  # multiplications a second, about, at the least
_FACTORED = 4e9  # the same where matrices are multiplied by themselves and factored
_MATRIX = 1 / 8  # what a multiplication by a matrix takes of another's time
_SHARE = 1 / 16  # of the seconds, for a ball of each sample of a batch: at the deadline its work is lost
_FURTHER = {"crown": 2.0, "lipsdp": 1.25}  # where they start, in radii found before
_NUMBERS = 1 << 17  # of all groups of a batch
_ENTRIES = 1 << 20  # of a batch of pairs' functionals


@dataclass(frozen=True)
class LocalRadii(Radii):
    """As `Radii`; `method` [B] tells what sets the radius: "global" (constants of the whole space), or over a ball
    around the sample "crown" (linear relaxation) or "lipsdp" (a semidefinite inequality)."""

    method: tuple[str, ...]


@proving()
@torch.no_grad()
def local_radii(
    certifier: Certifier,
    x: Tensor,  # [B, *input_shape]
    margins: Margins,
    bound: LipschitzBound | None = None,
    *,
    budget: float = 60.0,
    steps: int = 12,
) -> LocalRadii:
    """Radii of samples, at least those of `Certifier.radii`, from bounds over balls around them.

    Args:
        certifier: of the network.
        x: the samples.
        margins: of these samples.
        bound: of this network in the norm that is wanted; None is the certifier's own.
        budget: seconds, preparation included, kept to within a fraction of one ball's work; samples that are not
            reached in time keep their global radius, so that a faster machine may give larger radii; so do all of a
            network for which not even one ball would be done in time.
        steps: most balls tried a sample, at least 1.

    Raises:
        ValueError: a negative or NaN budget; fewer steps than 1; margins of other samples, or of another network; as
            `Certifier.radii`.

    References: Zhang et al., "Efficient neural network robustness certification with general activation functions",
    NeurIPS 2018; Fazlyab et al., "Efficient and accurate estimation of Lipschitz constants for deep neural networks",
    NeurIPS 2019.
    """
    if tuple(x.shape) != (len(margins.label), *certifier.input_shape):
        raise ValueError(f"x: expected the {len(margins.label)} samples of the margins, got {tuple(x.shape)}")
    if not budget >= 0:
        raise ValueError(f"budget: expected seconds >= 0, got {budget}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    deadline = time.monotonic() + budget
    if certifier.digest(x) != margins.digest:
        raise ValueError("margins: expected those of these samples by this certifier, got those of others")
    bound = certifier.bound if bound is None else bound
    whole = certifier.radii(margins, bound)
    found = _Found.of(certifier, margins, bound)
    wanted = (whole.radius > 0) & (whole.radius < found.limit)
    if bool(wanted.any()):
        with contextlib.suppress(Late):
            _improve(certifier, found, bound, x, wanted.nonzero()[:, 0], steps, deadline)
    return found.radii(margins, whole)


def _improve(
    certifier: Certifier,
    found: _Found,
    bound: LipschitzBound,
    x: Tensor,
    wanted: Tensor,  # positions
    steps: int,
    deadline: float,
) -> None:
    """Enter what balls give; raises `Late` at the deadline."""
    part = _Part.of(certifier, bound, deadline - time.monotonic())
    if part is None:
        return
    for kind in ("crown", "lipsdp") if suits(part.enclosure) else ("crown",):
        for batch in torch.split(wanted, part.batch):
            part.enclosure.check()
            _Search(kind, part, found, part.centre(x[batch]), batch).run(steps)


@dataclass(frozen=True, eq=False)
class _Found:
    """The best radii so far.

    Attributes:
        label: [B].
        real: [B, K] m_j.
        room: [B, K] m_j - D_j(0).
        growth: [B, K] D_j' per unit of the ball's norm.
        limit: [B] from overflow.
        best: [B, K] radius within which class j does not win.
        bare: [B, K] that in real arithmetic.
        method: [B, K] what set `best`, by position.
    """

    label: Tensor
    real: Tensor
    room: Tensor
    growth: Tensor
    limit: Tensor
    best: Tensor
    bare: Tensor
    method: Tensor

    @classmethod
    def of(cls, certifier: Certifier, margins: Margins, bound: LipschitzBound) -> _Found:
        stretch = certifier.stretch(bound.norm)
        exact = certifier.executed.arithmetic.unit == 0.0
        room = margins.real if exact else down(margins.real - margins.lost)
        growth = torch.zeros_like(room) if exact else up(margins.slope * stretch)
        limit = torch.where(margins.limit < math.inf, down(margins.limit / stretch).clamp_min(0.0), math.inf)
        constants = bound.pairwise.cpu()[margins.label]
        return cls(
            margins.label,
            margins.real,
            room,
            growth,
            limit,
            ratio(room, constants if exact else up(constants + growth)),
            ratio(margins.real, constants),
            torch.zeros_like(room, dtype=torch.int64),
        )

    def take(self, samples: Tensor, radius: Tensor, fixed: Tensor, slope: Tensor, method: int) -> Tensor:
        """Enter margins that fall by at most fixed + slope rho in balls; the radii that would follow without their end.

        Args:
            samples: [S] positions.
            radius: [S] of the balls.
            fixed: [S, K].
            slope: [S, K].
            method: by position.
        """
        free = ratio(down(self.room[samples] - fixed), up(slope + self.growth[samples]))
        bare = ratio(down(self.real[samples] - fixed), slope)
        better = torch.minimum(free, radius[:, None])
        gained = better > self.best[samples]
        self.method[samples] = torch.where(gained, method, self.method[samples])
        self.best[samples] = torch.where(gained, better, self.best[samples])
        bare = torch.minimum(bare, radius[:, None])
        self.bare[samples] = torch.where(bare > self.bare[samples], bare, self.bare[samples])
        return torch.maximum(free, self.best[samples]).amin(1)

    def radii(self, margins: Margins, whole: Radii) -> LocalRadii:
        """The least over the classes."""
        right = margins.prediction == margins.label
        least, limiting = torch.where(right[:, None], self.best, 0.0).min(1)
        radius = torch.maximum(torch.minimum(least, self.limit), whole.radius)
        bare = torch.maximum(torch.where(right, self.bare.amin(1), 0.0), whole.real)
        methods = self.method.gather(1, limiting[:, None])[:, 0].tolist()
        names = tuple(METHODS[method] for method in methods)
        return LocalRadii(radius, torch.maximum(bare, radius), limiting, self.limit < least, names)


class _Part:
    """The network behind the first tensor from which it has a form, and the balls there."""

    def __init__(
        self, certifier: Certifier, found: Form, walk: Walk, norm: str, scale: float, budget: float = math.inf
    ) -> None:
        deadline = time.monotonic() + budget
        self._certifier, self._form, self._scale = certifier, found, scale
        self._sources = [
            next(p for p in one.node.all_input_nodes if p in certifier.graph.shapes) for one in found.activations
        ]
        self.enclosure = Enclosure(found, [walk.call_of(one.node) for one in found.activations], norm, deadline)
        self.classes = certifier.graph.shapes[found.end][0]
        self.batch = max(1, int(min(_NUMBERS // sum(found.sizes), _SHARE * budget / _cost(found, self.classes))))

    @classmethod
    def of(cls, certifier: Certifier, bound: LipschitzBound, budget: float) -> _Part | None:
        """None where no part with an activation has a form, or the seconds would not do for one sample.

        From these seconds on, bounds raise `Late`, as this does itself.
        """
        deadline = time.monotonic() + budget
        graph = certifier.graph
        walk = structure(graph)
        constants = dict(bound.records["l2"].constants)
        for node in graph.nodes:
            if node not in graph.shapes or (node is not graph.input and walk.place(node).anchor is not node):
                continue
            try:
                found = form(graph, walk, graph.output, node)
            except NoForm:
                continue
            if not found.activations:
                return None
            left = deadline - time.monotonic()
            if _cost(found, graph.shapes[graph.output][0]) + _preparation(found) > left:
                continue
            if node is graph.input:
                return cls(certifier, found, walk, bound.norm, 1.0, left)
            scale = up_mul(certifier.stretch(bound.norm), constants[node.name])
            return cls(certifier, found, walk, "l2", scale, left)
        return None

    def centre(self, x: Tensor) -> Centre:
        """The activations' numbers at samples."""
        tensors = self._certifier.tensors(x, set(self._sources))
        numbers, errors = [], []
        for one, source in zip(self._form.activations, self._sources, strict=True):
            values, error = tensors[source]
            before = one.slopes.before
            if before is not None:
                before = float64(before)
                size = norm_up(values.flatten(1), 1)
                rounding = up_mul(gamma(before.terms), before.absolute("l2")) + before.deviation("l2")
                values = before.apply(values)
                error = (error * before.absolute("l2") + size * rounding + before.underflow("l2")) * (1 + 2.0**-40)
            numbers.append(values.flatten(1))
            errors.append(error)
        return Centre(tuple(numbers), tuple(errors))

    def region(self, centre: Centre, radius: Tensor) -> Region:
        """What holds over balls of `radius` [S] in the input's norm."""
        return self.enclosure.region(centre, up(radius * self._scale))

    def falls(self, region: Region, label: Tensor) -> tuple[Tensor, Tensor]:
        """Constants and slopes [S, K] of how far the margins fall over balls, by linear relaxation."""
        step = max(1, _ENTRIES // (len(label) * max(self.classes, *self._form.sizes)))
        parts = []
        for rivals in torch.split(torch.arange(self.classes), step):
            rows = torch.zeros(len(label), len(rivals), self.classes, dtype=torch.float64)
            rows[:, torch.arange(len(rivals)), rivals] = 1.0
            rows[torch.arange(len(label)), :, label] -= 1.0  # f_j - f_label, 0 for the label itself
            parts.append(self.enclosure.differences(rows, region))
        fixed, slope = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return fixed, up(slope * self._scale)

    def slopes(
        self, region: Region, position: int, label: int, rivals: Sequence[int], warm: dict[int, Tensor]
    ) -> Tensor:
        """[K] how far one sample's margins over some rivals fall per unit, by semidefinite inequalities; else inf.

        `warm`: by rival the multipliers of all neurons, which are replaced.
        """
        found = torch.full((self.classes,), math.inf, dtype=torch.float64)
        quadratic = Quadratic.of(self.enclosure, region, position) if rivals else None
        if quadratic is None:
            return found
        for rival in rivals:
            if time.monotonic() >= self.enclosure.deadline:
                break
            constant, multipliers = quadratic.constant(rival, label, warm.get(rival))
            found[rival] = up_mul(constant, self._scale)
            if multipliers is not None:
                kept = warm.setdefault(rival, torch.full((sum(self._form.sizes[1:]),), math.nan, dtype=torch.float64))
                kept[quadratic.neurons] = multipliers
        return found


def _cost(found: Form, classes: int) -> float:
    """Seconds of one linear relaxation of a sample, about, were all neurons loose."""
    total, below = 0.0, 0.0
    ends = [(one.terms, size) for one, size in zip(found.activations, found.sizes[1:], strict=True)]
    for terms, size in (*ends, (found.terms, classes)):
        below += sum(map(_products, terms))
        total += size * below
    return total / _SPEED


def _preparation(found: Form) -> float:
    """Seconds that the matrices of the form take, about."""
    total = 0.0
    for term in (*(term for one in found.activations for term in one.terms), *found.terms):
        if term.operator is not None and held(term.operator):
            short, long = sorted((math.prod(term.operator.in_shape), math.prod(term.operator.out_shape)))
            total += 2.0 * short * short * long / _FACTORED
            if not isinstance(term.operator, Dense):
                total += short * _products(term) / _SPEED
    return total


def _products(term: Term) -> float:
    """Multiplications of a map; those of matrices are several times as fast."""
    if term.operator is None:
        return 1.0
    source, size = math.prod(term.operator.in_shape), math.prod(term.operator.out_shape)
    return size * min(float(term.operator.terms), source * (_MATRIX if held(term.operator) else 1.0))


class _Search:
    """Balls around some samples: best is the one whose radius is also what follows from it without its own end."""

    def __init__(self, kind: str, part: _Part, found: _Found, centre: Centre, samples: Tensor) -> None:
        self._kind, self._part, self._found = kind, part, found
        self._centre, self._samples = centre, samples
        self._label, self._limit = found.label[samples], found.limit[samples]
        self._warm: list[dict[int, Tensor]] = [{} for _ in samples]

    def run(self, steps: int) -> None:
        """Try at most so many balls a sample; raises `Late` at the deadline."""
        low, high, bracket = self._best(slice(None)), self._limit.clone(), _Bracket.empty(len(self._samples))
        radius = torch.minimum(low * _FURTHER[self._kind], high)
        active = torch.arange(len(self._samples))
        for _ in range(min(steps, _BALLS) if self._kind == "lipsdp" else steps):
            if not len(active):
                return
            tried = radius[active]
            free = torch.minimum(self._tried(active, tried), self._limit[active])
            bracket.enter(active, tried, free)
            high[active] = torch.where(free >= tried, torch.minimum(high[active], free), tried)
            low[active] = self._best(active)
            active = active[high[active] > low[active] * (1 + _CLOSE)]
            radius[active] = bracket.next(active, low[active], high[active])

    def _best(self, active: Tensor | slice) -> Tensor:
        return torch.minimum(self._found.best[self._samples[active]].amin(1), self._limit[active])

    def _tried(self, active: Tensor, tried: Tensor) -> Tensor:
        """The radii that follow from balls, their own end apart."""
        samples, label = self._samples[active], self._label[active]
        region = self._part.region(self._centre.at(active), tried)
        free = self._found.take(samples, tried, *self._part.falls(region, label), METHODS.index("crown"))
        if self._kind != "lipsdp":
            return free
        for position, sample in enumerate(samples.tolist()):
            self._part.enclosure.check()
            before = self._found.best[sample]
            rivals = (before < tried[position]).nonzero()[:, 0].tolist()
            rivals = sorted((j for j in rivals if j != int(label[position])), key=before.tolist().__getitem__)
            slope = self._part.slopes(region, position, int(label[position]), rivals, self._warm[int(active[position])])
            own = samples[position : position + 1], tried[position : position + 1]
            found = self._found.take(*own, torch.zeros_like(slope)[None], slope[None], METHODS.index("lipsdp"))
            free[position] = torch.maximum(free[position], found[0])
        return free


@dataclass(frozen=True, eq=False)
class _Bracket:
    """Logarithms of the last radius below the crossing and of the last one above, and there log(free / radius)."""

    ends: Tensor  # [2, S]
    values: Tensor  # [2, S], NaN where none is known

    @classmethod
    def empty(cls, samples: int) -> _Bracket:
        """Nothing known."""
        return cls(*torch.full((2, 2, samples), math.nan, dtype=torch.float64))

    def enter(self, active: Tensor, tried: Tensor, free: Tensor) -> None:
        """A ball and what follows from it."""
        side = (free < tried).long()
        self.ends[side, active], value = tried.log(), (free / tried).log()
        # Illinois: an end that stays for a second time counts half
        again = ~self.values[side, active].isnan()
        self.values[1 - side, active] = torch.where(again, 0.5, 1.0) * self.values[1 - side, active]
        self.values[side, active] = value

    def next(self, active: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Where the secant crosses zero, or the middle."""
        (left, right), (below, above) = self.ends[:, active], self.values[:, active]
        crossing = (left * above - right * below) / (above - below)
        bottom, top = low.log(), high.log()
        margin = 0.05 * (top - bottom)
        inside = (crossing - bottom >= margin) & (top - crossing >= margin)
        middle = torch.where(high < math.inf, (bottom + top) / 2, bottom + 1)
        return torch.where(inside, crossing, middle).exp()

"""First-order search for LipSDP multipliers: the inequality is eliminated backwards, one layer at a time.

With R_L = C_L^T C_L and so on the quadratic form of the end, and for k = L, .., 1

    S_k = D_k - R_kk,    B_kl = c_k D_k A_kl + R_kl,    R_lm += B_kl^T S_k^-1 B_km - A_kl^T (a b D)_k A_km,

S_k > 0, c the middle of the slopes a and b, the form that is left on the start is the least Q for which the inequality
of `inequality` holds. What is minimised is the logarithm of the bound's square over the logarithms of the multipliers:
in l2 the largest eigenvalue of Q, in linf that of T^-1/2 Q T^-1/2 times the sum of T, in l1 the largest diagonal entry;
each as a p-norm, p rising, since a maximum has a kink where several meet. Where S_k > 0 fails, the value is infinite,
and it grows without bound on the way there, so that a line search stays inside. The gradient needs no second pass
through the factors: the value is a maximum over the numbers xi, and its derivative by d is (xi - a u)(b u - xi) there.

All is batched over problems that share the matrices and differ in the end, such as pairs of classes. Nothing here is
a proof: see `inequality.prove`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .neurons import Neurons

# Powers of the p-norm one after another, and the test for the end of each: the least gain in the logarithm over
# `_PATIENCE` steps. A p-norm exceeds the maximum of n by up to n^(1/p), which need not be worked out finely.
SCHEDULE = ((20.0, 1e-3), (100.0, 2e-4), (500.0, 5e-5), (3000.0, 1e-5), (3000.0, 1e-6))
_RATIOS = (2.0, 1.0002, 1.005, 1.1, 1.4, 3.0)  # of multipliers of crossed layers to their R's largest eigenvalue
_NOTHING = 2.0**-240  # eigenvalue that is none
_HISTORY = 20
_MOST_STEPS = 300  # a power
_PATIENCE = 5
_FALL = 1e-4  # Armijo's constant
_LONGEST = 1.0  # step in a logarithm
_SEARCH = 14
_FIELDS = ("smooth", "true", "slope", "logs")
_OUTSIDE = 1 + 1e-9  # keeps S_k > 0 where its factor is fitted
_KEPT = 1e-8  # share of the largest weight below which a direction adds nothing


@dataclass(frozen=True, eq=False)
class _Level:
    """One layer: matrices by source, slopes, the multiplier of each number."""

    matrices: dict[int, Tensor]
    middle: Tensor
    inner: Tensor  # a b
    low: Tensor
    high: Tensor
    tied: Tensor
    count: int


class Searched(Protocol):
    """A batch of functions to minimise, each of the same number of variables."""

    @property
    def count(self) -> int:
        """How many."""

    def chosen(self, index: Tensor) -> Searched:
        """Some of them."""

    def evaluate(self, x: Tensor, power: float) -> Value:
        """All of them, each at its own row of x."""


@dataclass(eq=False)
class Value:
    """What one evaluation gives: [P] the logarithm that is minimised (inf outside its domain), [P] that of the bound's
    square, [P, variables] the derivatives, and [P, variables] the logarithms of the multipliers and weights that the
    bound holds for.
    """

    smooth: Tensor
    true: Tensor
    slope: Tensor
    logs: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of problems with the same layers.

    Attributes:
        levels: layers 1..L.
        ends: [P, m, n_k] by source: the rows of the end.
        rows: [r, start] M: what the start is read through; None where it is the start itself.
        norm: of the start.
        sizes: of the groups, that of the start being r where there are rows.
    """

    levels: tuple[_Level, ...]
    ends: dict[int, Tensor]
    rows: Tensor | None
    norm: str
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many problems."""
        return len(next(iter(self.ends.values())))

    @property
    def device(self) -> torch.device:
        """Where the problems are."""
        return next(iter(self.ends.values())).device

    def chosen(self, index: Tensor) -> Problem:
        """Some of the problems."""
        return replace(self, ends={source: end[index] for source, end in self.ends.items()})

    def evaluate(self, x: Tensor, power: float) -> Value:
        """The p-norm of each problem's bound.

        x: [P, variables] logarithms of the multipliers, layer by layer, and in linf of the weights. Those of a layer
        with c = 0 that no R_kl crosses count up to a factor: its S_k does not enter the value, which is least where
        S_k is singular, so that the factor is the p-norm of the eigenvalues of D^-1/2 R D^-1/2.
        """
        counts = [level.count for level in self.levels]
        logs = torch.split(x, [*counts, x.shape[1] - sum(counts)], 1)
        taken = [part.exp() for part in logs[:-1]]
        fitted: dict[int, _Spectrum] = {}

        def choose(k: int, form: Tensor, crossed: bool) -> Tensor:
            level = self.levels[k]
            if not crossed and not bool(level.middle.any()):
                root = (-logs[k][:, level.tied] / 2).exp()
                fitted[k] = _eigenvalues(root[:, :, None] * form * root[:, None], power)
                taken[k] = taken[k] * (fitted[k].smooth.exp() * _OUTSIDE)[:, None]
            return taken[k]

        passed = _eliminate(self, choose)
        smooth, true, directions, by_weights = _objective(self, passed.rest, logs[-1], power)
        slopes = _gradient(self, passed, directions, taken, fitted, list(logs[:-1]))
        slope = torch.cat([*slopes, by_weights], 1)
        sound = passed.fine & torch.isfinite(passed.rest).all(2).all(1)
        sound &= torch.isfinite(smooth) & torch.isfinite(slope).all(1)
        smooth, true = (torch.where(sound, value, math.inf) for value in (smooth, true))
        found = torch.cat([*(part.log() for part in taken), logs[-1]], 1)
        return Value(smooth, true, torch.where(sound[:, None], slope, 0.0), found)


def problem(
    net: Neurons,
    pairs: Sequence[tuple[int, int]] | None,
    norm: str,
    device: torch.device | str = "cpu",
) -> Problem:
    """The problems of the whole end (pairs None, one problem) or of differences of two of its numbers."""
    levels, rows = [], None
    if 0 < net.start_rows < net.sizes[0]:
        stacked = torch.cat([part.matrix for part in net.start_parts])
        if norm != "l2":
            rows = stacked.to(device)
        net = net.with_start(_root(stacked @ stacked.T) if norm == "l2" else torch.eye(len(stacked)).to(stacked))
    for layer in net.layers:
        matrices = {part.source: part.matrix.to(device) for part in layer.parts}
        low, high = layer.low.to(device), layer.high.to(device)
        tied = layer.tied.to(device)
        levels.append(_Level(matrices, (low + high) / 2, low * high, low, high, tied, layer.multipliers))
    ends = {}
    for part in net.output:
        matrix = part.matrix.to(device)
        if pairs is None:
            ends[part.source] = matrix[None]
        else:
            first, second = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
            ends[part.source] = (matrix[first] - matrix[second])[:, None]
    return Problem(tuple(levels), ends, rows, norm, net.sizes)


def least_form(net: Neurons, multipliers: Sequence[Tensor]) -> Tensor | None:
    """About the quadratic form [start, start] that is left of the start; None where some S_k > 0 fails."""
    given = problem(net, None, "l1")
    passed = _eliminate(given, lambda k, form, crossed: multipliers[k][None])
    if not bool(passed.fine):
        return None
    return passed.rest[0] if given.rows is None else given.rows.T @ passed.rest[0] @ given.rows


def _root(gram: Tensor) -> Tensor:
    """About a G with G G^T the Gram matrix."""
    values, vectors = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


@dataclass(eq=False)
class _Passed:
    """What an elimination leaves: the form on the start, and what leads back from it to all numbers."""

    rest: Tensor  # [P, r, r]
    fine: Tensor  # [P] whether all S_k > 0
    factors: list[tuple[Tensor, dict[int, Tensor]]]  # per layer: L with S = L L^T, and L^-1 B by source


def _eliminate(given: Problem, choose: Callable[[int, Tensor, bool], Tensor]) -> _Passed:
    """Backwards through all layers; `choose` gives the multipliers of layer k (0 the first) for R_kk.

    It is told whether layer k is crossed: whether there is an R_kl, l < k.
    """
    blocks: dict[tuple[int, int], Tensor] = {}

    def put(first: int, second: int, block: Tensor) -> None:
        known = blocks.get((first, second))
        blocks[first, second] = block if known is None else known + block

    sources = sorted(given.ends)
    for first in sources:
        for second in [source for source in sources if source <= first]:
            put(first, second, given.ends[first].mT @ given.ends[second])
    fine = torch.ones(given.count, dtype=torch.bool, device=given.device)
    factors: list[tuple[Tensor, dict[int, Tensor]]] = []
    for k in range(len(given.levels), 0, -1):
        level = given.levels[k - 1]
        form = blocks.pop((k, k), None)
        if form is None:
            form = torch.zeros(given.count, len(level.low), len(level.low)).to(level.low)
        crossed = any(first == k for first, _ in blocks)
        d = choose(k - 1, form, crossed)[:, level.tied]
        factor, failed = torch.linalg.cholesky_ex(torch.diag_embed(d) - form)
        fine &= failed == 0
        if bool((failed != 0).any()):
            factor = torch.where((failed != 0)[:, None, None], torch.eye(len(d[0])).to(factor), factor)
        rows = {source: (level.middle * d)[:, :, None] * matrix for source, matrix in level.matrices.items()}
        for source in [second for first, second in blocks if first == k]:
            block = blocks.pop((k, source))
            rows[source] = rows[source] + block if source in rows else block
        solved = {s: torch.linalg.solve_triangular(factor, rows[s], upper=False) for s in sorted(rows)}
        inner = level.inner * d if bool((level.inner != 0).any()) else None
        for first in solved:
            for second in [source for source in solved if source <= first]:
                put(first, second, solved[first].mT @ solved[second])
                if inner is not None and first in level.matrices and second in level.matrices:
                    put(first, second, -(level.matrices[first].mT @ (inner[:, :, None] * level.matrices[second])))
        factors.append((factor, solved))
    rest = blocks.get((0, 0))
    if rest is None:
        rest = torch.zeros(given.count, given.sizes[0], given.sizes[0]).to(fine.device, torch.float64)
    return _Passed(rest, fine, factors[::-1])


def _gradient(
    given: Problem,
    passed: _Passed,
    directions: Tensor,
    multipliers: Sequence[Tensor],
    fitted: Mapping[int, _Spectrum],
    logs: Sequence[Tensor],
) -> list[Tensor]:
    """Derivatives by the logarithms, [P, multipliers] a layer, for directions [P, r, e] of the start."""
    numbers = {0: directions}
    found = []
    for k, (level, (factor, solved)) in enumerate(zip(given.levels, passed.factors, strict=True), start=1):
        pulled = sum((row @ numbers[source] for source, row in solved.items()), directions.new_zeros(()))
        numbers[k] = torch.linalg.solve_triangular(factor.mT, pulled, upper=True)
        slope = _by_multipliers(level, k, numbers) * multipliers[k - 1]
        if k - 1 in fitted:
            spectrum, total = fitted[k - 1], slope.sum(1, keepdim=True).clamp_min(0)
            slope = slope - total * _gathered(level, (spectrum.vectors.square() * spectrum.portions[:, None]).sum(2))
            _follow(numbers, k, spectrum, total, logs[k - 1][:, level.tied])
        found.append(slope)
    return found


def _by_multipliers(level: _Level, k: int, numbers: Mapping[int, Tensor]) -> Tensor:
    """(xi - a u)(b u - xi), summed over the directions and over what shares a multiplier."""
    xi = numbers[k]
    u = sum((matrix @ numbers[s] for s, matrix in level.matrices.items()), xi.new_zeros(()))
    return _gathered(level, ((xi - level.low[:, None] * u) * (level.high[:, None] * u - xi)).sum(-1))


def _gathered(level: _Level, each: Tensor) -> Tensor:
    return torch.zeros(len(each), level.count).to(each).index_add_(1, level.tied, each)


def _follow(numbers: dict[int, Tensor], k: int, spectrum: _Spectrum, total: Tensor, logs: Tensor) -> None:
    """Add the directions in which R_kk moves a fitted layer's factor, and with it the value."""
    more = (-logs / 2).exp()[:, :, None] * spectrum.vectors * (total * spectrum.slopes).sqrt()[:, None]
    for source in range(k):
        known = numbers[source]
        numbers[source] = torch.cat([known, known.new_zeros(*known.shape[:2], more.shape[2])], 2)
    numbers[k] = torch.cat([numbers[k], more], 2)


@dataclass(frozen=True, eq=False)
class Shared:
    """One set of multipliers for all pairs: minimises the mean logarithm of their bounds' squares, in l2.

    With H what F is without the end and with Q = I, s H - c c^T >= 0 exactly where s >= c^T H^-1 c: one factorisation
    gives the least s of every row c, whose own multipliers are s times the shared ones.
    """

    whole: Problem
    first: Tensor  # [pairs]
    second: Tensor

    @property
    def count(self) -> int:
        """One."""
        return 1

    def chosen(self, index: Tensor) -> Shared:
        """The one."""
        return self

    def evaluate(self, x: Tensor, power: float) -> Value:
        """See `Searched`; there is no p-norm here."""
        squares, slope, _ = self.squares(x)
        logs = squares.log().mean(1)
        sound = torch.isfinite(logs) & torch.isfinite(slope).all(1)
        value = torch.where(sound, logs, math.inf)
        return Value(value, value, torch.where(sound[:, None], slope, 0.0), x)

    def squares(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, pairs] the least s, NaN where H > 0 fails; the derivative of the mean logarithm; C H^-1 C^T."""
        counts = [level.count for level in self.whole.levels]
        multipliers = [part.exp() for part in torch.split(x, counts, 1)]
        nothing = {source: torch.zeros_like(end[:, :1]) for source, end in self.whole.ends.items()}
        passed = _eliminate(replace(self.whole, ends=nothing), lambda k, form, crossed: multipliers[k])
        solved = _solved(self.whole, passed)
        form = sum((end @ solved[source] for source, end in self.whole.ends.items()), x.new_zeros(()))
        diagonal = form.diagonal(dim1=1, dim2=2)
        squares = diagonal[:, self.first] + diagonal[:, self.second] - 2 * form[:, self.first, self.second]
        squares = torch.where(squares > 0, squares, math.nan)
        weights = torch.zeros_like(form)
        weights[:, self.first, self.second] = 1 / (squares * squares.shape[1])
        weights = weights + weights.mT
        laplacian = torch.diag_embed(weights.sum(2)) - weights
        root = _root(laplacian)
        numbers = {source: values @ root for source, values in solved.items()}
        levels = enumerate(self.whole.levels, start=1)
        slopes = [_by_multipliers(level, k, numbers) * multipliers[k - 1] for k, level in levels]
        return squares, torch.cat(slopes, 1), form


def _solved(given: Problem, passed: _Passed) -> dict[int, Tensor]:
    """H^-1 C^T by group, NaN where H > 0 fails; `passed` is for H, whose end is nothing."""
    rest = {source: end.mT for source, end in given.ends.items()}
    halves: dict[int, Tensor] = {}
    zero = next(iter(given.ends.values())).new_zeros(())
    for k in range(len(given.levels), 0, -1):
        factor, solved = passed.factors[k - 1]
        right = rest.get(k)
        halves[k] = zero if right is None else torch.linalg.solve_triangular(factor, right, upper=False)
        if right is not None:
            for source, row in solved.items():
                rest[source] = rest.get(source, zero) + row.mT @ halves[k]
    size = given.sizes[0]
    left = torch.eye(size).to(passed.rest) - (passed.rest + passed.rest.mT) / 2
    factor, failed = torch.linalg.cholesky_ex(left.nan_to_num(0.0, 0.0, 0.0))
    outside = ~passed.fine | (failed != 0)
    columns = next(iter(given.ends.values())).shape[1]
    right = rest.get(0)
    right = passed.rest.new_zeros(len(left), size, columns) if right is None else right
    found = {0: torch.cholesky_solve(right, factor).masked_fill(outside[:, None, None], math.nan)}
    for k, (factor, solved) in enumerate(passed.factors, start=1):
        total = halves[k] + sum((row @ found[source] for source, row in solved.items()), zero)
        found[k] = torch.linalg.solve_triangular(factor.mT, total, upper=True)
    return found


def shared(net: Neurons, pairs: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Shared | None:
    """The search for one set of multipliers; None where a layer has c = 0, whose optimum is on the boundary."""
    whole = problem(net, None, "l2", device)
    if not all(bool(level.middle.any()) for level in whole.levels):
        return None
    first, second = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
    return Shared(whole, first, second)


def _objective(given: Problem, rest: Tensor, weights: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smooth and true logarithms, directions of the start, derivatives by the weights' logarithms."""
    rest = torch.nan_to_num((rest + rest.mT) / 2, 0.0, 0.0, 0.0)
    if given.norm == "l1":
        return _largest_diagonal(given, rest, weights, power)
    if given.norm == "l2":
        found = _eigenvalues(rest, power)
        return found.smooth, found.true, found.vectors * found.slopes.sqrt()[:, None], weights
    inverse = (-weights / 2).exp()  # T^-1/2
    rows = torch.eye(rest.shape[-1]).to(rest) if given.rows is None else given.rows
    scaled = rows * inverse[:, None]  # M T^-1/2
    small = scaled.shape[-2] < scaled.shape[-1]
    root = torch.stack([_root(part @ part.mT) for part in scaled]) if small else scaled
    found = _eigenvalues(root.mT @ rest @ root, power)
    images = root @ found.vectors
    # an eigenvalue falls with tau_i by the square of entry i of its unit eigenvector of (M T^-1/2)^T Q M T^-1/2
    vectors = scaled.mT @ (rest @ images)
    squares = vectors.square() / vectors.square().sum(1, keepdim=True).clamp_min(1e-300)
    total = weights.logsumexp(1)
    by_weights = (weights - total[:, None]).exp() - (squares * found.portions[:, None]).sum(-1)
    return found.smooth + total, found.true + total, images * found.slopes.sqrt()[:, None], by_weights


@dataclass(eq=False)
class _Spectrum:
    """Largest eigenvalues of a batch, [P, e] each, ascending: of the p-norm, its derivatives and their products."""

    smooth: Tensor  # [P] logarithm of the p-norm
    true: Tensor  # [P] logarithm of the largest
    slopes: Tensor
    portions: Tensor
    vectors: Tensor  # [P, n, e]


def _eigenvalues(form: Tensor, power: float) -> _Spectrum:
    values, vectors = torch.linalg.eigh(form.nan_to_num(0.0, 0.0, 0.0))
    largest = values[:, -1:].clamp_min(1e-300)
    shares = (values.clamp_min(0) / largest) ** power
    total = shares.sum(1, keepdim=True)
    portions = shares / total
    kept = int((portions > _KEPT * portions.max()).sum(1).max())
    portions, vectors, values = portions[:, -kept:], vectors[:, :, -kept:], values[:, -kept:]
    true = largest[:, 0].log()
    return _Spectrum(true + total[:, 0].log() / power, true, portions / values.clamp_min(1e-300), portions, vectors)


def _largest_diagonal(
    given: Problem, rest: Tensor, weights: Tensor, power: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The p-norm of the diagonal of M^T Q M; directions are the axes of the start."""
    units = torch.eye(rest.shape[-1]).to(rest) if given.rows is None else given.rows
    values = (units * (rest @ units)).sum(1).clamp_min(0)
    largest = values.amax(1, keepdim=True).clamp_min(1e-300)
    shares = (values / largest) ** power
    total = shares.sum(1, keepdim=True)
    portions = shares / total
    kept = torch.nonzero((portions > _KEPT * portions.amax(1, keepdim=True)).any(0)).flatten()
    slopes = (portions / values.clamp_min(1e-300))[:, kept]
    true = largest[:, 0].log()
    return true + total[:, 0].log() / power, true, units[:, kept] * slopes.sqrt()[:, None], weights


def initial(given: Problem) -> Tensor:
    """Multipliers without a search, [P, variables] logarithms: one a layer, a multiple of the largest eigenvalue of R.

    For a layer that no R_kl crosses the multiple that is best where R is a multiple of the identity, which makes the
    bound at most the product over the layers (for [0, 1]: Xu, Sivaranjani, "ECLipsE", NeurIPS 2024, its fast form);
    for the others the best of a few.
    """
    logs, crossed = _one_a_layer(given, _RATIOS[0])
    if not crossed:
        return _with_weights(given, logs)
    tried = [logs, *(_one_a_layer(given, ratio)[0] for ratio in _RATIOS[1:])]
    return _best(given, [_with_weights(given, one) for one in tried])


def _best(given: Problem, tried: Sequence[Tensor]) -> Tensor:
    """The logarithms with the smallest value, problem by problem."""
    values = torch.stack([given.evaluate(one, SCHEDULE[-1][0]).true for one in tried])
    chosen = values.nan_to_num(math.inf).argmin(0)
    return torch.stack(list(tried))[chosen, torch.arange(given.count, device=given.device)]


def _one_a_layer(given: Problem, crossed_ratio: float) -> tuple[Tensor, bool]:
    """[P, multipliers] logarithms, and whether a layer is crossed: multiples of the largest eigenvalue of R_kk."""
    found: list[Tensor] = []
    any_crossed = False
    # numbers that nothing reads have R_kk = 0; any multiplier > 0 does
    least = max([_NOTHING, *(float(end.square().sum((1, 2)).max()) for end in given.ends.values())])

    def choose(k: int, form: Tensor, crossed: bool) -> Tensor:
        nonlocal any_crossed
        any_crossed |= crossed
        level = given.levels[k]
        largest = torch.linalg.eigvalsh(form.nan_to_num(0.0, 0.0, 0.0))[:, -1]
        largest = torch.where(largest > _NOTHING, largest, least)
        half = float((level.high - level.low).max()) / 2
        ratio = min(1e6, 1 + max(float(level.middle.abs().max()) / max(half, 1e-9), 1e-4))
        chosen: Tensor = (largest * (crossed_ratio if crossed else ratio))[:, None].expand(-1, level.count)
        found.append(chosen.log())
        return chosen

    _eliminate(given, choose)
    return torch.cat(found[::-1], 1), any_crossed


def _with_weights(given: Problem, logs: Tensor) -> Tensor:
    if given.norm != "linf":
        return logs
    size = given.sizes[0] if given.rows is None else given.rows.shape[1]
    return torch.cat([logs, torch.zeros(given.count, size).to(logs)], 1)


def search(
    given: Searched,
    start: Tensor,  # [P, variables]
    deadline: float,
    schedule: Sequence[tuple[float, float]] = SCHEDULE,
) -> Tensor:  # [P, variables] the best found
    """Minimise by L-BFGS with backtracking, each problem of the batch on its own, from `start` on.

    Args:
        given: the problems.
        start: logarithms inside the domain; a problem whose start is outside stays there.
        deadline: `time.monotonic()` at which to stop with the best so far.
        schedule: powers of the p-norm, one after another, and the least gain over some steps that goes on.
    """
    best, least = start.clone(), torch.full((given.count,), math.inf).to(start)
    for power, gain in schedule:
        if time.monotonic() > deadline:
            break
        _minimise(given, best, least, power, gain, deadline)
    return best


def _minimise(given: Searched, best: Tensor, least: Tensor, power: float, gain: float, deadline: float) -> None:
    """Minimise one p-norm, starting from `best`; `best` and `least` keep what has the smallest true value."""
    x = best.clone()
    now = given.evaluate(x, power)
    _keep(best, least, now, slice(None))
    memory = _Memory(given.count, x.shape[1], x)
    active = torch.nonzero(torch.isfinite(now.smooth)).flatten()
    trail = [now.smooth.clone()]
    for _ in range(_MOST_STEPS):
        if not len(active) or time.monotonic() > deadline:
            return
        step = memory.direction(now.slope, active)
        moved = _search_line(given, x, now, step, active, power, deadline)
        if not len(moved.index):
            return
        index = moved.index
        memory.push(index, moved.x - x[index], moved.value.slope - now.slope[index])
        x[index] = moved.x
        for name in _FIELDS:
            getattr(now, name)[index] = getattr(moved.value, name)
        _keep(best, least, moved.value, index)
        trail.append(now.smooth.clone())
        if len(trail) > _PATIENCE:
            gained = trail[-1 - _PATIENCE][index] - now.smooth[index]
            index = index[gained > gain]
        active = index


def _keep(best: Tensor, least: Tensor, value: Value, index: Tensor | slice) -> None:
    better = value.true < least[index]
    best[index] = torch.where(better[:, None], value.logs, best[index])
    least[index] = torch.where(better, value.true, least[index])


@dataclass(eq=False)
class _Moved:
    index: Tensor
    x: Tensor
    value: Value


def _search_line(
    given: Searched, x: Tensor, now: Value, step: Tensor, active: Tensor, power: float, deadline: float
) -> _Moved:
    """Backtracking from the whole step; problems for which no step helps drop out."""
    descent = (now.slope[active] * step).sum(1)
    length = torch.ones_like(descent)
    done: list[_Moved] = []
    left = torch.arange(len(active), device=active.device)
    for _ in range(_SEARCH):
        index = active[left]
        tried = x[index] + length[left][:, None] * step[left]
        value = given.chosen(index).evaluate(tried, power)
        good = value.smooth <= now.smooth[index] + _FALL * length[left] * descent[left]
        part = Value(value.smooth[good], value.true[good], value.slope[good], value.logs[good])
        done.append(_Moved(index[good], tried[good], part))
        outside = torch.isinf(value.smooth)
        length[left] *= torch.where(outside, 0.25, 0.5)
        left = left[~good]
        if not len(left) or time.monotonic() > deadline:
            break
    values = [one.value for one in done]
    return _Moved(
        torch.cat([one.index for one in done]),
        torch.cat([one.x for one in done]),
        Value(*(torch.cat([getattr(value, name) for value in values]) for name in _FIELDS)),
    )


class _Memory:
    """L-BFGS pairs of every problem (Nocedal and Wright, "Numerical optimization", 2nd ed., algorithm 7.4).

    The recursion runs over coefficients of the pairs and the gradient, by their inner products, so that its many small
    steps don't each cross all problems' variables.
    """

    def __init__(self, count: int, variables: int, like: Tensor) -> None:
        self._steps = torch.zeros(count, _HISTORY, variables).to(like)
        self._changes = torch.zeros(count, _HISTORY, variables).to(like)
        self._used = np.zeros((count, _HISTORY), dtype=bool)
        self._filled = 0

    def push(self, index: Tensor, step: Tensor, change: Tensor) -> None:
        """Take up a pair for some of the problems, the oldest going where there is no room."""
        product = (step * change).sum(1)
        used = product > 1e-12 * step.norm(dim=1) * change.norm(dim=1)
        if self._filled == _HISTORY:
            self._steps, self._changes = self._steps.roll(-1, 1), self._changes.roll(-1, 1)
            self._used = np.roll(self._used, -1, 1)
            self._filled -= 1
        place = self._filled
        self._steps[:, place], self._changes[:, place], self._used[:, place] = 0.0, 0.0, False
        self._steps[index, place], self._changes[index, place] = step, change
        self._used[index.cpu().numpy(), place] = used.cpu().numpy()
        self._filled += 1

    def direction(self, slope: Tensor, index: Tensor) -> Tensor:
        """The next step, not longer than `_LONGEST` in any variable."""
        gradient, count = slope[index], self._filled
        basis = torch.cat([self._steps[index, :count], self._changes[index, :count], gradient[:, None]], 1)
        coefficients = self._coefficients((basis @ basis.mT).cpu().numpy(), self._used[index.cpu().numpy(), :count])
        q = (torch.from_numpy(coefficients).to(basis)[:, None] @ basis)[:, 0]
        first = 0.1 / gradient.abs().amax(1, keepdim=True).clamp_min(1e-300)
        downhill = ((q * gradient).sum(1) > 0) & torch.from_numpy(self._used[index.cpu().numpy()].any(1)).to(q.device)
        q = torch.where(downhill[:, None], q, gradient * first)
        return -q * (_LONGEST / q.abs().amax(1, keepdim=True).clamp_min(_LONGEST))

    @staticmethod
    def _coefficients(gram: NDArray[np.float64], used: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of the steps, the changes and the gradient, in H times the gradient."""
        problems, count = used.shape
        found = np.zeros((problems, 2 * count + 1))
        found[:, -1] = 1.0
        shares = np.zeros((problems, count))
        scale = np.ones(problems)
        products = np.where(used, np.diagonal(gram[:, :count, count : 2 * count], axis1=1, axis2=2), 1.0)
        for k in range(count - 1, -1, -1):
            shares[:, k] = np.where(used[:, k], (gram[:, k] * found).sum(1) / products[:, k], 0.0)
            found[:, count + k] -= shares[:, k]
        for k in range(count):  # the latest pair that is used sets the scale
            scale = np.where(used[:, k], products[:, k] / np.maximum(gram[:, count + k, count + k], 1e-300), scale)
        found *= scale[:, None]
        for k in range(count):
            share = (gram[:, count + k] * found).sum(1) / products[:, k]
            found[:, k] += np.where(used[:, k], shares[:, k] - share, 0.0)
        return found

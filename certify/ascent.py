"""Lower estimates of Lipschitz constants: a search for points where a network's Jacobian is large."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .arithmetic import exact_arithmetic
from .execution import Float64Pass, plain_copy
from .graph import trace
from .jacobian import DUAL, check_finite, jacobian_norms, jacobians
from .linear import check_norm
from .rules import leaf_types
from .smoothing import Smoothed

_POINTS = 256  # given points that are looked at
_RANDOM = 2048  # random points
_JITTER = 1e-7  # of the points' scale: with probability 1 no point is then on a kink, where autograd may be wrong
_ROUNDING = 1e-12  # of a Jacobian in float64, relative to its rows
_WORK = 1e11  # floating-point operations of a round of searches, some 10 seconds of a core
_PASSES = 8  # forward passes that a step costs
_FEWEST, _MOST = 8, 128  # searches in a round
_LEAST_STEPS = 5  # however large the network is
_ENTRIES = 1 << 24  # numbers at once


@dataclass(frozen=True, eq=False)
class LowerEstimates:
    """What the Lipschitz constants of a network are at least: its Jacobian attains it somewhere.

    Attributes:
        whole: of the map from inputs to all logits, the same norm on both sides.
        pairwise: [K, K] float64, of f_i - f_j; symmetric, zero diagonal.
    """

    whole: float
    pairwise: Tensor


def lower_estimates(
    model: nn.Module,
    points: Tensor,  # [B, *input_shape]
    norm: str = "l2",
    *,
    steps: int = 80,
    seed: int = 0,
    seconds: float | None = None,
) -> LowerEstimates:
    """Search for points where the Jacobian J of the logits, and that of each difference of two, is large.

    max over x and c of ||J(x)^T c||_*, c = e_i - e_j or, for all logits, any c of the dual unit ball: normalised
    gradient steps in x from the best of the points and from random ones, with the best c for each x. Where slopes are
    constant in pieces the steps follow a network whose kinks are rounded off (`smoothing`), or the change of slope
    along a segment; what counts is the Jacobian of the network itself, all constants converted exactly to float64.
    Points may leave the box [0, 1], since bounds hold everywhere.

    Args:
        model: any module whose graph can be traced, in eval mode.
        points: samples; the first 256 are looked at.
        norm: of inputs, and of logits where all are meant: "l2", "linf" or "l1".
        steps: of each search at most; fewer where they would take more than some 10^11 operations. 0: only look.
        seed: of the random points; the global random state stays.
        seconds: after which no step is begun. None: equal calls on one machine give equal results.

    Returns:
        Estimates that exceed the true constants by at most 1e-9 relative, and where large terms cancel by some 1e-11 of
        the product of the layers' norms.

    Raises:
        ValueError: no points, steps < 0, a Jacobian with NaN or infinite entries at a point.
    """
    check_norm(norm)
    if steps < 0 or not len(points):
        raise ValueError(f"expected at least one point and steps >= 0, got {len(points)} points and steps = {steps}")
    end = math.inf if seconds is None else time.monotonic() + seconds
    with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(points.device):
        network = _Network(model, tuple(points.shape[1:]))
        return _Search(network, points.detach().clone().double(), norm, seed, end).run(steps)


class _Network(Float64Pass):
    """The traced network in float64, with gradients to its input."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__(trace(plain_copy(model), input_shape, leaf_types()))
        self._model.requires_grad_(False)
        self.classes = self._graph.shapes[self._graph.output][0]
        self.operations = float(sum(self._cost(node, shape) for node, shape in self._graph.shapes.items()))

    def _cost(self, node: fx.Node, shape: tuple[int, ...]) -> int:
        """About how many floating-point operations a node takes: a product for each weight that a number sees."""
        weights = [self._constants.get(parent) for parent in node.all_input_nodes]
        if node.op == "call_module":
            weights += list(self._graph.module(node).parameters())
        seen = [weight[0].numel() for weight in weights if isinstance(weight, Tensor) and weight.dim() > 1]
        return math.prod(shape) * (10 + 2 * max(seen, default=0))

    def __call__(self, x: Tensor) -> Tensor:  # [B, *input_shape] -> [B, K]
        values: dict[fx.Node, Any] = {}
        for node in self._graph.nodes:
            values[node] = self._value(node, values, x)
            for done in self._last.get(node, ()):
                del values[done]
        found: Tensor = values[self._graph.output]
        return found


@dataclass(frozen=True)
class _Course:
    """A round of searches: relative width of the kinks and length of the steps, at its start and end."""

    widths: tuple[float, float]
    lengths: tuple[float, float]

    def at(self, share: float) -> tuple[float, float]:
        """Width and length when that share of the round is over."""
        return _along(*self.widths, share), _along(*self.lengths, share)


_COURSES = (_Course((0.3, 0.03), (1.0, 0.1)), _Course((0.3, 0.005), (0.5, 0.01)))


def _along(first: float, last: float, share: float) -> float:
    return float(first * (last / first) ** share)


@dataclass(frozen=True, eq=False)
class _Task:
    """What searches look for: coefficients of the logits, and where they may follow the Jacobian."""

    coefficients: Tensor  # [E, K]
    free: Tensor  # [E, 1]


class _Search:
    """The largest values found so far, and where: of all logits, and of each pair."""

    def __init__(self, network: _Network, points: Tensor, norm: str, seed: int, end: float) -> None:
        self._network, self._norm, self._end = network, norm, end
        self._generator = torch.Generator().manual_seed(seed)
        self._classes, self._operations = network.classes, network.operations
        self._numbers = points[0].numel()
        self._points = points[: self._affordable(_POINTS)]
        self._centre = self._points.mean(0)
        self._scale = _scale(self._points - self._centre)
        self._smooth = True  # until there turn out to be no second derivatives
        self._pool = points[:0]
        self.whole, self._whole_at = 0.0, 0
        self.pairwise = torch.zeros(self._classes, self._classes, dtype=torch.float64, device=points.device)
        self._pairs_at = torch.zeros(self._classes, self._classes, dtype=torch.int64, device=points.device)

    def run(self, steps: int) -> LowerEstimates:
        """Look at the points, then search in rounds."""
        self._visit(self._points, given=True)
        if steps:
            self._visit(self._random(self._affordable(_RANDOM)))
        count = _WORK / (_PASSES * self._operations * max(steps, 1))
        steps = min(steps, max(_LEAST_STEPS, int(steps * count / _FEWEST)))
        for number, course in enumerate(_COURSES if steps else ()):
            starts, task = self._begin(min(max(int(count), _FEWEST), _MOST), scattered=number == 0)
            self._visit(self._ascended(starts, task, course, steps))
        return LowerEstimates(self.whole, self.pairwise.cpu())

    def _affordable(self, count: int) -> int:
        """As many points of `count` as one may take the Jacobians of all logits at."""
        size = self._classes * (2 * self._operations + self._classes * self._numbers)
        return max(1, min(count, int(_WORK / 4 / size)))

    def _random(self, count: int) -> Tensor:
        """Half uniform in the box around the points and [0, 1], half normal at distances up to far outside of it."""
        shape = self._centre.shape
        box = torch.rand(count // 2, *shape, generator=self._generator, dtype=torch.float64)
        normal = torch.randn(count - len(box), *shape, generator=self._generator, dtype=torch.float64)
        low, high = min(0.0, float(self._points.min())), max(1.0, float(self._points.max()))
        spread = self._scale / math.sqrt(self._numbers) * torch.logspace(-0.5, 1.5, len(normal), dtype=torch.float64)
        return torch.cat([low + (high - low) * box, self._centre.cpu() + _wide(spread, normal) * normal]).to(
            self._centre
        )

    def _visit(self, points: Tensor, given: bool = False) -> None:
        """Take the Jacobians there; what is larger than before is kept. Values that are not finite count nothing."""
        points = points[: self._affordable(len(points))]
        noise = torch.randn(points.shape, generator=self._generator, dtype=torch.float64)
        size = points.abs().flatten(1).amax(1).clamp_min(self._scale / math.sqrt(self._numbers))
        points = points + _JITTER * size.reshape(-1, *[1] * (points.dim() - 1)) * noise.to(points)
        for part in torch.split(points, max(1, min(64, _ENTRIES // (self._classes * self._numbers)))):
            jacobian = jacobians(self._network, part)
            if given:
                check_finite(jacobian)
            else:
                sound = torch.isfinite(jacobian).flatten(1).all(1)
                part, jacobian = part[sound], jacobian[sound]
            if len(part):
                self._keep(part, jacobian)

    def _keep(self, points: Tensor, jacobian: Tensor) -> None:
        first = len(self._pool)
        self._pool = torch.cat([self._pool, points])
        whole = jacobian_norms(jacobian, self._norm)
        best = int(whole.argmax())
        if (value := float(whole[best]) * (1 - _ROUNDING)) > self.whole:
            self.whole, self._whole_at = value, first + best
        for row in range(self._classes):
            self._keep_pairs(row, first, jacobian)

    def _keep_pairs(self, row: int, first: int, jacobian: Tensor) -> None:
        order = DUAL[self._norm]
        lengths = torch.linalg.vector_norm(jacobian, order, dim=2)
        values = torch.linalg.vector_norm(jacobian - jacobian[:, row : row + 1], order, dim=2)
        found, at = (values - _ROUNDING * (lengths + lengths[:, row : row + 1])).max(0)
        better = found > self.pairwise[row]
        self.pairwise[row] = torch.where(better, found, self.pairwise[row])
        self._pairs_at[row] = torch.where(better, at + first, self._pairs_at[row])

    def _begin(self, count: int, scattered: bool) -> tuple[Tensor, _Task]:
        """Starts [E, ...] and tasks: a quarter for all logits, the others for the largest pairs, in turn.

        The first of each task starts where its value is largest; the others anywhere in the pool where `scattered`.
        """
        eye = torch.eye(self._classes, dtype=torch.float64, device=self._pool.device)
        pairs = torch.triu_indices(self._classes, self._classes, 1, device=self._pool.device)
        largest = self.pairwise[pairs[0], pairs[1]].argsort(descending=True)[: count - count // 4]
        turn = torch.arange(count - count // 4, device=pairs.device)
        i, j = pairs[:, largest[turn % len(largest)]]
        at = self._pairs_at[i, j]
        at = torch.cat([torch.full((count // 4,), self._whole_at, device=at.device), at])
        later = torch.cat([torch.arange(count // 4, device=at.device) > 0, turn >= len(largest)])
        anywhere = torch.randint(len(self._pool), (count,), generator=self._generator).to(at.device)
        starts = self._pool[torch.where(later, anywhere, at) if scattered else at]
        free = torch.arange(count, device=at.device) < count // 4
        whole = torch.randn(count // 4, self._classes, generator=self._generator, dtype=torch.float64).to(eye)
        coefficients = torch.cat([_best(whole, self._norm), eye[i] - eye[j]])
        return starts, _Task(coefficients, free[:, None])

    def _ascended(self, x: Tensor, task: _Task, course: _Course, steps: int) -> Tensor:
        """The points of largest value on the way, one a search."""
        best, where = torch.full_like(x.flatten(1)[:, 0], -math.inf), x
        c = task.coefficients
        for step in range(steps + 1):
            width, length = course.at(step / steps)
            value, row = self._value(x, c)
            higher = value > best
            best, where = torch.where(higher, value, best), torch.where(_wide(higher, x), x, where)
            if step == steps or time.monotonic() > self._end:
                break
            direction, image = self._direction(x, c, row, width)
            c = torch.where(task.free & (image != 0).any(1, keepdim=True), _best(image, self._norm), c)
            x = x + length * self._scale * _unit(direction)
        return where

    def _value(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """||J^T c||_* of the network itself, and J^T c."""
        x = x.detach().requires_grad_()
        (row,) = torch.autograd.grad((self._network(x) * c).sum(), x)
        return torch.linalg.vector_norm(row.flatten(1), DUAL[self._norm], dim=1), row

    def _direction(self, x: Tensor, c: Tensor, row: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The gradient of ||J^T c||_* in x and in c, the latter J v for the input direction v of largest change."""
        found, image = torch.zeros_like(x), torch.zeros_like(c)
        if self._smooth:
            try:
                found, image = self._smooth_direction(x, c, width)
            except RuntimeError:  # an operation without second derivatives
                self._smooth = False
        flat = (found == 0).flatten(1).all(1)
        if bool(flat.any()):
            other, change = self._segment_direction(x, c, row, width)
            found = torch.where(_wide(flat, x), other, found)
            image = torch.where((image == 0).all(1, keepdim=True), change, image)
        return found.nan_to_num(0.0, 0.0, 0.0), image.nan_to_num(0.0, 0.0, 0.0)

    def _smooth_direction(self, x: Tensor, c: Tensor, width: float) -> tuple[Tensor, Tensor]:
        x, c = x.detach().requires_grad_(), c.detach().requires_grad_()
        with Smoothed(width):
            logits = self._network(x)
        (row,) = torch.autograd.grad((logits * c).sum(), x, create_graph=True)
        value = torch.linalg.vector_norm(row.flatten(1), DUAL[self._norm], dim=1).sum()
        found, image = torch.autograd.grad(value, (x, c), allow_unused=True, materialize_grads=True)
        return found, image

    def _segment_direction(self, x: Tensor, c: Tensor, row: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The difference of J^T c at the ends of a segment along it, and the change of the logits over the segment."""
        arm = width * self._scale * _unit(row)
        ends = torch.cat([x + arm, x - arm]).detach().requires_grad_()
        logits = self._network(ends)
        (rows,) = torch.autograd.grad((logits * torch.cat([c, c])).sum(), ends)
        upper, lower = logits.detach().chunk(2)
        return rows[: len(x)] - rows[len(x) :], upper - lower


def _scale(offsets: Tensor) -> float:
    """Root mean square of their lengths; that of the unit box where there is none."""
    found = float(offsets.flatten(1).square().sum(1).mean().sqrt())
    return found if 0 < found < math.inf else math.sqrt(offsets[0].numel() / 12)


def _best(image: Tensor, norm: str) -> Tensor:
    """c of the dual unit ball with the largest c . y for each row y."""
    if norm == "l2":
        return _unit(image)
    if norm == "l1":
        return image.sign()
    largest = image.abs().argmax(1, keepdim=True)
    return torch.zeros_like(image).scatter(1, largest, image.gather(1, largest).sign())


def _unit(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors.flatten(1), dim=1)
    safe = torch.where(lengths > 0, lengths, 1.0)
    return vectors / safe.reshape(-1, *[1] * (vectors.dim() - 1))


def _wide(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.dim() - 1))

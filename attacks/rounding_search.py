"""Rounding search: adversarial points that exist only because the model is executed in floating point."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Attack
from .checks import whole
from .finish import shorten
from .keepers import Closest
from .norms import per_sample
from .slopes import class_gradients, nearest_move
from .task import Task

# A point on the linearised boundary is adversarial or not by rounding alone: how far beyond it the search may begin,
# relative to the distance.
_BEYOND = 0.1
# Perturbations of a proposal, in units in the last place, and the share of the entries that get one.
_JITTERS = ((1.0, 1.0), (16.0, 1.0), (256.0, 1.0), (1.0, 0.1), (64.0, 0.1))
_SHARES = (0.01, 0.05, 0.3)


@dataclass(frozen=True, kw_only=True)
class RoundingSearch(Attack):
    """Walk to the decision boundary along the shortest way, then search the floats around it for nearer points.

    With g_j the gradient of f_j - f_y at z, z becomes the point nearest to x on the boundary of the model linearised
    at z, within the box: x + l_j d_j, l_j = (<g_j, z - x> - (f_j - f_y)(z)) / ||g_j||_q, d_j the steepest direction,
    where the box does not cut in, for the class j with the least l_j >= 0. For an affine model that is the exact
    minimal perturbation. From the nearest adversarial point on, the executed model alone counts: a round proposes, in
    turn,

    - a point nearer by a step s: entries shifted by some units in the last place, projected onto that ball, each
      rounded up or down at random; s doubles where the point is adversarial and shrinks where not;
    - the nearest point so far with random entries moved by one float towards x.

    Where the point on the linearised boundary is not adversarial, farther ones on its ray are tried: just beyond it,
    or, where it lies within the certified radius, just beyond that. Rounding makes the executed boundary rough; the
    search finds the inward tips of it, which lie within a radius computed as if arithmetic were exact.

    Attributes:
        descents: linearisations, >= 1.
        rounds: rounds of the search among the floats, >= 1; one evaluation each.
        classes: the strongest other classes that are considered, >= 1.

    Reference: Jin, Ohrimenko, Rubinstein, Getting a-Round Guarantees: Floating-Point Attacks on Certified Robustness,
    2022; the linearisation from x is the Hasofer-Lind-Rackwitz-Fiessler iteration.
    """

    name = "rounding-search"
    norms = ("l2", "linf", "l1")
    minimum_norm = True

    descents: int = 20
    rounds: int = 200
    classes: int = 10

    def __post_init__(self) -> None:
        whole("descents", self.descents)
        whole("rounds", self.rounds)
        whole("classes", self.classes)

    def cost(self, classes: int) -> float:
        """Return the gradients of all linearisations and the forwards of all rounds."""
        return self.descents * (min(self.classes, classes - 1) + 2.0) + self.rounds / 2

    def hardened(self) -> "RoundingSearch":
        """Return at least 40 linearisations and 1000 rounds."""
        return replace(self, descents=max(self.descents, 40), rounds=max(self.rounds, 1000))

    def _run(self, task: Task) -> Tensor:
        closest = Closest(task)
        self._descend(task, closest)
        with torch.no_grad():
            found = closest.distance.isfinite()
            if bool(found.any()):
                self._search(task[found], closest, found.nonzero().squeeze(1))
        return closest.point

    def _descend(self, task: Task, closest: Closest) -> None:
        """Offer the boundary points of the model linearised at x, then at that point, and so on."""
        z = task.x
        for step in range(self.descents):
            target = task.x + self._linearised(task, z)
            share = 1.0 if step % 4 < 3 else 0.5  # a shorter step now and then breaks cycles between two pieces
            z = (z + share * (target - z)).clamp(0.0, 1.0).to(z.dtype)
            with torch.no_grad():
                self._cross(task, z, closest)

    def _linearised(self, task: Task, z: Tensor) -> Tensor:
        """Return the move from x to the nearest class boundary of the model linearised at `z`, in float64."""
        _, _, values, gradients = class_gradients(task, z, self.classes)
        covered = (gradients.double() * (z.double() - task.x.double()).unsqueeze(1)).flatten(2).sum(2)
        gaps = (covered - values.double()).clamp_min(0.0)
        return nearest_move(task, gradients, gaps)

    def _cross(self, task: Task, z: Tensor, closest: Closest) -> None:
        """Offer `z` and, where it is not adversarial, points farther out on the ray from x through it."""
        standing = ~closest.offer(z, task.victim.logits(z))
        size = task.distance(z)
        least = torch.where(size > 0, task.certified / size, 1.0).clamp_min(1.0)
        share = torch.finfo(z.dtype).eps
        while bool(standing.any()) and share < _BEYOND:
            rows = standing.nonzero().squeeze(1)
            part = task[rows]
            stretch = per_sample(least[rows] * (1 + share), z)
            farther = _rounded(part.x.double() + stretch * (z[rows].double() - part.x.double()), z.dtype)
            standing[rows] = ~closest.offer_rows(rows, farther, task.victim.logits(farther))
            share *= 8

    def _search(self, task: Task, closest: Closest, rows: Tensor) -> None:
        """Look for adversarial floats nearer than those held of the samples `rows`, which `task` consists of."""
        point = closest.point[rows]
        point, logits = shorten(task, point, task.victim.logits(point))
        closest.offer_rows(rows, point, logits)
        step = closest.distance[rows] * torch.finfo(point.dtype).eps
        for number in range(self.rounds):
            point, distance = closest.point[rows], closest.distance[rows]
            leap = number % 2 == 0
            if leap:
                z = self._nearer(task, point, distance - step, *_JITTERS[number // 2 % len(_JITTERS)])
            else:
                z = _stepped_back(point, task.x, _SHARES[number // 2 % len(_SHARES)])
            closest.offer_rows(rows, z, task.victim.logits(z))
            if leap:
                step = step * torch.where(closest.distance[rows] < distance, 2.0, 0.9)

    def _nearer(self, task: Task, point: Tensor, radius: Tensor, ulps: float, share: float) -> Tensor:
        """Return points in the balls of `radius` (B,) around x beside `point`, rounded up or down at random."""
        delta = point.double() - task.x.double()
        typical = delta.flatten(1).square().mean(1).sqrt()
        unit = torch.finfo(point.dtype).eps * torch.maximum(point.double(), per_sample(typical, point))
        chosen = torch.rand(delta.shape, dtype=torch.float64, device=delta.device) < share
        jitter = unit * ulps * torch.randn(delta.shape, dtype=torch.float64, device=delta.device) * chosen
        radius = radius.clamp_min(0.0)
        size = task.norm.size(delta)  # 0 where x itself is adversarial in a batch of this size
        scaled = delta * per_sample(torch.where(size > 0, radius / size, 0.0), delta)
        z = _rounded(task.x.double() + task.norm.project(scaled + jitter, radius), point.dtype)
        outside = (z.double() - task.x.double()).abs() > per_sample(radius, z)  # by this entry alone
        return torch.where(outside, torch.nextafter(z, task.x), z)


def _rounded(z: Tensor, dtype: torch.dtype) -> Tensor:  # z: float64 (B, ...)
    """Return each entry of `z`, clipped to the box, as one of its two neighbours in `dtype`, chosen at random."""
    near = z.clamp(0.0, 1.0).to(dtype)
    side = z - near.double()
    side = torch.where(side == 0, torch.rand(z.shape, device=z.device) - 0.5, side)
    other = torch.nextafter(near, torch.copysign(torch.tensor(torch.inf, device=z.device), side).to(dtype))
    return torch.where(torch.rand(z.shape, device=z.device) < 0.5, near, other).clamp(0.0, 1.0)


def _stepped_back(point: Tensor, x: Tensor, share: float) -> Tensor:
    """Return `point` with a random share of the entries moved to the next float in the direction of `x`."""
    chosen = torch.rand(point.shape, device=point.device) < share
    return torch.where(chosen, torch.nextafter(point, x), point)

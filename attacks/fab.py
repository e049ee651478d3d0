"""FAB: project onto the linearised decision boundary, pulled towards x, and step back when across."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Attack
from .boxed import random_start, shortest
from .checks import whole
from .keepers import Closest
from .losses import strongest_classes
from .norms import per_sample
from .slopes import class_gradients, differences
from .task import Task

_ALL = 2**31  # classes that are linearised: all but y
_OVERSHOOT = 1.05
_BACKWARD = 0.9
_BIAS = 0.1  # the largest weight of the projection of x, against that of z


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Fast adaptive boundary attack, a minimum-norm attack.

    With d_z and d_x the shortest moves of z and of x onto the linearised boundary within the box, z becomes
    (1 - a) (z + 1.05 d_z) + a (x + 1.05 d_x), a = min(||d_z|| / (||d_z|| + ||d_x||), 0.1), clipped to the box; where
    that is adversarial, it is offered and z moves back to x + 0.9 (z - x). In AutoAttack, which has an eps, a
    sample leaves once a point within eps is found.

    Attributes:
        steps: steps of each run, >= 1.
        restarts: runs for each target, >= 1; the first starts at x, the others at random, at half the smallest
            distance found so far, or half of eps where there is one and nothing nearer was found.
        targets: the strongest wrong classes at x, each the target of its own run (FAB-T), >= 1; None for the nearest
            of all linearised boundaries at each step, which takes K - 1 gradients a step.

    Reference: Croce and Hein, Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack, ICML 2020,
    algorithm 1; the targeted form is of Reliable Evaluation, ICML 2020, section 5.
    """

    name = "fab"
    norms = ("l2", "linf", "l1")
    minimum_norm = True

    steps: int = 100
    restarts: int = 1
    targets: int | None = 9

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("restarts", self.restarts)
        if self.targets is not None:
            whole("targets", self.targets)

    def cost(self, classes: int) -> float:
        """Return the work of all runs: a step takes two forward passes, and one backward pass for each boundary."""
        if self.targets is None:
            return self.steps * self.restarts * (classes + 1) / 2
        return self.steps * self.restarts * 1.5 * min(self.targets, classes - 1)

    def hardened(self) -> "FAB":
        """Return at least 5 restarts."""
        return replace(self, restarts=max(self.restarts, 5))

    def _run(self, task: Task) -> Tensor:
        closest = Closest(task)
        targets = None if self.targets is None else strongest_classes(task, self.targets)
        for rank in range(1 if targets is None else targets.shape[1]):
            for restart in range(self.restarts):
                rows = _open(task, closest, torch.arange(len(task.x), device=task.x.device))
                if len(rows) == 0:
                    return closest.point
                start = _start(task, closest)[rows] if restart else task.x[rows].clone()
                self._search(task, closest, rows, start, None if targets is None else targets[:, rank])
        return closest.point

    def _search(self, task: Task, closest: Closest, rows: Tensor, z: Tensor, target: Tensor | None) -> None:
        """Run from `z` for the samples `rows` towards their `target` (B,), or to the nearest class."""
        part = task[rows]
        for _ in range(self.steps):
            z = _projected(part, z, *_boundary(part, z, None if target is None else target[rows]))
            with torch.no_grad():
                adversarial = closest.offer_rows(rows, z, part.victim.logits(z))
            z = torch.where(per_sample(adversarial, z), part.x + _BACKWARD * (z - part.x), z)
            left = _open(task, closest, rows)
            if len(left) < len(rows):
                z, rows, part = z[torch.isin(rows, left)], left, task[left]
                if len(rows) == 0:
                    return


def _open(task: Task, closest: Closest, rows: Tensor) -> Tensor:
    """Return those of `rows` that still have something to find: all of them where there is no eps."""
    within = closest.distance[rows] <= task.eps
    return rows if task.eps == torch.inf else rows[~within]


def _start(task: Task, closest: Closest) -> Tensor:
    reach = torch.minimum(closest.distance, torch.full_like(closest.distance, task.eps))
    reach = torch.where(reach.isfinite(), reach, 0.0)
    around = random_start(replace(task, eps=1.0)) - task.x
    return (task.x + per_sample(reach / 2, around).to(around.dtype) * around).clamp(0.0, 1.0)


def _boundary(task: Task, z: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the value (B,) and the gradient (B, ...) of f_j - f_y at z, for the target j or the nearest j."""
    if target is not None:
        logits, gradient = task.victim.gradient(
            z, lambda logits: differences(logits, task.y, target.unsqueeze(1)).squeeze(1)
        )
        return differences(logits, task.y, target.unsqueeze(1)).squeeze(1), gradient
    _, _, values, gradients = class_gradients(task, z, _ALL)
    slopes = task.norm.dual(gradients.flatten(0, 1)).reshape(values.shape)
    nearest = torch.where(slopes > 0, values.abs().double() / slopes, torch.inf).argmin(1)
    rows = torch.arange(len(z), device=z.device)
    return values[rows, nearest], gradients[rows, nearest]


def _projected(task: Task, z: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Return the step of the attack from z, for the boundary value + <gradient, . - z> = 0."""
    at_x = value + (gradient * (task.x - z)).flatten(1).sum(1)
    from_z = shortest(task.norm, z, gradient, -value)
    from_x = shortest(task.norm, task.x, gradient, -at_x)
    size_z, size_x = task.norm.size(from_z).clamp_min(1e-8), task.norm.size(from_x).clamp_min(1e-8)
    bias = per_sample((size_z / (size_z + size_x)).clamp_max(_BIAS), z).to(z.dtype)
    moved = (1 - bias) * (z + _OVERSHOOT * from_z) + bias * (task.x + _OVERSHOOT * from_x)
    return moved.clamp(0.0, 1.0)

"""FMN: gradient steps in a ball whose radius is held at the boundary."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .base import Attack
from .checks import positive, whole
from .keepers import Closest
from .norms import NORMS, per_sample
from .polish import ROUNDS, offer_first, polish
from .slopes import FirstOrder, awake, cooled, inward
from .starts import begin
from .task import Task


@dataclass(frozen=True, kw_only=True)
class FMN(Attack):
    """Fast minimum-norm attack in l2, l-infinity and l1.

    With g the gradient of the loss at x + delta, the radius becomes (1 + gamma_k) times the last one where the point is
    not adversarial, and min((1 - gamma_k) times the last one, the smallest size found) where it is. Then
    delta <- clip(project(delta + a_k r_k ||d||_2 g / ||g||_2, radius)), d the steepest direction of size 1, which is
    sqrt(n) long in l-infinity and else 1. gamma_k and a_k fall along a cosine. The loss is the logit difference in
    units of distance, soft in the first half of the steps. In the paper the a_k are lengths in units of x, and the
    radius is the first-order distance until a point is found, which may stop short of the boundary; here the first
    radius is as in DDN. Where the gradient is 0, g is random.

    Attributes:
        steps: steps of each run, >= 1.
        alpha: a_0 > 0; the last a_k is 1 % of it.
        gamma: first relative change of the radius, in (0, 1); the last one is 2 % of it.
        restarts: runs, >= 1; those after the first begin elsewhere, at the smallest distance found.
        classes: the strongest other classes that are considered, >= 1.

    Reference: Pintor et al., Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints, NeurIPS 2021.
    """

    name = "fmn"
    norms = ("l2", "linf", "l1")
    minimum_norm = True

    steps: int = 100
    alpha: float = 1.0
    gamma: float = 0.05
    restarts: int = 1
    classes: int = 10

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        positive("alpha", self.alpha)
        positive("gamma", self.gamma, below=1)
        whole("restarts", self.restarts)
        whole("classes", self.classes)

    def cost(self, classes: int) -> float:
        """Return the gradients of all steps and of the slopes at x, and what the last refinement takes."""
        return self.restarts * (self.steps + 4.0 * ROUNDS) + min(self.classes, classes - 1)

    def hardened(self) -> "FMN":
        """Return three runs of at least 200 steps."""
        return replace(self, steps=max(self.steps, 200), restarts=max(self.restarts, 3))

    def _run(self, task: Task) -> Tensor:
        objective = FirstOrder.of(task, self.classes)
        closest = Closest(task)
        offer_first(task, closest, objective.move)
        for number in range(self.restarts):
            self._descend(task, objective, closest, *begin(task, objective, closest, number))
        return closest.point

    def _descend(self, task: Task, objective: FirstOrder, closest: Closest, radius: Tensor, delta: Tensor) -> None:
        for step in range(self.steps):
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            gamma, alpha = (self.gamma * (0.02 + 0.98 * cosine), self.alpha * (0.01 + 0.99 * cosine))
            z = task.x + delta
            loss = partial(objective.loss, heat=cooled(step, self.steps))
            logits, gradient = task.victim.gradient(z, loss)
            adversarial = closest.offer(z, logits)
            smaller = torch.minimum(radius * (1 - gamma), closest.distance)
            radius = torch.where(adversarial, smaller, radius * (1 + gamma))
            gradient = awake(inward(z, gradient))
            length = alpha * radius * NORMS["l2"].size(task.norm.steepest(gradient))
            move = per_sample(length, delta).to(delta.dtype) * NORMS["l2"].steepest(gradient)
            delta = task.norm.project(delta + move, radius)
            delta = (task.x + delta).clamp(0.0, 1.0) - task.x
        with torch.no_grad():
            closest.offer(task.x + delta, task.victim.logits(task.x + delta))
        polish(task, closest)

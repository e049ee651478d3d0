"""FMN: gradient steps in a ball whose radius is held at the boundary."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Attack
from .checks import positive, whole
from .keepers import Closest
from .norms import per_sample
from .slopes import FirstOrder, inward
from .task import Task


@dataclass(frozen=True, kw_only=True)
class FMN(Attack):
    """Fast minimum-norm attack in l2, l-infinity and l1.

    With the loss L (>= 0 beyond the boundary) and its gradient g at x + delta, the radius becomes (1 + gamma_k) times
    ||delta|| + |L| / ||g||_q until a first adversarial point is found, then (1 + gamma_k) times the last one where the
    point is not adversarial, and min((1 - gamma_k) times the last one, the smallest size found) where it is. Then
    delta <- clip(project(delta + a_k g / ||g||_2, radius)). gamma_k and a_k fall along a cosine. L is the logit
    difference in units of distance. The paper's first radius lacks the factor, and may stop short of the boundary.

    Attributes:
        steps: steps, >= 1.
        alpha: the first step's length in units of x, > 0; the last one's is 1 % of it.
        gamma: first relative change of the radius, in (0, 1); the last one is 2 % of it.
        classes: the strongest other classes that are considered, >= 1.

    Reference: Pintor et al., Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints, NeurIPS 2021.
    """

    name = "fmn"
    norms = ("l2", "linf", "l1")
    minimum_norm = True

    steps: int = 100
    alpha: float = 1.0
    gamma: float = 0.05
    classes: int = 10

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        positive("alpha", self.alpha)
        positive("gamma", self.gamma, below=1)
        whole("classes", self.classes)

    def _run(self, task: Task) -> Tensor:
        objective = FirstOrder.of(task, self.classes)
        closest = Closest(task)
        delta = torch.zeros_like(task.x)
        radius = torch.full((len(delta),), torch.inf, dtype=torch.float64, device=delta.device)
        for step in range(self.steps):
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            gamma, alpha = (self.gamma * (0.02 + 0.98 * cosine), self.alpha * (0.01 + 0.99 * cosine))
            z = task.x + delta
            logits, gradient = task.victim.gradient(z, objective.loss)
            adversarial = closest.offer(z, logits)
            gradient = inward(z, gradient)
            smaller = torch.minimum(radius * (1 - gamma), closest.distance)
            reach = task.norm.size(delta) + objective.loss(logits).abs().double() / task.norm.dual(gradient)
            larger = (1 + gamma) * torch.where(closest.distance.isfinite(), radius, reach)
            radius = torch.where(adversarial, smaller, larger)
            length = gradient.flatten(1).norm(dim=1)
            scale = torch.where(length > 0, alpha / length, 0.0)
            delta = task.norm.project(delta + per_sample(scale, delta) * gradient, radius)
            delta = (task.x + delta).clamp(0.0, 1.0) - task.x
        with torch.no_grad():
            closest.offer(task.x + delta, task.victim.logits(task.x + delta))
        return closest.point

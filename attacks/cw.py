"""Carlini and Wagner's l2 attack, on logit differences, with a binary search of its constant."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Attack
from .checks import positive, whole
from .keepers import Closest
from .norms import per_sample
from .polish import ROUNDS, offer_first, polish
from .slopes import FirstOrder
from .starts import start_radius
from .task import Task


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(Attack):
    """Minimise ||z - x||_2^2 + c max(-L(z), 0) over the box by projected Adam, for the smallest c that succeeds.

    L is the logit difference in units of distance, >= 0 beyond the boundary; differences make the attack blind to
    a shift of the logits. c starts at three times the first-order distance to the boundary or the certified radius, the
    larger one (an affine model needs two), grows tenfold while nothing is found and is bisected after that. The box is
    held by projection: with the paper's tanh, pixels at 0 or 1, most of a handwritten digit, have next to no gradient.

    Attributes:
        steps: steps of Adam for each c, >= 1.
        searches: values of c that are tried, >= 1.
        lr: Adam's first step in units of x, > 0; it falls to 1 % along a cosine.
        classes: the strongest other classes that are considered, >= 1.

    Reference: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017, sections V and VI.
    """

    name = "cw"
    norms = ("l2",)
    minimum_norm = True

    steps: int = 100
    searches: int = 5
    lr: float = 0.01
    classes: int = 10

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("searches", self.searches)
        positive("lr", self.lr)
        whole("classes", self.classes)

    def cost(self, classes: int) -> float:
        """Return the gradients of all steps and of the slopes at x, and what the last refinement takes."""
        return self.searches * self.steps + min(self.classes, classes - 1) + 4.0 * ROUNDS

    def hardened(self) -> "CarliniWagner":
        """Return at least nine searches of at least 200 steps."""
        return replace(self, steps=max(self.steps, 200), searches=max(self.searches, 9))

    def _run(self, task: Task) -> Tensor:
        objective = FirstOrder.of(task, self.classes)
        closest = Closest(task)
        offer_first(task, closest, objective.move)
        c = 3 * start_radius(task, objective).to(task.x.dtype)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches):
            found = self._minimise(task, objective, closest, c)
            low, high = torch.where(found, low, c), torch.where(found, c, high)
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        polish(task, closest)
        return closest.point

    def _minimise(self, task: Task, objective: FirstOrder, closest: Closest, c: Tensor) -> Tensor:
        """Run Adam for the constants `c` (B,); return for which samples it met an adversarial point."""
        delta = torch.zeros_like(task.x)
        mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
        found = torch.zeros_like(c, dtype=torch.bool)
        for step in range(1, self.steps + 1):
            z = task.x + delta
            logits, gradient = task.victim.gradient(z, lambda logits: -objective.loss(logits).clamp_max(0.0))
            found |= closest.offer(z, logits)
            gradient = per_sample(c, delta) * gradient + 2 * delta
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            lr = self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            move = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-12)
            delta = (task.x + delta - lr * move).clamp(0.0, 1.0) - task.x
        return found

"""DDN: gradient steps on a sphere whose radius shrinks while inside the other class and grows while outside."""

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
class DDN(Attack):
    """Decoupled direction and norm, an l2 minimum-norm attack.

    delta <- delta + a_k g / ||g||_2, then delta <- r_k delta / ||delta||_2, then clip to the box, with
    r_k = (1 - gamma) r_{k-1} where the last point was adversarial and (1 + gamma) r_{k-1} where not. The step a_k
    falls from the radius of the start to 1 % of it along a cosine. The paper starts every sample at r_0 = 1 with
    a_0 = 1 and takes g from the cross-entropy; here r_0 = a_0 is the first-order distance to the boundary and g
    the gradient of the loss in units of distance, so that neither the units of x nor the scale of the logits matter.

    Attributes:
        steps: steps, >= 1.
        gamma: relative change of the radius, in (0, 1).
        classes: the strongest other classes that are considered, >= 1.

    Reference: Rony et al., Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and
    Defenses, CVPR 2019, algorithm 1.
    """

    name = "ddn"
    norms = ("l2",)
    minimum_norm = True

    steps: int = 100
    gamma: float = 0.05
    classes: int = 10

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        positive("gamma", self.gamma, below=1)
        whole("classes", self.classes)

    def _run(self, task: Task) -> Tensor:
        objective = FirstOrder.of(task, self.classes)
        closest = Closest(task)
        start = start_radius(task, objective)
        radius, delta = start, torch.zeros_like(task.x)
        for step in range(self.steps):
            z = task.x + delta
            logits, gradient = task.victim.gradient(z, objective.loss)
            adversarial = closest.offer(z, logits)
            gradient = inward(z, gradient)
            radius = radius * torch.where(adversarial, 1 - self.gamma, 1 + self.gamma)
            size = start * (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            delta = delta + per_sample(size, delta).to(delta.dtype) * task.norm.steepest(gradient)
            delta = per_sample(radius, delta).to(delta.dtype) * task.norm.steepest(delta)
            delta = (task.x + delta).clamp(0.0, 1.0) - task.x
        with torch.no_grad():
            closest.offer(task.x + delta, task.victim.logits(task.x + delta))
        return closest.point


def start_radius(task: Task, objective: FirstOrder) -> Tensor:  # returns (B,) float64
    """Return the first-order distance to the boundary, held within [1e-4, the size of the box]."""
    widest = task.norm.size(torch.ones_like(task.x))
    return torch.minimum((-objective.start).double().clamp_min(1e-4), widest)

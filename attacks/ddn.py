"""DDN: gradient steps on a sphere whose radius shrinks while inside the other class and grows while outside."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .base import Attack
from .checks import positive, whole
from .keepers import Closest
from .norms import per_sample
from .polish import ROUNDS, offer_first, polish
from .slopes import FirstOrder, awake, cooled, inward
from .starts import begin, on_sphere
from .task import Task


@dataclass(frozen=True, kw_only=True)
class DDN(Attack):
    """Decoupled direction and norm, an l2 minimum-norm attack.

    delta <- delta + a_k g / ||g||_2, then delta <- r_k delta / ||delta||_2, then clip to the box, with
    r_k = (1 - gamma_k) r_{k-1} where the last point was adversarial and (1 + gamma_k) r_{k-1} where not. The paper
    starts every sample at r_0 = 1, lets a_k fall from 1 to 0.01, keeps gamma and takes g from the cross-entropy. Here
    r_0 is the first-order distance to the boundary, or the certified radius where that is larger; a_k falls from r_k to
    1 % of it and gamma_k to 5 % of gamma, both along a cosine; and g is the gradient of the loss in units of distance,
    soft in the first half of the steps. So neither the units of x nor the scale of the logits matter. Where the
    gradient is 0, g is random.

    Attributes:
        steps: steps of each run, >= 1.
        gamma: first relative change of the radius, in (0, 1).
        restarts: runs, >= 1; those after the first begin elsewhere, at the smallest distance found.
        classes: the strongest other classes that are considered, >= 1.

    Reference: Rony et al., Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and
    Defenses, CVPR 2019, algorithm 1.
    """

    name = "ddn"
    norms = ("l2",)
    minimum_norm = True

    steps: int = 100
    gamma: float = 0.05
    restarts: int = 1
    classes: int = 10

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        positive("gamma", self.gamma, below=1)
        whole("restarts", self.restarts)
        whole("classes", self.classes)

    def cost(self, classes: int) -> float:
        """Return the gradients of all steps and of the slopes at x, and what the last refinement takes."""
        return self.restarts * (self.steps + 4.0 * ROUNDS) + min(self.classes, classes - 1)

    def hardened(self) -> "DDN":
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
            gamma, share = self.gamma * (0.05 + 0.95 * cosine), 0.01 + 0.99 * cosine
            z = task.x + delta
            loss = partial(objective.loss, heat=cooled(step, self.steps))
            logits, gradient = task.victim.gradient(z, loss)
            adversarial = closest.offer(z, logits)
            radius = radius * torch.where(adversarial, 1 - gamma, 1 + gamma)
            direction = task.norm.steepest(awake(inward(z, gradient)))
            move = per_sample(share * radius, delta).to(delta.dtype) * direction
            delta = on_sphere(task, delta + move, radius)
        with torch.no_grad():
            closest.offer(task.x + delta, task.victim.logits(task.x + delta))
        polish(task, closest)

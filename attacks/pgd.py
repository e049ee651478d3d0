"""Projected gradient ascent in a ball, with momentum, restarts and a choice of losses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Attack
from .boxed import project, random_start, sparse_step
from .checks import positive, whole
from .losses import LOSSES, RIVALS, Objective, objective
from .norms import per_sample
from .slopes import inward
from .standing import Standing
from .task import Task


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """z <- project(z + alpha d), from random starts; `project` is onto the ball and the box together.

    With g the gradient of the loss at z, without the entries that push out of the box, and v <- momentum v +
    g / ||g||_1, d is sign(v) in l-infinity and v / ||v||_2 in l2. In l1, alpha d moves the entries with the largest
    |v|, each by alpha over 1 % of their number or as far as the box lets it, until alpha is spent. Samples leave at
    their first adversarial point; of the others the strongest point on the path counts, not the last. Each restart
    goes on with the samples that still stand.

    Attributes:
        steps: steps of each restart, >= 1.
        restarts: starts, >= 1.
        alpha: step size in units of x, > 0; None for 2.5 eps / steps.
        random_start: False lets the first restart begin at x, as it always does in l1, where few steps make little of
            a random start.
        loss: "ce", as published, "margin", "dlr" or "logit-difference" (losses.py has the formulas), which is as strong
            or stronger, above all where all logits are close; "cycle" takes them in turn, one for each restart.
        momentum: the share of v that stays from step to step, in [0, 1).

    Reference: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018; Dong et al.,
    Boosting Adversarial Attacks with Momentum, CVPR 2018; the l1 step follows Tramer and Boneh, Adversarial
    Training and Robustness for Multiple Perturbations, NeurIPS 2019, whose step does not look at the box.
    """

    name = "pgd"
    norms = ("l2", "linf", "l1")

    steps: int = 40
    restarts: int = 1
    alpha: float | None = None
    random_start: bool = True
    loss: str = "logit-difference"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("restarts", self.restarts)
        if self.alpha is not None:
            positive("alpha", self.alpha)
        if self.loss not in (*LOSSES, "cycle"):
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, cycle, got {self.loss!r}")
        if self.momentum != 0:
            positive("momentum", self.momentum, below=1)

    def cost(self, classes: int) -> float:
        """Return the work of all steps, a gradient each, and of the slopes at x."""
        slopes = min(RIVALS, classes - 1) if self.loss in ("logit-difference", "cycle") else 0
        return float(self.steps * self.restarts + slopes)

    def hardened(self) -> "PGD":
        """Return at least 100 steps and 8 restarts that cycle through the losses."""
        return replace(self, steps=max(self.steps, 100), restarts=max(self.restarts, 2 * len(LOSSES)), loss="cycle")

    def _run(self, task: Task) -> Tensor:
        standing = Standing(task)
        for restart in range(self.restarts):
            if len(standing) == 0:
                break
            name = LOSSES[restart % len(LOSSES)] if self.loss == "cycle" else self.loss
            drawn = restart > 0 or (self.random_start and task.norm.name != "l1")
            start = random_start(standing.part) if drawn else standing.part.x.clone()
            self._ascend(standing, objective(name, standing.part), start)
        return standing.best.point

    def _ascend(self, standing: Standing, loss: Objective, z: Tensor) -> None:
        velocity = torch.zeros_like(z)
        for _ in range(self.steps):
            logits, gradient = standing.part.victim.gradient(z, loss)
            keep = standing.offer(z, logits)
            if keep is not None:
                z, velocity, gradient, loss = z[keep], velocity[keep], gradient[keep], loss[keep]
                if len(z) == 0:
                    return
            velocity = self.momentum * velocity + _unit_l1(inward(z, gradient))
            z = self._step(standing.part, z, velocity)
        with torch.no_grad():
            standing.offer(z, standing.part.victim.logits(z))

    def _step(self, task: Task, z: Tensor, velocity: Tensor) -> Tensor:
        alpha = self.alpha or 2.5 * task.eps / self.steps
        move = sparse_step(z, velocity, alpha) if task.norm.name == "l1" else alpha * task.norm.steepest(velocity)
        return (task.x + project(task, z + move - task.x)).clamp(0.0, 1.0)


def _unit_l1(gradient: Tensor) -> Tensor:
    size = gradient.double().flatten(1).abs().sum(1)
    scale = torch.where(size > 0, 1 / size, 0.0)
    return (gradient.double() * per_sample(scale, gradient)).to(gradient.dtype)

"""APGD: gradient ascent that halves its step by itself, on the cross-entropy, DLR and targeted DLR losses."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Attack
from .boxed import random_start
from .checks import whole
from .losses import Objective, objective, strongest_classes, targeted_dlr
from .norms import per_sample
from .standing import Standing
from .task import Task


@dataclass(frozen=True, kw_only=True)
class _APGD(Attack):
    """What the three share: restarts of `Climb` on the samples that still stand."""

    norms = ("l2", "linf")

    steps: int = 100
    restarts: int = 1

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("restarts", self.restarts)

    def cost(self, classes: int) -> float:
        """Return the work of all steps, a gradient each."""
        return float((self.steps + 1) * self.restarts)

    @abstractmethod
    def _losses(self, standing: Standing) -> Iterator[Objective]:
        """Yield the loss of each restart, for the samples that stand when it is asked for."""

    def _run(self, task: Task) -> Tensor:
        standing = Standing(task)
        for loss in self._losses(standing):
            Climb(standing, loss, self.steps).run()
            if len(standing) == 0:
                break
        return standing.best.point


@dataclass(frozen=True, kw_only=True)
class APGDCE(_APGD):
    """APGD on the cross-entropy, in the monotone form of losses.py that float32 does not cut off.

    Attributes:
        steps: steps of each restart, >= 1.
        restarts: random starts, >= 1.

    Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-Free Attacks, ICML 2020, algorithm 1.
    """

    name = "apgd-ce"
    loss = "ce"

    def hardened(self) -> "APGDCE":
        """Return at least 5 restarts."""
        return replace(self, restarts=max(self.restarts, 5))

    def _losses(self, standing: Standing) -> Iterator[Objective]:
        for _ in range(self.restarts):
            yield objective(self.loss, standing.part)


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGDCE):
    """APGD on the difference of logits ratio; its options are those of "apgd-ce"."""

    name = "apgd-dlr"
    loss = "dlr"

    def hardened(self) -> "APGDDLR":
        """Return at least 5 restarts."""
        return replace(self, restarts=max(self.restarts, 5))

    def _notes(self, classes: int) -> tuple[str, ...]:
        if classes > 2:
            return ()
        return (f"{self.name}: the DLR loss needs 3 classes; with 2, it used the logit difference",)


@dataclass(frozen=True, kw_only=True)
class APGDT(_APGD):
    """APGD on the targeted DLR loss, for the strongest wrong classes at x in turn.

    Attributes:
        steps: steps of each run, >= 1.
        restarts: random starts for each target, >= 1.
        targets: how many classes it goes for, >= 1; at most K - 1.

    Reference: Croce and Hein, ICML 2020, section 4.
    """

    name = "apgd-t"

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("targets", self.targets)

    def cost(self, classes: int) -> float:
        """Return the work of the runs of all targets."""
        return super().cost(classes) * min(self.targets, classes - 1)

    def hardened(self) -> "APGDT":
        """Return at least 2 restarts and 20 targets."""
        return replace(self, restarts=max(self.restarts, 2), targets=max(self.targets, 20))

    def _notes(self, classes: int) -> tuple[str, ...]:
        if classes >= 4:
            return ()
        loss = "the logit difference" if classes == 2 else "(f_t - f_y) / (f_(1) - f_(3))"
        return (f"{self.name}: the targeted DLR loss needs 4 classes; with {classes}, it used {loss}",)

    def _losses(self, standing: Standing) -> Iterator[Objective]:
        classes = strongest_classes(standing.part, self.targets)
        for rank in range(classes.shape[1]):
            for _ in range(self.restarts):
                yield Objective(targeted_dlr, standing.part.y, (classes[standing.rows, rank],))


class Climb:
    """One run of APGD from a random start over the samples that stand.

    z+ = P(z + eta g), z <- P(z + 0.75 (z+ - z) + 0.25 (z - z_before)), with g the steepest direction. eta starts at
    2 eps. At the checkpoints, after 0.22, 0.41, 0.57, ... of the steps, it is halved where at most 3/4 of the steps
    since the last one raised the loss, or where neither it nor the best loss changed there; from there the run goes on
    from the best point.
    """

    z: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    checked_loss: Tensor
    halved: Tensor
    rises: Tensor
    size: Tensor
    _STATE = (
        "z",
        "before",
        "gradient",
        "loss",
        "best",
        "best_gradient",
        "best_loss",
        "checked_loss",
        "halved",
        "rises",
        "size",
    )

    def __init__(self, standing: Standing, objective: Objective, steps: int) -> None:
        self.standing, self.objective, self.steps = standing, objective, steps

    def run(self) -> None:
        """Make all steps, or as many as some sample stands for."""
        period, done = max(int(0.22 * self.steps), 1), 0
        self._begin()
        for step in range(self.steps):
            if len(self.standing) == 0:
                return
            self._move(0.75 if step else 1.0)
            self._evaluate()
            done += 1
            if done == period:
                self._check(period)
                period, done = max(period - max(int(0.03 * self.steps), 1), int(0.06 * self.steps), 1), 0

    def _begin(self) -> None:
        task = self.standing.part
        self.z = random_start(task)
        count = torch.zeros(len(self.z), dtype=torch.float64, device=self.z.device)
        self.before, self.best = self.z, self.z.clone()
        self.gradient, self.best_gradient = torch.zeros_like(self.z), torch.zeros_like(self.z)
        self.loss, self.best_loss, self.rises = count - torch.inf, count - torch.inf, count.clone()
        self.halved = torch.ones_like(count, dtype=torch.bool)
        self.size = torch.full_like(count, 2 * task.eps)
        self.checked_loss = count
        self._evaluate()
        self.rises, self.checked_loss = torch.zeros_like(self.loss), self.best_loss.clone()

    def _evaluate(self) -> None:
        """Take the loss and gradient at z; samples that fell leave."""
        logits, gradient = self.standing.part.victim.gradient(self.z, self.objective)
        loss = self.objective(logits)
        self.rises += loss > self.loss
        self.gradient, self.loss = gradient, loss
        better = loss > self.best_loss
        self.best[better], self.best_gradient[better] = self.z[better], gradient[better]
        self.best_loss[better] = loss[better]
        keep = self.standing.offer(self.z, logits)
        if keep is not None:
            self.objective = self.objective[keep]
            for name in self._STATE:
                setattr(self, name, getattr(self, name)[keep])

    def _move(self, share: float) -> None:
        task, z = self.standing.part, self.z
        size = per_sample(self.size, z).to(z.dtype)
        ahead = _held(task, z + size * task.norm.steepest(self.gradient))
        mixed = z + share * (ahead - z) + (1 - share) * (z - self.before)
        self.before, self.z = z, _held(task, mixed)

    def _check(self, period: int) -> None:
        """Halve the step where it brought too little, and go back to the best point there."""
        halve = (self.rises <= 0.75 * period) | (~self.halved & (self.checked_loss >= self.best_loss))
        self.halved, self.checked_loss, self.rises = halve, self.best_loss.clone(), torch.zeros_like(self.rises)
        self.size = torch.where(halve, self.size / 2, self.size)
        self.z = torch.where(per_sample(halve, self.z), self.best, self.z)
        self.gradient = torch.where(per_sample(halve, self.z), self.best_gradient, self.gradient)


def _held(task: Task, z: Tensor) -> Tensor:
    """Return `z` projected onto the ball, then clipped to the box."""
    radius = torch.full((len(z),), task.eps, dtype=torch.float64, device=z.device)
    return (task.x + task.norm.project(z - task.x, radius)).clamp(0.0, 1.0)

"""Fixed-eps attacks along the gradient of the cross-entropy: FGSM and PGD."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, precise
from .base import Attack
from .checks import positive, whole
from .keepers import Strongest
from .task import Task


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of size eps along the steepest ascent direction d of the cross-entropy: x + eps d, clipped to the box.

    d is the gradient's sign in l-infinity (run by torchattacks) and gradient / ||gradient||_2 in l2 (which it lacks).

    Reference: Goodfellow et al., Explaining and Harnessing Adversarial Examples, ICLR 2015.
    """

    name = "fgsm"
    norms = ("l2", "linf")

    def _run(self, task: Task) -> Tensor:
        if task.norm.name == "linf":
            from torchattacks import FGSM as Member

            adapter = Adapter(task, precise)
            return adapter.attack(Member(adapter, eps=task.eps), task)
        cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
        _, gradient = task.victim.gradient(task.x, lambda logits: cross_entropy(precise(logits), task.y))
        return task.x + task.eps * task.norm.steepest(gradient)


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on the cross-entropy from random starts in the ball, run by torchattacks.

    Each restart goes on with the samples that still stand, and the strongest point on each path counts, not the last.

    Attributes:
        steps: steps of each restart, >= 1.
        restarts: random starts, >= 1.
        alpha: step size in units of x, > 0; None for 2.5 eps / steps.
        random_start: start at random in the ball, not at x.

    Reference: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """

    name = "pgd"
    norms = ("l2", "linf")

    steps: int = 40
    restarts: int = 1
    alpha: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("restarts", self.restarts)
        if self.alpha is not None:
            positive("alpha", self.alpha)

    def _run(self, task: Task) -> Tensor:
        best = Strongest(task)
        standing = torch.arange(len(task.x), device=task.x.device)
        for _ in range(self.restarts):
            point, logits = self._restart(task[standing])
            best.offer_rows(standing, point, logits)
            standing = standing[task[standing].margin(logits) < 0]
            if len(standing) == 0:
                break
        return best.point

    def _restart(self, task: Task) -> tuple[Tensor, Tensor]:
        from torchattacks import PGD as LinfMember
        from torchattacks import PGDL2 as L2Member

        path = Strongest(task)
        adapter = Adapter(task, precise, watch=path.offer)
        member = (LinfMember if task.norm.name == "linf" else L2Member)(
            adapter,
            eps=task.eps,
            alpha=self.alpha or 2.5 * task.eps / self.steps,
            steps=self.steps,
            random_start=self.random_start,
        )
        last = adapter.attack(member, task)
        with torch.no_grad():
            path.offer(last, task.victim.logits(last))
            point = task.admit(path.point)
            return point, task.victim.logits(point)

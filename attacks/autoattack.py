"""AutoAttack: four complementary attacks, each on the samples that withstood those before it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, plain, precise, relative
from .base import Attack
from .checks import whole
from .keepers import Strongest
from .task import Task


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """The standard ensemble: APGD on the cross-entropy, targeted APGD on the DLR loss, targeted FAB, and Square.

    Members run through torchattacks' classes with the paper's settings, which torchattacks' own ensemble does not use
    (it makes 10 steps and takes its seeds from the clock).

    Attributes:
        steps: steps of each APGD and FAB run, >= 1.
        targets: the strongest wrong classes that APGD and FAB go for, each in its own run; at most K - 1 are.
        queries: queries of Square, >= 1.

    Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-Free Attacks, ICML 2020.
    """

    name = "autoattack"
    norms = ("l2", "linf")

    steps: int = 100
    targets: int = 9
    queries: int = 5000

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("targets", self.targets)
        whole("queries", self.queries)

    def _notes(self, classes: int) -> tuple[str, ...]:
        if classes >= 4:
            return ()
        loss = "the logit difference" if classes == 2 else "(f_t - f_y) / (f_(1) - f_(3))"
        return (f"autoattack: the targeted DLR loss needs 4 classes; with {classes}, apgd-t used {loss}",)

    def _run(self, task: Task) -> Tensor:
        best = Strongest(task)
        standing = torch.arange(len(task.x), device=task.x.device)
        for member in self._members(task):
            part = task[standing]
            with torch.no_grad():
                point = part.admit(member(part))
                logits = task.victim.logits(point)
            best.offer_rows(standing, point, logits)
            standing = standing[part.margin(logits) < 0]
            if len(standing) == 0:
                break
        return best.point

    def _members(self, task: Task) -> Iterator[Callable[[Task], Tensor]]:
        with torch.no_grad():
            classes = task.victim.logits(task.x[:1]).shape[1]
        ranks = range(1, min(self.targets, classes - 1) + 1)
        yield self._apgd_ce
        for rank in ranks:
            yield partial(self._apgd_targeted, rank=rank)
        for rank in ranks:
            yield partial(self._fab, rank=rank)
        yield self._square

    def _apgd_ce(self, task: Task) -> Tensor:
        from torchattacks import APGD

        adapter = Adapter(task, precise)
        return adapter.attack(APGD(adapter, loss="ce", steps=self.steps, **_common(task)), task)

    def _apgd_targeted(self, task: Task, rank: int) -> Tensor:
        from .targeted_apgd import TargetedAPGD

        adapter = Adapter(task, precise)
        return adapter.attack(TargetedAPGD(adapter, rank=rank, steps=self.steps, **_common(task, rank)), task)

    def _fab(self, task: Task, rank: int) -> Tensor:
        from torchattacks import FAB

        adapter = Adapter(task, relative)
        member = FAB(adapter, steps=self.steps, multi_targeted=True, **_common(task))
        # torchattacks counts target classes from 2 (the second largest logit) up to n_target_classes + 1.
        member.target_class = rank + 1
        return adapter.attack(lambda x, y: member.attack_single_run_targeted(x, y), task)

    def _square(self, task: Task) -> Tensor:
        from torchattacks import Square

        adapter = Adapter(task, plain, square=True)
        return adapter.attack(Square(adapter, n_queries=self.queries, **_common(task)), task)


def _common(task: Task, offset: int = 0) -> dict[str, Any]:
    norm = {"l2": "L2", "linf": "Linf"}[task.norm.name]
    return {"norm": norm, "eps": task.eps, "seed": task.seed + offset, "n_restarts": 1, "verbose": False}

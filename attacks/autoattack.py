"""AutoAttack: complementary attacks in a cascade, each on the samples that withstood those before it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .apgd import APGDCE, APGDDLR, APGDT
from .base import Attack
from .checks import whole
from .fab import FAB
from .keepers import Strongest
from .square import Square
from .task import Task


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """The ensemble in its paper's settings.

    "standard": apgd-ce, apgd-t, fab (targeted) and square, in this order. "plus": apgd-ce, apgd-dlr and fab
    (untargeted) with 5 restarts each, square, apgd-t and fab (targeted).

    Attributes:
        version: "standard" or "plus".
        steps: steps of each APGD and FAB run, >= 1.
        targets: the strongest wrong classes that apgd-t and fab go for, each in its own run; at most K - 1 are.
        queries: queries of Square, >= 1.

    Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-Free Attacks, ICML 2020.
    """

    name = "autoattack"
    norms = ("l2", "linf")

    version: str = "standard"
    steps: int = 100
    targets: int = 9
    queries: int = 5000

    def __post_init__(self) -> None:
        if self.version not in ("standard", "plus"):
            raise ValueError(f"version must be one of standard, plus, got {self.version!r}")
        whole("steps", self.steps)
        whole("targets", self.targets)
        whole("queries", self.queries)

    def members(self) -> tuple[Attack, ...]:
        """Return the attacks of the cascade, first to last."""
        targeted = APGDT(steps=self.steps, targets=self.targets)
        fab_targeted = FAB(steps=self.steps, targets=self.targets)
        square = Square(queries=self.queries)
        if self.version == "standard":
            return APGDCE(steps=self.steps), targeted, fab_targeted, square
        return (
            APGDCE(steps=self.steps, restarts=5),
            APGDDLR(steps=self.steps, restarts=5),
            FAB(steps=self.steps, restarts=5, targets=None),
            square,
            targeted,
            fab_targeted,
        )

    def cost(self, classes: int) -> float:
        """Return the work of all members."""
        return sum(member.cost(classes) for member in self.members())

    def hardened(self) -> "AutoAttack":
        """Return the version "plus"."""
        return replace(self, version="plus")

    def _notes(self, classes: int) -> tuple[str, ...]:
        return tuple(f"autoattack: {note}" for member in self.members() for note in member._notes(classes))

    def _run(self, task: Task) -> Tensor:
        best = Strongest(task)
        standing = torch.arange(len(task.x), device=task.x.device)
        for member in self.members():
            part = task[standing]
            point = member._run(part)
            with torch.no_grad():
                point = part.admit(point)
                logits = task.victim.logits(point)
            best.offer_rows(standing, point, logits)
            standing = standing[part.margin(logits) < 0]
            if len(standing) == 0:
                break
        return best.point

"""One step along the gradient: FGSM, and its l2 and l1 forms."""

from dataclasses import dataclass

from torch import Tensor

from .base import Attack
from .boxed import steepest
from .losses import objective
from .task import Task


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """The point x + d with the largest <g, d>, g the gradient of the cross-entropy at x, of the ball and the box.

    In l-infinity that is x + eps sign(g), clipped to the box; in l2 x + eps g / ||g||_2 and in l1 the steepest entry
    moved by eps as long as the box does not bind, and where it does the other entries take what is left of eps.

    Reference: Goodfellow et al., Explaining and Harnessing Adversarial Examples, ICLR 2015.
    """

    name = "fgsm"
    norms = ("l2", "linf", "l1")

    def cost(self, classes: int) -> float:
        """Return the work of one gradient."""
        return 1.0

    def _run(self, task: Task) -> Tensor:
        _, gradient = task.victim.gradient(task.x, objective("ce", task))
        return task.x + steepest(task, gradient)

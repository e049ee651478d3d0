"""DeepFool: walk to the nearest boundary of the linearised model, again and again."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Attack
from .checks import positive, whole
from .keepers import Closest
from .norms import per_sample
from .slopes import class_gradients, inward
from .task import Task


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """At each step, z moves by the smallest step that closes the gap min_j |f_j - f_y| / ||grad(f_j - f_y)||_q.

    All samples move at once; those found adversarial leave. A first step that would end within the certified radius is
    made as long as that.

    Attributes:
        steps: steps at most, >= 1.
        overshoot: each step is longer by this fraction, > 0, to get across the boundary.
        classes: the strongest other classes that are considered, >= 1.

    Reference: Moosavi-Dezfooli et al., DeepFool, CVPR 2016, algorithm 2 and its l_p form.
    """

    name = "deepfool"
    norms = ("l2", "linf", "l1")
    minimum_norm = True

    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        positive("overshoot", self.overshoot)
        whole("classes", self.classes)

    def cost(self, classes: int) -> float:
        """Return the gradients of five steps, as many as it usually takes."""
        return (min(self.classes, classes - 1) + 0.5) * min(self.steps, 5)

    def hardened(self) -> "DeepFool":
        """Return a run of at least 200 steps that aim at the boundary itself, to within 0.2 %."""
        return replace(self, steps=max(self.steps, 200), overshoot=min(self.overshoot, 0.002))

    def _run(self, task: Task) -> Tensor:
        closest = Closest(task)
        z = task.x.clone()
        standing = torch.arange(len(z), device=z.device)
        for number in range(self.steps):
            least = task.certified if number == 0 else torch.zeros_like(task.certified)
            step = self._step(task[standing], z[standing], least[standing])
            z[standing] = (z[standing] + (1 + self.overshoot) * step).clamp(0.0, 1.0)
            with torch.no_grad():
                logits = task.victim.logits(z[standing])
            standing = standing[~closest.offer_rows(standing, z[standing], logits)]
            if len(standing) == 0:
                break
        return closest.point

    def _step(self, task: Task, z: Tensor, least: Tensor) -> Tensor:
        """Return the step to the nearest linearised boundary from `z`, of at least the size `least` (B,)."""
        _, _, values, gradients = class_gradients(task, z, self.classes)
        gradients = inward(z.unsqueeze(1), gradients)
        slopes = task.norm.dual(gradients.flatten(0, 1)).reshape(values.shape)
        lengths = torch.where(slopes > 0, values.abs().double() / slopes, torch.inf)
        length, nearest = lengths.min(dim=1)
        length = torch.where(length.isfinite(), torch.maximum(length, least), 0.0)
        direction = task.norm.steepest(gradients[torch.arange(len(z), device=z.device), nearest])
        return direction * per_sample(length, z).to(z.dtype)

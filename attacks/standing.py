"""The samples of a run that still stand: those that fall leave it at once, and cost no further evaluation."""

import torch
from torch import Tensor

from .keepers import Strongest
from .task import Task


class Standing:
    """Follows a fixed-eps run over the samples of `task`.

    Attributes:
        part: the task of the samples that stand, in the order of the run's tensors.
        rows: (b,) their indices in `task`.
        best: the strongest point met of every sample of `task`.
    """

    def __init__(self, task: Task) -> None:
        self.part = task
        self.rows = torch.arange(len(task.x), device=task.x.device)
        self.best = Strongest(task)

    def __len__(self) -> int:
        return len(self.rows)

    def offer(self, z: Tensor, logits: Tensor) -> Tensor | None:  # z: (b, ...), logits: (b, K)
        """Take the points `z` of the standing samples with their logits.

        Returns:
            (b,) bool, the rows that stand on, to be kept of the run's tensors; None where all do. A sample falls when
            its point is adversarial and still is after it was admitted to the ball.
        """
        self.best.offer_rows(self.rows, z, logits)
        fallen = self.part.margin(logits) >= 0
        if not bool(fallen.any()):
            return None
        with torch.no_grad():
            part = self.part[fallen]
            fallen[fallen.clone()] = part.margin(part.victim.logits(part.admit(z[fallen]))) >= 0
        keep = ~fallen
        self.rows, self.part = self.rows[keep], self.part[keep]
        return keep

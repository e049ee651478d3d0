"""Keep the best point seen of each sample, since a loop's last point is rarely its best."""

import torch
from torch import Tensor

from .task import Task, margin


class Closest:
    """The adversarial point nearest to x of each sample; x itself as long as none was offered."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.point = task.x.clone()
        self.distance = torch.full((len(task.x),), torch.inf, dtype=torch.float64, device=task.x.device)

    def offer(self, z: Tensor, logits: Tensor) -> Tensor:  # z: (B, ...), logits: (B, K); returns (B,) bool
        """Take the points that are adversarial and nearer than those held; return which are adversarial."""
        return self.offer_rows(torch.arange(len(z), device=z.device), z, logits)

    def offer_rows(self, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:  # rows: (b,), z: (b, ...), logits: (b, K)
        """Do the same for the samples with the indices `rows` only."""
        part = self.task[rows]
        adversarial = part.margin(logits) >= 0
        distance = part.distance(z)
        better = adversarial & (distance < self.distance[rows])
        self.point[rows[better]] = z[better]
        self.distance[rows[better]] = distance[better]
        return adversarial


class Strongest:
    """The point with the largest margin max_{j != y} f_j - f_y of each sample."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.point = task.x.clone()
        self.margin = torch.full((len(task.x),), -torch.inf, dtype=torch.float64, device=task.x.device)

    def offer(self, z: Tensor, logits: Tensor) -> None:  # z: (B, ...), logits: (B, K)
        """Take the points with a larger margin than those held."""
        self.offer_rows(torch.arange(len(z), device=z.device), z, logits)

    def offer_rows(self, rows: Tensor, z: Tensor, logits: Tensor) -> None:  # rows: (b,), z: (b, ...), logits: (b, K)
        """Do the same for the samples with the indices `rows` only."""
        offered = margin(logits, self.task.y[rows]).double()
        better = offered > self.margin[rows]
        self.point[rows[better]] = z[better].to(self.point.dtype)
        self.margin[rows[better]] = offered[better]

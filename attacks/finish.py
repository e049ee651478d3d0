"""What is done to a candidate before it counts: into the ball, re-scored, and drawn towards x to the boundary."""

import torch
from torch import Tensor

from .task import Task

# A candidate that fails on re-scoring sat on the decision boundary, and rounding undid it: try a little farther out.
_STRETCHES = (1.0001, 1.01, 1.1)


def confirm(task: Task, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (point (B, ...) admitted to the ball, its logits (B, K)), re-scored by the model on that very tensor."""
    point = task.admit(candidate)
    logits = task.victim.logits(point)
    for stretch in _STRETCHES:
        again = (task.margin(logits) < 0) & (task.distance(point) > 0)
        if not bool(again.any()):
            break
        part = task[again]
        farther = part.admit(part.x.double() + stretch * (point[again].double() - part.x.double()))
        farther_logits = task.victim.logits(farther)
        won = part.margin(farther_logits) >= 0
        index = again.nonzero().squeeze(1)[won]
        point[index], logits[index] = farther[won], farther_logits[won]
    return point, logits


def shorten(task: Task, point: Tensor, logits: Tensor, steps: int = 24) -> tuple[Tensor, Tensor]:
    """Bisect the segment from x to each adversarial `point`; return the nearest adversarial point met and its logits.

    The box holds by convexity. The result is always a point that the model was evaluated on.
    """
    best, best_logits = point.clone(), logits.clone()
    distance = task.distance(point)
    low, high = torch.zeros_like(distance), torch.ones_like(distance)
    for _ in range(steps):
        middle = (low + high) / 2
        z = task.on_segment(point, middle)
        z_logits = task.victim.logits(z)
        adversarial = task.margin(z_logits) >= 0
        low, high = torch.where(adversarial, low, middle), torch.where(adversarial, middle, high)
        z_distance = task.distance(z)
        better = adversarial & (z_distance < distance)
        best[better], best_logits[better], distance[better] = z[better], z_logits[better], z_distance[better]
    return best, best_logits

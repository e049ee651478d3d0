"""Logit differences and their gradients: the first-order picture of the distance to each other class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .task import Task


def rivals(task: Task, logits: Tensor, limit: int) -> Tensor:  # logits: (B, K); returns (B, min(limit, K - 1))
    """Return the classes other than y with the largest logits, largest first."""
    others = logits.scatter(1, task.y.unsqueeze(1), -torch.inf)
    return others.topk(min(limit, logits.shape[1] - 1), dim=1).indices


def differences(logits: Tensor, y: Tensor, classes: Tensor) -> Tensor:  # classes: (B, T); returns (B, T)
    """Return f_j - f_y for each class j of `classes`."""
    return logits.gather(1, classes) - logits.gather(1, y.unsqueeze(1))


def class_gradients(task: Task, z: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linearise the logit differences to the `limit` strongest other classes at `z`.

    Returns:
        logits (B, K), classes (B, T), values f_j - f_y (B, T), and their gradients at z (B, T, ...).
    """
    z = z.detach().requires_grad_()
    logits = task.victim.logits(z)
    classes = rivals(task, logits.detach(), limit)
    values = differences(logits, task.y, classes)
    gradients = []
    for column in range(classes.shape[1]):
        last = column == classes.shape[1] - 1
        (gradient,) = torch.autograd.grad(values[:, column].sum(), z, retain_graph=not last)
        task.victim.seen_gradient(gradient)
        gradients.append(gradient)
    return logits.detach(), classes, values.detach(), torch.stack(gradients, 1)


def inward(z: Tensor, gradient: Tensor) -> Tensor:
    """Return `gradient` with 0 where it pushes an entry of `z` out of the box, so that a step goes to the others."""
    stuck = (z >= 1) & (gradient > 0) | (z <= 0) & (gradient < 0)
    return torch.where(stuck, 0.0, gradient)


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """max_j (f_j - f_y) / s_j with s_j = ||grad(f_j - f_y)(x)||_q: a loss in units of distance.

    For an affine model it is minus the distance to the nearest class boundary. Dividing by the slopes makes the
    attack walk to the nearest class, not to the one with the largest logit, and makes it blind to the scale and
    shift of the logits, which cross-entropy is not.
    """

    y: Tensor
    classes: Tensor  # (B, T)
    slopes: Tensor  # (B, T)
    start: Tensor  # (B,) the loss at x

    @classmethod
    def of(cls, task: Task, limit: int) -> "FirstOrder":
        """Measure the slopes of the `limit` strongest other classes at x."""
        _, classes, values, gradients = class_gradients(task, task.x, limit)
        slopes = task.norm.dual(gradients.flatten(0, 1)).reshape(values.shape).to(values.dtype)
        # A class whose gradient vanishes at x is not infinitely far: bound the ratio; with no gradient at all use 1.
        steepest = slopes.amax(1, keepdim=True)
        slopes = torch.where(steepest > 0, torch.maximum(slopes, 1e-3 * steepest), 1.0)
        return cls(task.y, classes, slopes, (values / slopes).amax(1))

    def loss(self, logits: Tensor) -> Tensor:  # logits: (B, K); returns (B,)
        """Return the loss; it grows towards the boundary, and is >= 0 beyond it."""
        return (differences(logits, self.y, self.classes) / self.slopes).amax(1)

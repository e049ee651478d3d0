"""Logit differences and their gradients: the first-order picture of the distance to each other class."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxed import shortest
from .norms import per_sample
from .task import Task

_HEAT = 0.3


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
    z, logits = task.victim.traced(z)
    classes = rivals(task, logits.detach(), limit)
    values = differences(logits, task.y, classes)
    gradients = []
    for column in range(classes.shape[1]):
        last = column == classes.shape[1] - 1
        (gradient,) = torch.autograd.grad(values[:, column].sum(), z, retain_graph=not last)
        task.victim.seen_gradient(gradient)
        gradients.append(gradient)
    return logits.detach(), classes, values.detach(), torch.stack(gradients, 1)


def nearest_move(task: Task, gradients: Tensor, gaps: Tensor) -> Tensor:  # (B, T, ...), (B, T) >= 0
    """Return the least d with <g_j, d> = gap_j for some class j such that x + d lies in the box, in float64."""
    wide = gradients.flatten(0, 1).double()
    x = task.x.double().repeat_interleave(gradients.shape[1], 0)
    moves, gap = shortest(task.norm, x, wide, gaps.flatten().double()), gaps.flatten().double()
    met = (wide * moves).flatten(1).sum(1) >= gap * (1 - 1e-6)
    sizes = torch.where(met, task.norm.size(moves), torch.inf).reshape(gaps.shape)
    rows = torch.arange(len(gaps), device=gaps.device)
    return moves.reshape(gradients.shape)[rows, sizes.argmin(1)]


def inward(z: Tensor, gradient: Tensor) -> Tensor:
    """Return `gradient` with 0 where it pushes an entry of `z` out of the box, so that a step goes to the others."""
    stuck = (z >= 1) & (gradient > 0) | (z <= 0) & (gradient < 0)
    return torch.where(stuck, 0.0, gradient)


def awake(gradient: Tensor) -> Tensor:
    """Return `gradient` with a random row in place of each row of 0, so that a step leaves a flat spot."""
    flat = (gradient == 0).flatten(1).all(1)
    if not bool(flat.any()):
        return gradient
    return torch.where(per_sample(flat, gradient), torch.randn_like(gradient), gradient)


def cooled(step: int, steps: int) -> float:
    """Return the heat of a step for `FirstOrder.loss`: from 0.3 along a cosine to 0 at half of the steps."""
    return _HEAT * (1 + math.cos(math.pi * min(1.0, 2 * step / steps))) / 2


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """max_j (f_j - f_y) / s_j with s_j = ||grad(f_j - f_y)(x)||_q: a loss in units of distance.

    For an affine model it is minus the distance to the nearest class boundary. Dividing by the slopes makes the
    attack walk to the nearest class, not to the one with the largest logit, and makes it blind to the scale and
    shift of the logits, which cross-entropy is not.

    The class that is nearest to first order need not be the nearest. With heat h > 0 the loss is the soft maximum
    t log sum_j exp((f_j - f_y) / (t sqrt(s_j s))), s the mean slope, t = h times the first-order distance of x: a step
    then goes towards several classes, as with cross-entropy, but on every scale of the logits alike.
    """

    y: Tensor
    classes: Tensor  # (B, T)
    slopes: Tensor  # (B, T)
    start: Tensor  # (B,) the loss at x
    move: Tensor  # (B, ...) float64, the least from x onto a linearised boundary in the box

    @classmethod
    def of(cls, task: Task, limit: int) -> "FirstOrder":
        """Measure the slopes of the `limit` strongest other classes at x."""
        _, classes, values, gradients = class_gradients(task, task.x, limit)
        slopes = task.norm.dual(gradients.flatten(0, 1)).reshape(values.shape).to(values.dtype)
        move = nearest_move(task, gradients, -values)
        # A class whose gradient vanishes at x is not infinitely far: bound the ratio; with no gradient at all use 1.
        steepest = slopes.amax(1, keepdim=True)
        slopes = torch.where(steepest > 0, torch.maximum(slopes, 1e-3 * steepest), 1.0)
        return cls(task.y, classes, slopes, (values / slopes).amax(1), move)

    def loss(self, logits: Tensor, heat: float = 0.0) -> Tensor:  # logits: (B, K); returns (B,)
        """Return the loss; it grows towards the boundary, and without heat is >= 0 beyond it."""
        gaps = differences(logits, self.y, self.classes)
        if heat <= 0:
            return (gaps / self.slopes).amax(1)
        temperature = heat * (-self.start).clamp_min(1e-4)
        scale = (self.slopes * self.slopes.mean(1, keepdim=True)).sqrt() * temperature.unsqueeze(1)
        return temperature * torch.logsumexp(gaps / scale, dim=1)

"""What is done to a candidate before it counts: into the ball, re-scored, and drawn towards x to the boundary."""

import math

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


def shorten(task: Task, point: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Search the segment from x to each adversarial `point`; return the nearest adversarial point met and its logits.

    The search starts at the certified radius, where one is given. If that point is adversarial already, the rest of
    the segment is searched too. It ends at a bracket as narrow as the floats of x, relative to the segment. The box
    holds by convexity. The result is always a point that the model was evaluated on.
    """
    segment = _Segment(task, point, logits)
    segment.narrow()
    return segment.best, segment.best_logits


class _Segment:
    """Brackets [low, high] (B,) in units of the segment: not adversarial at `low`, adversarial at `high`."""

    def __init__(self, task: Task, point: Tensor, logits: Tensor) -> None:
        self.task, self.point = task, point
        self.best, self.best_logits, self.distance = point.clone(), logits.clone(), task.distance(point)
        self.high, self.above = torch.ones_like(self.distance), task.margin(logits).double()
        self.low = torch.where(task.certified < self.distance, task.certified / self.distance, 0.0)
        every = torch.arange(len(point), device=point.device)
        self.below = self._margin(every, self.low)
        wrong = (self.below >= 0).nonzero().squeeze(1)
        self.high[wrong], self.above[wrong], self.low[wrong] = self.low[wrong], self.below[wrong], 0.0
        if len(wrong) > 0:
            self.below[wrong] = self._margin(wrong, self.low[wrong])

    def narrow(self) -> None:
        """Shrink the brackets by the ITP method: as few evaluations as a secant's, at most one more than bisection's.

        Oliveira and Takahashi, An Enhancement of the Bisection Method Average Performance Preserving Minmax
        Optimality, ACM Transactions on Mathematical Software 2021.
        """
        width = 2 * torch.finfo(self.point.dtype).eps
        steps = math.ceil(-math.log2(width)) + 1
        for step in range(steps):
            rows = (self.high - self.low > width).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            t = self._next(rows, width, width / 2 * 2.0 ** (steps - step))
            margin = self._margin(rows, t)
            crossed, short = rows[margin >= 0], rows[margin < 0]
            self.high[crossed], self.above[crossed] = t[margin >= 0], margin[margin >= 0]
            self.low[short], self.below[short] = t[margin < 0], margin[margin < 0]

    def _next(self, rows: Tensor, width: float, reach: float) -> Tensor:
        """Return where to look: the chord's zero, moved so far to the middle that bisection is no quicker."""
        low, high, below, above = self.low[rows], self.high[rows], self.below[rows], self.above[rows]
        half, middle = (high - low) / 2, (low + high) / 2
        chord = low + (high - low) * below / (below - above)
        away = middle - chord
        moved = chord + away.sign() * torch.minimum((0.2 * (high - low) ** 2).clamp_min(width / 2), away.abs())
        slack = (reach - half).clamp_min(0.0)
        return torch.minimum(torch.maximum(moved, middle - slack), middle + slack)

    def _margin(self, rows: Tensor, t: Tensor) -> Tensor:
        """Evaluate the points at `t` of the segments `rows` and keep those that are adversarial and nearer."""
        part = self.task[rows]
        z = part.on_segment(self.point[rows], t)
        logits = self.task.victim.logits(z)
        margin, distance = part.margin(logits).double(), part.distance(z)
        better = (margin >= 0) & (distance < self.distance[rows])
        index = rows[better]
        self.best[index], self.best_logits[index], self.distance[index] = z[better], logits[better], distance[better]
        return margin

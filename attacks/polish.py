"""The last word on a minimum-norm point: steps onto the linearised boundary that know the box."""

import torch
from torch import Tensor

from .boxed import shortest
from .keepers import Closest
from .norms import per_sample
from .task import Task

ROUNDS = 3
# A goal lies on the linearised boundary: the true one is met a little farther out, in shares of what is to be gained.
_SHARES = (1e-6, 0.3, 0.8)


def polish(task: Task, closest: Closest) -> None:
    """Draw the points held towards x + d, the nearest points of the boundary linearised at them, within the box.

    d is the least move with <g, x + d - z> = -L(z), L the margin at the point z held and g its gradient: exact for an
    affine model, where the box binds too. Points on the ray through x + d and on the one halfway to it are offered, all
    nearer than z, so nothing is lost. A round takes one gradient and six forwards of the samples found.
    """
    for _ in range(ROUNDS):
        rows = closest.distance.isfinite().nonzero().squeeze(1)
        if len(rows) == 0:
            return
        held = (closest.point[rows] - task.x[rows]).double()
        goal = _goal(task[rows], closest.point[rows])
        with torch.no_grad():
            _offer_ray(task, closest, rows, goal)
            _offer_ray(task, closest, rows, (goal + held) / 2)


def offer_first(task: Task, closest: Closest, delta: Tensor) -> None:  # delta: (B, ...)
    """Offer x + `delta`, the nearest linearised boundary seen from x, and points a little farther out on its ray."""
    with torch.no_grad():
        for stretch in (1 + 1e-6, 1.01, 1.1):
            z = (task.x.double() + stretch * delta).clamp(0.0, 1.0).to(task.x.dtype)
            if bool(closest.offer(z, task.victim.logits(z)).all()):
                break


def _goal(task: Task, z: Tensor) -> Tensor:
    """Return the least move from x onto the boundary linearised at `z`, in float64."""
    logits, gradient = task.victim.gradient(z, task.margin)
    covered = (gradient.double() * (z.double() - task.x.double())).flatten(1).sum(1)
    gap = (covered - task.margin(logits).double()).clamp_min(0.0)
    return shortest(task.norm, task.x.double(), gradient.double(), gap)


def _offer_ray(task: Task, closest: Closest, rows: Tensor, delta: Tensor) -> None:
    """Offer points on the rays x + t `delta`, t >= 1, nearer than the points held."""
    task = task[rows]
    size, held = task.norm.size(delta), closest.distance[rows]
    for share in _SHARES:
        stretch = torch.where((size > 0) & (size < held), 1 + share * (held / size - 1), 0.0)
        # where nothing is to be gained, x is evaluated, which is not adversarial
        z = (task.x.double() + per_sample(stretch, delta) * delta).clamp(0.0, 1.0).to(task.x.dtype)
        closest.offer_rows(rows, z, task.victim.logits(z))

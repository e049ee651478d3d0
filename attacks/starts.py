"""Where a minimum-norm attack begins: its first radius, and other starts for restarts."""

import torch
from torch import Tensor

from .keepers import Closest
from .norms import per_sample
from .slopes import FirstOrder
from .task import Task


def start_radius(task: Task, objective: FirstOrder) -> Tensor:  # returns (B,) float64
    """Return the first-order distance to the boundary or the certified radius, the larger one, within the box's size.

    At least 1e-4, so that a sample on the boundary gets off the spot.
    """
    first = (-objective.start).double().clamp_min(1e-4)
    return torch.maximum(first, task.certified).clamp_max(task.norm.widest(task.x))


def begin(task: Task, objective: FirstOrder, closest: Closest, number: int) -> tuple[Tensor, Tensor]:
    """Return (radius (B,), delta (B, ...)) at which run `number` = 0, 1, … begins.

    The first begins at x. Later ones begin at the smallest distance found so far, or where nothing was found at the
    size of the box: in turn on the way to a random sample of the batch, of another class where one is met, and in a
    random direction.
    """
    if number == 0:
        return start_radius(task, objective), torch.zeros_like(task.x)
    way = torch.rand(task.x.shape, dtype=task.x.dtype, device=task.x.device) - task.x
    if number % 2 == 1:
        other = torch.randperm(len(task.x), device=task.x.device)
        differs = per_sample(task.y[other] != task.y, way)
        way = torch.where(differs, task.x[other] - task.x, way)
    radius = closest.distance.clamp_max(task.norm.widest(task.x))
    return radius, on_sphere(task, way, radius)


def on_sphere(task: Task, delta: Tensor, radius: Tensor) -> Tensor:
    """Return `delta` scaled to the size `radius` (B,), then clipped to the box; 0 stays 0."""
    size = task.norm.size(delta)
    scale = torch.where(size > 0, radius / size, 0.0)
    return (task.x + delta * per_sample(scale, delta).to(delta.dtype)).clamp(0.0, 1.0) - task.x

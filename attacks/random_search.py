"""A short random search without gradients, in every norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Attack
from .boxed import project, random_start
from .checks import whole
from .norms import per_sample
from .standing import Standing
from .task import Task


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Attack):
    """Shift a run of neighbouring entries by random signs, back into the ball; keep it where the margin gets larger.

    The run is half of all entries at first and a single one at last. It stands in for Square in l1.

    Attributes:
        queries: points evaluated of each sample, >= 1.
    """

    name = "random-search"
    norms = ("l2", "linf", "l1")

    queries: int = 100

    def __post_init__(self) -> None:
        whole("queries", self.queries)

    @torch.no_grad()
    def _run(self, task: Task) -> Tensor:
        standing = Standing(task)
        z = trial = random_start(task)
        held = torch.full((len(z),), -torch.inf, dtype=torch.float64, device=z.device)
        for query in range(1, self.queries + 1):
            logits = standing.part.victim.logits(trial)
            margins = standing.part.margin(logits).double()
            better = margins > held
            z, held = torch.where(per_sample(better, z), trial, z), torch.where(better, margins, held)
            keep = standing.offer(trial, logits)
            if keep is not None:
                z, held = z[keep], held[keep]
                if len(standing) == 0:
                    break
            trial = _shifted(standing.part, z, (1 - query / self.queries) ** 2 / 2)
        return standing.best.point


def _shifted(task: Task, z: Tensor, share: float) -> Tensor:
    size = z[0].numel()
    first = torch.randint(size, (len(z), 1), device=z.device)
    place = (torch.arange(size, device=z.device) - first) % size
    signs = torch.rand(len(z), size, device=z.device, dtype=z.dtype).sub(0.5).sign()
    noise = torch.where(place < max(1, round(share * size)), signs, 0.0).reshape(z.shape)
    noise = noise * per_sample(2 * task.eps / task.norm.size(noise), noise).to(z.dtype)
    return (task.x + project(task, z + noise - task.x)).clamp(0.0, 1.0)

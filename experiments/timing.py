"""Time of a training step under a constraint, beside that of the unconstrained one."""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch

from .config import CellConfig
from .data import Dataset, Split
from .fitting import Fitter, seeded
from .training import build

__all__ = ["step_ratio"]

_SMALL = 1e-9


def step_ratio(config: CellConfig, data: Dataset, *, device: str | torch.device = "cpu", rounds: int = 5) -> float:
    """Median step time of the constrained model over that of the same model without constraint, penalty or clipping.

    Both train on a few batches in turn, so that a busy machine slows both alike; their weights are thrown away.
    """
    config = dataclasses.replace(config, lr=_SMALL)  # a rate at which training diverges would end the timing too
    plain = dataclasses.replace(config, constraint="none", threshold=math.inf, gradient_clip=None, weight_decay=0.0)
    batches = _few_batches(config, data, torch.device(device))
    with seeded(config.seed, torch.device(device)):
        models = [build(cell, data, with_checkpoint=False).to(device) for cell in (config, plain)]
    fitters = [Fitter(model, cell, batches) for model, cell in zip(models, (config, plain), strict=True)]
    times: list[list[float]] = [[], []]
    for number in range(1, rounds + 2):
        for fitter, seen in zip(fitters, times, strict=True):
            seen.append(fitter.epoch(number)["step_s"])
    constrained, unconstrained = (statistics.median(seen[1:]) for seen in times)  # the first round warms up
    return constrained / unconstrained


def _few_batches(config: CellConfig, data: Dataset, device: torch.device) -> Split:
    count = min(len(data.train), 3 * config.batch_size)
    return Split(data.train.x[:count].to(device), data.train.y[:count].to(device))

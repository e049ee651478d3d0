"""Time of a training step under a constraint, beside that of the unconstrained one."""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch

from .config import CellConfig
from .data import Dataset, Split
from .fitting import Fitter
from .training import build

__all__ = ["step_ratio"]


def step_ratio(config: CellConfig, data: Dataset, *, device: str | torch.device = "cpu", rounds: int = 5) -> float:
    """Median step time of the constrained model over that of the same model without constraint, penalty or clipping.

    Both train on a few batches in turn, so that a busy machine slows both alike; their weights are thrown away.
    """
    plain = dataclasses.replace(config, constraint="none", threshold=math.inf, gradient_clip=None, weight_decay=0.0)
    batches = _few_batches(config, data, torch.device(device))
    fitters = [Fitter(build(cell, data).to(device), cell, batches) for cell in (config, plain)]
    times: list[list[float]] = [[], []]
    for number in range(1, rounds + 2):
        for fitter, seen in zip(fitters, times, strict=True):
            seen.append(fitter.epoch(number)["step_s"])
    constrained, unconstrained = (statistics.median(seen[1:]) for seen in times)  # the first round warms up
    return constrained / unconstrained


def _few_batches(config: CellConfig, data: Dataset, device: torch.device) -> Split:
    count = min(len(data.train), 3 * config.batch_size)
    return Split(data.train.x[:count].to(device), data.train.y[:count].to(device))

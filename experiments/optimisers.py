"""Optimisers by name, and the learning rate as a closed form of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .config import CellConfig

__all__ = ["build_optimizer", "learning_rate"]


def build_optimizer(parameters: Iterable[nn.Parameter], config: CellConfig) -> torch.optim.Optimizer:
    """Build the optimiser that the config names: "sgd" (Nesterov where momentum > 0), "adam" (l2 penalty), "adamw"."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    raise ValueError(f"unknown optimizer {config.optimizer!r}; allowed: sgd, adam, adamw")


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
}


def learning_rate(config: CellConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one step, counted from 0 over the whole training of n steps, the first w of them warm-up.

    lr (step + 1) / w in the warm-up; then with t = (step - w) / (n - w) in [0, 1): constant lr, cosine
    lr (1 + cos(pi t)) / 2, linear lr (1 - t), step lr, lr / 10 from t = 1/2 and lr / 100 from t = 3/4.
    """
    if config.schedule not in _SCHEDULES:
        raise ValueError(f"unknown schedule {config.schedule!r}; allowed: {', '.join(_SCHEDULES)}")
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * _SCHEDULES[config.schedule]((step - warmup) / (total - warmup))

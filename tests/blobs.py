"""Small images of four classes, and a linear model on them whose distances to its decision boundaries are known."""

import math

import numpy as np
import torch
from torch import nn

from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split

CLASSES, SIDE = 4, 6
ORDERS = {"l2": 2, "linf": math.inf, "l1": 1}


def blobs(count=40, seed=0):
    """Classes around centres inside [0.3, 0.7], far from the edges of the box."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.35 + 0.3 * torch.rand(CLASSES, 1, SIDE, SIDE, generator=generator)

    def split(size):
        y = torch.arange(size) % CLASSES
        noise = 0.05 * torch.randn(size, 1, SIDE, SIDE, generator=generator)
        return Split((centres[y] + noise).clamp(0.2, 0.8), y)

    return Dataset("blobs", split(200), split(40), split(count), (1, SIDE, SIDE), CLASSES, (0.5,), (0.25,))


def linear(data, scale=1.0):
    """Least squares on the train part: its decision boundaries, and so all distances to them, are known."""
    x = np.hstack([data.train.x.flatten(1).double().numpy(), np.ones((len(data.train), 1))])
    targets = np.eye(CLASSES)[data.train.y.numpy()]
    solution = np.linalg.lstsq(x, targets, rcond=1e-3)[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(scale * solution[:-1].T))
        model[1].bias.copy_(torch.from_numpy(scale * solution[-1]))
    return model.eval()


def settings(**changes):
    base = {"constraint": "none", "threshold": math.inf, "attacks": ("fgsm", "ddn"), "eps": (0.05, 0.15, 0.3)}
    return CellConfig(**{**base, **changes})

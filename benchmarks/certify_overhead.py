"""Time to certify a test set over a plain forward pass, on inputs of MNIST's size.

Both sides run in batches of 1024 without gradients. The plain pass is that of the same capped weights in a network
without constraints. `lipschitz` is needed once a model and is timed apart, on a fresh copy each time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from common import milliseconds, ratio, show, start, times_in_turn
from torch import Tensor, nn

from speccert.certify import certified_radii, lipschitz
from speccert.models import build_model, constrain

SAMPLES, BATCH, SHAPE = 10_000, 1024, (1, 28, 28)
ROUNDS = {"mlp": 9, "convnet-4c3f": 3}


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in torch.split(x, BATCH)])


def capped_and_plain(name: str) -> tuple[nn.Module, nn.Module]:
    """A capped net in eval mode, and the same weights in a net without constraints."""
    plain = build_model(name, SHAPE, 10).eval()
    capped = constrain(copy.deepcopy(plain), 1.0, "cap", input_shape=SHAPE).eval()
    for key, layer in capped.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            plain.get_parameter(f"{key}.weight").data.copy_(layer.weight)
    return capped, plain


def rows() -> Iterator[dict[str, str]]:
    x = torch.rand(SAMPLES, *SHAPE)
    for name, rounds in ROUNDS.items():
        model, plain = capped_and_plain(name)
        bound = lipschitz(model, SHAPE)
        jobs = {
            "plain": lambda: forward(plain, x),  # noqa: B023
            "radii": lambda: certified_radii(model, x, bound=bound, batch_size=BATCH),  # noqa: B023
            "bound": lambda: lipschitz(copy.deepcopy(plain), SHAPE),  # noqa: B023
        }
        seconds = times_in_turn(jobs, rounds)
        both = [a + b for a, b in zip(seconds["radii"], seconds["bound"], strict=True)]
        yield {
            "net": name,
            "samples": str(SAMPLES),
            "plain pass, ms": milliseconds(seconds["plain"]),
            "radii / plain": f"{ratio(seconds['radii'], seconds['plain']):.2f}",
            "lipschitz, ms": milliseconds(seconds["bound"]),
            "(lipschitz + radii) / plain": f"{ratio(both, seconds['plain']):.2f}",
        }


if __name__ == "__main__":
    start("Certifying a test set over a plain forward pass")
    show(list(rows()))

"""Time to certify a test set over a plain forward pass, on inputs of MNIST's size.

Both sides run in batches of 1024 without gradients. The plain pass is that of the same capped weights in a network
without constraints. Proved radii need that pass, one in float64, and the norms of all its tensors. What is needed once
a model is timed apart: `lipschitz`, on a fresh copy each time, and the plan of the deviation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from common import milliseconds, ratio, show, start, times_in_turn
from torch import Tensor, nn

from speccert.certify import Certifier, lipschitz
from speccert.models import build_model, constrain

BATCH, SHAPE = 1024, (1, 28, 28)
NETS = {"mlp": (10_000, 7), "convnet-4c3f": (1024, 3)}  # samples, rounds


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
    for name, (samples, rounds) in NETS.items():
        x = torch.rand(samples, *SHAPE)
        model, plain = capped_and_plain(name)
        bound = lipschitz(model, SHAPE)
        certifier, wide = Certifier(model, SHAPE, bound=bound), copy.deepcopy(plain).double()
        jobs = {
            "plain": lambda: forward(plain, x),  # noqa: B023
            "float64": lambda: forward(wide, x.double()),  # noqa: B023
            "radii": lambda: certifier.radii(certifier.margins(x, batch_size=BATCH)),  # noqa: B023
            "bound": lambda: lipschitz(copy.deepcopy(plain), SHAPE),  # noqa: B023
            "plan": lambda: Certifier(model, SHAPE, bound=bound),  # noqa: B023
        }
        seconds = times_in_turn(jobs, rounds)
        names = ("radii", "bound", "plan")
        total = [sum(parts) for parts in zip(*(seconds[name] for name in names), strict=True)]
        yield {
            "net": name,
            "samples": str(samples),
            "plain pass, ms": milliseconds(seconds["plain"]),
            "float64 pass / plain": f"{ratio(seconds['float64'], seconds['plain']):.2f}",
            "radii / plain": f"{ratio(seconds['radii'], seconds['plain']):.2f}",
            "lipschitz, ms": milliseconds(seconds["bound"]),
            "plan, ms": milliseconds(seconds["plan"]),
            "all / plain": f"{ratio(total, seconds['plain']):.2f}",
        }


if __name__ == "__main__":
    start("Certifying a test set over a plain forward pass")
    show(list(rows()))

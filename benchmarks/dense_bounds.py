"""Accuracy and time of `norm_bounds` on dense layers against the SVD in float64."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from common import ratio, show, start, times_in_turn
from torch import nn

from speccert.certify import norm_bounds

ROUNDS = {512: 7, 1024: 5, 2048: 3, 4096: 1}


def rows(sizes: list[int]) -> Iterator[dict[str, str]]:
    for size in sizes:
        layer = nn.Linear(size, size, bias=False).eval().requires_grad_(False)
        nn.init.normal_(layer.weight)
        exact = layer.weight.double()
        jobs = {
            "bounds": lambda: norm_bounds(layer, (size,)),  # noqa: B023
            "svd": lambda: torch.linalg.svdvals(exact),  # noqa: B023
        }
        seconds = times_in_turn(jobs, ROUNDS[size], warm_up=0 if size > 2048 else 1)
        norm, bounds = float(torch.linalg.svdvals(exact)[0]), norm_bounds(layer, (size,))
        yield {
            "n": str(size),
            "proved / SVD - 1": f"{bounds.upper / norm - 1:.1e}",
            "lower / SVD - 1": f"{bounds.lower / norm - 1:.1e}",
            "bounds, s": f"{statistics.median(seconds['bounds']):.3f}",
            "svdvals, s": f"{statistics.median(seconds['svd']):.3f}",
            "time ratio": f"{ratio(seconds['bounds'], seconds['svd']):.2f}",
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also n = 4096, which takes minutes")
    options = parser.parse_args()
    start("Dense layers: proved bound against torch.linalg.svdvals")
    show(list(rows(list(ROUNDS)[: 4 if options.large else 3])))

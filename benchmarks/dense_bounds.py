"""Tightness and time of the proved bound of dense layers against the SVD in float64, and its memory at n = 16384."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Iterator

import torch
from common import ratio, show, start, times_in_turn
from torch import nn

from speccert.certify import norm_bounds

ROUNDS = {512: 7, 1024: 5, 2048: 3, 4096: 1}
LARGE = 16384


def layer(size: int) -> nn.Linear:
    made = nn.Linear(size, size, bias=False).eval().requires_grad_(False)
    nn.init.normal_(made.weight)
    return made


def rows(sizes: list[int]) -> Iterator[dict[str, str]]:
    for size in sizes:
        dense = layer(size)
        exact = dense.weight.double()
        jobs = {
            "bounds": lambda: norm_bounds(dense, (size,)),  # noqa: B023
            "svd": lambda: torch.linalg.svdvals(exact),  # noqa: B023
        }
        seconds = times_in_turn(jobs, ROUNDS[size], warm_up=0 if size > 2048 else 1)
        norm, bounds = float(torch.linalg.svdvals(exact)[0]), norm_bounds(dense, (size,))
        yield {
            "n": str(size),
            "proved / SVD - 1": f"{bounds.upper / norm - 1:.1e}",
            "lower / SVD - 1": f"{bounds.lower / norm - 1:.1e}",
            "bounds, s": f"{statistics.median(seconds['bounds']):.3f}",
            "svdvals, s": f"{statistics.median(seconds['svd']):.3f}",
            "time ratio": f"{ratio(seconds['bounds'], seconds['svd']):.2f}",
        }


def large_row(size: int) -> dict[str, str]:
    """Without an SVD to compare with: the lower end is attained, so that the bracket's width bounds the error."""
    dense = layer(size)
    begin = time.process_time()
    bounds = norm_bounds(dense, (size,))
    return {
        "n": str(size),
        "proved / attained - 1": f"{bounds.upper / bounds.lower - 1:.1e}",
        "bounds, s": f"{time.process_time() - begin:.0f}",
        "weight in float32, GiB": f"{4 * size * size / 2**30:.1f}",
        "peak memory of the process, GiB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(ROUNDS), choices=list(ROUNDS))
    parser.add_argument("--large", action="store_true", help=f"also n = {LARGE}, which takes minutes and 8 GB")
    options = parser.parse_args()
    start("Dense layers: proved bound against torch.linalg.svdvals")
    show(list(rows(options.sizes)))
    if options.large:
        show([large_row(LARGE)])

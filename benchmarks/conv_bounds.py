"""Tightness, time and memory of `norm_bounds` on zero-padded convolutions.

Tightness is against the exact norm: Lanczos in float64 on the true operator, to 1e-8. Lanczos approaches it from below,
so that a ratio shown here is never smaller than the true one. Time is against 100 power iterations on the same operator
in float32, by conv2d and conv_transpose2d. With `--memory`, instead, peak memory beyond that of the layer for 512
channels: the rise of the process's largest resident size, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from common import milliseconds, ratio, show, start, times_in_turn
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional

from speccert.certify import norm_bounds

MEMORY_SIDES = (8, 32)
POWER_STEPS = 100
ROUNDS = 3
WIDTHS = [  # c_in, c_out, kernel, stride, side
    (3, 32, 3, 1, 8),
    (3, 32, 3, 1, 32),
    (16, 16, 5, 1, 8),
    (16, 16, 7, 1, 16),
    (32, 32, 1, 1, 16),
    (32, 32, 3, 1, 8),
    (32, 32, 3, 1, 16),
    (32, 64, 3, 2, 16),
    (64, 64, 3, 1, 16),
    (64, 64, 4, 2, 32),
    (64, 64, 3, 1, 32),
    (128, 128, 3, 1, 16),
    (128, 128, 3, 1, 32),
]


@dataclass(frozen=True)
class Case:
    """One layer; `kind` is "random" or "trained-like"."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    side: int
    kind: str

    @property
    def name(self) -> str:
        kernel, image = f"{self.kernel}x{self.kernel}", f"{self.side}x{self.side}"
        return f"{self.c_in} to {self.c_out}, {kernel}, stride {self.stride}, on {image}"

    def layer(self) -> nn.Conv2d:
        """A convolution with padding (kernel - 1) // 2."""
        padding = (self.kernel - 1) // 2
        layer = nn.Conv2d(self.c_in, self.c_out, self.kernel, self.stride, padding, bias=False).eval()
        noise = torch.randn_like(layer.weight)
        layer.requires_grad_(False).weight.copy_(_trained_like(noise) if self.kind == "trained-like" else noise)
        return layer


def _trained_like(noise: Tensor) -> Tensor:
    """Channel mixing with singular values 1, 1/2, 1/3, ..., smooth over the taps, plus a tenth of the noise."""
    c_out, c_in, height, width = noise.shape
    rank = min(c_out, c_in)
    left, right = (torch.linalg.qr(torch.randn(size, rank))[0] for size in (c_out, c_in))
    bumps = torch.stack([_bump(height, width) for _ in range(rank)])
    smooth = torch.einsum("or,ir,rhw->oihw", left / torch.arange(1, rank + 1), right, bumps)
    kernel: Tensor = smooth + 0.1 * smooth.norm() / noise.norm() * noise
    return kernel


def _bump(height: int, width: int) -> Tensor:
    centre = 0.5 * torch.randn(2)
    rows, columns = (torch.arange(size) - (size - 1) / 2 for size in (height, width))
    bump: Tensor = torch.exp(-((rows - centre[0])[:, None].square() + (columns - centre[1]).square()) / 2)
    return bump


class Operator:
    """The layer as a linear map and its adjoint."""

    def __init__(self, case: Case, weight: Tensor) -> None:
        self.weight, self.stride, self.padding = weight, case.stride, (case.kernel - 1) // 2
        self.shape = (1, case.c_in, case.side, case.side)
        out_side = (case.side + 2 * self.padding - case.kernel) // case.stride + 1
        # the pixels that the last stride does not reach
        self.rest = case.side - ((out_side - 1) * case.stride - 2 * self.padding + case.kernel)

    def gram(self, x: Tensor) -> Tensor:
        """A^T A x."""
        y = functional.conv2d(x, self.weight, None, self.stride, self.padding)
        return functional.conv_transpose2d(y, self.weight, None, self.stride, self.padding, self.rest)


def power_iterations(operator: Operator) -> Tensor:
    """The norm after `POWER_STEPS` steps from a random start."""
    x = torch.randn(operator.shape, dtype=operator.weight.dtype)
    for _ in range(POWER_STEPS):
        x = operator.gram(x)
        length = x.norm()
        x = x / length
    norm: Tensor = length.sqrt()
    return norm


def exact_norm(operator: Operator) -> float:
    """The norm by Lanczos in float64."""
    size = math.prod(operator.shape)

    def apply(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        image = operator.gram(torch.from_numpy(vector.copy()).reshape(operator.shape))
        return image.flatten().numpy()

    gram = LinearOperator((size, size), matvec=apply, dtype=np.float64)
    top = eigsh(gram, k=1, tol=1e-8, return_eigenvectors=False, v0=np.random.default_rng(0).standard_normal(size))
    return math.sqrt(float(top[0]))


def rows() -> Iterator[dict[str, str]]:
    for shape in WIDTHS:
        for kind in ("random", "trained-like"):
            case = Case(*shape, kind)
            layer, image = case.layer(), (case.c_in, case.side, case.side)
            power = Operator(case, layer.weight)
            jobs = {"bounds": lambda: norm_bounds(layer, image), "power": lambda: power_iterations(power)}  # noqa: B023
            seconds = times_in_turn(jobs, ROUNDS)
            bounds, exact = norm_bounds(layer, image), exact_norm(Operator(case, layer.weight.double()))
            yield {
                "convolution": case.name,
                "kernel": kind,
                "method": bounds.method,
                "exact norm": f"{exact:.4f}",
                "proved / exact": f"{bounds.upper / exact:.6f}",
                "lower / exact": f"{bounds.lower / exact:.6f}",
                "bounds, ms": milliseconds(seconds["bounds"]),
                "100 power steps, ms": milliseconds(seconds["power"]),
                "time ratio": f"{ratio(seconds['bounds'], seconds['power']):.2f}",
            }


def memory_rows() -> Iterator[dict[str, str]]:
    for side in MEMORY_SIDES:
        command = [sys.executable, __file__, "--memory-of", str(side)]
        upper, seconds, rise = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        yield {
            "convolution": Case(512, 512, 3, 1, side, "random").name,
            "proved": upper,
            "bounds, s": seconds,
            "peak memory beyond the layer, MB": rise,
        }


def print_memory(side: int) -> None:
    """Bound, seconds of CPU time and rise of the peak memory of one layer, on one line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    norm_bounds(nn.Conv2d(8, 8, 3, padding=1), (8, 40, 40))  # loads what the libraries load once
    layer = nn.Conv2d(512, 512, 3, padding=1, bias=False).requires_grad_(False)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    bounds = norm_bounds(layer, (512, side, side))
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes on Linux
    print(f"{bounds.upper:.4f} {time.process_time() - begin:.1f} {rise / 1000:.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--memory-of", type=int, metavar="SIDE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(arguments.memory_of)
    elif arguments.memory:
        start("Convolutions: memory of the proved bound")
        show(list(memory_rows()))
    else:
        start("Convolutions: proved bound against the exact norm")
        show(list(rows()))

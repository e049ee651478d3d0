"""The float settings that a certificate assumes: set them, and say what holds on this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch

from ..certify import NormBounds
from ..certify.linear import matrix_bounds

__all__ = ["Check", "check_machine", "exact_float32"]


def exact_float32() -> None:
    """Turn off, for this process, arithmetic below float32 in float32 operations: TF32 products and convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@dataclass(frozen=True)
class Check:
    """One assumption or fact: its name, what was found, and whether it holds (None for a mere fact)."""

    name: str
    found: str
    holds: bool | None = None


def check_machine() -> list[Check]:
    """What this machine is, and which of the float assumptions hold on it, each tried where it can be."""
    return [*_facts(), *_assumptions()]


def _facts() -> list[Check]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        Check("python", platform.python_version()),
        Check("torch", torch.__version__),
        Check("processor", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        Check("GPUs", ", ".join(gpus) if gpus else "none"),
    ]


def _assumptions() -> list[Check]:
    subnormal = torch.tensor(2.0**-126) * torch.tensor(0.5)
    rounding = torch.tensor(1.0) + torch.tensor(2.0**-24)
    tf32 = torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    return [
        Check("float32 keeps subnormal numbers", f"2^-126 / 2 = {float(subnormal):.4g}", float(subnormal) == 2.0**-127),
        Check("float32 rounds to nearest, ties to even", f"1 + 2^-24 = {float(rounding):.9g}", float(rounding) == 1.0),
        Check("no TF32 in products and convolutions", "allowed" if tf32 else "off", not tf32),
        _product_check(torch.float32, "cpu"),
        *([_product_check(torch.float32, "cuda")] if torch.cuda.is_available() else []),
        _eigenvalue_check(),
    ]


def _product_check(dtype: torch.dtype, device: str) -> Check:
    """A product's error against float64, in units of the bound that full float32 accumulation obeys."""
    size = 512
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    found = (left.to(device) @ right.to(device)).cpu().double()
    allowed = size * 2.0**-24 * (left.double().abs() @ right.double().abs())
    share = float(((found - left.double() @ right.double()).abs() / allowed).max())
    return Check(f"float32 products accumulate in float32 ({device})", f"error is {share:.2g} of the bound", share <= 1)


def _eigenvalue_check() -> Check:
    """The largest singular value of a matrix with a known one: a Hilbert-like outer construction by reflections."""
    size = 128
    values = np.linspace(0.0, 1.0, size)
    vector = np.random.default_rng(0).standard_normal(size)
    reflection = np.eye(size) - 2 * np.outer(vector, vector) / (vector @ vector)
    bounds: NormBounds = matrix_bounds(torch.from_numpy(reflection * values @ reflection.T), "l2", "check")
    return Check(
        "float64 norms are right to the safety factor",
        f"norm 1 bracketed by [{bounds.lower:.12f}, {bounds.upper:.12f}]",
        bounds.lower <= 1 + 1e-12 and bounds.upper >= 1,
    )

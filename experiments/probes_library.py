"""Probes of the library functions that proofs and networks rest on: Cholesky factors, norms, elementary functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..certify import norm_bounds

__all__ = [
    "ELEMENTARY",
    "batch_norm",
    "cholesky",
    "elementary",
    "exact_products",
    "known_norms",
    "refused_cholesky",
    "square_root",
]

Found = tuple[str, bool]
_UNIT = 2.0**-53


def _symmetric(size: int, lowest: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Hermitian matrix with eigenvalues from `lowest` to 1, by a reflection of a diagonal one."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    vector = vector / torch.linalg.vector_norm(vector)
    values = torch.linspace(0.1, 1.0, size, dtype=torch.float64)
    values[0] = lowest
    reflection = torch.eye(size, dtype=dtype) - 2 * vector[:, None] * vector.conj()[None]
    matrix: Tensor = (reflection * values.to(dtype)) @ reflection.mH
    symmetric: Tensor = (matrix + matrix.mH) / 2
    return symmetric


def cholesky() -> Found:
    """The factor of a float64 matrix B leaves |B - L L^T| <= gamma_{n+1} |L| |L|^T, entry by entry.

    Higham, "Accuracy and Stability of Numerical Algorithms", Theorem 10.3; the residual is taken in extended precision.
    """
    size = 160
    matrix = _symmetric(size, 0.01)
    factor = torch.linalg.cholesky(matrix).numpy().astype(np.longdouble)
    residual = np.abs(factor @ factor.T - matrix.numpy())
    share = float((residual / (np.abs(factor) @ np.abs(factor).T)).max()) / ((size + 1) * _UNIT)
    return f"residual is {share:.2g} of the bound", share <= 1


def refused_cholesky(dtype: torch.dtype) -> Found:
    """The factorisation of a matrix with one eigenvalue slightly below 0 stops, alone and in a batch."""
    real = torch.finfo(dtype).eps
    matrix = _symmetric(96, -4096 * real, dtype)
    batch = torch.stack([_symmetric(96, 0.01, dtype), matrix])
    alone, several = torch.linalg.cholesky_ex(matrix).info, torch.linalg.cholesky_ex(batch).info
    stops = int(alone) > 0 and several.tolist()[0] == 0 and several.tolist()[1] > 0
    return f"an eigenvalue of {-4096 * real:.2g} is {'refused' if stops else 'accepted'}", stops


def exact_products() -> Found:
    """Errors of float64 products are below gamma_n |A| |B|, against integer arithmetic."""
    size = 40
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-(2**52), 2**52, (size, size), generator=generator) for _ in range(2))
    exact = left.numpy().astype(object) @ right.numpy().astype(object)
    sizes = np.abs(left.numpy()).astype(object) @ np.abs(right.numpy()).astype(object)
    found = (left.double() @ right.double()).tolist()
    share = max(
        abs(int(found[i][j]) - exact[i, j]) / (sizes[i, j] * size * _UNIT) for i in range(size) for j in range(size)
    )
    return f"error is {float(share):.2g} of the bound", float(share) <= 1


def known_norms() -> Found:
    """Proved brackets hold the known norms of a reflected diagonal matrix and of a convolution."""
    layer = nn.Linear(96, 96, bias=False, dtype=torch.float64)
    convolution = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        layer.weight.copy_(_symmetric(96, 0.0))
        convolution.weight.fill_(1.0)  # circular: every row of its matrix holds 36 ones
    dense, torus = norm_bounds(layer.eval(), (96,)), norm_bounds(convolution.eval(), (4, 40, 40))
    close = 1 - 1e-12 <= dense.upper <= 1 + 1e-7 and 36 <= torus.upper <= 36 * (1 + 1e-2)
    below = dense.lower <= 1 + 1e-12 and torus.lower <= 36 * (1 + 1e-12)
    return f"1 is below {dense.upper:.12f}, 36 below {torus.upper:.10f}", close and below


# name: (function of torch, name of the function of an Arb ball, range of the samples)
ELEMENTARY: dict[str, tuple[Callable[[Tensor], Tensor], str, tuple[float, float]]] = {
    "exp": (torch.exp, "exp", (-9.0, 9.0)),
    "log": (torch.log, "log", (1e-3, 100.0)),
    "tanh": (torch.tanh, "tanh", (-5.0, 5.0)),
    "erf": (torch.erf, "erf", (-3.0, 3.0)),
    "sin": (torch.sin, "sin", (-6.3, 6.3)),
    "cos": (torch.cos, "cos", (-6.3, 6.3)),
    "sqrt": (torch.sqrt, "sqrt", (1e-3, 100.0)),
    "rsqrt": (torch.rsqrt, "rsqrt", (1e-3, 100.0)),
}


def elementary(dtype: torch.dtype, device: str, ulps: float) -> Found:
    """The largest errors of elementary functions on samples, in units in the last place of the exact values."""
    worst = {name: _worst(name, dtype, device) for name in ELEMENTARY}
    return ", ".join(f"{name} {error:.2f}" for name, error in worst.items()), max(worst.values()) <= ulps


def square_root(device: str) -> str:
    """How near torch.sqrt of a tensor is; the nearest number errs by at most half a unit in the last place."""
    errors = {dtype: _worst("sqrt", dtype, device) for dtype in (torch.float32, torch.float64)}
    told = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.2f}" for dtype, error in errors.items())
    nearest = max(errors.values()) <= 0.5 + 1e-9
    return f"{told} units in the last place, {'the nearest numbers' if nearest else 'not always the nearest number'}"


def _worst(name: str, dtype: torch.dtype, device: str) -> float:
    from flint import arb, ctx

    function, ball, (low, high) = ELEMENTARY[name]
    samples = torch.linspace(low, high, 1000, dtype=torch.float64).to(dtype)
    pairs = zip(samples.double().tolist(), function(samples.to(device)).cpu().double().tolist(), strict=True)
    with ctx.workprec(160):
        return max(_ulps(value, getattr(arb(x), ball)(), dtype) for x, value in pairs)


def _ulps(value: float, exact: object, dtype: torch.dtype) -> float:
    """|value - exact| in units in the last place of the exact value."""
    middle = float(exact)  # type: ignore[arg-type]
    _, exponent = math.frexp(middle)
    last = max(torch.finfo(dtype).eps * math.ldexp(1.0, exponent - 1), torch.finfo(dtype).tiny)
    return abs(float(value - exact)) / last  # type: ignore[operator]


def batch_norm(dtype: torch.dtype, device: str, units: float) -> Found:
    """The largest relative error of eval-mode batch normalisation's 1 / sqrt(var + eps), in unit roundoffs."""
    variance = (torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01).to(dtype)
    x = torch.ones(1, 512, dtype=dtype, device=device)
    found = functional.batch_norm(x, torch.zeros_like(x[0]), variance.to(device), eps=0.0)[0].cpu().double()
    exact = variance.double().rsqrt()  # right to some 2^-52, far below what is measured up to float32
    worst = float(((found - exact).abs() / exact).max()) / (torch.finfo(dtype).eps / 2)
    return f"error is {worst:.2f} unit roundoffs", worst <= units

"""Small computations with known exact results, which show how a device adds, multiplies and convolves.

Each gives a sentence on what was found, and whether it is as the certificates assume. Exact results are integers, or
come from rational arithmetic.
"""

from __future__ import annotations

import operator
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "accumulation",
    "complex_products",
    "convolutions",
    "fused",
    "half_subnormals",
    "products",
    "rounding",
    "subnormals",
    "tf32",
]

Found = tuple[str, bool]
_HUGE = 2.0**40  # beside small integers it swallows them in any sum that it enters, in float32 and below
_CONVOLUTIONS = ((3, 8, 9, 3), (16, 16, 12, 3), (64, 32, 8, 3), (4, 8, 16, 5))  # c_in, c_out, side, kernel
_BATCHES = (1, 32)


def _integers(*shape: int, largest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def rounding(dtype: torch.dtype, device: str) -> Found:
    """Sums, differences, products and quotients of one type are the nearest numbers, ties to even.

    For types up to float32 the reference is the float64 result, rounded: rounding twice does no harm from 2 p + 2
    digits on (Figueroa, "When is double rounding innocuous?", SIGNUM 30, 1995). For float64 it is rational arithmetic.
    """
    a, b = (_uniform(400, seed=seed).to(dtype) for seed in (0, 1))
    b[:8], a[:8] = torch.finfo(dtype).eps / 2, torch.linspace(1, 1.875, 8, dtype=torch.float64).to(dtype)  # ties
    x, y = a.to(device), b.to(device)
    found = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}
    wrong = [name for name, value in found.items() if not torch.equal(value.cpu(), _nearest(name, a, b))]
    return (f"not for {', '.join(wrong)}", False) if wrong else ("+ - * / of 400 pairs are the nearest numbers", True)


def _nearest(name: str, a: Tensor, b: Tensor) -> Tensor:
    x, y = a.double(), b.double()
    if a.dtype != torch.float64:
        return {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[name].to(a.dtype)
    exact = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[name]
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    return torch.tensor([float(exact(Fraction(p), Fraction(q))) for p, q in pairs], dtype=torch.float64)


def subnormals(dtype: torch.dtype, device: str) -> str:
    """Whether results below the smallest normal number are kept; certificates allow for both."""
    tiny = torch.tensor([torch.finfo(dtype).tiny], dtype=dtype, device=device)
    return "kept" if float((tiny * 0.5).double()) > 0 else "flushed to zero"


def fused(device: str) -> str:
    """Whether a product is added without being rounded first, in a dot product of two terms."""
    a = 1 + 2.0**-12
    rounded = float(torch.tensor(a * a, dtype=torch.float32))
    left, right = torch.zeros(64, 64, device=device), torch.zeros(64, 64, device=device)
    left[:, 0], right[0], left[:, 1], right[1] = -rounded, 1.0, a, a
    return "used" if float((left @ right)[0, 0]) != 0 else "not seen"


def tf32(device: str) -> Found:
    """Float32 products keep all 24 digits of their inputs: TF32 keeps 11, bfloat16 8."""
    left, right = 2 * _integers(48, 256, largest=2047) + 1, _integers(256, 40, largest=1)
    found = (left.float().to(device) @ right.float().to(device)).cpu().double()
    image = functional.conv2d(left.reshape(1, 48, 16, 16).float().to(device), torch.ones(1, 48, 3, 3, device=device))
    exact = functional.conv2d(left.reshape(1, 48, 16, 16), torch.ones(1, 48, 3, 3, dtype=torch.float64))
    same = torch.equal(found, left @ right) and torch.equal(image.cpu().double(), exact)
    return "13-digit integers are taken exactly" if same else "inputs lose digits", same


def products(dtype: torch.dtype, device: str) -> Found:
    """Matrix products are sums of products of entries: small blocks stay exact beside huge ones, as in no fast scheme.

    Strassen's and Winograd's schemes add huge entries to small ones first, and lose the small results. Sizes on both
    sides of the switch to blocked code, and products of a matrix with its own transpose.
    """
    huge = 2.0**10 if dtype == torch.float16 else (_HUGE if dtype != torch.float64 else 2.0**400)
    for size in (64, 256, 512):
        half = size // 2
        left, right = _integers(size, size, largest=2), _integers(size, size, largest=2, seed=1)
        expected = left[half:] @ right[:, half:]
        left[:half, :half], right[:half, :half] = huge, huge
        found = (left.to(dtype).to(device) @ right.to(dtype).to(device)).cpu().double()
        own = (left.to(dtype).to(device) @ left.to(dtype).to(device).mT).cpu().double()
        gram = left[half:] @ left[half:].mT
        if not torch.equal(found[half:, half:], expected.to(dtype).double()) or not torch.equal(
            own[half:, half:], gram.to(dtype).double()
        ):
            return f"{size} x {size}: small blocks are lost beside huge ones", False
    return "small blocks stay exact beside huge ones, up to 512 x 512", True


def complex_products(dtype: torch.dtype) -> Found:
    """Complex products take four real ones: with three ("3M") imaginary parts lose small numbers beside huge ones."""
    huge = 2.0**60
    left = torch.full((96, 96), complex(huge, 1.0), dtype=dtype)
    right = torch.full((96, 96), complex(1.0, 0.0), dtype=dtype)
    same = bool(((left @ right).imag == 96).all())
    return "imaginary parts keep small numbers beside huge real ones" if same else "three real products are used", same


def convolutions(dtype: torch.dtype, device: str) -> Found:
    """Outputs that read a huge pixel by a zero weight, or not at all, are exact.

    Fourier's and Winograd's convolutions spoil its neighbours; Winograd's smallest form, F(2x2, 3x3), only those that
    read it by a zero weight.
    """
    for c_in, c_out, side, kernel in _CONVOLUTIONS:
        for batch in _BATCHES:
            if not _local(c_in, c_out, side, kernel, batch, dtype, device):
                return (
                    f"{kernel}x{kernel}, {c_in} to {c_out} channels, batch {batch}: a pixel spoils its neighbours",
                    False,
                )
    return "a huge pixel changes only what reads it, kernels 3 and 5, batches of 1 and 32", True


def _local(c_in: int, c_out: int, side: int, kernel: int, batch: int, dtype: torch.dtype, device: str) -> bool:
    x, weight = _integers(batch, c_in, side, side, largest=1), _integers(c_out, c_in, kernel, kernel, largest=1, seed=1)
    if dtype in (torch.float16, torch.bfloat16):
        weight[:, 4:] = 0  # results stay exact in so few digits
    exact = functional.conv2d(x, weight, padding=kernel // 2)
    hit = torch.zeros(batch, 1, side, side, dtype=torch.float64)
    index = torch.arange(batch)
    hit[index, 0, (3 * index + side // 2) % side, (5 * index + side // 2) % side] = 1.0
    huge = 2.0**14 if dtype == torch.float16 else _HUGE
    spoiled = torch.cat([x[:, :1] + huge * hit, x[:, 1:]], dim=1)
    found = functional.conv2d(spoiled.to(dtype).to(device), weight.to(dtype).to(device), padding=kernel // 2)
    read = functional.conv2d(hit, (weight[:, :1] != 0).double(), padding=kernel // 2) > 0
    return bool(((found.cpu().double() == exact) | read).all())


def accumulation(dtype: torch.dtype, device: str) -> Found:
    """Sums of products of a half type are taken in at least float32: ones survive beside numbers that cancel later."""
    large = {torch.float16: 2048.0, torch.bfloat16: 256.0}[dtype]
    row = torch.cat([torch.full((16,), large), torch.ones(1024), torch.full((16,), -large)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([row[torch.randperm(len(row), generator=generator)] for _ in range(32)]).to(dtype).to(device)
    linear = functional.linear(rows, torch.ones(8, rows.shape[1], dtype=dtype, device=device))
    one = functional.conv2d(rows[:, :, None, None], torch.ones(4, rows.shape[1], 1, 1, dtype=dtype, device=device))
    pictures = rows[:, :1053].reshape(32, 117, 3, 3)
    nine = functional.conv2d(pictures, torch.ones(4, 117, 3, 3, dtype=dtype, device=device))
    exact = pictures.double().flatten(1).sum(1)[:, None].to(dtype).double()
    wrong = [
        name
        for name, same in (
            ("dense", bool((linear.double() == 1024).all())),
            ("convolution 1x1", bool((one.double() == 1024).all())),
            ("convolution 3x3", bool((nine.double().flatten(1) == exact).all())),
        )
        if not same
    ]
    return (f"not in {', '.join(wrong)}", False) if wrong else (f"{large:g} and 1024 ones add up exactly", True)


def half_subnormals(device: str) -> Found:
    """Conversions between float16 and float32 keep subnormal numbers of float16."""
    values = 2.0 ** torch.arange(-24, -13, dtype=torch.float32, device=device)
    same = torch.equal(values.to(torch.float16).to(torch.float32), values)
    return "2^-24 to 2^-14 are kept" if same else "subnormal numbers are flushed to zero", same

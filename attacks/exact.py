"""Distances decided in integers, for claims that hang on the last bit."""

import math

import torch
from torch import Tensor

from .checks import known_norm


def strictly_inside(x: Tensor, z: Tensor, radius: Tensor, norm: str) -> Tensor:  # (B, ...), (B, ...), (B,)
    """Return where ||z - x|| < radius, (B,) bool, decided in integers: rounding can't bring an outer point inside.

    Raises:
        ValueError: if the norm is unknown, or an entry of x or z is not finite.
    """
    known_norm(norm)
    if not bool(torch.isfinite(x).all() & torch.isfinite(z).all()):
        raise ValueError("x, z: expected finite numbers; got NaN or infinity")
    rows = zip(x.double().flatten(1).tolist(), z.double().flatten(1).tolist(), radius.double().tolist(), strict=True)
    return torch.tensor([_shorter(a, b, r, norm) for a, b, r in rows], dtype=torch.bool, device=x.device)


def _shorter(x: list[float], z: list[float], radius: float, norm: str) -> bool:
    if not math.isfinite(radius):
        return radius > 0
    size = [abs(_whole(b) - _whole(a)) for a, b in zip(x, z, strict=True)]
    limit = _whole(radius)
    if norm == "linf":
        return max(size) < limit
    if norm == "l1":
        return sum(size) < limit
    return limit > 0 and sum(entry * entry for entry in size) < limit * limit


def _whole(value: float) -> int:
    """The number of 2^-1074, of which every float64 is a multiple."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (1075 - denominator.bit_length())

"""Checks of what the user gives: each raises one clear line."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .norms import NORMS, Norm


def known_norm(name: str, allowed: Iterable[str] = tuple(NORMS)) -> Norm:
    """Return the norm called `name`; ValueError if it is not among `allowed`."""
    if name not in tuple(allowed):
        raise ValueError(f"norm must be one of {', '.join(allowed)}, got {name!r}")
    return NORMS[name]


def valid_eps(eps: float | None) -> float | None:
    """Return `eps` as a float; ValueError unless it is None or a finite number >= 0."""
    if eps is None:
        return None
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be a finite number >= 0 in units of the [0, 1] input, got {eps!r}")
    return float(eps)


def valid_seed(seed: int) -> int:
    """Return `seed`; ValueError unless it is an integer in [0, 2^32)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 4294967295], got {seed!r}")
    return seed


def whole(name: str, value: int, least: int = 1) -> None:
    """ValueError unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def positive(name: str, value: float, below: float = math.inf) -> None:
    """ValueError unless 0 < value < `below`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
        raise ValueError(f"{name} must be a number in (0, {below:g}), got {value!r}")


def valid_samples(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x, y) detached, on x's device; ValueError unless they are samples in [0, 1] with integer labels."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.dim() < 2 or x.numel() == 0:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a non-empty float32 or float64 tensor of shape (B, ...), got {got}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x must lie in [0, 1], got values from {x.min().item():g} to {x.max().item():g}")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y must be an integer tensor of shape ({len(x)},), got {got}")
    return x.detach(), y.detach().to(x.device, torch.int64)


def valid_labels(y: Tensor, classes: int) -> None:
    """ValueError unless every label lies in [0, classes)."""
    if bool(((y < 0) | (y >= classes)).any()):
        raise ValueError(f"y must lie in [0, {classes - 1}], got values from {int(y.min())} to {int(y.max())}")


def valid_certified(certified: Tensor | None, x: Tensor) -> Tensor:
    """Return the radii as float64 on x's device, zeros for None; ValueError unless they are (B,) numbers >= 0."""
    if certified is None:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if not isinstance(certified, Tensor) or certified.shape != x.shape[:1]:
        got = f"shape {tuple(certified.shape)}" if isinstance(certified, Tensor) else type(certified).__name__
        raise ValueError(f"certified must be a tensor of radii of shape ({len(x)},), got {got}")
    radii = certified.detach().to(x.device, torch.float64)
    if not bool((radii >= 0).all()):
        raise ValueError(f"certified must hold radii >= 0, got {radii[~(radii >= 0)][0].item():g}")
    return radii

"""Jacobians of a network at points, and their norms: the Lipschitz constant is at least as large."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .linear import check_norm

DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}  # order of the norm of a row, by the norm of the inputs


def jacobians(
    model: Callable[[Tensor], Tensor],
    x: Tensor,  # [B, *input_shape]
) -> Tensor:  # [B, K, D]
    """The Jacobian of the logits at each point, by one vector-Jacobian product per class."""
    with torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        logits = model(inputs)
        rows = [
            torch.autograd.grad(logits[:, k].sum(), inputs, retain_graph=k + 1 < logits.shape[1])[0]
            for k in range(logits.shape[1])
        ]
    return torch.stack([row.flatten(1) for row in rows], dim=1)


def jacobian_norms(
    jacobian: Tensor,  # [B, K, D]
    norm: str,
) -> Tensor:  # [B]
    """The norms induced by `norm` on both sides."""
    if norm != "l2":
        return jacobian.abs().sum(2 if norm == "linf" else 1).amax(1)
    short = jacobian if jacobian.shape[1] <= jacobian.shape[2] else jacobian.mT
    found: Tensor = torch.linalg.eigvalsh(short @ short.mT)[..., -1].clamp_min(0).sqrt()
    return found


def largest_jacobian_norm(
    model: nn.Module,
    points: Tensor,  # [B, *input_shape]
    norm: str = "l2",
    batch_size: int = 256,
) -> float:
    """max over the points of the Jacobian's norm, induced by `norm` on both sides: at most the Lipschitz constant.

    It holds where the network is differentiable; on a kink autograd's choice of slope may differ, so it is an estimate.

    Raises:
        ValueError: a Jacobian with NaN or infinite entries.
    """
    check_norm(norm)
    largest = 0.0
    for part in torch.split(points, batch_size):
        jacobian = jacobians(model, part).double()
        check_finite(jacobian)
        largest = max(largest, float(jacobian_norms(jacobian, norm).max()))
    return largest


def check_finite(jacobian: Tensor) -> None:
    """Raise ValueError for entries that are NaN or infinite."""
    if not bool(torch.isfinite(jacobian).all()):
        raise ValueError("Jacobian: expected finite numbers; got NaN or infinity")

"""Lower estimates of a network's Lipschitz constant, from its Jacobian at points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import check_norm


def jacobians(
    model: nn.Module,
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
    for start in range(0, len(points), batch_size):
        jacobian = jacobians(model, points[start : start + batch_size]).double()
        if not bool(torch.isfinite(jacobian).all()):
            raise ValueError("Jacobian: expected finite numbers; got NaN or infinity")
        if norm == "l2":
            values = torch.linalg.eigvalsh(jacobian @ jacobian.mT)[..., -1].clamp_min(0).sqrt()
        else:
            values = jacobian.abs().sum(2 if norm == "linf" else 1).amax(1)
        largest = max(largest, float(values.max()))
    return largest

"""Layers that torch lacks: input normalisation as a layer, and the residual sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Normalize", "Residual"]


class Normalize(nn.Module):
    """y = (x - mean) / std along dimension 1, as part of the model, so that radii stay in raw input units.

    A diagonal affine map: its Lipschitz constant is 1 / min(std) in every l_p norm.

    Args:
        mean: one number, or one a channel (for N x D inputs: one a feature), in raw input units.
        std: as ``mean``; every entry greater than 0.

    Raises:
        ValueError: an entry that is not finite, a std that is not positive, or lengths that do not match.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", _vector("mean", mean))
        self.register_buffer("std", _vector("std", std))
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be greater than 0, got {self.std.min().item():g}")
        if 1 not in (len(self.mean), len(self.std)) and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} entries and std {len(self.std)}; give one, or one a channel")

    def forward(self, x: Tensor) -> Tensor:  # N x C x ...
        """Return (x - mean) / std, in the shape of ``x``."""
        # the transposed view lets one C-vector broadcast for any rank, without a branch that torch.fx cannot trace
        return ((x.transpose(1, -1) - self.mean) / self.std).transpose(1, -1)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"channels={max(len(self.mean), len(self.std))}"


def _vector(name: str, values: float | Sequence[float] | Tensor) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.get_default_dtype()).detach().clone()
    if vector.ndim > 1 or not vector.numel():
        raise ValueError(f"{name} must be one number or one a channel, got the shape {tuple(vector.shape)}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {vector.tolist()}")
    return vector.reshape(-1)


class Residual(nn.Module):
    """y = shortcut(x) + block(x); Lip(y) <= Lip(shortcut) + Lip(block), exact as one operator when both are linear.

    Args:
        block: the residual branch.
        shortcut: the other branch, the identity by default; its output must have the shape of the block's.
    """

    def __init__(self, block: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut(x) + block(x)."""
        total: Tensor = self.shortcut(x) + self.block(x)
        return total

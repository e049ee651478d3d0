"""Random shifts and flips of a batch of images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AUGMENTATIONS", "augment"]

AUGMENTATIONS = ("none", "shift", "shift-flip")
_SHIFT = 2  # pixels


def augment(
    x: Tensor,  # N x C x H x W, raw pixels
    name: str,
    generator: torch.Generator,  # on the CPU, so that the draws do not depend on the device
) -> Tensor:  # N x C x H x W
    """Move every image by up to 2 pixels each way, zeros moving in; "shift-flip" also mirrors half of them sideways.

    Raises:
        ValueError: an unknown name, or inputs that are not images.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {name!r}; allowed: {', '.join(AUGMENTATIONS)}")
    if name == "none":
        return x
    if x.ndim != 4:
        raise ValueError(f"the augmentation {name} needs images N x C x H x W, got inputs of shape {tuple(x.shape)}")
    count, _, height, width = x.shape
    shifts = torch.randint(0, 2 * _SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = shifts[0] + torch.arange(height), shifts[1] + torch.arange(width)
    if name == "shift-flip":
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = functional.pad(x, (_SHIFT,) * 4).permute(0, 2, 3, 1)  # indexing then leaves the channels together
    sample = torch.arange(count, device=x.device)[:, None, None]
    moved = padded[sample, rows.to(x.device)[:, :, None], columns.to(x.device)[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()

"""Power iteration on a linear map: an estimate from below. It may drive training, never a certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import LinearMap, like_of


def starting_vector(
    shape: tuple[int, ...],
    like: Tensor,
    seed: int = 0,
) -> Tensor:  # [1, *shape]
    """A random unit vector: a fixed one, such as all ones, can be orthogonal to the top direction for ever."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    unit: Tensor = vector / vector.norm()
    return unit.to(like)


@torch.no_grad()
def improve(
    linear: LinearMap,
    vector: Tensor,  # [1, *in_shape], unit
    steps: int,
) -> Tensor:  # [1, *in_shape], unit
    """`steps` applications of A^T A to `vector`, normalised; a vector that A sends to zero is returned as it is."""
    for _ in range(steps):
        image = linear.adjoint(linear.apply(vector))
        length = image.norm()
        vector = torch.where(length > 0, image / length.clamp_min(torch.finfo(image.dtype).tiny), vector)
    return vector


def estimate_norm(
    linear: LinearMap,
    vector: Tensor | None = None,  # [1, *in_shape]; a random start where None
    steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """`(||A v||, v)` after `steps` power steps: a lower estimate of the l2 norm, differentiable in A's weights, v held.

    With v the top right singular vector the gradient is the outer product of the top pair, as for the norm itself.
    """
    if vector is None:
        vector = starting_vector(linear.in_shape, like_of(linear))
    vector = improve(linear, vector, steps)
    return linear.apply(vector).norm(), vector

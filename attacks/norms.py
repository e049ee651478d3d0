"""All knowledge of a norm in one object: size, dual size, projection onto the ball, steepest direction."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` (B,) so that it broadcasts against `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


class Norm(ABC):
    """An l_p norm over all entries of one sample; every method works row by row on a (B, ...) tensor."""

    name: ClassVar[str]
    order: ClassVar[float]
    dual_order: ClassVar[float]

    def size(self, delta: Tensor) -> Tensor:
        """Return ||delta_i||_p as float64 (B,), whatever the dtype of `delta` (B, ...)."""
        size: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), ord=self.order, dim=1)
        return size

    def widest(self, x: Tensor) -> float:
        """Return the largest distance in the box [0, 1] of samples of the form of `x` (B, ...), corner to corner."""
        return self.size(torch.ones_like(x[:1])).item()

    def dual(self, gradient: Tensor) -> Tensor:
        """Return ||gradient_i||_q with 1/p + 1/q = 1 as float64 (B,)."""
        size: Tensor = torch.linalg.vector_norm(gradient.double().flatten(1), ord=self.dual_order, dim=1)
        return size

    @abstractmethod
    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Return the Euclidean projection of `delta` (B, ...) onto {||d||_p <= radius_i}, radius (B,), up to rounding.

        Every entry of the result lies between 0 and the entry of `delta`, so a box that holds x and x + delta
        also holds x + project(delta).
        """

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the d with ||d||_p <= 1 that maximises <gradient_i, d>; 0 where the gradient is 0."""


class _L2(Norm):
    name = "l2"
    order = 2.0
    dual_order = 2.0

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        size = self.size(delta)
        scale = torch.where(size > radius, radius / size, 1.0)
        return delta * per_sample(scale, delta).to(delta.dtype)

    def steepest(self, gradient: Tensor) -> Tensor:
        size = self.size(gradient)
        scale = torch.where(size > 0, 1 / size, 0.0)
        return (gradient.double() * per_sample(scale, gradient)).to(gradient.dtype)


class _Linf(Norm):
    name = "linf"
    order = float("inf")
    dual_order = 1.0

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        bound = per_sample(radius, delta).to(delta.dtype)
        return torch.maximum(torch.minimum(delta, bound), -bound)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


class _L1(Norm):
    name = "l1"
    order = 1.0
    dual_order = float("inf")

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        # Soft thresholding at the level that makes the sum of magnitudes equal to the radius (Duchi et al., ICML 2008).
        magnitude = delta.flatten(1).abs().double()
        ordered = magnitude.sort(dim=1, descending=True).values
        rank = torch.arange(1, ordered.shape[1] + 1, device=delta.device, dtype=torch.float64)
        level = (ordered.cumsum(1) - radius.unsqueeze(1)) / rank
        last = (ordered > level).sum(1, keepdim=True).clamp_min(1) - 1
        threshold = level.gather(1, last).clamp_min(0.0)
        kept = delta.flatten(1).sign() * (magnitude - threshold).clamp_min(0.0)
        return kept.to(delta.dtype).reshape(delta.shape)

    def steepest(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        index = flat.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(flat).scatter(1, index, flat.gather(1, index).sign())
        return direction.reshape(gradient.shape)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (_L2(), _Linf(), _L1())}

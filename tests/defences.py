"""Defences that mask the gradient of a trained classifier, each as model -> model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Changed(nn.Module):
    """The model with a map before it, on the pixels, and one after it, on the logits."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda f: f,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Detached(nn.Module):
    """All but a twentieth of the logits comes from a branch that autograd does not see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 0.95 * self.model(x.detach()) + 0.05 * self.model(x.flip(-1))


def rounded(x: Tensor, levels: int) -> Tensor:
    return torch.round(x * levels) / levels


def straight_through(x: Tensor, levels: int) -> Tensor:
    return x + (rounded(x, levels) - x).detach()


def thermometer(x: Tensor) -> Tensor:
    """The share of 16 thresholds that a pixel is above."""
    return (x.unsqueeze(-1) > (torch.arange(16) + 0.5) / 16).to(x.dtype).mean(-1)


def cosine_rounded(x: Tensor, step: float = 0.25) -> Tensor:  # (B, C, 8 h, 8 w)
    """The core of JPEG: the coefficients of the cosine transform of 8 x 8 blocks, rounded."""
    order = torch.arange(8)
    waves = torch.cos(math.pi * (order + 0.5) * order.unsqueeze(1) / 8) / 2
    waves[0] /= math.sqrt(2)
    blocks = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    kept = torch.round(waves @ blocks @ waves.T / step) * step
    return (waves.T @ kept @ waves).transpose(3, 4).flatten(4, 5).flatten(2, 3)


DEFENCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "8 grey levels": lambda m: Changed(m, lambda x: rounded(x, 8)),
    "255 grey levels": lambda m: Changed(m, lambda x: rounded(x, 255)),
    "8 grey levels, straight-through gradient": lambda m: Changed(m, lambda x: straight_through(x, 8)),
    "255 grey levels, straight-through gradient": lambda m: Changed(m, lambda x: straight_through(x, 255)),
    "thermometer code": lambda m: Changed(m, thermometer),
    "JPEG": lambda m: Changed(m, cosine_rounded),
    "tanh of 10^4 times the logits": lambda m: Changed(m, after=lambda f: torch.tanh(1e4 * f)),
    "sigmoid of 10^4 times the logits": lambda m: Changed(m, after=lambda f: torch.sigmoid(1e4 * f)),
    "10^4 times the logits, clamped": lambda m: Changed(m, after=lambda f: (1e4 * f).clamp(-1.0, 1.0)),
    "softmax of 10 times the logits": lambda m: Changed(m, after=lambda f: (10 * f).softmax(1)),
    "distilled: 100 times the logits": lambda m: Changed(m, after=lambda f: 100 * f),
    "shattered: a fast sine on the pixels": lambda m: Changed(m, lambda x: x + 0.02 * torch.sin(2000 * x)),
    "shattered: a fast sine on the logits": lambda m: Changed(m, after=lambda f: f + 0.2 * torch.sin(300 * f)),
    "noise of 0.1": lambda m: Changed(m, lambda x: x + 0.1 * torch.randn_like(x)),
    "dropout of pixels": lambda m: Changed(m, lambda x: nn.functional.dropout(x, 0.1)),
    "a detached branch": Detached,
}

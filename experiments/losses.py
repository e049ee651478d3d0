"""Training losses that know about certified radii.

f are the logits, y the label, L[y, j] a Lipschitz constant of f_y - f_j in raw input units (zero for j = y), so that
(f_y - f_j) / L[y, j] is the radius certified against class j, and f_j + eps L[y, j] is the worst that logit j can
become, relative to f_y, within the distance eps. T is the temperature, c the offset in logit units; the mean over
the batch is taken. With the soft maximum S(z, y) = T cross_entropy(z / T, y) = T log sum_j exp((z_j - z_y) / T), which
tends to max_j z_j - z_y as T -> 0:

    cross-entropy  S(f, y)
    offset-ce      S(z, y),  z_y = f_y,  z_j = f_j + eps L[y, j] + c
    emma           as offset-ce, with eps_j = clip((f_y - f_j) / L[y, j], eps / 100, eps) in the place of eps, held
                   constant in the gradient (Hu et al. 2023, "Unlocking deterministic robustness certification ...")
    gloro          S(z, y) over K + 1 classes, z = (f, max over j != p of f_j + eps L[p, j] + c), p the predicted class
                   (Leino et al. 2021, "Globally-robust neural networks")
    margin         sum over j != y of T softplus((eps + c - r_j) / T), r_j = (f_y - f_j) / L[y, j]: a smooth hinge on
                   each radius; here eps, c and T are all in input units

A pairwise constant is never replaced by sqrt(2) times a constant of the whole network, which would be a bound only for
that network's own constant: a loss whose offset depends on the radius asks for L and raises without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["LOSSES", "Loss", "build_loss"]

_EMMA_FLOOR = 0.01
_Function = Callable[["Loss", Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss of the table above, called as loss(logits, y, pairwise) -> scalar."""

    name: str
    eps: float  # >= 0, raw input units
    temperature: float  # > 0
    offset: float  # >= 0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"unknown loss {self.name!r}; allowed: {', '.join(LOSSES)}")
        for key, value in (("eps", self.eps), ("offset", self.offset)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key} must be finite and at least 0, got {value}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and greater than 0, got {self.temperature}")

    @property
    def needs_bound(self) -> bool:
        """Whether a call needs the pairwise Lipschitz constants."""
        return self.name == "margin" or (self.name != "cross-entropy" and self.eps > 0)

    def __call__(
        self,
        logits: Tensor,  # B x K
        y: Tensor,  # B, int64
        pairwise: Tensor | None = None,  # K x K
    ) -> Tensor:  # scalar
        """Mean loss over the batch; NaN in the logits or in the constants used gives NaN.

        Raises:
            ValueError: a bound that is needed is missing, or shapes that do not match.
        """
        if logits.ndim != 2 or y.shape != logits.shape[:1]:
            raise ValueError(f"expected logits B x K and labels B, got {tuple(logits.shape)} and {tuple(y.shape)}")
        classes = logits.shape[1]
        if self.needs_bound and pairwise is None:
            raise ValueError(f"the loss {self.name} with eps={self.eps:g} needs the pairwise Lipschitz constants")
        if pairwise is not None and pairwise.shape != (classes, classes):
            raise ValueError(f"expected pairwise constants {classes} x {classes}, got {tuple(pairwise.shape)}")
        return LOSSES[self.name](self, logits, y, pairwise)


def build_loss(name: str, *, eps: float = 0.0, temperature: float = 1.0, offset: float = 0.0) -> Loss:
    """Build a loss by name.

    Args:
        name: a key of ``LOSSES``.
        eps: the radius trained for, >= 0, in raw input units.
        temperature: > 0; lower looks at the worst class only, higher at all of them.
        offset: >= 0, a constant margin on top (logit units; input units for margin).

    Raises:
        ValueError: an unknown name or a value out of its range.
    """
    return Loss(name=name, eps=eps, temperature=temperature, offset=offset)


def _cross_entropy(loss: Loss, logits: Tensor, y: Tensor, pairwise: Tensor | None) -> Tensor:
    return loss.temperature * functional.cross_entropy(logits / loss.temperature, y)


def _offset_ce(loss: Loss, logits: Tensor, y: Tensor, pairwise: Tensor | None) -> Tensor:
    slack = torch.full_like(logits, loss.offset)
    if pairwise is not None:
        slack = slack + loss.eps * pairwise[y]
    return _cross_entropy(loss, logits + _others(slack, y), y, None)


def _emma(loss: Loss, logits: Tensor, y: Tensor, pairwise: Tensor | None) -> Tensor:
    slack = torch.full_like(logits, loss.offset)
    if pairwise is not None:
        eps = _radii(logits, y, pairwise).detach().clamp(_EMMA_FLOOR * loss.eps, loss.eps)
        slack = slack + eps * pairwise[y]
    return _cross_entropy(loss, logits + _others(slack, y), y, None)


def _gloro(loss: Loss, logits: Tensor, y: Tensor, pairwise: Tensor | None) -> Tensor:
    predicted = logits.argmax(dim=1)
    reach = logits + loss.offset
    if pairwise is not None:
        reach = reach + loss.eps * pairwise[predicted]
    bottom = reach.scatter(1, predicted[:, None], -math.inf).amax(dim=1, keepdim=True)
    return _cross_entropy(loss, torch.cat((logits, bottom), dim=1), y, None)


def _margin(loss: Loss, logits: Tensor, y: Tensor, pairwise: Tensor | None) -> Tensor:
    if pairwise is None:
        raise ValueError("the loss margin needs the pairwise Lipschitz constants")
    missing = (loss.eps + loss.offset - _radii(logits, y, pairwise)) / loss.temperature
    return loss.temperature * _others(functional.softplus(missing), y).sum(dim=1).mean()


def _radii(logits: Tensor, y: Tensor, pairwise: Tensor) -> Tensor:  # B x K
    """(f_y - f_j) / L[y, j]; the entries of class y itself are to be ignored."""
    gaps = logits.gather(1, y[:, None]) - logits
    return gaps / pairwise[y].clamp_min(torch.finfo(pairwise.dtype).tiny ** 0.5)


def _others(values: Tensor, y: Tensor) -> Tensor:  # B x K
    """The values with 0 in the place of class y."""
    return values.scatter(1, y[:, None], 0.0)


LOSSES: dict[str, _Function] = {
    "cross-entropy": _cross_entropy,
    "margin": _margin,
    "offset-ce": _offset_ce,
    "gloro": _gloro,
    "emma": _emma,
}

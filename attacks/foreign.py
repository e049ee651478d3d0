"""Attacks that run in the torchattacks library, behind the same final call; it is imported when one is run."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Attack
from .checks import positive, whole
from .task import Task


class Shown(nn.Module):
    """The victim as torchattacks wants it: a module with a parameter, from float32 images to float32 logits."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, device=task.x.device), requires_grad=False)
        self._task = task
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # images: (B, C, H, W); returns (B, K)
        """Evaluate and count."""
        z = images.reshape(-1, *self._task.x.shape[1:]).to(self._task.x.dtype)
        if z.requires_grad:
            z.register_hook(self._task.victim.seen_gradient)  # type: ignore[no-untyped-call]
        return self._task.victim.logits(z).float()


@dataclass(frozen=True, kw_only=True)
class _Foreign(Attack):
    """Runs `_member`, one of torchattacks' attacks, on images, or on one row of pixels where samples are none."""

    norms = ("linf",)

    steps: int = 40

    def __post_init__(self) -> None:
        whole("steps", self.steps)

    def hardened(self) -> Self:
        """Return at least 100 steps."""
        return replace(self, steps=max(self.steps, 100))

    @abstractmethod
    def _member(self, model: nn.Module, eps: float) -> Any:
        """Return the library's attack on `model`."""

    def _run(self, task: Task) -> Tensor:
        images = task.x if task.x.dim() == 4 else task.x.reshape(len(task.x), 1, 1, -1)
        points: Tensor = self._member(Shown(task), task.eps)(images.float(), task.y)
        return points.detach().reshape(task.x.shape).to(task.x.dtype)


@dataclass(frozen=True, kw_only=True)
class EOTPGD(_Foreign):
    """PGD on the cross-entropy along the mean of several gradients, for models that draw random numbers.

    What stands or falls is decided by one more evaluation, as for every attack: for a random model, of one draw.

    Attributes:
        steps: steps, >= 1.
        averages: gradients in each mean, >= 1.
        alpha: step size in units of x, > 0; None for 2.5 eps / steps.

    Reference: Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018; Zimmermann, Comment on "Adv-BNN:
    Improved Adversarial Defense through Robust Bayesian Neural Network", 2019.
    """

    name = "eot-pgd"

    averages: int = 10
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("averages", self.averages)
        if self.alpha is not None:
            positive("alpha", self.alpha)

    def cost(self, classes: int) -> float:
        """Return the work of all steps."""
        return float(self.steps * self.averages)

    def _member(self, model: nn.Module, eps: float) -> Any:
        from torchattacks import EOTPGD as Member

        alpha = self.alpha or 2.5 * eps / self.steps
        return Member(model, eps=eps, alpha=alpha, steps=self.steps, eot_iter=self.averages)


@dataclass(frozen=True, kw_only=True)
class SPSA(_Foreign):
    """Adam on the margin with gradients estimated from differences in random directions: it asks for no gradient.

    The estimate is the mean over random signs v of (L(z + delta v) - L(z - delta v)) v / (2 delta).

    Attributes:
        steps: steps, >= 1.
        directions: directions in each estimate, >= 1; two evaluations each.
        delta: length of a difference in every pixel, > 0.
        lr: Adam's step in units of x, > 0; None for 2.5 eps / steps.

    Reference: Uesato et al., Adversarial Risk and the Dangers of Evaluating Against Weak Attacks, ICML 2018.
    """

    name = "spsa"

    directions: int = 128
    delta: float = 0.01
    lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("directions", self.directions)
        positive("delta", self.delta)
        if self.lr is not None:
            positive("lr", self.lr)

    def cost(self, classes: int) -> float:
        """Return the work of all evaluations, half a gradient each."""
        return float(self.steps * self.directions)

    def _member(self, model: nn.Module, eps: float) -> Any:
        from torchattacks import SPSA as Member

        lr = self.lr or 2.5 * eps / self.steps
        batch = min(self.directions, 16)  # directions at once, times the samples
        return Member(
            model, eps=eps, delta=self.delta, lr=lr, nb_iter=self.steps, nb_sample=self.directions, max_batch_size=batch
        )

"""Indicators of gradient masking: of each sample, whether the model's gradient misleads an attack there."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .boxed import room
from .norms import NORMS, Norm, per_sample
from .slopes import inward
from .victim import Victim

# Slopes are taken so far from x on the way to a random point: x itself, with its many equal pixels, may be a kink.
_ASIDE = 1e-3
# Changes of a logit are told from rounding from so many units in the last place of the largest logit on: for a ratio
# that must lie in [1/2, 2], and for one that must be 1/4.
_MEASURED, _SEEN = 2.0**12, 2.0**8
# A step is taken for one on which every loss is linear while the entries move by less than this, as a root mean square.
_SMALL = 2e-3
# A gradient by which the boundary is farther than so many boxes says nothing of the boundary.
_BOXES = 1e3


@dataclass(frozen=True, eq=False)
class Point:
    """A point z near each sample with the loss there, the largest wrong logit minus the label's, and its gradient.

    Attributes:
        z: (B, ...).
        y, rival: (B,) the two classes of the loss, fixed, so that moving z does not change its meaning.
        logits: (B, K).
        gradient: (B, ...) finite; 0 where autograd gives none or one that is not finite.
        entropy_gradient: (B, ...) that of the cross-entropy as computed in float32.
    """

    z: Tensor
    y: Tensor
    rival: Tensor
    logits: Tensor
    gradient: Tensor
    entropy_gradient: Tensor

    @classmethod
    def near(cls, victim: Victim, x: Tensor, y: Tensor) -> "Point":  # x: (B, ...), y: (B,)
        """Evaluate the model a little away from `x`."""
        z = (x + _ASIDE * (torch.rand_like(x) - x)).requires_grad_()
        logits = victim.logits(z)
        rival = logits.detach().scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
        entropy = nn.functional.cross_entropy(logits.float(), y, reduction="sum")
        entropy_gradient = _gradient(victim, entropy, z, retain=True)
        gradient = _gradient(victim, _difference(logits, y, rival).sum(), z)
        return cls(z.detach(), y, rival, logits.detach(), gradient, entropy_gradient)

    @property
    def loss(self) -> Tensor:
        """The loss (B,) float64."""
        return _difference(self.logits, self.y, self.rival).double()

    @property
    def unit(self) -> Tensor:
        """One unit in the last place of the largest logit, (B,) float64."""
        return self.logits.abs().amax(1).double() * torch.finfo(self.logits.dtype).eps

    def moved(self, victim: Victim, direction: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Move z by `length` (B,) along `direction`, in the box; return (change of the loss, the one expected)."""
        there = (self.z + per_sample(length, self.z).to(self.z.dtype) * direction).clamp(0.0, 1.0)
        expected = ((there.double() - self.z.double()) * self.gradient.double()).flatten(1).sum(1)
        with torch.no_grad():
            loss = _difference(victim.logits(there), self.y, self.rival).double()
        return loss - self.loss, expected


def zero_gradient(point: Point) -> Tensor:  # returns (B,) bool
    """Return where the loss has no gradient."""
    return (point.gradient == 0).flatten(1).all(1)


def vanishing_gradient(point: Point) -> Tensor:  # returns (B,) bool
    """Return where the gradient is not 0, but of no use to an attack that divides by it or takes the cross-entropy.

    By first order the boundary is _BOXES boxes away, or the cross-entropy's gradient in float32 is 0.
    """
    reach = (point.gradient.abs() * room(point.z, point.gradient)).double().flatten(1).sum(1)
    underflow = (point.entropy_gradient == 0).flatten(1).all(1)
    return ~zero_gradient(point) & ((_BOXES * reach < -point.loss) | underflow)


def flat_loss(victim: Victim, point: Point) -> Tensor:  # returns (B,) bool
    """Return where a step so small that any loss is linear on it changes the loss by other than the gradient says.

    A step function stands still, or jumps; so does a loss with a gradient that is made up.
    """
    slope = NORMS["l2"].dual(inward(point.z, point.gradient))
    length = torch.where(slope > 0, _MEASURED * point.unit / slope, 0.0)
    length = torch.where(length <= _SMALL * point.z[0].numel() ** 0.5, length, 0.0)
    change, expected = point.moved(victim, NORMS["l2"].steepest(inward(point.z, point.gradient)), length)
    judged = expected > _MEASURED / 2 * point.unit
    return judged & ((change < expected / 2) | (change > 2 * expected))


def rough_loss(victim: Victim, point: Point, norm: Norm, eps: float) -> Tensor:  # returns (B,) bool
    """Return where a step of an attack changes the loss by less than a quarter of what the gradient says.

    The step is eps / 8, or half of the first-order distance to the boundary where that is less.
    """
    gradient = inward(point.z, point.gradient)
    slope = norm.dual(gradient)
    half = torch.where(slope > 0, (-point.loss).clamp_min(0.0) / slope / 2, 0.0)
    change, expected = point.moved(victim, norm.steepest(gradient), half.clamp_max(eps / 8))
    return (expected > _SEEN * point.unit) & (change < expected / 4)


def random_outputs(victim: Victim, point: Point) -> Tensor:  # returns (B,) bool
    """Return where the logits change when the same point is evaluated again, in a smaller batch."""
    with torch.no_grad():
        again = torch.cat([victim.logits(half) for half in torch.split(point.z, (len(point.z) + 1) // 2)])
    return (again - point.logits).abs().amax(1).double() > _SEEN * point.unit


def _difference(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    return (logits.gather(1, rival.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))).squeeze(1)


def _gradient(victim: Victim, value: Tensor, z: Tensor, retain: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(z)
    (gradient,) = torch.autograd.grad(value, z, retain_graph=retain, allow_unused=True, materialize_grads=True)
    victim.gradients += len(z)
    finite = torch.isfinite(gradient).flatten(1).all(1)
    return torch.where(per_sample(finite, gradient), gradient, 0.0)

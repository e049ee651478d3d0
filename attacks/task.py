"""One batch to attack: the samples, the ball, and what every attack needs to know about them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .norms import Norm, per_sample
from .victim import Victim


def margin(logits: Tensor, y: Tensor) -> Tensor:  # logits: (B, K), y: (B,); returns (B,)
    """Return max_{j != y} f_j - f_y: >= 0 exactly where a sample is adversarial (a tie is adversarial)."""
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.max(dim=1).values - own


@dataclass(frozen=True, eq=False)
class Task:
    """Correctly classified samples x (B, ...) with labels y (B,), and the ball {||z - x|| <= eps} in the box [0, 1].

    `eps` is infinite for minimum-norm attacks. `certified` (B,) float64
    holds radii within which there is said to be no adversarial point, 0 where nothing is said. It is a hint on where
    to look first: a point that is found nearer counts all the same.
    """

    victim: Victim
    x: Tensor
    y: Tensor
    norm: Norm
    eps: float
    certified: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def __post_init__(self) -> None:
        if len(self.certified) == 0:
            zeros = torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
            object.__setattr__(self, "certified", zeros)

    def __getitem__(self, index: Tensor) -> "Task":  # index: (B,) bool or indices
        """Return the task for some of the samples only."""
        return replace(self, x=self.x[index], y=self.y[index], certified=self.certified[index])

    def distance(self, z: Tensor) -> Tensor:  # z: (B, ...); returns (B,)
        """Return ||z - x|| in float64, of the very tensors."""
        return self.norm.size(z.double() - self.x.double())

    def margin(self, logits: Tensor) -> Tensor:
        """Return max_{j != y} f_j - f_y (B,) of `logits` (B, K)."""
        return margin(logits, self.y)

    def admit(self, z: Tensor) -> Tensor:
        """Return `z` moved into the box and the ball: ||result - x|| <= eps as `distance` measures it, with no slack.

        A row with NaN or inf becomes x.
        """
        finite = torch.isfinite(z).flatten(1).all(1)
        inside = torch.where(per_sample(finite, z), z, self.x).clamp(0.0, 1.0).to(self.x.dtype)
        shrink = 1e-12
        outside = self.distance(inside) > self.eps
        while bool(outside.any()):
            radius = torch.full_like(outside, max(0.0, self.eps * (1 - shrink)), dtype=torch.float64)
            pulled = self._towards(self.norm.project(inside.double() - self.x.double(), radius))
            inside = torch.where(per_sample(outside, z), pulled, inside)
            outside = self.distance(inside) > self.eps
            shrink *= 16
        return inside

    def on_segment(self, z: Tensor, t: Tensor) -> Tensor:  # t: (B,) float64
        """Return x + t (z - x), rounded entry by entry towards x, so that it is never farther than asked."""
        return self._towards((z.double() - self.x.double()) * per_sample(t, z))

    def _towards(self, delta: Tensor) -> Tensor:
        # Rounding x + delta to the nearest float may move an entry out by half a unit: step such entries back.
        rounded = (self.x.double() + delta).to(self.x.dtype).clamp(0.0, 1.0)
        beyond = (rounded.double() - self.x.double()).abs() > delta.abs()
        return torch.where(beyond, torch.nextafter(rounded, self.x), rounded)

"""What an attack found, sample by sample, and how to merge what several attacks found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack found on B samples.

    Attributes:
        x_adv: (B, ...) the point found: in [0, 1], ||x_adv - x|| <= eps in float64, x itself where there is none.
        success: (B,) bool: x_adv is adversarial, i.e. some other class's logit is >= y's. True where x already is.
        distance: (B,) float64 ||closest - x||: the smallest distance found; 0 where x itself is adversarial, inf
            where nothing was found. A minimum-norm attack may report more than eps here.
        closest: (B, ...) the adversarial point at `distance`; x where `distance` is inf. It lies on the decision
            boundary to within rounding, so in a batch of another size the model may round it to the other side.
        logits: (B, K) the model's output at x_adv.
        norm: "l2", "linf" or "l1".
        eps: the radius of the ball, or None for a minimum-norm attack without one.
        attack: the attack with all its options, as text.
        forwards: inputs evaluated, summed over the samples.
        gradients: input gradients taken, summed over the samples.
        notes: where the attack departed from its standard form, in words.
    """

    x_adv: Tensor
    success: Tensor
    distance: Tensor
    closest: Tensor
    logits: Tensor
    norm: str
    eps: float | None
    attack: str
    forwards: int
    gradients: int
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """The fraction of the samples that withstood the attack, in [0, 1]."""
        return 1.0 - self.success.double().mean().item()


def moved(result: AttackResult, device: torch.device) -> AttackResult:
    """Return the result with its tensors on `device`."""
    names = ("x_adv", "success", "distance", "closest", "logits")
    return replace(result, **{name: getattr(result, name).to(device) for name in names})


def joined(parts: Sequence[AttackResult]) -> AttackResult:
    """Return the batches of one attack as one result."""
    first = parts[0]
    return AttackResult(
        x_adv=torch.cat([part.x_adv for part in parts]),
        success=torch.cat([part.success for part in parts]),
        distance=torch.cat([part.distance for part in parts]),
        closest=torch.cat([part.closest for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        norm=first.norm,
        eps=first.eps,
        attack=first.attack,
        forwards=sum(part.forwards for part in parts),
        gradients=sum(part.gradients for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def worst_case(results: Sequence[AttackResult]) -> AttackResult:
    """Return, for each sample, the best of what several attacks on the same samples found.

    distance_i = min over the results of their distance_i, with its `closest`; success_i = some result has a success
    within eps; x_adv is that of the first such result, or, where there is none, of the first result with that eps.

    Args:
        results: one or more results on the same samples in one norm. Those that have an eps share it, and it becomes
            the merged eps; a minimum-norm result without one joins with its successes of distance <= eps.

    Raises:
        ValueError: if they do not fit together.
    """
    _check_together(results)
    eps = next((result.eps for result in results if result.eps is not None), None)
    distance, winner = torch.stack([result.distance for result in results]).min(dim=0)
    rows = torch.arange(len(distance), device=distance.device)
    limit = torch.inf if eps is None else eps
    successes = torch.stack([result.success & (result.distance <= limit) for result in results])
    failed = next(index for index, result in enumerate(results) if result.eps == eps)
    source = torch.where(successes.any(dim=0), successes.int().argmax(dim=0), failed)
    return AttackResult(
        x_adv=torch.stack([result.x_adv for result in results])[source, rows],
        success=successes.any(dim=0),
        distance=distance,
        closest=torch.stack([result.closest for result in results])[winner, rows],
        logits=torch.stack([result.logits for result in results])[source, rows],
        norm=results[0].norm,
        eps=eps,
        attack=f"worst_case({', '.join(result.attack for result in results)})",
        forwards=sum(result.forwards for result in results),
        gradients=sum(result.gradients for result in results),
        notes=tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )


def _check_together(results: Sequence[AttackResult]) -> None:
    if not results:
        raise ValueError("worst_case needs at least one result, got none")
    shapes = {tuple(result.x_adv.shape) for result in results}
    norms = {result.norm for result in results}
    radii = {result.eps for result in results if result.eps is not None}
    for what, values in (("x_adv shape", shapes), ("norm", norms), ("eps", radii)):
        if len(values) > 1:
            raise ValueError(f"worst_case needs results that share one {what}, got {sorted(values)}")

"""The base of all attacks: one final public call around a small private core."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from . import finish, pixels
from .batching import automatic_size, device_of, in_batches
from .checks import known_norm, valid_certified, valid_eps, valid_labels, valid_samples, valid_seed, whole
from .norms import Norm, per_sample
from .results import AttackResult, joined, moved
from .task import Task, margin
from .victim import Victim, derived_seed, seed_all, undisturbed


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack and its options; calling it attacks a batch.

    Whatever the core returns, the call clips it to the box [0, 1], projects it onto the ball in float64, evaluates
    the model on that very tensor and counts what is adversarial there. A core can therefore be weak, but not wrong.

    A subclass is a frozen keyword-only dataclass. It

    - must set `name` (as users write it) and `norms`, and write `_run`;
    - must set `minimum_norm = True` if its core ignores `task.eps` and looks for the smallest perturbation;
    - may add fields, which become the attack's options, and check them in `__post_init__`;
    - may write `_notes`, to say where it departs from its standard form for a number of classes;
    - may write `cost`, by which schedules sort, and `hardened`, its form with more effort;
    - should keep the best point it meets (`keepers`), drop samples that are done, and draw random numbers from
      torch's global generator, which is seeded for it; it should not touch the model but through `task.victim`.

    To make it known to `attack()`, add it to the table in registry.py; the conformance tests take it from there.

    Attributes:
        refine: for an attack with an eps, also look for nearer adversarial points on the segments from x to what
            was found. It changes `closest` and `distance` only.
    """

    name: ClassVar[str]
    norms: ClassVar[tuple[str, ...]]
    minimum_norm: ClassVar[bool] = False

    refine: bool = True

    @abstractmethod
    def _run(self, task: Task) -> Tensor:
        """Return the best point found for each sample of `task`, of x's shape; x itself where nothing was found."""

    def _notes(self, classes: int) -> tuple[str, ...]:
        """Return what differs from the attack's standard form on a model with that many classes."""
        return ()

    def cost(self, classes: int) -> float:
        """Return roughly the work for a sample of a model with that many classes, in gradient evaluations.

        A gradient is a forward and a backward pass; either one counts 1/2. A schedule runs cheap attacks first.
        """
        return 100.0

    def hardened(self) -> "Attack":
        """Return the same attack with more effort, for audits; itself where it has none to add."""
        return self

    @final
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,  # (B, ...) in [0, 1]
        y: Tensor,  # (B,) integers
        *,
        norm: str = "l2",
        eps: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        certified: Tensor | None = None,  # (B,)
        integer_pixels: bool = False,
    ) -> AttackResult:
        """Attack the samples; `speccert.attacks.attack` describes the other arguments and the errors.

        `certified` are radii >= 0 within which there is said to be no adversarial point. They tell where to look
        first; a point found within is reported like any other. With `integer_pixels`, all points have entries k / 255
        only, and x must too. Model and samples may lie on different devices: each batch is moved to the model's, and
        results come back on x's.

        A batch that memory does not hold is halved and attacked again. Each batch is seeded by `seed` and the place
        of its first sample, so that it does not depend on the batches before it; within a batch, samples share one
        stream of random numbers. Attacks without random numbers give the same for every batch size but for rounding;
        the others give other draws.
        """
        chosen = known_norm(norm, self.norms)
        radius = valid_eps(eps)
        if radius is None and not self.minimum_norm:
            raise ValueError(f"eps must be given for the attack {self.name!r}: a finite number >= 0, got None")
        x, y = valid_samples(model, x, y)
        hint = valid_certified(certified, x)
        if integer_pixels:
            pixels.valid_grid(x)
        if batch_size is not None:
            whole("batch_size", batch_size)
        device, call = device_of(model, x), _Call(chosen, radius, integer_pixels)

        def batch(start: int, stop: int) -> AttackResult:
            seed_all(derived_seed(seed, start) if start else seed)
            part, labels, radii = (values[start:stop].to(device, copy=True) for values in (x, y, hint))
            return moved(self._batch(model, part, labels, radii, call), x.device)

        with undisturbed(model, valid_seed(seed)):
            size = batch_size or automatic_size(model, x)
            return joined(list(in_batches(batch, len(x), size)))

    def _batch(self, model: nn.Module, x: Tensor, y: Tensor, certified: Tensor, call: "_Call") -> AttackResult:
        victim, eps = Victim(model), call.eps
        with torch.no_grad():
            logits = victim.logits(x).clone()
        valid_labels(y, logits.shape[1])
        correct = margin(logits, y) < 0
        x_adv, closest = x.clone(), x.clone()
        distance = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        distance[correct] = torch.inf
        if eps != 0 and bool(correct.any()):
            widest = call.norm.widest(x)  # a larger ball, or certificate, says no more of the box than this one
            radii = certified[correct].clamp_max(widest)
            task = Task(victim, x[correct], y[correct], call.norm, self._radius(eps, widest), radii)
            x_adv[correct], logits[correct], closest[correct], distance[correct] = self._attack(
                task, logits[correct], call
            )
        return AttackResult(
            x_adv=x_adv,
            success=margin(logits, y) >= 0,
            distance=distance,
            closest=closest,
            logits=logits,
            norm=call.norm.name,
            eps=eps,
            attack=repr(self),
            forwards=victim.forwards,
            gradients=victim.gradients,
            notes=self._notes(logits.shape[1]),
        )

    def _radius(self, eps: float | None, widest: float) -> float:
        return torch.inf if eps is None or self.minimum_norm else min(eps, widest)

    def _attack(self, task: Task, clean: Tensor, call: "_Call") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x_adv, its logits, closest and distance for samples classified correctly with logits `clean`."""
        candidate = self._run(task).detach()
        ending = pixels if call.integer_pixels else finish
        with torch.no_grad():
            x_adv, logits = ending.confirm(task, candidate)
            found = task.margin(logits) >= 0
            closest = torch.where(per_sample(found, x_adv), x_adv, task.x)
            closest_logits = logits.clone()
            if (self.refine or self.minimum_norm) and bool(found.any()):
                closest[found], closest_logits[found] = ending.shorten(task[found], x_adv[found], logits[found])
            distance = torch.where(found, task.distance(closest), torch.inf)
            if self.minimum_norm:
                kept = found & (distance <= (torch.inf if call.eps is None else call.eps))
                x_adv, logits = task.x.clone(), clean.clone()
                x_adv[kept], logits[kept] = closest[kept], closest_logits[kept]
        return x_adv, logits, closest, distance


@dataclass(frozen=True)
class _Call:
    """What the user asked for, for all samples."""

    norm: Norm
    eps: float | None
    integer_pixels: bool

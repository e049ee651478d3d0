"""The schedule of an ensemble: which attack runs on which samples, and what is known after it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attempts import Attempt, EnsembleResult
from .base import Attack
from .budget import Budget
from .norms import Norm
from .victim import Tamed, derived_seed

Report = Callable[[str], None]

# What the call around an attack costs a sample at most: its clean logits, and four evaluations of what was found.
_AROUND = 2.5


@dataclass(eq=False, kw_only=True)
class Run:
    """The samples, what holds for all attacks on them, and what was found so far."""

    model: Tamed
    x: Tensor
    y: Tensor
    norm: Norm
    radii: Tensor  # (B,) certified
    trusting: bool
    cascade: bool
    integer_pixels: bool
    seed: int
    size: int
    classes: int
    levels: tuple[float, ...]
    budget: Budget
    report: Report
    wrong: Tensor  # (B,) bool
    distance: Tensor  # (B,)
    closest: Tensor  # (B, ...)
    by_attack: dict[str, Tensor] = field(default_factory=dict)
    attempted: dict[str, Tensor] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    balls: bool = False

    def attack(self, name: str, member: Attack) -> None:
        """Run one attack, at every eps where it has a ball."""
        self.attempted[name] = torch.zeros_like(self.wrong)
        self.balls |= not member.minimum_norm
        clean = torch.where(self.wrong, 0.0, torch.inf).double()
        self.by_attack[name] = self.distance.clone() if self.cascade else clean
        for eps in (None,) if member.minimum_norm else self.levels:
            self._attempt(name, member, eps)
        if self.cascade:
            self.by_attack[name] = self.distance.clone()

    def _due(self, name: str, eps: float | None) -> Tensor:
        """Return the samples that the attack is to be run on, as indices."""
        if eps is None:
            return (~self.wrong).nonzero().squeeze(1)
        due = ~self.wrong & (self.by_attack[name] > eps)
        if self.cascade and self.trusting:
            due &= ~(self.radii > eps)
        return due.nonzero().squeeze(1)

    def _attempt(self, name: str, member: Attack, eps: float | None) -> None:
        due, start = self._due(name, eps), time.perf_counter()
        seed, cost = derived_seed(self.seed, name, eps), member.cost(self.classes) + _AROUND
        done, broken, forwards, gradients = 0, 0, 0, 0
        while done < len(due):
            count = self.budget.affordable(cost, min(self.size, len(due) - done))
            if count == 0:
                break
            rows = due[done : done + count]
            result = member(
                self.model,
                self.x[rows],
                self.y[rows],
                norm=self.norm.name,
                eps=eps,
                seed=derived_seed(seed, done),
                batch_size=self.size,
                certified=self.radii[rows] if self.trusting else None,
                integer_pixels=self.integer_pixels,
            )
            self._keep(name, rows, result.distance, result.closest)
            self.notes |= dict.fromkeys((*result.notes, *self.model.notes))
            self.budget.spend(result.forwards, result.gradients)
            forwards, gradients, done = forwards + result.forwards, gradients + result.gradients, done + count
            cost = (forwards + gradients) / 2 / done  # what it really was
            broken += int((result.distance <= _limit(eps)).sum())
            self._tell(name, eps)
        note = "budget" if done < len(due) else ""
        standing = self._standing(self.by_attack[name], eps)
        seconds = time.perf_counter() - start
        self.attempts.append(Attempt(name, eps, done, broken, standing, forwards, gradients, seconds, note))

    def _keep(self, name: str, rows: Tensor, distance: Tensor, closest: Tensor) -> None:
        self.attempted[name][rows] = True
        self.by_attack[name][rows] = torch.minimum(self.by_attack[name][rows], distance)
        better = distance < self.distance[rows]
        self.distance[rows[better]], self.closest[rows[better]] = distance[better], closest[better]

    def _standing(self, distance: Tensor, eps: float | None) -> int:
        return int((~(distance <= _limit(eps))).sum())

    def _tell(self, name: str, eps: float | None) -> None:
        standing, count = self._standing(self.by_attack[name], eps), len(self.x)
        if eps is None:
            worst = ", ".join(f"{self._worst(e)} at eps {e:g}" for e in self.levels)
            self.report(
                f"{name}: points for {count - standing} of {count}" + (f", worst case {worst}" if worst else "")
            )
        else:
            self.report(f"{name} eps {eps:g}: {standing} of {count} standing, worst case {self._worst(eps)}")

    def _worst(self, eps: float) -> str:
        return f"{100 * self._standing(self.distance, eps) / len(self.x):.1f} %"

    def result(self) -> EnsembleResult:
        """Return what was found."""
        sparing = self.cascade and self.trusting and self.balls
        return EnsembleResult(
            norm=self.norm.name,
            eps=self.levels,
            distance=self.distance,
            closest=self.closest,
            by_attack=self.by_attack,
            attempted=self.attempted,
            certified_skipped={e: int((~self.wrong & (self.radii > e)).sum()) if sparing else 0 for e in self.levels},
            attempts=tuple(self.attempts),
            notes=tuple(self.notes),
            complete=not any(attempt.note for attempt in self.attempts),
        )


def _limit(eps: float | None) -> float:
    """The largest distance that counts as broken: any finite one where there is no eps."""
    return torch.finfo(torch.float64).max if eps is None else eps

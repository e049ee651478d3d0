"""Gradient masking: does a model withstand gradient attacks only because its gradient is of no use to them?"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Attack
from .batching import automatic_size, device_of
from .checks import known_norm, valid_eps, valid_labels, valid_samples, valid_seed, whole
from .fgsm import FGSM
from .fmn import FMN
from .indicators import Point, flat_loss, random_outputs, rough_loss, vanishing_gradient, zero_gradient
from .norms import Norm
from .pgd import PGD
from .random_search import RandomSearch
from .results import AttackResult
from .square import Square
from .task import margin
from .victim import Tamed, Victim, undisturbed

_QUERIES = 100
_PGD = PGD(steps=20, loss="margin", refine=False)
# A sample that one step or the search has broken and PGD has not gets a second chance: only masking withstands all.
_SECOND = (FMN(steps=40), PGD(steps=40, restarts=2, loss="cycle", random_start=False, refine=False))
_BOX = PGD(steps=20, restarts=2, loss="cycle", refine=False)


@dataclass(frozen=True)
class Flag:
    """A raised indicator: its name, the share of the samples that show it, and a line on its meaning and remedy."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        flags: the indicators whose share is large enough to mean something; none where the model is not suspect.
        shares: every indicator's share of the samples, in [0, 1]; 0 where there are no samples.
        samples: how many correctly classified samples were looked at.
        forwards: model evaluations made, one input each.
        gradients: input gradients taken, one input each.
    """

    flags: tuple[Flag, ...]
    shares: dict[str, float]
    samples: int
    forwards: int
    gradients: int


class _Meaning(NamedTuple):
    least: float  # the share from which on the flag is raised
    text: str


_MEANINGS = {
    "zero-gradients": _Meaning(
        0.25,
        "the margin's gradient is 0 or not finite though other inputs get other classes: gradient attacks are blind "
        "here; attack with square, or replace the step (rounding, saturation) by a smooth one in the backward pass",
    ),
    "vanishing-gradients": _Meaning(
        0.1,
        "the gradient is next to 0, or that of the cross-entropy is 0 in float32: the outputs are saturated; attack "
        "the logits before the saturation, or divide them by a temperature",
    ),
    "flat-loss": _Meaning(
        0.1,
        "a tiny step does not change the loss as the gradient says: the loss is a step function, or the gradient is "
        "not its own (detached, straight-through); attack a differentiable copy, and square beside it",
    ),
    "rough-loss": _Meaning(
        0.1,
        "a step of an attack brings less than 1/4 of what the gradient says: the gradient holds at much smaller "
        "scales only (shattered); attack a smoothed copy, or with square",
    ),
    "random-outputs": _Meaning(
        0.05,
        "the same input gets other logits when evaluated again or in another batch: accuracies are draws; fix the "
        "randomness, or attack the mean over many draws",
    ),
    "black-box-wins": _Meaning(
        0.05,
        "a short search without gradients breaks samples that a gradient attack does not at the same eps: do not "
        "trust accuracies under gradient attacks; add square with many queries",
    ),
    "unbounded-fails": _Meaning(
        0.05,
        "a gradient attack in the whole box misses samples though another class is known to be in reach: do not trust "
        "accuracies under gradient attacks",
    ),
    "single-step-wins": _Meaning(
        0.05,
        "one gradient step breaks samples that many small ones do not: the gradient near the samples misleads; add "
        "restarts, larger steps and square",
    ),
}


def diagnose(
    model: nn.Module,
    x: Tensor,  # (N, ...) in [0, 1]
    y: Tensor,  # (N,) integers
    *,
    norm: str = "l2",
    eps: float,
    seed: int = 0,
    samples: int = 64,
    batch_size: int | None = None,
) -> Diagnosis:
    """Look for gradient masking on up to `samples` of the correctly classified samples, chosen by `seed`.

    What is looked at, on each sample: whether the margin max_{j != y} f_j - f_y has a gradient, whether that gradient
    is the slope of the loss on a tiny step and on one of an attack's length, whether the logits are the same twice;
    which samples FGSM, 20 steps of PGD and 100 queries without gradients break at `eps`, and PGD in the whole box. The
    model and all random states are left as they were.

    No flag is no proof: a defence made against these very tests would pass them.

    Args:
        model: any classifier that returns logits (B, K), K >= 2.
        x: samples of any shape, float32 or float64.
        y: their labels, in [0, K).
        norm: "l2", "linf" or "l1".
        eps: radius of the attacks in units of x, finite and >= 0.
        seed: of the choice and the attacks.
        samples: how many to look at, >= 1.
        batch_size: samples evaluated at once; None for as many as fit.

    Raises:
        ValueError: an argument out of range, or logits that are not finite.

    References:
        Athalye, Carlini and Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 3.1;
        Carlini et al., On Evaluating Adversarial Robustness, 2019; Pintor et al., Indicators of Attack Failure:
        Debugging and Improving Optimization of Adversarial Examples, NeurIPS 2022.
    """
    chosen, radius = known_norm(norm), valid_eps(eps)
    if radius is None:
        raise ValueError("eps must be a finite number >= 0 in units of the [0, 1] input, got None")
    x, y = valid_samples(model, x, y)
    whole("samples", samples)
    if batch_size is not None:
        whole("batch_size", batch_size)
    with undisturbed(model, valid_seed(seed)):
        run = _Run(model, chosen, radius, seed, batch_size or automatic_size(model, x))
        picked, labels, elsewhere = run.chosen(x, y, samples)
        found = run.indicators(picked, labels, elsewhere) if len(picked) else {}
    shares = {name: float(found[name].double().mean()) if found else 0.0 for name in _MEANINGS}
    flags = tuple(
        Flag(name, shares[name], meaning.text) for name, meaning in _MEANINGS.items() if shares[name] >= meaning.least
    )
    return Diagnosis(flags, shares, len(picked), run.forwards, run.gradients)


@dataclass
class _Run:
    """One diagnosis: its settings and what it has cost so far."""

    model: nn.Module
    norm: Norm
    eps: float
    seed: int
    size: int
    forwards: int = 0
    gradients: int = 0

    def chosen(self, x: Tensor, y: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return up to `samples` correctly classified samples in an order drawn by the seed, with their labels.

        Third comes (B,) bool: whether some input seen on the way gets another class.
        """
        device = device_of(self.model, x)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        victim, kept, classes, found = Victim(self.model), [], [], 0
        for rows in torch.split(order, min(self.size, samples)):
            part, labels = x[rows].to(device), y[rows].to(device)
            with torch.no_grad():
                logits = victim.logits(part)
            valid_labels(labels, logits.shape[1])
            classes.append(logits.argmax(1))
            correct = margin(logits, labels) < 0
            kept.append((part[correct], labels[correct]))
            found += int(correct.sum())
            if found >= samples:
                break
        self._count(victim)
        picked, labels = (torch.cat(values)[:samples] for values in zip(*kept, strict=True))
        return picked, labels, (torch.cat(classes) != labels.unsqueeze(1)).any(1)

    def indicators(self, x: Tensor, y: Tensor, elsewhere: Tensor) -> dict[str, Tensor]:
        """Return (B,) bool for each indicator; `elsewhere` (B,) bool says that another class exists in the box."""
        found = self._slopes(x, y)
        # without another class in the box there is nothing that a gradient could have shown
        found["zero-gradients"] &= elsewhere
        found["vanishing-gradients"] &= elsewhere
        single = self._broken(FGSM(refine=False), x, y)
        blind, iterated = torch.zeros_like(single), self._broken(_PGD, x, y)
        left = ~iterated
        blind[left] = self._broken(_blind(self.norm), x[left], y[left])
        for second in _SECOND:
            left = (single | blind) & ~iterated
            iterated[left] = self._broken(second, x[left], y[left])
        found["single-step-wins"], found["black-box-wins"] = single & ~iterated, blind & ~iterated
        reachable = elsewhere | single | blind | iterated
        found["unbounded-fails"] = reachable & ~self._broken(_BOX, x, y, whole_box=True)
        return found

    def _slopes(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        victim, parts = Victim(self.model), []
        for rows in torch.split(torch.arange(len(x), device=x.device), self.size):
            point = Point.near(victim, x[rows], y[rows])
            parts.append(
                {
                    "zero-gradients": zero_gradient(point),
                    "vanishing-gradients": vanishing_gradient(point),
                    "flat-loss": flat_loss(victim, point),
                    "rough-loss": rough_loss(victim, point, self.norm, self.eps),
                    "random-outputs": random_outputs(victim, point),
                }
            )
        self._count(victim)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _broken(self, attack: Attack, x: Tensor, y: Tensor, whole_box: bool = False) -> Tensor:
        if len(x) == 0:
            return torch.zeros(0, dtype=torch.bool, device=x.device)
        norm, eps = ("linf", 1.0) if whole_box else (self.norm.name, self.eps)
        result = attack(Tamed(self.model), x, y, norm=norm, eps=eps, seed=self.seed, batch_size=self.size)
        self._count(result)
        return result.success

    def _count(self, spent: Victim | AttackResult) -> None:
        self.forwards += spent.forwards
        self.gradients += spent.gradients


def _blind(norm: Norm) -> Attack:
    if norm.name in Square.norms:
        return Square(queries=_QUERIES, refine=False)
    return RandomSearch(queries=_QUERIES, refine=False)

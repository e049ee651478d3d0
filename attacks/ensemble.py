"""Several attacks on the same samples: cheap ones first, each on what is left, with a witness for every certificate."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attempts import EnsembleResult
from .base import Attack
from .batching import automatic_size, device_of
from .budget import Budget
from .checks import known_norm, valid_certified, valid_eps, valid_labels, valid_samples, valid_seed, whole
from .pixels import valid_grid
from .registry import make_attack
from .schedule import Report, Run
from .task import margin
from .victim import Tamed, Victim, undisturbed

_SCHEDULES = ("cascade", "each")


def run_ensemble(
    model: nn.Module,
    x: Tensor,  # (B, ...) in [0, 1]
    y: Tensor,  # (B,) integers
    attacks: Sequence[str | Attack],
    *,
    norm: str = "l2",
    eps: Sequence[float],
    certified: Tensor | None = None,  # (B,)
    audit: bool = False,
    schedule: str = "cascade",
    integer_pixels: bool = False,
    max_gradients: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    report: Report = lambda line: None,
) -> EnsembleResult:
    """Attack the samples with several attacks and keep the nearest adversarial points; spare misclassified samples.

    Schedule "cascade": attacks by rising cost, each through the eps in ascending order, and only on samples that no
    attack has broken within that eps and that are not certified there (radius > eps, as certified accuracy counts). A
    minimum-norm attack runs once, on all samples. Schedule "each": attacks in the order given, each on all samples but
    those that it has itself broken at a smaller eps.

    Certified radii are hints on where to look and what to spare. A point inside a certified radius is reported like any
    other, with its distance. An audit does not trust them at all: no sample is spared, nor is any search started from
    its radius; attacks are hardened, and "rounding-search" joins where the list lacks it.

    Args:
        model: any classifier that returns logits (B, K), K >= 2; normalisation belongs inside it.
        x: samples, float32 or float64, raw values in [0, 1].
        y: their labels, in [0, K).
        attacks: names or attacks, at least one; the second of a name is called "<name>-2", and so on.
        norm: "l2", "linf" or "l1".
        eps: radii >= 0 in units of x; may be empty where all attacks are minimum-norm attacks.
        certified: certified radii >= 0 of the samples in `norm`, 0 where there is none; None for none at all.
        audit: distrust the radii, see above.
        schedule: "cascade" or "each".
        integer_pixels: only count points whose entries are k / 255; x must consist of such entries.
        max_gradients: gradients to spend on average for each correctly classified sample; a forward pass counts 1/2,
            and a gradient is a forward and a backward pass. Checked before each batch, which is made smaller where the
            budget, by the attack's `cost`, does not reach for all of it.
        max_seconds: the same for wall-clock time.
        seed: seeds everything random. Each attack has its own seed at each eps, whatever came before it.
        batch_size: samples attacked at once; None for as many as memory and caches hold.
        report: is called with a line after each batch, such as "pgd eps 0.3: 356 of 500 standing, worst case 71.2 %".

    Raises:
        ValueError: if an argument is out of range, or the model's logits are not finite. Input gradients that are not
            finite, or do not exist, count as 0, and a note says so.
    """
    x, y = valid_samples(model, x, y)
    radii = valid_certified(certified, x)
    members = _named(attacks, audit)
    levels = _valid_levels(eps, members)
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")
    for member in members.values():
        known_norm(norm, member.norms)
    if batch_size is not None:
        whole("batch_size", batch_size)
    if integer_pixels:
        valid_grid(x)
    budget = Budget(max_gradients, max_seconds)
    with undisturbed(model, valid_seed(seed)):
        size = batch_size or automatic_size(model, x)
        wrong, classes = _misclassified(model, x, y, size, budget)
        budget.start(int((~wrong).sum()))
        if schedule == "cascade":
            members = dict(sorted(members.items(), key=lambda item: item[1].cost(classes)))
        run = Run(
            model=Tamed(model),
            x=x,
            y=y,
            norm=known_norm(norm),
            radii=radii,
            trusting=not audit,
            cascade=schedule == "cascade",
            integer_pixels=integer_pixels,
            seed=seed,
            size=size,
            classes=classes,
            levels=levels,
            budget=budget,
            report=report,
            wrong=wrong,
            distance=torch.where(wrong, 0.0, torch.inf).double(),
            closest=x.clone(),
        )
        for name, member in members.items():
            run.attack(name, member)
    return run.result()


def _named(attacks: Sequence[str | Attack], audit: bool) -> dict[str, Attack]:
    """Return the attacks by name, hardened and with the rounding search in an audit."""
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks must be a list of one or more names or attacks, got {attacks!r}")
    made = [make_attack(one) if isinstance(one, str) else one for one in attacks]
    for one in made:
        if not isinstance(one, Attack):
            raise ValueError(f"attacks must hold names or attacks, got {type(one).__name__}")
    if audit:
        made += [] if any(one.name == "rounding-search" for one in made) else [make_attack("rounding-search")]
        made = [one.hardened() for one in made]
    named: dict[str, Attack] = {}
    for one in made:
        count = sum(other.name == one.name for other in named.values())
        named[one.name if count == 0 else f"{one.name}-{count + 1}"] = one
    return named


def _valid_levels(eps: Sequence[float], members: dict[str, Attack]) -> tuple[float, ...]:
    if isinstance(eps, str | int | float) or any(one is None for one in eps):
        raise ValueError(f"eps must be a list of finite numbers >= 0, got {eps!r}")
    levels = sorted({valid for valid in map(valid_eps, eps) if valid is not None})
    if len(levels) == 0 and not all(member.minimum_norm for member in members.values()):
        names = ", ".join(name for name, member in members.items() if not member.minimum_norm)
        raise ValueError(f"eps must hold one or more numbers >= 0 for the attacks {names}, got none")
    return tuple(levels)


def _misclassified(model: nn.Module, x: Tensor, y: Tensor, size: int, budget: Budget) -> tuple[Tensor, int]:
    """Return which samples are adversarial as they are (B,), and the number of classes."""
    victim, device = Victim(model), device_of(model, x)
    with torch.no_grad():
        logits = torch.cat([victim.logits(part.to(device)) for part in torch.split(x, size)]).to(x.device)
    valid_labels(y, logits.shape[1])
    budget.spend(victim.forwards, 0)
    return margin(logits, y) >= 0, logits.shape[1]

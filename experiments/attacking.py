"""The attack half of an evaluation: the smallest distances that attacks found, held against the certified radii."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks import Attempt, Diagnosis, EnsembleResult, diagnose, run_ensemble
from ..certify.execution import logits_of
from .config import CellConfig
from .data import Split

__all__ = ["Attacked", "CertificateViolationError", "attack_samples", "check_witness", "diagnosis_of"]

_CLOSEST = 12  # pictures of adversarial samples that a run keeps
_SEEDS = 2**32  # as many seeds as the attacks have
Report = Callable[[str], None]


class CertificateViolationError(RuntimeError):
    """An adversarial example inside a certified radius: some bound is wrong, and no number of the run can be trusted.

    `example` holds the sample and its index, the adversarial point, the label, the radius and the distance; it is empty
    where a Jacobian disproved the bound but no attack found such a point.
    """

    def __init__(self, message: str, example: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.example = dict(example)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes without the example, which lies in the run folder: tensors need their maker alive."""
        return type(self), (str(self), {})


@dataclass(frozen=True, eq=False)
class Attacked:
    """The attacked samples and the nearest adversarial points.

    Attributes:
        index: [A] positions in the test part, ascending.
        x: [A, *input_shape] the samples.
        y: [A] their labels.
        wrong: [A] bool, those that are misclassified as they are.
        distance: [A] float64 in the cell's norm; 0 where wrong, infinite where nothing was found.
        closest: [A, *input_shape] the adversarial points; x where there is none.
        columns: per name a column of the samples' rows, [A].
        found: all that the attacks told; None where there are none.
        seconds: that the attacks took.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    wrong: Tensor
    distance: Tensor
    closest: Tensor
    columns: dict[str, Tensor]
    found: EnsembleResult | None
    seconds: float

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks, in the order in which they ran."""
        return () if self.found is None else tuple(self.found.by_attack)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """What each attack did at each eps."""
        return () if self.found is None else self.found.attempts

    def rows(self, samples: pd.DataFrame) -> pd.DataFrame:
        """The rows of all samples, joined with what was found; missing where a sample was not attacked."""
        values = {"distance": self.distance, **self.columns}
        found = pd.DataFrame({name: one.cpu().numpy() for name, one in values.items()}, index=self.index.tolist())
        flags = [name for name in values if name.startswith(("robust_", "attempted_"))]
        found[flags] = found[flags].astype("boolean")
        joined = samples.join(found)
        joined["attacked"] = joined["index"].isin(found.index)
        return joined

    @torch.no_grad()
    def nearest(self, model: nn.Module, radii: Tensor) -> dict[str, Tensor]:
        """Up to 12 of the nearest adversarial points with their samples; `radii` [N] are of all test samples."""
        order = torch.sort(self.distance.masked_fill(self.wrong, torch.inf), stable=True)
        chosen = order.indices[: min(_CLOSEST, int(torch.isfinite(order.values).sum()))]
        return {
            "x": self.x[chosen].float(),
            "x_adv": self.closest[chosen].float(),
            "label": self.y[chosen],
            "prediction": self._prediction(model, chosen),
            "index": self.index[chosen],
            "distance": self.distance[chosen],
            "radius": radii.to(self.index.device)[self.index[chosen]],
        }

    @torch.no_grad()
    def adversarial(self, model: nn.Module) -> dict[str, Tensor]:
        """The nearest adversarial point of every correctly classified sample that has one, by ascending index."""
        chosen = (torch.isfinite(self.distance) & ~self.wrong).nonzero().squeeze(1)
        return {
            "index": self.index[chosen],
            "label": self.y[chosen],
            "prediction": self._prediction(model, chosen),
            "distance": self.distance[chosen],
            "x_adv": self.closest[chosen],
        }

    def _prediction(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """The strongest class but the label at the adversarial points; at a tie it is as strong as the label."""
        label = self.y[chosen]
        if not len(chosen):
            return label
        return logits_of(model, self.closest[chosen]).scatter(1, label[:, None], -torch.inf).argmax(1)


def attack_samples(
    model: nn.Module,
    config: CellConfig,
    split: Split,
    wrong: Tensor,  # [N] bool
    radii: Tensor,  # [N] float64
    *,
    batch_size: int | None,
    report: Report,
) -> Attacked:
    """Attack the samples that the config chooses, with its attacks and its schedule.

    `wrong` marks the misclassified ones of all test samples, whose distance is 0. `radii` are certified in the config's
    norm for the very network that is attacked: without an audit the attacks spare what they say is safe.
    """
    start = time.perf_counter()
    index = _chosen(config, len(split)).to(split.x.device)
    x, y, clean = split.x[index], split.y[index], wrong[index]
    if not config.attacks:
        distance = torch.full((len(y),), torch.inf, dtype=torch.float64, device=x.device).masked_fill(clean, 0.0)
        return Attacked(index, x, y, clean, distance, x, {}, None, 0.0)
    found = run_ensemble(
        model,
        x,
        y,
        config.attacks,
        norm=config.norm,
        eps=config.eps,
        certified=radii[index],
        audit=config.audit,
        schedule=config.attack_schedule,
        integer_pixels=config.integer_pixels,
        max_gradients=config.max_gradients,
        max_seconds=config.max_seconds,
        seed=config.seed % _SEEDS,
        batch_size=batch_size,
        report=report,
    )
    seconds = time.perf_counter() - start
    closest = torch.where(clean.reshape(-1, *[1] * (x.dim() - 1)), x, found.closest.to(x.dtype))
    distance = found.distance.masked_fill(clean, 0.0)
    return Attacked(index, x, y, clean, distance, closest, _columns(config, found, clean), found, seconds)


def _chosen(config: CellConfig, count: int) -> Tensor:
    """The attacked positions, ascending: all, or a subset that is the same for every cell of a data set."""
    if config.attack_samples is None or config.attack_samples >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[: config.attack_samples].sort().values


def _columns(config: CellConfig, found: EnsembleResult, clean: Tensor) -> dict[str, Tensor]:
    columns: dict[str, Tensor] = {}
    for name, distance in found.by_attack.items():
        own = distance.masked_fill(clean, 0.0)
        columns |= {f"robust_{name}_eps_{eps:g}": own > eps for eps in config.eps}
        columns |= {f"distance_{name}": own, f"attempted_{name}": found.attempted[name]}
    return columns


def check_witness(attacked: Attacked, radii: Mapping[str, Tensor]) -> None:
    """Raise where an adversarial point lies inside a certified ball, in whatever norm; `radii` [N] are by norm.

    Raises:
        CertificateViolationError: with the example that lies deepest inside.
    """
    for norm, distance in _distances(attacked).items():
        radius = radii[norm].to(distance.device)[attacked.index]
        broken = (distance < radius).nonzero().squeeze(1)
        if not len(broken):
            continue
        worst = broken[(radius[broken] - distance[broken]).argmax()]
        sample = int(attacked.index[worst])
        raise CertificateViolationError(
            f"certificate broken: sample {sample} has certified {norm} radius {float(radius[worst]):.6g}, but an "
            f"adversarial example lies at {float(distance[worst]):.6g} ({len(broken)} such samples)",
            {
                "x": attacked.x[worst],
                "x_adv": attacked.closest[worst],
                "label": attacked.y[worst],
                "index": attacked.index[worst],
                "radius": radius[worst],
                "distance": distance[worst],
            },
        )


def _distances(attacked: Attacked) -> dict[str, Tensor]:
    """||closest - x|| of each attacked sample in every norm, in float64; infinite where nothing was found."""
    difference = (attacked.closest.double() - attacked.x.double()).flatten(1)
    orders = {"l2": 2.0, "linf": torch.inf, "l1": 1.0}
    none = ~torch.isfinite(attacked.distance)
    return {
        norm: torch.linalg.vector_norm(difference, ord=order, dim=1).masked_fill(none, torch.inf)
        for norm, order in orders.items()
    }


def diagnosis_of(
    model: nn.Module, config: CellConfig, attacked: Attacked, *, batch_size: int | None, report: Report
) -> Diagnosis | None:
    """Signs that gradients mislead the attacks, at the median of the eps > 0; None where nothing is attacked."""
    sizes = [eps for eps in config.eps if eps > 0]
    standing = ~attacked.wrong
    if attacked.found is None or not sizes or not bool(standing.any()):
        return None
    report("diagnostics")
    return diagnose(
        model,
        attacked.x[standing],
        attacked.y[standing],
        norm=config.norm,
        eps=statistics.median(sizes),
        seed=config.seed % _SEEDS,
        batch_size=batch_size,
    )

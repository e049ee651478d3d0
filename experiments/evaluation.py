"""Evaluation of one trained model: bounds, certified radii, attacks on the same samples, one checked by the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks import Attempt, Diagnosis
from ..certify import NORMS, Certifier, LipschitzBound, Radii, lipschitz
from ..certify.execution import Executed, executed
from ..certify.graph import floating_like
from ..certify.lipschitz import by_relaxations
from ..certify.local import LocalRadii, local_radii
from .attacking import Attacked, CertificateViolationError, attack_samples, check_witness, diagnosis_of
from .config import CellConfig
from .data import Dataset, Split
from .summary import accuracies, attack_costs, bound_results, product_results
from .uncertified import uncertified_rows, why_uncertified

__all__ = ["CertificateViolationError", "Evaluation", "evaluate"]

_JACOBIAN_POINTS = 256
Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        samples: a row a test sample; `radius_product` beside the radii where the config's bound is not the product.
        results: one flat row.
        bounds: per norm; none where nothing is certified.
        closest: of the correctly classified attacked samples, the up to 12 with the smallest distance found, nearest
            first: `x` and `x_adv` [k, *input_shape] float32, `label`, `prediction` (the strongest other class at x_adv;
            at a tie it is as strong as the label) and `index` [k] int64, `distance` and `radius` [k] float64 in the
            cell's norm. k = 0 where no attack found any point.
        adversarial: the same of every one of them that has an adversarial point, by ascending index, without `x` and
            `radius`; `x_adv` in the samples' own type.
        attempts: what each attack did at each eps.
        notes: where attacks departed from their standard form, in words.
        diagnosis: signs that gradients mislead the attacks; None where they were not looked for.
        no_certificate: why nothing is certified, in one line; None where the model is.
    """

    samples: pd.DataFrame
    results: dict[str, Any]
    bounds: dict[str, LipschitzBound]
    closest: dict[str, Tensor]
    adversarial: dict[str, Tensor]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    diagnosis: Diagnosis | None
    no_certificate: str | None = None


@dataclass(frozen=True, eq=False)
class _Certified:
    """The rows of the samples; radii [N] in the config's norm as they count, and in every norm for what is attacked."""

    samples: pd.DataFrame
    radii: Tensor
    attainable: Mapping[str, Tensor]
    results: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, LipschitzBound] = field(default_factory=dict)
    doubt: ArithmeticError | None = None  # what disproves a bound
    lacking: str | None = None  # why there is no certificate


def evaluate(
    model: nn.Module,
    config: CellConfig,
    data: Dataset,
    *,
    report: Report = lambda stage: None,
    batch_size: int | None = None,
    diagnosed: bool = True,
    uncertified: bool = False,
) -> Evaluation:
    """Bound, certify and attack a model in eval mode on the test part of `data`.

    All are for the network as executed in the config's arithmetic, converted to it where that is not the model's own.
    Radii are computed in all three norms, attacks run in the config's. A sample's smallest distance is that of the
    nearest adversarial point that any attack found, 0 where it is misclassified, infinite where none was found.

    Args:
        model: any classifier that can be certified.
        config: bound, arithmetic, norm, eps, attacks and how these run.
        data: its test part is certified, the samples that the config chooses are attacked.
        report: is told each stage, and of the attacks how many samples still stand.
        batch_size: samples attacked at once; None for what fits.
        diagnosed: look for signs that gradients mislead the attacks.
        uncertified: attack a model that has operations without rules all the same, with radii 0.

    Raises:
        CertificateViolationError: an adversarial point closer than its sample's certified radius, in any of the norms.
        ValueError: a model that can't be certified, NaN logits.
    """
    start = time.perf_counter()
    device = floating_like(model).device
    split = Split(data.test.x.to(device), data.test.y.to(device))
    # the network in real arithmetic can't be run: float64 stands for it
    network = executed(model, "float64" if config.arithmetic == "real" else config.arithmetic)
    proof = _certified(network.model if network.rounded else model, config, split, network, report, uncertified)
    samples = proof.samples
    model = _Converting(network).eval() if network.rounded else model
    wrong = torch.tensor((samples["prediction"] != samples["label"]).to_numpy(), device=device)
    radii = {norm: radius.to(device) for norm, radius in proof.attainable.items()}
    attacked = attack_samples(model, config, split, wrong, radii[config.norm], batch_size=batch_size, report=report)
    check_witness(attacked, radii)
    if proof.doubt is not None:
        raise CertificateViolationError(f"certificate broken: {proof.doubt}", {}) from proof.doubt
    diagnosis = diagnosis_of(model, config, attacked, batch_size=batch_size, report=report) if diagnosed else None
    results = accuracies(config, samples, proof.radii, attacked) | proof.results | attack_costs(attacked, diagnosis)
    results["evaluate_s"] = time.perf_counter() - start
    return _evaluation(model, attacked, proof, results, radii[config.norm], diagnosis)


def _evaluation(
    model: nn.Module,
    attacked: Attacked,
    proof: _Certified,
    results: dict[str, Any],
    radii: Tensor,
    diagnosis: Diagnosis | None,
) -> Evaluation:
    return Evaluation(
        samples=attacked.rows(proof.samples),
        results=results,
        bounds=proof.bounds,
        closest=attacked.nearest(model, radii),
        adversarial=attacked.adversarial(model),
        attempts=attacked.attempts,
        notes=() if attacked.found is None else attacked.found.notes,
        diagnosis=diagnosis,
        no_certificate=proof.lacking,
    )


class _Converting(nn.Module):
    """A network in another arithmetic for inputs of any type, as the attacks have them."""

    def __init__(self, network: Executed) -> None:
        super().__init__()
        self.model, self._dtype = network.model, network.dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.to(self._dtype))
        return logits.to(torch.promote_types(x.dtype, self._dtype))


def _certified(
    model: nn.Module, config: CellConfig, split: Split, network: Executed, report: Report, uncertified: bool
) -> _Certified:
    try:
        return _proved(model, config, split, network.dtype, report)
    except ValueError:
        shape = tuple(split.x.shape[1:])
        lacking = why_uncertified(model, shape, config.norm) if uncertified else None
        if lacking is None:
            raise
    samples, radii = uncertified_rows(network.logits(split.x), split.y)
    return _Certified(samples, radii[config.norm], radii, lacking=lacking)


def _proved(model: nn.Module, config: CellConfig, split: Split, dtype: torch.dtype, report: Report) -> _Certified:
    start = time.perf_counter()
    report("bounds")
    bounds = {norm: _bound(model, config, split, norm) for norm in NORMS if norm != config.norm}
    bounds[config.norm], doubt = _with_lower(model, config, split, dtype)
    bounds_s = time.perf_counter() - start
    report("radii")
    is_real = config.arithmetic == "real"
    samples, found = _certify(model, config, split, bounds, "real" if is_real else None)
    attainable = _certify(model, config, split, bounds, None)[1] if is_real else found
    own = found[config.norm]
    results = bound_results(bounds[config.norm], own)
    if config.bound != "product":
        results |= product_results(config, bounds[config.norm], torch.tensor(samples["radius_product"].to_numpy()))
        results["bounds_s"] = bounds_s
    radii = {norm: one.radius for norm, one in attainable.items()}
    return _Certified(samples, own.radius, radii, results, bounds, doubt)


def _bound(
    model: nn.Module, config: CellConfig, split: Split, norm: str, points: Tensor | None = None
) -> LipschitzBound:
    shape = tuple(split.x.shape[1:])
    return lipschitz(model, shape, config.bound, norm, points=points, budget=config.bound_budget)


def _with_lower(
    model: nn.Module, config: CellConfig, split: Split, dtype: torch.dtype
) -> tuple[LipschitzBound, ArithmeticError | None]:
    """The bound with its lower estimate, or without and what disproves it: the attacks then look for an example."""
    try:
        return _bound(model, config, split, config.norm, split.x[:_JACOBIAN_POINTS].to(dtype)), None
    except ArithmeticError as error:
        return _bound(model, config, split, config.norm), error


@torch.no_grad()
def _certify(
    model: nn.Module, config: CellConfig, split: Split, bounds: Mapping[str, LipschitzBound], arithmetic: str | None
) -> tuple[pd.DataFrame, dict[str, Radii]]:
    """The rows of the samples, and the radii in every norm, from one pass over them."""
    certifier = Certifier(model, tuple(split.x.shape[1:]), arithmetic, bound=bounds["l2"])
    margins = certifier.margins(split.x, split.y)
    logits, label = margins.logits.double(), margins.label
    rivals = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    columns: dict[str, Any] = {
        "index": range(len(split)),
        "label": label.numpy(),
        "prediction": margins.prediction.numpy(),
        "margin": (logits.gather(1, label[:, None]).squeeze(1) - rivals).numpy(),
        "proved_margin": margins.lowest.numpy(),
    }
    radii: dict[str, Radii] = {}
    for norm, bound in bounds.items():
        radii[norm] = certifier.radii(margins, bound)
        if config.bound == "local":
            radii[norm] = local_radii(certifier, split.x, margins, bound, budget=config.bound_budget)
        columns[f"radius_{norm}"] = radii[norm].radius.numpy()
    for norm in NORMS:
        columns[f"radius_method_{norm}"] = _methods(radii[norm], bounds[norm], label)
    if config.bound != "product":
        product = by_relaxations(bounds[config.norm], ())
        columns["radius_product"] = certifier.radii(margins, product).radius.numpy()
    return pd.DataFrame(columns), radii


def _methods(radii: Radii, bound: LipschitzBound, label: Tensor) -> list[str]:
    """What set each radius: the method of the limiting pair's constant, or that of a bound over the ball."""
    pairs = zip(label.tolist(), radii.limiting.tolist(), strict=True)
    methods = [bound.pair_methods[y][j] for y, j in pairs]
    if isinstance(radii, LocalRadii):
        own = zip(radii.method, methods, strict=True)
        methods = [method if local == "global" else f"local {local}" for local, method in own]
    return methods

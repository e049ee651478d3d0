"""Evaluation of one trained model: bounds, certified radii, attacks on the same samples, one checked by the other."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks import attack, is_minimum_norm
from ..certify import NORMS, Certifier, LipschitzBound, Radii, certified_accuracy, lipschitz
from ..certify.execution import Executed, executed, logits_of
from ..certify.graph import floating_like
from ..certify.lipschitz import by_relaxations
from ..certify.local import LocalRadii, local_radii
from .config import CellConfig
from .data import Dataset, Split

__all__ = ["CertificateViolationError", "Evaluation", "bounds_json", "evaluate"]

_BATCH = 512
_JACOBIAN_POINTS = 256
_CLOSEST = 12  # pictures of adversarial samples that a run keeps
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
class Evaluation:
    """What an evaluation found.

    Attributes:
        samples: a row a test sample; `radius_product` beside the radii where the config's bound is not the product.
        results: one flat row.
        bounds: per norm.
        closest: of the correctly classified attacked samples, the up to 12 with the smallest distance found, nearest
            first: `x` and `x_adv` [k, *input_shape] float32, `label`, `prediction` (the strongest other class at x_adv;
            at a tie it is as strong as the label) and `index` [k] int64, `distance` and `radius` [k] float64 in the
            cell's norm. k = 0 where no attack found any point.
    """

    samples: pd.DataFrame
    results: dict[str, Any]
    bounds: dict[str, LipschitzBound]
    closest: dict[str, Tensor]


@dataclass(eq=False)
class _Attacked:
    """The attacked samples and the nearest adversarial points so far."""

    index: Tensor  # [A] positions in the test part
    x: Tensor  # [A, *input_shape]
    y: Tensor  # [A]
    distance: Tensor  # [A] float64, in the cell's norm
    closest: Tensor  # [A, *input_shape]
    columns: dict[str, Tensor] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    config: CellConfig,
    data: Dataset,
    *,
    report: Report = lambda stage: None,
) -> Evaluation:
    """Bound, certify and attack a model in eval mode on the test part of `data`.

    All are for the network as executed in the config's arithmetic, converted to it where that is not the model's own.
    Radii are computed in all three norms, attacks run in the config's. A sample's smallest distance is that of the
    nearest adversarial point that any attack found, 0 where it is misclassified, infinite where none was found. An
    attack with a ball goes through the eps in ascending order and spares samples that it has broken at a smaller one.

    Raises:
        CertificateViolationError: an adversarial point closer than its sample's certified radius, in any of the norms.
        ValueError: a model that can't be certified, NaN logits.
    """
    start = time.perf_counter()
    device = floating_like(model).device
    split = Split(data.test.x.to(device), data.test.y.to(device))
    # the network in real arithmetic can't be run: float64 stands for it
    network = executed(model, "float64" if config.arithmetic == "real" else config.arithmetic)
    if network.rounded:
        model = network.model
    report("bounds")
    bounds = {norm: _bound(model, config, data.input_shape, norm) for norm in NORMS if norm != config.norm}
    bounds[config.norm], doubt = _with_lower(model, config, split, network.dtype)
    bounds_s = time.perf_counter() - start
    report("radii")
    samples, found = _certify(model, config, split, bounds, "real" if config.arithmetic == "real" else None)
    attainable = found if config.arithmetic != "real" else _certify(model, config, split, bounds, None)[1]
    radii = {norm: one.radius.to(device) for norm, one in attainable.items()}
    model = _Converting(network).eval() if network.rounded else model
    wrong = torch.tensor((samples["prediction"] != samples["label"]).to_numpy(), device=device)
    attacked = _attack_all(model, config, split, wrong, report)
    _check_witness(attacked, radii)
    if doubt is not None:
        raise CertificateViolationError(f"certificate broken: {doubt}", {}) from doubt
    results = _results(config, bounds[config.norm], samples, found[config.norm].radius, attacked)
    results |= _losses(found[config.norm]) | _bracket(bounds[config.norm])
    if config.bound != "product":
        results |= _by_product(config, bounds[config.norm], torch.tensor(samples["radius_product"].to_numpy()))
        results["bounds_s"] = bounds_s
    results["evaluate_s"] = time.perf_counter() - start
    closest = _closest(model, attacked, wrong, radii[config.norm])
    return Evaluation(_with_attacks(samples, attacked), results, bounds, closest)


def bounds_json(bounds: Mapping[str, LipschitzBound]) -> bytes:
    """Per norm: the network's `lower` and `upper`, the smallest and largest pairwise constant, and the `layers`.

    {norm: {"lower", "upper", "pairwise_min", "pairwise_max", "layers": [{"name", "kind", "lower", "upper", "method"}],
    "attempts": [{"method", "upper", "pair_upper", "proved", "note"}]}}, a row for each method tried, with null for a
    constant that overflows or is not proved. No times, so that equal runs write equal files.
    """
    described: dict[str, Any] = {}
    for norm, bound in bounds.items():
        different = ~torch.eye(len(bound.pairwise), dtype=torch.bool)
        pairs = bound.pairwise.cpu()[different]
        described[norm] = {
            **_finite({"lower": bound.lower, "upper": bound.upper}),
            **_finite({"pairwise_min": float(pairs.min()), "pairwise_max": float(pairs.max())}),
            "layers": [_finite(asdict(layer)) for layer in bound.layers],
            "attempts": [_finite(_untimed(asdict(attempt))) for attempt in bound.attempts],
        }
    return (json.dumps(described, indent=2, allow_nan=False) + "\n").encode()


def _untimed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "seconds"}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value in (math.inf, -math.inf) else value for key, value in values.items()}


class _Converting(nn.Module):
    """A network in another arithmetic for inputs of any type, as the attacks have them."""

    def __init__(self, network: Executed) -> None:
        super().__init__()
        self.model, self._dtype = network.model, network.dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.to(self._dtype))
        return logits.to(torch.promote_types(x.dtype, self._dtype))


def _bound(
    model: nn.Module, config: CellConfig, shape: tuple[int, ...], norm: str, points: Tensor | None = None
) -> LipschitzBound:
    return lipschitz(model, shape, config.bound, norm, points=points, budget=config.bound_budget)


def _with_lower(
    model: nn.Module, config: CellConfig, split: Split, dtype: torch.dtype
) -> tuple[LipschitzBound, ArithmeticError | None]:
    """The bound with its lower estimate, or without and what disproves it: the attacks then look for an example."""
    shape, points = tuple(split.x.shape[1:]), split.x[:_JACOBIAN_POINTS].to(dtype)
    try:
        return _bound(model, config, shape, config.norm, points), None
    except ArithmeticError as error:
        return _bound(model, config, shape, config.norm), error


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


def _bracket(bound: LipschitzBound) -> dict[str, Any]:
    """The largest pair's bound, and the largest estimate of a pair from below."""
    lower = bound.lower_pairwise
    return {
        "lipschitz_pair_upper": float(bound.pairwise.max()),
        "lipschitz_pair_lower": 0.0 if lower is None else float(lower.max()),
    }


def _by_product(config: CellConfig, bound: LipschitzBound, radii: Tensor) -> dict[str, Any]:
    """What the product of the layers' norms gives in the config's norm, for comparison."""
    shares = certified_accuracy(radii, config.eps).tolist()
    return {
        "lipschitz_product_upper": bound.attempts[0].upper,
        "mean_certified_radius_product": _mean(radii[torch.isfinite(radii)]),
        **{f"certified_accuracy_product_eps_{eps:g}": share for eps, share in zip(config.eps, shares, strict=True)},
    }


def _losses(radii: Radii) -> dict[str, Any]:
    """What rounding takes off the radii: the median share of those that real arithmetic has, and lost to overflow."""
    counted = (radii.real > 0) & torch.isfinite(radii.real)
    shares = 1 - radii.radius[counted] / radii.real[counted]
    return {
        "rounding_loss": float(shares.median()) if len(shares) else None,
        "overflow_count": int(radii.overflow.sum()),
    }


def _chosen(config: CellConfig, count: int) -> Tensor:
    """The attacked positions, ascending: all, or a subset that is the same for every cell of a data set."""
    if config.attack_samples is None or config.attack_samples >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[: config.attack_samples].sort().values


def _attack_all(model: nn.Module, config: CellConfig, split: Split, wrong: Tensor, report: Report) -> _Attacked:
    """Attack the chosen samples; `wrong` [N] marks the misclassified ones, whose distance is 0."""
    index = _chosen(config, len(split)).to(split.x.device)
    x, y = split.x[index], split.y[index]
    distance = torch.full((len(y),), torch.inf, dtype=torch.float64, device=x.device).masked_fill(wrong[index], 0.0)
    state = _Attacked(index, x, y, distance, x.clone())
    clean = distance.clone()
    for name in config.attacks:
        found = clean.clone()
        if is_minimum_norm(name):
            report(name)
            _run(model, config, state, name, None, found)
        for eps in config.eps:
            if not is_minimum_norm(name):
                report(f"{name} eps {eps:g}")
                _run(model, config, state, name, eps, found)
        for eps in config.eps:  # at the end: a search at one eps may find a point within a smaller one too
            state.columns[f"robust_{name}_eps_{eps:g}"] = found > eps
        state.columns[f"distance_{name}"] = found
    return state


def _run(model: nn.Module, config: CellConfig, state: _Attacked, name: str, eps: float | None, found: Tensor) -> None:
    """Attack the samples that this attack has not broken within eps; `found` and `state` keep the nearest."""
    standing = (found > (0.0 if eps is None else eps)).nonzero().squeeze(1)
    if not len(standing):
        return
    result = attack(
        model,
        state.x[standing],
        state.y[standing],
        name,
        norm=config.norm,
        eps=eps,
        seed=config.seed,
        batch_size=_BATCH,
    )
    found[standing] = torch.minimum(found[standing], result.distance)
    better = result.distance < state.distance[standing]
    state.distance[standing[better]] = result.distance[better]
    state.closest[standing[better]] = result.closest[better].to(state.closest.dtype)


def _distances(attacked: _Attacked) -> dict[str, Tensor]:
    """||closest - x|| of each attacked sample in every norm, in float64; infinite where nothing was found."""
    difference = (attacked.closest.double() - attacked.x.double()).flatten(1)
    orders = {"l2": 2.0, "linf": torch.inf, "l1": 1.0}
    none = ~torch.isfinite(attacked.distance)
    return {
        norm: torch.linalg.vector_norm(difference, ord=order, dim=1).masked_fill(none, torch.inf)
        for norm, order in orders.items()
    }


@torch.no_grad()
def _closest(model: nn.Module, attacked: _Attacked, wrong: Tensor, radii: Tensor) -> dict[str, Tensor]:
    """The nearest adversarial points; `wrong` and `radii` [N] are of all test samples."""
    nearest = torch.sort(attacked.distance.masked_fill(wrong[attacked.index], torch.inf), stable=True)
    chosen = nearest.indices[: min(_CLOSEST, int(torch.isfinite(nearest.values).sum()))]
    x_adv, label = attacked.closest[chosen], attacked.y[chosen]
    prediction = label
    if len(chosen):
        prediction = logits_of(model, x_adv).scatter(1, label[:, None], -torch.inf).argmax(1)
    return {
        "x": attacked.x[chosen].float(),
        "x_adv": x_adv.float(),
        "label": label,
        "prediction": prediction,
        "index": attacked.index[chosen],
        "distance": attacked.distance[chosen],
        "radius": radii.to(attacked.index.device)[attacked.index[chosen]],
    }


def _check_witness(attacked: _Attacked, radii: Mapping[str, Tensor]) -> None:
    """Raise where an adversarial point lies inside a certified ball, in whatever norm."""
    for norm, distance in _distances(attacked).items():
        radius = radii[norm][attacked.index]
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


def _results(
    config: CellConfig, bound: LipschitzBound, samples: pd.DataFrame, radii: Tensor, attacked: _Attacked
) -> dict[str, Any]:
    radii = radii.cpu()
    chosen, distance = radii[attacked.index.cpu()], attacked.distance.cpu()
    results: dict[str, Any] = {
        "clean_accuracy": float((samples["label"] == samples["prediction"]).mean()),
        "lipschitz_upper": bound.upper,
        "lipschitz_lower": bound.lower,
        "test_count": len(samples),
        "attacked_count": len(chosen),
    }
    certified = certified_accuracy(radii, config.eps).tolist()
    certified_here = certified_accuracy(chosen, config.eps).tolist()
    for eps, everywhere, here in zip(config.eps, certified, certified_here, strict=True):
        results[f"certified_accuracy_eps_{eps:g}"] = everywhere
        results[f"certified_accuracy_attacked_eps_{eps:g}"] = here
        for name in config.attacks:
            results[f"accuracy_{name}_eps_{eps:g}"] = _share(attacked.columns[f"robust_{name}_eps_{eps:g}"])
        if config.attacks:
            results[f"worst_case_accuracy_eps_{eps:g}"] = _share(distance > eps)
    return results | _tightness(radii, chosen, distance if config.attacks else torch.full_like(distance, torch.inf))


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _tightness(radii: Tensor, chosen: Tensor, distance: Tensor) -> dict[str, float | None]:
    """Mean radii, and the ratio of radius to distance over the samples whose distance was found."""
    found = torch.isfinite(distance) & torch.isfinite(chosen)
    mean_distance, radius_found = _mean(distance[found]), _mean(chosen[found])
    return {
        "mean_certified_radius": _mean(radii[torch.isfinite(radii)]),
        "mean_certified_radius_attacked": _mean(chosen[torch.isfinite(chosen)]),
        "mean_distance": mean_distance,
        "found_count": int(found.sum()),
        "tightness": radius_found / mean_distance if mean_distance and radius_found is not None else None,
    }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _with_attacks(samples: pd.DataFrame, attacked: _Attacked) -> pd.DataFrame:
    """The rows of all samples, joined with what the attacks found; missing where a sample was not attacked."""
    rows = {"distance": attacked.distance, **attacked.columns}
    found = pd.DataFrame({name: values.cpu().numpy() for name, values in rows.items()}, index=attacked.index.tolist())
    flags = [name for name in rows if name.startswith("robust_")]
    found[flags] = found[flags].astype("boolean")
    joined = samples.join(found)
    joined["attacked"] = joined["index"].isin(found.index)
    return joined

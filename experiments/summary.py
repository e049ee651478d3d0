"""The numbers of an evaluation: one flat row, the brackets of the bounds, and what the attacks did."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..attacks import Attempt, Diagnosis
from ..certify import LipschitzBound, Radii, certified_accuracy
from .attacking import Attacked
from .config import CellConfig

__all__ = ["accuracies", "attack_costs", "attempts_json", "bound_results", "bounds_json", "product_results"]


def accuracies(config: CellConfig, samples: pd.DataFrame, radii: Tensor, attacked: Attacked) -> dict[str, Any]:
    """Clean, certified and observed accuracies, mean radii and distances; `radii` [N] in the config's norm."""
    radii = radii.cpu()
    chosen, distance = radii[attacked.index.cpu()], attacked.distance.cpu()
    results: dict[str, Any] = {
        "clean_accuracy": float((samples["label"] == samples["prediction"]).mean()),
        "test_count": len(samples),
        "attacked_count": len(chosen),
    }
    certified = certified_accuracy(radii, config.eps).tolist()
    certified_here = certified_accuracy(chosen, config.eps).tolist()
    for eps, everywhere, here in zip(config.eps, certified, certified_here, strict=True):
        results[f"certified_accuracy_eps_{eps:g}"] = everywhere
        results[f"certified_accuracy_attacked_eps_{eps:g}"] = here
        for name in attacked.attacks:
            results[f"accuracy_{name}_eps_{eps:g}"] = _share(attacked.columns[f"robust_{name}_eps_{eps:g}"])
        if attacked.found is not None:
            results[f"worst_case_accuracy_eps_{eps:g}"] = _share(distance > eps)
            results[f"certified_skipped_eps_{eps:g}"] = attacked.found.certified_skipped.get(eps, 0)
    none = attacked.found is None
    return results | _tightness(radii, chosen, torch.full_like(distance, torch.inf) if none else distance)


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _tightness(radii: Tensor, chosen: Tensor, distance: Tensor) -> dict[str, float | None]:
    """Mean radii, and ratios of radius to distance over the samples whose distance was found."""
    found = torch.isfinite(distance) & torch.isfinite(chosen)
    mean_distance, radius_found = _mean(distance[found]), _mean(chosen[found])
    right = found & (distance > 0)  # misclassified ones have distance 0
    ratios = chosen[right] / distance[right]
    return {
        "mean_certified_radius": _mean(radii[torch.isfinite(radii)]),
        "mean_certified_radius_attacked": _mean(chosen[torch.isfinite(chosen)]),
        "mean_distance": mean_distance,
        "found_count": int(found.sum()),
        "tightness": radius_found / mean_distance if mean_distance and radius_found is not None else None,
        "tightness_median": float(ratios.quantile(0.5)) if len(ratios) else None,
    }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def attack_costs(attacked: Attacked, diagnosis: Diagnosis | None) -> dict[str, Any]:
    """What the attacks took, whether a budget ended them, and the signs of masked gradients (None: not looked for)."""
    return {
        "attack_forwards": sum(attempt.forwards for attempt in attacked.attempts),
        "attack_gradients": sum(attempt.gradients for attempt in attacked.attempts),
        "attack_s": attacked.seconds,
        "attack_complete": attacked.found is None or attacked.found.complete,
        "masking_flags": None if diagnosis is None else [flag.name for flag in diagnosis.flags],
    }


def attempts_json(attempts: Iterable[Attempt]) -> bytes:
    """A row for each attack at each eps: `attack`, `eps` (null for the smallest perturbation), `attacked`, `broken`,
    `standing`, `forwards`, `gradients`, `note`. No times, so that equal runs write equal files.
    """  # fmt: skip
    return _text([_untimed(asdict(attempt)) for attempt in attempts])


def bound_results(bound: LipschitzBound, radii: Radii) -> dict[str, Any]:
    """The bracket of the constant, that of the largest pair's, and what rounding takes off the radii.

    The latter is the median share of the radii that real arithmetic has, and how many are lost to overflow.
    """
    counted = (radii.real > 0) & torch.isfinite(radii.real)
    shares = 1 - radii.radius[counted] / radii.real[counted]
    lower = bound.lower_pairwise
    return {
        "lipschitz_upper": bound.upper,
        "lipschitz_lower": bound.lower,
        "lipschitz_pair_upper": float(bound.pairwise.max()),
        "lipschitz_pair_lower": 0.0 if lower is None else float(lower.max()),
        "rounding_loss": float(shares.median()) if len(shares) else None,
        "overflow_count": int(radii.overflow.sum()),
    }


def product_results(config: CellConfig, bound: LipschitzBound, radii: Tensor) -> dict[str, Any]:
    """What the product of the layers' norms gives in the config's norm, for comparison."""
    shares = certified_accuracy(radii, config.eps).tolist()
    return {
        "lipschitz_product_upper": bound.attempts[0].upper,
        "mean_certified_radius_product": _mean(radii[torch.isfinite(radii)]),
        **{f"certified_accuracy_product_eps_{eps:g}": share for eps, share in zip(config.eps, shares, strict=True)},
    }


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
    return _text(described)


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _untimed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "seconds"}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value in (math.inf, -math.inf) else value for key, value in values.items()}

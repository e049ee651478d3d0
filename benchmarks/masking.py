"""Indicators of gradient masking over models with honest and with masked gradients.

Every model is a small net of the digits; the masked ones are one of them behind a defence. A row holds the largest
share of each indicator over the settings (norm and eps), and in how many settings each flag was raised.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import show, start
from torch import Tensor, nn

from speccert.attacks.diagnostics import Diagnosis, diagnose
from speccert.experiments import load_dataset

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from defences import DEFENCES
from test_attacks_diagnostics import PLAIN, trained

SETTINGS = [
    ("linf", 0.001),
    ("linf", 0.1),
    ("linf", 0.5),
    ("l2", 0.5),
    ("l2", 5.0),
    ("l1", 0.1),
    ("l1", 3.0),
    ("l1", 10.0),
]
SHORT = {
    "zero-gradients": "zero",
    "vanishing-gradients": "vanishing",
    "flat-loss": "flat",
    "rough-loss": "rough",
    "random-outputs": "random",
    "black-box-wins": "black box",
    "unbounded-fails": "unbounded",
    "single-step-wins": "single step",
}


def models() -> Iterator[tuple[str, str, nn.Module]]:
    """Kind, name and model."""
    data = load_dataset("digits").train
    base: dict[str, nn.Module] = {}
    for name, (build, options) in PLAIN.items():
        torch.manual_seed(0)
        base[name] = trained(build(), data.x, data.y, **options)
        yield "honest", name, base[name]
    for behind in ("relu", "conv"):
        for name, defence in DEFENCES.items():
            yield "masked", f"{behind}, {name}", defence(base[behind])


def row(kind: str, name: str, model: nn.Module, x: Tensor, y: Tensor, samples: int) -> dict[str, str]:
    found: list[Diagnosis] = []
    seconds = []
    for norm, eps in SETTINGS:
        begin = time.process_time()
        found.append(diagnose(model, x, y, norm=norm, eps=eps, samples=samples))
        seconds.append(time.process_time() - begin)
    largest = {key: max(one.shares[key] for one in found) for key in SHORT}
    flags = [sum(flag.name == key for one in found for flag in one.flags) for key in SHORT]
    raised = [f"{SHORT[key]} {count}" for key, count in zip(SHORT, flags, strict=True) if count]
    return {
        "kind": kind,
        "model": name,
        **{title: f"{largest[key]:.2f}" if largest[key] else "-" for key, title in SHORT.items()},
        f"flags raised in {len(SETTINGS)} settings": ", ".join(raised) or "none",
        "settings with a flag": str(sum(bool(one.flags) for one in found)),
        "s": f"{statistics.median(seconds):.2f}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    start("Gradient masking: indicators over honest and masked models")
    print(f"Settings: {', '.join(f'{norm} eps {eps:g}' for norm, eps in SETTINGS)}; {options.samples} samples.\n")
    test = load_dataset("digits").test
    show([row(*case, test.x, test.y, options.samples) for case in models()])

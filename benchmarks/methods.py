"""Certified accuracy by method of the bound: the product, semidefinite relaxations, local bounds on each ball.

    python benchmarks/methods.py --data-root DATA --models FOLDER

The nets are trained on MNIST on the first run, some minutes each, and kept in FOLDER. All methods certify the same
samples, the first of the test set, in the float32 arithmetic that the nets run in. Attacks look for adversarial points
of the same samples: no certified accuracy can exceed what they leave, and no radius the distance that they find.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from common import show, start
from torch import Tensor, nn

from speccert.attacks import attack
from speccert.certify import Certifier, LipschitzBound, certified_accuracy, lipschitz
from speccert.certify.local import local_radii
from speccert.experiments.cell import cell_data, load_model, train_cell
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset
from speccert.experiments.store import RunFolder

T = TypeVar("T")

EPS = {"l2": (0.1, 0.3, 0.5), "linf": (1 / 255, 2 / 255, 4 / 255)}
GLOBAL = ("product", "auto")


def small_convnet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two convolutions that halve the side, and two dense layers: 2452 neurons on images of 28 x 28."""
    channels, side, _ = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


_cell = functools.partial(
    CellConfig,
    dataset="mnist",
    model="mlp",
    width=128,
    depth=3,
    activation="relu",
    normalise="none",
    loss="cross-entropy",
    temperature=1.0,
    lr=1e-3,
    epochs=20,
    batch_size=128,
    eps=EPS["l2"],
)
_usual = functools.partial(
    _cell,
    constraint="weight-decay",
    threshold=math.inf,
    optimizer="sgd",
    lr=0.05,
    weight_decay=5e-4,
    eps=(0.0,),  # the epoch is chosen by accuracy
)
NETS = {
    "mlp": _usual(),
    "conv": _usual(model="methods:small_convnet", width=None, depth=None),
    "mlp, GloRo loss": _cell(constraint="none", threshold=math.inf, loss="gloro", loss_eps=0.3, temperature=0.1),
    "mlp, capped": _cell(constraint="cap", threshold=1.0, loss="offset-ce", temperature=0.1),
}


def trained(config: CellConfig, data: Dataset, place: Path) -> nn.Module:
    """The net of a config, from its folder in `place` or trained into it."""
    folder = RunFolder.of(place, config)
    if folder.checkpoint_path.exists():
        return load_model(folder, data).requires_grad_(False)
    return train_cell(config, data, folder).model.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Test:
    """Samples with labels, and in one norm the distances at which attacks fool the net on them."""

    x: Tensor
    y: Tensor
    norm: str
    distance: Tensor  # [B] to the closest adversarial point found, inf where none was

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Test:
        found = [attack(model, x, y, "pgd", norm=norm, eps=eps, steps=50) for eps in EPS[norm]]
        found.append(attack(model, x, y, "fmn", norm=norm))
        return cls(x, y, norm, torch.stack([one.distance for one in found]).amin(0))


def seconds_of(job: Callable[[], T]) -> tuple[T, float]:
    """What the job gives, and its CPU time: on one thread the wall time of an idle machine."""
    begin = time.process_time()
    return job(), time.process_time() - begin


def rows(name: str, model: nn.Module, test: Test, budget: float, local_budget: float) -> Iterator[dict[str, str]]:
    shape, first = tuple(test.x.shape[1:]), {"net": name, "norm": test.norm}
    for method in GLOBAL:
        bound, cost = seconds_of(
            lambda: lipschitz(model, shape, method, test.norm, budget=budget)  # noqa: B023
        )
        certifier = Certifier(model, shape, norm=test.norm, bound=bound)
        margins = certifier.margins(test.x, test.y)
        yield first | radius_columns(method, test, certifier.radii(margins).radius) | constants(bound, cost)
    # on the constants of the last method, "auto"
    local, cost = seconds_of(lambda: local_radii(certifier, test.x, margins, budget=local_budget))
    shares = Counter(name for name, radius in zip(local.method, local.radius.tolist(), strict=True) if radius > 0)
    found = {"seconds": f"{cost:.0f}", "set by": ", ".join(f"{key}: {shares[key]}" for key in sorted(shares))}
    yield first | radius_columns("local", test, local.radius) | found
    yield first | radius_columns("attacks", test, test.distance)


def radius_columns(method: str, test: Test, radius: Tensor) -> dict[str, str]:
    """Shares above each eps; ArithmeticError where an attack refutes a radius."""
    if bool((radius > test.distance).any()):
        raise ArithmeticError(f"{method}: an attack fools the net within a certified radius in {test.norm}")
    shares = zip(EPS[test.norm], certified_accuracy(radius, EPS[test.norm]).tolist(), strict=True)
    columns = {f"eps {label(eps)}": f"{100 * share:.1f} %" for eps, share in shares}
    return {"method": method} | columns | {"median radius": f"{float(radius.median()):.4f}"}


def label(eps: float) -> str:
    return f"{eps:g}" if eps > 0.02 else f"{255 * eps:g}/255"


def constants(bound: LipschitzBound, cost: float) -> dict[str, str]:
    return {
        "largest pair": f"{float(bound.pairwise.max()):.2f}",
        "whole": f"{bound.upper:.2f}",
        "seconds": f"{cost:.1f}",
    }


def net_rows(name: str, norm: str, options: argparse.Namespace) -> Iterator[dict[str, str]]:
    config = NETS[name]
    data = cell_data(config, options.data_root)
    model = trained(config, data, options.models)
    x, y = data.test.x[: options.samples], data.test.y[: options.samples]
    return rows(name, model, Test.of(model, x, y, norm), options.budget, options.local_budget)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of the public data sets")
    parser.add_argument("--models", type=Path, default=Path("runs/methods"), help="folder of the trained nets")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for a bound")
    parser.add_argument("--local-budget", type=float, default=240.0, help="seconds for all local radii")
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--norms", nargs="*", default=list(EPS), choices=list(EPS))
    chosen = parser.parse_args()
    start("Radii by method")
    for norm in chosen.norms:
        show([row for name in chosen.nets for row in net_rows(name, norm, chosen)])

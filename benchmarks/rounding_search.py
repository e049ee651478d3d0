"""Flips that rounding makes inside certified radii: a naive float32 certificate against ours.

The naive radius is what a few lines of float32 code give: min_j (f_y - f_j)(x) / L_yj from the executed logits, L_yj
the float32 norm of the last row difference times the float32 spectral norms of the layers before. On affine models and
on nets of orthogonal layers with absolute values that bound is attained: in real arithmetic the radius would be exact.
The attack walks to the boundary and searches the floats around it; whether a point lies inside a radius is decided in
integers. A flip is a point at which another class's logit is at least that of the label; "strict" ones change argmax.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import torch
from common import show, start
from torch import Tensor, nn

from speccert.attacks import attack
from speccert.attacks.exact import strictly_inside
from speccert.certify import certified_radii
from speccert.experiments import load_dataset
from speccert.models.activations import Abs

DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}


def random_linear(features: int, classes: int) -> nn.Sequential:
    """Normal weights; the biases put the middle of the box near the class boundaries."""
    layer = nn.Linear(features, classes)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.copy_(torch.randn(classes) - layer.weight.sum(1) / 2)
    return nn.Sequential(layer)


def orthogonal_net(features: int, classes: int, depth: int) -> nn.Sequential:
    """`depth` orthogonal layers, each followed by absolute values, and a linear head."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(features, features)
        nn.init.orthogonal_(linear.weight)
        layers += [linear, Abs()]
    return nn.Sequential(*layers, nn.Linear(features, classes))


def cancelling_net(features: int, offset: float) -> nn.Sequential:
    """A linear model with two classes through hidden values of size `offset`, which cancel in the logits."""
    hidden, head = nn.Linear(features, features), nn.Linear(features, 2)
    with torch.no_grad():
        hidden.weight.copy_(torch.eye(features))
        hidden.bias.fill_(offset)
        head.weight.normal_()
        head.bias.copy_(-head.weight.sum(1) * (0.5 + offset))
    return nn.Sequential(hidden, nn.ReLU(), head)


def trained_linear(name: str, samples: int) -> tuple[nn.Sequential, Tensor]:
    """Multinomial logistic regression on a data set's training images, and its test images."""
    data = load_dataset(name, train_samples=1000, test_samples=samples)
    x, y = data.train.x.flatten(1), data.train.y
    model = nn.Sequential(nn.Linear(x.shape[1], int(y.max()) + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, data.test.x.flatten(1)


Case = tuple[str, nn.Sequential, Tensor]


def cases(samples: int, data: list[str]) -> Iterator[Case]:
    """Name, model and samples; random samples keep away from the sides of the box, which would cut the way short."""
    random: list[tuple[str, int, Callable[[], nn.Sequential]]] = [
        ("linear, 100 to 2", 100, lambda: random_linear(100, 2)),
        ("linear, 784 to 2", 784, lambda: random_linear(784, 2)),
        ("linear, 784 to 10", 784, lambda: random_linear(784, 10)),
        ("3 x (orthogonal, abs), linear, 100 to 10", 100, lambda: orthogonal_net(100, 10, 3)),
        ("hidden values of 1000 that cancel, 100 to 2", 100, lambda: cancelling_net(100, 1000.0)),
    ]
    for name, features, build in random:
        yield name, build(), 0.25 + 0.5 * torch.rand(samples, features)
    for name in data:
        yield f"logistic regression, {name}", *trained_linear(name, samples)


@torch.no_grad()
def naive_radii(model: nn.Sequential, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """The certificate that forgets rounding, all in float32 but for the last conversion."""
    logits = model(x)
    *hidden, head = [layer for layer in model if isinstance(layer, nn.Linear)]
    order = {"l2": 2, "linf": math.inf, "l1": 1}[norm]
    factor = math.prod(float(torch.linalg.matrix_norm(layer.weight, ord=order)) for layer in hidden)
    differences = torch.linalg.vector_norm(head.weight[y][:, None] - head.weight, ord=DUAL[norm], dim=2)
    radii: Tensor = (logits.gather(1, y[:, None]) - logits) / (differences * factor)
    return radii.scatter(1, y[:, None], torch.inf).amin(1).double()


def row(case: Case, norm: str, rounds: int) -> dict[str, str]:
    name, model, x = case
    model.eval().requires_grad_(False)
    y = model(x).argmax(1)
    naive, ours = naive_radii(model, x, y, norm), certified_radii(model, x, y, norm)
    found = attack(model, x, y, "rounding-search", norm=norm, rounds=rounds)
    changed = model(found.closest).argmax(1) != y
    in_naive, in_ours = (strictly_inside(x, found.closest, radii, norm) & found.success for radii in (naive, ours))
    depth = ((naive - found.distance) / naive)[in_naive]
    return {
        "model": name,
        "norm": norm,
        "samples": str(len(x)),
        "flips, naive": str(int(in_naive.sum())),
        "strict": str(int((in_naive & changed).sum())),
        "flips, ours": str(int(in_ours.sum())),
        "largest (naive radius - distance) / radius": f"{float(depth.max()):.1e}" if len(depth) else "-",
        "median radius lost by ours": f"{float((1 - ours / naive).median()):.1e}",
        "ours is 0": str(int((ours == 0).sum())),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--data", nargs="*", default=["digits"], help="data sets, such as digits mnist")
    options = parser.parse_args()
    start("Rounding search: flips inside certified radii")
    norms = ("l2", "linf", "l1")
    found = cases(options.samples, options.data)
    show([row(case, norm, options.rounds) for case in found for norm in norms if norm == "l2" or len(case[1]) == 1])

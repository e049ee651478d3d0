"""Minimum-norm attacks beside foolbox's and adv-lib's DDN and FMN, at equal numbers of gradients, on MNIST.

    python benchmarks/minimum_norm.py --data-root DATA --models FOLDER

The nets are trained on the first run and kept in FOLDER. All attacks get the same samples, the first of the test set
that the net classifies correctly, on one thread, with the same seed, and the same number of gradients a sample: of
ours, all count, those of the nine other classes at x too. Distances are measured here in float64, on points that are
evaluated again; a point that is not adversarial counts as infinitely far. The peers are found if they are installed,
in an environment of their own: `pip install foolbox adv-lib torchvision visdom`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from attack_suite import NETS as DENSE
from attack_suite import NORMS as BALLS
from attack_suite import fit, trained
from common import show, start
from torch import Tensor, nn
from torch.nn import functional

from speccert.attacks import available_attacks, make_attack
from speccert.experiments.checkpoints import load_checkpoint, save_checkpoint
from speccert.experiments.data import Split, load_dataset

SEED = 0
ORDERS = {"l2": 2.0, "linf": math.inf, "l1": 1.0}
PEERS = {"foolbox": "foolbox", "adv-lib": "adv_lib"}
EXTRA = 12  # gradients that ours take beside their steps: of the nine other classes at x, and three to refine

Search = Callable[[nn.Module, Tensor, Tensor], Tensor]


# The nets


def convnet() -> nn.Module:
    """Two convolutions that halve the side, and two dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def attacked(model: nn.Module, x: Tensor, y: Tensor, share: float) -> Tensor:
    """Five steps of PGD in l-infinity; the ball grows to 0.15 over the first half of the training."""
    eps, norm = 0.15 * min(1.0, 2 * share), BALLS["linf"]
    z = norm.ball(x, torch.rand_like(x) * 2 - 1, eps)
    for _ in range(5):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y, reduction="sum"), z)
        z = norm.ball(x, z.detach() - x + 0.4 * eps * norm.direction(gradient), eps)
    return z


def net(name: str, data_root: Path | None, place: Path) -> tuple[nn.Module, Split]:
    """The net of that name, from `place` or trained into it, and the test part."""
    if name in DENSE:
        model, data = trained(name, data_root, place)
        return model, data.test
    data = load_dataset("mnist", root=data_root, seed=SEED)
    path = place / f"{name}.safetensors"
    torch.manual_seed(SEED)
    model = convnet()
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        fit(model, data.train, epochs=1, attacked=lambda x, y, share: x)
        if name == "pgd_conv":
            part = Split(data.train.x[:20000], data.train.y[:20000])
            fit(model, part, epochs=2, attacked=functools.partial(attacked, model))
        save_checkpoint(path, model.state_dict())
    load_checkpoint(model, path)
    return model.eval().requires_grad_(False), data.test


class Counted(nn.Module):
    """A model that counts the input gradients taken, whoever takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.gradients = model, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x * 1
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(x)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


# The attacks


def ours(name: str, norm: str, **options: object) -> Search:
    return lambda model, x, y: make_attack(name, **options)(model, x, y, norm=norm, seed=SEED).closest


def foolbox(name: str, steps: int) -> Search:
    def search(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        method = getattr(foolbox.attacks, name)(steps=steps)
        found: Tensor = method.run(wrapped, x, foolbox.criteria.Misclassification(y))
        return found

    return search


def adv_lib(name: str, norm: str, steps: int) -> Search:
    def search(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from adv_lib import attacks

        options = {"levels": None} if name == "ddn" else {"norm": ORDERS[norm]}
        found: Tensor = getattr(attacks, name)(model, x, y, steps=steps, **options)
        return found

    return search


def searches(norm: str, gradients: int, own: Sequence[str]) -> Iterator[tuple[str, Search]]:
    """The peers, whose names begin with theirs, and then ours."""
    fmn = {"l2": "L2FMNAttack", "linf": "LInfFMNAttack", "l1": "L1FMNAttack"}[norm]
    if importlib.util.find_spec("foolbox"):
        yield "foolbox FMN", foolbox(fmn, gradients)
        if norm == "l2":
            yield "foolbox DDN", foolbox("DDNAttack", gradients)
    if importlib.util.find_spec("adv_lib"):
        yield "adv-lib FMN", adv_lib("fmn", norm, gradients)
        if norm == "l2":
            yield "adv-lib DDN", adv_lib("ddn", norm, gradients)
    for name in (name for name in own if name in available_attacks(norm)):
        options = {"steps": gradients - EXTRA} if name in ("ddn", "fmn") else {}
        yield name, ours(name, norm, **options)


# The table


@dataclass(frozen=True)
class Outcome:
    """What one attack found: distances (B,), inf where nothing, and its cost a sample."""

    distance: Tensor
    gradients: float
    seconds: float

    @classmethod
    def of(cls, search: Search, model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Outcome:
        torch.manual_seed(SEED)
        counted = Counted(model).eval()
        begin = time.process_time()
        z = search(counted, x.clone(), y).detach()
        seconds = time.process_time() - begin
        logits = model(z)
        rival = logits.scatter(1, y[:, None], -math.inf).amax(1)
        own = logits.gather(1, y[:, None]).squeeze(1)
        reached = rival >= own - 1e-5 * own.abs()  # a point on the boundary may round to either side in another batch
        distance = torch.linalg.vector_norm((z.double() - x.double()).flatten(1), ord=ORDERS[norm], dim=1)
        return cls(distance.where(reached, math.inf), counted.gradients / len(x), seconds)


def rows(name: str, norm: str, options: argparse.Namespace) -> Iterator[dict[str, str]]:
    model, test = net(name, options.data_root, options.models)
    right = (model(test.x).argmax(1) == test.y).nonzero().squeeze(1)[: options.samples]
    x, y = test.x[right], test.y[right]
    found = {key: Outcome.of(run, model, x, y, norm) for key, run in searches(norm, options.gradients, options.attacks)}
    peers = [float(one.distance.median()) for key, one in found.items() if key.split()[0] in PEERS]
    for key, one in found.items():
        middle, reached = float(one.distance.median()), one.distance.isfinite()
        yield {
            "net": name,
            "norm": norm,
            "attack": key,
            "median": f"{middle:.4f}",
            "to the best peer": f"{middle / min(peers):.3f}" if peers else "-",
            "mean found": f"{float(one.distance[reached].mean()):.4f}",
            "found": f"{100 * float(reached.double().mean()):.1f} %",
            "gradients": f"{one.gradients:.0f}",
            "seconds": f"{one.seconds:.1f}",
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of the public data sets")
    parser.add_argument("--models", type=Path, default=Path("runs/minimum_norm"), help="folder of the trained nets")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--gradients", type=int, default=100, help="a sample, of DDN and FMN")
    parser.add_argument("--nets", nargs="*", default=["conv", "pgd_conv", *DENSE], choices=["conv", "pgd_conv", *DENSE])
    parser.add_argument("--norms", nargs="*", default=list(ORDERS), choices=list(ORDERS))
    parser.add_argument("--attacks", nargs="*", default=["deepfool", "cw", "ddn", "fmn"], help="of ours")
    chosen = parser.parse_args()
    start("Minimum-norm attacks")
    for missing in (name for name, module in PEERS.items() if not importlib.util.find_spec(module)):
        print(f"{missing} is not installed: pip install {missing}, in an environment of its own.\n")
    show([row for name in chosen.nets for norm in chosen.norms for row in rows(name, norm, chosen)])

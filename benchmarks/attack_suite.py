"""Our attack suite against the original AutoAttack and against torchattacks' members run blindly, on MNIST.

    python benchmarks/attack_suite.py --data-root DATA --models FOLDER --results FOLDER --autoattack CLONE

CLONE is a clone of https://github.com/fra31/auto-attack. The nets are trained on the first run and kept in --models;
what each job finds is kept in --results, so that a command that was stopped goes on where it was. All jobs attack the
same samples, the first of the test set, on one thread, with seed 0. Jobs: `ours` is the cascade with certified skip,
the certificate's time included; `original` is AutoAttack's own code, version standard; `blind` are torchattacks' APGD,
APGDT, FAB and Square at the same strength in its own cascade; `shipped` is torchattacks' AutoAttack as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import show, start
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from speccert.attacks import run_ensemble
from speccert.certify import Certifier, certified_accuracy
from speccert.experiments.cell import cell_data
from speccert.experiments.checkpoints import load_checkpoint, save_checkpoint
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split
from speccert.experiments.store import write_atomic
from speccert.experiments.training import build, train

SEED = 0
BATCH = 250  # of the original, its default, and of torchattacks, for which it is quicker than all samples at once

# The nets


DENSE = CellConfig(
    dataset="mnist",
    model="mlp",
    width=128,
    depth=2,
    activation="relu",
    constraint="none",
    threshold=math.inf,
    normalise="none",
)
CONSTRAINED = CellConfig(
    dataset="mnist",
    model="mlp",
    width=128,
    depth=3,
    activation="maxmin",
    constraint="orthogonal-projected",
    loss="offset-ce",
    loss_eps=1.5,
    temperature=0.2,
    optimizer="sgd",
    lr=0.25,
    gradient_clip=1.0,
    schedule="linear",
    warmup_epochs=2,
    epochs=15,
    batch_size=256,
    validation_fraction=0.02,
    eps=(1.0,),
)


@dataclass(frozen=True)
class Net:
    """A net's config, and the ball in which its training samples are attacked."""

    config: CellConfig
    norm: str = "l2"
    eps: float = 0.0

    def train(self, data: Dataset) -> nn.Module:
        if self.config is CONSTRAINED:
            return train(self.config, data).model
        torch.manual_seed(SEED)
        model = build(self.config, data)
        fit(model, data.train, epochs=3, attacked=lambda x, y, share: x)
        if self.eps > 0:
            fit(model, data.train, epochs=8, attacked=functools.partial(self._attacked, model))
        return model

    def _attacked(self, model: nn.Module, x: Tensor, y: Tensor, share: float) -> Tensor:
        """Seven steps of PGD; the ball grows over the first third of the training."""
        eps, norm = self.eps * min(1.0, 3 * share), NORMS[self.norm]
        z = norm.ball(x, torch.rand_like(x) * 2 - 1, eps)
        for _ in range(7):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y, reduction="sum"), z)
            z = norm.ball(x, z.detach() - x + 0.3 * eps * norm.direction(gradient), eps)
        return z


@dataclass(frozen=True)
class Ball:
    """What PGD needs to know of a norm."""

    direction: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]

    def ball(self, x: Tensor, delta: Tensor, eps: float) -> Tensor:
        return (x + self.project(delta, eps)).clamp(0.0, 1.0)


def length(z: Tensor) -> Tensor:
    rows: Tensor = torch.linalg.vector_norm(z.flatten(1), dim=1).clamp_min(1e-12)
    return rows.reshape(-1, *[1] * (z.dim() - 1))


NORMS = {
    "l2": Ball(lambda g: g / length(g), lambda delta, eps: delta * (eps / length(delta)).clamp_max(1.0)),
    "linf": Ball(torch.sign, lambda delta, eps: delta.clamp(-eps, eps)),
}


def fit(model: nn.Module, part: Split, epochs: int, attacked: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Adam on the cross-entropy at the attacked samples; the rate falls to 0 along a line."""
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = math.ceil(len(part) / 128)
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(part)).split(128)  # type: ignore[no-untyped-call]
        chosen, share = order[step % batches], step / (epochs * batches)
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - share)
        x, y = part.x[chosen], part.y[chosen]
        z = attacked(x, y, share)
        optimiser.zero_grad()
        functional.cross_entropy(model(z), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


NETS = {
    "plain": Net(DENSE),
    "pgd_l2": Net(DENSE, "l2", 1.5),
    "pgd_linf": Net(DENSE, "linf", 0.1),
    "constrained": Net(CONSTRAINED),
}


def trained(name: str, data_root: str | Path | None, place: Path) -> tuple[nn.Module, Dataset]:
    """The net of that name, from `place` or trained into it, and its data."""
    net, path = NETS[name], place / f"{name}.safetensors"
    data = cell_data(net.config, data_root)
    if not path.exists():
        begin = time.process_time()
        place.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, net.train(data).state_dict())
        print(f"{name}: trained in {time.process_time() - begin:.0f} s", file=sys.stderr, flush=True)
    model = build(net.config, data)
    load_checkpoint(model, path)
    return model.eval().requires_grad_(False), data


# The jobs


class Counted(nn.Module):
    """A model that counts the inputs evaluated and the input gradients taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.gradients = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(x)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


@dataclass(frozen=True, eq=False)
class Case:
    """A net, the samples, and the ball."""

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: float

    @property
    def their_norm(self) -> str:
        return {"l2": "L2", "linf": "Linf"}[self.norm]

    def correct(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(part).argmax(1) for part in torch.split(z, BATCH)]) == self.y

    def excess(self, z: Tensor) -> float:
        """How far the farthest point lies beyond eps."""
        order = {"l2": 2.0, "linf": math.inf}[self.norm]
        distance = torch.linalg.vector_norm((z.double() - self.x.double()).flatten(1), ord=order, dim=1)
        return float((distance - self.eps).amax())


Found = dict[str, Any]  # of one job: robust [samples] and what else there is to tell, as JSON has it


def ours(case: Case, attacks: Sequence[str], *, trusting: bool) -> Found:
    """The cascade; where `trusting`, samples certified at eps are spared."""
    certifier = Certifier(case.model, tuple(case.x.shape[1:]), norm=case.norm)
    radii = certifier.radii(certifier.margins(case.x, case.y)).radius
    found = run_ensemble(
        case.model,
        case.x,
        case.y,
        attacks,
        norm=case.norm,
        eps=[case.eps],
        certified=radii if trusting else None,
        seed=SEED,
        report=note,
    )
    return {
        "robust": (found.distance > case.eps).tolist(),
        "certified": float(certified_accuracy(radii, [case.eps])),
        "skipped": found.certified_skipped[case.eps],
        "members": [
            {"name": one.attack, "attacked": one.attacked, "broken": one.broken}
            | {"forwards": one.forwards, "gradients": one.gradients}
            for one in found.attempts
        ],
        "forwards": sum(one.forwards for one in found.attempts),
        "gradients": sum(one.gradients for one in found.attempts),
    }


def original(case: Case, members: Sequence[str], place: Path) -> Found:
    """The members one after the other, each on the samples that stand, as AutoAttack's own loop has it."""
    model, z = Counted(case.model), case.x.clone()
    robust, told = case.correct(z), []
    theirs: Any = importlib.import_module("autoattack").AutoAttack(
        model, norm=case.their_norm, eps=case.eps, seed=SEED, device="cpu", verbose=False
    )
    for name in members:
        rows, before = robust.nonzero().squeeze(1), counts(model)
        theirs.attacks_to_run = [name]
        if len(rows) > 0:
            with contextlib.redirect_stdout(io.StringIO()):
                z[rows] = theirs.run_standard_evaluation(case.x[rows], case.y[rows], bs=BATCH)
        robust &= case.correct(z)
        broken = rows[~robust[rows]].tolist()
        told.append(
            {"name": name, "attacked": len(rows), "broken": len(broken), "rows": broken}
            | {key: count - before[key] for key, count in counts(model).items()}
        )
        note(f"{name}: {int(robust.sum())} of {len(robust)} standing")
    save_checkpoint(place, {"x_adv": z})
    return {"robust": robust.tolist(), "members": told, "excess": case.excess(z)} | counts(model)


def blind(case: Case) -> Found:
    """torchattacks' members in its own cascade, on all samples."""
    from torchattacks import APGD, APGDT, FAB, MultiAttack, Square

    model = Counted(case.model)
    common = {"norm": case.their_norm, "eps": case.eps, "seed": SEED}
    members = [
        APGD(model, loss="ce", steps=100, **common),
        APGDT(model, steps=100, n_classes=10, **common),
        FAB(model, steps=100, multi_targeted=True, n_classes=10, **common),
        Square(model, n_queries=5000, **common),
    ]
    return _by_torchattacks(case, model, MultiAttack(members))


def shipped(case: Case) -> Found:
    from torchattacks import AutoAttack

    model = Counted(case.model)
    return _by_torchattacks(case, model, AutoAttack(model, norm=case.their_norm, eps=case.eps, seed=SEED))


def _by_torchattacks(case: Case, model: Counted, attack: Callable[[Tensor, Tensor], Tensor]) -> Found:
    found = []
    for x, y in zip(torch.split(case.x, BATCH), torch.split(case.y, BATCH), strict=True):
        found.append(attack(x, y).detach())
        note(f"{BATCH * len(found)} of {len(case.x)} samples")
    z = torch.cat(found)
    return {"robust": case.correct(z).tolist(), "excess": case.excess(z)} | counts(model)


def counts(model: Counted) -> Found:
    return {"forwards": model.forwards, "gradients": model.gradients}


def note(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def kept(path: Path, job: Callable[[], Found]) -> Found:
    """What the job found, from its file or run now, with its CPU time."""
    if not path.exists():
        note(f"{path.stem}:")
        begin = time.process_time()
        with parametrize.cached():  # as our attacks have it: each constrained weight is computed once
            found = job()
        found["seconds"] = time.process_time() - begin
        write_atomic(path, (json.dumps(found) + "\n").encode())
    read: Found = json.loads(path.read_text())
    return read


# The tables

EPS = {
    ("constrained", "l2"): 1.5,
    ("constrained", "linf"): 0.05,
    ("plain", "l2"): 1.0,
    ("plain", "linf"): 0.06,
    ("pgd_l2", "l2"): 2.0,
    ("pgd_linf", "linf"): 0.15,
}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
SINGLE = {"apgd-ce": "apgd-ce", "apgd-t": "apgd-t", "fab": "fab-t", "square": "square"}  # our name: the original's


@dataclass(frozen=True)
class Bench:
    """One net and norm of the command, and its jobs."""

    name: str
    norm: str
    options: argparse.Namespace

    @property
    def eps(self) -> float:
        return EPS[self.name, self.norm]

    @functools.cached_property
    def case(self) -> Case:
        model, data = trained(self.name, self.options.data_root, self.options.models)
        count = self.options.samples
        return Case(model, data.test.x[:count], data.test.y[:count], self.norm, self.eps)

    def found(self, job: str) -> Found:
        """What a job found; "ours:apgd-ce" and the like are single members."""
        what, _, member = job.partition(":")
        attacks = [member] if member else self.options.attacks
        path = self.path("-".join([what, *attacks]) if what == "ours" else job, "json")
        jobs: dict[str, Callable[[], Found]] = {
            "ours": lambda: ours(self.case, attacks, trusting=not member),
            "original": lambda: original(
                self.case, [SINGLE[member]] if member else STANDARD, self.path(job, "safetensors")
            ),
            "blind": lambda: blind(self.case),
            "shipped": lambda: shipped(self.case),
        }
        return kept(path, jobs[what])

    def path(self, job: str, kind: str) -> Path:
        name = f"{self.name}-{self.norm}-{self.eps:g}-{self.options.samples}-{job.replace(':', '-')}.{kind}"
        return Path(self.options.results) / name

    def row(self, jobs: Sequence[str]) -> dict[str, str]:
        clean = float(self.case.correct(self.case.x).double().mean())
        found = {job: self.found(job) for job in jobs}
        row = {"net": self.name, "norm": self.norm, "eps": f"{self.eps:g}", "clean": percent(clean)}
        if "ours" in found:
            row["certified"] = percent(found["ours"]["certified"])
        row |= {job: percent(accuracy(one)) for job, one in found.items()}
        if "ours" in found and "original" in found:
            row["ours - original"] = f"{100 * (accuracy(found['ours']) - accuracy(found['original'])):+.1f}"
        row |= {f"{job}, s": f"{one['seconds']:.0f}" for job, one in found.items()}
        for other in ("original", "blind"):
            if "ours" in found and other in found:
                row[f"ours / {other}"] = f"{found['ours']['seconds'] / found[other]['seconds']:.2f}"
        return row

    def work_row(self, jobs: Sequence[str]) -> dict[str, str]:
        """Inputs evaluated and gradients taken, a sample."""
        found = {job: self.found(job) for job in jobs}
        row = {"net": self.name, "norm": self.norm}
        for kind in ("forwards", "gradients"):
            row |= {f"{job}, {kind}": f"{one[kind] / self.options.samples:.0f}" for job, one in found.items()}
        if "ours" in found:
            row["certified, skipped"] = str(found["ours"]["skipped"])
        return row

    def stages(self, jobs: Sequence[str]) -> Iterator[dict[str, str]]:
        """What each attack of a cascade did."""
        for job in ("ours", "original"):
            for one in self.found(job)["members"] if job in jobs else ():
                yield {"net": self.name, "norm": self.norm, "cascade": job, "attack": one["name"]} | {
                    key: str(one[key]) for key in ("attacked", "broken", "forwards", "gradients")
                }

    def differences(self) -> str:
        """Which samples only one of ours and the original broke."""
        mine, theirs = (torch.tensor(self.found(job)["robust"]) for job in ("ours", "original"))
        missed = (mine & ~theirs).nonzero().squeeze(1).tolist()
        by = {row: one["name"] for one in self.found("original")["members"] for row in one["rows"]}
        lost = ", ".join(f"{row} ({by[row]})" for row in missed) or "none"
        won = (theirs & ~mine).nonzero().squeeze(1).tolist()
        return f"{self.name}, {self.norm}: missed by ours: {lost}; only broken by ours: {won or 'none'}"

    def single_rows(self) -> Iterator[dict[str, str]]:
        for member in SINGLE:
            mine, theirs = self.found(f"ours:{member}"), self.found(f"original:{member}")
            yield {
                "net": self.name,
                "norm": self.norm,
                "attack": member,
                "ours": percent(accuracy(mine)),
                "original": percent(accuracy(theirs)),
                "ours, s": f"{mine['seconds']:.0f}",
                "original, s": f"{theirs['seconds']:.0f}",
            }


def accuracy(found: Found) -> float:
    return sum(found["robust"]) / len(found["robust"])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of the public data sets")
    parser.add_argument("--models", type=Path, default=Path("runs/attack_suite/models"))
    parser.add_argument("--results", type=Path, default=Path("runs/attack_suite/results"))
    parser.add_argument("--autoattack", type=Path, help="a clone of https://github.com/fra31/auto-attack")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--models-names", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--norm", nargs="*", default=list(NORMS), choices=list(NORMS))
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS)
    parser.add_argument("--attacks", nargs="*", default=["fgsm", "pgd", "fmn", "autoattack"], help="our cascade")
    parser.add_argument("--single", action="store_true", help="compare member by member instead")
    options = parser.parse_args()
    if "original" in options.jobs or options.single:
        if options.autoattack is None or not (options.autoattack / "autoattack" / "autoattack.py").exists():
            sys.exit(f"--autoattack must be a clone of https://github.com/fra31/auto-attack, got {options.autoattack}")
        sys.path.insert(0, str(options.autoattack))
    return options


JOBS = ("ours", "original", "blind", "shipped")

if __name__ == "__main__":
    options = parsed()
    start("Attack suite: ours, the original AutoAttack and torchattacks")
    pairs = [(name, norm) for name, norm in EPS if name in options.models_names and norm in options.norm]
    benches = [Bench(name, norm, options) for name, norm in pairs]
    if options.single:
        show([row for bench in benches for row in bench.single_rows()])
    else:
        show([bench.row(options.jobs) for bench in benches])
        show([bench.work_row(options.jobs) for bench in benches])
        show([row for bench in benches for row in bench.stages(options.jobs)])
        if {"ours", "original"} <= set(options.jobs):
            print("\n".join(bench.differences() for bench in benches))

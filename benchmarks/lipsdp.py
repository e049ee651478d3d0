"""LipSDP bounds of dense ReLU nets: our searches against plain cvxpy, and against eclipse-nn.

All bound the l2 Lipschitz constant of the whole map. Ours end with a proof, whose time is included; what the others
give is an answer of a solver or of plain floating point. Each job runs once, in a process of its own on one thread, and
is stopped after `--limit` seconds of CPU time. "gap" is value / optimum - 1, the optimum being the least value proved.
`pip install --no-deps eclipse-nn` brings the peer; without it, its columns are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import show, start
from torch import Tensor, nn
from torch.nn import functional

from speccert.certify import lipschitz
from speccert.certify.graph import trace
from speccert.certify.inequality import prove
from speccert.certify.interior_point import solve
from speccert.certify.linear import float64
from speccert.certify.neurons import Neurons, form, neurons
from speccert.certify.rules import leaf_types
from speccert.certify.sdp import closed_form, first_order
from speccert.certify.walk import Walk
from speccert.experiments.data import load_dataset

HAS_PEER = importlib.util.find_spec("eclipse_nn") is not None

SMALL = [(10, 32, 32, 2), (16, 40, 40, 40, 5), (20, 64, 64, 10)]
RANDOM = [
    (50, 256, 10),
    (32, *[32] * 9, 10),
    (64, *[64] * 4, 10),
    (100, 128, 128, 10),
    (784, *[128] * 3, 10),
    (784, *[512] * 4, 10),
]
TRAINED = {
    "digits": [(64, 64, 10), (64, *[32] * 9, 10), (64, *[64] * 4, 10), (64, *[128] * 3, 10)],
    "mnist": [(784, 64, 64, 10), (784, *[128] * 3, 10), (784, *[512] * 4, 10)],
}
EPOCHS = {"digits": 30, "mnist": 2}
MOST_NEURONS = 1100  # for the interior-point method, which takes minutes beyond


@dataclass(frozen=True)
class Net:
    """One net, its name and weights."""

    name: str
    weights: tuple[Tensor, ...]

    def model(self) -> nn.Sequential:
        """The same in float64."""
        layers: list[nn.Module] = []
        for weight in self.weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
            linear.requires_grad_(False).weight.copy_(weight)
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1]).eval()

    @property
    def neurons(self) -> int:
        return sum(len(weight) for weight in self.weights[:-1])


def name_of(sizes: Sequence[int]) -> str:
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
    return "-".join(str(size) if count == 1 else f"{count}x{size}" for size, count in runs)


def random_net(sizes: Sequence[int]) -> Net:
    generator = torch.Generator().manual_seed(0)
    weights = tuple(
        torch.randn(b, a, generator=generator, dtype=torch.float64) / math.sqrt(a) for a, b in itertools.pairwise(sizes)
    )
    return Net(f"{name_of(sizes)}, random", weights)


def trained_net(data_name: str, sizes: Sequence[int], root: str | None) -> Net:
    """Trained by Adam on the cross-entropy, without any constraint."""
    torch.manual_seed(0)
    data = load_dataset(data_name, root=root).train
    x, y = data.x.flatten(1), data.y
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*list(itertools.chain(*((linear, nn.ReLU()) for linear in linears)))[:-1])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS[data_name]):
        for batch in torch.randperm(len(x)).split(128):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return Net(f"{name_of(sizes)}, {data_name}", tuple(linear.weight.detach().double() for linear in linears))


# The jobs: a net and the seconds it may take -> the bound and a note


def _neurons(net: Net) -> Neurons:
    graph = trace(net.model(), (net.weights[0].shape[1],), leaf_types())
    walk = Walk(graph, norm_of=lambda *_: 1.0, factor_of=lambda *_: 1.0, prepare=float64)
    return neurons(form(graph, walk, graph.output))


def by_closed_form(net: Net, limit: float) -> tuple[float, str]:
    held = _neurons(net)
    return prove(held, closed_form(held)[0].multipliers).upper, ""


def by_first_order(net: Net, limit: float) -> tuple[float, str]:
    held = _neurons(net)
    return prove(held, first_order(held, seconds=limit)[0].multipliers).upper, ""


def by_interior_point(net: Net, limit: float) -> tuple[float, str]:
    held = _neurons(net)
    return prove(held, solve(held, seconds=limit)).upper, ""


def by_cvxpy(net: Net, limit: float) -> tuple[float, str]:
    """LipSDP-Neuron as its paper has it, written for cvxpy without any thought of speed; Clarabel."""
    cvxpy: Any = importlib.import_module("cvxpy")
    weights = [weight.numpy() for weight in net.weights]
    sizes = [weight.shape[1] for weight in weights]
    whole = torch.eye(sum(sizes), dtype=torch.float64).numpy()
    ends = [0, *itertools.accumulate(sizes)]
    picks = [whole[a:b] for a, b in itertools.pairwise(ends)]
    rho, matrix = cvxpy.Variable(), -picks[-1].T @ weights[-1].T @ weights[-1] @ picks[-1]
    matrix = matrix + rho * (picks[0].T @ picks[0])
    wanted = []
    for k, weight in enumerate(weights[:-1], start=1):
        d = cvxpy.Variable(sizes[k])
        cross = picks[k].T @ cvxpy.diag(d) @ (weight @ picks[k - 1])
        matrix = matrix + 2 * picks[k].T @ cvxpy.diag(d) @ picks[k] - cross - cross.T
        wanted.append(d >= 0)
    program = cvxpy.Problem(cvxpy.Minimize(rho), [matrix >> 0, *wanted])
    program.solve(solver=cvxpy.CLARABEL)
    return math.sqrt(float(rho.value)), program.status


def by_eclipse_fast(net: Net, limit: float) -> tuple[float, str]:
    peer: Any = importlib.import_module("eclipse_nn")
    return float(peer.LipConstEstimator(weights=list(net.weights)).estimate("ECLipsE_Fast")), ""


def by_eclipse(net: Net, limit: float) -> tuple[float, str]:
    """Its value without its check of the solver's answers, which makes it return ECLipsE-Fast's where it fails."""
    peer: Any = importlib.import_module("eclipse_nn.eclipsE")
    solved, failed = peer.sdp, []

    def unchecked(*args: Any) -> tuple[Any, ...]:
        scale, multipliers, matrix, status = solved(*args)
        failed.append(bool((multipliers < 0).any()) or float(torch.linalg.eigvalsh(matrix)[0]) < -1e-8)
        return scale, multipliers.clamp_min(0), torch.eye(len(matrix), dtype=torch.float64), status

    peer.sdp = unchecked
    value, code = peer.ECLipsE(list(net.weights), [0] * (len(net.weights) - 1), [1] * (len(net.weights) - 1))
    return (math.inf if code else float(value)), "its check fails" if any(failed) else ""


Job = Callable[[Net, float], tuple[float, str]]


@dataclass(frozen=True)
class Measured:
    """A bound and the CPU time that it took; inf where the job was stopped."""

    value: float
    seconds: float
    note: str = ""


def measured(job: Job, net: Net, limit: float) -> Measured:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(sender, job, net, limit))
    process.start()
    sender.close()
    try:
        found: Measured = receiver.recv()
    except EOFError:
        found = Measured(math.inf, math.inf)
    process.join()
    print(f"{net.name}: {job.__name__}: {found}", file=sys.stderr, flush=True)
    return found


def _child(sender: Connection, job: Job, net: Net, limit: float) -> None:
    most = math.ceil(limit)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    begin = time.process_time()
    value, note = job(net, limit)
    sender.send(Measured(value, time.process_time() - begin, note))


# The tables


def cell(found: Measured, limit: float) -> tuple[str, str]:
    return (f"{found.value:.5g}", f"{found.seconds:.2f}") if found.value < math.inf else ("-", f"> {limit:.0f}")


def gap(found: Measured, best: float) -> str:
    return f"{found.value / best - 1:.1e}" if found.value < math.inf else "-"


def faster(found: Measured, other: Measured, limit: float) -> str:
    """How many times less the first took; at least that where the other was stopped."""
    return (">= " if other.value == math.inf else "") + f"{min(other.seconds, limit) / found.seconds:.0f}"


def solver_rows(limit: float) -> Iterator[dict[str, str]]:
    for sizes in SMALL:
        net = random_net(sizes)
        plain, first, inner = (measured(job, net, limit) for job in (by_cvxpy, by_first_order, by_interior_point))
        best = inner.value
        yield {
            "net": net.name,
            "product": f"{lipschitz(net.model(), (sizes[0],)).upper:.5g}",
            "optimum": f"{best:.8g}",
            "cvxpy and Clarabel, gap": gap(plain, best),
            "s": cell(plain, limit)[1],
            "interior point, s": f"{inner.seconds:.2f}",
            "cvxpy / that": faster(inner, plain, limit),
            "first order, gap": gap(first, best),
            "first order, s": f"{first.seconds:.2f}",
            "cvxpy / first order": faster(first, plain, limit),
        }


def nets(root: str | None) -> Iterator[Net]:
    for sizes in (*SMALL, *RANDOM):
        yield random_net(sizes)
    for data_name, many in TRAINED.items():
        for sizes in many:
            yield trained_net(data_name, sizes, root)


def peer_rows(limit: float, root: str | None, search: float) -> Iterator[dict[str, str]]:
    for net in nets(root):
        fast, closed = measured(by_eclipse_fast, net, limit), measured(by_closed_form, net, limit)
        first = measured(by_first_order, net, search)
        inner = measured(by_interior_point, net, search) if net.neurons <= MOST_NEURONS else Measured(math.inf, 0.0)
        slow = measured(by_eclipse, net, limit)
        best = min(inner.value, first.value)
        value, seconds = cell(slow, limit)
        yield {
            "net": net.name,
            "product": f"{lipschitz(net.model(), (net.weights[0].shape[1],)).upper:.5g}",
            "ECLipsE-Fast": cell(fast, limit)[0],
            "s": cell(fast, limit)[1],
            "ECLipsE": value + ("*" if slow.note else ""),
            "ECLipsE, s": seconds,
            "closed form": cell(closed, limit)[0],
            "closed form, s": cell(closed, limit)[1],
            "first order": cell(first, limit)[0],
            "first order, s": cell(first, limit)[1],
            "interior point": cell(inner, limit)[0],
            "interior point, s": cell(inner, limit)[1] if net.neurons <= MOST_NEURONS else "-",
            "best / ECLipsE-Fast": f"{best / fast.value:.3f}",
            "best / ECLipsE": f"{best / slow.value:.3f}" if slow.value < math.inf else "-",
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="*", choices=["solvers", "peers"], default=["solvers", "peers"])
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of CPU time a job")
    parser.add_argument("--search", type=float, default=300.0, help="seconds for our searches")
    parser.add_argument("--data-root", help="folder of the data sets")
    options = parser.parse_args()
    for name in ("cvxpy", *(["eclipse_nn"] if HAS_PEER else [])):
        importlib.import_module(name)  # not to be counted
    start("LipSDP: interior point and first order against plain cvxpy and eclipse-nn")
    if "solvers" in options.tables:
        show(list(solver_rows(options.limit)))
    if "peers" in options.tables and HAS_PEER:
        show(list(peer_rows(options.limit, options.data_root, options.search)))
        print("* its own check of its solver's answers fails, so that it returns the value of ECLipsE-Fast.\n")
    elif "peers" in options.tables:
        print("eclipse-nn is not installed: `pip install --no-deps eclipse-nn` brings it.\n")

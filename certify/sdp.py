"""Bounds of whole networks by LipSDP: multipliers proposed by several methods, each bound proved anew.

The multipliers' search is by first-order descent (`multipliers`), by an interior-point solver (`interior_point`), or a
closed form; whatever they give is a proposal, and `inequality.prove` decides. A network that is no such form as a whole
is bounded behind an anchor from which on it is, times the product's constant up to there.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .arithmetic import proving
from .graph import Graph
from .inequality import Proved, Relaxation, prove
from .interior_point import SolverFailed, solve
from .linear import float64
from .multipliers import POWERS, Problem, initial, problem, search
from .neurons import Form, Neurons, NoForm, form, neurons
from .rounding import up_mul
from .walk import Walk

SDP_METHODS = ("closed-form", "lipsdp", "lipsdp-layer", "lipsdp-first-order")
MOST_PAIRS = 256
_SHARE = 0.4  # of the time that the search for the whole end may take before the pairs
_BATCH = 1 << 26  # float64 numbers in the blocks of one batch of pairs
_SPEED = 2e10  # multiplications a second, about: to tell what can't be done in time
_GRACE = 0.1  # of the budget, for proofs that take longer than planned
_EVALUATIONS = 40  # fewest for which a search is worth while


@dataclass(frozen=True)
class Proposal:
    """Multipliers, a tensor a layer, and in linf weights of the start; nothing is proved about them."""

    multipliers: tuple[Tensor, ...]
    weights: Tensor | None = None


@dataclass(frozen=True)
class Attempt:
    """What one method gave: a row of the table of methods.

    Attributes:
        method: its name.
        upper: bound of the whole map, in the norms of the bound.
        pair_upper: of the largest pair.
        seconds: that it took.
        proved: whether the numbers are proved; where not, they are infinite.
        note: what it was applied to, or why it gave nothing.
    """

    method: str
    upper: float
    pair_upper: float
    seconds: float
    proved: bool = True
    note: str = ""


@dataclass
class Found:
    """Relaxations that were proved, and what was tried."""

    relaxations: list[Relaxation] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)


def closed_form(net: Neurons, pairs: Sequence[tuple[int, int]] | None = None, norm: str = "l2") -> list[Proposal]:
    """Multipliers without a search, for the whole end or one a pair; see `multipliers.initial`."""
    given = problem(net, pairs, norm)
    return _proposals(given, initial(given))


def first_order(
    net: Neurons,
    pairs: Sequence[tuple[int, int]] | None = None,
    norm: str = "l2",
    *,
    seconds: float = 60.0,
    device: torch.device | str = "cpu",
    warm: Proposal | None = None,
) -> list[Proposal]:
    """Multipliers by first-order descent, for the whole end or one proposal a pair.

    Pairs start from the multipliers of the whole end, doubled: ||e_i - e_j||^2 = 2 keeps these inside.

    Args:
        net: the network.
        pairs: of numbers of the end; None bounds all of it.
        norm: of the start.
        seconds: after which the best so far is returned.
        device: where to compute.
        warm: a proposal to start from; for pairs one of the whole end.
    """
    deadline = time.monotonic() + seconds
    whole = problem(net, None, norm, device)
    start = initial(whole) if warm is None else _logarithms(whole, warm)
    if pairs is None:
        return _proposals(whole, search(whole, start, deadline))
    if warm is None:
        start = search(whole, start, time.monotonic() + _SHARE * seconds)
    counts = sum(level.count for level in whole.levels)
    start = torch.cat([start[:, :counts] + math.log(2.0), start[:, counts:]], 1)
    given = problem(net, pairs, norm, device)
    step = max(1, _BATCH // max(1, sum(size * size for size in given.sizes)))
    parts = torch.split(torch.arange(len(pairs), device=start.device), step)
    found = []
    for position, part in enumerate(parts):
        share = (deadline - time.monotonic()) / (len(parts) - position)
        chosen = given.chosen(part)
        found.append(search(chosen, start.expand(len(part), -1), time.monotonic() + max(share, 0.0), POWERS[1:]))
    return _proposals(given, torch.cat(found))


def _logarithms(given: Problem, proposal: Proposal) -> Tensor:
    parts = list(proposal.multipliers)
    if given.norm == "linf" and proposal.weights is not None:
        parts.append(proposal.weights)
    return torch.cat([part.log() for part in parts]).to(given.device)[None]


def _proposals(given: Problem, logs: Tensor) -> list[Proposal]:
    counts = [level.count for level in given.levels]
    columns = torch.split(logs.cpu().exp(), [*counts, logs.shape[1] - sum(counts)], 1)
    return [
        Proposal(tuple(column[row] for column in columns[:-1]), columns[-1][row] if given.norm == "linf" else None)
        for row in range(len(logs))
    ]


class Tightener:
    """A traced network and its product bounds, to be tightened.

    Args:
        graph: the traced model.
        constants: l2 Lipschitz constants from the input to every anchor, by its name.
        classes: how many logits.
        solver: for "lipsdp" and "lipsdp-layer", see `interior_point.solve`.
    """

    def __init__(self, graph: Graph, constants: Mapping[str, float], classes: int, solver: str | None = None) -> None:
        self._graph, self._constants, self._solver = graph, constants, solver
        self._walk = Walk(graph, norm_of=lambda *_: 1.0, factor_of=lambda *_: 1.0, prepare=float64)
        few = classes * (classes - 1) <= 2 * MOST_PAIRS
        self._pairs = list(itertools.combinations(range(classes), 2)) if few else []
        self._nets: dict[fx.Node, Neurons] = {}
        self._proof_seconds = 0.0

    @proving()
    def tighten(self, method: str, norm: str, budget: float, device: torch.device | str = "cpu") -> Found:
        """Run the steps of a method: "closed-form", "lipsdp", "lipsdp-layer", "lipsdp-first-order", or "auto".

        Args:
            method: "auto" takes the closed form first and then descends.
            norm: of the input.
            budget: seconds; what can't be done in this time is left out, and said so.
            device: for the search.
        """
        deadline = time.monotonic() + budget
        found = Found()
        steps = ("closed-form", "lipsdp-first-order") if method in ("auto", "local") else (method,)
        for step in steps:
            self._run(step, norm, deadline, device, found)
        return found

    def _run(self, method: str, norm: str, deadline: float, device: torch.device | str, found: Found) -> None:
        begin = time.monotonic()
        try:
            start, net = self._part(method, norm, deadline - begin)
        except NoForm as reason:
            found.attempts.append(Attempt(method, math.inf, math.inf, time.monotonic() - begin, False, str(reason)))
            return
        inner = norm if start is self._graph.input else "l2"
        proved: list[Relaxation] = []
        note = "" if start is self._graph.input else f"behind {start.name}, times the product up to there"
        try:
            for pair, proposal in self._proposals(method, net, inner, deadline, device):
                part, proving_from = net if pair is None else net.pair(*pair), time.monotonic()
                result = prove(part, proposal.multipliers, inner, proposal.weights)
                self._proof_seconds = time.monotonic() - proving_from
                if result.upper < math.inf:
                    proved.append(self._relaxation(start, pair, inner, proposal, result, method))
                if time.monotonic() > deadline + _GRACE * (deadline - begin) and pair is not None:
                    note = _joined(note, "stopped by the budget")
                    break
        except SolverFailed as reason:
            note = _joined(note, str(reason))
        found.relaxations += proved
        upper = min((one.upper for one in proved if one.pair is None), default=math.inf)
        largest = max((one.upper for one in proved if one.pair is not None), default=math.inf)
        found.attempts.append(Attempt(method, upper, largest, time.monotonic() - begin, bool(proved), note))

    def _proposals(
        self,
        method: str,
        net: Neurons,
        norm: str,
        deadline: float,
        device: torch.device | str,
    ) -> Iterator[tuple[tuple[int, int] | None, Proposal]]:
        """Proposals for the whole end, then for the pairs; those of the whole serve for pairs too (doubled)."""
        left = deadline - time.monotonic()
        if method == "closed-form":
            yield None, closed_form(net, None, norm)[0]
            yield from zip(self._pairs, closed_form(net, self._pairs, norm) if self._pairs else [], strict=True)
        elif method == "lipsdp-first-order":
            (whole,) = first_order(net, None, norm, seconds=_SHARE * left if self._pairs else left, device=device)
            yield None, whole
            if self._pairs:
                left = deadline - time.monotonic() - self._proof_seconds * len(self._pairs)
                found = first_order(net, self._pairs, norm, seconds=left, device=device, warm=whole)
                yield from zip(self._pairs, found, strict=True)
        else:
            coupling = "layer" if method == "lipsdp-layer" else "neuron"
            yield None, self._solved(net, coupling, norm, left)
            for pair in self._pairs:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                yield pair, self._solved(net.pair(*pair), coupling, norm, left)

    def _solved(self, net: Neurons, coupling: str, norm: str, seconds: float) -> Proposal:
        """The solver's proposal; in l1, for which it has no program, that for l2."""
        found = solve(net, norm="l2" if norm == "l1" else norm, coupling=coupling, solver=self._solver, seconds=seconds)
        return Proposal(tuple(found[: len(net.layers)]), found[-1] if norm == "linf" else None)

    def _relaxation(
        self,
        start: fx.Node,
        pair: tuple[int, int] | None,
        norm: str,
        proposal: Proposal,
        result: Proved,
        method: str,
    ) -> Relaxation:
        constant = 1.0 if start is self._graph.input else self._constants[start.name]
        upper = up_mul(constant, result.upper)
        end = self._graph.output.name
        return Relaxation(norm, start.name, end, pair, constant, upper, proposal.multipliers, result.weights, method)

    def _part(self, method: str, norm: str, seconds: float) -> tuple[fx.Node, Neurons]:
        """The largest part up to the output that has a form and can be done in time; NoForm where there is none.

        Methods of an interior-point solver take what has the form, and judge its size themselves.
        """
        reason = NoForm("no part behind an anchor has slopes")
        for start in self._starts():
            try:
                found = form(self._graph, self._walk, self._graph.output, start)
                if not found.activations:
                    break
                if method != "closed-form" and (cost := _cost(found)) * _EVALUATIONS / _SPEED > seconds:
                    raise NoForm(f"an evaluation of {cost:.1e} multiplications is too slow for {seconds:.0f} s")
                if start not in self._nets:
                    self._nets[start] = neurons(found)
                return start, self._nets[start]
            except NoForm as error:
                reason = reason if start is not self._graph.input else error
        raise reason

    def _starts(self) -> list[fx.Node]:
        """The input and all anchors, in the order of the graph."""
        return [node for node in self._graph.nodes if node.name in self._constants]


def _cost(found: Form) -> float:
    """Multiplications of one elimination, about: along the path of each layer to its sources."""
    sizes = found.sizes
    total = 0.0
    for one, size in zip(found.activations, sizes[1:], strict=True):
        reached = sum(sizes[t.source] if t.source else min(sizes[0], size) for t in one.terms)
        total += size**3 / 3 + float(size) * reached * (size + reached)
    return total


def _joined(first: str, second: str) -> str:
    return "; ".join(part for part in (first, second) if part)

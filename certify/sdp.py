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
from .inequality import Proved, Relaxation, prove, prove_pairs
from .interior_point import SolverFailed, solve
from .multipliers import SCHEDULE, Problem, initial, problem, search, shared
from .neurons import Form, Neurons, NoForm, form, neurons
from .rounding import up_div, up_mul
from .walk import structure

SDP_METHODS = ("closed-form", "lipsdp", "lipsdp-layer", "lipsdp-first-order")
MOST_PAIRS = 256
_SHARE = 0.4  # of the time that the search for the whole end may take before the pairs
_BATCH = 1 << 26  # float64 numbers in the blocks of one batch of pairs
_SPEED = 2e10  # multiplications a second, about: to tell what can't be done in time
_INSIDE = 1e-6  # of a logarithm
_LEAST = 2.0**-250  # multiplier, of numbers that nothing reads
_WORTHWHILE = 0.2  # share of the time that a search of each pair must have
_SOLVING = 1e-7  # seconds of the interior-point method by the cube of its side, about
_SOLVER_SHARE = 0.3  # of the budget
_GRACE = 0.1  # of the budget, for proofs that take longer than planned
_FEWEST = 6  # eliminations of the closed form
_EVALUATIONS = 40  # fewest for which a search is worth while

# what ends a search, whose bound is then the product's: numbers out of range, a device without room
_NO_PROPOSAL = (SolverFailed, ArithmeticError, torch.linalg.LinAlgError, torch.OutOfMemoryError)  # type: ignore[attr-defined]


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

    Pairs start from multipliers that are searched for all of them together, or from those of the whole end, doubled:
    ||e_i - e_j||^2 = 2 keeps these inside.

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
    together = _together(net, pairs, start, seconds_left(deadline) * _SHARE, device) if norm == "l2" else None
    return _pair_by_pair(net, pairs, norm, start, together, deadline, device)


def _pair_by_pair(
    net: Neurons,
    pairs: Sequence[tuple[int, int]],
    norm: str,
    start: Tensor,
    together: Together | None,
    deadline: float,
    device: torch.device | str,
) -> list[Proposal]:
    """A search for each pair, from what was found for all together, else from logarithms of the whole end, doubled."""
    given = problem(net, pairs, norm, device)
    if together is None:
        counts = sum(level.count for level in given.levels)
        starts = torch.cat([start[:, :counts] + math.log(2.0), start[:, counts:]], 1).expand(len(pairs), -1)
    else:
        starts = together.logs + together.squares.T.log()
    step = max(1, _BATCH // max(1, sum(size * size for size in given.sizes)))
    parts = torch.split(torch.arange(len(pairs), device=start.device), step)
    found = []
    for position, part in enumerate(parts):
        share = seconds_left(deadline) / (len(parts) - position)
        found.append(search(given.chosen(part), starts[part], time.monotonic() + share, SCHEDULE[1:-1]))
    return _proposals(given, torch.cat(found))


def seconds_left(deadline: float) -> float:
    """From now on, at least 0."""
    return max(0.0, deadline - time.monotonic())


@dataclass(frozen=True)
class Together:
    """Multipliers for all pairs at once: their logarithms [1, multipliers], the squares of the bounds, C H^-1 C^T."""

    logs: Tensor
    squares: Tensor  # [1, pairs]
    gram: Tensor  # [end, end]


def _together(
    net: Neurons, pairs: Sequence[tuple[int, int]], start: Tensor, seconds: float, device: torch.device | str
) -> Together | None:
    """A search from multipliers of the whole end; None where there is none, see `multipliers.shared`."""
    given = shared(net, pairs, device)
    if given is None:
        return None
    # F > 0 for the whole end in place of H > 0: multipliers in units of the bound's square are inside
    inside = start - given.whole.evaluate(start, SCHEDULE[-1][0]).true[:, None] - _INSIDE
    best = search(given, inside, time.monotonic() + seconds, SCHEDULE[-1:])
    squares, _, gram = given.squares(best)
    return Together(best, squares, gram[0]) if bool(torch.isfinite(squares).all()) else None


def _logarithms(given: Problem, proposal: Proposal) -> Tensor:
    parts = list(proposal.multipliers)
    if given.norm == "linf" and proposal.weights is not None:
        parts.append(proposal.weights)
    return torch.cat([part.log() for part in parts]).to(given.device)[None]


def _proposals(given: Problem, logs: Tensor) -> list[Proposal]:
    counts = [level.count for level in given.levels]
    columns = torch.split(logs.cpu().exp().clamp_min(_LEAST), [*counts, logs.shape[1] - sum(counts)], 1)
    return [
        Proposal(tuple(column[row] for column in columns[:-1]), columns[-1][row] if given.norm == "linf" else None)
        for row in range(len(logs))
    ]


@dataclass(frozen=True, eq=False)
class _Part:
    """What is bounded: the network from `start` to the output, the norm at its start, by which method."""

    start: fx.Node
    net: Neurons
    norm: str
    method: str
    pairs: list[tuple[int, int]]


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
        self._walk = structure(graph)
        few = classes * (classes - 1) <= 2 * MOST_PAIRS
        self._pairs = list(itertools.combinations(range(classes), 2)) if few else []
        self._nets: dict[fx.Node, Neurons] = {}

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
        if method in ("auto", "local"):
            self._run("closed-form", norm, deadline, device, found, pairs=False)
            method = "lipsdp-first-order"
            if norm != "l1" and self._solvable(norm, budget):
                self._run("lipsdp", norm, deadline, device, found, pairs=True)
                if not found.attempts[-1].note or not seconds_left(deadline):
                    return found
        self._run(method, norm, deadline, device, found, pairs=True)
        return found

    def _solvable(self, norm: str, budget: float) -> bool:
        """Whether the interior-point method is sure to be done with all pairs in a part of the budget."""
        net = self._nets.get(self._graph.input)
        if net is None:
            return False
        read = net.sizes[1] if len(net.sizes) > 1 and norm == "l2" else net.sizes[0]
        side = sum(net.sizes[1:]) + min(net.sizes[0], read)
        return side**3 * _SOLVING * (len(self._pairs) + 1) < _SOLVER_SHARE * budget

    def _run(
        self,
        method: str,
        norm: str,
        deadline: float,
        device: torch.device | str,
        found: Found,
        *,
        pairs: bool,
    ) -> None:
        begin = time.monotonic()
        try:
            start, net = self._part(method, seconds_left(deadline))
        except NoForm as reason:
            found.attempts.append(Attempt(method, math.inf, math.inf, time.monotonic() - begin, False, str(reason)))
            return
        inner = norm if start is self._graph.input else "l2"
        proved: list[Relaxation] = []
        note = "" if start is self._graph.input else f"behind {start.name}, times the product up to there"
        part = _Part(start, net, inner, method, self._pairs if pairs else [])
        try:
            for one in self._proofs(part, deadline, device):
                proved += [] if one is None else [one]
        except _NO_PROPOSAL as reason:
            note = _joined(note, str(reason).splitlines()[0] if str(reason) else type(reason).__name__)
        if part.pairs and len({one.pair for one in proved} - {None}) < len(part.pairs):
            note = _joined(note, "not every pair" if proved else "")
        if not proved and not note:
            note = "no multipliers were found that prove a bound"
        found.relaxations += proved
        upper = min((one.upper for one in proved if one.pair is None), default=math.inf)
        best: dict[tuple[int, int], float] = {}
        for one in proved:
            if one.pair is not None:
                best[one.pair] = min(one.upper, best.get(one.pair, math.inf))
        largest = max(best.values()) if best and len(best) == len(part.pairs) else math.inf
        found.attempts.append(Attempt(method, upper, largest, time.monotonic() - begin, bool(proved), note))

    def _proofs(self, part: _Part, deadline: float, device: torch.device | str) -> Iterator[Relaxation | None]:
        """Proofs of the whole end, then of the pairs; None where one fails."""
        if part.method == "lipsdp-first-order":
            yield from self._descended(part, deadline, device)
            return
        begin = time.monotonic()
        for pair, proposal in self._proposals(part, deadline):
            if pair is not None and time.monotonic() > deadline + _GRACE * (deadline - begin):
                return
            yield self._proof(part, pair, proposal)

    def _descended(self, part: _Part, deadline: float, device: torch.device | str) -> Iterator[Relaxation | None]:
        net, norm = part.net, part.norm
        left = seconds_left(deadline)
        (whole,) = first_order(net, None, norm, seconds=_SHARE * left if part.pairs else left, device=device)
        begin = time.monotonic()
        relaxation = self._proof(part, None, whole)
        proof_seconds = time.monotonic() - begin
        yield relaxation
        if not part.pairs:
            return
        start, together = _logarithms(problem(net, None, norm, device), whole), None
        if norm == "l2" and relaxation is not None:
            together = _together(net, part.pairs, start, seconds_left(deadline) * _SHARE, device)
        if together is not None and relaxation is not None:
            yield from self._shared(part, together, relaxation)
        # one by one only where all proofs fit and the search is left a good part
        left = seconds_left(deadline) - proof_seconds * len(part.pairs)
        if left < (deadline - begin) * _WORTHWHILE:
            return
        found = _pair_by_pair(net, part.pairs, norm, start, together, time.monotonic() + left, device)
        for pair, proposal in zip(part.pairs, found, strict=True):
            yield self._proof(part, pair, proposal)
            if time.monotonic() > deadline + _GRACE * left:
                return

    def _shared(self, part: _Part, together: Together, proved: Relaxation) -> Iterator[Relaxation | None]:
        """All pairs by one proof."""
        (own,) = _proposals(problem(part.net, None, part.norm), together.logs)
        largest = up_div(proved.upper, proved.start_constant) if proved.start_constant > 0 else math.inf
        results = prove_pairs(part.net, own.multipliers, together.gram.cpu(), part.pairs, largest)
        for pair, (result, multipliers) in zip(part.pairs, results, strict=True):
            yield self._relaxation(part, pair, Proposal(multipliers), result)

    def _proof(self, part: _Part, pair: tuple[int, int] | None, proposal: Proposal) -> Relaxation | None:
        net = part.net if pair is None else part.net.pair(*pair)
        return self._relaxation(part, pair, proposal, prove(net, proposal.multipliers, part.norm, proposal.weights))

    def _proposals(self, part: _Part, deadline: float) -> Iterator[tuple[tuple[int, int] | None, Proposal]]:
        """Proposals of a closed form or a solver for the whole end, then for the pairs."""
        net, norm = part.net, part.norm
        if part.method == "closed-form":
            yield None, closed_form(net, None, norm)[0]
            yield from zip(part.pairs, closed_form(net, part.pairs, norm) if part.pairs else [], strict=True)
            return
        yield None, self._solved(part, net, seconds_left(deadline))
        for pair in part.pairs:
            if not (left := seconds_left(deadline)):
                return
            yield pair, self._solved(part, net.pair(*pair), left)

    def _solved(self, part: _Part, net: Neurons, seconds: float) -> Proposal:
        """The solver's proposal; in l1, for which it has no program, that for l2."""
        coupling = "layer" if part.method == "lipsdp-layer" else "neuron"
        norm = "l2" if part.norm == "l1" else part.norm
        found = solve(net, norm=norm, coupling=coupling, solver=self._solver, seconds=seconds)
        return Proposal(tuple(found[: len(net.layers)]), found[-1] if len(found) > len(net.layers) else None)

    def _relaxation(
        self, part: _Part, pair: tuple[int, int] | None, proposal: Proposal, result: Proved
    ) -> Relaxation | None:
        if not result.upper < math.inf:
            return None
        constant = 1.0 if part.start is self._graph.input else self._constants[part.start.name]
        return Relaxation(
            part.norm,
            part.start.name,
            self._graph.output.name,
            pair,
            constant,
            up_mul(constant, result.upper),
            proposal.multipliers,
            result.weights,
            part.method,
        )

    def _part(self, method: str, seconds: float) -> tuple[fx.Node, Neurons]:
        """The largest part up to the output that has a form and can be done in time; NoForm where there is none."""
        reason, late = NoForm("no part behind an anchor has slopes"), False
        for start in self._starts():
            try:
                found = form(self._graph, self._walk, self._graph.output, start)
                if not found.activations:
                    break
                count = _FEWEST if method == "closed-form" else _EVALUATIONS
                if (_cost(found) * count + float(sum(found.sizes[1:])) ** 3) / _SPEED > seconds:
                    if not late:
                        reason = NoForm(f"{seconds:.0f} s are too few for {sum(found.sizes[1:])} neurons")
                    late = True
                    continue
                if start not in self._nets:
                    self._nets[start] = neurons(found)
                return start, self._nets[start]
            except NoForm as error:
                reason = error if start is self._graph.input else reason
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

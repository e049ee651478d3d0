"""How far the executed network may be from the real one, at every tensor of its graph and anywhere in a ball.

Notation, all norms l2: c bounds ||t(x)|| of the real network at the centre x, L is the Lipschitz constant from the
input to t, E(rho) = A + B rho bounds ||executed t(x') - real t(x')|| for every x' with ||x' - x|| <= rho. An operation
of the local error e = p M + q N + h (see `local_errors`) meets inputs of at most M = c + L rho + E and would give,
without its own rounding, a result of at most N = c_out + L_out rho + k E, where k is its own Lipschitz constant.

Non-affine operation:  E_out = k E + e.
Affine run from its anchor a:  E = s E_a + l, with s the norm of the run so far, the proved one R at its end, and
l_out = k l + e the local errors of the run itself; where the part T before the last operation has an inverse, as a
diagonal or a reshape has, k is at most R ||T^-1||. Sums of branches of one anchor add their s and l, concatenations
take roots of squares. Sums of unlike branches: E = E_1 + E_2 + e; concatenations: the root of squares.

Everything is affine in rho, so that A (a number a sample) and B (one for all) are two passes of one recursion: with c
and h for A, and with L in the place of c and without h for B. The root of squares of affine functions is at most the
affine function of the roots (Minkowski). All terms are >= 0 and a step makes fewer than 100 operations, whose rounding
(1 + 2^-53)^100 the factor 1 + 2^-40 covers; 2^-1000 covers underflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .arithmetic import Arithmetic
from .graph import Graph
from .linear import Diagonal, LinearMap, Reindex, float64
from .local_errors import NO_ERROR, LocalError, local_error, sum_error
from .rounding import down_add, norm_up, up_add, up_div, up_mul
from .rounding_rules import spread_norm
from .rules import EXACT, Rounding, rounding_for, rule_for
from .walk import CONCATS, SUMS, Walk

_WIDE = 1 + 2.0**-40
_FLOOR = 2.0**-1000
_SHARE = 0.25  # of the largest finite number, which no intermediate bound may reach


@dataclass(frozen=True)
class Step:
    """One tensor of the graph: where it comes from, how deviations grow into it, and how its operation rounds."""

    node: fx.Node
    kind: str  # input, operation, sum or concat
    inputs: tuple[fx.Node, ...] = ()
    anchor: fx.Node | None = None  # None: it is an anchor itself
    growth: float = 1.0  # k
    span: float = 1.0  # s
    inverse: float = 1.0  # bound of the norm of the inverse of the map from the anchor; inf where none is known
    lipschitz: float = 1.0  # L
    rounding: Rounding = EXACT
    gain: float = 0.0  # alpha, the norm of the operator with absolute entries
    rows: float = 0.0  # its largest row sum
    constant: float = 0.0  # norm of what a sum adds
    results: int = 1
    moves: bool = False  # the numbers are those of the one input, and zeros: norms are the same


@dataclass(frozen=True)
class Norms:
    """Proved l2 constants of a graph: of the runs by the name of their last node, and of the anchors by name."""

    runs: Mapping[str, float]
    anchors: Mapping[str, float]


def plan(graph: Graph, norms: Norms) -> tuple[Step, ...]:
    """The steps of a traced graph, in order.

    Raises:
        ValueError: an operation without a rounding rule; norms of another model.
    """
    return _Planner(graph, norms).steps()


class _Planner:
    def __init__(self, graph: Graph, norms: Norms) -> None:
        self._graph, self._norms = graph, norms
        self._walk = Walk(
            graph,
            norm_of=lambda name, parts, linear: self._run(name),
            factor_of=lambda rule, call: rule.factor(call, "l2") if rule.factor else math.inf,
            prepare=float64,
        )
        self._walk.constant(graph.output)
        self._found: dict[fx.Node, Step] = {}

    def steps(self) -> tuple[Step, ...]:
        for node in self._graph.nodes:
            if node in self._graph.shapes:
                self._found[node] = self._step(node)
        return tuple(self._found.values())

    def _run(self, name: str) -> float:
        if name not in self._norms.runs:
            raise ValueError(f"bound: expected one computed for this model; it has no norm of the layers up to {name}")
        return self._norms.runs[name]

    def _step(self, node: fx.Node) -> Step:
        results = math.prod(self._graph.shapes[node])
        if node.op == "placeholder":
            return Step(node, "input", results=results)
        inputs = tuple(arg for arg in node.all_input_nodes if arg in self._graph.shapes)
        operation, title = self._walk.operation_of(node)
        if operation in SUMS:
            step = self._sum(node, results)
        elif operation in CONCATS:
            step = self._concat(node, results)
        else:
            step = self._operation(node, inputs, title, results)
        return self._located(step)

    def _sum(self, node: fx.Node, results: int) -> Step:
        terms = tuple(arg for arg in node.args if isinstance(arg, fx.Node) and arg in self._graph.shapes)
        constant = 0.0
        for arg in node.args:
            if arg not in terms:
                value = self._graph.constants[arg] if isinstance(arg, fx.Node) else arg
                constant = spread_norm(torch.as_tensor(value, dtype=torch.float64), self._graph.shapes[node])
        spans = [self._found[term].span for term in terms]
        inverse = self._found[terms[0]].inverse if len(terms) == 1 else math.inf
        return Step(node, "sum", terms, span=up_add(*spans), inverse=inverse, constant=constant, results=results)

    def _concat(self, node: fx.Node, results: int) -> Step:
        joined: Any = node.args[0] if node.args else node.kwargs["tensors"]
        terms = tuple(arg for arg in joined if isinstance(arg, fx.Node) and arg in self._graph.shapes)
        span = _root(self._found[term].span for term in terms)
        return Step(node, "concat", terms, span=span, inverse=math.inf, results=results)

    def _operation(self, node: fx.Node, inputs: tuple[fx.Node, ...], title: str, results: int) -> Step:
        operation, call = self._walk.operation_of(node)[0], self._walk.call_of(node)
        rule, rounding = rule_for(operation, call.place, title), rounding_for(operation, call, title)
        source = self._found[inputs[0]]
        step = Step(node, "operation", inputs, rounding=rounding, results=results)
        if rule.linear is None:
            assert rule.factor is not None
            growth = float(rule.factor(call, "l2"))
            return replace(step, growth=growth, gain=growth if rounding.gain is None else rounding.gain)
        linear: LinearMap = float64(rule.linear(call))
        absolute = linear.absolute("l2")
        gain = absolute if rounding.gain is None else rounding.gain
        rows = linear.absolute("linf") if rounding.kind == "dot" else 0.0
        run = self._norms.runs.get(node.name, math.inf)
        return replace(
            step,
            growth=min(absolute, up_mul(run, source.inverse)),
            span=up_mul(absolute, source.span),
            inverse=up_mul(_inverse(linear), source.inverse),
            gain=gain,
            rows=rows,
            moves=linear.isometry and rounding.kind == "exact",
        )

    def _located(self, step: Step) -> Step:
        """With the anchor, the proved norm of the run up to here, and the constant from the input."""
        place = self._walk.place(step.node)
        if place.anchor is step.node:
            return replace(step, span=1.0, inverse=1.0, lipschitz=self._anchor(step.node.name))
        span = min(step.span, self._norms.runs.get(step.node.name, math.inf))
        lipschitz = up_mul(span, self._anchor(place.anchor.name))
        return replace(step, anchor=place.anchor, span=span, lipschitz=lipschitz)

    def _anchor(self, name: str) -> float:
        if name not in self._norms.anchors:
            raise ValueError(f"bound: expected one computed for this model; it has no constant of {name}")
        return self._norms.anchors[name]


def _inverse(linear: LinearMap) -> float:
    """Bound of the norm of the inverse of a map that moves or scales every entry; inf for any other."""
    if isinstance(linear, Diagonal):
        least = down_add(float(linear.scale.abs().min()), -linear.slack)
        return up_div(1.0, least) if least > 0 else math.inf
    permutes = isinstance(linear, Reindex) and math.prod(linear.in_shape) == math.prod(linear.out_shape)
    return 1.0 if permutes else math.inf


def _root(values: Any) -> float:
    return float(norm_up(torch.tensor(list(values), dtype=torch.float64)))


@dataclass(frozen=True)
class Spread:
    """What the recursion gives at one tensor: E, and the local part l of its run."""

    whole: Tensor
    local: Tensor


def step_errors(steps: Sequence[Step], arithmetic: Arithmetic) -> list[LocalError]:
    """The local error of every step's operation in an arithmetic."""
    return [_step_error(step, arithmetic) for step in steps]


def _step_error(step: Step, arithmetic: Arithmetic) -> LocalError:
    if step.kind == "sum":
        return sum_error(arithmetic, step.constant, step.results)
    if step.kind != "operation":
        return NO_ERROR
    return local_error(step.rounding, arithmetic, step.gain, step.rows, step.results)


def spread(
    steps: Sequence[Step],
    errors: Sequence[LocalError],
    sizes: Mapping[fx.Node, Tensor],  # [B] each: c, or L, or the norms of computed tensors
    entry: Tensor | float,  # E at the input
    *,
    fixed: bool = True,
    computed: bool = False,
) -> dict[fx.Node, Spread]:
    """One pass of the recursion; where an operation has no bound, it gives infinity or NaN from there on.

    Args:
        steps: of the graph.
        errors: the local error of each.
        sizes: bounds of the tensors' norms.
        entry: the deviation of the input.
        fixed: whether h counts (not for B).
        computed: `sizes` are norms of the tensors as computed, so that deviations don't add to them.
    """
    found: dict[fx.Node, Spread] = {}
    for step, error in zip(steps, errors, strict=True):
        own = sizes[step.node]
        if step.kind == "input":
            found[step.node] = Spread(_wide(torch.zeros_like(own) + entry), torch.zeros_like(own))
            continue
        before = [found[node] for node in step.inputs]
        total = torch.zeros_like(own) if computed else _sum([one.whole for one in before])
        size, outer = sizes[step.inputs[0]] + total, step.growth * total
        local = error.p * size + error.q * (own + outer) + (error.h if fixed else 0.0)
        if computed:
            local = local * (1 + 2 * error.q)
        found[step.node] = _grown(step, before, local, found)
    return found


def _grown(step: Step, before: Sequence[Spread], local: Tensor, found: Mapping[fx.Node, Spread]) -> Spread:
    """E and l of a step from those of its inputs and its local error."""
    join = (lambda values: functools.reduce(torch.hypot, values)) if step.kind == "concat" else _sum
    if step.anchor is None:
        whole = _wide(step.growth * join([one.whole for one in before]) + local)
        return Spread(whole, torch.zeros_like(whole))
    own = _wide(step.growth * join([one.local for one in before]) + local)
    return Spread(_wide(step.span * found[step.anchor].whole + own), own)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _wide(values: Tensor) -> Tensor:
    return values * _WIDE + _FLOOR


def peaks(
    steps: Sequence[Step],
    sizes: Mapping[fx.Node, Tensor],
    found: Mapping[fx.Node, Spread],
    *,
    fixed: bool = True,
) -> list[Tensor]:
    """Bounds of every number inside each operation but pure moves, less than a factor of 2 for rounding apart.

    max(reach, alpha) M + alpha + beta + peak, for sums M_1 + M_2 + the constant; `fixed` as for `spread`.
    """
    bounds = []
    for step in steps:
        if step.kind == "input":  # its conversion may overflow
            bounds.append(_wide(sizes[step.node] + found[step.node].whole))
            continue
        if step.kind == "concat" or step.moves:
            continue
        size = _sum([sizes[node] + found[node].whole for node in step.inputs])
        gain, rounding = max(step.rounding.reach, step.gain), step.rounding
        constant = up_add(step.constant, step.gain, rounding.offset, rounding.peak) if fixed else 0.0
        bounds.append(_wide(gain * size + constant))
    return bounds


def overflow_limit(
    arithmetic: Arithmetic,
    fixed: Sequence[Tensor],  # each [B]
    slopes: Sequence[Tensor] | None = None,  # each [1]
) -> Tensor:  # [B]
    """The largest rho for which all bounds of `peaks`, fixed + slope rho, stay below a quarter of the largest number.

    0 where they don't even at the centre; infinite for those that do where no slopes are given.
    """
    level, limit = _SHARE * arithmetic.huge, torch.tensor([math.inf], dtype=torch.float64)
    for position, start in enumerate(fixed):
        slope = torch.zeros_like(limit[:1]) if slopes is None else slopes[position] * _WIDE
        room = torch.where((start < level) & (slope >= 0), (level - start) / slope * (1 - 2.0**-40), 0.0)
        limit = torch.minimum(limit, room)
    return limit

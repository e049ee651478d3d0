"""What a model is made of, as its bound sees it: affine layers and runs, other operations, and what has no rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..certify.graph import Graph
from ..certify.linear import Chain, LinearMap, float64
from ..certify.rules import Call, Rule
from ..certify.walk import CONCATS, Place, Walk

__all__ = ["Failure", "Layer", "Met", "Operation", "Run", "constant_of", "meet", "same_map"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One affine operation by itself: where it stands, its module (None for a function), its float64 operator."""

    place: str
    module: nn.Module | None
    linear: LinearMap
    first: bool  # no layer lies between it and the input, but moves of entries


@dataclass(frozen=True, eq=False)
class Run:
    """A maximal affine run: the node that it ends in, its layers' names, its float64 operator."""

    end: str
    parts: tuple[str, ...]
    linear: LinearMap


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation that is not affine: its rule is a "factor", or the "sum" or "concat" of branches that joins them."""

    place: str
    kind: str  # its type or function
    rule: str
    factor: float | None  # in the norm of the audit; None for sums and concatenations


@dataclass(frozen=True, eq=False)
class Failure:
    """An operation that can't be bounded, why, and the shape of the tensor that it reads."""

    place: str
    kind: str
    message: str
    module: nn.Module | None
    in_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Met:
    """A traced model taken apart, in the order of its graph."""

    layers: tuple[Layer, ...]
    runs: tuple[Run, ...]
    operations: tuple[Operation, ...]
    failures: tuple[Failure, ...]


class _Recorder(Walk):
    """The walk that gives the bound, which here writes down what it meets and goes on where it can't bound."""

    def __init__(
        self, graph: Graph, norm: str, norm_of: Callable[[Run], float], factor_of: Callable[[Operation], float]
    ) -> None:
        self.layers: list[Layer] = []
        self.runs: list[Run] = []
        self.operations: list[Operation] = []
        self.failures: list[Failure] = []
        self._node = graph.input

        def run(name: str, parts: tuple[str, ...], linear: LinearMap) -> float:
            self.runs.append(Run(name, parts, linear))
            return norm_of(self.runs[-1])

        def factor(rule: Rule, call: Call) -> float:
            value = float(rule.factor(call, norm)) if rule.factor else 1.0
            self.operations.append(Operation(call.place, self._kind(self._node), "factor", value))
            return factor_of(self.operations[-1])

        super().__init__(
            graph,
            norm_of=run,
            factor_of=factor,
            prepare=float64,
            norm=norm,
        )

    def _kind(self, node: fx.Node) -> str:
        return self.operation_of(node)[1].rpartition(".")[2]

    def _visit(self, node: fx.Node) -> Place:
        self._node = node
        inputs = [parent for parent in node.all_input_nodes if parent in self._graph.shapes]
        module = self._graph.module(node) if node.op == "call_module" else None
        try:
            place = super()._visit(node)
        except ValueError as error:
            shape = self._graph.shapes[inputs[0]]
            self.failures.append(Failure(self._name(node), self._kind(node), str(error), module, shape))
            self._constants[node] = max(self.constant(parent) for parent in inputs)
            return Place(node, None)
        if len(inputs) > 1:
            rule = "concat" if self.operation_of(node)[0] in CONCATS else "sum"
            self.operations.append(Operation(self._name(node), self._kind(node), rule, None))
        return place

    def _extend(self, place: Place, linear: LinearMap, name: str, shape: tuple[int, ...]) -> Place:
        extended = super()._extend(place, linear, name, shape)
        if not linear.isometry:
            module = self._graph.module(self._node) if self._node.op == "call_module" else None
            first = place.anchor is self._graph.input and not place.parts
            self.layers.append(Layer(name, module, float64(linear), first))
        return extended


def meet(graph: Graph, norm: str) -> Met:
    """Take a traced model apart, without computing any norm."""
    recorder = _Recorder(graph, norm, lambda run: 1.0, lambda operation: 1.0)
    recorder.constant(graph.output)
    return Met(tuple(recorder.layers), tuple(recorder.runs), tuple(recorder.operations), tuple(recorder.failures))


def same_map(run: LinearMap, layer: LinearMap) -> bool:
    """Whether a run is this layer with nothing but moves of entries around it."""
    maps = run.maps if isinstance(run, Chain) else (run,)
    real = [linear for linear in maps if not linear.isometry]
    if len(real) != 1 or type(real[0]) is not type(layer) or real[0].in_shape != layer.in_shape:
        return False
    own, other = getattr(real[0], "weight", None), getattr(layer, "weight", None)
    return isinstance(own, Tensor) and isinstance(other, Tensor) and torch.equal(own, other)


def constant_of(
    graph: Graph,
    norm: str,
    norm_of: Callable[[Run], float],
    factor_of: Callable[[Operation], float],
) -> float:
    """The Lipschitz constant that follows from these constants of runs and operations; what has no rule counts as 1."""
    recorder = _Recorder(graph, norm, norm_of, factor_of)
    return float(recorder.constant(graph.output))

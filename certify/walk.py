"""The walk over a traced graph: a Lipschitz constant for every tensor, affine runs gathered into one operator.

Every tensor is `expression(anchor)` plus a constant: `anchor` is the nearest tensor behind a non-affine operation (or a
sum of unlike branches), `expression` the linear map from there. Constants of anchors multiply; operators of a run fold.
Products and sums of constants that are floats are rounded up, so that they stay bounds; tensors are estimates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import Graph, plain_type, type_name
from .linear import Concat, Diagonal, LinearMap, add, chain, float64, identity, joined
from .rounding import up_add, up_mul
from .rules import Call, Operation, Rule, rule_for

SUMS: tuple[Operation, ...] = (operator.add, torch.add, "add", operator.iadd, operator.sub, torch.sub, "sub")
DIFFERENCES: tuple[Operation, ...] = (operator.sub, torch.sub, "sub")
CONCATS: tuple[Operation, ...] = (torch.cat, torch.concat, torch.concatenate)
_COMMUTATIVE: tuple[Operation, ...] = (operator.mul, torch.mul, "mul")


@dataclass(frozen=True)
class Place:
    """A tensor of the graph as an affine function of its anchor; `operator` None stands for the identity."""

    anchor: fx.Node
    operator: LinearMap | None
    parts: tuple[str, ...] = ()  # names of the layers in the run


def _product(first: Any, second: Any) -> Any:
    return up_mul(first, second) if isinstance(first, float) and isinstance(second, float) else first * second


def _sum(first: Any, second: Any) -> Any:
    return up_add(first, second) if isinstance(first, float) and isinstance(second, float) else first + second


def _joined(constants: list[Any], norm: str) -> Any:
    estimates = [constant for constant in constants if isinstance(constant, Tensor)]
    if not estimates:
        return joined(constants, norm)
    parts = torch.stack([torch.as_tensor(constant).to(estimates[0]) for constant in constants])
    return torch.linalg.vector_norm(parts, {"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm])


def structure(graph: Graph) -> Walk:
    """A walk for the places and calls of a graph alone, in float64; its constants mean nothing."""
    return Walk(graph, norm_of=lambda *_: 1.0, factor_of=lambda *_: 1.0, prepare=float64)


class Walk:
    """Lipschitz constants of a graph's tensors from the input, in one norm.

    Args:
        graph: the traced model.
        norm_of: gives the constant of an affine run (name of its last node, names of its layers, operator).
        factor_of: gives the constant of a non-affine operation (its rule, its call).
        prepare: turns an operator into the form to work on (float64 for bounds, as it is for estimates).
        norm: "l2", "linf" or "l1": decides how concatenations join.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        norm_of: Callable[[str, tuple[str, ...], LinearMap], Any],
        factor_of: Callable[[Rule, Call], float],
        prepare: Callable[[LinearMap], LinearMap],
        norm: str = "l2",
    ) -> None:
        self._graph = graph
        self._norm_of, self._factor_of, self._prepare, self._norm = norm_of, factor_of, prepare, norm
        self._places: dict[fx.Node, Place] = {}
        self._constants: dict[fx.Node, Any] = {graph.input: 1.0}
        self._runs: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node in graph.shapes:
                self._places[node] = self._visit(node)

    @property
    def output(self) -> Place:
        """The model's output as an affine function of its anchor."""
        return self._places[self._graph.output]

    def anchor_constant(self, anchor: fx.Node) -> Any:
        """Lipschitz constant from the input to an anchor."""
        return self._constants[anchor]

    def constant(self, node: fx.Node) -> Any:
        """Lipschitz constant from the input to any tensor of the graph."""
        place = self._places[node]
        if place.operator is None:
            return self._constants[place.anchor]
        if node not in self._runs:
            self._runs[node] = self._norm_of(node.name, place.parts, place.operator)
        return _product(self._runs[node], self._constants[place.anchor])

    def _visit(self, node: fx.Node) -> Place:
        if node.op == "placeholder":
            return Place(node, None)
        inputs = [parent for parent in node.all_input_nodes if parent in self._graph.shapes]
        operation = self._operation(node)
        if operation in SUMS:
            return self._sum(node, operation)
        if operation in CONCATS:
            return self._concat(node)
        rule = rule_for(operation, self._name(node), self._title(node, operation))
        if len(inputs) != 1 or sum(arg is inputs[0] for arg in (*node.args, *node.kwargs.values())) != 1:
            raise ValueError(
                f"{self._name(node)}: {self._title(node, operation)} has a rule for one tensor input only; write "
                "it as a module of your own and register that one's rule with speccert.certify.register_rule"
            )
        call = self._call(node, inputs[0], operation)
        if rule.linear is not None:
            return self._extend(self._places[inputs[0]], rule.linear(call), call.place, self._graph.shapes[node])
        assert rule.factor is not None
        factor = self._factor_of(rule, call)
        if not factor >= 0:
            raise ValueError(f"{call.place}: expected its rule to give a factor >= 0, got {factor}")
        self._constants[node] = _product(float(factor), self.constant(inputs[0]))
        return Place(node, None)

    def _extend(self, place: Place, linear: LinearMap, name: str, shape: tuple[int, ...]) -> Place:
        linear = self._prepare(linear)
        if linear.out_shape != shape:
            raise ValueError(f"{name}: its rule gives an operator to {linear.out_shape}, but the model gave {shape}")
        parts = place.parts if linear.isometry else (*place.parts, name)
        return Place(place.anchor, linear if place.operator is None else chain([place.operator, linear]), parts)

    def _sum(self, node: fx.Node, operation: Operation) -> Place:
        if node.kwargs or len(node.args) != 2:
            raise ValueError(f"{self._name(node)}: expected a sum of two terms without further arguments")
        terms = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self._graph.shapes]
        shape = self._graph.shapes[node]
        if any(self._graph.shapes[term] != shape for term in terms):
            raise ValueError(f"{self._name(node)}: expected terms of one shape, got a broadcast to {shape}")
        signs = [-1.0 if operation in DIFFERENCES and term is node.args[1] else 1.0 for term in terms]
        if len(terms) == 2 and terms[0] is terms[1]:
            signs = [1.0, -1.0 if operation in DIFFERENCES else 1.0]
        places = [self._places[term] for term in terms]
        if len(terms) == 1:
            return self._signed(places[0], signs[0], shape)
        if places[0].anchor is places[1].anchor:
            maps = [self._as_map(p, s, shape) for p, s in zip(places, signs, strict=True)]
            parts = (*places[0].parts, *(p for p in places[1].parts if p not in places[0].parts))
            return Place(places[0].anchor, add(maps[0], maps[1]), parts)
        self._constants[node] = _sum(self.constant(terms[0]), self.constant(terms[1]))
        return Place(node, None)

    def _concat(self, node: fx.Node) -> Place:
        joined_terms = node.args[0] if node.args else node.kwargs.get("tensors")
        terms = list(joined_terms) if isinstance(joined_terms, (tuple, list)) else []
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dims = len(self._graph.shapes[node]) + 1
        if not isinstance(axis, int) or axis % dims == 0:
            raise ValueError(f"{self._name(node)}: expected a concatenation along an axis behind the batch")
        moving = [term for term in terms if isinstance(term, fx.Node) and term in self._graph.shapes]
        places = [self._places[term] for term in moving]
        if len(moving) == len(terms) and len({place.anchor for place in places}) == 1:
            maps = tuple(self._as_map(p, 1.0, self._graph.shapes[t]) for p, t in zip(places, moving, strict=True))
            parts = tuple(dict.fromkeys(name for place in places for name in place.parts))
            return Place(places[0].anchor, Concat(maps, axis % dims - 1), parts)
        self._constants[node] = _joined([self.constant(term) for term in moving], self._norm)
        return Place(node, None)

    def _signed(self, place: Place, sign: float, shape: tuple[int, ...]) -> Place:
        return place if sign > 0 else Place(place.anchor, self._as_map(place, sign, shape), place.parts)

    def _as_map(self, place: Place, sign: float, shape: tuple[int, ...]) -> LinearMap:
        linear = self._prepare(identity(shape)) if place.operator is None else place.operator
        if sign > 0:
            return linear
        return chain([linear, self._prepare(Diagonal(torch.tensor(sign, dtype=torch.float64), shape))])

    def _operation(self, node: fx.Node) -> Operation:
        if node.op == "call_module":
            return plain_type(self._graph.module(node))
        return node.target

    def _title(self, node: fx.Node, operation: Operation) -> str:
        if node.op == "call_module":
            return type_name(self._graph.module(node))
        return f"Tensor.{operation}" if isinstance(operation, str) else getattr(operation, "__name__", str(operation))

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _call(self, node: fx.Node, source: fx.Node, operation: Operation) -> Call:
        first = node.args[0] if node.args else node.kwargs.get("input")
        if first is not source and operation not in _COMMUTATIVE:
            raise ValueError(
                f"{self._name(node)}: expected the tensor as first argument of {self._title(node, operation)}"
            )
        resolve = self._graph.constants.__getitem__
        args = fx.node.map_arg(tuple(arg for arg in node.args if arg is not source), resolve)
        kwargs = fx.node.map_arg({k: v for k, v in node.kwargs.items() if v is not source}, resolve)
        module: nn.Module | None = self._graph.module(node) if node.op == "call_module" else None
        shapes = self._graph.shapes
        return Call(self._name(node), module, tuple(args), dict(kwargs), shapes[source], shapes[node])

    def place(self, node: fx.Node) -> Place:
        """Any tensor of the graph as an affine function of its anchor."""
        return self._places[node]

    def operation_of(self, node: fx.Node) -> tuple[Operation, str]:
        """What a node calls, and its name for messages."""
        operation = self._operation(node)
        return operation, self._title(node, operation)

    def call_of(self, node: fx.Node) -> Call:
        """The call of an operation of one tensor input."""
        (source,) = (parent for parent in node.all_input_nodes if parent in self._graph.shapes)
        return self._call(node, source, self._operation(node))

    def anchors(self) -> tuple[tuple[str, float], ...]:
        """The anchors' names, in the order of the graph, with their constants from the input."""
        return tuple((node.name, float(self._constants[node])) for node in self._graph.nodes if node in self._constants)

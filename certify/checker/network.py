"""The checker's own reading of a traced graph: affine maps in exact numbers, activations, sums and concatenations."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..graph import Graph, plain_type, trace, type_name
from .activations import activation_for
from .balls import Fixed, fixed
from .chains import Chain, Concat, Sum
from .layers import affine_for
from .maps import Linear, Scale, Shape, identity
from .picks import Activation
from .reading import Affine, Reading
from .rounds import EXACT, Rounds

# Leaves of this package's own, by name, since the checker imports none of them.
OWN_LEAVES = frozenset(
    {f"speccert.models.activations.{name}" for name in ("Abs", "GroupSort", "Householder", "MaxMin")}
    | {"speccert.models.layers.Normalize"}
)
SUMS = (operator.add, torch.add, "add", operator.iadd)
DIFFERENCES = (operator.sub, torch.sub, "sub")
CONCATS = (torch.cat, torch.concat, torch.concatenate)
_COMMUTATIVE = (operator.mul, torch.mul, "mul")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One tensor of the network and how it comes from others.

    Attributes:
        name: of the graph's node.
        kind: "input", "affine", "activation", "sum" or "concat".
        shape: without the batch.
        sources: names of the tensors it is made of.
        linear: of an affine node.
        offset: constant part of an affine node, or the constant added by a sum of one tensor.
        activation: of an activation node.
        signs: of a sum's tensors, 1 or -1.
        axis: of a concatenation, without the batch.
        rounds: how the executed operation rounds.
    """

    name: str
    kind: str
    shape: Shape
    sources: tuple[str, ...] = ()
    linear: Linear | None = None
    offset: Fixed | None = None
    activation: Activation | None = None
    signs: tuple[int, ...] = ()
    axis: int = 0
    rounds: Rounds = EXACT


@dataclass(frozen=True)
class Place:
    """A tensor as a linear map of its anchor (None: the anchor itself, plus a constant)."""

    anchor: str
    linear: Linear | None


@dataclass(frozen=True)
class Network:
    """All tensors in order, and each one's place."""

    nodes: tuple[Node, ...]
    output: str
    places: dict[str, Place] = field(default_factory=dict)

    def node(self, name: str) -> Node:
        """The tensor of that name."""
        return next(node for node in self.nodes if node.name == name)

    @property
    def anchors(self) -> list[Node]:
        """Tensors that no affine run passes through, in order."""
        return [node for node in self.nodes if self.places[node.name] == Place(node.name, None)]

    @property
    def run_ends(self) -> list[str]:
        """Tensors whose Lipschitz constant is needed and that end an affine run, in order."""
        needed = {self.output}
        for node in self.anchors:
            needed.update(node.sources)
        return [n.name for n in self.nodes if n.name in needed and self.places[n.name].linear is not None]


def traced(model: nn.Module, input_shape: Shape, *, foreign: bool = False) -> Graph:
    """The graph of a model with the same leaves as the certifier's: torch's layers and this package's own.

    `foreign` also leaves modules of other origin closed, which the certifier does where they have a registered rule.
    """
    closed = (m for m in model.modules() if type_name(m) in OWN_LEAVES or (foreign and not any(m.children())))
    return trace(model, input_shape, frozenset(plain_type(m) for m in closed))


def plain_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose parametrized tensors are plain ones, in `dtype` (None: as they are)."""
    clone = copy.deepcopy(model)
    for own, live in zip(list(clone.modules()), list(model.modules()), strict=True):
        if parametrize.is_parametrized(live):
            names = list(live.parametrizations)  # type: ignore[arg-type]
            own.__class__ = plain_type(own)
            del own._modules["parametrizations"]
            for name in names:
                value = getattr(live, name).detach().clone()
                own.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return clone if dtype is None else clone.to(dtype)


def read(graph: Graph) -> Network:
    """The network of a graph; ValueError that names what the checker has no rule for."""
    reader = _Reader(graph)
    nodes = tuple(reader.read(node) for node in graph.nodes if node in graph.shapes)
    network = Network(nodes, graph.output.name)
    for node in nodes:
        network.places[node.name] = _place(network, node)
    return network


def _place(network: Network, node: Node) -> Place:
    places = [network.places[name] for name in node.sources]
    if node.kind == "affine" and node.linear is not None:
        return Place(places[0].anchor, _after(places[0].linear, node.linear))
    if node.kind == "sum" and len(places) == 1:
        return Place(places[0].anchor, _signed(places[0].linear, node.signs[0], node.shape))
    if (
        node.kind in ("sum", "concat")
        and places
        and len({place.anchor for place in places}) == 1
        and node.offset is None
    ):
        maps = [place.linear or identity(network.node(n).shape) for place, n in zip(places, node.sources, strict=True)]
        if node.kind == "concat":
            return Place(places[0].anchor, Concat(tuple(maps), node.axis, node.shape))
        second = _signed(maps[1], node.signs[1], node.shape) or maps[1]
        return Place(places[0].anchor, Sum(_signed(maps[0], node.signs[0], node.shape) or maps[0], second))
    return Place(node.name, None)


def _after(first: Linear | None, last: Linear) -> Linear:
    if first is None:
        return last
    maps = (*(first.maps if isinstance(first, Chain) else (first,)), last)
    return Chain(maps, first.in_shape)


def _signed(linear: Linear | None, sign: int, shape: Shape) -> Linear | None:
    if sign > 0:
        return linear
    return _after(linear, Scale(fixed(torch.tensor(-1.0)), shape))


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def read(self, node: fx.Node) -> Node:
        shape = self._graph.shapes[node]
        if node.op == "placeholder":
            return Node(name=node.name, kind="input", shape=shape)
        target: Any = plain_type(self._graph.module(node)) if node.op == "call_module" else node.target
        if target in SUMS or target in DIFFERENCES:
            return self._sum(node, -1 if target in DIFFERENCES else 1)
        if target in CONCATS:
            return self._concat(node)
        reading = self._reading(node, target)
        affine = affine_for(target, reading)
        if isinstance(affine, Affine):
            if affine.linear.out_shape != shape or affine.linear.in_shape != reading.in_shape:
                raise ValueError(f"{reading.place}: the checker reads another shape than the model gives")
            return Node(
                name=node.name,
                kind="affine",
                shape=shape,
                sources=(reading.source,),
                linear=affine.linear,
                offset=affine.offset,
                rounds=affine.rounds,
            )
        activation = activation_for(target, reading)
        if activation is None:
            raise ValueError(f"{reading.place}: the checker has no rule for {reading.title}")
        return Node(
            name=node.name,
            kind="activation",
            shape=shape,
            sources=(reading.source,),
            activation=activation,
            rounds=activation.rounds,
        )

    def _reading(self, node: fx.Node, target: Any) -> Reading:
        place = str(node.target) if node.op == "call_module" else node.name
        module = self._graph.module(node) if node.op == "call_module" else None
        title = type_name(module) if module is not None else str(getattr(target, "__name__", target))
        moving = [parent for parent in node.all_input_nodes if parent in self._graph.shapes]
        if len(moving) != 1 or sum(arg is moving[0] for arg in (*node.args, *node.kwargs.values())) != 1:
            raise ValueError(f"{place}: the checker has no rule for {title} of several tensors")
        first = node.args[0] if node.args else node.kwargs.get("input")
        if first is not moving[0] and target not in _COMMUTATIVE:
            raise ValueError(f"{place}: the checker has no rule for {title} with the tensor in second place")
        constants = self._graph.constants.__getitem__
        args: Any = fx.node.map_arg(tuple(arg for arg in node.args if arg is not moving[0]), constants)
        kwargs: Any = fx.node.map_arg({k: v for k, v in node.kwargs.items() if v is not moving[0]}, constants)
        shapes = self._graph.shapes
        return Reading(
            place=place,
            title=title,
            source=moving[0].name,
            module=module,
            args=tuple(args),
            kwargs=dict(kwargs),
            in_shape=shapes[moving[0]],
            out_shape=shapes[node],
        )

    def _sum(self, node: fx.Node, last: int) -> Node:
        shapes, shape = self._graph.shapes, self._graph.shapes[node]
        if node.kwargs or len(node.args) != 2:
            raise ValueError(f"{node.name}: the checker has no rule for a sum with further arguments")
        terms: list[tuple[Any, int]] = [
            (arg, sign) for arg, sign in zip(node.args, (1, last), strict=True) if self._moves(arg)
        ]
        if any(shapes[term] != shape for term, _ in terms):
            raise ValueError(f"{node.name}: the checker has no rule for a sum of unlike shapes")
        offset = None
        if len(terms) == 1:
            constant, sign = next((a, s) for a, s in zip(node.args, (1, last), strict=True) if not self._moves(a))
            offset = self._constant(node, constant, sign, shape)
        return Node(
            name=node.name,
            kind="sum",
            shape=shape,
            sources=tuple(term.name for term, _ in terms),
            signs=tuple(sign for _, sign in terms),
            offset=offset,
        )

    def _moves(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument in self._graph.shapes

    def _constant(self, node: fx.Node, argument: Any, sign: int, shape: Shape) -> Fixed:
        value = self._graph.constants[argument] if isinstance(argument, fx.Node) else argument
        if not isinstance(value, Tensor | int | float) or isinstance(value, bool):
            raise ValueError(f"{node.name}: the checker has no rule for a sum with {type(value).__name__}")
        tensor = sign * torch.as_tensor(value, dtype=torch.float64)
        if tensor.dim() > len(shape):
            if tensor.shape[0] != 1 or tensor.dim() != len(shape) + 1:
                raise ValueError(f"{node.name}: the checker has no rule for a constant of shape {tuple(tensor.shape)}")
            tensor = tensor[0]
        return fixed(torch.broadcast_to(tensor, shape))

    def _concat(self, node: fx.Node) -> Node:
        terms: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        rank = len(self._graph.shapes[node]) + 1
        if not isinstance(axis, int) or axis % rank == 0 or not isinstance(terms, tuple | list):
            raise ValueError(f"{node.name}: the checker has no rule for a concatenation along the batch")
        if not all(self._moves(term) for term in terms):
            raise ValueError(f"{node.name}: the checker has no rule for a concatenation with constants")
        return Node(
            name=node.name,
            kind="concat",
            shape=self._graph.shapes[node],
            sources=tuple(term.name for term in terms),
            axis=axis % rank - 1,
        )

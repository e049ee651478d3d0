"""A network, or a part of one, as slope-restricted numbers joined by linear maps.

With xi_0 the numbers at the start (the input, or a tensor inside) and xi_k the numbers that activation k gives,

    u_k = sum over l < k of A_kl xi_l + constant,    xi_k = psi_k(u_k),    end = sum over k of C_k xi_k + constant,

where every difference quotient of psi_k is between its slopes (see `slopes`). Residual sums, concatenations and
activations that pass a part of their input on (MaxMin, Householder) become further A_kl and C_k; constants drop out of
differences. `Form` holds the maps as operators, `Neurons` as matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .graph import Graph
from .linear import Diagonal, LinearMap, Reindex, add, chain, float64, identity
from .rounding import gamma, largest_entry, norm_up, up_add, up_mul, up_sqrt
from .slopes import Slopes, slopes_of
from .walk import CONCATS, DIFFERENCES, SUMS, Place, Walk

MOST = 12288  # numbers of all activations
_ENTRIES = 1 << 25  # of one matrix
_LARGEST = 2.0**100  # entry of a matrix
_LOST = 2.0**-900  # more than underflow takes from a product of moderate numbers
_AT_ONCE = 1 << 24  # entries of a batch of unit vectors and their images


class NoForm(ValueError):
    """A part of a network that is no such form; one line says why."""


@dataclass(frozen=True, eq=False)
class Term:
    """A linear map from the numbers of one group; `operator` None is the identity."""

    source: int
    operator: LinearMap | None


@dataclass(frozen=True, eq=False)
class Activation:
    """psi_k: the graph's node, its slopes, the shape of its numbers, and the maps that lead to them."""

    node: fx.Node
    slopes: Slopes
    shape: tuple[int, ...]
    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """A part of a network from `start` to `end`; group 0 has the shape `shape`, group k that of activation k - 1."""

    start: fx.Node
    end: fx.Node
    shape: tuple[int, ...]
    activations: tuple[Activation, ...]
    terms: tuple[Term, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each group has."""
        return (math.prod(self.shape), *(math.prod(one.shape) for one in self.activations))


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix [m, n] (float64, CPU) that acts on group `source`, within `error` of the true one in l2 norm."""

    source: int
    matrix: Tensor
    error: float = 0.0


@dataclass(frozen=True, eq=False)
class Layer:
    """The matrices to the numbers u of one activation, and the slopes of each.

    Attributes:
        parts: A_k, one a source, sources ascending.
        low: [n] least slopes.
        high: [n] largest slopes.
        tied: [n] the position of each number's multiplier: numbers of a group share one.
    """

    parts: tuple[Part, ...]
    low: Tensor
    high: Tensor
    tied: Tensor

    @property
    def multipliers(self) -> int:
        """How many multipliers the layer has."""
        return int(self.tied.max()) + 1


@dataclass(frozen=True, eq=False)
class Neurons:
    """A `Form` with matrices: sizes of the groups 0..L, layers 1..L, and the parts of the end."""

    sizes: tuple[int, ...]
    layers: tuple[Layer, ...]
    output: tuple[Part, ...]

    @property
    def start_parts(self) -> list[Part]:
        """The matrices that read the start, layer by layer, those of the end last."""
        parts = [*(part for layer in self.layers for part in layer.parts), *self.output]
        return [part for part in parts if part.source == 0]

    @property
    def start_rows(self) -> int:
        """How many rows they have."""
        return sum(len(part.matrix) for part in self.start_parts)

    def with_start(
        self,
        rows: Tensor,  # [start_rows, n], exact
    ) -> Neurons:
        """The same with n numbers at the start and other matrices that read it."""
        blocks = iter(torch.split(rows, [len(part.matrix) for part in self.start_parts]))

        def read(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(Part(0, next(blocks)) if part.source == 0 else part for part in parts)

        layers = tuple(replace(layer, parts=read(layer.parts)) for layer in self.layers)
        return Neurons((rows.shape[1], *self.sizes[1:]), layers, read(self.output))

    def mixed(
        self,
        rows: Tensor,  # [m, end]
    ) -> Neurons:
        """The same with rows @ end as the end."""
        size = float(norm_up(rows.flatten()))
        parts = []
        for part in self.output:
            rounding = up_mul(gamma(rows.shape[1] + 2), size, float(norm_up(part.matrix.flatten())))
            lost = up_mul(float(rows.numel() * part.matrix.shape[1]), _LOST)
            parts.append(Part(part.source, rows @ part.matrix, up_add(rounding, lost, up_mul(size, part.error))))
        return replace(self, output=tuple(parts))

    def pair(self, first: int, second: int) -> Neurons:
        """The same with the difference of two numbers of the end as the end, a row."""
        parts = []
        for part in self.output:
            row = (part.matrix[first] - part.matrix[second])[None]
            rounding = up_mul(2.0**-52, float(norm_up(row.flatten())))
            parts.append(Part(part.source, row, up_add(rounding, up_mul(up_sqrt(2.0), part.error))))
        return replace(self, output=tuple(parts))


def form(graph: Graph, walk: Walk, end: fx.Node, start: fx.Node | None = None) -> Form:
    """The part of a network between two tensors.

    Args:
        graph: the traced model.
        walk: over it, in float64.
        end: the last tensor, e.g. the logits.
        start: the first one, the input or an anchor of the walk; None is the input.

    Raises:
        NoForm: an operation without slopes, or a path to the end that does not go through the start.
    """
    return _Former(graph, walk, graph.input if start is None else start).form(end)


class _Former:
    def __init__(self, graph: Graph, walk: Walk, start: fx.Node) -> None:
        self._graph, self._walk, self._start = graph, walk, start
        self._activations: list[Activation] = []
        self._anchors: dict[fx.Node, tuple[Term, ...]] = {start: (Term(0, None),)}

    def form(self, end: fx.Node) -> Form:
        for anchor in self._needed(end):
            if anchor not in self._anchors:
                self._anchors[anchor] = self._anchor(anchor)
        terms = self._terms(end)
        return Form(self._start, end, self._graph.shapes[self._start], tuple(self._activations), terms)

    def _needed(self, end: fx.Node) -> list[fx.Node]:
        """The anchors behind `end`, in the order of the graph."""
        found, left = set(), [self._place(end).anchor]
        while left:
            anchor = left.pop()
            if anchor in found:
                continue
            found.add(anchor)
            if anchor is not self._start:
                if anchor is self._graph.input:
                    raise NoForm(f"{end.name} depends on the input on a path around {self._start.name}")
                left += [self._place(node).anchor for node in self._sources(anchor)]
        return [node for node in self._graph.nodes if node in found]

    def _place(self, node: fx.Node) -> Place:
        return Place(node, None) if node is self._start else self._walk.place(node)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [parent for parent in node.all_input_nodes if parent in self._graph.shapes]

    def _terms(self, node: fx.Node) -> tuple[Term, ...]:
        place = self._place(node)
        return _after(self._anchors[place.anchor], place.operator)

    def _anchor(self, node: fx.Node) -> tuple[Term, ...]:
        operation, title = self._walk.operation_of(node)
        if operation in SUMS:
            signs = [1.0, -1.0 if operation in DIFFERENCES else 1.0]
            shape = self._graph.shapes[node]
            terms = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self._graph.shapes]
            parts = [_after(self._terms(t), _sign(s, shape)) for t, s in zip(terms, signs, strict=True)]
            return _merged((term for part in parts for term in part), shape)
        if operation in CONCATS:
            return self._concat(node)
        slopes = slopes_of(operation, self._walk.call_of(node))
        if slopes is None:
            raise NoForm(f"{node.name}: {title} has no slopes that are known number by number")
        (source,) = self._sources(node)
        before = self._terms(source)
        shape = self._graph.shapes[node] if slopes.shape is None else slopes.shape
        self._activations.append(Activation(node, slopes, shape, _after(before, _prepared(slopes.before))))
        own: tuple[Term, ...] = (Term(len(self._activations), _prepared(slopes.after)),)
        if slopes.skip is not None:
            own = _merged((*_after(before, _prepared(slopes.skip)), *own), self._graph.shapes[node])
        return own

    def _concat(self, node: fx.Node) -> tuple[Term, ...]:
        shape = self._graph.shapes[node]
        nodes = node.args[0] if node.args else node.kwargs["tensors"]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        assert isinstance(nodes, (tuple, list))
        assert isinstance(axis, int)
        axis = axis % (len(shape) + 1)
        found: list[Term] = []
        position = 0
        for part in nodes:
            if not isinstance(part, fx.Node):
                raise NoForm(f"{node.name}: joins something that is no tensor of the graph")
            constant = part not in self._graph.shapes
            own = tuple(self._graph.constants[part].shape[1:]) if constant else self._graph.shapes[part]
            if not constant:
                found += _after(self._terms(part), _placed(own, shape, axis - 1, position))
            position += own[axis - 1]
        return _merged(found, shape)


def _prepared(operator: LinearMap | None) -> LinearMap | None:
    return None if operator is None else float64(operator)


def _sign(sign: float, shape: tuple[int, ...]) -> LinearMap | None:
    return None if sign > 0 else Diagonal(torch.tensor(sign, dtype=torch.float64), shape)


def _placed(own: tuple[int, ...], shape: tuple[int, ...], axis: int, position: int) -> LinearMap:
    """Zeros around a tensor along one axis."""
    pad = [0, 0] * (len(shape) - 1 - axis) + [position, shape[axis] - position - own[axis]]
    return Reindex(lambda x: torch.nn.functional.pad(x, pad), own, shape)


def _after(terms: tuple[Term, ...], operator: LinearMap | None) -> tuple[Term, ...]:
    if operator is None:
        return terms
    return tuple(Term(t.source, operator if t.operator is None else chain([t.operator, operator])) for t in terms)


def _merged(terms: Iterable[Term], shape: tuple[int, ...]) -> tuple[Term, ...]:
    """One term a source, ascending, of terms that give tensors of `shape`."""
    found, unit = dict[int, Term](), identity(shape)
    for term in terms:
        other = found.get(term.source)
        found[term.source] = (
            term if other is None else Term(term.source, add(other.operator or unit, term.operator or unit))
        )
    return tuple(found[source] for source in sorted(found))


def neurons(found: Form, most: int = MOST) -> Neurons:
    """The form with matrices.

    Raises:
        NoForm: more than `most` numbers in all, or a matrix that is too large.
    """
    if sum(found.sizes[1:]) > most:
        raise NoForm(f"{sum(found.sizes[1:])} neurons are more than {most}")
    layers = []
    for one in found.activations:
        size = math.prod(one.shape)
        layers.append(
            Layer(
                tuple(_part(term, found.sizes) for term in one.terms),
                torch.full((size,), one.slopes.low, dtype=torch.float64),
                torch.full((size,), one.slopes.high, dtype=torch.float64),
                _tied(one),
            )
        )
    end = tuple(_part(term, found.sizes) for term in found.terms)
    return Neurons(found.sizes, tuple(layers), end)


def _tied(one: Activation) -> Tensor:
    if one.slopes.group == 1:
        return torch.arange(math.prod(one.shape))
    groups, places = one.shape[0] // one.slopes.group, math.prod(one.shape[1:])
    return torch.arange(groups * places).reshape(groups, 1, places).expand(-1, one.slopes.group, -1).flatten()


def _part(term: Term, sizes: tuple[int, ...]) -> Part:
    if term.operator is None:
        size = sizes[term.source]
        if size * size > _ENTRIES:
            raise NoForm(f"a matrix of {size} x {size} is too large")
        return Part(term.source, torch.eye(size, dtype=torch.float64))
    linear = float64(term.operator)
    matrix = _matrix(linear)
    if not largest_entry(matrix) < _LARGEST:
        raise NoForm(f"a weight of {largest_entry(matrix):.1e} is too large")
    try:
        return Part(term.source, matrix, linear.matrix_error("l2"))
    except ValueError as reason:  # of maps that have no bound of their rounding
        raise NoForm(str(reason)) from reason


def _matrix(linear: LinearMap) -> Tensor:
    """[out, in], from images of unit vectors on the smaller side."""
    inputs, outputs = math.prod(linear.in_shape), math.prod(linear.out_shape)
    if inputs * outputs > _ENTRIES:
        raise NoForm(f"a matrix of {outputs} x {inputs} is too large")
    wide = inputs > outputs
    size, shape = (outputs, linear.out_shape) if wide else (inputs, linear.in_shape)
    function = linear.adjoint if wide else linear.apply
    step = max(1, _AT_ONCE // max(inputs, outputs, 1))
    images = []
    for first in range(0, size, step):
        basis = torch.zeros(min(step, size - first), size, dtype=torch.float64)
        basis[torch.arange(len(basis)), torch.arange(first, first + len(basis))] = 1.0
        images.append(function(basis.reshape(len(basis), *shape)).detach().flatten(1))
    found = torch.cat(images)
    return found if wide else found.T.contiguous()

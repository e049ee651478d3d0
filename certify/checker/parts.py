"""A part of a network, from one tensor to the logits, as slope-restricted numbers joined by matrices.

With xi_0 the numbers at the start and xi_k those that activation k gives, in the order of the graph,
u_k = sum over l < k of A_kl xi_l + constant, xi_k = psi_k(u_k), and the logits are the sum of C_k xi_k + constant.
Constants drop out of differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flint import fmpz
from numpy.typing import NDArray

from .balls import Fixed, fixed, largest, length, zeros
from .chains import Chain, Sum
from .maps import Dense, Gather, Linear, Scale, Shape, identity
from .matrices import Refused, materialised, within_limits
from .network import Network, Node
from .slopes import Slopes

_SHORT = 100  # bits of the entries of matrices
_NUMBERS = 1 << 13  # of all activations together, at most
_COST = 200  # maps in a sum, beyond which it becomes a matrix

Terms = Mapping[int, Linear | None]


@dataclass(frozen=True)
class Layer:
    """The matrices to the numbers of one activation by the group that they act on, its slopes, its multipliers."""

    rows: Mapping[int, Fixed]
    low: int
    high: int
    conditions: NDArray[np.int64]

    @property
    def count(self) -> int:
        """How many multipliers it has."""
        return int(self.conditions.max(initial=-1)) + 1


@dataclass(frozen=True)
class Part:
    """Sizes of the groups 0..L, layers 1..L, and the matrices to the logits."""

    sizes: tuple[int, ...]
    layers: tuple[Layer, ...]
    end: Mapping[int, Fixed]


def part_from(network: Network, start: str) -> Part:
    """The part from an anchor of the network to its logits; Refused where there is no such form."""
    return _Reader(network, start).part()


def check_size(network: Network, start: str) -> None:
    """Refused where the part from an anchor to the logits has no form, or matrices that are too large."""
    _Reader(network, start).matrices()


class _Reader:
    def __init__(self, network: Network, start: str) -> None:
        self._network, self._start = network, start
        self._terms: dict[str, Terms] = {start: {0: None}}
        self._slopes: list[tuple[Terms, Slopes]] = []

    def part(self) -> Part:
        sizes, rows = self.matrices()
        *layers, end = [_matrices(terms, sizes) for terms in rows]
        slopes = [one for _, one in self._slopes]
        made = (Layer(found, one.low, one.high, one.conditions) for found, one in zip(layers, slopes, strict=True))
        return Part(sizes, tuple(made), end)

    def matrices(self) -> tuple[tuple[int, ...], list[Terms]]:
        """Sizes of the groups, and maps to the numbers of each activation and to the logits, all within the limits."""
        for node in self._needed():
            if node.name != self._start:
                self._terms[node.name] = self._anchor(node)
        sizes = (math.prod(self._network.node(self._start).shape), *(math.prod(s.shape) for _, s in self._slopes))
        if sum(sizes[1:]) > _NUMBERS:
            raise Refused(f"{sum(sizes[1:])} numbers of activations are more than the checker takes, {_NUMBERS}")
        rows = [*(terms for terms, _ in self._slopes), self._of(self._network.output)]
        outputs = (*sizes[1:], math.prod(self._network.node(self._network.output).shape))
        for terms, count in zip(rows, outputs, strict=True):
            for source in terms:
                within_limits(sizes[source], count)
        return sizes, rows

    def _needed(self) -> list[Node]:
        """The anchors from the start to the logits, in order; each path to them must go through the start."""
        places, found, left = self._network.places, set[str](), [self._place(self._network.output)]
        first = self._network.nodes[0].name
        while left:
            name = left.pop()
            if name in found:
                continue
            found.add(name)
            if name == self._start:
                continue
            if name == first or places[name].anchor != name:
                raise Refused(f"the logits depend on the input on a path around {self._start!r}")
            left += [self._place(source) for source in self._network.node(name).sources]
        return [node for node in self._network.nodes if node.name in found]

    def _place(self, name: str) -> str:
        return self._network.places[name].anchor

    def _of(self, name: str) -> Terms:
        place = self._network.places[name]
        return _after(self._terms[place.anchor], place.linear)

    def _anchor(self, node: Node) -> Terms:
        if node.kind == "activation" and node.activation is not None:
            return self._activation(node)
        if node.kind == "sum":
            signs = zip(node.sources, node.signs, strict=True)
            return _merged([_signed(self._of(name), sign, node.shape) for name, sign in signs], node.shape)
        if node.kind != "concat":
            raise Refused(f"{node.name} is no activation, sum or concatenation")
        parts, position = [], 0
        for name in node.sources:
            own = self._network.node(name).shape
            parts.append(_after(self._of(name), _placed(own, node.shape, node.axis, position)))
            position += own[node.axis]
        return _merged(parts, node.shape)

    def _activation(self, node: Node) -> Terms:
        assert node.activation is not None
        if node.activation.slopes is None:
            raise Refused(f"{node.name} has no slopes that the checker knows number by number")
        slopes, before = node.activation.slopes, self._of(node.sources[0])
        self._slopes.append((_after(before, slopes.before), slopes))
        own: Terms = {len(self._slopes): slopes.after}
        return own if slopes.skip is None else _merged([_after(before, slopes.skip), own], node.shape)


def _after(terms: Terms, linear: Linear | None) -> Terms:
    if linear is None:
        return terms
    return {source: linear if one is None else _chain(one, linear) for source, one in terms.items()}


def _chain(first: Linear, last: Linear) -> Linear:
    maps = [part for one in (first, last) for part in (one.maps if isinstance(one, Chain) else (one,))]
    return Chain(tuple(maps), first.in_shape)


def _signed(terms: Terms, sign: int, shape: Shape) -> Terms:
    return terms if sign > 0 else _after(terms, Scale(fixed(torch.tensor(-1.0)), shape))


def _merged(parts: Sequence[Terms], shape: Shape) -> Terms:
    """One map a group, of terms that add up to a tensor of `shape`."""
    found: dict[int, Linear | None] = {}
    for terms in parts:
        for source, linear in terms.items():
            if source not in found:
                found[source] = linear
            else:
                other = Sum(found[source] or identity(shape), linear or identity(shape))
                # sums of sums that begin with nothing in common double the work each time
                found[source] = _as_matrix(other) if other.cost > _COST else other
    return found


def _as_matrix(linear: Linear) -> Linear:
    """The same as one matrix between flat tensors."""
    inputs, outputs = math.prod(linear.in_shape), math.prod(linear.out_shape)
    weight = Dense(short(materialised(linear)), (inputs,))
    first = Gather(np.arange(inputs), linear.in_shape, (inputs,))
    return Chain((first, weight, Gather(np.arange(outputs), (outputs,), linear.out_shape)), linear.in_shape)


def _placed(own: Shape, shape: Shape, axis: int, position: int) -> Linear:
    """Zeros around a tensor along one axis."""
    index = np.full(shape, -1, dtype=np.int64)
    inner = tuple(slice(position, position + own[axis]) if i == axis else slice(None) for i in range(len(shape)))
    index[inner] = np.arange(math.prod(own)).reshape(own)
    return Gather(index.reshape(-1), own, shape)


def _matrices(terms: Terms, sizes: tuple[int, ...]) -> dict[int, Fixed]:
    return {source: short(_matrix(linear, sizes[source])) for source, linear in sorted(terms.items())}


def _matrix(linear: Linear | None, size: int) -> Fixed:
    if linear is not None:
        return materialised(linear)
    unit = zeros((size, size))
    unit[np.arange(size), np.arange(size)] = fmpz(1)
    return Fixed(unit, 0)


def short(matrix: Fixed, bits: int = _SHORT) -> Fixed:
    """The matrix in integers of at most `bits` bits, outward."""
    excess = length(largest(matrix.mant)) - bits
    if excess <= 0:
        return matrix
    return Fixed(matrix.mant >> excess, matrix.exp + excess, (matrix.err >> excess) + 2)

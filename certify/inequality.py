"""Proofs of LipSDP inequalities: multipliers, from wherever they come, become a bound that holds.

For a part of a network as `Neurons`, multipliers d >= 0 and weights tau of the start let, for all vectors xi_0 .. xi_L,

    F = sum tau xi_0^2 - ||sum C_k xi_k||^2 - sum_k sum_i d_ki (xi_ki - a_ki u_ki)(b_ki u_ki - xi_ki),

u_k = sum A_kl xi_l. Differences of the network's numbers make every term of the last sum >= 0 (summed over a tied
group), so that F >= 0 for all vectors proves ||change of the end||^2 <= sum tau (change of the start)^2: Fazlyab,
Robey, Hassani, Morari, Pappas, "Efficient and accurate estimation of Lipschitz constants for deep neural networks",
NeurIPS 2019; for groups: Pauli, Havens, Araujo, Garg, Khorrami, Allgower, Hu, "Novel quadratic constraints for
extending LipSDP beyond slope-restricted activations", ICLR 2024. In l2 tau is one number; in linf the sum of tau, in
place of the largest, bounds the square. In l1 a whole matrix Q takes the place of tau, and its largest diagonal entry
bounds the square: a change along one axis is e_i^T Q e_i at most, and any change is a path of such.

The matrix of F, scaled by powers of two, is made in float64 with a bound of all its errors, those of the A_kl and C_k
included, and proved to be positive by `rounding.proved_below`. A start of more numbers than there are rows that read it
is replaced by the image of its ball: with M all these rows and M T^-1 M^T <= G G^T, G y, ||y|| <= 1, stands for M x,
x^T T x <= 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import check_norm
from .multipliers import least_form
from .neurons import MOST, Layer, Neurons, Part
from .rounding import (
    UNIT,
    cholesky_factor,
    covering,
    gamma,
    inverse_roots,
    norm_up,
    power_of_two,
    proved_below,
    sum_up,
    up,
    up_add,
    up_mul,
    up_sqrt,
)

_SIDE = MOST  # of the matrix of F
_MOST = 2.0**300  # of multipliers, weights and their inverses
_LARGE = 2.0**200  # of the norms of scaled blocks, beyond which nothing is proved
_LOST = 2.0**-450  # more than underflow takes from an entry: the smallest normal number, enlarged by such factors
_ATTEMPTS, _FIRST, _STEP = 14, 2.0**-31, 4.0  # by how much a weight is raised until the proof succeeds


@dataclass(frozen=True)
class Proved:
    """`upper` bounds ||end||_2 / ||start||_norm, inf where nothing is proved; `weights`: tau, [1] in l2, None in l1."""

    upper: float
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A proved bound of a network's end, or of the difference of two of its numbers, by one inequality.

    Attributes:
        norm: of the input.
        start: graph node of the tensor that the part starts at.
        end: that of its end.
        pair: the two numbers of the end whose difference is bounded; None: all, in l2.
        start_constant: Lipschitz constant from the input, in `norm`, to the start, in l2; 1 where that is the input.
        upper: start_constant times the part's bound, rounded up.
        multipliers: per activation.
        weights: tau, one number in l2; None in l1.
        method: where the multipliers come from.
    """

    norm: str
    start: str
    end: str
    pair: tuple[int, int] | None
    start_constant: float
    upper: float
    multipliers: tuple[Tensor, ...]
    weights: Tensor | None
    method: str


def prove(
    net: Neurons,
    multipliers: Sequence[Tensor],
    norm: str = "l2",
    weights: Tensor | None = None,
) -> Proved:
    """The least bound that these multipliers are proved to give.

    Args:
        net: the part; its end is what is bounded.
        multipliers: per layer [multipliers], float64, > 0.
        norm: of the start: "l2", "linf" or "l1".
        weights: [start] tau up to a factor, for linf.

    Raises:
        ValueError: a number of multipliers that does not fit the layers, or of weights that does not fit the start.
    """
    multipliers = [one.detach().to("cpu", torch.float64) for one in multipliers]
    held = _checked(net, multipliers)
    start = net.sizes[0] if norm == "l1" else min(net.sizes[0], net.start_rows)
    if sum(net.sizes[1:]) + start > _SIDE:
        return Proved(math.inf)
    check_norm(norm)
    if norm == "linf" and weights is not None and weights.shape != (net.sizes[0],):
        raise ValueError(f"weights: expected {net.sizes[0]} numbers, got shape {tuple(weights.shape)}")
    shape = torch.ones(net.sizes[0], dtype=torch.float64)
    if norm == "linf":
        shape = shape / len(shape) if weights is None else weights.double() / weights.sum()
    if held is None or not _moderate(shape):
        return Proved(math.inf)
    if norm == "l1":
        return _prove_l1(net, multipliers, held)
    reduced = _reduced(net, shape)
    if reduced is None:
        return Proved(math.inf)
    units = shape if reduced is net else torch.ones(reduced.sizes[0], dtype=torch.float64)
    value = _value(reduced, multipliers, units)
    if not 1 / _MOST < value < _MOST:
        return Proved(math.inf)
    matrix = _Matrix(reduced, held, units * value)
    for attempt in range(_ATTEMPTS):
        level = value * (1 + _FIRST * _STEP**attempt)
        if matrix.positive(torch.diag(units * level)):
            tau = shape[:1] * level if norm == "l2" else up(shape * level)
            return Proved(up_sqrt(level if norm == "l2" else float(sum_up(tau))), tau)
    return Proved(math.inf)


def prove_pairs(
    net: Neurons,
    multipliers: Sequence[Tensor],
    gram: Tensor,  # [end, end]
    pairs: Sequence[tuple[int, int]],
    largest: float,
) -> list[tuple[Proved, tuple[Tensor, ...]]]:
    """Bounds of differences of two numbers of the end, in l2, by one proof for all, and each pair's own multipliers.

    With H what F is without the end, S about C H^-1 C^T and G^T G about S^-1, one proves ||G end|| <= q ||start||. Then
    end_i - end_j = w . G end + r . end with any w near G^-T (e_i - e_j) and r = e_i - e_j - G^T w, which leaves
    |end_i - end_j| <= (||w|| q + ||r|| largest) ||start||. With multipliers times the square of that over q^2, the
    inequality of the pair holds too.

    Args:
        net: the part.
        multipliers: shared by all pairs, for tau = 1.
        gram: S, of which nothing is asked.
        pairs: of numbers of the end.
        largest: a proved bound of ||end|| / ||start||.
    """
    nothing = [(Proved(math.inf), tuple(multipliers))] * len(pairs)
    raised = gram + gram.diagonal().max() * 1e-10 * torch.eye(len(gram), dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex((raised + raised.T) / 2)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        return nothing
    mix = torch.linalg.solve_triangular(factor, torch.eye(len(gram), dtype=torch.float64), upper=False)
    if not _moderate(mix.diagonal()):
        return nothing
    whole = prove(net.mixed(mix), multipliers)
    if whole.weights is None:
        return nothing
    found = []
    for first, second in pairs:
        wanted = torch.zeros(len(gram), dtype=torch.float64)
        wanted[first], wanted[second] = 1.0, -1.0
        w = factor.T @ wanted
        size = float(norm_up(w))
        rest = wanted - mix.T @ w
        rounding = up_mul(gamma(len(gram) + 2), up_add(1.0, up_mul(float(norm_up(mix.flatten())), size)), 2.0)
        left = up_mul(up_add(float(norm_up(rest)), rounding), largest)
        upper = up_add(up_mul(size, whole.upper), left)
        square = up_mul(upper, upper)
        scale = square / float(whole.weights)
        own = tuple(one * scale for one in multipliers)
        found.append((Proved(up_sqrt(square), torch.tensor([square], dtype=torch.float64)), own))
    return found


def _moderate(values: Tensor) -> bool:
    return bool(((values > 1 / _MOST) & (values < _MOST)).all())


def _checked(net: Neurons, multipliers: Sequence[Tensor]) -> list[Tensor] | None:
    """The multiplier of every number; None where they can't prove anything."""
    if len(multipliers) != len(net.layers):
        raise ValueError(f"multipliers: expected {len(net.layers)} tensors, got {len(multipliers)}")
    found = []
    for layer, given in zip(net.layers, multipliers, strict=True):
        if given.shape != (layer.multipliers,):
            raise ValueError(f"multipliers: expected {layer.multipliers} numbers, got shape {tuple(given.shape)}")
        if not _moderate(given):
            return None
        found.append(given[layer.tied])
    return found


def _value(net: Neurons, multipliers: Sequence[Tensor], shape: Tensor) -> float:
    """An estimate of the least factor of `shape` for which F >= 0; inf where there is none."""
    rest = least_form(net, multipliers)
    if rest is None:
        return math.inf
    root = shape.rsqrt()
    form = root[:, None] * rest * root
    return float(torch.linalg.eigvalsh(form)[-1]) if bool(torch.isfinite(form).all()) else math.inf


def _lower(parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Pairs of parts, the source of the first not below that of the second."""
    for left in parts:
        for right in parts:
            if left.source >= right.source:
                yield left, right


def _middle(layer: Layer, d: Tensor) -> Tensor:
    """c d, c the middle of the slopes, which is exact on their grid."""
    return (layer.low + layer.high) / 2 * d


def _reduced(net: Neurons, tau: Tensor) -> Neurons | None:
    """The part with y, ||y||^2 <= x^T T x, for the start, where fewer rows read it than it has numbers."""
    parts = net.start_parts
    if not 0 < net.start_rows < net.sizes[0]:
        return net
    root = tau.rsqrt()  # right to 4 units: the product with it to 6
    stacked = torch.cat([part.matrix for part in parts]) * root
    error = float(norm_up(torch.tensor([part.error for part in parts], dtype=torch.float64)))
    rounding = up_add(up_mul(8 * UNIT, float(norm_up(stacked.flatten()))), up_mul(float(stacked.numel()), _LOST))
    scale = power_of_two(stacked)
    error = up_mul(up_add(up_mul(error, float(root.max()), 1.01), rounding), scale)
    factor = covering(stacked * scale, up_add(error, up_mul(float(stacked.numel()), _LOST)))
    if factor is None:
        return None
    unscaled = factor / scale
    if not bool((unscaled * scale == factor).all()):  # where entries become subnormal
        return None
    return net.with_start(unscaled)


class _Matrix:
    """F's matrix, scaled by powers of two so that diagonals are near 1, and a bound of the norm of its errors."""

    def __init__(self, net: Neurons, held: list[Tensor], start: Tensor) -> None:
        self._net, self._held = net, held
        self.scales = [inverse_roots(start), *(inverse_roots(d) for d in held)]
        ends = torch.tensor([0, *net.sizes]).cumsum(0).tolist()
        self._slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._full = torch.zeros(ends[-1], ends[-1], dtype=torch.float64)
        self._errors: list[float] = []
        self._fill()

    def positive(
        self,
        start: Tensor,  # [start, start] symmetric, exact
    ) -> bool:
        """Whether F with this quadratic form of the start is proved to be positive semidefinite."""
        full, errors = self._full.clone(), list(self._errors)
        block = full[self._slices[0], self._slices[0]]
        block += start * self.scales[0][:, None] * self.scales[0]
        errors.append(up_mul(2 * UNIT, float(norm_up(block.flatten()))))
        error = up_add(*errors)
        if not error < 1:
            return False
        trace = float(full.diagonal().abs().sum())
        level = -(error * 1.01 + cholesky_factor(len(full), torch.float64) * trace * 1.5 + _LOST)
        return float(proved_below(full.neg_(), level)) <= -error

    def _fill(self) -> None:
        for k, (layer, d) in enumerate(zip(self._net.layers, self._held, strict=True), start=1):
            own = self.scales[k]
            self._add(k, k, torch.diag(d * own**2), 0.0)
            weights = _middle(layer, d) * own
            for part in layer.parts:
                block = -(weights[:, None] * (part.matrix * self.scales[part.source]))
                held = up_mul(float(weights.abs().max()), part.error, float(self.scales[part.source].max()), 1.01)
                rounding = up_add(
                    up_mul(4 * UNIT, float(norm_up(block.flatten()))), up_mul(float(block.numel()), _LOST)
                )
                self._add(k, part.source, block, up_add(held, rounding))
            inner = layer.low * layer.high * d
            if bool((inner != 0).any()):
                self._products(layer.parts, inner)
        self._products(self._net.output, -torch.ones(len(self._net.output[0].matrix), dtype=torch.float64))

    def _products(self, parts: Sequence[Part], inner: Tensor) -> None:
        """Add sum over l, m of P_l^T diag(inner) P_m, P the parts."""
        root = inner.abs().sqrt()
        size = {part.source: self.scales[part.source] for part in parts}
        norms = {p.source: float(norm_up((root[:, None] * p.matrix * size[p.source]).flatten())) * 1.01 for p in parts}
        if not all(norm < _LARGE for norm in norms.values()):
            self._errors.append(math.inf)
            return
        loose = {p.source: up_mul(float(root.max()), p.error, float(size[p.source].max()), 1.01) for p in parts}
        for left, right in _lower(parts):
            a, b = left.source, right.source
            block = (left.matrix * size[a]).T @ (inner[:, None] * (right.matrix * size[b]))
            rounding = up_mul(gamma(len(inner) + 4), norms[a], norms[b])
            held = up_add(up_mul(norms[a], loose[b]), up_mul(loose[a], norms[b]), up_mul(loose[a], loose[b]))
            self._add(a, b, block, up_add(rounding, held, up_mul(float(block.numel() * len(inner)), _LOST)))

    def _add(self, first: int, second: int, block: Tensor, error: float) -> None:
        """Add a block to the lower triangle, mirrored where it is off the diagonal; sums round once each."""
        rows, columns = self._slices[first], self._slices[second]
        target = self._full[rows, columns]
        target += block
        touched = float(norm_up(target.flatten()))
        error = error if float(norm_up(block.flatten())) < _LARGE else math.inf
        if first != second:
            self._full[columns, rows] = target.T
        self._errors.append(up_add(error, up_mul(2 * UNIT, touched)))


def _prove_l1(net: Neurons, multipliers: Sequence[Tensor], held: list[Tensor]) -> Proved:
    """By Q, what elimination leaves, raised on its diagonal."""
    rest = least_form(net, multipliers)
    if rest is None or not bool(torch.isfinite(rest).all()):
        return Proved(math.inf)
    rest = (rest + rest.T) / 2
    largest = float(rest.diagonal().max())
    if not 0 < largest < _MOST:
        return Proved(math.inf)
    matrix = _Matrix(net, held, torch.full((net.sizes[0],), largest, dtype=torch.float64))
    for attempt in range(_ATTEMPTS):
        raised = rest.clone()
        raised.diagonal().add_(largest * _FIRST * _STEP**attempt)
        if matrix.positive(raised):
            return Proved(up_sqrt(float(raised.diagonal().max())))
    return Proved(math.inf)

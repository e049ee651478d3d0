"""Linear maps of a network and their operator norms: dense, diagonal, re-indexing, chains and sums.

Every map keeps live tensors, so that the same object serves a differentiable estimate in training (`apply`) and a
proved bound for a certificate (`bounds`). Bounds are computed in float64 on the CPU, every operation rounded outward
(see `rounding`); what a map's tensors miss of the real operator is its `slack`, and every upper bound includes it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from .arithmetic import proving
from .rounding import (
    down_add,
    down_mul,
    gamma,
    largest_entry,
    norm_up,
    proved_norm,
    sum_up,
    unit,
    up_add,
    up_div,
    up_mul,
    up_sqrt,
)

NORMS = ("l2", "linf", "l1")

# Relative room left by estimates, such as lower ends from power iteration; no upper bound rests on it.
SAFETY = 1e-9

_NO_BOUND = "{}: too large to be made a matrix and no structured bound is known"
_TINY = torch.finfo(torch.float64).tiny

# A map is made into a matrix, and its norm taken exactly, up to these sizes.
_EXACT_SIDE = 1024
_EXACT_ENTRIES = 1 << 24


@dataclass(frozen=True)
class NormBounds:
    """A bracket `lower <= norm <= upper` of an operator norm; `method` names how `upper`, a proved bound, was found.

    What one needs to prove `upper` again: where it follows from the bounds of other maps, `pieces`, these maps with
    their bounds; where it is that of a convolution's torus, `torus`: (side, stride of the aliasing, twist 0 or 1/2) per
    spatial axis.
    """

    lower: float
    upper: float
    method: str
    pieces: tuple[tuple[LinearMap, NormBounds], ...] = field(default=(), repr=False, compare=False)
    torus: tuple[tuple[int, int, float], ...] = ()

    def widened(self, error: float) -> NormBounds:
        """The bracket for every operator within `error` >= 0, in the same norm, of the one that this is of."""
        if error == 0.0:
            return self
        return replace(self, lower=max(0.0, down_add(self.lower, -error)), upper=up_add(self.upper, error))


def check_norm(norm: str) -> None:
    """Raise ValueError where `norm` is none of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}; got {norm!r}")


class LinearMap(ABC):
    """A linear map between tensors of `in_shape` and `out_shape` (both without the batch).

    Must write: `apply` and the two shapes. Should write: `_structured`, a bound that needs no matrix, slack included.
    May write: `isometry`, and `fused`, which absorbs the map that comes before this one. A map is made into a matrix
    by applying it to unit vectors; its entries must then be right to `terms` roundings each. One whose `apply`
    subtracts numbers that cancel is to be built of `Chain`, `Sum` and `Concat`, which account for that.
    """

    in_shape: tuple[int, ...]
    isometry: bool = False  # norm at most 1 in l1, l2 and linf alike: moves entries about, drops or adds zeros
    composite: bool = False  # made of other maps: its own matrix can have a smaller norm than its structure shows
    # At least ||held - true|| in l1, l2 and linf alike, held: the operator that the tensors give. Infinite where a map
    # was made of live tensors, for an estimate: such a map has no bound.
    slack: float = 0.0

    @property
    @abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the image, without the batch."""

    @abstractmethod
    def apply(
        self,
        x: Tensor,  # [B, *in_shape]
    ) -> Tensor:  # [B, *out_shape]
        """The image of each row of the batch; differentiable in x and in the weights."""

    def adjoint(
        self,
        y: Tensor,  # [B, *out_shape]
    ) -> Tensor:  # [B, *in_shape]
        """The adjoint map, as the vector-Jacobian product of `apply`; differentiable where gradients are on."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = torch.zeros(y.shape[0], *self.in_shape, dtype=y.dtype, device=y.device, requires_grad=True)
            image = self.apply(x)
            return torch.autograd.grad(image, x, y.expand_as(image), create_graph=differentiable)[0]

    def fused(self, first: LinearMap) -> LinearMap | None:
        """`self` after `first` as one structured map, or None where no such form is known."""
        return None

    def followed_by(self, last: LinearMap) -> LinearMap | None:
        """`last` after `self` as one structured map, where `last` itself knows none (see `fused`)."""
        return None

    def plus(self, other: LinearMap) -> LinearMap | None:
        """`self + other` as one structured map, or None where no such form is known."""
        return None

    @property
    def terms(self) -> int:
        """Most roundings on a path from an input to an output of `apply`: n for an inner product of n terms."""
        return math.prod(self.in_shape) + 1

    @property
    def adjoint_terms(self) -> int:
        """As `terms`, for `adjoint`."""
        return math.prod(self.out_shape) + 1

    @property
    def matrix_terms(self) -> int:
        """Most roundings of one entry of the map's matrix, made of images of unit vectors; 0 where it holds them."""
        return max(self.terms, self.adjoint_terms)

    def absolute(self, norm: str) -> float:
        """Proved upper bound of the norm of |A|, the operator of absolute entries, of the held and of the true map.

        l1: the largest column sum; linf: the largest row sum; l2: the root of the product of these two.
        """
        if self.isometry:
            return 1.0
        if norm == "l2":
            columns, rows = self.absolute("l1"), self.absolute("linf")
            return min(max(columns, rows), up_sqrt(up_mul(columns, rows)))  # the product may overflow
        return up_add(float64(self)._absolute(norm), self.slack)

    def _absolute(self, norm: str) -> float:
        """`absolute` of the held operator of a float64 map in l1 or linf, where it is the norm itself."""
        structured = self._structured(norm)
        if structured is not None:
            return structured.upper
        matrix = _matrix(self)
        if matrix is None:
            raise ValueError(_NO_BOUND.format(_title(self)))
        return up_div(_largest_sum(matrix, norm), down_add(1.0, -gamma(self.matrix_terms)))

    def deviation(self, norm: str) -> float:
        """Upper bound of ||held - true||: the slack of one map, and what slack of the parts makes of a composed one."""
        return self.slack

    def underflow(self, norm: str) -> float:
        """Upper bound of the norm of what underflow can take on the paths of `apply` or `adjoint`."""
        size = math.prod(self.in_shape) + math.prod(self.out_shape)
        return up_mul(float(max(self.terms, self.adjoint_terms)), float(size), 2 * _TINY)

    def matrix_error(self, norm: str) -> float:
        """Upper bound of ||matrix - true||, the matrix made of images of unit vectors under `apply` or `adjoint`.

        Each entry is a sum of products along paths, each with at most n = `matrix_terms` relative roundings: it errs
        by at most gamma_n |A|, entrywise (ASNA, section 3.5), plus underflow, plus `deviation`.
        """
        rounded = self.matrix_terms
        own = up_add(up_mul(gamma(rounded), self.absolute(norm)), self.underflow(norm)) if rounded else 0.0
        return up_add(own, self.deviation(norm))

    def _structured(self, norm: str) -> NormBounds | None:
        return None

    @proving()
    def bounds(self, norm: str = "l2") -> NormBounds:
        """Bracket of the norm induced by `norm` on both sides; `upper` is proved, `lower` may be an estimate or 0.

        Raises:
            ValueError: an unknown norm, entries that are not finite, or neither structure nor size permits a bound.
        """
        check_norm(norm)
        if self.isometry:
            return NormBounds(1.0, 1.0, "isometry")
        exact = float64(self)
        check_bounded(exact)
        matrix = _materialised(exact, norm)
        if matrix is not None and not self.composite:
            return matrix
        structured = exact._structured(norm)
        if structured is None and matrix is None:
            raise ValueError(_NO_BOUND.format(_title(self)))
        if structured is None or matrix is None:
            return structured or matrix  # type: ignore[return-value]
        return matrix if matrix.upper < structured.upper else structured

    def rows(self) -> Tensor:
        """The map as a matrix [prod(out_shape), prod(in_shape)] in its own dtype, one adjoint per output."""
        like = like_of(self)
        size = math.prod(self.out_shape)
        basis = torch.eye(size, dtype=like.dtype, device=like.device)
        return self.adjoint(basis.reshape(size, *self.out_shape)).flatten(1)


def converted(linear: LinearMap, function: Callable[[Tensor], Tensor]) -> LinearMap:
    """The same map with `function` applied to each of its tensors."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, LinearMap):
            return converted(value, function)
        return tuple(convert(part) for part in value) if isinstance(value, tuple) else value

    return replace(linear, **{name: convert(value) for name, value in _fields(linear)})  # type: ignore[type-var]


def float64(linear: LinearMap) -> LinearMap:
    """The same map with detached float64 tensors on the CPU (an exact conversion of any float type)."""
    return converted(linear, _float64)


def _float64(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        raise ValueError(f"weights: expected real numbers, got {tensor.dtype}")
    return tensor.detach().to("cpu", torch.float64)


def _title(linear: LinearMap) -> str:
    return f"operator {type(linear).__name__} of shape {linear.in_shape} -> {linear.out_shape}"


def _fields(linear: LinearMap) -> list[tuple[str, object]]:
    return [(f.name, getattr(linear, f.name)) for f in fields(linear) if f.init]  # type: ignore[arg-type]


def _tensors(linear: LinearMap) -> list[Tensor]:
    found: list[Tensor] = []
    for _, value in _fields(linear):
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, LinearMap):
                found += _tensors(part)
    return found


def like_of(linear: LinearMap) -> Tensor:
    """A detached tensor with the map's dtype and device; float64 on the CPU for a map without weights."""
    return next((t.detach() for t in _tensors(linear)), torch.zeros((), dtype=torch.float64))


def _matrix(linear: LinearMap) -> Tensor | None:
    """The matrix [out, in] of a float64 map, by unit vectors on its smaller side; None where it is too large."""
    inputs, outputs = math.prod(linear.in_shape), math.prod(linear.out_shape)
    if min(inputs, outputs) > _EXACT_SIDE or inputs * outputs > _EXACT_ENTRIES:
        return None
    if inputs > outputs:
        return linear.rows()
    basis = torch.eye(inputs, dtype=torch.float64)
    return linear.apply(basis.reshape(inputs, *linear.in_shape)).flatten(1).T


def _materialised(linear: LinearMap, norm: str) -> NormBounds | None:
    """Bracket of the true operator from its matrix."""
    matrix = _matrix(linear)
    return None if matrix is None else matrix_bounds(matrix, norm, "materialised").widened(linear.matrix_error(norm))


def _largest_sum(matrix: Tensor, norm: str) -> float:
    """Upper bound of the largest row sum (linf) or column sum (l1) of |matrix|."""
    return float(sum_up(matrix, 1 if norm == "linf" else 0).max()) if matrix.numel() else 0.0


def matrix_bounds(
    matrix: Tensor,  # [out, in]
    norm: str,
    method: str,
) -> NormBounds:
    """Bracket of a matrix's norm: largest singular value (l2), row sum (linf) or column sum (l1) of |matrix|.

    Proved, both ends: see `rounding.proved_norm` for l2; sums of n terms err by at most gamma_n.
    """
    matrix = matrix.detach().to("cpu", torch.float64)
    if norm == "l2":
        proof = proved_norm(matrix)
        return NormBounds(proof.lower, proof.upper, method)
    upper = _largest_sum(matrix, norm)
    return NormBounds(down_mul(upper, down_add(1.0, -gamma(4 * max(matrix.shape, default=0) + 32))), upper, method)


def widest(linear: LinearMap) -> float:
    """The larger of `absolute` in l1 and linf, which bounds the l2 norm too."""
    return max(linear.absolute("l1"), linear.absolute("linf"))


def rounding_slack(held: LinearMap, roundings: int = 1) -> float:
    """Slack of a map whose entries each took up to n `roundings` in their own type: gamma_n |held|, and underflow."""
    tensors = _tensors(held)
    kinds = {tensor.dtype for tensor in tensors}
    relative = gamma(roundings + 1, max(unit(kind) for kind in kinds))
    lost = up_mul(float(sum(t.numel() for t in tensors)), 4.0 * roundings, max(torch.finfo(k).tiny for k in kinds))
    return up_add(up_mul(relative, widest(held)), lost)


def product_slack(held: LinearMap, first: LinearMap, last: LinearMap) -> float:
    """Slack of `held`, the rounded entrywise products of `last` and a diagonal map, either way round.

    (last + E)(first + F) - held is the rounding of the products, E first, last F and E F.
    """
    if _live(held):
        return math.inf
    unrounded = any(isinstance(m, Diagonal) and _unit_factors(m.scale) for m in (first, last))
    inherited = [up_mul(a.slack, widest(b)) for a, b in ((first, last), (last, first)) if a.slack]
    return up_add(0.0 if unrounded else rounding_slack(held), *inherited)


def sum_slack(held: LinearMap, *parts: LinearMap) -> float:
    """Slack of `held`, the rounded entrywise sum of some maps."""
    return math.inf if _live(held) else up_add(rounding_slack(held), *(part.slack for part in parts))


def _live(linear: LinearMap) -> bool:
    """Whether the map is part of an estimate that gradients follow, where slack would be a waste of time."""
    return any(tensor.requires_grad for tensor in _tensors(linear))


def _unit_factors(scale: Tensor) -> bool:
    """Whether products with `scale` are exact: all entries 1, 0 or -1."""
    return bool(((scale == 0) | (scale.abs() == 1)).all())


@dataclass(frozen=True)
class Dense(LinearMap):
    """`x @ weight.T` on the last axis. Norm: that of the matrix, whatever the other axes."""

    weight: Tensor  # [out, in]
    in_shape: tuple[int, ...]
    slack: float = 0.0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """All axes but the last as they were."""
        return (*self.in_shape[:-1], self.weight.shape[0])

    @property
    def terms(self) -> int:
        """The inner length."""
        return self.weight.shape[1]

    @property
    def adjoint_terms(self) -> int:
        """The number of rows."""
        return self.weight.shape[0]

    @property
    def matrix_terms(self) -> int:
        """None: a unit vector gives a column as it is."""
        return 0

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return functional.linear(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        """See `LinearMap.adjoint`."""
        return y @ self.weight

    def fused(self, first: LinearMap) -> LinearMap | None:
        """Absorbs a diagonal map along the last axis (a product of two dense maps could cancel, and is left apart)."""
        if isinstance(first, Diagonal) and len(self.in_shape) == 1:
            held = Dense(self.weight * first.scale.expand(self.in_shape), first.in_shape)
            return replace(held, slack=product_slack(held, first, self))
        return None

    def _absolute(self, norm: str) -> float:
        return _largest_sum(self.weight, norm)

    def _structured(self, norm: str) -> NormBounds:
        return matrix_bounds(self.weight, norm, "dense").widened(self.slack)

    @proving()
    def bounds(self, norm: str = "l2") -> NormBounds:
        """The bracket of the matrix; see `LinearMap.bounds`."""
        check_norm(norm)
        check_bounded(self)
        return self._structured(norm)


def check_bounded(linear: LinearMap) -> None:
    """Raise ValueError where a tensor holds NaN, infinity or complex numbers, or a map was fused for an estimate."""
    if not all(math.isfinite(largest_entry(tensor)) for tensor in _tensors(linear)):
        raise ValueError("weights: expected finite numbers; got NaN or infinity")
    float64(linear)  # refuses complex numbers
    if not linear.deviation("l2") < math.inf:
        raise ValueError(f"{_title(linear)}: its slack is infinite; expected maps fused without gradient and overflow")


@dataclass(frozen=True)
class Diagonal(LinearMap):
    """`scale * x`, `scale` broadcast over `in_shape` (a number, a channel vector [C, 1, 1], ...). Norm: max |scale|."""

    scale: Tensor
    in_shape: tuple[int, ...]
    isometry: bool = False
    slack: float = 0.0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """As `in_shape`."""
        return self.in_shape

    @property
    def terms(self) -> int:
        """One product."""
        return 1

    @property
    def adjoint_terms(self) -> int:
        """One product."""
        return 1

    @property
    def matrix_terms(self) -> int:
        """None: a unit vector gives an entry as it is."""
        return 0

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return x * self.scale.to(x.dtype)

    def fused(self, first: LinearMap) -> LinearMap | None:
        """Absorbs a diagonal map, and scales the rows of a dense one."""
        if isinstance(first, Diagonal):
            held: Diagonal | Dense = Diagonal(self.scale * first.scale, self.in_shape)
        elif isinstance(first, Dense) and len(self.in_shape) == 1:
            held = Dense(self.scale.expand(self.in_shape)[:, None] * first.weight, first.in_shape)
        else:
            return None
        return replace(held, slack=product_slack(held, first, self))

    def plus(self, other: LinearMap) -> LinearMap | None:
        """Adds a diagonal map of the same shape."""
        if isinstance(other, Diagonal):
            held = Diagonal(self.scale + other.scale, self.in_shape)
            return replace(held, slack=sum_slack(held, self, other))
        return other.plus(self)

    def _absolute(self, norm: str) -> float:
        return largest_entry(self.scale)

    def _structured(self, norm: str) -> NormBounds:
        value = largest_entry(self.scale)
        return NormBounds(value, value, "diagonal").widened(self.slack)


def identity(shape: tuple[int, ...]) -> Diagonal:
    """The identity, in a form that neighbours absorb."""
    return Diagonal(torch.ones((), dtype=torch.float64), shape, isometry=True)


@dataclass(frozen=True)
class Reindex(LinearMap):
    """A map that only moves entries, or adds zeros: reshape, flatten, pixel (un)shuffle, zero padding. Norm: 1."""

    function: Callable[[Tensor], Tensor]
    in_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    isometry: bool = True

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape given as `image_shape`."""
        return self.image_shape

    @property
    def terms(self) -> int:
        """None."""
        return 0

    @property
    def adjoint_terms(self) -> int:
        """None."""
        return 0

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return self.function(x)


@dataclass(frozen=True)
class Channelwise(LinearMap):
    """The same linear map on every channel: norm that of one channel's matrix, e.g. adaptive average pooling."""

    function: Callable[[Tensor], Tensor]
    in_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    slack: float = 0.0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape given as `image_shape`."""
        return self.image_shape

    @property
    def terms(self) -> int:
        """As many as one channel has entries, and two for a weight."""
        return math.prod(self.in_shape[1:]) + 2

    @property
    def adjoint_terms(self) -> int:
        """As many as one channel's image has entries, and two for a weight."""
        return math.prod(self.image_shape[1:]) + 2

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return self.function(x)

    def _structured(self, norm: str) -> NormBounds | None:
        if self.in_shape[0] == 1:
            return None
        one = replace(self, in_shape=(1, *self.in_shape[1:]), image_shape=(1, *self.image_shape[1:]))
        return _materialised(one, norm)


@dataclass(frozen=True)
class Chain(LinearMap):
    """`maps` one after another, first map first. Norm: the smaller of the product and, where small, the matrix's."""

    maps: tuple[LinearMap, ...]
    composite: bool = True

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape that the first map takes."""
        return self.maps[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape that the last map gives."""
        return self.maps[-1].out_shape

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        for linear in self.maps:
            x = linear.apply(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """See `LinearMap.adjoint`."""
        for linear in reversed(self.maps):
            y = linear.adjoint(y)
        return y

    @property
    def terms(self) -> int:
        """The sum over the maps."""
        return sum(linear.terms for linear in self.maps)

    @property
    def adjoint_terms(self) -> int:
        """The sum over the maps."""
        return sum(linear.adjoint_terms for linear in self.maps)

    def absolute(self, norm: str) -> float:
        """The product over the maps: |A B| <= |A| |B|."""
        return up_mul(*(linear.absolute(norm) for linear in self.maps))

    def deviation(self, norm: str) -> float:
        """||A B - (A + E)(B + F)|| <= ||E|| ||B + F|| + ||A|| ||F||, map by map."""
        parts = [linear.deviation(norm) for linear in self.maps]
        if not any(parts):
            return 0.0
        total, before = 0.0, 1.0
        for own, linear in zip(parts, self.maps, strict=True):
            size = linear.absolute(norm)
            total, before = up_add(up_mul(own, before), up_mul(size, total)), up_mul(size, before)
        return total

    def underflow(self, norm: str) -> float:
        """That of each map, times all others that enlarge it."""
        growth = up_mul(*(max(1.0, linear.absolute(norm)) for linear in self.maps))
        total = up_add(*(linear.underflow(norm) for linear in self.maps))
        return up_mul(total, growth) if growth < math.inf else math.inf

    def _structured(self, norm: str) -> NormBounds | None:
        parts = [linear.bounds(norm) for linear in self.maps]
        upper = up_mul(*(part.upper for part in parts))
        method = " * ".join(part.method for part in parts if part.method != "isometry")
        return NormBounds(0.0, upper, method, tuple(zip(self.maps, parts, strict=True)))

    @proving()
    def bounds(self, norm: str = "l2") -> NormBounds:
        """As `LinearMap.bounds`; one map beside isometries needs no matrix of its own."""
        if sum(not linear.isometry for linear in self.maps) > 1:
            return super().bounds(norm)
        pieces = tuple((linear, linear.bounds(norm)) for linear in self.maps)
        real = next((bounds for linear, bounds in pieces if not linear.isometry), pieces[0][1])
        sizes = {
            math.prod(shape) for linear in self.maps if linear.isometry for shape in (linear.in_shape, linear.out_shape)
        }
        # where zeros are added, the part's top vector may lie in what is never reached
        lower = real.lower if len(sizes) <= 1 else 0.0
        return replace(real, lower=lower, pieces=pieces, torus=())


@dataclass(frozen=True)
class Sum(LinearMap):
    """The sum of maps from one input, e.g. a residual block without activation. Norm: at most the sum of norms."""

    maps: tuple[LinearMap, ...]
    composite: bool = True

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape that every map takes."""
        return self.maps[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape that the sum has, after broadcasting."""
        return tuple(torch.broadcast_shapes(*(linear.out_shape for linear in self.maps)))  # type: ignore[no-untyped-call]

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        total = self.maps[0].apply(x)
        for linear in self.maps[1:]:
            total = total + linear.apply(x)
        return total

    @property
    def terms(self) -> int:
        """Those of the longest map, and the additions."""
        return max(linear.terms for linear in self.maps) + len(self.maps) - 1

    @property
    def adjoint_terms(self) -> int:
        """Those of the longest map, the additions, and the sums over what was broadcast."""
        return max(linear.adjoint_terms + self._copies(linear) for linear in self.maps) + len(self.maps) - 1

    def absolute(self, norm: str) -> float:
        """The sum over the maps."""
        return up_add(*(up_mul(linear.absolute(norm), self._spread(linear, norm)) for linear in self.maps))

    def deviation(self, norm: str) -> float:
        """The sum over the maps."""
        return up_add(*(up_mul(linear.deviation(norm), self._spread(linear, norm)) for linear in self.maps))

    def underflow(self, norm: str) -> float:
        """The sum over the maps."""
        return up_add(*(up_mul(linear.underflow(norm), self._spread(linear, norm)) for linear in self.maps))

    def _copies(self, linear: LinearMap) -> int:
        """How often broadcasting repeats one output of a map."""
        return math.prod(self.out_shape) // max(1, math.prod(linear.out_shape))

    def _spread(self, linear: LinearMap, norm: str) -> float:
        """The norm of the broadcast that brings a map's outputs to the shape of the sum."""
        copies = self._copies(linear)
        if copies == 1 or norm == "linf":
            return 1.0
        return float(copies) if norm == "l1" else up_sqrt(float(copies))

    def _structured(self, norm: str) -> NormBounds | None:
        pieces = tuple((linear, linear.bounds(norm)) for linear in self.maps)
        upper = up_add(*(up_mul(bounds.upper, self._spread(linear, norm)) for linear, bounds in pieces))
        return NormBounds(0.0, upper, "sum", pieces)


@dataclass(frozen=True)
class Concat(LinearMap):
    """Maps from one input, joined along an axis. Norm: root of squares (l2), maximum (linf), sum (l1)."""

    maps: tuple[LinearMap, ...]
    axis: int  # counted without the batch
    composite: bool = True

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape that every map takes."""
        return self.maps[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The joined shape."""
        shape = list(self.maps[0].out_shape)
        shape[self.axis] = sum(linear.out_shape[self.axis] for linear in self.maps)
        return tuple(shape)

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return torch.cat([linear.apply(x) for linear in self.maps], dim=self.axis + 1)

    @property
    def terms(self) -> int:
        """Those of the longest map."""
        return max(linear.terms for linear in self.maps)

    @property
    def adjoint_terms(self) -> int:
        """Those of the longest map, and the additions."""
        return max(linear.adjoint_terms for linear in self.maps) + len(self.maps) - 1

    def absolute(self, norm: str) -> float:
        """The maps' own, joined."""
        return joined([linear.absolute(norm) for linear in self.maps], norm)

    def deviation(self, norm: str) -> float:
        """The maps' own, joined."""
        return joined([linear.deviation(norm) for linear in self.maps], norm)

    def underflow(self, norm: str) -> float:
        """The maps' own, joined."""
        return joined([linear.underflow(norm) for linear in self.maps], norm)

    def _structured(self, norm: str) -> NormBounds:
        pieces = tuple((linear, linear.bounds(norm)) for linear in self.maps)
        return NormBounds(0.0, joined([bounds.upper for _, bounds in pieces], norm), "concat", pieces)


def joined(
    constants: list[float],
    norm: str,
) -> float:
    """Lipschitz constant of a concatenation from those of its parts, rounded up: root of squares, maximum or sum."""
    if norm == "l2":
        return float(norm_up(torch.tensor(constants, dtype=torch.float64)))
    return max(constants) if norm == "linf" else up_add(*constants)


def chain(maps: list[LinearMap]) -> LinearMap:
    """The composition of maps, neighbours fused into one structured map where such a form is known."""
    flat: list[LinearMap] = []
    for linear in maps:
        for part in linear.maps if isinstance(linear, Chain) else (linear,):
            merged = (part.fused(flat[-1]) or flat[-1].followed_by(part)) if flat else None
            if merged is not None:
                flat[-1] = merged
            else:
                flat.append(part)
    return flat[0] if len(flat) == 1 else Chain(tuple(flat))


def add(first: LinearMap, second: LinearMap) -> LinearMap:
    """The sum of two maps of one input, as one structured map where such a form is known."""
    if first.in_shape == second.in_shape and first.out_shape == second.out_shape:
        merged = first.plus(second)
        if merged is not None:
            return merged
    return Sum((first, second))

"""Linear maps of a network and their operator norms: dense, diagonal, re-indexing, chains and sums.

Every map keeps live tensors, so that the same object serves a differentiable estimate in training (`apply`) and a
float64 bound for a certificate (`bounds`). Bounds are computed in float64 and widened by `SAFETY`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

NORMS = ("l2", "linf", "l1")

# Relative outward widening of every float64 bound. The eigenvalue solvers used here are backward stable with an error
# of a modest polynomial in n times 1.1e-16; 1e-9 covers that for every n up to some 10^4.
SAFETY = 1e-9

# Rounding of composed maps is relative to the product of their norms, not to the norm of the product, which may cancel.
CANCELLATION = 1e-12

# A map is made into a matrix, and its norm taken exactly, up to these sizes.
_EXACT_SIDE = 1024
_EXACT_ENTRIES = 1 << 24

# Blocks whose eigenvalues are found at once, and the relative width of the screen that the others must pass: far above
# the rounding of a Cholesky factorisation (some n^2 * 1e-16), far below SAFETY.
_SOLVED_AT_ONCE = 4
_SCREEN = 1e-10


@dataclass(frozen=True)
class NormBounds:
    """A bracket `lower <= norm <= upper` of an operator norm; `method` names how `upper` was found."""

    lower: float
    upper: float
    method: str

    def scaled(self, factor: float) -> NormBounds:
        """The bracket of `factor * map`, factor >= 0."""
        return NormBounds(self.lower * factor, self.upper * factor, self.method)


def check_norm(norm: str) -> None:
    """Raise ValueError where `norm` is none of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}; got {norm!r}")


class LinearMap(ABC):
    """A linear map between tensors of `in_shape` and `out_shape` (both without the batch).

    Must write: `apply` and the two shapes. Should write: `_structured`, a bound that needs no matrix. May write:
    `isometry`, and `fused`, which absorbs the map that comes before this one.
    """

    in_shape: tuple[int, ...]
    isometry: bool = False  # norm at most 1 in l1, l2 and linf alike: moves entries about, drops or adds zeros
    composite: bool = False  # made of other maps: its own matrix can have a smaller norm than its structure shows

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

    def _structured(self, norm: str) -> NormBounds | None:
        return None

    def bounds(self, norm: str = "l2") -> NormBounds:
        """Bracket of the norm induced by `norm` on both sides; ValueError where neither structure nor size permits."""
        check_norm(norm)
        if self.isometry:
            return NormBounds(1.0, 1.0, "isometry")
        exact = float64(self)
        for tensor in _tensors(exact):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError("weights: expected finite numbers; got NaN or infinity")
        matrix = _materialised(exact, norm)
        if matrix is not None and not self.composite:
            return matrix
        structured = exact._structured(norm)
        if structured is None and matrix is None:
            raise ValueError(
                f"operator {type(self).__name__} of shape {self.in_shape} -> {self.out_shape}: too large to be made a "
                "matrix and no structured bound is known"
            )
        if structured is None or matrix is None:
            return structured or matrix  # type: ignore[return-value]
        upper = matrix.upper + CANCELLATION * magnitude(exact, norm)
        return dataclasses.replace(matrix, upper=upper) if upper < structured.upper else structured

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

    return dataclasses.replace(linear, **{name: convert(value) for name, value in _fields(linear)})  # type: ignore[type-var]


def float64(linear: LinearMap) -> LinearMap:
    """The same map with detached float64 tensors (an exact conversion of any float type)."""
    return converted(linear, lambda tensor: tensor.detach().double())


def _fields(linear: LinearMap) -> list[tuple[str, object]]:
    return [(f.name, getattr(linear, f.name)) for f in dataclasses.fields(linear) if f.init]  # type: ignore[arg-type]


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


def _materialised(linear: LinearMap, norm: str) -> NormBounds | None:
    inputs, outputs = math.prod(linear.in_shape), math.prod(linear.out_shape)
    if min(inputs, outputs) > _EXACT_SIDE or inputs * outputs > _EXACT_ENTRIES:
        return None
    if inputs <= outputs:
        basis = torch.eye(inputs, dtype=torch.float64, device=like_of(linear).device)
        matrix = linear.apply(basis.reshape(inputs, *linear.in_shape)).flatten(1).T
    else:
        matrix = linear.rows()
    return matrix_bounds(matrix, norm, "materialised")


def matrix_bounds(
    matrix: Tensor,  # [out, in]
    norm: str,
    method: str,
) -> NormBounds:
    """Bracket of a matrix's norm: largest singular value (l2), row sum (linf) or column sum (l1) of |matrix|.

    The l2 norm is the root of the largest eigenvalue of the smaller Gram matrix, which is well conditioned, so that it
    is right to n * 1e-16 relative; the matrix is first scaled to entries of at most 1, against under- and overflow.
    """
    matrix = matrix.detach().double()
    if norm == "l2":
        value = largest_norm(matrix)
    else:
        value = float(matrix.abs().sum(1 if norm == "linf" else 0).max()) if matrix.numel() else 0.0
    return NormBounds(value * (1 - SAFETY), value * (1 + SAFETY), method)


def largest_norm(
    blocks: Tensor,  # [m, n] or [B, m, n], real or complex
    floor: float = 0.0,
    give_up: float = math.inf,
) -> float:
    """max(floor, the largest spectral norm of the blocks): the root of the top eigenvalue of the smaller Gram matrix.

    A batch is screened: the blocks of largest Frobenius norm are solved first; a Cholesky factorisation of
    s^2 I - G, which exists only for norm < s, then rules out every block but those above the best so far, at a fraction
    of the cost of their eigenvalues. Right to 1e-10 relative. A search that finds `give_up` or more may return that
    instead.
    """
    scale = float(_real(blocks).abs().max()) if blocks.numel() else 0.0
    if scale == 0.0:
        return floor
    scaled = blocks / scale
    gram = scaled @ scaled.mH if scaled.shape[-2] <= scaled.shape[-1] else scaled.mH @ scaled
    if gram.dim() == 2:
        return max(floor, scale * math.sqrt(_top_eigenvalue(gram)))
    return scale * math.sqrt(_largest_eigenvalue(gram, (floor / scale) ** 2, (give_up / scale) ** 2))


def _real(entries: Tensor) -> Tensor:
    return torch.view_as_real(entries) if entries.is_complex() else entries


def _top_eigenvalue(gram: Tensor) -> float:
    return max(0.0, float(torch.linalg.eigvalsh(gram)[..., -1].max()))


def _largest_eigenvalue(gram: Tensor, best: float, give_up: float) -> float:
    """max(best, the top eigenvalue of the batch [B, n, n]) to 1e-10 relative; see `largest_norm`."""
    estimates = _real(gram).square().flatten(1).sum(1)
    first = estimates.topk(min(len(gram), _SOLVED_AT_ONCE)).indices
    best = max(best, _top_eigenvalue(gram[first]))
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    while len(gram) and best < give_up:
        above = torch.linalg.cholesky_ex(best * (1 + _SCREEN) * unit - gram).info > 0
        gram, estimates = gram[above], estimates[above]
        order = estimates.argsort(descending=True)
        chosen, rest = order[:_SOLVED_AT_ONCE], order[_SOLVED_AT_ONCE:]
        if len(chosen):
            best = max(best, _top_eigenvalue(gram[chosen]))
        gram, estimates = gram[rest], estimates[rest]
    return best


@dataclass(frozen=True)
class Dense(LinearMap):
    """`x @ weight.T` on the last axis. Norm: that of the matrix, whatever the other axes."""

    weight: Tensor  # [out, in]
    in_shape: tuple[int, ...]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """All axes but the last as they were."""
        return (*self.in_shape[:-1], self.weight.shape[0])

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return functional.linear(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        """See `LinearMap.adjoint`."""
        return y @ self.weight

    def fused(self, first: LinearMap) -> LinearMap | None:
        """Absorbs a diagonal map along the last axis (a product of two dense maps could cancel, and is left apart)."""
        if isinstance(first, Diagonal) and len(self.in_shape) == 1:
            return Dense(self.weight * first.scale.expand(self.in_shape), first.in_shape)
        return None

    def _structured(self, norm: str) -> NormBounds:
        return matrix_bounds(self.weight, norm, "dense")

    def bounds(self, norm: str = "l2") -> NormBounds:
        """The exact bracket of the matrix; see `LinearMap.bounds`."""
        check_norm(norm)
        check_finite(self.weight)
        return self._structured(norm)


def check_finite(weight: Tensor) -> None:
    """Raise ValueError where a weight holds NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weights: expected finite numbers; got NaN or infinity")


@dataclass(frozen=True)
class Diagonal(LinearMap):
    """`scale * x`, `scale` broadcast over `in_shape` (a number, a channel vector [C, 1, 1], ...). Norm: max |scale|."""

    scale: Tensor
    in_shape: tuple[int, ...]
    isometry: bool = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        """As `in_shape`."""
        return self.in_shape

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return x * self.scale.to(x.dtype)

    def fused(self, first: LinearMap) -> LinearMap | None:
        """Absorbs a diagonal map, and scales the rows of a dense one."""
        if isinstance(first, Diagonal):
            return Diagonal(self.scale * first.scale, self.in_shape)
        if isinstance(first, Dense) and len(self.in_shape) == 1:
            return Dense(self.scale.expand(self.in_shape)[:, None] * first.weight, first.in_shape)
        return None

    def plus(self, other: LinearMap) -> LinearMap | None:
        """Adds a diagonal map of the same shape."""
        if isinstance(other, Diagonal):
            return Diagonal(self.scale + other.scale, self.in_shape)
        return other.plus(self)

    def _structured(self, norm: str) -> NormBounds:
        value = float(self.scale.abs().max())
        return NormBounds(value * (1 - SAFETY), value * (1 + SAFETY), "diagonal")


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

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return self.function(x)


@dataclass(frozen=True)
class Channelwise(LinearMap):
    """The same linear map on every channel: norm that of one channel's matrix, e.g. adaptive average pooling."""

    function: Callable[[Tensor], Tensor]
    in_shape: tuple[int, ...]
    image_shape: tuple[int, ...]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape given as `image_shape`."""
        return self.image_shape

    def apply(self, x: Tensor) -> Tensor:
        """See `LinearMap.apply`."""
        return self.function(x)

    def _structured(self, norm: str) -> NormBounds | None:
        if self.in_shape[0] == 1:
            return None
        one = Channelwise(self.function, (1, *self.in_shape[1:]), (1, *self.image_shape[1:]))
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

    def _structured(self, norm: str) -> NormBounds | None:
        parts = [linear.bounds(norm) for linear in self.maps]
        upper = math.prod(part.upper for part in parts)
        return NormBounds(0.0, upper * (1 + SAFETY), " * ".join(p.method for p in parts if p.method != "isometry"))

    def bounds(self, norm: str = "l2") -> NormBounds:
        """As `LinearMap.bounds`; one map beside isometries needs no matrix of its own."""
        real = [linear for linear in self.maps if not linear.isometry]
        if len(real) <= 1:
            return real[0].bounds(norm) if real else NormBounds(1.0, 1.0, "isometry")
        return super().bounds(norm)


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

    def _structured(self, norm: str) -> NormBounds | None:
        if any(linear.out_shape != self.out_shape for linear in self.maps):
            return None
        upper = sum(linear.bounds(norm).upper for linear in self.maps)
        return NormBounds(0.0, upper * (1 + SAFETY), "sum")


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

    def _structured(self, norm: str) -> NormBounds:
        uppers = [linear.bounds(norm).upper for linear in self.maps]
        return NormBounds(0.0, joined(uppers, norm) * (1 + SAFETY), "concat")


def magnitude(linear: LinearMap, norm: str) -> float:
    """The norm with nothing cancelled, from the norms of all single maps: rounding is relative to it."""
    if isinstance(linear, Chain):
        return math.prod(magnitude(part, norm) for part in linear.maps)
    if isinstance(linear, Sum):
        return sum(magnitude(part, norm) for part in linear.maps)
    if isinstance(linear, Concat):
        return joined([magnitude(part, norm) for part in linear.maps], norm)
    return linear.bounds(norm).upper


def joined(
    constants: list[float],
    norm: str,
) -> float:
    """Lipschitz constant of a concatenation from those of its parts: root of squares, maximum or sum."""
    if norm == "l2":
        return math.hypot(*constants)
    return max(constants) if norm == "linf" else sum(constants)


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

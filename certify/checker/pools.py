"""The checker's own table of average pools and means: exact weights, windows from their definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flint import arb, fmpq, fmpz

from .balls import BITS, Fixed, from_balls, integers
from .convolution import Convolution
from .maps import Indices, Shape, Windows
from .reading import Affine, Reading, tuple_of
from .rounds import Rounds


@dataclass(frozen=True)
class _Pool:
    """Settings of an average pool, module or function."""

    kernel: Shape
    stride: Shape
    padding: Shape
    ceil: bool
    counts_padding: bool
    divisor: int | None


def _pool_of(use: Reading) -> _Pool:
    dims = len(use.in_shape) - 1
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    defaults = (None, None, 0, False, True, None)
    if use.module is not None:
        values = [getattr(use.layer, name, default) for name, default in zip(names, defaults, strict=True)]
    else:
        values = [use.argument(i, name, default) for i, (name, default) in enumerate(zip(names, defaults, strict=True))]
    kernel, stride, padding, ceil, counts, divisor = values
    stride = kernel if stride is None or stride == () else stride
    return _Pool(
        tuple_of(kernel, dims), tuple_of(stride, dims), tuple_of(padding, dims), bool(ceil), bool(counts), divisor
    )


def _rounds(count: int, *, wide: bool = True) -> Rounds:
    """The sum of `count` numbers, at most sqrt(count) times their norm, and its division."""
    return Rounds("dot", count + 2, reach=arb(count).sqrt(), wide=wide)


def average_pool(use: Reading) -> Affine:
    """Plain pools are convolutions of one weight; others are means of windows with divisors of their own."""
    pool, dims = _pool_of(use), len(use.in_shape) - 1
    if dims not in (1, 2, 3) or use.in_shape[0] != use.out_shape[0]:
        raise use.refused(f"inputs {use.in_shape}")
    rounds = _rounds(math.prod(pool.kernel))
    if not pool.ceil and not pool.divisor and (pool.counts_padding or not any(pool.padding)):
        weight = from_balls([arb(fmpq(1, math.prod(pool.kernel)))], (1,) * (dims + 2))
        kernels = weight.moved(np.broadcast_to(weight.mant, (use.in_shape[0], 1, *pool.kernel)))
        padding = tuple((p, p) for p in pool.padding)
        return Affine(
            Convolution(
                kernels, use.in_shape, use.out_shape, pool.stride, padding, (1,) * dims, groups=use.in_shape[0]
            ),
            None,
            rounds,
        )
    axes, sizes = [], []
    for axis in range(dims):
        size, outputs = use.in_shape[axis + 1], use.out_shape[axis + 1]
        starts = [o * pool.stride[axis] - pool.padding[axis] for o in range(outputs)]
        ends = [min(s + pool.kernel[axis], size + pool.padding[axis]) for s in starts]
        axes.append([range(max(0, s), min(size, e)) for s, e in zip(starts, ends, strict=True)])
        sizes.append([e - s for s, e in zip(starts, ends, strict=True)])
    counts = [math.prod(window) for window in itertools.product(*sizes)] if pool.counts_padding else None
    if pool.divisor:
        counts = [int(pool.divisor)] * math.prod(use.out_shape[1:])
    return Affine(_windows(use, axes, counts), None, rounds)


def _windows(use: Reading, axes: Sequence[Sequence[range]], divisors: list[int] | None) -> Windows:
    """Means over products of ranges per axis, divided by the number of entries where no divisors are given."""
    places: Indices = np.arange(math.prod(use.in_shape[1:])).reshape(use.in_shape[1:])
    reads = [places[np.ix_(*(list(r) for r in window))].reshape(-1) for window in itertools.product(*axes)]
    index = np.full((len(reads), max(map(len, reads))), -1, dtype=np.int64)
    for row, read in zip(index, reads, strict=True):
        row[: len(read)] = read
    counts = [len(read) for read in reads] if divisors is None else divisors
    if not all(count > 0 for count in counts):
        raise use.refused("an empty window")
    weight = Fixed(integers([fmpz((1 << BITS) // count) for count in counts], (len(counts),)), -BITS, fmpz(1))
    return Windows(index, weight, use.in_shape, use.out_shape)


def adaptive_pool(use: Reading) -> Affine:
    """Means from floor(i n / o) to ceil((i + 1) n / o) on each axis."""
    axes = [
        [range(i * n // o, -(-(i + 1) * n // o)) for i in range(o)]
        for n, o in zip(use.in_shape[1:], use.out_shape[1:], strict=True)
    ]
    terms = math.prod(max(map(len, ranges)) for ranges in axes)
    if len(use.in_shape) < 2 or use.in_shape[0] != use.out_shape[0]:
        raise use.refused(f"inputs {use.in_shape}")
    # over three axes, torch sums numbers of a half type in that type
    return Affine(_windows(use, axes, None), None, _rounds(terms, wide=len(axes) != 3))


def mean(use: Reading) -> Affine:
    """The mean over axes behind the channels."""
    axes, rank = use.argument(0, "dim"), len(use.in_shape) + 1
    if axes is None or use.kwargs.keys() - {"dim", "keepdim"} or len(use.args) > 2:
        raise use.refused("other arguments than axes")
    found = {axis % rank for axis in tuple_of(axes, 1)}
    if found & {0, 1}:
        raise use.refused(f"dim={axes}")
    ranges = [
        [range(n)] if i + 2 in found else [range(j, j + 1) for j in range(n)] for i, n in enumerate(use.in_shape[1:])
    ]
    terms = math.prod(use.in_shape[axis - 1] for axis in found)
    return Affine(_windows(use, ranges, None), None, _rounds(terms))

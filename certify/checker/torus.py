"""Exact re-proof of a convolution's norm from its frequency blocks on a torus.

A zero-padded convolution reads, for outputs o and taps t, the places o s + t d - p of an axis of n places. On a torus
of side N, with N >= n + p, N past the last place read and N past the last output's place, no read comes back into the
axis from the other side, so that the layer is a compression of the torus' convolution; this also holds for a twisted
torus, on which x[i + N] = -x[i]. The torus' convolution is block-diagonal in the frequencies (j + twist) / N; taking
every a-th output joins the a frequencies j, j + N / a, ... in one block, scaled by a^(-1/2) (a divides N, the stride).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flint import arb, fmpq, fmpz, fmpz_mat

from .balls import Fixed, from_balls, integers, largest, matrix, trimmed
from .convolution import Convolution, pad_places
from .norms import block, guessed_norm, proves_below

Axis = tuple[int, int, float]  # side, aliasing stride, twist
_PHASE_BITS = 62
_AT_ONCE = 1 << 19  # entries of the frequency blocks that are held at a time
_FREQUENCIES = 1 << 16  # blocks at most


def torus_problem(convolution: Convolution, axes: Sequence[Axis]) -> str:
    """Why these sides, strides and twists give no bound; empty where they do."""
    if len(axes) != len(convolution.stride):
        return f"expected a side for each of {len(convolution.stride)} axes, got {len(axes)}"
    if math.prod(side // max(1, stride) for side, stride, _ in axes) > _FREQUENCIES:
        return f"the torus {list(axes)} is too large"
    for axis, (side, stride, twist) in enumerate(axes):
        least = least_side(convolution, axis)
        fits = side == least if convolution.mode == "circular" else side >= least
        if not fits or stride < 1 or side % stride or convolution.stride[axis] % stride:
            return f"torus side {side} with stride {stride} does not fit axis {axis}, which needs {least}"
        if twist not in (0.0, 0.5) or (twist and convolution.mode == "circular"):
            return f"twist {twist} is not allowed for padding mode {convolution.mode}"
    return ""


def least_side(convolution: Convolution, axis: int) -> int:
    """The smallest torus of which the axis is a compression, before it is made a multiple of the stride."""
    size, (before, after) = convolution.in_shape[axis + 1], convolution.padding[axis]
    if convolution.mode == "circular":
        return size
    if convolution.mode != "zeros":
        size, before, after = size + before + after, 0, 0
    last_output = (convolution.out_shape[axis + 1] - 1) * convolution.stride[axis]
    span = (convolution.kernel[axis] - 1) * convolution.dilation[axis]
    return max(size + before, last_output + span - before + 1, last_output + 1)


def default_torus(convolution: Convolution) -> tuple[Axis, ...]:
    """The smallest untwisted torus."""
    axes: list[Axis] = []
    for axis, stride in enumerate(convolution.stride):
        side = least_side(convolution, axis)
        if convolution.mode == "circular":
            axes.append((side, stride if side % stride == 0 else 1, 0.0))
        else:
            axes.append((-(-side // stride) * stride, stride, 0.0))
    return tuple(axes)


def padding_repeats(convolution: Convolution) -> int:
    """What padding and wrapped outputs multiply the squared norm by: repeats of one pixel, or of one torus place."""
    found = 1
    for axis, (before, after) in enumerate(convolution.padding):
        size, outputs = convolution.in_shape[axis + 1], convolution.out_shape[axis + 1]
        if convolution.mode == "circular":
            places = np.arange(outputs) * convolution.stride[axis] % size
        elif convolution.mode == "zeros":
            continue
        else:
            places = pad_places(np.arange(-before, size + after), size, convolution.mode)
        found *= int(np.bincount(places).max())
    return found


def torus_below(
    convolution: Convolution, axes: Sequence[Axis], bound: arb, report: Callable[[str], None]
) -> float | None:
    """None where the norm is proved to be at most `bound`; else about the norm of the first block that is too large."""
    aliases = math.prod(stride for _, stride, _ in axes)
    level = bound * arb(fmpq(aliases, padding_repeats(convolution))).sqrt()
    groups = _distinct_groups(convolution)
    blocks = (pair for weight in groups for pair in _blocks(convolution, weight, axes))
    total = len(groups) * len(_bases(axes))
    for count, (re, im) in enumerate(blocks):
        found = block(re, im)
        if not proves_below(found, level):
            return guessed_norm(found) * float((bound / level).mid()) if level > 0 else math.inf
        if count % 100 == 99:
            report(f"frequency block {count + 1} of {total}")
    return None


def _distinct_groups(convolution: Convolution) -> list[Fixed]:
    rows = convolution.weight.mant.reshape(convolution.groups, -1, *convolution.weight.shape[1:])
    distinct = {tuple(map(int, row.reshape(-1))): row for row in rows}
    return [convolution.weight.moved(row) for row in distinct.values()]


def _bases(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Base frequencies, one of each pair of conjugates."""
    periods = [side // stride for side, stride, _ in axes]
    shifts = [1 if twist else 0 for _, _, twist in axes]
    found = []
    for base in itertools.product(*map(range, periods)):
        mirror = tuple((-j - shift) % period for j, shift, period in zip(base, shifts, periods, strict=True))
        if base <= mirror:
            found.append(base)
    return found


def _blocks(convolution: Convolution, weight: Fixed, axes: Sequence[Axis]) -> Iterator[tuple[Fixed, Fixed | None]]:
    """Blocks [c_out, c_in * aliases] of one group, unscaled, as real and imaginary parts."""
    outputs, inputs = weight.shape[:2]
    taps = weight.mant.reshape(outputs * inputs, -1).T
    offsets = [range(k) for k in convolution.kernel]
    positions = [
        tuple(t * d for t, d in zip(tap, convolution.dilation, strict=True)) for tap in itertools.product(*offsets)
    ]
    aliases = list(itertools.product(*(range(stride) for _, stride, _ in axes)))
    width = inputs * len(aliases)
    step = max(1, _AT_ONCE // (2 * outputs * width))
    bases = _bases(axes)
    kernel = matrix(taps)
    for start in range(0, len(bases), step):
        frequencies = [_frequency(base, alias, axes) for base in bases[start : start + step] for alias in aliases]
        turns = [[_turn(frequency, position) for position in positions] for frequency in frequencies]
        parts = [_symbols(turns, function, weight, kernel) for function in (arb.cos_pi_fmpq, arb.sin_pi_fmpq)]
        shaped = [
            part.mant.reshape(-1, len(aliases), outputs, inputs)
            .transpose(0, 2, 3, 1)
            .reshape(-1, outputs, inputs * len(aliases))
            for part in parts
        ]
        for re, im in zip(*shaped, strict=True):
            yield parts[0].moved(re), parts[1].moved(im)


def _frequency(base: tuple[int, ...], alias: tuple[int, ...], axes: Sequence[Axis]) -> tuple[fmpq, ...]:
    """(j + twist + alias N / a) / N per axis, in turns."""
    parts = zip(base, alias, axes, strict=True)
    return tuple(fmpq(2 * j + int(2 * twist), 2 * side) + fmpq(a, stride) for j, a, (side, stride, twist) in parts)


def _turn(frequency: tuple[fmpq, ...], position: tuple[int, ...]) -> fmpq:
    """-2 f t in half turns, between -2 and 2."""
    total = -2 * sum((f * t for f, t in zip(frequency, position, strict=True)), fmpq(0))
    return total - 2 * (total / 2).floor()


def _symbols(turns: list[list[fmpq]], function: Callable[[fmpq], arb], weight: Fixed, kernel: fmpz_mat) -> Fixed:
    """sum over taps of phase * weight, [frequencies, c_out * c_in]."""
    phases = from_balls([function(turn) for row in turns for turn in row], (len(turns), len(turns[0])), _PHASE_BITS)
    mant = integers((matrix(phases.mant) * kernel).entries(), (len(turns), int(kernel.ncols())))
    one = fmpz(1) << -phases.exp
    err = len(turns[0]) * (phases.err * (largest(weight.mant) + weight.err) + weight.err * one)
    return trimmed(Fixed(mant, phases.exp + weight.exp, err))

"""How an activation behaves around a centre: secant slopes over a range, and the lines that enclose it there.

With u the centre's number and u + t any number of the range, low <= t <= high,

    psi(u + t) - psi(u) = s t,    s in [below_low, below_high] for t <= 0 and in [above_low, above_high] for t >= 0.

For psi with one kink these intervals are exact; for smooth ones they are the range of the derivative between the two
numbers. For whatever slope c one chooses, psi(u + t) - psi(u) - c t is at most the largest of (below_low - c) low,
(above_high - c) high and 0, and at least the smallest of (below_high - c) low, (above_low - c) high and 0.

The centre is known up to an error, which every interval covers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .rounding import gamma
from .rules import Call
from .slopes import Slopes

# Room for the rounding of a slope, a few units, and for elementary functions within some units of their size.
_ROOM = 2.0**-44
_WIDE = 1 + 2.0**-48  # covers a dozen roundings of a product or of a sum of like signs

_FLOOR = 2.0**-480  # above the underflow of products and squares

_KINKS = {"relu": (0.0, 1.0), "abs": (-1.0, 1.0), "twice-negative": (2.0, 0.0)}  # slopes below and above zero

# Where the derivative of x sigmoid(x) and of x Phi(x) is largest; smallest at minus that; monotone in between.
_SILU_TOP = (2.3993, 2.3994)
_GELU_TOP = (1.4142, 1.4143)

_Derivative = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # ends of an interval -> ends of the derivative's range


@dataclass(frozen=True, eq=False)
class Range:
    """Numbers u of one activation over a ball.

    Attributes:
        centre: [B, n] u at the centre, as computed.
        error: [B, 1] what that may be off.
        low: [B, n] at most u' - u for every u' of the ball, <= 0.
        high: [B, n] at least u' - u, >= 0.
    """

    centre: Tensor
    error: Tensor
    low: Tensor
    high: Tensor

    def around(self) -> tuple[Tensor, Tensor]:
        """The ends of what u may be."""
        room = self.error + self.centre.abs() * 2.0**-50
        return self.centre - room * _WIDE, self.centre + room * _WIDE

    def ends(self) -> tuple[Tensor, Tensor]:
        """The ends of what u' may be."""
        lower, upper = self.around()
        return (
            lower + self.low - (lower.abs() + self.low.abs()) * 2.0**-50,
            upper + self.high + (upper.abs() + self.high.abs()) * 2.0**-50,
        )


@dataclass(frozen=True, eq=False)
class Lines:
    """low_slope t + low <= psi(u + t) - psi(u) <= high_slope t + high over a range, low <= 0 <= high; all [B, n].

    Attributes:
        least: at most psi(u + t) - psi(u), and `most` at least that.
        slope_low: least secant slope, and `slope_high` the largest; for psi that sorts 1 and 1 where a place gets the
            same number all over the ball, else -1 and 1: ||psi(u + t) - psi(u)|| <= ||t|| over these places.
        order: [B, n] where psi sorts: the position of the number t that a place's lines are about.
    """

    low_slope: Tensor
    low: Tensor
    high_slope: Tensor
    high: Tensor
    least: Tensor
    most: Tensor
    slope_low: Tensor
    slope_high: Tensor
    order: Tensor | None = None

    def at(self, samples: Tensor) -> Lines:
        """Of some of the samples."""
        chosen = {name: value[samples] for name, value in vars(self).items() if name in _FIELDS and value is not None}
        return Lines(**chosen)

    @cached_property
    def steepest(self) -> Tensor:
        """[B] at least every absolute slope, of lines and secants."""
        slopes = (self.low_slope, self.high_slope, self.slope_low, self.slope_high)
        return functools.reduce(torch.maximum, (slope.abs() for slope in slopes)).amax(1) * _WIDE

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """[B, n] halfway between the lines' slopes, and half their difference."""
        return (self.high_slope + self.low_slope) / 2, (self.high_slope - self.low_slope) / 2

    @cached_property
    def cone(self) -> tuple[Tensor, Tensor]:
        """[B, n] a and h with |psi(u + t) - psi(u) - a t| <= h |t|; for psi that sorts see `slope_low`."""
        middle, half = (self.slope_high + self.slope_low) / 2, (self.slope_high - self.slope_low) / 2
        return middle, torch.where(half > 0, half * _WIDE + middle.abs() * 2.0**-50, half)

    @cached_property
    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n] halfway between the constants, [B, n] half their difference, [B] rounding of sums with these."""
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        size = torch.linalg.vector_norm(middle.abs() + half, dim=1) * (1 + 2.0**-20)
        return middle, half, size * 4 * gamma(half.shape[1] + 8) + _FLOOR

    @property
    def loose(self) -> Tensor:
        """[B, n] where the lines are apart."""
        return (self.low_slope != self.high_slope) | (self.low < 0) | (self.high > 0)


_FIELDS = frozenset(one.name for one in fields(Lines))


def lines(
    slopes: Slopes,
    call: Call,
    shape: tuple[int, ...],
    numbers: Range,
) -> Lines:
    """The lines of an activation over a ball; `shape` is that of the numbers of one sample."""
    if slopes.kind == "sort":
        return _sorted(slopes.group, shape, numbers)
    below, above = _secants(slopes, call, numbers)
    low, high = numbers.low, numbers.high
    high_slope = _chord(below[0], above[1], low, high)
    low_slope = _chord(below[1], above[0], low, high)
    zero = torch.zeros_like(low)
    return Lines(
        low_slope,
        _smallest(zero, (below[1] - low_slope) * low, (above[0] - low_slope) * high),
        high_slope,
        _largest(zero, (below[0] - high_slope) * low, (above[1] - high_slope) * high),
        _smallest(zero, below[1] * low, above[0] * high),
        _largest(zero, below[0] * low, above[1] * high),
        torch.minimum(below[0], above[0]),
        torch.maximum(below[1], above[1]),
    )


def _chord(below: Tensor, above: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The slope of the line through (low, below low) and (high, above high): a choice, no bound."""
    width = high - low
    steep = (above * high - below * low) / torch.where(width > 0, width, 1.0)
    usable = (below != above) & (width > 0) & torch.isfinite(steep)
    middle = torch.where(below == above, above, (below + above) / 2)
    return torch.where(usable, steep, middle)


def _largest(zero: Tensor, *values: Tensor) -> Tensor:
    for value in values:
        zero = torch.maximum(zero, value)
    return zero * _WIDE


def _smallest(zero: Tensor, *values: Tensor) -> Tensor:
    for value in values:
        zero = torch.minimum(zero, value)
    return zero * _WIDE


_Interval = tuple[Tensor, Tensor]


def _secants(slopes: Slopes, call: Call, numbers: Range) -> tuple[_Interval, _Interval]:
    """The intervals below and above."""
    if slopes.kind == "leaky-relu":
        return _kinked(numbers, slopes.parameter, 1.0)
    if slopes.kind in _KINKS:
        return _kinked(numbers, *_KINKS[slopes.kind])
    low, high = (torch.full_like(numbers.centre, end) for end in (slopes.low, slopes.high))
    derivative = _derivative(slopes, call)
    if derivative is None:
        return (low, high), (low, high)
    (least, largest), (lower, upper) = numbers.ends(), numbers.around()
    return tuple(  # type: ignore[return-value]
        (torch.maximum(found[0], low), torch.minimum(found[1], high))
        for found in (derivative(least, upper), derivative(lower, largest))
    )


def _kinked(numbers: Range, left: float, right: float) -> tuple[_Interval, _Interval]:
    """psi(v) = left v for v <= 0 and right v for v >= 0.

    From u > 0 to v < 0 the secant's slope is right + (left - right) (-v) / (u - v), monotone in u and in v; from u < 0
    to v > 0 it is left + (right - left) v / (v - u).
    """
    (least, largest), (lower, upper) = numbers.ends(), numbers.around()
    p, q = torch.full_like(least, left), torch.full_like(least, right)
    positive, negative = lower >= 0, upper <= 0
    down = torch.where(positive, q + (left - right) * _share(-least, lower), torch.where(negative, p, q))
    up = torch.where(negative, p + (right - left) * _share(largest, -upper), torch.where(positive, q, p))
    # where the centre's side is unknown, both slopes may be met on either side
    below = _hull(torch.where(positive, q, p), down)
    above = _hull(torch.where(negative, p, q), up)
    # by the crossing: rounded slopes may be equal beyond a kink as well
    fixed_below = torch.where(positive, least >= 0, negative)
    fixed_above = torch.where(negative, largest <= 0, positive)
    room, ends = _ROOM * (abs(left) + abs(right)), (min(left, right), max(left, right))
    return tuple(  # type: ignore[return-value]
        tuple(torch.where(fixed, end, (end + sign * room).clamp(*ends)) for end, sign in ((low, -1.0), (high, 1.0)))
        for (low, high), fixed in ((below, fixed_below), (above, fixed_above))
    )


def _hull(first: Tensor, second: Tensor) -> _Interval:
    return torch.minimum(first, second), torch.maximum(first, second)


def _share(far: Tensor, near: Tensor) -> Tensor:
    """far / (far + near) with far > 0 the way beyond the kink and near the way to it; 0 where it is not reached."""
    crossing, near = ~(far <= 0), near.clamp_min(0.0)  # NaN: unknown
    share = far / torch.where(crossing, far + near, 1.0)
    return torch.where(crossing, torch.where(far < math.inf, share, 1.0), 0.0)


def _derivative(slopes: Slopes, call: Call) -> _Derivative | None:
    if slopes.kind in ("clamp", "softshrink"):
        module: Any = call.module
        if module is None:  # a function, whose ends are not known here
            return None
        clamps = slopes.kind == "clamp"
        return _clamp(float(module.min_val), float(module.max_val)) if clamps else _shrink(float(module.lambd))
    if slopes.kind == "softplus":
        beta = float(call.argument(0, "beta", 1) if call.module is None else getattr(call.module, "beta", 1.0))
        return _rounded(lambda low, high: (torch.sigmoid(beta * low), torch.sigmoid(beta * high)))
    if slopes.kind == "elu":
        return _elu(slopes.parameter)
    found = _DERIVATIVES.get(slopes.kind)
    return None if found is None else _rounded(found)


def _rounded(function: _Derivative) -> _Derivative:
    """The range widened by the rounding of the derivative."""

    def found(low: Tensor, high: Tensor) -> _Interval:
        least, most = function(low, high)
        return least - _ROOM, most + _ROOM

    return found


def _clamp(least: float, most: float) -> _Derivative:
    """1 within the ends, 0 outside."""

    def found(low: Tensor, high: Tensor) -> _Interval:
        inside, outside = (low >= least) & (high <= most), (high <= least) | (low >= most)
        return inside.to(low), 1 - outside.to(low)

    return found


def _shrink(level: float) -> _Derivative:
    """0 within [-level, level], 1 outside."""

    def found(low: Tensor, high: Tensor) -> _Interval:
        inside, outside = (low >= -level) & (high <= level), (high <= -level) | (low >= level)
        return outside.to(low), 1 - inside.to(low)

    return found


def _elu(alpha: float) -> _Derivative:
    """alpha exp(v) for v < 0, 1 for v > 0."""

    def found(low: Tensor, high: Tensor) -> _Interval:
        least, most = _hull(*(alpha * torch.exp(end.clamp_max(0.0)) for end in (low, high)))
        least, most = least - abs(alpha) * _ROOM, most + abs(alpha) * _ROOM
        bottom = torch.where(high > 0, least.clamp_max(1.0), least)
        top = torch.where(high > 0, most.clamp_min(1.0), most)
        return torch.where(low >= 0, 1.0, bottom), torch.where(low >= 0, 1.0, top)

    return found


def _even(function: Callable[[Tensor], Tensor], *, falls: bool) -> _Derivative:
    """An even derivative, monotone in |v|."""

    def found(low: Tensor, high: Tensor) -> _Interval:
        far = torch.maximum(low.abs(), high.abs())
        near = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
        return (function(far), function(near)) if falls else (function(near), function(far))

    return found


def _waved(function: Callable[[Tensor], Tensor], top: tuple[float, float]) -> _Derivative:
    """A derivative that is monotone but for its largest value within `top` and its smallest within -`top`."""

    def found(low: Tensor, high: Tensor) -> _Interval:
        least, most = _hull(function(low), function(high))
        least = torch.where((low <= -top[0]) & (high >= -top[1]), -math.inf, least)
        return least, torch.where((low <= top[1]) & (high >= top[0]), math.inf, most)

    return found


def _silu_slope(v: Tensor) -> Tensor:
    return torch.sigmoid(v) * (1 + v * torch.sigmoid(-v))


def _gelu_slope(v: Tensor) -> Tensor:
    density = torch.exp(-v.clamp(-40, 40).square() / 2) / math.sqrt(2 * math.pi)
    return (1 + torch.erf(v / math.sqrt(2))) / 2 + v.clamp(-40, 40) * density


_DERIVATIVES: dict[str, _Derivative] = {
    "tanh": _even(lambda v: 1 - torch.tanh(v).square(), falls=True),
    "tanhshrink": _even(lambda v: torch.tanh(v).square(), falls=False),
    "sigmoid": _even(lambda v: torch.sigmoid(v) * torch.sigmoid(-v), falls=True),
    "softsign": _even(lambda v: (1 + v).square().reciprocal(), falls=True),
    "logsigmoid": lambda low, high: (torch.sigmoid(-high), torch.sigmoid(-low)),
    "silu": _waved(_silu_slope, _SILU_TOP),
    "gelu": _waved(_gelu_slope, _GELU_TOP),
}


def _sorted(size: int, shape: tuple[int, ...], numbers: Range) -> Lines:
    """Sorting in groups along the first axis: a place that gets the same number all over the ball moves it there.

    The numbers at a place lie between those of the sorted lower and the sorted upper ends.
    """
    groups = (shape[0] // size, size, math.prod(shape[1:]))

    def grouped(values: Tensor) -> Tensor:  # [B, n] -> [B, groups, size, places]
        return values.reshape(len(values), *groups)

    centre, (least, largest) = grouped(numbers.centre), map(grouped, numbers.ends())
    order = centre.argsort(2)
    own_least, own_largest = least.gather(2, order), largest.gather(2, order)
    edge = torch.full_like(own_least[:, :, :1], math.inf)
    before = torch.cat([-edge, own_largest[:, :, :-1].cummax(2).values], 2)
    after = torch.cat([own_least[:, :, 1:].flip(2).cummin(2).values.flip(2), edge], 2)
    fixed = ((before <= own_least) & (own_largest <= after)).flatten(1)
    positions = grouped(torch.arange(math.prod(groups)).expand(len(centre), -1)).gather(2, order).flatten(1)
    around = [grouped(end).sort(2).values for end in numbers.around()]
    least, largest = least.sort(2).values - around[1], largest.sort(2).values - around[0]
    least, largest = (_smallest(torch.zeros_like(end), end - end.abs() * 2.0**-50) for end in (least, -largest))
    least, most = least.flatten(1), -largest.flatten(1)
    slope = fixed.to(centre)
    return Lines(
        slope,
        torch.where(fixed, 0.0, least),
        slope,
        torch.where(fixed, 0.0, most),
        least,
        most,
        2 * slope - 1,
        torch.ones_like(slope),
        torch.where(fixed, positions, torch.arange(math.prod(groups))),
    )

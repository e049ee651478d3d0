"""The checker's own table of elementwise operations: values in enclosures, Lipschitz factors, rounding."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flint import arb, fmpq
from torch import nn
from torch.nn import functional

from .balls import Fixed, aligned, balls, fixed, from_balls, plus, rational, times
from .picks import NOTHING, Activation, group_sort, householder, max_min, max_pool, one, pick
from .reading import Reading, real_name
from .rounds import Rounds
from .slopes import absolute_slopes, between, unit_slopes

# sup |f'|, each proved by a test in interval arithmetic to within one unit of its last digit.
_GELU_TANH = 1.128993068659
_SILU = 1.099839320129
_JUMP = 2.07e-9  # exceeds log(1 + exp(-20)), by which torch's softplus jumps at its threshold


def activation_for(target: Any, use: Reading) -> Activation | None:
    """The operation of this use, None where the table has none of that type."""
    rule = _TABLE.get(target) or _OWN.get(real_name(target))
    return None if rule is None else rule(use)


def _constant(value: arb) -> Callable[[str], arb]:
    return lambda norm: value


def _filled(level: arb, use: Reading) -> arb:
    return abs(level) * arb(math.prod(use.out_shape)).sqrt()


def _by_balls(function: Callable[[arb], arb]) -> Callable[[Fixed], Fixed]:
    return lambda x: from_balls([function(ball) for ball in balls(x)], x.shape)


def _relu(x: Fixed) -> Fixed:
    return x.moved(np.maximum(x.mant, NOTHING))


def _absolute(x: Fixed) -> Fixed:
    return x.moved(abs(x.mant))


def _clamped(low: float, high: float) -> Callable[[Fixed], Fixed]:
    def apply(x: Fixed) -> Fixed:
        for end, limit in ((low, np.maximum), (high, np.minimum)):
            if math.isfinite(end):
                x, level = aligned(x, fixed(torch.tensor(end, dtype=torch.float64)))
                x = Fixed(limit(x.mant, level.mant), x.exp, x.err + level.err)
        return x

    return apply


def _hardtanh(use: Reading) -> Activation:
    low, high = float(use.layer.min_val), float(use.layer.max_val)
    level = max((abs(end) for end in (low, high) if math.isfinite(end)), default=0.0)
    rounds = Rounds("steps", 1, gain=arb(0), offset=_filled(arb(level), use))
    return Activation(_clamped(low, high), one, rounds, unit_slopes(use.in_shape))


def _relu6(use: Reading) -> Activation:
    if (use.layer.min_val, use.layer.max_val) != (0.0, 6.0):
        return _hardtanh(use)
    return Activation(_clamped(0.0, 6.0), one, Rounds("steps", 0, gain=arb(1)), unit_slopes(use.in_shape))


def _leaky(use: Reading) -> Activation:
    value = float(use.layer.negative_slope)
    slope = fixed(torch.tensor(value, dtype=torch.float64))

    def apply(x: Fixed) -> Fixed:
        falling = times(x.moved(np.minimum(x.mant, NOTHING)), slope)
        return plus(_relu(x), falling)

    factor = arb(max(1.0, abs(value)))
    slopes = between(arb(min(1.0, value)), arb(max(1.0, value)))(use.in_shape)
    return Activation(apply, _constant(factor), Rounds("steps", 2, gain=factor), slopes)


def _softshrink(use: Reading) -> Activation:
    level = arb(rational(float(use.layer.lambd)))
    if not level >= 0:
        raise use.refused("a negative lambda")

    def shrink(x: arb) -> arb:
        return (x - level).max(arb(0)) + (x + level).min(arb(0))

    rounds = Rounds("steps", 2, gain=arb(1), offset=_filled(level, use))
    return Activation(_by_balls(shrink), one, rounds, unit_slopes(use.in_shape))


def _elu(use: Reading) -> Activation:
    alpha = arb(rational(float(use.layer.alpha)))
    size = abs(alpha)
    factor = arb(1).max(size)

    def function(x: arb) -> arb:
        return x.max(arb(0)) + alpha * x.min(arb(0)).expm1()

    rounds = Rounds("steps", 8, gain=factor, offset=_filled(size, use))
    slopes = between(alpha.min(arb(0)), alpha.max(arb(1)))(use.in_shape)
    return Activation(_by_balls(function), _constant(factor), rounds, slopes)


def _smooth(
    function: Callable[[arb], arb],
    factor: arb,
    units: int,
    gain: arb | None = None,
    level: arb | None = None,
    *,
    least: arb | None = None,
) -> Callable[[Reading], Activation]:
    """`factor` is the largest slope, `least` the least one, 0 where None."""

    def build(use: Reading) -> Activation:
        offset = arb(0) if level is None else _filled(level, use)
        rounds = Rounds("steps", units, gain=gain or arb(1), offset=offset)
        slopes = between(arb(0) if least is None else least, factor)(use.in_shape)
        return Activation(_by_balls(function), _constant(factor), rounds, slopes)

    return build


def _sigmoid(x: arb) -> arb:
    return ((x / 2).tanh() + 1) / 2


def _log_one_plus_exp(x: arb) -> arb:
    """log(1 + e^x), without overflow."""
    return x.max(arb(0)) + (-abs(x)).exp().log1p()


def _normal(x: arb) -> arb:
    """The normal distribution function."""
    return ((-x / arb(2).sqrt()).erfc()) / 2


def _gelu_tanh(x: arb) -> arb:
    inner = (2 / arb.pi()).sqrt() * (x + arb(fmpq(44715, 10**6)) * x * x * x)
    return x * (1 + inner.tanh()) / 2


def _gelu(use: Reading) -> Activation:
    kind = use.layer.approximate if use.module is not None else use.kwargs.get("approximate", "none")
    if kind not in ("none", "tanh"):
        raise use.refused(f"approximate={kind!r}")
    root = arb(2).sqrt()
    # f'(x) + f'(-x) = 1 for both forms and for SiLU, so that the least slope is 1 less the largest
    exact = _normal(root) + root * (-arb(1)).exp() / (2 * arb.pi()).sqrt()  # its derivative is largest at sqrt(2)
    if kind == "none":
        return _smooth(lambda x: x * _normal(x), exact, 16, least=1 - exact)(use)
    return _smooth(_gelu_tanh, arb(_GELU_TANH), 16, least=1 - arb(_GELU_TANH))(use)


def _log_sigmoid(use: Reading) -> Activation:
    return _smooth(lambda x: -_log_one_plus_exp(-x), arb(1), 8, arb(1), arb(2).log())(use)


def _softplus(use: Reading) -> Activation:
    threshold = use.layer.threshold if use.module is not None else use.argument(1, "threshold", 20)
    beta = use.layer.beta if use.module is not None else use.argument(0, "beta", 1)
    if not beta >= 0.1 or not threshold >= 20:
        raise use.refused("beta < 0.1 or a threshold < 20")
    scale = arb(rational(float(beta)))
    level, jump = arb(2).log() / scale, arb(_JUMP) / scale
    rounds = Rounds("steps", 8, gain=arb(1), offset=_filled(level, use), jump=_filled(jump, use), peak=scale)
    smooth = _by_balls(lambda x: _log_one_plus_exp(scale * x) / scale)
    return Activation(smooth, one, rounds, unit_slopes(use.in_shape))


def _entries() -> dict[Any, Callable[[Reading], Activation]]:
    tanh = _smooth(lambda x: x.tanh(), arb(1), 10)
    sigmoid = _smooth(_sigmoid, arb(fmpq(1, 4)), 8, arb(fmpq(1, 4)), arb(fmpq(1, 2)))
    rows: list[tuple[tuple[Any, ...], Callable[[Reading], Activation]]] = [
        ((nn.ReLU, torch.relu, functional.relu, "relu"), pick(_relu, unit_slopes)),
        ((torch.abs, operator.abs, "abs"), pick(_absolute, absolute_slopes)),
        ((nn.ReLU6,), _relu6),
        ((nn.Hardtanh,), _hardtanh),
        ((nn.LeakyReLU,), _leaky),
        ((nn.Softshrink,), _softshrink),
        ((nn.ELU,), _elu),
        ((nn.Tanh, torch.tanh, functional.tanh, "tanh"), tanh),
        ((nn.Softsign,), _smooth(lambda x: x / (1 + abs(x)), arb(1), 10)),
        ((nn.Tanhshrink,), _smooth(lambda x: x - x.tanh(), arb(1), 10)),
        ((nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid"), sigmoid),
        ((nn.LogSigmoid,), _log_sigmoid),
        ((nn.Softplus, functional.softplus), _softplus),
        ((nn.GELU, functional.gelu), _gelu),
        ((nn.SiLU, functional.silu), _smooth(lambda x: x * _sigmoid(x), arb(_SILU), 8, least=1 - arb(_SILU))),
        (
            (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, functional.max_pool1d, functional.max_pool2d),
            max_pool,
        ),
    ]
    return {target: rule for targets, rule in rows for target in targets}


_TABLE = _entries()

_OWN: dict[str, Callable[[Reading], Activation]] = {
    "speccert.models.activations.Abs": pick(_absolute, absolute_slopes),
    "speccert.models.activations.MaxMin": max_min,
    "speccert.models.activations.GroupSort": group_sort,
    "speccert.models.activations.Householder": householder,
}

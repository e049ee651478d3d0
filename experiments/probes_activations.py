"""The smooth activations as they run, held against their rounding rules by ball arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..certify.arithmetic import ARITHMETICS
from ..certify.graph import plain_type, type_name
from ..certify.local_errors import local_error
from ..certify.rules import Call, rounding_for, rule_for

__all__ = ["ACTIVATIONS", "activations"]

Exact = Callable[[Any], Any]  # from a ball to a ball
_POINTS = 400
_REACH = 6.0


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + (-x).exp())


def _tanh_gelu(x: Any) -> Any:
    inner = (2 / type(x).pi()).sqrt() * (x + type(x)(44715) / 1000000 * x**3)
    return x * (1 + inner.tanh()) / 2


ACTIVATIONS: dict[str, tuple[nn.Module, Exact]] = {
    "tanh": (nn.Tanh(), lambda x: x.tanh()),
    "sigmoid": (nn.Sigmoid(), _sigmoid),
    "softplus": (nn.Softplus(), lambda x: (1 + x.exp()).log()),
    "log-sigmoid": (nn.LogSigmoid(), lambda x: -((1 + (-x).exp()).log())),
    "softsign": (nn.Softsign(), lambda x: x / (1 + abs(x))),
    "tanhshrink": (nn.Tanhshrink(), lambda x: x - x.tanh()),
    "elu": (nn.ELU(), lambda x: x if x >= 0 else x.exp() - 1),
    "gelu": (nn.GELU(), lambda x: x * (-x / type(x)(2).sqrt()).erfc() / 2),
    "gelu-tanh": (nn.GELU("tanh"), _tanh_gelu),
    "silu": (nn.SiLU(), lambda x: x * _sigmoid(x)),
}


def activations(dtype: torch.dtype, device: str) -> tuple[str, bool]:
    """The largest error of each activation on samples, as a share of what its rounding rule allows."""
    shares = {name: _share(*ACTIVATIONS[name], dtype, device) for name in ACTIVATIONS}
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items()), max(shares.values()) <= 1


def _share(module: nn.Module, exact: Exact, dtype: torch.dtype, device: str) -> float:
    from flint import arb, ctx

    fixed, slope = _allowed(module, str(dtype).removeprefix("torch."))
    samples = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64).to(dtype)
    pairs = zip(samples.double().tolist(), module(samples.to(device)).cpu().double().tolist(), strict=True)
    with ctx.workprec(160):
        shares: list[float] = [abs(float(value - exact(arb(x)))) / (fixed + slope * abs(x)) for x, value in pairs]
    return max(shares)


def _allowed(module: nn.Module, arithmetic: str) -> tuple[float, float]:
    """The error that the rule allows one entry x: `fixed + slope |x|`."""
    call, operation = Call("activation", module, (), {}, (1,), (1,)), plain_type(module)
    rule, rounding = rule_for(operation, "activation", type_name(module)), rounding_for(operation, call, "activation")
    factor = rule.factor(call, "l2") if rule.factor else 1.0
    gain = float(factor if rounding.gain is None else rounding.gain)
    error = local_error(rounding, ARITHMETICS[arithmetic], gain, 0.0, 1)
    return error.h, error.p + error.q * float(factor)

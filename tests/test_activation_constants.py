"""sup |f'| of the smooth activations, in 50 digits: what certify's rules must not be below."""

import pytest
import torch
from mpmath import diff, erf, exp, findroot, mp, mpf, pi, sqrt, tanh
from torch import nn

from speccert.certify import lipschitz

# name: (layer, f, a point near the maximum of f', sup f' rounded up to 12 digits behind the point)
CASES = {
    "gelu": (nn.GELU(), lambda x: x * (1 + erf(x / sqrt(2))) / 2, "1.4142", "1.128904145186"),
    "gelu-tanh": (
        nn.GELU(approximate="tanh"),
        lambda x: x * (1 + tanh(sqrt(2 / pi) * (x + mpf("0.044715") * x**3))) / 2,
        "1.4185",
        "1.128993068659",
    ),
    "silu": (nn.SiLU(), lambda x: x / (1 + exp(-x)), "2.3994", "1.099839320129"),
    "sigmoid": (nn.Sigmoid(), lambda x: 1 / (1 + exp(-x)), "0.0001", "0.25"),
    "tanh": (nn.Tanh(), tanh, "0.0001", "1"),
}


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(50):
        yield


@pytest.mark.parametrize("name", CASES)
def test_constant_is_the_maximum_of_the_derivative_rounded_up(name):
    _, f, start, constant = CASES[name]
    peak = findroot(lambda x: diff(f, x, 2), mpf(start))
    assert abs(peak - mpf(start)) < mpf("1e-3")
    highest = diff(f, peak)
    assert highest <= mpf(constant) + mpf("1e-40")
    assert mpf(constant) - highest < mpf("1e-12")


@pytest.mark.parametrize("name", CASES)
def test_no_derivative_on_a_fine_grid_is_larger(name):
    layer, _, _, constant = CASES[name]
    x = torch.linspace(-40, 40, 2_000_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(layer(x).sum(), x)
    assert slopes.abs().max().item() <= float(constant) + 1e-15
    assert slopes.abs().max().item() >= float(constant) - 1e-9


def test_gelu_closed_form():
    # f'(x) = Phi(x) + x phi(x) and f''(x) = phi(x) (2 - x^2): the maximum lies at sqrt 2
    highest = (1 + erf(1)) / 2 + sqrt(2) * exp(-1) / sqrt(2 * pi)
    assert mpf("1.128904145185") < highest < mpf("1.128904145186")


def test_silu_closed_form():
    # with s the sigmoid, f' = s (1 + x (1 - s)) and f'' = s (1 - s) (2 - x tanh(x / 2)), which has one root for x > 0
    peak = findroot(lambda x: x * tanh(x / 2) - 2, mpf("2.4"))
    s = 1 / (1 + exp(-peak))
    assert mpf("1.099839320128") < s * (1 + peak * (1 - s)) < mpf("1.099839320129")


@pytest.mark.parametrize("name", CASES)
def test_the_registered_rule_is_no_smaller(name):
    layer, _, _, constant = CASES[name]
    model = nn.Sequential(nn.Identity(), layer).eval()
    assert lipschitz(model, (2,)).upper >= float(constant)
    assert lipschitz(model, (2,)).upper <= float(constant) * (1 + 1e-4)

"""Every operation that has a Lipschitz rule has a rounding rule, and both fit what the operation does."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import SCALAR, each, exact_array
from oracles import Wired, randomised, seeded
from torch import nn
from torch.nn import functional

from speccert.certify import Certifier
from speccert.certify import rules as registry
from speccert.certify.arithmetic import ARITHMETICS, DTYPES
from speccert.certify.local_errors import local_error
from speccert.certify.rounding_rules import spread_norm
from speccert.certify.rules import Call, Rounding, register_rounding, register_rule
from speccert.models import Abs


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_ROUNDINGS", dict(registry._ROUNDINGS))


def test_every_lipschitz_rule_has_its_rounding():
    ours = {operation for operation in registry._RULES if "test" not in getattr(operation, "__module__", "")}
    assert ours <= set(registry._ROUNDINGS)


def inputs(dtype):
    """All numbers of a half type, or many of a larger one: even steps, all magnitudes, both signs."""
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        return values[values.isfinite() & (values.abs() < 1e4)]
    generator = seeded()
    exponents = torch.rand(500, generator=generator, dtype=torch.float64) * 40 - 30
    signs = torch.rand(500, generator=generator, dtype=torch.float64) - 0.5
    return torch.cat([torch.exp2(exponents) * signs.sign(), torch.linspace(-30, 30, 501).double()]).to(dtype)


ELEMENTWISE = [
    *(nn.ReLU(), nn.ReLU6(), Abs(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus()),
    *(nn.Softplus(3.0, 25.0), nn.Softplus(0.1), nn.LogSigmoid(), nn.Tanhshrink(), nn.Softsign(), nn.ELU(), nn.ELU(0.3)),
    *(nn.ELU(2.5), nn.LeakyReLU(), nn.LeakyReLU(-3.1), nn.Softshrink(), nn.Softshrink(0.3), nn.Hardtanh(-0.3, 0.7)),
]


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("layer", ELEMENTWISE, ids=str)
def test_activations_err_less_than_their_rule_says(layer, name):
    x = inputs(DTYPES[name])
    computed = layer(x).double().numpy()
    if DTYPES[name].itemsize == 2:  # all of them, against float64, whose own error is no matter here
        exact = smooth(layer, x.double()).numpy()
        slack = 1e-13 * (1 + x.double().abs().numpy())
        error = np.abs(computed - exact) - slack
    else:
        exact = each(lambda v: SCALAR[type(layer)](layer, v))(exact_array(x))
        error = np.abs(exact_array(torch.from_numpy(computed)) - exact).astype(np.float64)
    call = Call("here", layer, (), {}, (1,), (1,))
    rounding = registry.rounding_for(type(layer), call, "it")
    found = local_error(rounding, ARITHMETICS[name], rounding.gain, 0.0, 1)
    assert (error <= found.p * x.double().abs().numpy() + found.h).all()


def smooth(layer, x):
    """The function that the Lipschitz rule is about: softplus without its threshold."""
    if isinstance(layer, nn.Softplus):
        return torch.logaddexp(x * layer.beta, torch.zeros_like(x)) / layer.beta
    return layer(x)


OPERATIONS = {
    "linear": lambda m, x: functional.linear(torch.flatten(x, 1), m.weight, m.bias),
    "linear without bias": lambda m, x: functional.linear(torch.flatten(x, 1), m.weight),
    "number times": lambda m, x: m.fc(0.1 * x.flatten(1)),
    "vector times": lambda m, x: m.fc(x.flatten(1) * m.scale),
    "over a number": lambda m, x: m.fc(x.flatten(1) / 0.3),
    "over a vector": lambda m, x: m.fc(x.flatten(1) / m.scale),
    "plus a number": lambda m, x: m.fc(x.flatten(1) + 0.1),
    "number minus": lambda m, x: m.fc(0.7 - x.flatten(1)),
    "minus a vector": lambda m, x: m.fc(x.flatten(1) - m.scale),
    "negated": lambda m, x: m.fc(-x.flatten(1)),
    "mean": lambda m, x: m.small(x.mean((2, 3))),
    "pool": lambda m, x: m.fc(functional.avg_pool2d(x, 3, 1, 1).flatten(1)),
    "max pool": lambda m, x: m.fc(functional.max_pool2d(x, 3, 1, 1).flatten(1)),
    "sum": lambda m, x: m.fc(x.flatten(1)) + m.other(x.flatten(1)).tanh(),
    "difference": lambda m, x: m.fc(x.flatten(1)).relu() - m.other(x.flatten(1)).relu(),
    "concatenation": lambda m, x: m.six(torch.cat([m.fc(x.flatten(1)).relu(), m.other(x.flatten(1)).abs()], 1)),
}


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_functions_and_methods_against_float64(operation, name):
    generator = seeded(2)
    tensors = {
        "weight": torch.randn(3, 32, generator=generator),
        "bias": torch.randn(3, generator=generator),
        "scale": 0.5 + torch.rand(32, generator=generator),
    }
    layers = {"fc": nn.Linear(32, 3), "other": nn.Linear(32, 3), "small": nn.Linear(2, 3), "six": nn.Linear(6, 3)}
    model = randomised(Wired(OPERATIONS[operation], tensors, **layers)).to(DTYPES[name])
    x = torch.randn(60, 2, 4, 4, generator=generator).to(DTYPES[name])
    certifier = Certifier(model, (2, 4, 4))
    margins = certifier.margins(x, torch.arange(60) % 3)
    with torch.no_grad():
        error = model(x).double() - model.double()(x.double())
    apart = (error.gather(1, margins.label[:, None]) - error).abs()
    assert (apart <= margins.lost + 1e-12).all()
    assert bool((margins.lost.scatter(1, margins.label[:, None], 0) < 1e4 * ARITHMETICS[name].unit).all())


class Curve(nn.Module):
    def forward(self, x):
        return 0.5 * torch.sin(x)


def test_a_rule_of_ones_own_with_its_rounding(own_registry):
    model = nn.Sequential(nn.Linear(4, 3), Curve(), nn.Linear(3, 2)).eval()
    register_rule(Curve, factor=0.5)
    with pytest.raises(ValueError, match=r"no rounding rule for .*Curve"):
        Certifier(model, (4,))
    register_rounding(Curve, rounding=Rounding("steps", 10, 1.0))
    first = Certifier(model, (4,)).margins(torch.ones(1, 4)).lost
    del registry._RULES[Curve], registry._ROUNDINGS[Curve]
    register_rule(Curve, factor=0.5, rounding=lambda call: Rounding("steps", 10, 1.0))
    assert torch.equal(Certifier(model, (4,)).margins(torch.ones(1, 4)).lost, first)
    with pytest.raises(ValueError, match="has a rounding rule already"):
        register_rounding(Curve, rounding=Rounding("exact"))


@pytest.mark.parametrize(
    "values", [{"kind": "other"}, {"kind": "dot", "terms": -1}, {"kind": "steps", "offset": math.nan}]
)
def test_roundings_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        Rounding(**values)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1,), ()])
def test_the_norm_of_a_broadcast_tensor(shape):
    values = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    whole = float(values.expand(*([3, 4] if len(shape) == 2 else [4, 3])).norm())
    assert whole <= spread_norm(values, (4, 3)) <= whole * (1 + 1e-12)


def test_windows_of_adaptive_pools_are_counted_at_their_largest():
    for size, outputs in itertools.product(range(1, 9), range(1, 6)):
        call = Call("here", nn.AdaptiveAvgPool1d(outputs), (), {}, (1, size), (1, outputs))
        terms = registry.rounding_for(nn.AdaptiveAvgPool1d, call, "it").terms - 2
        image = nn.AdaptiveAvgPool1d(outputs)(torch.eye(size, dtype=torch.float64)[:, None])
        assert terms == int((image[:, 0] > 0).sum(0).max())

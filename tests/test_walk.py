"""How constants compose over a graph: exact for affine runs, sums, roots of squares and products elsewhere."""

import math
from fractions import Fraction

import pytest
import torch
from oracles import Wired, assert_sound, matrix_norm, operator_matrix, operator_norm, random, randomised
from torch import nn
from torch.nn.utils import parametrize

from speccert.certify import lipschitz
from speccert.certify.walk import _joined

NORMS = ("l2", "linf", "l1")
ORDER = {"l2": 2, "linf": 1, "l1": math.inf}  # dual norm of a row


def wired(function, *, buffers=None, **modules):
    return randomised(Wired(function, buffers, **modules), scale=0.7).double()


def layer_norm(layer, norm="l2"):
    return matrix_norm(layer.weight, norm)


AFFINE = {
    "residual of the identity": (lambda m, x: x + m.identity(x), (4,)),
    "sum of x and x": (lambda m, x: x + x, (4,)),
    "sum as a function": (lambda m, x: torch.add(m.fc(x), x), (4,)),
    "sum as a method": (lambda m, x: m.fc(x).add(x), (4,)),
    "difference": (lambda m, x: m.fc(x) - x, (4,)),
    "difference the other way": (lambda m, x: torch.sub(x, m.fc(x)), (4,)),
    "difference as a method": (lambda m, x: x.sub(m.fc(x)), (4,)),
    "in place": (lambda m, x: _iadd(m.fc(x), x), (4,)),
    "two layers": (lambda m, x: m.fc(m.other(x)), (4,)),
    "a layer used twice": (lambda m, x: m.fc(m.fc(x)), (4,)),
    "a layer beside itself": (lambda m, x: m.fc(x) + m.fc(m.fc(x)), (4,)),
    "branches of branches": (lambda m, x: (m.fc(x) + x) - (m.other(x) - m.fc(m.other(x))), (4,)),
    "shared branch": (lambda m, x: _twice(m.fc(x)), (4,)),
    "factors": (lambda m, x: 2 * m.fc(x) - x / 4 + m.scale * x, (4,)),
    "constants": (lambda m, x: m.scale - m.fc(x) + 1, (4,)),
    "concatenation": (lambda m, x: torch.cat([m.fc(x), x, m.other(x)], 1), (4,)),
    "concatenation by keyword": (lambda m, x: torch.cat((m.fc(x), x), dim=-1), (4,)),
    "concatenation of all keywords": (lambda m, x: torch.cat(tensors=[m.fc(x), x], dim=1), (4,)),
    "concatenation, then a layer": (lambda m, x: m.wide(torch.concat([m.fc(x), x], 1)), (4,)),
    "concatenation of x and x": (lambda m, x: torch.cat([x, x], 1), (4,)),
    "concatenation with a constant": (lambda m, x: torch.cat([x, m.fc(m.ones)], 1), (4,)),
    "convolution and identity": (lambda m, x: (x + m.conv(x)).flatten(1), (2, 5, 4)),
    "convolution less identity": (lambda m, x: (m.conv(x) - x).flatten(1), (2, 5, 4)),
    "normalised convolution": (lambda m, x: m.bn(m.conv(x)).flatten(1), (2, 5, 4)),
    "the whole run": (lambda m, x: m.head(m.pool(m.bn(m.conv(x / 0.3))).flatten(1)), (2, 4, 4)),
    "a run around a residual": (lambda m, x: m.head(m.pool(m.bn(x + m.conv(m.bn(x)))).flatten(1)), (2, 4, 4)),
    "channels joined": (lambda m, x: torch.cat([m.conv(x), x], 1).flatten(1), (2, 5, 4)),
    "rows joined": (lambda m, x: torch.cat([m.conv(x), x], 2).flatten(1), (2, 5, 4)),
}


def _iadd(a, b):
    a += b
    return a


def _twice(a):
    return a + a * 0.5


def affine_model(function):
    return wired(
        function,
        identity=nn.Identity(),
        fc=nn.Linear(4, 4),
        other=nn.Linear(4, 4),
        wide=nn.Linear(8, 3),
        conv=nn.Conv2d(2, 2, 3, padding=1),
        bn=nn.BatchNorm2d(2),
        pool=nn.AvgPool2d(2),
        head=nn.Linear(8, 3),
        buffers={"scale": random(4), "ones": torch.ones(5, 4)},
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_graphs_are_exact(name, norm):
    function, shape = AFFINE[name]
    model = affine_model(function)
    if name == "concatenation with a constant":  # whose batch size is built in
        with pytest.raises(ValueError, match=r"batch|fit"):
            lipschitz(model, shape, norm=norm)
        return
    matrix = operator_matrix(model, shape)
    bound = lipschitz(model, shape, norm=norm)
    pairs = torch.linalg.vector_norm(matrix[:, None] - matrix[None], ORDER[norm], dim=2)
    assert bool((pairs <= bound.pairwise).all())
    torch.testing.assert_close(bound.pairwise, pairs, rtol=1e-8, atol=1e-10)
    exact = matrix_norm(matrix, norm)
    assert exact <= bound.upper <= exact * (1 + 1e-7)


def test_residual_identity_is_2_and_a_chain_would_say_1():
    model = Wired(lambda m, x: x + m.identity(x), identity=nn.Identity()).eval()
    assert lipschitz(model, (3,)).upper == pytest.approx(2.0, rel=1e-8)


@pytest.mark.parametrize("function", [lambda m, x: x - x, lambda m, x: m.fc(x) - m.fc(x), lambda m, x: m.fc(x) * 0])
def test_equal_branches_cancel(function):
    bound = lipschitz(wired(function, fc=nn.Linear(4, 4)), (4,))
    assert 0 <= bound.upper < 1e-8
    assert float(bound.pairwise.max()) < 1e-8


def test_nearly_cancelling_branches_cover_their_rounding():
    model = wired(lambda m, x: 1e8 * (m.fc(x) * (1 + 1e-13) - m.fc(x)), fc=nn.Linear(4, 4))
    exact = 1e8 * (1 + 1e-13 - 1) * layer_norm(model.fc)
    assert lipschitz(model, (4,)).upper >= exact


BRANCHED = {
    "residual": (lambda m, x: x + m.fc(m.act(m.other(x))), lambda a, b: 1 + a * b),
    "residual minus": (lambda m, x: x - m.fc(m.act(m.other(x))), lambda a, b: 1 + a * b),
    "two activations": (lambda m, x: m.act(m.fc(x)) + m.act(m.other(x)), lambda a, b: a + b),
    "activation and itself": (lambda m, x: _plus_itself(m.act(m.fc(x))), lambda a, b: 2 * a),
    "activation less itself": (lambda m, x: _less_itself(m.act(m.fc(x))), lambda a, b: 0.0),
    "concatenation": (lambda m, x: torch.cat([m.act(m.fc(x)), m.other(x)], 1), math.hypot),
    "deep": (lambda m, x: m.fc(m.act(m.other(m.act(m.fc(x))))), lambda a, b: a * a * b),
    "dense sum": (
        lambda m, x: m.fc(m.act(m.fc(x)) + x) + m.act(m.other(x)),
        lambda a, b: a * (a + 1) + b,
    ),
}


def _plus_itself(a):
    return a + a


def _less_itself(a):
    return a - a


@pytest.mark.parametrize("name", BRANCHED)
def test_branches_add_up(name):
    function, formula = BRANCHED[name]
    model = wired(function, fc=nn.Linear(4, 4), other=nn.Linear(4, 4), act=nn.ReLU())
    expected = formula(layer_norm(model.fc), layer_norm(model.other))
    bounds = assert_sound(model, (4,))
    assert bounds["l2"].upper == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_concatenation_of_branches_in_linf_and_l1():
    model = wired(
        lambda m, x: torch.cat([m.act(m.fc(x)), m.act(m.other(x))], 1),
        fc=nn.Linear(4, 4),
        other=nn.Linear(4, 4),
        act=nn.ReLU(),
    )
    a, b = (layer_norm(model.fc, n) for n in ("linf", "l1")), (layer_norm(model.other, n) for n in ("linf", "l1"))
    (a_linf, a_l1), (b_linf, b_l1) = a, b
    assert lipschitz(model, (4,), norm="linf").upper <= max(a_linf, b_linf) * (1 + 1e-7)
    assert lipschitz(model, (4,), norm="l1").upper <= (a_l1 + b_l1) * (1 + 1e-7)
    assert_sound(model, (4,))


def test_factors_multiply_through_the_graph():
    model = wired(lambda m, x: m.act(3 * x), act=nn.Sigmoid())
    assert lipschitz(model, (4,)).upper == pytest.approx(0.75, rel=1e-7)


@pytest.mark.parametrize("change", ["in place", "through data", "load"])
def test_bounds_follow_the_weights(change):
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))).double()
    before = lipschitz(model, (4,)).upper
    if change == "in place":
        with torch.no_grad():
            model[0].weight.mul_(100)
    elif change == "through data":
        model[0].weight.data *= 100
    else:
        state = model.state_dict()
        model.load_state_dict({**state, "0.weight": 100 * state["0.weight"]})
    assert lipschitz(model, (4,)).upper == pytest.approx(100 * before, rel=1e-7)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, weight):
        return self.factor * weight


def test_bounds_follow_parametrized_weights():
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3))).double()
    parametrize.register_parametrization(model[0], "weight", Scaled().eval())
    model.eval()
    before = lipschitz(model, (2, 4, 4)).upper
    model[0].parametrizations.weight[0].factor.mul_(10)
    assert lipschitz(model, (2, 4, 4)).upper == pytest.approx(10 * before, rel=1e-7)
    model[0].parametrizations.weight.original.data *= 10
    assert lipschitz(model, (2, 4, 4)).upper == pytest.approx(100 * before, rel=1e-7)


def test_shared_weights_count_at_each_use():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = randomised(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), first)).double()
    assert lipschitz(model, (4,)).upper == pytest.approx(layer_norm(first) ** 3, rel=1e-7)


def test_layers_are_named_by_their_run():
    model = randomised(
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    ).double()
    layers = lipschitz(model, (2, 4, 4)).layers
    assert [layer.name for layer in layers] == ["0 + 1", "4"]
    assert all(layer.lower <= layer.upper for layer in layers)
    assert layers[0].upper == pytest.approx(operator_norm(model[:2], (2, 4, 4)), rel=1e-7)


def test_runs_of_one_layer_at_two_sizes_are_bracketed_apart():
    def forward(m, x):
        return m.pool(m.act(m.conv(m.pool(m.act(m.conv(x)))))).flatten(1)

    model = wired(forward, conv=nn.Conv2d(2, 2, 3, padding=1), act=nn.ReLU(), pool=nn.AvgPool2d(2))
    assert_sound(model, (2, 8, 8))


def test_non_contiguous_inputs_and_weights():
    model = wired(
        lambda m, x: m.fc(m.act(m.conv(x)).flatten(1)), conv=nn.Conv2d(2, 3, 3), act=nn.ReLU(), fc=nn.Linear(12, 3)
    )
    before = lipschitz(model, (2, 4, 4))
    model.to(memory_format=torch.channels_last)
    model.fc.weight.data = model.fc.weight.data.t().contiguous().t()
    after = lipschitz(model, (2, 4, 4))
    assert after.upper == pytest.approx(before.upper, rel=1e-12)


REFUSED = {
    "product of branches": lambda m, x: m.fc(x) * m.act(x),
    "quotient of branches": lambda m, x: m.fc(x) / (1 + m.act(x)),
    "broadcast branch": lambda m, x: m.fc(x) + m.act(x).mean(1, keepdim=True),
    "stack": lambda m, x: torch.stack([m.fc(x), x], 1),
    "joined batch": lambda m, x: torch.cat([m.fc(x), x], 0),
    "joined without an axis": lambda m, x: torch.cat([m.fc(x), x]),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_composed_is_refused(function):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the messages differ)
        lipschitz(wired(function, fc=nn.Linear(4, 4), act=nn.ReLU()), (4,))
    assert len(str(caught.value).splitlines()) == 1


def scalar_layer(factor, size=2):
    layer = nn.Linear(size, size, bias=False)
    nn.init.eye_(layer.weight)
    layer.weight.data *= factor
    return layer


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [0.1, 0.7, 1 / 3, 1.1])
def test_products_and_sums_of_constants_are_rounded_up(norm, factor):
    """Scaled identities, whose constants are known exactly: 40 products, each of which could round down."""
    exact = Fraction(float(torch.tensor(factor)))
    layers = [layer for _ in range(40) for layer in (scalar_layer(factor), nn.ReLU())]
    deep = nn.Sequential(*layers).eval()
    upper = Fraction(lipschitz(deep, (2,), norm=norm).upper)
    assert exact**40 <= upper <= exact**40 * (1 + Fraction(1, 10**12))

    def residuals(m, x):
        for _ in range(20):
            x = x + m.act(m.fc(x))
        return x

    model = Wired(residuals, fc=scalar_layer(factor), act=nn.ReLU()).eval()
    upper = Fraction(lipschitz(model, (2,), norm=norm).upper)
    assert (1 + exact) ** 20 <= upper <= (1 + exact) ** 20 * (1 + Fraction(1, 10**12))


def test_joined_constants_are_rounded_up():
    def concatenations(m, x):
        for _ in range(6):
            x = torch.cat([m.act(x), m.other(x)], 1)
        return x

    model = Wired(concatenations, act=nn.ReLU(), other=nn.Tanh()).eval()
    for norm, exact in (("l2", Fraction(8)), ("linf", Fraction(1)), ("l1", Fraction(64))):
        upper = Fraction(lipschitz(model, (2,), norm=norm).upper)
        assert exact <= upper <= exact * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize("norm", NORMS)
def test_estimates_join_branches_with_their_gradients(norm):
    parts = [torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True), 0.0]
    found = _joined(parts, norm)
    found.backward()
    assert float(found.detach()) == {"l2": 5.0, "linf": 4.0, "l1": 7.0}[norm]
    assert float(parts[1].grad) == pytest.approx({"l2": 0.8, "linf": 1.0, "l1": 1.0}[norm])

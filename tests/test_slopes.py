"""Slopes of activations, against difference quotients in 400 bits and the layers themselves."""

import itertools
import math
import operator

import mpmath
import pytest
import torch
from exact import SCALAR
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import random, randomised
from torch import nn
from torch.nn import functional

from speccert.certify import layer_rules  # noqa: F401  (registers torch's layers)
from speccert.certify.graph import plain_type
from speccert.certify.linear import NORMS
from speccert.certify.rules import _RULES, Call
from speccert.certify.slopes import _SLOPES, Slopes, mixed_channels, register_slopes, slopes_of
from speccert.models import Abs, GroupSort, Householder, MaxMin

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
GRID = 2.0**-26

# layer, and the least and the largest slope, or what they tend to
SCALARS = {
    "relu": (nn.ReLU(), 0.0, 1.0),
    "relu6": (nn.ReLU6(), 0.0, 1.0),
    "hardtanh": (nn.Hardtanh(-0.3, 2.0), 0.0, 1.0),
    "abs": (Abs(), -1.0, 1.0),
    "tanh": (nn.Tanh(), 0.0, 1.0),
    "sigmoid": (nn.Sigmoid(), 0.0, 0.25),
    "softplus": (nn.Softplus(), 0.0, 1.0),
    "softplus of beta 5": (nn.Softplus(beta=5.0), 0.0, 1.0),
    "softplus of beta 0.1": (nn.Softplus(beta=0.1), 0.0, 1.0),
    "softsign": (nn.Softsign(), 0.0, 1.0),
    "softshrink": (nn.Softshrink(0.3), 0.0, 1.0),
    "logsigmoid": (nn.LogSigmoid(), 0.0, 1.0),
    "tanhshrink": (nn.Tanhshrink(), 0.0, 1.0),
    "leaky relu": (nn.LeakyReLU(), 0.01, 1.0),
    "leaky relu of 0": (nn.LeakyReLU(0.0), 0.0, 1.0),
    "leaky relu of -1.5": (nn.LeakyReLU(-1.5), -1.5, 1.0),
    "leaky relu of 3": (nn.LeakyReLU(3.0), 1.0, 3.0),
    "leaky relu of 1": (nn.LeakyReLU(1.0), 1.0, 1.0),
    "elu": (nn.ELU(), 0.0, 1.0),
    "elu of 2.5": (nn.ELU(2.5), 0.0, 2.5),
    "elu of -0.7": (nn.ELU(-0.7), -0.7, 1.0),
    "elu of 0.1": (nn.ELU(0.1), 0.0, 1.0),
    "gelu": (nn.GELU(), -0.128904145186, 1.128904145186),
    "gelu-tanh": (nn.GELU("tanh"), -0.128993068659, 1.128993068659),
    "silu": (nn.SiLU(), -0.099839320129, 1.099839320129),
}


def described(layer, shape=(4,)):
    return slopes_of(plain_type(layer), Call("layer", layer, (), {}, shape, shape))


def quotient(layer, first, second):
    function = SCALAR[type(layer)]
    a, b = mpmath.mpf(first), mpmath.mpf(second)
    return (function(layer, a) - function(layer, b)) / (a - b)


@pytest.mark.parametrize("name", SCALARS)
def test_slopes_are_what_they_are_and_hardly_wider(name):
    layer, low, high = SCALARS[name]
    found = described(layer)
    assert found.low <= low <= found.low + 2 * GRID
    assert found.high - 2 * GRID <= high <= found.high
    assert found.shape is found.before is found.after is found.skip is None
    assert found.group == 1


numbers = st.one_of(
    st.floats(-6, 6), st.floats(-1e-3, 1e-3), st.floats(-60, 60), st.floats(-1e150, 1e150, allow_subnormal=False)
)


@pytest.mark.parametrize("name", SCALARS)
def test_difference_quotients_stay_between_the_slopes(name):
    layer = SCALARS[name][0]
    found = described(layer)

    @EXAMPLES
    @given(numbers, numbers)
    def check(first, second):
        if abs(first - second) > 1e-30 * (abs(first) + 1):
            assert found.low <= quotient(layer, first, second) <= found.high

    check()


@pytest.mark.parametrize("name", SCALARS)
def test_difference_quotients_of_neighbours_stay_between_the_slopes(name):
    """On a fine grid the quotients come close to both ends where the function has those slopes."""
    layer, low, high = SCALARS[name]
    found, room = described(layer), 0.35 if name.startswith("softplus") else 0.12
    grid = [mpmath.mpf(i) / 32 - mpmath.mpf("7.984375") for i in range(500)]
    values = [SCALAR[type(layer)](layer, point) for point in grid]
    quotients = [(b - a) * 32 for a, b in itertools.pairwise(values)]
    assert found.low <= min(quotients) <= low + room
    assert high - room <= max(quotients) <= found.high


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh", "silu", "sigmoid"])
def test_smooth_slopes_hold_at_their_extrema_in_50_digits(name):
    layer = SCALARS[name][0]
    found = described(layer)
    with mpmath.mp.workdps(50):

        def f(v):
            return SCALAR[type(layer)](layer, v)

        peak = mpmath.findroot(lambda v: mpmath.diff(f, v, 2), {"silu": 2.4, "sigmoid": 0.001}.get(name, 1.42))
        high, low = mpmath.diff(f, peak), mpmath.diff(f, -peak)
        assert found.low <= min(low, high) + mpmath.mpf("1e-30")
        assert max(low, high) <= found.high
        assert abs(f(peak + mpmath.mpf("1e-12")) - f(peak - mpmath.mpf("1e-12"))) <= found.high * mpmath.mpf("2e-12")


@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.ELU])
@EXAMPLES
@given(parameter=st.floats(-50, 50), first=numbers, second=numbers)
def test_slopes_of_any_parameter(kind, parameter, first, second):
    layer = kind(parameter)
    found = described(layer)
    if abs(first - second) > 1e-30 * (abs(first) + 1):
        assert found.low <= quotient(layer, first, second) <= found.high
    assert found.parameter == parameter


CALLS = [
    (torch.relu, {}, (0.0, 1.0)),
    (functional.relu, {}, (0.0, 1.0)),
    ("relu", {}, (0.0, 1.0)),
    (torch.abs, {}, (-1.0, 1.0)),
    (operator.abs, {}, (-1.0, 1.0)),
    ("abs", {}, (-1.0, 1.0)),
    (torch.tanh, {}, (0.0, 1.0)),
    (functional.tanh, {}, (0.0, 1.0)),
    ("tanh", {}, (0.0, 1.0)),
    (torch.sigmoid, {}, (0.0, 0.25)),
    (functional.sigmoid, {}, (0.0, 0.25)),
    ("sigmoid", {}, (0.0, 0.25)),
    (functional.softplus, {"beta": 2.0}, (0.0, 1.0)),
    (functional.silu, {}, (-0.099839320129, 1.099839320129)),
    (functional.gelu, {}, (-0.128904145186, 1.128904145186)),
    (functional.gelu, {"approximate": "tanh"}, (-0.128993068659, 1.128993068659)),
]


@pytest.mark.parametrize(("function", "keywords", "ends"), CALLS)
def test_functions_have_the_slopes_of_their_layers(function, keywords, ends):
    found = slopes_of(function, Call("f", None, (), keywords, (4,), (4,)))
    assert ends[0] - 2 * GRID <= found.low <= ends[0]
    assert ends[1] <= found.high <= ends[1] + 2 * GRID


def test_all_activations_with_a_factor_have_slopes_but_pools():
    pools = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, functional.max_pool1d, functional.max_pool2d}
    own = {op for op, rule in _RULES.items() if rule.factor and str(getattr(op, "__module__", "")).startswith("test")}
    assert {op for op, rule in _RULES.items() if rule.factor} - own - pools == set(_SLOPES)
    assert all(slopes_of(pool, Call("pool", None, (), {}, (4,), (4,))) is None for pool in pools)


# what the slopes of an activation leave of its Lipschitz factor


@pytest.mark.parametrize("name", SCALARS)
def test_factor_in_l2_is_the_larger_end(name):
    layer = SCALARS[name][0]
    factor = _RULES[type(layer)].factor(Call("layer", layer, (), {}, (4,), (4,)), "l2")
    found = described(layer)
    assert max(abs(found.low), abs(found.high)) <= factor + 2 * GRID
    assert factor <= max(abs(found.low), abs(found.high)) + 2 * GRID


# activations of pairs and groups


def twice_negative(v):
    return 2 * v.clamp(max=0)


def sorted_groups(size):
    return lambda v: v.reshape(len(v), -1, size, *v.shape[2:]).sort(2).values.flatten(1, 2)


def turned(channels, seed=0, scale=3.0):
    layer = Householder(channels)
    return randomised(layer, seed, scale)


GROUPED = {
    "maxmin": (lambda: MaxMin(), "abs", torch.abs, (-1.0, 1.0)),
    "groupsort of 2": (lambda: GroupSort(2), "sort", sorted_groups(2), (-1.0, 1.0)),
    "groupsort of 3": (lambda: GroupSort(3), "sort", sorted_groups(3), (-1.0, 1.0)),
    "groupsort of 12": (lambda: GroupSort(12), "sort", sorted_groups(12), (-1.0, 1.0)),
    "householder": (lambda: Householder(12), "twice-negative", twice_negative, (0.0, 2.0)),
    "turned householder": (lambda: turned(12), "twice-negative", twice_negative, (0.0, 2.0)),
    "much turned householder": (lambda: turned(12, 1, 1e6), "twice-negative", twice_negative, (0.0, 2.0)),
}


@pytest.mark.parametrize("shape", [(12,), (12, 5), (12, 3, 2), (12, 2, 1, 3)])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_maps_around_their_psi(name, shape):
    """phi(v) = P v + Q psi(R v), for vectors, series, pictures and volumes."""
    build, kind, psi, ends = GROUPED[name]
    layer = build().double()
    found = described(layer, shape)
    assert (found.kind, found.low, found.high) == (kind, *ends)
    v = 3 * random(20, *shape)
    before = found.before.apply(v)
    assert tuple(before.shape[1:]) == (shape if found.shape is None else found.shape)
    after = psi(before)
    after = after if found.after is None else found.after.apply(after)
    torch.testing.assert_close(found.skip.apply(v) + after, layer(v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_sorting_does_not_lengthen_a_group(size):
    """The condition that tied numbers share, and why one multiplier each would be wrong."""
    u, other = random(400, size), random(400, size, seed=1)
    lengthened = (u.sort(1).values - other.sort(1).values).square() - (u - other).square()
    assert float(lengthened.sum(1).max()) <= 1e-12
    assert float(lengthened.max()) > 0.1


@pytest.mark.parametrize("group", [2, 3, 4])
def test_groups_are_neighbouring_channels(group):
    found = described(GroupSort(group), (12,))
    assert found.group == group
    mean = found.skip.apply(torch.eye(12, dtype=torch.float64))
    expected = torch.block_diag(*[torch.full((group, group), 1 / group, dtype=torch.float64)] * (12 // group))
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("name", GROUPED)
def test_matrices_are_within_their_slack_of_the_true_ones(name):
    """Against sines, cosines and 1 / n in 400 bits: in all norms, by the Frobenius norm of the difference times 12."""
    layer = GROUPED[name][0]()
    found = described(layer, (12,))
    unit = torch.eye(12, dtype=torch.float64)
    for linear, exact in zip((found.before, found.skip), _exact_maps(layer), strict=True):
        held = linear.apply(unit).T
        assert tuple(held.shape) == (len(exact), len(exact[0]))
        errors = [
            abs(mpmath.mpf(a) - b) for u, v in zip(held.tolist(), exact, strict=True) for a, b in zip(u, v, strict=True)
        ]
        assert max(errors) * 12 <= linear.slack or max(errors) == 0


def _exact_maps(layer):
    one, zero = mpmath.mpf(1), mpmath.mpf(0)
    if isinstance(layer, GroupSort):
        n = layer.group_size
        mean = [[one / n if i // n == j // n else zero for j in range(12)] for i in range(12)]
        return [[(i == j) - mean[i][j] for j in range(12)] for i in range(12)], mean
    if isinstance(layer, MaxMin):
        before = [[one * (j == i) - (j == i + 6) for j in range(12)] for i in range(6)]
        return before, [[one / 2 * (i % 6 == j % 6) for j in range(12)] for i in range(12)]
    half = [mpmath.mpf(float(angle)) / 2 for angle in layer.angle.detach().double()]
    before = [[mpmath.sin(h) * (j == i) - mpmath.cos(h) * (j == i + 6) for j in range(12)] for i, h in enumerate(half)]
    return before, [[one * (i == j) for j in range(12)] for i in range(12)]


def test_householder_angles_are_taken_as_stored():
    layer = Householder(4).to(torch.bfloat16)
    layer.angle.data = torch.tensor([1.1, -2.7], dtype=torch.bfloat16)
    v = random(30, 4)
    found = described(layer)
    image = found.skip.apply(v) + found.after.apply(twice_negative(found.before.apply(v)))
    torch.testing.assert_close(image, layer.double()(v))


def test_slopes_leave_the_layer_alone():
    layer = turned(4)
    angle = layer.angle.detach().clone()
    found = described(layer)
    assert torch.equal(layer.angle.detach(), angle)
    assert layer.angle.requires_grad
    assert not found.before.weight.requires_grad
    assert found.before.weight.data_ptr() != layer.angle.data_ptr()


@pytest.mark.parametrize("kind", [GroupSort, Householder])
def test_a_call_without_its_layer_is_refused(kind):
    with pytest.raises(ValueError, match="expected a"):
        slopes_of(kind, Call("place", None, (), {}, (4,), (4,)))


# mixed channels


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5), (3, 1, 2, 2)])
def test_mixed_channels_multiply_at_every_place(shape):
    weight = random(5, 3)
    linear = mixed_channels(weight, shape, 0.25)
    x = random(6, *shape, seed=3)
    assert linear.in_shape == shape
    assert linear.out_shape == (5, *shape[1:])
    torch.testing.assert_close(linear.apply(x), torch.einsum("oc,bc...->bo...", weight, x))
    torch.testing.assert_close(
        linear.adjoint(random(6, 5, *shape[1:])), torch.einsum("oc,bo...->bc...", weight, random(6, 5, *shape[1:]))
    )
    exact = float(torch.linalg.matrix_norm(weight, 2))
    for norm in NORMS:
        assert linear.deviation(norm) >= 0.25
    assert exact + 0.25 <= linear.bounds("l2").upper <= (exact + 0.25) * (1 + 1e-7)


# Slopes


@pytest.mark.parametrize(
    ("low", "high"), [(0.1, 0.3), (-0.1, 1 / 3), (-7.77, 1e6 + 0.1), (0.0, 1e-300), (-1e-300, 0.0)]
)
def test_slopes_are_widened_to_short_numbers(low, high):
    found = Slopes("x", low, high)
    assert low - GRID <= found.low <= low
    assert high <= found.high <= high + GRID
    assert found.low * 2**26 == math.floor(found.low * 2**26)
    assert found.high * 2**26 == math.floor(found.high * 2**26)


def test_short_slopes_stay():
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.25, 0.25), (-(2.0**20), 2.0**20)):
        found = Slopes("x", low, high)
        assert (found.low, found.high) == (low, high)


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.0, 0.0), (0.0, math.inf), (-math.inf, 0.0), (math.nan, 1.0), (0.0, math.nan), (0.0, 2e6), (-2e6, 0.0)],
)
def test_slopes_that_are_none_are_refused(low, high):
    with pytest.raises(ValueError, match=r"expected -2\^20 <= low"):
        Slopes("x", low, high)


@pytest.mark.parametrize("slope", [1e7, -1e7, 1e305, -1e305, math.inf])
def test_activations_too_steep_have_none(slope):
    assert described(nn.LeakyReLU(slope)) is described(nn.ELU(slope)) is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.999), (-0.999, 1.0), (0.0, 0.0)])
def test_a_group_needs_slopes_around_both_signs(low, high):
    with pytest.raises(ValueError, match=r"\[-1, 1\] at least in a group"):
        Slopes("x", low, high, group=2)


def test_a_second_description_is_refused():
    with pytest.raises(ValueError, match="has slopes already"):
        register_slopes(nn.ReLU, slopes=Slopes("relu", 0.0, 1.0))


def test_own_activations_can_be_described(monkeypatch):
    monkeypatch.setattr("speccert.certify.slopes._SLOPES", dict(_SLOPES))

    class Own(nn.Module):
        pass

    class Other(nn.Module):
        pass

    register_slopes(Own, Other, slopes=Slopes("own", -0.5, 0.5))
    register_slopes("own-method", slopes=lambda call: Slopes(call.place, 0.0, float(call.in_shape[0])))
    call = Call("place", None, (), {}, (3,), (3,))
    assert slopes_of(Own, call) is slopes_of(Other, call)
    assert slopes_of("own-method", call) == Slopes("place", 0.0, 3.0)
    assert slopes_of(type("Third", (Own,), {}), call) is None
    with pytest.raises(ValueError, match="has slopes already"):
        register_slopes("new", Own, slopes=Slopes("own", -0.5, 0.5))
    assert slopes_of("new", call) is None

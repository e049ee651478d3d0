"""Properties of `lipschitz` by all methods: never below what a network attains, never above the product."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_lipschitz import corners, largest_same, pairs, proved_exactly, reachable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Wired, p_norm, random, randomised, separated_points, stretch
from torch import nn

from speccert.certify import lipschitz
from speccert.certify.graph import trace
from speccert.certify.inequality import prove
from speccert.certify.linear import float64
from speccert.certify.lipschitz import METHODS
from speccert.certify.neurons import form, neurons
from speccert.certify.rules import leaf_types
from speccert.certify.walk import Walk
from speccert.models import Abs, GroupSort, Householder, MaxMin, Residual, build_model

NORMS = ("l2", "linf", "l1")
TIGHT = [method for method in METHODS if method != "product"]
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SECONDS = 0.3


def dense(*sizes, activation=nn.ReLU, seed=0, scale=0.7, bias=1.0):
    layers = []
    for first, second in itertools.pairwise(sizes):
        layers += [nn.Linear(first, second), activation()]
    model = randomised(nn.Sequential(*layers[:-1]).double(), seed, scale)
    for layer in model[::2]:
        layer.bias.data.mul_(bias)
    return model


def check_consistent(bound, product, norm):
    """Never above the product, symmetric, and each entry explained by the product or one of the relaxations."""
    assert bound.upper <= product.upper
    assert bool((bound.pairwise <= product.pairwise).all())
    assert torch.equal(bound.pairwise, bound.pairwise.T)
    assert bool((bound.pairwise.diagonal() == 0).all())
    assert bool(torch.isfinite(bound.pairwise).all())
    assert bound.attempts[0].method == "product"
    assert bound.attempts[0].upper == product.upper
    inner = {
        one.norm: math.sqrt(math.prod(bound.input_shape)) if one.norm != norm == "linf" else 1.0
        for one in bound.relaxations
    }
    classes = len(bound.pairwise)
    for i, j in itertools.combinations(range(classes), 2):
        known = [float(product.pairwise[i, j])]
        for one in bound.relaxations:
            if one.pair is None:
                known.append(math.sqrt(2) * one.upper * inner[one.norm])
            elif set(one.pair) == {i, j}:
                known.append(one.upper * inner[one.norm])
        assert float(bound.pairwise[i, j]) == pytest.approx(min(known), rel=1e-12, abs=1e-300)
        label = bound.pair_methods[i][j]
        assert label == bound.pair_methods[j][i]
        base = label.removesuffix(" by equivalence")
        assert base in ("product", "equivalence", "lipsdp", "lipsdp-layer", "lipsdp-first-order", "closed-form")
        assert (base in ("product", "equivalence")) == (bound.pairwise[i, j] == product.pairwise[i, j])
    outer = math.sqrt(classes) if norm == "l1" else 1.0
    whole = [one.upper * inner[one.norm] * outer for one in bound.relaxations if one.pair is None]
    assert bound.upper == pytest.approx(min([product.upper, *whole]), rel=1e-12)


def check_attained(bound, jacobians, norm):
    assert largest_same(jacobians, norm) <= bound.upper * (1 + 1e-12)
    exact = pairs(jacobians, norm)
    assert bool((torch.from_numpy(exact) <= bound.pairwise * (1 + 1e-12)).all())


def check_points(model, shape, bounds, seed=0):
    """Differences of far and of ascended points."""
    x = 3 * random(6, *shape, seed=seed)
    for norm, bound in bounds.items():
        for other in (random(6, *shape, seed=seed + 1), separated_points(model, x, norm, steps=6)):
            with torch.no_grad():
                worst = stretch(model, x, other, norm).amax(0)
            assert bool((worst <= bound.pairwise * (1 + 1e-7) + 1e-12).all())
            change = p_norm((model(x) - model(other)).detach(), norm) / p_norm(x - other, norm)
            assert float(change.max()) <= bound.upper * (1 + 1e-7) + 1e-12


def all_bounds(model, shape, method, budget=SECONDS):
    bounds = {}
    for norm in NORMS:
        bounds[norm] = lipschitz(model, shape, method, norm, budget=budget)
        check_consistent(bounds[norm], lipschitz(model, shape, norm=norm), norm)
    return bounds


# against the pieces of piecewise linear networks

CHAINS = {
    "relu": lambda seed: dense(3, 4, 3, seed=seed),
    "deep relu": lambda seed: dense(2, 3, 3, 3, 2, seed=seed),
    "leaky relu": lambda seed: dense(3, 4, 4, 2, activation=lambda: nn.LeakyReLU(-0.3), seed=seed),
    "steep leaky relu": lambda seed: dense(3, 4, 4, 2, activation=lambda: nn.LeakyReLU(3.0), seed=seed),
    "hardtanh": lambda seed: dense(3, 4, 4, 2, activation=nn.Hardtanh, seed=seed),
    "abs": lambda seed: dense(3, 4, 4, 2, activation=Abs, seed=seed),
    "maxmin": lambda seed: dense(3, 6, 4, 2, activation=MaxMin, seed=seed),
    "groupsort of 2": lambda seed: dense(3, 4, 4, 2, activation=lambda: GroupSort(2), seed=seed),
    "groupsort of 3": lambda seed: dense(3, 6, 3, 2, activation=lambda: GroupSort(3), seed=seed),
    "householder": lambda seed: dense(3, 4, 4, 2, activation=lambda: Householder(4), seed=seed),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "auto") for name in CHAINS), *(("relu", method) for method in TIGHT if method != "auto")],
)
def test_no_piece_exceeds_a_bound(name, method):
    model = CHAINS[name](1)
    jacobians = corners(model)
    for norm, bound in all_bounds(model, (model[0].in_features,), method).items():
        check_attained(bound, jacobians, norm)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 14))
@pytest.mark.parametrize("name", CHAINS)
def test_no_piece_exceeds_a_bound_of_many_networks(name, seed):
    model = CHAINS[name](seed)
    jacobians = corners(model)
    for method in TIGHT:
        for norm, bound in all_bounds(model, (model[0].in_features,), method, 4.0).items():
            check_attained(bound, jacobians, norm)


@pytest.mark.parametrize("activation", [nn.ReLU, Abs, lambda: nn.LeakyReLU(0.2)])
@pytest.mark.parametrize("seed", range(2))
def test_bounds_bracket_the_exact_constant(activation, seed):
    """Regions found by linear programs: exact <= bound <= product, and all pieces together are no less than regions."""
    model = dense(2, 4, 3, 2, activation=activation, seed=seed, bias=0.5)
    exact, loose = reachable(model), corners(model)
    assert largest_same(exact, "l2") <= largest_same(loose, "l2") * (1 + 1e-12)
    for norm, bound in all_bounds(model, (2,), "auto", 0.5).items():
        check_attained(bound, exact, norm)
        assert bound.upper <= 3 * largest_same(loose, norm)


def test_interior_point_finds_what_the_product_misses():
    """relu(x) + relu(-x) = |x|: 1, by LipSDP; 2 by the product."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert lipschitz(model, (1,)).upper == pytest.approx(2.0)
    for method in ("lipsdp", "lipsdp-first-order", "auto", "lipsdp-layer"):
        bound = lipschitz(model, (1,), method)
        assert 1.0 <= bound.upper <= 1.001
        assert 1.0 <= float(bound.pairwise[0, 1]) <= 1.001


# against differences of points of any network

ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.Hardtanh, nn.Softsign, nn.LogSigmoid),
    *(lambda: nn.LeakyReLU(0.2), lambda: nn.LeakyReLU(-1.5), lambda: nn.ELU(2.0), lambda: nn.GELU("tanh"), Abs),
    *(nn.Tanhshrink, lambda: nn.Softshrink(0.2), nn.Identity, MaxMin, lambda: GroupSort(2), lambda: GroupSort(4)),
    *(lambda: Householder(4), lambda: nn.Softplus(beta=5.0), lambda: nn.ELU(-0.5)),
]


@st.composite
def networks(draw):
    """Depth 1 to 6, mixed activations, residual sums and concatenations, odd scales."""
    layers = [nn.Linear(draw(st.integers(1, 5)), 4)]
    for _ in range(draw(st.integers(0, 5))):
        act = draw(st.sampled_from(ACTIVATIONS))()
        kind = draw(st.sampled_from(["layer", "layer", "residual", "joined", "bare"]))
        if kind == "layer":
            layers += [act, nn.Linear(4, 4, bias=draw(st.booleans()))]
        elif kind == "residual":
            layers.append(Residual(nn.Sequential(act, nn.Linear(4, 4))))
        elif kind == "joined":
            layers += [Joined(act, nn.Linear(4, 4)), nn.Linear(8, 4)]
        else:
            layers.append(act)
    layers.append(nn.Linear(4, draw(st.integers(2, 4))))
    model = randomised(
        nn.Sequential(*layers).double(), draw(st.integers(0, 10**6)), draw(st.sampled_from([0.1, 0.6, 3.0]))
    )
    if draw(st.booleans()):
        for parameter in model.parameters():
            parameter.data.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) > 0.4)
    return model, (model[0].in_features,)


class Joined(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], 1)


@pytest.mark.slow
@FEW
@given(networks(), st.sampled_from(["auto", "lipsdp", "lipsdp-first-order"]))
def test_random_networks_stay_below_their_bounds(case, method):
    model, shape = case
    check_points(model, shape, all_bounds(model, shape, method, 0.2))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(TIGHT))
def test_many_random_networks_stay_below_their_bounds(case, method):
    model, shape = case
    check_points(model, shape, all_bounds(model, shape, method, 2.0))


ARCHITECTURES = [
    ("mlp", (5,), {"width": 8, "depth": 3, "activation": "relu"}),
    ("mlp", (5,), {"width": 8, "depth": 3, "activation": "groupsort"}),
    ("convnet-4c3f", (1, 8, 8), {"width": 2, "activation": "relu"}),
    ("lipconvnet", (1, 8, 8), {"width": 2, "depth": 3, "activation": "maxmin"}),
    ("liresnet", (1, 8, 8), {"width": 4, "depth": 2, "activation": "householder"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "options"), ARCHITECTURES)
def test_architectures_stay_below_their_bounds(name, shape, options):
    model = randomised(build_model(name, shape, 3, **options), scale=0.4).double()
    for norm in NORMS if len(shape) == 1 else ("l2", "linf"):
        bound = lipschitz(model, shape, "auto", norm, budget=1.0, points=random(4, *shape))
        check_consistent(bound, lipschitz(model, shape, norm=norm), norm)
        check_points(model, shape, {norm: bound})
        assert 0 < bound.lower <= bound.upper


def test_a_network_with_a_pool_and_a_head():
    model = randomised(
        nn.Sequential(
            *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU()),
            *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        )
    ).double()
    bounds = all_bounds(model, (1, 7, 7), "auto", 3.0)
    check_points(model, (1, 7, 7), bounds)
    product = lipschitz(model, (1, 7, 7))
    assert bounds["l2"].upper < 0.95 * product.upper
    assert all(one.start_constant > 0 and one.norm == "l2" for bound in bounds.values() for one in bound.relaxations)
    assert any("by equivalence" in name for row in bounds["linf"].pair_methods for name in row)


# every relaxation holds by itself


def part_of(model, shape, relaxation):
    graph = trace(model, shape, leaf_types())
    walk = Walk(graph, norm_of=lambda *_: 1.0, factor_of=lambda *_: 1.0, prepare=float64)
    nodes = {node.name: node for node in graph.nodes}
    net = neurons(form(graph, walk, nodes[relaxation.end], nodes[relaxation.start]))
    return net if relaxation.pair is None else net.pair(*relaxation.pair)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["lipsdp", "lipsdp-first-order", "auto"])
def test_relaxations_can_be_proved_again(method, norm):
    """From what is stored alone, by the package and in rational arithmetic."""
    model = dense(3, 4, 4, 3, seed=2)
    bound = lipschitz(model, (3,), method, norm, budget=1.0)
    assert bound.relaxations
    for one in bound.relaxations:
        net = part_of(model, (3,), one)
        again = prove(net, one.multipliers, one.norm, one.weights).upper
        assert again == pytest.approx(one.upper / one.start_constant, rel=1e-6)
        if norm == "l2":
            assert proved_exactly(net, one.multipliers, one.upper)
        elif norm == "linf":
            assert proved_exactly(net, one.multipliers, one.upper, norm, one.weights)
            assert sum(map(Fraction, one.weights.tolist())) <= Fraction(one.upper) ** 2


def test_start_constants_are_those_of_the_product():
    model = Wired(
        lambda m, x: m.c(m.act(m.b(m.act(m.pool(m.a(x)[:, None] if False else m.a(x)))))),
        a=nn.Linear(6, 6),
        pool=nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten()),
        b=nn.Linear(3, 4),
        c=nn.Linear(4, 2),
        act=nn.ReLU(),
    )
    model = randomised(model).double()
    bound = lipschitz(model, (6,), "auto", budget=1.0)
    constants = dict(bound.records["l2"].constants)
    assert bound.relaxations
    for one in bound.relaxations:
        assert one.start_constant == constants[one.start]
        net = part_of(model, (6,), one)
        upper = prove(net, one.multipliers, one.norm, one.weights).upper
        assert Fraction(upper) * Fraction(one.start_constant) <= Fraction(one.upper)


# options


def test_methods_and_budgets_are_checked():
    model = nn.Linear(3, 3).eval()
    with pytest.raises(ValueError, match="method: expected one of product, "):
        lipschitz(model, (3,), "sdp")
    for budget in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="budget: expected") as caught:
            lipschitz(model, (3,), "auto", budget=budget)
        assert len(str(caught.value).splitlines()) == 1


def test_product_is_as_it_was():
    model = dense(3, 4, 4, 3)
    bound = lipschitz(model, (3,))
    assert bound.relaxations == ()
    assert [attempt.method for attempt in bound.attempts] == ["product"]
    assert bound.lower_pairwise is None
    factors = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in model[::2]]
    assert math.prod(factors) <= bound.upper <= math.prod(factors) * (1 + 1e-7)


@pytest.mark.parametrize("method", ["lipsdp-first-order", "auto"])
def test_lower_estimates_stay_below(method):
    model = dense(3, 6, 5, 3, seed=3)
    for norm in NORMS:
        bound = lipschitz(model, (3,), method, norm, budget=1.0, points=random(5, 3))
        assert 0 < bound.lower <= bound.upper
        assert bool((bound.lower_pairwise <= bound.pairwise).all())
        exact = pairs(corners(model), norm)
        assert bool((bound.lower_pairwise <= torch.from_numpy(exact) * (1 + 1e-9)).all())
        assert bound.lower <= largest_same(corners(model), norm) * (1 + 1e-9)


def test_bounds_leave_the_model_and_the_generator_alone():
    model = dense(3, 4, 4, 3, activation=lambda: Householder(4)).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for method in ("lipsdp", "auto"):
        lipschitz(model, (3,), method, budget=0.5, points=torch.zeros(1, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_models_are_bounded_by_their_stored_weights(dtype):
    model = dense(3, 4, 3).to(dtype)
    exact = corners(
        nn.Sequential(
            *[layer.double() if isinstance(layer, nn.Linear) else layer for layer in dense(3, 4, 3).to(dtype)]
        )
    )
    check_attained(lipschitz(model, (3,), "auto", budget=1.0), exact, "l2")


def scaled_layers(factors):
    model = dense(3, 4, 4, 3)
    with torch.no_grad():
        for layer, factor in zip(model[::2], factors, strict=True):
            layer.weight.mul_(factor)
    return model


@pytest.mark.parametrize("method", ["auto", "lipsdp"])
@pytest.mark.parametrize(
    "factors", [(2.0**60, 1.0, 1.0), (2.0**-60, 2.0**60, 1.0), (1.0, 2.0**-70, 1.0), (2.0**30, 2.0**30, 2.0**-90)]
)
def test_powers_of_two_scale_the_bounds(method, factors):
    """Exactly the factor, but for where the search ends."""
    plain, scaled = (lipschitz(scaled_layers(f), (3,), method, budget=60.0) for f in ((1.0, 1.0, 1.0), factors))
    factor = math.prod(factors)
    assert scaled.upper == pytest.approx(factor * plain.upper, rel=5e-3)
    torch.testing.assert_close(scaled.pairwise, factor * plain.pairwise, rtol=5e-3, atol=0)


@pytest.mark.parametrize("method", ["auto", "lipsdp"])
@pytest.mark.parametrize(
    "factors",
    [
        (1e-150, 1.0, 1.0),
        (1e-90, 1e-90, 1e-90),
        (1e150, 1e-150, 1.0),
        (1e100, 1e100, 1e100),
        (1e-200, 1e200, 1.0),
        (0.0, 1.0, 1.0),
        (1.0, 1.0, 0.0),
    ],
)
def test_scales_at_the_edge_fall_back_to_the_product(method, factors):
    model = scaled_layers(factors)
    for norm in NORMS:
        try:
            product = lipschitz(model, (3,), norm=norm)
        except ValueError:
            continue
        check_consistent(lipschitz(model, (3,), method, norm, budget=0.3), product, norm)

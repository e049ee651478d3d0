import math
import sys
from fractions import Fraction

import pytest
import torch
from exact_norms import product, rational
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Wired, assert_sound, jacobian, matrix_norm, operator_matrix, random, randomised
from torch import nn

from speccert.certify import TrainingBound, lipschitz, norm_bounds
from speccert.certify.ascent import LowerEstimates

NORMS = ("l2", "linf", "l1")


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class Joined(nn.Module):
    def __init__(self, first, second, axis):
        super().__init__()
        self.first, self.second, self.axis = first, second, axis

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], self.axis)


class Difference(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return 0.5 * self.first(x) - self.second(x) / 3


ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.Hardtanh, nn.Softsign, nn.LogSigmoid),
    *(lambda: nn.LeakyReLU(0.2), lambda: nn.LeakyReLU(-1.5), lambda: nn.ELU(2.0), lambda: nn.GELU("tanh")),
    *(nn.Tanhshrink, lambda: nn.Softshrink(0.2), nn.Identity, lambda: nn.Dropout(0.5)),
]


@st.composite
def convolutions(draw, channels, size, keep=False):
    """A convolution, transposed convolution or pool that fits; `keep` asks for one that keeps the shape."""
    kernel = draw(st.integers(1, min(4, min(size))))
    if keep:
        mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        return nn.Conv2d(channels, channels, 3 if min(size) > 1 else 1, padding="same", padding_mode=mode)
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, kernel // 2))
    kind = draw(st.sampled_from(["conv", "grouped", "transposed", "max", "average", "dilated"]))
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=draw(st.booleans()))
    if kind == "average":
        included, rounded = draw(st.booleans()), draw(st.booleans())
        return nn.AvgPool2d(kernel, stride, padding, ceil_mode=rounded, count_include_pad=included)
    if kind == "transposed":
        return nn.ConvTranspose2d(channels, draw(st.integers(1, 3)), kernel, min(stride, 2), 0)
    if kind == "grouped":
        return nn.Conv2d(channels, 2 * channels, kernel, stride, padding, groups=channels, bias=draw(st.booleans()))
    return nn.Conv2d(channels, draw(st.integers(1, 3)), kernel, stride, padding, dilation=1 + (kind == "dilated"))


@st.composite
def models(draw):
    """A random small network: layers, residual blocks, differences and concatenations, then a linear layer."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(3, 6)), draw(st.integers(3, 6)))
    layers, x = [], torch.zeros(2, *shape)
    for _ in range(draw(st.integers(1, 5))):
        channels, size = x.shape[1], tuple(x.shape[2:])
        kind = draw(
            st.sampled_from(["spatial", "spatial", "activation", "activation", "norm", "residual", "join", "less"])
        )
        if kind == "spatial":
            layer = draw(convolutions(channels, size))
        elif kind == "activation":
            layer = draw(st.sampled_from(ACTIVATIONS))()
        elif kind == "norm":
            layer = nn.BatchNorm2d(channels, affine=draw(st.booleans()))
        else:
            kept = [draw(convolutions(channels, size, keep=True)) for _ in range(2)]
            blocks = [
                nn.Sequential(draw(st.sampled_from(ACTIVATIONS[:-3]))(), conv) if draw(st.booleans()) else conv
                for conv in kept
            ]
            if kind == "residual":
                layer = Residual(nn.Sequential(*blocks))
            elif kind == "join":
                layer = Joined(*blocks, axis=draw(st.integers(1, 3)))
            else:
                layer = Difference(*blocks)
        try:
            image = layer.eval()(x.clone())
        except RuntimeError:
            continue
        if math.prod(image.shape[1:]) == 0 or math.prod(image.shape[1:]) > 400:
            continue
        layers.append(layer)
        x = image
    layers += [nn.Flatten(), nn.Linear(x[0].numel(), 3)]
    if draw(st.booleans()):
        layers += [draw(st.sampled_from(ACTIVATIONS))(), nn.Linear(3, 3)]
    return randomised(nn.Sequential(*layers), seed=draw(st.integers(0, 1000)), scale=0.5).double(), shape


def check(case):
    model, shape = case
    assert_sound(model, shape, points=4)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models())
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_random_networks_stay_below_their_bounds(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(models())
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_many_random_networks_stay_below_their_bounds(case):
    check(case)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models())
def test_lower_end_never_exceeds_the_upper_one(case):
    model, shape = case
    for norm in NORMS:
        bound = lipschitz(model, shape, norm=norm, points=random(3, *shape))
        assert 0 <= bound.lower <= bound.upper


def test_method_and_norm_are_checked():
    model = nn.Linear(3, 3).eval()
    with pytest.raises(ValueError, match="method: expected one of product"):
        lipschitz(model, (3,), "exact")
    with pytest.raises(ValueError, match="expected one of l2, linf, l1"):
        lipschitz(model, (3,), norm="l3")


def test_lower_is_the_largest_jacobian_at_the_points():
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).double()
    x = random(5, 4)
    for norm in NORMS:
        exact = max(matrix_norm(jacobian(model, point), norm) for point in x)
        assert lipschitz(model, (4,), norm=norm, points=x).lower == pytest.approx(exact, rel=1e-6)
    assert lipschitz(model, (4,)).lower == 0.0


def test_a_jacobian_above_the_bound_is_an_error_not_a_cut(monkeypatch):
    model = nn.Linear(3, 3).eval()
    pairs = torch.ones(3, 3, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)
    for whole, pairwise, claim in ((1e6, pairs * 0, "Jacobian norm"), (0.0, pairs * 1e6, "pair 0, 1")):
        estimates = LowerEstimates(whole, pairwise)
        monkeypatch.setattr(
            sys.modules[TrainingBound.__module__], "lower_estimates", lambda *_, found=estimates, **__: found
        )
        with pytest.raises(ArithmeticError, match=rf"{claim}.*the bound is wrong|exceeds the bound.*{claim}"):
            lipschitz(model, (3,), points=torch.zeros(1, 3))


@pytest.mark.parametrize("norm", NORMS)
def test_pairwise_has_the_row_differences_of_the_last_run(norm):
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3))).double()
    last = (model[3].weight @ model[2].weight).detach()
    order = {"l2": 2, "linf": 1, "l1": math.inf}
    product = {
        kind: torch.linalg.vector_norm(last[:, None] - last[None], order[kind], dim=2)
        * matrix_norm(model[0].weight, kind)
        for kind in ("l2", norm)
    }
    factor = 2.0 if norm == "linf" else 1.0  # sqrt(4) inputs
    expected = torch.minimum(product[norm], factor * product["l2"])
    bound = lipschitz(model, (4,), norm=norm)
    torch.testing.assert_close(bound.pairwise, expected, rtol=1e-7, atol=0)
    assert bool((bound.pairwise >= expected).all())
    assert torch.equal(bound.pairwise, bound.pairwise.T)
    assert bound.input_shape == (4,)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_each_pair_says_which_bound_it_took(norm):
    model = randomised(
        nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    ).double()
    own = lipschitz(model, (6,), norm=norm)
    l2 = lipschitz(model, (6,))
    other = l2.pairwise * (math.sqrt(6) if norm == "linf" else 1.0)
    for i in range(3):
        for j in range(3):
            taken = own.pair_methods[i][j]
            assert taken in ("product", "equivalence")
            if taken == "equivalence":
                assert float(own.pairwise[i, j]) == pytest.approx(float(other[i, j]), rel=1e-8)
            assert float(own.pairwise[i, j]) <= float(other[i, j]) * (1 + 1e-8)
    assert any("equivalence" in row for row in own.pair_methods)
    assert all(set(row) == {"product"} for row in l2.pair_methods)


def test_activation_at_the_end_uses_the_whole_map():
    model = randomised(nn.Sequential(nn.Linear(4, 3), nn.ReLU())).double()
    bound = lipschitz(model, (4,))
    assert float(bound.pairwise[0, 1]) == pytest.approx(math.sqrt(2) * matrix_norm(model[0].weight), rel=1e-7)
    assert_sound(model, (4,))


def test_many_classes_need_no_cube_of_memory():
    model = randomised(nn.Linear(2000, 700), scale=0.1)
    bound = lipschitz(model, (2000,))
    i, j = 3, 650
    rows = model.weight.detach().double()
    assert float(bound.pairwise[i, j]) == pytest.approx(float((rows[i] - rows[j]).norm()), rel=1e-8)


@pytest.mark.parametrize("weight", [1e30, 1e-30])
def test_extreme_weights(weight):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    for layer in (model[0], model[2]):
        nn.init.eye_(layer.weight)
        layer.weight.data *= weight
    assert lipschitz(model, (3,)).upper == pytest.approx(weight**2, rel=1e-6)


def test_an_overflowing_product_is_refused():
    layers = [layer for _ in range(12) for layer in (nn.Linear(3, 3), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(3, 3)).eval()
    for layer in model[::2]:
        nn.init.eye_(layer.weight)
        layer.weight.data *= 1e30
    with pytest.raises(ValueError, match="overflow"):
        lipschitz(model, (3,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_models_are_bounded_by_their_stored_weights(dtype):
    model = randomised(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))).to(dtype)
    exact = matrix_norm(model[0].weight.double()) * matrix_norm(model[2].weight.double())
    assert exact <= lipschitz(model, (8,)).upper <= exact * (1 + 1e-7)


# TrainingBound


def network():
    return randomised(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            nn.Linear(12, 8),
            nn.Tanh(),
            nn.Linear(8, 4),
        ),
        seed=3,
    ).double()


def converged(training, calls=150):
    with torch.no_grad():
        for _ in range(calls):
            training.pairwise()
    return training.pairwise()


def test_training_bound_approaches_the_proved_one_from_below():
    model = network()
    proved = lipschitz(model, (1, 6, 6)).pairwise
    training = TrainingBound(model, (1, 6, 6))
    first, last = training.pairwise().detach(), converged(training).detach()
    assert bool((first <= proved * (1 + 1e-9)).all())
    assert bool((last <= proved * (1 + 1e-9)).all())
    torch.testing.assert_close(last, proved, rtol=1e-4, atol=1e-9)
    assert float(last.diagonal().abs().max()) == 0.0


def test_training_bound_works_in_training_mode_and_leaves_it():
    model = network().train()
    statistics, state = model[1].running_mean.clone(), torch.get_rng_state()
    pairwise = TrainingBound(model, (1, 6, 6)).pairwise()
    pairwise.sum().backward()
    assert all(module.training for module in model.modules())
    assert torch.equal(model[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.grad is not None


def test_gradient_agrees_with_finite_differences_of_the_closed_form():
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))).double()

    def closed_form(first, second):
        gaps = (second[:, None] - second[None]).square().sum(2)
        return torch.linalg.matrix_norm(first, 2) * (gaps[0, 1].sqrt() + 2 * gaps[1, 2].sqrt())

    pairwise = converged(TrainingBound(model, (4,)), 400)
    (pairwise[0, 1] + 2 * pairwise[1, 2]).backward()
    for layer in (model[0], model[2]):
        numeric = torch.zeros_like(layer.weight)
        for index in range(layer.weight.numel()):
            shift = torch.zeros(layer.weight.numel(), dtype=torch.float64)
            shift[index] = 1e-6
            values = []
            for sign in (1, -1):
                weights = [
                    m.weight.detach() + sign * shift.reshape(m.weight.shape) * (m is layer)
                    if m is layer
                    else m.weight.detach()
                    for m in (model[0], model[2])
                ]
                values.append(closed_form(*weights))
            numeric.view(-1)[index] = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(layer.weight.grad, numeric.detach(), rtol=1e-4, atol=1e-6)


def test_training_bound_follows_the_weights():
    model = network()
    training = TrainingBound(model, (1, 6, 6))
    before = converged(training).detach()
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[0].bias.mul_(3)
    torch.testing.assert_close(training.pairwise().detach(), 3 * before, rtol=1e-4, atol=1e-9)


def test_training_bound_follows_constants_made_of_weights():
    model = Wired(lambda m, x: m.fc(x * m.scale.exp()), fc=nn.Linear(3, 3)).double()
    model.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
    training = TrainingBound(model, (3,))
    before = training.pairwise().detach()
    model.scale.data += math.log(5)
    torch.testing.assert_close(training.pairwise().detach(), 5 * before)


RUNS = {
    "chain": lambda m, x: m.head(m.act(m.conv(x)).flatten(1)),
    "one layer at two sizes": lambda m, x: m.small(m.pool(m.act(m.conv(m.pool(m.act(m.conv(x)))))).flatten(1)),
    "unnamed runs": lambda m, x: m.head(m.act(-x + m.act(2 * x)).flatten(1)),
    "concatenated identities": lambda m, x: m.wide(m.act(torch.cat([x, x], 1)).flatten(1)),
}


@pytest.mark.parametrize("function", RUNS.values(), ids=RUNS)
def test_state_round_trip_continues_where_it_was(function):
    model = randomised(
        Wired(
            function,
            conv=nn.Conv2d(2, 2, 3, padding=1),
            pool=nn.AvgPool2d(2),
            act=nn.ReLU(),
            head=nn.Linear(128, 3),
            wide=nn.Linear(256, 3),
            small=nn.Linear(8, 3),
        )
    ).double()
    training = TrainingBound(model, (2, 8, 8))
    for _ in range(3):
        training.pairwise()
    state = {name: vector.clone() for name, vector in training.state().items()}
    again = TrainingBound(model, (2, 8, 8))
    again.load_state(state)
    assert set(again.state()) == set(state)
    torch.testing.assert_close(again.pairwise(), training.pairwise())
    proved = lipschitz(model.eval(), (2, 8, 8)).pairwise
    torch.testing.assert_close(converged(again).detach(), proved, rtol=2e-3, atol=1e-9)


def test_training_bound_refuses_nan_and_other_outputs():
    model = nn.Linear(3, 3)
    model.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="weight"):
        TrainingBound(model, (3,))
    with pytest.raises(ValueError, match="logits"):
        TrainingBound(nn.Linear(3, 1), (3,))


def test_whole_affine_network_is_its_materialised_operator():
    model = randomised(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 3, 3),
            nn.Flatten(),
            nn.Linear(12, 5),
        )
    ).double()
    matrix = operator_matrix(model, (2, 8, 8))
    bound = lipschitz(model, (2, 8, 8))
    assert len(bound.layers) == 1
    assert matrix_norm(matrix) <= bound.upper <= matrix_norm(matrix) * (1 + 1e-7)
    alone = math.prod(
        norm_bounds(model[i], shape).upper
        for i, shape in ((0, (2, 8, 8)), (1, (4, 8, 8)), (2, (4, 8, 8)), (3, (4, 4, 4)), (5, (12,)))
    )
    assert bound.upper < alone


# against exact arithmetic


def exact_pairs(rows, norm):
    """Dual norm of each row difference: its square in l2."""
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            gaps = [abs(a - b) for a, b in zip(first, second, strict=True)]
            value = {"l2": sum(g * g for g in gaps), "linf": sum(gaps), "l1": max(gaps)}[norm]
            yield i, j, value


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(5))
def test_pairwise_constants_dominate_the_exact_row_differences(norm, seed):
    first, last = randomised(nn.Linear(4, 5), seed=seed), randomised(nn.Linear(5, 3), seed=seed + 50)
    cases = [(nn.Sequential(first), rational(first.weight))]
    cases.append((nn.Sequential(first, last), product(rational(last.weight), rational(first.weight))))
    for model, rows in cases:
        pairwise = lipschitz(model.eval(), (4,), norm=norm).pairwise
        for i, j, value in exact_pairs(rows, norm):
            found = Fraction(float(pairwise[i, j]))
            found = found**2 if norm == "l2" else found
            assert value <= found <= value * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_norm_equivalence_is_rounded_up(norm):
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).eval()
    model[0].weight.data = torch.tensor([[0.1, 0.1, 0.1], [-0.1, -0.1, -0.1]])
    entry = Fraction(float(model[0].weight.detach()[0, 0]))
    exact = 2 * entry * (3 if norm == "linf" else 1)
    assert exact <= Fraction(float(lipschitz(model, (3,), norm=norm).pairwise[0, 1]))


def test_bounds_hold_no_gradient_history():
    """A circular convolution's adjoint goes through autograd, and so does that of a sum."""
    block = Residual(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    model = randomised(nn.Sequential(block, nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(32, 3)))
    for norm in NORMS:
        bound = lipschitz(model, (2, 4, 4), norm=norm)
        assert not bound.pairwise.requires_grad
        assert not any(record.pairwise.requires_grad for record in bound.records.values())


def test_bounds_are_computed_on_the_cpu_in_float64_and_leave_the_model_alone():
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bound = lipschitz(model, (4,))
    assert bound.pairwise.dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_padded_column_has_no_lower_end():
    model = nn.Sequential(nn.ZeroPad1d((1, 0)), nn.Flatten(), nn.Linear(4, 2, bias=False), nn.ReLU()).double().eval()
    with torch.no_grad():
        model[2].weight.zero_()[:, 0] = 7.0
    (layer,) = lipschitz(model, (1, 3)).layers
    assert layer.lower == 0.0


def test_pairs_behind_a_zero_layer_do_not_move():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.copy_(torch.tensor([[1e308, 1e308], [-1e308, -1e308]], dtype=torch.float64))
    assert bool((lipschitz(model, (2,)).pairwise == 0).all())


def test_a_product_that_is_attained_is_not_searched():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[2].weight.copy_(torch.eye(4)[:2])
    found = lipschitz(model, (4,), "auto", points=torch.ones(3, 4, dtype=torch.float64), budget=5)
    assert [one.method for one in found.attempts] == ["product"]
    assert "attained" in found.attempts[0].note
    assert found.lower == pytest.approx(1.0)

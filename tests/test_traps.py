"""Mistakes known from other tools, one test each; those on training, attacks and storage are elsewhere."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact_lipschitz import random_neurons, reachable
from oracles import Wired, exact_copy, jacobian, matrix_norm, operator_norm, random, randomised
from scipy import special, stats
from torch import nn
from torch.nn.utils import parametrize

from speccert.attacks import attack
from speccert.certify import (
    certified_radii,
    estimate_norm,
    interior_point,
    lipschitz,
    norm_bounds,
    register_rule,
    sdp,
)
from speccert.certify.convolution import torus_bound
from speccert.certify.inequality import prove
from speccert.certify.interior_point import SolverFailed, solve
from speccert.certify.linear import Dense, float64
from speccert.certify.rules import Call, linear_map_of
from speccert.certify.slopes import slopes_of
from speccert.models import BASELINES, CONSTRAINTS, Normalize, Residual, constrain


def test_power_iteration_is_no_bound():
    for seed in range(20):
        layer = randomised(nn.Conv2d(3, 4, 3, padding=1), seed)
        exact = operator_norm(layer, (3, 7, 7))
        linear = float64(linear_map_of(layer, (3, 7, 7)))
        assert float(estimate_norm(linear, steps=10)[0]) < exact <= norm_bounds(layer, (3, 7, 7)).upper
        assert torus_bound(linear) >= exact


def test_start_vector_is_not_orthogonal_to_the_top_direction():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, -1.0]])
    assert norm_bounds(layer, (2,)).upper >= math.sqrt(2)
    assert float(estimate_norm(Dense(layer.weight, (2,)))[0].detach()) == pytest.approx(math.sqrt(2))


class Rescaling(nn.Module):
    def forward(self, x):
        return torch.special.expit(100 * x)


@pytest.mark.parametrize("layer", [Rescaling(), nn.Softmax(1), nn.LayerNorm(3), nn.CELU()], ids=str)
def test_unknown_layer_does_not_count_as_1(layer):
    with pytest.raises(ValueError, match="no Lipschitz rule"):
        lipschitz(nn.Sequential(nn.Linear(3, 3), layer).eval(), (3,))


def test_batch_norm_and_gelu_do_not_count_as_1():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.GELU()).eval()
    model[0].weight.data.fill_(50.0)
    assert lipschitz(model, (3,)).upper >= 50 / math.sqrt(1 + 1e-5) * 1.1289


def test_branching_graph_is_no_chain():
    model = Wired(lambda m, x: x + m.identity(x), identity=nn.Linear(3, 3, bias=False)).eval()
    nn.init.eye_(model.identity.weight)
    assert lipschitz(model, (3,)).upper >= 2.0
    assert lipschitz(model, (3,)).upper == pytest.approx(2.0, rel=1e-7)


@pytest.mark.parametrize(
    ("pool", "true"), [((3, 1), 3.0), ((3, 2), 2.0), ((2, 2), 1.0), (((2, 3), (3, 2)), math.sqrt(2))]
)
def test_overlapping_max_pool_is_not_1_lipschitz(pool, true):
    upper = lipschitz(nn.Sequential(nn.MaxPool2d(*pool), nn.Flatten()).eval(), (1, 9, 9)).upper
    assert true <= upper <= true * (1 + 1e-8)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_bound_is_not_computed_on_stale_weights():
    model = randomised(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3)))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    model.eval()
    before = lipschitz(model, (2, 4, 4)).upper
    model[0].parametrizations.weight.original.data.mul_(100)
    after = lipschitz(model, (2, 4, 4)).upper
    assert after == pytest.approx(100 * before, rel=1e-6)
    assert after >= operator_norm(model, (2, 4, 4)) * (1 - 1e-6)


def test_tie_of_the_top_logits_is_not_certified():
    model = randomised(nn.Sequential(nn.Linear(4, 3, bias=False)))
    assert float(certified_radii(model, torch.zeros(1, 4))) == 0.0
    nn.init.zeros_(model[0].weight)
    assert float(certified_radii(model, torch.ones(1, 4))) == 0.0


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape", [(2, 7, 7), (2, 40, 40)])
def test_padding_that_repeats_pixels_counts(mode, kernel, shape):
    layer = randomised(nn.Conv2d(2, 2, kernel, padding=kernel // 2, padding_mode=mode))
    small = operator_norm(layer, (2, 7, 7))
    bounds = norm_bounds(layer, shape)
    if shape == (2, 7, 7):
        assert small <= bounds.upper <= small * (1 + 1e-8)
    else:
        assert bounds.lower <= bounds.upper
        assert bounds.upper >= bounds.lower * (1 + 1e-12)
    identity = nn.Conv2d(1, 1, kernel, padding=kernel // 2, padding_mode=mode, bias=False)
    nn.init.ones_(identity.weight)
    linear = float64(linear_map_of(identity, (1, 8, 8)))
    assert operator_norm(identity, (1, 8, 8)) <= torus_bound(linear) * (1 + 1e-12)


def test_circular_grid_is_the_picture_not_the_kernel():
    for seed in range(10):
        layer = randomised(nn.Conv2d(3, 3, 3, padding=1), seed)
        symbol = torch.fft.fft2(layer.weight.detach().double()).permute(2, 3, 0, 1)
        on_the_kernel = float(torch.linalg.matrix_norm(symbol, 2).max())
        exact = operator_norm(layer, (3, 8, 8))
        assert torus_bound(float64(linear_map_of(layer, (3, 8, 8)))) >= exact
        assert exact > 0.5 * on_the_kernel
    dense = nn.Conv2d(1, 1, 2, bias=False)
    dense.weight.data = torch.tensor([[[[1.0, 0.0], [1j.imag, -1.0]]]])
    assert norm_bounds(dense, (1, 9, 9)).upper >= operator_norm(dense, (1, 9, 9))


def test_grouped_convolution_is_the_maximum_not_the_product():
    layer = randomised(nn.Conv2d(6, 6, 3, padding=1, groups=6))
    exact = operator_norm(layer, (6, 6, 6))
    assert exact <= norm_bounds(layer, (6, 6, 6)).upper <= exact * (1 + 1e-8)
    assert torus_bound(float64(linear_map_of(layer, (6, 6, 6)))) >= exact


@pytest.mark.parametrize("padding", [0, 1, 2, 3, "same", "valid"])
def test_padding_is_that_of_the_layer(padding):
    layer = randomised(nn.Conv2d(2, 3, 5, padding=padding))
    exact = operator_norm(layer, (2, 8, 8))
    assert exact <= norm_bounds(layer, (2, 8, 8)).upper <= exact * (1 + 1e-8)


def test_input_normalisation_counts_by_its_smallest_std():
    model = nn.Sequential(Normalize([0.5, 0.4, 0.3], [0.25, 0.5, 0.1]), nn.Flatten()).eval()
    for norm in ("l2", "linf", "l1"):
        assert 10 <= lipschitz(model, (3, 2, 2), norm=norm).upper * (1 + 1e-7) <= 10.00001


def test_radii_are_in_raw_input_units():
    head = randomised(nn.Linear(12, 3))
    plain, scaled = (
        nn.Sequential(nn.Flatten(), head).eval(),
        nn.Sequential(Normalize(0.0, 0.1), nn.Flatten(), head).eval(),
    )
    x = random(5, 3, 4).float()
    torch.testing.assert_close(certified_radii(scaled, x / 10), certified_radii(plain, x) / 10, rtol=1e-4, atol=1e-6)


def test_batch_norm_takes_the_square_root():
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()))
    exact = operator_norm(model, (3, 2, 2))
    assert exact <= lipschitz(model, (3, 2, 2)).upper <= exact * (1 + 1e-7)


def test_every_pair_counts_not_the_runner_up_alone():
    model = nn.Sequential(nn.Linear(2, 3)).double().eval()
    model[0].weight.data = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 10.0]], dtype=torch.float64)
    model[0].bias.data = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert float(certified_radii(model, torch.zeros(1, 2).double())) == pytest.approx(0.1, rel=1e-6)


def test_bound_does_not_accumulate_over_batches_or_calls():
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x = random(9, 4).float()
    first = certified_radii(model, x, batch_size=2)
    torch.testing.assert_close(certified_radii(model, x, batch_size=2), first, rtol=0, atol=0)
    torch.testing.assert_close(certified_radii(model, x), first, rtol=1e-5, atol=1e-6)


def test_residual_sum_is_not_taken_for_1_lipschitz():
    block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    nn.init.eye_(block[0].weight)
    model = Residual(block).eval()
    assert lipschitz(model, (4,)).upper >= 2.0 >= matrix_norm(jacobian(exact_copy(model), torch.ones(4).double()))


def test_weights_of_truncated_series_are_measured_not_believed():
    """A layer called orthogonal whose weight is not: the bound is that of the weight."""
    layer = nn.Linear(4, 4, bias=False)
    generator = 0.9 * random(4, 4)
    skew = generator - generator.T
    layer.weight.data = (torch.eye(4) + skew + skew @ skew / 2).float()
    assert norm_bounds(layer, (4,)).lower > 1.001


def test_bf16_and_tf32_do_not_reach_the_logits():
    model, x = randomised(nn.Sequential(nn.Linear(64, 3))), random(10, 64).float()
    plain = certified_radii(model, x)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(certified_radii(model, x), plain)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_rounding_of_the_certifier_never_lowers_the_bound():
    for seed in range(200):
        matrix = random(12, 9, seed=seed).float()
        layer = nn.Linear(9, 12)
        layer.weight.data = matrix
        assert norm_bounds(layer, (9,)).upper >= matrix_norm(matrix.double())


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 2, 3, padding=1), nn.Linear(5, 4), nn.ConvTranspose2d(2, 2, 3)], ids=str
)
def test_zero_weights_give_0_not_nan(layer):
    nn.init.zeros_(layer.weight)
    shape = (5,) if isinstance(layer, nn.Linear) else (2, 40, 40)
    assert norm_bounds(layer, shape).upper == 0.0


def test_float_execution_lowers_the_margin():
    """A margin of one rounding step of the logits is worth nothing."""
    model = nn.Sequential(nn.Linear(1, 2)).eval()
    model[0].weight.data = torch.tensor([[0.0], [1e-12]])
    model[0].bias.data = torch.tensor([1.0 + 2**-23, 1.0])
    assert float(certified_radii(model, torch.zeros(1, 1))) == 0.0


@pytest.mark.parametrize(
    ("layer", "true"),
    [(nn.SiLU(), 1.09983), (nn.GELU(), 1.12890), (nn.GELU("tanh"), 1.12898), (nn.LeakyReLU(-2.0), 2.0)],
    ids=str,
)
def test_slopes_of_activations_include_the_peak(layer, true):
    assert lipschitz(nn.Sequential(layer).eval(), (3,)).upper >= true


def test_layers_without_bias_are_accepted():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False)).eval()
    assert certified_radii(model, random(4, 1, 4, 4).float()).shape == (4,)


def test_a_rule_must_be_given_by_hand():
    with pytest.raises(ValueError, match="has a rule already"):
        register_rule(nn.ReLU, factor=0.5)


def test_alias_changed_in_place_beside_a_large_constant_logit_is_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            with torch.no_grad():
                self.last.bias[2] = -1e4

        def forward(self, x):
            a = self.first(x)
            b = a
            a += self.second(x)
            return self.last(b)

    with pytest.raises(ValueError, match="in place"):
        lipschitz(Masked().eval(), (4,))


def test_bits_read_as_another_type_are_refused():
    class Recast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).view(torch.bfloat16)

    with pytest.raises(ValueError, match=r"a new type for the same bits|expected numbers no coarser"):
        lipschitz(Recast().half().eval(), (4,))


def test_global_hooks_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 10)
    try:
        with pytest.raises(ValueError, match="global forward hooks"):
            lipschitz(nn.Sequential(nn.Linear(3, 3)).eval(), (3,))
    finally:
        handle.remove()


def test_tiny_last_rows_do_not_underflow_in_the_pairs():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1e-170, 0, 0], [-1e-170, 0, 0]], dtype=torch.float64))
    first = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    assert float(lipschitz(model, (3,)).pairwise[0, 1]) >= 2e-170 * first


# Rows of the list of mistakes that came with certificates for the executed network, and misuse from public reports


def batched(*shape, seed=0):
    return random(*shape, seed=seed).float()


@pytest.mark.parametrize("method", ["lipsdp-network", "lipsdp-rand", "eclipse", "sdp"])
def test_forms_that_couple_neurons_are_no_method(method):
    """LipSDP-Network, with multipliers between neurons, gives less than the true constant: here 0.588 for 1.257."""
    with pytest.raises(ValueError, match="method"):
        lipschitz(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), (3,), method)


TIGHT = ("lipsdp", "lipsdp-layer", "lipsdp-first-order", "auto")


def tiny_net(seed, sizes=(2, 3, 3, 2)):
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return randomised(nn.Sequential(*layers[:-1]), seed, scale=1.0).double()


@pytest.mark.parametrize("seed", range(12))
def test_lipsdp_is_never_below_the_linear_pieces_that_are_reached(seed):
    model = tiny_net(seed)
    pieces = reachable(model)
    pair = np.linalg.norm(pieces[:, 0] - pieces[:, 1], axis=1).max()
    for method in TIGHT if seed < 3 else ("lipsdp",):
        bound = lipschitz(model, (2,), method, budget=5.0)
        assert bound.upper >= np.linalg.norm(pieces, 2, (1, 2)).max()
        assert float(bound.pairwise[0, 1]) >= pair


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999, 1.001, 1e6, math.nan, math.inf])
def test_multipliers_of_a_solver_are_not_taken_on_trust(factor, monkeypatch):
    """Whatever a solver answers, and calls optimal, is proved anew or not used."""
    solved = sdp.solve
    monkeypatch.setattr(sdp, "solve", lambda net, **options: [factor * one for one in solved(net, **options)])
    for seed in range(2):
        model = tiny_net(seed)
        bound = lipschitz(model, (2,), "lipsdp")
        assert np.linalg.norm(reachable(model), 2, (1, 2)).max() <= bound.upper < math.inf
        assert bound.upper <= lipschitz(model, (2,)).upper


def test_loose_answers_of_a_first_order_solver_prove_a_bound_not_below_the_optimum():
    """SCS's own value is below the optimum: its objective is no bound."""
    for seed in range(3):
        net = random_neurons((4, 6, 6), 2, seed)
        best = prove(net, solve(net)).upper
        assert best * (1 - 1e-7) <= prove(net, solve(net, solver="scs")).upper < best * 1.01


@pytest.mark.parametrize("status", ["infeasible", "unbounded", "infeasible_inaccurate"])
def test_the_status_of_a_solver_is_read(status, monkeypatch):
    monkeypatch.setattr(interior_point, "_run", lambda program, solver, seconds: setattr(program, "_status", status))
    with pytest.raises(SolverFailed, match=status):
        solve(random_neurons((4, 6), 2), solver="clarabel")


@pytest.mark.parametrize("coupling", ["network", "network-rand", "pairs", True])
def test_only_multipliers_of_single_neurons_or_layers_can_be_asked_for(coupling):
    with pytest.raises(ValueError, match="coupling"):
        solve(random_neurons((4, 6), 2), coupling=coupling)


@pytest.mark.parametrize(
    ("layer", "derivative"),
    [
        (nn.SiLU(), lambda v: special.expit(v) * (1 + v * (1 - special.expit(v)))),
        (nn.GELU(), lambda v: stats.norm.cdf(v) + v * stats.norm.pdf(v)),
        (nn.Softplus(), special.expit),
        (nn.Sigmoid(), lambda v: special.expit(v) * (1 - special.expit(v))),
        (nn.Tanh(), lambda v: 1 - np.tanh(v) ** 2),
        (nn.LeakyReLU(-2.0), lambda v: np.where(v > 0, 1.0, -2.0)),
        (nn.ELU(3.0), lambda v: np.where(v > 0, 1.0, 3.0 * np.exp(np.minimum(v, 0)))),
    ],
)
def test_slope_ranges_include_both_peaks(layer, derivative):
    """SiLU's slopes go down to -0.0998, not -0.0734, and those of GELU up to 1.129, not 1."""
    slopes = slopes_of(type(layer), Call("", layer, (), {}, (1,), (1,)))
    values = derivative(np.linspace(-12, 12, 200_001))
    assert slopes.low <= values.min()
    assert slopes.high >= values.max()
    assert slopes.high - slopes.low <= values.max() - values.min() + 1e-2


@pytest.mark.parametrize("method", TIGHT)
def test_tight_bounds_count_layers_that_are_no_plain_dense_ones(method):
    """A convolution is not skipped, a scale not taken for 1, and GELU not for ReLU."""
    model = randomised(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.GELU(), nn.Linear(8, 3))).double()
    before = lipschitz(model, (1, 3, 3), method, budget=5.0).upper
    model[0].weight.data.mul_(1000)
    assert lipschitz(model, (1, 3, 3), method, budget=5.0).upper == pytest.approx(1000 * before, rel=1e-3)
    scaled = nn.Sequential(model, Scale(100.0)).eval()
    with pytest.raises(ValueError, match="no Lipschitz rule"):
        lipschitz(scaled, (1, 3, 3), method)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.special.expm1(self.factor * x)


@pytest.mark.parametrize("method", TIGHT)
def test_tight_bounds_take_layers_without_bias(method):
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).eval()
    bound = lipschitz(model, (3,), method, budget=5.0)
    assert 0 < bound.upper <= lipschitz(model, (3,)).upper


@pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("constraint", [name for name in CONSTRAINTS if name not in ("penalty", *BASELINES)])
def test_a_threshold_holds_for_every_layer_and_gives_finite_outputs(constraint, threshold):
    model = randomised(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), scale=2.0)
    constrain(model, threshold, constraint, input_shape=(6,)).eval()
    assert bool(model(batched(5, 6)).isfinite().all())
    for layer in (model[0], model[2]):
        assert norm_bounds(layer, (6,)).upper <= threshold * (1 + 1e-4)
        assert matrix_norm(layer.weight.double()) <= norm_bounds(layer, (6,)).upper


def test_a_bound_of_other_weights_is_refused():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    bound = lipschitz(model, (4,))
    model[0].weight.data.mul_(100)
    with pytest.raises(ValueError, match="bound"):
        certified_radii(model, batched(3, 4), bound=bound)


def test_autocast_in_the_models_own_forward_is_refused():
    """A trace does not see it; in a branch of small values, a tolerance of the replay does not either."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.small = randomised(nn.Linear(16, 2)), randomised(nn.Linear(16, 2), 1, 0.01)

        def forward(self, x):
            wide = self.wide(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return wide + self.small(x)

    with pytest.raises(ValueError, match="the model"):
        certified_radii(Mixed().eval(), batched(3, 16))


def test_a_forward_that_gives_other_outputs_every_time_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = randomised(nn.Linear(4, 2))

        def forward(self, x):
            return self.linear(x) + 1e-5 * torch.randn(2)

    with pytest.raises(ValueError, match="the model"):
        certified_radii(Noisy().eval(), batched(3, 4))


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_class_masked_by_infinity_is_refused(value):
    model = randomised(nn.Sequential(nn.Linear(4, 3)))
    model[0].bias.data[2] = value
    with pytest.raises(ValueError, match="finite"):
        certified_radii(model, batched(2, 4))


def test_a_class_masked_by_a_large_number_does_not_limit_the_radius():
    model = randomised(nn.Sequential(nn.Linear(4, 3)))
    x = batched(20, 4)
    plain = certified_radii(nn.Sequential(two_rows(model[0])).eval(), x)
    model[0].bias.data[2] = -1e4
    masked = certified_radii(model, x)
    assert bool((masked <= plain).all())
    assert float((masked / plain).median()) > 0.9


def two_rows(layer):
    head = nn.Linear(layer.in_features, 2).eval()
    head.weight.data, head.bias.data = layer.weight.data[:2].clone(), layer.bias.data[:2].clone()
    return head


def test_a_normalisation_outside_the_model_gives_radii_in_other_units():
    """Where the data are normalised before the model, a radius counts standard deviations: put it into the model."""
    head, x, std = randomised(nn.Linear(12, 3)), batched(9, 12), 0.25
    inside = nn.Sequential(Normalize([0.0], [std]), nn.Flatten(), head).eval()
    outside = nn.Sequential(head).eval()
    raw = certified_radii(inside, x.reshape(9, 1, 12))
    normalised = certified_radii(outside, x / std)
    torch.testing.assert_close(raw, normalised * std, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e18, 1e30])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_squares_of_tiny_and_huge_weights_neither_vanish_nor_overflow(scale, norm):
    layer = randomised(nn.Linear(6, 5))
    layer.weight.data.mul_(scale)
    true = matrix_norm(layer.weight.double() / scale, norm) * scale
    assert true * (1 - 1e-12) <= norm_bounds(layer, (6,), norm).upper <= true * (1 + 1e-8)


def test_batch_norm_without_variance_and_eps_is_refused():
    layer = nn.BatchNorm1d(3, eps=0.0).eval()
    layer.running_var.zero_()
    with pytest.raises(ValueError, match="finite"):
        lipschitz(nn.Sequential(layer, nn.Linear(3, 2)).eval(), (3,))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1)], ids=str)
def test_probabilities_in_place_of_logits_are_refused(last):
    with pytest.raises(ValueError, match="no Lipschitz rule"):
        certified_radii(nn.Sequential(nn.Linear(3, 3), last).eval(), batched(2, 3))


def test_one_image_without_a_batch_axis_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match="expected"):
        certified_radii(model, batched(2, 2)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixels_as_integers_are_refused(dtype):
    with pytest.raises(ValueError, match="floating-point"):
        certified_radii(nn.Sequential(nn.Linear(4, 3)).eval(), torch.ones(2, 4, dtype=dtype))


def test_logits_that_tie_when_executed_have_no_radius():
    """The real margin is positive, but the executed logits are equal: float32 has no number between them."""
    model = nn.Sequential(nn.Linear(1, 2)).eval()
    model[0].weight.data = torch.tensor([[1.0], [0.0]])
    model[0].bias.data = torch.tensor([2.0**24, 2.0**24])
    x = torch.tensor([[0.25]])
    assert bool((model(x)[:, 0] == model(x)[:, 1]).all())
    assert float(certified_radii(model, x, torch.tensor([0]))) == 0.0
    assert float(certified_radii(model, x, torch.tensor([0]), arithmetic="real")) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "autoattack", "rounding-search"])
def test_attacks_do_not_overshoot_their_ball(name):
    model = randomised(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)))
    x = 0.3 + 0.4 * torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    options = {"autoattack": {"steps": 3, "queries": 5}}.get(name, {})
    found = attack(model, x, model(x).argmax(1), name, eps=0.05, **options)
    assert bool(((found.x_adv.double() - x.double()).norm(dim=1) <= 0.05).all())
    assert 0.0 <= found.accuracy <= 1.0


def test_a_shift_of_the_logits_does_not_hide_adversarial_points():
    model = randomised(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)))
    shifted = Wired(lambda m, x: m.inner(x) - 100.0, inner=model).eval()
    x = 0.3 + 0.4 * torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    distances = [attack(m, x, y, "cw", steps=30, searches=3).distance for m in (model, shifted)]
    assert bool(distances[0].isfinite().any())
    torch.testing.assert_close(*distances, rtol=1e-2, atol=1e-3)

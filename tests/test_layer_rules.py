import copy
import math

import flint
import pytest
import torch
from oracles import Wired, assert_sound, matrix_norm, operator_matrix, operator_norm, random, randomised
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn import functional

from speccert.certify import lipschitz, norm_bounds
from speccert.certify.layer_rules import GELU, GELU_TANH, SILU
from speccert.models import Householder, Normalize

NORMS = ("l2", "linf", "l1")

AFFINE = [
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(2, 7, bias=False), (2, 3, 2)),
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm1d(4), (4, 6)),
    (nn.BatchNorm2d(4, affine=False), (4, 3, 5)),
    (nn.BatchNorm3d(2, eps=0.5), (2, 3, 2, 2)),
    (nn.AvgPool1d(3, 2, 1), (2, 9)),
    (nn.AvgPool2d(2), (3, 6, 5)),
    (nn.AvgPool2d(3, 1, 1), (3, 6, 5)),
    (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (3, 6, 5)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 5)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 6, 8)),
    (nn.AvgPool2d(2, divisor_override=1), (2, 6, 5)),
    (nn.AvgPool2d((3, 2), (1, 2), (1, 0)), (2, 6, 5)),
    (nn.AvgPool3d(2), (1, 4, 4, 2)),
    (nn.AdaptiveAvgPool1d(3), (2, 7)),
    (nn.AdaptiveAvgPool2d(1), (3, 4, 5)),
    (nn.AdaptiveAvgPool2d((3, 4)), (2, 7, 5)),
    (nn.AdaptiveAvgPool2d((None, 7)), (2, 3, 5)),
    (nn.AdaptiveAvgPool3d(2), (2, 3, 4, 5)),
    (nn.Flatten(), (2, 3, 2)),
    (nn.Flatten(2), (2, 3, 2)),
    (nn.Flatten(1, 2), (2, 3, 2)),
    (nn.Unflatten(1, (2, 3)), (6, 2)),
    (nn.PixelShuffle(2), (4, 3, 2)),
    (nn.PixelUnshuffle(2), (2, 4, 2)),
    (nn.ChannelShuffle(2), (4, 3, 2)),
    (nn.ZeroPad1d((1, 2)), (2, 5)),
    (nn.ZeroPad2d((1, 2, 0, 3)), (2, 3, 4)),
    (nn.ZeroPad3d(1), (1, 2, 2, 2)),
    (nn.Identity(), (3, 2)),
    (nn.Dropout(0.5), (3, 2)),
    (nn.Dropout2d(0.5), (3, 2, 2)),
    (nn.AlphaDropout(0.5), (3, 2)),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("layer", "shape"), AFFINE, ids=str)
def test_affine_layers_have_the_norm_of_their_matrix(layer, shape, norm):
    layer = randomised(layer)
    exact = operator_norm(layer, shape, norm)
    bounds = norm_bounds(layer, shape, norm)
    assert exact * (1 - 1e-9) <= bounds.upper <= exact * (1 + 1e-8) or bounds.method == "isometry"
    assert exact <= bounds.upper * (1 + 1e-12)
    assert bounds.lower <= exact * (1 + 1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("layer", "shape"), AFFINE, ids=str)
def test_affine_layers_in_a_model_give_its_exact_pairwise_constants(layer, shape, norm):
    layer = copy.deepcopy(layer)
    images = math.prod(randomised(layer)(torch.zeros(2, *shape)).shape[1:])
    model = randomised(nn.Sequential(layer, nn.Flatten(), nn.Linear(images, 3))).double()
    matrix = operator_matrix(model, shape)
    order = {"l2": 2, "linf": 1, "l1": math.inf}[norm]
    exact = torch.linalg.vector_norm(matrix[:, None] - matrix[None], order, dim=2)
    found = lipschitz(model, shape, norm=norm)
    assert bool((exact <= found.pairwise).all())
    torch.testing.assert_close(found.pairwise, exact, rtol=1e-7, atol=1e-9)
    assert matrix_norm(matrix, norm) <= found.upper


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *((nn.AdaptiveAvgPool2d((9, 7)), (2, 40, 40)), (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (3, 40, 40))),
        *((nn.AvgPool2d(3, 1, 1), (2, 40, 40)), (nn.AvgPool2d(5, 2, 2, count_include_pad=False), (2, 34, 34))),
    ],
    ids=str,
)
def test_pools_too_large_for_a_matrix_are_bounded_by_one_channel(layer, shape):
    single = operator_norm(layer, (1, *shape[1:]))
    assert single <= norm_bounds(layer, shape).upper <= 1.02 * single


def test_batch_norm_uses_the_square_root_and_eps():
    layer = nn.BatchNorm2d(2, eps=0.21).eval()
    layer.running_var.copy_(torch.tensor([0.04, 1.0]))
    layer.weight.data = torch.tensor([50.0, -3.0])
    assert norm_bounds(layer, (2, 3, 3)).upper == pytest.approx(50 / math.sqrt(0.25), rel=1e-6)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_batch_norm_without_running_statistics_is_refused(kind):
    shape = (3, 4) if kind is nn.BatchNorm1d else (3, 4, 4)
    with pytest.raises(ValueError, match="running statistics"):
        norm_bounds(kind(3, track_running_stats=False).eval(), shape)
    model = nn.Sequential(kind(3, track_running_stats=False), nn.Flatten(), nn.Linear(math.prod(shape), 2)).eval()
    with pytest.raises(ValueError, match="running statistics"):
        lipschitz(model, shape)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Dropout(0.5), nn.AlphaDropout()], ids=str)
def test_layers_that_act_otherwise_in_training_mode_are_refused_there(layer):
    with pytest.raises(ValueError, match="eval mode"):
        norm_bounds(layer.train(), (3, 4, 4))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *(
            (nn.BatchNorm2d(3), (4, 2, 2)),
            (nn.BatchNorm2d(3), (3,)),
            (nn.BatchNorm1d(3), (4,)),
            (nn.Linear(3, 2), (4,)),
        ),
        *((nn.AvgPool2d(2), (4,)), (nn.AvgPool2d(2), (4, 4)), (nn.AvgPool1d(2), (4,)), (nn.AvgPool2d(5), (1, 3, 3))),
        *((nn.AdaptiveAvgPool2d(2), (4, 4)), (nn.AdaptiveAvgPool1d(2), (4,)), (nn.ZeroPad2d(-1), (2, 5, 5))),
        *((nn.PixelShuffle(2), (3, 2, 2)), (nn.Linear(3, 2), ()), (nn.Unflatten(1, (2, 2)), (5,))),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_a_layer_are_refused(layer, shape):
    with pytest.raises(ValueError, match=r"expected|does not fit") as caught:
        norm_bounds(layer.eval(), shape)
    assert len(str(caught.value).splitlines()) == 1


POOLS = [
    ((3, 1), {}, 9),
    ((3, 1, 1), {}, 9),
    ((3, 2), {}, 4),
    ((2, 2), {}, 1),
    ((2, 3), {}, 1),
    ((3, 2, 1), {"ceil_mode": True}, 4),
    ((5, 4, 1), {"ceil_mode": True}, 4),
    ((3, 1), {"dilation": 2}, 9),
    ((2, 2), {"dilation": 2}, 4),
    ((3, 2), {"dilation": 3}, 1),
    (((3, 2), (1, 2)), {}, 3),
]


def windows_over_pixels(arguments, options, shape):
    """How often each pixel is read, found by giving torch's own pool a picture of its indices."""
    pool = nn.MaxPool2d(*arguments, return_indices=True, **options)
    count, (height, width) = torch.zeros(shape, dtype=torch.int64), shape
    for row in range(height):
        for column in range(width):
            x = torch.zeros(1, 1, height, width)
            x[0, 0, row, column] = 1.0
            count[row, column] = int(pool(x)[0].sum())
    return int(count.max())


@pytest.mark.parametrize(("arguments", "options", "most"), POOLS)
def test_max_pool_counts_the_windows_over_one_pixel(arguments, options, most):
    shape = (9, 8)
    assert windows_over_pixels(arguments, options, shape) <= most
    exact = windows_over_pixels(arguments, options, shape)
    model = nn.Sequential(nn.MaxPool2d(*arguments, **options), nn.Flatten()).eval()
    for norm, constant in (("l2", math.sqrt(exact)), ("linf", 1.0), ("l1", exact)):
        upper = lipschitz(model, (2, *shape), norm=norm).upper
        assert constant <= upper <= constant * (1 + 1e-8)


@pytest.mark.parametrize(("arguments", "options", "most"), POOLS)
def test_max_pool_attains_its_l2_constant_on_one_bright_pixel(arguments, options, most):
    """Negative pictures too: padding is minus infinity, never zero."""
    pool = nn.MaxPool2d(*arguments, **options)
    upper = lipschitz(nn.Sequential(pool, nn.Flatten()).eval(), (1, 9, 8)).upper
    x = -torch.rand(64, 1, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = x + 0.3 * random(*x.shape)
    for a, b in ((x, other), (10 * x, x + random(*x.shape, seed=2))):
        ratio = (pool(a) - pool(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
        assert bool((ratio <= upper).all())


@pytest.mark.parametrize("shape", [(9, 8), (9,)])
def test_max_pool_that_would_take_the_batch_for_channels(shape):
    pool = nn.MaxPool2d(3, 1, 1) if len(shape) == 2 else nn.MaxPool1d(3, 1, 1)
    model = nn.Sequential(pool, nn.Flatten()).eval()
    try:
        upper = lipschitz(model, shape).upper
    except ValueError:
        return
    assert upper >= math.sqrt(3.0 ** len(shape))


def test_max_pool_1d_and_3d():
    one = nn.Sequential(nn.MaxPool1d(3, 1), nn.Flatten()).eval()
    three = nn.Sequential(nn.MaxPool3d(3, 1), nn.Flatten()).eval()
    assert lipschitz(one, (2, 9)).upper == pytest.approx(math.sqrt(3), rel=1e-8)
    assert lipschitz(three, (1, 5, 5, 5)).upper == pytest.approx(math.sqrt(27), rel=1e-8)


def steepest(function):
    """sup |f'| by a fine grid, then bounded minimisation around the best point."""
    x = torch.linspace(-12, 12, 240001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    best = float(x.detach()[slope.abs().argmax()])

    def negative(value):
        point = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return -abs(float(torch.autograd.grad(function(point), point)[0]))

    return -minimize_scalar(negative, bounds=(best - 1e-3, best + 1e-3), method="bounded", options={"xatol": 1e-12}).fun


@pytest.mark.parametrize(
    ("function", "constant", "loose"),
    [
        (functional.gelu, GELU, 1e-10),
        (lambda x: functional.gelu(x, approximate="tanh"), GELU_TANH, 1e-3),
        (functional.silu, SILU, 1e-10),
    ],
)
def test_smooth_activations_have_their_largest_slope(function, constant, loose):
    exact = steepest(function)
    assert exact <= constant <= exact + loose


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2.0, 0.5), nn.Tanh(), nn.Softsign(), nn.Softshrink(0.3), nn.LogSigmoid()),
    *(nn.Tanhshrink(), nn.Sigmoid(), nn.Softplus(), nn.Softplus(3.0, 40), nn.Softplus(0.1), nn.LeakyReLU(0.2)),
    *(
        nn.LeakyReLU(3.0),
        nn.LeakyReLU(-2.5),
        nn.ELU(),
        nn.ELU(4.0),
        nn.ELU(-4.0),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
    ),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_activations_are_bounded_by_their_largest_slope(layer):
    exact = steepest(layer)
    for norm in NORMS:
        upper = lipschitz(nn.Sequential(layer).eval(), (3,), norm=norm).upper
        assert exact <= upper * (1 + 1e-12)
        assert upper <= max(exact, 1.0) * 1.01 or isinstance(layer, nn.ELU)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0, 19.0, 81.0, 200.0, math.nan])
def test_softplus_that_jumps_or_overflows_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        lipschitz(nn.Sequential(nn.Softplus(1.0, threshold)).eval(), (3,))


FUNCTIONS = {
    "relu": lambda m, x: functional.relu(m.fc(x)),
    "relu by keyword": lambda m, x: functional.relu(input=m.fc(x)),
    "relu method": lambda m, x: m.fc(x).relu(),
    "tanh": lambda m, x: torch.tanh(m.fc(x)).tanh(),
    "sigmoid": lambda m, x: functional.sigmoid(m.fc(x)).sigmoid(),
    "abs": lambda m, x: abs(m.fc(x)).abs(),
    "gelu": lambda m, x: functional.gelu(m.fc(x)),
    "gelu by tanh": lambda m, x: functional.gelu(m.fc(x), approximate="tanh"),
    "silu": lambda m, x: functional.silu(m.fc(x)),
    "softplus": lambda m, x: functional.softplus(m.fc(x), 2.0, 30.0),
    "softplus by keyword": lambda m, x: functional.softplus(m.fc(x), beta=2.0, threshold=30.0),
    "linear": lambda m, x: functional.linear(x, m.fc.weight, m.fc.bias),
    "linear by keyword": lambda m, x: functional.linear(input=x, weight=m.fc.weight),
    "factor": lambda m, x: 3.0 * m.fc(x) * 0.5,
    "factor by keyword": lambda m, x: torch.mul(m.fc(x), other=-2.0),
    "factor a feature": lambda m, x: m.fc(x) * m.scale,
    "factor a feature with a batch axis": lambda m, x: m.fc(x) * m.scale[None],
    "factor before the layer": lambda m, x: m.fc(x * m.before[None]),
    "divisor": lambda m, x: m.fc(x) / m.scale,
    "divisor by keyword": lambda m, x: torch.div(m.fc(x), other=m.scale),
    "divisor before the layer": lambda m, x: m.fc(x / m.before[None]),
    "negated": lambda m, x: -m.fc(-x),
    "shifted": lambda m, x: 1 - m.fc(x + 2) + m.scale,
    "reshaped": lambda m, x: m.fc(x.view(-1, 2, 2).flatten(1).unsqueeze(1).squeeze(1)),
    "flattened": lambda m, x: torch.flatten(m.fc(x).reshape(x.shape[0], 3, 1), 1),
    "reshaped by size": lambda m, x: m.fc(x.reshape(x.size(0), -1)).contiguous().clone(),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_and_methods_are_sound(function):
    model = randomised(
        Wired(function, {"scale": random(3), "before": random(4)}, fc=nn.Linear(4, 3)), scale=1.0
    ).double()
    assert_sound(model, (4,))


POOL_FUNCTIONS = {
    "max pool": lambda m, x: functional.max_pool2d(x, 3, 1),
    "max pool with ceil": lambda m, x: functional.max_pool2d(x, 3, 2, 1, 1, True),
    "max pool by keyword": lambda m, x: functional.max_pool2d(input=x, kernel_size=2, stride=1, padding=1),
    "average pool": lambda m, x: functional.avg_pool2d(x, 2),
    "average pool with options": lambda m, x: functional.avg_pool2d(x, 3, 2, 1, True, False),
    "average pool with a divisor": lambda m, x: functional.avg_pool2d(x, 2, divisor_override=1),
    "mean": lambda m, x: x.mean((2, 3)),
    "mean, kept": lambda m, x: torch.mean(x, dim=-1, keepdim=True),
    "mean by keyword": lambda m, x: torch.mean(input=x, dim=(2, 3)),
}


@pytest.mark.parametrize("function", POOL_FUNCTIONS.values(), ids=POOL_FUNCTIONS)
def test_pool_functions_are_sound(function):
    images = function(None, torch.zeros(1, 2, 6, 5)).numel()
    model = Wired(lambda m, x: m.fc(function(m, x).flatten(1)), fc=nn.Linear(images, 3))
    assert_sound(randomised(model).double(), (2, 6, 5))


REFUSED = {
    "rounded division": lambda m, x: torch.div(m.fc(x), 2.0, rounding_mode="floor"),
    "rounded division as a method": lambda m, x: m.fc(x).div(2.0, rounding_mode="trunc"),
    "floor division": lambda m, x: m.fc(x) // 2,
    "constant over x": lambda m, x: 1.0 / m.fc(x),
    "square": lambda m, x: m.fc(x) * m.fc(x),
    "x times x": lambda m, x: m.fc(x * x),
    "power": lambda m, x: m.fc(x) ** 2,
    "weight from x": lambda m, x: functional.linear(m.fc(x), torch.relu(x)),
    "bias from x": lambda m, x: functional.linear(x, m.fc.weight, m.fc(x)[0]),
    "weight times x": lambda m, x: functional.linear(m.fc.weight, x),
    "chunk": lambda m, x: m.fc(x).chunk(3, 1)[0],
    "split": lambda m, x: torch.split(m.fc(x), 1, 1)[0],
    "index": lambda m, x: m.fc(x)[:, :2],
    "softmax": lambda m, x: functional.softmax(m.fc(x), 1),
    "product of matrices": lambda m, x: x @ m.fc.weight.t(),
    "sum over features": lambda m, x: torch.sum(m.fc(x), 1, keepdim=True),
    "functional dropout": lambda m, x: functional.dropout(m.fc(x), 0.5),
    "alpha": lambda m, x: torch.add(m.fc(x), m.fc(x), alpha=100),
    "alpha in a difference": lambda m, x: torch.sub(m.fc(x), m.fc(x), alpha=100),
    "broadcast sum": lambda m, x: m.fc(x) + m.fc(x).mean(1, keepdim=True),
    "division by zero": lambda m, x: m.fc(x) / 0.0,
    "infinite factor": lambda m, x: m.fc(x) * float("inf"),
    "factor a sample": lambda m, x: m.fc(x) * torch.arange(5.0).double()[:, None],
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_operations_without_a_bound_are_refused(function):
    model = randomised(Wired(function, fc=nn.Linear(4, 3))).double()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the messages differ)
        lipschitz(model, (4,))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("layer", [nn.Softmax(1), nn.LayerNorm(3), nn.Hardshrink(), nn.GroupNorm(1, 3), nn.PReLU()])
def test_layers_without_a_rule_are_refused_by_name(layer):
    model = nn.Sequential(nn.Linear(3, 3), layer).eval()
    with pytest.raises(ValueError, match=rf"1: no Lipschitz rule for .*{type(layer).__name__}.*register_rule"):
        lipschitz(model, (3,))


def test_dropout_in_eval_mode_is_the_identity():
    model = randomised(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))).double()
    assert lipschitz(model, (4,)).upper == pytest.approx(operator_norm(model[0], (4,)), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_every_precision_are_read_exactly(dtype):
    model = randomised(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)))
    model = model.to(dtype)
    exact = operator_norm(model, (2, 4, 4))
    found = lipschitz(model, (2, 4, 4)).upper
    assert exact <= found <= exact * (1 + 1e-8)


# against exact arithmetic: the rounding of what is computed from weights


def dominates(upper, exact):
    """Whether a float is surely at least a ball, and hardly more."""
    return flint.arb(upper) >= exact.lower() and flint.arb(upper) >= exact and flint.arb(upper) <= exact * (1 + 1e-13)


@pytest.mark.parametrize("seed", range(20))
def test_batch_norm_bounds_dominate_the_exact_scale(seed):
    layer = randomised(nn.BatchNorm2d(1), seed=seed)
    layer.eps = 1e-5
    with flint.ctx.workprec(200):
        weight, variance = flint.arb(float(layer.weight.detach())), flint.arb(float(layer.running_var))
        exact = abs(weight) / (variance + flint.arb(layer.eps)).sqrt()
        for norm in NORMS:
            assert dominates(norm_bounds(layer, (1, 2, 2), norm).upper, exact)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kernel", [3, 5, 7, 11, 13])
def test_averages_dominate_the_exact_share(kernel, norm):
    """One window: entries 1/k, of norm 1/sqrt(k) in l2, 1 in linf and 1/k in l1."""
    count = flint.arb(kernel)
    with flint.ctx.workprec(200):
        exact = {"l2": 1 / count.sqrt(), "linf": flint.arb(1), "l1": 1 / count}[norm]
        for layer in (nn.AvgPool1d(kernel), nn.AdaptiveAvgPool1d(1), nn.AvgPool1d(kernel, ceil_mode=True)):
            assert dominates(norm_bounds(layer, (2, kernel), norm).upper, exact)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("divisor", [0.1, 3.0, 0.7, -49.0])
def test_divisors_dominate_the_exact_reciprocal(divisor, norm):
    model = Wired(lambda m, x: torch.relu(x / divisor)).eval()
    with flint.ctx.workprec(200):
        exact = 1 / abs(flint.arb(divisor))
        assert dominates(lipschitz(model, (2,), norm=norm).upper, exact)
        for std in (0.2507, 0.3):
            layer = Normalize(0.5, std)
            assert dominates(norm_bounds(layer, (1, 2, 2), norm).upper, 1 / flint.arb(float(layer.std)))


@pytest.mark.parametrize("seed", range(20))
def test_householder_factors_dominate_the_exact_ones(seed):
    layer = Householder(2)
    layer.angle.data = random(*layer.angle.shape, seed=seed).float()
    with flint.ctx.workprec(200):
        angle = flint.arb(float(layer.angle.detach().flatten()[0]))
        exact = abs(angle.cos()) + abs(angle.sin())
        for norm in ("linf", "l1"):
            assert dominates(lipschitz(nn.Sequential(layer).eval(), (2,), norm=norm).upper, exact)


@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
def test_max_pool_roots_are_rounded_up(kernel):
    upper = lipschitz(nn.Sequential(nn.MaxPool1d(kernel, 1), nn.Flatten()).eval(), (1, 20)).upper
    assert dominates(upper, flint.arb(kernel).sqrt())


def test_slopes_of_smooth_activations_are_rounded_up():
    """GELU'(x) = Phi(x) + x phi(x) is largest at sqrt(2); the others by three-way search in balls of 200 bits."""
    with flint.ctx.workprec(200):
        one, pi = flint.arb(1), flint.arb.pi()
        assert flint.arb(GELU) >= (1 + one.erf()) / 2 + flint.arb(2).sqrt() * (-one).exp() / (2 * pi).sqrt()
        assert flint.arb(SILU) >= highest(lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))), 2, 3)
        assert flint.arb(GELU_TANH) >= highest(tanh_slope, 1, 2)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def tanh_slope(x):
    scale, cubic = (2 / flint.arb.pi()).sqrt(), flint.arb("0.044715")
    inner = (scale * (x + cubic * x**3)).tanh()
    return (1 + inner) / 2 + x / 2 * (1 - inner * inner) * scale * (1 + 3 * cubic * x * x)


def highest(function, low, high):
    low, high = flint.arb(low), flint.arb(high)
    for _ in range(150):
        left, right = (low + (high - low) / 3).mid(), (high - (high - low) / 3).mid()
        low, high = (left, high) if function(left).mid() < function(right).mid() else (low, right)
    return function(low)


def test_factors_that_float64_rounds_are_refused():
    for factor in (2**53 + 1, torch.tensor([2**53 + 1])):
        with pytest.raises(ValueError, match="a factor that float64 holds exactly"):
            lipschitz(Wired(lambda m, x, c=factor: x * c).double().eval(), (3,))


def test_a_mean_in_another_type_is_refused():
    with pytest.raises(ValueError, match="a mean with no arguments but dim and keepdim"):
        lipschitz(Wired(lambda m, x: x.mean(2, dtype=torch.float64)).eval(), (3, 4))


@pytest.mark.parametrize("layer", [nn.LeakyReLU(float("nan")), nn.ELU(float("inf")), nn.LeakyReLU(float("-inf"))])
def test_slopes_that_are_no_numbers_are_refused(layer):
    with pytest.raises(ValueError, match="expected a finite"):
        lipschitz(nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 2)).eval(), (2,))

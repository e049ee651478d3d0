import itertools

import numpy as np
import pytest
import torch
from flint import arb, ctx
from torch import nn

from speccert.certify.checker.balls import approximate, balls, euclidean, fixed, from_balls, plus, product, times
from speccert.certify.checker.chains import Chain, Concat, Sum
from speccert.certify.checker.convolution import Convolution, Transposed
from speccert.certify.checker.maps import Dense, Linear, ones
from speccert.certify.checker.matrices import absolute_norm, greatest_sum, inverse_norm, materialised, rows_of
from speccert.certify.checker.network import read, traced
from speccert.certify.checker.samples import forward
from speccert.models import GroupSort, Householder, MaxMin, Normalize


@pytest.fixture(autouse=True)
def _precision():
    with ctx.workprec(128):
        yield


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(5, 7),
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(3, 3) * 1e-30,
        torch.randn(6).half(),
        torch.randn(6).bfloat16(),
        torch.zeros(2, 2),
        torch.tensor([5e-324, 1e-310, 0.0], dtype=torch.float64),
        torch.tensor(3.0),
    ],
)
def test_conversion_is_exact(values):
    found = fixed(values)
    error = np.abs(approximate(found) - values.double().numpy()).max()
    assert found.err == 0 or error <= float(found.radius.upper())
    assert error <= float(values.abs().max()) * 2.0**-100 or found.err > 0


def test_conversion_of_a_wide_range_says_its_error():
    values = torch.tensor([1e300, 1e-300], dtype=torch.float64)
    found = fixed(values)
    assert found.err > 0
    assert all(ball.contains(arb(float(v))) for ball, v in zip(balls(found), values, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        fixed(torch.tensor([1.0, value]))


def test_arithmetic_encloses_exact_results():
    third, root = from_balls([arb(1) / 3, arb(2)], (2, 1)), from_balls([arb(2).sqrt(), arb(5)], (1, 2))
    found = balls(product(third, root))
    for ball, (a, b) in zip(found, itertools.product((arb(1) / 3, arb(2)), (arb(2).sqrt(), arb(5))), strict=True):
        assert ball.contains(a * b)
    assert balls(plus(third, third, -1))[0].contains(0)
    assert balls(times(third, third))[0].contains(arb(1) / 9)
    assert euclidean(from_balls([arb(3), arb(4)], (1, 2)))[0] >= 5


def _conv(mode, stride, groups):
    return nn.Conv2d(4, 6, (3, 2), stride=stride, padding=(2, 1), dilation=(1, 2), groups=groups, padding_mode=mode)


LAYERS = {
    **{
        f"{mode} {stride} {groups}": (_conv(mode, stride, groups), (4, 6, 5))
        for mode in ("zeros", "circular", "reflect", "replicate")
        for stride in (1, (2, 3))
        for groups in (1, 2)
    },
    "same": (nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 5, 5)),
    "conv1d": (nn.Conv1d(2, 3, 4, stride=2), (2, 9)),
    "conv3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 3)),
    "transposed with rests": (nn.ConvTranspose2d(2, 3, 2, stride=2, dilation=3, output_padding=2), (2, 3, 3)),
    "linear": (nn.Linear(5, 3), (4, 5)),
    "batch norm": (nn.BatchNorm2d(3), (3, 2, 2)),
    "normalize": (Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), (3, 2, 2)),
    "average": (nn.AvgPool2d(3, 2, 1), (2, 7, 7)),
    "average, ceil": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 6)),
    "average, ceil, own count": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 6, 6)),
    "average, divisor": (nn.AvgPool2d(2, divisor_override=3), (2, 4, 4)),
    "average 1d": (nn.AvgPool1d(3, 2, 1), (2, 8)),
    "adaptive": (nn.AdaptiveAvgPool2d((3, None)), (2, 7, 4)),
    "shuffle": (nn.PixelShuffle(2), (8, 3, 3)),
    "unshuffle": (nn.PixelUnshuffle(2), (2, 4, 4)),
    "channels": (nn.ChannelShuffle(2), (4, 2, 2)),
    "pad": (nn.ZeroPad2d((1, 2, 0, 1)), (2, 3, 3)),
    "flatten": (nn.Flatten(), (2, 3, 3)),
}


def _affine(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer, shape, read(traced(nn.Sequential(layer), shape)).nodes[1]


@pytest.mark.parametrize("name", LAYERS)
def test_affine_layers_against_torch(name):
    layer, shape, node = _affine(name)
    x = torch.randn(2, *shape, dtype=torch.float64)
    image = node.linear.apply(fixed(x))
    image = image if node.offset is None else plus(image, node.offset)
    expected = layer(x).detach().numpy()
    assert np.abs(approximate(image) - expected).max() <= 1e-12
    assert node.shape == expected.shape[1:]


@pytest.mark.parametrize("name", LAYERS)
def test_adjoints_matrices_and_sums(name):
    layer, shape, node = _affine(name)
    size = int(np.prod(shape))
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T.numpy()
    for found in (materialised(node.linear), rows_of(node.linear)):
        assert np.abs(approximate(found) - matrix).max() <= 1e-12
    sums = {"linf": np.abs(matrix).sum(1).max(), "l1": np.abs(matrix).sum(0).max()}
    for norm, expected in sums.items():
        assert greatest_sum(node.linear, norm) >= expected * (1 - 1e-12)
        if "circular" not in name and "re" not in name:  # no entries that meet
            assert greatest_sum(node.linear, norm) <= expected * (1 + 1e-12)
    assert absolute_norm(node.linear) >= np.linalg.norm(matrix, 2) * (1 - 1e-12)
    if matrix.shape[0] == matrix.shape[1]:
        inverse = inverse_norm(node.linear)
        assert not inverse.is_finite() or inverse >= np.linalg.norm(np.linalg.inv(matrix), 2) * (1 - 1e-12)


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4), nn.Hardtanh(-float("inf"), 0.4),
    nn.Tanh(), nn.Softsign(), nn.Softshrink(0.2), nn.LogSigmoid(),
    nn.Tanhshrink(), nn.Sigmoid(), nn.Softplus(), nn.Softplus(2.0), nn.LeakyReLU(0.3), nn.LeakyReLU(-2.0), nn.ELU(),
    nn.ELU(1.5), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), MaxMin(), GroupSort(4), Householder(8), nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, ceil_mode=True), nn.MaxPool2d(3, 1, 1, dilation=2),
]  # fmt: skip


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_activations_against_torch(layer):
    torch.manual_seed(0)
    layer = layer.double().eval()
    if isinstance(layer, Householder):
        nn.init.uniform_(layer.angle, -4, 4)
    node = read(traced(nn.Sequential(layer), (8, 5, 5))).nodes[1]
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64) * 3
    assert np.abs(approximate(node.activation.apply(fixed(x))) - layer(x).detach().numpy()).max() <= 1e-14
    for norm, order in (("l2", 2), ("linf", np.inf), ("l1", 1)):
        points = x[:1].clone().requires_grad_()
        jacobian = torch.autograd.functional.jacobian(layer, points).reshape(-1, points.numel())
        found = float(torch.linalg.matrix_norm(jacobian, ord=order))
        assert node.activation.factor(norm) >= found * (1 - 1e-9)


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.Sigmoid()], ids=str)
def test_activations_far_from_zero(layer):
    node = read(traced(nn.Sequential(layer), (8,))).nodes[1]
    x = torch.tensor([[-1e4, -700.0, -30.0, -1e-30, 0.0, 1e-30, 30.0, 1e4]], dtype=torch.float64)
    found = approximate(node.activation.apply(fixed(x)))
    assert np.abs(found - layer(x).numpy()).max() <= 1e-8


def _derivative(name, x):
    """f' and f'' of SiLU and of GELU's tanh form in balls."""
    if name == "silu":
        s = ((x / 2).tanh() + 1) / 2
        slope = s * (1 - s)
        return s + x * slope, slope * (2 + x * (1 - 2 * s))
    a, b = (2 / arb.pi()).sqrt(), arb(44715) / 10**6
    t = (a * (x + b * x * x * x)).tanh()
    inner, second = a * (1 + 3 * b * x * x), 6 * a * b * x
    slope = 1 - t * t
    return (1 + t) / 2 + x * slope * inner / 2, slope * inner + x * slope * (second - 2 * t * inner * inner) / 2


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_largest_slopes_are_proved(name):
    """|f'| stays below the table's factor on all of [-40, 40] (branch and bound), and nearly reaches it."""
    layer = nn.SiLU() if name == "silu" else nn.GELU("tanh")
    factor = read(traced(nn.Sequential(layer), (2,))).nodes[1].activation.factor("l2")
    left, best, steps = [(arb(-40), arb(40))], 0.0, 0
    while left:
        low, high = left.pop()
        middle, half = (low + high) / 2, (high - low) / 2
        whole = arb(middle.mid(), half.abs_upper())
        steps += 1
        assert steps < 20000
        value, bend = _derivative(name, arb(middle.mid()))[0], _derivative(name, whole)[1]
        best = max(best, float(value.mid()))
        direct = _derivative(name, whole)[0]
        taylor = value + bend * arb(0, half.abs_upper())
        if not (abs(direct) < factor or abs(taylor) < factor):
            left += [(low, arb(middle.mid())), (arb(middle.mid()), high)]
    assert factor - best < 1e-11


def test_a_network_against_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = torch.rand(4, 2, 5, 5)
    with torch.no_grad():
        expected = model.double()(x.double())
    for row, found in enumerate(forward(read(traced(model, (2, 5, 5))), x, str)):
        for i in range(3):
            assert abs(float(found.logits[i].mid()) - float(expected[row, i])) <= 1e-14
            other = (i + 1) % 3
            assert (
                abs(float(found.difference(i, other).mid()) - float(expected[row, i] - expected[row, other])) <= 1e-14
            )


def test_a_transposed_convolution_is_the_adjoint_of_its_forward():
    node = _affine("transposed")[2]
    assert isinstance(node.linear, Transposed)
    assert isinstance(node.linear.forward, Convolution)
    x = ones(node.linear.in_shape)
    expected = approximate(node.linear.forward.adjoint(x))
    assert np.array_equal(approximate(node.linear.apply(x)), expected)


def test_a_deep_chain_of_sums_takes_no_time_that_doubles_with_each():
    """As a matrix, transposed and in absolute values; forty sums of two would otherwise be 2^40 products."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(40)]
    first = Dense(fixed(torch.randn(4, 4, dtype=torch.float64)), (4,))
    linear: Linear = first
    expected, sizes = approximate(first.weight), abs(approximate(first.weight))
    for number, layer in enumerate(layers):
        weight = layer.weight.detach()
        after = Chain((linear, Dense(fixed(weight), (4,))), (4,))
        if number % 3:
            linear = Sum(linear, after)
        else:
            both = Concat((linear, after), 0, (8,))
            linear = Chain((both, Dense(fixed(torch.eye(4, dtype=torch.float64).repeat(1, 2)), (8,))), (4,))
        expected, sizes = expected + weight.numpy() @ expected, sizes + abs(weight.numpy()) @ sizes
    for found in (materialised(linear), rows_of(linear)):
        assert np.abs(approximate(found) - expected).max() <= 1e-12 * np.abs(expected).max()
    assert float(greatest_sum(linear, "linf").mid()) == pytest.approx(sizes.sum(1).max(), rel=1e-12)
    assert float(greatest_sum(linear, "l1").mid()) == pytest.approx(sizes.sum(0).max(), rel=1e-12)

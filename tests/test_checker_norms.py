import itertools

import numpy as np
import pytest
import torch
from flint import arb, ctx
from torch import nn

from speccert.certify.checker.balls import fixed
from speccert.certify.checker.folding import folded
from speccert.certify.checker.matrices import Refused
from speccert.certify.checker.network import read, traced
from speccert.certify.checker.norms import absolute_sum, block, proves_below
from speccert.certify.checker.runs import prove
from speccert.certify.checker.torus import default_torus, least_side, padding_repeats, torus_below, torus_problem
from speccert.certify.claims import PieceClaim


@pytest.fixture(autouse=True)
def _precision():
    with ctx.workprec(128):
        yield


def _norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.to(torch.complex128), 2))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 4), (10, 200), (64, 64), (65, 80), (200, 150)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norms_are_proved_just_above_and_never_below(shape, dtype, scale):
    torch.manual_seed(0)
    matrix = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    found, norm = block(fixed(matrix)), _norm(matrix.double())
    slack = 1e-15 if min(shape) <= 64 else 5e-13
    assert proves_below(found, arb(norm * (1 + slack)))
    assert proves_below(found, arb(norm * 2))
    assert not proves_below(found, arb(norm * (1 - 1e-14)))
    assert not proves_below(found, arb(norm / 2))
    assert not proves_below(found, arb(-1))


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_norms_of_any_scale(scale):
    torch.manual_seed(0)
    matrix = torch.randn(70, 70, dtype=torch.float64)
    found, norm = block(fixed(matrix * scale)), _norm(matrix) * scale
    assert proves_below(found, arb(norm * (1 + 1e-12)))
    assert not proves_below(found, arb(norm * (1 - 1e-12)))


def test_norms_that_are_attained_exactly():
    assert proves_below(block(fixed(torch.eye(5))), arb(1))
    assert not proves_below(block(fixed(torch.eye(5))), arb(1) - arb(2) ** -100)
    assert proves_below(block(fixed(torch.zeros(3, 4))), arb(0))
    assert proves_below(block(fixed(torch.tensor([[3.0], [4.0]]))), arb(5))
    assert not proves_below(block(fixed(torch.tensor([[3.0], [4.0]]))), arb(5) - arb(2) ** -90)


@pytest.mark.parametrize("side", [3, 40, 70])
def test_complex_blocks(side):
    torch.manual_seed(0)
    matrix = torch.randn(side, side + 5, dtype=torch.complex128)
    found, norm = block(fixed(matrix.real), fixed(matrix.imag)), _norm(matrix)
    assert proves_below(found, arb(norm * (1 + 1e-12)))
    assert not proves_below(found, arb(norm * (1 - 1e-12)))


def test_the_errors_of_entries_count():
    exact = fixed(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    loose = type(exact)(exact.mant, exact.exp, exact.err + (1 << 20))
    norm = arb(_norm(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()))
    assert proves_below(block(exact), norm * (1 + arb(2) ** -40))
    assert not proves_below(block(loose), norm + loose.radius * 5)
    assert proves_below(block(loose), norm * (1 + arb(2) ** -40) + loose.radius * 6)


def test_sums_of_absolute_values_are_exact():
    matrix = fixed(torch.tensor([[1.0, -2.0], [0.5, 4.0]]))
    assert absolute_sum(matrix, "linf") == 4.5
    assert absolute_sum(matrix, "l1") == 6


def _convolution(mode, stride, padding, kernel=3, shape=(2, 7, 6), dilation=1):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation, padding_mode=mode).double()
    node = read(traced(nn.Sequential(layer).eval(), shape)).nodes[1]
    size = int(np.prod(shape))
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1)
    return node.linear, _norm(matrix)


CASES = [
    ("zeros", 1, 1), ("zeros", 1, 2), ("zeros", (2, 1), 1), ("zeros", 3, 0), ("circular", 1, 1), ("circular", 2, 1),
    ("reflect", 1, 2), ("reflect", 2, 1), ("replicate", 1, 2), ("replicate", 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [3, 4])
def test_no_legal_torus_proves_less_than_the_norm(case, dilation, kernel):
    mode, stride, padding = case
    convolution, norm = _convolution(mode, stride, padding, kernel, (2, 9, 8), dilation)
    steps = (0,) if mode == "circular" else (0, 1, 2)
    twists = (0.0,) if mode == "circular" else (0.0, 0.5)
    tried = 0
    for grow, twist, alias in itertools.product(steps, twists, (1, max(convolution.stride))):
        sides = [least_side(convolution, axis) + grow for axis in range(2)]
        axes = tuple((side, alias if side % alias == 0 else 1, twist) for side in sides)
        if not torus_problem(convolution, axes):
            tried += 1
            assert torus_below(convolution, axes, arb(norm * (1 - 1e-9)), str) is not None
    assert tried


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_torus_bound_is_tight(mode):
    convolution, norm = _convolution(mode, 1, 1, shape=(2, 16, 16))
    axes = default_torus(convolution)
    assert torus_below(convolution, axes, arb(norm * 1.03), str) is None
    if mode == "circular":
        assert padding_repeats(convolution) == 1
        assert torus_below(convolution, axes, arb(norm * (1 + 1e-10)), str) is None


def test_a_torus_block_by_numpy():
    convolution, _ = _convolution("zeros", 1, 1)
    sides = [least_side(convolution, axis) for axis in range(2)]
    weight = np.array([[int(v) for v in row] for row in convolution.weight.mant.reshape(6, -1)], dtype=float)
    weight = np.ldexp(weight, convolution.weight.exp).reshape(3, 2, 3, 3)
    symbol = np.fft.fft2(weight, s=sides).transpose(2, 3, 0, 1).reshape(-1, 3, 2)
    largest = np.linalg.norm(symbol, 2, axis=(1, 2)).max()
    axes = tuple((side, 1, 0.0) for side in sides)
    assert torus_below(convolution, axes, arb(largest * (1 + 1e-10)), str) is None
    assert torus_below(convolution, axes, arb(largest * (1 - 1e-10)), str) is not None


def _claim(upper, method="materialised", **more):
    return PieceClaim("Chain", (), (), upper, method, **more)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_cancelling_entries_in_every_norm(norm):
    """conv, batch norm and a linear layer in one run: its matrix, whose norm is far below the product's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)).double().eval()
    network = read(traced(model, (2, 5, 5)))
    linear = network.places[network.output].linear
    basis = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
    with torch.no_grad():
        matrix = (model(basis) - model(torch.zeros_like(basis))).T
    found = float(torch.linalg.matrix_norm(matrix, {"l2": 2, "linf": np.inf, "l1": 1}[norm]))
    prove(linear, _claim(found * (1 + 1e-12)), norm, str)
    with pytest.raises(Refused, match="claimed"):
        prove(linear, _claim(found * (1 - 1e-12)), norm, str)
    assert len(folded(linear)) == 2


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_a_bound_of_one_norm_does_not_prove_another(norm):
    """A wide matrix: its l2 norm lies between the others, and must not stand in for them."""
    model = nn.Sequential(nn.Conv1d(1, 6, 3, bias=False)).double()
    network = read(traced(model.eval(), (1, 3)))
    weight = model[0].weight.detach()
    sums = weight.abs().sum((1, 2) if norm == "linf" else 0)
    linear, exact = network.places[network.output].linear, float(sums.max())
    prove(linear, _claim(exact * (1 + 1e-12)), norm, str)
    with pytest.raises(Refused):
        prove(linear, _claim(exact * (1 - 1e-9)), norm, str)


def test_a_linear_residual_block_is_one_convolution():
    layer = nn.Conv2d(3, 3, 3, padding=1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x + self.layer(x)

    network = read(traced(Block().eval(), (3, 5, 5)))
    (one,) = folded(network.places[network.output].linear)
    assert type(one).__name__ == "Convolution"

"""Each probe is passed by honest arithmetic (see test_precision) and must fail where that is replaced by another."""

import math

import pytest
import torch
from flint import arb
from torch import nn
from torch.nn import functional

from speccert.experiments import probes, probes_activations, probes_library

HALVES = (torch.float16, torch.bfloat16)
honest_product, honest_convolution = torch.Tensor.__matmul__, functional.conv2d


def strassen(left, right):
    """One level of Strassen's scheme."""
    a, b, inner = left.shape[0] // 2, right.shape[1] // 2, left.shape[1] // 2
    (a11, a12), (a21, a22) = ((rows[:, :inner], rows[:, inner:]) for rows in (left[:a], left[a:]))
    (b11, b12), (b21, b22) = ((rows[:, :b], rows[:, b:]) for rows in (right[:inner], right[inner:]))
    m1, m2 = honest_product(a11 + a22, b11 + b22), honest_product(a21 + a22, b11)
    m3, m4 = honest_product(a11, b12 - b22), honest_product(a22, b21 - b11)
    m5, m6 = honest_product(a11 + a12, b22), honest_product(a21 - a11, b11 + b12)
    m7 = honest_product(a12 - a22, b21 + b22)
    return torch.cat([torch.cat([m1 + m4 - m5 + m7, m3 + m5], 1), torch.cat([m2 + m4, m1 - m2 + m3 + m6], 1)])


def replace_product(monkeypatch, dtype, function):
    def product(left, right):
        return function(left, right) if left.dtype == dtype else honest_product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)


def replace_convolution(monkeypatch, dtype, function):
    def convolution(x, weight, *given, **options):
        honest = honest_convolution(x, weight, *given, **options)
        return function(x, weight, honest) if x.dtype == dtype else honest

    monkeypatch.setattr(functional, "conv2d", convolution)


def test_the_stand_in_for_strassen_is_right():
    left, right = torch.rand(8, 8).double(), torch.rand(8, 8).double()
    torch.testing.assert_close(strassen(left, right), left @ right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strassens_products_are_seen(dtype, monkeypatch):
    replace_product(monkeypatch, dtype, strassen)
    assert probes.products(dtype, "cpu")[1] is False


@pytest.mark.parametrize("digits", [8, 11])
def test_inputs_of_fewer_digits_are_seen(digits, monkeypatch):
    def coarse(x):
        fraction, exponent = torch.frexp(x)
        return torch.ldexp((fraction * 2**digits).round() / 2**digits, exponent)

    replace_product(monkeypatch, torch.float32, lambda a, b: honest_product(coarse(a), coarse(b)))
    assert probes.tf32("cpu")[1] is False


def test_products_in_three_multiplications_are_seen(monkeypatch):
    def three(left, right):
        a, b, c, d = left.real, left.imag, right.real, right.imag
        ac, bd = honest_product(a, c), honest_product(b, d)
        return torch.complex(ac - bd, honest_product(a + b, c + d) - ac - bd)

    replace_product(monkeypatch, torch.complex128, three)
    assert probes.complex_products(torch.complex128)[1] is False


def test_fourier_convolutions_are_seen(monkeypatch):
    def fourier(x, weight, honest):
        shape = [x.shape[2] + weight.shape[2] - 1] * 2
        product = torch.fft.rfft2(x, s=shape)[:, None] * torch.fft.rfft2(weight.flip(2, 3), s=shape)[None]
        whole, start = torch.fft.irfft2(product.sum(2), s=shape), weight.shape[2] // 2
        return whole[..., start : start + x.shape[2], start : start + x.shape[3]]

    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    honest = honest_convolution(x, weight, padding=1)
    torch.testing.assert_close(fourier(x, weight, honest), honest)
    replace_convolution(monkeypatch, torch.float32, fourier)
    assert probes.convolutions(torch.float32, "cpu")[1] is False


def test_winograds_convolutions_are_seen(monkeypatch):
    """F(2x2, 3x3) on tiles of 4x4: outputs Y = A^T ((G w G^T) * (B^T d B)) A."""
    b = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    g = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    a = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])

    def winograd(x, weight, honest):
        if weight.shape[2] != 3 or x.shape[2] % 2 or honest.shape[2:] != x.shape[2:]:
            return honest
        tiles = functional.pad(x, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)  # [B, c, i, j, 4, 4]
        product = torch.einsum("bcijpq,ocpq->boijpq", b @ tiles @ b.T, g @ weight @ g.T)
        out = a @ product @ a.T  # [B, o, i, j, 2, 2]
        return out.permute(0, 1, 2, 4, 3, 5).reshape(honest.shape)

    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    honest = honest_convolution(x, weight, padding=1)
    torch.testing.assert_close(winograd(x, weight, honest), honest)
    replace_convolution(monkeypatch, torch.float32, winograd)
    assert probes.convolutions(torch.float32, "cpu")[1] is False


def test_the_winograd_convolutions_of_nnpack_are_seen_where_it_is_used(monkeypatch):
    if not torch.backends.nnpack.is_available():
        pytest.skip("this torch has no NNPACK")
    x, weight = torch.rand(32, 3, 9, 9), torch.rand(8, 3, 3, 3)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.backends.nnpack.flags(enabled=False):
        plain = functional.conv2d(x, weight, padding=1)
        assert probes.convolutions(torch.float32, "cpu")[1] is True
    if torch.equal(plain, functional.conv2d(x, weight, padding=1)):
        pytest.skip("this processor is none of NNPACK's")
    assert probes.convolutions(torch.float32, "cpu")[1] is False


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_taken_in_a_half_type_are_seen(dtype, monkeypatch):
    def in_half(rows, weight):
        total = torch.zeros(len(rows), dtype=dtype)
        for column in rows.T:
            total = total + column
        return total[:, None].expand(-1, len(weight))

    assert probes.accumulation(dtype, "cpu")[1] is True
    monkeypatch.setattr(functional, "linear", in_half)
    text, holds = probes.accumulation(dtype, "cpu")
    assert holds is False
    assert text == "not in dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("operation", ["__add__", "__mul__", "__truediv__"])
def test_results_that_are_not_the_nearest_are_seen(dtype, operation, monkeypatch):
    honest = getattr(torch.Tensor, operation)

    def off(left, right):
        result = honest(left, right)
        own = isinstance(right, torch.Tensor) and result.dtype == dtype and result.numel() == 400
        return torch.nextafter(result, torch.full_like(result, math.inf)) if own else result

    assert probes.rounding(dtype, "cpu")[1] is True
    if dtype == torch.float64:  # there the reference is rational
        monkeypatch.setattr(torch.Tensor, operation, off)
        assert probes.rounding(dtype, "cpu")[1] is False
        return
    monkeypatch.setattr(torch.Tensor, operation, off)
    text, holds = probes.rounding(dtype, "cpu")
    assert holds is False
    assert text.startswith("not for")


def test_half_subnormals(monkeypatch):
    assert probes.half_subnormals("cpu")[1] is True
    honest = torch.Tensor.to

    def flushing(tensor, target):
        result = honest(tensor, target)
        return torch.where(result.abs() < 2.0**-14, torch.zeros_like(result), result)

    monkeypatch.setattr(torch.Tensor, "to", flushing)
    assert probes.half_subnormals("cpu")[1] is False


def test_elementary_functions_out_of_their_limits_are_seen(monkeypatch):
    assert probes_library.elementary(torch.float32, "cpu", 4.0)[1] is True
    wrong = (lambda x: torch.exp(x) * (1 + 1e-6), "exp", (-3.0, 3.0))
    monkeypatch.setitem(probes_library.ELEMENTARY, "exp", wrong)
    text, holds = probes_library.elementary(torch.float32, "cpu", 4.0)
    assert holds is False
    shown = float(text.split("exp ")[1].split(",")[0])
    assert 8 < shown < 18  # 1e-6 is 16.8 times 2^-24, or 8.4 to 16.8 units in the last place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_activations_that_err_more_than_their_rule_allows_are_seen(dtype, monkeypatch):
    assert probes_activations.activations(dtype, "cpu")[1] is True
    off = 1 + 16 * torch.finfo(dtype).eps
    monkeypatch.setitem(probes_activations.ACTIVATIONS, "tanh", (nn.Tanh(), lambda x: x.tanh() * off))
    text, holds = probes_activations.activations(dtype, "cpu")
    assert holds is False
    assert float(text.split("tanh ")[1].split(",")[0]) > 1


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", math.tanh),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("softplus", lambda x: math.log1p(math.exp(x))),
        ("log-sigmoid", lambda x: -math.log1p(math.exp(-x))),
        ("elu", lambda x: x if x > 0 else math.expm1(x)),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_the_balls_hold_the_functions(name, function):
    module, exact = probes_activations.ACTIVATIONS[name]
    for x in (-3.5, -0.25, 0.0, 0.5, 4.0):
        assert float(exact(arb(x))) == pytest.approx(function(x), rel=1e-13, abs=1e-15)
        assert float(module(torch.tensor([x]).double())) == pytest.approx(function(x), rel=1e-7)


def test_an_accepted_indefinite_matrix_is_seen(monkeypatch):
    assert probes_library.refused_cholesky(torch.float64)[1] is True
    honest = torch.linalg.cholesky_ex

    def careless(matrix):
        result = honest(matrix)
        return type(result)((result.L, torch.zeros_like(result.info)))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", careless)
    assert probes_library.refused_cholesky(torch.float64)[1] is False


def test_a_careless_cholesky_factor_is_seen(monkeypatch):
    assert probes_library.cholesky()[1] is True
    honest = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: honest(matrix.float()).double())
    assert probes_library.cholesky()[1] is False


def test_float64_products_in_float32_are_seen(monkeypatch):
    assert probes_library.exact_products()[1] is True
    replace_product(monkeypatch, torch.float64, lambda a, b: honest_product(a.float(), b.float()).double())
    assert probes_library.exact_products()[1] is False


def test_norms_that_are_too_small_are_seen(monkeypatch):
    assert probes_library.known_norms()[1] is True
    honest = probes_library.norm_bounds

    def small(layer, shape):
        bounds = honest(layer, shape)
        return type(bounds)(bounds.lower / 2, bounds.upper * 0.999, bounds.method)

    monkeypatch.setattr(probes_library, "norm_bounds", small)
    assert probes_library.known_norms()[1] is False


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_batch_normalisation_is_measured_in_unit_roundoffs(dtype, monkeypatch):
    assert probes_library.batch_norm(dtype, "cpu", 3.0)[1] is True
    honest = functional.batch_norm
    grown = 1 + 8 * torch.finfo(dtype).eps
    monkeypatch.setattr(functional, "batch_norm", lambda x, *given, **options: honest(x, *given, **options) * grown)
    assert probes_library.batch_norm(dtype, "cpu", 3.0)[1] is False

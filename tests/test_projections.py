"""Projections against SVDs and materialised operators in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speccert.models.projections import almost_orthogonal, bjorck, cayley, clip_convolution, clip_singular_values

SHAPES = [(5, 5), (7, 3), (3, 7), (1, 6), (6, 1)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_gives_the_clipped_singular_values_and_keeps_the_vectors(shape):
    matrix = random(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    ceiling = float(values.mean())
    expected = left @ torch.diag(values.clamp_max(ceiling)) @ right
    torch.testing.assert_close(clip_singular_values(matrix, ceiling), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ceiling", [0.1, 1.3, 100.0])
def test_clip_gradient_matches_finite_differences(shape, ceiling):
    matrix = random(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: clip_singular_values(w, ceiling), matrix)


def test_clip_gradient_of_complex_batches_matches_finite_differences():
    matrix = torch.complex(random(2, 3, 4), random(2, 3, 4, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: clip_singular_values(w, 1.0), matrix)


def test_clip_gradient_stays_bounded_where_singular_values_meet():
    matrix = torch.eye(4, dtype=torch.float64).requires_grad_()
    weights = random(4, 4)
    (clip_singular_values(2 * matrix, 1.0) * weights).sum().backward()
    assert torch.isfinite(matrix.grad).all()
    assert matrix.grad.norm() <= 2 * weights.norm()


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (3, 1), (1, 1)])
def test_cayley_is_orthonormal(shape):
    q = cayley(3 * random(*shape))
    gram = q.T @ q if shape[0] >= shape[1] else q @ q.T
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64))


def test_cayley_of_a_square_matrix_matches_its_definition():
    weight = random(5, 5)
    skew = weight - weight.T
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(cayley(weight), (identity - skew) @ torch.linalg.inv(identity + skew))


@pytest.mark.parametrize("function", [cayley, bjorck])
def test_orthogonal_gradients_match_finite_differences(function):
    assert torch.autograd.gradcheck(function, random(4, 3).requires_grad_())


@given(st.integers(1, 12), st.integers(1, 12), st.floats(-3, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_bjorck_norm_never_exceeds_one(rows, columns, exponent, seed):
    result = bjorck(random(rows, columns, seed=seed) * 10.0**exponent)
    assert torch.linalg.matrix_norm(result, 2) <= 1 + 1e-12


def test_bjorck_approaches_the_polar_factor():
    weight = random(8, 5)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(bjorck(weight, iterations=60), left @ right)


def test_bjorck_of_zero_is_zero():
    assert torch.equal(bjorck(torch.zeros(3, 2)), torch.zeros(3, 2))


CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 4, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, groups=2, padding=2, dilation=2),
    nn.Conv2d(4, 4, 3, groups=4, padding=1),
    nn.Conv2d(3, 8, 1),
]


def operator_norm(layer: nn.Module, weight: torch.Tensor, shape: tuple[int, ...]) -> float:
    """Largest singular value of the layer's matrix, made by pushing the identity through it in float64."""
    layer = layer.double()
    size = torch.Size(shape).numel()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
        matrix = layer(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_aol_norm_of_the_true_operator_is_at_most_one(layer):
    weight = random(*layer.weight.shape) * 5
    held = almost_orthogonal(weight, layer.groups)
    assert operator_norm(layer, held, (layer.in_channels, 7, 6)) <= 1 + 1e-12


def test_aol_leaves_an_orthogonal_kernel_alone():
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    weight[:, :, 1, 1] = cayley(random(4, 4))
    held = almost_orthogonal(weight)
    # d_c sums |Q^T Q| entries, which are those of the identity up to rounding
    torch.testing.assert_close(held, weight)


def test_aol_of_a_channel_that_is_zero_stays_finite():
    weight = random(3, 2, 3, 3)
    weight[:, 1] = 0
    assert torch.isfinite(almost_orthogonal(weight)).all()


def test_clip_convolution_with_a_full_kernel_clips_the_circular_operator():
    weight = random(3, 2, 5, 4)
    layer = nn.Conv2d(2, 3, (5, 4), padding="same", padding_mode="circular")
    before = operator_norm(layer, weight, (2, 5, 4))
    clipped = clip_convolution(weight, before / 2, (5, 4))
    # a kernel as large as the picture needs no cutting, so the norm is exactly the ceiling
    assert operator_norm(layer, clipped, (2, 5, 4)) == pytest.approx(before / 2, rel=1e-9)


def test_clip_convolution_lowers_the_norm_of_a_small_kernel():
    weight = random(4, 4, 3, 3)
    layer = nn.Conv2d(4, 4, 3, padding=1)
    before = operator_norm(layer, weight, (4, 8, 8))
    clipped = clip_convolution(weight, before / 3, (9, 9))
    assert operator_norm(layer, clipped, (4, 8, 8)) < before * 0.6

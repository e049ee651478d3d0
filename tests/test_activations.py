import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from speccert.certify import lipschitz
from speccert.models.activations import ACTIVATIONS, Abs, GroupSort, Householder, MaxMin, build_activation

SHAPES = [(5, 8), (3, 8, 4), (2, 8, 3, 5)]


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(layer, x):
    return torch.func.jacrev(lambda v: layer(v[None])[0])(x)


def with_angles(angles):
    layer = Householder(2 * len(angles)).double()
    layer.angle.data = torch.tensor(angles, dtype=torch.float64)
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_maxmin_is_the_sort_of_each_pair_in_numpy(shape):
    x = random(shape)
    pairs = np.sort(x.numpy().reshape(shape[0], 2, 4, *shape[2:]), axis=1)[:, ::-1]
    np.testing.assert_array_equal(MaxMin()(x).numpy(), pairs.reshape(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_groupsort_is_the_sort_of_each_group_in_numpy(shape, size):
    x = random(shape)
    groups = np.sort(x.numpy().reshape(shape[0], 8 // size, size, *shape[2:]), axis=2)
    np.testing.assert_array_equal(GroupSort(size)(x).numpy(), groups.reshape(shape))


def test_abs_is_numpy_abs():
    x = random((4, 3))
    np.testing.assert_array_equal(Abs()(x).numpy(), np.abs(x.numpy()))


@pytest.mark.parametrize("shape", SHAPES)
def test_householder_starts_as_maxmin(shape):
    x = random(shape)
    torch.testing.assert_close(Householder(8)(x.float()), MaxMin()(x.float()))


@pytest.mark.parametrize("angle", [-4.0, -1.0, 0.0, 0.3, math.pi / 4, 2.0, math.pi])
def test_householder_is_the_reflection_of_the_paper_below_its_line(angle):
    layer, z = with_angles([angle]), random((200, 2))
    expected = z.numpy().copy()
    below = z[:, 0].numpy() * np.sin(angle / 2) - z[:, 1].numpy() * np.cos(angle / 2) < 0
    reflection = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    expected[below] = expected[below] @ reflection.T
    assert 0 < below.sum() < 200
    np.testing.assert_allclose(layer(z).detach().numpy(), expected, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=3), st.integers(0, 1000))
def test_householder_keeps_the_norm_and_has_an_orthogonal_jacobian(angles, seed):
    layer, x = with_angles(angles), random((2 * len(angles),), seed)
    torch.testing.assert_close(layer(x[None]).norm(), x.norm())
    matrix = jacobian(layer, x)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(x), dtype=torch.float64))


@pytest.mark.parametrize("layer", [MaxMin(), GroupSort(4), Abs(), with_angles([0.4, 2.0, -1.0, 5.0])])
def test_gradient_norm_is_preserved(layer):
    x = random((6, 8)).requires_grad_()
    upstream = random((6, 8), seed=1)
    (gradient,) = torch.autograd.grad(layer(x), x, upstream)
    torch.testing.assert_close(gradient.norm(dim=1), upstream.norm(dim=1))


def test_householder_gradient_of_the_angle_is_right():
    layer, x = with_angles([0.4, 2.0]), random((3, 4, 2))
    assert torch.autograd.gradcheck(
        lambda angle: torch.func.functional_call(layer, {"angle": angle}, (x,)), layer.angle
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_activation_keeps_the_shape_and_can_be_traced(name, shape):
    layer = build_activation(name, 8)
    x = random(shape).float()
    assert layer(x).shape == x.shape
    assert torch.equal(fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("name", "kind"), [("relu", nn.ReLU), ("leaky-relu", nn.LeakyReLU), ("identity", nn.Identity), ("silu", nn.SiLU)]
)
def test_stock_activations_are_stock_layers(name, kind):
    assert type(build_activation(name, 3)) is kind


@pytest.mark.parametrize(("name", "channels"), [("maxmin", 7), ("householder", 7), ("groupsort", 6), ("maxmin", 0)])
def test_channels_that_cannot_be_grouped_are_refused_when_built(name, channels):
    with pytest.raises(ValueError, match=f"multiple of [24] channels, got {channels}"):
        build_activation(name, channels)


@pytest.mark.parametrize("layer", [MaxMin(), GroupSort(3), Householder(4), fx.symbolic_trace(MaxMin())])
def test_channels_that_cannot_be_grouped_are_refused_when_run(layer):
    with pytest.raises(ValueError, match="channels"):
        layer(torch.zeros(2, 7))


def test_bad_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"unknown activation 'swish'; allowed: abs, gelu"):
        build_activation("swish", 4)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        GroupSort(1)


@pytest.mark.parametrize("angles", [[0.0], [math.pi / 2], [0.3, 2.0], [math.pi / 4, 0.0, -5.0]])
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", math.inf), ("l1", 1)])
def test_householder_rule_is_the_largest_jacobian_norm(angles, norm, order):
    layer = with_angles(angles).eval()
    points = random((200, 2 * len(angles)))
    found = max(torch.linalg.matrix_norm(jacobian(layer, x), ord=order).item() for x in points)
    bound = lipschitz(nn.Sequential(layer).eval(), (2 * len(angles),), norm=norm).upper
    assert found <= bound * (1 + 1e-14)
    assert bound <= found * (1 + 1e-4)


@pytest.mark.parametrize("layer", [MaxMin(), GroupSort(2), Abs()])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_sorting_rules_are_one_in_every_norm(layer, norm):
    assert 1 <= lipschitz(nn.Sequential(layer).eval(), (4,), norm=norm).upper <= 1 + 1e-4

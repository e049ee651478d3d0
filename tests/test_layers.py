import numpy as np
import pytest
import torch
from torch import fx, nn

from speccert.certify import lipschitz
from speccert.models.layers import Normalize, Residual


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 5, 3), (2, 3, 4, 6)])
@pytest.mark.parametrize("mean", [0.25, [0.1, 0.2, 0.3]])
@pytest.mark.parametrize("std", [0.5, torch.tensor([0.5, 1.0, 2.0])])
def test_normalize_is_the_formula_in_numpy(shape, mean, std):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    layer = Normalize(mean, std)
    column = (-1, *[1] * (len(shape) - 2))
    expected = (x.numpy() - np.float32(mean).reshape(column)) / np.float32(std).reshape(column)
    np.testing.assert_array_equal(layer(x).numpy(), expected)
    assert torch.equal(fx.symbolic_trace(layer)(x), layer(x))


def test_normalize_keeps_its_numbers_as_buffers_without_gradient():
    layer = Normalize([0.1, 0.2], 0.5)
    assert set(layer.state_dict()) == {"mean", "std"}
    assert list(layer.parameters()) == []


def test_normalize_does_not_follow_later_changes_of_its_arguments():
    std = torch.tensor([1.0, 2.0])
    layer = Normalize(0.0, std)
    std.zero_()
    assert layer.std.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.0, 0.0, "std must be greater than 0, got 0"),
        (0.0, [1.0, -2.0], "std must be greater than 0, got -2"),
        (0.0, float("inf"), "std must be finite"),
        (float("nan"), 1.0, "mean must be finite"),
        ([0.0, 1.0], [1.0, 1.0, 1.0], "mean has 2 entries and std 3"),
        ([[0.0]], 1.0, "mean must be one number or one a channel"),
        ([], 1.0, "mean must be one number or one a channel"),
    ],
)
def test_normalize_refuses_bad_numbers(mean, std, text):
    with pytest.raises(ValueError, match=text):
        Normalize(mean, std)


def test_residual_sums_its_branches():
    block, shortcut = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    x = torch.rand(5, 3)
    layer = Residual(block, shortcut)
    torch.testing.assert_close(layer(x), x @ block.weight.T + block.bias + x @ shortcut.weight.T)
    assert torch.equal(fx.symbolic_trace(layer)(x), layer(x))


def test_residual_has_the_identity_as_its_shortcut():
    x = torch.rand(5, 3)
    torch.testing.assert_close(Residual(nn.Identity())(x), 2 * x)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("std", [0.3, [0.7, 0.1, 3.0]])
def test_normalize_rule_is_one_over_the_smallest_std(shape, norm, std):
    layer = Normalize(0.5, std)
    exact = 1 / layer.std.double().min().item()
    upper = lipschitz(nn.Sequential(layer, nn.Flatten()).eval(), shape, norm=norm).upper
    assert exact <= upper <= exact * (1 + 1e-4)


def test_normalize_rule_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"channels|input_shape"):
        lipschitz(nn.Sequential(Normalize([0.1, 0.2], 0.5), nn.Flatten()).eval(), (3, 2, 2))


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_residual_of_linear_branches_is_bounded_as_one_operator(scale):
    block = nn.Linear(4, 4, bias=False)
    block.weight.data = scale * torch.eye(4)
    upper = lipschitz(Residual(block).eval(), (4,)).upper
    assert 1 + scale <= upper <= (1 + scale) * (1 + 1e-4)

import pytest
import torch
from oracles import jacobian, matrix_norm, random, randomised
from torch import nn

from speccert.certify import jacobians, largest_jacobian_norm

NORMS = ("l2", "linf", "l1")


@pytest.fixture
def model():
    return randomised(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))).double()


def test_jacobians_are_those_of_reverse_mode(model):
    x = random(5, 1, 4, 4)
    found = jacobians(model, x)
    for row, point in zip(found, x, strict=True):
        torch.testing.assert_close(row, jacobian(model, point))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_largest_norm_over_the_points(model, norm, batch_size):
    x = random(5, 1, 4, 4)
    exact = max(matrix_norm(jacobian(model, point), norm) for point in x)
    assert largest_jacobian_norm(model, x, norm, batch_size) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_jacobian_of_an_affine_map_is_its_matrix(norm):
    layer = randomised(nn.Linear(6, 3)).double()
    assert largest_jacobian_norm(layer, random(2, 6), norm) == pytest.approx(matrix_norm(layer.weight, norm))


def test_weights_and_inputs_get_no_gradient(model):
    x = random(3, 1, 4, 4)
    with torch.no_grad():
        jacobians(model, x)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad
    assert x.grad is None


def test_jacobian_that_is_not_finite_is_refused():
    model = nn.Sequential(nn.Linear(2, 2)).double().eval()
    model[0].weight.data.fill_(float("nan"))
    for norm in NORMS:
        with pytest.raises(ValueError, match="Jacobian"):
            largest_jacobian_norm(model, random(2, 2), norm)


def test_unknown_norm_is_refused(model):
    with pytest.raises(ValueError, match="expected one of l2, linf, l1"):
        largest_jacobian_norm(model, random(2, 1, 4, 4), "fro")

import time

import pytest
import torch
from oracles import operator_norm, randomised
from torch import nn
from torch.nn.utils import parametrizations

from speccert.certify import linear_map_of, norm_bounds
from speccert.certify.linear import Chain, Reindex
from speccert.certify.spectral import bracket

NORMS = ("l2", "linf", "l1")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (1, 1), (200, 150)])
def test_dense_layer(shape, norm):
    layer = randomised(nn.Linear(*shape))
    exact = operator_norm(layer, shape[:1], norm)
    bounds = norm_bounds(layer, shape[:1], norm)
    assert exact * (1 - 1e-8) <= bounds.lower <= exact <= bounds.upper <= exact * (1 + 1e-8)


def test_input_shape_may_be_a_list():
    layer = nn.Linear(3, 2)
    assert norm_bounds(layer, [3]) == norm_bounds(layer, (3,))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.MaxPool2d(2), nn.Sigmoid()])
def test_layers_that_are_not_affine_are_refused(layer):
    with pytest.raises(ValueError, match="expected an affine layer"):
        norm_bounds(layer, (1, 4, 4))


def test_unknown_layer_and_unknown_norm_are_refused():
    with pytest.raises(ValueError, match=r"no Lipschitz rule for .*Softmax.*register_rule"):
        norm_bounds(nn.Softmax(1), (3,))
    with pytest.raises(ValueError, match="expected one of l2, linf, l1"):
        norm_bounds(nn.Linear(3, 3), (3,), "fro")


def test_hooks_and_replaced_forwards_are_refused():
    hooked = nn.Linear(3, 3)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ValueError, match="hook"):
        norm_bounds(hooked, (3,))
    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: 9 * x
    with pytest.raises(ValueError, match="forward"):
        norm_bounds(replaced, (3,))


def test_parametrized_weight_is_the_one_that_runs():
    layer = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(10)
    assert norm_bounds(layer.eval(), (2, 5, 5)).upper == pytest.approx(operator_norm(layer, (2, 5, 5)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_bounded_in_float64(dtype):
    layer = randomised(nn.Linear(30, 20)).to(dtype)
    exact = operator_norm(layer, (30,))
    assert exact <= norm_bounds(layer, (30,)).upper <= exact * (1 + 1e-8)


def test_bracket_of_a_large_chain_has_a_lower_end():
    conv = linear_map_of(randomised(nn.Conv2d(3, 6, 3, padding=1)), (3, 24, 24))
    flat = Reindex(lambda x: x.flatten(1), (6, 24, 24), (3456,))
    dense = linear_map_of(randomised(nn.Linear(3456, 1100)), (3456,))
    bounds = bracket(Chain((conv, flat, dense)))
    assert 0 < bounds.lower < bounds.upper


def test_gradients_modes_and_random_state_stay_as_they_were():
    layer = nn.Conv2d(2, 40, 3).train()
    state = torch.get_rng_state()
    norm_bounds(layer, (2, 30, 30))
    assert layer.training
    assert layer.weight.grad is None
    assert layer.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_large_convolution_takes_about_a_second():
    layer = randomised(nn.Conv2d(64, 64, 3, padding=1))
    norm_bounds(layer, (64, 8, 8))
    start = time.process_time()
    norm_bounds(layer, (64, 32, 32))
    assert time.process_time() - start < 3

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


def test_neither_autocast_nor_flushed_subnormals_nor_default_types_change_a_bound():
    torch.manual_seed(164)
    layers = [(nn.Conv2d(4, 4, 3, padding=1, bias=False), (4, 40, 40)), (nn.Linear(3, 2).double(), (3,))]
    layers[1][0].weight.data.fill_(1e-320)
    for layer, shape in layers:
        expected = norm_bounds(layer, shape)
        assert expected.upper > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert norm_bounds(layer, shape) == expected
        with torch.inference_mode():
            assert norm_bounds(layer, shape) == expected
        torch.set_default_dtype(torch.float64)
        flushed = torch.set_flush_denormal(True)
        try:
            assert norm_bounds(layer, shape) == expected
            assert not flushed or 2.0**-1022 * float(torch.tensor(0.5)) == 0.0  # the caller's setting is kept
        finally:
            torch.set_flush_denormal(False)
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_complex_weights_are_refused(norm):
    linear = nn.Linear(2, 2, bias=False, dtype=torch.cfloat)
    for layer, shape in [(linear, (2,)), (nn.Conv1d(1, 1, 3, dtype=torch.cfloat), (1, 2000))]:
        layer.weight.data.fill_(1j)
        with pytest.raises(ValueError, match=r"expected real numbers, got torch\.complex64"):
            norm_bounds(layer, shape, norm)


@pytest.mark.parametrize("layer", [nn.AvgPool2d(15, 1, 7), nn.Conv2d(16, 16, 15, padding=7, groups=16)])
def test_large_kernels_of_single_channels_take_seconds(layer):
    start = time.process_time()
    bounds = norm_bounds(layer, (16, 64, 64))
    assert 0 < bounds.lower <= bounds.upper
    assert time.process_time() - start < 20  # it was minutes: the forms of all pairs of lags

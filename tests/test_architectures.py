import importlib
import sys

import pytest
import torch
from torch import fx, nn

from speccert.certify import lipschitz
from speccert.models.activations import ACTIVATIONS
from speccert.models.architectures import ARCHITECTURES, build_model
from speccert.models.layers import Normalize

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 1, 1), (2, 2, 2), (3, 7, 7)]
CASES = [(name, shape) for name in ARCHITECTURES for shape in IMAGES] + [("mlp", (64,))]


def build(name, shape, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, shape, 10, **options)


def kinds(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_logits_have_their_shape_and_the_trace_gives_the_same(name, shape):
    model = build(name, shape, width=4, mean=0.5, std=[0.25] * shape[0]).eval()
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    assert logits.shape == (3, 10)
    assert torch.equal(logits, model(x))
    assert torch.equal(logits, fx.symbolic_trace(model)(x))
    assert len(logits.unique(dim=0)) == 3


@pytest.mark.parametrize(("name", "shape"), [("mlp", (64,)), *((name, (1, 8, 8)) for name in ARCHITECTURES)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_can_be_certified(name, shape, activation):
    importlib.import_module("speccert.models.rules")
    model = build(name, shape, width=4, activation=activation, mean=0.5, std=0.25).double().eval()
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = lipschitz(model, shape)
    moved = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = (model(moved) - model(x)).norm(dim=1) / (moved - x).flatten(1).norm(dim=1)
    assert change.max().item() <= bound.upper * (1 + 1e-9)


@pytest.mark.parametrize(("name", "shape"), CASES[:3])
def test_only_stock_layers_after_the_normalisation(name, shape):
    model = build(name, shape, width=4, activation="relu", mean=0.5)
    assert type(model[0]) is Normalize
    assert all(type(layer).__module__.startswith("torch.nn") for layer in model[1:])


@pytest.mark.parametrize(
    ("name", "channels", "sides", "dense"),
    [  # of Wong et al. 2018, "large" for MNIST, and Lee et al. 2020, table of architectures
        ("convnet-4c3f", [32, 32, 64, 64], [28, 14, 14, 7], [512, 512, 10]),
        ("convnet-6c2f", [32, 32, 32, 64, 64, 64], [28, 28, 14, 14, 14, 7], [512, 10]),
    ],
)
def test_convnets_are_those_of_the_papers(name, channels, sides, dense):
    model = build(name, (1, 28, 28))
    x, seen = torch.rand(1, 1, 28, 28), []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            seen.append(x.shape[2])
    assert [layer.out_channels for layer in kinds(model, nn.Conv2d)] == channels
    assert seen == sides
    assert [layer.out_features for layer in kinds(model, nn.Linear)] == dense


@pytest.mark.parametrize("depth", [1, 3, 5, 7, 10, 15])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 7, 7)])
def test_lipconvnet_has_depth_convolutions_and_halves_where_it_can(depth, shape):
    model = build("lipconvnet", shape, width=2, depth=depth)
    assert len(kinds(model, nn.Conv2d)) == depth
    halvings = {8: 3, 32: 5, 28: 2, 7: 0}[shape[1]]
    assert len(kinds(model, nn.PixelUnshuffle)) == min(depth, halvings)


def test_liresnet_starts_near_the_identity_in_its_residual_layers():
    model = build("liresnet", (1, 28, 28), width=8, depth=6)
    residual = kinds(model, nn.Conv2d)[1:-1]
    assert len(residual) == 6
    x = torch.rand(2, 8, 14, 14)
    for layer in residual:
        change = layer(x) - x
        assert 0 < change.norm() < 0.3 * x.norm()


def test_mlp_has_depth_hidden_layers_of_width():
    sizes = [
        (layer.in_features, layer.out_features) for layer in kinds(build("mlp", (3, 4, 5), width=6, depth=2), nn.Linear)
    ]
    assert sizes == [(60, 6), (6, 6), (6, 10)]


def test_dense_layers_start_orthogonal():
    for layer in kinds(build("mlp", (64,), width=32), nn.Linear):
        values = torch.linalg.svdvals(layer.weight.double())
        torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)
        assert not layer.bias.any()


def test_the_seed_sets_the_weights():
    first, second = build("liresnet", (1, 8, 8), width=4), build("liresnet", (1, 8, 8), width=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_no_normalisation_where_none_is_asked_for():
    assert not kinds(build("mlp", (4,)), Normalize)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("vgg", (1, 8, 8), 10), {}, r"unknown model 'vgg'; allowed: mlp, convnet-4c3f, .*, or module:function"),
        (("mlp", (1, 8), 10), {}, r"input_shape must be \(D,\) or \(C, H, W\)"),
        (("mlp", (), 10), {}, "input_shape must be"),
        (("mlp", (0,), 10), {}, "input_shape must be"),
        (("mlp", (4,), 1), {}, "num_classes must be at least 2, got 1"),
        (("mlp", (4,), 10), {"width": 0}, "width must be at least 1, got 0"),
        (("mlp", (4,), 10), {"depth": -1}, "depth must be at least 1, got -1"),
        (("mlp", (4,), 10), {"width": 7}, "positive multiple of 2 channels, got 7"),
        (("mlp", (4,), 10), {"activation": "swish"}, "unknown activation"),
        (("mlp", (4,), 10), {"mean": [0.0, 0.0]}, "mean must hold 1 or 4 numbers"),
        (("mlp", (4,), 10), {"std": 0.0}, "std must be greater than 0"),
        (("liresnet", (64,), 10), {}, "liresnet needs square images"),
        (("lipconvnet", (1, 8, 6), 10), {}, "lipconvnet needs square images"),
        (("convnet-4c3f", (1, 8, 8), 10), {"depth": 3}, "convnet-4c3f has a fixed depth, got depth=3"),
    ],
)
def test_bad_settings_are_refused_in_one_line(arguments, options, text):
    with pytest.raises(ValueError, match=text) as error:
        build_model(*arguments, **options)
    assert "\n" not in str(error.value)


USER = """
from torch import nn
def good(*, input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(input_shape[0] * 4), nn.Linear(input_shape[0] * 4, num_classes))
def wrong(*, input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * 4, num_classes + 1))
def misfit(*, input_shape, num_classes):
    return nn.Linear(17, num_classes)
def none(*, input_shape, num_classes):
    return None
def pair(*, input_shape, num_classes):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()
constant = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_nets.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_nets"
    sys.modules.pop("user_nets", None)


def test_a_users_model_is_imported_and_normalised_and_left_in_train_mode(user_module):
    model = build_model(f"{user_module}:good", (3, 2, 2), 5, mean=[0.1, 0.2, 0.3])
    assert type(model[0]) is Normalize
    assert all(layer.training for layer in model.modules())
    assert model.eval()(torch.rand(2, 3, 2, 2)).shape == (2, 5)


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("no_such_module:net", "No module named 'no_such_module'; expected module:function"),
        ("user_nets:absent", "the module user_nets has no function absent"),
        ("user_nets:constant", "has no function constant"),
        ("user_nets:", "expected module:function, got 'user_nets:'"),
        ("user_nets:none", "must return a torch.nn.Module, got NoneType"),
        ("user_nets:wrong", r"expected logits of shape \(1, 5\), got \(1, 6\)"),
        ("user_nets:misfit", r"cannot take inputs of shape \(3, 2, 2\)"),
        ("user_nets:pair", "expected the model to return one tensor, got tuple"),
    ],
)
def test_a_bad_users_model_is_refused(user_module, location, text):
    with pytest.raises(ValueError, match=text):
        build_model(location, (3, 2, 2), 5)


def test_a_users_model_takes_no_width(user_module):
    with pytest.raises(ValueError, match="takes no width and depth, got width=4"):
        build_model(f"{user_module}:good", (3, 2, 2), 5, width=4)

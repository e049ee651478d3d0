"""Masked models are flagged and others are not; the shares are what the models were built to show."""

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from defences import DEFENCES
from torch import Tensor, nn

from speccert.attacks.diagnostics import diagnose
from speccert.experiments import load_dataset
from speccert.models import build_model, constrain

NORMS = [("linf", 0.1), ("l2", 0.5), ("l1", 3.0)]
EXTREMES = [("linf", 1e-3), ("l2", 5.0)]
EXPECTED = {
    "8 grey levels": "zero-gradients",
    "255 grey levels": "zero-gradients",
    "8 grey levels, straight-through gradient": "flat-loss",
    "255 grey levels, straight-through gradient": "flat-loss",
    "thermometer code": "zero-gradients",
    "JPEG": "zero-gradients",
    "tanh of 10^4 times the logits": "zero-gradients",
    "sigmoid of 10^4 times the logits": "zero-gradients",
    "10^4 times the logits, clamped": "zero-gradients",
    "softmax of 10 times the logits": "vanishing-gradients",
    "distilled: 100 times the logits": "vanishing-gradients",
    "shattered: a fast sine on the pixels": "rough-loss",
    "shattered: a fast sine on the logits": "rough-loss",
    "noise of 0.1": "random-outputs",
    "dropout of pixels": "random-outputs",
    "a detached branch": "flat-loss",
}


def mlp(activation: str = "relu", width: int = 32, depth: int = 2) -> nn.Module:
    return build_model("mlp", (1, 8, 8), 10, width=width, depth=depth, activation=activation)


def conv() -> nn.Module:
    first, second = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def held(threshold: float, constraint: str = "cap", activation: str = "maxmin") -> nn.Module:
    return constrain(mlp(activation), threshold, constraint, input_shape=(1, 8, 8))


def scaled(factor: float, bias: bool = False) -> nn.Module:
    """An untrained net with all weights scaled, and its last bias drawn anew where `bias`."""
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
        if bias:
            list(model.parameters())[-1].normal_()
    return model


PLAIN: dict[str, tuple[Callable[[], nn.Module], dict[str, float]]] = {
    "relu": (mlp, {}),
    "relu, trained for long": (mlp, {"epochs": 40}),
    "deep": (lambda: mlp(width=24, depth=7), {}),
    "conv": (conv, {}),
    "maxmin": (lambda: mlp("maxmin"), {}),
    "groupsort": (lambda: mlp("groupsort"), {}),
    "sigmoid": (lambda: mlp("sigmoid"), {"epochs": 20}),
    "gelu": (lambda: mlp("gelu"), {}),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}),
    "adversarially trained": (mlp, {"eps": 0.5}),
    "capped at 0.5": (lambda: held(0.5), {"temperature": 0.1}),
    "capped at 0.5, relu": (lambda: held(0.5, activation="relu"), {"temperature": 0.1}),
    "capped at 1": (lambda: held(1.0), {"temperature": 0.1}),
    "capped at 10": (lambda: held(10.0), {"temperature": 0.1}),
    "orthogonal, groupsort": (lambda: held(1.0, "orthogonal", "groupsort"), {"temperature": 0.1}),
    "few steps": (mlp, {"epochs": 1, "lr": 1e-4}),
    "untrained": (mlp, {"epochs": 0}),
    "tiny logits": (lambda: scaled(1e-3), {"epochs": 0}),
    "nearly constant": (lambda: scaled(0.1, bias=True), {"epochs": 0}),
    "constant but for rounding": (lambda: scaled(1e-3, bias=True), {"epochs": 0}),
    "constant": (lambda: scaled(0.0, bias=True), {"epochs": 0}),
}


def trained(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int = 6, lr: float = 5e-3, eps: float = 0.0, temperature: float = 1
) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            z = x[rows].requires_grad_()
            loss = nn.functional.cross_entropy(model(z) / temperature, y[rows])
            if eps:  # one step in l2
                step = nn.functional.normalize(torch.autograd.grad(loss, z)[0].flatten(1)).view_as(z)
                loss = nn.functional.cross_entropy(model((z.detach() + eps * step).clamp(0, 1)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def test_part() -> tuple[Tensor, Tensor]:
    test = load_dataset("digits").test
    return test.x, test.y


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    data = load_dataset("digits").train
    made = {}
    with torch.random.fork_rng():
        for name, (build, options) in PLAIN.items():
            torch.manual_seed(0)
            made[name] = trained(build(), data.x, data.y, **options)
    return made


def names(found) -> list[str]:
    return [flag.name for flag in found.flags]


def in_turn(table) -> list[tuple[str, list[tuple[str, float]]]]:
    """Each model with one of the norms and one of the extreme eps; benchmarks/masking.py tries all with all."""
    return [(name, [NORMS[place % 3], EXTREMES[place % 2]]) for place, name in enumerate(table)]


@pytest.mark.parametrize(("name", "settings"), in_turn(PLAIN), ids=str)
def test_models_with_honest_gradients_raise_no_flag(name, settings, models, test_part):
    for norm, eps in settings:
        found = diagnose(models[name], *test_part, norm=norm, eps=eps, samples=24)
        assert names(found) == [], (norm, eps, found.shares)


@pytest.mark.parametrize(("name", "settings"), in_turn(DEFENCES), ids=str)
def test_masked_models_are_flagged_for_the_right_reason(name, settings, models, test_part):
    norm, eps = settings[0]
    found = diagnose(DEFENCES[name](models["relu"]), *test_part, norm=norm, eps=eps, samples=24)
    assert EXPECTED[name] in names(found), (norm, eps, found.shares)
    assert all(0.05 <= flag.share <= 1 and "\n" not in flag.text for flag in found.flags)
    assert {flag.name: flag.share for flag in found.flags}.items() <= found.shares.items()


def test_every_defence_has_an_expectation():
    assert EXPECTED.keys() == DEFENCES.keys()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_search_without_gradients_beats_gradients_that_are_zero(norm, models, test_part):
    eps = dict(NORMS)[norm]
    found = diagnose(DEFENCES["255 grey levels"](models["relu"]), *test_part, norm=norm, eps=eps)
    assert {"zero-gradients", "black-box-wins", "unbounded-fails"} <= set(names(found))
    assert found.shares["zero-gradients"] == 1.0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(7,), (1, 5, 9), (3, 4, 4), (2, 6)], ids=str)
def test_any_shape(shape, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.rand(20, *shape)
    found = diagnose(model, x, model(x).argmax(1), norm=norm, eps=0.1)
    assert (found.samples, names(found)) == (20, [])
    assert found.forwards > 20
    assert found.gradients > 20


def test_a_gradient_that_is_not_finite_counts_as_none():
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x.sum(1) + (x[:, :1] - x[:, :1]).sqrt().sum(1)
            return torch.stack([level, 1 - level], 1)

    x = torch.rand(30, 2)
    found = diagnose(Root(), x, Root()(x).argmax(1), eps=0.1)
    assert found.shares["zero-gradients"] == 1.0
    assert "zero-gradients" in names(found)


def test_an_output_that_depends_on_the_batch_is_random():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    x = torch.rand(40, 3)
    found = diagnose(Centred(), x, Centred()(x).argmax(1), eps=0.1)
    assert found.shares["random-outputs"] > 0.9


def test_all_is_left_as_it_was_and_the_seed_alone_decides(models, test_part):
    model = models["relu"].train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    found = [diagnose(model, *test_part, eps=0.5, seed=seed, samples=16) for seed in (3, 3, 4)]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert next(model.parameters()).grad.eq(1).all()
    assert found[0] == found[1]
    assert found[0].samples == 16
    model.zero_grad()
    model.eval()


def test_batches_change_no_flag(models, test_part):
    masked = DEFENCES["8 grey levels"](models["relu"])
    whole, parts = (diagnose(masked, *test_part, eps=0.5, samples=20, batch_size=size) for size in (None, 7))
    assert names(whole) == names(parts)
    assert whole.samples == parts.samples == 20


def test_no_sample_classified_correctly(models, test_part):
    x, _ = test_part
    wrong = (models["relu"](x).argmax(1) + 1) % 10
    found = diagnose(models["relu"], x, wrong, eps=0.5)
    assert (found.flags, found.samples, found.gradients) == ((), 0, 0)
    assert set(found.shares.values()) == {0.0}


def test_eps_zero(models, test_part):
    assert names(diagnose(models["relu"], *test_part, eps=0)) == []


def test_it_is_cheap(models, test_part):
    diagnose(models["relu"], *test_part, eps=0.5)
    begin = time.process_time()
    found = diagnose(models["relu"], *test_part, eps=0.5)
    assert time.process_time() - begin < 3  # about 0.2 s on an idle core
    assert found.gradients <= 64 * 200
    assert found.forwards <= 64 * 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": None}, "eps must be a finite number >= 0"),
        ({"eps": -1.0}, "eps must be a finite number >= 0"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"samples": 0}, "samples must be an integer >= 1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        diagnose(nn.Linear(3, 2), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), **{"eps": 0.1, **options})
    assert "\n" not in str(caught.value)

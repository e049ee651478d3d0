"""EOT-PGD and SPSA, run by torchattacks: what they are for, which PGD cannot do."""

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks import attack, make_attack


class Tilted(nn.Module):
    """Class 1 wins where mean(x) > 0.6, under noise in front of it whose gradients point anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        noise = 0.3 * torch.randn_like(x)
        score = x.mean(1) - 0.6 + (noise * (x - x.detach())).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


class Stairs(nn.Module):
    """The same boundary, on pixels rounded to 1/8, without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        score = ((8 * x).round() / 8).mean(1) - 0.6
        return torch.stack([torch.zeros_like(score), score], 1)


def samples() -> tuple[Tensor, Tensor]:
    return torch.full((20, 30), 0.48), torch.zeros(20, dtype=torch.int64)


def test_the_mean_of_many_gradients_sees_through_noise() -> None:
    x, y = samples()
    weak = attack(Tilted(), x, y, "pgd", norm="linf", eps=0.14, loss="margin").accuracy
    strong = attack(Tilted(), x, y, "eot-pgd", norm="linf", eps=0.14, averages=100).accuracy
    assert strong < 0.2 < 0.8 < weak


def test_differences_replace_gradients() -> None:
    x, y = samples()
    assert attack(Stairs(), x, y, "pgd", norm="linf", eps=0.2, random_start=False, loss="margin").accuracy == 1
    result = attack(Stairs(), x, y, "spsa", norm="linf", eps=0.2, delta=0.1, steps=20, directions=64)
    assert result.accuracy == 0
    assert result.gradients == 0
    assert result.forwards > 20 * 20 * 128


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("eot-pgd", {"steps": 0}, "steps must be an integer >= 1, got 0"),
        ("eot-pgd", {"averages": 0}, "averages must be an integer >= 1, got 0"),
        ("eot-pgd", {"alpha": 0.0}, "alpha must be a number in"),
        ("spsa", {"directions": 0}, "directions must be an integer >= 1, got 0"),
        ("spsa", {"delta": -1}, "delta must be a number in"),
        ("spsa", {"lr": 0.0}, "lr must be a number in"),
    ],
)
def test_bad_options_raise_one_line(name, option, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_attack(name, **option)


@pytest.mark.parametrize("name", ["eot-pgd", "spsa"])
def test_hardened_makes_more_steps_and_costs_more(name) -> None:
    one = make_attack(name)
    assert one.hardened().cost(10) == 2.5 * one.cost(10)

import math

import numpy as np
import pytest
import torch

from speccert.experiments.config import CellConfig
from speccert.experiments.optimisers import build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("constant", lambda t: np.ones_like(t)),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: np.cos(np.pi * t / 2) ** 2),
        ("step", lambda t: np.select([t < 0.5, t < 0.75], [1.0, 0.1], 0.01)),
    ],
)
@pytest.mark.parametrize("warmup", [0, 2])
def test_schedule_is_its_closed_form(schedule, shape, warmup):
    config = CellConfig(schedule=schedule, epochs=8, warmup_epochs=warmup, lr=0.5)
    rates = [learning_rate(config, step, 5) for step in range(40)]
    start = 0.5 * np.arange(1, 5 * warmup + 1) / max(5 * warmup, 1)
    rest = 0.5 * shape(np.arange(40 - 5 * warmup) / (40 - 5 * warmup))
    np.testing.assert_allclose(rates, [*start, *rest], rtol=1e-12)


def test_rates_are_positive_and_the_first_is_the_full_one_without_warmup():
    for schedule in ("constant", "cosine", "linear", "step"):
        config = CellConfig(schedule=schedule, epochs=3, lr=0.1)
        rates = [learning_rate(config, step, 7) for step in range(21)]
        assert rates[0] == 0.1
        assert min(rates) > 0


def first_step(**settings):
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer([parameter], CellConfig(lr=0.1, **settings))
    (3 * parameter).sum().backward()
    optimizer.step()
    return parameter.item()


def test_first_steps_are_their_formulas():
    assert first_step(optimizer="sgd", momentum=0.0, weight_decay=0.5) == pytest.approx(2 - 0.1 * (3 + 0.5 * 2))
    assert first_step(optimizer="sgd", momentum=0.9) == pytest.approx(2 - 0.1 * (3 + 0.9 * 3))
    assert first_step(optimizer="adam", weight_decay=0.5) == pytest.approx(2 - 0.1)
    assert first_step(optimizer="adamw", weight_decay=0.5) == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1)
    assert math.isclose(first_step(optimizer="adamw"), 1.9, rel_tol=1e-6)

import math

import pytest
import torch

from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split
from speccert.experiments.timing import step_ratio
from speccert.experiments.training import build


def data():
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.rand(40, 1, 4, 4, generator=generator), torch.arange(40) % 3)
    return Dataset("noise", split, split, split, (1, 4, 4), 3, (0.5,), (0.25,))


def cell(**settings):
    return CellConfig(**{"width": 8, "depth": 1, "epochs": 1, "batch_size": 16, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"constraint": "penalty"},
        {"constraint": "none", "threshold": math.inf},
        {"loss": "gloro"},
        {"schedule": "linear", "epochs": 2, "warmup_epochs": 1},
        {"optimizer": "sgd", "lr": 1e30},
        {"constraint": "gradient-clip", "threshold": math.inf, "gradient_clip": 1.0},
    ],
    ids=str,
)
def test_the_ratio_is_a_positive_number(settings):
    ratio = step_ratio(cell(**settings), data(), rounds=1)
    assert 0 < ratio < math.inf


def test_the_random_state_is_left_as_it_was():
    before = torch.get_rng_state()
    step_ratio(cell(), data(), rounds=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_start_weights_of_a_constrained_model_do_not_matter(tmp_path):
    """They fit the constrained model and not the plain one beside it."""
    path = tmp_path / "start.safetensors"
    save_checkpoint(path, build(cell(), data()).state_dict())
    assert step_ratio(cell(checkpoint=str(path)), data(), rounds=1) > 0

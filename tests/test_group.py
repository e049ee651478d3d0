"""Two processes that torchrun starts do the steps of one, in double precision; oracles: one process, and autograd."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split, load_dataset
from speccert.experiments.group import ALONE, Group
from speccert.experiments.training import Training, build

CPU = torch.device("cpu")
SAMPLES = 199
SMALL = {"width": 16, "depth": 2, "epochs": 2, "batch_size": 33, "lr": 1e-2, "loss_eps": 0.3, "eps": (0.1, 0.3)}
ONE_STEP = {
    "epochs": 1, "batch_size": SAMPLES, "lr": 1.0, "optimizer": "sgd", "momentum": 0.0, "schedule": "constant",
    "temperature": 1.0, "constraint": "none", "threshold": math.inf,
}  # fmt: skip
# A batch of 33 splits into 16 and 17, the last one of 199 samples into 0 and 1.
CASES = {
    "cap": {},
    "projected": {"constraint": "orthogonal-projected", "loss": "offset-ce"},
    "penalty": {"constraint": "penalty", "threshold": 0.5, "penalty_weight": 0.3},
    "gloro": {"loss": "gloro"},
    "emma": {"loss": "emma", "constraint": "orthogonal", "activation": "householder"},
    "bound-without-cap": {"loss": "margin", "constraint": "none", "threshold": math.inf, "optimizer": "adam"},
    "clipped": {"gradient_clip": 0.05, "optimizer": "sgd", "weight_decay": 1e-3},
    "moved": {"augment": "shift-flip", "model": "convnet-4c3f", "width": 2, "depth": None},
    "one-step": ONE_STEP,
    "one-by-one": {"batch_size": 1, "epochs": 1, "constraint": "penalty"},
    "diverging": {"lr": 1e200, "optimizer": "sgd", "constraint": "none", "threshold": math.inf, "epochs": 3},
}
PROGRAM = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import distributed
import test_group
from speccert.experiments.group import Group
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
distributed.init_process_group("gloo")
group = Group(distributed.get_rank(), distributed.get_world_size(), test_group.CPU)
for name in test_group.CASES:
    found = test_group.trained(name, group)
    torch.save(found, os.path.join(sys.argv[2], f"{name}-{group.rank}.pt"))
distributed.destroy_process_group()
"""


def data():
    digits = load_dataset("digits", train_samples=SAMPLES)
    parts = (Split(part.x.double(), part.y) for part in (digits.train, digits.validation, digits.test))
    return Dataset("digits", *parts, digits.input_shape, digits.num_classes, digits.mean, digits.std)


def config(name):
    return CellConfig(**{**SMALL, **CASES[name]})


def trained(name, group):
    """Weights, history and status after the whole training."""
    training = Training(config(name), data(), CPU, group)
    while training.unfinished:
        training.epoch()
    weights = {key: value.clone() for key, value in training.model.state_dict().items()}
    return {"weights": weights, "history": training.history, "status": training.status}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found, by name of the case; started once for all cases."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(folder / "program.py"), str(Path(__file__).parent), str(folder)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "diverging"])
def test_two_processes_do_the_steps_of_one(name, pair, double):
    """Some 20 steps of size 1e-2, each within about 1e-15 / 1e-8 (Adam's division by the root of a square) of exact.

    A gradient that is wrong by one sample of the last batch moves the weights by more than 1e-5.
    """
    first, second = pair(name)
    alone = trained(name, ALONE)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, atol=1e-8, rtol=1e-8)
        assert torch.equal(first["weights"][key], second["weights"][key])
    assert json.dumps(first["history"]) == json.dumps(second["history"])
    assert first["status"] == second["status"] == alone["status"] == "finished"
    for row, expected in zip(first["history"], alone["history"], strict=True):
        for key in row.keys() - {"epoch_s", "step_s"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-7, abs=1e-9)


def test_the_gradient_is_that_of_the_whole_batch(pair, double):
    torch.manual_seed(config("one-step").seed)
    model = build(config("one-step"), data())
    x, y = data().train.x, data().train.y
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    found = pair("one-step")[0]
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found["weights"][key], parameter.detach() - parameter.grad, atol=1e-13, rtol=1e-12)
    row = found["history"][0]
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert row["train_accuracy"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-12)


def test_a_divergence_ends_all_processes_at_one_epoch(pair):
    first, second = pair("diverging")
    assert first["status"] == second["status"] == "non-finite"
    assert json.dumps(first["history"]) == json.dumps(second["history"])
    assert math.isnan(first["history"][-1]["validation_accuracy"])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_parts_cover_a_batch_and_weigh_as_their_samples(size, count):
    values = torch.rand(count, dtype=torch.float64)
    groups = [Group(rank, size, CPU) for rank in range(size)]
    parts = [group.part(count) for group in groups]
    owned = [list(range(count))[part][:own] for part, own in parts]
    assert sorted(itertools.chain(*owned)) == list(range(count))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    assert all(len(values[part]) == max(own, 1) for part, own in parts)
    means = [group.weight(own, count) * values[part].mean() for group, (part, own) in zip(groups, parts, strict=True)]
    assert sum(means).item() / size == pytest.approx(values.mean().item(), rel=1e-12)


def test_one_process_alone_changes_nothing():
    module, values = nn.BatchNorm1d(3), torch.rand(4)
    assert ALONE.joined(module) is module
    assert ALONE.total(values) is values
    assert ALONE.agreed("x") == "x"
    ALONE.align([values])
    assert ALONE.part(5) == (slice(0, 5), 5)
    assert ALONE.weight(5, 5) == 1.0
    assert ALONE.first


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)])
def test_layers_that_see_the_whole_batch_are_refused(layer):
    with pytest.raises(ValueError, match=r"1: normalisation by the batch can't be trained by several processes"):
        Group(0, 2, CPU).joined(nn.Sequential(nn.Conv2d(3, 3, 1), layer))

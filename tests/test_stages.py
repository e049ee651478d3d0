import math

import pytest
import tiny
import torch
from studies import console, text, user_module, weights

from speccert.experiments.cell import run_cell
from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import CellConfig, ConfigError
from speccert.experiments.execution import Execution
from speccert.experiments.spec import RunSpec
from speccert.experiments.stages import open_model, train_one
from speccert.experiments.store import RunFolder, StoreError

TINY = {**tiny.TINY, "seed": 3}
MODELS = """
from torch import nn
def linear(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def three(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    config = CellConfig(**TINY)
    return RunFolder.of(output, config), run_cell(config, Execution(output=str(output)))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of the user's, `stage_models`, in the current folder."""
    return user_module(tmp_path, monkeypatch, "stage_models", MODELS)


def test_a_torch_checkpoint_is_read_too(models):
    torch.save(weights(), models / "weights.pt")
    opened = open_model("stage_models:linear", checkpoint=models / "weights.pt", dataset="digits")
    assert torch.equal(opened.model[1].weight, weights()["1.weight"])


def nan_weights(folder):
    save_checkpoint(folder / "nan.safetensors", {**weights(), "1.bias": torch.full((10,), math.nan)})
    return {"checkpoint": folder / "nan.safetensors"}


def cut_weights(folder):
    save_checkpoint(folder / "cut.safetensors", weights())
    path = folder / "cut.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    return {"checkpoint": path}


@pytest.mark.parametrize(
    ("name", "more", "error", "message"),
    [
        ("nothing", {}, ConfigError, "model: expected a run folder or module:function, got 'nothing'"),
        ("stage_models:linear", {"dataset": None}, ConfigError, "dataset: expected one for the model"),
        ("stage_models:missing", {}, ValueError, "no function missing"),
        ("no_such_module:f", {}, ValueError, "No module named 'no_such_module'"),
        ("stage_models:three", {}, ValueError, r"expected logits of shape \(1, 10\), got \(1, 3\)"),
        ("stage_models:linear", nan_weights, StoreError, "NaN or infinite weights: 1.bias"),
        ("stage_models:linear", cut_weights, StoreError, "cut.safetensors: truncated"),
        ("stage_models:linear", {"checkpoint": "none.safetensors"}, StoreError, "none.safetensors: cannot be read"),
        ("stage_models:linear", {"dataset": "none.npz"}, ValueError, "none.npz: cannot be read"),
        ("stage_models:linear", {"device": "abacus"}, ValueError, "device: expected cpu, cuda or cuda:N"),
    ],
)
def test_a_model_that_cannot_be_opened_is_refused_in_one_line(name, more, error, message, models):
    arguments = {"dataset": "digits", **(more(models) if callable(more) else more)}
    with pytest.raises(error, match=message) as raised:
        open_model(name, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: folder.config_path.write_text(folder.config_path.read_text()[:50]),
            "expected a config in JSON",
        ),
        (lambda folder: folder.checkpoint_path.unlink(), "missing; the run has not been trained to its end"),
    ],
)
def test_a_damaged_run_folder_is_refused(damage, message, finished, tmp_path):
    copy = RunFolder(tmp_path / finished[0].id)
    copy.path.mkdir()
    for path in finished[0].path.iterdir():
        (copy.path / path.name).write_bytes(path.read_bytes())
    damage(copy)
    with pytest.raises(StoreError, match=message):
        open_model(str(copy.path))


def test_a_run_folder_takes_no_other_data_or_weights(finished):
    with pytest.raises(ConfigError, match="a run folder brings its own data set and checkpoint"):
        open_model(str(finished[0].path), dataset="digits")


def spec(**settings):
    return RunSpec.from_mapping({**TINY, "thresholds": [1.0], **settings})


def train_here(grid, output, shown=None):
    return train_one(grid, output, device="cpu", data_root=None, console=shown or console())


def test_training_alone_keeps_the_model_and_what_a_run_goes_on_from(tmp_path, finished):
    shown = console(30)
    folder = train_here(spec(), tmp_path, shown)
    assert {path.name for path in folder.path.iterdir()} == {
        *("config.json", "checkpoint.safetensors", "history.parquet", "resume.pt", "lease.1")
    }
    assert folder.checkpoint_path.read_bytes() == finished[0].checkpoint_path.read_bytes()
    assert text(shown).splitlines()[0] == "training"
    assert text(shown).splitlines()[-1].endswith(f"; checkpoint in {folder.path}") or "best epoch" in text(shown)


def test_training_does_not_touch_a_finished_run(finished):
    folder, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    shown = console()
    train_here(spec(), folder.path.parent, shown)
    assert "finished before" in text(shown)
    assert {path.name: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"thresholds": [1, 2]}, "got 2 cells; use certify run"), ({"width": 15}, "multiple of 2 channels, got 15")],
)
def test_what_cannot_be_trained_is_refused_before_any_folder(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_here(spec(**settings), tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/"))

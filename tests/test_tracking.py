"""What the trackers logged, read back with the libraries' own readers."""

import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

from speccert.experiments import tracking
from speccert.experiments.config import CellConfig, ConfigError, config_id
from speccert.experiments.leases import CancelledRunError, LeaseLostError
from speccert.experiments.store import RunFolder
from speccert.experiments.tracking import check_trackers, make_tracker

ROOT = Path(__file__).parent.parent
STUDY = "/studies/first"
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
EACH = pytest.mark.parametrize(
    "name", [pytest.param("tensorboard", marks=needs_tensorboard), pytest.param("mlflow", marks=needs_mlflow)]
)


def cell(**settings):
    return CellConfig(**{**TINY, "epochs": 4, **settings})


def row(epoch, **values):
    defaults = {"train_loss": 1.0 / epoch, "lipschitz_bound": 2.0**epoch, "validation_accuracy": 0.1 * epoch}
    return {"epoch": epoch, **defaults, **values}


SUMMARY = {
    "id": "abc",
    "threshold": 1.0,
    "seed": 0,
    "clean_accuracy": 0.75,
    "certified_accuracy_eps_0.1": 0.5,
    "gradient_norm": None,
    "best_epoch": 4,
    "diverged": False,
    "status": "finished",
}
FINAL = {
    "final/clean_accuracy": 0.75,
    "final/certified_accuracy_eps_0.1": 0.5,
    "final/best_epoch": 4.0,
    "final/diverged": 0.0,
}


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", *tracking._REQUEST_DEFAULTS):
        monkeypatch.setenv(name, "")  # so that it is removed again, whatever the code sets
        monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.of(tmp_path / "study", cell())
    folder.create(cell())
    return folder


def log(folder, rows, *, names=("tensorboard",), summary=None, config=None, study=STUDY):
    with make_tracker(names, config or cell(), folder, study) as tracker:
        for one in rows:
            tracker.epoch(one)
        if summary is not None:
            tracker.finish(summary)


def events(folder):
    """Every scalar that TensorBoard shows, as tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def client(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient((folder.path.parent / "mlruns").as_uri())


def runs(folder, study=STUDY):
    """All active runs, once as each experiment of this name holds them."""
    reader = client(folder)
    ids = [found.experiment_id for found in reader.search_experiments() if found.name == study]
    assert len(ids) == 1
    return reader.search_runs(ids)


def history(folder):
    (run,) = runs(folder)
    points = {key: client(folder).get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: [(point.step, point.value) for point in found] for key, found in points.items()}


def logged(name, folder):
    return events(folder) if name == "tensorboard" else history(folder)


def series(rows, key):
    return [(one["epoch"], pytest.approx(one[key], rel=1e-6)) for one in rows]  # event files hold float32


@EACH
def test_every_number_of_every_epoch_is_read_back_at_its_step(name, folder):
    rows = [row(epoch) for epoch in (1, 2, 3)]
    log(folder, rows, names=[name])
    expected = {key: series(rows, key) for key in ("train_loss", "lipschitz_bound", "validation_accuracy")}
    assert logged(name, folder) == expected


@EACH
def test_numbers_that_are_not_finite_are_left_out(name, folder):
    rows = [row(1), row(2, train_loss=math.nan, lipschitz_bound=math.inf), row(3)]
    log(folder, rows, names=[name])
    found = logged(name, folder)
    assert [step for step, _ in found["train_loss"]] == [1, 3]
    assert [step for step, _ in found["lipschitz_bound"]] == [1, 3]
    assert found["validation_accuracy"] == series(rows, "validation_accuracy")


@EACH
def test_a_resumed_training_goes_on_without_doubled_points(name, folder):
    rows = [row(epoch) for epoch in (1, 2, 3, 4)]
    log(folder, rows[:3], names=[name])  # killed before epoch 3 could be kept
    log(folder, rows[2:], names=[name], summary=SUMMARY)
    found = logged(name, folder)
    assert found["train_loss"] == series(rows, "train_loss")
    assert {key: found[key] for key in FINAL} == {key: [(5, pytest.approx(value))] for key, value in FINAL.items()}


@EACH
def test_the_results_of_a_summary_are_logged_once_and_its_settings_are_no_results(name, folder):
    log(folder, [row(1)], names=[name], summary=SUMMARY)
    log(folder, [], names=[name], summary=SUMMARY)  # evaluated again
    found = logged(name, folder)
    assert {key: found[key] for key in found if key.startswith("final/")} == {
        key: [(5, pytest.approx(value))] for key, value in FINAL.items()
    }
    assert found["train_loss"] == [(1, 1.0)]


@EACH
def test_a_training_that_starts_over_replaces_what_was_logged(name, folder):
    log(folder, [row(1, train_loss=9.0), row(2, train_loss=8.0), row(3, train_loss=7.0)], names=[name])
    log(folder, [row(1), row(2)], names=[name])
    assert logged(name, folder)["train_loss"] == [(1, 1.0), (2, 0.5)]


def test_both_at_once_log_the_same(folder):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    log(folder, [row(1), row(2)], names=["tensorboard", "mlflow"], summary=SUMMARY)
    expected = {key: [(step, pytest.approx(v)) for step, v in points] for key, points in history(folder).items()}
    assert events(folder) == expected


@needs_tensorboard
def test_tensorboard_gets_the_settings_and_the_success_of_a_cell(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata

    config = cell(threshold=math.inf, constraint="none")
    log(folder, [row(1)], summary=SUMMARY, config=config)
    found = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    contents = found.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    end = metadata.parse_session_end_info_plugin_data(contents[metadata.SESSION_END_INFO_TAG])
    shown = {key: value.WhichOneof("kind") for key, value in start.hparams.items()}
    assert shown.keys() == {key for key in CellConfig.__dataclass_fields__ if getattr(config, key) is not None}
    assert (start.hparams["lr"].number_value, start.hparams["threshold"].number_value) == (config.lr, math.inf)
    assert (start.hparams["eps"].string_value, start.hparams["model"].string_value) == ("0.1, 0.3, 0.5", "mlp")
    assert end.status == api_pb2.STATUS_SUCCESS


@needs_mlflow
def test_mlflow_gets_one_run_with_parameters_and_tags(folder):
    log(folder, [row(1)], names=["mlflow"], summary=SUMMARY)
    (run,) = runs(folder)
    config = cell()
    expected = {key: str(getattr(config, key)) for key in CellConfig.__dataclass_fields__}
    expected |= {"eps": "0.1, 0.3, 0.5", "attacks": "fgsm, ddn"}
    assert run.data.params == {key: value for key, value in expected.items() if value != "None"}
    assert run.data.tags["speccert.cell"] == config_id(config) == run.info.run_name
    assert run.data.tags["speccert.status"] == "finished"
    assert json.loads((folder.path / "mlflow.json").read_text())["run_id"] == run.info.run_id


@needs_mlflow
@pytest.mark.parametrize(
    ("error", "summary", "status"),
    [
        (None, SUMMARY, "FINISHED"),
        (None, None, "KILLED"),
        (RuntimeError("broken"), None, "FAILED"),
        (KeyboardInterrupt(), None, "KILLED"),
        (CancelledRunError("cancelled"), None, "KILLED"),
        (LeaseLostError("taken over"), None, "RUNNING"),
    ],
    ids=repr,
)
def test_the_status_of_a_run_tells_how_the_cell_ended(folder, error, summary, status):
    def attempt():
        with make_tracker(["mlflow"], cell(), folder, STUDY) as tracker:
            tracker.epoch(row(1))
            if summary is not None:
                tracker.finish(summary)
            if error is not None:
                raise error

    if error is None:
        attempt()
    else:
        with pytest.raises(type(error)):
            attempt()
    assert [run.info.status for run in runs(folder)] == [status]


@needs_mlflow
def test_a_resumed_run_is_running_and_then_finished(folder):
    log(folder, [row(1)], names=["mlflow"])
    with make_tracker(["mlflow"], cell(), folder, STUDY) as tracker:
        assert [run.info.status for run in runs(folder)] == ["RUNNING"]
        tracker.finish(SUMMARY)
    assert [run.info.status for run in runs(folder)] == ["FINISHED"]


@needs_mlflow
def test_a_run_that_is_gone_is_followed_by_a_new_one(folder):
    log(folder, [row(1)], names=["mlflow"])
    (first,) = runs(folder)
    client(folder).delete_run(first.info.run_id)
    log(folder, [row(2)], names=["mlflow"])
    assert history(folder)["train_loss"] == [(2, 0.5)]
    (folder.path / "mlflow.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')  # of another store
    log(folder, [row(3)], names=["mlflow"])
    assert len(runs(folder)) == 2


@needs_mlflow
def test_a_damaged_note_of_the_run_is_told(folder, caplog):
    (folder.path / "mlflow.json").write_text("{}")
    log(folder, [row(1)], names=["mlflow"])
    assert "mlflow.json: damaged; delete it" in caplog.text


@needs_mlflow
def test_the_environment_names_store_and_experiment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere" / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    check_trackers(["mlflow"])
    log(folder, [row(1)], names=["mlflow"])
    assert not (folder.path.parent / "mlruns").exists()
    assert len(runs(RunFolder(tmp_path / "elsewhere" / folder.id), "mine")) == 1


@needs_mlflow
def test_keys_are_made_fit_for_mlflow(folder):
    log(folder, [row(1, **{"accuracy:a(b)=c": 1.0})], names=["mlflow"])
    assert history(folder)["accuracy_a_b__c"] == [(1, 1.0)]


WORKER = """
import sys, time
from pathlib import Path
from speccert.experiments.config import CellConfig
from speccert.experiments.store import RunFolder
from speccert.experiments.tracking import make_tracker

output, seed = Path(sys.argv[1]), int(sys.argv[2])
cell = CellConfig(seed=seed)
tracker = make_tracker(["mlflow"], cell, RunFolder.of(output, cell), sys.argv[3])
RunFolder.of(output, cell).create(cell)
while len(list(output.glob("*/config.json"))) < 2:
    time.sleep(0.001)
with tracker:
    tracker.epoch({"epoch": 1, "train_loss": seed + 0.5})
    tracker.finish({"clean_accuracy": 0.5})
"""


@needs_mlflow
def test_two_processes_log_to_one_experiment_at_once(tmp_path):
    commands = [[sys.executable, "-c", WORKER, str(tmp_path), str(seed), STUDY] for seed in (0, 1)]
    workers = [
        subprocess.Popen(command, cwd=ROOT.parent, stderr=subprocess.PIPE, text=True, env=os.environ)
        for command in commands
    ]
    assert [process.communicate(timeout=60)[1] for process in workers] == ["", ""]
    found = {run.data.params["seed"]: run for run in runs(RunFolder(tmp_path / "any"))}
    assert {seed: run.data.metrics["train_loss"] for seed, run in found.items()} == {"0": 0.5, "1": 1.5}
    assert [run.info.status for run in found.values()] == ["FINISHED", "FINISHED"]


def test_a_lock_is_held_alone_and_an_abandoned_one_taken(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "lock"
    monkeypatch.setattr(tracking, "_LOCK_S", 0.2)
    path.parent.mkdir()
    path.touch()
    start = time.monotonic()
    with tracking._alone(path):
        assert time.monotonic() - start > 0.2
        assert path.exists()
    assert not path.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param("tensorboard", "{cell}/tensorboard", marks=needs_tensorboard),
        pytest.param("mlflow", "mlruns", marks=needs_mlflow),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_tracker_that_fails_is_told_once_and_the_training_goes_on(name, place, when, folder, caplog):
    place = folder.path.parent / place.format(cell=folder.id)
    if when == "at the start":
        place.write_text("a file where a folder should be")
    with make_tracker([name], cell(), folder, STUDY) as tracker:
        tracker.epoch(row(1))
        if when == "in the middle":
            shutil.rmtree(place)
            place.write_text("a file where a folder should be")
        tracker.epoch(row(2))
        tracker.epoch(row(3))
        tracker.finish(SUMMARY)
    (record,) = [record for record in caplog.records if record.name == "speccert"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"cell {folder.id}: no more logging to {name}: ")
    assert "\n" not in record.getMessage()


def test_the_other_tracker_goes_on(folder, caplog):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    (folder.path.parent / "mlruns").write_text("a file where a folder should be")
    log(folder, [row(1), row(2)], names=["mlflow", "tensorboard"])
    assert events(folder)["train_loss"] == [(1, 1.0), (2, 0.5)]
    assert len(caplog.records) == 1


def test_no_tracker_does_nothing_and_imports_nothing(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom speccert.experiments.config import CellConfig\n"
        "from speccert.experiments.store import RunFolder\n"
        "from speccert.experiments.tracking import check_trackers, make_tracker\ncheck_trackers(())\n"
        "with make_tracker((), CellConfig(), RunFolder(Path(sys.argv[1])), 'study') as tracker:\n"
        "    tracker.epoch({'epoch': 1, 'train_loss': 1.0})\n    tracker.finish({'clean_accuracy': 1.0})\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cell")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert not set(result.stdout.split()) & {"tensorboard", "mlflow", "torch", "pandas", "numpy"}
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(folder):
    text = "track = 'wandb': expected names out of tensorboard, mlflow"
    for call in (lambda: check_trackers(["mlflow", "wandb"]), lambda: make_tracker(["wandb"], cell(), folder, STUDY)):
        with pytest.raises(ConfigError) as error:
            call()
        assert str(error.value) == text


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.entities")]
)
def test_a_missing_package_is_told_with_what_to_install(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        check_trackers([name])
    assert str(error.value).startswith(f"track = '{name}': can't be imported (")
    assert str(error.value).endswith(f"install it: pip install 'speccert[{name}]'")


@EACH
def test_what_is_installed_passes_the_check(name):
    check_trackers([name])


@needs_mlflow
@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nowhere://store"])
def test_a_store_that_cannot_be_used_is_told_before_anything_runs(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=f"^track = 'mlflow': the store {uri} can't be used: ") as error:
        check_trackers(["mlflow"])
    assert "\n" not in str(error.value)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"

import errno
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from speccert.experiments import store
from speccert.experiments.config import CellConfig, config_id
from speccert.experiments.store import (
    RunFolder,
    StoreError,
    find_runs,
    load_checkpoint,
    lock_output,
    save_checkpoint,
    write_atomic,
)

SAMPLES = pd.DataFrame(
    {
        "index": [0, 1],
        "label": [3, 4],
        "prediction": [3, 5],
        "margin": [1.5, -0.5],
        "radius_l2": [0.75, 0.0],
        "attacked": [True, False],
        "distance": [math.inf, math.nan],
    }
)
HISTORY = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "gradient_norm": [0.5, 0.25]})


@pytest.fixture
def run(tmp_path):
    cell = CellConfig(threshold=math.inf)
    folder = RunFolder.of(tmp_path, cell)
    folder.create(cell)
    return folder


def test_written_files_have_the_content_and_nothing_else_is_there(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, b"old")
    write_atomic(path, b"content")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_written_files_follow_the_umask(tmp_path):
    write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, step, full)
    monkeypatch.setattr(store.Path, "replace", full)
    with pytest.raises(StoreError, match=r"file.txt: cannot be written \(No space left on device\)"):
        write_atomic(tmp_path / "file.txt", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(store.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        write_atomic(tmp_path / "a" / "b", b"")


def test_round_trips(run):
    run.write_samples(SAMPLES)
    run.write_history(HISTORY)
    run.write_summary({"clean_accuracy": np.float32(0.5), "mean_distance": None, "diverged": False, "device": "cpu"})
    pd.testing.assert_frame_equal(run.read_samples(), SAMPLES)
    pd.testing.assert_frame_equal(run.read_history(), HISTORY)
    row = run.read_summary()
    assert (row["id"], row["threshold"], row["eps"]) == (run.id, math.inf, [0.1, 0.3, 0.5])
    assert (row["clean_accuracy"], row["mean_distance"], row["diverged"]) == (0.5, None, False)
    assert run.read_config() == CellConfig(threshold=math.inf)


def test_summary_on_disk_is_strict_json(run):
    run.write_summary({"clean_accuracy": 1.0})
    row = json.loads(run.summary_path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["threshold"] == "inf"


@pytest.mark.parametrize(
    ("results", "match"),
    [
        ({"clean_accuracy": math.nan}, "clean_accuracy = nan, expected a finite number"),
        ({"lipschitz_upper": math.inf}, "lipschitz_upper = inf, expected a finite number"),
        ({"radii": [1, 2]}, r"radii = \[1, 2\], expected"),
        ({"epochs": 3}, "results named as config fields: epochs"),
    ],
)
def test_bad_results_are_refused(run, results, match):
    with pytest.raises(StoreError, match=match):
        run.write_summary(results)
    assert not run.summary_path.exists()


def test_finished_means_a_good_summary_of_this_run(run):
    assert not run.is_finished
    run.write_summary({"clean_accuracy": 1.0})
    assert run.is_finished
    whole = run.summary_path.read_text()
    for damaged in (whole[:-5], "", "[]", whole.replace(run.id, "0" * 12), whole.replace("1.0", "NaN", 1)):
        run.summary_path.write_text(damaged)
        assert not run.is_finished


def test_create_clears_what_a_killed_job_left(run):
    stale = run.path / ".samples.parquet.abc.tmp"
    stale.write_bytes(b"half")
    run.create(CellConfig(threshold=math.inf))
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json"]


def test_create_refuses_another_config(run):
    with pytest.raises(StoreError, match=f"expected the config with id {run.id}, got one with id"):
        run.create(CellConfig(seed=1))


def test_a_missing_or_foreign_config_is_refused(run):
    run.config_path.write_text(CellConfig(seed=9).to_json())
    with pytest.raises(StoreError, match="foreign folder, its config has id"):
        run.read_config()
    run.config_path.unlink()
    with pytest.raises(StoreError, match=r"config.json: cannot be read \(No such file"):
        run.read_config()


@pytest.mark.parametrize("kind", ["samples", "history"])
def test_damaged_parquet_is_refused(run, kind):
    path, read = getattr(run, f"{kind}_path"), getattr(run, f"read_{kind}")
    with pytest.raises(StoreError, match=f"{kind}.parquet: missing"):
        read()
    run.write_samples(SAMPLES)
    run.write_history(HISTORY)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=f"{kind}.parquet: truncated or not a parquet file") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_missing_columns_are_refused(run):
    with pytest.raises(StoreError, match=r"samples.parquet: columns missing: label, distance"):
        run.write_samples(SAMPLES.drop(columns=["label", "distance"]))
    HISTORY[["epoch"]].to_parquet(run.history_path)
    with pytest.raises(StoreError, match=r"history.parquet: columns missing: train_loss, gradient_norm"):
        run.read_history()


def test_all_runs_are_found(tmp_path, run):
    run.write_summary({"clean_accuracy": 0.75})
    cell = CellConfig(seed=1)
    RunFolder.of(tmp_path, cell).create(cell)
    (tmp_path / "0123456789ab").mkdir()
    (tmp_path / "plots").mkdir()
    (tmp_path / "table.csv").touch()
    frame = find_runs(tmp_path).set_index("id")
    assert sorted(frame.index) == sorted([run.id, config_id(cell), "0123456789ab"])
    assert frame.loc[run.id, ["finished", "clean_accuracy", "threshold"]].tolist() == [True, 0.75, math.inf]
    assert frame.loc[config_id(cell), ["finished", "seed"]].tolist() == [False, 1]
    assert not frame.loc["0123456789ab", "finished"]


def test_an_empty_output_folder_gives_no_rows(tmp_path):
    assert find_runs(tmp_path).columns.tolist() == ["folder", "id", "finished"]
    assert len(find_runs(tmp_path)) == 0


def test_bad_runs_are_all_named(tmp_path, run):
    run.write_summary({"clean_accuracy": 0.75})
    run.summary_path.write_bytes(run.summary_path.read_bytes()[:30])
    foreign = tmp_path / "my-model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(StoreError, match=rf"{run.id}.summary.json: damaged.*my-model.config.json: config format None"):
        find_runs(tmp_path)


def test_no_output_folder(tmp_path):
    with pytest.raises(StoreError, match="none: expected a folder of runs"):
        find_runs(tmp_path / "none")


def test_the_lock_holds_and_is_let_go(tmp_path):
    with lock_output(tmp_path / "out"):
        match = rf"out: output folder in use by process {os.getpid()} on \S+"
        with pytest.raises(StoreError, match=match), lock_output(tmp_path / "out"):
            pass
    with lock_output(tmp_path / "out"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from speccert.experiments.store import lock_output\n"
        "with lock_output(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(StoreError, match=f"in use by process {owner.pid} on"), lock_output(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with lock_output(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file: cannot be locked"), lock_output(tmp_path / "file"):
        pass


def model():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["ours.safetensors", "torch.pt", "nested.pth"])
def test_checkpoints_round_trip(tmp_path, kind):
    source, target, path = model(), model(), tmp_path / kind
    if kind.endswith(".safetensors"):
        save_checkpoint(path, source.state_dict())
    else:
        torch.save({"state_dict": source.state_dict()} if kind == "nested.pth" else source.state_dict(), path)
    load_checkpoint(target, path)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_shared_and_transposed_weights_are_saved(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path / "a.safetensors", {"a": weight, "b": weight.T})
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "a.safetensors")["b"], weight.T)


def test_only_tensors_are_saved(tmp_path):
    with pytest.raises(StoreError, match="expected tensors only, got other values for step"):
        save_checkpoint(tmp_path / "a.safetensors", {"step": 3})


def changed(state, **changes):
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"0.weight": None, "1.bias": None}, "missing weights: 0.weight, 1.bias"),
        ({"2.weight": torch.zeros(1)}, "unexpected weights: 2.weight"),
        ({"0.weight": torch.zeros(2, 4)}, r"0.weight has shape \(2, 4\), expected \(2, 3\)"),
        ({"0.bias": torch.tensor([0.0, math.nan])}, "NaN or infinite weights: 0.bias"),
        ({"0.bias": torch.tensor([0.0, math.inf])}, "NaN or infinite weights: 0.bias"),
        ({str(i): torch.zeros(1) for i in range(7)}, "unexpected weights: 0, 1, 2, 3, 4 and 2 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, match):
    target, path = model(), tmp_path / "a.safetensors"
    save_checkpoint(path, changed(model().state_dict(), **changes))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(StoreError, match=match):
        load_checkpoint(target, path)
    assert all(torch.equal(target.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("keep", [0, 5, 60, -10])
def test_truncated_checkpoints_are_refused(tmp_path, name, keep):
    path = tmp_path / name
    if name == "a.pt":
        torch.save(model().state_dict(), path)
    else:
        save_checkpoint(path, model().state_dict())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=rf"{name}: (truncated|damaged)") as caught:
        load_checkpoint(model(), path)
    assert "\n" not in str(caught.value)


def test_no_pickled_code_is_run(tmp_path):
    torch.save(model(), tmp_path / "whole.pt")
    with pytest.raises(StoreError, match="pickled code is not run"):
        load_checkpoint(model(), tmp_path / "whole.pt")


def test_other_content_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(StoreError, match=r"expected a state_dict \(names to tensors\), got list"):
        load_checkpoint(model(), tmp_path / "list.pt")
    with pytest.raises(StoreError, match=r"none.pt: cannot be read \(No such file"):
        load_checkpoint(model(), tmp_path / "none.pt")

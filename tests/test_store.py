import errno
import json
import math
import signal

import numpy as np
import pandas as pd
import pytest
from studies import process, small_disk

from speccert.experiments import store
from speccert.experiments.config import CellConfig
from speccert.experiments.store import RunFolder, StoreError, write_atomic

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
    texts = {"device": "cpu", "masking_flags": ["flat-loss"]}
    run.write_summary({"clean_accuracy": np.float32(0.5), "mean_distance": None, "diverged": False, **texts})
    pd.testing.assert_frame_equal(run.read_samples(), SAMPLES)
    pd.testing.assert_frame_equal(run.read_history(), HISTORY)
    row = run.read_summary()
    assert (row["id"], row["threshold"], row["eps"]) == (run.id, math.inf, [0.1, 0.3, 0.5])
    assert (row["clean_accuracy"], row["mean_distance"], row["diverged"]) == (0.5, None, False)
    assert row["masking_flags"] == ["flat-loss"]
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
        ({"flags": ["flat-loss", None]}, r"flags = \['flat-loss', None\], expected a finite number, text, texts,"),
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
    for name in (".samples.parquet.abc.tmp", ".probe.abc"):
        (run.path / name).write_bytes(b"half")
    (run.path / "lease.1").touch()
    run.create(CellConfig(threshold=math.inf))
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "lease.1"]


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


def test_every_path_of_a_run_is_in_its_folder(run):
    paths = {name: getattr(run, name) for name in dir(RunFolder) if name.endswith("_path")}
    assert len(set(paths.values())) == len(paths) >= 10
    assert {path.parent for path in paths.values()} == {run.path}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path, "256k"):
        yield tmp_path


def test_a_disk_that_is_really_full_keeps_the_old_file_whole(disk):
    path = disk / "cell" / "file"
    write_atomic(path, b"a" * 100_000)
    with pytest.raises(StoreError, match=r"file: cannot be written \(No space left on device\)"):
        write_atomic(path, b"b" * 200_000)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == b"a" * 100_000


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    code = (
        "import sys; from speccert.experiments.store import write_atomic\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "    for letter in b'ab': write_atomic(sys.argv[1], bytes([letter]) * 10**6)"
    )
    for _ in range(5):
        with process(code, tmp_path / "file") as writer:
            writer.line()
            while not (tmp_path / "file").exists():
                pass
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        content = (tmp_path / "file").read_bytes()
        assert len(content) == 10**6
        assert content in (b"a" * 10**6, b"b" * 10**6)

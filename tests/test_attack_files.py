import json
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from blobs import blobs, linear, settings
from safetensors.torch import load_file
from studies import small_disk

from speccert.experiments.attack_files import AttackFolder
from speccert.experiments.config import ConfigError
from speccert.experiments.evaluation import evaluate
from speccert.experiments.store import StoreError

NAMES = {"summary.json", "samples.parquet", "attempts.json", "adversarial.safetensors", "closest.png", "tightness.png"}


@pytest.fixture(scope="module")
def config():
    return settings(attacks=("fgsm", "ddn"), attack_samples=20)


@pytest.fixture(scope="module")
def found(config):
    data = blobs()
    return evaluate(linear(data), config, data)


def names(path):
    return {one.name for one in path.iterdir()}


def test_all_that_was_found_is_written(config, found, tmp_path):
    folder = AttackFolder(tmp_path / "new" / "found")
    folder.claim()
    folder.write("mynet:build", config, found)
    assert names(folder.path) == NAMES
    row = json.loads((folder.path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["kind"], row["finished"], row["name"]) == ("certify attack", True, "mynet:build")
    assert (row["norm"], row["attacks"], row["attack_schedule"], row["eps"]) == (
        *("l2", ["fgsm", "ddn"], "cascade"),
        list(config.eps),
    )
    assert row["no_certificate"] is None
    assert {key: row[key] for key in found.results} == found.results
    pd.testing.assert_frame_equal(pd.read_parquet(folder.path / "samples.parquet"), found.samples)
    kept = load_file(folder.path / "adversarial.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in found.adversarial.items())
    assert len(json.loads((folder.path / "attempts.json").read_text())) == len(found.attempts)
    for name in ("closest.png", "tightness.png"):
        assert (folder.path / name).read_bytes().startswith(b"\x89PNG")


def test_another_attack_replaces_the_files_and_what_a_killed_one_left(config, found, tmp_path):
    folder = AttackFolder(tmp_path)
    folder.claim()
    folder.write("first", config, found)
    for name in (".samples.parquet.abc.tmp", ".probe.abc"):
        (tmp_path / name).touch()
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    folder.claim()
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == before
    folder.refute("certificate broken: sample 3", {"x": torch.ones(2)})
    assert names(tmp_path) - {".samples.parquet.abc.tmp", ".probe.abc"} == {
        "summary.json",
        "counterexample.safetensors",
    }
    row = json.loads((tmp_path / "summary.json").read_text())
    assert row == {"kind": "certify attack", "finished": False, "error": "certificate broken: sample 3"}
    folder.claim()
    folder.write("second", config, found)
    assert names(tmp_path) - {".samples.parquet.abc.tmp", ".probe.abc"} == NAMES
    assert json.loads((tmp_path / "summary.json").read_text())["name"] == "second"


def foreign(path, name, text):
    (path / name).write_text(text)


@pytest.mark.parametrize(
    ("fill", "other"),
    [
        (lambda path: foreign(path, "notes.txt", "mine"), "notes.txt"),
        (lambda path: foreign(path, "summary.json", "{}"), "summary.json"),
        (lambda path: foreign(path, "summary.json", "["), "summary.json"),
        (lambda path: foreign(path, "samples.parquet", "mine"), "samples.parquet"),
        (lambda path: (path / "figures").mkdir(), "figures"),
        (
            lambda path: [
                foreign(path, "summary.json", '{"kind": "certify attack"}'),
                foreign(path, "config.json", "{}"),
            ],
            "config.json",
        ),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(fill, other, tmp_path):
    fill(tmp_path)
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=rf"output: expected a new folder, .*; {tmp_path} holds {other}$"):
        AttackFolder(tmp_path).claim()
    assert names(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named_before_the_attack(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/found: cannot be written \(Not a directory\)"):
        AttackFolder(tmp_path / "file" / "found").claim()

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"):
        AttackFolder(tmp_path / "other").claim()


def test_a_full_disk_is_told_and_leaves_no_finished_summary(config, found, tmp_path):
    with small_disk(tmp_path, "24k"):
        folder = AttackFolder(tmp_path)
        folder.claim()
        with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"):
            folder.write("mynet:build", config, found)
        assert not json.loads((tmp_path / "summary.json").read_text())["finished"]
        assert not list(tmp_path.glob(".*.tmp"))
        folder.claim()  # still ours


def test_infinite_and_missing_values_are_kept_out_of_the_summary(config, tmp_path):
    data = blobs()
    found = evaluate(linear(data, 1e-3), settings(attacks=("fgsm",), eps=(1e-4,), attack_samples=5), data)
    folder = AttackFolder(tmp_path)
    folder.write("far", config, found)
    row = json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["mean_distance"] is None or math.isfinite(row["mean_distance"])
    assert np.isinf(pd.read_parquet(tmp_path / "samples.parquet")["distance"]).any()

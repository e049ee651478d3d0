import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import trials
from safetensors.torch import load_file
from torch import nn

from speccert.certify import rules
from speccert.certify.linear import Dense
from speccert.experiments import run, store, sweep, work
from speccert.experiments.config import ConfigError, config_id
from speccert.experiments.data import DataError
from speccert.experiments.evaluation import CertificateViolationError
from speccert.experiments.execution import Execution
from speccert.experiments.leases import claim
from speccert.experiments.spec import RunSpec
from speccert.experiments.store import RunFolder, StoreError
from speccert.experiments.sweep import CellError, check_device, write_results
from speccert.experiments.work import Finished

TINY = {**tiny.TINY, "thresholds": [1.0]}
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from speccert.experiments import attacking, resume, run
def dies(honest, calls, seen=[]):
    def call(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **kwargs)
    return call
{patch}
run({spec!r}, {output!r})
"""


LAST_FILE = """
from speccert.experiments.store import RunFolder
RunFolder.write_summary = dies(RunFolder.write_summary, 1)
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_figures(monkeypatch):
    """Pictures take seconds, and one test draws them."""
    monkeypatch.setattr(sweep, "write_figures", lambda *_: [])


def without_times(summary):
    return {key: value for key, value in summary.items() if key not in trials.TIMES}


def state_of(output):
    """Every file below a folder, with its time and content."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(output.rglob("*")) if path.is_file()}


def only_folder(output):
    (folder,) = (path for path in output.iterdir() if re.fullmatch(r"[0-9a-f]{12}", path.name))
    return RunFolder(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = run({**TINY, "thresholds": [1.0, math.inf], "eps": [0.1, 0.3]}, output)
    torch.set_num_threads(threads)
    return output, table


def test_a_run_writes_folders_tables_and_pictures(finished):
    output, table = finished
    cells = RunSpec.from_mapping({**TINY, "thresholds": [1.0, math.inf], "eps": [0.1, 0.3]}).cells()
    figures = {"accuracy_over_eps", "gradient_norms", "radius_against_distance", "sandwich_eps_0.1", "sandwich_eps_0.3"}
    figures |= {"bracket_cap", "closest_cap", "tightness"}
    files = {"robustness.csv", "robustness.md", "robustness.tex", "robustness.parquet", "index.parquet", ".certify"}
    assert {path.name for path in output.iterdir()} == {*files, "figures", *map(config_id, cells)}
    assert {path.name for path in (output / "figures").iterdir()} == {
        f"{f}.{s}" for f in figures for s in ("pdf", "png")
    }
    assert table["threshold"].tolist() == [1.0, math.inf]
    written = pd.read_csv(output / "robustness.csv")
    for column in ("clean_accuracy", "mean_distance", "worst_case_accuracy_eps_0.3"):
        assert written[column].to_numpy() == pytest.approx(table[column].to_numpy(), rel=1e-12)
    for name, mark in (("md", "| cap"), ("tex", r"\begin{tabular}")):
        assert mark in (output / f"robustness.{name}").read_text()


def test_certified_is_at_most_observed_in_every_row_and_cell(finished):
    output, table = finished
    for eps in ("0.1", "0.3"):
        certified = table[f"certified_accuracy_attacked_eps_{eps}"]
        assert (certified <= table[f"worst_case_accuracy_eps_{eps}"]).all()
        for name in ("fgsm", "ddn"):
            assert (table[f"worst_case_accuracy_eps_{eps}"] <= table[f"accuracy_{name}_eps_{eps}"]).all()
    assert (table["mean_certified_radius_attacked"] <= table["mean_distance"]).all()
    assert (table["lipschitz_lower"] <= table["lipschitz_upper"]).all()
    for path in output.glob("*/samples.parquet"):
        rows = pd.read_parquet(path)
        rows = rows[rows["attacked"]]
        assert (rows["radius_l2"] <= rows["distance"]).all()


def test_the_table_repeats_the_summaries(finished):
    output, table = finished
    summaries = [json.loads(path.read_text()) for path in output.glob("*/summary.json")]
    for row in table.to_dict("records"):
        (summary,) = (s for s in summaries if float(s["threshold"]) == row["threshold"])
        for key in ("clean_accuracy", "tightness", "certified_accuracy_eps_0.1", "accuracy_ddn_eps_0.3", "step_ratio"):
            assert row[key] == pytest.approx(summary[key])


def test_finished_cells_are_kept_and_a_new_one_is_added(finished, no_figures, monkeypatch):
    output, table = finished
    before = {path: content for path, content in state_of(output).items() if len(path.parent.name) == 12}
    spec = {**TINY, "thresholds": [math.inf, 1.0], "eps": [0.1, 0.3]}
    with monkeypatch.context() as patch:
        patch.setattr("speccert.experiments.work.run_cell", lambda *_, **__: pytest.fail("computed again"))
        again = run(spec, output)
    assert {path: content for path, content in state_of(output).items() if path in before} == before
    pd.testing.assert_frame_equal(again, table)


def test_a_summary_that_is_damaged_is_computed_again_to_the_same(no_figures, tmp_path):
    run(TINY, tmp_path)
    folder = only_folder(tmp_path)
    summary = folder.read_summary()
    folder.summary_path.write_text(folder.summary_path.read_text()[:200])
    run(TINY, tmp_path)
    assert without_times(folder.read_summary()) == without_times(summary)


@pytest.mark.parametrize(
    ("stage", "patch"),
    [
        ("training", "resume.ResumeFile.write = dies(resume.ResumeFile.write, 3)"),
        ("attacks", "attacking.run_ensemble = dies(attacking.run_ensemble, 1)"),
        pytest.param("last file", LAST_FILE, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(stage, patch, tmp_path, no_figures):
    spec = {**TINY, "epochs": 4}
    script = KILLED.format(patch=patch, spec=spec, output=str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = only_folder(tmp_path / "killed")
    assert not folder.summary_path.exists()
    assert (folder.path / "resume.pt").exists()
    assert folder.checkpoint_path.exists() == (stage != "training")

    epochs = []
    run(spec, tmp_path / "killed", watcher=Listening(epochs))
    assert epochs == ([3, 4] if stage == "training" else [])
    run(spec, tmp_path / "whole")
    whole = only_folder(tmp_path / "whole")
    assert without_times(folder.read_summary()) == without_times(whole.read_summary())
    assert folder.read_samples().equals(whole.read_samples())
    assert (
        folder.read_history()
        .drop(columns=["epoch_s", "step_s"])
        .equals(whole.read_history().drop(columns=["epoch_s", "step_s"]))
    )
    assert load_file(folder.checkpoint_path).keys() == load_file(whole.checkpoint_path).keys()
    assert folder.checkpoint_path.read_bytes() == whole.checkpoint_path.read_bytes()
    assert {path.name for path in folder.path.iterdir()} == {path.name for path in whole.path.iterdir()}


class Listening(sweep._Silent):
    def __init__(self, epochs):
        self.epochs = epochs

    def progress(self, progress):
        if progress.stage.startswith("epoch"):
            self.epochs.append(int(progress.stage.split()[1].split("/")[0]))


@pytest.fixture
def separated(tmp_path, monkeypatch):
    """A linear model on well separated data: its certificate is tight, and an attack finds its boundary."""
    name = f"separated_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def build(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = 0.3 + 0.4 * np.eye(8)[y] + 0.02 * generator.standard_normal((120, 8))
    arrays = {"x_train": x[:90], "y_train": y[:90], "x_test": x[90:], "y_test": y[90:]}
    np.savez(tmp_path / "separated.npz", **arrays)
    return {
        "dataset": str(tmp_path / "separated.npz"),
        "model": f"{name}:build",
        "normalise": "none",
        "constraints": ["none"],
        "epochs": 20,
        "lr": 0.02,
        "batch_size": 16,
        "eps": [0.1, 0.2],
        "attacks": ["ddn"],
    }


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_a_bound_that_is_too_small_ends_the_run(factor, separated, tmp_path, monkeypatch, no_figures):
    rule = rules.Rule(linear=lambda call: Dense(call.module.weight * factor, call.in_shape))
    monkeypatch.setitem(rules._RULES, nn.Linear, rule)
    output = tmp_path / "runs"
    spec = {**separated, "seeds": [0, 1]}
    if factor == 1.0:
        assert (run(spec, output)["tightness"] > 0.95).all()
        return
    with pytest.raises(CertificateViolationError, match=r"certificate broken.*saved in .*counterexample.safetensors"):
        run(spec, output)
    folder = only_folder(output)  # the second seed was not begun
    assert not folder.summary_path.exists()
    assert not list(output.glob("robustness.*"))
    assert not (output / "figures").exists()
    example = load_file(folder.path / "counterexample.safetensors")
    state = load_file(folder.checkpoint_path)
    logits = (state["1.weight"] @ example["x_adv"] + state["1.bias"]).double()
    label = int(example["label"])
    rivals = torch.cat([logits[:label], logits[label + 1 :]])
    assert rivals.max() >= logits[label] - 1e-6
    distance = torch.linalg.vector_norm(example["x_adv"].double() - example["x"].double())
    assert distance < float(example["radius"])
    assert 0 <= example["x_adv"].min() <= example["x_adv"].max() <= 1


def test_a_cell_that_fails_leaves_the_others_finished(tmp_path, no_figures, monkeypatch):
    honest = work.run_cell

    def failing(config, execution, **rest):
        if config.seed in bad:
            raise ValueError("seed is no good\nsecond line")
        return honest(config, execution, **rest)

    bad = {1, 2}
    monkeypatch.setattr(work, "run_cell", failing)
    cells = RunSpec.from_mapping({**TINY, "seeds": [0, 1, 2]}).cells()
    with pytest.raises(CellError) as raised:
        run({**TINY, "seeds": [1, 2, 0]}, tmp_path)
    assert str(raised.value) == f"cell {config_id(cells[1])}, {config_id(cells[2])} failed: seed is no good"
    assert RunFolder.of(tmp_path, cells[0]).is_finished

    bad = {2}
    again = "seed is no good second line (in an earlier run; --retry-failed runs it again)"
    with pytest.raises(CellError) as raised:
        run({**TINY, "seeds": [1, 2, 0]}, tmp_path)
    assert str(raised.value) == f"cell {config_id(cells[1])}, {config_id(cells[2])} failed: {again}"
    assert not RunFolder.of(tmp_path, cells[1]).is_finished
    with pytest.raises(CellError) as raised:
        run({**TINY, "seeds": [1, 2, 0]}, tmp_path, retry_failed=True)
    assert str(raised.value) == f"cell {config_id(cells[2])} failed: seed is no good"
    assert RunFolder.of(tmp_path, cells[1]).is_finished
    assert not RunFolder.of(tmp_path, cells[1]).failure_path.exists()


def test_of_many_failed_cells_the_first_are_named():
    failed = [Finished(f"{k:012d}", error=ValueError("one\ntwo")) for k in range(7)]
    ids = ", ".join(f"{k:012d}" for k in range(5))
    assert sweep._reasons(failed) == f"cell {ids} and 2 more failed: one"
    failed = [Finished(str(k), error=ValueError(f"reason {k}")) for k in range(7)]
    assert sweep._reasons(failed).endswith("; cell 4 failed: reason 4; and 2 more cells; certify status shows them")


@pytest.mark.parametrize(
    ("spec", "arguments", "error", "message"),
    [
        ({"width": 15}, {}, ValueError, "needs a positive multiple of 2 channels, got 15"),
        ({"epcohs": 3}, {}, ConfigError, r"unknown setting 'epcohs' \(did you mean epochs"),
        ({"eps": []}, {}, ConfigError, r"eps = \(\): expected a list"),
        ({"thresholds": [0]}, {}, ConfigError, "threshold = 0.0: expected a number > 0, or inf"),
        ({"dataset": "none.npz"}, {}, DataError, "none.npz: cannot be read"),
        ({"model": "no_such_module:f"}, {}, ValueError, "no_such_module:f"),
        ({}, {"executor": "slurmm"}, ValueError, "executor: expected one of inline, local, slurm; got 'slurmm'"),
        ({}, {"jobs": 0}, ValueError, "jobs: expected an integer >= 1, got 0"),
        ({}, {"executor": "local", "jobs": -1}, ValueError, "jobs: expected an integer >= 1, got -1"),
        ({}, {"device": "abacus"}, ValueError, "device: expected cpu, cuda or cuda:N of this machine, got 'abacus'"),
        ({}, {"device": "meta"}, ValueError, "device: expected cpu, cuda or cuda:N of this machine, got 'meta'"),
    ],
)
def test_bad_input_ends_in_one_line_before_any_run_folder(spec, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message) as raised:
        run({**TINY, **spec}, tmp_path / "runs", **arguments)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700
    assert {path.name for path in (tmp_path / "runs").glob("*")} <= {".certify"}


def test_missing_data_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "speccert.experiments.data.read_files", lambda name, root: (_ for _ in ()).throw(DataError("no data"))
    )
    with pytest.raises(DataError, match="no data"):
        run({**TINY, "dataset": "mnist"}, tmp_path / "runs", data_root=tmp_path / "nowhere")


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"file/.*: cannot be written \(Not a directory\)"):
        run(TINY, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_ends_the_run_without_half_files(tmp_path, no_figures, monkeypatch):
    honest = store.os.fsync

    def full(descriptor):
        if "resume.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        with pytest.raises(CellError, match=r"resume.pt: cannot be written \(No space left on device\)"):
            run(TINY, tmp_path)
    assert {path.name for path in only_folder(tmp_path).path.iterdir()} == {"config.json", "log.txt", "lease.1"}
    run(TINY, tmp_path)
    assert only_folder(tmp_path).is_finished


def test_a_damaged_run_of_another_grid_does_not_spoil_the_table(tmp_path, no_figures):
    (tmp_path / ("0" * 12)).mkdir()
    (tmp_path / ("0" * 12) / "config.json").write_text("{")
    assert len(run(TINY, tmp_path)) == 1
    with pytest.raises(StoreError, match=r"0{12}/config.json: expected a config in JSON"):
        write_results(tmp_path)


def test_truncated_samples_are_named(tmp_path, no_figures):
    run(TINY, tmp_path)
    samples = only_folder(tmp_path).samples_path
    samples.write_bytes(samples.read_bytes()[:-100])
    from speccert.experiments.plots import write_figures

    with pytest.raises(StoreError, match=r"samples.parquet: truncated or not a parquet file"):
        write_figures(tmp_path, tmp_path / "figures")


def test_devices_of_this_machine_are_taken():
    check_device("cpu")
    with pytest.raises(ValueError, match="got 'cuda:99'"):
        check_device("cuda:99")


def test_bad_ways_to_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wait: only Slurm jobs can be left to themselves, got executor 'local'"):
        run(TINY, tmp_path, executor="local", wait=False)
    with pytest.raises(ValueError, match="slurm: unknown option 'partitions'"):
        run(TINY, tmp_path, executor="slurm", slurm={"partitions": "gpu"})


class Sharing(sweep._Silent):
    """Takes note of what is said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_a_cell_of_somebody_else_is_waited_for(tmp_path, no_figures, monkeypatch):
    (cell,) = trials.cells_of(TINY)
    lease = claim(RunFolder.of(tmp_path, cell).path, "another")
    told, naps = Sharing(), []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            work.run_cell(cell, Execution(output=str(tmp_path)))
            lease.finish()
            lease.__exit__(None, None, None)

    with lease:
        monkeypatch.setattr(sweep.time, "sleep", sleep)
        assert len(run(TINY, tmp_path, watcher=told)) == 1
    assert len(naps) == 3
    assert told.said == [f"waiting for 1 cells on which others work (process {os.getpid()} on {socket.gethostname()})"]


def test_a_cell_that_somebody_else_leaves_undone_is_run_here(tmp_path, no_figures, monkeypatch):
    (cell,) = trials.cells_of(TINY)
    lease = claim(RunFolder.of(tmp_path, cell).path, "another")
    with lease:
        monkeypatch.setattr(sweep.time, "sleep", lambda _: lease.__exit__(None, None, None))
        run(TINY, tmp_path)
    assert RunFolder.of(tmp_path, cell).is_finished


def test_two_commands_on_one_folder_share_its_cells(tmp_path):
    output = tmp_path / "runs"
    settings = {**trials.LONG, "seeds": [0, 1, 2, 3]}
    with (
        trials.certify_run(settings, output, "--jobs", "1") as first,
        trials.certify_run(settings, output, "--executor", "inline") as second,
    ):
        for process in (first, second):
            out, err = process.communicate(timeout=150)
            assert (process.returncode, err) == (0, "")
            assert out.count("at eps") >= 4  # told of every cell, its own or not
            assert "tables:" in out
    assert trials.contents(output) == trials.unbroken(settings, tmp_path / "unbroken")
    assert set(trials.begins(output).values()) == {1}
    trials.assert_tidy(output)
    assert pd.read_csv(output / "robustness.csv")["done"].tolist() == [4]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_in_one_line_and_with_space_the_same_command_finishes(tmp_path):
    disk, settings = tmp_path / "disk", {**trials.SMALL, "thresholds": [1.0], "seeds": [0, 1]}
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        output = disk / "runs"
        (tmp_path / "spec.toml").write_text(RunSpec.from_mapping(settings).to_toml())
        command = [sys.executable, "-c", "from speccert.cli import main; main()", "run", tmp_path / "spec.toml"]
        command += ["-o", output, "--jobs", "2"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 1
        assert len(ended.stderr.splitlines()) == 1
        assert "No space left on device" in ended.stderr
        assert not [path for path in output.rglob("*") if ".tmp" in path.name or path.name.startswith(".lease")]
        assert not list(output.glob("*/failed.json"))
        for path in output.glob("*/*.json"):
            json.loads(path.read_text())
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "waiting for" not in ended.stdout  # for an owner that has gone
        assert trials.contents(output) == trials.unbroken(settings, tmp_path / "unbroken")
        trials.assert_tidy(output)
    finally:
        subprocess.run(["umount", disk], check=True)

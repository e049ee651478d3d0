"""What all executors share: the same results, errors that end one cell only, the choice of devices."""

import os
import signal

import pytest
import torch
import trials

from speccert.experiments import executors, run, sweep
from speccert.experiments.config import config_id
from speccert.experiments.evaluation import CertificateViolationError
from speccert.experiments.execution import Execution
from speccert.experiments.executors import Finished, InlineExecutor, default_jobs, device_slots
from speccert.experiments.sweep import CellError

MODEL = """
import multiprocessing
from torch import nn
def build(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
def in_worker():
    return multiprocessing.parent_process() is not None
class Strange(Exception):
    def __init__(self, one, two):
        self.lock = __import__("threading").Lock()
    def __str__(self):
        return "strange"
def fails(input_shape, num_classes):
    if in_worker():
        raise ValueError("no model today")
    return build(input_shape, num_classes)
def strange(input_shape, num_classes):
    if in_worker():
        raise Strange(1, 2)
    return build(input_shape, num_classes)
def leaves(input_shape, num_classes):
    if in_worker():
        raise SystemExit(3)
    return build(input_shape, num_classes)
def lies(input_shape, num_classes):
    if in_worker():
        from speccert.certify import rules
        from speccert.certify.linear import Dense
        rules._RULES[nn.Linear] = rules.Rule(linear=lambda call: Dense(call.module.weight * 0.01, call.in_shape))
    return build(input_shape, num_classes)
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(sweep, "write_figures", lambda *_: [])  # pictures take seconds and are drawn elsewhere
    with trials.one_thread_workers(monkeypatch):
        yield


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Settings with a model that behaves as told, but in workers only."""
    name = trials.importable(MODEL, tmp_path, monkeypatch)
    settings = {**trials.SMALL, "constraints": ["none"], "normalise": "none", "attacks": ["fgsm"], "width": None}
    return lambda function="build", **more: {**settings, "seeds": [0, 1], "model": f"{name}:{function}", **more}


class Told(sweep._Silent):
    def __init__(self):
        self.stages, self.ends = {}, []

    def progress(self, progress):
        self.stages.setdefault(progress.id, []).append(progress.stage.split(" loss")[0])

    def finish(self, finished):
        self.ends.append(finished.id)


def test_inline_and_local_give_the_same_to_the_last_bit(tmp_path):
    inline, local = Told(), Told()
    run(trials.TWELVE, tmp_path / "inline", watcher=inline)
    run(trials.TWELVE, tmp_path / "local", executor="local", jobs=2, watcher=local)
    found = trials.contents(tmp_path / "inline")
    assert set(found) == set(trials.ids_of(trials.TWELVE))
    assert trials.contents(tmp_path / "local") == found
    assert inline.stages == local.stages
    assert sorted(inline.ends) == sorted(local.ends) == sorted(found)
    for output in (tmp_path / "inline", tmp_path / "local"):
        assert set(trials.begins(output).values()) == {1}
        trials.assert_tidy(output)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fails", "no model today"),
        pytest.param("strange", "strange", marks=pytest.mark.slow),
        pytest.param("leaves", r".*called sys.exit\(3\)", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_any_class_in_a_worker_ends_its_cell_and_is_kept(function, reason, spec, tmp_path):
    cells = trials.ids_of(spec(function))
    with pytest.raises(CellError, match=rf"^cell {', '.join(cells)} failed: {reason}$"):
        run(spec(function), tmp_path / "runs", executor="local", jobs=1)
    for cell in cells:
        assert "Traceback" in (tmp_path / "runs" / cell / "failed.json").read_text()


def test_a_broken_certificate_in_a_worker_ends_the_whole_run(spec, tmp_path):
    output = tmp_path / "runs"
    with pytest.raises(CertificateViolationError, match="certificate broken"):
        run(spec("lies", seeds=[0, 1, 2]), output, executor="local", jobs=1)
    assert len(trials.begins(output)) == 1
    with pytest.raises(CertificateViolationError, match="certificate broken"):  # and is not forgotten
        run(spec("lies", seeds=[0, 1, 2]), output, executor="local", jobs=1)
    assert not list(output.glob("*/summary.json"))
    assert not list(output.glob("robustness.*"))


def test_inline_cells_fail_one_by_one(spec, tmp_path, monkeypatch):
    def failing(cell, *_):
        return Finished(config_id(cell), error=ValueError("no") if cell.seed == 0 else OSError("full"))

    monkeypatch.setattr(executors, "work", failing)
    cells = trials.cells_of(spec())
    ends = list(InlineExecutor().events(cells, Execution(output=str(tmp_path))))
    assert [(end.id, end.summary, str(end.error)) for end in ends] == [
        (config_id(cells[0]), None, "no"),
        (config_id(cells[1]), None, "full"),
    ]


@pytest.mark.parametrize(
    ("settings", "count", "slots"),
    [
        ({"device": "cuda"}, 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ({"device": "cuda", "cells_per_gpu": 2}, 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ({"device": "cuda", "gpus_per_cell": 2}, 5, ["cuda:0,cuda:1", "cuda:2,cuda:3"]),
        ({"device": "cuda:1", "cells_per_gpu": 2}, 4, ["cuda:1"]),
        ({"gpus_per_cell": 2}, 0, ["cpu"]),
    ],
)
def test_devices_are_shared_out_round_robin(settings, count, slots, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert device_slots(Execution(output="runs", **settings)) == slots


def test_more_gpus_a_cell_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="gpus_per_cell: expected at most 1, the GPUs of this machine, got 2"):
        device_slots(Execution(output="runs", device="cuda", gpus_per_cell=2))


@pytest.mark.parametrize(
    ("settings", "count", "cores", "jobs"),
    [
        ({"device": "cuda"}, 4, 16, 4),
        ({"device": "cuda", "cells_per_gpu": 3}, 2, 16, 6),
        ({"device": "cuda", "gpus_per_cell": 2}, 4, 16, 2),
        ({"device": "cuda:1", "cells_per_gpu": 3}, 4, 16, 3),
        ({}, 4, 16, 16),
        ({"threads": 3}, 0, 16, 5),
        ({"threads": 2, "gpus_per_cell": 4}, 0, 16, 2),
        ({"threads": 4}, 0, 2, 1),
    ],
)
def test_as_many_cells_at_once_as_the_machine_can_feed(settings, count, cores, jobs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert default_jobs(Execution(output="runs", **settings)) == jobs


INTERRUPTED = "certify: error: interrupted; what is finished is kept, and the same command goes on from there"


@pytest.mark.parametrize(
    "flags", [("--executor", "inline"), ("--executor", "local", "--jobs", "2")], ids=lambda f: f[1]
)
def test_ctrl_c_ends_at_once_with_one_line_and_leaves_nothing_behind(flags, tmp_path):
    output = tmp_path / "runs"
    with trials.certify_run(trials.ENDLESS, output, *flags) as process:
        trials.wait_for(lambda: len(trials.running(output)) == (1 if "inline" in flags else 2), process=process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        out, err = process.communicate(timeout=20)
        trials.wait_for(lambda: not trials.group_members(process.pid), seconds=5)
    assert (process.returncode, err.strip()) == (130, INTERRUPTED)
    assert "Traceback" not in out
    for path in output.glob("*/config.json"):
        assert {one.name for one in path.parent.iterdir()} == {"config.json", "lease.1", "log.txt", "resume.pt"}
    assert not list(output.glob(".certify/run-*"))
    assert not trials.running(output)

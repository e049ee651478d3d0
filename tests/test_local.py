"""Worker processes that die, are stopped, or lose the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import time

import pytest
import trials

from speccert.experiments.cell import Progress
from speccert.experiments.config import config_id
from speccert.experiments.execution import Execution
from speccert.experiments.local import LocalExecutor
from speccert.experiments.store import RunFolder
from speccert.experiments.work import Finished

MODEL = """
import multiprocessing, os, signal
from torch import nn
def build(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
def dies(input_shape, num_classes):
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return build(input_shape, num_classes)
def prints(input_shape, num_classes):
    print("x" * 300_000)
    return build(input_shape, num_classes)
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    with trials.one_thread_workers(monkeypatch):
        yield


@pytest.fixture
def model(tmp_path, monkeypatch):
    name = trials.importable(MODEL, tmp_path, monkeypatch)
    settings = {**trials.SMALL, "constraint": "none", "normalise": "none", "attacks": ["fgsm"], "width": None}
    return lambda function: {**settings, "model": f"{name}:{function}"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return trials.unbroken(trials.LONG, tmp_path_factory.mktemp("unbroken"))


def followed(settings, output, jobs=2):
    """The executor's events on a study."""
    execution = Execution(output=str(output), jobs=jobs)
    return contextlib.closing(LocalExecutor().events(trials.cells_of(settings), execution))


def only_child():
    (child,) = multiprocessing.active_children()
    return child.pid


def is_epoch(event, number):
    return isinstance(event, Progress) and event.stage.startswith(f"epoch {number}/")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_killed_worker_is_replaced_and_its_cell_goes_on_to_the_same_bits(number, tmp_path, expected):
    first, second = trials.ids_of(trials.LONG)
    with followed(trials.LONG, tmp_path, jobs=1) as events:
        seen = []
        for event in events:
            seen.append(event)
            if is_epoch(event, 5) and event.id == first:
                os.kill(only_child(), number)
    assert trials.contents(tmp_path) == expected
    assert [event.id for event in seen if isinstance(event, Finished)] == [first, second]
    assert all(event.error is None for event in seen if isinstance(event, Finished))
    assert trials.begins(tmp_path) == {first: 2, second: 1}
    assert sum(is_epoch(event, 3) and event.id == first for event in seen) == 1  # not trained twice
    trials.assert_tidy(tmp_path)


def test_a_worker_that_dies_while_it_starts_is_replaced(tmp_path):
    settings = {**trials.SMALL, "thresholds": [1.0]}

    def interfere(events):
        pids = []
        original = LocalExecutor.events.__globals__["wait"]

        def killing(handles):
            if not pids:
                pids.append(only_child())
                os.kill(pids[0], signal.SIGTERM)  # it is deep in its imports, without a handler
            return original(handles)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("speccert.experiments.local.wait", killing)
            return list(events)

    with followed(settings, tmp_path) as events:
        ends = [event for event in interfere(events) if isinstance(event, Finished)]
    assert [event.error for event in ends] == [None]


@pytest.mark.slow
def test_a_cell_that_kills_every_worker_ends_with_an_error_and_the_others_go_on(model, tmp_path):
    bad, good = trials.cells_of(model("dies"))[0], trials.cells_of(model("build"))[0]
    execution = Execution(output=str(tmp_path), jobs=1)
    ends = [event for event in LocalExecutor().events([bad, good], execution) if isinstance(event, Finished)]
    assert [event.id for event in ends] == [config_id(bad), config_id(good)]
    assert "3 workers died one after the other" in str(ends[0].error)
    assert RunFolder.of(tmp_path, bad).failure_path.exists()
    assert ends[1].error is None
    assert trials.begins(tmp_path)[config_id(bad)] == 4


def test_a_cell_that_prints_does_no_harm(model, tmp_path, capfd):
    with followed(model("prints"), tmp_path) as events:
        ends = [event for event in events if isinstance(event, Finished)]
    assert [event.error for event in ends] == [None]
    assert "x" * 300_000 in capfd.readouterr().out


def test_closing_the_iterator_ends_the_workers_at_once(tmp_path):
    with followed(trials.ENDLESS, tmp_path) as events:
        next(event for event in events if is_epoch(event, 3))
        assert len(multiprocessing.active_children()) == 2
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert multiprocessing.active_children() == []
    assert not trials.running(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_workers_end_with_a_parent_that_is_killed_and_the_command_goes_on_from_there(tmp_path, expected):
    output = tmp_path / "runs"
    with trials.certify_run(trials.LONG, output, "--jobs", "2") as process:
        trials.wait_for(lambda: len(trials.running(output)) == 2, process=process)
        process.kill()
        process.wait()
        trials.wait_for(lambda: not trials.group_members(process.pid), seconds=20)
    code, _, err = trials.completed(trials.LONG, output, "--jobs", "2")
    assert (code, err) == (0, [])
    assert trials.contents(output) == expected
    assert set(trials.begins(output).values()) == {2}
    trials.assert_tidy(output)


@pytest.mark.slow
def test_workers_go_on_while_their_parent_is_stopped(tmp_path, expected):
    output = tmp_path / "runs"
    with trials.certify_run(trials.LONG, output, "--jobs", "2") as process:
        trials.wait_for(lambda: len(trials.running(output)) == 2, process=process)
        os.kill(process.pid, signal.SIGSTOP)
        trials.wait_for(lambda: len(list(output.glob("*/summary.json"))) == 2)
        os.kill(process.pid, signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert trials.contents(output) == expected


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start(tmp_path):
    output = tmp_path / "runs"
    with trials.certify_run(trials.ENDLESS, output, "--jobs", "2") as process:
        trials.wait_for(lambda: len(trials.group_members(process.pid)) >= 3, process=process)  # with the workers
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
        trials.wait_for(lambda: not trials.group_members(process.pid), seconds=5)
    assert process.returncode == 130
    assert len(err.strip().splitlines()) == 1

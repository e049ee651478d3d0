"""The file that tells a job its cells, the file in which it tells of them, and the signals that end it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import trials

from speccert.experiments import chunks
from speccert.experiments.chunks import read_chunk, run_chunk, stop, write_chunk
from speccert.experiments.execution import Execution
from speccert.experiments.store import StoreError

JOB = """
import signal, sys, time
from speccert.experiments import chunks
chunks._GRACE_S = 1.0
if __name__ == "__main__":
    def warned(number, frame):  # as submitit does
        chunks.stop()
        raise RuntimeError("not requeued")
    signal.signal(signal.SIGUSR2, warned)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    chunks.run_chunk(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert multiprocessing.active_children() == []


def chunk_of(settings, tmp_path, **execution):
    execution = Execution(**{"output": str(tmp_path / "runs"), "jobs": 1, **execution})
    return write_chunk(tmp_path / "jobs" / "chunk-0.json", trials.cells_of(settings), execution)


def told(chunk):
    lines = [line for line in chunk.events_path.read_text().splitlines() if line]
    return [(event["id"], event["event"]) for event in map(json.loads, lines)]


def test_a_chunk_is_read_as_it_was_written(tmp_path):
    settings = {**trials.SMALL, "thresholds": [1.0, float("inf")], "checkpoint": "weights.pt"}
    chunk = chunk_of(settings, tmp_path, track=("mlflow",), threads=3, device="cuda")
    assert read_chunk(chunk.path) == chunk
    assert json.loads(chunk.path.read_text())["ids"] == trials.ids_of(settings)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"cells": []}', b'{"cells": [1], "execution": {}}'])
def test_a_missing_or_damaged_chunk_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "chunk.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"chunk.json: missing or damaged job file"):
        read_chunk(tmp_path / "chunk.json")


def test_a_job_tells_of_every_cell_and_passes_finished_ones_over(tmp_path):
    settings = {**trials.SMALL, "thresholds": [1.0], "seeds": [0, 1]}
    chunk = chunk_of(settings, tmp_path)
    chunk.events_path.write_text('{"id": "half a li')
    run_chunk(chunk.path)
    first, second = trials.ids_of(settings)
    text = chunk.events_path.read_text().partition("\n")[2]
    expected = [(first, "begun"), (first, "done"), (second, "begun"), (second, "done")]
    assert [(event["id"], event["event"]) for event in map(json.loads, text.splitlines())] == expected
    chunk.events_path.unlink()
    run_chunk(chunk.path)
    assert told(chunk) == [(first, "done"), (second, "done")]
    assert set(trials.begins(tmp_path / "runs").values()) == {1}


def test_errors_are_told_in_one_line():
    from speccert.experiments.cell import Progress
    from speccert.experiments.evaluation import CertificateViolationError
    from speccert.experiments.work import Finished

    begun = set()
    assert chunks._line(Progress("a", "training", 0.0), begun) == {"id": "a", "event": "begun"}
    assert chunks._line(Progress("a", "epoch 1", 0.5), begun) is None
    line = chunks._line(Finished("a", error=ValueError("two\nlines")), begun)
    assert line == {"id": "a", "event": "error", "error": "two lines", "fatal": False}
    assert chunks._line(Finished("a", error=ValueError()), begun)["error"] == "ValueError"
    assert chunks._line(Finished("a", error=CertificateViolationError("x", {})), begun)["fatal"]
    assert chunks._line(Finished("a", held="process 3"), begun) == {"id": "a", "event": "held", "held": "process 3"}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGUSR2, 1, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGUSR2"],
)
def test_a_job_that_is_ended_lets_its_cells_go(number, code, tmp_path):
    chunk = chunk_of(trials.ENDLESS, tmp_path, jobs=2)
    (tmp_path / "job.py").write_text(JOB)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", chunk.path], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        trials.wait_for(lambda: len(trials.running(tmp_path / "runs")) == 2, process=process)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        trials.wait_for(lambda: not trials.group_members(process.pid), seconds=20)  # they end a moment later
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for name in trials.ids_of(trials.ENDLESS):
        folder = tmp_path / "runs" / name
        assert json.loads((folder / "lease.1").read_text())["state"] == "released"
        assert "stopped from outside" in (folder / "log.txt").read_text()
        assert not (folder / "failed.json").exists()


def test_stop_without_workers_does_nothing():
    stop()

import os
import signal
from pathlib import Path

import pytest
from studies import process

from speccert.experiments import processes
from speccert.experiments.processes import is_process, is_requeued, this_process

TELL = (
    "import json, sys, time; from speccert.experiments.processes import this_process\n"
    "print(json.dumps(this_process()), flush=True); time.sleep(60)"
)


@pytest.fixture
def other():
    import json

    with process(TELL) as running:
        yield running, json.loads(running.line())


def test_this_process_is_alive():
    assert is_process(this_process()) is True


def test_another_process_lives_until_it_is_killed(other):
    running, content = other
    assert is_process(content) is True
    running.send_signal(signal.SIGSTOP)
    assert is_process(content) is True
    running.kill()
    running.wait()
    assert is_process(content) is False


def test_a_zombie_is_dead(other):
    running, content = other
    os.kill(running.pid, signal.SIGKILL)
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert os.path.exists(f"/proc/{running.pid}")
    assert is_process(content) is False


def test_a_reused_id_is_another_process(other):
    _, content = other
    assert is_process({**content, "start": str(int(content["start"]) - 100)}) is False


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "elsewhere"},
        {"machine": None},
        {"pid": None},
        {"pid": "7"},
        {"pid": 0},
        {"pid": -1},
        {"start": None},
    ],
)
def test_what_cannot_be_told_is_none(change):
    assert is_process({**this_process(), **change}) is None
    assert is_process({}) is None


def test_an_id_that_no_system_has_is_dead():
    assert is_process({**this_process(), "pid": 10**30}) is False


@pytest.mark.skipif(os.getuid() != 0, reason="needs a process of another user")
def test_a_process_that_this_user_may_not_see_is_not_taken_for_dead(monkeypatch):
    monkeypatch.setattr(processes, "_started", lambda pid: None)  # as with /proc mounted with hidepid
    assert is_process({**this_process(), "start": "1"}) is None
    assert is_process({**this_process(), "start": "1", "pid": 2**22 + 1}) is False


@pytest.mark.parametrize(
    ("environment", "content", "expected"),
    [
        ({}, {"job": None, "restarts": 0}, False),
        ({"SLURM_JOB_ID": "7"}, {"job": "7", "restarts": 0}, False),  # another node or step of the same job
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"job": "7", "restarts": 0}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"job": "7", "restarts": 1}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"job": "8", "restarts": 0}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "x"}, {"job": "7"}, False),
        (
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "2"},
            {"job": "7_2", "restarts": 1},
            True,
        ),
    ],
)
def test_the_same_slurm_job_before_it_was_requeued(monkeypatch, environment, content, expected):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_requeued(content) is expected


def test_a_machine_without_proc_tells_processes_by_their_ids(monkeypatch):
    monkeypatch.setattr(processes, "Path", lambda path: Path("/none"))
    processes._machine.cache_clear()
    try:
        content = this_process()
        assert content["start"] is None
        assert is_process(content) is None
        assert is_process({**content, "pid": 2**22 + 1}) is False
    finally:
        processes._machine.cache_clear()

"""Studies of small cells on digits, what must be equal in two runs of one, and `certify run` as its own process."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speccert.experiments.config import config_id
from speccert.experiments.execution import Execution
from speccert.experiments.leases import read_lease
from speccert.experiments.spec import RunSpec
from speccert.experiments.store import RunFolder
from speccert.experiments.study import records
from speccert.experiments.work import work

# all that differs between two runs on one machine
TIMES = {"attack_s", "cell_s", "evaluate_s", "step_ratio", "step_s", "train_s"}
SMALL = {
    "width": 8,
    "epochs": 2,
    "train_samples": 100,
    "test_samples": 30,
    "attack_samples": 10,
    "attacks": ["fgsm", "ddn"],
    "eps": [0.1, 0.3],
    "loss": "cross-entropy",
}
TWELVE = {**SMALL, "constraints": ["cap", "clip"], "thresholds": [0.5, 1.0, 2.0], "seeds": [0, 1]}
LONG = {**SMALL, "thresholds": [1.0], "seeds": [0, 1], "epochs": 40}  # seconds each, in many steps
ENDLESS = {**LONG, "epochs": 100_000}


@contextlib.contextmanager
def one_thread_workers(monkeypatch):
    """One thread in workers, too; no worker outlives the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert multiprocessing.active_children() == []


def importable(text, folder, monkeypatch):
    """The name of a module of this text that this process and its workers can import."""
    name = f"models_of_{folder.name}_{os.getpid()}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def cells_of(settings):
    return RunSpec.from_mapping(settings).cells()


def ids_of(settings):
    return [config_id(cell) for cell in cells_of(settings)]


def unbroken(settings, output):
    """What an uninterrupted run of the study gives; computed in this process."""
    for cell in cells_of(settings):
        ended = work(cell, Execution(output=str(output)))
        assert ended.summary is not None, ended
    return contents(output)


def contents(output):
    """All that must be equal in two runs of one study, to the last bit: rows, weights, samples."""
    found = {}
    for path in sorted(Path(output).glob("*/summary.json")):
        folder = RunFolder(path.parent)
        row = {key: value for key, value in folder.read_summary().items() if key not in TIMES}
        files = (folder.checkpoint_path, folder.samples_path, folder.closest_path, folder.bounds_path)
        files += (folder.attempts_path, folder.adversarial_path)
        found[folder.id] = row, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return found


def begins(output):
    """How often each cell was begun."""
    logs = sorted(Path(output).glob("*/log.txt"))
    return {path.parent.name: path.read_text().count("begins in process") for path in logs}


def assert_tidy(output):
    """No half file, no lease and no record is left of a run that has ended."""
    assert records(output) == []
    names = {str(path.relative_to(output)) for path in Path(output).rglob("*")}
    left = [name for name in names if any(mark in name for mark in (".tmp", "lease", ".probe", "resume.pt", "run-"))]
    assert left == []


def wait_for(condition, seconds=90, process=None):
    """What the condition gives once it is true; fails after a time, or when the process ends before."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found


def running(output):
    """The cells that have an epoch behind them and a living owner, each with what its lease says."""
    states = {path.parent.name: read_lease(path.parent) for path in Path(output).glob("*/resume.pt")}
    return {name: state.content for name, state in states.items() if state.live}


@contextlib.contextmanager
def meddling(output, do):
    """Meanwhile do something, once, to the first cell that has an epoch behind it; gives a list of its id."""
    found = []

    def meddle():
        name, lease = next(iter(wait_for(lambda: running(output)).items()))
        found.append(name)
        do(lease)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(meddle)
        yield found
        done.result()


def group_members(group):
    """Process ids of a process group, zombies aside."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, found, state in rows if found == str(group) and not state.startswith("Z")]


@contextlib.contextmanager
def certify_run(settings, output, *flags):
    """`certify run` as a process and a group of its own; whatever is left of the group is killed."""
    spec = Path(output).parent / "spec.toml"
    spec.write_text(RunSpec.from_mapping(settings).to_toml())
    process = subprocess.Popen(
        [sys.executable, "-c", "from speccert.cli import main; main()", "run", spec, "-o", output, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=Path(output).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def completed(settings, output, *flags, seconds=120):
    """The same, to its end: exit code, output, lines of errors."""
    with certify_run(settings, output, *flags) as process:
        out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err.splitlines()

"""The Slurm executor through `run` and `certify run`, on a real Slurm: equal results, whatever happens to the jobs."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import trials
from slurm.cluster import needs_slurm

from speccert.cli import main
from speccert.experiments import run, submit, sweep
from speccert.experiments.config import ConfigError
from speccert.experiments.execution import Execution
from speccert.experiments.processes import this_process
from speccert.experiments.slurm import SlurmExecutor
from speccert.experiments.slurm_options import SlurmOptions
from speccert.experiments.study import RunRecord, records
from speccert.experiments.sweep import CellError

pytest.importorskip("submitit", reason="submitit is not installed; pip install 'speccert[slurm]'")

MEMORY = {"memory": "1500M"}  # the test cluster kills a job above what it asked for
FLAGS = ("--executor", "slurm", "--slurm", "memory=1500M")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """One thread in jobs, too; pictures take seconds and are drawn elsewhere."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "write_figures", lambda *_: [])
    submitted = []
    original = submit.submit
    monkeypatch.setattr(
        submit, "submit", lambda *given, **more: submitted.append(original(*given, **more)) or submitted[-1]
    )
    yield
    submit.cancel(job for jobs in submitted for job in jobs)


@pytest.fixture
def output(tmp_path):
    """The folder of a study; jobs of the commands that were run on it are cancelled."""
    yield tmp_path / "runs"
    for path in tmp_path.glob("runs/.certify/jobs/*/jobs.json"):
        submit.cancel(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return trials.unbroken(trials.LONG, tmp_path_factory.mktemp("unbroken"))


class Told(sweep._Silent):
    def __init__(self):
        self.said, self.ends, self.stages = [], [], []

    def say(self, text):
        self.said.append(text)

    def progress(self, progress):
        self.stages.append(progress)

    def finish(self, finished):
        self.ends.append(finished)


def jobs_of(output):
    return [job for record in records(output) for job in record.jobs]


@needs_slurm
def test_packed_jobs_give_what_inline_gives_to_the_last_bit(output, tmp_path):
    told = Told()
    options = {**MEMORY, "cells_per_job": 4, "parallelism": 2}
    run(trials.TWELVE, output, executor="slurm", slurm=options, watcher=told)
    assert trials.contents(output) == trials.unbroken(trials.TWELVE, tmp_path / "inline")
    assert sorted(end.id for end in told.ends) == sorted(trials.ids_of(trials.TWELVE))
    assert told.said[0].startswith("submitted 3 Slurm jobs (")
    assert told.said[0].endswith(" for 12 cells, 4 a job")
    assert set(trials.begins(output).values()) == {1}
    trials.assert_tidy(output)


@needs_slurm
def test_a_killed_cell_goes_on_in_its_job(output, expected):
    told = Told()
    with trials.meddling(output, lambda lease: os.kill(lease["pid"], signal.SIGKILL)):
        run(trials.LONG, output, executor="slurm", slurm=MEMORY, watcher=told)
    assert trials.contents(output) == expected
    assert sorted(trials.begins(output).values()) == [1, 2]
    assert len(told.said) == 1


@needs_slurm
def test_a_killed_job_is_submitted_again(output, expected):
    def kill(lease):
        parent = int(Path(f"/proc/{lease['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)

    told = Told()
    with trials.meddling(output, kill):
        run(trials.LONG, output, executor="slurm", slurm=MEMORY, watcher=told)
    assert trials.contents(output) == expected
    assert any("with 1 cells undone; submitted again" in text for text in told.said)
    trials.assert_tidy(output)


@needs_slurm
def test_scancel_ends_the_cells_of_a_job_and_no_others(output, expected):
    with (
        trials.meddling(output, lambda lease: subprocess.run(["scancel", lease["job"]], check=True)) as cancelled,
        pytest.raises(CellError, match=r"^cell \w{12} failed: Slurm job \d+_\d ended \(CANCELLED\); its log is "),
    ):
        run(trials.LONG, output, executor="slurm", slurm=MEMORY)
    (other,) = {*trials.ids_of(trials.LONG)} - {*cancelled}
    assert set(trials.contents(output)) == {other}
    assert "stopped from outside" in (output / cancelled[0] / "log.txt").read_text()
    run(trials.LONG, output)
    assert trials.contents(output) == expected


@needs_slurm
def test_the_command_can_be_left_come_back_to_and_cancelled(output, expected):
    settings = {**trials.LONG, "epochs": 100_000}
    with trials.certify_run(settings, output, *FLAGS) as process:
        trials.wait_for(lambda: len(trials.running(output)) == 2, process=process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "2 Slurm jobs go on; certify status shows them, certify cancel ends them" in out
    assert len(err.strip().splitlines()) == 1
    jobs = jobs_of(output)
    assert set(submit.states(jobs).values()) == {"RUNNING"}

    with trials.certify_run(settings, output, *FLAGS) as again:
        line = trials.wait_for(again.stdout.readline, process=again)
        assert line.startswith("waiting for 2 cells on which others work (Slurm job ")
        assert jobs_of(output) == jobs
        with pytest.raises(SystemExit) as stop:
            main(["cancel", str(output)])
        assert stop.value.code == 0
        _, err = again.communicate(timeout=30)
    assert again.returncode == 130
    assert len(err.strip().splitlines()) == 1
    trials.wait_for(lambda: set(submit.states(jobs).values()) == {"CANCELLED"})
    trials.wait_for(lambda: not trials.running(output))
    assert records(output) == []
    assert set(trials.begins(output).values()) == {1}


@needs_slurm
def test_jobs_that_are_left_to_themselves_finish(output, expected):
    told = Told()
    run(trials.LONG, output, executor="slurm", slurm={**MEMORY, "cells_per_job": 2}, wait=False, watcher=told)
    assert told.ends == []
    (job,) = jobs_of(output)
    trials.wait_for(lambda: submit.states([job])[job] == "COMPLETED")
    assert trials.contents(output) == expected
    told = Told()
    run(trials.LONG, output, executor="slurm", slurm=MEMORY, watcher=told)
    assert told.said == told.ends == []


@needs_slurm
def test_options_that_the_cluster_refuses_end_the_run_before_anything_is_submitted(output):
    with pytest.raises(ConfigError, match="slurm: partition = 'nowhere': expected one of "):
        run(trials.LONG, output, executor="slurm", slurm={"partition": "nowhere"})
    assert not list(output.glob("*/log.txt"))
    assert not list(output.glob(".certify/run-*"))


HANGING = """
import multiprocessing, time
from pathlib import Path
import numpy as np
def load():
    begun = Path({begun!r})
    if multiprocessing.parent_process() is not None and not begun.exists():
        begun.touch()
        time.sleep(1000)
    x = np.random.default_rng(0).random((300, 8))
    y = x[:, :3].argmax(1)
    return {{"x_train": x[:200], "y_train": y[:200], "x_test": x[200:], "y_test": y[200:]}}
"""


@needs_slurm
@pytest.mark.slow
def test_a_job_that_runs_into_its_time_limit_is_requeued_and_its_cells_go_on(output, tmp_path, monkeypatch):
    name = f"hanging_data_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(HANGING.format(begun=str(tmp_path / "begun")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    settings = {**trials.SMALL, "dataset": f"{name}:load", "thresholds": [1.0], "seeds": [0, 1]}
    told = Told()
    options = {**MEMORY, "time": 1, "signal_delay_s": 30, "cells_per_job": 2}
    run(settings, output, executor="slurm", slurm=options, watcher=told)
    assert trials.contents(output) == trials.unbroken(settings, tmp_path / "inline")
    assert max(trials.begins(output).values()) >= 2  # where starting takes long, the next limit may come as early
    assert len(told.said) == 1


@needs_slurm
@pytest.mark.slow
def test_a_preempted_job_requeues_and_its_cells_go_on(output, tmp_path):
    names = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=True).stdout.split()
    if not {"low", "high"} <= set(names):
        pytest.skip("the cluster has no partitions low and high")
    settings = {**trials.LONG, "seeds": [0], "epochs": 600}

    def preempt(lease):
        node = subprocess.run(
            ["squeue", "-h", "-j", lease["job"], "-o", "%N"], capture_output=True, text=True, check=True
        ).stdout.strip()
        command = ["sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    told = Told()
    # a limit over 10 minutes: below it the jobs' library takes every warning for a time-out
    options = {**MEMORY, "partition": "low", "time": 30}
    with trials.meddling(output, preempt):
        run(settings, output, executor="slurm", slurm=options, watcher=told)
    assert trials.contents(output) == trials.unbroken(settings, tmp_path / "inline")
    assert list(trials.begins(output).values()) == [2]
    assert len(told.said) == 1


# -- without Slurm ----------------------------------------------------------------------------------------------------


class Cluster:
    """Stands in for Slurm: jobs that run their cells when told to, or end in a state."""

    def __init__(self, monkeypatch):
        self.states, self.jobs, self.cancelled = {}, {}, []
        monkeypatch.setattr(submit, "check_cluster", lambda options, cells, **_: options.chunk_size(cells, 1000))
        monkeypatch.setattr(submit, "submit", self.submit)
        monkeypatch.setattr(submit, "states", lambda jobs: {job: self.states[job] for job in jobs})
        monkeypatch.setattr(submit, "cancel", self.cancelled.extend)
        monkeypatch.setattr("speccert.experiments.slurm._POLL_S", 0.01)
        monkeypatch.setattr("speccert.experiments.slurm.time.sleep", self.tick)
        self.script = []

    def submit(self, folder, options, chunks, **_):
        names = [f"{len(self.jobs) + k}" for k in range(len(chunks))]
        self.jobs |= dict(zip(names, chunks, strict=True))
        self.states |= dict.fromkeys(names, "PENDING")
        return names

    def tick(self, _):
        if self.script:
            self.script.pop(0)()


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def executed(output, cluster, said, settings=trials.LONG, **options):
    cells = trials.cells_of(settings)
    executor = SlurmExecutor(SlurmOptions(**options), said.append)
    return executor, list(executor.events(cells, Execution(output=str(output))))


def test_a_job_that_dies_is_submitted_three_times_in_all(tmp_path, cluster):
    said = []
    cluster.script = [lambda job=str(job): cluster.states.update({job: "NODE_FAIL"}) for job in range(3)]
    _, ends = executed(tmp_path, cluster, said, {**trials.LONG, "seeds": [0]})
    assert len(cluster.jobs) == 3
    assert [str(end.error).partition(";")[0] for end in ends] == ["Slurm job 2 ended (NODE_FAIL)"]
    assert [text.partition(" with")[0] for text in said[1:]] == [f"Slurm job {job} ended (NODE_FAIL)" for job in (0, 1)]


def test_what_a_job_tells_is_passed_on_and_half_lines_are_waited_for(tmp_path, cluster):
    first, second = trials.ids_of(trials.LONG)
    events = []

    def tell(text):
        path = cluster.jobs["0"].with_suffix(".events")
        path.write_text((path.read_text() if path.exists() else "") + text)

    cluster.script = [
        lambda: tell(f'\n{{"id": "{first}", "event": "begun"}}\n{{"id": "{first}", "ev'),
        lambda: tell('ent": "held", "held": "process 7"}\nnonsense\n"text"\n'),
        lambda: tell(f'{{"id": "{second}", "event": "error", "error": "no", "fatal": true}}\n'),
        lambda: cluster.states.update({"0": "COMPLETED"}),
    ]
    _, events = executed(tmp_path, cluster, [], cells_per_job=2)
    assert [(end.id, end.held, type(end.error).__name__) for end in events] == [
        (first, "process 7", "NoneType"),
        (second, None, "CertificateViolationError"),
    ]


def test_a_broken_certificate_cancels_all_jobs(tmp_path, cluster):
    executor = SlurmExecutor(SlurmOptions(), print)
    events = executor.events(trials.cells_of(trials.LONG), Execution(output=str(tmp_path)))
    cluster.script = [lambda: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        next(events)
    assert executor.goes_on
    executor.abort()
    assert cluster.cancelled == ["0", "1"]
    assert not executor.goes_on


def test_queued_cells_are_those_of_living_jobs_and_old_records_go(tmp_path, cluster):
    cells = trials.cells_of(trials.LONG)
    executor = SlurmExecutor(SlurmOptions(), print, wait=False)
    execution = Execution(output=str(tmp_path))
    assert list(executor.events(cells, execution)) == []
    process = {"host": "elsewhere", "machine": "another", "pid": 1, "start": "1"}
    (record,) = records(tmp_path)
    RunRecord(token=record.token, executor="slurm", cells=2, jobs=record.jobs, process=process).write(tmp_path)
    other = SlurmExecutor(SlurmOptions(), print)
    first, second = trials.ids_of(trials.LONG)
    assert other.queued(str(tmp_path)) == {first: "Slurm job 0", second: "Slurm job 1"}
    assert executor.queued(str(tmp_path)) == {}  # its own
    cluster.states["0"] = "RUNNING"
    cluster.states["1"] = "COMPLETED"
    assert set(other.queued(str(tmp_path))) == {first}
    cluster.states["0"] = "CANCELLED"
    assert other.queued(str(tmp_path)) == {}
    assert len(records(tmp_path)) == 1  # its process may live, where it can't be seen from here
    dead = {**this_process(), "start": "1"}
    RunRecord(token=record.token, executor="slurm", cells=2, jobs=record.jobs, process=dead).write(tmp_path)
    assert other.queued(str(tmp_path)) == {}
    assert records(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "execution", "message"),
    [
        ({}, {"device": "cuda"}, "slurm: gpus = 0: expected at least 1 with device cuda"),
        ({"gpus": 2}, {"device": "cuda", "gpus_per_cell": 4}, "slurm: gpus = 2: expected 4, the gpus_per_cell"),
    ],
)
def test_gpus_of_the_jobs_and_of_the_cells_must_agree(options, execution, message, tmp_path, cluster):
    executor = SlurmExecutor(SlurmOptions(**options), print)
    with pytest.raises(ValueError, match=message):
        next(executor.events(trials.cells_of(trials.LONG), Execution(output=str(tmp_path), **execution)))
    assert cluster.jobs == {}

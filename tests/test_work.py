import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from studies import finish, process, small_disk
from tiny import TINY

from speccert.experiments import leases
from speccert.experiments import work as working
from speccert.experiments.cell import Progress
from speccert.experiments.config import CellConfig, config_id
from speccert.experiments.evaluation import CertificateViolationError
from speccert.experiments.execution import Execution
from speccert.experiments.index import cells, read_failure
from speccert.experiments.leases import CancelledRunError, claim, read_lease
from speccert.experiments.store import RunFolder, StoreError
from speccert.experiments.work import Finished, is_fatal, recalled, work

CELL = CellConfig(**TINY)


@pytest.fixture
def study(tmp_path):
    return Execution(output=str(tmp_path), token="first"), RunFolder.of(tmp_path, CELL)


@pytest.fixture
def instead(monkeypatch):
    """Puts a function of (folder, report) in the place of the training and the evaluation."""

    def put(function):
        def run_cell(config, execution, *, report):
            folder = RunFolder.of(execution.output, config)
            folder.create(config)
            report(Progress(folder.id, "training", 0.0))
            function(folder, report)
            report(Progress(folder.id, "writing", 1.0))
            folder.write_summary({"clean_accuracy": 0.5})
            return folder.read_summary()

        monkeypatch.setattr(working, "run_cell", run_cell)

    return put


def raising(error):
    def function(folder, report):
        raise error

    return function


def nothing(folder, report):
    return None


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def test_a_cell_from_its_claim_to_its_summary(study):
    execution, folder = study
    stages = []
    finished = work(CELL, execution, lambda progress: stages.append(progress.stage))
    assert finished == Finished(folder.id, summary=folder.read_summary())
    assert finished.summary["clean_accuracy"] > 0
    assert not [name for name in names(folder) if name.startswith(("lease", ".", "failed", "resume"))]
    lines = folder.log_path.read_text().splitlines()
    assert f"begins in process {os.getpid()} on " in lines[0]
    assert [line.split("UTC  ")[1] for line in lines[1:]] == [*stages, "finished"]
    before = folder.summary_path.stat().st_mtime_ns
    assert work(CELL, execution) == finished
    assert folder.summary_path.stat().st_mtime_ns == before
    assert len(folder.log_path.read_text().splitlines()) == len(lines)


def test_the_number_of_threads_is_put_back(study, instead):
    execution, _ = study
    seen, before = [], torch.get_num_threads()
    instead(lambda folder, report: seen.append(torch.get_num_threads()))
    work(CELL, dataclasses.replace(execution, threads=2))
    assert (seen, torch.get_num_threads()) == ([2], before)


def test_a_cell_that_somebody_has_is_left_to_him(study, instead):
    execution, folder = study
    instead(nothing)
    with claim(folder.path, "other"):
        finished = work(CELL, execution)
        assert finished == Finished(folder.id, held=read_lease(folder.path).owner)
        assert names(folder) == ["lease.1"]
    assert work(CELL, execution).summary is not None


class OddError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\nlines  here"), "two lines here"),
        (ValueError(), "ValueError"),
        (OddError(), "OddError"),
        (StoreError("weights: does not fit the model"), "weights: does not fit the model"),
        (FileNotFoundError(errno.ENOENT, "No such file", "data.bin"), "[Errno 2] No such file: 'data.bin'"),
        (OSError("not an image"), "not an image"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("\ud800 in a name"), "\ud800 in a name"),
    ],
)
def test_the_error_of_a_cell_is_kept_and_retried_when_it_is_run_again(study, instead, error, text):
    execution, folder = study
    instead(raising(error))
    assert work(CELL, execution) == Finished(folder.id, error=error)
    kept = read_failure(folder)
    assert (kept["error"], kept["kind"], kept["token"]) == (text, type(error).__name__, "first")
    assert "in function\n    raise error" in kept["traceback"]
    assert "Traceback (most recent call last)" in folder.log_path.read_text()
    [cell] = cells(execution.output)
    assert (cell.state, cell.error) == ("failed", text)
    instead(nothing)
    assert str(work(CELL, execution).error) == text  # in the very run: a requeued job does not try it again
    assert not folder.is_finished
    assert work(CELL, dataclasses.replace(execution, token="second")).summary is not None
    assert read_failure(folder) is None
    assert names(folder) == ["config.json", "log.txt", "summary.json"]


def test_a_broken_certificate_is_fatal_now_and_when_it_is_recalled(study, instead):
    execution, folder = study
    instead(raising(CertificateViolationError("certificate broken", {})))
    assert is_fatal(work(CELL, execution).error)
    assert is_fatal(recalled(read_failure(folder)))
    assert is_fatal(work(CELL, execution).error)
    assert not is_fatal(recalled({"error": "other", "kind": "ValueError"}))


def full(kind):
    error = OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
    wrapped = StoreError(f"file: cannot be written ({error.strerror})")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize("kind", ["ENOSPC", "EDQUOT", "EIO", "ESTALE", "EROFS", "EACCES", "EMFILE"])
@pytest.mark.parametrize("wrap", [True, False])
def test_an_error_of_the_machine_leaves_the_cell_to_the_next_run(study, instead, kind, wrap):
    execution, folder = study
    error = full(kind) if wrap else full(kind).__cause__
    instead(raising(error))
    assert work(CELL, execution).error is error
    assert read_failure(folder) is None
    assert [cell.state for cell in cells(execution.output)] == ["interrupted"]
    instead(nothing)
    assert work(CELL, execution).summary is not None


@pytest.mark.parametrize("free", [0, 16, 40])
def test_on_a_disk_that_is_really_full_a_cell_stops_and_goes_on_with_more_room(tmp_path, free):
    with small_disk(tmp_path, "1m"):
        rest = (tmp_path / "rest").open("wb", buffering=0)
        with rest, contextlib.suppress(OSError):
            while rest.write(b"x" * 4096) == 4096:
                pass
        os.truncate(tmp_path / "rest", (tmp_path / "rest").stat().st_size - 1024 * free)
        execution, folder = Execution(output=str(tmp_path)), RunFolder.of(tmp_path, CELL)
        finished = work(CELL, execution)
        assert "No space left on device" in str(finished.error)
        assert not folder.is_finished
        assert not read_lease(folder.path).live
        assert read_failure(folder) is None
        assert not [path for path in folder.path.rglob("*") if path.suffix == ".tmp"]
        (tmp_path / "rest").unlink()
        assert work(CELL, execution).summary is not None


def test_a_log_on_a_full_disk_ends_no_cell(study, instead):
    execution, folder = study
    folder.path.mkdir()
    folder.log_path.symlink_to("/dev/full")
    instead(nothing)
    assert work(CELL, execution).summary is not None


def test_a_model_that_calls_exit_fails_alone(study, instead):
    execution, folder = study
    instead(raising(SystemExit(3)))
    assert "sys.exit(3)" in str(work(CELL, execution).error)
    assert "sys.exit(3)" in read_failure(folder)["error"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_an_interruption_lets_the_cell_go(study, instead, error):
    execution, folder = study
    instead(raising(error()))
    with pytest.raises(error):
        work(CELL, execution)
    assert not read_lease(folder.path).live
    assert folder.log_path.read_text().splitlines()[-1].endswith("stopped from outside")
    assert read_failure(folder) is None


def test_a_cancelled_run_stops_at_its_next_report_and_keeps_no_failure(study, instead):
    execution, folder = study

    def cancelled(folder, report):
        execution.cancel_path.parent.mkdir()
        execution.cancel_path.touch()

    instead(cancelled)
    assert isinstance(work(CELL, execution).error, CancelledRunError)
    assert read_failure(folder) is None
    assert not folder.is_finished
    assert isinstance(work(CELL, execution).error, CancelledRunError)  # before anything is begun
    instead(nothing)
    assert work(CELL, dataclasses.replace(execution, token="second")).summary is not None


@pytest.mark.parametrize("then", ["goes on", "fails", "finds its files gone"])
def test_who_lost_the_cell_writes_nothing_more(study, instead, then):
    execution, folder = study

    def lost(folder, report):
        (folder.path / "lease.2").write_text(
            json.dumps({"key": "other", "machine": "elsewhere", "pid": 7, "host": "far"})
        )
        if then == "fails":
            raise ValueError("broken")
        if then == "finds its files gone":
            raise FileNotFoundError(errno.ENOENT, "gone")

    instead(lost)
    assert work(CELL, execution) == Finished(folder.id, held="process 7 on far")
    assert names(folder) == ["config.json", "lease.1", "lease.2", "log.txt"]


def test_a_cell_whose_folder_was_deleted_can_be_begun_anew(study, instead):
    execution, _ = study
    instead(lambda folder, report: shutil.rmtree(folder.path))
    finished = work(CELL, execution)
    assert (finished.summary, finished.error) == (None, None)
    assert finished.held is not None
    instead(nothing)
    assert work(CELL, execution).summary is not None


def test_three_deaths_end_the_cell_with_an_error_that_can_be_retried(study, instead, monkeypatch):
    execution, _ = study
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    context = multiprocessing.get_context("fork")

    def die(folder, report):
        report(Progress(folder.id, "epoch 1/2", 0.5))
        time.sleep(0.3)  # some beats
        os.kill(os.getpid(), signal.SIGKILL)

    instead(die)
    for _ in range(3):
        worker = context.Process(target=work, args=(CELL, execution))
        worker.start()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        assert [cell.state for cell in cells(execution.output)] == ["interrupted"]
    instead(nothing)
    finished = work(CELL, execution)
    assert str(finished.error).startswith(
        "3 workers died one after the other (epoch 1/2) without a whole epoch between"
    )
    assert [cell.state for cell in cells(execution.output)] == ["failed"]
    assert work(CELL, dataclasses.replace(execution, token="second")).summary is not None


def test_a_damaged_summary_is_computed_again(study, instead):
    execution, folder = study
    instead(nothing)
    work(CELL, execution)
    folder.summary_path.write_text("{")
    assert work(CELL, execution).summary["clean_accuracy"] == 0.5


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    finished = work(CELL, Execution(output=str(tmp_path / "file")))
    assert isinstance(finished.error, StoreError)
    assert (finished.summary, finished.held) == (None, None)


def test_the_id_is_that_of_the_config(tmp_path):
    finish(tmp_path, **TINY)
    assert work(CELL, Execution(output=str(tmp_path))).id == config_id(CELL)


VARIABLE = ("train_s", "step_s", "step_ratio", "attack_s", "evaluate_s", "cell_s")
KILLED = """
import json, sys, torch
from speccert.experiments.config import CellConfig
from speccert.experiments.execution import Execution
from speccert.experiments.work import work
def report(progress):
    print(progress.stage, flush=True)
    if progress.stage.startswith('epoch'): sys.stdin.readline()
work(CellConfig(**json.loads(sys.argv[1])), Execution(output=sys.argv[2]), report)
"""


def test_a_killed_and_resumed_cell_ends_as_an_unbroken_one(tmp_path):
    settings = {**TINY, "epochs": 3}
    with process(KILLED, json.dumps(settings), tmp_path / "broken") as worker:
        while not worker.line().startswith("epoch 1"):
            pass
        worker.tell("")
        while not worker.line().startswith("epoch 2"):
            pass
        worker.kill()
        worker.wait()
    cell = CellConfig(**settings)
    [begun] = cells(tmp_path / "broken")
    assert begun.state == "interrupted"
    stages = []
    resumed = work(cell, Execution(output=str(tmp_path / "broken")), lambda progress: stages.append(progress.stage))
    whole = work(cell, Execution(output=str(tmp_path / "whole")))
    assert next(stage for stage in stages if stage.startswith("epoch")).startswith("epoch 3/3")
    for timing in VARIABLE:
        del resumed.summary[timing], whole.summary[timing]
    assert resumed.summary == whole.summary

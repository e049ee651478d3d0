import itertools
import json
import math
import os
import signal

import pyarrow.parquet as pq
import pytest
from studies import process

from speccert.experiments import processes, study, submit
from speccert.experiments.config import FIELDS, CellConfig, config_id
from speccert.experiments.execution import MACHINERY
from speccert.experiments.processes import this_process
from speccert.experiments.store import StoreError
from speccert.experiments.study import RunRecord, add_jobs, cancel, forget_plans, planned, records, write_plan

CELLS = [
    CellConfig(width=width, threshold=threshold, seed=seed)
    for width, threshold, seed in itertools.product((16, None), (1.0, math.inf), (3, 1, 2))
]


def machinery(folder):
    return sorted(path.name for path in (folder / MACHINERY).iterdir())


def test_a_plan_gives_every_cell_in_its_order_and_to_the_bit(tmp_path):
    write_plan(tmp_path, CELLS)
    found = planned(tmp_path)
    assert list(found) == [config_id(cell) for cell in CELLS]
    for cell in CELLS:
        values = found[config_id(cell)]
        assert tuple(values) == FIELDS
        assert CellConfig(**values) == cell
    assert planned(tmp_path, ["seed"]) == {config_id(cell): {"seed": cell.seed} for cell in CELLS}


def test_a_plan_of_an_earlier_version_has_the_defaults_of_later_settings(tmp_path):
    write_plan(tmp_path, CELLS)
    (path,) = (tmp_path / MACHINERY).glob("plan-*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["bound_budget"]), path)
    found = planned(tmp_path)
    assert list(found) == [config_id(cell) for cell in CELLS]
    assert {row["bound_budget"] for row in found.values()} == {CellConfig().bound_budget}
    assert planned(tmp_path, ["seed"]) == {config_id(cell): {"seed": cell.seed} for cell in CELLS}


def test_equal_studies_share_a_plan_and_others_are_joined(tmp_path):
    write_plan(tmp_path, CELLS[:3])
    write_plan(tmp_path, CELLS[:3])
    assert len(machinery(tmp_path)) == 1
    [path] = (tmp_path / MACHINERY).iterdir()
    os.utime(path, (1, 1))
    write_plan(tmp_path, CELLS[2:])
    assert list(planned(tmp_path)) == [config_id(cell) for cell in CELLS]
    assert forget_plans(tmp_path) == 2
    assert planned(tmp_path) == {}
    assert forget_plans(tmp_path) == 0


def test_a_folder_without_plans(tmp_path):
    assert planned(tmp_path) == {}
    assert records(tmp_path) == []
    assert cancel(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"PAR1", "half", "other columns"])
def test_a_damaged_plan_is_named(tmp_path, content):
    write_plan(tmp_path, CELLS)
    [path] = (tmp_path / MACHINERY).iterdir()
    if content == "other columns":
        pq.write_table(pq.read_table(path).select(["id", "seed"]), path)
    else:
        path.write_bytes(path.read_bytes()[:-20] if content == "half" else content)
    with pytest.raises(StoreError, match=r"plan-\w+.parquet: damaged plan; delete it") as caught:
        planned(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_forgotten_while_it_is_read(tmp_path, monkeypatch):
    write_plan(tmp_path, CELLS)
    monkeypatch.setattr(study, "_age", lambda path: path.unlink())
    assert planned(tmp_path) == {}


def test_a_record_lives_as_long_as_its_process(tmp_path):
    record = RunRecord(token="t", executor="local", cells=3)
    record.write(tmp_path)
    assert records(tmp_path) == [record]
    assert record.is_alive is True
    assert str(record) == f"local run by process {os.getpid()} on {record.process['host']}"
    record.remove(tmp_path)
    assert records(tmp_path) == []
    dead = RunRecord(token="d", executor="local", cells=3, process={**this_process(), "start": "1"})
    dead.write(tmp_path)
    assert records(tmp_path) == []
    assert machinery(tmp_path) == []


def test_records_elsewhere_and_those_of_jobs_are_kept(tmp_path):
    far = RunRecord(token="a", executor="local", cells=3, process={**this_process(), "machine": "elsewhere"})
    jobs = RunRecord(
        token="b", executor="slurm", cells=3, process={**this_process(), "start": "1"}, jobs=("7_0", "7_1")
    )
    far.write(tmp_path)
    jobs.write(tmp_path)
    assert records(tmp_path) == [far, jobs]
    assert str(jobs).endswith(", 2 Slurm jobs")
    add_jobs(tmp_path, "b", ["9"])
    add_jobs(tmp_path, "c", ["10"])
    assert [record.jobs for record in records(tmp_path)] == [(), ("7_0", "7_1", "9"), ("10",)]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"token": "x"}', "null", '{"jobs": 3}'])
def test_what_is_no_record_is_passed_over(tmp_path, text):
    (tmp_path / MACHINERY).mkdir()
    (tmp_path / MACHINERY / "run-x.json").write_text(text)
    RunRecord(token="y", executor="inline", cells=1).write(tmp_path)
    values = json.loads((tmp_path / MACHINERY / "run-y.json").read_text())
    (tmp_path / MACHINERY / "run-z.json").write_text(json.dumps({**values, "process": None}))
    (tmp_path / MACHINERY / "run-w.json").write_text(json.dumps(values))  # a copy of the record of another run
    assert [record.token for record in records(tmp_path)] == ["y"]


RUN = """
import sys, time
from speccert.experiments.study import RunRecord
try:
    RunRecord(token="t", executor="local", cells=1).write(sys.argv[1])
    print("runs", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_cancelling_interrupts_the_process_and_leaves_the_marker(tmp_path):
    with process(RUN, tmp_path) as run:
        assert run.line() == "runs"
        assert [record.token for record in cancel(tmp_path)] == ["t"]
        assert run.line() == "interrupted"
        assert "run-t.cancel" in machinery(tmp_path)


def test_cancelling_ends_the_slurm_jobs_of_all_runs_even_where_slurm_fails(tmp_path, monkeypatch):
    dead = {**this_process(), "start": "1"}
    for token in ("a", "b"):
        RunRecord(token=token, executor="slurm", cells=1, process=dead, jobs=(f"{token}1",)).write(tmp_path)
    ended = []
    monkeypatch.setattr(submit, "cancel", lambda jobs: ended.extend(jobs))
    cancel(tmp_path)
    assert ended == ["a1", "b1"]
    assert machinery(tmp_path) == []
    for token in ("a", "b"):
        RunRecord(token=token, executor="slurm", cells=1, process=dead, jobs=(f"{token}1",)).write(tmp_path)

    def failing(jobs):
        raise submit.SlurmError("no answer")

    monkeypatch.setattr(submit, "cancel", failing)
    with pytest.raises(submit.SlurmError):
        cancel(tmp_path)
    assert {"run-a.cancel", "run-b.cancel"} <= set(machinery(tmp_path))  # workers stop by themselves


def test_a_run_of_another_user_is_told_by_the_marker(tmp_path, monkeypatch):
    RunRecord(token="t", executor="local", cells=1).write(tmp_path)

    def refused(pid, number):
        assert number == signal.SIGINT
        raise PermissionError

    monkeypatch.setattr(study.os, "kill", refused)
    cancel(tmp_path)
    assert "run-t.cancel" in machinery(tmp_path)


def test_a_run_elsewhere_is_told_by_the_marker(tmp_path, monkeypatch):
    with process(RUN, tmp_path) as run:
        run.line()
        monkeypatch.setattr(processes, "_machine", lambda: "elsewhere")
        [record] = cancel(tmp_path)
        assert record.is_alive is None
        assert run.poll() is None
        assert "run-t.cancel" in machinery(tmp_path)


def test_the_modules_of_status_need_no_torch_and_no_pandas():
    names = ("config", "flags", "execution", "processes", "store", "leases", "study", "index", "status")
    code = (
        "import sys, importlib\n"
        f"for name in {names}: importlib.import_module('speccert.experiments.' + name)\n"
        "print(*sorted({'torch', 'pandas', 'numpy', 'pyarrow', 'rich'} & set(sys.modules)), '.')"
    )
    with process(code) as run:
        assert run.line() == "."


def test_a_run_on_another_machine_keeps_its_mark_of_cancellation(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "cancel", lambda jobs: None)
    record = RunRecord(token="far", executor="slurm", cells=1, process={**this_process(), "machine": "elsewhere"})
    record.write(tmp_path)
    add_jobs(tmp_path, "far", ["5_0"])
    cancel(tmp_path)
    assert machinery(tmp_path) == ["run-far.cancel", "run-far.json"]

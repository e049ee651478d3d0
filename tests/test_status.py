import io
import os
import time

import pytest
from rich.console import Console
from studies import begin, fail, finish, process

from speccert.experiments import status as statuses
from speccert.experiments.config import CellConfig, config_id
from speccert.experiments.index import Cell
from speccert.experiments.leases import LeaseState, claim
from speccert.experiments.spec import RunSpec
from speccert.experiments.status import STATES, Status, find_cell, print_dry_run, read_log, read_status, watch_status
from speccert.experiments.store import RunFolder, StoreError
from speccert.experiments.study import RunRecord, write_plan

LABELS = {"dataset": "digits", "model": "mlp", "constraint": "cap", "threshold": 1.0, "seed": 0, "epochs": 30}


def printed(function, *arguments, width=120, **further):
    console = Console(file=io.StringIO(), width=width)
    function(*arguments, console=console, **further)
    return console.file.getvalue()


def cell(state="pending", number=0, lease=None, error=None, **labels):
    return Cell(f"{number:012x}", state, {**LABELS, **labels}, lease, error)


def running(number=0, **content):
    return cell("running", number, LeaseState(1, True, {"pid": 7, "host": "far", "stage": "epoch 3/30", **content}))


@pytest.fixture
def study(tmp_path):
    """One cell in each state."""
    write_plan(tmp_path, [CellConfig(seed=seed, threshold=0.5) for seed in range(5)])
    finish(tmp_path, {"clean_accuracy": 0.5, "cell_s": 100.0}, seed=0, threshold=0.5)
    begin(tmp_path, seed=2, threshold=0.5)
    fail(begin(tmp_path, seed=3, threshold=0.5), "ValueError: [red]broken[/red]")
    with claim(begin(tmp_path, seed=1, threshold=0.5).path, "t"):
        yield tmp_path


def test_the_counts_of_every_state(study):
    status = read_status(study)
    assert status.counts == dict.fromkeys(STATES, 1)
    assert status.costs == {("digits", "mlp", 30): 100.0, (): 100.0}
    assert [status.remaining_s(one) for one in status.cells] == [0.0, 100.0, 100.0, 100.0, 100.0]
    assert status.left_s == 300.0  # one runs, one was interrupted, one waits; the failed one is not run again


def test_what_is_printed(study):
    RunRecord(token="t", executor="local", cells=4).write(study)
    text = printed(watch_status, study)
    assert "5 cells: 1 done, 1 running, 1 failed, 1 interrupted, 1 pending; about 5 min to go" in text
    assert f"local run by process {os.getpid()} on " in text
    assert "ValueError: [red]broken[/red]" in text  # no markup of its own
    assert f"starting (process {os.getpid()} on " in text
    for seed in (1, 2, 3):
        assert config_id(CellConfig(seed=seed, threshold=0.5)) in text
    assert config_id(CellConfig(seed=4, threshold=0.5)) not in text
    assert config_id(CellConfig(seed=4, threshold=0.5)) in printed(watch_status, study, state="pending")


@pytest.mark.parametrize(
    ("costs", "content", "expected"),
    [
        ({}, {}, None),
        ({}, {"elapsed_s": 20.0, "fraction": 0.0}, None),
        ({}, {"elapsed_s": 20.0, "fraction": 0.1, "first": 0.1, "first_s": 20.0}, None),
        ({}, {"elapsed_s": 30.0, "fraction": 0.2, "first": 0.1, "first_s": 20.0}, 80.0),  # 10 s a tenth
        ({}, {"elapsed_s": 30.0, "fraction": 0.9, "first": 0.8, "first_s": 20.0}, 10.0),  # resumed at 0.7
        ({(): 50.0}, {"elapsed_s": 20.0, "fraction": 0.2}, 30.0),
        ({(): 50.0, ("digits", "mlp", 30): 90.0}, {"elapsed_s": 20.0}, 70.0),
        ({(): 50.0}, {"elapsed_s": 70.0}, 0.0),
        ({("mnist", "mlp", 30): 50.0}, {"elapsed_s": 70.0}, None),
    ],
)
def test_the_time_to_go_of_a_running_cell(costs, content, expected):
    status = Status([], [], costs)
    found = status.remaining_s(running(**content))
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_time_to_go_of_the_study_is_shared_by_those_that_run():
    found = [running(1, elapsed_s=40.0), running(2, elapsed_s=60.0), cell("pending", 3), cell("interrupted", 4)]
    status = Status([*found, cell("done", 5), cell("failed", 6)], [], {(): 100.0})
    assert status.left_s == pytest.approx((60 + 40 + 100 + 100) / 2)
    assert Status([cell("pending")], [], {(): 100.0}).left_s is None  # nobody is at it
    assert Status([running(), cell("pending", 1)], [], {}).left_s is None


def test_only_so_many_cells_are_listed():
    found = [cell("failed", number, error="x", seed=number) for number in range(100)]
    console = Console(file=io.StringIO(), width=100)
    console.print(statuses._view(Status(found, [], {}), None))
    text = console.file.getvalue()
    assert "... and 60 more" in text
    assert text.count("\n") < 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7200, "2.0 h"), (4 * 86400, "4.0 days")],
)
def test_durations(seconds, text):
    assert statuses._duration(seconds) == text


def test_it_is_live_on_a_terminal_until_all_is_done(tmp_path, monkeypatch):
    write_plan(tmp_path, [CellConfig(seed=seed) for seed in range(2)])
    left = [0, 1]
    monkeypatch.setattr(time, "sleep", lambda seconds: finish(tmp_path, seed=left.pop(0)))
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    status = watch_status(tmp_path, console, every_s=3.0)
    assert status.counts["done"] == 2
    assert left == []


def test_it_is_printed_once_where_there_is_no_terminal(study):
    assert printed(watch_status, study, every_s=0.01).count("5 cells:") == 1


def test_no_such_folder(tmp_path):
    with pytest.raises(StoreError, match="none: expected a folder of runs"):
        read_status(tmp_path / "none")


def test_a_dry_run_lists_ids_states_and_the_cost_and_writes_nothing(study):
    spec = RunSpec.from_mapping({"seed": [0, 3], "threshold": [0.5, "inf"], "model": "mlp"})
    before = sorted(study.rglob("*"))
    text = printed(print_dry_run, spec, study)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["cell"] == ["state", "threshold", "seed"]
    states = {(0.5, 0): "done", (0.5, 3): "failed"}
    for one in spec.cells():
        state = states.get((one.threshold, one.seed), "pending")
        assert lines[config_id(one)] == [state, f"{one.threshold:g}", str(one.seed)]
    assert "4 cells: 1 done, 1 failed, 2 pending" in text
    assert "cost: about 5 min of compute for the 3 cells left" in text
    assert sorted(study.rglob("*")) == before
    text = printed(print_dry_run, spec, study / "none")
    assert "4 cells: 4 pending" in text
    assert "cost: no finished cell to estimate it from" in text
    assert not (study / "none").exists()


def test_a_cell_is_found_by_the_beginning_of_its_id(study):
    names = [config_id(CellConfig(seed=seed, threshold=0.5)) for seed in range(4)]
    for name in names:
        assert find_cell(study, name) == find_cell(study, name[:6]) == RunFolder(study / name)
    with pytest.raises(StoreError, match=r"expected one begun cell whose id begins with 'xyz', found none"):
        find_cell(study, "xyz")
    with pytest.raises(StoreError, match=r"begins with '', found 4: "):
        find_cell(study, "")
    with pytest.raises(StoreError, match="found none"):  # planned, and not begun
        find_cell(study, config_id(CellConfig(seed=4, threshold=0.5)))


def test_the_log_of_a_cell_with_its_traceback(tmp_path):
    folder = begin(tmp_path)
    with pytest.raises(StoreError, match=r"log.txt: no log of this cell \(No such file"):
        read_log(folder)
    folder.log_path.write_bytes(b"one\ntwo \xff\nthree\n")
    assert read_log(folder) == "one\ntwo \ufffd\nthree"
    assert read_log(folder, 2) == "two \ufffd\nthree"
    fail(folder)
    assert read_log(folder).splitlines()[-2:] == ["Traceback", "ValueError: broken"]
    folder.log_path.write_text("one\nTraceback\nValueError: broken\n")
    assert read_log(folder) == "one\nTraceback\nValueError: broken"


@pytest.mark.parametrize("command", [["status", "{}"], ["run", "-o", "{}", "--dry-run"], ["logs", "{}", "{id}"]])
def test_the_commands_load_neither_torch_nor_pandas(tmp_path, command):
    folder = finish(tmp_path, {"clean_accuracy": 0.5, "cell_s": 1.0})
    begin(tmp_path, seed=1)
    write_plan(tmp_path, [CellConfig(seed=seed) for seed in range(3)])
    folder.log_path.write_text("begins\n")
    statuses.Index(tmp_path, verify=True)
    code = (
        "import sys\n"
        "from speccert.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, *sorted({'torch', 'pandas', 'scipy'} & set(sys.modules)), '.')"
    )
    arguments = [part.format(tmp_path, id=folder.id) for part in command]
    with process(code, *arguments) as run:
        assert run.communicate()[0].splitlines()[-1] == "0 ."

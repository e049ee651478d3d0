import json
import math
import os
import shutil
import signal
import threading
import time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from studies import begin, fail, finish, process

from speccert.experiments import index as indices
from speccert.experiments.config import FIELDS, CellConfig, config_id
from speccert.experiments.index import INDEX_NAME, Cell, Index, cells, find_runs, read_failure
from speccert.experiments.leases import claim
from speccert.experiments.store import RunFolder, StoreError
from speccert.experiments.study import write_plan


def by_hand(output):
    """Every run folder read one by one, as plain values: what an index must give."""
    rows = {}
    for folder in map(RunFolder, output.iterdir()):
        if len(folder.id) == 12 and folder.path.is_dir() and folder.is_finished:
            rows[folder.id] = folder.read_summary()
    return rows


def as_found(output):
    """The finished cells of `find_runs`, as plain values."""
    frame = find_runs(output)
    rows = frame[frame["finished"]].drop(columns=["folder", "state", "finished", "error"]).to_dict("records")
    return {row["id"]: row for row in rows}


def same(one, other):
    """Equal values; undefined is None or NaN or absent."""
    if pd.api.types.is_scalar(one) and pd.isna(one):
        return pd.api.types.is_scalar(other) and pd.isna(other)
    return bool(one == other)


def assert_equals_folders(output):
    expected, found = by_hand(output), as_found(output)
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        for key in row.keys() | found[name].keys():
            assert same(row.get(key), found[name].get(key)), (key, row.get(key), found[name].get(key))


NAMES = ("clean_accuracy", "mean_distance", "diverged", "machine", "content", "test_count")
NUMBERS = st.one_of(st.none(), st.floats(-1e300, 1e300), st.integers(-(2**53), 2**53))
RESULTS = st.fixed_dictionaries(
    {},
    optional={
        "clean_accuracy": NUMBERS,
        "mean_distance": st.one_of(st.none(), st.floats(0, 1)),
        "diverged": st.booleans(),
        "machine": st.text(min_size=1, max_size=5),
        "content": st.one_of(st.none(), st.text("abc", min_size=1)),
        "test_count": st.integers(0, 10**6),
    },
)
SEEDS = st.integers(0, 5)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("finish"), SEEDS, RESULTS),
        st.tuples(st.just("remove"), SEEDS),
        st.tuples(st.just("begin"), SEEDS),
        st.tuples(st.just("unfinish"), SEEDS),
        st.tuples(st.sampled_from(["look", "glance", "no index", "half an index"])),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ACTIONS)
def test_the_index_equals_the_folders_after_whatever_happens(tmp_path_factory, actions):
    output = tmp_path_factory.mktemp("study")
    for number, (action, *details) in enumerate(actions):
        config = {"seed": details[0], "threshold": math.inf if details[0] % 2 else 0.5} if details else {}
        folder = RunFolder.of(output, CellConfig(**config))
        if action == "finish":
            finish(output, details[1], **config)
            os.utime(folder.summary_path, ns=(number, number))  # as if time had passed
        elif action == "remove":
            shutil.rmtree(folder.path, ignore_errors=True)
        elif action == "begin" and not folder.path.exists():
            begin(output, **config)
        elif action == "unfinish":
            folder.summary_path.unlink(missing_ok=True)
        elif action == "look":
            assert_equals_folders(output)
        elif action == "glance":
            Index(output, verify=False)
        elif action == "no index":
            (output / INDEX_NAME).unlink(missing_ok=True)
        elif action == "half an index" and (output / INDEX_NAME).exists():
            (output / INDEX_NAME).write_bytes((output / INDEX_NAME).read_bytes()[:-8])
    assert_equals_folders(output)
    states = {cell.id: cell.state for cell in cells(output)}
    assert {name for name, state in states.items() if state == "done"} == by_hand(output).keys()


KINDS = [None, True, 3, 2.5, "text", 2**60]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_result_that_changes_its_kind(tmp_path, first, second):
    finish(tmp_path, {"result": first}, seed=0)
    assert_equals_folders(tmp_path)
    finish(tmp_path, {"result": second}, seed=1)
    grown = find_runs(tmp_path).sort_values("seed")["result"].tolist()
    (tmp_path / INDEX_NAME).unlink()
    made_anew = find_runs(tmp_path).sort_values("seed")["result"].tolist()
    assert all(same(one, other) for one, other in zip(grown, made_anew, strict=True))
    if first is not None and second is not None and isinstance(first, str) != isinstance(second, str):
        assert made_anew == [str(first), str(second)]


def test_the_columns_and_the_states(tmp_path):
    plan = [CellConfig(seed=seed) for seed in range(7)]
    write_plan(tmp_path, plan)
    finish(tmp_path, {"clean_accuracy": 0.5, "mean_distance": None}, seed=1)
    begin(tmp_path, seed=2)
    fail(begin(tmp_path, seed=3), "ValueError: broken")
    lost = begin(tmp_path, seed=9, width=16)  # not in the plan
    (tmp_path / "figures").mkdir()
    (tmp_path / "robustness.csv").touch()
    with claim(begin(tmp_path, seed=4).path, "t"):
        frame = find_runs(tmp_path)
        found = cells(tmp_path)
    assert frame.columns[:5].tolist() == ["folder", "id", "state", "finished", "error"]
    assert frame.columns.tolist()[5 : 5 + len(FIELDS)] == list(FIELDS)
    assert frame.columns.tolist()[5 + len(FIELDS) :] == ["clean_accuracy", "mean_distance"]
    assert frame["id"].tolist() == [*map(config_id, plan), lost.id]
    assert frame["folder"].tolist() == [str(tmp_path / name) for name in frame["id"]]
    states = ["pending", "done", "interrupted", "failed", "running", "pending", "pending", "interrupted"]
    assert frame["state"].tolist() == states
    assert frame["finished"].tolist() == [state == "done" for state in states]
    assert frame["finished"].dtype == bool
    assert frame["seed"].tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert frame["error"].tolist() == [None, None, None, "ValueError: broken", None, None, None, None]
    assert all(value == [0.1, 0.3, 0.5] for value in frame["eps"])
    assert frame["clean_accuracy"].isna().tolist() == [state != "done" for state in states]
    assert [(cell.id, cell.state) for cell in found] == list(zip(frame["id"], states, strict=True))
    assert found[4].lease.owner.startswith(f"process {os.getpid()} on ")
    assert found[7].labels == {
        "dataset": "digits", "model": "mlp", "constraint": "cap", "threshold": 1.0, "seed": 9, "epochs": 30
    }  # fmt: skip


def test_some_cells_only(tmp_path):
    folders = [finish(tmp_path, seed=seed) for seed in range(3)]
    damaged = finish(tmp_path, seed=3)
    damaged.summary_path.write_text("{")
    found = find_runs(tmp_path, [folders[2].id, folders[0].id])
    assert found["id"].tolist() == sorted([folders[2].id, folders[0].id])
    assert sorted(found["seed"]) == [0, 2]
    assert len(find_runs(tmp_path, [])) == 0
    assert len(find_runs(tmp_path, ["0" * 12])) == 0


def test_the_folder_of_one_run(tmp_path, monkeypatch):
    folder = finish(tmp_path, seed=4)
    finish(tmp_path, seed=5)
    assert find_runs(folder.path)["seed"].tolist() == [4]
    monkeypatch.chdir(folder.path)
    frame = find_runs(".")
    assert (frame["id"].tolist(), frame["state"].tolist()) == ([folder.id], ["done"])


def test_an_empty_study(tmp_path):
    frame = find_runs(tmp_path)
    assert frame.columns[:5].tolist() == ["folder", "id", "state", "finished", "error"]
    assert len(frame) == 0
    assert cells(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_planned_study_of_which_nothing_was_begun(tmp_path):
    write_plan(tmp_path, [CellConfig(seed=seed, threshold=math.inf) for seed in (2, 1)])
    frame = find_runs(tmp_path)
    assert frame[["state", "seed", "threshold"]].to_numpy().tolist() == [
        ["pending", 2, math.inf],
        ["pending", 1, math.inf],
    ]


@pytest.mark.parametrize("place", ["none", "file"])
def test_no_such_folder(tmp_path, place):
    (tmp_path / "file").touch()
    for function in (find_runs, cells):
        with pytest.raises(StoreError, match=f"{place}: expected a folder of runs"):
            function(tmp_path / place)


def test_an_empty_folder_with_the_name_of_a_run_is_pending(tmp_path):
    (tmp_path / "0123456789ab").mkdir()
    assert cells(tmp_path) == [Cell("0123456789ab", "pending", {})]
    assert find_runs(tmp_path)["state"].tolist() == ["pending"]


def test_bad_runs_are_all_named(tmp_path):
    finish(tmp_path, seed=0).summary_path.write_text('{"id":')
    finish(tmp_path, seed=1).config_path.write_text("{}")
    foreign = tmp_path / "my-model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    pattern = (
        r"summary.json: damaged|config.json: config format None is not readable|my-model.config.json: config format"
    )
    with pytest.raises(StoreError, match=pattern) as caught:
        find_runs(tmp_path)
    assert len(str(caught.value).split("; ")) == 3
    assert "\n" not in str(caught.value)
    assert [cell.state for cell in cells(tmp_path)].count("failed") == 2


def test_a_damaged_cell_that_is_computed_again_is_running_and_then_done(tmp_path):
    folder = finish(tmp_path, {"clean_accuracy": 0.5})
    assert find_runs(tmp_path)["clean_accuracy"].tolist() == [0.5]
    folder.summary_path.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        find_runs(tmp_path)
    with claim(folder.path, "t") as lease:
        assert find_runs(tmp_path)["state"].tolist() == ["running"]
        folder.write_summary({"clean_accuracy": 0.75})
        lease.finish()
    assert find_runs(tmp_path)["clean_accuracy"].tolist() == [0.75]


def test_a_finished_cell_is_done_whatever_else_lies_in_its_folder(tmp_path):
    folder = finish(tmp_path)
    fail(folder)
    (folder.path / "lease.3").touch()
    assert [cell.state for cell in cells(tmp_path)] == ["done"]


def rewritten(path, change):
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PAR1 and so on"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: rewritten(path, lambda table: table.replace_schema_metadata({"speccert_index": "0"})),
        lambda path: rewritten(path, lambda table: table.replace_schema_metadata(None)),
        lambda path: rewritten(path, lambda table: table.drop_columns(["threshold"])),
        lambda path: rewritten(path, lambda table: table.drop_columns(["summary_size"])),
        lambda path: rewritten(
            path, lambda table: table.set_column(table.column_names.index("seed"), "seed", pa.array(["x"]))
        ),
    ],
)
def test_an_index_that_is_missing_damaged_or_old_is_made_anew(tmp_path, spoil):
    finish(tmp_path, {"clean_accuracy": 0.5})
    find_runs(tmp_path)
    spoil(tmp_path / INDEX_NAME)
    assert_equals_folders(tmp_path)
    assert pq.read_table(tmp_path / INDEX_NAME)["clean_accuracy"].to_pylist() == [0.5]


def test_a_folder_in_place_of_the_index(tmp_path):
    finish(tmp_path)
    (tmp_path / INDEX_NAME).mkdir()
    assert_equals_folders(tmp_path)
    assert len(cells(tmp_path)) == 1


def test_a_known_cell_is_not_read_again(tmp_path, monkeypatch):
    for seed in range(3):
        finish(tmp_path, seed=seed)
    find_runs(tmp_path)
    finish(tmp_path, seed=3)
    read = []
    before = RunFolder.read_summary
    monkeypatch.setattr(RunFolder, "read_summary", lambda folder: read.append(folder.id) or before(folder))
    find_runs(tmp_path)
    assert read == [config_id(CellConfig(seed=3))]
    find_runs(tmp_path)
    assert len(read) == 1


@pytest.mark.parametrize("verify", [True, False])
def test_a_removed_cell_is_gone_and_a_changed_one_is_seen_where_it_matters(tmp_path, verify):
    folders = [finish(tmp_path, {"clean_accuracy": 0.5}, seed=seed) for seed in range(3)]
    find_runs(tmp_path)
    shutil.rmtree(folders[0].path)
    folders[1].write_summary({"clean_accuracy": 0.625})
    index = Index(tmp_path, verify=verify)
    values = {name: row["clean_accuracy"] for name, row in index.values(["clean_accuracy"]).items()}
    assert values == {folders[1].id: 0.625 if verify else 0.5, folders[2].id: 0.5}
    assert index.finished == values.keys() == set(index.rows["id"].to_pylist())


def test_many_new_cells_are_indexed_even_by_a_glance(tmp_path, monkeypatch):
    monkeypatch.setattr(indices, "_MANY", 20)
    for seed in range(21):
        finish(tmp_path, seed=seed)
    Index(tmp_path, verify=False)
    assert pq.read_table(tmp_path / INDEX_NAME).num_rows == 21


def test_an_index_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    def refused(path, content):
        raise StoreError("read-only")

    finish(tmp_path, {"clean_accuracy": 0.5})
    monkeypatch.setattr(indices, "write_atomic", refused)
    assert_equals_folders(tmp_path)
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_a_study_of_somebody_else_is_read(tmp_path):
    study = tmp_path / "study"  # whose parent, which is read first, holds nothing else
    finish(study, {"clean_accuracy": 0.5}, seed=0)
    (begin(study, seed=1).path / "lease.1").write_text('{"machine": "elsewhere", "state": "held"}')
    for path in (study, *study.parents[:4]):
        path.chmod(0o755)
    code = (
        "import os, sys, pandas, pyarrow.parquet\n"
        "from speccert.experiments.index import cells, find_runs\n"
        "find_runs(os.path.dirname(sys.argv[1])), cells(sys.argv[1])  # imports all that they need\n"
        "os.setuid(65534)\n"
        "print(*sorted(find_runs(sys.argv[1])['state']), *sorted(cell.state for cell in cells(sys.argv[1])))"
    )
    with process(code, study) as reader:
        assert reader.line() == "done running done running"
    assert not (tmp_path / INDEX_NAME).exists()


def test_folders_that_vanish_while_they_are_read(tmp_path, monkeypatch):
    for seed in range(4):
        finish(tmp_path, seed=seed)
    begin(tmp_path, seed=4)
    index = Index(tmp_path, verify=True)
    shutil.rmtree(tmp_path / config_id(CellConfig(seed=4)))
    assert [cell.state for cell in cells(tmp_path, index=index)].count("done") == 4
    monkeypatch.setattr(indices, "_run_names", lambda output: [config_id(CellConfig(seed=seed)) for seed in range(9)])
    assert (find_runs(tmp_path)["state"] == "done").sum() == 4


WRITER = (
    "import sys; from speccert.experiments.index import Index\n"
    "print('awake', flush=True); sys.stdin.readline()\n"
    "while True: Index(sys.argv[1], verify=True)"
)


def test_two_writers_and_a_growing_study(tmp_path):
    with process(WRITER, tmp_path) as one, process(WRITER, tmp_path) as other:
        for writer in (one, other):
            assert writer.line() == "awake"
            writer.tell("go")
        for seed in range(40):
            finish(tmp_path, {"clean_accuracy": seed / 64}, seed=seed)
            assert _finished_by_index(tmp_path) == {config_id(CellConfig(seed=k)) for k in range(seed + 1)}
        assert one.poll() is None
        assert other.poll() is None
        one.send_signal(signal.SIGKILL)
    assert_equals_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".parquet"} == {INDEX_NAME}


def _finished_by_index(output):
    return Index(output, verify=False).finished


def test_readers_in_threads(tmp_path):
    for seed in range(30):
        finish(tmp_path, seed=seed)
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(find_runs(tmp_path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [30] * 4


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"kind": "x"}', "\x00"])
def test_what_is_no_failure(tmp_path, text):
    folder = begin(tmp_path)
    assert read_failure(folder) is None
    folder.failure_path.write_text(text)
    assert read_failure(folder) is None
    fail(folder, "x")
    assert read_failure(folder)["error"] == "x"


@pytest.mark.slow
def test_thousands_of_cells_are_found_fast(tmp_path):
    configs = [CellConfig(seed=seed) for seed in range(2000)]
    write_plan(tmp_path, configs)
    for config in configs:
        folder = RunFolder.of(tmp_path, config)
        folder.path.mkdir()
        folder.config_path.write_text(config.to_json())
        row = {"id": folder.id, **json.loads(config.to_json()), "clean_accuracy": 0.5, "cell_s": 1.0}
        folder.summary_path.write_text(json.dumps(row))
    assert len(find_runs(tmp_path)) == 2000
    times = []
    for _ in range(3):
        start = time.process_time()
        find_runs(tmp_path)
        times.append(time.process_time() - start)
    assert min(times) < 1.0

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from speccert.experiments import executors, run, sweep
from speccert.experiments.config import RunSpec, config_id
from speccert.experiments.evaluation import CertificateViolationError
from speccert.experiments.executors import Finished, InlineExecutor, LocalExecutor, default_jobs, make_executor
from speccert.experiments.store import RunFolder, lock_output
from speccert.experiments.sweep import CellError

TIMES = {"evaluate_s", "train_s", "step_s", "step_ratio"}
TINY = {
    "model": None,
    "normalise": "none",
    "constraints": ["none"],
    "seeds": [0, 1],
    "epochs": 2,
    "train_samples": 200,
    "test_samples": 40,
    "attack_samples": 10,
    "attacks": ["fgsm"],
    "loss": "cross-entropy",
}
MODEL = """
import multiprocessing, os, signal, glob
from torch import nn
def build(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))
def in_worker():
    return multiprocessing.parent_process() is not None
def dies(input_shape, num_classes):
    if in_worker() and glob.glob({output!r} + "/*/summary.json") and not os.path.exists({output!r} + "/spare"):
        os.kill(os.getpid(), signal.SIGKILL)
    return build(input_shape, num_classes)
def leaves(input_shape, num_classes):
    if in_worker():
        raise SystemExit(3)
    return build(input_shape, num_classes)
def fails(input_shape, num_classes):
    if in_worker():
        raise ValueError("no model today")
    return build(input_shape, num_classes)
def lies(input_shape, num_classes):
    if in_worker():
        from speccert.certify import rules
        from speccert.certify.linear import Dense
        rules._RULES[nn.Linear] = rules.Rule(linear=lambda call: Dense(call.module.weight * 0.01, call.in_shape))
    return build(input_shape, num_classes)
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """OMP_NUM_THREADS reaches the workers, too; pictures take seconds and are drawn elsewhere."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "write_figures", lambda *_: [])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert multiprocessing.active_children() == []


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Settings with a model that behaves as told, but in workers only."""
    name = f"worker_models_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL.format(output=str(tmp_path / "runs")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return lambda function="build", **settings: {**TINY, "model": f"{name}:{function}", **settings}


def summaries(output):
    rows = [RunFolder(path).read_summary() for path in sorted(output.iterdir()) if len(path.name) == 12]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


class Told(sweep._Silent):
    def __init__(self):
        self.stages, self.ends = {}, []

    def progress(self, progress):
        self.stages.setdefault(progress.id, []).append(progress.stage.split(" loss")[0])

    def finish(self, finished):
        self.ends.append(finished.id)


def test_inline_and_local_give_the_same_but_for_times(spec, tmp_path):
    inline, local = Told(), Told()
    run(spec(), tmp_path / "inline", watcher=inline)
    run(spec(), tmp_path / "local", executor="local", jobs=1, watcher=local)
    assert len(summaries(tmp_path / "inline")) == 2
    assert summaries(tmp_path / "inline") == summaries(tmp_path / "local")
    assert inline.stages == local.stages
    assert sorted(inline.ends) == sorted(local.ends)
    for path in (tmp_path / "inline").glob("*/checkpoint.safetensors"):
        assert path.read_bytes() == (tmp_path / "local" / path.parent.name / path.name).read_bytes()


def test_a_killed_worker_ends_in_one_line_and_finished_cells_are_kept(spec, tmp_path):
    output = tmp_path / "runs"
    cells = [config_id(cell) for cell in RunSpec.from_mapping(spec("dies")).cells()]
    with pytest.raises(CellError) as raised:
        run(spec("dies"), output, executor="local", jobs=1)
    assert str(raised.value) == f"cell {cells[1]} failed: a worker process died (killed, or out of memory)"
    kept = (output / cells[0] / "summary.json").stat().st_mtime_ns
    (output / "spare").touch()
    assert len(run(spec("dies"), output)) == 1
    assert (output / cells[0] / "summary.json").stat().st_mtime_ns == kept
    assert (output / cells[1] / "summary.json").exists()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param("leaves", "a worker process died (killed, or out of memory)", marks=pytest.mark.slow),
        ("fails", "no model today"),
    ],
)
def test_a_cell_that_fails_in_a_worker_is_told_once_for_all_cells(function, reason, spec, tmp_path):
    cells = [config_id(cell) for cell in RunSpec.from_mapping(spec(function)).cells()]
    with pytest.raises(CellError) as raised:
        run(spec(function), tmp_path / "runs", executor="local", jobs=1)
    assert str(raised.value) == f"cell {', '.join(cells)} failed: {reason}"


def test_a_broken_certificate_in_a_worker_ends_the_whole_run(spec, tmp_path):
    output = tmp_path / "runs"
    with pytest.raises(CertificateViolationError, match=r"certificate broken.*saved in .*counterexample.safetensors"):
        run(spec("lies", seeds=[0, 1, 2]), output, executor="local", jobs=1)
    assert list(output.glob("*/counterexample.safetensors"))
    assert not list(output.glob("*/summary.json"))
    assert not list(output.glob("robustness.*"))
    with lock_output(output):
        pass


def test_inline_cells_fail_one_by_one(spec, tmp_path, monkeypatch):
    def failing(cell, **_):
        raise ValueError("no") if cell.seed == 0 else OSError("full")

    monkeypatch.setattr(executors, "run_cell", failing)
    cells = RunSpec.from_mapping(spec()).cells()
    ends = list(InlineExecutor().events(cells, {}))
    assert [(end.id, end.summary, str(end.error)) for end in ends] == [
        (config_id(cells[0]), None, "no"),
        (config_id(cells[1]), None, "full"),
    ]
    assert all(isinstance(end, Finished) for end in ends)


def test_executors_by_name():
    assert isinstance(make_executor("inline", 1, print), InlineExecutor)
    assert isinstance(make_executor("local", 3, print), LocalExecutor)
    for name in ("inline", "local"):
        with pytest.raises(ValueError, match="jobs: expected an integer >= 1, got 0"):
            make_executor(name, 0, print)
    with pytest.raises(ValueError, match="executor: expected one of inline, local; got 'cloud'"):
        make_executor("cloud", 1, print)


@pytest.mark.parametrize(("device", "count", "expected"), [("cuda", 4, 4), ("cuda", 1, 1), ("cuda:1", 4, 1)])
def test_a_gpu_runs_one_cell_at_a_time(device, count, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert default_jobs(device) == expected


def test_a_processor_runs_one_cell_a_core():
    assert default_jobs("cpu") == os.cpu_count()


INTERRUPTED = "certify: error: interrupted; what is finished is kept, and the same command goes on from there"
SCRIPT = "from speccert.cli import main; main()"


def started(spec, tmp_path, *flags):
    """`certify run` on an endless training, as its own process group; waits until an epoch is done."""
    (tmp_path / "spec.toml").write_text(RunSpec.from_mapping(spec(epochs=100_000)).to_toml())
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "run", "spec.toml", "-o", "runs", *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("runs/*/resume.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no epoch in 90 s"
        time.sleep(0.05)
    return process


def group_ends(group, seconds=15):
    """Whether every process of a group has ended, zombies aside."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        if not [row for row in rows if row[0] == str(group) and not row[1].startswith("Z")]:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--executor", "inline"), id="inline"),
        pytest.param(("--executor", "local", "--jobs", "2"), id="local", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_with_one_line_and_leaves_nothing_behind(flags, spec, tmp_path):
    process = started(spec, tmp_path, *flags)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == INTERRUPTED
    assert "Traceback" not in out
    assert group_ends(process.pid)
    runs = tmp_path / "runs"
    left = {path.name for pattern in ("*/*", "*/.*") for path in runs.glob(pattern)}
    assert left <= {"config.json", "resume.pt"}
    with lock_output(runs):
        pass


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(spec, tmp_path):
    process = started(spec, tmp_path, "--jobs", "2")
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert group_ends(process.pid)


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start(spec, tmp_path):
    """They are deep in their imports then, without a handler of their own."""
    (tmp_path / "spec.toml").write_text(RunSpec.from_mapping(spec(epochs=100_000)).to_toml())
    script = (
        "import multiprocessing, os, signal, time\n"
        "from speccert.experiments import executors\n"
        "def interrupted(futures, inbox):\n"
        "    for seconds, who in ((0.5, [p.pid for p in multiprocessing.active_children()]), (1, [os.getpid()])):\n"
        "        time.sleep(seconds)\n"
        "        for process in who:\n"
        "            os.kill(process, signal.SIGINT)\n"
        "    time.sleep(30)\n"
        f"executors._drain = interrupted\n{SCRIPT}"
    )
    command = [sys.executable, "-c", script, "run", "spec.toml", "-o", "runs", "--jobs", "2"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert ended.returncode == 130
    assert ended.stderr.strip() == INTERRUPTED

"""Trainings by two gloo processes: their result, their resuming, and their end however it comes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speccert.experiments import distributed, ranks
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split, load_dataset
from speccert.experiments.distributed import Launch, RankDiedError, RankError, rank_devices
from speccert.experiments.store import StoreError
from speccert.experiments.training import train

TIMES = ["epoch_s", "step_s"]
# Variables of a torchrun, a Slurm job or an MPI around this process.
FOREIGN = (
    "MASTER_ADDR=192.0.2.1 MASTER_PORT=1 RANK=5 WORLD_SIZE=9 LOCAL_RANK=5 LOCAL_WORLD_SIZE=9 GROUP_RANK=3 "
    "SLURM_PROCID=7 SLURM_NTASKS=8 SLURM_LOCALID=7 TORCHELASTIC_RUN_ID=x TORCHELASTIC_USE_AGENT_STORE=False "
    "TORCHELASTIC_ERROR_FILE=/nowhere/x PET_NPROC_PER_NODE=7 GLOO_SOCKET_IFNAME=absent0"
)


def cell(**settings):
    small = {"width": 16, "depth": 2, "epochs": 3, "batch_size": 33, "lr": 1e-2, "eps": (0.1, 0.3)}
    return CellConfig(
        **{**small, "loss": "emma", "loss_eps": 0.3, "augment": "shift", "gradient_clip": 0.2, **settings}
    )


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", train_samples=199)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder; its name stands in the command line of every process that a launch starts."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    assert ended(path, seconds=15), "processes were left behind"


def processes(mark):
    """(pid, command line) of the living processes that name `mark` in it."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0] if command else "Z"
        except OSError:
            continue  # it has just ended
        if str(mark).encode() in command and state != "Z":
            yield int(entry.name), command.decode()


def ranks_of(mark):
    """Pids by rank."""
    pids = [pid for pid, command in processes(mark) if "run_rank(" in command]
    variables = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids]
    return {
        int(text.removeprefix(b"RANK=")): pid
        for pid, given in zip(pids, variables, strict=True)
        for text in given
        if text.startswith(b"RANK=")
    }


def ended(mark, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not list(processes(mark)):
            return True
        time.sleep(0.05)
    return False


def assert_same(first, second):
    assert first.history.drop(columns=TIMES).equals(second.history.drop(columns=TIMES))
    assert (first.best_epoch, first.status, first.ranks) == (second.best_epoch, second.status, second.ranks)
    states = [result.model.state_dict() for result in (first, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def assert_close(first, second):
    """Some 20 steps in float32, each with a relative rounding of about 1e-6 that Adam can multiply by some 10."""
    states = [result.model.state_dict() for result in (first, second)]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], atol=1e-3, rtol=1e-3)
    assert first.history["train_loss"].to_numpy() == pytest.approx(second.history["train_loss"].to_numpy(), rel=1e-3)


@pytest.fixture(scope="module")
def unbroken(digits):
    """Two ranks, with the rows as they came and the moments at which they did."""
    rows = []
    result = train(cell(), digits, ranks=2, on_epoch=lambda row: rows.append((time.monotonic(), row)))
    return SimpleNamespace(result=result, rows=rows)


class Stop(Exception):
    pass


def stop_after(epoch):
    def on_epoch(row):
        if row["epoch"] == epoch:
            raise Stop

    return on_epoch


def test_two_ranks_give_what_one_process_gives(unbroken, digits):
    result = unbroken.result
    assert_close(result, train(cell(), digits))
    assert result.ranks == 2
    assert [row for _, row in unbroken.rows] == result.history.to_dict("records")
    moments = [moment for moment, _ in unbroken.rows]
    assert moments == sorted(moments)
    assert not result.model.training
    assert all(p.grad is None for p in result.model.parameters())


def test_a_stopped_training_goes_on_to_the_same_bits_and_with_another_number_of_ranks(
    unbroken, digits, tmp_path, temporary, monkeypatch
):
    """Stopped by an error of `on_epoch`, with a foreign launcher's environment around it."""
    for variable in FOREIGN.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(Stop):
        train(cell(), digits, folder=tmp_path / "a", ranks=2, on_epoch=stop_after(1))
    assert not list(processes(temporary))
    assert list(temporary.iterdir()) == []
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["resume.pt"]
    state = torch.load(tmp_path / "a" / "resume.pt", weights_only=True)["state"]
    assert 1 <= len(state["history"]) < 3  # the ranks may have been an epoch further when they were stopped
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rows = []
    resumed = train(cell(), digits, folder=tmp_path / "a", ranks=2, on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == list(range(len(state["history"]) + 1, 4))
    assert_same(resumed, unbroken.result)
    alone = train(cell(), digits, folder=tmp_path / "b")
    assert alone.ranks == 1
    assert_close(alone, unbroken.result)


MODEL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        sizes = {"first": (inputs, 256), "third": (256, 256), "second": (256, 256), "last": (256, classes)}
        self.layers = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    def forward(self, x):
        x = x.flatten(1)
        for name in ("first", "second", "third"):
            x = torch.relu(self.layers[name](x))
        return self.layers["last"](x)
def net(*, input_shape, num_classes):
    return Net(input_shape[1] * input_shape[2], num_classes)
"""


@pytest.mark.slow
def test_three_ranks_go_on_to_the_same_bits(digits, tmp_path, monkeypatch):
    """From three on the order of a sum matters; it must not follow the order in which the gradients came before."""
    (tmp_path / "odd_order.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    baseline = {"constraint": "none", "threshold": float("inf"), "loss": "cross-entropy"}
    config = cell(model="odd_order:net", width=None, depth=None, **baseline)
    with pytest.raises(Stop):
        train(config, digits, folder=tmp_path, ranks=3, on_epoch=stop_after(1))
    resumed = train(config, digits, folder=tmp_path, ranks=3)
    assert_same(resumed, train(config, digits, ranks=3))


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_all_within_seconds(victim, digits, temporary, tmp_path):
    killed = []

    def kill(row):
        if not killed:
            killed.append(time.monotonic())
            os.kill(ranks_of(temporary)[victim], signal.SIGKILL)

    with pytest.raises(RankDiedError, match=rf"^rank {victim} was killed by SIGKILL \(by hand, or out of memory\)$"):
        train(cell(epochs=100_000), digits, folder=tmp_path / "a", ranks=2, on_epoch=kill)
    assert time.monotonic() - killed[0] < 30
    assert not list(processes(temporary))
    assert (tmp_path / "a" / "resume.pt").exists()


@pytest.mark.slow
def test_a_killed_launcher_ends_its_ranks(digits, temporary):
    def kill(row):
        for pid, command in processes(temporary):
            if "run_launcher(" in command:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(RankDiedError, match=r"^the launcher of the ranks died"):
        train(cell(epochs=100_000), digits, ranks=2, on_epoch=kill)
    assert ended(temporary, seconds=15)


def test_the_error_of_a_rank_is_told_in_one_line(digits):
    flat = {
        part: Split(getattr(digits, part).x.flatten(1), getattr(digits, part).y) for part in ("train", "validation")
    }
    data = Dataset("flat", **flat, test=digits.test, input_shape=(64,), num_classes=10, mean=(0.5,), std=(0.25,))
    with pytest.raises(
        RankError, match=r"^rank [01] failed: ValueError: the augmentation shift needs images"
    ) as raised:
        train(cell(), data, ranks=2)
    assert not isinstance(raised.value, RankDiedError)
    assert "\n" not in str(raised.value)
    assert "augment.py" in raised.value.__notes__[0]


def test_what_has_ended_starts_no_ranks(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Launch, "run", lambda *_: pytest.fail("ranks were started"))
    diverging = cell(lr=1e30, optimizer="sgd", constraint="none", threshold=float("inf"), gradient_clip=None)
    for name, config in (("finished", cell(epochs=1)), ("non-finite", diverging)):
        alone = train(config, digits, folder=tmp_path / name)
        assert alone.status in (name, "at-chance")
        again = train(config, digits, folder=tmp_path / name, ranks=2)
        assert again.history.equals(alone.history)
        assert (again.status, again.ranks) == (alone.status, 2)


@pytest.mark.slow
def test_a_divergence_is_no_error(digits):
    config = cell(lr=1e30, optimizer="sgd", constraint="none", threshold=float("inf"), gradient_clip=None)
    result, alone = train(config, digits, ranks=2), train(config, digits)
    assert result.status == alone.status == "non-finite"
    assert len(result.history) == len(alone.history)
    assert result.best_epoch == alone.best_epoch


PROGRAM = """
import signal, sys
from speccert.experiments.data import load_dataset
from speccert.experiments.training import train
sys.path.insert(0, {tests!r})
from test_distributed import cell
def leave(number, frame):
    raise SystemExit(7)
signal.signal(signal.SIGTERM, leave)
train(cell(epochs=100_000), load_dataset("digits", train_samples=199), folder={folder!r}, ranks=2)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 7, marks=pytest.mark.slow)],
)
def test_ranks_end_with_the_process_that_started_them(number, code, tmp_path, temporary):
    folder = tmp_path / "a"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder))],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (folder / "resume.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, "no epoch in 120 s"
        time.sleep(0.05)
    assert len(ranks_of(temporary)) == 2
    process.send_signal(number)
    assert process.wait(60) == code
    assert ended(temporary, seconds=15)
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["resume.pt"]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "ranks", "expected"),
    [
        ("cpu", 1, ["cpu"]),
        ("cpu", 3, ["cpu"] * 3),
        ("cuda", 1, ["cuda"]),
        ("cuda:3", 1, ["cuda:3"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:2, cuda:1", 2, ["cuda:2", "cuda:1"]),
        (torch.device("cpu"), 2, ["cpu", "cpu"]),
    ],
)
def test_devices_of_the_ranks(device, ranks, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(found) for found in rank_devices(device, ranks)] == expected


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("cpu", 0, "ranks: expected an integer >= 1, got 0"),
        ("cuda:1", 2, "a device for each of 2 ranks; got cuda:1"),
        ("cuda:0,cuda:1", 1, "a device for each of 1 ranks"),
        ("cuda:1,cuda:1", 2, "all different"),
        ("cuda:1,cpu", 2, "one GPU a rank, all different, or the CPU for all, got cuda:1, cpu"),
        ("cuda", 8, "expected 8 of the 4 GPUs that this process sees"),
        ("cuda:0,cuda:4", 2, "expected 2 of the 4 GPUs"),
    ],
)
def test_devices_that_do_not_fit_the_ranks_are_refused(device, ranks, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=message):
        rank_devices(device, ranks)


def failure(exitcode, message=None, written=None, folder=None, rank=0):
    path = folder / f"{rank}.json"
    if message is not None:
        path.write_text("{}")
        os.utime(path, (written, written))
    told = "<NONE>" if message is None else {"message": message, "extraInfo": {"py_callstack": "calls"}}
    return SimpleNamespace(
        exitcode=exitcode,
        error_file=str(path),
        error_file_data={"message": told},
        signal_name=lambda: signal.Signals(-exitcode).name,
    )


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        # the cause is told, not what it led to: a lost connection, or the end that the agent makes
        (
            [(1, "RuntimeError: connection closed", 50), (-9, None, None)],
            (RankDiedError, "rank 1 was killed by SIGKILL"),
        ),
        (
            [(1, "RuntimeError: connection closed", 50), (1, "KeyError: 3", 49)],
            (RankError, "rank 1 failed: KeyError: 3"),
        ),
        ([(-15, None, None), (1, "KeyError: 3", 49)], (RankError, "rank 1 failed: KeyError: 3")),
        ([(3, None, None), (-15, None, None)], (RankError, "rank 0 failed: it ended with exit code 3")),
        ([(1, "StoreError: a: disk full", 9), (-15, None, None)], (StoreError, "a: disk full")),
    ],
)
def test_the_failure_that_caused_the_others_is_told(failures, expected, tmp_path):
    made = {rank: failure(*given, folder=tmp_path, rank=rank) for rank, given in enumerate(failures)}
    (tmp_path / "failure.json").write_text(json.dumps(ranks._described(made)))
    with pytest.raises(expected[0], match=rf"^{expected[1]}"):
        distributed._raise_failure(tmp_path)

"""Several processes that train one cell together on this machine, started as torchrun starts them.

This process starts a launcher, which runs torch's elastic agent, which runs the ranks; see ranks.py for both. The
launcher is a process of its own since the agent blocks its thread, takes over the signals of its process, and would
keep this one from stopping between two epochs. The ranks write the resume file, and a line for each epoch to a file
that this process follows.

Nothing outlives its purpose: a rank that ends takes the others with it, within a second, by the agent. All ranks end
when this process closes a pipe that is their standard input, which the system does for it however it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .config import CellConfig
from .data import Dataset
from .ranks import FAILURE, JOB, ROWS, run_launcher
from .store import StoreError

__all__ = ["Launch", "RankDiedError", "RankError", "rank_devices"]

_POLL_S = 0.05
_PATIENCE_S = 10.0
_LOG = "launcher.log"


class RankError(RuntimeError):
    """One of the processes that train a cell together raised an error; its traceback is in the notes."""


class RankDiedError(RankError):
    """One of the processes that train a cell together, or their launcher, was killed."""


def rank_devices(device: str | torch.device, ranks: int) -> tuple[torch.device, ...]:
    """The device of each rank: "cpu" is shared, "cuda" stands for the first GPUs, a list with commas names one a rank.

    Raises:
        ValueError: ranks < 1, another number of devices than of ranks, a GPU that is not there or named twice.
    """
    if ranks < 1:
        raise ValueError(f"ranks: expected an integer >= 1, got {ranks}")
    names = [name.strip() for name in str(device).split(",")]
    if ranks > 1 and names == ["cpu"]:
        names = ["cpu"] * ranks
    elif ranks > 1 and names == ["cuda"]:
        names = [f"cuda:{index}" for index in range(ranks)]
    if len(names) != ranks:
        raise ValueError(
            f"device: expected cpu, cuda or, with commas, a device for each of {ranks} ranks; got {device}"
        )
    devices = tuple(torch.device(name) for name in names)
    if ranks > 1:
        _check_devices(devices)
    return devices


def _check_devices(devices: tuple[torch.device, ...]) -> None:
    named = ", ".join(map(str, devices))
    if {device.type for device in devices} == {"cpu"}:
        return
    if {device.type for device in devices} != {"cuda"} or len({device.index for device in devices}) < len(devices):
        raise ValueError(f"device: expected one GPU a rank, all different, or the CPU for all, got {named}")
    count = torch.cuda.device_count()
    if any(device.index is None or device.index >= count for device in devices):
        raise ValueError(f"device: expected {len(devices)} of the {count} GPUs that this process sees, got {named}")


@dataclass(frozen=True)
class Launch:
    """A training by several processes, to its end.

    Args:
        config: what to train.
        data: its train and validation parts go to the ranks through a file in the system's temporary folder.
        folder: of the resume file.
        devices: one a rank.
    """

    config: CellConfig
    data: Dataset
    folder: Path
    devices: tuple[torch.device, ...]

    def run(self, on_row: Callable[[dict[str, float]], None]) -> None:
        """Start the ranks, pass each row of the history on as it comes, and return when all have ended well.

        Raises:
            RankError: a rank raised an error; RankDiedError: it was killed.
            StoreError: the first rank could not write the resume file.
        """
        with tempfile.TemporaryDirectory(prefix="speccert-") as name:
            folder = Path(name)
            self._write_job(folder / JOB)
            with _launched(folder, len(self.devices), self._threads()) as process, _Rows.open(folder) as rows:
                while process.poll() is None:
                    rows.pass_on(on_row)
                    time.sleep(_POLL_S)
                rows.pass_on(on_row)
            if process.returncode != 0:
                _raise_failure(folder)

    def _threads(self) -> int:
        return max(1, torch.get_num_threads() // len(self.devices))

    def _write_job(self, path: Path) -> None:
        data = self.data
        content = {
            "config": self.config.to_json(),
            "folder": str(self.folder.resolve()),
            "devices": [str(device) for device in self.devices],
            "threads": self._threads(),
            "dtype": torch.get_default_dtype(),
            "parts": {key: [split.x, split.y] for key, split in (("train", data.train), ("val", data.validation))},
            "data": [data.name, data.input_shape, data.num_classes, data.mean, data.std],
        }
        torch.save(content, path)


@dataclass(frozen=True)
class _Rows:
    """The rows of the history as the first rank writes them."""

    file: Any
    begun: list[str]  # of a line whose end has not come yet

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[_Rows]:
        path = folder / ROWS
        path.touch()
        with path.open(encoding="utf-8") as file:
            yield cls(file, [])

    def pass_on(self, on_row: Callable[[dict[str, float]], None]) -> None:
        while text := self.file.readline():
            self.begun.append(text)
            if text.endswith("\n"):
                line = "".join(self.begun)
                self.begun.clear()
                on_row(json.loads(line))


@contextlib.contextmanager
def _launched(folder: Path, ranks: int, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher; stopped, with its ranks, when the block is left."""
    code = f"from {run_launcher.__module__} import run_launcher; run_launcher({str(folder)!r}, {ranks})"
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(threads),
            start_new_session=True,  # Ctrl-C is this process's business
        )
    try:
        yield process
    finally:
        _stop(process)


def _environment(threads: int) -> dict[str, str]:
    """This process's, with its import path, without what an elastic agent above it has set for its own ranks."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "TORCH_ELASTIC_"))}
    kept["OMP_NUM_THREADS"] = str(threads)
    kept["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    kept["PYTHONSAFEPATH"] = "1"
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # gloo would look the host's name up, which fails on many a cluster node
        kept["GLOO_SOCKET_IFNAME"] = loopback[0]
    return kept


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()  # the ranks leave at once, and the launcher after them
    for end in (process.poll, process.terminate, process.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
            return


def _raise_failure(folder: Path) -> NoReturn:
    path = folder / FAILURE
    if not path.exists():
        last = (folder / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RankDiedError(f"the launcher of the ranks died{': ' if last else ''}{''.join(last)}")
    failure = json.loads(path.read_text(encoding="utf-8"))
    where, message = f"rank {failure['rank']}", failure["message"].splitlines()[0]
    if failure["signal"] is not None:
        raise RankDiedError(f"{where} was killed by {failure['signal']} (by hand, or out of memory)")
    if message.startswith(f"{StoreError.__name__}: "):
        if "cannot be written" in message:  # of the machine, and not of the cell
            raise RankDiedError(f"{where}: {message.partition(': ')[2]}")
        raise StoreError(message.partition(": ")[2])
    error = RankError(f"{where} failed: {message}")
    error.add_note(failure["traceback"])
    raise error

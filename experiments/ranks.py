"""The programs of a distributed training: torch's elastic agent, and the ranks that it runs."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:  # at run time the launcher needs none of this
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from .data import Dataset

__all__ = ["FAILURE", "JOB", "ROWS", "run_launcher", "run_rank"]

JOB, ROWS, FAILURE = "job.pt", "rows.jsonl", "failure.json"  # in the folder that all share
_PATIENCE_S = 5
# Between two communications lies at most a validation by the first rank. A rank that ends is noticed at once, without
# this; it is the end of a rank that lives and does nothing.
_SILENCE = datetime.timedelta(hours=1)


def run_launcher(folder: str, ranks: int) -> None:
    """The launcher's program: torch's elastic agent, on one machine, without restarts, as torchrun --standalone."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=Path(folder).name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.05,
        shutdown_timeout=_PATIENCE_S,
        logs_specs=DefaultLogsSpecs(str(Path(folder) / "ranks"), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, sys.executable)("-c", f"from {__name__} import run_rank; run_rank({folder!r})")
    except ChildFailedError as error:
        content = _described(error.failures)
        (Path(folder) / FAILURE).write_text(json.dumps(content), encoding="utf-8")
        raise SystemExit(1) from error
    finally:
        if select.select([sys.stdin], [], [], 0)[0]:  # closed: who should have cleared the folder may be dead
            shutil.rmtree(folder, ignore_errors=True)


def _described(failures: dict[int, ProcessFailure]) -> dict[str, Any]:
    """The failure that caused the others: a kill, else the error first written; the agent itself ends by SIGTERM."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float]:
        failure = item[1]
        written = Path(failure.error_file)
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        return not killed, not written.exists(), written.stat().st_mtime if written.exists() else 0.0

    rank, failure = min(failures.items(), key=order)
    told = failure.error_file_data["message"]
    if not isinstance(told, dict):  # it wrote nothing
        told = {"message": f"it ended with exit code {failure.exitcode}"}
    return {
        "rank": rank,
        "signal": failure.signal_name() if failure.exitcode < 0 else None,
        "message": told["message"],
        "traceback": told.get("extraInfo", {}).get("py_callstack", ""),
    }


def run_rank(folder: str) -> None:
    """The program of one rank; the launcher has set its environment."""
    from torch.distributed.elastic.multiprocessing.errors import record

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    code = 1
    try:
        record(_train_rank)(Path(folder))  # an error goes into a file, for the launcher
        code = 0
    finally:
        # All files are closed. To leave in order takes a second, and after an error it would wait for ranks that may
        # be gone.
        os._exit(code)


def _leave_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written; this returns at the end of the file
    os._exit(1)


def _train_rank(folder: Path) -> None:
    from .config import CellConfig
    from .group import Group
    from .precision import exact_float32
    from .training import fit

    # mapped, so that the ranks share the memory
    job = torch.load(folder / JOB, weights_only=True, mmap=True)
    torch.set_num_threads(job["threads"])
    torch.set_default_dtype(job["dtype"])
    exact_float32()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(job["devices"][rank])
    with _joined(device):
        if rank == 0:
            (folder / JOB).unlink()  # all have it open; its space is free again when they end, in whatever way
        with (folder / ROWS).open("a", encoding="utf-8", buffering=1) as rows:

            def pass_on(row: dict[str, float]) -> None:
                rows.write(json.dumps(row) + "\n")

            config, data = CellConfig.from_json(job["config"]), _dataset(job)
            group = Group(rank, size, device)
            fit(config, data, folder=job["folder"], device=device, on_epoch=pass_on, group=group)


@contextlib.contextmanager
def _joined(device: torch.device) -> Iterator[None]:
    """Member of torch's default process group, by the environment."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=_SILENCE, device_id=device if cuda else None)
    distributed.barrier()
    yield
    distributed.destroy_process_group()


def _dataset(job: dict[str, Any]) -> Dataset:
    from .data import Dataset, Split

    name, input_shape, num_classes, mean, std = job["data"]
    train, validation = (Split(*job["parts"][key]) for key in ("train", "val"))
    absent = Split(validation.x[:0], validation.y[:0])
    return Dataset(name, train, validation, absent, tuple(input_shape), num_classes, tuple(mean), tuple(std))

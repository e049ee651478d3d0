"""Where cells run, behind one method: in this process, in processes of this machine, in jobs of a Slurm cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeAlias

import torch

from .cell import Progress
from .config import CellConfig
from .execution import Execution
from .work import Finished, work

__all__ = ["Event", "Executor", "InlineExecutor", "WorkerError", "default_jobs", "device_slots", "held_signals"]

Event: TypeAlias = Progress | Finished


class WorkerError(RuntimeError):
    """A worker process or a job that ended without an answer, e.g. killed or out of memory."""


class Executor(ABC):
    """Runs cells. Must write: `events`, which runs every cell once and yields its progress and its end.

    May write: `goes_on` and `abort`, where work goes on without this process; `queued`, where cells wait in a queue.
    """

    @abstractmethod
    def events(self, cells: Sequence[CellConfig], execution: Execution) -> Generator[Event, None, None]:
        """Run the cells; a cell's error ends that cell, not the others.

        Closing the iterator stops what runs in processes of this machine.
        """

    @property
    def goes_on(self) -> bool:
        """Whether work goes on without this process."""
        return False

    def abort(self) -> None:  # noqa: B027 -- most have nothing to do
        """End what would go on without this process."""

    def queued(self, output: str) -> dict[str, str]:
        """Cells of a study that other runs have handed to a queue, by id, each with who has it."""
        return {}


class InlineExecutor(Executor):
    """One cell after the other in this process.

    Args:
        on_progress: is told the progress, since a generator can't yield from a call.
    """

    def __init__(self, on_progress: Callable[[Progress], None] = lambda progress: None) -> None:
        self._on_progress = on_progress

    def events(self, cells: Sequence[CellConfig], execution: Execution) -> Generator[Event, None, None]:
        """See `Executor.events`; progress goes to `on_progress`."""
        execution = dataclasses.replace(execution, device=device_slots(execution)[0])
        for cell in cells:
            yield work(cell, execution, self._on_progress)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Hold back Ctrl-C and Slurm's warning. Processes started meanwhile never see them: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def device_slots(execution: Execution) -> list[str]:
    """The devices on which cells may run at once, in the order in which workers take them.

    The GPUs one after the other, `cells_per_gpu` times round; groups "cuda:0,cuda:1" where a cell takes several. A
    device other than plain "cuda" is one slot for all.

    Raises:
        ValueError: fewer GPUs than a cell takes.
    """
    size = execution.gpus_per_cell
    if execution.device != "cuda":
        return [execution.device]
    count = torch.cuda.device_count()
    if count < size:
        raise ValueError(f"gpus_per_cell: expected at most {count}, the GPUs of this machine, got {size}")
    groups = [range(first, first + size) for first in range(0, count - size + 1, size)]
    return [",".join(f"cuda:{index}" for index in group) for group in groups] * execution.cells_per_gpu


def default_jobs(execution: Execution) -> int:
    """How many cells run at once unless told otherwise: one a slot on GPUs, else as many as the cores can feed."""
    if execution.device.startswith("cuda"):
        return len(device_slots(execution)) if execution.device == "cuda" else execution.cells_per_gpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (execution.threads * execution.gpus_per_cell))

"""Where cells run: in this process, or in processes of this machine, behind one method."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from .cell import Progress, run_cell
from .config import CellConfig, config_id
from .evaluation import CertificateViolationError

__all__ = ["EXECUTORS", "Executor", "Finished", "InlineExecutor", "LocalExecutor", "WorkerError", "make_executor"]


@dataclass(frozen=True)
class Finished:
    """The end of one cell: its summary, or the error that ended it."""

    id: str
    summary: dict[str, Any] | None
    error: Exception | None = None


class WorkerError(RuntimeError):
    """A worker process that ended without an answer, e.g. killed or out of memory."""


Event = Progress | Finished

_PATIENCE = 20  # signals, half a second apart
_inbox: Any = None  # in a worker: the queue that its progress goes to


class Executor(ABC):
    """Runs cells. Must write: `events`, which runs every cell once and yields its progress and its end."""

    @abstractmethod
    def events(self, cells: Sequence[CellConfig], arguments: dict[str, Any]) -> Iterator[Event]:
        """Run the cells, `arguments` going to `run_cell`; a cell's error ends that cell, not the others."""


class InlineExecutor(Executor):
    """One cell after the other in this process."""

    def __init__(self, on_progress: Callable[[Progress], None] = lambda progress: None) -> None:
        self._on_progress = on_progress

    def events(self, cells: Sequence[CellConfig], arguments: dict[str, Any]) -> Iterator[Event]:
        """See `Executor.events`; progress goes straight to `on_progress`, since a generator can't yield from a call."""
        for cell in cells:
            try:
                yield Finished(config_id(cell), run_cell(cell, **arguments, report=self._on_progress))
            except (ValueError, RuntimeError, OSError) as error:
                yield Finished(config_id(cell), None, error)


class LocalExecutor(Executor):
    """`jobs` processes of this machine, each with its share of the cores; GPUs round robin where the device is cuda."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs

    def events(self, cells: Sequence[CellConfig], arguments: dict[str, Any]) -> Iterator[Event]:
        """See `Executor.events`. A worker that dies takes its pool with it: its cells end with WorkerError."""
        context = multiprocessing.get_context("spawn")
        workers = min(self._jobs, len(cells))
        threads = max(1, torch.get_num_threads() // workers)  # torch's number heeds OMP_NUM_THREADS
        inbox = context.SimpleQueue()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(threads, inbox))
        devices = _devices(arguments["device"])
        try:
            with _no_interrupts():
                futures = {
                    pool.submit(_work, cell, {**arguments, "device": devices[k % len(devices)]}): config_id(cell)
                    for k, cell in enumerate(cells)
                }
            yield from _drain(futures, inbox)
            pool.shutdown()  # all are done: workers that leave by themselves release what they hold
        finally:
            _stop(pool)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back. Processes started meanwhile never see it: it is this process that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drain(futures: dict[Future[dict[str, Any]], str], inbox: Any) -> Iterator[Event]:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
        while not inbox.empty():
            yield inbox.get()
        for future in done:
            yield _finished(futures[future], future)


def _finished(identity: str, future: Future[dict[str, Any]]) -> Finished:
    error = future.exception()
    if error is None:
        return Finished(identity, future.result())
    if isinstance(error, BrokenProcessPool | SystemExit):
        return Finished(identity, None, WorkerError("a worker process died (killed, or out of memory)"))
    if isinstance(error, Exception):
        return Finished(identity, None, error)
    raise error


def _stop(pool: ProcessPoolExecutor) -> None:
    """Cancel what has not begun and end the workers: their files are whole or absent, so this loses an epoch.

    A worker that is busy ends its cell at the first signal and itself at a later one; one that heeds none is killed.
    """
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for _ in range(_PATIENCE):
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(0.5)
        processes = [process for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()


def _start(threads: int, inbox: Any) -> None:
    """Make a worker ready: it cleans up when it is told to stop, and never outlives the process that started it."""
    global _inbox
    _inbox = inbox
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(cell: CellConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    return run_cell(cell, **arguments, report=_inbox.put)


def _devices(device: str) -> list[str]:
    if device != "cuda" or torch.cuda.device_count() < 2:
        return [device]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


EXECUTORS = ("inline", "local")


def default_jobs(device: str) -> int:
    """One process a GPU where the device is cuda, else one a core."""
    if device.startswith("cuda"):
        return len(_devices(device))
    return os.cpu_count() or 1


def make_executor(name: str, jobs: int, on_progress: Callable[[Progress], None]) -> Executor:
    """The executor called `name`; ValueError for an unknown name or jobs < 1."""
    if jobs < 1:
        raise ValueError(f"jobs: expected an integer >= 1, got {jobs}")
    if name == "inline":
        return InlineExecutor(on_progress)
    if name == "local":
        return LocalExecutor(jobs)
    raise ValueError(f"executor: expected one of {', '.join(EXECUTORS)}; got {name!r}")


def is_fatal(error: Exception) -> bool:
    """Whether an error ends the whole run: a broken certificate means that no other number can be trusted."""
    return isinstance(error, CertificateViolationError)

"""Cells in processes of this machine: each worker takes one cell after the other; one that dies is replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from .cell import Progress
from .config import CellConfig, config_id
from .execution import Execution
from .executors import Event, Executor, WorkerError, default_jobs, device_slots, held_signals
from .leases import CancelledRunError
from .work import Finished, is_fatal, work

__all__ = ["LocalExecutor"]

_PATIENCE_S = (3.0, 5.0, 5.0)  # between the signals that end a worker; the next one would cut its cleaning up short
_DEATHS = 4  # of workers on one cell, without an epoch between them: one more than `work` allows, which keeps the error


class LocalExecutor(Executor):
    """`execution.jobs` processes of this machine, GPUs shared out round robin where the device is cuda.

    A worker that is killed is replaced, and its cell goes on from its last epoch; a cell whose workers die one after
    the other without an epoch between them ends with an error.
    """

    def events(self, cells: Sequence[CellConfig], execution: Execution) -> Generator[Event, None, None]:
        """See `Executor.events`."""
        slots = device_slots(execution)
        jobs = min(execution.jobs or default_jobs(execution), len(cells))
        workers = [_Worker(dataclasses.replace(execution, device=slots[k % len(slots)])) for k in range(jobs)]
        waiting, deaths = deque(cells), _Deaths()
        try:
            while waiting or any(worker.cell for worker in workers):
                for worker in workers:
                    if worker.cell is None and waiting:
                        worker.give(waiting.popleft())
                wait([handle for worker in workers if worker.cell for handle in worker.handles])
                for worker in workers:
                    is_dead = worker.is_dead  # asked first: what it said before its death is heard
                    yield from deaths.watched(worker.messages())
                    if worker.cell is not None and is_dead:
                        lost, worker.cell = worker.cell, None
                        if deaths.may_go_on(config_id(lost)):
                            waiting.appendleft(lost)
                        else:
                            yield Finished(config_id(lost), error=WorkerError(_DEATHS_TEXT))
            _dismiss(workers)
        finally:
            _stop(workers)


_DEATHS_TEXT = f"{_DEATHS} worker processes died one after the other (killed, out of memory, or unable to start)"


class _Deaths:
    """Counts the workers that died on each cell without an epoch between them."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._fractions: dict[str, float] = {}

    def watched(self, events: Iterator[Event]) -> Iterator[Event]:
        """The same events; an epoch clears its cell's count."""
        for event in events:
            if isinstance(event, Progress) and event.fraction > self._fractions.get(event.id, 0.0):
                self._fractions[event.id] = event.fraction
                self._counts.pop(event.id, None)
            yield event

    def may_go_on(self, identity: str) -> bool:
        """Count one more death; whether another worker may take the cell."""
        self._counts[identity] = self._counts.get(identity, 0) + 1
        return self._counts[identity] < _DEATHS


class _Worker:
    """One process, started with its first cell, and the cell that it runs."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self.cell: CellConfig | None = None

    def give(self, cell: CellConfig) -> None:
        """Start a cell, in a new process where the old one is dead."""
        if self._connection is None or self.is_dead:
            self.hang_up()
            self._connection = self._start()
        self.cell = cell
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # just died: counts as a death on this cell
            self._connection.send(cell)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(its, self._execution))
        resource_tracker.ensure_running()  # before Ctrl-C is held back: where it has to start, it lets Ctrl-C in again
        with held_signals():
            self._process.start()
        its.close()
        return mine

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended."""
        return self._process is not None and not self._process.is_alive()

    @property
    def process(self) -> BaseProcess | None:
        """Its process, where one has been started."""
        return self._process

    @property
    def handles(self) -> list[Connection | int]:
        """What becomes ready when it has something to say, or dies."""
        found: list[Connection | int] = [] if self._connection is None else [self._connection]
        return found if self._process is None else [*found, self._process.sentinel]

    def messages(self) -> Iterator[Event]:
        """What it has sent; at the end of its cell it is free."""
        with contextlib.suppress(EOFError, OSError):  # it died, maybe in the middle of a word
            while self.cell is not None and self._connection is not None and self._connection.poll():
                event: Event = self._connection.recv()
                if isinstance(event, Finished):
                    self.cell = None
                yield event

    def hang_up(self) -> None:
        """No more cells for it: it ends by itself behind the one that it runs."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _dismiss(workers: Sequence[_Worker]) -> None:
    """Let idle workers end by themselves, all at once."""
    for worker in workers:
        worker.hang_up()
    _join([worker.process for worker in workers if worker.process is not None], _PATIENCE_S[0])


def _stop(workers: Sequence[_Worker]) -> None:
    """End the workers, whatever else is interrupted: their files are whole or absent, so this loses an epoch.

    One that heeds no signal, or swallows what it raises, is killed.
    """
    with held_signals():
        processes = [worker.process for worker in workers if worker.process is not None and not worker.is_dead]
        for patience in _PATIENCE_S:
            for process in processes:
                process.terminate()
            processes = _join(processes, patience)
        for process in processes:
            process.kill()
            process.join()
        for worker in workers:
            worker.hang_up()


def _join(processes: Sequence[BaseProcess], seconds: float) -> list[BaseProcess]:
    """Those that have not ended in time."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process for process in processes if process.is_alive()]


class _ToldToLeave(BaseException):
    """Told to leave by a signal; no error of the cell, so that no handler of its errors stops it."""


def _serve(connection: Connection, execution: Execution) -> None:
    """A worker's life: it cleans up when it is told to leave, and never outlives the process that started it."""
    leave = _Leave()
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns every process of a job; the one that started us acts
    threading.Thread(target=_follow_parent, daemon=True).start()

    def report(progress: Progress) -> None:
        leave.check()
        connection.send(progress)

    with contextlib.suppress(_ToldToLeave, EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            cell = connection.recv()
            connection.send(_portable(work(cell, execution, report)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving; Python's own end takes a while with torch


def _portable(finished: Finished) -> Finished:
    """Its error as one of a class that every process can read: those of the user's own modules may do anything."""
    error = finished.error
    if error is None or is_fatal(error) or isinstance(error, CancelledRunError):
        return finished
    return dataclasses.replace(finished, error=RuntimeError(str(error) or type(error).__name__))


class _Leave:
    """Handler of a signal: raises, and lets the cleaning up be, should the signal come from several at once."""

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last > _PATIENCE_S[0] / 2:
            self._last = now
            raise _ToldToLeave

    def check(self) -> None:
        """Raise again, since the first time may have been where Python can't pass an error on, e.g. in a `__del__`."""
        if self._last > -math.inf:
            raise _ToldToLeave


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

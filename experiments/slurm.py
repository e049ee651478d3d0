"""Cells in jobs of a Slurm cluster: an array of jobs, each with a share of the cells, followed through the store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import submit
from .cell import Progress
from .chunks import Chunk, write_chunk
from .config import CellConfig, config_id
from .evaluation import CertificateViolationError
from .execution import MACHINERY, Execution
from .executors import Event, Executor, WorkerError, held_signals
from .leases import CancelledRunError, read_lease
from .slurm_options import SlurmOptions
from .store import RunFolder, StoreError, write_atomic
from .study import add_jobs, records
from .work import Finished

__all__ = ["SlurmExecutor"]

_SUBMISSIONS = 3  # of one share of the cells, where its jobs die
_POLL_S, _SLOWEST_POLL_S = 1.0, 15.0
_SHOWN = 64  # running cells whose progress is read
_PATIENCE_S = 600.0  # without an answer from Slurm
_JOBS_NAME = "jobs.json"


class SlurmExecutor(Executor):
    """Jobs of a Slurm cluster; their state comes from Slurm, their results from the run folders alone.

    A job that is preempted or runs into its time limit is requeued and goes on from the last epochs; the cells of one
    that dies are submitted again, twice at most. An interruption of this process leaves the jobs to themselves.

    Args:
        options: what the jobs ask for.
        say: is told what happens to the jobs.
        wait: False ends `events` when the jobs are submitted.
    """

    def __init__(self, options: SlurmOptions, say: Callable[[str], None], *, wait: bool = True) -> None:
        self._options, self._say, self._wait = options, say, wait
        self._live: dict[str, _Followed] = {}

    def events(self, cells: Sequence[CellConfig], execution: Execution) -> Generator[Event, None, None]:
        """See `Executor.events`; the options are held against the cluster before anything is submitted.

        Raises:
            ConfigError: options that the cluster refuses.
            SlurmError: Slurm did not take the jobs, or has not answered for minutes.
        """
        execution = self._for_jobs(execution)
        size = submit.check_cluster(self._options, len(cells), cells_per_gpu=execution.cells_per_gpu)
        shares = math.ceil(len(cells) / size)
        self._submit([cells[first::shares] for first in range(shares)], execution)  # dear cells lie side by side
        ids = list(self._live)
        self._say(f"submitted {len(ids)} Slurm jobs ({ids[0]} to {ids[-1]}) for {len(cells)} cells, {size} a job")
        if not self._wait:
            return
        try:
            yield from self._follow(execution)
        finally:
            if execution.cancel_path.exists():
                self._live = {}
            if self._live:
                self._say(f"{len(self._live)} Slurm jobs go on; certify status shows them, certify cancel ends them")

    @property
    def goes_on(self) -> bool:
        """See `Executor.goes_on`: as long as a job lives."""
        return bool(self._live)

    def abort(self) -> None:
        """Cancel all jobs of this executor."""
        if self._live:
            submit.cancel(self._live)
            self._live = {}

    def queued(self, output: str) -> dict[str, str]:
        """See `Executor.queued`: the unfinished cells of jobs that live."""
        others = [(record, [job for job in record.jobs if job not in self._live]) for record in records(output)]
        jobs = [job for _, found in others for job in found]
        try:
            states = submit.states(jobs)
        except submit.SlurmError:
            states = dict.fromkeys(jobs, "UNKNOWN")  # no answer: they may live
        cells: dict[str, str] = {}
        for record, found in others:
            live = [job for job in found if submit.outcome(states[job]) == "alive"]
            if found and not live and record.is_alive is False:
                record.remove(output)
            cells |= _cells_of(output, record.token, live)
        return cells

    def _for_jobs(self, execution: Execution) -> Execution:
        gpus = max(1, self._options.gpus)
        if execution.device == "cuda" and not self._options.gpus:
            raise ValueError("slurm: gpus = 0: expected at least 1 with device cuda")
        if execution.gpus_per_cell not in (1, gpus):
            raise ValueError(
                f"slurm: gpus = {self._options.gpus}: expected {execution.gpus_per_cell}, the gpus_per_cell"
            )
        return dataclasses.replace(
            execution,
            output=str(Path(execution.output).absolute()),
            data_root=None if execution.data_root is None else str(Path(execution.data_root).absolute()),
            jobs=self._options.cells_at_once,
            gpus_per_cell=gpus if execution.device == "cuda" else execution.gpus_per_cell,
        )

    def _submit(self, shares: Sequence[Sequence[CellConfig]], execution: Execution, times: int = 1) -> None:
        """Submit one job a share and follow it; `times` counts how often its cells have been submitted."""
        folder = Path(execution.output) / MACHINERY / "jobs" / execution.token
        number = len(list(folder.glob("chunk-*.json")))
        chunks = [
            write_chunk(folder / f"chunk-{number + k:05d}.json", share, execution) for k, share in enumerate(shares)
        ]
        paths = [chunk.path for chunk in chunks]
        with held_signals():  # a job that nobody has noted could not be cancelled
            jobs = submit.submit(folder, self._options, paths, cells_per_gpu=execution.cells_per_gpu)
            try:
                add_jobs(execution.output, execution.token, jobs)
                names = _read_names(folder) | {job: path.name for job, path in zip(jobs, paths, strict=True)}
                write_atomic(folder / _JOBS_NAME, json.dumps(names).encode())
            except StoreError:
                submit.cancel(jobs)
                raise
            self._live |= {job: _Followed(job, chunk, times) for job, chunk in zip(jobs, chunks, strict=True)}

    def _follow(self, execution: Execution) -> Iterator[Event]:
        answered = time.monotonic()
        while self._live:
            time.sleep(min(_SLOWEST_POLL_S, _POLL_S + len(self._live) / 50))
            for job in self._live.values():
                yield from job.news()
            yield from self._progress(execution)
            if execution.cancel_path.exists():
                for job in self._live.values():  # a broken certificate cancels the others, and is told before that
                    yield from job.news()
                raise CancelledRunError("cancelled")
            try:
                states = submit.states(self._live)
                answered = time.monotonic()
            except submit.SlurmError:
                if time.monotonic() - answered > _PATIENCE_S:
                    raise
                continue
            for name, state in states.items():
                if submit.outcome(state) != "alive":
                    yield from self._ended(self._live.pop(name), state, execution)

    def _progress(self, execution: Execution) -> Iterator[Progress]:
        running = [identity for job in self._live.values() for identity in job.running]
        for identity in running[:_SHOWN]:
            lease = read_lease(Path(execution.output) / identity)
            if lease.live and "stage" in lease.content:
                yield Progress(identity, str(lease.content["stage"]), float(lease.content["fraction"]))

    def _ended(self, job: _Followed, state: str, execution: Execution) -> Iterator[Event]:
        """The last news of a job that is no more; what it left undone is submitted again, or ends with an error."""
        yield from job.news()
        left = []
        for cell in job.left:
            folder = RunFolder.of(execution.output, cell)
            if folder.is_finished:  # its last line was lost
                yield Finished(folder.id, summary=folder.read_summary())
            else:
                left.append(cell)
        if not left:
            return
        log = submit.log_paths(job.chunk.path.parent, job.id)[1]
        if submit.outcome(state) == "cancelled" or job.times >= _SUBMISSIONS:
            error = WorkerError(f"Slurm job {job.id} ended ({state}); its log is {log}")
            yield from (Finished(config_id(cell), error=error) for cell in left)
            return
        self._say(f"Slurm job {job.id} ended ({state}) with {len(left)} cells undone; submitted again (log: {log})")
        self._submit([left], execution, job.times + 1)


class _Followed:
    """A job, and what it has told of its cells so far."""

    def __init__(self, job: str, chunk: Chunk, times: int) -> None:
        self.id, self.chunk, self.times = job, chunk, times
        self.running: dict[str, None] = {}
        self._left = {config_id(cell): cell for cell in chunk.cells}
        self._offset = 0

    @property
    def left(self) -> list[CellConfig]:
        """Cells whose end it has not told."""
        return list(self._left.values())

    def news(self) -> Iterator[Finished]:
        """The ends of cells that it has told since it was asked last."""
        for line in self._new_lines():
            identity = str(line.get("id"))
            if line.get("event") == "begun":
                self.running[identity] = None
            elif identity in self._left:
                self.running.pop(identity, None)
                del self._left[identity]
                yield self._finished(identity, line)

    def _finished(self, identity: str, line: dict[str, Any]) -> Finished:
        if line["event"] == "held":
            return Finished(identity, held=str(line["held"]))
        if line["event"] == "error":
            text = str(line["error"])
            return Finished(
                identity, error=CertificateViolationError(text, {}) if line["fatal"] else RuntimeError(text)
            )
        folder = RunFolder(Path(self.chunk.execution.output) / identity)
        try:
            return Finished(identity, summary=folder.read_summary())
        except StoreError as error:
            return Finished(identity, error=error)

    def _new_lines(self) -> list[dict[str, Any]]:
        """Whole lines only: the job may be in the middle of the last one, and may have died there."""
        try:
            with self.chunk.events_path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]


def _read_names(folder: Path) -> dict[str, str]:
    """Names of the chunk files, by job."""
    try:
        names: dict[str, str] = json.loads((folder / _JOBS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return names


def _cells_of(output: str, token: str, jobs: Sequence[str]) -> dict[str, str]:
    """Ids of the jobs' cells, each with its job; none where its files are gone."""
    folder = Path(output) / MACHINERY / "jobs" / token
    names = _read_names(folder) if jobs else {}
    cells: dict[str, str] = {}
    for job in jobs:
        with contextlib.suppress(OSError, ValueError, KeyError):
            ids = json.loads((folder / names[job]).read_text(encoding="utf-8"))["ids"]
            cells |= dict.fromkeys(ids, f"Slurm job {job}")
    return cells

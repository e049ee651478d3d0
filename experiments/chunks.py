"""Cells of one Slurm job: a file that names them, a file that tells of each one's end, and the job's main function."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .config import CellConfig, config_id
from .execution import Execution
from .store import StoreError, write_atomic

__all__ = ["Chunk", "read_chunk", "run_chunk", "stop", "write_chunk"]

_GRACE_S = 600.0  # longer than clusters wait between SIGTERM and SIGKILL


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one job has to do: cells, how to run them, and how many side by side."""

    path: Path
    execution: Execution
    cells: tuple[CellConfig, ...]

    @property
    def events_path(self) -> Path:
        """A line of JSON for every cell that began or ended, written by the job alone."""
        return self.path.with_suffix(".events")


def write_chunk(path: Path, cells: Sequence[CellConfig], execution: Execution) -> Chunk:
    """Write what a job has to do; raises StoreError where it can't be written."""
    content = {
        "execution": dataclasses.asdict(execution),
        "ids": [config_id(cell) for cell in cells],
        "cells": [json.loads(cell.to_json()) for cell in cells],
    }
    write_atomic(path, json.dumps(content).encode())
    return Chunk(path, execution, tuple(cells))


def read_chunk(path: str | Path) -> Chunk:
    """Read what `write_chunk` wrote.

    Raises:
        StoreError: missing or damaged.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(CellConfig.from_json(json.dumps(values)) for values in content["cells"])
        values = {**content["execution"], "track": tuple(content["execution"]["track"])}
        return Chunk(path, Execution(**values), cells)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: missing or damaged job file ({error})") from error


def run_chunk(path: str | Path) -> None:
    """Run a job's cells; finished ones are passed over, so that a requeued job goes on where it was.

    The cells run in processes of their own, also one at a time: the signals that end a job interrupt this one wherever
    it is, and the submitting library raises from them what a cell would take for an error of its own.
    """
    from .local import LocalExecutor

    chunk = read_chunk(path)
    with chunk.events_path.open("a", encoding="utf-8", buffering=1) as file, _until_terminated():
        file.write("\n")  # behind half a line of this job before it was killed and requeued
        begun: set[str] = set()
        with contextlib.closing(LocalExecutor().events(chunk.cells, chunk.execution)) as events:
            for event in events:
                line = _line(event, begun)
                if line is not None:
                    file.write(json.dumps(line) + "\n")
                if line is not None and line.get("fatal"):  # ends this job, and the others at their next epoch
                    write_atomic(chunk.execution.cancel_path, b"")
                    break


class _TerminatedError(BaseException):
    """Slurm ends the job."""


@contextlib.contextmanager
def _until_terminated() -> Iterator[None]:
    """At SIGTERM the work ends and its cells are let go; then the job waits to be killed, or requeued by a warning.

    A job that ended by itself while Slurm makes room for another counts as failed, and Slurm would not requeue it.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _TerminatedError:
        time.sleep(_GRACE_S)
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(event: Any, begun: set[str]) -> dict[str, Any] | None:
    """What the event log says of an event; of a cell's progress only that it began."""
    from .work import Finished, is_fatal

    if not isinstance(event, Finished):
        if event.id in begun:
            return None
        begun.add(event.id)
        return {"id": event.id, "event": "begun"}
    if event.summary is not None:
        return {"id": event.id, "event": "done"}
    if event.error is not None:
        error = " ".join(str(event.error).split()) or type(event.error).__name__
        return {"id": event.id, "event": "error", "error": error, "fatal": is_fatal(event.error)}
    return {"id": event.id, "event": "held", "held": event.held}


def stop() -> None:
    """End the workers of this process's chunk; their cells go on from their last epochs."""
    for child in multiprocessing.active_children():
        child.terminate()

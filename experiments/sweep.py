"""The main job: every cell of a grid trained, evaluated, written; then the table and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from .cell import Progress, cell_data, check_cell
from .config import CellConfig, RunSpec, config_id
from .executors import Finished, default_jobs, is_fatal, make_executor
from .plots import write_figures
from .store import RunFolder, find_runs, lock_output
from .tables import robustness_table, write_table

__all__ = ["CellError", "Watcher", "run", "write_results"]


class CellError(RuntimeError):
    """One or more cells of a run that failed; the others are finished and kept."""


class Watcher(Protocol):
    """Is told how a run goes; every method may be called from the process that called `run` only."""

    def start(self, cells: Sequence[CellConfig], finished: Mapping[str, dict[str, Any]]) -> None:
        """All cells, and the summaries of those that were finished before."""

    def progress(self, progress: Progress) -> None:
        """One step of one cell."""

    def finish(self, finished: Finished) -> None:
        """The end of one cell."""


class _Silent:
    def start(self, cells: Sequence[CellConfig], finished: Mapping[str, dict[str, Any]]) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def finish(self, finished: Finished) -> None: ...


def run(
    spec: RunSpec | Mapping[str, Any] | None = None,
    output: str | Path = "runs",
    *,
    executor: str = "inline",
    jobs: int | None = None,
    device: str = "cpu",
    data_root: str | Path | None = None,
    watcher: Watcher | None = None,
) -> pd.DataFrame:
    """Train, bound, certify and attack every cell of `spec`; write run folders, table and pictures to `output`.

    A finished cell is not computed again, an interrupted one goes on behind its last epoch. The output folder is held
    alone meanwhile.

    Args:
        spec: the grid, or its settings as for `RunSpec.from_mapping`; None for the defaults (digits).
        output: folder for one sub-folder a cell, robustness.csv/.md/.tex and figures/.
        executor: "inline" or "local".
        jobs: processes of the local executor; one a core, or one a GPU where the device is cuda, if None.
        device: "cpu", "cuda" or "cuda:N".
        data_root: where the public data sets lie; see `load_dataset`.
        watcher: is told how the run goes.

    Returns:
        The robustness table of these cells; see `robustness_table`.

    Raises:
        CertificateViolationError: a certificate that an attack broke; nothing further is computed.
        CellError: cells that failed, after all others have been finished.
        ValueError: a bad setting, missing data, an output folder in use.
    """
    spec = RunSpec.from_mapping(spec or {}) if not isinstance(spec, RunSpec) else spec
    watcher = watcher or _Silent()
    check_device(device)
    chosen = make_executor(executor, default_jobs(device) if jobs is None else jobs, watcher.progress)
    cells = spec.cells()
    with lock_output(output):
        folders = {config_id(cell): RunFolder.of(output, cell) for cell in cells}
        done = {key: folder.read_summary() for key, folder in folders.items() if folder.is_finished}
        missing = [cell for cell in cells if config_id(cell) not in done]
        watcher.start(cells, done)
        if missing:
            check_cell(missing[0], cell_data(missing[0], data_root))  # fails here in one line, and not once a cell
        failed: list[Finished] = []
        arguments = {"output": str(output), "data_root": data_root, "device": device}
        for event in chosen.events(missing, arguments) if missing else ():
            _watch(event, watcher, failed)
        if failed:
            raise CellError(_reasons(failed))
        return write_results(output, list(folders))


def _watch(event: Progress | Finished, watcher: Watcher, failed: list[Finished]) -> None:
    if isinstance(event, Progress):
        watcher.progress(event)
        return
    watcher.finish(event)
    if event.error is not None:
        if is_fatal(event.error):
            raise event.error
        failed.append(event)


def _reasons(failed: Sequence[Finished]) -> str:
    """Every failed cell, those that failed for one reason together."""
    cells: dict[str, list[str]] = {}
    for one in failed:
        lines = str(one.error).splitlines()
        cells.setdefault(lines[0] if lines else type(one.error).__name__, []).append(one.id)
    return "; ".join(f"cell {', '.join(ids)} failed: {reason}" for reason, ids in cells.items())


def write_results(output: str | Path, ids: Sequence[str] | None = None) -> pd.DataFrame:
    """Write the table (CSV, Markdown, LaTeX) and the pictures of the finished runs in `output`; return the table.

    Args:
        output: the folder of runs; the files go there too.
        ids: the runs to show; all finished ones where None.
    """
    frame = find_runs(output, ids)
    frame = frame[frame["finished"].astype(bool)]
    table = robustness_table(frame)
    for suffix in ("csv", "md", "tex"):
        write_table(table, Path(output) / f"robustness.{suffix}")
    write_figures(frame, Path(output) / "figures")
    return table


def check_device(device: str) -> None:
    """Raise ValueError where it is not a device to compute on that torch has."""
    try:
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda"):
            raise RuntimeError(f"{kind} is not supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(" device type at")[0]
        raise ValueError(f"device: expected cpu, cuda or cuda:N of this machine, got {device!r} ({reason})") from error

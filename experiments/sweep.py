"""The main job: every cell of a study trained, evaluated, written; then the tables and the pictures."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from .cell import Progress, cell_data, check_cell
from .config import CellConfig, ConfigError, config_id
from .contents import check_contents
from .evaluation import CertificateViolationError
from .execution import Execution
from .executors import Event, Executor, InlineExecutor, device_slots
from .index import find_runs, read_failure
from .leases import CancelledRunError, read_lease
from .local import LocalExecutor
from .plots import write_figures
from .slurm_options import SlurmOptions
from .spec import RunSpec
from .store import RunFolder, StoreError
from .study import RunRecord, write_plan
from .table_writers import write_table
from .tables import robustness_table
from .tracking import check_trackers
from .work import Finished, is_fatal, recalled

__all__ = ["EXECUTORS", "CellError", "Watcher", "check_device", "run", "write_results"]

EXECUTORS = ("inline", "local", "slurm")
_TABLES = ("csv", "md", "tex", "parquet")
_CHECK_S = 5.0  # spent on building models before anything runs
_POLL_S, _SLOWEST_POLL_S = 1.0, 30.0
_POLL_SHARE = 10  # seconds of rest for one spent asking what others do
_NAMED = 5  # failed cells, and reasons, in one line


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

    def say(self, text: str) -> None:
        """One line on the run as a whole."""


class _Silent:
    def start(self, cells: Sequence[CellConfig], finished: Mapping[str, dict[str, Any]]) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def finish(self, finished: Finished) -> None: ...

    def say(self, text: str) -> None: ...


def run(
    spec: RunSpec | Mapping[str, Any] | None = None,
    output: str | Path = "runs",
    *,
    executor: str | None = None,
    jobs: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    threads: int | None = None,
    gpus_per_cell: int | None = None,
    cells_per_gpu: int | None = None,
    track: Sequence[str] | None = None,
    slurm: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    wait: bool = True,
    watcher: Watcher | None = None,
) -> pd.DataFrame:
    """Train, bound, certify and attack every cell of `spec`; write run folders, tables and pictures to `output`.

    A finished cell is not computed again, an interrupted one goes on behind its last epoch, and one on which somebody
    else works is waited for. What is None below comes from the spec's table `execution`, then from `Execution`.

    Args:
        spec: the study, or its settings as for `RunSpec.from_mapping`; None for the defaults (digits).
        output: folder for one sub-folder a cell, robustness.csv/.md/.tex/.parquet and figures/.
        executor: "inline" (the default), "local" or "slurm".
        jobs: cells at once, of the local executor; by default as many as the cores or GPUs can take.
        device: "cpu", "cuda" or "cuda:N".
        data_root: where the public data sets lie; see `load_dataset`.
        threads: of torch, for each cell; results are equal to the last bit at equal numbers of threads only.
        gpus_per_cell: more than 1 trains each cell on that many GPUs, or on a CPU in that many processes.
        cells_per_gpu: small cells side by side on one GPU.
        track: "tensorboard", "mlflow".
        slurm: options of the Slurm jobs, on top of the spec's; see `SlurmOptions`.
        retry_failed: run cells again that failed before; else they are only named.
        wait: False leaves Slurm jobs to themselves once they are submitted.
        watcher: is told how the run goes.

    Returns:
        The robustness table of these cells; see `robustness_table`.

    Raises:
        CertificateViolationError: a certificate that an attack broke; nothing further is computed.
        CellError: cells that failed, after all others have been finished.
        ValueError: a bad setting, missing data, an output folder that cannot be written.
    """
    spec = RunSpec.from_mapping(spec or {}) if not isinstance(spec, RunSpec) else spec
    given = {
        "executor": executor,
        "jobs": jobs,
        "device": device,
        "data_root": None if data_root is None else str(data_root),
        "threads": threads,
        "gpus_per_cell": gpus_per_cell,
        "cells_per_gpu": cells_per_gpu,
        "track": None if track is None else tuple(track),
    }
    settings = {**spec.execution, **{key: value for key, value in given.items() if value is not None}}
    name = settings.pop("executor", "inline")
    execution = Execution(output=str(output), **settings)
    check_trackers(execution.track)
    watcher = watcher or _Silent()
    chosen = _make_executor(name, execution, {**spec.slurm, **(slurm or {})}, watcher, wait=wait)
    sweep = _Sweep(spec.cells(), execution, watcher, retry_failed=retry_failed)
    return sweep.run(name, chosen, wait=wait)


def _make_executor(
    name: str, execution: Execution, slurm: Mapping[str, Any], watcher: Watcher, *, wait: bool
) -> Executor:
    if name == "slurm":
        from .slurm import SlurmExecutor

        return SlurmExecutor(SlurmOptions.from_mapping(slurm), watcher.say, wait=wait)
    if not wait:
        raise ConfigError(f"no-wait: only Slurm jobs can be left to themselves, got executor {name!r}")
    if name not in EXECUTORS:
        raise ConfigError(f"executor: expected one of {', '.join(EXECUTORS)}; got {name!r}")
    check_device(execution.device)
    device_slots(execution)
    return InlineExecutor(watcher.progress) if name == "inline" else LocalExecutor()


class _Sweep:
    """One call of `run`."""

    def __init__(
        self, cells: Sequence[CellConfig], execution: Execution, watcher: Watcher, *, retry_failed: bool
    ) -> None:
        self._cells = {config_id(cell): cell for cell in cells}
        self._execution, self._watcher, self._retry_failed = execution, watcher, retry_failed
        self._folders = {key: RunFolder.of(execution.output, cell) for key, cell in self._cells.items()}
        self._failed: list[Finished] = []

    def run(self, name: str, executor: Executor, *, wait: bool) -> pd.DataFrame:
        """All that is missing, then the results."""
        output = self._execution.output
        done = self._finished_before()
        if not self._retry_failed:
            self._recall_failures(done)
        known = {*done, *(one.id for one in self._failed)}
        missing = [cell for key, cell in self._cells.items() if key not in known]
        self._watcher.start(list(self._cells.values()), done)
        _check_cells(missing, self._execution.data_root)  # fails here in one line, and not once a cell
        write_plan(output, list(self._cells.values()))
        record = RunRecord(token=self._execution.token, executor=name, cells=len(missing))
        try:
            record.write(output)
            with contextlib.closing(self._events(executor, missing, wait=wait)) as events:
                for event in events:
                    self._watch(event)
        except CancelledRunError as error:
            raise KeyboardInterrupt from error
        except CertificateViolationError:
            _remove_tables(output)
            try:
                executor.abort()
            except RuntimeError as failure:  # the broken certificate is what matters
                self._watcher.say(f"the jobs could not be cancelled ({failure}); certify cancel ends them")
            raise
        finally:
            if not executor.goes_on:
                record.remove(output)
        table = write_results(output, list(self._cells))
        if self._failed:
            raise CellError(_reasons(self._failed))
        return table

    def _finished_before(self) -> dict[str, dict[str, Any]]:
        done = {}
        for key, folder in self._folders.items():
            if (summary := _summary(folder)) is not None:
                check_contents(self._cells[key], summary.get("content"), folder.path)
                done[key] = summary
        return done

    def _recall_failures(self, done: Mapping[str, Any]) -> None:
        for key, folder in self._folders.items():
            failure = None if key in done else read_failure(folder)
            if failure is None:
                continue
            error = recalled(failure)
            if is_fatal(error):
                _remove_tables(self._execution.output)
                raise error
            error = RuntimeError(f"{error} (in an earlier run; --retry-failed runs it again)")
            self._failed.append(Finished(key, error=error))

    def _events(self, executor: Executor, missing: Sequence[CellConfig], *, wait: bool) -> Generator[Event, None, None]:
        """Run the cells; those that somebody else has are waited for, and run here where he leaves them undone."""
        todo, held = self._split(executor, missing)
        while todo or held:
            if todo:
                with contextlib.closing(executor.events(todo, self._execution)) as events:
                    for event in events:
                        if isinstance(event, Finished) and event.held is not None:
                            held[event.id] = event.held
                        else:
                            yield event
            if not wait:
                return
            todo = []
            if held:
                self._watcher.say(_waiting(held))
            spent = 0.0
            while held and not todo:
                time.sleep(min(_SLOWEST_POLL_S, _POLL_S + _POLL_SHARE * spent))
                start = time.monotonic()
                todo = yield from self._resolved(executor, held)
                spent = time.monotonic() - start

    def _split(self, executor: Executor, missing: Sequence[CellConfig]) -> tuple[list[CellConfig], dict[str, str]]:
        """What to run, and what is queued in the jobs of another run already."""
        queued = executor.queued(self._execution.output)
        held = {key: queued[key] for cell in missing if (key := config_id(cell)) in queued}
        return [cell for cell in missing if config_id(cell) not in held], held

    def _resolved(self, executor: Executor, held: dict[str, str]) -> Generator[Event, None, list[CellConfig]]:
        """Yields how cells go on or end with others who have them; returns those that were left undone."""
        queued = executor.queued(self._execution.output)
        if self._execution.cancel_path.exists():
            raise CancelledRunError("cancelled")
        left = []
        for key in list(held):
            folder = self._folders[key]
            lease = read_lease(folder.path)
            summary = None if lease.live else _summary(folder)  # a live owner writes it before he lets go
            if lease.live or (summary is None and key in queued):
                if "stage" in lease.content:
                    yield Progress(key, str(lease.content["stage"]), float(lease.content["fraction"]))
                continue
            if summary is not None:
                yield Finished(key, summary=summary)
            elif failure := read_failure(folder):
                yield Finished(key, error=recalled(failure))
            else:
                left.append(self._cells[key])
            del held[key]
        return left

    def _watch(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._watcher.progress(event)
            return
        self._watcher.finish(event)
        if event.error is not None:
            if is_fatal(event.error) or isinstance(event.error, CancelledRunError):
                raise event.error
            self._failed.append(event)


def _summary(folder: RunFolder) -> dict[str, Any] | None:
    """The results of a finished cell."""
    try:
        return folder.read_summary()
    except StoreError:
        return None


def _waiting(held: Mapping[str, str]) -> str:
    owners = sorted(set(held.values()))
    further = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
    return f"waiting for {len(held)} cells on which others work ({owners[0]}{further})"


def _check_cells(cells: Sequence[CellConfig], data_root: str | None) -> None:
    """Build one model of each kind for its data, within seconds; raises ValueError where one can't be built."""
    kinds: dict[Any, CellConfig] = {}
    for cell in cells:
        kind = (cell.dataset, cell.model, cell.width, cell.depth, cell.activation, cell.normalise, cell.constraint)
        kinds.setdefault((*kind, cell.norm, cell.checkpoint), cell)
    end = time.monotonic() + _CHECK_S
    for cell in kinds.values():
        check_cell(cell, cell_data(cell, data_root))
        if time.monotonic() > end:
            break


def _remove_tables(output: str | Path) -> None:
    """No table, picture or page of a run with a broken certificate is left to be believed."""
    for name in (*(f"robustness.{suffix}" for suffix in _TABLES), "report.html"):
        with contextlib.suppress(OSError):
            (Path(output) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(output) / "figures", ignore_errors=True)


def _reasons(failed: Sequence[Finished]) -> str:
    """The failed cells, those that failed for one reason together; of many the first ones."""
    cells: dict[str, list[str]] = {}
    for one in failed:
        lines = str(one.error).splitlines()
        cells.setdefault(lines[0] if lines else type(one.error).__name__, []).append(one.id)
    shown = [f"cell {_some(ids)} failed: {reason}" for reason, ids in list(cells.items())[:_NAMED]]
    rest = sum(len(ids) for ids in list(cells.values())[_NAMED:])
    return "; ".join([*shown, f"and {rest} more cells; certify status shows them"] if rest else shown)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")


def write_results(output: str | Path, ids: Sequence[str] | None = None) -> pd.DataFrame:
    """Write the table (CSV, Markdown, LaTeX, Parquet) and the pictures of the runs in `output`; return the table.

    Args:
        output: the folder of runs; the files go there too.
        ids: the runs to show; all where None.
    """
    frame = find_runs(output, ids)
    table = robustness_table(frame)
    for suffix in _TABLES:
        write_table(table, Path(output) / f"robustness.{suffix}")
    if frame["finished"].any():
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

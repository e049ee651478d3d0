"""The machinery of a study beside its run folders: which cells are planned, and which runs are at work."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import ADDED, FIELDS, CellConfig, config_id
from .execution import MACHINERY
from .processes import is_process, this_process
from .store import StoreError, write_atomic

__all__ = [
    "RunRecord",
    "add_jobs",
    "cancel",
    "cells_schema",
    "forget_plans",
    "planned",
    "records",
    "write_plan",
]


def write_plan(output: str | Path, cells: Sequence[CellConfig]) -> None:
    """Note the cells of a study, so that those not begun are known; equal studies share one file.

    Raises:
        StoreError: the folder cannot be written.
    """
    import pyarrow.parquet as pq

    ids = [config_id(cell) for cell in cells]
    path = Path(output) / MACHINERY / f"plan-{hashlib.sha256(','.join(sorted(ids)).encode()).hexdigest()[:12]}.parquet"
    if path.exists():
        return
    buffer = io.BytesIO()
    pq.write_table(_cells_table(ids, cells), buffer)
    write_atomic(path, buffer.getvalue())


def cells_schema() -> Any:
    """Columns of a table of cells: `id`, then one a config field."""
    import pyarrow as pa

    kinds: dict[Any, Any] = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    types: dict[Any, Any] = {**kinds, **{kind | None: column for kind, column in kinds.items()}}
    types |= {tuple[float, ...]: pa.list_(pa.float64()), tuple[str, ...]: pa.list_(pa.string())}
    fields = dataclasses.fields(CellConfig)
    return pa.schema([("id", pa.string()), *((field.name, types[field.type]) for field in fields)])


def _cells_table(ids: Sequence[str], cells: Sequence[CellConfig]) -> Any:
    import pyarrow as pa

    columns: dict[str, Sequence[Any]] = {
        "id": ids,
        **{name: [getattr(cell, name) for cell in cells] for name in FIELDS},
    }
    return pa.table(columns, schema=cells_schema())


def planned(output: str | Path, fields: Sequence[str] = FIELDS) -> dict[str, dict[str, Any]]:
    """Config fields of every planned cell, by id, in the order of the plans.

    Args:
        output: the study's folder.
        fields: the fields wanted; few are read faster.

    Raises:
        StoreError: a damaged plan.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells: dict[str, dict[str, Any]] = {}
    paths = list((Path(output) / MACHINERY).glob("plan-*.parquet"))
    for path in sorted(paths, key=_age):
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
            late = {name: value for name, value in ADDED.items() if name in fields and name not in table.column_names}
            rows = table.select([name for name in ("id", *fields) if name not in late]).to_pylist()
        except FileNotFoundError:
            continue  # forgotten meanwhile
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise StoreError(f"{path}: damaged plan; delete it, and `certify run` writes it anew") from error
        for row in rows:
            cells.setdefault(row.pop("id"), row | late)
    return cells


def _age(path: Path) -> tuple[int, str]:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns, path.name
    return 0, path.name


def forget_plans(output: str | Path) -> int:
    """Remove all plans, so that cells that were never begun are not waited for; how many plans there were."""
    paths = list((Path(output) / MACHINERY).glob("plan-*.parquet"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One call of `run` that is at work on a study.

    Attributes:
        token: its name; see `Execution.token`.
        executor: which one.
        process: the process that called it, as `this_process` has it.
        cells: how many it set out to run.
        jobs: Slurm jobs that it submitted.
    """

    token: str
    executor: str
    cells: int
    process: dict[str, Any] = dataclasses.field(default_factory=this_process)
    jobs: tuple[str, ...] = ()

    def write(self, output: str | Path) -> None:
        """Keep the record in the study's folder; raises StoreError where it can't be written."""
        write_atomic(_record_path(output, self.token), (json.dumps(dataclasses.asdict(self)) + "\n").encode())

    def remove(self, output: str | Path) -> None:
        """The run has ended."""
        for suffix in (".json", ".cancel"):
            with contextlib.suppress(OSError):
                _record_path(output, self.token).with_suffix(suffix).unlink(missing_ok=True)

    @property
    def is_alive(self) -> bool | None:
        """Whether its process is alive; None where it is on a machine that can't be seen from here."""
        return is_process(self.process)

    def __str__(self) -> str:
        jobs = f", {len(self.jobs)} Slurm jobs" if self.jobs else ""
        return f"{self.executor} run by process {self.process.get('pid')} on {self.process.get('host')}{jobs}"


def add_jobs(output: str | Path, token: str, jobs: Sequence[str]) -> None:
    """Note Slurm jobs that a run has submitted; raises StoreError where that can't be written."""
    record = _read_record(_record_path(output, token)) or RunRecord(token=token, executor="slurm", cells=0)
    dataclasses.replace(record, jobs=(*record.jobs, *jobs)).write(output)


def records(output: str | Path) -> list[RunRecord]:
    """The runs that have not ended, as far as is known; records of dead processes without jobs are removed."""
    found = []
    for path in sorted((Path(output) / MACHINERY).glob("run-*.json")):
        record = _read_record(path)
        if record is None:
            continue
        if record.is_alive is False and not record.jobs:
            record.remove(output)
        else:
            found.append(record)
    return found


def cancel(output: str | Path) -> list[RunRecord]:
    """Stop all runs that are at work on a study, and return them; what is finished stays, the rest can be resumed.

    Slurm jobs are cancelled, a process of this machine is interrupted as by Ctrl-C, and workers elsewhere stop at their
    next epoch or stage.

    Raises:
        SlurmError: jobs that can't be cancelled.
        StoreError: the folder cannot be written.
    """
    found = records(output)
    for record in found:
        write_atomic(_record_path(output, record.token).with_suffix(".cancel"), b"")
    for record in found:
        if record.jobs:
            from . import submit

            submit.cancel(record.jobs)
        if record.is_alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # another user's sees the marker
                os.kill(record.process["pid"], signal.SIGINT)
        elif record.jobs and record.is_alive is False:
            record.remove(output)
    return found


def _read_record(path: Path) -> RunRecord | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = RunRecord(**{**values, "jobs": tuple(values["jobs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # ended meanwhile, or not a record
    return record if isinstance(record.process, dict) and record.token == path.stem.removeprefix("run-") else None


def _record_path(output: str | Path, token: str) -> Path:
    return Path(output) / MACHINERY / f"run-{token}.json"

"""All cells of a study at once: one index of the finished ones, and the state of the others.

The index is a cache in Parquet: a row a finished cell, made from the run folders and made anew where it is missing or
damaged. A finished cell does not change, so that only new ones are read; before a table is made, the time and size of
every summary are compared too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import FIELDS
from .index_table import STAMPS, Row, index_bytes, joined, read_index
from .leases import LeaseState, read_lease
from .store import RunFolder, StoreError, write_atomic
from .study import planned

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["INDEX_NAME", "Cell", "Index", "cells", "find_runs", "read_failure"]

INDEX_NAME = "index.parquet"
_RUN_NAME = re.compile(r"[0-9a-f]{12}")
_LABELS = ("dataset", "model", "constraint", "threshold", "seed", "epochs")
_MANY = 200  # new cells that are worth an index
_READERS = 16  # threads: a shared file system answers many questions at once


class Index:
    """The finished cells of an output folder.

    Args:
        output: the output folder.
        verify: compare every summary's time and size with the index, not only which folders there are.

    Attributes:
        names: all run folders.
        finished: those of them that are finished.
        problems: a line for each summary that could not be read.

    Raises:
        StoreError: no such folder.
    """

    def __init__(self, output: str | Path, *, verify: bool) -> None:
        self.output = Path(output)
        self.problems: dict[str, str] = {}
        self.names = frozenset(_run_names(self.output))
        self._old = read_index(self.output / INDEX_NAME)
        self._kept = self._still_true(verify)
        self._new = self._read_all(self.names - self._kept)
        self.finished = self._kept | {row["id"] for row in self._new}
        is_changed = self._new or (self._old is not None and len(self._kept) < self._old.num_rows)
        if (verify and is_changed) or len(self._new) > _MANY:  # a look at the status is not to wait for pandas
            self._write()

    @functools.cached_property
    def rows(self) -> Any:
        """An Arrow table, a row a finished cell: `id`, the two stamps, then as in `summary.json`."""
        import pyarrow as pa

        old = self._old
        if old is not None and len(self._kept) < old.num_rows:
            old = old.filter(pa.array([name in self._kept for name in old["id"].to_pylist()], pa.bool_()))
        rows = joined(old, self._new)
        return joined(None, self._read_all(self.names)) if rows is None else rows

    def values(self, columns: Sequence[str]) -> dict[str, Row]:
        """Some columns of the finished cells, by id; None where a cell has none of a name."""
        found = {row["id"]: {name: row.get(name) for name in columns} for row in self._new}
        if self._kept:
            known = [name for name in columns if name in self._old.column_names]
            for row in self._old.select(["id", *known]).to_pylist():
                if (name := row.pop("id")) in self._kept:
                    found[name] = {**dict.fromkeys(columns), **row}
        return found

    def _read_all(self, names: Iterable[str]) -> list[Row]:
        return [row for row in self._map(self._read, sorted(names)) if row]

    def _still_true(self, verify: bool) -> frozenset[str]:
        """Ids of the rows of the old index that still hold."""
        if self._old is None:
            return frozenset()
        stamps = [self._old[name].to_pylist() for name in STAMPS]
        known = dict(zip(self._old["id"].to_pylist(), zip(*stamps, strict=True), strict=True))
        found = dict(zip(known, self._map(self._stamp, known), strict=True)) if verify else known
        return frozenset(name for name, stamp in known.items() if name in self.names and found[name] == stamp)

    def _stamp(self, name: str) -> tuple[int, int] | None:
        try:
            found = (self.output / name / "summary.json").stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _read(self, name: str) -> Row | None:
        folder = RunFolder(self.output / name)
        stamp = self._stamp(name)
        if stamp is None:
            return None
        try:
            return {**folder.read_summary(), **_fields(folder), **dict(zip(STAMPS, stamp, strict=True))}
        except StoreError as error:
            self.problems[name] = str(error)
            return None

    def _map(self, function: Any, names: Iterable[str]) -> list[Any]:
        names = list(names)
        if len(names) < _READERS:
            return [function(name) for name in names]
        shares = [names[first::_READERS] for first in range(_READERS)]
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(lambda share: [function(name) for name in share], shares))
        return [parts[k % _READERS][k // _READERS] for k in range(len(names))]

    def _write(self) -> None:
        with contextlib.suppress(StoreError):  # a folder of somebody else, or a full disk: it is only a cache
            write_atomic(self.output / INDEX_NAME, index_bytes(self.rows))


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where one cell of a study stands.

    Attributes:
        id: hash of its config.
        state: "done", "running", "failed", "interrupted" (begun, and nobody works on it) or "pending".
        labels: dataset, model, constraint, threshold, seed and epochs; empty where not known.
        lease: of a running cell.
        error: the last line of the error of a failed cell.
    """

    id: str
    state: str
    labels: dict[str, Any]
    lease: LeaseState | None = None
    error: str | None = None


def cells(output: str | Path, *, index: Index | None = None) -> list[Cell]:
    """Every cell of a study, planned or begun, planned ones first and in their order.

    Raises:
        StoreError: no such folder, or a damaged plan.
    """
    index = index or Index(output, verify=False)
    plan = planned(output, _LABELS)
    done = index.values(_LABELS)
    rest = [name for name in [*plan, *sorted(index.names - plan.keys())] if name not in done]
    states = dict(zip(rest, index._map(lambda name: _state(index, name, plan.get(name)), rest), strict=True))
    return [
        states[name] if name in states else Cell(name, "done", done[name])
        for name in [*plan, *sorted(index.names - plan.keys())]
    ]


def _state(index: Index, name: str, labels: dict[str, Any] | None) -> Cell:
    if name not in index.names:
        return Cell(name, "pending", labels or {})
    folder = RunFolder(index.output / name)
    labels = labels or _labels(folder)
    lease = read_lease(folder.path)
    if lease.live:
        return Cell(name, "running", labels, lease=lease)
    if failure := read_failure(folder):
        return Cell(name, "failed", labels, error=str(failure["error"]))
    if name in index.problems:
        return Cell(name, "failed", labels, error=index.problems[name])
    return Cell(name, "interrupted" if folder.config_path.exists() else "pending", labels)


def _labels(folder: RunFolder) -> dict[str, Any]:
    try:
        fields = _fields(folder)
    except StoreError:
        return {}
    return {field: fields[field] for field in _LABELS}


def _fields(folder: RunFolder) -> Row:
    config = folder.read_config()
    values = {field: getattr(config, field) for field in FIELDS}
    return {field: list(value) if isinstance(value, tuple) else value for field, value in values.items()}


def read_failure(folder: RunFolder) -> dict[str, Any] | None:
    """What ended a cell: `error` (one line), `traceback`, `time`; None where it has not failed."""
    try:
        content = json.loads(folder.failure_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "error" in content else None


def find_runs(output: str | Path, ids: Collection[str] | None = None) -> pd.DataFrame:
    """Every cell of a study: columns `folder`, `id`, `state`, `finished`, `error`, the config fields, and all results.

    `state` is as in `Cell`, `finished` whether it is "done". Cells that are not are rows without results. Planned cells
    come first, in the order of the plan.

    Args:
        output: the output folder, or the folder of one run.
        ids: the cells wanted; all where None.

    Raises:
        StoreError: no such folder; names every damaged or foreign run folder.
    """
    import pandas as pd

    output = Path(output)
    if (output / "config.json").exists():
        path = output.resolve()
        ids, output = [path.name], path.parent
    index = Index(output, verify=True)
    wanted = None if ids is None else frozenset(ids)
    found = [cell for cell in cells(output, index=index) if wanted is None or cell.id in wanted]
    rest = pd.DataFrame(_unfinished(index, [cell for cell in found if cell.state != "done"]))
    done = _frame(index.rows)
    done.insert(1, "state", "done")
    frame = pd.concat([part for part in (done, rest) if len(part)] or [done], ignore_index=True)
    frame = frame.set_index("id").loc[[cell.id for cell in found]].reset_index()
    errors = {cell.id: cell.error for cell in found}
    first = {
        "folder": pd.Series([str(output / name) for name in frame["id"]], dtype=object),
        "id": frame["id"],
        "state": frame["state"],
        "finished": frame["state"].eq("done"),
        "error": pd.Series([errors.get(name) for name in frame["id"]], dtype=object),
    }
    return pd.concat([pd.DataFrame(first), frame.drop(columns=[*first], errors="ignore")], axis=1)


def _unfinished(index: Index, found: Sequence[Cell]) -> list[Row]:
    """Rows without results; the config is that of the plan, or in the folder of a begun cell.

    Raises:
        StoreError: names every folder that could not be read, here or before.
    """
    plan = planned(index.output) if found else {}
    rows, problems = [], []
    for cell in found:
        folder, fields = RunFolder(index.output / cell.id), plan.get(cell.id, {})
        if cell.state != "running" and cell.id in index.problems:
            problems.append(index.problems[cell.id])
        elif not fields and folder.config_path.exists():
            try:
                fields = _fields(folder)
            except StoreError as error:
                problems.append(str(error))
        rows.append({"id": cell.id, "state": cell.state, **fields})
    if problems:
        raise StoreError("; ".join(problems))
    return rows


def _frame(rows: Any) -> pd.DataFrame:
    """The index as pandas has it, its lists as lists, results that no cell has as NaN."""
    import pyarrow as pa

    rows = rows.drop_columns(list(STAMPS))
    for at, field in enumerate(rows.schema):
        if pa.types.is_null(field.type):
            rows = rows.set_column(at, field.name, pa.nulls(rows.num_rows, pa.float64()))
    frame: pd.DataFrame = rows.to_pandas()
    for field in rows.schema:
        if pa.types.is_list(field.type):
            frame[field.name] = rows[field.name].to_pylist()
    return frame


def _run_names(output: Path) -> list[str]:
    """Sub-folders that are named as a run or hold a config."""
    try:
        with os.scandir(output) as entries:
            folders = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise StoreError(f"{output}: expected a folder of runs ({error.strerror})") from error
    return [name for name in folders if _RUN_NAME.fullmatch(name) or (output / name / "config.json").exists()]

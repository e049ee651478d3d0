"""What a study's cells do: counts, progress, times to come; logs of single cells. Reads the store, and no torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import FIELDS, CellConfig, config_id
from .index import Cell, Index, cells, read_failure
from .spec import RunSpec
from .store import RunFolder, StoreError
from .study import RunRecord, records

if TYPE_CHECKING:
    from rich.console import Console, Group

__all__ = ["STATES", "Status", "find_cell", "print_dry_run", "read_log", "read_status", "watch_status"]

STATES = ("done", "running", "failed", "interrupted", "pending")
_STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "pending": "dim"}
_LIKE = ("dataset", "model", "epochs")  # cells alike in these cost about the same
_SHOWN = 40  # cells a state in a terminal


@dataclasses.dataclass(frozen=True)
class Status:
    """A study at one moment.

    Attributes:
        cells: all of them.
        runs: calls of `certify run` that have not ended.
        costs: mean seconds of a finished cell, for each kind of cell (`dataset`, `model`, `epochs`); under () of all.
    """

    cells: list[Cell]
    runs: list[RunRecord]
    costs: Mapping[tuple[Any, ...], float]

    @property
    def counts(self) -> dict[str, int]:
        """How many cells are in each state."""
        found = Counter(cell.state for cell in self.cells)
        return {state: found.get(state, 0) for state in STATES}

    def remaining_s(self, cell: Cell) -> float | None:
        """Seconds that a cell will still compute, by its own pace or that of finished ones; None where unknown."""
        cost = _cost(self.costs, cell.labels)
        if cell.state == "done":
            return 0.0
        if cell.state != "running" or cell.lease is None:
            return cost
        content = cell.lease.content
        elapsed, fraction, first, first_s = (
            float(content.get(key, default))
            for key, default in (("elapsed_s", 0.0), ("fraction", 0.0), ("first", 1.0), ("first_s", 0.0))
        )
        if cost is not None:
            return max(0.0, cost - elapsed)
        return (elapsed - first_s) * (1 - fraction) / (fraction - first) if fraction > first else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at the present number of running cells; None where unknown, or where none runs."""
        times = [self.remaining_s(cell) for cell in self.cells if cell.state in ("running", "pending", "interrupted")]
        running = self.counts["running"]
        if not running or any(value is None for value in times):
            return None
        return sum(value for value in times if value is not None) / running


def read_status(output: str | Path) -> Status:
    """The state of every cell of a study; raises StoreError where there is no such folder."""
    index = Index(output, verify=False)
    return Status(cells(output, index=index), records(output), _costs(index))


def _costs(index: Index) -> dict[tuple[Any, ...], float]:
    kinds: dict[tuple[Any, ...], list[float]] = {}
    for row in index.values((*_LIKE, "cell_s")).values():
        if isinstance(seconds := row.pop("cell_s"), int | float):
            kinds.setdefault(tuple(row.values()), []).append(seconds)
            kinds.setdefault((), []).append(seconds)
    return {kind: statistics.fmean(times) for kind, times in kinds.items()}


def _cost(costs: Mapping[tuple[Any, ...], float], labels: Mapping[str, Any]) -> float | None:
    return costs.get(tuple(labels.get(name) for name in _LIKE), costs.get(()))


def watch_status(output: Path, console: Console, *, state: str | None = None, every_s: float | None = None) -> Status:
    """Print the status, or show it live until all is done (or Ctrl-C) where `every_s` is given."""
    status = read_status(output)
    if every_s is None or not console.is_terminal:
        console.print(_view(status, state))
        return status
    from rich.live import Live

    with Live(_view(status, state), console=console, auto_refresh=False) as live:
        while status.counts["running"] or status.counts["pending"] or (status.counts["interrupted"] and status.runs):
            time.sleep(every_s)
            status = read_status(output)
            live.update(_view(status, state), refresh=True)
    return status


def _view(status: Status, state: str | None) -> Group:
    from rich.console import Group
    from rich.text import Text

    counts = Text(", ").join(Text(f"{count} {name}", _STYLES[name]) for name, count in status.counts.items() if count)
    head = Text(f"{len(status.cells)} cells: " if status.cells else "no cell: certify run makes them").append_text(
        counts
    )
    if status.left_s is not None:
        head.append(f"; about {_duration(status.left_s)} to go")
    parts: list[Any] = [head, *(Text(str(record)) for record in status.runs)]
    states = (state,) if state else ("running", "failed", "interrupted")
    parts += [_table(status, name) for name in states if status.counts[name]]
    return Group(*parts)


def _table(status: Status, state: str) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen = [cell for cell in status.cells if cell.state == state]
    names = _differing(status.cells)
    table = Table(title=state, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("cell", *names):
        table.add_column(name, no_wrap=True)
    table.add_column("time left" if state == "running" else "", no_wrap=True, justify="right")
    table.add_column("stage" if state == "running" else "last line of the error" if state == "failed" else "")
    for cell in chosen[:_SHOWN]:
        labels = [_label(cell.labels.get(name)) for name in names]
        left = status.remaining_s(cell) if state == "running" else None
        table.add_row(cell.id, *labels, "" if left is None else _duration(left), Text(_remark(cell)))
    if len(chosen) > _SHOWN:
        table.add_row(f"... and {len(chosen) - _SHOWN} more")
    return table


def _differing(found: Iterable[Cell]) -> list[str]:
    """The labels that tell the cells apart, always with the threshold."""
    values: dict[str, set[Any]] = {}
    for cell in found:
        for name, value in cell.labels.items():
            values.setdefault(name, set()).add(value)
    return [name for name, seen in values.items() if len(seen) > 1 or name == "threshold"]


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_label, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _remark(cell: Cell) -> str:
    if cell.lease is not None:
        return f"{cell.lease.content.get('stage', '')} ({cell.lease.owner})"
    return cell.error or ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def print_dry_run(spec: RunSpec, output: Path, console: Console) -> None:
    """List the cells of a study with their ids and states, and what is still to compute; nothing is run or written.

    A cell's line has the settings that the study names and in which its cells differ.
    """
    chosen = {config_id(cell): cell for cell in spec.cells()}
    status = read_status(output) if output.is_dir() else Status([], [], {})
    known = {cell.id: cell for cell in status.cells}
    shown = [known.get(key, Cell(key, "pending", _labels(cell))) for key, cell in chosen.items()]
    named = {"constraint", "threshold", "seed", *(name for part in spec.parts for name in part)}
    names = [name for name in FIELDS if name in named and len({getattr(one, name) for one in chosen.values()}) > 1]
    rows = [[one.id, one.state, *(_label(getattr(chosen[one.id], name)) for name in names)] for one in shown]
    rows.insert(0, ["cell", "state", *names])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        console.out(line.rstrip(), highlight=False)
    _print_costs(Status(shown, [], status.costs), console)


def _labels(cell: CellConfig) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in _LIKE}


def _print_costs(status: Status, console: Console) -> None:
    left = [cell for cell in status.cells if cell.state != "done"]
    times = [status.remaining_s(cell) for cell in left]
    counts = ", ".join(f"{count} {name}" for name, count in status.counts.items() if count)
    console.out(f"{len(status.cells)} cells: {counts}", highlight=False)
    if not left:
        return
    if any(value is None for value in times):
        console.out("cost: no finished cell to estimate it from", highlight=False)
        return
    total = sum(value for value in times if value is not None)
    console.out(
        f"cost: about {_duration(total)} of compute for the {len(left)} cells left, by the finished ones "
        f"(divide by the number that run at once)",
        highlight=False,
    )


def find_cell(output: Path, prefix: str) -> RunFolder:
    """The run folder whose id begins so.

    Raises:
        StoreError: none, or several.
    """
    index = Index(output, verify=False)
    names = [name for name in sorted(index.names) if name.startswith(prefix)]
    if len(names) != 1:
        found = f"{len(names)}: {', '.join(names[:5])}" if names else "none"
        raise StoreError(f"{output}: expected one begun cell whose id begins with {prefix!r}, found {found}")
    return RunFolder(output / names[0])


def read_log(folder: RunFolder, lines: int | None = None) -> str:
    """The log of a cell, its last lines only where a number is given; with the error's traceback where it has failed.

    Raises:
        StoreError: no log.
    """
    try:
        text = folder.log_path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StoreError(f"{folder.log_path}: no log of this cell ({error.strerror})") from error
    kept = text.splitlines()[-lines:] if lines else text.splitlines()
    failure = read_failure(folder)
    if failure is not None and lines is None and str(failure.get("traceback")) not in text:
        kept += ["", str(failure.get("traceback", failure["error"]))]
    return "\n".join(kept)

"""How a run looks in a terminal: a live table of the cells with progress bars."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .cell import Progress
from .config import FIELDS, CellConfig, config_id
from .leases import CancelledRunError
from .work import Finished

__all__ = ["LiveRun"]

_MISSING = "\N{EN DASH}"
_FAILED = "failed"
_ALWAYS = ("constraint", "threshold", "seed")
_BARS = 12  # of cells that run; the table shows further ones
_ROWS = 30  # of the live table: the cells that run, those that failed, then those that ended last


class LiveRun:
    """A `Watcher` that shows a row a cell, filled in as cells end, above bars of what runs now.

    Where the output is no terminal it prints a line when a cell ends instead.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._cells: dict[str, CellConfig] = {}
        self._summaries: dict[str, dict[str, Any]] = {}
        self._stages: dict[str, str] = {}
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[stage]}"), console=console,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._names: list[str] = []
        self._total = self._bars.add_task("all cells", total=0, stage="")
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveRun:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def start(self, cells: Sequence[CellConfig], finished: Mapping[str, dict[str, Any]]) -> None:
        """See `Watcher.start`."""
        self._cells = {config_id(cell): cell for cell in cells}
        self._names = [name for name in FIELDS if len({getattr(cell, name) for cell in cells}) > 1 or name in _ALWAYS]
        self._summaries = dict(finished)
        self._bars.update(self._total, total=len(cells), completed=len(finished))
        if finished:
            self._say(f"{len(finished)} of {len(cells)} cells were finished before and are kept")

    def progress(self, progress: Progress) -> None:
        """See `Watcher.progress`."""
        self._stages[progress.id] = progress.stage
        epochs = self._cells[progress.id].epochs
        if progress.id not in self._tasks:
            if len(self._tasks) == _BARS:
                return
            self._tasks[progress.id] = self._bars.add_task(self._title(progress.id), total=epochs, stage="")
        self._bars.update(self._tasks[progress.id], completed=round(progress.fraction * epochs), stage=progress.stage)

    def finish(self, finished: Finished) -> None:
        """See `Watcher.finish`."""
        if finished.id in self._tasks:
            self._bars.remove_task(self._tasks.pop(finished.id))
        self._bars.advance(self._total)
        title = self._title(finished.id)
        self._stages.pop(finished.id, None)
        if finished.summary is None:
            self._stages[finished.id] = _FAILED
            word = "stopped" if isinstance(finished.error, CancelledRunError) else "failed"
            self._say(f"{title}: {word} ({finished.error})")
            return
        self._summaries[finished.id] = finished.summary
        if not self._console.is_terminal:
            self._say(f"{title}: {_outcome(self._cells[finished.id], finished.summary)}")

    def say(self, text: str) -> None:
        """See `Watcher.say`."""
        self._say(text)

    def _say(self, text: str) -> None:
        self._console.out(text, highlight=False)

    def _view(self) -> Group:
        return Group(self._bars, self._table())

    def _table(self) -> Table:
        table = Table(title="cells", title_justify="left")
        for name in self._names:
            table.add_column(name, justify="left" if name in ("constraint", "model", "dataset") else "right")
        for name in ("clean %", "certified %", "observed %", "state"):
            table.add_column(name, justify="right" if name != "state" else "left")
        shown = self._shown()
        for key in shown:
            cell, summary = self._cells[key], self._summaries.get(key)
            state = "done" if summary else self._stages.get(key, "waiting").split(" loss")[0]
            table.add_row(*(_text(getattr(cell, name)) for name in self._names), *_figures(cell, summary), state)
        if len(shown) < len(self._cells):
            table.caption = f"{len(self._cells) - len(shown)} more"
        return table

    def _shown(self) -> list[str]:
        """All cells in their order; of many, those that run, those that failed, then those that ended last."""
        if len(self._cells) <= _ROWS:
            return list(self._cells)
        at_work = sorted(self._stages, key=lambda key: self._stages[key] == _FAILED)
        return [*at_work[:_ROWS], *itertools.islice(reversed(self._summaries), _ROWS)][:_ROWS]

    def _title(self, key: str) -> str:
        cell = self._cells[key]
        further = [f"{name} {_text(getattr(cell, name))}" for name in self._names if name not in _ALWAYS]
        return ", ".join([f"{cell.constraint} {cell.threshold:g} seed {cell.seed}", *further])


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return _MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _figures(cell: CellConfig, summary: Mapping[str, Any] | None) -> list[str]:
    """Clean, certified and worst observed accuracy at the middle eps, in percent."""
    eps = cell.eps[len(cell.eps) // 2]
    keys = ("clean_accuracy", f"certified_accuracy_attacked_eps_{eps:g}", f"worst_case_accuracy_eps_{eps:g}")
    values = [None if summary is None else summary.get(key) for key in keys]
    return [_MISSING if value is None else f"{100 * value:.1f}" for value in values]


def _outcome(cell: CellConfig, summary: Mapping[str, Any]) -> str:
    clean, certified, observed = _figures(cell, summary)
    eps = cell.eps[len(cell.eps) // 2]
    seconds = summary["train_s"] + summary["evaluate_s"]
    return f"clean {clean} %, at eps {eps:g} certified {certified} %, observed {observed} %, {seconds:.0f} s"

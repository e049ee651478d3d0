"""The table of a sweep: certified and observed robustness side by side, made from run folders alone.

`robustness_table` gives plain numbers (fractions, raw input units); the writers show them to people, in percent and cut
into blocks that fit a page.
"""

import dataclasses
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pandas as pd

from .config import ATTACKS, CONSTRAINTS, FIELDS
from .store import find_runs, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

Runs: TypeAlias = str | Path | Sequence[str | Path] | pd.DataFrame  # output folder(s), or what find_runs gave

_MISSING = "\N{EN DASH}"
_NAMES = ("dataset", "model", "norm")  # always columns of the table, shown only where they differ
_SPANNED = ("constraint", "threshold", "seed")
_OVERVIEW = ("clean_accuracy", "lipschitz_upper", "lipschitz_lower", "gradient_norm", "step_ratio")
_DISTANCES = ("mean_certified_radius", "mean_certified_radius_attacked", "mean_distance", "tightness")
_COUNTS = ("test_count", "attacked_count")
_HEADERS = {
    "clean_accuracy": "clean (%)",
    "lipschitz_upper": "Lipschitz bound",
    "lipschitz_lower": "lower estimate",
    "gradient_norm": "gradient norm",
    "step_ratio": "step time ratio",
    "mean_certified_radius": "certified radius",
    "mean_certified_radius_attacked": "certified radius (attacked)",
    "mean_distance": "smallest distance",
    "tightness": "tightness",
    "certified_accuracy": "certified",
    "certified_accuracy_attacked": "certified (attacked)",
    "worst_case_accuracy": "worst case",
}
_LATEX = str.maketrans({"±": r"$\pm$", "∞": r"$\infty$", _MISSING: "--", "ε": r"$\varepsilon$"})


def collect_runs(runs: Runs) -> pd.DataFrame:
    """The runs of one or more output folders as one frame, as `find_runs` gives it.

    Raises:
        ValueError: no run at all, one run in two folders, or a damaged folder.
    """
    if isinstance(runs, pd.DataFrame):
        frame = runs
    else:
        folders = [runs] if isinstance(runs, str | Path) else list(runs)
        frame = pd.concat([find_runs(folder) for folder in folders], ignore_index=True) if folders else pd.DataFrame()
    if frame.empty:
        raise ValueError("expected at least one run, got none")
    if frame["id"].duplicated().any():
        twice = frame.loc[frame["id"].duplicated(keep=False), "folder"].tolist()
        raise ValueError(f"expected every run once, got one run in {' and '.join(twice[:2])}")
    return frame


def differing_settings(frame: pd.DataFrame) -> list[str]:
    """Config fields in which runs differ beyond constraint, threshold and seed.

    A field that only follows the constraint, as weight decay follows the baseline "weight-decay", is not one of them.
    """
    found = []
    for field in (name for name in FIELDS if name in frame.columns and name not in _SPANNED):
        values = frame[field].map(_hashable)
        within = values.groupby(frame["constraint"]).nunique(dropna=False).gt(1).any()
        if within or (field in _NAMES and values.nunique(dropna=False) > 1):
            found.append(field)
    return found


def robustness_table(runs: Runs, *, aggregate: bool = True, eps: Iterable[float] | None = None) -> pd.DataFrame:
    """One row a constraint and threshold (and each other setting that differs), sorted, with threshold inf last.

    Columns: `dataset`, `model`, `norm`, the differing settings, `constraint`, `threshold`; `runs` (their number) where
    aggregated, else `seed`; `status` (empty, or how many runs diverged or are unfinished); then the results named as
    in `summary.json`, NaN where undefined. Where aggregated a result is the mean over the seeds that have it, and
    `<result>_std` their sample standard deviation (NaN for one).

    Args:
        runs: an output folder, several, or the frame of `find_runs`.
        aggregate: one row for all seeds.
        eps: the eps values to show, in raw input units; all if None.

    Raises:
        ValueError: no run, a damaged run folder, or an eps at which nothing was evaluated.
    """
    frame = collect_runs(runs)
    extra = [field for field in differing_settings(frame) if field not in _NAMES]
    keys = [*_NAMES, *extra, "constraint", "threshold"] + ([] if aggregate else ["seed"])
    metrics = _metrics(frame, eps)
    frame = frame.reindex(columns=[*FIELDS, "finished", "diverged", *metrics])
    frame[list(FIELDS)] = frame[list(FIELDS)].map(_hashable)
    identity = [field for field in FIELDS if field != "seed" or not aggregate]
    groups = [group for _, group in frame.groupby(identity, sort=False, dropna=False)]
    table = pd.DataFrame([_row(group, keys, metrics, aggregate=aggregate) for group in groups])
    order = {name: position for position, name in enumerate(CONSTRAINTS)}
    return table.sort_values(
        keys, key=lambda column: column.map(order) if column.name == "constraint" else column, ignore_index=True
    )


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write the table as its ending says: .csv (all digits), .md (GitHub) or .tex (booktabs).

    Raises:
        ValueError: another ending, or a folder that cannot be written.
    """
    writers = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}
    writer = writers.get(Path(path).suffix)
    if writer is None:
        raise ValueError(f"{path}: expected a table named {', '.join('*' + suffix for suffix in writers)}")
    write_atomic(path, writer(table).encode())


def to_csv(table: pd.DataFrame) -> str:
    """Plain numbers with all digits; what is undefined is an empty cell."""
    return table.to_csv(index=False, lineterminator="\n")


def to_markdown(table: pd.DataFrame) -> str:
    """GitHub tables, one a block, each under a bold title."""
    from tabulate import tabulate

    parts = []
    for block in _blocks(table, math.inf):
        rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
        text = tabulate(rows, block.headers, "github", disable_numparse=True, colalign=block.align)
        parts.append(f"**{block.title}**\n\n{text}\n")
    return "\n".join(parts)


def to_latex(table: pd.DataFrame) -> str:
    """One `table` environment a block; needs the LaTeX package booktabs."""
    from tabulate import tabulate

    parts = []
    for block in _blocks(table, math.inf):
        text = tabulate(block.rows, block.headers, "latex_booktabs", disable_numparse=True, colalign=block.align)
        title = re.sub(r"([%_&#])", r"\\\1", block.title)
        parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{title}}}\n{text}\n\\end{{table}}\n")
    return "\n".join(parts).translate(_LATEX)


def print_table(table: pd.DataFrame, console: "Console | None" = None) -> None:
    """Show the table in a terminal, in blocks as wide as it; 100 columns or more read well."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    for block in _blocks(table, console.width):
        shown = Table(title=block.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for header, align in zip(block.headers, block.align, strict=True):
            shown.add_column(header.replace(" ", "\n"), justify=align, no_wrap=True)
        for row in block.rows:
            shown.add_row(*row, style="red" if any("diverged" in cell for cell in row) else None)
        console.print(shown)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of the table as people read it."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    align: list[Literal["left", "right"]]


def _hashable(value: Any) -> Any:
    return ", ".join(_text(item) for item in value) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    """A label as people read it."""
    if isinstance(value, float):
        return _MISSING if math.isnan(value) else "∞" if math.isinf(value) else format(value, "g")
    return _MISSING if value is None else str(value)


def _metrics(frame: pd.DataFrame, chosen: Iterable[float] | None) -> list[str]:
    """Names of all results, in the order of the table."""
    known = {format(eps, "g"): eps for cell in frame.get("eps", []) if isinstance(cell, list | tuple) for eps in cell}
    keys = sorted(known, key=lambda key: known[key])
    if chosen is not None:
        keys = [format(eps, "g") for eps in sorted(chosen)]
        if absent := [key for key in keys if key not in known]:
            raise ValueError(f"nothing was evaluated at eps {', '.join(absent)}, expected some of {', '.join(known)}")
    used = {name for cell in frame.get("attacks", []) if isinstance(cell, list | tuple) for name in cell}
    attacks = [f"accuracy_{name}" for name in ATTACKS if name in used]
    kinds = ["certified_accuracy", "certified_accuracy_attacked", "worst_case_accuracy", *attacks]
    return [*_OVERVIEW, *_DISTANCES, *_COUNTS, *(f"{kind}_eps_{key}" for key in keys for kind in kinds)]


def _row(group: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str], *, aggregate: bool) -> dict[str, Any]:
    numbers = group[list(metrics)].apply(pd.to_numeric)
    row = {key: group[key].iloc[0] for key in keys}
    if aggregate:
        row["runs"] = len(group)
    row["status"] = _status(group)
    for metric in metrics:
        row[metric] = numbers[metric].mean()
        if aggregate:
            row[f"{metric}_std"] = numbers[metric].std()
    return row


def _status(group: pd.DataFrame) -> str:
    counts = {
        "diverged": int(group["diverged"].eq(True).sum()),
        "unfinished": int(group["finished"].ne(True).sum()),
    }
    of = f" of {len(group)}" if len(group) > 1 else ""
    return ", ".join(f"{count}{of} {name}" if of else name for name, count in counts.items() if count)


def _blocks(table: pd.DataFrame, width: float) -> list[_Block]:
    """Cut the columns into accuracy and bounds, distances, and one block an eps, each with the rows' labels."""
    constant = [name for name in _NAMES if table[name].nunique(dropna=False) == 1]
    setting = ", ".join(_text(table[name].iloc[0]) for name in constant)
    columns = [str(name) for name in table.columns]
    start = columns.index("status")
    hidden = {*constant, *(["runs"] if "runs" in columns and table["runs"].max() == 1 else [])}
    labels = [name for name in columns[:start] if name not in hidden]
    labels += ["status"] if table["status"].ne("").any() else []
    subset = bool((table["attacked_count"] < table["test_count"]).any())
    groups = {
        "accuracy and bounds": list(_OVERVIEW),
        "means in input units": list(_DISTANCES),
    }
    for metric in columns[start:]:
        _, _, key = metric.partition("_eps_")
        if key and not key.endswith("_std"):
            groups.setdefault(f"accuracy (%) at ε = {key}", []).append(metric)
    return [
        _block(table, f"{setting}: {title}" if setting else title, labels, chunk)
        for title, metrics in groups.items()
        for chunk in _chunks(table, labels, [name for name in metrics if subset or "_attacked" not in name], width)
    ]


def _chunks(table: pd.DataFrame, labels: Sequence[str], metrics: Sequence[str], width: float) -> list[list[str]]:
    """Share the columns out so that each block, with the labels, fits the width."""
    rows = table.to_dict("records")
    used = sum(_width(label, [_text(row[label]) for row in rows]) for label in labels)
    chunks: list[list[str]] = []
    room = 0.0
    for metric in metrics:
        needed = _width(_header(metric), [_cell(row, metric) for row in rows])
        if needed > room or not chunks:
            chunks.append([])
            room = width - used
        chunks[-1].append(metric)
        room -= needed
    return chunks


def _width(header: str, cells: Sequence[str]) -> int:
    """Characters of a column with its padding, its header broken at every space."""
    return 3 + max(map(len, [*header.split(), *cells]))


def _block(table: pd.DataFrame, title: str, labels: Sequence[str], metrics: Sequence[str]) -> _Block:
    headers = [*labels, *(_header(metric) for metric in metrics)]
    rows = [
        [*(_text(row[label]) for label in labels), *(_cell(row, metric) for metric in metrics)]
        for row in table.to_dict("records")
    ]
    numeric = {"threshold", "seed", "runs", *metrics}
    align: list[Literal["left", "right"]]
    align = ["right" if name in numeric else "left" for name in [*labels, *metrics]]
    return _Block(title, headers, rows, align)


def _header(metric: str) -> str:
    kind = metric.partition("_eps_")[0]
    return _HEADERS.get(kind, kind.removeprefix("accuracy_"))


def _cell(row: Mapping[Hashable, Any], metric: str) -> str:
    """Mean, with the deviation where there is one; accuracies in percent."""
    mean, deviation = row[metric], row.get(f"{metric}_std", math.nan)
    if math.isnan(mean):
        return _MISSING
    if "accuracy" in metric:
        return f"{100 * mean:.1f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.1f}")
    return f"{mean:.4g}" if math.isnan(deviation) else f"{mean:.3g} ± {deviation:.1g}"

"""The tables of a study: certified and observed robustness side by side, made from run folders alone.

`robustness_table` and `pivot_table` give plain numbers (fractions, raw input units), and the state of what is missing;
`table_writers` shows them to people.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from .attack_notes import CASCADE, SCHEDULE, group_notes, is_attacked, is_cascade, with_effort
from .config import ATTACKS, FIELDS
from .grouping import config_labels, group_ids, group_runs, in_order
from .index import find_runs

__all__ = [
    "DISTANCES",
    "EFFORT",
    "NAMES",
    "OVERVIEW",
    "Runs",
    "collect_runs",
    "differing_settings",
    "pivot_table",
    "robustness_table",
]

Runs: TypeAlias = str | Path | Sequence[str | Path] | pd.DataFrame  # output folder(s), or what find_runs gave

NAMES = ("dataset", "model", "norm")  # always columns of the robustness table, shown only where they differ
OVERVIEW = ("clean_accuracy", "lipschitz_upper", "lipschitz_lower", "gradient_norm", "step_ratio")
DISTANCES = (
    "mean_certified_radius",
    "mean_certified_radius_attacked",
    "mean_distance",
    "tightness",
    "tightness_median",
)
EFFORT = ("gradients_per_sample", "forwards_per_sample", "attack_s")

_COUNTS = ("test_count", "attacked_count")
_LATER = (
    "tightness_median",
    *EFFORT,
    "certified_skipped",
)  # beginnings of results that runs of earlier versions do not have
_SPANNED = ("constraint", "threshold", "seed")
_BOOKKEEPING = ("folder", "id", "state", "finished", "error")


def collect_runs(runs: Runs) -> pd.DataFrame:
    """The runs of one or more output folders as one frame, as `find_runs` gives it.

    Raises:
        ValueError: no run at all, one run in two folders, or a damaged folder.
    """
    if isinstance(runs, pd.DataFrame):
        frame = runs
    else:
        folders = [runs] if isinstance(runs, str | Path) else list(runs)
        # Without all-missing columns, whose type pandas would have to guess.
        found = [find_runs(folder) for folder in folders]
        names = list(dict.fromkeys(name for one in found for name in one.columns))
        parts = [one.dropna(axis="columns", how="all") for one in found if len(one)]
        frame = pd.concat(parts, ignore_index=True).reindex(columns=names) if parts else pd.DataFrame()
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
        values = config_labels(frame, [field])[field]
        if values.nunique(dropna=False) < 2:
            continue
        if field in NAMES or values.groupby(frame["constraint"]).nunique(dropna=False).gt(1).any():
            found.append(field)
    return found


def robustness_table(
    runs: Runs,
    *,
    aggregate: bool = True,
    eps: Iterable[float] | None = None,
    by: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row a constraint and threshold (and each other setting that differs), sorted, with threshold inf last.

    Columns: `dataset`, `model`, `norm`, `bound` where it is not always the product, the differing settings,
    `constraint`, `threshold`, or those of `by`; where
    aggregated `runs`, how many are planned, and `done`, how many of them are finished, else `seed`; `status`, empty
    where all is well, else how many runs diverged, failed or are not finished, or whose certificate broke;
    `attack_schedule` and `flags` where they matter, see `group_notes`; then the results named as in `summary.json`, and
    `gradients_per_sample` and `forwards_per_sample`, the evaluations that the attacks made a sample attacked; NaN where
    there is none. Where aggregated a result is the mean over the finished runs that have it, and `<result>_ci95` the
    half-width of its interval, see `half_width`.

    Args:
        runs: an output folder, several, or the frame of `find_runs`.
        aggregate: one row for all seeds.
        eps: the eps values to show, in raw input units; all if None.
        by: config fields; one row each combination of their values, over all runs that share it.

    Raises:
        ValueError: no run, a damaged run folder, an eps at which nothing was evaluated, an unknown field, or `by`
            without `aggregate`.
    """
    if by is not None and not aggregate:
        raise ValueError("a row a seed needs seed among the fields of by, got by together with aggregate=False")
    frame = with_effort(collect_runs(runs))
    if by is None:
        tighter = ["bound"] if "bound" in frame and frame["bound"].dropna().ne("product").any() else []
        extra = [*tighter, *(field for field in differing_settings(frame) if field not in (*NAMES, *tighter))]
        keys = [*NAMES, *extra, "constraint", "threshold"] + ([] if aggregate else ["seed"])
    else:
        keys = _fields(by)
    metrics = _metrics(frame, eps)
    table, notes = group_runs(frame, keys, metrics), group_notes(frame, keys)
    first, rest = [*keys, "status"], metrics
    if aggregate:
        first = [*keys, "runs", "done", "status"]
        rest = [name for name in table.columns if name not in first]
    table = pd.concat([table[first], notes, table[rest]], axis="columns")
    return in_order(table, keys).reset_index(drop=True)


def pivot_table(
    runs: Runs,
    rows: str | Sequence[str],
    columns: str | Sequence[str],
    value: str,
    *,
    eps: float | None = None,
) -> pd.DataFrame:
    """One result over two sets of config fields: means over all finished runs that share their values.

    Columns: the fields of `rows`; then for each combination of the values of `columns`, written as in
    `[threshold=0.5, norm=l2]`, `<value>[…]`, `<value>_ci95[…]` (see `half_width`), `runs[…]`, how many are planned, 0
    where the study has none there, and `status[…]`, as in `robustness_table`; and, where there is any, `notes[…]`:
    the flags of the attacks behind the result, and "cascade" for the accuracy of a single attack of a cascade.

    Args:
        runs: an output folder, several, or the frame of `find_runs`.
        rows: config fields.
        columns: other config fields.
        value: a result named as in `summary.json`.
        eps: of a result named without its eps: "certified_accuracy" at 0.3 is "certified_accuracy_eps_0.3".

    Raises:
        ValueError: no run, a damaged run folder, an unknown field or result, or a field in both rows and columns.
    """
    down, across = _fields(rows), _fields(columns)
    if twice := [field for field in down if field in across]:
        raise ValueError(f"expected every field in rows or in columns, got {', '.join(twice)} in both")
    frame = with_effort(collect_runs(runs))
    name = value if eps is None else f"{value}_eps_{eps:g}"
    _refuse_unknown("result", [name], _results(frame))
    notes = _notes(frame, [*down, *across], name)
    cells = pd.concat([group_runs(frame, [*down, *across], [name]), notes], axis="columns")
    cells = in_order(cells, [*down, *across]).reset_index(drop=True)
    row = group_ids(cells, down)
    column = group_ids(in_order(cells, across), across).sort_index()
    names = (name, f"{name}_ci95", "runs", "status", *notes.columns)
    wide = cells[[*names]].set_index([row, column]).unstack()
    filled = {"runs": wide["runs"].fillna(0).astype(int)}
    filled |= {text: wide[text].fillna("") for text in ("status", *notes.columns)}
    firsts = cells[across].loc[column.drop_duplicates().sort_values().index]
    heads = [_head(across, values) for values in firsts.itertuples(index=False)]
    parts = {f"{part}[{head}]": filled.get(part, wide[part])[at] for at, head in enumerate(heads) for part in names}
    labels = cells.loc[~row.duplicated(), down].reset_index(drop=True)
    return pd.DataFrame({key: labels[key] for key in down} | parts)


def _notes(frame: pd.DataFrame, keys: Sequence[str], name: str) -> pd.DataFrame:
    """What is to know of the attacks behind a result in each group of a pivot: a column `notes`, or none."""
    found = group_notes(frame, keys)
    blank = pd.Series("", found.index)
    flags = found.get("flags", blank) if is_attacked(name) else blank
    schedule = frame.get(SCHEDULE, pd.Series(None, frame.index, dtype=object))
    ids = group_ids(config_labels(frame, keys), keys)
    cascade = schedule.map(is_cascade).groupby(ids).any() & name.startswith("accuracy_")
    texts = [", ".join(filter(None, [flag, CASCADE * bool(one)])) for flag, one in zip(flags, cascade, strict=True)]
    return pd.DataFrame({"notes": texts} if any(texts) else {}, index=found.index)


def _head(keys: Sequence[str], values: Iterable[Any]) -> str:
    """A combination of values as text; different values never agree in it."""
    return ", ".join(f"{key}={_exact(value)}" for key, value in zip(keys, values, strict=True))


def _exact(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    short = format(value, "g")
    return "unset" if math.isnan(value) else short if float(short) == value else repr(value)


def _metrics(frame: pd.DataFrame, chosen: Iterable[float] | None) -> list[str]:
    """Names of the table's results, in its order."""
    known = {format(eps, "g"): eps for eps in _items(frame, "eps")}
    keys = sorted(known, key=lambda key: known[key])
    if chosen is not None:
        keys = [format(eps, "g") for eps in sorted(chosen)]
        if absent := [key for key in keys if key not in known]:
            raise ValueError(f"nothing was evaluated at eps {', '.join(absent)}, expected some of {', '.join(known)}")
    used = _items(frame, "attacks")
    ran = list(dict.fromkeys(str(name).partition("_eps_")[0] for name in frame.columns))  # an audit adds an attack
    attacks = [f"accuracy_{name}" for name in ATTACKS if name in used or f"accuracy_{name}" in ran]
    if SCHEDULE in frame and frame[SCHEDULE].map(is_cascade).any():  # as they ran: each is what the one before it left
        attacks.sort(key=lambda name: ran.index(name) if name in ran else len(ran))
    compared = [name for name in frame.columns if str(name).startswith("certified_accuracy_product_eps_")]
    by_product = ["certified_accuracy_product"] if bool(frame[compared].notna().any(axis=None)) else []
    kinds = ["certified_accuracy", *by_product, "certified_accuracy_attacked", "worst_case_accuracy", *attacks]
    kinds += ["certified_skipped"]
    found = [*OVERVIEW, *DISTANCES, *_COUNTS, *EFFORT, *(f"{kind}_eps_{key}" for key in keys for kind in kinds)]
    return [name for name in found if not name.startswith(_LATER) or _is_known(frame, name)]


def _is_known(frame: pd.DataFrame, name: str) -> bool:
    """Whether any run has a result of this name."""
    return name in frame and bool(frame[name].notna().any())


def _items(frame: pd.DataFrame, field: str) -> set[Any]:
    """All values in the lists of a field."""
    cells = frame.get(field, ())
    return {item for cell in cells if isinstance(cell, list | tuple | np.ndarray) for item in cell}


def _results(frame: pd.DataFrame) -> list[str]:
    """Names of all results that are numbers, those of the table first."""
    first = list(dict.fromkeys([*_metrics(frame, None), "tightness_median", *EFFORT]))
    others = [name for name in frame.columns if name not in {*first, *FIELDS, *_BOOKKEEPING}]
    return first + [name for name in others if _is_numeric(frame[name].dropna())]


def _is_numeric(values: "pd.Series[Any]") -> bool:
    return len(values) > 0 and all(isinstance(value, int | float | np.number | np.bool_) for value in values)


def _fields(names: str | Sequence[str]) -> list[str]:
    """Config fields to group by, checked."""
    fields = [names] if isinstance(names, str) else list(names)
    if not fields or len(set(fields)) < len(fields):
        raise ValueError(f"expected one or more different config fields, got {', '.join(fields) or 'none'}")
    _refuse_unknown("config field", fields, FIELDS)
    return fields


def _refuse_unknown(kind: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [name for name in given if name not in allowed]
    if not unknown:
        return
    hints = ((name, difflib.get_close_matches(name, allowed, n=2)) for name in unknown)
    named = ", ".join(repr(name) + (f" (did you mean {' or '.join(close)}?)" if close else "") for name, close in hints)
    raise ValueError(f"unknown {kind} {named}; allowed: {', '.join(allowed)}")

"""Runs grouped by config fields: mean and interval of each result over a group, and the state of the group's runs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .config import CONSTRAINTS

__all__ = ["BROKEN", "DIVERGED", "config_labels", "group_ids", "group_runs", "half_width", "in_order", "is_able"]

BROKEN, DIVERGED = "certificate broken", "diverged"
_STATES = (DIVERGED, BROKEN, "failed", "interrupted", "running", "pending")
_ORDER = {name: position for position, name in enumerate(CONSTRAINTS)}


def half_width(deviation: ArrayLike, count: ArrayLike) -> NDArray[np.float64]:
    """Half-width t_{0.975, n-1} s / sqrt(n) of the two-sided 95 % Student-t interval of a mean; NaN for n < 2.

    Args:
        deviation: the sample standard deviation s (divided by n - 1).
        count: the number n of values, of the same shape.
    """
    from scipy.special import stdtrit

    n = np.asarray(count, np.float64)
    enough = np.maximum(n, 2)
    width = stdtrit(enough - 1, 0.975) * np.asarray(deviation, np.float64) / np.sqrt(enough)
    return np.where(n >= 2, width, math.nan)


def is_able(status: str) -> bool:
    """Whether a row of this status may be the best of a column: no run of it diverged or broke its certificate."""
    return not any(word in status for word in (DIVERGED, BROKEN))


def group_runs(frame: pd.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """One row a combination of the keys' values, in order of first appearance.

    Columns: the keys; `runs`, their number, and `done`, that of the finished ones; `status`, empty where all is well,
    else how many runs are in which other state; then each metric, its mean over the finished runs that have it, and
    `<metric>_ci95`, the `half_width` of its interval. NaN where there is none.

    Args:
        frame: of `find_runs`.
        keys: config fields.
        metrics: results.

    Raises:
        ValueError: a result that is not a number.
    """
    labels = config_labels(frame, keys)
    ids = group_ids(labels, keys)
    done = frame["state"].eq("done")
    numbers = _numbers(frame, metrics).where(done)
    groups = numbers.groupby(ids)
    mean = groups.mean()
    width = half_width(groups.std(), groups.count())
    first = labels[~ids.duplicated()].reset_index(drop=True)
    columns: dict[str, Any] = {key: first[key] for key in keys}
    columns |= {"runs": ids.value_counts().sort_index(), "done": done.groupby(ids).sum()}
    columns |= {"status": _with_unattacked(_status(frame, ids), numbers, ids)}
    for at, metric in enumerate(metrics):
        columns |= {metric: mean[metric], f"{metric}_ci95": width[:, at]}
    return pd.DataFrame(columns)


def config_labels(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Config fields as values that can be compared and hashed; unset or unknown is NaN."""
    labels = frame.reindex(columns=list(keys))
    for key in keys:
        if labels[key].dtype == object:
            labels[key] = labels[key].map(_hashable)
    return labels


def group_ids(frame: pd.DataFrame, keys: Sequence[str]) -> "pd.Series[int]":
    """Number of each row's combination of values, counted from 0 by first appearance."""
    return frame.groupby(list(keys), sort=False, dropna=False).ngroup()


def in_order(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows sorted by config fields: constraints as they are listed, all else by size, unset last."""
    return frame.sort_values(
        list(keys),
        key=lambda column: column.map(_ORDER) if column.name == "constraint" else column,
        kind="stable",
    )


def _status(frame: pd.DataFrame, ids: "pd.Series[int]") -> list[str]:
    """Per group, how many runs are in which state other than done."""
    done = frame["state"].eq("done")
    blank = pd.Series(None, frame.index, dtype=object)
    broken = frame.get("error", blank).map(lambda text: isinstance(text, str) and text.startswith(BROKEN)).astype(bool)
    diverged = frame.get("diverged", blank).eq(True)
    states = frame["state"].mask(~done & broken, BROKEN).mask(done & diverged, DIVERGED)
    counts = states.groupby([ids, states]).size().unstack(fill_value=0)
    names = sorted(set(counts.columns) - {"done"}, key=_STATES.index)
    totals = counts.sum(axis="columns")
    texts = []
    for total, row in zip(totals, counts[names].itertuples(index=False), strict=True):
        found = [(count, name) for count, name in zip(row, names, strict=True) if count]
        texts.append(", ".join(name if count == total else f"{count} of {total} {name}" for count, name in found))
    return texts


def _with_unattacked(status: list[str], numbers: pd.DataFrame, ids: "pd.Series[int]") -> list[str]:
    """The status, with how many runs have no value under attack where others have: the means are of different runs."""
    values = numbers[[name for name in numbers.columns if str(name).startswith("worst_case_accuracy")]]
    done, attacked = numbers.notna().any(axis="columns"), values.notna().any(axis="columns")
    pairs = zip(attacked.groupby(ids).sum(), done.groupby(ids).sum(), strict=True)
    notes = [f"{n - m} of {n} not attacked" if 0 < m < n else "" for m, n in pairs]
    return [", ".join(filter(None, pair)) for pair in zip(status, notes, strict=True)]


def _numbers(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    numbers = frame.reindex(columns=list(metrics))
    for name in metrics:
        try:
            numbers[name] = pd.to_numeric(numbers[name]).astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected numbers in every summary.json ({error})") from error
    return numbers


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(format(item, "g") if isinstance(item, float) else str(item) for item in value)
    return math.nan if value is None else value

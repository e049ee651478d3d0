"""The series of a report: cells that differ in their seed only, named as people read them, and which ones are drawn."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from .attack_notes import counted, run_flags
from .config import BASELINES, CONSTRAINTS
from .grouping import config_labels, in_order
from .report_html import MISSING
from .tables import NAMES, differing_settings

SERIES_SHOWN = 60


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """The finished cells of one constraint and threshold within one setting, a row a seed."""

    setting: str
    constraint: str
    threshold: float
    rows: pd.DataFrame

    @property
    def panel(self) -> str:
        """Where it is drawn: its constraint, or "baselines"."""
        return "baselines" if self.constraint in BASELINES else self.constraint

    @property
    def label(self) -> str:
        """Its name within its panel, and in the legend."""
        return self.constraint if self.constraint in BASELINES else f"threshold {number(self.threshold)}"

    @property
    def name(self) -> str:
        """Its name anywhere."""
        return self.constraint if self.constraint in BASELINES else f"{self.constraint} {number(self.threshold)}"

    @property
    def kept(self) -> pd.DataFrame:
        """Its cells that did not diverge."""
        return self.rows[~self.rows["diverged"]]

    @property
    def doubts(self) -> list[str]:
        """Flags of the attacks on its cells, each with the number of cells that have it."""
        return counted(run_flags(self.rows))

    @property
    def note(self) -> str:
        """How many of its cells diverged, and flags of the attacks, or nothing."""
        lost = len(self.rows) - len(self.kept)
        return ", ".join([*([f"{lost} of {len(self.rows)} diverged"] if lost else []), *self.doubts])


def number(value: float) -> str:
    """A setting as people read it."""
    return "∞" if math.isinf(value) else format(value, "g")


def naming_fields(frame: pd.DataFrame) -> list[str]:
    """Fields that tell settings apart: data set, model and norm where they differ, and what differs within these."""
    known = frame.dropna(subset=[*NAMES])
    within = {field for _, part in known.groupby([*NAMES]) for field in differing_settings(part)}
    return [field for field in differing_settings(frame) if field in NAMES or field in within]


def setting_names(frame: pd.DataFrame) -> "pd.Series[str]":
    """One name a row for all settings in which runs differ beyond constraint, threshold and seed."""
    fields = naming_fields(frame) or list(NAMES)

    def name(row: dict[Any, Any]) -> str:
        return ", ".join(text(row[field]) if field in NAMES else f"{field} {text(row[field])}" for field in fields)

    return pd.Series([name(row) for row in frame[fields].to_dict("records")], frame.index, dtype=object)


def text(value: Any) -> str:
    """Any setting as people read it."""
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    if isinstance(value, float):
        return MISSING if math.isnan(value) else number(value)
    return MISSING if value is None else str(value)


def all_series(frame: pd.DataFrame) -> list[Series]:
    """Every series with a finished cell, by setting, constraint, threshold; `frame` has a column `setting`."""
    done = frame[frame["state"].eq("done")]
    groups = done.groupby(["setting", "constraint", "threshold"], sort=False)
    found = [Series(str(key[0]), str(key[1]), float(str(key[2])), rows) for key, rows in groups]
    fields = naming_fields(frame) or list(NAMES)
    order = frame["setting"].reindex(in_order(config_labels(frame, fields), fields).index).drop_duplicates().tolist()
    return sorted(found, key=lambda one: (order.index(one.setting), CONSTRAINTS.index(one.constraint), one.threshold))


def middle_eps(row: "pd.Series[Any]") -> float:
    """The middle one of a cell's positive eps; 0 where there is none."""
    positive = [eps for eps in row["eps"] if eps > 0] if isinstance(row["eps"], list | tuple) else []
    return positive[len(positive) // 2] if positive else 0.0


def score(row: "pd.Series[Any]") -> float:
    """Certified accuracy of a cell at its middle eps, -1 where it diverged or has none."""
    value = row.get(f"certified_accuracy_eps_{middle_eps(row):g}")
    return -1.0 if value is None or math.isnan(value) or row["diverged"] else float(value)


def best_of_each(
    items: Sequence[Any], bucket: Callable[[Any], Any], value: Callable[[Any], float], limit: int
) -> list[Any]:
    """At most `limit` items, in their order: the best of every bucket, then the second best of every one, and so on."""
    if len(items) <= limit:
        return list(items)
    values = [value(item) for item in items]
    buckets: dict[Any, list[int]] = {}
    for at in sorted(range(len(items)), key=lambda at: -values[at]):
        buckets.setdefault(bucket(items[at]), []).append(at)
    turns = sorted((turn, -values[at], at) for order in buckets.values() for turn, at in enumerate(order))
    return [items[at] for at in sorted(at for _, _, at in turns[:limit])]


def chosen_series(series: Sequence[Series]) -> list[Series]:
    """All, or the best 60: in turn the best of each constraint in each setting, by certified accuracy at middle eps."""

    def value(one: Series) -> float:
        return max(score(row) for _, row in one.rows.iterrows())

    return best_of_each(series, lambda one: (one.setting, one.constraint), value, SERIES_SHOWN)

"""What a reader must know of the attacks behind a result: doubts about them, their order, and what they cost.

Runs of earlier versions recorded none of it: for them nothing is said.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .grouping import config_labels, group_ids

__all__ = [
    "CASCADE",
    "INCOMPLETE",
    "SCHEDULE",
    "casts_doubt",
    "counted",
    "group_notes",
    "is_attacked",
    "is_cascade",
    "is_observed",
    "run_flags",
    "with_effort",
]

CASCADE, INCOMPLETE = "cascade", "attacks incomplete"
SCHEDULE = "attack_schedule"  # the config field
_OBSERVED = ("accuracy_", "worst_case_accuracy", "mean_distance")
_FLAG = re.compile(r"[a-z][a-z0-9-]*")


def is_observed(metric: str) -> bool:
    """Whether a result is what attacks found, and too good where they searched badly."""
    return metric.startswith(_OBSERVED)


def is_attacked(metric: str) -> bool:
    """Whether a result depends on what attacks found at all."""
    return is_observed(metric) or metric.startswith("tightness")


def is_cascade(schedule: Any) -> bool:
    """Whether a schedule, or one of several in a row, is a cascade: an attack tries what the cheaper ones left."""
    return isinstance(schedule, str) and CASCADE in schedule.split(", ")


def run_flags(frame: pd.DataFrame) -> "pd.Series[Any]":
    """What casts doubt on the attacks of each finished run, a list of names: signs of masked gradients, then
    "attacks incomplete" where a budget ended them.

    Args:
        frame: of `find_runs`; `masking_flags` is a list, or text with the names.
    """
    blank = pd.Series(None, frame.index, dtype=object)
    done = frame["state"].eq("done")
    masked = frame.get("masking_flags", blank).where(done)
    ended = done & frame.get("attack_complete", blank).eq(False)
    found = [[*_names(value), *[INCOMPLETE] * bool(cut)] for value, cut in zip(masked, ended, strict=True)]
    return pd.Series(found, frame.index, dtype=object)


def _names(value: Any) -> list[str]:
    if isinstance(value, str):
        return [name for name in _FLAG.findall(value) if name != "none"]
    return [str(name) for name in value] if isinstance(value, list | tuple | np.ndarray) else []


def casts_doubt(notes: str) -> bool:
    """Whether a text of flags names any; a cascade alone is none."""
    return bool(set(filter(None, notes.split(", "))) - {CASCADE})


def counted(flags: Iterable[Sequence[str]]) -> list[str]:
    """Each flag of some runs in words: "flat-loss" where all have it, else "1 of 3 flat-loss"."""
    runs = list(flags)
    names = dict.fromkeys(name for run in runs for name in run)
    counts = {name: sum(name in run for run in runs) for name in sorted(names, key=lambda name: name == INCOMPLETE)}
    return [name if count == len(runs) else f"{count} of {len(runs)} {name}" for name, count in counts.items()]


def group_notes(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """What is to know of each group of `group_runs`: columns `attack_schedule` and `flags`, each only where it matters.

    The schedule matters where any run has a cascade; as one of the keys it is left out here. Flags are those of the
    finished runs.
    """
    ids = group_ids(config_labels(frame, keys), keys)
    columns: dict[str, Any] = {}
    if SCHEDULE not in keys and SCHEDULE in frame and frame[SCHEDULE].eq(CASCADE).any():
        found = frame[SCHEDULE].dropna().groupby(ids).agg(lambda values: ", ".join(sorted(set(values))))
        columns[SCHEDULE] = found.reindex(range(ids.max() + 1), fill_value="")
    flags = run_flags(frame)
    if flags.map(len).any():
        done = frame["state"].eq("done")
        found = flags[done].groupby(ids[done]).agg(lambda runs: ", ".join(counted(runs)))
        columns["flags"] = found.reindex(range(ids.max() + 1), fill_value="")
    return pd.DataFrame(columns, index=range(ids.max() + 1))


def with_effort(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `gradients_per_sample` and `forwards_per_sample`, where known: what the attacks cost a sample."""
    if not {"attacked_count", "attack_gradients", "attack_forwards"} <= set(frame.columns):
        return frame
    attacked = pd.to_numeric(frame["attacked_count"])
    totals = {kind: pd.to_numeric(frame[f"attack_{kind}"]) for kind in ("gradients", "forwards")}
    return frame.assign(
        **{f"{kind}_per_sample": total / attacked.where(attacked > 0) for kind, total in totals.items()}
    )

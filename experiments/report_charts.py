"""What the charts of a report show, read from run folders as plain values.

Certified and observed shares are taken on the same samples, the attacked ones (all, where none was attacked). Diverged
cells are left out of them and counted in a note.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .config import BASELINES
from .grouping import half_width
from .report_series import Series
from .store import RunFolder

_Floats: TypeAlias = NDArray[np.float64]

POINTS_SHOWN = 4000
_EPOCHS_SHOWN = 200
_GRID_STEPS = 120
_HISTORY = ("gradient_norm", "validation_accuracy", "validation_certified_accuracy")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """What was certified and found on the attacked samples of one run (on all samples where none was attacked)."""

    cell: str
    index: NDArray[np.int64]
    label: NDArray[np.int64]
    correct: NDArray[np.bool_]
    radius: _Floats
    distance: _Floats  # NaN where not attacked


def read_samples(row: "pd.Series[Any]") -> Samples:
    """The samples of a finished cell that count; raises StoreError where its file is missing or damaged."""
    rows = RunFolder(Path(row["folder"])).read_samples()
    if rows["attacked"].any():
        rows = rows[rows["attacked"]]
    return Samples(
        row["id"],
        rows["index"].to_numpy(np.int64),
        rows["label"].to_numpy(np.int64),
        (rows["prediction"] == rows["label"]).to_numpy(bool),
        rows[f"radius_{row['norm']}"].to_numpy(np.float64),
        rows["distance"].to_numpy(np.float64),
    )


def shares_above(values: _Floats, eps: _Floats) -> _Floats:
    """Share of `values` above each eps: certified accuracy of radii, observed accuracy of distances; NaN if any is."""
    if not len(values) or np.isnan(values).any():
        return np.full(len(eps), math.nan)
    return (len(values) - np.searchsorted(np.sort(values), eps, side="right")) / len(values)


def eps_grid(end: float, marked: Iterable[float]) -> _Floats:
    """About 120 even steps of a round size from 0 to at least `end`, and the marked eps."""
    power = 10.0 ** math.floor(math.log10(end / _GRID_STEPS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= end / _GRID_STEPS)
    even = np.arange(math.ceil(end / step - 1e-9) + 1) * step
    return np.unique(np.round(np.concatenate([even, np.fromiter(marked, np.float64)]), 12))


def reach(samples: Samples) -> float:
    """Where a picture over eps may end: the attacks have all but won, or nothing is certified."""
    finite = samples.distance[np.isfinite(samples.distance)]
    if finite.any():
        return float(np.quantile(finite, 0.95))
    return float(samples.radius[np.isfinite(samples.radius)].max(initial=0.0))


def chart_data(series: Sequence[Series]) -> dict[str, Any]:
    """Settings with their eps, series with their curves, and the points of the scatter."""
    samples = [[read_samples(row) for _, row in one.kept.iterrows()] for one in series]
    settings, drawn = [], []
    for name in dict.fromkeys(one.setting for one in series):
        members = [at for at, one in enumerate(series) if one.setting == name]
        rows = pd.concat([series[at].rows for at in members])
        marked = sorted({eps for cell in rows["eps"] for eps in cell})
        ends = [reach(part) for at in members for part in samples[at]]
        grid = eps_grid(max([*ends, *(1.1 * eps for eps in marked)], default=1.0) or 1.0, marked)
        settings.append({"name": name, "norm": rows["norm"].iloc[0], "eps": marked, "grid": grid.tolist()})
        drawn += [_drawn(series[at], samples[at], grid, marked, len(settings) - 1) for at in members]
    _rank(drawn)
    points = list(_points(series, samples))
    return {"settings": settings, "series": drawn, **_scatter(points)}


def _drawn(one: Series, samples: Sequence[Samples], grid: _Floats, marked: Sequence[float], at: int) -> dict[str, Any]:
    """All that the page draws of a series."""
    at_eps = np.array(marked)
    return {
        "setting": at,
        "panel": one.panel,
        "label": one.label,
        "name": one.name,
        "threshold": one.threshold,
        "baseline": BASELINES.index(one.constraint) if one.constraint in BASELINES else None,
        "note": one.note,
        "certified": _mean([shares_above(part.radius, grid) for part in samples]),
        "observed": _mean([shares_above(part.distance, grid) for part in samples]),
        "sandwich": {
            "clean": _spread([np.full(len(marked), part.correct.mean()) for part in samples], len(marked)),
            "observed": _spread([shares_above(part.distance, at_eps) for part in samples], len(marked)),
            "certified": _spread([shares_above(part.radius, at_eps) for part in samples], len(marked)),
        },
        "history": _history(one),
        "bracket": [_average(one.kept.get(f"lipschitz_{end}")) for end in ("lower", "upper")],
        "tightness": _average(one.kept.get("tightness")),
        "tightness_median": _average(one.kept.get("tightness_median")),
        "seeds": len(one.kept),
    }


def _rank(drawn: Sequence[dict[str, Any]]) -> None:
    """Number the finite thresholds of the study: the page gives each a colour and a marker."""
    finite = sorted({one["threshold"] for one in drawn if math.isfinite(one["threshold"])})
    for one in drawn:
        one["rank"] = finite.index(one["threshold"]) if one["threshold"] in finite else None
        one["ranks"] = len(finite)


def _mean(curves: Sequence[_Floats]) -> list[float] | None:
    """Mean over the seeds; None where there is none, or one is undefined."""
    if not curves or np.isnan(curves).any():
        return None
    mean: list[float] = np.mean(curves, axis=0).round(5).tolist()
    return mean


def _spread(values: Sequence[_Floats], count: int) -> list[tuple[float | None, float | None]]:
    """Mean and half width of its 95 % interval over the seeds, for each eps."""
    if not values or np.isnan(values).any():
        return [(None, None)] * count
    width = half_width(np.std(values, axis=0, ddof=min(1, len(values) - 1)), np.full(count, len(values)))
    return list(zip(np.mean(values, axis=0).tolist(), width.tolist(), strict=True))


def _average(values: "pd.Series[Any] | None") -> float | None:
    mean = math.nan if values is None else float(pd.to_numeric(values).mean())
    return None if math.isnan(mean) else mean


def _history(one: Series) -> dict[str, list[float]]:
    """Means over the seeds by epoch, of the diverged cells only where there is no other; at most 200 epochs."""
    rows = one.kept if len(one.kept) else one.rows
    read = [RunFolder(Path(folder)).read_history() for folder in rows["folder"]]
    every = pd.concat([history.reindex(columns=["epoch", *_HISTORY]) for history in read])
    mean = every.groupby("epoch").mean()
    step = math.ceil(len(mean) / _EPOCHS_SHOWN)
    mean = mean.iloc[sorted({*range(0, len(mean), step), len(mean) - 1})] if step > 1 else mean
    columns = {name: [float(f"{value:.5g}") for value in mean[name]] for name in _HISTORY}
    return {"epoch": mean.index.tolist(), **columns}


def _points(series: Sequence[Series], samples: Sequence[Sequence[Samples]]) -> Iterator[tuple[Any, ...]]:
    """(series, cell, index, label, radius, distance) of every attacked sample that is classified right."""
    for at in range(len(series)):
        for part in samples[at]:
            keep = part.correct & ~np.isnan(part.distance)
            columns = (part.index, part.label, part.radius, part.distance)
            for row in zip(*(column[keep].tolist() for column in columns), strict=True):
                yield at, part.cell, *row


def _scatter(points: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """At most 4,000 points by a fixed seed, of which those inside a certified radius come first and never drop out."""
    broken = [point for point in points if point[4] > point[5]]
    others = [point for point in points if not point[4] > point[5]]
    room = max(0, POINTS_SHOWN - len(broken))
    if len(others) > room:
        picked = np.random.default_rng(0).choice(len(others), room, replace=False)
        others = [others[at] for at in sorted(picked.tolist())]
    shown = broken[:POINTS_SHOWN] + others
    cells = list(dict.fromkeys(point[1] for point in shown))
    places = {cell: at for at, cell in enumerate(cells)}
    rows = [(at, places[cell], index, label, *map(_short, ends)) for at, cell, index, label, *ends in shown]
    return {
        "point_cells": cells,
        "points": rows,
        "points_found": len(points),
        "points_broken": min(len(broken), POINTS_SHOWN),
        "broken_found": len(broken),
        "broken_cells": list(dict.fromkeys(point[1] for point in broken)),
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")

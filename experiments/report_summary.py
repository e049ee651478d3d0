"""The first screen of a report: what was studied, what came out, whether a certificate broke, on which machines."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from .config import BASELINES
from .grouping import is_able
from .report_html import Html, count, description, listed, percent, seconds, tag
from .report_series import number
from .report_table import STATES

_NORMS = {"l2": "\N{SCRIPT SMALL L}₂", "linf": "\N{SCRIPT SMALL L}∞", "l1": "\N{SCRIPT SMALL L}₁"}


def title_of(frame: pd.DataFrame) -> str:
    """What was studied, in a line."""
    return f"Robustness of {_values(frame, 'model', 4)} on {_values(frame, 'dataset', 4)}"


def lead_html(frame: pd.DataFrame) -> Html:
    """How many cells there are in which state, and the axes of the study."""
    states = {state: int(frame["state"].eq(state).sum()) for state in STATES}
    diverged = int(frame["diverged"].sum())
    told = [f"{number:,} {state}" for state, number in states.items() if number]
    if diverged:
        told[0] += f" ({diverged:,} of them diverged)"
    norms = [_NORMS.get(norm, norm) for norm in frame["norm"].dropna().unique()]
    facts = {
        "cells": (f"{len(frame):,}: " if len(told) > 1 else "") + ", ".join(told),
        "data sets": _values(frame, "dataset"),
        "models": _values(frame, "model"),
        "constraints": _values(frame, "constraint"),
        "thresholds": listed(map(number, sorted(frame["threshold"].dropna().unique()))),
        "seeds": _values(frame, "seed"),
        "perturbations": f"{listed(norms)} of size {listed(f'{eps:g}' for eps in _all(frame, 'eps'))}",
        "attacks": listed(_all(frame, "attacks")) or "none",
    }
    return description(facts, "facts")


def _values(frame: pd.DataFrame, field: str, limit: int = 8) -> str:
    values = sorted(frame[field].dropna().unique())
    return listed((int(value) if field == "seed" else value for value in values), limit) or "unknown"


def _all(frame: pd.DataFrame, field: str) -> list[Any]:
    """Every item of a setting that is a list."""
    return sorted({item for cell in frame[field] if isinstance(cell, list | tuple) for item in cell})


def verdict_html(
    frame: pd.DataFrame, broken: Sequence[tuple[str, str]], inside: int, inside_cells: Sequence[str]
) -> Html:
    """Whether any certificate was broken: by a cell's own check, or by a point inside a certified radius.

    Args:
        frame: of all cells.
        broken: cells that ended by it, each with what it says.
        inside: how many points of finished cells lie inside a certified radius.
        inside_cells: the cells of these.
    """
    if broken or inside:
        told = [tag("li", tag("code", cell), f" {error}") for cell, error in broken[:20]]
        if inside:
            points = count(inside, "adversarial example")
            told.append(tag("li", tag("code", listed(inside_cells)), f" {points} inside a certified radius"))
        return tag(
            "div",
            tag("strong", "A certificate was broken."),
            tag("p", "No certified number on this page can be trusted until the cause is found."),
            tag("ul", *told),
            class_="banner broken",
            role="alert",
        )
    if frame["state"].ne("done").all():
        words = "No cell is finished yet: there are no results to show."
        return tag("div", tag("strong", words), class_="banner empty")
    attacked = int(pd.to_numeric(frame["attacked_count"]).where(frame["attacks"].map(bool)).sum())
    if not attacked:
        return tag(
            "div", tag("strong", "Nothing was attacked"), ": no certificate was challenged.", class_="banner empty"
        )
    words = f": {count(attacked, 'sample')} attacked in all, no adversarial example inside a certified radius."
    return tag("div", tag("strong", "No certificate was broken"), words, class_="banner sound")


def headline_html(table: pd.DataFrame) -> Html:
    """The best certified accuracy at each eps, with the observed accuracy of the same cells, and the widest gap."""
    tiles = []
    several = table[["dataset", "model", "norm"]].drop_duplicates().shape[0] > 1
    widest: tuple[float, str] = (-1.0, "")
    metrics = [f"{name}" for name in table.columns]
    for metric in [name for name in metrics if re.fullmatch(r"certified_accuracy_eps_[^_]+", name)]:
        eps = metric.partition("_eps_")[2]
        for (dataset, norm), rows in table.groupby(["dataset", "norm"], sort=False):
            values = pd.to_numeric(rows[metric]).where(rows["status"].map(is_able))
            if values.isna().all():
                continue
            row = rows.iloc[int(values.argmax())]
            place = f"{dataset} · " if several else ""
            known = [_row_name(row, several), _observed(row, eps)]
            tiles.append(
                tag(
                    "div",
                    tag("dt", f"{place}certified at {_NORMS[str(norm)]} ε = {eps}"),
                    tag("dd", tag("b", percent(row[metric])), tag("span", "; ".join(filter(None, known)))),
                )
            )
        widest = max(widest, *_gaps(table, eps, several), key=lambda gap: gap[0])
    if widest[0] >= 0:
        points, where = widest
        shown = tag("dd", tag("b", f"{100 * points:.1f} points"), tag("span", where))
        tiles.append(tag("div", tag("dt", "widest gap, certified to observed"), shown))
    return tag("dl", *tiles, class_="tiles") if tiles else Html("")


def _observed(row: "pd.Series[Any]", eps: str) -> str:
    """What was observed; where some samples only were attacked, beside what is certified on these."""
    observed = row.get(f"worst_case_accuracy_eps_{eps}", math.nan)
    if math.isnan(observed):
        return ""
    if row["attacked_count"] >= row["test_count"]:
        return f"observed {percent(observed)}"
    certified = percent(row[f"certified_accuracy_attacked_eps_{eps}"])
    return f"on the attacked {row['attacked_count']:.0f}: {certified} certified, {percent(observed)} observed"


def _gaps(table: pd.DataFrame, eps: str, several: bool) -> list[tuple[float, str]]:
    """Observed minus certified accuracy, on the same samples, of each row at one eps."""
    names = [f"{kind}_eps_{eps}" for kind in ("worst_case_accuracy", "certified_accuracy_attacked")]
    if not set(names) <= set(table.columns):
        return [(-1.0, "")]
    gaps = pd.to_numeric(table[names[0]]) - pd.to_numeric(table[names[1]])
    if gaps.isna().all():
        return [(-1.0, "")]
    return [(float(gaps.max()), f"{_row_name(table.iloc[int(gaps.argmax())], several)}, ε = {eps}")]


def _row_name(row: "pd.Series[Any]", several: bool) -> str:
    threshold = "" if row["constraint"] in BASELINES else f" at threshold {number(row['threshold'])}"
    return (f"{row['model']}, " if several else "") + f"{row['constraint']}{threshold}"


def environment_html(frame: pd.DataFrame) -> Html:
    """Versions, machines and compute time of the finished cells."""
    done = frame[frame["state"].eq("done")]
    names = {"speccert_version": "speccert", "torch_version": "torch", "python_version": "Python", "machine": "machine"}
    facts = {name: listed(sorted(done[key].dropna().unique())) for key, name in names.items() if key in done}
    times = [pd.to_numeric(done[key]).sum() for key in ("train_s", "evaluate_s") if key in done]
    if times:
        facts["compute time"] = seconds(float(sum(times)))
    return description({key: value or "not recorded" for key, value in facts.items()}, "facts")

"""The first screen of a report: what was studied, what came out, whether a certificate broke, on which machines."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from .attack_notes import INCOMPLETE
from .config import BASELINES
from .grouping import is_able
from .report_html import Html, count, description, listed, percent, seconds, tag
from .report_series import Series, number
from .report_table import STATES

_SERIES_LISTED = 20
_MEANINGS = {
    "zero-gradients": "the loss has no gradient, or one that is not finite",
    "vanishing-gradients": "the gradient is next to 0: the outputs are saturated",
    "flat-loss": "a tiny step does not change the loss as the gradient says",
    "rough-loss": "a step of an attack brings far less than the gradient says",
    "random-outputs": "an input gets other logits when it is evaluated again",
    "black-box-wins": "a search without gradients breaks samples that gradient attacks do not",
    "unbounded-fails": "an attack free to go anywhere misses samples that another class is in reach of",
    "single-step-wins": "one gradient step breaks samples that many small ones do not",
    INCOMPLETE: "a budget ended them before all samples were attacked by all",
}
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
    spared = _spared(frame)
    if spared:
        words += f" Attacks at a fixed ε spared {count(spared, 'sample')} certified there; an audit attacks these too."
    return tag("div", tag("strong", "No certificate was broken"), words, class_="banner sound")


def _spared(frame: pd.DataFrame) -> int:
    """Samples that attacks at a fixed eps left out since they are certified there, at the eps with most of them."""
    skipped = frame[[name for name in frame.columns if str(name).startswith("certified_skipped_eps_")]]
    return int(skipped.apply(pd.to_numeric).max(axis="columns").sum()) if len(skipped.columns) else 0


def doubts_html(series: Sequence[Series]) -> Html:
    """The series whose attacks may have been too weak, each with its flags, and what these mean; or nothing."""
    doubted = [(one, one.doubts) for one in series if one.doubts]
    if not doubted:
        return Html("")
    several = len({one.setting for one in series}) > 1
    items = [
        tag("li", tag("b", f"{one.setting}: {one.name}" if several else one.name), f": {', '.join(doubts)}")
        for one, doubts in doubted[:_SERIES_LISTED]
    ]
    if len(doubted) > _SERIES_LISTED:
        items.append(tag("li", f"{len(doubted) - _SERIES_LISTED} more; the table names all"))
    names = [name for name in _MEANINGS if any(name in doubt for _, doubts in doubted for doubt in doubts)]
    meanings = "; ".join(f"{name}: {_MEANINGS[name]}" for name in names)
    return tag(
        "div",
        tag("strong", f"The attacks on {len(doubted)} of {len(series):,} series may have been too weak."),
        " What they observed may be too good; what is certified does not rest on them.",
        tag("ul", *items),
        tag("p", tag("small", f"{meanings}.")) if names else Html(""),
        class_="banner doubted",
        role="note",
    )


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
    tiles += _tightest(table, several)
    if widest[0] >= 0:
        points, where = widest
        shown = tag("dd", tag("b", f"{100 * points:.1f} points"), tag("span", where))
        tiles.append(tag("div", tag("dt", "widest gap, certified to observed"), shown))
    return tag("dl", *tiles, class_="tiles") if tiles else Html("")


def _tightest(table: pd.DataFrame, several: bool) -> list[Html]:
    """The largest median of radius over distance, and how far it moves over the rows."""
    if "tightness_median" not in table:
        return []
    medians = pd.to_numeric(table["tightness_median"]).where(table["status"].map(is_able))
    if medians.isna().all():
        return []
    best = int(medians.argmax())
    least = medians.min()
    span = f"; {least:.2f} to {medians.max():.2f} over all" if medians.count() > 1 else ""
    shown = tag("dd", tag("b", f"{medians.iloc[best]:.2f}"), tag("span", _row_name(table.iloc[best], several) + span))
    return [tag("div", tag("dt", "tightest: median radius / distance"), shown)]


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
    if effort := _effort(done):
        facts["cost of attacks"] = effort
    return description({key: value or "not recorded" for key, value in facts.items()}, "facts")


def _effort(done: pd.DataFrame) -> str:
    """What the attacks took: evaluations a sample over all cells that counted them, and their time."""
    names = ("attacked_count", "attack_gradients", "attack_forwards", "attack_s")
    if not set(names) <= set(done.columns):
        return ""
    samples, gradients, forwards, time = done[[*names]].apply(pd.to_numeric).dropna().sum()
    if not samples:
        return ""
    return f"{gradients / samples:,.0f} gradients and {forwards / samples:,.0f} forwards a sample, {seconds(time)}"

"""The robustness table of a report, as markup that the page's script sorts and filters."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from .attack_notes import SCHEDULE, casts_doubt, is_cascade, is_observed
from .config import FIELDS
from .grouping import is_able
from .report_html import MISSING, Html, count, joined, listed, tag
from .report_series import naming_fields, text

ROWS_SHOWN = 5000
STATES = ("done", "diverged", "running", "interrupted", "failed", "pending")
_BOUNDS = {
    "lipschitz_lower": "lower estimate",
    "mean_certified_radius": "mean certified radius",
    "mean_distance": "mean smallest distance",
    "gradient_norm": "gradient norm",
    "step_ratio": "step time ratio",
}
_EFFORT = {
    "gradients_per_sample": "gradients a sample",
    "forwards_per_sample": "forwards a sample",
    "attack_s": "seconds of attacks",
}
_AFTER = "After X: the accuracy that the attack X and the cheaper ones before it left."
_CASCADE = "In a cascade the accuracy of an attack is what it and the cheaper ones before it left."
_SPARED = "Spared: samples that attacks at this ε left out, since they are certified there."
_KINDS = {
    "certified_accuracy": ("certified", "main attacks"),
    "certified_accuracy_product": ("certified by the product", "main bounds"),
    "certified_accuracy_attacked": ("certified", "main attacks"),
    "worst_case_accuracy": ("observed", "main attacks"),
    "certified_skipped": ("spared", "attacks"),
}
_EXACT = ("lipschitz_upper", "certified_skipped", *_EFFORT)  # shown without an interval
_EVERYWHERE = ("certified_accuracy", "certified_accuracy_product")  # over all test samples


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of results: where its numbers are, its header in two lines, the views it belongs to."""

    metric: str
    header: str
    over: str = ""
    views: str = "main"

    @property
    def is_share(self) -> bool:
        return "accuracy" in self.metric


def table_html(table: pd.DataFrame, frame: pd.DataFrame) -> Html:
    """The table with a row a setting: results are means over seeds, ± the half-width of their 95 % interval.

    Args:
        table: of `robustness_table`, aggregated.
        frame: of `find_runs`, with `state` and `error`; says why results are missing.
    """
    labels = [name for name in table.columns if name in FIELDS]
    naming = {*naming_fields(frame), "constraint", "threshold"}
    differing = [name for name in labels if name in naming]
    columns = _columns([str(name) for name in table.columns], table)
    reasons = _reasons(frame, labels)
    rows = table.head(ROWS_SHOWN).to_dict("records")
    best = _best(rows, [column.metric for column in columns if column.is_share])
    body = [
        _row(row, differing, columns, reasons.get(tuple(text(row[name]) for name in labels), {}), best) for row in rows
    ]
    head = [_head(name, "", "label", name in ("threshold",)) for name in differing]
    head += [_head("flags", "", "label", False)] if "flags" in table else []
    head.append(_head("cells", "", "label", False))
    head += [_head(column.header, column.over, column.views, True) for column in columns]
    return joined(
        [
            tag("p", f"The first {ROWS_SHOWN:,} of {len(table):,} rows.", class_="note")
            if len(table) > ROWS_SHOWN
            else Html(""),
            tag(
                "div",
                tag(
                    "table",
                    tag("caption", _caption(table), class_="sr"),
                    tag("thead", tag("tr", *head)),
                    tag("tbody", *body),
                    id="robustness",
                    data_view="all",
                ),
                class_="scroll",
                tabindex="0",
                role="region",
                aria_label="Robustness table",
            ),
            _notes(table),
        ]
    )


def _notes(table: pd.DataFrame) -> Html:
    """What the headers of the attacks mean."""
    cascade = SCHEDULE in table and table[SCHEDULE].map(is_cascade).any()
    told = [_AFTER if _is_all_cascade(table) else _CASCADE] if cascade else []
    told += [_SPARED] if any(str(name).startswith("certified_skipped") for name in table.columns) else []
    return tag("p", " ".join(told), class_="note") if told else Html("")


def _is_all_cascade(table: pd.DataFrame) -> bool:
    return SCHEDULE in table and bool(table[SCHEDULE].map(is_cascade).all())


def _caption(table: pd.DataFrame) -> str:
    return f"Certified and observed robustness, {count(len(table), 'row')}; accuracies in percent"


def _columns(names: Sequence[str], table: pd.DataFrame) -> list[_Column]:
    """What the table holds, in reading order; the rest of a cell's results is in its summary.json."""
    found = [_Column("clean_accuracy", "clean")]
    subset = bool((table["attacked_count"] < table["test_count"]).any())
    after = "after " if _is_all_cascade(table) else ""
    for metric in names:
        kind, _, eps = metric.partition("_eps_")
        if not eps or metric.endswith("_ci95") or (kind == "certified_accuracy_attacked" and not subset):
            continue
        header, views = _KINDS.get(kind, (after + kind.removeprefix("accuracy_"), "attacks"))
        samples = "" if not subset else ", all" if kind in _EVERYWHERE else ", attacked"
        found.append(_Column(metric, header, f"ε = {eps}{samples}", views))  # comparable over the same samples only
    found.append(_Column("lipschitz_upper", "Lipschitz bound", views="main bounds"))
    found.append(_Column("tightness_median", "radius / distance", "median", "main bounds"))
    found.append(_Column("tightness", "tightness", views="bounds" if "tightness_median" in names else "main bounds"))
    found += [_Column(metric, header, views="attacks") for metric, header in _EFFORT.items()]
    found += [_Column(metric, header, views="bounds") for metric, header in _BOUNDS.items()]
    return [column for column in found if column.metric in names]


def _head(name: str, over: str, views: str, numeric: bool) -> Html:
    inner = joined([tag("small", over), Html("<br>"), name]) if over else joined([name])
    classes = " ".join([*(f"v-{view}" for view in views.split()), *(["num"] if numeric else [])])
    return tag("th", tag("button", inner, type="button", class_="sort"), scope="col", class_=classes, aria_sort="none")


def _row(
    row: Mapping[Hashable, Any],
    labels: Sequence[str],
    columns: Sequence[_Column],
    reasons: Mapping[str, list[str]],
    best: Mapping[tuple[str, ...], float],
) -> Html:
    cells = []
    for at, name in enumerate(labels):
        value = row[name]
        number = float(value) if isinstance(value, float) and not math.isnan(value) else None
        cells.append(
            tag(
                "th" if at == 0 else "td",
                text(value),
                scope="row" if at == 0 else None,
                class_="v-label num" if name == "threshold" else "v-label",
                data_v=number,
            )
        )
    if "flags" in row:
        cells.append(tag("td", row["flags"] or MISSING, class_="v-label flags"))
    cells.append(_state(reasons))
    cells += [_result(row, column, best.get(_place(row, column.metric), math.nan)) for column in columns]
    states = " ".join(reasons)
    return tag("tr", *cells, data_states=states, class_=None if "done" in reasons else "missing")


def _state(reasons: Mapping[str, list[str]]) -> Html:
    """How many cells are in which state, and why those failed."""
    total = sum(len(errors) for state, errors in reasons.items() if state != "diverged")
    parts: list[str] = []
    for state, errors in reasons.items():
        words = (
            str(total) if len(reasons) == 1 and state == "done" else f"{len(errors)} {state}" if total > 1 else state
        )
        parts += [" ", tag("span", words, class_=f"state {state}")]
        if told := list(dict.fromkeys(error for error in errors if error)):
            parts += [" ", tag("span", listed(told, 2), class_="why")]
    return tag("td", *parts[1:], class_="v-label states", data_v=len(reasons.get("done", ())))


def _result(row: Mapping[Hashable, Any], column: _Column, best: float) -> Html:
    value = row[column.metric]
    spread = row[f"{column.metric}_ci95"]
    classes = " ".join([*(f"v-{view}" for view in column.views.split()), "num"])
    if math.isnan(value):
        return tag("td", MISSING, class_=classes + " none", title="missing")
    scale, digits = (100.0, ".1f") if column.is_share else (1.0, ".4g")
    shown: list[str] = [format(scale * value, digits)]
    if not math.isnan(spread) and not column.metric.startswith(_EXACT):
        shown.append(tag("small", f" ± {format(scale * spread, '.1f' if column.is_share else '.1g')}"))
    marked = value == best and _may_win(row, column.metric)
    return tag("td", *shown, class_=classes + (" best" if marked else ""), data_v=f"{value:.6g}")


def _best(rows: Sequence[Mapping[Hashable, Any]], metrics: Sequence[str]) -> dict[tuple[str, ...], float]:
    """The largest of several numbers of each metric, for each data set and norm."""
    values: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        for metric in metrics:
            if not math.isnan(row[metric]) and _may_win(row, metric):
                values.setdefault(_place(row, metric), []).append(row[metric])
    return {place: max(found) for place, found in values.items() if len(found) > 1}


def _may_win(row: Mapping[Hashable, Any], metric: str) -> bool:
    """Whether a row may be the best of a column: no run of it is broken, and no attack whose result it is doubted."""
    return is_able(str(row["status"])) and not (is_observed(metric) and casts_doubt(str(row.get("flags", ""))))


def _place(row: Mapping[Hashable, Any], metric: str) -> tuple[str, ...]:
    return metric, text(row["dataset"]), text(row["norm"])


def _reasons(frame: pd.DataFrame, labels: Sequence[str]) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """By row of the table, the states of its cells, each with their errors ("" is none); diverged ones are done too."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in frame.to_dict("records"):
        states = found.setdefault(tuple(text(row[name]) for name in labels), {})
        states.setdefault(row["state"], []).append(row["error"] or "")
        if row["diverged"]:
            states.setdefault("diverged", []).append("")
    return {key: dict(sorted(states.items(), key=lambda item: STATES.index(item[0]))) for key, states in found.items()}

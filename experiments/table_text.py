"""A table cut into blocks of text: what every writer for people shows, before its own marks and escapes."""

import dataclasses
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .attack_notes import CASCADE, SCHEDULE, casts_doubt, is_attacked, is_cascade, is_observed
from .grouping import BROKEN, DIVERGED, config_labels, group_ids, is_able
from .tables import DISTANCES, EFFORT, NAMES, OVERVIEW

__all__ = ["MISSING", "Block", "Cell", "blocks"]

_Align: TypeAlias = Literal["left", "right"]
_Floats: TypeAlias = NDArray[np.float64]

MISSING = "\N{EN DASH}"
_TINY = 1e-300  # shown as 0: below it a power of ten may not be a float
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
    "tightness_median": "median radius/distance",
    "attacked_count": "samples attacked",
    "gradients_per_sample": "gradients a sample",
    "forwards_per_sample": "forwards a sample",
    "attack_s": "seconds",
    "certified_accuracy": "certified",
    "certified_accuracy_product": "certified (product)",
    "certified_accuracy_attacked": "certified (attacked)",
    "worst_case_accuracy": "worst case",
}
_AFTER_NOTE = "after X: accuracy left by the attack X and the cheaper ones before it"
_CASCADE_NOTE = "cascade: the accuracy of an attack is what it and the cheaper ones before it left"
_DOUBT_NOTE = "attacks with flags may have been too weak: masked gradients, or a budget that ended them"
_SPARED_NOTE = "spared: samples that attacks at that ε left out, since they are certified there"
_COUNTS = ("attacked_count", "certified_skipped", *EFFORT)  # shown without an interval


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell as people read it."""

    text: str
    note: str = ""  # the state of the runs behind it, where not all is well
    best: bool = False
    bad: bool = False  # a run behind it diverged, failed, or its certificate broke

    def shown(self, mark: str = "{}", escape: Callable[[str], str] = str) -> str:
        """Its text, marked where it is the best, and its note."""
        text = escape(self.text)
        return (mark.format(text) if self.best else text) + (escape(f" ({self.note})") if self.note else "")

    @property
    def style(self) -> str:
        """How a terminal shows it."""
        return " ".join(["bold"] * self.best + ["red"] * self.bad)


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the table as people read it."""

    title: str
    headers: list[str]
    rows: list[tuple[Cell, ...]]
    align: list[_Align]
    notes: list[str]  # lines below it


@dataclasses.dataclass(frozen=True)
class _Column:
    header: str
    cells: list[Cell]
    align: _Align

    @property
    def width(self) -> int:
        """Characters with the padding, the header broken at every space."""
        return 3 + max(map(len, [*self.header.split(), *(cell.shown() for cell in self.cells)]))


def blocks(table: pd.DataFrame, width: float, *, wide: bool = True) -> list[Block]:
    """Cut the columns into accuracy and bounds, distances, one block an eps, and the attacks' cost, with rows' labels.

    Blocks of what attacks found name the flags of the attacks; notes below say what they mean.

    Args:
        table: of `tables`.
        width: characters that a block may have.
        wide: also show the seconds of the attacks, and how many certified samples they spared.
    """
    names = [str(name) for name in table.columns]
    pivoted = [name for name in names if "[" in name]
    start = names.index(pivoted[0]) if pivoted else _start(names)
    constant = _constant(table) if not pivoted else []
    setting = ", ".join(("bound " if name == "bound" else "") + _label(table[name].iloc[0]) for name in constant)
    shown = [name for name in names[:start] if name not in constant and _is_shown(table, name)]
    found = []
    for title, metrics in _groups(table, names[start:], wide).items():
        labels = [_label_column(table, name) for name in shown if name != "flags" or any(map(is_attacked, metrics))]
        for chunk in _chunks([_column(table, metric) for metric in metrics], width - sum(one.width for one in labels)):
            columns = [*labels, *chunk]
            spread = ", mean ± 95 % interval" if any("±" in cell.text for one in chunk for cell in one.cells) else ""
            rows = list(zip(*(one.cells for one in columns), strict=True))
            heads = [one.header for one in columns]
            full = (f"{setting}: {title}" if setting else title) + spread
            found.append(Block(full, heads, rows, [one.align for one in columns], []))
        found[-1].notes.extend(_notes(table, metrics))
    return found


def _start(names: Sequence[str]) -> int:
    """Where the results of a robustness table begin."""
    return 1 + max(names.index(name) for name in ("status", "flags", SCHEDULE) if name in names)


def _notes(table: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """What the flags, and the headers of attacks, mean that stand in blocks of these results."""
    places = [f"notes[{name.partition('[')[2]}" for name in metrics if "[" in name]
    words = {word for name in places for text in table.get(name, ()) for word in text.split(", ")}
    marks = _marks(table) if any(map(is_attacked, metrics)) and not places else {}
    single = any(name.startswith("accuracy_") for name in metrics) and not places
    cascade = CASCADE in words or (single and SCHEDULE in table and table[SCHEDULE].map(is_cascade).any())
    notes = {
        _AFTER_NOTE if _is_all_cascade(table) else _CASCADE_NOTE: cascade,
        **{f"{mark}: {text}": True for text, mark in marks.items()},
        _DOUBT_NOTE: bool(marks or words - {"", CASCADE}),
        _SPARED_NOTE: any(name.startswith("certified_skipped") for name in metrics),
    }
    return [note for note, is_true in notes.items() if is_true]


def _marks(table: pd.DataFrame) -> dict[str, str]:
    """A letter for each text of flags, which would be wider than all else."""
    texts = dict.fromkeys(text for text in table.get("flags", ()) if text)
    letters = string.ascii_uppercase
    return {text: letters[at // 26 - 1] * (at >= 26) + letters[at % 26] for at, text in enumerate(texts)}


def _is_all_cascade(table: pd.DataFrame) -> bool:
    return SCHEDULE in table and bool(table[SCHEDULE].map(is_cascade).all())


def _constant(table: pd.DataFrame) -> list[str]:
    """Data set, model, norm and bound where all rows share them: part of the title, not columns."""
    if not {*NAMES, "constraint", "threshold"} <= set(table.columns):
        return []
    known = [name for name in (*NAMES, "bound") if name in table.columns]
    return [name for name in known if table[name].nunique(dropna=False) == 1]


def _is_shown(table: pd.DataFrame, name: str) -> bool:
    """Whether a label says something."""
    if name == "runs":
        return bool(table["runs"].max() > 1)
    if name == "done":
        return bool(table["done"].ne(table["runs"]).any() and table["runs"].max() > 1)
    if name == SCHEDULE:
        return table[name].nunique(dropna=False) > 1
    return name != "status" or bool(table["status"].ne("").any())


def _groups(table: pd.DataFrame, names: Sequence[str], wide: bool) -> dict[str, list[str]]:
    """Results by the title of their block."""
    values = [name for name in names if not name.partition("[")[0].endswith("_ci95")]
    pivoted = [name for name in values if "[" in name and not name.startswith(("runs[", "status[", "notes["))]
    if pivoted:
        return {_pivot_title(pivoted[0].partition("[")[0]): pivoted}
    subset = bool((table["attacked_count"] < table["test_count"]).any())
    values = [name for name in values if subset or "_attacked" not in name]
    groups = {
        "accuracy and bounds": [name for name in values if name in OVERVIEW],
        "radii and distances in input units": [name for name in values if name in DISTANCES],
    }
    for name in values:
        if (key := name.partition("_eps_")[2]) and "accuracy" in name:
            groups.setdefault(f"accuracy (%) at ε = {key}", []).append(name)
    effort = [name for name in values if name in (EFFORT if wide else EFFORT[:2])]
    skipped = [name for name in values if name.startswith("certified_skipped") and wide]
    return groups | ({"attacks": ["attacked_count", *effort, *skipped]} if effort else {})


def _pivot_title(value: str) -> str:
    key = value.partition("_eps_")[2]
    return f"{_header(value)} accuracy (%) at ε = {key}" if key else _header(value)


def _chunks(columns: Sequence[_Column], width: float) -> list[list[_Column]]:
    """Share the columns out so that each block fits the width that the labels leave."""
    chunks: list[list[_Column]] = []
    room = 0.0
    for column in columns:
        if column.width > room or not chunks:
            chunks.append([])
            room = width
        chunks[-1].append(column)
        room -= column.width
    return chunks


def _label_column(table: pd.DataFrame, name: str) -> _Column:
    numeric = pd.api.types.is_numeric_dtype(table[name])
    bad = map(_is_bad, table["status"] if "status" in table else [""] * len(table))
    marks = _marks(table) if name == "flags" else {}
    values = [marks.get(value, "") for value in table[name]] if name == "flags" else table[name]
    cells = [Cell(_label(value), bad=one) for value, one in zip(values, bad, strict=True)]
    return _Column(name, cells, "right" if numeric else "left")


def _label(value: Any) -> str:
    if isinstance(value, float):
        return MISSING if math.isnan(value) else "∞" if math.isinf(value) else format(value, "g")
    return MISSING if value is None else str(value)


def _column(table: pd.DataFrame, name: str) -> _Column:
    """The cells of a result; in a pivot each with the state of its runs, blank where none are planned."""
    value, bracket, head = name.partition("[")
    place = bracket + head
    interval = "" if value.startswith(_COUNTS) else f"{value}_ci95{place}"
    half = table.get(interval, pd.Series(math.nan, table.index))
    status = table[f"status{place}"].tolist()
    doubts = table.get(f"notes{place}" if place else "flags", pd.Series("", table.index)).tolist()
    able = [
        is_able(one) and not (is_observed(value) and casts_doubt(doubt))
        for one, doubt in zip(status, doubts, strict=True)
    ]
    told = [", ".join(filter(None, pair)) if place else "" for pair in zip(status, doubts, strict=True)]
    planned = table[f"runs{place}"].tolist() if place else [1] * len(table)
    shown = [_mean(*pair, percent="accuracy" in value) for pair in zip(table[name], half, strict=True)]
    best = [False] * len(table)
    means, numbers = table[name].to_numpy(np.float64), [number for _, number in shown]
    for rows in _comparable(table):
        found = _best(means[rows], [numbers[at] for at in rows], [able[at] for at in rows], _direction(value))
        for at, one in zip(rows, found, strict=True):
            best[at] = one
    cells = [
        Cell(text, note, first, _is_bad(state)) if count else Cell("")
        for (text, _), note, state, first, count in zip(shown, told, status, best, planned, strict=True)
    ]
    header = re.sub(r"=inf(?=,|$)", "=∞", head.removesuffix("]")) or _header(value, cascade=_is_all_cascade(table))
    return _Column(header, cells, "right")


def _comparable(table: pd.DataFrame) -> list[list[int]]:
    """Positions of the rows of each data set and norm: only these compete for the best of a column."""
    keys = [name for name in ("dataset", "norm") if name in table.columns]
    if not keys or table.empty:
        return [list(range(len(table)))]
    ids = group_ids(config_labels(table, keys), keys).tolist()
    return [[at for at, one in enumerate(ids) if one == group] for group in sorted(set(ids))]


def _header(metric: str, *, cascade: bool = False) -> str:
    kind, _, eps = metric.partition("_eps_")
    if kind == "certified_skipped":
        return f"spared at {eps}"
    if cascade and kind.startswith("accuracy_"):
        return f"after {kind.removeprefix('accuracy_')}"
    return _HEADERS.get(kind, kind.removeprefix("accuracy_"))


def _direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where a column has no best."""
    if "accuracy" in metric or metric in DISTANCES:
        return 1
    return -1 if metric == "step_ratio" else 0


def _best(means: _Floats, shown: Sequence[float], fit: Sequence[bool], direction: int) -> list[bool]:
    """Which rows are best, with those that look equal as they are shown; none where fewer than two have a number."""
    known = ~np.isnan(means)
    able = known & np.array(fit)
    if not direction or np.count_nonzero(known) < 2 or not able.any():
        return [False] * len(means)
    top = means == direction * (direction * means[able]).max()
    equal = set(np.asarray(shown)[able & top])
    return [bool(one and (first or text in equal)) for one, first, text in zip(able, top, shown, strict=True)]


def _is_bad(status: str) -> bool:
    return any(word in status for word in (DIVERGED, BROKEN, "failed"))


def _mean(mean: float, half: float, *, percent: bool) -> tuple[str, float]:
    """Mean ± half-width as text, and the mean as it is shown there; a NaN half-width is left out.

    Accuracies have one decimal, in percent. Else the half-width has at most two significant digits, and the mean, of
    five at most, ends at the same place.
    """
    if math.isnan(mean):
        return MISSING, math.nan
    if percent:
        text = f"{100 * mean:.1f}"
        return text + ("" if math.isnan(half) else f" ± {100 * half:.1f}"), float(text)
    if math.isinf(mean) or math.isnan(half):
        return _plain(mean), float(_plain(mean).replace("∞", "inf"))
    mean, half = (number if abs(number) > _TINY else 0.0 for number in (mean, half))
    size = _exponent(max(abs(mean), half))
    place = max(_exponent(half) - 1, size - 4)  # power of ten of the last digit shown
    if half < 0.5 * 10.0**place:
        return f"{_plain(mean)} ± 0", float(_plain(mean))
    power = 0 if -4 <= size < 5 else size
    shown, width = (_until(number / 10.0**power, place - power) for number in (mean, half))
    text = f"{shown} ± {width}"
    return (f"({text})e{power}", float(f"{shown}e{power}")) if power else (text, float(shown))


def _plain(number: float) -> str:
    """Four significant digits; whole numbers, as counts are, in full."""
    whole = math.isfinite(number) and number == round(number) and abs(number) < 1e6
    return f"{number:.0f}" if whole else f"{number:.4g}".replace("inf", "∞")


def _exponent(number: float) -> int:
    """Power of ten of the first digit of the number, rounded to two."""
    return int(f"{number:.1e}".partition("e")[2])


def _until(number: float, place: int) -> str:
    """The number rounded to a power of ten."""
    return f"{round(number, -place) + 0.0:.{max(0, -place)}f}"  # + 0.0 takes the sign off a zero

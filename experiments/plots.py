"""Pictures of a sweep, made from run folders alone: certified and observed robustness side by side.

Every function gives a matplotlib `Figure` of its own and leaves pyplot and the rc settings alone. Certified and
observed values in one picture are taken on the same samples, the attacked ones, so that certified can be seen to
stay below observed. Distances and eps are in raw input units. Unfinished runs are left out; so are diverged ones, but
the legend names them. A dagger marks series with flags: signs of masked gradients, or attacks that a budget ended.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .attack_notes import run_flags
from .config import BASELINES, CONSTRAINTS
from .grouping import half_width
from .pictures import BROKEN, CERTIFIED, NORMS, OBSERVED, bracket_figure, closest_figure, tightness
from .report_cells import load_closest
from .report_series import score
from .store import RunFolder, write_atomic
from .tables import Runs, collect_runs, differing_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

__all__ = [
    "bracket_figure",
    "closest_figure",
    "plot_accuracy_over_eps",
    "plot_gradient_norms",
    "plot_radius_against_distance",
    "plot_sandwich",
    "plot_tightness",
    "save_figure",
    "write_figures",
]

_Floats: TypeAlias = NDArray[np.float64]
_Colour: TypeAlias = str | tuple[float, float, float, float]
_Style: TypeAlias = Literal["-", "--", ":", ""]

_BASELINE_COLOURS = dict(zip(BASELINES, ("#000000", "#D55E00", "#CC79A7"), strict=True))  # of Okabe and Ito
_CLEAN = "#555555"
_DASHED: Literal["--"] = "--"
_MARKERS = "osDvp*hd"
_PANEL_INCHES = (3.3, 2.6)  # a panel is as wide as a column of a paper
_PANELS_A_ROW = 3
_GRID_POINTS = 401
_DOUBT = "†"  # beside the name of a series whose attacks may have been too weak


@dataclasses.dataclass(frozen=True)
class _Series:
    """The runs of one constraint and threshold, one a seed, and how they are drawn."""

    constraint: str
    threshold: float
    label: str
    colour: _Colour
    marker: str
    folders: tuple[RunFolder, ...]


@dataclasses.dataclass(frozen=True)
class _Samples:
    """What was certified and found on the attacked samples of one run (on all samples where none was attacked)."""

    correct: NDArray[np.bool_]
    radius: _Floats
    distance: _Floats  # NaN where not attacked

    def certified(self, eps: _Floats) -> _Floats:
        """Share certified at each eps."""
        positive = np.sort(self.radius[self.radius > 0])
        return (len(positive) - np.searchsorted(positive, eps, side="right")) / len(self.radius)

    def observed(self, eps: _Floats) -> _Floats:
        """Share with no adversarial example found within each eps; NaN where none was searched for."""
        if np.isnan(self.distance).any():
            return np.full(len(eps), math.nan)
        return (len(self.distance) - np.searchsorted(np.sort(self.distance), eps, side="right")) / len(self.distance)

    def quartiles(self) -> _Floats:  # [3]
        """Lower quartile, median and upper quartile of radius / distance; NaN where no distance was found."""
        ratios = tightness(self.radius[self.correct], self.distance[self.correct])
        return np.quantile(ratios, [0.25, 0.5, 0.75]) if len(ratios) else np.full(3, math.nan)


def write_figures(runs: Runs, folder: str | Path) -> list[Path]:
    """Write every picture, as PDF and PNG: one of each kind, and a sandwich for each eps of the configs.

    Where runs differ in more than constraint, threshold and seed, each setting gets a sub-folder of its own. Pictures
    of distances are made only where there were attacks; those of single samples, `closest_<constraint>` and
    `bracket_<constraint>`, for the best run of each constraint by certified accuracy at the middle eps.

    Raises:
        ValueError: no finished run, a damaged run folder, or a folder that cannot be written.
    """
    finished = _finished(runs)
    differing = differing_settings(finished)
    if differing:
        settings = finished[differing].to_dict("records")
        names = pd.Series([",".join(f"{key}={_setting(row[key])}" for key in row) for row in settings], finished.index)
        parts = {name: finished[names.eq(name)] for name in sorted(set(names))}
        paths = [write_figures(part, Path(folder) / re.sub(r"[^\w.,=-]+", "_", name)) for name, part in parts.items()]
        return [path for written in paths for path in written]
    figures = {"accuracy_over_eps": plot_accuracy_over_eps(finished), "gradient_norms": plot_gradient_norms(finished)}
    for eps in sorted({eps for cell in finished["eps"] for eps in cell}):
        figures[f"sandwich_eps_{eps:g}"] = plot_sandwich(finished, eps)
    if finished["attacks"].map(len).any() and not finished["diverged"].eq(True).all():
        figures["radius_against_distance"] = plot_radius_against_distance(finished)
        figures["tightness"] = plot_tightness(finished)
        figures |= _figures_of_samples(finished)
    return [path for name, figure in figures.items() for path in save_figure(figure, Path(folder) / name)]


def _figures_of_samples(finished: pd.DataFrame) -> dict[str, "Figure"]:
    """Nearest adversarial examples and brackets of the best run of each constraint, where it has any."""
    able = finished[~finished["diverged"].eq(True) & finished["attacks"].map(len).gt(0)].assign(diverged=False)
    figures = {}
    for constraint, group in able.groupby("constraint"):
        row = max((row for _, row in group.iterrows()), key=score)
        folder = RunFolder(Path(row["folder"]))
        samples, closest = folder.read_samples(), load_closest(folder)
        at = "" if constraint in BASELINES else f" {row['threshold']:g}"
        name = f"{constraint}{at}, seed {row['seed']} ({row['id']})".replace("inf", "∞")
        figures[f"bracket_{constraint}"] = bracket_figure(samples, row["norm"], name=name)
        if closest is not None and len(closest["x"]):
            figures[f"closest_{constraint}"] = closest_figure(closest, name=name)
    return figures


def _setting(value: object) -> str:
    """A setting in the name of a folder."""
    if isinstance(value, float):
        return "unset" if math.isnan(value) else f"{value:g}"
    return "unset" if value is None else str(value)


def plot_accuracy_over_eps(runs: Runs, *, eps_max: float | None = None) -> "Figure":
    """Certified (solid) and worst observed (dashed) accuracy over eps: a panel a constraint, a colour a threshold.

    Certified at eps: the share of samples with radius >= eps and > 0. Observed: the share whose smallest adversarial
    distance found is > eps. Seeds are averaged.

    Args:
        runs: an output folder, several, or the frame of `find_runs`.
        eps_max: end of the eps axis, > 0; by default where the attacks have succeeded on 95 % of the samples.

    Raises:
        ValueError: no finished run, or runs that differ in more than constraint, threshold and seed.
    """
    panels, norm = _panels(runs)
    samples = _all_samples(panels, norm)
    end = max(map(_reach, samples.values()), default=1.0) if eps_max is None else eps_max
    eps = np.linspace(0.0, end, _GRID_POINTS)

    def draw(axes: "Axes", panel: Sequence[_Series]) -> None:
        for one in panel:
            if not one.folders:
                continue
            certified = np.mean([samples[folder].certified(eps) for folder in one.folders], axis=0)
            observed = np.mean([samples[folder].observed(eps) for folder in one.folders], axis=0)
            axes.plot(eps, 100 * certified, color=one.colour, linewidth=1.5)
            axes.plot(eps, 100 * observed, color=one.colour, linewidth=1.2, linestyle=_DASHED)
        axes.set(xlim=(0, end), ylim=(0, 102), ylabel="accuracy (%)")
        axes.set_xlabel(f"perturbation size ε ({NORMS[norm]}, input units)")

    handles = [*_series_handles(panels), _line("certified", "0.5"), _line("under attack", "0.5", style=_DASHED)]
    handles += _doubts(panels.values())
    return _figure(panels, draw, handles)


def plot_sandwich(runs: Runs, eps: float) -> "Figure":
    """Clean, worst observed and certified accuracy at one eps over the thresholds, the gap between the last two filled.

    The true robust accuracy lies in the filled area. A panel a constraint; the baselines stand at its right. Points are
    means over the seeds, bars the 95 % intervals of these means (see `half_width`), none where there is one seed.

    Args:
        runs: an output folder, several, or the frame of `find_runs`.
        eps: size of the perturbation in raw input units, >= 0 and finite.

    Raises:
        ValueError: a bad eps, no finished run, or runs that differ in more than constraint, threshold and seed.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps!r}")
    panels, norm = _panels(runs)
    samples = _all_samples(panels, norm)
    baselines = panels.pop("baselines", [])

    def draw(axes: "Axes", panel: Sequence[_Series]) -> None:
        def draw_part(positions: Sequence[int], part: Sequence[_Series]) -> None:
            points = [_Point.of([samples[folder] for folder in one.folders], eps) for one in part]
            _draw_sandwich(axes, positions, points)

        _over_thresholds(axes, panel, baselines, draw_part)
        axes.set(ylim=(-3, 103), ylabel=f"accuracy (%) at ε = {eps:g} ({NORMS[norm]})")

    handles = [
        _line("clean", _CLEAN, style=":", marker="s"),
        _line("under attack", OBSERVED, style=_DASHED, marker="o"),
        _line("certified", CERTIFIED, marker="^"),
        *_doubts([*panels.values(), baselines]),
    ]
    return _figure(panels or {"baselines": baselines}, draw, handles)


def plot_tightness(runs: Runs) -> "Figure":
    """Certified radius over smallest adversarial distance: median and quartiles over the samples, over the thresholds.

    Samples are the attacked ones that are classified right and for which a point was found; 1 is the best there can be,
    more a broken certificate. Seeds are averaged. A panel a constraint; the baselines stand at its right.

    Raises:
        ValueError: no finished run, or runs that differ in more than constraint, threshold and seed.
    """
    panels, norm = _panels(runs)
    samples = _all_samples(panels, norm)
    baselines = panels.pop("baselines", [])
    found = {folder: one.quartiles() for folder, one in samples.items()}
    highest = max((quartiles[2] for quartiles in found.values() if np.isfinite(quartiles[2])), default=0.0)

    def quartiles(one: _Series) -> _Floats:
        known = [found[folder] for folder in one.folders if np.isfinite(found[folder]).all()]
        return np.mean(known, axis=0) if known else np.full(3, math.nan)

    def draw(axes: "Axes", panel: Sequence[_Series]) -> None:
        def draw_part(positions: Sequence[int], part: Sequence[_Series]) -> None:
            low, middle, high = np.array([quartiles(one) for one in part]).T
            axes.plot(positions, middle, color=CERTIFIED, marker="o", markersize=4, linewidth=1.2)
            if len(part) > 1:
                axes.fill_between(positions, low, high, color=CERTIFIED, alpha=0.15, linewidth=0)
            else:
                axes.bar(positions, high - low, 0.3, low, color=CERTIFIED, alpha=0.15, linewidth=0)

        _over_thresholds(axes, panel, baselines, draw_part)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, 1.05 * max(1.0, highest)), ylabel=f"radius / distance ({NORMS[norm]})")

    limit = _line("radius = distance", "black", style=":")
    handles: list[Line2D | Patch] = [_line("median", CERTIFIED, marker="o"), _band("quartiles"), limit]
    handles += _doubts([*panels.values(), baselines])
    return _figure(panels or {"baselines": baselines}, draw, handles)


def plot_radius_against_distance(runs: Runs) -> "Figure":
    """Smallest adversarial distance found over certified radius, a point an attacked sample that is classified right.

    No point may lie below the diagonal: there an adversarial example was found inside a certified ball. Such
    points are drawn as red crosses. Samples on which every attack failed are carets at the upper edge.

    Raises:
        ValueError: no finished run, no such sample, or runs that differ in more than constraint, threshold, seed.
    """
    panels, norm = _panels(runs)
    samples = _all_samples(panels, norm)
    used = {folder: (one.radius[keep], one.distance[keep]) for folder, one in samples.items() for keep in [_hit(one)]}
    distances = np.concatenate([distance for _, distance in used.values()] or [np.empty(0)])
    if not len(distances):
        raise ValueError("expected attacked samples that are classified right, got none")
    right = 1.05 * max(float(radius.max(initial=0.0)) for radius, _ in used.values()) or 1.0
    top = 1.08 * float(distances[np.isfinite(distances)].max(initial=0.0)) or right

    def draw(axes: "Axes", panel: Sequence[_Series]) -> None:
        axes.fill_between([0, right], [0, right], color="0.9", linewidth=0)
        axes.plot([0, right], [0, right], color="black", linewidth=0.8)
        for one in panel:
            for folder in one.folders:
                _draw_points(axes, one, *used[folder], top)
        axes.set(xlim=(0, right), ylim=(0, top), xlabel=f"certified radius ({NORMS[norm]}, input units)")
        axes.set_ylabel("smallest distance found")

    handles = [*_series_handles(panels, points=True), _line("distance = radius", "black")]
    handles += [_line("attacks failed", "0.4", style="", marker="^")] if np.isinf(distances).any() else []
    if any((radius > distance).any() for radius, distance in used.values()):
        handles.append(_line("certificate broken", BROKEN, style="", marker="x"))
    handles += _doubts(panels.values())
    return _figure(panels, draw, handles)


def plot_gradient_norms(runs: Runs) -> "Figure":
    """Norm of the loss gradient (as in `history.parquet`, log scale) over the epochs, a colour a threshold.

    Seeds are averaged. A panel a constraint.

    Raises:
        ValueError: no finished run, or runs that differ in more than constraint, threshold and seed.
    """
    from matplotlib.ticker import MaxNLocator

    panels, _ = _panels(runs)

    def draw(axes: "Axes", panel: Sequence[_Series]) -> None:
        for one in panel:
            if not one.folders:
                continue
            rows = pd.concat([folder.read_history() for folder in one.folders])
            mean = rows.groupby("epoch")["gradient_norm"].mean()
            axes.plot(mean.index, mean, color=one.colour, linewidth=1.3)
        axes.set(yscale="log", xlabel="epoch", ylabel="gradient norm")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _figure(panels, draw, _series_handles(panels))


def save_figure(figure: "Figure", path: str | Path, *, dpi: int = 200) -> tuple[Path, Path]:
    """Write `path`.pdf and `path`.png (an ending .pdf or .png of `path` is replaced), each whole or not at all.

    Raises:
        ValueError: the folder cannot be written.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".pdf", ".png") else path
    written = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=dpi, metadata=metadata)
        written.append(stem.with_name(stem.name + suffix))
        write_atomic(written[-1], buffer.getvalue())
    return written[0], written[1]


def _panels(runs: Runs) -> tuple[dict[str, list[_Series]], str]:
    """Series by panel (a constraint, or "baselines" for all of these), and the norm of the runs."""
    frame = _finished(runs)
    if differing := differing_settings(frame):
        raise ValueError(
            f"expected runs that differ in constraint, threshold and seed only, got {', '.join(differing)}"
        )
    thresholds = sorted({value for value in frame["threshold"] if math.isfinite(value)})
    panels: dict[str, list[_Series]] = {}
    pairs = set(zip(frame["constraint"], frame["threshold"], strict=True))
    for constraint, threshold in sorted(pairs, key=lambda pair: (CONSTRAINTS.index(pair[0]), pair[1])):
        panel = "baselines" if constraint in BASELINES else constraint
        group = frame[frame["constraint"].eq(constraint) & frame["threshold"].eq(threshold)]
        one = _series(constraint, threshold, thresholds, group)
        panels.setdefault(panel, []).append(one)
    return panels, str(frame["norm"].iloc[0])


def _finished(runs: Runs) -> pd.DataFrame:
    frame = collect_runs(runs)
    frame = frame[frame["finished"].eq(True)]
    if frame.empty:
        raise ValueError("expected at least one finished run, got none")
    return frame if "diverged" in frame else frame.assign(diverged=False)


def _series(constraint: str, threshold: float, thresholds: Sequence[float], group: pd.DataFrame) -> _Series:
    from matplotlib import colormaps

    diverged = group["diverged"].eq(True)
    folders = tuple(RunFolder(Path(folder)) for folder in group.loc[~diverged, "folder"])
    label = constraint if constraint in BASELINES else f"{threshold:g}".replace("inf", "∞")
    label += _DOUBT if run_flags(group[~diverged]).map(len).any() else ""
    label += f" ({int(diverged.sum())} of {len(group)} diverged)" if diverged.any() else ""
    if constraint in BASELINES:
        at = BASELINES.index(constraint)
        return _Series(constraint, threshold, label, _BASELINE_COLOURS[constraint], "xP+"[at], folders)
    if math.isinf(threshold):
        return _Series(constraint, threshold, label, "black", "x", folders)
    at = thresholds.index(threshold)
    colour = colormaps["viridis"](0.88 * at / max(1, len(thresholds) - 1))
    return _Series(constraint, threshold, label, colour, _MARKERS[at % len(_MARKERS)], folders)


def _all_samples(panels: dict[str, list[_Series]], norm: str) -> dict[RunFolder, _Samples]:
    folders = [folder for panel in panels.values() for one in panel for folder in one.folders]
    return {folder: _read(folder, norm) for folder in folders}


def _read(folder: RunFolder, norm: str) -> _Samples:
    rows = folder.read_samples()
    if rows["attacked"].any():
        rows = rows[rows["attacked"]]
    correct = (rows["prediction"] == rows["label"]).to_numpy(bool)
    return _Samples(correct, rows[f"radius_{norm}"].to_numpy(np.float64), rows["distance"].to_numpy(np.float64))


def _reach(samples: _Samples) -> float:
    """Where a picture over eps may end: the attacks have all but won, or nothing is certified."""
    finite = samples.distance[np.isfinite(samples.distance)]
    return float(np.quantile(finite, 0.95)) if finite.any() else float(samples.radius.max()) or 1.0


def _hit(samples: _Samples) -> NDArray[np.bool_]:
    return samples.correct & ~np.isnan(samples.distance)


@dataclasses.dataclass(frozen=True)
class _Point:
    """Accuracies in percent at one eps: mean over the seeds, and half-width of its 95 % interval."""

    mean: tuple[float, float, float]  # clean, observed, certified
    half: tuple[float, float, float]  # 0 for one seed

    @classmethod
    def of(cls, runs: Sequence[_Samples], eps: float) -> "_Point":
        if not runs:
            return cls((math.nan,) * 3, (0.0,) * 3)
        at = np.array([eps])
        values = [[run.correct.mean(), run.observed(at)[0], run.certified(at)[0]] for run in runs]
        half = half_width(np.std(values, axis=0, ddof=1), np.full(3, len(runs))) if len(runs) > 1 else np.zeros(3)
        clean, observed, certified = (100 * np.mean(values, axis=0)).tolist()
        return cls((clean, observed, certified), tuple((100 * half).tolist()))


def _over_thresholds(
    axes: "Axes",
    panel: Sequence[_Series],
    baselines: Sequence[_Series],
    draw_part: Callable[[Sequence[int], Sequence[_Series]], None],
) -> None:
    """Draw the thresholds of a constraint side by side, connected, and at their right each baseline by itself."""
    main = [one for one in panel if one.constraint not in BASELINES]
    every = [*main, *baselines]
    parts = [range(len(main)), *(range(at, at + 1) for at in range(len(main), len(every)))]
    for part in filter(len, parts):
        draw_part(part, every[part.start : part.stop])
    if main and baselines:
        axes.axvline(len(main) - 0.5, color="0.8", linewidth=0.8)
    axes.set_xticks(range(len(every)), [_tick(one) for one in every])
    for text in axes.get_xticklabels()[len(main) :]:
        text.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set(xlim=(-0.5, len(every) - 0.5), xlabel="threshold of the layers' spectral norm")


def _draw_sandwich(axes: "Axes", positions: Sequence[int], points: Sequence[_Point]) -> None:
    means, halves = (np.array(rows).T for rows in zip(*((p.mean, p.half) for p in points), strict=True))
    looks = (("s", ":", _CLEAN), ("o", _DASHED, OBSERVED), ("^", "-", CERTIFIED))
    for mean, half, (marker, style, colour) in zip(means, halves, looks, strict=True):
        axes.errorbar(
            positions,
            mean,
            half,
            color=colour,
            marker=marker,
            linestyle=style,
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    if len(points) > 1:
        axes.fill_between(positions, means[2], means[1], color=CERTIFIED, alpha=0.15, linewidth=0)
    else:
        axes.bar(positions, means[1] - means[2], 0.3, means[2], color=CERTIFIED, alpha=0.15, linewidth=0)


def _draw_points(axes: "Axes", one: _Series, radius: _Floats, distance: _Floats, top: float) -> None:
    missed, broken = np.isinf(distance), radius > distance
    found = ~missed & ~broken
    shown = ((radius[found], distance[found], one.marker), (radius[missed], np.full(missed.sum(), 0.985 * top), "^"))
    for x, y, marker in shown:
        axes.scatter(x, y, 7, [one.colour], marker=marker, alpha=0.6, linewidths=0.6, rasterized=True)
    axes.scatter(radius[broken], distance[broken], 30, BROKEN, marker="x", zorder=3)


def _tick(one: _Series) -> str:
    return one.label.replace(" (", "\n(").replace(" diverged", "\ndiverged")


def _line(label: str, colour: _Colour, *, style: _Style = "-", marker: str = "") -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.4, label=label)


def _band(label: str) -> "Patch":
    from matplotlib.patches import Patch

    return Patch(facecolor=CERTIFIED, alpha=0.15, linewidth=0, label=label)


def _doubts(panels: Iterable[Sequence[_Series]]) -> list["Line2D"]:
    """What the dagger means, where there is one."""
    is_there = any(_DOUBT in one.label for panel in panels for one in panel)
    return [_line(f"{_DOUBT} masked gradients or attacks cut short", "black", style="")] if is_there else []


def _series_handles(panels: dict[str, list[_Series]], *, points: bool = False) -> list["Line2D"]:
    """One legend entry a threshold (the same in every panel) and a baseline."""
    every = {one.label: one for panel in panels.values() for one in panel}
    ordered = sorted(every.values(), key=lambda one: (one.constraint in BASELINES, one.threshold))
    names = [one.label if one.constraint in BASELINES else f"threshold {one.label}" for one in ordered]
    style: _Style = "" if points else "-"
    return [
        _line(name, one.colour, style=style, marker=one.marker if points else "")
        for name, one in zip(names, ordered, strict=True)
    ]


def _figure(
    panels: dict[str, list[_Series]],
    draw: Callable[["Axes", Sequence[_Series]], None],
    handles: Iterable["Line2D | Patch"],
) -> "Figure":
    """Lay the panels out in rows, with one legend below them all, where it covers no data."""
    from matplotlib.figure import Figure

    handles = list(handles)
    columns = min(len(panels), _PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    label_inches = 0.45 + 0.053 * max(len(str(handle.get_label())) for handle in handles)
    legend_columns = min(len(handles), int(columns * _PANEL_INCHES[0] / label_inches))
    legend_rows = math.ceil(len(handles) / legend_columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(columns * width, rows * height + 0.17 * legend_rows + 0.1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (name, panel) in zip(grid.flat, panels.items(), strict=False):
        draw(axes, panel)
        if len(panels) > 1:
            axes.set_title(name, fontsize=9)
        axes.tick_params(which="both", labelsize=7)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.yaxis.label.set_visible(axes in grid[:, 0])
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=legend_columns, fontsize=7, frameon=False, columnspacing=1
    )
    return figure

"""Pictures of single samples: the nearest adversarial examples of a model, and what brackets its true distances.

Like `plots`, every function gives a matplotlib `Figure` of its own and leaves pyplot and the rc settings alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "BROKEN",
    "CERTIFIED",
    "CLOSEST",
    "NORMS",
    "OBSERVED",
    "Change",
    "bracket_figure",
    "change_of",
    "closest_figure",
    "tightness",
]

_Floats: TypeAlias = NDArray[np.float64]

CLOSEST = ("x", "x_adv", "label", "prediction", "index", "distance", "radius")  # arrays of nearest adversarial examples
NORMS = {"l2": r"$\ell_2$", "linf": r"$\ell_\infty$", "l1": r"$\ell_1$"}
CERTIFIED, OBSERVED, BROKEN = "#0072B2", "#D55E00", "#CC0000"
_EXAMPLES_A_ROW = 3
_EXAMPLE_INCHES = (3.1, 1.62)
_SIDE_INCHES, _TEXT_INCHES, _NAME_INCHES = 0.95, 0.36, 0.25
_SHARP = 64  # sides up to this are drawn pixel by pixel


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """An image and what an attack made of it, as pictures [C, H, W] in [0, 1], C = 1 or 3.

    Attributes:
        original: the image.
        adversarial: the adversarial example, on the same scale.
        difference: scaled to the largest: of one channel blue below, white at, red above zero; of three grey at zero.
        largest: the largest absolute difference.
    """

    original: _Floats
    adversarial: _Floats
    difference: _Floats
    largest: float


def change_of(x: _Floats, x_adv: _Floats) -> Change | None:  # [C, H, W] or [H, W]
    """The pictures of a change; None where the input is no image of one or three channels, or not finite."""
    image = x[None] if x.ndim == 2 else x
    if image.ndim != 3 or len(image) not in (1, 3) or min(image.shape[1:]) < 2 or not np.isfinite([x, x_adv]).all():
        return None
    other = x_adv.reshape(image.shape)
    largest = float(np.abs(other - image).max())
    low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
    original, adversarial = ((part - low) / (high - low) for part in (image, other))
    return Change(original, adversarial, _signed((other - image) / (largest or 1.0)), largest)


def _signed(difference: _Floats) -> _Floats:  # [C, H, W] in [-1, 1]
    if len(difference) == 3:
        return 0.5 + difference / 2
    below, above = np.clip(-difference[0], 0, 1), np.clip(difference[0], 0, 1)
    blue, red = np.array([0.0, 0.36, 0.6]), np.array([0.77, 0.3, 0.0])
    coloured: _Floats = 1 - below * (1 - blue[:, None, None]) - above * (1 - red[:, None, None])
    return coloured


def closest_figure(closest: Mapping[str, Any], *, name: str = "") -> "Figure":
    """Originals beside adversarial examples beside the amplified change, with label -> prediction, distance and radius.

    Inputs that are no images are drawn as curves over their entries. A distance below the radius, that is a broken
    certificate, is written in red.

    Args:
        closest: tensors or arrays `x` and `x_adv` [k, *input_shape], `label`, `prediction`, `index`, `distance` and
            `radius` [k], as in `Evaluation.closest`; k = 0 gives a figure that says so.
        name: of the model, written at the top.

    Raises:
        ValueError: an array is missing, or one has another length.
    """
    from matplotlib.figure import Figure

    arrays = _arrays(closest)
    count = len(arrays["x"])
    if not count:
        return _told("No adversarial example was found.")
    columns = min(count, _EXAMPLES_A_ROW)
    rows = math.ceil(count / columns)
    width, height = _EXAMPLE_INCHES
    head = _NAME_INCHES if name else 0.0
    figure = Figure(figsize=(columns * width, rows * height + head))
    figure.text(0.06 / (columns * width), 1 - 0.06 / (rows * height + head), name, fontsize=8, va="top")
    for at in range(count):
        row, column = divmod(at, columns)
        _draw_example(figure, {name: arrays[name][at] for name in CLOSEST}, column * width, (rows - row) * height)
    return figure


def _arrays(closest: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    if missing := [name for name in CLOSEST if name not in closest]:
        raise ValueError(f"expected arrays {', '.join(CLOSEST)}; {', '.join(missing)} missing")
    arrays = {name: np.asarray(_on_host(closest[name])) for name in CLOSEST}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected arrays of equal length, got {lengths}")
    if arrays["x"].shape != arrays["x_adv"].shape:
        raise ValueError(f"expected x and x_adv of equal shape, got {arrays['x'].shape} and {arrays['x_adv'].shape}")
    return arrays


def _on_host(value: Any) -> Any:
    """An array, or a tensor as numpy can read it."""
    return value.detach().cpu() if hasattr(value, "detach") else value


def _draw_example(figure: "Figure", one: Mapping[str, Any], left: float, top: float) -> None:
    """One example in a box whose upper left corner lies at these inches."""
    distance, radius = float(one["distance"]), float(one["radius"])
    title = f"{int(one['label'])} → {int(one['prediction'])}, sample {int(one['index'])}\n"
    title += f"distance {_short(distance)}, radius {_short(radius)}"
    inches = figure.get_size_inches()
    title += ", broken" if distance < radius else ""
    colour = BROKEN if distance < radius else "black"
    place = ((left + 0.06) / inches[0], (top - 0.04) / inches[1])
    figure.text(*place, title, fontsize=7, va="top", linespacing=1.25, color=colour)
    x, x_adv = (np.asarray(one[name], np.float64) for name in ("x", "x_adv"))
    change = change_of(x, x_adv)

    def add(start: float, width: float, height: float) -> "Axes":
        bottom = top - _TEXT_INCHES - height
        axes = figure.add_axes(((left + start) / inches[0], bottom / inches[1], width / inches[0], height / inches[1]))
        axes.tick_params(labelsize=5, length=2, pad=1)
        return axes

    if change is None:
        _draw_curves(add(0.3, 1.55, 0.98), add(2.15, 0.85, 0.98), x.ravel(), x_adv.ravel())
        return
    factor = 1 / (change.largest or 1.0)
    shown = f"{factor:.0f}" if factor >= 10 else f"{factor:.2g}"
    names = ("original", "adversarial", f"change \N{MULTIPLICATION SIGN} {shown}")
    parts = (change.original, change.adversarial, change.difference)
    for at, (name, part) in enumerate(zip(names, parts, strict=True)):
        axes = add(0.06 + at * (_SIDE_INCHES + 0.05), _SIDE_INCHES, _SIDE_INCHES)
        _draw_image(axes, part)
        axes.set_xlabel(name, fontsize=6, labelpad=2)


def _draw_image(axes: "Axes", image: _Floats) -> None:  # [C, H, W] in [0, 1]
    shown = np.clip(image, 0, 1).transpose(1, 2, 0)
    sharp = max(shown.shape[:2]) <= _SHARP
    axes.imshow(shown.repeat(3 // shown.shape[2], 2), interpolation="nearest" if sharp else None)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.8", linewidth=0.5)


def _draw_curves(both: "Axes", change: "Axes", x: _Floats, x_adv: _Floats) -> None:
    from matplotlib.ticker import MaxNLocator

    entries = np.arange(len(x))
    both.step(entries, x, where="mid", color="0.4", linewidth=0.8)
    both.step(entries, x_adv, where="mid", color=OBSERVED, linewidth=0.8, linestyle="--")
    change.bar(entries, x_adv - x, color=OBSERVED, width=0.9)
    change.axhline(0, color="0.4", linewidth=0.5)
    both.set_xlabel("original (grey), adversarial (dashed)", fontsize=6, labelpad=2)
    change.set_xlabel("change", fontsize=6, labelpad=2)
    for axes in (both, change):
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def bracket_figure(samples: "pd.DataFrame", norm: str, *, name: str = "") -> "Figure":
    """The bracket [certified radius, smallest distance found] of every attacked sample that is classified right.

    The true distance of a sample lies in its bracket. Samples are sorted by distance, then radius; those for which no
    adversarial point was found come last, with an open bracket and a caret at the upper edge. A radius above the
    distance, a broken certificate, is a red cross.

    Args:
        samples: of `samples.parquet`: label, prediction, attacked, distance and radius_<norm>.
        norm: of the distances, "l2", "linf" or "l1".
        name: of the model, written in the title.

    Raises:
        ValueError: a column is missing, or the norm is unknown.
    """
    from matplotlib.figure import Figure

    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}: expected one of {', '.join(NORMS)}")
    names = ("label", "prediction", "attacked", "distance", f"radius_{norm}")
    if missing := [name for name in names if name not in samples]:
        raise ValueError(f"expected columns {', '.join(names)}; {', '.join(missing)} missing")
    rows = samples[samples["attacked"].eq(True) & samples["label"].eq(samples["prediction"])].dropna(subset="distance")
    if rows.empty:
        return _told("No attacked sample is classified right.")
    rows = rows.sort_values(["distance", f"radius_{norm}"], kind="stable")
    radius, distance = (rows[name].to_numpy(np.float64) for name in (f"radius_{norm}", "distance"))
    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.subplots()
    handles = _draw_brackets(axes, radius, distance)
    axes.set_xlabel("attacked samples that are classified right, by distance", fontsize=8)
    axes.set_ylabel(f"{NORMS[norm]} distance (input units)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title((f"{name}: " if name else "") + _median_text(radius, distance), fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _draw_brackets(axes: "Axes", radius: _Floats, distance: _Floats) -> list["Line2D"]:
    """Draw every bracket; returns what the legend shows."""
    ends = np.concatenate([radius, distance])
    top = 1.08 * float(ends[np.isfinite(ends)].max(initial=0.0)) or 1.0
    at, low, high = np.arange(1, 1 + len(radius)), np.minimum(radius, top), np.minimum(distance, top)
    missed, broken = np.isinf(distance), radius > distance
    found = ~missed & ~broken
    size = float(np.clip(900 / len(radius), 2, 14))
    width = float(np.clip(250 / len(radius), 0.4, 3))
    for part, colour, alpha in ((found, CERTIFIED, 0.25), (missed, "0.4", 0.25), (broken, BROKEN, 1.0)):
        axes.vlines(at[part], low[part], high[part], colors=colour, alpha=alpha, linewidth=width, rasterized=True)
    points = (
        (found, high, size, OBSERVED, "o"),
        (~broken, low, size, CERTIFIED, "o"),
        (missed, np.full(len(at), 0.985 * top), 14.0, "0.4", "^"),
        (broken, high, 30.0, BROKEN, "x"),
    )
    for part, heights, area, colour, marker in points:
        lines = 1.5 if marker == "x" else 0.0
        axes.scatter(at[part], heights[part], area, colour, marker=marker, linewidths=lines, rasterized=True)
    axes.set(xlim=(0.5 - 0.01 * len(radius), len(radius) * 1.01 + 0.5), ylim=(0, top))
    return [
        _handle("smallest distance found", OBSERVED, "o"),
        _handle("certified radius", CERTIFIED, "o"),
        *([_handle(f"no point found ({missed.sum()})", "0.4", "^")] if missed.any() else []),
        *([_handle(f"certificate broken ({broken.sum()})", BROKEN, "x")] if broken.any() else []),
    ]


def _handle(label: str, colour: str, marker: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle="", marker=marker, markersize=4, label=label)


def tightness(radius: _Floats, distance: _Floats) -> _Floats:
    """radius / distance of the samples where both are finite and the distance is > 0."""
    known = np.isfinite(radius) & np.isfinite(distance) & (distance > 0)
    return radius[known] / distance[known]


def _median_text(radius: _Floats, distance: _Floats) -> str:
    ratios = tightness(radius, distance)
    median = f", median radius / distance {np.median(ratios):.3f}" if len(ratios) else ""
    return f"{len(radius):,} sample{'' if len(radius) == 1 else 's'}{median}"


def _told(words: str) -> "Figure":
    """A figure that says why it shows nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3, 0.8))
    figure.text(0.5, 0.5, words, ha="center", va="center", fontsize=8)
    return figure


def _short(number: float) -> str:
    return f"{number:.3g}".replace("inf", "∞")

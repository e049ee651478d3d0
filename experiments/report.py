"""The report of a study: one self-contained HTML page, made from run folders alone.

The page needs no network and no clock: equal folders give equal bytes. Its text and tables are markup, its charts are
drawn by its own script from data embedded in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .attack_notes import with_effort
from .config import FIELDS
from .grouping import BROKEN, config_labels, in_order
from .index import read_failure
from .report_cells import CELLS_SHOWN, cell_data, config_data
from .report_charts import POINTS_SHOWN, chart_data
from .report_html import Html, joined, tag
from .report_page import failures_html, page, settings_html
from .report_series import SERIES_SHOWN, all_series, chosen_series, setting_names
from .report_summary import doubts_html, environment_html, headline_html, lead_html, title_of, verdict_html
from .report_table import table_html
from .store import RunFolder, write_atomic
from .tables import NAMES, Runs, collect_runs, robustness_table

__all__ = ["write_report"]

_RESULTS = ("diverged", "attacked_count", "tightness")


def write_report(runs: Runs, path: str | Path) -> Path:
    """Write the report of the runs to an HTML file, whole or not at all.

    Every cell is in its table (up to 5,000 rows) and its list of settings. Curves, layers and images are those of at
    most 60 series and cells, the best of each constraint; the page says where it leaves some out.

    Args:
        runs: an output folder, several, or the frame of `find_runs`.
        path: the HTML file.

    Returns:
        The path written.

    Raises:
        ValueError: no run, a damaged run folder, or a file that cannot be written.
    """
    frame = _completed(with_effort(collect_runs(runs)))
    table = robustness_table(frame)
    series = all_series(frame)
    drawn = chosen_series(series)
    charts = chart_data(drawn)
    cells = cell_data(drawn)
    config = config_data(frame)
    title = title_of(frame)
    parts = {
        "heading": tag("h1", title),
        "lead": lead_html(frame),
        "verdict": joined(
            [
                verdict_html(frame, _broken(frame), charts["broken_found"], charts["broken_cells"]),
                doubts_html(series),
            ]
        ),
        "headline": headline_html(table),
        "environment": environment_html(frame),
        "table": table_html(table, frame),
        "settings": settings_html(config, frame),
        "failures": failures_html(_failures(frame)),
        "selection": _selection(len(series), charts, cells),
    }
    path = Path(path)
    write_atomic(path, page(title=title, parts=parts, data={**charts, **cells, "config": config}))
    return path


def _completed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame in the order of its settings, with every column that the page reads, whatever the runs have."""
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *FIELDS, *_RESULTS])))
    keys = [*NAMES, "constraint", "threshold", "seed"]
    frame = frame.loc[in_order(config_labels(frame, keys), keys).index].reset_index(drop=True)
    frame["error"] = [error if isinstance(error, str) else "" for error in frame["error"]]
    frame["diverged"] = frame["diverged"].eq(True)
    return frame.assign(setting=setting_names(frame))


def _failures(frame: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """Every failed cell with its error, and its traceback where there is one."""
    failed = frame[frame["state"].eq("failed")].to_dict("records")
    found = [(row, read_failure(RunFolder(Path(row["folder"]))) or {}) for row in failed]
    return [
        (row["id"], {"error": row["error"] or "no error recorded", **{key: str(told[key]) for key in told}})
        for row, told in found
    ]


def _broken(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Cells that ended because an attack or a Jacobian disproved their certificate, each with what it says."""
    stopped = frame[frame["state"].isin(["failed", "interrupted"])].to_dict("records")
    return [
        (row["id"], row["error"] or BROKEN)
        for row in stopped
        if BROKEN in row["error"] or (Path(row["folder"]) / "counterexample.safetensors").exists()
    ]


def _selection(series: int, charts: Mapping[str, Any], cells: Mapping[str, Any]) -> Html:
    """What the charts leave out, in words."""
    told: list[str] = []
    if series > SERIES_SHOWN:
        told.append(
            f"Charts show {SERIES_SHOWN} of {series:,} combinations: in turn the best of every constraint by certified "
            "accuracy at the middle ε. The table holds them all."
        )
    if cells["cells_found"] > CELLS_SHOWN:
        told.append(f"Layers and images are those of {CELLS_SHOWN} of {cells['cells_found']:,} of their cells.")
    if charts["points_found"] > POINTS_SHOWN:
        told.append(
            f"The scatter shows {POINTS_SHOWN:,} of {charts['points_found']:,} samples, drawn by a fixed seed; none "
            "inside a certified radius is left out."
        )
    if _without_pictures(cells["cells"]):
        told.append("Images fill 1 MB at most, those of the best cell of each constraint first.")
    return tag("p", " ".join(told), class_="note") if told else joined([])


def _without_pictures(cells: Sequence[Mapping[str, Any]]) -> bool:
    return any(cell.get("pictures_left_out") for cell in cells)

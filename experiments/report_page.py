"""The markup of a report: summary, settings, failures, and the frame that holds charts, style and script."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import pandas as pd

from .report_html import MISSING, Html, description, joined, listed, tag

_FAILURES_SHOWN = 60
_CELLS_LISTED = 5000
_SCRIPTS = ("dom", "chart", "charts", "sandwich", "scatter", "training", "cells", "table", "main")
_ASSETS = "report_assets"


def page(*, title: str, parts: Mapping[str, Html], data: Mapping[str, Any]) -> bytes:
    """One self-contained page: `parts` fill the template, `data` is embedded for the charts."""
    style, script = _asset("report.css"), "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    filled = Template(_asset("template.html")).substitute(
        {"title": joined([title]), "policy": policy, "style": style, "script": script, "data": to_json(data), **parts}
    )
    return filled.encode(errors="backslashreplace")


def to_json(data: Any) -> str:
    """JSON that can stand in a script element: null for NaN and infinity, and no character that markup reads."""
    text = json.dumps(_plain(data), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asset(name: str) -> str:
    return (resources.files(__package__) / _ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression that lets a browser run this very text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def settings_html(config: Mapping[str, Any], frame: pd.DataFrame) -> Html:
    """Settings that all cells share, and every cell with those in which it differs."""
    shared = {key: _shown(value) for key, value in config["shared"].items()}
    names = ["cell", "state", *config["differing"]]
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    states = dict(zip(frame["id"], frame["state"], strict=True))
    rows = [
        tag(
            "tr",
            tag("th", tag("code", row[0]), scope="row"),
            tag("td", tag("span", states[row[0]], class_=f"state {states[row[0]]}")),
            *(tag("td", _shown(value)) for value in row[1:]),
        )
        for row in config["rows"][:_CELLS_LISTED]
    ]
    cut = len(config["rows"]) > _CELLS_LISTED
    note = tag("p", f"The first {_CELLS_LISTED:,} of {len(config['rows']):,} cells.", class_="note") if cut else ""
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="plain", id="cells")
    box = tag("div", table, class_="scroll tall", tabindex="0", role="region", aria_label="Cells and their settings")
    return joined(
        [
            tag("h3", "Shared by all cells"),
            description(shared, "settings"),
            tag("h3", "Cells"),
            note or Html(""),
            box,
        ]
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return listed(value, 100) or "none"
    return (
        MISSING
        if value is None
        else "∞"
        if value == "inf"
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def failures_html(failures: Sequence[tuple[str, Mapping[str, str]]]) -> Html:
    """Every failed cell with its traceback, up to 60."""
    if not failures:
        return Html("")
    shown = [
        tag(
            "details",
            tag("summary", tag("code", cell), " ", found["error"], " ", tag("small", found.get("time", ""))),
            tag("pre", found.get("traceback") or "no traceback recorded", tabindex="0"),
        )
        for cell, found in failures[:_FAILURES_SHOWN]
    ]
    cut = len(failures) > _FAILURES_SHOWN
    note = tag("p", f"The first {_FAILURES_SHOWN} of {len(failures):,}.", class_="note") if cut else Html("")
    return tag("section", tag("h2", "Failed cells"), note, *shown, id="failed")

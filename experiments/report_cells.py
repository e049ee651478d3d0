"""What a report shows of single cells, read from run folders: bounds of the layers, adversarial images, failures."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .config import FIELDS, CellConfig
from .pictures import CLOSEST, change_of
from .report_series import Series, best_of_each, score
from .store import RunFolder, StoreError

_Floats: TypeAlias = NDArray[np.float64]

CELLS_SHOWN = 60
PICTURE_BYTES = 1_000_000  # of all cells together
_LARGEST_SIDE = 64
_INTEGERS = {field.name for field in dataclasses.fields(CellConfig) if field.type in (int, int | None)}


def cell_data(series: Sequence[Series]) -> dict[str, Any]:
    """Cells with their bounds and nearest adversarial examples: all, or the best 60, every series in its turn.

    Pictures are taken up cell by cell until they fill 1 MB, from the best cell of each constraint on; `pictured` says
    of how many cells.
    """
    order = {one.name + one.setting: at for at, one in enumerate(series)}
    every = [(one, row) for one in series for _, row in one.rows.iterrows()]
    chosen = best_of_each(
        every, lambda pair: order[pair[0].name + pair[0].setting], lambda pair: score(pair[1]), CELLS_SHOWN
    )
    settings = list(dict.fromkeys(one.setting for one in series))
    cells = [_cell(one, row, settings.index(one.setting)) for one, row in chosen]
    _add_pictures(cells, chosen)
    return {"cells": cells, "cells_found": len(every)}


def _cell(one: Series, row: "pd.Series[Any]", setting: int) -> dict[str, Any]:
    folder = RunFolder(Path(row["folder"]))
    return {
        "id": row["id"],
        "setting": setting,
        "panel": one.panel,
        "name": f"{one.name}, seed {row['seed']}",
        "threshold": one.threshold,
        "norm": row["norm"],
        "diverged": bool(row["diverged"]),
        "bounds": _read_bounds(folder),
        "tightness": row.get("tightness"),
        "tightness_median": row.get("tightness_median"),
        "closest": None,
        "score": score(row),
    }


def _read_bounds(folder: RunFolder) -> Any:
    """What bounds.json holds; None where a run was made before there was one."""
    if not folder.bounds_path.exists():
        return None
    try:
        return json.loads(folder.bounds_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder.bounds_path}: damaged ({error})") from error


def _add_pictures(cells: list[dict[str, Any]], chosen: Sequence[tuple[Series, "pd.Series[Any]"]]) -> None:
    room = PICTURE_BYTES
    turns: dict[str, int] = {}
    ranked = []
    for at in sorted(range(len(cells)), key=lambda at: -cells[at]["score"]):
        place = f"{cells[at]['setting']} {cells[at]['panel']}"
        ranked.append((turns.setdefault(place, 0), at))
        turns[place] += 1
    for _, at in sorted(ranked):
        closest = read_closest(RunFolder(Path(chosen[at][1]["folder"])))
        size = sum(len(uri) for one in closest or () for uri in one.get("pictures", ()))
        if size > room and closest is not None:
            closest = [{key: value for key, value in one.items() if key != "pictures"} for one in closest]
            cells[at]["pictures_left_out"] = True
        else:
            room -= size
        cells[at]["closest"] = closest


def load_closest(folder: RunFolder) -> dict[str, NDArray[Any]] | None:
    """The nearest adversarial examples of a run as arrays named as in `Evaluation.closest`; None where not recorded.

    Raises:
        StoreError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not folder.closest_path.exists():
        return None
    try:
        arrays = load(folder.closest_path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{folder.closest_path}: damaged ({error})") from error
    if missing := [name for name in CLOSEST if name not in arrays]:
        raise StoreError(f"{folder.closest_path}: expected arrays {', '.join(CLOSEST)}; {', '.join(missing)} missing")
    return {name: arrays[name] for name in CLOSEST}


def read_closest(folder: RunFolder) -> list[dict[str, Any]] | None:
    """The nearest adversarial examples of a run, with PNG pictures where inputs are images; None where not recorded.

    Raises:
        StoreError: the file is damaged.
    """
    arrays = load_closest(folder)
    if arrays is None:
        return None
    return [_example({name: array[at] for name, array in arrays.items()}) for at in range(len(arrays["x"]))]


def _example(arrays: Mapping[str, Any]) -> dict[str, Any]:
    example: dict[str, Any] = {name: int(arrays[name]) for name in ("label", "prediction", "index")}
    example |= {name: float(arrays[name]) for name in ("distance", "radius")}
    x, x_adv = np.asarray(arrays["x"], np.float64), np.asarray(arrays["x_adv"], np.float64)
    example["shape"] = list(x.shape)
    if change := change_of(x, x_adv):
        example["pictures"] = [*map(png_uri, (change.original, change.adversarial, change.difference))]
        example["largest"] = change.largest
    return example


def png_uri(image: _Floats) -> str:  # [C, H, W] in [0, 1], C = 1 or 3
    """A PNG data URI; sides above 64 are averaged down."""
    from PIL import Image

    levels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    scale = _LARGEST_SIDE / max(picture.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def config_data(frame: pd.DataFrame) -> dict[str, Any]:
    """Settings that all cells share, and the differing ones of each cell, as config.json has them."""
    fields = [field for field in FIELDS if field in frame.columns]
    plain = pd.DataFrame({field: [_setting(field, value) for value in frame[field]] for field in fields}, dtype=object)
    keys = {field: plain[field].map(json.dumps) for field in fields}
    differing = [field for field in fields if keys[field].nunique() > 1]
    shared = {field: plain[field].iloc[0] for field in fields if field not in differing}
    rows = [[name, *row] for name, row in zip(frame["id"], plain[differing].to_numpy(object).tolist(), strict=True)]
    return {"shared": shared, "differing": differing, "rows": rows, "order": fields}


def _setting(field: str, value: Any) -> Any:
    """A setting as config.json has it: in a frame an integer beside a gap is a float, and the gap NaN."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return int(value) if field in _INTEGERS and isinstance(value, float) else value

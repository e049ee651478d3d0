"""Run folders on disk: who owns which path, atomic writes, strict reads, and the lock on an output folder.

A run folder is named by the hash of its config. Every file is written under a temporary name, flushed to disk and
renamed, and `summary.json` comes last: a killed job leaves no half file and no run that looks finished.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import pickle
import re
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .config import CellConfig, ConfigError, config_id

_RUN_NAME = re.compile(r"[0-9a-f]{12}")
_SAMPLES_COLUMNS = ("index", "label", "prediction", "margin", "radius_l2", "attacked", "distance")
_HISTORY_COLUMNS = ("epoch", "train_loss", "gradient_norm")


class StoreError(ValueError):
    """A run folder or file that is missing, damaged, foreign or in use."""


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write the whole file or nothing: temporary name in the same folder, flush to disk, rename.

    Raises:
        StoreError: the folder cannot be written or the disk is full; neither file is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One run's folder and every path in it."""

    path: Path

    @classmethod
    def of(cls, output: str | Path, cell: CellConfig) -> "RunFolder":
        """The folder of a config's run in an output folder, made or not."""
        return cls(Path(output) / config_id(cell))

    @property
    def id(self) -> str:
        """Hash of the config."""
        return self.path.name

    @property
    def config_path(self) -> Path:
        """The config, in JSON."""
        return self.path / "config.json"

    @property
    def checkpoint_path(self) -> Path:
        """The trained weights."""
        return self.path / "checkpoint.safetensors"

    @property
    def history_path(self) -> Path:
        """A row an epoch."""
        return self.path / "history.parquet"

    @property
    def samples_path(self) -> Path:
        """A row a test sample."""
        return self.path / "samples.parquet"

    @property
    def summary_path(self) -> Path:
        """One flat row; written last, it marks the run as finished."""
        return self.path / "summary.json"

    @property
    def is_finished(self) -> bool:
        """Whether a readable summary of this very run is there."""
        try:
            self.read_summary()
        except StoreError:
            return False
        return True

    def create(self, cell: CellConfig) -> None:
        """Make the folder with its config, and clear what a killed job left half written.

        Raises:
            StoreError: the config belongs to another folder, or the folder cannot be written.
        """
        if config_id(cell) != self.id:
            raise StoreError(f"{self.path}: expected the config with id {self.id}, got one with id {config_id(cell)}")
        for stale in self.path.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        write_atomic(self.config_path, cell.to_json().encode())

    def read_config(self) -> CellConfig:
        """The config of this run.

        Raises:
            StoreError: missing, damaged, or not the config that names this folder.
        """
        try:
            cell = CellConfig.from_json(_read_text(self.config_path))
        except ConfigError as error:
            raise StoreError(f"{self.config_path}: {error}") from error
        if config_id(cell) != self.id:
            raise StoreError(f"{self.path}: foreign folder, its config has id {config_id(cell)}")
        return cell

    def write_summary(self, results: Mapping[str, Any]) -> None:
        """Finish the run: write its id, all config fields and `results` as one flat JSON row.

        Raises:
            StoreError: a result named as a config field, or a value that is not a finite number, text, truth value or
                None (for undefined).
        """
        settings = {"id": self.id, **dataclasses.asdict(self.read_config())}
        if clash := sorted(settings.keys() & results.keys()):
            raise StoreError(f"{self.summary_path}: results named as config fields: {', '.join(clash)}")
        row = {**settings, "threshold": _threshold_text(settings["threshold"]), **_plain(self.summary_path, results)}
        write_atomic(self.summary_path, (json.dumps(row, indent=2, allow_nan=False) + "\n").encode())

    def read_summary(self) -> dict[str, Any]:
        """The flat row, its threshold a float again (may be inf) and undefined values None.

        Raises:
            StoreError: missing, damaged, or of another run.
        """
        try:
            row = json.loads(_read_text(self.summary_path), parse_constant=_refuse_constant)
        except ValueError as error:
            raise StoreError(f"{self.summary_path}: damaged ({error})") from error
        if not isinstance(row, dict) or row.get("id") != self.id:
            found = row.get("id") if isinstance(row, dict) else type(row).__name__
            raise StoreError(f"{self.summary_path}: expected the summary of run {self.id}, got {found!r}")
        if row.get("threshold") == "inf":
            row["threshold"] = math.inf
        return row

    def write_samples(self, samples: pd.DataFrame) -> None:
        """Write a row a test sample; raises StoreError where a needed column is missing."""
        _write_parquet(self.samples_path, samples, _SAMPLES_COLUMNS)

    def read_samples(self) -> pd.DataFrame:
        """Read a row a test sample; raises StoreError on a missing or damaged file."""
        return _read_parquet(self.samples_path, _SAMPLES_COLUMNS)

    def write_history(self, history: pd.DataFrame) -> None:
        """Write a row an epoch; raises StoreError where a needed column is missing."""
        _write_parquet(self.history_path, history, _HISTORY_COLUMNS)

    def read_history(self) -> pd.DataFrame:
        """Read a row an epoch; raises StoreError on a missing or damaged file."""
        return _read_parquet(self.history_path, _HISTORY_COLUMNS)


def find_runs(output: str | Path, ids: Collection[str] | None = None) -> pd.DataFrame:
    """Every run in an output folder: columns `folder`, `id`, `finished`, the config fields, and all results.

    Unfinished runs are rows without results. Sub-folders that neither are named as a run nor hold a config are no runs.

    Args:
        output: the output folder, or the folder of one run.
        ids: the runs to read; all where None.

    Raises:
        StoreError: no such folder; names every damaged or foreign run folder.
    """
    output = Path(output)
    if not output.is_dir():
        raise StoreError(f"{output}: expected a folder of runs")
    rows, problems = [], []
    alone = (output / "config.json").exists()
    for path in [output.resolve()] if alone else sorted(child for child in output.iterdir() if child.is_dir()):
        folder = RunFolder(path)
        if ids is not None and folder.id not in ids:
            continue
        if not _RUN_NAME.fullmatch(path.name) and not folder.config_path.exists():
            continue
        try:
            rows.append({"folder": str(path), **_row(folder)})
        except StoreError as error:
            problems.append(str(error))
    if problems:
        raise StoreError("; ".join(problems))
    return pd.DataFrame(rows, columns=None if rows else ["folder", "id", "finished"])


def _row(folder: RunFolder) -> dict[str, Any]:
    if not folder.config_path.exists() and not folder.summary_path.exists():
        return {"id": folder.id, "finished": False}
    cell = folder.read_config()
    if folder.summary_path.exists():
        return {"finished": True, **folder.read_summary()}
    return {"id": folder.id, "finished": False, **dataclasses.asdict(cell)}


@contextlib.contextmanager
def lock_output(output: str | Path) -> Iterator[None]:
    """Hold an output folder alone; the system lets go of it when this process ends, however it ends.

    Raises:
        StoreError: another process holds it (named by pid and host), or it cannot be locked.
    """
    path = Path(output) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise StoreError(f"{output}: cannot be locked ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise StoreError(f"{output}: output folder in use by {owner}") from error
        except OSError as error:
            raise StoreError(f"{output}: cannot be locked ({error.strerror})") from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a `state_dict` as a safetensors file, whole or not at all.

    Raises:
        StoreError: an entry that is not a tensor, or a folder that cannot be written.
    """
    from safetensors.torch import save

    if foreign := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise StoreError(f"{path}: expected tensors only, got other values for {_some(foreign)}")
    # Cloned, since safetensors refuses tensors that share memory.
    write_atomic(path, save({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}))


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fill a model with the weights in a .safetensors file, or in a torch file of a `state_dict`; never runs a pickle.

    Raises:
        StoreError: the file is missing, truncated or of another kind; weights are missing, unexpected, of another
            shape, NaN or infinite. The model is then left as it was.
    """
    state = _read_state(Path(path))
    expected = model.state_dict()
    shared = [key for key in expected if key in state]
    wrong = [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in shared
        if state[key].shape != expected[key].shape
    ]
    faults = {
        "missing weights": [key for key in expected if key not in state],
        "unexpected weights": sorted(key for key in state if key not in expected),
        "shapes that differ": wrong,
        "NaN or infinite weights": [key for key in shared if not bool(torch.isfinite(state[key]).all())],
    }
    if found := [f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys]:
        raise StoreError(f"{path}: does not fit the model; {'; '.join(found)}")
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors":
            state: Any = load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise StoreError(f"{path}: truncated or not a safetensors file ({error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StoreError(
            f"{path}: damaged, or not a torch file of model.state_dict(); pickled code is not run"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"{path}: expected a state_dict (names to tensors), got {type(state).__name__}")
    return dict(state)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: damaged, not UTF-8 text") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _threshold_text(threshold: float) -> float | str:
    return "inf" if math.isinf(threshold) else threshold


def _plain(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as JSON values; refuses what JSON cannot hold, so that no NaN is passed on as a number."""
    row = {key: value.item() if isinstance(value, np.generic) else value for key, value in results.items()}
    for key, value in row.items():
        if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise StoreError(f"{path}: {key} = {value!r}, expected a finite number, text, true, false or None")
    return row


def _write_parquet(path: Path, frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    _check_columns(path, frame, columns)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())


def _read_parquet(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: truncated or not a parquet file ({str(error).splitlines()[0]})") from error
    _check_columns(path, frame, columns)
    return frame


def _check_columns(path: Path, frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    if missing := [column for column in columns if column not in frame.columns]:
        raise StoreError(f"{path}: columns missing: {', '.join(missing)}")

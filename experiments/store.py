"""Run folders on disk: who owns which path, atomic writes, strict reads.

A run folder is named by the hash of its config. Every file is written under a temporary name, flushed to disk and
renamed, and `summary.json` comes last: a killed job leaves no half file and no run that looks finished.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CellConfig, ConfigError, config_id

if TYPE_CHECKING:
    import pandas as pd

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
    def resume_path(self) -> Path:
        """State of a training that goes on; absent in a finished run."""
        return self.path / "resume.pt"

    @property
    def history_path(self) -> Path:
        """A row an epoch."""
        return self.path / "history.parquet"

    @property
    def samples_path(self) -> Path:
        """A row a test sample."""
        return self.path / "samples.parquet"

    @property
    def bounds_path(self) -> Path:
        """Brackets of the layers and of the network, in JSON."""
        return self.path / "bounds.json"

    @property
    def closest_path(self) -> Path:
        """The attacked samples with the nearest adversarial examples, and these."""
        return self.path / "closest.safetensors"

    @property
    def adversarial_path(self) -> Path:
        """The nearest adversarial example of every attacked sample that has one."""
        return self.path / "adversarial.safetensors"

    @property
    def attempts_path(self) -> Path:
        """What each attack did at each eps, in JSON."""
        return self.path / "attempts.json"

    @property
    def log_path(self) -> Path:
        """What happened, a line an event."""
        return self.path / "log.txt"

    @property
    def failure_path(self) -> Path:
        """The error that ended the cell, in JSON; absent where it goes on or is finished."""
        return self.path / "failed.json"

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
        for stale in (*self.path.glob(".*.tmp"), *self.path.glob(".probe.*")):
            with contextlib.suppress(OSError):
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
            StoreError: a result named as a config field, or a value that is not a finite number, text, truth value, a
                list of texts or None (for undefined).
        """
        settings = {"id": self.id, **dataclasses.asdict(self.read_config())}
        if clash := sorted(settings.keys() & results.keys()):
            raise StoreError(f"{self.summary_path}: results named as config fields: {', '.join(clash)}")
        row = {
            **settings,
            "threshold": _threshold_text(settings["threshold"]),
            **plain_results(self.summary_path, results),
        }
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

    def write_samples(self, samples: "pd.DataFrame") -> None:
        """Write a row a test sample; raises StoreError where a needed column is missing."""
        _write_parquet(self.samples_path, samples, _SAMPLES_COLUMNS)

    def read_samples(self) -> "pd.DataFrame":
        """Read a row a test sample; raises StoreError on a missing or damaged file."""
        return _read_parquet(self.samples_path, _SAMPLES_COLUMNS)

    def write_history(self, history: "pd.DataFrame") -> None:
        """Write a row an epoch; raises StoreError where a needed column is missing."""
        _write_parquet(self.history_path, history, _HISTORY_COLUMNS)

    def read_history(self) -> "pd.DataFrame":
        """Read a row an epoch; raises StoreError on a missing or damaged file."""
        return _read_parquet(self.history_path, _HISTORY_COLUMNS)


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


def plain_results(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as JSON values; refuses what JSON cannot hold, so that no NaN is passed on as a number."""
    row = {key: value.item() if hasattr(value, "item") else value for key, value in results.items()}
    for key, value in row.items():
        if not _is_plain(value):
            raise StoreError(f"{path}: {key} = {value!r}, expected a finite number, text, texts, true, false or None")
    return row


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float | None) and not (isinstance(value, float) and not math.isfinite(value))


def _write_parquet(path: Path, frame: "pd.DataFrame", columns: tuple[str, ...]) -> None:
    _check_columns(path, frame, columns)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())


def _read_parquet(path: Path, columns: tuple[str, ...]) -> "pd.DataFrame":
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: truncated or not a parquet file ({str(error).splitlines()[0]})") from error
    _check_columns(path, frame, columns)
    return frame


def _check_columns(path: Path, frame: "pd.DataFrame", columns: tuple[str, ...]) -> None:
    if missing := [column for column in columns if column not in frame.columns]:
        raise StoreError(f"{path}: columns missing: {', '.join(missing)}")

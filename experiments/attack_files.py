"""The files of `certify attack --output`: written whole or not at all, into a folder that holds nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import save_checkpoint
from .config import CellConfig, ConfigError
from .evaluation import Evaluation
from .store import StoreError, plain_results, write_atomic
from .summary import attempts_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["AttackFolder"]

_KIND = "certify attack"
_SUMMARY, _COUNTEREXAMPLE = "summary.json", "counterexample.safetensors"
_NAMES = (
    *(_SUMMARY, "samples.parquet", "attempts.json", "adversarial.safetensors"),
    *("closest.png", "tightness.png", _COUNTEREXAMPLE),
)
_SETTINGS = (
    *("dataset", "model", "seed", "attack_samples", "norm", "eps", "attacks", "attack_schedule", "audit"),
    *("integer_pixels", "max_gradients", "max_seconds", "bound", "bound_budget", "arithmetic"),
)


@dataclass(frozen=True)
class AttackFolder:
    """The folder of one call of `certify attack`, replaced by the next one.

    It holds `summary.json` (one flat row of settings and results; `finished` is false while the other files are
    written), `samples.parquet` (a row a test sample), `attempts.json` (a row for each attack at each eps),
    `adversarial.safetensors` (the nearest adversarial points), `closest.png` (the nearest of them as pictures) and
    `tightness.png` (certified radius and distance found of each sample), or after a broken certificate
    `counterexample.safetensors`.
    """

    path: Path

    def claim(self) -> None:
        """Make the folder and see that it can be written.

        Raises:
            ConfigError: it holds something else than the output of an attack.
            StoreError: it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(name for name in os.listdir(self.path) if not _is_left_over(name))
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        if names and not (set(names) <= {*_NAMES} and _is_ours(self.path)):
            other = next((name for name in names if name not in _NAMES), names[0])
            raise ConfigError(
                f"output: expected a new folder, an empty one, or one of an earlier attack; {self.path} holds {other}"
            )
        probe = self.path / f".probe.{uuid.uuid4().hex}"
        write_atomic(probe, b"")
        probe.unlink(missing_ok=True)

    def write(self, model: str, config: CellConfig, found: Evaluation) -> None:
        """Write all files, the summary last.

        Raises:
            StoreError: the folder can't be written, or the disk is full.
        """
        self._begin({"finished": False})
        buffer = io.BytesIO()
        found.samples.to_parquet(buffer, index=False)
        write_atomic(self.path / "samples.parquet", buffer.getvalue())
        write_atomic(self.path / "attempts.json", attempts_json(found.attempts))
        save_checkpoint(self.path / "adversarial.safetensors", found.adversarial)
        self._pictures(config, found)
        row = {"finished": True, "name": model, "no_certificate": found.no_certificate}
        row |= {key: getattr(config, key) for key in _SETTINGS}
        self._summary(row | plain_results(self.path / _SUMMARY, found.results))

    def refute(self, message: str, example: Mapping[str, Tensor]) -> Path:
        """Keep why a certificate is broken, and the example where there is one, and nothing else; where that lies.

        Raises:
            StoreError: the folder can't be written, or the disk is full.
        """
        self._begin({"finished": False, "error": message})
        if not example:
            return self.path / _SUMMARY
        save_checkpoint(self.path / _COUNTEREXAMPLE, example)
        return self.path / _COUNTEREXAMPLE

    def _begin(self, row: dict[str, Any]) -> None:
        """Mark the folder, and clear it of what an earlier attack left."""
        self._summary(row)
        for name in _NAMES:
            if name != _SUMMARY:
                with contextlib.suppress(OSError):
                    (self.path / name).unlink(missing_ok=True)

    def _pictures(self, config: CellConfig, found: Evaluation) -> None:
        from .plots import bracket_figure, closest_figure

        write_atomic(self.path / "closest.png", _png(closest_figure(found.closest)))
        write_atomic(self.path / "tightness.png", _png(bracket_figure(found.samples, config.norm)))

    def _summary(self, row: dict[str, Any]) -> None:
        text = json.dumps({"kind": _KIND, **row}, indent=2, allow_nan=False)
        write_atomic(self.path / _SUMMARY, (text + "\n").encode())


def _is_left_over(name: str) -> bool:
    """Of a process that was killed while it wrote."""
    return name.startswith(".") and (name.endswith(".tmp") or name.startswith(".probe."))


def _is_ours(path: Path) -> bool:
    try:
        row = json.loads((path / _SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and row.get("kind") == _KIND


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()

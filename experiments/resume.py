"""The file from which a killed training goes on, to the result that it would have had."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .store import StoreError, write_atomic

__all__ = ["ResumeFile"]

_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class ResumeFile:
    """The state of one training after its last finished epoch: tensors, numbers and text; written whole or not at all.

    Args:
        path: where it lies.
        owner: id of the config; a file of another config is refused.
    """

    path: Path
    owner: str

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file by `state`; raises StoreError where it cannot be written."""
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "owner": self.owner, "state": dict(state)}, buffer)
        write_atomic(self.path, buffer.getvalue())

    def read(self) -> dict[str, Any] | None:
        """The state, on the CPU; None where there is no file.

        Raises:
            StoreError: a damaged file, or one of another config or format.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise StoreError(f"{self.path}: damaged; delete it to start over") from error
        found = (content.get("format"), content.get("owner")) if isinstance(content, dict) else None
        if found != (_FORMAT, self.owner):
            raise StoreError(f"{self.path}: expected the state of run {self.owner}; delete it to start over")
        state: dict[str, Any] = content["state"]
        return state

    def remove(self) -> None:
        """Delete the file where it is there."""
        self.path.unlink(missing_ok=True)

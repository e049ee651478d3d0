"""How cells are run: nothing here changes a cell's result beyond rounding, and nothing here is part of its id."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path

from .config import ConfigError

__all__ = ["MACHINERY", "Execution"]

MACHINERY = ".certify"  # folder beside the run folders: plans, run records, job files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how the cells of a study run; plain values only, so that it goes to other processes and into files.

    Attributes:
        output: the study's folder.
        data_root: where the public data sets lie; see `load_dataset`.
        device: "cpu", "cuda" or "cuda:N"; of a cell on several GPUs "cuda:0,cuda:1".
        threads: of torch, for each cell. Results are equal to the last bit at equal numbers of threads only.
        jobs: cells at once; None leaves the choice to the executor.
        gpus_per_cell: more than 1 trains a cell on that many GPUs (on a CPU: in that many processes).
        cells_per_gpu: small cells side by side on one GPU.
        track: trackers that log each training.
        token: names one call of `run`, for the leases and for its cancellation.
    """

    output: str
    data_root: str | None = None
    device: str = "cpu"
    threads: int = 1
    jobs: int | None = None
    gpus_per_cell: int = 1
    cells_per_gpu: int = 1
    track: tuple[str, ...] = ()
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        counts = {key: getattr(self, key) for key in ("threads", "jobs", "gpus_per_cell", "cells_per_gpu")}
        if self.jobs is None:
            del counts["jobs"]
        wrong = {key: value for key, value in counts.items() if type(value) is not int or value < 1}
        if wrong:
            raise ConfigError(
                "; ".join(f"{key}: expected an integer >= 1, got {value!r}" for key, value in wrong.items())
            )
        if self.gpus_per_cell > 1 and self.cells_per_gpu > 1:
            raise ConfigError(
                f"gpus_per_cell = {self.gpus_per_cell} with cells_per_gpu = {self.cells_per_gpu}: one must be 1"
            )

    @property
    def cancel_path(self) -> Path:
        """Its presence tells every worker of this run to stop."""
        return Path(self.output) / MACHINERY / f"run-{self.token}.cancel"

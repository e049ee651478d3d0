"""Models to work on, and single stages of the main job on one of them: `certify train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn

from ..models.imported import import_model
from .cell import Progress, cell_data, check_cell, load_model, train_cell
from .checkpoints import load_checkpoint
from .config import CellConfig, ConfigError
from .data import Dataset, load_dataset
from .leases import LeaseState, claim
from .precision import exact_float32
from .spec import RunSpec
from .store import RunFolder, StoreError
from .sweep import check_device

__all__ = ["Opened", "open_model", "train_one"]


@dataclass(frozen=True, eq=False)
class Opened:
    """A model to work on, in eval mode, with its data and its settings."""

    model: nn.Module
    data: Dataset
    config: CellConfig
    name: str


def open_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    dataset: str | None = None,
    data_root: Path | None = None,
    device: str = "cpu",
) -> Opened:
    """The model of a run folder, or of "module:function" on a data set, with weights from a file where given.

    Raises:
        ConfigError: neither a folder nor module:function, a data set that is missing or not wanted.
        ValueError: files, data or weights that can't be used.
    """
    check_device(device)
    exact_float32()
    if Path(name).is_dir():
        if checkpoint is not None or dataset is not None:
            raise ConfigError("a run folder brings its own data set and checkpoint; leave these flags out")
        folder = RunFolder(Path(name).resolve())
        config = folder.read_config()
        data = cell_data(config, data_root)
        return Opened(load_model(folder, data, device), data, config, folder.id)
    if ":" not in name:
        raise ConfigError(f"model: expected a run folder or module:function, got {name!r}")
    if dataset is None:
        raise ConfigError(f"dataset: expected one for the model {name}; give --dataset")
    data = load_dataset(dataset, root=data_root)
    model = import_model(name, data.input_shape, data.num_classes)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    config = RunSpec.from_mapping({"dataset": dataset, "model": name, "constraint": "none"}).cells()[0]
    shown = name if checkpoint is not None else f"{name} with the weights that the function gave it"
    return Opened(model.to(device).eval(), data, config, shown)


def train_one(spec: RunSpec, output: Path, *, device: str, data_root: Path | None, console: Console) -> RunFolder:
    """Train the one cell of `spec` and say where it lies; `certify run` takes the training over and does not repeat it.

    Raises:
        ConfigError: the spec holds several cells.
    """
    cells = spec.cells()
    if len(cells) != 1:
        raise ConfigError(f"certify train takes one value of every setting, got {len(cells)} cells; use certify run")
    check_device(device)
    exact_float32()
    folder = RunFolder.of(output, cells[0])
    if folder.is_finished:
        console.out(f"finished before; checkpoint in {folder.path}", highlight=False)
        return folder
    data = cell_data(cells[0], data_root)
    check_cell(cells[0], data)
    lease = claim(folder.path, "train")
    if isinstance(lease, LeaseState):
        raise StoreError(f"{folder.path}: {lease.owner} works on it")

    def report(progress: Progress) -> None:
        lease.check()
        lease.progress(progress.stage, progress.fraction)
        console.out(progress.stage, highlight=False)

    with lease:
        if RunFolder(folder.path).is_finished:  # by another process, between the first question and the claim
            lease.finish()
            raise StoreError(f"{folder.path}: another process has just finished it")
        result = train_cell(cells[0], data, folder, device=device, report=report)
    state = "" if not result.diverged else f"; the training diverged ({result.status})"
    console.out(f"best epoch {result.best_epoch}{state}; checkpoint in {folder.path}", highlight=False)
    return folder

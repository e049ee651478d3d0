"""One cell from start to end: train, evaluate, write its run folder."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..certify import TrainingBound
from .config import CellConfig
from .data import Dataset, load_dataset
from .evaluation import CertificateViolationError, evaluate
from .fitting import seeded
from .precision import exact_float32
from .store import RunFolder, StoreError, load_checkpoint, save_checkpoint
from .timing import step_ratio
from .training import TrainResult, build, forget, train

__all__ = ["Progress", "check_cell", "load_model", "run_cell", "train_cell"]


@dataclass(frozen=True)
class Progress:
    """Where a cell stands: its id, the stage in words, and the share of its training that is done."""

    id: str
    stage: str
    fraction: float


Report = Callable[[Progress], None]


def cell_data(config: CellConfig, data_root: str | Path | None) -> Dataset:
    """The data of a cell; raises DataError where they are missing or damaged."""
    return load_dataset(
        config.dataset,
        root=data_root,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        train_samples=config.train_samples,
        test_samples=config.test_samples,
    )


def check_cell(config: CellConfig, data: Dataset) -> None:
    """Raise ValueError where the model can't be built for the data or has no certificate; nothing is written."""
    with seeded(config.seed, torch.device("cpu")), torch.no_grad():
        TrainingBound(build(config, data), data.input_shape).pairwise()


def train_cell(
    config: CellConfig,
    data: Dataset,
    folder: RunFolder,
    *,
    device: str = "cpu",
    report: Report = lambda progress: None,
) -> TrainResult:
    """Train a cell, or resume it, and write config, history and checkpoint to its folder."""

    def on_epoch(row: dict[str, float]) -> None:
        epoch = int(row["epoch"])
        certified = row["validation_certified_accuracy"]
        stage = f"epoch {epoch}/{config.epochs} loss {row['train_loss']:.3f} certified {100 * certified:.1f} %"
        report(Progress(folder.id, stage, epoch / config.epochs))

    folder.create(config)
    report(Progress(folder.id, "training", 0.0))
    result = train(config, data, folder=folder.path, device=device, on_epoch=on_epoch)
    folder.write_history(result.history)
    save_checkpoint(folder.checkpoint_path, result.model.state_dict())
    return result


def run_cell(
    config: CellConfig,
    output: str | Path,
    *,
    data_root: str | Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
) -> dict[str, Any]:
    """Train and evaluate one cell, write its run folder, and return its summary.

    Raises:
        CertificateViolationError: after saving the counterexample as counterexample.safetensors in the folder.
        ValueError: data, settings, model or files that can't be used.
    """
    exact_float32()
    folder = RunFolder.of(output, config)
    data = cell_data(config, data_root)
    trained = train_cell(config, data, folder, device=device, report=report)
    path = folder.path / "counterexample.safetensors"
    path.unlink(missing_ok=True)
    try:
        found = evaluate(trained.model, config, data, report=lambda stage: report(Progress(folder.id, stage, 1.0)))
    except CertificateViolationError as error:
        if not error.example:
            raise
        save_checkpoint(path, error.example)
        raise CertificateViolationError(f"{error}; saved in {path}", error.example) from error
    report(Progress(folder.id, "step time", 1.0))
    folder.write_samples(found.samples)
    ratio = {"step_ratio": step_ratio(config, data, device=device)}
    folder.write_summary(found.results | _training_results(trained) | ratio | _machine(device))
    forget(folder.path, config)
    return folder.read_summary()


def load_model(folder: RunFolder, data: Dataset, device: str = "cpu") -> nn.Module:
    """The trained model of a run folder, in eval mode; raises StoreError where its files are missing or damaged."""
    config = folder.read_config()
    if not folder.checkpoint_path.exists():
        raise StoreError(f"{folder.checkpoint_path}: missing; the run has not been trained to its end")
    model = build(config, data, with_checkpoint=False)
    load_checkpoint(model, folder.checkpoint_path)
    return model.to(device).eval()


def _training_results(trained: TrainResult) -> dict[str, Any]:
    return {
        "gradient_norm": _defined(trained.gradient_norm),
        "step_s": _defined(trained.step_s),
        "train_s": trained.train_s,
        "best_epoch": trained.best_epoch,
        "diverged": trained.diverged,
        "status": trained.status,
    }


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _machine(device: str) -> dict[str, Any]:
    cuda = torch.device(device).type == "cuda"
    return {
        "speccert_version": __version__,
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "device": device,
        "machine": torch.cuda.get_device_name(device)
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }

"""One cell from start to end: train, evaluate, write its run folder."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..certify import TrainingBound
from .checkpoints import load_checkpoint, save_checkpoint
from .config import CellConfig
from .contents import content_digest, contents_digest
from .data import Dataset, load_dataset
from .evaluation import CertificateViolationError, Evaluation, evaluate
from .execution import Execution
from .fitting import seeded
from .precision import exact_float32
from .store import RunFolder, StoreError, write_atomic
from .summary import attempts_json, bounds_json
from .timing import step_ratio
from .tracking import make_tracker
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
    return _data(
        config.dataset,
        data_root,
        config.seed,
        config.validation_fraction,
        config.train_samples,
        config.test_samples,
        content_digest(config.dataset),
    )


@functools.lru_cache(maxsize=2)  # a worker's next cell has mostly the same data; `content` tells a changed file
def _data(
    name: str,
    root: str | Path | None,
    seed: int,
    validation_fraction: float,
    train_samples: int | None,
    test_samples: int | None,
    content: str | None,
) -> Dataset:
    return load_dataset(
        name,
        root=root,
        seed=seed,
        validation_fraction=validation_fraction,
        train_samples=train_samples,
        test_samples=test_samples,
    )


def check_cell(config: CellConfig, data: Dataset) -> None:
    """Raise ValueError where the model can't be built for the data or has no certificate; nothing is written.

    Also where adversarial points on whole pixels are asked for, and the data's are not.
    """
    _check_pixels(config, data)
    with seeded(config.seed, torch.device("cpu")), torch.no_grad():
        TrainingBound(build(config, data), data.input_shape).pairwise()


def _check_pixels(config: CellConfig, data: Dataset) -> None:
    x = data.test.x
    if config.integer_pixels and not torch.equal((255 * x.double()).round().div(255).to(x.dtype), x):
        raise ValueError("integer_pixels: expected test samples whose pixels are k/255 with whole k, got others")


def train_cell(
    config: CellConfig,
    data: Dataset,
    folder: RunFolder,
    *,
    device: str = "cpu",
    ranks: int = 1,
    report: Report = lambda progress: None,
    on_epoch: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> TrainResult:
    """Train a cell, or resume it, and write config, history and checkpoint to its folder.

    Args:
        ranks: processes that train it together; see `train`.
        report: is told each epoch in words; what it raises ends the training, which can be resumed.
        on_epoch: is given each row of the history.
    """

    def after_epoch(row: dict[str, float]) -> None:
        epoch = int(row["epoch"])
        certified = row["validation_certified_accuracy"]
        stage = f"epoch {epoch}/{config.epochs} loss {row['train_loss']:.3f} certified {100 * certified:.1f} %"
        on_epoch(row)  # first: the epoch is kept, even where the report ends the training
        report(Progress(folder.id, stage, epoch / config.epochs))

    folder.create(config)
    report(Progress(folder.id, "training", 0.0))
    result = train(config, data, folder=folder.path, device=device, on_epoch=after_epoch, ranks=ranks)
    report(Progress(folder.id, "trained", 1.0))
    folder.write_history(result.history)
    save_checkpoint(folder.checkpoint_path, result.model.state_dict())
    return result


def run_cell(
    config: CellConfig,
    execution: Execution,
    *,
    report: Report = lambda progress: None,
) -> dict[str, Any]:
    """Train and evaluate one cell, write its run folder, and return its summary.

    `report` is called before anything is written but the resume file; what it raises ends the cell there.

    Raises:
        CertificateViolationError: after saving the counterexample as counterexample.safetensors in the folder.
        ValueError: data, settings, model or files that can't be used.
    """
    start = time.perf_counter()
    exact_float32()
    folder = RunFolder.of(execution.output, config)
    content = contents_digest(config)  # before anything is read: what changes meanwhile is then seen to differ
    data = cell_data(config, execution.data_root)
    _check_pixels(config, data)
    ranks, device = execution.gpus_per_cell, execution.device.split(",")[0]
    with make_tracker(execution.track, config, folder, str(Path(execution.output).resolve())) as tracker:
        trained = train_cell(
            config, data, folder, device=execution.device, ranks=ranks, report=report, on_epoch=tracker.epoch
        )
        found = _evaluated(trained, config, data, folder, report)
        report(Progress(folder.id, "step time", 1.0))
        results = found.results | _training_results(trained) | {"step_ratio": step_ratio(config, data, device=device)}
        report(Progress(folder.id, "writing", 1.0))
        folder.write_samples(found.samples)
        write_atomic(folder.bounds_path, bounds_json(found.bounds))
        write_atomic(folder.attempts_path, attempts_json(found.attempts))
        save_checkpoint(folder.adversarial_path, found.adversarial)
        save_checkpoint(folder.closest_path, found.closest)
        results |= _machine(device) | {"ranks": ranks, "content": content}
        folder.write_summary(results | {"cell_s": time.perf_counter() - start})
        forget(folder.path, config)
        summary = folder.read_summary()
        tracker.finish(summary)
    return summary


def _evaluated(
    trained: TrainResult, config: CellConfig, data: Dataset, folder: RunFolder, report: Report
) -> Evaluation:
    """The evaluation; where it breaks a certificate, the counterexample is saved first."""
    path = folder.path / "counterexample.safetensors"
    path.unlink(missing_ok=True)
    try:
        return evaluate(
            trained.model,
            config,
            data,
            report=lambda stage: report(Progress(folder.id, stage, 1.0)),
            diagnosed=not trained.diverged,
        )
    except CertificateViolationError as error:
        if not error.example:
            raise
        try:
            save_checkpoint(path, error.example)
            where = f"saved in {path}"
        except StoreError as failure:  # the broken certificate is what matters
            where = f"the example could not be saved: {failure}"
        raise CertificateViolationError(f"{error}; {where}", error.example) from error


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
        "machine": torch.cuda.get_device_name(device) if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

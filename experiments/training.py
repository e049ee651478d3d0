"""Training of one cell: seeded, logged, stopped when it diverges, and resumed to the same bits when it was killed.

In one process, or in several that share every batch; see `train`.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..certify import certified_accuracy, estimate_radii, lipschitz
from ..models import build_model, constrain
from .checkpoints import load_checkpoint
from .config import CellConfig, config_id
from .contents import contents_digest
from .data import Dataset, Split
from .distributed import Launch, rank_devices
from .fitting import Fitter, NonFiniteError, seeded
from .group import ALONE, Group
from .resume import ResumeFile
from .store import StoreError

__all__ = ["TrainResult", "build", "fit", "forget", "train"]

FINISHED, NON_FINITE, AT_CHANCE = "finished", "non-finite", "at-chance"
_RESUME_NAME = "resume.pt"
_EVALUATION_BATCH = 1024
_COLUMNS = (
    *("epoch", "train_loss", "train_accuracy", "validation_accuracy", "validation_certified_accuracy"),
    *("lipschitz_bound", "largest_layer_norm", "gradient_norm", "lr", "epoch_s", "step_s"),
)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained model, and how the training went.

    Attributes:
        model: with the weights of the best epoch, in eval mode.
        history: a row an epoch: epoch, train_loss, train_accuracy, validation_accuracy, validation_certified_accuracy,
            lipschitz_bound, largest_layer_norm (of the affine runs), gradient_norm (mean over the steps, before
            clipping), lr (of the last step), epoch_s, step_s (median). What a divergence left undefined is NaN.
        best_epoch: the epoch, from 1, of the highest certified accuracy on the validation part, at the middle one of
            the config's positive eps; ties by accuracy, then by the later epoch. 0 = the start weights, when no epoch
            ended with finite ones.
        status: "finished", "non-finite" (NaN or overflow in the loss, the gradient or the weights ended the training)
            or "at-chance" (the train accuracy of the last epoch is at most 1.5 / K).
        ranks: processes that shared the training; those of the last call where it was resumed.
    """

    model: nn.Module
    history: pd.DataFrame
    best_epoch: int
    status: str
    ranks: int = 1

    @property
    def diverged(self) -> bool:
        """Whether the training failed, in either way."""
        return self.status != FINISHED

    @property
    def gradient_norm(self) -> float:
        """Mean gradient norm over the epochs that ended with finite numbers; NaN where none did."""
        return float(self.history["gradient_norm"].mean())

    @property
    def step_s(self) -> float:
        """Median over those epochs of the median step time, in seconds; NaN where none did."""
        return float(self.history["step_s"].median())

    @property
    def train_s(self) -> float:
        """Time of all epochs with their validation, in seconds, those before an interruption included."""
        return float(self.history["epoch_s"].sum())


OnEpoch = Callable[[dict[str, float]], None]


def train(
    config: CellConfig,
    data: Dataset,
    *,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    on_epoch: OnEpoch | None = None,
    ranks: int = 1,
) -> TrainResult:
    """Train one cell on the train part of `data`, choosing the epoch on the validation part.

    The result depends on the config, the data and the machine only: the seed sets the start weights, and (seed, epoch)
    the order of the data and the augmentation; torch's global generators are left as they were. With different numbers
    of ranks it is the same up to rounding: the batch is that of the config whatever their number, its mean loss and
    the gradient are those of the whole batch. (What a layer such as dropout draws by itself differs.)

    Args:
        config: what to train.
        data: raw inputs; the normalisation that the config names becomes the model's first layer.
        folder: where a resume file is kept from epoch to epoch; after an interruption, a call with the same folder goes
            on behind the last whole epoch, to the same bits (on a GPU: as far as its kernels are deterministic). It
            stays at the end, so that work behind the training can be interrupted too; see `forget`.
        device: where to train: "cpu", "cuda" or "cuda:N". With several ranks on GPUs, "cuda" stands for the first ones
            that this process sees, and "cuda:2,cuda:3" names one a rank. The model ends on the first.
        on_epoch: called in this process with each row of the history, after the resume file was written. Whatever it
            raises ends the training there and is passed on; the next call with the same folder goes on.
        ranks: processes that train together on this machine, as torchrun starts them, each on its part of every batch;
            by NCCL on GPUs, by gloo on the CPU, where they share this process's threads.

    Raises:
        ValueError: settings that do not fit the data or the model, or devices that do not fit the ranks.
        StoreError: a resume file or start weights that cannot be used, or a resume file that cannot be written.
        RankError: one of several ranks died or raised an error; the others have been stopped.
    """
    devices = rank_devices(device, ranks)
    if ranks == 1:
        return fit(config, data, folder=folder, device=devices[0], on_epoch=on_epoch).result()
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return train(config, data, folder=made, device=device, on_epoch=on_epoch, ranks=ranks)
    state = _resume_file(folder, config).read()
    if state is None or _is_unfinished(config, state["status"], len(state["history"])):
        Launch(config, data, Path(folder), devices).run(on_epoch or (lambda row: None))
    return fit(config, data, folder=folder, device=devices[0]).result(ranks)


def fit(
    config: CellConfig,
    data: Dataset,
    *,
    folder: str | Path | None,
    device: torch.device,
    on_epoch: OnEpoch | None = None,
    group: Group = ALONE,
) -> Training:
    """Take a training up where it is and bring it to its end, in this process as a member of `group`.

    Every member reads the resume file; the first one writes it and calls `on_epoch`.
    """
    training = Training(config, data, device, group)
    resume = None if folder is None else _resume_file(folder, config)
    if resume is not None and (state := resume.read()) is not None:
        training.load(state)
    while training.unfinished:
        row = training.epoch()
        if not group.first:
            continue
        if resume is not None:
            resume.write(training.state())
        if on_epoch is not None:
            on_epoch(row)
    return training


def forget(folder: str | Path, config: CellConfig) -> None:
    """Remove the resume file that `train` left in a folder."""
    _resume_file(folder, config).remove()


def _resume_file(folder: str | Path, config: CellConfig) -> ResumeFile:
    return ResumeFile(Path(folder) / _RESUME_NAME, " ".join(filter(None, (config_id(config), contents_digest(config)))))


def _is_unfinished(config: CellConfig, status: str, epochs: int) -> bool:
    return status == FINISHED and epochs < config.epochs


class Training:
    """One training between two epochs, as a member of a group sees it."""

    def __init__(self, config: CellConfig, data: Dataset, device: torch.device, group: Group = ALONE) -> None:
        self.config, self.input_shape, self.classes = config, data.input_shape, data.num_classes
        self._group = group
        with seeded(config.seed, device):
            self.model = build(config, data).to(device)
        self.fitter = Fitter(self.model, config, _moved(data.train, device), group)
        self.validation = _moved(data.validation, device)
        self.history: list[dict[str, float]] = []
        self.status = FINISHED
        self.best: dict[str, Any] = {"epoch": 0, "key": [-1.0, -1.0], "weights": _copied(self.model.state_dict())}

    @property
    def unfinished(self) -> bool:
        """Whether there is an epoch to come."""
        return _is_unfinished(self.config, self.status, len(self.history))

    def epoch(self) -> dict[str, float]:
        """Train and validate one epoch; its row joins the history, the same in every member of the group."""
        start = time.perf_counter()
        row: dict[str, float] = dict.fromkeys(_COLUMNS, math.nan) | {"epoch": len(self.history) + 1}
        status = FINISHED
        try:
            row |= self.fitter.epoch(len(self.history) + 1)
            if self._group.first:
                row |= self._validate()
                self._keep_best(row)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            # an overflow surfaces in many ways, e.g. as a factorisation that fails; any other error is passed on
            if not isinstance(error, NonFiniteError) and not _has_overflowed(self.model):
                raise
            status = NON_FINITE
        row["epoch_s"] = time.perf_counter() - start
        row, self.status = self._group.agreed((row, status))
        self.history.append(row)
        return row

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        self.model.eval()
        x, y, config = self.validation.x, self.validation.y, self.config
        with parametrize.cached():
            bound = lipschitz(self.model, self.input_shape, "product", config.norm)  # an epoch is too short for more
            logits = torch.cat([self.model(part) for part in torch.split(x, _EVALUATION_BATCH)])
        if not bool(logits.isfinite().all()):
            raise NonFiniteError("the logits of the validation part are not finite")
        radii = estimate_radii(logits, y, bound.pairwise)
        return {
            "validation_accuracy": float((logits.argmax(1) == y).double().mean()),
            "validation_certified_accuracy": float(certified_accuracy(radii, _validation_eps(config))),
            "lipschitz_bound": bound.upper,
            "largest_layer_norm": max((layer.upper for layer in bound.layers), default=1.0),
        }

    def _keep_best(self, row: Mapping[str, float]) -> None:
        key = [row["validation_certified_accuracy"], row["validation_accuracy"]]
        if key >= self.best["key"]:
            self.best = {"epoch": int(row["epoch"]), "key": key, "weights": _copied(self.model.state_dict())}

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on; no generator is in it, since (seed, epoch) sets them.

        After a divergence there is no next epoch, and the weights, which may be NaN, are left out.
        """
        state = {"status": self.status, "history": self.history, "best": self.best}
        if self.status != FINISHED:
            return state
        bound = self.fitter.bound
        return state | {
            "model": self.model.state_dict(),
            "optimizer": self.fitter.optimizer.state_dict(),
            "bound": {} if bound is None else bound.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.status, self.history, self.best = state["status"], state["history"], state["best"]
        if self.status != FINISHED:
            return
        self.model.load_state_dict(state["model"])
        self.fitter.optimizer.load_state_dict(state["optimizer"])
        if self.fitter.bound is not None:
            device = self.validation.x.device
            self.fitter.bound.load_state({key: vector.to(device) for key, vector in state["bound"].items()})

    def result(self, ranks: int = 1) -> TrainResult:
        """The model with its best weights, and the log."""
        history = pd.DataFrame(self.history, columns=list(_COLUMNS)).astype({"epoch": "int64"})
        status = self.status
        if status == FINISHED and history["train_accuracy"].iloc[-1] <= 1.5 / self.classes:
            status = AT_CHANCE
        self.model.load_state_dict(self.best["weights"])
        self.model.zero_grad()
        return TrainResult(self.model.eval(), history, self.best["epoch"], status, ranks)


def build(config: CellConfig, data: Dataset, *, with_checkpoint: bool = True) -> nn.Module:
    """The model with its normalisation, its start weights where a checkpoint is named, and its constraint.

    Raises:
        ValueError: a model that can't be built for the data, or that the constraint does not fit.
        StoreError: start weights that can't be used.
    """
    model = build_model(
        config.model,
        data.input_shape,
        data.num_classes,
        width=config.width,
        depth=config.depth,
        activation=config.activation,
        mean=None if config.normalise == "none" else data.mean,
        std=data.std if config.normalise == "standard" else None,
    )
    if config.checkpoint is None or not with_checkpoint:
        return constrain(model, config.threshold, config.constraint, input_shape=data.input_shape)
    refusal = _refusal(model, config.checkpoint)
    model = constrain(model, config.threshold, config.constraint, input_shape=data.input_shape)
    if refusal is not None and _refusal(model, config.checkpoint) is not None:
        raise refusal
    return model


def _refusal(model: nn.Module, checkpoint: str) -> StoreError | None:
    """Load the weights; where they do not fit, the reason. A checkpoint fits before or after the constraint is on."""
    try:
        load_checkpoint(model, checkpoint)
    except StoreError as error:
        return error
    return None


def _moved(split: Split, device: torch.device) -> Split:
    return Split(split.x.to(device), split.y.to(device))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def _validation_eps(config: CellConfig) -> float:
    """The middle one of the positive eps, the upper of two; 0 where there is none."""
    positive = [eps for eps in config.eps if eps > 0]
    return positive[len(positive) // 2] if positive else 0.0


def _has_overflowed(model: nn.Module) -> bool:
    """Whether a weight is NaN, infinite, or so large that products of a few overflow."""
    weights = [p.detach() for p in model.parameters() if p.is_floating_point()]
    return any(not bool((w.abs() <= torch.finfo(w.dtype).max ** 0.25).all()) for w in weights)

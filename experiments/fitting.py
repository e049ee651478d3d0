"""The pass over the training data: steps, their log, and the stop at the first number that is not finite."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize

from ..certify import TrainingBound
from ..models import retract, spectral_penalty
from .augment import augment
from .config import CellConfig
from .data import Split
from .group import ALONE, Group
from .losses import build_loss
from .optimisers import build_optimizer, learning_rate

__all__ = ["Fitter", "NonFiniteError", "seeded"]


class NonFiniteError(ArithmeticError):
    """A loss, gradient, weight or logit that is NaN or infinite."""


class _Objective(nn.Module):
    """What a step minimises. Every use of the parameters lies in its forward, where `Group.joined` can see it."""

    def __init__(self, model: nn.Module, config: CellConfig, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self._loss = build_loss(
            config.loss, eps=config.loss_eps, temperature=config.temperature, offset=config.loss_offset
        )
        self._penalty_weight = config.penalty_weight if config.constraint == "penalty" else None
        self.bound = None
        if self._loss.needs_bound:
            free = not config.constraint.startswith("orthogonal") or math.isinf(config.threshold)
            self.bound = TrainingBound(model, input_shape, through_norms=free)

    def forward(self, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """`weight` times the objective; the mean loss without the penalty, and the logits, without gradients."""
        with parametrize.cached():  # every constrained weight is computed once a step
            logits = self.model(x)
            loss = self._loss(logits, y, None if self.bound is None else self.bound.pairwise())
            objective = loss
            if self._penalty_weight is not None:
                objective = loss + self._penalty_weight * spectral_penalty(self.model)
        return weight * objective, loss.detach(), logits.detach()


class Fitter:
    """Updates a model, epoch by epoch.

    Several processes that are a group and each have a `Fitter` on equal arguments do the steps of one process up to
    rounding: each takes its part of every batch, and gradients and sums are those of the whole.

    Args:
        model: constrained already, on its device.
        config: loss, optimiser, schedule, batches, augmentation, clipping and penalty.
        split: the train part, on the same device.
        group: the processes that share the work.

    Attributes:
        optimizer: its state belongs into a resume file.
        bound: the running estimate of the pairwise constants, where the loss needs them; its state does too.

    Raises:
        ValueError: batch normalisation in a group of several.
    """

    def __init__(self, model: nn.Module, config: CellConfig, split: Split, group: Group = ALONE) -> None:
        self._model, self._config, self._split, self._group = model, config, split, group
        objective = _Objective(model, config, tuple(split.x.shape[1:]))
        self.bound = objective.bound
        self._objective = group.joined(objective)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._steps = math.ceil(len(split) / config.batch_size)
        self.optimizer = build_optimizer(self._parameters, config)

    def epoch(self, number: int) -> dict[str, float]:
        """Run one epoch, counted from 1; (seed, number) alone sets the order of the data and all other randomness.

        Returns:
            train_loss and train_accuracy (means over the samples as they came by), gradient_norm (mean over the steps
            of the global l2 norm before clipping), lr (of the last step), step_s (median, in seconds).

        Raises:
            NonFiniteError: the loss or the gradient is NaN or infinite; in every process of the group at the same step.
        """
        bound = {} if self.bound is None else self.bound.state()
        self._group.align([*self._model.state_dict().values(), *bound.values()])
        seed = self._config.seed * 1_000_003 + number
        # what a layer draws for its part of the batch differs from process to process; all else is drawn from `seed`
        with seeded(seed + (self._group.rank << 40), self._split.x.device):
            return self._pass(number, torch.Generator().manual_seed(seed % 2**63))

    def _pass(self, number: int, generator: torch.Generator) -> dict[str, float]:
        x, y = self._split.x, self._split.y
        order = torch.randperm(len(y), generator=generator).to(x.device)
        sums = torch.zeros(3, dtype=torch.float64, device=x.device)
        last, lr, clock = torch.zeros((), device=x.device), 0.0, _Clock(x.device)
        self._model.train()
        for step, chosen in enumerate(torch.split(order, self._config.batch_size)):
            _check(last.item())  # of the step before: a GPU still has work queued while this waits
            lr = self._set_learning_rate((number - 1) * self._steps + step)
            inputs = augment(x[chosen], self._config.augment, generator)
            found = self._step(inputs, y[chosen])
            sums += found
            last = found.sum()
            clock.tick()
        loss_sum, hit_sum, norm_sum = sums.tolist()
        _check(loss_sum + norm_sum)
        row = {"train_loss": loss_sum / len(y), "train_accuracy": hit_sum / len(y)}
        return row | {"gradient_norm": norm_sum / self._steps, "lr": lr, "step_s": clock.median_s()}

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(self._config, step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _step(self, x: Tensor, y: Tensor) -> Tensor:  # 3, float64
        """One update; returns the sum of the losses without the penalty, the right predictions, the gradient's norm."""
        part, own = self._group.part(len(y))
        self.optimizer.zero_grad()
        objective, loss, logits = self._objective(x[part], y[part], self._group.weight(own, len(y)))
        objective.backward()
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._config.gradient_clip is not None:
            clip_grads_with_norm_(self._parameters, self._config.gradient_clip, norm)
        self.optimizer.step()
        retract(self._model)
        hits = (logits.argmax(1) == y[part])[:own].sum()
        sums = self._group.total(torch.stack([loss.double() * own, hits.double()]))
        return torch.cat([sums, norm.detach().double()[None]])


def _check(value: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteError("the loss or the gradient is not finite")


class _Clock:
    """Times between ticks; on a GPU by events in its queue, so that no step has to wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.tick()

    def tick(self) -> None:
        if not self._cuda:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def median_s(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            lengths = [start.elapsed_time(end) / 1000 for start, end in pairs]
        else:
            lengths = [end - start for start, end in zip(self._times, self._times[1:], strict=False)]
        return float(torch.tensor(lengths, dtype=torch.float64).median())


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators of the CPU and of `device`, seeded for a while and then put back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed % 2**63)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed % 2**63)
        yield

"""Proved margins of the executed network, and the radii that follow from them in every norm.

The real network's margins come from one float64 pass, less its own running error; what the executed network may differ
from the real one, anywhere in the ball, is taken off (see `deviation`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .arithmetic import FLOAT64, proving
from .deviation import Norms, Spread, overflow_limit, peaks, plan, spread, step_errors
from .digests import model_digest
from .execution import Executed, Float64Pass, Visit, executed
from .graph import check_model, trace
from .lipschitz import LipschitzBound, lipschitz
from .rounding import ROOT_2, down, gamma, up, up_mul, up_sqrt
from .rules import leaf_types

_WIDE = 1 + 2.0**-40  # covers the rounding of a dozen operations
_HASHED = 1024  # samples converted at once for their digest


@dataclass(frozen=True)
class Margins:
    """What one pass over samples proves, whatever the norm of the ball.

    Attributes:
        label: [B] the class that is certified.
        prediction: [B] the class that the executed network gives.
        logits: [B, K] its logits.
        real: [B, K] lower bounds of f_label - f_j of the real network at the sample; infinite in column `label`.
        lost: [B, K] upper bounds of what rounding takes off at the sample itself.
        slope: [B, K] upper bounds of what it takes off further per unit of l2 distance.
        limit: [B] l2 distance up to which no number can overflow.
        digest: of the samples, whatever their type, and of the network and its arithmetic.
    """

    label: Tensor
    prediction: Tensor
    logits: Tensor
    real: Tensor
    lost: Tensor
    slope: Tensor
    limit: Tensor
    digest: str

    @property
    def lowest(self) -> Tensor:  # [B]
        """The proved margin to the strongest other class, of the real network; negative where misclassified."""
        return self.real.amin(1)


@dataclass(frozen=True)
class Radii:
    """Certified radii of samples in one norm.

    Attributes:
        radius: [B] float64 in raw input units, for the executed network; 0 where the prediction is not the label.
        real: [B] that of the network in real arithmetic.
        limiting: [B] the class whose pair with the label sets the radius.
        overflow: [B] whether only a possible overflow sets it.
    """

    radius: Tensor
    real: Tensor
    limiting: Tensor
    overflow: Tensor


class Certifier:
    """A network with all that is proved about it once, before any sample.

    Args:
        model: any module whose operations have rules, in eval mode.
        input_shape: of one input, without the batch.
        arithmetic: in which it runs: "float64", "float32", "float16", "bfloat16"; "real" leaves rounding out; None or
            "model" takes that of its own tensors. Another than its own rounds weights and inputs to that type.
        norm: that of the ball: "l2", "linf" or "l1".
        method: of the Lipschitz bound; "local" takes that of `lipschitz` (see `local_radii` for the rest).
        budget: seconds for the bound, see `lipschitz`.
        bound: constants computed before for this very model and input shape, in that norm; none where its weights are
            converted.

    Raises:
        ValueError: as `lipschitz`; an operation without a rounding rule; a bound of another model or norm.
    """

    @proving()
    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        arithmetic: str | None = None,
        *,
        norm: str = "l2",
        method: str = "product",
        bound: LipschitzBound | None = None,
        budget: float = 60.0,
    ) -> None:
        check_model(model)
        self.executed: Executed = executed(model, arithmetic)
        self.input_shape = tuple(input_shape)
        if bound is not None and self.executed.rounded:
            raise ValueError(f"bound: expected none where the model is converted to {self.executed.arithmetic.name}")
        graph = trace(self.executed.model, self.input_shape, leaf_types())
        if bound is None:
            bound = lipschitz(self.executed.model, self.input_shape, method, norm, budget=budget)
        elif bound.norm != norm:
            raise ValueError(f"bound: expected one in {norm}, got one in {bound.norm}")
        self._digest = model_digest(graph)
        self._check(bound)
        self.bound = bound
        record = self.bound.records["l2"]
        self._steps = plan(graph, Norms({run.end: run.bounds.upper for run in record.runs}, dict(record.constants)))
        self.graph, self._input, self._output = graph, graph.input, graph.output
        self._pass = Float64Pass(graph)
        last = next(step for step in self._steps if step.node is graph.output)
        self._anchor = graph.output if last.anchor is None else last.anchor
        self._difference = _row_differences(record.pairwise, record.last_constant, last.span)
        self._running = step_errors(self._steps, FLOAT64)
        self._errors = step_errors(self._steps, self.executed.arithmetic)
        self._balls = {rounds: self._ball(rounds) for rounds in (False, True)}

    def _check(self, bound: LipschitzBound) -> None:
        if bound.digest != self._digest:
            raise ValueError("bound: expected one computed for this very model; its layers or weights are others now")
        if bound.input_shape != self.input_shape:
            raise ValueError(f"bound: expected one for inputs {self.input_shape}, got one for {bound.input_shape}")

    def _ball(self, rounds: bool) -> tuple[Tensor, list[Tensor]]:
        """Growth per unit of the l2 radius: of the differences' deviation [K, K], of the numbers that may overflow."""
        sizes = {step.node: torch.tensor([step.lipschitz], dtype=torch.float64) for step in self._steps}
        entry = self.executed.arithmetic.unit if rounds else 0.0
        found = spread(self._steps, self._errors, sizes, entry, fixed=False)
        return self._lost(found, torch.arange(len(self._difference))), peaks(self._steps, sizes, found, fixed=False)

    @proving()
    @torch.no_grad()
    def margins(
        self,
        x: Tensor,  # [B, *input_shape]
        y: Tensor | None = None,  # [B] integers; the prediction where None
        batch_size: int = 1024,
    ) -> Margins:
        """Predict, run the float64 pass, and bound what rounding takes off; everything it gives is on the CPU.

        Raises:
            ValueError: NaN or infinite inputs or logits, no samples, labels that are no class.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"x: expected inputs of {self.input_shape}, got {tuple(x.shape[1:])}")
        logits = self.executed.logits(x, batch_size).cpu()
        prediction = logits.argmax(1)
        label = prediction if y is None else _labels(y, len(x), len(self._difference))
        batches = zip(torch.split(x, batch_size), torch.split(label, batch_size), strict=True)
        parts = [self._proved(part, classes) for part, classes in batches]
        real, lost, limit = (torch.cat(column) for column in zip(*parts, strict=True))
        slope = self._balls[self.executed.rounds(x.dtype)][0][label]
        return Margins(label, prediction, logits, real, lost, slope, limit, self.digest(x))

    def digest(self, x: Tensor) -> str:
        """What ties margins to these samples, as numbers, and to this network in its arithmetic."""
        found = hashlib.sha256(f"{self._digest} {self.executed.arithmetic.name}".encode())
        for part in torch.split(x.detach(), _HASHED):
            found.update((part.to("cpu", torch.float64) + 0.0).numpy().tobytes())  # -0.0 counts as 0.0
        return found.hexdigest()

    def _proved(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower bounds of the real margins, what rounding takes off them, and the radius free of overflow."""
        computed, logits = self._computed(x)
        running = spread(self._steps, self._running, computed, 0.0, computed=True)
        error = self._lost(running, label)
        real = down(down(logits.gather(1, label[:, None]) - logits) - error)
        sound = (overflow_limit(FLOAT64, peaks(self._steps, computed, running)) > 0)[:, None] & torch.isfinite(error)
        real = torch.where(sound, real, -math.inf).scatter(1, label[:, None], math.inf)
        arithmetic = self.executed.arithmetic
        if arithmetic.unit == 0.0:
            return real, torch.zeros_like(real), torch.full_like(real[:, 0], math.inf)
        sizes = {node: (norm + running[node].whole) * _WIDE for node, norm in computed.items()}
        rounds, entry = self.executed.rounds(x.dtype), torch.zeros_like(real[:, 0])
        if rounds:
            entry = arithmetic.unit * sizes[self._input] + arithmetic.tiny * math.sqrt(x[0].numel()) * _WIDE
        found = spread(self._steps, self._errors, sizes, entry * _WIDE)
        limit = overflow_limit(arithmetic, peaks(self._steps, sizes, found), self._balls[rounds][1])
        return real, self._lost(found, label), limit

    @proving()
    def tensors(
        self,
        x: Tensor,  # [B, *input_shape]
        nodes: Collection[fx.Node],
    ) -> dict[fx.Node, tuple[Tensor, Tensor]]:  # [B, *shape], [B]
        """Tensors of the real network at samples as a float64 pass gives them, and what each may be off in l2.

        They are proved where `Margins.real` is finite.
        """
        kept: dict[fx.Node, Tensor] = {}
        wanted = frozenset(nodes)

        def keep(node: fx.Node, value: Tensor) -> None:
            if node in wanted:
                kept[node] = value.cpu().clone()  # the network may write into its tensors later

        computed, _ = self._computed(x, keep)
        running = spread(self._steps, self._running, computed, 0.0, computed=True)
        return {node: (kept[node], running[node].whole) for node in nodes}

    def _computed(self, x: Tensor, keep: Visit = lambda node, value: None) -> tuple[dict[fx.Node, Tensor], Tensor]:
        """Norms of all tensors of the float64 pass, and its logits; `keep` is told every tensor too."""
        norms: dict[fx.Node, Tensor] = {}
        moved = {step.node: step.inputs[0] for step in self._steps if step.moves}

        def visit(node: fx.Node, value: Tensor) -> None:
            norms[node] = norms[moved[node]] if node in moved else _norms(value)
            keep(node, value)

        return norms, self._pass.run(x, visit).cpu()

    def _lost(self, found: dict[fx.Node, Spread], label: Tensor) -> Tensor:  # [B] -> [B, K]
        """kappa E + sqrt(2) l for the difference of the label's logit and each other."""
        whole, local = found[self._anchor].whole, found[self._output].local
        return (self._difference[label] * whole[:, None] + ROOT_2 * local[:, None]) * _WIDE

    def stretch(self, norm: str) -> float:
        """At least the l2 norm of an input per unit of its norm."""
        return up_sqrt(float(math.prod(self.input_shape))) if norm == "linf" else 1.0

    @proving()
    def radii(
        self,
        margins: Margins,
        bound: LipschitzBound | None = None,
    ) -> Radii:
        """r = min over j of (m_j - D_j(0)) / (K_j + D_j'), D_j(rho) what rounding takes off within l2 distance rho.

        Args:
            margins: of this network.
            bound: of this network in the norm that is wanted; None is the one that the certifier was built with.
        """
        bound = self.bound if bound is None else bound
        self._check(bound)
        stretch = self.stretch(bound.norm)
        constants, right = bound.pairwise.cpu()[margins.label], margins.prediction == margins.label
        pairs = ratio(down(margins.real - margins.lost), up(constants + up(margins.slope * stretch)))
        bare = torch.where(right, ratio(margins.real, constants).amin(1), 0.0)
        if self.executed.arithmetic.unit == 0.0:
            pairs = ratio(margins.real, constants)
        least = torch.where(right, pairs.amin(1), 0.0)
        limit = torch.where(margins.limit < math.inf, down(margins.limit / stretch).clamp_min(0.0), math.inf)
        return Radii(torch.minimum(least, limit), bare, pairs.argmin(1), limit < least)


def _norms(values: Tensor) -> Tensor:  # [B, ...] float64 -> [B] on the CPU
    """Upper bounds of the rows' l2 norms: squares may underflow (2^-510 each), or overflow to infinity."""
    count = values[0].numel()
    found: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1).cpu()
    return found * (1 + 2 * gamma(count + 8)) + math.sqrt(count) * 2.0**-510


def ratio(margins: Tensor, constants: Tensor) -> Tensor:
    """Lower bounds of margins / constants, at least 0; infinite for a positive margin that nothing can change."""
    quotient = torch.where(constants == 0, math.inf, down(margins / constants))
    # not finite where nothing is proved: the comparisons then fail
    return torch.where((margins > 0) & (constants >= 0), quotient, 0.0).clamp_min(0.0)


def _row_differences(pairwise: Tensor, constant: float, span: float) -> Tensor:  # [K, K]
    """Upper bounds of the norms of the last run's row differences, from the pairwise constants that they gave."""
    if constant > 0:
        return up(pairwise.cpu() / constant).fill_diagonal_(0.0)
    return torch.full_like(pairwise.cpu(), up_mul(ROOT_2, span)).fill_diagonal_(0.0)


def _labels(y: Tensor, samples: int, classes: int) -> Tensor:
    """The labels as int64 on the CPU; ValueError where they are no classes."""
    if y.shape != (samples,):
        raise ValueError(f"y: expected {samples} labels, got a tensor of shape {tuple(y.shape)}")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"y: expected integer labels, got {y.dtype}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"y: expected labels 0..{classes - 1}, got {int(y.min())}..{int(y.max())}")
    return y.cpu().to(torch.int64)

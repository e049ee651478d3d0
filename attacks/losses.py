"""What fixed-eps attacks climb: losses of the logits, >= 0 or large where a sample is adversarial, row by row.

All are computed in float64 from differences of logits, so that a shift or a large scale of the logits takes no digits
away. With f the logits, y the label, f_(i) the i-th largest logit and m = max_{j != y} f_j - f_y:

- "ce": log sum_{j != y} exp(f_j) - f_y. The cross-entropy is log(1 + exp(.)) of it, so the two have the same
  gradient direction and the same order; but the cross-entropy is 0 in float32 at a margin of 17, with its gradient.
- "margin": m, as Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017, f_6.
- "dlr": m / (f_(1) - f_(3)), Croce and Hein, Reliable Evaluation, ICML 2020, equation 6; m with two classes.
- "logit-difference": max_j (f_j - f_y) / s_j with s_j = ||grad(f_j - f_y)(x)||_q over the 10 strongest classes at x:
  to first order minus the distance to the nearest boundary, where "margin" may chase a class that is near in logits
  but far in x.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .slopes import FirstOrder, rivals
from .task import Task, margin

RIVALS = 10


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:  # logits: (B, K), y: (B,); returns (B,)
    """Return log sum_{j != y} exp(f_j) - f_y, with which the cross-entropy increases."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.logsumexp(1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:  # logits: (B, K), y: (B,); returns (B,)
    """Return (max_{j != y} f_j - f_y) / (f_(1) - f_(3)); with two classes the numerator alone."""
    if logits.shape[1] == 2:
        return margin(logits, y)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third).clamp_min(_TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:  # target: (B,); returns (B,)
    """Return (f_t - f_y) / (f_(1) - (f_(3) + f_(4)) / 2).

    With three classes the divisor is f_(1) - f_(3); with two there is none, since f_(1) - f_(2) would make the loss
    constant.
    """
    difference = (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))).squeeze(1)
    classes = logits.shape[1]
    if classes == 2:
        return difference
    ordered = logits.topk(min(classes, 4), dim=1).values
    return difference / (ordered[:, 0] - ordered[:, 2:].mean(1)).clamp_min(_TINY)


def scaled_difference(logits: Tensor, y: Tensor, classes: Tensor, slopes: Tensor) -> Tensor:  # (B, T) each
    """Return max_j (f_j - f_y) / s_j over the given classes j."""
    return ((logits.gather(1, classes) - logits.gather(1, y.unsqueeze(1))) / slopes).amax(1)


_TINY = 1e-300  # where all logits are equal, so that 0 / 0 becomes 0


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss and what it knows of each sample of a batch; calling it on logits (B, K) gives (B,) in float64."""

    formula: Callable[..., Tensor]
    y: Tensor
    given: tuple[Tensor, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the loss (B,) of `logits` (B, K)."""
        return self.formula(logits.double(), self.y, *self.given)

    def __getitem__(self, index: Tensor) -> "Objective":
        """Return the loss of some of the samples only."""
        return replace(self, y=self.y[index], given=tuple(tensor[index] for tensor in self.given))


_FORMULAS: dict[str, Callable[..., Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
LOSSES = (*_FORMULAS, "logit-difference")


def objective(name: str, task: Task) -> Objective:
    """Return the loss called `name` for the samples of `task`; "logit-difference" takes gradients at x for it."""
    if name in _FORMULAS:
        return Objective(_FORMULAS[name], task.y)
    first = FirstOrder.of(task, RIVALS)
    return Objective(scaled_difference, task.y, (first.classes, first.slopes.double()))


def strongest_classes(task: Task, limit: int) -> Tensor:  # returns (B, min(limit, K - 1))
    """Return the wrong classes with the largest logits at x, largest first: the targets of targeted attacks."""
    with torch.no_grad():
        return rivals(task, task.victim.logits(task.x), limit)

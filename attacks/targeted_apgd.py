"""APGD on the targeted DLR loss, as a subclass of torchattacks' APGD; importing this module imports torchattacks.

torchattacks' own APGDT moves every sample of an l2 batch by the step size of the first one, needs four classes, and
always targets `n_classes - 1` of them. Its APGD has none of these faults and takes the loss from a method.
"""

from typing import Any

import torch
import torchattacks
from torch import Tensor


class TargetedAPGD(torchattacks.APGD):  # type: ignore[misc]  # torchattacks has no types
    """APGD towards the class with the `rank`-th largest logit among the wrong ones at x, rank >= 1."""

    def __init__(self, model: torch.nn.Module, *, rank: int, **settings: Any) -> None:
        super().__init__(model, loss="dlr", **settings)
        self.rank = rank

    def attack_single_run(self, x: Tensor, y: Tensor) -> Any:
        """Choose the target of each sample, then run; torchattacks passes the samples to attack, in their order."""
        with torch.no_grad():
            wrong = self.get_logits(x).scatter(1, y.unsqueeze(1), -torch.inf)
        self.target = wrong.topk(self.rank, dim=1).indices[:, -1:]
        return super().attack_single_run(x, y)

    def dlr_loss(self, logits: Tensor, y: Tensor) -> Tensor:  # logits: (B, K); returns (B,)
        """Return (f_t - f_y) / (f_(1) - (f_(3) + f_(4)) / 2), f_(i) the i-th largest logit.

        With three classes the divisor is f_(1) - f_(3); with two there is none, since f_(1) - f_(2) would make the
        loss constant.
        """
        difference = (logits.gather(1, self.target) - logits.gather(1, y.unsqueeze(1))).squeeze(1)
        classes = logits.shape[1]
        if classes == 2:
            return difference
        ordered = logits.sort(dim=1, descending=True).values
        return difference / (ordered[:, 0] - ordered[:, 2:4].mean(1) + 1e-12)

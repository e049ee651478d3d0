"""What floating-point execution costs a model at given inputs, and what it is assumed to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..certify import LipschitzBound
from ..certify.arithmetic import assumptions, exact_arithmetic
from ..certify.certifier import Certifier, Margins
from .audit_claims import Claim

__all__ = ["Execution", "NamedAssumption", "execution_of"]

RUNNER_UP = "looks at the runner-up class alone"


@dataclass(frozen=True)
class NamedAssumption:
    """What a certificate of the model takes for granted: its id and its sentence."""

    id: str
    text: str


@dataclass(frozen=True)
class Execution:
    """The model in its own arithmetic, at `samples` inputs, certified for the class that it predicts.

    Attributes:
        arithmetic: its name.
        unit: relative rounding of a stored result.
        assumptions: what its certificates assume.
        samples: how many inputs.
        lost: the largest bound of what rounding takes off a margin at an input.
        margin: the median over the inputs of the proved margin to the strongest other class.
        radius: the median certified radius of the executed network.
        real_radius: that of the network in real arithmetic.
        withdrawn: inputs whose radius is 0 in floating point but not in real arithmetic.
        ties: inputs whose two largest logits are equal; a test with >= would certify them.
        bfloat16: the largest change of a logit under bfloat16 autocast, which no certificate of the model covers.
    """

    arithmetic: str
    unit: float
    assumptions: tuple[NamedAssumption, ...]
    samples: int
    lost: float
    margin: float
    radius: float
    real_radius: float
    withdrawn: int
    ties: int
    bfloat16: float


@torch.no_grad()
def execution_of(
    model: nn.Module,
    bound: LipschitzBound,
    points: Tensor,  # [B, *input_shape]
) -> tuple[Execution, Claim]:
    """What rounding costs at the points, and what looking at the runner-up class alone would claim there.

    Raises:
        ValueError: an operation without a rounding rule, NaN or infinite logits.
    """
    certifier = Certifier(model, bound.input_shape, norm=bound.norm, bound=bound)
    margins = certifier.margins(points)
    radii = certifier.radii(margins)
    top = margins.logits.topk(2, dim=1).values
    arithmetic = certifier.executed.arithmetic
    execution = Execution(
        arithmetic=arithmetic.name,
        unit=arithmetic.unit,
        assumptions=tuple(NamedAssumption(item.id, item.text) for item in assumptions(arithmetic)),
        samples=len(points),
        lost=float(_others(margins.lost, margins).max()),
        margin=float(margins.lowest.median()),
        radius=float(radii.radius.median()),
        real_radius=float(radii.real.median()),
        withdrawn=int(((radii.real > 0) & (radii.radius == 0)).sum()),
        ties=int((top[:, 0] == top[:, 1]).sum()),
        bfloat16=_autocast_change(model, points),
    )
    return execution, _runner_up(margins, bound)


def _others(values: Tensor, margins: Margins) -> Tensor:
    """The values of all classes but the certified one, which has none."""
    return values.scatter(1, margins.label[:, None], 0.0)


def _autocast_change(model: nn.Module, points: Tensor) -> float:
    with exact_arithmetic(points.device):
        own = model(points)
    with torch.autocast(points.device.type, dtype=torch.bfloat16):
        return float((model(points).double() - own.double()).abs().nan_to_num(nan=math.inf).max())


def _runner_up(margins: Margins, bound: LipschitzBound) -> Claim:
    """The pair's constant that such a tool divides by, beside the one that all pairs together allow.

    With r the smallest margin over constant among all classes, dividing the runner-up's margin m by its own constant
    gives a radius too large by (m / r) over that constant.
    """
    constants = bound.pairwise.cpu()[margins.label]
    runner_up = margins.real.argmin(1, keepdim=True)
    ratios = torch.where(constants > 0, margins.real / constants, torch.inf).amin(1)
    claimed = constants.gather(1, runner_up)[:, 0]
    limited = (ratios > 0) & (ratios < margins.lowest / claimed * (1 - 1e-9))  # by another class
    needed = torch.where(limited, margins.lowest / ratios, claimed)
    worst = int((needed / claimed.clamp_min(1e-300)).argmax())
    return Claim(RUNNER_UP, f"sample {worst}", float(claimed[worst]), 0.0, float(needed[worst]))

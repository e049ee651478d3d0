"""How an executed operation rounds, as the checker's deviation needs it, and the constants of the arithmetics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from flint import arb

ZERO: Final = arb(0)


@dataclass(frozen=True)
class Rounds:
    """Roundings of one operation.

    Attributes:
        kind: "exact" (moves numbers), "dot" (sums of products), "steps" (a chain of roundings).
        count: products and bias of one result, or roundings.
        gain: of "steps": rounded numbers are at most gain * |input| + offset in l2; None: the absolute operator's norm.
        offset: see gain; of "dot" the l2 norm of the bias over the output.
        repeats: how often one input enters one result at most.
        partials: partial sums that half types store besides the results.
        jump: l2 norm of what separates the executed function from the one whose Lipschitz constant is used.
        wide: whether half types sum the products in the accumulation's type.
        reach: bound of an intermediate result per unit of the input's l2 norm, where it exceeds the operation's own.
        peak: bound of intermediate numbers beyond gain and offset; not finite: no radius.
    """

    kind: str
    count: int = 0
    gain: arb | None = None
    offset: arb = ZERO
    repeats: int = 1
    partials: int = 0
    jump: arb = ZERO
    wide: bool = True
    reach: arb = ZERO
    peak: arb = ZERO


EXACT = Rounds("exact")


@dataclass(frozen=True)
class Format:
    """Constants of an arithmetic; see docs/certificates.md for what they stand for."""

    unit: float
    accumulation: float
    tiny: float
    huge: float
    dtype: torch.dtype | None
    assumptions: tuple[str, ...]


_REAL = ("eval-mode",)
_FLOAT = (*_REAL, "round-to-nearest", "summation", "elementary-functions")
_HALF = (*_FLOAT, "accumulation", "subnormals")
FORMATS = {
    "real": Format(0.0, 0.0, 0.0, float("inf"), None, _REAL),
    "float64": Format(2.0**-53, 2.0**-53, 2.0**-1022, (2 - 2.0**-52) * 2.0**1023, torch.float64, _FLOAT),
    "float32": Format(2.0**-24, 2.0**-24, 2.0**-126, (2 - 2.0**-23) * 2.0**127, torch.float32, _FLOAT),
    "float16": Format(2.0**-11, 2.0**-23, 2.0**-24, 65504.0, torch.float16, _HALF),
    "bfloat16": Format(2.0**-8, 2.0**-23, 2.0**-126, (2 - 2.0**-7) * 2.0**127, torch.bfloat16, _HALF),
}

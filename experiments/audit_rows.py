"""What an audit found, as data: a row a run, a row an operation, the network, its execution, claims and problems."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from .audit_claims import Claim
from .audit_execution import Execution
from .audit_problems import Problem

__all__ = ["Audit", "NetworkRow", "OperationRow", "RunRow"]


@dataclass(frozen=True)
class RunRow:
    """An affine run: its layers, its operator, and the bracket of its norm."""

    layers: tuple[str, ...]
    operator: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    method: str
    lower: float
    upper: float

    @property
    def ratio(self) -> float | None:
        """upper / lower; None where no lower end is known."""
        return self.upper / self.lower if self.lower else None


@dataclass(frozen=True)
class OperationRow:
    """An activation, a pooling, a sum or a concatenation: its rule ("factor", "sum", "concat") and its factor."""

    place: str
    kind: str
    rule: str
    factor: float | None


@dataclass(frozen=True)
class NetworkRow:
    """The network's bracket, the range of its pairwise constants, and their gain over sqrt(2) times the upper end."""

    lower: float
    upper: float
    pairwise_lowest: float
    pairwise_highest: float
    gain: float  # how much larger radii are, at least, than with one constant for all pairs (see `PAIR_FACTOR`)


@dataclass(frozen=True)
class Audit:
    """What was found out about a model.

    Where `network` is None the model has no bound, and where `execution` is None no certificate as executed; `problems`
    says why.
    """

    model: str
    input_shape: tuple[int, ...]
    norm: str
    dtype: str
    problems: tuple[Problem, ...]
    runs: tuple[RunRow, ...] = ()
    operations: tuple[OperationRow, ...] = ()
    network: NetworkRow | None = None
    execution: Execution | None = None
    claims: tuple[Claim, ...] = ()

    def to_json(self) -> str:
        """All of it as JSON; infinity is the string "inf", as in certificates."""
        content: dict[str, Any] = {"format": 1, **asdict(self)}
        content["runs"] = [{**asdict(row), "ratio": row.ratio} for row in self.runs]
        content["claims"] = [
            {**asdict(claim), "verdict": claim.verdict, "excess": claim.excess} for claim in self.claims
        ]
        return json.dumps(_plain(content), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value  # "inf" or "-inf"

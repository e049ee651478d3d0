"""What a certificate claims, as plain data; docs/certificates.md explains each field."""

from __future__ import annotations

from dataclasses import dataclass

Matrix = tuple[tuple[float, ...], ...]


class CertificateError(ValueError):
    """A certificate that cannot be read, written or used; one line says where and why."""


@dataclass(frozen=True)
class ModelClaim:
    """The model that is certified: its digest, the shape of one input, the number of classes, its own type."""

    digest: str
    input_shape: tuple[int, ...]
    classes: int
    dtype: str


@dataclass(frozen=True)
class ArithmeticClaim:
    """The arithmetic in which the certified network runs.

    Attributes:
        name: "real", "float64", "float32", "float16" or "bfloat16".
        unit: relative rounding of a stored result.
        accumulation: relative rounding of a step of a sum.
        tiny: what underflow takes from a result at most.
        huge: largest finite number.
    """

    name: str
    unit: float
    accumulation: float
    tiny: float
    huge: float


@dataclass(frozen=True)
class AssumptionClaim:
    """Something about the executing machine that the radii rest on: a name and a sentence."""

    id: str
    text: str


@dataclass(frozen=True)
class PieceClaim:
    """A linear map inside an affine run, with a bound of its norm.

    Attributes:
        kind: type of the operator.
        in_shape: without the batch.
        out_shape: without the batch.
        upper: bound of the norm of the real map.
        method: how it was found.
        torus: (side, stride, twist) per spatial axis where the method is "torus", else None.
        pieces: the maps from whose bounds `upper` follows; none where it was proved directly.
    """

    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    upper: float
    method: str
    torus: tuple[tuple[int, int, float], ...] | None = None
    pieces: tuple[PieceClaim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunClaim(PieceClaim):
    """A whole affine run: `end` is the graph's node that it ends with, `parts` its layers, `lower` an estimate."""

    end: str
    parts: tuple[str, ...]
    lower: float


@dataclass(frozen=True)
class ConstantClaim:
    """A bound of the Lipschitz constant from the input to an anchor of the graph."""

    node: str
    upper: float


@dataclass(frozen=True)
class NormClaim:
    """All bounds in one norm.

    Attributes:
        upper: of the map from inputs to all logits.
        runs: every affine run that is used, in graph order.
        constants: every anchor in graph order: the input, non-affine operations, sums and concatenations of unlike
            tensors.
        last_constant: that of the output's anchor.
        pairwise: [K][K]; entry (i, j) bounds |f_i - f_j| per unit of the input norm.
    """

    upper: float
    runs: tuple[RunClaim, ...]
    constants: tuple[ConstantClaim, ...]
    last_constant: float
    pairwise: Matrix


@dataclass(frozen=True)
class RelaxationClaim:
    """A Lipschitz constant of all logits, or of the difference of two, that multipliers prove.

    Attributes:
        norm: of the input; the logits are measured in l2, a difference by its absolute value.
        start: anchor of the graph from which the multipliers count; the input or a later one.
        end: the graph's node of the logits.
        pair: the two classes, None for all logits.
        start_constant: from the input, in `norm`, to the start in l2; 1 where the start is the input.
        upper: from the input, in `norm`, to the end.
        multipliers: per activation between the two, in graph order, one for each of its numbers (or groups of them).
        weights: one per number of the input where the norm is linf and the start is the input, else None.
        method: how the multipliers were found.
    """

    norm: str
    start: str
    end: str
    pair: tuple[int, int] | None
    start_constant: float
    upper: float
    multipliers: Matrix
    weights: tuple[float, ...] | None
    method: str


@dataclass(frozen=True, slots=True)
class SampleClaim:
    """One certified sample.

    Attributes:
        index: its position in the data that it came from.
        input: its digest.
        label: the class that the radius is for.
        prediction: the class that the executed network gives.
        margin: lower bound of the real network's margin of the label to the best other class.
        radius: no input closer than this, in the certificate's norm, is classified otherwise; 0 where misclassified.
    """

    index: int
    input: str
    label: int
    prediction: int
    margin: float
    radius: float

"""The checker's own pass over samples: enclosures of the real logits, and what radius they prove."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flint import arb
from torch import Tensor

from ..claims import SampleClaim
from .balls import Fixed, euclidean, fixed, plus, scaled
from .chains import concatenated
from .deviation import Deviation, Spread, passes
from .network import Network, Node

_AT_ONCE = 1 << 19  # entries of the largest tensor of a batch
Matrix = Sequence[Sequence[arb]]


@dataclass(frozen=True)
class Passed:
    """One sample's real logits, as a midpoint and a common radius, and upper bounds of all tensors' norms."""

    logits: tuple[arb, ...]
    radius: arb
    norms: Mapping[str, arb]

    def difference(self, first: int, second: int) -> arb:
        """logits[first] - logits[second]."""
        spread = arb(0, (2 * self.radius).abs_upper()) if not self.radius.is_zero() else arb(0)
        return self.logits[first] - self.logits[second] + spread


def forward(network: Network, x: Tensor, report: Callable[[str], None]) -> Iterator[Passed]:
    """Enclosures of all samples' logits in the real network, in batches."""
    widest = max(math.prod(node.shape) for node in network.nodes)
    step = max(1, _AT_ONCE // widest)
    for start in range(0, len(x), step):
        part = x[start : start + step]
        yield from _batch(network, part)
        report(f"sample {start + len(part)} of {len(x)}")


def _batch(network: Network, x: Tensor) -> Iterator[Passed]:
    values: dict[str, Fixed] = {}
    norms: dict[str, list[arb]] = {}
    last = {source: node.name for node in network.nodes for source in node.sources}
    for node in network.nodes:
        values[node.name] = fixed(x) if node.kind == "input" else _value(node, [values[name] for name in node.sources])
        norms[node.name] = norms[node.sources[0]] if passes(node) else euclidean(values[node.name])
        for name in {source for source in node.sources if last[source] == node.name and source != network.output}:
            del values[name]
    logits = values[network.output]
    for row in range(len(x)):
        middle = tuple(scaled(value, logits.exp) for value in logits.mant[row])
        yield Passed(middle, logits.radius, {name: found[row] for name, found in norms.items()})


def _value(node: Node, sources: list[Fixed]) -> Fixed:
    if node.kind == "affine" and node.linear is not None:
        image = node.linear.apply(sources[0])
    elif node.kind == "activation" and node.activation is not None:
        return node.activation.apply(sources[0])
    elif node.kind == "concat":
        return concatenated(sources, node.axis)
    else:
        image = sources[0] if node.signs[0] > 0 else sources[0].moved(-sources[0].mant)
        if len(sources) == 2:
            image = plus(image, sources[1], node.signs[1])
    return image if node.offset is None else plus(image, node.offset)


class Radii:
    """Checks the rows of samples against what can be proved.

    Args:
        deviation: of the executed network.
        pairwise: proved constants of the differences of logits in the norm of the radii.
        differences: l2 norms of the last run's row differences.
        stretch: from that norm to l2.
        rounds: whether the inputs are rounded on entry.
    """

    def __init__(
        self, deviation: Deviation, pairwise: Matrix, differences: Matrix, stretch: arb, *, rounds: bool
    ) -> None:
        self._deviation, self._pairwise, self._differences = deviation, pairwise, differences
        self._stretch, self._rounds = stretch, rounds
        network = deviation.network
        self._output, self._anchor = network.output, network.places[network.output].anchor
        self._entry = math.prod(network.nodes[0].shape)
        sizes = {name: step.lipschitz for name, step in deviation.steps.items()}
        self._slopes = deviation.spread(sizes, self._unit, fixed=False)
        self._rises = deviation.peaks(sizes, self._slopes, fixed=False)

    @property
    def _unit(self) -> arb:
        return arb(self._deviation.number.unit) if self._rounds else arb(0)

    def at_centre(self, passed: Passed) -> dict[str, Spread]:
        """The deviation at the sample itself."""
        entry = arb(0)
        if self._rounds:
            tiny = arb(self._deviation.number.tiny)
            entry = self._unit * passed.norms[self._deviation.network.nodes[0].name] + tiny * arb(self._entry).sqrt()
        return self._deviation.spread(passed.norms, entry, fixed=True)

    def lost(self, found: Mapping[str, Spread], first: int, second: int) -> arb:
        """What rounding can take off the difference of two logits, by the deviations given."""
        return self._differences[first][second] * found[self._anchor].whole + arb(2).sqrt() * found[self._output].local

    def loss(self, first: int, second: int) -> arb:
        """What rounding can take off further per unit of l2 distance."""
        return self.lost(self._slopes, first, second)

    def margin(self, passed: Passed, label: int) -> arb:
        """The real margin of the label to the best other class."""
        found = arb.pos_inf()
        for other in range(len(passed.logits)):
            if other != label:
                found = found.min(passed.difference(label, other))
        return found

    def refuted(self, passed: Passed, found: Mapping[str, Spread], prediction: int) -> bool:
        """Whether the executed network surely gives another class."""
        others = (other for other in range(len(passed.logits)) if other != prediction)
        return any(passed.difference(prediction, other) + self.lost(found, prediction, other) < 0 for other in others)

    def problem(self, passed: Passed, found: Mapping[str, Spread], row: SampleClaim) -> str:
        """Why the radius is not proved; empty where it is."""
        if row.radius == 0:
            return ""
        if not row.radius > 0:
            return f"expected a number >= 0, got {row.radius!r}"
        if row.prediction != row.label:
            return f"claimed {row.radius!r} for a sample that is misclassified"
        radius = arb(row.radius)
        for other in range(len(passed.logits)):
            if other == row.label:
                continue
            room = passed.difference(row.label, other) - self.lost(found, row.label, other)
            loss = self._pairwise[row.label][other] + self._stretch * self.loss(row.label, other)
            if not room > 0:
                return f"claimed {row.radius!r}; class {other} cannot be ruled out at the sample itself"
            if not (loss.is_zero() or radius * loss <= room):
                return f"claimed {row.radius!r}, the checker proves {_least(room / loss):.17g} against class {other}"
        limit = self._deviation.limit(self._deviation.peaks(passed.norms, found, fixed=True), self._rises)
        if not (limit == arb.pos_inf() or radius * self._stretch <= limit):
            return f"claimed {row.radius!r}, but numbers may overflow from {_least(limit / self._stretch):.17g} on"
        return ""


def _least(value: arb) -> float:
    """About the lower end."""
    return float(value.lower()) if value.is_finite() else 0.0


def entry_rounds(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether inputs are rounded where the network takes them in."""
    return torch.promote_types(x.dtype, dtype) != dtype

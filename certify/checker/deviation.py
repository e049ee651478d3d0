"""The checker's own evaluation, in balls, of how far the executed network may be from the real one.

All norms are l2; rho is the distance from the sample. Per tensor: c its norm in the real network, L the constant from
the input, E = A + B rho the deviation. An operation errs by e = p M + q N + h of its own, M the norm of what it is
given and N that of what it would give without rounding; docs/certificates.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flint import arb

from .balls import euclidean
from .maps import Gather
from .matrices import absolute_norm, greatest_sum, inverse_norm
from .network import Network, Node
from .rounds import Format

_SHARE = arb(1) / 4  # of the largest number, for sums; and of 1, for the number of roundings times the unit


@dataclass(frozen=True)
class Step:
    """What does not depend on samples: e = p M + q N + h and how deviations grow into the tensor."""

    p: arb = field(default_factory=arb)
    q: arb = field(default_factory=arb)
    h: arb = field(default_factory=arb)
    growth: arb = field(default_factory=lambda: arb(1))  # k: of deviations of the inputs
    span: arb = field(default_factory=lambda: arb(1))  # from the anchor
    inverse: arb = field(default_factory=lambda: arb(1))  # of the map from the anchor
    lipschitz: arb = field(default_factory=lambda: arb(1))  # from the input
    gain: arb = field(default_factory=arb)  # alpha
    peak: arb = field(default_factory=arb)  # what is added to max(1, alpha) M


@dataclass(frozen=True)
class Spread:
    """The deviation of a tensor, and the part of it that arose in its own affine run."""

    whole: arb
    local: arb


class Deviation:
    """The recursion over one network.

    Args:
        network: as the checker read it.
        runs: proved l2 norms of the affine runs by their last tensor.
        anchors: proved l2 constants of the anchors.
        number: the arithmetic.
    """

    def __init__(
        self, network: Network, runs: Mapping[str, float], anchors: Mapping[str, float], number: Format
    ) -> None:
        self.network, self.number = network, number
        self._runs, self._anchors = runs, anchors
        self.steps: dict[str, Step] = {}
        for node in network.nodes:
            self.steps[node.name] = self._step(node)

    def _step(self, node: Node) -> Step:
        anchored = self.network.places[node.name].anchor == node.name
        sources = [self.steps[name] for name in node.sources]
        step = Step()
        if node.kind == "affine":
            step = self._affine(node, sources[0])
        elif node.kind == "activation" and node.activation is not None:
            step = replace(self._rounded(node, arb(0), arb(0)), growth=node.activation.factor("l2"))
        elif node.kind == "sum":
            constant = arb(0) if node.offset is None else euclidean(node.offset.reshape(1, *node.shape))[0]
            inverse = sources[0].inverse if len(sources) == 1 else arb.pos_inf()
            span = sum((one.span for one in sources), arb(0))
            step = replace(self._added(constant, node), span=span, inverse=inverse, peak=constant)
        elif node.kind == "concat":
            span = sum((one.span * one.span for one in sources), arb(0)).sqrt()
            step = Step(span=span, inverse=arb.pos_inf())
        if anchored:
            return replace(step, span=arb(1), inverse=arb(1), lipschitz=arb(self._anchors[node.name]))
        span = step.span.min(self._run(node.name))
        anchor = arb(self._anchors[self.network.places[node.name].anchor])
        return replace(step, span=span, lipschitz=_product(span, anchor))

    def _run(self, name: str) -> arb:
        return arb(self._runs[name]) if name in self._runs else arb.pos_inf()

    def _affine(self, node: Node, source: Step) -> Step:
        assert node.linear is not None
        if node.linear.moves_only:
            alpha, rows = arb(1), arb(1)
        else:
            rows = greatest_sum(node.linear, "linf")
            alpha = absolute_norm(node.linear)
        step = self._rounded(node, alpha, rows)
        step = replace(step, gain=step.gain.max(node.rounds.reach))
        through_run = _product(self._run(node.name), source.inverse)
        return replace(
            step,
            growth=alpha.min(through_run),
            span=_product(alpha, source.span),
            inverse=_product(inverse_norm(node.linear), source.inverse),
        )

    def _rounded(self, node: Node, alpha: arb, rows: arb) -> Step:
        """p, q, h, gain and peak of an operation."""
        rounds, number = node.rounds, self.number
        if rounds.kind == "exact" or number.unit == 0.0:
            return Step(gain=alpha)
        root, tiny = arb(math.prod(node.shape)).sqrt(), arb(number.tiny)
        if rounds.kind == "dot":
            return self._dot(node, alpha, rows, root)
        gain = alpha if rounds.gain is None else rounds.gain
        share = rounds.count * arb(number.unit)
        if not share <= _SHARE:
            return Step(h=arb.pos_inf(), gain=gain, peak=arb.pos_inf())
        relative, lost = share * (1 + share), max(rounds.count, 1) * tiny
        h = relative * rounds.offset + 2 * lost * (1 + gain) * root + rounds.jump
        return Step(p=relative * gain + lost, h=h, gain=gain, peak=gain + rounds.offset + rounds.peak)

    def _dot(self, node: Node, alpha: arb, rows: arb, root: arb) -> Step:
        """Sums of at most n products in any order; half types round the stored results and partial sums again."""
        rounds, number = node.rounds, self.number
        n, unit, fine = arb(rounds.count), arb(number.unit), arb(number.accumulation if rounds.wide else number.unit)
        nodes = arb(max(rounds.count - 1, 0))
        beta, lost = rounds.offset, 2 * arb(number.tiny) * root
        peak = alpha + beta + rounds.peak
        if not n * fine <= _SHARE:
            return Step(h=arb.pos_inf(), gain=alpha, peak=arb.pos_inf())
        gamma = n * fine / (1 - n * fine)
        share = fine * (1 + nodes * (arb(1) / 2 + gamma))
        p = share * alpha + lost * (n * rounds.repeats).sqrt()
        q = nodes / 2 * fine
        h = share * beta + lost * (2 * n + rows)
        step = Step(p=p, q=q, h=h, gain=alpha, peak=peak)
        if number.unit == number.accumulation or not rounds.wide:
            return step
        stores, partials = arb(2 if beta > 0 else 1), arb(rounds.partials)
        width = (stores + partials) * unit
        if not width <= _SHARE:
            return Step(h=arb.pos_inf(), gain=alpha, peak=arb.pos_inf())
        whole, part = stores * unit * (1 + width), partials * unit * (1 + width)
        grown = 1 + whole + part
        h = grown * h + (whole + part) * beta + (stores + partials) * lost
        return replace(step, p=grown * p + part * alpha, q=grown * q + whole, h=h)

    def _added(self, constant: arb, node: Node) -> Step:
        unit = arb(self.number.unit)
        if self.number.unit == 0.0:
            return Step()
        lost = 3 * arb(self.number.tiny) * arb(math.prod(node.shape)).sqrt()
        return Step(q=unit, h=unit * (1 + unit) * constant + lost)

    def spread(self, sizes: Mapping[str, arb], entry: arb, *, fixed: bool) -> dict[str, Spread]:
        """One pass: with the norms c and what the input's conversion takes (A), or with L and the unit (B)."""
        found: dict[str, Spread] = {}
        for node in self.network.nodes:
            step, anchor = self.steps[node.name], self.network.places[node.name].anchor
            if node.kind == "input":
                found[node.name] = Spread(entry, arb(0))
                continue
            before = [found[name] for name in node.sources]
            total = sum((one.whole for one in before), arb(0))
            size = sizes[node.sources[0]] + total
            local = step.p * size + (step.h if fixed else 0)
            if not step.q.is_zero():
                local += step.q * (sizes[node.name] + step.growth * total)
            if anchor == node.name:
                found[node.name] = Spread(_product(step.growth, _join(node, [b.whole for b in before])) + local, arb(0))
            else:
                own = _product(step.growth, _join(node, [b.local for b in before])) + local
                found[node.name] = Spread(step.span * found[anchor].whole + own, own)
        return found

    def peaks(self, sizes: Mapping[str, arb], found: Mapping[str, Spread], *, fixed: bool) -> list[arb]:
        """Bounds of all numbers inside each operation that computes: max(1, alpha) M + alpha + beta + peak."""
        bounds = []
        for node in self.network.nodes:
            step = self.steps[node.name]
            if node.kind == "input":
                bounds.append(sizes[node.name] + found[node.name].whole)
                continue
            if node.kind == "concat" or (node.linear is not None and node.linear.moves_only):
                continue
            size = sum((sizes[name] + found[name].whole for name in node.sources), arb(0))
            bounds.append(step.gain.max(arb(1)) * size + (step.peak if fixed else 0))
        return bounds

    def limit(self, starts: Sequence[arb], slopes: Sequence[arb]) -> arb:
        """A distance within which all bounds, start + slope rho, stay below a quarter of the largest number."""
        if self.number.unit == 0.0:
            return arb.pos_inf()
        level, found = _SHARE * arb(self.number.huge), arb.pos_inf()
        for start, slope in zip(starts, slopes, strict=True):
            if not start < level:
                return arb(0)
            if not slope.is_zero():
                found = found.min((level - start) / slope)
        return found


def _join(node: Node, values: Sequence[arb]) -> arb:
    if node.kind == "concat":
        return sum((value * value for value in values), arb(0)).sqrt()
    return sum(values, arb(0))


def _product(first: arb, second: arb) -> arb:
    """The product, 0 where a factor is exactly 0 even if the other is infinite."""
    return arb(0) if first.is_zero() or second.is_zero() else first * second


def passes(node: Node) -> bool:
    """Whether a tensor has the very numbers of the one before it."""
    return isinstance(node.linear, Gather) and node.linear.moves_only and node.offset is None

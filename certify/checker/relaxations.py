"""Proof of a certificate's relaxations: constants of the logits, or of their differences, below the product's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from flint import arb, ctx, fmpz, fmpz_mat
from torch import nn

from ..certificate_file import Certificate
from ..claims import NormClaim, RelaxationClaim
from .balls import PRECISION, Fixed, exponent_of, integers, largest, length, matrix, scaled
from .definite import UNIT, least_first, semidefinite, whole
from .invalid import Invalid, stage
from .maps import Shape
from .matrices import Refused
from .narrowing import narrowed, selected
from .network import Network, plain_copy, read, traced
from .parts import Part, check_size, part_from
from .quadratics import Powers, Quadratic, diagonal, shifted

_GAPS = tuple(2.0**-power for power in range(31, 44, 3))  # what is added to the scaled form of the l1 norm
_MOST = 16.0  # of that form's entries


def check_relaxations(
    network: Network, certificate: Certificate, counts: dict[str, int], report: Callable[[str], None]
) -> None:
    """Prove every relaxation, by constants that were proved before; Invalid names the first that fails."""
    prover = Prover(network, certificate.bounds, certificate.norm)
    for position, claim in enumerate(certificate.relaxations):
        report(f"relaxation {position + 1} of {len(certificate.relaxations)}")
        name = f"relaxation {position}"
        try:
            with stage(name):
                prover.prove(claim)
        except Refused as error:
            raise Invalid(name, str(error)) from error
        counts["relaxations"] = counts.get("relaxations", 0) + 1


def refused_starts(model: nn.Module, input_shape: Shape, starts: Collection[str]) -> frozenset[str]:
    """The anchors behind which the checker proves no relaxation, since there is no form or it is too large.

    None where it has no rule for some layer: then no claim about this model can be checked.
    """
    with ctx.workprec(PRECISION):
        try:
            network = read(traced(plain_copy(model, None), input_shape))
        except ValueError:
            return frozenset()
        return frozenset(start for start in starts if not _takes(network, start))


def _takes(network: Network, start: str) -> bool:
    try:
        check_size(network, start)
    except Refused:
        return False
    return True


class Prover:
    """Proves relaxations of one network.

    Args:
        network: as the checker read it.
        bounds: with constants of the anchors that are proved.
        norm: of the radii.
    """

    def __init__(self, network: Network, bounds: Mapping[str, NormClaim], norm: str) -> None:
        self._network, self._bounds, self._norm = network, bounds, norm
        self._input = network.nodes[0].name
        self._parts: dict[str, Part] = {}
        self._narrow: dict[str, Part] = {}

    def prove(self, claim: RelaxationClaim) -> None:
        """Return where ||change of the end||_2 <= upper ||change of the input||_norm is proved; else Refused."""
        self._check(claim)
        part = self._part(claim)
        end = "all logits" if claim.pair is None else f"classes {claim.pair[0]} and {claim.pair[1]}"
        problem = f"claimed {claim.upper!r} for {end} in {claim.norm}, not proved"
        try:
            proved = self._holds(part, claim)
        except OverflowError as error:  # of a guess in float64
            raise Refused(f"{problem}: its numbers are too far apart") from error
        if not proved:
            raise Refused(problem)

    def _holds(self, part: Part, claim: RelaxationClaim) -> bool:
        share = arb(claim.upper) / arb(claim.start_constant)
        square = (share * share).lower()
        if claim.start != self._input or claim.norm == "l2":
            return self._in_l2(part, claim, square)
        return _in_linf(part, claim, square) if claim.norm == "linf" else _in_l1(part, claim, square)

    def _check(self, claim: RelaxationClaim) -> None:
        """Everything that must hold besides the inequality itself."""
        network, classes = self._network, self._network.node(self._network.output).shape[0]
        if claim.norm not in ("l2", self._norm):
            raise Refused(f"expected a bound in l2 or {self._norm}, got one in {claim.norm}")
        if claim.end != network.output:
            raise Refused(f"expected a bound of the logits, {network.output!r}, got one of {claim.end!r}")
        pair = claim.pair
        if pair is not None and not (len(pair) == 2 and all(0 <= i < classes for i in pair) and pair[0] != pair[1]):
            raise Refused(f"expected two of {classes} classes, got {pair}")
        for value in (claim.upper, claim.start_constant, *(v for row in claim.multipliers for v in row)):
            if not 0 < value < math.inf:
                raise Refused(f"expected constants and multipliers > 0, got {value!r}")
        if claim.start not in [node.name for node in network.anchors]:
            raise Refused(f"the model has no input, activation, sum or concatenation {claim.start!r} to start from")
        needed = self._constant(claim.start, claim.norm)
        if not needed <= arb(claim.start_constant):
            shown = float(needed.upper())
            raise Refused(f"claimed {claim.start_constant!r} up to {claim.start!r}, the checker proves {shown:.17g}")

    def _constant(self, start: str, norm: str) -> arb:
        """From the input in `norm` to the start in l2; to the input itself 1, in that norm."""
        if start == self._input:
            return arb(1)
        l2, own = (
            next(arb(one.upper) for one in self._bounds[name].constants if one.node == start) for name in ("l2", norm)
        )
        if norm == "l2":
            return l2
        before, after = (arb(math.prod(self._network.node(name).shape)).sqrt() for name in (self._input, start))
        return (l2 * before).min(own * after) if norm == "linf" else l2.min(own)

    def _part(self, claim: RelaxationClaim) -> Part:
        """The part that is meant, which the multipliers and weights must fit."""
        if claim.start not in self._parts:
            self._parts[claim.start] = part_from(self._network, claim.start)
        part = self._parts[claim.start]
        found, expected = [len(row) for row in claim.multipliers], [layer.count for layer in part.layers]
        if found != expected:
            raise Refused(f"expected {expected} multipliers, got {found}")
        size = part.sizes[0] if claim.norm == "linf" and claim.start == self._input else None
        if (None if claim.weights is None else len(claim.weights)) != size:
            raise Refused(f"expected {size or 'no'} weights, got {claim.weights and len(claim.weights)}")
        return part

    def _in_l2(self, part: Part, claim: RelaxationClaim, square: arb) -> bool:
        if claim.start not in self._narrow:
            self._narrow[claim.start] = narrowed(part, None)
        part = self._narrow[claim.start]
        return _nonnegative(part, claim, [square] * part.sizes[0])


def _in_linf(part: Part, claim: RelaxationClaim, square: arb) -> bool:
    """With Q = diag(tau), sum tau <= upper^2: xi^T Q xi <= upper^2 ||xi||_inf^2."""
    weights = claim.weights or ()
    if not all(0 < value < math.inf for value in weights):
        raise Refused("expected weights > 0")
    if not sum(map(arb, weights), arb(0)) <= square:
        raise Refused(f"claimed {claim.upper!r}, whose square is below the sum of the weights")
    narrow = narrowed(part, weights)
    return _nonnegative(narrow, claim, [arb(w) for w in weights] if narrow is part else [arb(1)] * narrow.sizes[0])


def _nonnegative(part: Part, claim: RelaxationClaim, weights: Sequence[arb]) -> bool:
    """Whether F >= 0 is proved with Q = diag(weights), exact numbers."""
    pairs = [(man, int(exp)) for man, exp in (value.man_exp() for value in weights)]
    powers: Powers = np.array([-((exp + int(man).bit_length()) // 2) for man, exp in pairs], dtype=np.int64)
    exps = np.array([exp for _, exp in pairs], dtype=np.int64)
    first = shifted(integers([man for man, _ in pairs], (-1,)), exps + 2 * powers + 2 * UNIT)
    form = Quadratic(part, claim.multipliers, claim.pair, powers)
    return semidefinite(form.symmetric(diagonal(first)))


def _in_l1(part: Part, claim: RelaxationClaim, square: arb) -> bool:
    """With any Q: xi^T Q xi is convex, as it bounds squares, so that it is largest at a vertex of the ball.

    Q = M^T P M, M the rows that act on the start, or P itself; P is about the least that makes F >= 0.
    """
    part, rows = selected(part)
    size = part.sizes[0]
    powers: Powers = np.full(size, -(exponent_of(square) // 2), dtype=np.int64)
    if rows is not None and (widest := largest(rows.mant)):
        powers += length(widest) + rows.exp  # m^T P m is about the square for the longest column m
    nothing = fmpz_mat(size, size)
    guess = least_first(Quadratic(part, claim.multipliers, claim.pair, powers).symmetric(nothing))
    if guess is None or not guess.max(initial=0.0) > 0:
        return False
    powers = powers + -np.frexp(guess.diagonal().clip(min=guess.max() * 2.0**-60))[1].astype(np.int64) // 2
    form = Quadratic(part, claim.multipliers, claim.pair, powers)
    guess = least_first(form.symmetric(nothing))
    if guess is None or not bool((np.abs(guess) < _MOST).all()):
        return False
    for gap in _GAPS:
        least = whole((guess + guess.T) / 2 + gap * np.eye(size))
        if _columns_below(least, powers, rows, square):
            return semidefinite(form.symmetric(least * (fmpz(1) << UNIT)))
    return False


def _columns_below(least: fmpz_mat, powers: Powers, rows: Fixed | None, square: arb) -> bool:
    """Whether m^T P m <= square for each column m of the rows, or unit vector; P scaled, in units of 2^-56."""
    top = int(powers.max())
    lifts = integers([fmpz(1) << top - int(t) for t in powers], (-1, 1))
    if rows is None:
        found = [least[i, i] * lift * lift for i, lift in enumerate(lifts[:, 0])]
        return all(scaled(value, -2 * top - UNIT) <= square for value in found)
    columns, errs = rows.mant * lifts, lifts * rows.err
    image = integers((least * matrix(columns)).entries(), columns.shape)
    more = sum(map(abs, least.entries()), fmpz(0)) * largest(errs) ** 2
    found = list((columns * image).sum(0) + 2 * (abs(image) * errs).sum(0) + more)
    return all(scaled(value, 2 * (rows.exp - top) - UNIT) <= square for value in found)

"""Re-proof of the norms of affine runs, from the claimed way or another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flint import arb

from ..claims import PieceClaim
from .balls import Fixed, largest, scaled
from .chains import Concat, Sum
from .convolution import Convolution, Transposed
from .folding import folded
from .maps import Dense, Linear, Scale, Windows
from .matrices import Refused, absolute_norm, greatest_sum, materialised
from .norms import absolute_sum, block, guessed_norm, proves_below
from .torus import default_torus, torus_below, torus_problem


def prove(linear: Linear, claim: PieceClaim, norm: str, report: Callable[[str], None]) -> None:
    """Return where the norm of `linear`, in and out in `norm`, is proved to be at most claim.upper; else Refused."""
    if claim.upper == math.inf:
        return
    parts = folded(linear)
    if not parts:
        _compare(arb(1) if math.prod(linear.in_shape) else arb(0), claim)
    elif claim.pieces:
        _from_pieces(parts, claim, norm, report)
    elif len(parts) == 1:
        _prove_one(parts[0], claim, norm, report)
    else:
        _prove_matrix(materialised(linear), claim, norm)


def _compare(found: arb, claim: PieceClaim) -> None:
    if not found <= arb(claim.upper):
        raise Refused(f"claimed {claim.upper!r}, the checker proves {_shown(found)}")


def _shown(value: arb) -> str:
    return f"{float(value.upper()):.17g}"


def _from_pieces(parts: list[Linear], claim: PieceClaim, norm: str, report: Callable[[str], None]) -> None:
    if claim.kind == "Chain":
        claims = [piece for piece in claim.pieces if piece.method != "isometry"]
        _prove_all(parts, claims, norm, report)
        total = arb(1)
        for piece in claims:
            total *= arb(piece.upper)
    elif claim.kind == "Sum" and len(parts) == 1 and isinstance(parts[0], Sum):
        _prove_all([parts[0].first, parts[0].second], claim.pieces, norm, report)
        total = sum((arb(piece.upper) for piece in claim.pieces), arb(0))
    elif claim.kind == "Concat" and len(parts) == 1 and isinstance(parts[0], Concat):
        _prove_all(parts[0].maps, claim.pieces, norm, report)
        total = joined([arb(piece.upper) for piece in claim.pieces], norm)
    else:
        raise Refused(f"its pieces are no {claim.kind} of what the model does there")
    _compare(total, claim)


def _prove_all(parts: Sequence[Linear], claims: Sequence[PieceClaim], norm: str, report: Callable[[str], None]) -> None:
    if len(parts) != len(claims):
        raise Refused(f"expected {len(parts)} pieces, got {len(claims)}")
    for part, claim in zip(parts, claims, strict=True):
        prove(part, claim, norm, report)


def joined(constants: Sequence[arb], norm: str) -> arb:
    """The constant of a concatenation: root of squares (l2), largest (linf), sum (l1)."""
    if norm == "l2":
        return sum((c * c for c in constants), arb(0)).sqrt()
    total = arb(0)
    for constant in constants:
        total = total.max(constant) if norm == "linf" else total + constant
    return total


def _prove_one(part: Linear, claim: PieceClaim, norm: str, report: Callable[[str], None]) -> None:
    """A single map, by its structure or as a matrix."""
    if isinstance(part, Scale):
        _compare(scaled(largest(part.factor.mant) + part.factor.err, part.factor.exp), claim)
    elif isinstance(part, Dense):
        _prove_matrix(part.weight, claim, norm)
    elif norm != "l2":
        _prove_sums(part, claim, norm)
    elif claim.torus is not None:
        _prove_torus(part, claim, report)
    elif isinstance(part, Windows):
        _prove_matrix(materialised(part.one_channel), claim, norm)
    elif not absolute_norm(part) <= arb(claim.upper):
        _prove_matrix(materialised(part), claim, norm)


def _prove_sums(part: Linear, claim: PieceClaim, norm: str) -> None:
    """By the sums of absolute values; where entries may cancel, by those of the matrix itself."""
    found = greatest_sum(part, norm)
    if claim.method == "materialised" and not found <= arb(claim.upper):
        found = absolute_sum(materialised(part), norm)
    _compare(found, claim)


def _prove_torus(part: Linear, claim: PieceClaim, report: Callable[[str], None]) -> None:
    convolution = part.forward if isinstance(part, Transposed) else part
    if not isinstance(convolution, Convolution):
        raise Refused("a torus is claimed for what is no convolution")
    axes = claim.torus or default_torus(convolution)
    problem = torus_problem(convolution, axes)
    if problem:
        raise Refused(problem)
    found = torus_below(convolution, axes, arb(claim.upper), report)
    if found is not None:
        raise Refused(f"claimed {claim.upper!r}, not proved; a frequency block gives about {found:.17g}")


def _prove_matrix(matrix: Fixed, claim: PieceClaim, norm: str) -> None:
    if norm != "l2":
        _compare(absolute_sum(matrix, norm), claim)
        return
    found = block(matrix)
    if not proves_below(found, arb(claim.upper)):
        raise Refused(f"claimed {claim.upper!r}, not proved; the norm is about {guessed_norm(found):.17g}")

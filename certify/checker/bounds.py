"""Checks of a certificate's constants: norms of runs, constants of tensors, constants of pairs of classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from flint import arb, fmpz

from ..certificate_file import Certificate
from ..claims import NormClaim
from .balls import Fixed, integers, largest, matrix, scaled
from .invalid import Invalid
from .matrices import Refused, rows_of
from .network import Network, Node
from .runs import joined, prove

Matrix = list[list[arb]]


def check_bounds(
    network: Network, claim: NormClaim, norm: str, counts: dict[str, int], report: Callable[[str], None]
) -> None:
    """Prove every constant of one norm; Invalid names the first that fails."""
    _check_runs(network, claim, norm, counts, report)
    constants = _check_constants(network, claim, norm)
    counts["constants"] = counts.get("constants", 0) + len(constants)
    runs = {run.end: arb(run.upper) for run in claim.runs}
    anchor = network.places[network.output].anchor
    if claim.last_constant != constants[anchor]:
        raise Invalid(
            f"last constant ({norm})", f"claimed {claim.last_constant!r}, its anchor has {constants[anchor]!r}"
        )
    _at_least(claim.upper, _through(network, network.output, runs, constants), f"upper ({norm})")
    differences, size = row_differences(network, norm), len(claim.pairwise)
    if size != len(differences) or any(len(row) != size for row in claim.pairwise):
        raise Invalid(f"pairwise ({norm})", f"expected {len(differences)} rows and columns")
    for i, row in enumerate(claim.pairwise):
        for j, value in enumerate(row):
            needed = product(differences[i][j], arb(claim.last_constant))
            _check_pair(value, needed, i, j, f"pairwise {i}, {j} ({norm})")


def _at_least(claimed: float, needed: arb, name: str) -> None:
    if claimed != math.inf and not needed <= arb(claimed):
        raise Invalid(name, f"claimed {claimed!r}, the checker proves {float(needed.upper()):.17g}")
    if claimed == math.inf and needed.is_nan():
        raise Invalid(name, "claimed inf, the checker proves nothing")


def _check_pair(claimed: float, needed: arb, i: int, j: int, name: str) -> None:
    if i != j:
        _at_least(claimed, needed, name)
    elif claimed != 0:
        raise Invalid(name, f"claimed {claimed!r}, a class does not differ from itself")


def product(first: arb, second: arb) -> arb:
    """The product, 0 where a factor is exactly 0 even if the other is infinite."""
    return arb(0) if first.is_zero() or second.is_zero() else first * second


def _check_runs(
    network: Network, claim: NormClaim, norm: str, counts: dict[str, int], report: Callable[[str], None]
) -> None:
    found, expected = [run.end for run in claim.runs], network.run_ends
    _same(found, expected, "run", norm)
    for run in claim.runs:
        linear = network.places[run.end].linear
        if linear is None:
            raise Invalid(f"run {run.end} ({norm})", "the model has no affine run that ends there")
        if (tuple(run.in_shape), tuple(run.out_shape)) != (linear.in_shape, linear.out_shape):
            shapes = f"{linear.in_shape} -> {linear.out_shape}"
            raise Invalid(
                f"run {run.end} ({norm})", f"claimed {run.in_shape} -> {run.out_shape}, the model has {shapes}"
            )
        if not run.lower <= run.upper:
            raise Invalid(f"run {run.end} ({norm})", f"estimated {run.lower!r}, above the claimed {run.upper!r}")
        report(f"norm of the run to {run.end} ({norm})")
        try:
            prove(linear, run, norm, report)
        except Refused as error:
            raise Invalid(f"run {run.end} ({norm})", str(error)) from error
        counts["runs"] = counts.get("runs", 0) + 1


def _same(found: Sequence[str], expected: Sequence[str], kind: str, norm: str) -> None:
    for name in expected:
        if name not in found:
            raise Invalid(f"{kind} {name} ({norm})", "missing")
    for name in found:
        if name not in expected:
            raise Invalid(f"{kind} {name} ({norm})", f"the model has no such {kind}")
    if list(found) != list(expected):
        raise Invalid(f"{kind}s ({norm})", "expected each once, in the order of the model")


def _check_constants(network: Network, claim: NormClaim, norm: str) -> dict[str, float]:
    _same([one.node for one in claim.constants], [node.name for node in network.anchors], "constant", norm)
    constants = {one.node: one.upper for one in claim.constants}
    runs = {run.end: arb(run.upper) for run in claim.runs}
    for node in network.anchors:
        _at_least(constants[node.name], _needed(network, node, runs, constants, norm), f"constant {node.name} ({norm})")
    return constants


def _needed(network: Network, node: Node, runs: Mapping[str, arb], constants: Mapping[str, float], norm: str) -> arb:
    """An anchor's constant from those of the tensors that it is made of."""
    if node.kind == "input":
        return arb(1)
    before = [_through(network, name, runs, constants) for name in node.sources]
    if node.kind == "activation" and node.activation is not None:
        return product(node.activation.factor(norm), before[0])
    return joined(before, norm) if node.kind == "concat" else sum(before, arb(0))


def _through(network: Network, name: str, runs: Mapping[str, arb], constants: Mapping[str, float]) -> arb:
    """Any needed tensor's constant from the input, by claims."""
    place = network.places[name]
    constant = arb(constants[place.anchor])
    return constant if place.linear is None else product(runs[name], constant)


def row_differences(network: Network, norm: str) -> Matrix:
    """Dual norms of the differences of the last run's rows: upper bounds [K][K]."""
    classes, place = network.node(network.output).shape[0], network.places[network.output]
    if place.linear is None:
        one = [[fmpz(int(i == j)) for j in range(classes)] for i in range(classes)]
        rows = Fixed(integers([value for row in one for value in row], (classes, classes)), 0)
    else:
        rows = rows_of(place.linear)
    if norm == "l2":
        return _euclidean_differences(rows)
    found = [[arb(0)] * classes for _ in range(classes)]
    for i in range(classes):
        for j in range(i):
            difference = abs(rows.mant[i] - rows.mant[j]) + 2 * rows.err
            total = largest(difference) if norm == "l1" else fmpz(difference.sum())
            found[i][j] = found[j][i] = scaled(total, rows.exp)
    return found


def _euclidean_differences(rows: Fixed) -> Matrix:
    """||r_i - r_j||^2 = G_ii + G_jj - 2 G_ij, exactly."""
    entries = matrix(rows.mant)
    gram, size = (entries * entries.transpose()).tolist(), len(rows.mant)
    unit, spread = arb(2) ** rows.exp, 2 * rows.radius * arb(rows.mant.shape[1]).sqrt()
    return [
        [arb(gram[i][i] + gram[j][j] - 2 * gram[i][j]).sqrt() * unit + spread for j in range(size)] for i in range(size)
    ]


def check_final(certificate: Certificate, entries: int) -> None:
    """The constants in the radii's norm: the smallest of that norm's own and of what follows from l2.

    Relaxations, proved before, bound the change of a difference, or the l2 norm of the change of all logits, which is
    at least that of a difference by sqrt(2).
    """
    own, l2, norm = certificate.bounds[certificate.norm], certificate.bounds["l2"], certificate.norm
    inner = arb(entries).sqrt() if norm == "linf" else arb(1)
    classes = len(own.pairwise)
    outer = arb(classes).sqrt() if norm == "l1" else arb(1)
    relaxed = _relaxed(certificate, inner)
    whole = relaxed.get(None, arb.pos_inf())
    if len(certificate.pairwise) != classes or any(len(row) != classes for row in certificate.pairwise):
        raise Invalid("pairwise", f"expected {classes} rows and columns")
    for i, row in enumerate(certificate.pairwise):
        for j, value in enumerate(row):
            other = product(arb(l2.pairwise[i][j]), inner)
            pair = relaxed.get((i, j), arb.pos_inf()).min(whole * arb(2).sqrt())
            _check_pair(value, arb(own.pairwise[i][j]).min(other).min(pair), i, j, f"pairwise {i}, {j}")
    product_upper = arb(own.upper).min(arb(l2.upper) * inner * outer)
    _at_least(certificate.lipschitz, product_upper.min(whole * outer), "lipschitz")


def _relaxed(certificate: Certificate, inner: arb) -> dict[tuple[int, int] | None, arb]:
    """The least proved constant of each pair, in either order, and of all logits (None), from the radii's norm."""
    found: dict[tuple[int, int] | None, arb] = {}
    for claim in certificate.relaxations:
        value = arb(claim.upper) * (arb(1) if claim.norm == certificate.norm else inner)
        keys = [None] if claim.pair is None else [claim.pair, (claim.pair[1], claim.pair[0])]
        for key in keys:
            found[key] = found.get(key, value).min(value)
    return found

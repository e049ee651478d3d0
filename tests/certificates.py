"""Certificates made by hand, for tests of how they are stored."""

import dataclasses
import math

from speccert.certify.certificate_file import Certificate
from speccert.certify.claims import (
    ArithmeticClaim,
    AssumptionClaim,
    ConstantClaim,
    ModelClaim,
    NormClaim,
    PieceClaim,
    RelaxationClaim,
    RunClaim,
    SampleClaim,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4


def samples(count, classes=3):
    """Rows with awkward numbers: an infinite radius, the smallest numbers, a misclassified sample."""
    special = [(0.1 + 0.2, math.inf), (-math.inf, 1e-308), (-0.0, 0.0), (1e308, 1 / 3)]
    return tuple(
        SampleClaim(
            2 * k,
            "sha256:" + f"{k:064x}",
            k % classes,
            k % classes,
            *special[k % 4] if k < 8 else (0.1 * k, 1 / (k + 1)),
        )
        for k in range(count)
    )


def norm_claim(upper=0.1 + 0.2, end="conv"):
    """Bounds of a convolution, and of a chain of a re-indexing and a dense map."""
    flat = PieceClaim("Reindex", (2, 3, 4), (24,), 1.0, "isometry")
    dense = PieceClaim("Dense", (24,), (3,), 1 / 3, "dense")
    runs = (
        RunClaim(
            "Convolution",
            (1, 3, 4),
            (2, 3, 4),
            math.nextafter(1.0, 2.0),
            "torus",
            ((4, 2, 0.5), (5, 1, 0.0)),
            end=end,
            parts=("conv", "bn"),
            lower=0.99,
        ),
        RunClaim("Chain", (2, 3, 4), (3,), 1 / 3, "dense", None, (flat, dense), end="fc", parts=("fc",), lower=0.0),
    )
    constants = (ConstantClaim("x", 1.0), ConstantClaim("act", math.nextafter(1.0, 2.0)))
    return NormClaim(upper, runs, constants, constants[1].upper, matrix(0.5))


def relaxations(norm):
    """One of a pair and one of all logits, in l2 and in the norm of the radii."""
    weights = (0.1 + 0.2,) * 12 if norm == "linf" else None
    return (
        RelaxationClaim("l2", "act", "fc", (2, 0), 1 / 3, 0.1 + 0.2, ((1e-308, 0.1), (1e308,)), None, "lipsdp"),
        RelaxationClaim(norm, "x", "fc", None, 1.0, math.nextafter(1.0, 2.0), (), weights, "closed-form"),
    )


def matrix(value):
    """A 3 x 3 matrix with a zero diagonal."""
    return tuple(tuple(0.0 if i == j else value / (i + j) for j in range(3)) for i in range(3))


def certificate(count=3, norm="l2", **changes):
    """A certificate of `count` samples whose claims nobody has checked."""
    made = Certificate(
        speccert="0.1.0",
        model=ModelClaim(DIGEST, (1, 3, 4), 3, "float32"),
        norm=norm,
        method="product",
        arithmetic=ArithmeticClaim("float32", 2.0**-24, 2.0**-24, 2.0**-126, 3.4028234663852886e38),
        assumptions=(AssumptionClaim("one", "A sentence."), AssumptionClaim("two", "With “signs”, \\ and 中.")),
        bounds={each: norm_claim() for each in dict.fromkeys(("l2", norm))},
        relaxations=relaxations(norm),
        pairwise=matrix(1.0),
        lipschitz=math.inf,
        samples=samples(count),
    )
    return dataclasses.replace(made, **changes)

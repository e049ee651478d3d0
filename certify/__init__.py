"""Bounds and certificates: operator norms, Lipschitz constants, certified radii."""

from .jacobian import jacobians, largest_jacobian_norm
from .linear import NORMS, LinearMap, NormBounds
from .lipschitz import LayerBound, LipschitzBound, TrainingBound, lipschitz
from .power import estimate_norm
from .radii import (
    average_certified_radius,
    certified_accuracy,
    certified_curve,
    certified_radii,
    radii_from_logits,
)
from .rules import Call, linear_map_of, register_rule
from .spectral import norm_bounds

__all__ = [
    "NORMS",
    "Call",
    "LayerBound",
    "LinearMap",
    "LipschitzBound",
    "NormBounds",
    "TrainingBound",
    "average_certified_radius",
    "certified_accuracy",
    "certified_curve",
    "certified_radii",
    "estimate_norm",
    "jacobians",
    "largest_jacobian_norm",
    "linear_map_of",
    "lipschitz",
    "norm_bounds",
    "radii_from_logits",
    "register_rule",
]

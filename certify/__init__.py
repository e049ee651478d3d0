"""Bounds and certificates: operator norms, Lipschitz constants, certified radii."""

from .arithmetic import ARITHMETICS, Arithmetic, assumptions
from .certificate import certify
from .certificate_file import Certificate, load_certificate
from .certifier import Certifier, Margins, Radii
from .checker import Verdict, verify
from .claims import CertificateError
from .jacobian import jacobians, largest_jacobian_norm
from .linear import NORMS, LinearMap, NormBounds
from .lipschitz import LayerBound, LipschitzBound, TrainingBound, lipschitz
from .power import estimate_norm
from .radii import (
    average_certified_radius,
    certified_accuracy,
    certified_curve,
    certified_radii,
    estimate_radii,
)
from .rules import Call, Rounding, linear_map_of, register_rule
from .spectral import norm_bounds

__all__ = [
    "ARITHMETICS",
    "NORMS",
    "Arithmetic",
    "Call",
    "Certificate",
    "CertificateError",
    "Certifier",
    "LayerBound",
    "LinearMap",
    "LipschitzBound",
    "Margins",
    "NormBounds",
    "Radii",
    "Rounding",
    "TrainingBound",
    "Verdict",
    "assumptions",
    "average_certified_radius",
    "certified_accuracy",
    "certified_curve",
    "certified_radii",
    "certify",
    "estimate_norm",
    "estimate_radii",
    "jacobians",
    "largest_jacobian_norm",
    "linear_map_of",
    "lipschitz",
    "load_certificate",
    "norm_bounds",
    "register_rule",
    "verify",
]

"""Networks: constraints on stock layers, activations, architectures, normalisation as a layer."""

from . import roundings as _roundings  # registers how this package's layers round
from . import rules as _rules  # registers the Lipschitz rules of this package's layers
from .activations import ACTIVATIONS, Abs, GroupSort, Householder, MaxMin, build_activation
from .architectures import build_model
from .constraints import BASELINES, CONSTRAINTS, SpectralConstraint, constrain, retract, spectral_penalty
from .layers import Normalize, Residual

del _roundings, _rules

__all__ = [
    "ACTIVATIONS",
    "BASELINES",
    "CONSTRAINTS",
    "Abs",
    "GroupSort",
    "Householder",
    "MaxMin",
    "Normalize",
    "Residual",
    "SpectralConstraint",
    "build_activation",
    "build_model",
    "constrain",
    "retract",
    "spectral_penalty",
]

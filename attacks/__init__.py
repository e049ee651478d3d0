"""Attacks on classifiers: an independent witness against a wrong certificate.

`attack(model, x, y, "pgd", norm="l2", eps=0.5)` searches a ball around each sample; minimum-norm attacks ("ddn",
"fmn", "fab", "cw", "deepfool") search for the smallest perturbation; `worst_case` merges what several found.
`run_ensemble` runs several, cheapest first, each on the samples that still stand, and `diagnose` looks for signs that
a model hides its gradients.
"""

from .attempts import Attempt, EnsembleResult
from .base import Attack
from .diagnostics import Diagnosis, Flag, diagnose
from .ensemble import run_ensemble
from .registry import attack, available_attacks, is_minimum_norm, make_attack
from .results import AttackResult, worst_case

__all__ = [
    "Attack",
    "AttackResult",
    "Attempt",
    "Diagnosis",
    "EnsembleResult",
    "Flag",
    "attack",
    "available_attacks",
    "diagnose",
    "is_minimum_norm",
    "make_attack",
    "run_ensemble",
    "worst_case",
]

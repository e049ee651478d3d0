"""Attacks on classifiers: an independent witness against a wrong certificate.

`attack(model, x, y, "pgd", norm="l2", eps=0.5)` searches a ball around each sample; minimum-norm attacks ("ddn",
"fmn", "cw", "deepfool") search for the smallest perturbation; `worst_case` merges what several found. FGSM and PGD in
l-infinity, l2 PGD and the members of AutoAttack run through torchattacks, which is imported when first used.
"""

from .base import Attack
from .registry import attack, available_attacks, is_minimum_norm, make_attack
from .results import AttackResult, worst_case

__all__ = [
    "Attack",
    "AttackResult",
    "attack",
    "available_attacks",
    "is_minimum_norm",
    "make_attack",
    "worst_case",
]

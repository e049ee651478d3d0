"""Attacks by name."""

import dataclasses

from torch import Tensor, nn

from .apgd import APGDCE, APGDDLR, APGDT
from .autoattack import AutoAttack
from .base import Attack
from .checks import known_norm
from .cw import CarliniWagner
from .ddn import DDN
from .deepfool import DeepFool
from .fab import FAB
from .fgsm import FGSM
from .fmn import FMN
from .foreign import EOTPGD, SPSA
from .pgd import PGD
from .results import AttackResult
from .rounding_search import RoundingSearch
from .square import Square

_ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind
    for kind in (
        FGSM,
        PGD,
        APGDCE,
        APGDDLR,
        APGDT,
        FAB,
        Square,
        AutoAttack,
        EOTPGD,
        SPSA,
        DeepFool,
        CarliniWagner,
        DDN,
        FMN,
        RoundingSearch,
    )
}


def available_attacks(norm: str, *, minimum_norm: bool | None = None) -> tuple[str, ...]:
    """Return the names of the attacks in that norm; `minimum_norm` keeps only those that are, or are not, of that kind.

    Raises:
        ValueError: if the norm is unknown.
    """
    known_norm(norm)
    return tuple(
        name for name, kind in _ATTACKS.items() if norm in kind.norms and minimum_norm in (None, kind.minimum_norm)
    )


def is_minimum_norm(name: str) -> bool:
    """Return whether that attack looks for the smallest perturbation and needs no eps.

    Raises:
        ValueError: if the name is unknown.
    """
    return _kind(name).minimum_norm


def make_attack(name: str, **options: object) -> Attack:
    """Return the attack called `name` with its options set.

    Raises:
        ValueError: if the name or an option is unknown, or an option's value is out of range.
    """
    kind = _kind(name)
    allowed = [field.name for field in dataclasses.fields(kind)]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ValueError(f"options of {name!r} are {', '.join(allowed)}, got {', '.join(unknown)}")
    return kind(**options)  # type: ignore[arg-type]  # each class checks the values of its fields


def attack(
    model: nn.Module,
    x: Tensor,  # (B, ...) in [0, 1]
    y: Tensor,  # (B,) integers
    name: str,
    *,
    norm: str = "l2",
    eps: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    certified: Tensor | None = None,  # (B,)
    integer_pixels: bool = False,
    **options: object,
) -> AttackResult:
    """Search for adversarial points: z in [0, 1] with ||z - x|| <= eps and max_{j != y} f_j(z) >= f_y(z).

    The model is attacked in eval mode; its mode, gradients and all random states are left as they were, and the
    result depends on `seed` alone, not on the global state. Perturbations are measured in float64 on the tensors
    that the model saw.

    Args:
        model: any classifier that returns logits (B, K), K >= 2; normalisation belongs inside it. Samples are moved to
            its device batch by batch, and what is found back to theirs.
        x: samples of any shape (flat or images), float32 or float64, raw values in [0, 1].
        y: their labels, in [0, K).
        name: an attack, one of `available_attacks(norm)`.
        norm: "l2", "linf" or "l1".
        eps: the radius in units of x; may be None for minimum-norm attacks, which then report every success.
        seed: seeds everything random.
        batch_size: samples attacked at once; None for as many as memory holds, at most 256 on a CPU and 1,024 on a GPU.
        certified: radii within which there is said to be no adversarial point, 0 where nothing is said. Searches for
            the smallest perturbation begin there; points inside count all the same.
        integer_pixels: only points whose every entry is some k / 255 count; x must be such a point. In float32 an entry
            moved by 8 levels may have moved by a little more than 8 / 255: leave eps some room.
        options: the attack's own options, its dataclass's fields.

    Raises:
        ValueError: if an argument is out of range, or the model's logits or input gradients are not finite.
    """
    return make_attack(name, **options)(
        model,
        x,
        y,
        norm=norm,
        eps=eps,
        seed=seed,
        batch_size=batch_size,
        certified=certified,
        integer_pixels=integer_pixels,
    )


def _kind(name: str) -> type[Attack]:
    if name not in _ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(_ATTACKS)}, got {name!r}")
    return _ATTACKS[name]

"""What an ensemble of attacks found, and each attack's share in it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Attempt:
    """One attack at one eps.

    Attributes:
        attack: its name in the ensemble.
        eps: the radius of the ball; None for a minimum-norm attack.
        attacked: samples that it was run on.
        broken: those of them for which it found a point within eps; any point for a minimum-norm attack.
        standing: samples of all that have no point within eps after it, found by it or, in a cascade, before it.
        forwards: inputs evaluated.
        gradients: input gradients taken.
        seconds: wall-clock time.
        note: "budget" where a budget kept it from samples, "" otherwise.
    """

    attack: str
    eps: float | None
    attacked: int
    broken: int
    standing: int
    forwards: int
    gradients: int
    seconds: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class EnsembleResult:
    """What several attacks found on B samples.

    Attributes:
        norm: "l2", "linf" or "l1".
        eps: the radii, ascending.
        distance: (B,) float64 smallest distance that any attack found; 0 where misclassified, inf where none was found.
        closest: (B, ...) the adversarial points at `distance`; x where it is 0 or inf.
        by_attack: for each attack (B,) float64, the smallest distance that it found or, in a cascade, that was found up
            to then: (by_attack[name] > eps) is what stands after it.
        attempted: for each attack (B,) bool, whether it was run on the sample.
        certified_skipped: for each eps, the correctly classified samples spared by attacks with a ball because their
            certified radius is larger.
        attempts: in the order they were made.
        notes: where attacks departed from their standard form, in words.
        complete: whether every attack was run on all samples it was due on; False where a budget ended it.
    """

    norm: str
    eps: tuple[float, ...]
    distance: Tensor
    closest: Tensor
    by_attack: dict[str, Tensor]
    attempted: dict[str, Tensor]
    certified_skipped: dict[float, int]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    complete: bool

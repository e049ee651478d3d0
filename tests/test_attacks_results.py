"""Merging results by hand-made cases."""

import dataclasses

import pytest
import torch

from speccert.attacks import AttackResult, worst_case

INF = float("inf")


def result(name: str, success: list[bool], distance: list[float], eps: float | None, at: float) -> AttackResult:
    point = torch.full((len(success), 2), at)
    return AttackResult(
        x_adv=point,
        success=torch.tensor(success),
        distance=torch.tensor(distance, dtype=torch.float64),
        closest=point + 0.01,
        logits=torch.full((len(success), 3), at),
        norm="l2",
        eps=eps,
        attack=name,
        forwards=10,
        gradients=4,
        notes=("a note",),
    )


FIXED = result("fixed", [True, False, False, True], [0.3, INF, INF, 0.2], 0.5, 0.1)
OTHER = result("other", [False, True, False, True], [INF, 0.5, INF, 0.1], 0.5, 0.2)
FREE = result("free", [True, True, True, True], [0.6, 0.4, 0.9, 0.3], None, 0.3)


def test_worst_case_per_sample() -> None:
    merged = worst_case([FREE, FIXED, OTHER])
    assert merged.success.tolist() == [True, True, False, True]
    assert merged.distance.tolist() == [0.3, 0.4, 0.9, 0.1]
    torch.testing.assert_close(merged.closest[:, 0], torch.tensor([0.11, 0.31, 0.31, 0.21]))
    # Row 2: the minimum-norm attack's point lies outside the ball, so the first attack in the ball gives the point.
    torch.testing.assert_close(merged.x_adv[:, 0], torch.tensor([0.1, 0.3, 0.1, 0.3]))
    assert torch.equal(merged.logits[:, 0], merged.x_adv[:, 0])
    assert merged.accuracy == 0.25
    assert (merged.eps, merged.norm, merged.forwards, merged.gradients) == (0.5, "l2", 30, 12)
    assert merged.attack == "worst_case(free, fixed, other)"
    assert merged.notes == ("a note",)


def test_worst_case_of_minimum_norm_results_alone() -> None:
    merged = worst_case([FREE])
    assert merged.eps is None
    assert merged.success.all()
    assert torch.equal(merged.distance, FREE.distance)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dataclasses.replace(FIXED, eps=0.6), r"share one eps, got \[0.5, 0.6\]"),
        (dataclasses.replace(FIXED, norm="l1"), r"share one norm, got \['l1', 'l2'\]"),
        (dataclasses.replace(FIXED, x_adv=torch.zeros(3, 2)), r"share one x_adv shape"),
    ],
)
def test_results_must_fit_together(other: AttackResult, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worst_case([FIXED, other])


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="at least one result"):
        worst_case([])

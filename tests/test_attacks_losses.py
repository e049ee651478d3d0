"""The losses against the papers' formulas at numbers worked out by hand, and where float32 loses the cross-entropy."""

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks.losses import LOSSES, cross_entropy, dlr, objective, strongest_classes, targeted_dlr
from speccert.attacks.norms import NORMS
from speccert.attacks.task import Task, margin
from speccert.attacks.victim import Victim

LOGITS = torch.tensor([[5.0, 3.0, 1.0, -1.0], [2.0, 6.0, 3.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0])


def test_formulas_by_hand() -> None:
    # Row 1 is classified as 0: m = 3 - 5 over 5 - 1. Row 2 is not: m = 6 - 2 over 6 - 2.
    assert margin(LOGITS, LABELS).tolist() == [-2.0, 4.0]
    assert dlr(LOGITS, LABELS).tolist() == [-0.5, 1.0]
    # Towards class 2: (1 - 5) / (5 - (1 - 1) / 2) and (3 - 2) / (6 - (2 + 0) / 2).
    assert targeted_dlr(LOGITS, LABELS, torch.tensor([2, 2])).tolist() == [-0.8, 0.2]
    # log(e^3 + e + e^-1) - 5
    assert cross_entropy(LOGITS, LABELS)[0].item() == pytest.approx(-1.857068, abs=1e-6)


def test_few_classes() -> None:
    two, three = LOGITS[:, :2], LOGITS[:, :3]
    assert dlr(two, LABELS).tolist() == [-2.0, 4.0]
    assert targeted_dlr(two, LABELS, torch.tensor([1, 1])).tolist() == [-2.0, 4.0]
    assert targeted_dlr(three, LABELS, torch.tensor([1, 2])).tolist() == [-0.5, 0.25]
    assert dlr(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])).tolist() == [0.0]


def test_cross_entropy_has_torchs_order_and_direction() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    y = torch.randint(5, (40,), generator=draw)
    theirs = nn.functional.cross_entropy(logits, y, reduction="none")
    (wanted,) = torch.autograd.grad(theirs.sum(), logits)
    ours = cross_entropy(logits, y)
    (got,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(ours.exp().log1p(), theirs)
    torch.testing.assert_close(nn.functional.normalize(got), nn.functional.normalize(wanted))


@pytest.mark.parametrize("gap", [1.0, 30.0, 90.0, 250.0, 1e6])
def test_cross_entropy_keeps_its_direction_at_any_margin(gap: float) -> None:
    """Against the closed form softmax - one-hot, from which the exponent of the gap cancels."""
    logits = torch.tensor([[gap, 0.0, -1.0]], requires_grad=True)
    cross_entropy(logits.double(), torch.tensor([0])).backward()
    others = torch.tensor([1.0, torch.e**-1]) / (1 + torch.e**-1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.cat([torch.tensor([-1.0]), others]))


@pytest.mark.parametrize("name", LOSSES)
def test_objectives_rank_alike_near_the_boundary(name: str) -> None:
    """Every loss turns from negative to positive, or grows, along a walk across the boundary of an affine model."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]]))
        model.bias.zero_()
    x = torch.tensor([[1.0, 0.1, 0.1]])
    task = Task(Victim(model), x, torch.tensor([0]), NORMS["l2"], 1.0)
    loss = objective(name, task)
    values = [loss(model(x + t * torch.tensor([[-1.0, 3.0, 4.0]]))).item() for t in (0.0, 0.01, 0.02)]
    assert values == sorted(values)
    assert loss(model(x)).dtype == torch.float64
    if name == "logit-difference":
        assert values[0] == pytest.approx(-0.3 / 26**0.5, rel=1e-6)  # minus the distance to the boundary


def test_objective_of_some_samples() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 5), torch.rand(6, 4)
    task = Task(Victim(model), x, model(x).argmax(1), NORMS["linf"], 0.1)
    keep = torch.tensor([True, False, True, True, False, False])
    for name in LOSSES:
        loss = objective(name, task)
        torch.testing.assert_close(loss[keep](model(x[keep])), loss(model(x))[keep])


def test_strongest_classes_are_the_largest_wrong_logits() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return LOGITS

    task = Task(Victim(Fixed()), torch.zeros(2, 1), torch.tensor([0, 1]), NORMS["l2"], 0.1)
    assert strongest_classes(task, 2).tolist() == [[1, 2], [2, 0]]
    assert strongest_classes(task, 9).tolist() == [[1, 2, 3], [2, 0, 3]]

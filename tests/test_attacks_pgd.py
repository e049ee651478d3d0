"""PGD and FGSM: the optimum of a linear model in the ball and the box, losses, momentum and restarts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks import attack, make_attack
from speccert.attacks.boxed import sparse_step
from speccert.attacks.losses import LOSSES
from speccert.attacks.pgd import PGD

EPS = {"l2": 1.0, "linf": 0.2, "l1": 3.0}
ORDERS = {"l2": 2.0, "linf": float("inf"), "l1": 1.0}


def linear(norm: str) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A model, samples of which half the entries lie at 0 or 1, labels, and the largest margin in the ball and box.

    The bias makes all margins there negative, so that no sample leaves the attack early.
    """
    draw = torch.Generator().manual_seed(2)
    model = nn.Linear(60, 2).double()
    x = (torch.rand(20, 60, generator=draw, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 60, generator=draw, dtype=torch.float64))
        model.bias.copy_(torch.tensor([200.0, 0.0]))
    gradient = (model.weight[1] - model.weight[0]).detach().expand_as(x)
    room = torch.where(gradient > 0, 1 - x, x)
    best = (gradient.abs() * _sizes(gradient.abs(), room, norm)).sum(1)
    return model, x, torch.zeros(20, dtype=torch.int64), best


def _sizes(steep: Tensor, room: Tensor, norm: str) -> Tensor:
    """The sizes of the best move: min(c |g|, room) in l2, the steepest entries first in l1."""
    if norm == "linf":
        return room.clamp_max(EPS[norm])
    if norm == "l2":
        low, high = torch.zeros(len(room), 1).double(), torch.full((len(room), 1), 1e3).double()
        for _ in range(100):
            middle = (low + high) / 2
            longer = torch.minimum(middle * steep, room).norm(dim=1, keepdim=True) > EPS[norm]
            low, high = torch.where(longer, low, middle), torch.where(longer, middle, high)
        return torch.minimum(low * steep, room)
    sizes = torch.zeros_like(room)
    for row in range(len(room)):
        left = EPS[norm]
        for entry in steep[row].argsort(descending=True).tolist():
            sizes[row, entry] = min(left, room[row, entry].item())
            left -= sizes[row, entry].item()
    return sizes


def gain(model: nn.Linear, x: Tensor, z: Tensor) -> Tensor:
    with torch.no_grad():
        before, after = model(x), model(z)
    moved: Tensor = (after[:, 1] - after[:, 0]) - (before[:, 1] - before[:, 0])
    return moved


@pytest.mark.parametrize(
    ("loss", "options"), [(loss, {}) for loss in LOSSES] + [("ce", {"momentum": 0.75}), ("ce", {"random_start": False})]
)
@pytest.mark.parametrize("norm", EPS)
def test_reaches_the_optimum_of_a_linear_model(norm: str, loss: str, options: dict[str, Any]) -> None:
    model, x, y, best = linear(norm)
    # In l1 a step of alpha leaves a residue of about alpha / 3.
    steps, alpha = (400, EPS[norm] / 50) if norm == "l1" else (100, EPS[norm] / 10)
    result = attack(model, x, y, "pgd", norm=norm, eps=EPS[norm], steps=steps, alpha=alpha, loss=loss, **options)
    gained = gain(model, x, result.x_adv)
    assert (gained <= best * (1 + 1e-9)).all()
    assert (gained >= best * 0.99).all()


@pytest.mark.parametrize("norm", EPS)
def test_one_step_is_the_optimum_of_a_linear_model(norm: str) -> None:
    model, x, y, best = linear(norm)
    result = attack(model, x, y, "fgsm", norm=norm, eps=EPS[norm])
    torch.testing.assert_close(gain(model, x, result.x_adv), best, rtol=1e-9, atol=0)
    assert result.gradients == 20


def test_default_step_size() -> None:
    """One step of 2.5 eps / steps from x, where neither ball nor box binds."""
    model = nn.Linear(4, 2)
    x, y = torch.full((1, 4), 0.5), torch.tensor([0])
    with torch.no_grad():
        model.bias.copy_(torch.tensor([50.0, 0.0]))
    short = attack(model, x, y, "pgd", norm="linf", eps=0.1, steps=10, random_start=False)
    single = attack(model, x, y, "pgd", norm="linf", eps=0.1, steps=1, alpha=0.025, random_start=False)
    assert (single.x_adv - x).abs().max().item() == pytest.approx(0.025, abs=1e-6)
    assert (short.x_adv - x).abs().max().item() == pytest.approx(0.1, abs=1e-6)


def test_sparse_steps_move_the_steepest_entries_that_have_room() -> None:
    gradient = torch.tensor([[0.1, -3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    z = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    assert sparse_step(z, gradient, 0.25).tolist() == [[0.0, -0.25, 0.0, 0.0], [0.0] * 4]
    assert sparse_step(z, gradient, 0.5).tolist()[0] == [0.0, -0.25, 0.25, 0.0]
    assert sparse_step(z, gradient, 2.0).tolist()[0] == [0.5, -0.25, 0.5, 0.0]
    wide = sparse_step(torch.full((1, 200), 0.5), torch.arange(200.0).unsqueeze(0), 0.5)
    assert wide[0, 198:].tolist() == [0.25, 0.25]
    assert wide.sum() == 0.5


class Ridge(nn.Module):
    """Class 1 wins only left of x_0 = 0.2; from the right of 0.6 the loss leads away from there."""

    def forward(self, x: Tensor) -> Tensor:
        far = torch.where(x[:, 0] > 0.6, x[:, 0] - 1.2, 0.2 - x[:, 0])
        return torch.stack([torch.zeros_like(far), far], 1)


def test_restarts_go_on_with_the_samples_that_stand() -> None:
    x, y = torch.full((200, 1), 0.62), torch.zeros(200, dtype=torch.int64)
    runs = [attack(Ridge(), x, y, "pgd", norm="linf", eps=0.5, steps=10, loss="ce", restarts=n) for n in (1, 3)]
    assert 0.02 < runs[1].accuracy < runs[0].accuracy / 2 < 0.4
    # Whoever fell in the first restart made no step in the later ones.
    assert runs[1].gradients < 200 * 10 * (runs[0].accuracy + 0.5 + 0.3)
    assert runs[0].gradients < 200 * 10 * (runs[0].accuracy + 0.1)


class Steep(nn.Module):
    """Two near classes: one near in logits and far in x, the other far in logits and near in x."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        return torch.stack([torch.zeros_like(a), 0.1 * (a - 0.9) - 0.02, 10 * (b - 0.7)], 1)


def test_scaled_differences_find_the_class_that_is_near_in_x() -> None:
    """The margin climbs class 1, which cannot be reached; the logit difference in units of distance climbs class 2."""
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    found = {
        loss: bool(attack(Steep(), x, y, "pgd", eps=0.25, loss=loss, random_start=False).success) for loss in LOSSES
    }
    assert found["logit-difference"]
    assert not found["margin"]
    assert attack(Steep(), x, y, "pgd", eps=0.25, loss="cycle", restarts=4).success.all()


def test_momentum_crosses_a_flat_piece() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            slope = torch.relu(x[:, 0] - 0.5).clamp_max(0.05) + 100 * torch.relu(x[:, 0] - 0.65)
            return torch.stack([torch.ones_like(slope), slope], 1)

    x, y = torch.full((1, 3), 0.51), torch.tensor([0])
    still, moving = (
        attack(Flat(), x, y, "pgd", norm="linf", eps=0.3, steps=20, alpha=0.02, random_start=False, momentum=momentum)
        for momentum in (0.0, 0.9)
    )
    assert not still.success.any()
    assert moving.success.all()


def test_hardened_and_cost() -> None:
    pgd = PGD(steps=40)
    strong = pgd.hardened()
    assert (strong.steps, strong.restarts, strong.loss) == (100, 8, "cycle")
    assert PGD(steps=300, restarts=20).hardened().restarts == 20
    assert pgd.cost(10) < strong.cost(10)
    names = ("fgsm", "pgd", "apgd-ce", "apgd-t", "autoattack")
    costs = [make_attack(name).cost(10) for name in names]
    assert costs == sorted(costs)
    assert make_attack("autoattack").cost(10) < make_attack("autoattack").hardened().cost(10)
    assert make_attack("fab", targets=None).cost(1000) > make_attack("fab", targets=9).cost(10) / 10

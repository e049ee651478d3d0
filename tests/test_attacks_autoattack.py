"""AutoAttack's settings and strength, and what torchattacks gets to see."""

from typing import Any

import pytest
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import Tensor, nn

from speccert.attacks import attack
from speccert.attacks.adapter import Layout, plain, precise, relative
from speccert.attacks.autoattack import AutoAttack
from speccert.attacks.gradient import PGD
from speccert.attacks.targeted_apgd import TargetedAPGD


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small trained network, and test images that it classifies."""
    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(1500).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return model, x[1500:1530], y[1500:1530]


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.35), ("linf", 0.05)])
def test_at_least_as_strong_as_pgd(digits: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float) -> None:
    model, x, y = digits
    pgd = attack(model, x, y, "pgd", norm=norm, eps=eps, steps=40, restarts=3)
    strong = attack(model, x, y, "autoattack", norm=norm, eps=eps, steps=40, queries=20)
    assert 0 < strong.accuracy <= pgd.accuracy < 1
    assert strong.notes == ()


def test_nearest_points_explain_every_success(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A minimum-norm attack that is worth its name finds nearly all that AutoAttack finds at one eps."""
    model, x, y = digits
    strong = attack(model, x, y, "autoattack", eps=0.35, steps=20, targets=4, queries=1)
    for name in ("ddn", "fmn", "cw", "deepfool"):
        nearest = attack(model, x, y, name)
        assert (nearest.distance <= 0.35)[strong.success].double().mean() >= 0.95


def test_members_make_the_papers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    for name in ("APGD", "FAB", "Square"):
        original = getattr(torchattacks, name).__init__

        def record(self: Any, *args: Any, _name: str = name, _original: Any = original, **settings: Any) -> None:
            seen.append((_name, settings))
            _original(self, *args, **settings)

        monkeypatch.setattr(getattr(torchattacks, name), "__init__", record)
    monkeypatch.setattr(torchattacks.Square, "forward", lambda self, images, labels: images)
    model = nn.Linear(4, 12)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias[0] = 1.0
    result = attack(model, torch.rand(2, 4), torch.zeros(2, dtype=torch.int64), "autoattack", eps=0.1, seed=3)
    assert [name for name, _ in seen] == ["APGD"] * 10 + ["FAB"] * 9 + ["Square"]
    assert [settings["loss"] for _, settings in seen[:10]] == ["ce"] + ["dlr"] * 9
    assert all(settings["steps"] == 100 for _, settings in seen[:19])
    assert seen[-1][1]["n_queries"] == 5000
    assert all(isinstance(settings["seed"], int) and settings["eps"] == 0.1 for _, settings in seen)
    # Two samples, ten APGD runs of 101 gradients and nine FAB runs of 100.
    assert result.gradients == 2 * (10 * 101 + 9 * 100)


@pytest.mark.parametrize(("classes", "loss"), [(2, "the logit difference"), (3, "(f_t - f_y) / (f_(1) - f_(3))")])
def test_few_classes_are_noted(classes: int, loss: str) -> None:
    model = nn.Linear(6, classes)
    x = torch.rand(3, 6)
    result = attack(model, x, model(x).argmax(1), "autoattack", eps=1e-3, steps=3, queries=3)
    assert len(result.notes) == 1
    assert loss in result.notes[0]


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_samples_of_a_batch_do_not_meet(digits: tuple[nn.Module, Tensor, Tensor], norm: str) -> None:
    """torchattacks' own l2 APGDT moves all samples by the first one's step size."""
    model, x, y = digits
    results = []
    for first in (0, 5, 9):
        rows = torch.tensor([first, 7])
        member = TargetedAPGD(model, rank=1, norm=norm, eps=0.2, steps=50)
        torch.manual_seed(0)
        results.append(member.attack_single_run(x[rows], y[rows])[0][1])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(results[2], results[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("shape", "square", "image"),
    [
        ((3, 8, 8), False, (3, 8, 8)),
        ((3, 8, 8), True, (3, 8, 8)),
        ((1, 4, 4), True, (1, 5, 5)),
        ((1, 12, 12), True, (1, 15, 15)),
        ((1, 24, 24), True, (1, 25, 25)),
        ((1, 28, 28), True, (1, 28, 28)),
        ((2, 3, 9), True, (2, 6, 6)),
        ((64,), False, (1, 1, 64)),
        ((64,), True, (1, 8, 8)),
        ((65,), True, (1, 9, 9)),
        ((2,), True, (1, 5, 5)),
        ((2, 3), False, (1, 1, 6)),
        ((2, 2, 2, 2), True, (1, 5, 5)),
    ],
)
def test_layout_there_and_back(shape: tuple[int, ...], square: bool, image: tuple[int, ...]) -> None:
    layout, x = Layout(shape, square), torch.rand(3, *shape)
    assert layout.images(x).shape == (3, *image)
    assert torch.equal(layout.samples(layout.images(x)), x)


@pytest.mark.parametrize("side", [1, 2, 4, 5, 7, 8, 12, 13, 18, 24])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_runs_on_any_size(side: int, norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * side * side, 3))
    x = torch.rand(2, 2, side, side)
    result = attack(model, x, model(x).argmax(1), "autoattack", norm=norm, eps=1e-3, steps=1, queries=12)
    assert torch.isfinite(result.x_adv).all()


@pytest.mark.parametrize("gap", [1.0, 30.0, 90.0, 250.0])
def test_precise_logits_give_the_true_direction(gap: float) -> None:
    """Against the closed form softmax - one-hot, divided by its largest entry: the exponents of the gap cancel."""
    logits = torch.tensor([[gap, 0.0, -1.0]], requires_grad=True)
    nn.functional.cross_entropy(precise(logits), torch.tensor([0])).backward()
    others = torch.tensor([1.0, torch.e**-1]).double()
    expected = torch.cat([-others.sum().unsqueeze(0), others])
    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad[0].double(), expected / expected.abs().max(), rtol=1e-6, atol=1e-9, msg=str(logits.grad)
    )


def test_precise_logits_never_lose_the_gradient() -> None:
    logits = torch.tensor([[1e6, 0.0, -5e5]], requires_grad=True)
    nn.functional.cross_entropy(precise(logits), torch.tensor([0])).backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-1.0, 1.0, 0.0])


@pytest.mark.parametrize("view", [plain, precise, relative])
def test_views_keep_the_ranking_and_own_their_memory(view: Any) -> None:
    logits = torch.randn(5, 4) * 100 - 300
    shown = view(logits)
    assert torch.equal(shown.argsort(1), logits.argsort(1))
    before = logits.clone()
    if view is not precise:
        shown.zero_()
    assert torch.equal(logits, before)


def test_options_are_checked() -> None:
    for kind, option in ((AutoAttack, "targets"), (AutoAttack, "queries"), (PGD, "restarts")):
        with pytest.raises(ValueError, match=f"{option} must be an integer >= 1, got 0"):
            kind(**{option: 0})

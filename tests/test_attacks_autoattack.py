"""AutoAttack and its members: settings, the published schedules, and strength beside torchattacks' members."""

from typing import Any

import pytest
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import Tensor, nn

from speccert.attacks import apgd, attack, make_attack
from speccert.attacks.apgd import APGDCE, APGDT, Climb
from speccert.attacks.autoattack import AutoAttack
from speccert.attacks.fab import FAB
from speccert.attacks.images import Images
from speccert.attacks.norms import NORMS
from speccert.attacks.pgd import PGD
from speccert.attacks.square import Square, _pyramid_pair
from speccert.attacks.standing import Standing
from speccert.attacks.task import Task
from speccert.attacks.victim import Victim


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
    return model, x[1500:1550], y[1500:1550]


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.35), ("linf", 0.05)])
def test_at_least_as_strong_as_pgd(digits: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float) -> None:
    model, x, y = digits
    pgd = attack(model, x, y, "pgd", norm=norm, eps=eps, steps=40, restarts=3)
    strong = attack(model, x, y, "autoattack", norm=norm, eps=eps, steps=40, queries=20)
    assert 0 < strong.accuracy <= pgd.accuracy < 1
    assert strong.notes == ()


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.35), ("linf", 0.05)])
@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("apgd-ce", {}, lambda model, **given: torchattacks.APGD(model, loss="ce", **given)),
        ("apgd-dlr", {}, lambda model, **given: torchattacks.APGD(model, loss="dlr", **given)),
        ("apgd-t", {"targets": 3}, lambda model, **given: torchattacks.APGDT(model, n_classes=4, **given)),
        (
            "fab",
            {"targets": 3},
            lambda model, **given: torchattacks.FAB(model, multi_targeted=True, n_classes=4, **given),
        ),
        ("fab", {"targets": None}, lambda model, **given: torchattacks.FAB(model, **given)),
    ],
    ids=["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "fab"],
)
def test_members_fell_the_samples_that_torchattacks_fells(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, options: dict[str, Any], theirs: Any, norm: str, eps: float
) -> None:
    model, x, y = digits
    result = attack(model, x, y, name, norm=norm, eps=eps, steps=40, **options)
    z = theirs(model, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, steps=40)(x, y)
    with torch.no_grad():
        fallen = model(z).argmax(1) != y
    fallen &= torch.linalg.vector_norm((z - x).flatten(1), NORMS[norm].order, 1) <= eps * (1 + 1e-5)
    assert 5 < fallen.sum() < 45
    assert (fallen & ~result.success).sum() <= 1
    assert (result.success & ~fallen).sum() <= 2


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.08)])
def test_square_is_as_strong_as_torchattacks(digits: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float) -> None:
    """Random search: equal to within a few samples of 50."""
    model, x, y = digits
    ours = attack(model, x, y, "square", norm=norm, eps=eps, queries=300, refine=False).accuracy
    member = torchattacks.Square(
        model, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, n_queries=300, resc_schedule=False
    )
    with torch.no_grad():
        theirs = (model(member(x, y)).argmax(1) == y).double().mean().item()
    assert ours <= theirs + 0.06


def test_nearest_points_explain_every_success(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A minimum-norm attack that is worth its name finds nearly all that AutoAttack finds at one eps."""
    model, x, y = digits
    strong = attack(model, x, y, "autoattack", eps=0.35, steps=20, targets=4, queries=1)
    for name in ("ddn", "fmn", "cw", "deepfool", "fab"):
        nearest = attack(model, x, y, name, **({"targets": 2} if name == "fab" else {}))
        assert (nearest.distance <= 0.35)[strong.success].double().mean() >= 0.95


def test_versions_have_the_papers_members() -> None:
    standard = AutoAttack().members()
    assert standard == (APGDCE(), APGDT(), FAB(), Square())
    assert [getattr(member, "steps", None) for member in standard] == [100, 100, 100, None]
    assert (standard[1].targets, standard[2].targets, standard[3].queries) == (9, 9, 5000)
    plus = AutoAttack(version="plus").members()
    assert [member.name for member in plus] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab"]
    assert [member.restarts for member in plus] == [5, 5, 5, 1, 1, 1]
    assert [plus[2].targets, plus[5].targets] == [None, 9]
    assert AutoAttack().hardened() == AutoAttack(version="plus")


def test_members_make_all_their_steps_where_nothing_falls() -> None:
    model = nn.Linear(4, 12)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias[0] = 1.0
    result = attack(
        model, torch.rand(2, 4), torch.zeros(2, dtype=torch.int64), "autoattack", eps=0.1, steps=9, queries=30
    )
    # Two samples, ten APGD runs of 1 + 9 gradients and nine FAB runs of 9.
    assert result.gradients == 2 * (10 * 10 + 9 * 9)


@pytest.mark.parametrize(("classes", "loss"), [(2, "the logit difference"), (3, "(f_t - f_y) / (f_(1) - f_(3))")])
def test_few_classes_are_noted(classes: int, loss: str) -> None:
    model = nn.Linear(6, classes)
    x = torch.rand(3, 6)
    for name in ("autoattack", "apgd-t"):
        options = {"queries": 3} if name == "autoattack" else {}
        result = attack(model, x, model(x).argmax(1), name, eps=1e-3, steps=3, **options)
        assert len(result.notes) == 1
        assert loss in result.notes[0]
    assert len(attack(model, x, model(x).argmax(1), "apgd-dlr", eps=1e-3, steps=3).notes) == (classes == 2)


def test_checkpoints_and_step_sizes_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """w_j = ceil(p_j N) with p = 0, 0.22, and then 0.03 less than the last distance, at least 0.06."""
    seen: list[tuple[int, float, bool]] = []
    original = Climb._check

    def record(self: Climb, period: int) -> None:
        before = self.size.clone()
        original(self, period)
        seen.append((period, before.item(), self.size.item() == before.item() / 2))

    monkeypatch.setattr(Climb, "_check", record)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    attack(model, torch.full((1, 5), 0.5), torch.tensor([0]), "apgd-ce", norm="linf", eps=0.1)
    assert [period for period, _, _ in seen] == [22, 19, 16, 13, 10, 7, 6, 6]
    assert seen[0][1] == pytest.approx(0.2)
    # A linear model is at its optimum after a step or two: the loss no longer rises, so that the step is halved.
    assert seen[0][2]


def test_momentum_mixes_the_last_two_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """x + eta g, then 0.75 of the next move and 0.25 of the last one, worked out by hand."""
    monkeypatch.setattr(apgd, "random_start", lambda task: task.x.clone())
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))
        model.bias.copy_(torch.tensor([9.0, 0.0]))
    x, y = torch.full((1, 1), 0.1), torch.tensor([0])
    points: list[float] = []
    climb = Climb(Standing(Task(Victim(model), x, y, NORMS["l2"], 0.5)), lambda logits: -((logits[:, 1] - 0.4) ** 2), 2)
    original = Climb._evaluate

    def record(self: Climb) -> None:
        points.append(self.z.item())
        original(self)

    monkeypatch.setattr(Climb, "_evaluate", record)
    climb.run()
    # From 0.1 a step of 1 is cut to 0.6. There the gradient points back: the next one is cut to 0, at the box, and
    # 0.6 + 0.75 (0 - 0.6) + 0.25 (0.6 - 0.1) = 0.275.
    assert points == pytest.approx([0.1, 0.6, 0.275])


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab"])
def test_samples_of_a_batch_do_not_meet(
    digits: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, name: str, norm: str
) -> None:
    """torchattacks' own l2 APGDT moves all samples by the first one's step size."""
    monkeypatch.setattr(apgd, "random_start", lambda task: task.x.clone())
    model, x, y = digits
    eps = {"l2": 0.2, "linf": 0.03}[norm]
    options = {"targets": 1} if name in ("apgd-t", "fab") else {}
    results = []
    for first in (0, 5, 9):
        rows = torch.tensor([first, 7])
        results.append(
            attack(model, x[rows], y[rows], name, norm=norm, eps=eps, steps=30, refine=False, **options).x_adv[1]
        )
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(results[2], results[0], atol=1e-4, rtol=0)


def test_fallen_samples_cost_nothing_more(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    for name in ("apgd-ce", "apgd-t", "square"):
        options = {"queries": 200} if name == "square" else {"steps": 40}
        weak, strong = (attack(model, x, y, name, norm="linf", eps=eps, refine=False, **options) for eps in (1e-3, 0.5))
        assert strong.accuracy == 0
        assert strong.forwards < weak.forwards / 5


def test_fab_restarts_never_lose_a_point(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    once, again = (attack(model, x, y, "fab", targets=None, steps=10, restarts=count) for count in (1, 3))
    assert (again.distance <= once.distance * (1 + 1e-9)).all()
    assert again.distance.sum() < once.distance.sum()


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((3, 8, 8), (3, 8, 8)),
        ((1, 12, 12), (1, 12, 12)),
        ((2, 3, 9), (2, 3, 9)),
        ((784,), (1, 28, 28)),
        ((65,), (1, 9, 9)),
        ((2,), (1, 2, 2)),
        ((2, 3), (1, 3, 3)),
        ((2, 2, 2, 2), (1, 4, 4)),
    ],
)
def test_images_there_and_back(shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    images, x = Images(shape), torch.rand(3, *shape)
    assert images.of(x).shape == (3, *image)
    assert torch.equal(images.samples(images.of(x)), x)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (1, 4, 4), (2, 5, 5), (1, 12, 12), (2, 24, 24), (1, 3, 17), (23,)], ids=str
)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_runs_on_any_size(shape: tuple[int, ...], norm: str) -> None:
    x = torch.rand(2, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    result = attack(model, x, model(x).argmax(1), "square", norm=norm, eps=1e-3, queries=40)
    assert torch.isfinite(result.x_adv).all()
    assert result.forwards >= 2 * 41


def test_pyramids_are_the_papers() -> None:
    """A 5 x 5 pair: sum_k 1 / k^2 on rectangles that grow from the middle, the halves of opposite signs, l2 size 1."""
    torch.manual_seed(0)
    pair = _pyramid_pair(5, torch.zeros(1))
    pair = pair if pair[0].sum() * pair[:, 0].sum() == 0 or pair[0].min() >= 0 else pair.T
    assert pair.norm().item() == pytest.approx(1.0)
    upper = torch.tensor([[1 / 9, 1 / 4, 1 / 4, 1 / 4, 1 / 9], [1 / 9, 1 / 4, 1.0, 1 / 4, 1 / 9]])
    upper = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]]) + torch.tensor([[0, 1, 1, 1, 0]] * 2) / 4 + 1 / 9
    assert torch.allclose(pair[:2] / pair[:2].norm(), upper / upper.norm(), atol=1e-6)
    assert (pair[2:] < 0).all()


def test_options_are_checked() -> None:
    cases = [
        (AutoAttack, "targets"),
        (AutoAttack, "queries"),
        (PGD, "restarts"),
        (APGDT, "targets"),
        (Square, "queries"),
    ]
    for kind, option in cases:
        with pytest.raises(ValueError, match=f"{option} must be an integer >= 1, got 0"):
            kind(**{option: 0})
    assert make_attack("fab", targets=None) == FAB(targets=None)

"""The ensemble runs what is due and nothing else, keeps the nearest points, and exposes wrong certificates."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks import Attack, make_attack
from speccert.attacks.ensemble import EnsembleResult, run_ensemble
from speccert.attacks.task import Task
from speccert.certify import certified_accuracy

INF = float("inf")
DUAL = {"l2": 2.0, "linf": 1.0, "l1": INF}
FMN = make_attack("fmn", steps=60)


def linear(count: int = 24, classes: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model and samples in the middle of the box, at least 0.005 from every boundary, with its own labels."""
    model = nn.Linear(8, classes).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, 8, generator=draw))
        model.bias.copy_(-model.weight @ torch.full((8,), 0.5, dtype=torch.float64))
    x = 0.5 + 0.1 * (2 * torch.rand(20 * count, 8, generator=draw).double() - 1)
    y = model(x).argmax(1)
    far = (distances(model, x, y, "linf") > 0.005).nonzero().squeeze(1)[:count]
    return model, x[far], y[far]


def distances(model: Any, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """min_j (f_y - f_j) / ||w_y - w_j||_q in float64: the distance to the boundary, where the box does not matter."""
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    logits = x.double() @ weight.T + bias
    slopes = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=DUAL[norm], dim=2)
    gaps = logits.gather(1, y[:, None]) - logits
    return (gaps / slopes).scatter(1, y[:, None], INF).amin(1)


class Seen:
    """What the spies were run on: (name, eps, sample indices, certified radii)."""

    calls: ClassVar[list[tuple[str, float, list[int], list[float]]]] = []

    @classmethod
    def by(cls, name: str) -> list[tuple[float, list[int]]]:
        return [(eps, rows) for seen, eps, rows, _ in cls.calls if seen == name]


@dataclass(frozen=True, kw_only=True)
class Spy(Attack):
    """Moves the first entry by `reach`; the samples carry their index in the last entry."""

    name = "spy"
    norms = ("l2", "linf", "l1")

    label: str = "spy"
    reach: float = 0.0
    price: float = 1.0
    hard: bool = False
    refine: bool = False

    def _run(self, task: Task) -> Tensor:
        index = (task.x[:, -1] * 1000).round().long().tolist()
        Seen.calls.append((self.label, task.eps, index, task.certified.tolist()))
        z = task.x.clone()
        z[:, 0] += self.reach
        return z

    def cost(self, classes: int) -> float:
        return self.price

    def hardened(self) -> Attack:
        return Spy(label=self.label, reach=self.reach, price=self.price, hard=True)


class Freest(Spy):
    """The same without a ball."""

    name = "freest"
    minimum_norm = True


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    Seen.calls.clear()
    yield
    Seen.calls.clear()


class Threshold(nn.Module):
    """Class 1 from 0.5 in the first entry on: a sample with first entry 0.5 - d lies at distance d."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.full_like(x[:, 0], 0.5), x[:, 0]], 1)


def row(first: list[float]) -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.zeros(len(first), 3)
    x[:, 0] = torch.tensor(first)
    x[:, 2] = torch.arange(len(first)) / 1000
    return Threshold(), x, torch.zeros(len(first), dtype=torch.int64)


def check(result: EnsembleResult, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Every finite distance is that of an adversarial point in the box."""
    found = result.distance.isfinite()
    order = {"l2": 2.0, "linf": INF, "l1": 1.0}[result.norm]
    measured = torch.linalg.vector_norm((result.closest.double() - x.double()).flatten(1), ord=order, dim=1)
    torch.testing.assert_close(measured[found], result.distance[found], rtol=1e-12, atol=0)
    assert torch.equal(result.closest[~found], x[~found])
    with torch.no_grad():
        logits = model(result.closest)
    own = logits.gather(1, y[:, None])
    assert ((logits >= own - 1e-6).sum(1)[found] > 1).all()  # evaluated in a batch of another size
    assert result.closest.min() >= 0
    assert result.closest.max() <= 1


@pytest.mark.parametrize("schedule", ["cascade", "each"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_distances_of_a_linear_model(norm: str, schedule: str) -> None:
    model, x, y = linear()
    exact = distances(model, x, y, norm)
    eps = [exact.quantile(q).item() for q in (0.3, 0.6)]
    result = run_ensemble(model, x, y, ["fgsm", FMN], norm=norm, eps=eps, certified=0.9 * exact, schedule=schedule)
    assert (result.distance >= exact * (1 - 1e-5)).all()
    assert (result.distance <= exact * 1.02).all()
    check(result, model, x, y)


@pytest.mark.parametrize("attacks", [["fmn"], ["fgsm", "fmn"], ["pgd", "deepfool"]])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_wrong_certificates_are_exposed_without_an_audit(norm: str, attacks: list[str]) -> None:
    model, x, y = linear()
    exact = distances(model, x, y, norm)
    wrong = 1.1 * exact
    result = run_ensemble(model, x, y, attacks, norm=norm, eps=[exact.median().item()], certified=wrong)
    assert (result.distance < wrong).all()
    assert (result.distance >= exact * (1 - 1e-5)).all()


@pytest.mark.parametrize(
    ("norm", "attacks", "schedule"),
    [("l2", ["fgsm"], "cascade"), ("linf", ["fgsm"], "each"), ("l1", ["fmn"], "cascade"), ("l2", ["pgd"], "each")],
)
def test_wrong_certificates_are_exposed_by_an_audit(norm: str, attacks: list[str], schedule: str) -> None:
    model, x, y = linear(4)
    exact = distances(model, x, y, norm)
    result = run_ensemble(
        model, x, y, attacks, norm=norm, eps=[exact.max().item()], certified=1.1 * exact, audit=True, schedule=schedule
    )
    assert (result.distance < 1.1 * exact).all()


def test_audit_of_right_certificates_finds_nothing_inside() -> None:
    model, x, y = linear(6)
    exact = distances(model, x, y, "l2")
    result = run_ensemble(model, x, y, ["fgsm"], eps=[exact.median().item()], certified=0.999 * exact, audit=True)
    assert (result.distance >= 0.999 * exact).all()


def test_cascade_runs_what_is_due_by_rising_cost() -> None:
    # sample:        0    1    2     3     4 (misclassified)  5 (certified to 0.25)
    model, x, y = row([0.1, 0.3, 0.45, 0.35, 0.6, 0.2])
    certified = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.25], dtype=torch.float64)
    weak, strong = Spy(label="weak", reach=0.1, price=1), Spy(label="strong", reach=0.3, price=50)
    free = Freest(label="free", reach=0.35, price=9)
    result = run_ensemble(model, x, y, [strong, free, weak], eps=[0.22, 0.1], certified=certified)
    assert Seen.by("weak") == [(0.1, [0, 1, 2, 3]), (0.22, [0, 1, 3])]
    assert [call[0] for call in Seen.calls] == ["weak", "weak", "free", "strong", "strong"]
    assert Seen.by("free") == [(INF, [0, 1, 2, 3, 5])]
    assert list(result.by_attack) == ["spy-2", "freest", "spy"]
    # `free` moves 0.35 and so breaks 1, 2, 3 and 5 at their distance after bisection; only 0 stands.
    torch.testing.assert_close(
        result.distance, torch.tensor([INF, 0.2, 0.05, 0.15, 0.0, 0.3]).double(), rtol=0, atol=1e-6
    )
    assert Seen.by("strong") == [(0.1, [0, 1, 3]), (0.22, [0])]
    assert result.complete
    check(result, model, x, y)


def test_certified_at_exactly_eps_is_not_spared() -> None:
    """Certified accuracy counts radius > eps, and so does the schedule."""
    model, x, y = row([0.1, 0.1, 0.1])
    radii = torch.tensor([0.1, 0.25, 0.3], dtype=torch.float64)
    result = run_ensemble(model, x, y, [Spy()], eps=[0.1, 0.25, 0.4], certified=radii)
    assert Seen.by("spy") == [(0.1, [0]), (0.25, [0, 1]), (0.4, [0, 1, 2])]
    shares = certified_accuracy(radii, [0.1, 0.25, 0.4]) * 3
    assert list(result.certified_skipped.values()) == shares.tolist() == [2, 1, 0]


def test_each_runs_every_attack_on_all_but_what_it_broke_itself() -> None:
    model, x, y = row([0.1, 0.45, 0.42, 0.6])
    first, second = Spy(label="first", reach=0.06, price=9), Spy(label="second", reach=0.09, price=1)
    result = run_ensemble(
        model, x, y, [first, second], eps=[0.06, 0.09], certified=torch.full((4,), 0.08), schedule="each"
    )
    assert Seen.calls[0][0] == "first"
    assert Seen.by("first") == [(0.06, [0, 1, 2]), (0.09, [0, 2])]
    assert Seen.by("second") == [(0.06, [0, 1, 2]), (0.09, [0, 2])]
    assert result.certified_skipped == {0.06: 0, 0.09: 0}
    accuracies = {
        name: [(found > eps).double().mean().item() for eps in result.eps] for name, found in result.by_attack.items()
    }
    assert accuracies == {"spy": [0.5, 0.5], "spy-2": [0.5, 0.25]}
    assert [len(seen[3]) for seen in Seen.calls] == [3, 2, 3, 2]
    assert Seen.calls[0][3] == pytest.approx([0.08] * 3)


def test_audit_trusts_nothing() -> None:
    model, x, y = row([0.1, 0.45, 0.6])
    result = run_ensemble(model, x, y, [Spy(reach=0.1)], eps=[0.1], certified=torch.full((3,), 0.3), audit=True)
    assert Seen.by("spy") == [(0.1, [0, 1])]
    assert Seen.calls[0][3] == [0.0, 0.0]
    assert list(result.by_attack) == ["spy", "rounding-search"]
    assert result.certified_skipped == {0.1: 0}
    assert result.attempted["spy"].tolist() == [True, True, False]
    assert result.distance[1] < 0.3


def test_audit_hardens_and_adds_no_second_rounding_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = row([0.45])
    hard = []
    monkeypatch.setattr(Spy, "_run", lambda self, task: hard.append(self.hard) or task.x)
    result = run_ensemble(model, x, y, [Spy(), make_attack("rounding-search", rounds=2)], eps=[0.1], audit=True)
    assert hard == [True]
    assert list(result.by_attack) == ["spy", "rounding-search"]


def test_running_minimum_in_a_cascade() -> None:
    model, x, y = linear()
    exact = distances(model, x, y, "l2")
    result = run_ensemble(model, x, y, ["pgd", "fgsm", FMN], eps=[exact.median().item()])
    found = list(result.by_attack.values())
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(found))
    assert torch.equal(found[-1], result.distance)


def test_misclassified_samples_are_never_attacked() -> None:
    model, x, y = linear()
    y = y.clone()
    y[::2] = (y[::2] + 1) % 3
    for schedule in ("cascade", "each"):
        result = run_ensemble(model, x, y, ["fgsm", "fmn"], eps=[0.1], schedule=schedule)
        assert (result.distance[::2] == 0).all()
        assert (result.distance[1::2] > 0).all()
        assert torch.equal(result.closest[::2], x[::2])
        for tried in result.attempted.values():
            assert not tried[::2].any()
            assert tried[1::2].any()
        assert max(attempt.attacked for attempt in result.attempts) == 12


def test_attempts_add_up() -> None:
    model, x, y = linear()
    exact = distances(model, x, y, "l2")
    eps = sorted(exact.quantile(q).item() for q in (0.3, 0.7))
    result = run_ensemble(model, x, y, ["fgsm", FMN], eps=eps, batch_size=7)
    fgsm, more, fmn = result.attempts
    assert [(a.attack, a.eps) for a in result.attempts] == [("fgsm", eps[0]), ("fgsm", eps[1]), ("fmn", None)]
    assert (fgsm.attacked, fgsm.standing) == (24, 24 - fgsm.broken)
    assert (more.attacked, more.standing) == (fgsm.standing, fgsm.standing - more.broken)
    assert (fmn.attacked, fmn.broken, fmn.standing) == (24, 24, 0)
    assert fgsm.gradients == 24
    assert all(a.forwards >= a.gradients > 0 and a.seconds > 0 and a.note == "" for a in result.attempts)


class Counting(nn.Module):
    """Counts the inputs that it evaluates, and raises Ctrl-C at the `stop`-th call."""

    def __init__(self, model: nn.Module, stop: int = -1) -> None:
        super().__init__()
        self.model, self.stop, self.inputs, self.calls = model, stop, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.inputs += len(x)
        logits: Tensor = self.model(x)
        return logits


def test_forwards_are_those_of_the_model() -> None:
    model, x, y = linear()
    counting = Counting(model)
    result = run_ensemble(counting, x, y, ["fgsm", "fmn"], eps=[0.1], batch_size=10)
    assert counting.inputs == 24 + sum(attempt.forwards for attempt in result.attempts)


@pytest.mark.parametrize("limit", [1, 10, 70, 150])
def test_gradient_budget(limit: int) -> None:
    model, x, y = linear()
    result = run_ensemble(model, x, y, ["fgsm", "pgd", "fmn"], eps=[1e-3, 2e-3], max_gradients=limit)
    spent = sum(a.forwards + a.gradients for a in result.attempts) / 2
    assert 24 / 2 + spent <= 24 * limit * 1.1 + 2  # the clean pass counts
    assert not result.complete
    assert [a.note for a in result.attempts][-1] == "budget"
    assert len(result.attempts) == 5
    for attempt in result.attempts:
        assert (attempt.note == "budget") or attempt.attacked == 24
    assert result.attempts[-1].attacked == result.attempted["fmn"].sum()


def test_a_budget_that_suffices_changes_nothing() -> None:
    model, x, y = linear()
    free, held = (
        run_ensemble(model, x, y, ["fgsm", "fmn"], eps=[0.1], max_gradients=limit, max_seconds=seconds)
        for limit, seconds in ((None, None), (10**6, 1e6))
    )
    assert held.complete
    assert torch.equal(free.distance, held.distance)


def test_time_budget() -> None:
    model, x, y = linear()
    result = run_ensemble(model, x, y, ["fgsm", "fmn"], eps=[0.1], max_seconds=1e-9)
    assert [(a.attacked, a.note) for a in result.attempts] == [(0, "budget"), (0, "budget")]
    assert not result.complete
    assert result.distance.isinf().all()


def test_equal_seeds_give_equal_results() -> None:
    model, x, y = linear()
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(run_ensemble(model, x, y, ["pgd", "fmn"], eps=[0.05, 0.1], seed=5))
    first, second = results
    assert torch.equal(first.distance, second.distance)
    assert torch.equal(first.closest, second.closest)
    other = run_ensemble(model, x, y, ["pgd"], eps=[0.05, 0.1], seed=6)
    assert not torch.equal(other.by_attack["pgd"], first.by_attack["pgd"])


def test_an_attack_does_not_depend_on_those_before_it() -> None:
    model, x, y = linear()
    alone, after = (
        run_ensemble(model, x, y, attacks, eps=[0.05, 0.1], schedule="each").by_attack["pgd"]
        for attacks in (["pgd"], ["fgsm", "pgd"])
    )
    assert torch.equal(alone, after)


@pytest.mark.parametrize("stop", [1, 4, 9, 40])
def test_interruption_leaves_everything_as_found(stop: int) -> None:
    inner, x, y = linear()
    model = Counting(nn.Sequential(inner, nn.Dropout(0.5)), stop).train()
    model.model[1].eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        run_ensemble(model, x, y, ["fgsm", "fmn"], eps=[0.1])
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert inner.training
    assert not model.model[1].training
    assert inner.weight.requires_grad
    assert inner.weight.grad is None
    assert torch.is_grad_enabled()


def test_report_lines() -> None:
    model, x, y = linear()
    lines: list[str] = []
    run_ensemble(model, x, y, ["fgsm", "fmn"], eps=[0.001], batch_size=12, report=lines.append)
    assert lines[:2] == ["fgsm eps 0.001: 24 of 24 standing, worst case 100.0 %"] * 2
    assert re.fullmatch(r"fmn: points for 24 of 24, worst case 100.0 % at eps 0.001", lines[-1])
    assert len(lines) == 4


def test_samples_on_integer_pixels() -> None:
    model, x, y = linear()
    x = (x * 255).round() / 255
    result = run_ensemble(model, x, y, ["fgsm", "fmn"], eps=[0.1], integer_pixels=True)
    levels = result.closest.double() * 255
    assert ((levels - levels.round()).abs() < 1e-4).all()
    check(result, model, x, y)


class Detached(nn.Module):
    """A classifier that autograd can't see into."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.detach().mean(1), 1 - x.detach().mean(1)], 1)


class Undefined(nn.Module):
    """The same with a gradient of NaN in the first entry: 0 times the infinite slope of the root at 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1) + (0 * x[:, 0]).sqrt()
        return torch.stack([mean, 1 - mean], 1)


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (Detached(), "model: autograd gives no input gradients; taken for 0, so only square and spsa can judge it"),
        (Undefined(), "model: some input gradients are NaN or inf; these entries were taken for 0"),
    ],
)
@pytest.mark.parametrize("schedule", ["cascade", "each"])
def test_models_without_gradients_are_attacked_all_the_same(model: nn.Module, note: str, schedule: str) -> None:
    x, y = torch.full((3, 16), 0.55), torch.zeros(3, dtype=torch.int64)
    attacks = ["fgsm", "pgd", "fmn", "deepfool", make_attack("square", queries=50), make_attack("apgd-t", steps=3)]
    result = run_ensemble(model, x, y, attacks, norm="linf", eps=[0.1], schedule=schedule)
    assert note in result.notes
    assert (result.by_attack["square"] <= 0.1).all()
    result = run_ensemble(nn.Linear(16, 2).requires_grad_(False), x, y, ["fgsm"], norm="linf", eps=[0.1])
    assert result.notes == ()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attacks": []}, r"attacks must be a list of one or more names or attacks, got \[\]"),
    ({"attacks": "pgd"}, "attacks must be a list of one or more names or attacks, got 'pgd'"),
    ({"attacks": [3]}, "attacks must hold names or attacks, got int"),
    ({"attacks": ["bim"]}, "attack must be one of fgsm, .* got 'bim'"),
    ({"attacks": ["fmn", "pgd"], "eps": []}, "eps must hold one or more numbers >= 0 for the attacks pgd, got none"),
    ({"eps": [0.1, -1]}, "eps must be a finite number >= 0"),
    ({"eps": 0.1}, "eps must be a list of finite numbers >= 0, got 0.1"),
    ({"eps": [0.1, None]}, r"eps must be a list of finite numbers >= 0, got \[0.1, None\]"),
    ({"y": torch.full((24,), 3)}, r"y must lie in \[0, 2\], got values from 3 to 3"),
    ({"schedule": "tree"}, "schedule must be one of cascade, each, got 'tree'"),
    ({"norm": "l3"}, "norm must be one of .* got 'l3'"),
    ({"attacks": ["pgd", "ddn"], "norm": "linf"}, "norm must be one of l2, got 'linf'"),
    ({"max_gradients": 0}, "max_gradients must be an integer >= 1, got 0"),
    ({"max_seconds": 0}, r"max_seconds must be a number in \(0, inf\), got 0"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ({"seed": -1}, "seed must be an integer"),
    ({"certified": torch.zeros(3)}, r"certified must be a tensor of radii of shape \(24,\), got shape \(3,\)"),
    ({"certified": torch.full((24,), -1.0)}, "certified must hold radii >= 0, got -1"),
    ({"certified": torch.full((24,), float("nan"))}, "certified must hold radii >= 0, got nan"),
    ({"certified": [0.0] * 24}, r"certified must be a tensor of radii of shape \(24,\), got list"),
    ({"integer_pixels": True}, "integer_pixels needs x on the grid k / 255"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_calls_raise_one_line(change: dict[str, Any], message: str) -> None:
    model, x, y = linear()
    call: dict[str, Any] = {"model": model, "x": x, "y": y, "attacks": ["pgd"], "eps": [0.1]} | change
    with pytest.raises(ValueError, match=message) as caught:
        run_ensemble(**call)
    assert "\n" not in str(caught.value)


def test_minimum_norm_attacks_need_no_eps() -> None:
    model, x, y = linear()
    result = run_ensemble(model, x, y, ["fmn"], eps=[])
    assert result.eps == ()
    assert result.distance.isfinite().all()

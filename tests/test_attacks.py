"""Every attack in every norm keeps the contract of `attack()`; new attacks are tested by joining the registry."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speccert.attacks import Attack, attack, available_attacks, is_minimum_norm, make_attack

QUICK: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 5, "restarts": 2},
    "apgd-ce": {"steps": 5, "restarts": 2},
    "apgd-dlr": {"steps": 5},
    "apgd-t": {"steps": 5, "targets": 2},
    "fab": {"steps": 5, "restarts": 2},
    "square": {"queries": 8, "restarts": 2},
    "autoattack": {"steps": 3, "queries": 8},
    "eot-pgd": {"steps": 5, "averages": 2},
    "spsa": {"steps": 2, "directions": 20},
    "cw": {"steps": 20, "searches": 2},
    "ddn": {"steps": 20},
    "fmn": {"steps": 20},
}
CASES = [(name, norm) for norm in ("l2", "linf", "l1") for name in available_attacks(norm)]
EPS = {"l2": 0.2, "linf": 0.05, "l1": 0.5}
ORDERS = {"l2": 2.0, "linf": float("inf"), "l1": 1.0}


class Net(nn.Module):
    def __init__(self, shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        size = torch.Size(shape).numel()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, classes)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def samples(shape: tuple[int, ...], count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def problem(shape: tuple[int, ...] = (12,), classes: int = 4, count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """Samples with the model's own labels, but for the last one, which is misclassified."""
    model, x = Net(shape, classes), samples(shape, count)
    y = model(x).argmax(1)
    y[-1] = (y[-1] + 1) % classes
    return model, x, y


def size(delta: Tensor, norm: str) -> Tensor:
    flat: Tensor = delta.double().flatten(1)
    return torch.linalg.vector_norm(flat, ord=ORDERS[norm], dim=1)


def adversarial(logits: Tensor, y: Tensor) -> Tensor:
    rows = torch.arange(len(y))
    return torch.stack([(row >= row[label]).sum() > 1 for row, label in zip(logits[rows], y, strict=True)])


@pytest.mark.parametrize("shape", [(12,), (1, 6, 6), (3, 4, 5), (2, 7)], ids=str)
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_result_keeps_its_contract(name: str, norm: str, shape: tuple[int, ...]) -> None:
    model, x, y = problem(shape)
    eps = EPS[norm]
    result = attack(model, x, y, name, norm=norm, eps=eps, **QUICK.get(name, {}))
    assert result.x_adv.shape == result.closest.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert not result.x_adv.requires_grad
    for point in (result.x_adv, result.closest):
        assert point.min() >= 0
        assert point.max() <= 1
    assert (size(result.x_adv.double() - x.double(), norm) <= eps).all()
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(result.x_adv))
    assert torch.equal(result.success, adversarial(result.logits, y))
    assert (result.distance[result.success] <= eps).all()
    found = result.distance.isfinite()
    measured = size(result.closest.double() - x.double(), norm)
    torch.testing.assert_close(measured[found], result.distance[found], rtol=1e-12, atol=0)
    assert result.success[-1]
    assert result.distance[-1] == 0
    assert torch.equal(result.x_adv[-1], x[-1])
    assert result.accuracy == pytest.approx(1 - result.success.double().mean().item())
    assert repr(make_attack(name, **QUICK.get(name, {}))) == result.attack
    assert (result.gradients > 0) == (name not in ("square", "spsa"))
    assert result.forwards > 0


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_eps_zero_returns_the_input(name: str, norm: str) -> None:
    model, x, y = problem()
    result = attack(model, x, y, name, norm=norm, eps=0)
    assert torch.equal(result.x_adv, x)
    assert result.accuracy == pytest.approx(5 / 6)
    assert result.success.tolist() == [False] * 5 + [True]
    assert result.distance.tolist() == [float("inf")] * 5 + [0.0]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_seed_alone_decides(name: str, norm: str) -> None:
    model, x, y = problem()
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(attack(model, x, y, name, norm=norm, eps=EPS[norm], seed=7, **QUICK.get(name, {})))
    assert torch.equal(results[0].x_adv, results[1].x_adv)
    assert torch.equal(results[0].distance, results[1].distance)


def test_other_seed_gives_another_start() -> None:
    model, x, y = problem()
    first, second = (attack(model, x, y, "pgd", eps=1e-3, seed=seed, steps=1).x_adv for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_batches(name: str, norm: str, batch_size: int) -> None:
    model, x, y = problem()
    result = attack(model, x, y, name, norm=norm, eps=EPS[norm], batch_size=batch_size, **QUICK.get(name, {}))
    assert result.x_adv.shape == x.shape
    assert (size(result.x_adv.double() - x.double(), norm) <= EPS[norm]).all()
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(result.x_adv))


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_float64_model(name: str, norm: str) -> None:
    model, x = Net((12,), 4, torch.float64), samples((12,), dtype=torch.float64)
    y = model(x).argmax(1)
    result = attack(model, x, y, name, norm=norm, eps=EPS[norm], **QUICK.get(name, {}))
    assert result.x_adv.dtype == torch.float64
    assert (size(result.x_adv - x, norm) <= EPS[norm]).all()


@given(eps=st.floats(1e-12, 3.0), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_never_leaves_the_ball(norm: str, eps: float, seed: int) -> None:
    model, x, y = problem()
    for name in ("fgsm", "pgd"):
        result = attack(model, x, y, name, norm=norm, eps=eps, seed=seed, **({"steps": 3} if name == "pgd" else {}))
        assert (size(result.x_adv.double() - x.double(), norm) <= eps).all()


def test_minimum_norm_attack_without_eps_returns_the_nearest_point() -> None:
    model, x, y = problem()
    free = attack(model, x, y, "ddn")
    held = attack(model, x, y, "ddn", eps=free.distance[:-1].median().item())
    assert torch.equal(free.x_adv, free.closest)
    assert torch.equal(free.distance, held.distance)
    assert torch.equal(held.success, held.distance <= held.eps)
    assert torch.equal(held.x_adv[~held.success], x[~held.success])


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if is_minimum_norm(case[0])])
def test_wrong_certified_radii_hide_nothing(name: str, norm: str) -> None:
    model, x, y = problem()
    chosen = make_attack(name, **QUICK.get(name, {}))
    free = chosen(model, x, y, norm=norm)
    claimed = torch.where(free.distance.isfinite(), 1.1 * free.distance, 0.0)
    result = chosen(model, x, y, norm=norm, certified=claimed)
    assert (free.distance[:-1].isfinite()).any()
    assert (result.distance < claimed)[:-1][claimed[:-1] > 0].all()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_right_certified_radii_change_no_success(name: str) -> None:
    model, x, y = problem()
    nearest = attack(model, x, y, "fmn").distance
    free, held = (make_attack(name)(model, x, y, eps=0.3, certified=radii) for radii in (None, 0.9 * nearest))
    assert torch.equal(free.x_adv, held.x_adv)
    torch.testing.assert_close(free.distance, held.distance, rtol=1e-2, atol=1e-6)


def test_refine_changes_distances_only() -> None:
    model, x, y = problem()
    refined, plain = (attack(model, x, y, "pgd", eps=2.0, steps=5, refine=refine) for refine in (True, False))
    assert torch.equal(refined.x_adv, plain.x_adv)
    assert (refined.distance <= plain.distance).all()
    assert refined.distance.sum() < plain.distance.sum()
    assert torch.equal(plain.closest[plain.success], plain.x_adv[plain.success])


def test_tie_is_a_success_at_distance_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    result = attack(model, torch.full((1, 2), 0.5), torch.tensor([0]), "fgsm", eps=0.1)
    assert result.success.all()
    assert result.distance.item() == 0


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_constant_model_withstands(name: str, norm: str) -> None:
    """No gradient anywhere: nothing is found, and no division by zero does harm."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    x, y = samples((12,)), torch.zeros(6, dtype=torch.int64)
    result = attack(model, x, y, name, norm=norm, eps=EPS[norm], **QUICK.get(name, {}))
    assert not result.success.any()
    assert result.distance.isinf().all()
    assert torch.isfinite(result.x_adv).all()


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.sum(1), x.sum(1) / 0 * 0], 1)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (8 * x[:, :2]).long()


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2].detach() + torch.tensor([1.0, 0.0])


X, Y = torch.full((2, 3), 0.5), torch.zeros(2, dtype=torch.int64)
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"x": X + 1}, r"x must lie in \[0, 1\], got values from 1.5 to 1.5"),
    ({"x": X * float("nan")}, r"x must lie in \[0, 1\], got values from nan to nan"),
    ({"x": X.half()}, "x must be a non-empty float32 or float64 tensor"),
    ({"x": X[:0], "y": Y[:0]}, "x must be a non-empty"),
    ({"y": Y.float()}, r"y must be an integer tensor of shape \(2,\)"),
    ({"y": Y[:1]}, r"y must be an integer tensor of shape \(2,\)"),
    ({"y": Y + 2}, r"y must lie in \[0, 1\], got values from 2 to 2"),
    ({"eps": -0.1}, "eps must be a finite number >= 0 .* got -0.1"),
    ({"eps": float("nan")}, "eps must be a finite number >= 0"),
    ({"eps": None}, "eps must be given for the attack 'pgd'"),
    ({"norm": "l3"}, "norm must be one of l2, linf, l1, got 'l3'"),
    ({"name": "ddn", "norm": "linf"}, "norm must be one of l2, got 'linf'"),
    (
        {"name": "bim"},
        "attack must be one of fgsm, pgd, .*, fmn, rounding-search, got 'bim'",
    ),
    ({"step": 3}, "options of 'pgd' are refine, steps, restarts, alpha, random_start, loss, momentum, got step"),
    ({"loss": "hinge"}, "loss must be one of ce, margin, dlr, logit-difference, cycle, got 'hinge'"),
    ({"momentum": 1.0}, r"momentum must be a number in \(0, 1\), got 1.0"),
    ({"name": "autoattack", "version": "rand"}, "version must be one of standard, plus, got 'rand'"),
    ({"name": "fab", "targets": 0}, "targets must be an integer >= 1, got 0"),
    ({"steps": 0}, "steps must be an integer >= 1, got 0"),
    ({"alpha": -1.0}, r"alpha must be a number in \(0, inf\), got -1.0"),
    ({"name": "ddn", "gamma": 1.5}, r"gamma must be a number in \(0, 1\), got 1.5"),
    ({"seed": -1}, r"seed must be an integer in \[0, 4294967295\], got -1"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ({"model": Broken()}, "model must return finite logits, got NaN or inf for 2 of 2"),
    ({"model": nn.Linear(3, 1)}, r"model must return logits of shape \(2, K\) with K >= 2, got \(2, 1\)"),
    ({"model": Counts()}, "model must return floating-point logits, got torch.int64"),
    ({"model": Detached()}, "model must return logits that autograd can trace to x; square and spsa need no gradient"),
    ({"model": lambda x: x}, "model must be a torch.nn.Module, got function"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_bad_calls_raise_one_line(change: dict[str, Any], message: str) -> None:
    call = {"model": nn.Linear(3, 2), "x": X, "y": Y, "name": "pgd", "eps": 0.1} | change
    with pytest.raises(ValueError, match=message) as caught:
        attack(**call)
    assert "\n" not in str(caught.value)


def test_names_and_kinds() -> None:
    fixed = ("fgsm", "pgd", "apgd-ce", "apgd-dlr", "apgd-t", "square", "autoattack")
    nearest = ("deepfool", "cw", "ddn", "fmn", "rounding-search")
    assert available_attacks("l2") == (*fixed[:5], "fab", *fixed[5:], *nearest)
    assert available_attacks("linf", minimum_norm=False) == (*fixed, "eot-pgd", "spsa")
    assert available_attacks("l1", minimum_norm=False) == ("fgsm", "pgd")
    assert available_attacks("l1", minimum_norm=True) == ("fab", "deepfool", "fmn", "rounding-search")
    assert is_minimum_norm("fmn")
    assert not is_minimum_norm("pgd")
    with pytest.raises(ValueError, match="norm must be one of l2, linf, l1, got 'l0'"):
        available_attacks("l0")
    assert issubclass(type(make_attack("cw")), Attack)


def test_import_is_light_and_independent() -> None:
    code = (
        "import sys, speccert.attacks\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torchattacks', 'matplotlib', 'sklearn')"
        " or m.startswith(('speccert.certify', 'speccert.models', 'speccert.experiments'))]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if not is_minimum_norm(case[0])])
def test_a_ball_larger_than_the_box_is_the_box(name: str, norm: str) -> None:
    model = nn.Linear(9, 3).requires_grad_(False)
    x = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    widest = {"l2": 3.0, "linf": 1.0, "l1": 9.0}[norm]
    huge, box = (
        attack(model, x, model(x).argmax(1), name, norm=norm, eps=eps, **QUICK.get(name, {})) for eps in (1e30, widest)
    )
    assert torch.equal(huge.x_adv, box.x_adv)
    assert (huge.eps, box.eps) == (1e30, widest)

"""Integer pixels: the grid, the box and the ball hold exactly, and exhaustive search finds little more."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speccert.attacks import available_attacks, make_attack
from speccert.attacks.pixels import levels, valid_grid

ORDERS = {"l2": 2.0, "linf": float("inf"), "l1": 1.0}
QUICK: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 5},
    "apgd-ce": {"steps": 5},
    "apgd-dlr": {"steps": 5},
    "apgd-t": {"steps": 5, "targets": 2},
    "fab": {"steps": 5},
    "square": {"queries": 8},
    "autoattack": {"steps": 3, "queries": 8},
    "cw": {"steps": 20, "searches": 2},
    "ddn": {"steps": 20},
    "fmn": {"steps": 20},
    "rounding-search": {"descents": 5, "rounds": 5},
}
CASES = [(name, norm) for norm in ORDERS for name in available_attacks(norm)]
EPS = {"l2": 0.3, "linf": 0.05, "l1": 1.0}


def size(delta: Tensor, norm: str) -> Tensor:
    flat: Tensor = delta.double().flatten(1)
    return torch.linalg.vector_norm(flat, ord=ORDERS[norm], dim=1)


def problem(seed: int, shape: tuple[int, ...], dtype: torch.dtype, count: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    entries = torch.Size(shape).numel()
    hidden, out = nn.Linear(entries, 12), nn.Linear(12, 3)
    with torch.no_grad():
        for weight in (hidden.weight, hidden.bias, out.weight, out.bias):
            weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[-1] ** 0.5)
    model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out).to(dtype)
    x = levels(torch.zeros((), dtype=dtype))[torch.randint(0, 256, (count, *shape), generator=draw)]
    return model, x, model(x).argmax(1)


def on_grid(z: Tensor) -> bool:
    return torch.equal(z, levels(z)[(z.double() * 255).round().long()])


@given(
    seed=st.integers(0, 10**6),
    eps=st.one_of(st.floats(1e-4, 2.0), st.integers(0, 64).map(lambda level: level / 255)),
    shape=st.sampled_from([(5,), (2, 3, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    case=st.sampled_from([case for case in CASES if case[0] in ("fgsm", "pgd", "fmn", "deepfool")]),
)
@settings(max_examples=25, deadline=None)
def test_grid_box_and_ball_hold(
    seed: int, eps: float, shape: tuple[int, ...], dtype: torch.dtype, case: tuple[str, str]
) -> None:
    name, norm = case
    model, x, y = problem(seed, shape, dtype)
    result = make_attack(name, **QUICK.get(name, {}))(model, x, y, norm=norm, eps=eps, integer_pixels=True)
    for z in (result.x_adv, result.closest):
        assert on_grid(z)
        assert z.dtype == dtype
        assert z.min() >= 0
        assert z.max() <= 1
    assert (size(result.x_adv.double() - x.double(), norm) <= eps).all()
    with torch.no_grad():
        torch.testing.assert_close(model(result.x_adv), result.logits)
        closest = model(result.closest)
    margins = [
        (logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None]).squeeze(1))
        for logits in (result.logits, closest)
    ]
    assert torch.equal(result.success, margins[0] >= 0)
    found = result.distance.isfinite()
    assert (margins[1][found] >= -1e-6).all()  # evaluated in a batch of another size
    torch.testing.assert_close(size(result.closest.double() - x.double(), norm)[found], result.distance[found])
    assert (result.distance[result.success] <= eps).all()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_attack(name: str, norm: str) -> None:
    model, x, y = problem(3, (3, 4, 4), torch.float32)
    attack = make_attack(name, **QUICK.get(name, {}))
    whole = attack(model, x, y, norm=norm, eps=EPS[norm], integer_pixels=True)
    assert on_grid(whole.x_adv)
    assert on_grid(whole.closest)
    assert (size(whole.x_adv.double() - x.double(), norm) <= EPS[norm]).all()


@functools.cache
def moves_within(reach: int, entries: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(-reach, reach + 1), repeat=entries)), dtype=torch.float64)


def exhaustive(weight: Tensor, x: Tensor, gap: float, norm: str, reach: int) -> float:
    """The smallest size of an integer move d / 255 with <weight, d / 255> >= gap inside the box, by trying all."""
    own = (x.double() * 255).round()
    moves = moves_within(reach, len(x))
    inside = ((own + moves >= 0) & (own + moves <= 255)).all(1)
    good = moves[inside & ((moves / 255) @ weight >= gap)] / 255
    if len(good) == 0:
        return float("inf")
    return torch.linalg.vector_norm(good, ord=ORDERS[norm], dim=1).min().item()


def linear(seed: int, entries: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A float64 model f_1 - f_0 = <w, x> - b, 12 samples up to 13 levels from the boundary, w, and b - <w, x> > 0."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(entries, generator=draw, dtype=torch.float64)
    x = levels(weight)[torch.randint(0, 256, (4000, entries), generator=draw)]
    gaps = (x @ weight).median() - x @ weight
    near = ((gaps > 0) & (gaps < 13 / 255 * weight.norm())).nonzero().squeeze(1)[:12]
    model = nn.Linear(entries, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        model.bias.copy_(torch.stack([torch.zeros(()).double(), -(x @ weight).median()]))
    return model, x[near], weight, gaps[near]


@pytest.mark.parametrize("name", ["fmn", "pgd"])
@pytest.mark.parametrize("entries", [2, 3])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_against_exhaustive_search(norm: str, entries: int, name: str) -> None:
    found, exact = [], []
    for seed in range(3):
        model, x, weight, gaps = linear(seed, entries)
        attack, eps = make_attack(name, **QUICK[name]), 18 / 255 if name == "pgd" else None
        labels = torch.zeros(len(x), dtype=torch.int64)
        found.append(attack(model, x, labels, norm=norm, eps=eps, integer_pixels=True).distance)
        exact += [exhaustive(weight, point, gap.item(), norm, 18) for point, gap in zip(x, gaps, strict=True)]
    a, b = torch.cat(found), torch.tensor(exact, dtype=torch.float64)
    comparable = b <= 17 / 255
    assert comparable.sum() > 20
    a, b = a[comparable], b[comparable]
    assert (a >= b - 1e-9).all()
    assert (a <= b + 1e-9).double().mean() >= 0.4
    assert (a <= 1.1 * b + 1e-9).double().mean() >= 0.9
    assert (a <= b + 2.01 / 255).double().mean() >= 0.95


def test_a_point_that_only_a_guided_choice_finds() -> None:
    """One level on the steep entry wins, while both ways of plain rounding lose."""
    model = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.9]]))
        model.bias.copy_(torch.tensor([0.0, -1.9 * 100 / 255 - 0.95 / 255]))
    x = torch.full((1, 2), 100.0, dtype=torch.float64) / 255
    result = make_attack("deepfool")(model, x, torch.tensor([0]), norm="l2", integer_pixels=True)
    assert (result.closest * 255).round().tolist() == [[101.0, 100.0]]


def test_levels_are_the_nearest_floats() -> None:
    image = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(levels(torch.zeros(())), image.float() / 255)
    assert torch.equal(levels(torch.zeros((), dtype=torch.float64)), image.double() / 255)


@pytest.mark.parametrize("value", [0.5, 1e-9, 1 - 1e-7, 100 / 255 + 1e-6])
def test_samples_off_the_grid_are_refused(value: float) -> None:
    x = torch.zeros(2, 3)
    x[1, 2] = value
    with pytest.raises(
        ValueError, match=r"integer_pixels needs x on the grid k / 255, got .*\(1 of 6 entries are off it\)"
    ) as caught:
        make_attack("fgsm")(nn.Linear(3, 2), x, torch.tensor([0, 1]), eps=0.1, integer_pixels=True)
    assert "\n" not in str(caught.value)
    valid_grid(x[:1])


def test_refinement_comes_nearer() -> None:
    model, x, y = problem(5, (1, 6, 6), torch.float32, count=20)
    plain, refined = (
        make_attack("pgd", refine=refine)(model, x, y, eps=2.0, integer_pixels=True) for refine in (False, True)
    )
    assert refined.success.sum() > 10
    assert (refined.distance <= plain.distance).all()
    assert refined.distance[refined.success].sum() < 0.8 * plain.distance[refined.success].sum()

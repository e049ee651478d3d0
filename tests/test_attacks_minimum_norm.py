"""Minimum-norm attacks against exact distances: affine models with the box active, nets in the plane, hard cases."""

import math

import numpy as np
import pytest
import torch
from oracles import random, seeded
from torch import nn

from speccert.attacks import attack, available_attacks, make_attack

NORMS = ("l2", "linf", "l1")
ORDERS = {"l2": 2.0, "linf": math.inf, "l1": 1.0}
NAMES = ("deepfool", "cw", "ddn", "fmn", "rounding-search")
CASES = [(name, norm) for norm in NORMS for name in NAMES if name in available_attacks(norm)]
DESCENTS = [(name, norm) for name, norm in CASES if name in ("ddn", "fmn")]
NEAR = {"ddn": 1.001, "fmn": 1.001, "rounding-search": 1.001, "cw": 1.001}  # DeepFool's steps forget x at the box


def affine(features, classes, seed=0):
    model = nn.Linear(features, classes).double().requires_grad_(False)
    model.weight.copy_(random(classes, features, seed=seed))
    model.bias.copy_(random(classes, seed=seed + 1) - model.weight.sum(1) / 2)
    return model


def nearest(weight, gap, x, norm):
    """The least ||d|| with <weight, d> >= gap and x + d in the box; inf where there is none."""
    steep, room = np.abs(weight), np.where(weight > 0, 1 - x, x)
    if steep @ room < gap:
        return math.inf
    if norm == "l1":  # the steepest entries first, each to the side of the box
        order = np.argsort(-steep)
        gains = np.concatenate([[0.0], np.cumsum((steep * room)[order])])
        last = int(np.searchsorted(gains, gap)) - 1
        return float(room[order][:last].sum() + (gap - gains[last]) / steep[order][last])
    # d_i = min(t |w_i|, room_i) in l2 and min(t, room_i) in l-infinity: the gain grows in t, one piece after the other
    speed = steep if norm == "l2" else np.ones_like(steep)
    stops = np.sort(room / speed)
    gains = np.array([steep @ np.minimum(stop * speed, room) for stop in stops])
    piece = int(np.searchsorted(gains, gap))
    before, done = (stops[piece - 1], gains[piece - 1]) if piece else (0.0, 0.0)
    t = before + (gap - done) / (steep * speed)[room / speed >= stops[piece]].sum()
    size: float = np.linalg.norm(np.minimum(t * speed, room), ORDERS[norm])
    return size


def exact(model, x, y, norm):
    found = []
    for image, label in zip(x, y.tolist(), strict=True):
        logits = model(image)
        others = [j for j in range(len(logits)) if j != label]
        ways = ((model.weight[j] - model.weight[label], float(logits[label] - logits[j])) for j in others)
        found.append(min(nearest(weight.numpy(), gap, image.numpy(), norm) for weight, gap in ways))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_affine_models_with_the_box_active(name, norm, classes):
    model = affine(30, classes)
    # digits have most of their pixels at 0 or 1
    x = (1.6 * torch.rand(12, 30, generator=seeded(), dtype=torch.float64) - 0.3).clamp(0, 1)
    y = model(x).argmax(1)
    best = exact(model, x, y, norm)
    x, y, best = (values[best.isfinite()] for values in (x, y, best))
    assert len(x) >= 8
    found = attack(model, x, y, name, norm=norm)
    assert (found.distance >= best * (1 - 1e-9)).all()
    if name in NEAR:
        assert (found.distance <= best * NEAR[name]).all()


class Plane(nn.Module):
    """A net on the unit square with a wavy boundary."""

    def __init__(self, seed):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
        for number, layer in enumerate(layer for layer in self.body if isinstance(layer, nn.Linear)):
            layer.weight.data = random(*layer.weight.shape, seed=seed + number) * math.sqrt(2 / layer.in_features)
            layer.bias.data = random(*layer.bias.shape, seed=seed + 10 + number) / 2
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.body(4 * x - 2)


def grid_distance(model, x, y, norm, side=501):
    """The distance to the nearest adversarial point of a grid on the square."""
    axis = torch.linspace(0, 1, side, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    label = model(grid).argmax(1)
    sizes = (torch.linalg.vector_norm(grid[label != own] - one, ord=ORDERS[norm], dim=1) for one, own in zip(x, y))  # noqa: B905
    return torch.stack([size.min() for size in sizes])


@pytest.mark.parametrize("norm", NORMS)
def test_nets_in_the_plane_against_all_points(norm):
    model, x = Plane(0), torch.rand(25, 2, generator=seeded(), dtype=torch.float64)
    y = model(x).argmax(1)
    assert len(y.unique()) > 1
    best = grid_distance(model, x, y, norm)
    # the grid may miss the nearest point by half a cell's diagonal, and thin cells by more
    for name in (name for name, known in CASES if known == norm):
        found = attack(model, x, y, name, norm=norm).distance
        assert (found >= best - 0.004).all(), name
    hard = make_attack("fmn", steps=100, restarts=3)(model, x, y, norm=norm).distance
    plain = attack(model, x, y, "fmn", norm=norm).distance
    assert (hard <= best * 1.01 + 0.001).double().mean() >= 0.9
    assert (plain <= best * 1.01 + 0.001).double().mean() >= 0.7


class Plateau(nn.Module):
    """Flat but within 0.2 of x = 1, where the other class wins: no gradient shows the way."""

    def forward(self, x):
        value = (x.flatten(1).mean(1) - 0.8).clamp_min(0.0) - 0.05
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.mark.parametrize(("name", "norm"), DESCENTS)
def test_hardened_attacks_find_what_lies_beyond_a_plateau(name, norm):
    shape = (1, 2, 3)
    x = torch.stack([torch.full(shape, 0.1), torch.full(shape, 0.2), torch.full(shape, 0.95)])
    y = torch.tensor([0, 0, 1])  # the third sample is the other class's
    found = make_attack(name).hardened()(Plateau(), x, y, norm=norm)
    size = {"l2": math.sqrt(6), "linf": 1.0, "l1": 6.0}[norm]
    assert found.success.all()
    assert (found.distance[:2] >= size * torch.tensor([0.75, 0.65]).double() * (1 - 1e-6)).all()
    assert (found.distance[:2] <= size * torch.tensor([0.75, 0.65]).double() * 1.2).all()


@pytest.mark.parametrize("x", [torch.rand(6, 12, generator=seeded()), torch.eye(6, 12)], ids=["inside", "corners"])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_certificate_without_end_stops_no_attack(name, norm, x):
    model = affine(12, 3).float()
    found = attack(model, x, model(x).argmax(1), name, norm=norm, certified=torch.full((6,), math.inf))
    assert found.distance.isfinite().any()


@pytest.mark.parametrize("factor", [0.9, 3.0])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_certificate_that_is_wrong_hides_nothing(name, norm, factor):
    model = affine(20, 3)
    x = 0.35 + 0.3 * torch.rand(20, 20, generator=seeded(), dtype=torch.float64)
    y = model(x).argmax(1)
    best = exact(model, x, y, norm)
    kept = best < {"l2": 0.2, "linf": 0.05, "l1": 0.3}[norm]
    x, y, best = x[kept], y[kept], best[kept]
    assert len(x) >= 3
    found = make_attack(name)(model, x, y, norm=norm, certified=factor * best)
    assert (found.distance >= best * (1 - 1e-9)).all()
    assert (found.distance <= best * 1.002).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_certificate_saves_the_rounding_search_its_way(norm):
    """From the linearised boundary, which lies far inside, the search goes on at the certified radius."""

    class Cubed(nn.Module):
        def forward(self, x):
            value = (2 * x.mean(1) - 1) ** 3 - 0.2
            return torch.stack([torch.zeros_like(value), value], 1)

    x, y = torch.full((2, 5), 0.52, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    root = (0.2 ** (1 / 3) + 1) / 2 - 0.52
    best = root * {"l2": math.sqrt(5), "linf": 1.0, "l1": 5.0}[norm]
    certified = torch.full((2,), 0.99 * best, dtype=torch.float64)
    found = make_attack("rounding-search", descents=1, rounds=1)(Cubed(), x, y, norm=norm, certified=certified)
    if norm != "l1":  # in l1 one entry moves first
        assert (found.distance <= best * (1 + 1e-6)).all()
    assert (found.distance >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("name", NAMES)
def test_hardened_is_the_same_attack_with_more_effort(name):
    plain = make_attack(name)
    hard = plain.hardened()
    assert type(hard) is type(plain)
    assert hard.hardened() == hard
    assert hard.cost(10) >= plain.cost(10) >= plain.cost(2) > 0
    assert hard != plain
    x = torch.rand(6, 8, generator=seeded())
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).requires_grad_(False)
    for number, layer in enumerate((model[0], model[2])):
        layer.weight.copy_(2 * random(*layer.weight.shape, seed=number))
        layer.bias.copy_(random(*layer.bias.shape, seed=number + 5) - layer.weight.sum(1) / 2)
    y = model(x).argmax(1)
    first, second = (one(model, x, y).distance for one in (plain, hard))
    assert (second <= first * 1.02).double().mean() >= 0.75
    assert second.clamp_max(100).mean() <= first.clamp_max(100).mean() * 1.001


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(("name", "gradients"), [("ddn", 100), ("fmn", 100), ("cw", 500)])
def test_cost_counts_the_gradients(name, gradients, classes):
    model = affine(6, classes)
    x = torch.rand(4, 6, generator=seeded(), dtype=torch.float64)
    one = make_attack(name)
    found = one(model, x, model(x).argmax(1))
    assert found.gradients == 4 * (gradients + 3 + classes - 1)
    assert one.cost(classes) == pytest.approx(found.gradients / 4, rel=0.1)


class Saturated(nn.Module):
    """Logits through sigmoids so steep that nearly all gradients are 0."""

    def forward(self, x):
        value = torch.sigmoid(1e4 * (x.flatten(1).mean(1) - 0.6))
        return torch.stack([torch.full_like(value, 0.5), value], 1)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_saturated_nets(name, norm):
    x = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.4], [0.9, 0.9, 0.9]])
    found = attack(Saturated(), x, torch.tensor([0, 0, 1]), name, norm=norm)
    away = {"l2": math.sqrt(3), "linf": 1.0, "l1": 3.0}[norm]
    reached = found.distance.isfinite()
    least = away * (x.mean(1) - 0.6).abs().double()
    assert (found.distance >= least * (1 - 1e-3)).all()
    assert torch.equal(found.success, reached)
    assert torch.equal(found.closest[~reached], x[~reached])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_one_pixel(name, norm):
    model = nn.Linear(1, 2).requires_grad_(False)
    model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    model.bias.copy_(torch.tensor([-0.5, 0.5]))
    x = torch.tensor([[1.0], [0.75], [0.5], [0.0]])
    found = attack(model, x, torch.tensor([0, 0, 0, 1]), name, norm=norm)
    torch.testing.assert_close(found.distance, torch.tensor([0.5, 0.25, 0.0, 0.5]).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_x_in_the_corners_of_the_box(name, norm):
    model = affine(8, 2)
    x = (torch.rand(10, 8, generator=seeded(), dtype=torch.float64) > 0.5).double()
    y = model(x).argmax(1)
    best = exact(model, x, y, norm)
    found = attack(model, x, y, name, norm=norm)
    assert (found.distance >= best * (1 - 1e-9)).all()
    if name in NEAR:
        assert (found.distance <= best * NEAR[name]).all()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_samples_that_are_all_misclassified_cost_one_forward(name, norm):
    model = affine(5, 3)
    x = torch.rand(4, 5, generator=seeded(), dtype=torch.float64)
    found = attack(model, x, (model(x).argmax(1) + 1) % 3, name, norm=norm)
    assert found.distance.tolist() == [0.0] * 4
    assert (found.forwards, found.gradients) == (4, 0)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_logits_in_half_precision(name, norm):
    """In float16 the gradient of a loss times a large constant would be infinite."""
    net = nn.Sequential(nn.Linear(3, 2).requires_grad_(False), Half())
    net[0].weight.copy_(torch.tensor([[0.01, 0.01, 0.01], [-0.01, -0.01, -0.01]]))
    net[0].bias.copy_(torch.tensor([5.0, -5.0]))
    x = torch.rand(4, 3, generator=seeded())
    found = attack(net, x, torch.zeros(4, dtype=torch.int64), name, norm=norm)  # no point of the box is adversarial
    assert found.distance.isinf().all()


class Half(nn.Module):
    def forward(self, x):
        return x.half()


class Undefined(nn.Module):
    """Finite logits with a gradient of NaN: 0 times the infinite slope of the root at 0."""

    def forward(self, x):
        value = (x.flatten(1).sum(1) * 0).sqrt()
        return torch.stack([value + 1, value], 1)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_gradients_that_are_no_numbers_are_refused(name, norm):
    with pytest.raises(ValueError, match="model must have finite input gradients, got NaN or inf"):
        attack(Undefined(), torch.rand(2, 3, generator=seeded()), torch.zeros(2, dtype=torch.int64), name, norm=norm)

"""The rounding search finds flips inside radii that forget rounding, and the nearest boundary point within the box."""

import math

import numpy as np
import pytest
import torch
from oracles import random, seeded
from scipy.optimize import linprog, minimize
from torch import nn

from speccert.attacks import attack, make_attack
from speccert.attacks.exact import strictly_inside

NORMS = ("l2", "linf", "l1")
DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}


def linear_model(features, classes, dtype=torch.float32, seed=0):
    model = nn.Linear(features, classes).to(dtype).requires_grad_(False)
    model.weight.copy_(random(classes, features, seed=seed))
    model.bias.copy_(random(classes, seed=seed + 1) - model.weight.sum(1) / 2)
    return model


def uniform(*shape, dtype=torch.float32):
    """Samples off the sides of the box."""
    return 0.25 + 0.5 * torch.rand(*shape, generator=seeded(), dtype=dtype)


def radii_of(model, x, y, norm):
    """min_j (f_y - f_j)(x) / ||w_y - w_j||_q in the arithmetic of the arguments: naive in float32."""
    logits = x @ model.weight.T + model.bias
    slopes = torch.linalg.vector_norm(model.weight[y][:, None] - model.weight, ord=DUAL[norm], dim=2)
    radii = (logits.gather(1, y[:, None]) - logits) / slopes
    return radii.scatter(1, y[:, None], torch.inf).amin(1).double()


@pytest.mark.parametrize(("norm", "share"), [("l2", 0.5), ("linf", 0.02), ("l1", 0.1)])
@pytest.mark.parametrize(("features", "classes"), [(100, 2), (100, 10), (784, 2)])
def test_flips_inside_the_naive_radius_of_linear_models(norm, share, features, classes):
    model, x = linear_model(features, classes), uniform(100, features)
    y = model(x).argmax(1)
    naive = radii_of(model, x, y, norm)
    found = attack(model, x, y, "rounding-search", norm=norm, rounds=60)
    inside = strictly_inside(x, found.closest, naive, norm)
    logits = model(found.closest)
    rivals = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    flipped = rivals >= logits.gather(1, y[:, None]).squeeze(1)
    assert found.success.all()
    assert flipped.all()
    assert (inside & flipped).double().mean() >= share
    assert (found.distance >= naive - 1e-4).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 5])
def test_the_exact_distance_of_float64_models(norm, classes):
    model, x = linear_model(100, classes, torch.float64), uniform(40, 100, dtype=torch.float64)
    y = model(x).argmax(1)
    exact = radii_of(model, x, y, norm)
    free = exact < 0.2  # the box does not cut the way short
    found = attack(model, x, y, "rounding-search", norm=norm, rounds=20)
    assert free.sum() >= 10
    torch.testing.assert_close(found.distance[free], exact[free], rtol=0, atol=1e-12)


def nearest_in_box(weight, gap, x, norm):
    """The least ||d|| with <weight, d> >= gap and x + d in the box, by scipy's solvers."""
    size = len(x)
    box = np.stack([-x, 1 - x], 1)
    if norm == "l2":
        allowed = {"type": "ineq", "fun": lambda d: weight @ d - gap, "jac": lambda d: weight}
        options = {"ftol": 1e-14, "maxiter": 500}
        first = weight * gap / (weight @ weight)
        return math.sqrt(minimize(lambda d: d @ d, first, bounds=box, constraints=allowed, options=options).fun)
    eye, ones = np.eye(size), np.ones((size, 1))
    if norm == "linf":
        cost, zero = np.r_[np.zeros(size), 1.0], np.zeros((1, 1))
        rows = np.block([[-weight[None], zero], [eye, -ones], [-eye, -ones]])
        bounds = [*box, (0, None)]
    else:
        cost = np.r_[np.zeros(size), np.ones(size)]
        rows = np.block([[-weight[None], np.zeros((1, size))], [eye, -eye], [-eye, -eye]])
        bounds = [*box, *[(0, None)] * size]
    return linprog(cost, rows, np.r_[-gap, np.zeros(2 * size)], bounds=bounds).fun


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_the_boundary_within_the_box(norm):
    model = linear_model(12, 2, torch.float64)
    x = torch.rand(12, 12, generator=seeded(3), dtype=torch.float64).round(decimals=1)
    y = model(x).argmax(1)
    found = attack(model, x, y, "rounding-search", norm=norm, rounds=20)
    for image, label, distance in zip(x, y, found.distance, strict=True):
        weight = model.weight[1 - label] - model.weight[label]
        logits = model(image)
        best = nearest_in_box(weight.numpy(), float(logits[label] - logits[1 - label]), image.numpy(), norm)
        assert float(distance) == pytest.approx(best, rel=1e-5)


def test_nets_of_orthogonal_layers_are_broken_at_their_radius():
    class Abs(nn.Module):
        def forward(self, x):
            return torch.abs(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 50), Abs(), nn.Linear(50, 50), Abs(), nn.Linear(50, 3))
        model.requires_grad_(False)
        for layer in (model[0], model[2]):
            nn.init.orthogonal_(layer.weight)
    x = uniform(100, 50)
    y = model(x).argmax(1)
    naive = radii_of(model[4], model[:4](x), y, "l2")
    found = attack(model, x, y, "rounding-search")
    assert (found.distance >= naive * (1 - 1e-3)).all()
    assert (found.distance <= naive * (1 + 1e-6)).sum() >= 10
    assert strictly_inside(x, found.closest, naive, "l2").sum() >= 5


def test_hidden_values_that_cancel_bring_the_flips_far_inside():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)).requires_grad_(False)
    model[0].weight.copy_(torch.eye(20))
    model[0].bias.fill_(1e4)
    model[2].weight.copy_(random(2, 20))
    model[2].bias.copy_(-model[2].weight.sum(1) * (0.5 + 1e4))
    x = uniform(100, 20)
    y = model(x).argmax(1)
    weight, bias = model[2].weight.double(), model[2].bias.double()
    logits = (x.double() + 1e4) @ weight.T + bias
    exact = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    found = attack(model, x, y, "rounding-search")
    assert (strictly_inside(x, found.closest, 0.99 * exact, "l2") & found.success).sum() >= 15


def test_a_point_that_is_adversarial_in_a_smaller_batch_alone():
    class Fickle(nn.Module):
        """Rounds otherwise in batches of one, as matrix products may."""

        def forward(self, x):
            return x if len(x) > 1 else 0 * x

    x = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    found = attack(Fickle(), x, torch.tensor([0, 0]), "rounding-search", rounds=4)
    assert found.distance.tolist() == [0.0, 0.0]
    assert torch.equal(found.closest, x)


@pytest.mark.parametrize("option", ["descents", "rounds", "classes"])
def test_options_are_counts(option):
    with pytest.raises(ValueError, match=f"{option} must be an integer >= 1, got 0"):
        make_attack("rounding-search", **{option: 0})

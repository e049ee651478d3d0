import itertools
import math

import numpy as np
import pytest
import torch
from oracles import Wired, jacobian, matrix_norm, random, randomised
from scipy.optimize import linprog
from torch import nn

from speccert.certify import ascent, lipschitz, register_rule
from speccert.certify.ascent import lower_estimates
from speccert.models.activations import Abs, GroupSort, Householder, MaxMin

NORMS = ("l2", "linf", "l1")
ACTS = [nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, Abs, MaxMin]
ACTS += [lambda: GroupSort(4), lambda: Householder(16)]
DUAL = {"l2": 2, "linf": 1, "l1": np.inf}


def dense(*sizes, act=nn.ReLU, seed=0):
    layers = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, outer), act()]
    return randomised(nn.Sequential(*layers[:-1]), seed=seed, scale=1.0).double()


def pieces(model):
    """The Jacobians of a dense net of two layers with ReLU or abs, one a pattern that an open set of inputs has."""
    first, act, last = model
    low = {nn.ReLU: 0.0, Abs: -1.0}[type(act)]
    w, b = first.weight.detach().numpy(), first.bias.detach().numpy()
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=len(w)):
        s = np.array(signs)
        # largest t with s (w x + b) >= t
        answer = linprog(
            np.append(np.zeros(w.shape[1]), -1.0),
            np.column_stack([-s[:, None] * w, np.ones(len(w))]),
            s * b,
            bounds=[(None, None)] * w.shape[1] + [(None, 1.0)],
        )
        if answer.status == 0 and answer.x[-1] > 1e-7:
            found.append(last.weight.detach().numpy() @ (np.where(s > 0, 1.0, low)[:, None] * w))
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", [nn.ReLU, Abs])
@pytest.mark.parametrize("seed", range(2))
def test_never_above_the_exact_constants_and_mostly_at_them(norm, act, seed):
    model = dense(2, 6, 3, act=act, seed=seed)
    exact = pieces(model)
    whole = max(matrix_norm(piece, norm) for piece in exact)
    pairs = np.max([np.linalg.norm(p[:, None] - p[None], DUAL[norm], axis=2) for p in exact], axis=0)
    found = lower_estimates(model, random(20, 2), norm, steps=20)
    assert whole * 0.9 <= found.whole <= whole * (1 + 1e-9)
    assert (found.pairwise.numpy() <= pairs * (1 + 1e-9)).all()
    assert (found.pairwise.numpy() >= pairs * 0.8).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTS)
def test_bracket_of_the_bound_and_gain_over_the_points(norm, act):
    model = dense(5, 16, 16, 4, act=act)
    points = random(10, 5)
    bound = lipschitz(model, (5,), norm=norm)
    looked, searched = (lower_estimates(model, points, norm, steps=steps) for steps in (0, 10))
    attained = max(matrix_norm(jacobian(model, point), norm) for point in points)
    assert looked.whole == pytest.approx(attained, rel=1e-4)
    assert looked.whole * (1 + 1e-4) < searched.whole <= bound.upper * (1 + 1e-9)
    assert bool((searched.pairwise <= bound.pairwise * (1 + 1e-9)).all())
    assert float(searched.pairwise.sum()) > 1.05 * float(looked.pairwise.sum())
    assert torch.equal(searched.pairwise, searched.pairwise.T)
    assert float(searched.pairwise.diagonal().abs().max()) == 0.0


@pytest.mark.parametrize("norm", NORMS)
def test_affine_network_is_met(norm):
    layer = randomised(nn.Linear(6, 4)).eval()
    found = lower_estimates(layer, torch.zeros(1, 6), norm, steps=3)
    rows = layer.weight.detach().double()
    assert found.whole == pytest.approx(matrix_norm(rows, norm), rel=1e-9)
    pairs = torch.linalg.vector_norm(rows[:, None] - rows[None], DUAL[norm], dim=2)
    torch.testing.assert_close(found.pairwise, pairs, rtol=1e-9, atol=1e-12)


def test_autograd_on_a_kink_is_no_evidence():
    """x - relu(x) + relu(-x) = 0, but autograd's slopes at 0 add up to 1."""
    model = Wired(lambda self, x: torch.cat([x - torch.relu(x) + torch.relu(-x), 0 * x], 1)).eval()
    point = torch.zeros(1, 1, dtype=torch.float64)
    assert float(jacobian(model, point[0]).abs().max()) == 1.0
    assert lower_estimates(model, point, steps=5).whole < 1e-9


def test_equal_rows_differ_by_nothing():
    model = dense(3, 8, 2)
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
    assert float(lower_estimates(model, random(4, 3), steps=5).pairwise.max()) == 0.0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp_min(0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class Positive(nn.Module):
    def forward(self, x):
        return Once.apply(x)


register_rule(Positive, factor=1.0)


def test_networks_without_second_derivatives_are_searched_along_segments():
    plain = dense(5, 16, 16, 3)
    model = nn.Sequential(*(Positive() if isinstance(layer, nn.ReLU) else layer for layer in plain)).eval()
    points = random(10, 5)
    looked, searched = (lower_estimates(model, points, steps=steps) for steps in (0, 30))
    assert searched.whole > 1.1 * looked.whole
    assert searched.whole <= lipschitz(plain, (5,)).upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_measured_in_float64(dtype):
    model = dense(4, 12, 3).to(dtype)
    exact = dense(4, 12, 3).to(dtype).double()
    points = random(6, 4).to(dtype)
    found, expected = lower_estimates(model, points, steps=0), lower_estimates(exact, points, steps=0)
    assert found.whole == expected.whole
    assert torch.equal(found.pairwise, expected.pairwise)


def test_equal_calls_give_equal_results_and_leave_no_trace():
    model = randomised(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
    points = random(5, 1, 4, 4).float()
    state = torch.get_rng_state()
    with torch.inference_mode():
        first = lower_estimates(model, points, steps=10)
    second = lower_estimates(model, points, steps=10)
    assert first.whole == second.whole
    assert torch.equal(first.pairwise, second.pairwise)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert points.grad is None
    other = lower_estimates(model, points, steps=10, seed=1)
    assert not torch.equal(other.pairwise, first.pairwise)


def test_time_ends_the_search_but_not_the_look():
    model, points = dense(5, 16, 3), random(5, 5)
    looked = lower_estimates(model, points, steps=0)
    assert lower_estimates(model, points, steps=10**9, seconds=0.0).whole >= looked.whole


def test_large_networks_get_fewer_steps_and_points(monkeypatch):
    monkeypatch.setattr(ascent, "_WORK", 1.0)
    model, points = dense(5, 16, 3), random(5, 5)
    first = max(float(matrix_norm(jacobian(model, point))) for point in points[:1])
    assert lower_estimates(model, points).whole >= first * (1 - 1e-4)


def test_points_that_overflow_are_left_out():
    model = Wired(lambda self, x: torch.exp(300 * x), None).eval()
    found = lower_estimates(model, torch.full((1, 2), -1.0, dtype=torch.float64), steps=5)
    assert math.isfinite(found.whole)
    with pytest.raises(ValueError, match="Jacobian: expected finite numbers"):
        lower_estimates(model, torch.full((1, 2), 10.0, dtype=torch.float64), steps=5)


def test_bad_input_is_refused():
    model = dense(3, 4, 2)
    with pytest.raises(ValueError, match="expected one of l2, linf, l1"):
        lower_estimates(model, random(2, 3), "fro")
    with pytest.raises(ValueError, match="at least one point and steps >= 0, got 0 points"):
        lower_estimates(model, random(0, 3))
    with pytest.raises(ValueError, match="steps = -1"):
        lower_estimates(model, random(2, 3), steps=-1)

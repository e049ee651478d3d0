"""Moves within the box, against torchattacks' projections, scipy's linear programs and the conditions of optimality."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torchattacks.attacks import fab as torchattacks_fab

from speccert.attacks.boxed import project, random_start, shortest, steepest
from speccert.attacks.norms import NORMS
from speccert.attacks.task import Task
from speccert.attacks.victim import Victim

ORDERS = {"l2": 2.0, "linf": float("inf"), "l1": 1.0}
EPS = {"l2": 0.8, "linf": 0.3, "l1": 1.5}


def task(norm: str, count: int = 30, features: int = 12) -> tuple[Task, Tensor]:
    """Samples of which a third of the entries lie on the box's sides, and directions."""
    draw = torch.Generator().manual_seed(4)
    x = (torch.rand(count, features, generator=draw, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    labels = torch.zeros(count, dtype=torch.int64)
    direction = torch.randn(count, features, generator=draw, dtype=torch.float64)
    return Task(Victim(nn.Identity()), x, labels, NORMS[norm], EPS[norm]), direction


def size(delta: Tensor, norm: str) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], 1)
    return length


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 100.0])
@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point(norm: str, scale: float) -> None:
    """p is the projection of v on a convex set exactly when <v - p, q - p> <= 0 for all q of the set."""
    given, direction = task(norm)
    v = scale * direction
    p = project(given, v)
    assert ((given.x + p >= -1e-12) & (given.x + p <= 1 + 1e-12)).all()
    assert (size(p, norm) <= EPS[norm] * (1 + 1e-9)).all()
    for row in range(len(v)):
        q = _linear_optimum((v - p)[row].numpy(), given.x[row].numpy(), norm)
        assert (v - p)[row] @ (torch.tensor(q) - p[row]) <= 1e-6 * max(1.0, scale)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_move_is_the_linear_optimum(norm: str) -> None:
    given, gradient = task(norm)
    gradient[3, :] = 0
    gradient[4, 2:] = 0
    d = steepest(given, gradient)
    assert ((given.x + d >= -1e-12) & (given.x + d <= 1 + 1e-12)).all()
    assert (size(d, norm) <= EPS[norm] * (1 + 1e-9)).all()
    for row in range(len(d)):
        best = gradient[row].numpy() @ _linear_optimum(gradient[row].numpy(), given.x[row].numpy(), norm)
        assert (gradient[row] @ d[row]).item() == pytest.approx(best, abs=1e-7)


def _linear_optimum(gradient: np.ndarray, x: np.ndarray, norm: str) -> np.ndarray:
    if norm == "l2":
        # Its multiplier by bisection: d = clip(gradient / m, -x, 1 - x) at the norm eps.
        low, high = 1e-9, 1e9
        for _ in range(200):
            middle = (low * high) ** 0.5
            d = np.clip(gradient / middle, -x, 1 - x)
            low, high = (middle, high) if np.linalg.norm(d) > EPS["l2"] else (low, middle)
        return np.clip(gradient / high, -x, 1 - x)
    if norm == "linf":
        bounds = np.stack([np.maximum(-x, -EPS["linf"]), np.minimum(1 - x, EPS["linf"])], 1)
        return np.asarray(linprog(-gradient, bounds=bounds).x)
    n = len(x)  # d = up - down
    solved = linprog(
        np.concatenate([-gradient, gradient]),
        A_ub=np.ones((1, 2 * n)),
        b_ub=[EPS["l1"]],
        bounds=[(0, room) for room in np.concatenate([1 - x, x])],
    )
    return np.asarray(solved.x[:n] - solved.x[n:])


@pytest.mark.parametrize("gap", [-0.7, -1e-3, 1e-3, 0.4, 2.0])
@pytest.mark.parametrize("norm", NORMS)
def test_shortest_move_onto_a_hyperplane_as_in_torchattacks(norm: str, gap: float) -> None:
    given, gradient = task(norm)
    d = shortest(NORMS[norm], given.x, gradient, torch.full((len(given.x),), gap, dtype=torch.float64))
    offset = (gradient * given.x).sum(1) + gap
    theirs = getattr(torchattacks_fab, f"projection_{norm}")(given.x.float(), gradient.float(), offset.float())
    reached = (gradient * d).sum(1) - gap
    corner = torch.where(gradient * gap > 0, 1 - given.x, -given.x)
    in_reach = (gradient * corner).sum(1).abs() >= abs(gap)
    assert in_reach.sum() >= 10
    torch.testing.assert_close(reached[in_reach], torch.zeros_like(reached[in_reach]), atol=1e-9, rtol=0)
    torch.testing.assert_close(size(d, norm)[in_reach], size(theirs.double(), norm)[in_reach], atol=2e-5, rtol=1e-4)
    assert ((given.x + d >= -1e-12) & (given.x + d <= 1 + 1e-12)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_vanishing_gradients_move_nothing(norm: str) -> None:
    given, gradient = task(norm)
    ones = torch.ones(len(given.x), dtype=torch.float64)
    assert not shortest(NORMS[norm], given.x, 0 * gradient, ones).any()
    assert not steepest(given, 0 * gradient).any()
    tiny = shortest(NORMS[norm], given.x, 1e-200 * gradient, 1e-201 * ones)
    torch.testing.assert_close(tiny, shortest(NORMS[norm], given.x, gradient, 0.1 * ones))


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_lie_on_the_sphere_where_the_box_lets_them(norm: str) -> None:
    x = torch.full((50, 20), 0.5)
    given = Task(Victim(nn.Identity()), x, torch.zeros(50, dtype=torch.int64), NORMS[norm], 0.1)
    torch.manual_seed(0)
    delta = random_start(given) - x
    torch.testing.assert_close(size(delta, norm), torch.full((50,), 0.1), atol=1e-5, rtol=0)
    assert delta.mean().abs() < 0.01

"""Norm objects against numpy and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from speccert.attacks.norms import NORMS

ORDERS = {"l2": 2, "linf": np.inf, "l1": 1}
DUALS = {"l2": 2, "linf": 1, "l1": np.inf}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NORMS)
def test_sizes_match_numpy(name: str) -> None:
    delta = draw(0, 4, 2, 3)
    flat = delta.double().numpy().reshape(4, -1)
    norm = NORMS[name]
    np.testing.assert_allclose(norm.size(delta), np.linalg.norm(flat, ORDERS[name], axis=1), rtol=1e-13)
    np.testing.assert_allclose(norm.dual(delta), np.linalg.norm(flat, DUALS[name], axis=1), rtol=1e-13)
    assert norm.size(delta).dtype == torch.float64


@pytest.mark.parametrize("name", NORMS)
def test_steepest_attains_the_dual_norm(name: str) -> None:
    norm, gradient = NORMS[name], draw(1, 5, 3, 4)
    direction = norm.steepest(gradient)
    inner = (direction * gradient).flatten(1).sum(1).double()
    torch.testing.assert_close(inner, norm.dual(gradient), rtol=1e-6, atol=0)
    assert (norm.size(direction) <= 1 + 1e-6).all()
    assert torch.equal(norm.steepest(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("name", NORMS)
def test_projection_is_the_nearest_point(name: str) -> None:
    norm, delta, radius = NORMS[name], draw(2, 3, 4).double(), 0.7
    projected = norm.project(delta, torch.full((3,), radius, dtype=torch.float64)).numpy()
    for row, result in zip(delta.numpy(), projected, strict=True):
        # delta = positive part - negative part makes the l1 ball smooth for the solver.
        ball = {"type": "ineq", "fun": lambda v: radius - np.linalg.norm(v[:4] - v[4:], ORDERS[name])}
        if name == "l1":
            ball = {"type": "ineq", "fun": lambda v: radius - v.sum()}
        limit = radius if name == "linf" else None
        solved = minimize(
            lambda v, row=row: ((v[:4] - v[4:] - row) ** 2).sum(),
            np.concatenate([np.maximum(row, 0), np.maximum(-row, 0)]) * 0.1 + 1e-3,
            bounds=[(0, limit)] * 8,
            constraints=[] if name == "linf" else [ball],
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-14},
        )
        np.testing.assert_allclose(result, solved.x[:4] - solved.x[4:], atol=2e-5)


@given(seed=st.integers(0, 10**6), radius=st.floats(0, 5))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", NORMS)
def test_projection_properties(name: str, seed: int, radius: float) -> None:
    norm, delta = NORMS[name], draw(seed, 3, 7).double()
    limit = torch.full((3,), radius, dtype=torch.float64)
    projected = norm.project(delta, limit)
    assert (norm.size(projected) <= radius * (1 + 1e-12) + 1e-14).all()
    assert (projected.abs() <= delta.abs()).all()
    assert (projected * delta >= 0).all()
    inside = norm.size(delta) <= radius
    torch.testing.assert_close(projected[inside], delta[inside])


@pytest.mark.parametrize("name", NORMS)
def test_projection_of_zero(name: str) -> None:
    zero = torch.zeros(2, 3)
    assert torch.equal(NORMS[name].project(zero, torch.tensor([0.0, 1.0], dtype=torch.float64)), zero)

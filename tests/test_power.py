import pytest
import torch
from oracles import matrix_norm, random

from speccert.certify import estimate_norm
from speccert.certify.linear import Dense, Diagonal
from speccert.certify.power import improve, starting_vector


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [0, 1, 10, 200])
def test_estimate_never_exceeds_the_norm_and_reaches_it(seed, steps):
    weight = random(7, 5, seed=seed)
    estimate, vector = estimate_norm(Dense(weight, (5,)), steps=steps)
    exact = matrix_norm(weight)
    assert float(estimate) <= exact * (1 + 1e-12)
    assert float(vector.norm()) == pytest.approx(1.0)
    if steps == 200:
        assert float(estimate) == pytest.approx(exact, rel=1e-3)


def test_start_is_not_orthogonal_to_the_top_direction():
    weight = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # sends a constant vector to zero
    assert float(estimate_norm(Dense(weight, (2,)))[0]) == pytest.approx(2**0.5)


def test_start_is_a_unit_vector_that_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, again = starting_vector((3, 4), torch.zeros(())), starting_vector((3, 4), torch.zeros(()))
    assert torch.equal(first, again)
    assert not torch.equal(first, starting_vector((3, 4), torch.zeros(()), seed=1))
    assert float(first.norm()) == pytest.approx(1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_maps_that_send_the_vector_to_zero_give_no_nan(scale):
    for dtype in (torch.float32, torch.float64):
        linear = Dense(scale * random(3, 4).to(dtype), (4,))
        estimate, vector = estimate_norm(linear, steps=5)
        assert bool(torch.isfinite(vector).all())
        assert 0.0 <= float(estimate) <= scale * 10


def test_gradient_is_the_outer_product_of_the_top_pair():
    weight = random(4, 6).requires_grad_()
    estimate, _ = estimate_norm(Dense(weight, (6,)), steps=300)
    estimate.backward()
    left, _, right = torch.linalg.svd(weight.detach())
    torch.testing.assert_close(weight.grad, torch.outer(left[:, 0], right[0]), rtol=1e-4, atol=1e-5)


def test_warm_start_continues():
    linear = Dense(random(20, 20), (20,))
    cold, vector = estimate_norm(linear, steps=3)
    warm, _ = estimate_norm(linear, vector, steps=3)
    assert float(cold) <= float(warm) <= matrix_norm(linear.weight) * (1 + 1e-12)


def test_improvement_takes_no_gradient():
    weight = random(4).requires_grad_()
    assert not improve(Diagonal(weight, (4,)), starting_vector((4,), weight), 3).requires_grad

"""The ball and the box hold exactly, in the floats that the model sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speccert.attacks.norms import NORMS
from speccert.attacks.task import Task, margin
from speccert.attacks.victim import Victim

ORDERS = {"l2": 2.0, "linf": float("inf"), "l1": 1.0}


def task(x: Tensor, norm: str, eps: float) -> Task:
    return Task(Victim(nn.Identity()), x, torch.zeros(len(x), dtype=torch.int64), NORMS[norm], eps)


@given(
    seed=st.integers(0, 10**6),
    eps=st.one_of(st.floats(0, 2), st.floats(0, 1e-6)),
    reach=st.floats(1e-9, 3),
    double=st.booleans(),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("norm", NORMS)
def test_admitted_points_are_in_the_ball_and_the_box(
    norm: str, seed: int, eps: float, reach: float, double: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    x = (torch.rand(4, 3, 5, generator=draw, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)
    z = x + reach * torch.randn(4, 3, 5, generator=draw, dtype=dtype)
    point = task(x, norm, eps).admit(z)
    delta = (point.double() - x.double()).flatten(1)
    assert (torch.linalg.vector_norm(delta, ORDERS[norm], 1) <= eps).all()
    assert point.min() >= 0
    assert point.max() <= 1
    assert point.dtype == dtype
    assert ((point - x) * (z - x) >= 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_admit_keeps_points_that_belong(norm: str) -> None:
    x = torch.full((2, 4), 0.5)
    z = x + 0.01
    assert torch.equal(task(x, norm, 0.5).admit(z), z)
    assert torch.equal(task(x, norm, 0.0).admit(z), x)


def test_admit_goes_as_far_as_it_may() -> None:
    x = torch.rand(20, 50, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    point = task(x, "l2", 0.1).admit(x + 0.2)
    size = torch.linalg.vector_norm((point.double() - x.double()), dim=1)
    assert (size <= 0.1).all()
    assert (size >= 0.1 - 1e-6).all()


def test_admit_drops_points_that_are_not_finite() -> None:
    x = torch.full((3, 2), 0.5)
    z = torch.tensor([[float("nan"), 0.6], [float("inf"), 0.6], [0.6, 0.6]])
    assert torch.equal(task(x, "l2", 1.0).admit(z), torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.6]]))


@given(seed=st.integers(0, 10**6), t=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_segment_never_goes_farther_than_asked(seed: int, t: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, z = torch.rand(3, 6, generator=draw), torch.rand(3, 6, generator=draw)
    point = task(x, "l2", 1.0).on_segment(z, torch.full((3,), t, dtype=torch.float64))
    assert ((point.double() - x.double()).abs() <= t * (z.double() - x.double()).abs()).all()
    torch.testing.assert_close(point, torch.lerp(x, z, t), atol=1e-6, rtol=0)


def test_margin_is_at_least_zero_on_a_tie() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    assert margin(logits, torch.tensor([0, 0, 1])).tolist() == [-1.0, 0.0, 2.0]


def test_certified_radii_are_zero_unless_given_and_stay_with_their_samples() -> None:
    x = torch.rand(4, 3)
    plain = task(x, "l2", 1.0)
    assert plain.certified.dtype == torch.float64
    assert plain.certified.tolist() == [0.0] * 4
    radii = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    told = Task(plain.victim, x, plain.y, plain.norm, 1.0, radii)
    assert told[torch.tensor([3, 1])].certified.tolist() == [0.4, 0.2]
    assert told[torch.tensor([True, False, False, True])].certified.tolist() == [0.1, 0.4]
    assert plain[torch.tensor([2])].certified.tolist() == [0.0]

"""Inside a ball or not, against rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random

from speccert.attacks.exact import strictly_inside

NORMS = ("l2", "linf", "l1")


def brute_inside(x, z, radius, norm):
    size = [abs(Fraction(b) - Fraction(a)) for a, b in zip(x, z, strict=True)]
    limit = Fraction(radius)
    if norm == "linf":
        return max(size) < limit
    return sum(size) < limit if norm == "l1" else sum(s * s for s in size) < limit * limit


@given(seed=st.integers(0, 10**6), ulps=st.integers(-2, 2), scale=st.sampled_from([1.0, 1e-30, 5e-324, 1e150]))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("norm", NORMS)
def test_inside_is_decided_exactly(norm, seed, ulps, scale):
    x, z = random(1, 6, seed=seed) * scale, random(1, 6, seed=seed + 1) * scale
    radius = torch.linalg.vector_norm(z - x, {"l2": 2, "linf": math.inf, "l1": 1}[norm], dim=1)
    for _ in range(abs(ulps)):
        radius = torch.nextafter(radius, torch.tensor(math.copysign(math.inf, ulps), dtype=torch.float64))
    radius = radius.clamp_min(0.0)  # steps from 0 go below
    expected = brute_inside(x[0].tolist(), z[0].tolist(), float(radius), norm)
    assert bool(strictly_inside(x, z, radius, norm)) == expected


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_at_the_radius_is_not_inside(norm):
    x, z = torch.zeros(5, 2), torch.tensor([[0.5, 0.0]]).repeat(5, 1)
    radii = torch.tensor([0.5, math.nextafter(0.5, 1), 0.0, math.inf, math.nan], dtype=torch.float64)
    assert strictly_inside(x, z, radii, norm).tolist() == [False, True, False, True, False]
    assert strictly_inside(x, x, radii, norm).tolist() == [True, True, False, True, False]


def test_bad_points_and_norms_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="expected finite numbers"):
        strictly_inside(x, x + math.nan, torch.ones(1), "l2")
    with pytest.raises(ValueError, match="norm must be one of l2, linf, l1, got 'l0'"):
        strictly_inside(x, x, torch.ones(1), "l0")

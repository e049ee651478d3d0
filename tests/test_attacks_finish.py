"""The end of every attack: a point is re-scored, and drawn to the boundary on its segment in few evaluations."""

import math

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks.finish import confirm, shorten
from speccert.attacks.norms import NORMS
from speccert.attacks.task import Task
from speccert.attacks.victim import Victim


class Along(nn.Module):
    """Logits (0, g(mean of x)): adversarial for the label 0 where g >= 0."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, x: Tensor) -> Tensor:
        value = self.g(x.flatten(1).mean(1))
        return torch.stack([torch.zeros_like(value), value], 1)


def task(g, dtype=torch.float64, count=3, certified=0.0, norm="linf"):
    """Samples at 0, so that t on the segment to 1 is the mean, and the distance in l-infinity."""
    x = torch.zeros(count, 4, dtype=dtype)
    radii = torch.full((count,), certified, dtype=torch.float64)
    return Task(Victim(Along(g)), x, torch.zeros(count, dtype=torch.int64), NORMS[norm], math.inf, radii)


def shortened(one: Task):
    point = torch.ones_like(one.x)
    logits = one.victim.logits(point)
    one.victim.forwards = 0
    return shorten(one, point, logits)


ROOT = 0.31830988618
SHAPES = {
    "line": lambda t: t - ROOT,
    "kink": lambda t: torch.where(t < ROOT, 1e-3 * (t - ROOT), 100 * (t - ROOT)),
    "curve": lambda t: t**3 - ROOT**3,
    "step": lambda t: torch.where(t < ROOT, -1e-9, 1.0).to(t.dtype),
    "late": lambda t: torch.where(t < ROOT, -1.0, 1e-9).to(t.dtype),
    "flat": lambda t: (t - ROOT).clamp(-1e-6, 1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_crossing_is_found_to_the_last_floats(name, dtype):
    one = task(SHAPES[name], dtype)
    point, logits = shortened(one)
    eps = torch.finfo(dtype).eps
    assert (one.margin(logits) >= 0).all()
    assert torch.equal(logits, one.victim.logits(point))
    # cubes near the root, and the mean of four floats, round by some units
    assert ((one.distance(point) - ROOT).abs() <= 8 * eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_never_more_evaluations_than_bisection_and_few_where_smooth(name, dtype):
    one = task(SHAPES[name], dtype, count=1)
    shortened(one)
    bisection = math.ceil(-math.log2(torch.finfo(dtype).eps))
    assert one.victim.forwards <= bisection + 2  # the low end, and one to spare
    if name in ("line", "curve"):
        assert one.victim.forwards <= 0.6 * bisection


def test_finished_samples_are_not_evaluated_again():
    one = task(lambda t: t - ROOT, count=2)
    x = one.x.clone()
    x[1] = ROOT - 1e-17  # on the boundary at once
    mixed = Task(one.victim, x, one.y, one.norm, math.inf)
    alone = task(lambda t: t - ROOT, count=1)
    shortened(mixed)
    shortened(alone)
    assert mixed.victim.forwards < 2 * alone.victim.forwards


@pytest.mark.parametrize("certified", [0.1, 0.3183])
def test_a_right_certificate_saves_evaluations(certified):
    with_hint, without = task(SHAPES["step"], certified=certified, count=1), task(SHAPES["step"], count=1)
    near, far = shortened(with_hint)[0], shortened(without)[0]
    torch.testing.assert_close(near, far, rtol=0, atol=1e-15)
    assert with_hint.victim.forwards <= without.victim.forwards


@pytest.mark.parametrize("certified", [0.32, 0.5, 0.999, 1.0, 7.0, math.inf])
def test_a_wrong_certificate_hides_nothing(certified):
    one = task(SHAPES["line"], certified=certified)
    point, _ = shortened(one)
    assert ((one.distance(point) - ROOT).abs() <= 1e-15).all()
    assert (one.distance(point) < certified).all()


def test_each_sample_has_its_own_certificate():
    radii = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    one = task(SHAPES["line"])
    point, _ = shortened(Task(one.victim, one.x, one.y, one.norm, math.inf, radii))
    assert ((one.distance(point) - ROOT).abs() <= 1e-15).all()


@pytest.mark.parametrize("norm", NORMS)
def test_distance_never_grows(norm):
    def teeth(t: Tensor) -> Tensor:
        return torch.sin(40 * t) - 0.5

    one = task(teeth, norm=norm)
    start = torch.full_like(one.x, 0.99)
    logits = one.victim.logits(start)
    assert (one.margin(logits) >= 0).all()
    point, logits = shorten(one, start, logits)
    assert (one.margin(logits) >= 0).all()
    assert (one.distance(point) <= one.distance(start)).all()
    slope = 40 * math.cos(40 * float(point[0, 0]))  # it lies on the inner side of a tooth
    assert slope > 0
    assert abs(math.sin(40 * float(point[0, 0])) - 0.5) < 1e-12


def test_x_that_is_adversarial_on_second_sight_is_at_distance_zero():
    one = task(lambda t: t + 1.0)
    point, _ = shortened(one)
    assert torch.equal(point, one.x)


def test_confirm_goes_farther_where_a_point_just_misses_the_boundary():
    one = task(lambda t: t - ROOT)
    short = torch.full_like(one.x, ROOT / 1.005)
    point, logits = confirm(one, short)
    assert (one.margin(logits) >= 0).all()
    assert torch.equal(logits, one.victim.logits(point))
    missed, logits = confirm(one, torch.full_like(one.x, ROOT / 1.2))
    assert (one.margin(logits) < 0).all()
    assert torch.equal(missed, torch.full_like(one.x, ROOT / 1.2))

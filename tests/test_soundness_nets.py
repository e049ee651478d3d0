"""Networks built to make floating point differ from the reals: flips exist, but never inside a certified radius."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
from flips import assert_no_flip, exact_copy, executed, near_boundary
from oracles import Wired, randomised, seeded
from torch import nn

from speccert.attacks import attack
from speccert.attacks.exact import strictly_inside
from speccert.certify import certified_radii
from speccert.experiments import load_dataset
from speccert.models import GroupSort, MaxMin, Normalize

NORMS = ("l2", "linf", "l1")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SIZE = 6


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def dense(*sizes, activation=nn.ReLU, seed=0, scale=0.5):
    layers = []
    for first, second in itertools.pairwise(sizes):
        layers += [nn.Linear(first, second), activation()]
    return randomised(nn.Sequential(*layers[:-1]), seed, scale).requires_grad_(False)


def scaled_weights(powers):
    """Layers whose weights are scaled by powers of two that cancel over the whole network."""
    model = dense(SIZE, 8, 8, 3)
    for layer, power in zip([model[0], model[2], model[4]], powers, strict=True):
        layer.weight.mul_(2.0**power)
    for layer, power in zip([model[0], model[2], model[4]], [sum(powers[: k + 1]) for k in range(3)], strict=True):
        layer.bias.mul_(2.0**power)
    return model


def cancelling_pairs(size):
    """Rows (w, -w + 1): the two large products cancel, and what is left is a few digits."""
    model = dense(SIZE, SIZE, 2)
    model[0].weight.zero_()
    for row in range(SIZE):
        model[0].weight[row, row], model[0].weight[row, (row + 1) % SIZE] = size, 1 - size
    return model


def cancelling_biases(size):
    """Hidden values of that size which the last layer takes off again."""
    model = dense(SIZE, SIZE, 2)
    model[0].bias.fill_(size)
    model[2].bias.copy_(-model[2].weight.sum(1) * size + torch.tensor([0.1, 0.0]))
    return model


def shifted_there_and_back(size):
    return Wired(lambda m, x: m.head((m.first(x) + size) - size), first=dense(SIZE, SIZE), head=dense(SIZE, 3)).eval()


def large_columns(size):
    """A constant feature of that size beside the data, with weights that make it cancel between the classes."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE + 1), nn.ReLU(), nn.Linear(SIZE + 1, 3)).eval().requires_grad_(False)
    randomised(model, 3)
    model[0].weight[-1], model[0].bias[-1] = 0.0, size
    model[2].weight[:, -1] = 1.0
    return model


class Absolute(nn.Module):
    def forward(self, x):
        return torch.abs(x)


def chain(depth, width=8):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), Absolute()]
    model = randomised(nn.Sequential(nn.Linear(SIZE, width), *layers, nn.Linear(width, 3)), 0, 0.4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
    return model.requires_grad_(False)


def batch_norm(variance, mean=0.5):
    model = randomised(nn.Sequential(nn.Linear(SIZE, 5), nn.BatchNorm1d(5, eps=1e-12), nn.ReLU(), nn.Linear(5, 3)))
    model[1].running_var.fill_(variance)
    model[1].running_mean.fill_(mean)
    return model.requires_grad_(False)


def images(pool, activation):
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), activation(), pool, nn.Flatten()]
    size = nn.Sequential(*layers).eval()(torch.zeros(1, 1, 6, 6)).shape[1]
    return randomised(nn.Sequential(*layers, nn.Linear(size, 3))).requires_grad_(False)


def cancelling_residual(size):
    """x + (w x - x) with large weights: the branches nearly cancel."""
    model = Wired(lambda m, x: m.head(m.first(x) - m.second(x)), first=dense(SIZE, 5), second=dense(SIZE, 5, seed=1))
    model.add_module("head", dense(5, 3))
    model.first[0].weight.mul_(size)
    model.second[0].weight.copy_(model.first[0].weight + 0.3 * torch.randn(5, SIZE, generator=seeded(5)))
    return model.eval().requires_grad_(False)


NETS = {
    "ordinary": lambda: dense(SIZE, 16, 16, 4),
    "weights 2^30, 2^-60, 2^30": lambda: scaled_weights([30, -60, 30]),
    "weights 2^-70, 2^130, 2^-60": lambda: scaled_weights([-60, 110, -50]),
    "weights 2^-40": lambda: scaled_weights([-40, -40, -40]),
    "pairs of 2^10": lambda: cancelling_pairs(2.0**10),
    "pairs of 2^22": lambda: cancelling_pairs(2.0**22),
    "pairs of 2^30": lambda: cancelling_pairs(2.0**30),
    "biases of 1e3": lambda: cancelling_biases(1e3),
    "biases of 1e6": lambda: cancelling_biases(1e6),
    "biases of 1e9": lambda: cancelling_biases(1e9),
    "shift by 1e5": lambda: shifted_there_and_back(1e5),
    "column of 1e5": lambda: large_columns(1e5),
    "100 layers": lambda: chain(100),
    "20 layers": lambda: chain(20),
    "variance 1e-12": lambda: batch_norm(1e-12),
    "variance 1e-30": lambda: batch_norm(1e-30),
    "variance 1e12, mean 1e6": lambda: batch_norm(1e12, 1e6),
    "residual of 1e4": lambda: cancelling_residual(1e4),
    "normalised by 1e-4": lambda: nn.Sequential(Normalize([0.5], [1e-4]), nn.Flatten(), dense(SIZE, 8, 3)).eval(),
    "group sort": lambda: dense(SIZE, 8, 8, 3, activation=lambda: GroupSort(4)),
    "max min": lambda: dense(SIZE, 8, 8, 3, activation=MaxMin),
    **{
        f"{kind.__name__} of 50": lambda kind=kind: dense(SIZE, 8, 3, activation=kind, scale=50.0)
        for kind in (
            nn.Tanh,
            nn.Sigmoid,
            nn.GELU,
            nn.SiLU,
            nn.Softplus,
            nn.ELU,
            nn.Softsign,
            nn.LogSigmoid,
            nn.Tanhshrink,
        )
    },
}
IMAGE_NETS = {
    "max pool": lambda: images(nn.MaxPool2d(3, 1), nn.ReLU),
    "average pool": lambda: images(nn.AvgPool2d(2), nn.GELU),
    "adaptive pool": lambda: images(nn.AdaptiveAvgPool2d(1), nn.LeakyReLU),
    "ordinary": lambda: images(nn.Identity(), nn.ReLU),
}


def samples(model, shape, dtype=torch.float32, count=8):
    """Samples beside the decision boundary, at it to a few digits, and anywhere."""
    x, other = uniform(count, *shape, seed=1).to(dtype), uniform(count, *shape, seed=2).to(dtype)
    return torch.cat([near_boundary(model, x, other), x])


def check(model, shape, norm, dtype=torch.float32):
    x = samples(model, shape, dtype)
    radii = certified_radii(model, x, norm=norm)
    assert_no_flip(model, x, radii, norm)
    return x, radii


DEEP = pytest.param("100 layers", marks=pytest.mark.slow)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [DEEP if name == "100 layers" else name for name in NETS])
def test_no_flip_inside_the_radius(name, norm):
    shape = (1, 1, SIZE) if name.startswith("normalised") else (SIZE,)
    model = NETS[name]()
    x, radii = check(model, shape, norm)
    y = executed(model, x).argmax(1)
    found = attack(model, x, y, "rounding-search", norm=norm, rounds=20, descents=5)
    assert not bool((strictly_inside(x, found.closest, radii, norm) & found.success).any())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", IMAGE_NETS)
def test_no_flip_inside_the_radius_of_images(name, norm):
    check(IMAGE_NETS[name](), (1, 6, 6), norm)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", ["ordinary", "20 layers", "biases of 1e3", "pairs of 2^10", "Tanh of 50", "max min"])
def test_no_flip_inside_the_radius_of_half_precision(name, kind):
    check(NETS[name]().to(HALVES[kind]), (SIZE,), "l2", HALVES[kind])


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", IMAGE_NETS)
def test_no_flip_inside_the_radius_of_half_precision_images(name, kind):
    check(IMAGE_NETS[name]().to(HALVES[kind]), (1, 6, 6), "l2", HALVES[kind])


class Converted(nn.Module):
    """The model that `arithmetic=` speaks of: weights and inputs rounded to a type."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, x):
        return self.model(x.to(self.dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["ordinary", "biases of 1e3", "20 layers"])
def test_no_flip_of_a_model_converted_to_another_type(name, kind, norm):
    """The float32 points are rounded on entry, which may take them out of the ball."""
    model = NETS[name]()
    converted = Converted(model, getattr(torch, kind))
    x = samples(converted, (SIZE,))
    radii = certified_radii(model, x, norm=norm, arithmetic=kind)
    assert_no_flip(converted, x, radii, norm, exact=exact_copy(converted.model))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("powers", [(-130, 0, 0), (-70, -70, 0), (-126, 10, 30), (-100, -40, 120)])
def test_no_flip_where_numbers_are_subnormal(powers, flush):
    model = scaled_weights(powers)
    torch.set_flush_denormal(flush)
    try:
        x = samples(model, (SIZE,))
        assert_no_flip(model, x, certified_radii(model, x), "l2")
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_inputs_do_not_count(flush):
    """A margin that hangs on inputs below the smallest normal number is gone where they are flushed to zero."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval().requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1e30, 0.0], [0.0, 1e30]]))
    x = torch.tensor([[1e-39, 0.0], [2e-38, 0.0]])
    torch.set_flush_denormal(flush)
    try:
        radii = certified_radii(model, x, torch.tensor([0, 0]))
        assert float(radii[0]) == 0.0
        assert_no_flip(model, x, radii, "l2")
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("bias", [6.0e4, 6.5e4])
def test_hidden_values_near_the_largest_float16(bias):
    """Inside the ball the hidden values must not overflow to infinity, which makes the logits NaN."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval().requires_grad_(False)
    model[0].weight.copy_(1000 * torch.eye(2))
    model[0].bias.fill_(bias)
    model[2].weight.copy_(torch.tensor([[1e-3, -1e-3], [0.0, 0.0]]))
    model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.tensor([[0.2, 0.1], [0.4, 0.0]]).half()
    radii = certified_radii(model.half(), x)
    assert_no_flip(model, x, radii, "l2")
    assert bool(executed(model, x + 10).isfinite().all()) is False
    assert bool((radii < 10).all())


@pytest.mark.parametrize("scale", [1e18, 1e19, 3e37])
@pytest.mark.parametrize("norm", NORMS)
def test_overflow_in_float32_ends_the_ball(scale, norm):
    """Far from the boundary only overflow limits the radius."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval().requires_grad_(False)
    model[0].weight.copy_(scale * torch.eye(2))
    model[2].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    model[2].bias.copy_(torch.tensor([scale, 0.0]))
    x = torch.tensor([[0.5, 0.25]])
    assert_no_flip(model, x, certified_radii(model, x, norm=norm), norm)


class Averaged(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


POOLS = [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(64), Averaged()]


@pytest.mark.parametrize("pool", POOLS, ids=["adaptive", "average", "mean"])
def test_sums_of_an_average_may_overflow_though_the_average_does_not(pool):
    model = nn.Sequential(pool, nn.Flatten(), nn.Linear(1, 2)).eval().requires_grad_(False)
    model[2].weight.copy_(torch.tensor([[1e-6], [0.0]]))
    model[2].bias.copy_(torch.tensor([1e32, 0.0]))
    x, z = torch.zeros(1, 1, 64, 64), torch.full((1, 1, 64, 64), 1.2e36)
    assert not bool(executed(model, z).isfinite().all())
    assert not bool(strictly_inside(x, z, certified_radii(model, x), "l2"))


def test_softplus_overflows_below_a_high_threshold():
    """torch computes log1p(exp(x)) up to the threshold; exp overflows at 88.7."""
    model = nn.Sequential(nn.Softplus(threshold=200.0), nn.Linear(2, 2, bias=False)).eval().requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    x, z = torch.tensor([[80.0, 80.0]]), torch.tensor([[80.0, 95.0]])
    assert not bool(executed(model, z).isfinite().all())
    with contextlib.suppress(ValueError):  # to refuse such a threshold is right too
        assert not bool(strictly_inside(x, z, certified_radii(model, x), "l2"))


ORDINARY = {
    "mlp": lambda: [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)],
    "convnet": lambda: [
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ],
}


@pytest.mark.parametrize(("name", "half"), [("mlp", 0.5), ("convnet", 0.2)])
def test_ordinary_networks_keep_their_radii(name, half):
    """What rounding takes off the radii of trained networks is next to nothing in float32, and not all in float16."""
    data = load_dataset("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*ORDINARY[name]())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train.x), data.train.y).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    x, y = data.test.x[:100], data.test.y[:100]
    kinds = ("real", "float32", "float16")
    real, single, short = (certified_radii(model, x, y, arithmetic=kind) for kind in kinds)
    right = real > 0
    assert float(right.double().mean()) >= 0.8
    assert bool((single <= real).all())
    assert float((single[right] > 0).double().mean()) >= 0.95
    assert float((single / real)[right].median()) >= 0.99
    assert float((short / real)[right].median()) >= half


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
def test_a_coarser_arithmetic_certifies_less(kind):
    model, x = NETS["ordinary"](), uniform(50, SIZE)
    y = executed(model, x).argmax(1)
    radii = {name: certified_radii(model, x, y, arithmetic=name) for name in ("real", "float64", "float32", kind)}
    assert bool((radii["float64"] <= radii["real"] * (1 + 1e-12)).all())
    assert bool((radii["float32"] <= radii["float64"]).all())
    share = {"float64": 0.999999, "float32": 0.999, "float16": 0.5, "bfloat16": 0.0}[kind]
    assert float((radii[kind] > 0).double().mean()) >= min(share, 0.9)
    assert float((radii[kind] / radii["real"]).median()) >= share
    assert math.isfinite(float(radii[kind].max()))

"""The executed network against the real one, evaluated with 400 bits: no deviation beyond its bound, no flip."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from exact import deviations, exact_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Wired, randomised, seeded
from torch import nn

from speccert.certify import Certifier, lipschitz
from speccert.models import Abs, GroupSort, Householder, MaxMin, Normalize, Residual

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPE = (2, 4, 4)


def dense(*widths, activation=nn.ReLU, bias=True):
    layers = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "dense": lambda: dense(32, 12, 8, 4),
    "without bias": lambda: dense(32, 12, 8, 4, bias=False),
    "deep": lambda: dense(32, *[8] * 12, 4, activation=MaxMin),
    "linear": lambda: dense(32, 4),
    "affine run": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 9), nn.Linear(9, 6), Abs(), nn.Linear(6, 3)),
    "conv": lambda: nn.Sequential(
        Normalize((0.4, 0.5), (0.2, 0.3)),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        MaxMin(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "circular": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(32, 3)
    ),
    "reflect": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(32, 3)
    ),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(243, 3)
    ),
    "pools": lambda: nn.Sequential(
        nn.AvgPool2d(2, 1), nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    ),
    "residual": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(32, 6),
        Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))),
        Residual(nn.Linear(6, 6)),
        nn.Linear(6, 3),
    ),
    "activation last": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 4), GroupSort(2)),
    "householder": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), Householder(8), nn.Linear(8, 3)),
    **{
        kind.__name__: lambda kind=kind: dense(32, 8, 3, activation=kind)
        for kind in (
            *(nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.LogSigmoid, nn.Tanhshrink, nn.Softsign, nn.ELU),
            *(nn.LeakyReLU, nn.Softshrink, nn.Hardtanh, nn.ReLU6),
        )
    },
}


def sharpened(model, seed):
    """Random weights, some of which make large values that cancel in the next layer."""
    model = randomised(model, seed, scale=0.5)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                size = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(torch.pow(10.0, 2 * size))
    return model


def ball(x, radius, count, seed):
    """Points of x's type within `radius` of x (rounding included): single entries, all entries, corners."""
    generator = seeded(seed)
    steps = torch.randn(count, *x.shape, generator=generator, dtype=torch.float64)
    steps[::3] = steps[::3].sign()
    steps[1::3] *= torch.rand(steps[1::3].shape, generator=generator, dtype=torch.float64) < 0.1
    lengths = steps.flatten(1).norm(dim=1).clamp_min(1e-9).reshape(-1, *[1] * x.dim())
    points = (x.double() + steps / lengths * radius * 0.99).to(x.dtype)
    distance = (points.double() - x.double()).flatten(1).norm(dim=1)
    return points[distance <= radius]


def assert_covered(model, x, arithmetic=None, radius=0.5, count=12, seed=0):
    """Every deviation of differences of logits in the ball stays within its bound; returns the largest ratio."""
    certifier = Certifier(model, tuple(x.shape[1:]), arithmetic)
    ratio = 0.0
    for sample in x:
        points = torch.cat([sample[None], ball(sample, radius, count, seed)])
        with torch.no_grad():
            found = certifier.executed.logits(points)
        apart = deviations(certifier.executed.model, found, points)
        for label in range(found.shape[1]):
            margins = certifier.margins(sample[None], torch.tensor([label]))
            allowed = (margins.lost + margins.slope * radius)[0].numpy()
            assert (apart[:, label] <= allowed).all(), f"{apart[:, label].max(0)} beyond {allowed}"
            assert (apart[0, label] <= margins.lost[0].numpy()).all()
            ratio = max(ratio, float((apart[:, label] / allowed.clip(1e-300)).max()))
            real = exact_logits(certifier.executed.model, sample[None])[0]
            assert all(float(margins.real[0, j]) <= real[label] - real[j] for j in range(len(real)) if j != label)
    return ratio


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("model", list(MODELS))
def test_no_deviation_exceeds_its_bound(model, name):
    x = (0.5 + 0.3 * torch.randn(2, *SHAPE, generator=seeded(3), dtype=torch.float64)).to(DTYPES[name])
    ratio = assert_covered(sharpened(MODELS[model](), 1).to(DTYPES[name]), x, count=6)
    if (model, name) != ("Softplus", "float64"):  # whose jump at the threshold is far above its rounding
        assert ratio > 1e-6  # of the same kind, not off by powers of ten


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("model", ["dense", "conv", "residual"])
def test_a_converted_model_too(model, name):
    x = 0.5 + 0.3 * torch.randn(2, *SHAPE, generator=seeded(3))
    assert_covered(sharpened(MODELS[model](), 1).float(), x, name, count=6)


def tiny_and_huge(scale):
    """Weights far from 1 whose product is of size 1: partial results come near the subnormal or the largest numbers."""
    model = sharpened(dense(32, 8, 8, 3), 5).double()
    with torch.no_grad():
        for layer, factor in ((model[1], scale), (model[3], 1.0), (model[5], 1 / scale)):
            layer.weight.mul_(factor)
            layer.bias.mul_(scale if layer is not model[5] else 1.0)
    return model


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("float32", 1e-36),
        ("float32", 1e-38),
        ("float32", 1e30),
        ("float64", 1e-306),
        ("float16", 1e-4),
        ("float16", 1e3),
        ("bfloat16", 1e-37),
    ],
)
def test_numbers_near_the_ends_of_the_range(name, scale):
    x = torch.rand(2, *SHAPE, generator=seeded(1), dtype=torch.float64).to(DTYPES[name])
    assert_covered(tiny_and_huge(scale).to(DTYPES[name]), x, count=6)


@pytest.mark.parametrize("scale", [1e-36, 1.0])
def test_flushed_subnormals_are_covered(scale):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        x = 1e-38 * torch.rand(2, *SHAPE, generator=seeded(1))
        model = tiny_and_huge(scale).float()
        certifier = Certifier(model, SHAPE)
        found = certifier.executed.logits(x)
        margins = certifier.margins(x, torch.tensor([0, 1]))
    finally:
        torch.set_flush_denormal(False)
    apart = deviations(model, found, x)
    assert (apart[[0, 1], [0, 1]] <= margins.lost.numpy()).all()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_large_hidden_values_that_cancel(name):
    model = sharpened(dense(32, 10, 6, 3), 2)
    with torch.no_grad():
        model[1].weight[5:] = model[1].weight[:5] * (1 + 2.0**-7)
        model[1].bias[5:] = model[1].bias[:5]
        model[1].bias += 1e4
        model[3].weight[:, 5:] = -model[3].weight[:, :5]
    x = torch.rand(2, *SHAPE, generator=seeded(1), dtype=torch.float64).to(DTYPES[name])
    assert_covered(model.to(DTYPES[name]), x, count=6)


def test_branches_concatenations_and_constants():
    def forward(m, x):
        flat = torch.flatten(x, 1)
        h = m.first(flat * 0.3 - m.shift)
        both = torch.cat([torch.relu(h), 0.7 - m.second(h)], 1)
        return m.last(both / 3.0) + m.other(flat)

    shift = torch.rand(32, generator=seeded(2))
    model = randomised(
        Wired(
            forward,
            {"shift": shift},
            first=nn.Linear(32, 6),
            second=nn.Linear(6, 4),
            last=nn.Linear(10, 3),
            other=nn.Linear(32, 3),
        )
    ).float()
    certifier = Certifier(model, SHAPE)
    x = torch.rand(40, *SHAPE, generator=seeded(3))
    with torch.no_grad():
        found = model(x).double()
        wide = copy.deepcopy(model).double()
        exact = wide(x.double())
    error = found - exact
    margins = certifier.margins(x, torch.zeros(40, dtype=torch.int64))
    assert ((error[:, :1] - error).abs() <= margins.lost + 1e-12).all()
    assert (margins.real[:, 1:] <= (exact[:, :1] - exact)[:, 1:] + 1e-13).all()
    assert (margins.lost[:, 1:] < 3e-4).all()


KINDS = st.sampled_from([nn.ReLU, MaxMin, Abs, nn.Tanh, nn.Softplus, nn.GELU, nn.LeakyReLU])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), KINDS, st.booleans()), max_size=4),
    st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
    st.integers(0, 1000),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_random_architectures(layers, name, seed, scale):
    parts, width = [nn.Flatten()], 8
    for half, kind, skip in layers:
        parts += [nn.Linear(width, 2 * half), kind()]
        width = 2 * half
        if skip:
            parts.append(Residual(nn.Sequential(nn.Linear(width, width), kind())))
    model = randomised(nn.Sequential(*parts, nn.Linear(width, 3)), seed).to(DTYPES[name])
    x = (scale * torch.randn(1, 2, 2, 2, generator=seeded(seed), dtype=torch.float64)).to(DTYPES[name])
    assert_covered(model, x, radius=scale, count=4, seed=seed)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_the_slope_is_taken_in_the_norm_of_the_ball(norm):
    model = sharpened(MODELS["dense"](), 1).float()
    x = torch.rand(5, *SHAPE, generator=seeded(4))
    certifier = Certifier(model, SHAPE, norm=norm)
    margins = certifier.margins(x)
    found = certifier.radii(margins)
    stretch = math.sqrt(32) if norm == "linf" else 1.0
    constants = certifier.bound.pairwise[margins.label]
    for row in range(5):
        others = [j for j in range(4) if j != margins.label[row]]
        pairs = [
            float((margins.real - margins.lost)[row, j] / (constants + stretch * margins.slope)[row, j]) for j in others
        ]
        assert float(found.radius[row]) == pytest.approx(max(0.0, min(pairs)), rel=1e-9)
        assert float(found.radius[row]) <= max(0.0, min(pairs)) * (1 + 1e-15)
    assert bool((found.radius <= found.real).all())


def test_a_plain_net_loses_little():
    """Usefulness: an untrained net of MNIST's size, whose margins are small, keeps 90 % of its radii in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dense(784, 128, 128, 10, activation=nn.ReLU).eval()
    x = torch.rand(20, 1, 28, 28, generator=seeded(0))
    with torch.no_grad():
        model[-1].weight *= 10
    certifier = Certifier(model, (1, 28, 28))
    found = certifier.radii(certifier.margins(x))
    assert float((1 - found.radius / found.real).median()) < 0.1


def test_rounding_on_entry_is_part_of_the_bound():
    model = dense(32, 3).float()
    x = torch.rand(3, *SHAPE, generator=seeded(0), dtype=torch.float64)
    certifier = Certifier(model.eval(), SHAPE)
    wide, narrow = certifier.margins(x), certifier.margins(x.float())
    assert bool((wide.lost > narrow.lost)[wide.lost > 0].all())
    assert bool((wide.slope >= narrow.slope).all())


def test_overflow_limits_the_radius_and_is_told():
    model = dense(32, 8, 3, bias=False).half().eval()
    with torch.no_grad():
        model[1].weight.fill_(120.0)
        model[3].weight.copy_(torch.tensor([[1.0], [-1.0], [0.0]]).expand(3, 8))
    certifier = Certifier(model, SHAPE)
    x = torch.full((1, *SHAPE), 0.5).half()
    found = certifier.radii(certifier.margins(x))
    assert bool(found.overflow.all())
    assert float(found.radius) == 0.0
    near = certifier.radii(certifier.margins(x / 16))
    assert 0 < float(near.radius) < 65504


def test_too_many_terms_for_a_half_type_have_radius_0():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    certifier = Certifier(model, SHAPE)
    x = torch.rand(4, *SHAPE, generator=seeded(0))
    certifier._errors[2] = dataclasses.replace(certifier._errors[2], h=math.inf)
    found = certifier.radii(certifier.margins(x))
    assert found.radius.tolist() == [0.0] * 4
    assert bool((found.real > 0).all())
    certifier._running[2] = dataclasses.replace(certifier._running[2], h=math.inf)
    margins = certifier.margins(x)
    assert margins.lowest.tolist() == [-math.inf] * 4
    assert certifier.radii(margins).real.tolist() == [0.0] * 4


def test_what_does_not_fit_is_refused():
    model = dense(32, 3).eval()
    certifier = Certifier(model, SHAPE)
    with pytest.raises(ValueError, match=r"expected inputs of \(2, 4, 4\), got \(1, 4, 4\)"):
        certifier.margins(torch.zeros(1, 1, 4, 4))
    other = lipschitz(dense(32, 8, 3).eval(), SHAPE)
    with pytest.raises(ValueError, match="bound: expected one computed for this very model"):
        Certifier(nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(32, 3)).eval(), SHAPE, bound=other)


@pytest.mark.parametrize("arithmetic", [None, "real"])
def test_a_layer_without_a_rounding_rule_is_refused(monkeypatch, arithmetic):
    from speccert.certify import rules

    monkeypatch.setattr(rules, "_ROUNDINGS", {k: v for k, v in rules._ROUNDINGS.items() if k is not nn.Tanh})
    model = dense(32, 4, 3, activation=nn.Tanh).eval()
    with pytest.raises(ValueError, match=r"2: no rounding rule for .*Tanh.*; give .*rounding="):
        Certifier(model, SHAPE, arithmetic)


@pytest.mark.parametrize(
    "layer",
    [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(64), Wired(lambda m, x: x.mean((2, 3), keepdim=True))],
    ids=["adaptive", "pool", "mean"],
)
def test_a_mean_whose_sum_overflows_is_outside_the_radius(layer):
    """The sum is taken before the division: 4096 numbers of 1.2e36 overflow, though their mean does not."""
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(1, 2)).eval().requires_grad_(False)
    model[2].weight.copy_(torch.tensor([[1e-6], [0.0]]))
    model[2].bias.copy_(torch.tensor([1e32, 0.0]))
    z = torch.full((1, 1, 64, 64), 1.2e36)
    assert not bool(torch.isfinite(model(z)).all())
    certifier = Certifier(model, (1, 64, 64))
    found = certifier.radii(certifier.margins(torch.zeros_like(z)))
    assert 1e35 < float(found.radius) < float(z.double().norm())
    assert bool(found.overflow)


@pytest.mark.parametrize("change", ["weights", "layers"])
def test_a_bound_of_other_weights_is_refused(change):
    model = dense(32, 8, 4).eval()
    bound = lipschitz(model, SHAPE)
    if change == "weights":
        model[1].weight.data.mul_(100)  # not seen by version counters
    else:
        model[2] = nn.Identity().eval()
    with pytest.raises(ValueError, match="expected one computed for this very model"):
        Certifier(model, SHAPE, bound=bound)


def test_bounds_of_other_shapes_norms_or_models_are_refused():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    model.eval()
    other = copy.deepcopy(model)
    other[0].weight.data.mul_(1e-3)
    with pytest.raises(ValueError, match="expected one for inputs"):
        Certifier(model, (1, 2, 2), bound=lipschitz(model, (1, 16, 16)))
    with pytest.raises(ValueError, match="expected one in l2, got one in linf"):
        Certifier(model, (1, 2, 2), bound=lipschitz(model, (1, 2, 2), norm="linf"))
    certifier = Certifier(model, (1, 2, 2))
    margins = certifier.margins(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="this very model"):
        certifier.radii(margins, lipschitz(other, (1, 2, 2), norm="linf"))
    with pytest.raises(ValueError, match="expected one for inputs"):
        certifier.radii(margins, lipschitz(model, (1, 4, 4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pool_that_sums_in_the_half_type_itself(dtype):
    """torch's 3d adaptive pool: the mean of 4096 ones is 0.5 in float16."""
    model = nn.Sequential(nn.AdaptiveAvgPool3d((2, 1, 1)), nn.Flatten(), nn.Linear(2, 2)).to(dtype).eval()
    x = torch.full((1, 1, 32, 16, 16), 1.25, dtype=dtype)
    certifier = Certifier(model, tuple(x.shape[1:]))
    assert float(certifier.radii(certifier.margins(x)).radius) == 0.0

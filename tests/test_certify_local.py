"""Local radii: nothing found by search contradicts a range, a margin or a radius, and none is below the global one."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from oracles import p_norm, random, randomised, seeded, steepest
from scipy.optimize import linprog
from torch import nn

from speccert.certify import Certifier, certified_radii, edges, local
from speccert.certify.convolution import Convolution
from speccert.certify.edges import edge
from speccert.certify.linear import Chain, Diagonal
from speccert.certify.local import _Part, local_radii
from speccert.certify.local_sdp import suits
from speccert.certify.local_slopes import Range, lines
from speccert.certify.neurons import Term
from speccert.certify.preactivations import Late
from speccert.certify.rules import Call
from speccert.certify.slopes import Slopes
from speccert.models import Abs, GroupSort, Householder, MaxMin, Normalize, Residual

NORMS = ("l2", "linf", "l1")
SHAPE = (2, 4, 4)
ORDER = {"l2": 2, "linf": math.inf, "l1": 1}


def dense(*widths, activation=nn.ReLU):
    layers = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Joined(nn.Module):
    """Skips, differences and concatenations of unlike branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(32, 4), nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        hidden = torch.relu(self.a(x))
        return self.d(torch.cat([torch.tanh(hidden - self.b(hidden.abs())), torch.relu(self.c(x))], 1))


MODELS = {
    "dense": lambda: dense(32, 12, 8, 4),
    "wide": lambda: dense(32, 40, 40, 3),
    "deep": lambda: dense(32, *[8] * 4, 4, activation=MaxMin),
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
    "groupsort": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), GroupSort(4), nn.Conv2d(8, 4, 4), GroupSort(2), nn.Flatten(), nn.Linear(4, 3)
    ),
    "residual": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(32, 6),
        Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))),
        Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU())),
        nn.Linear(6, 3),
    ),
    "joined": Joined,
    "activation last": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 4), GroupSort(2)),
    "householder": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(32, 8), Householder(8), nn.Linear(8, 8), Householder(8)
    ),
    "pool": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)
    ),
    "abs": lambda: dense(32, 8, 8, 3, activation=Abs),
    **{
        kind.__name__: lambda kind=kind: dense(32, 8, 8, 3, activation=kind)
        for kind in (
            *(nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.LogSigmoid, nn.Tanhshrink, nn.Softsign, nn.ELU),
            *(nn.LeakyReLU, nn.Softshrink, nn.Hardtanh, nn.ReLU6),
        )
    },
}


STRUCTURES = [name for name in MODELS if not name[0].isupper()]
KINDS = [name for name in MODELS if name not in STRUCTURES]
QUICK = {"Tanh", "SiLU", "LeakyReLU", "Hardtanh"}  # of the kinds; the others are slow


def case(*values, quick):
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


# all norms for the structures, one in turn for each further activation
CASES = [
    case(name, norm, quick=name == "conv" or (i + j) % 3 == 0)
    for i, name in enumerate(STRUCTURES)
    for j, norm in enumerate(NORMS)
]
CASES += [case(name, NORMS[i % 3], quick=name in QUICK) for i, name in enumerate(KINDS)]


def points(x, radius, norm, count, seed):  # -> [count, *x.shape] within the ball, most on its surface
    generator = seeded(seed)
    steps = torch.randn(count, *x.shape, generator=generator, dtype=torch.float64)
    steps[::4] = steps[::4].sign()
    steps[1::4] *= torch.rand(steps[1::4].shape, generator=generator, dtype=torch.float64) < 0.1
    steps[2::8] *= torch.rand(len(steps[2::8]), *[1] * x.dim(), generator=generator, dtype=torch.float64)
    length = p_norm(steps, norm).clamp_min(1e-9).reshape(-1, *[1] * x.dim())
    return x + steps / torch.where(torch.arange(count).reshape(length.shape) % 8 == 2, length.max(), length) * radius


def attacked(model, x, label, radius, norm, steps=15):  # -> the smallest margin that ascent finds in the ball
    start = points(x, radius, norm, 24, 3)
    found = start.clone()
    least = math.inf
    for step in range(steps):
        found.requires_grad_()
        logits = model(found)
        others = logits.clone()
        others[:, label] = -math.inf
        margin = logits[:, label] - others.amax(1)
        least = min(least, float(margin.detach().min()))
        (gradient,) = torch.autograd.grad(margin.sum(), found)
        offset = found.detach() - x - radius * (1 - step / steps) * steepest(gradient, norm)
        length = p_norm(offset, norm).clamp_min(1e-30).reshape(-1, *[1] * x.dim())
        found = x + offset * (radius / length).clamp_max(1.0)
    return least


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_no_margin_in_a_ball_falls_further_than_its_bound(name, norm):
    model = randomised(MODELS[name](), 1, 0.4).double()
    x = 0.5 + 0.3 * random(3, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE, "real", norm=norm)
    part = _Part.of(certifier, certifier.bound, 60.0)
    label = model(x).argmax(1)
    for size in (1e-3, 0.3, 5.0):
        radius = torch.full((3,), size / {"l2": 1, "linf": 5, "l1": 0.3}[norm], dtype=torch.float64)
        fixed, slope = part.falls(part.region(part.centre(x), radius), label)
        for i, sample in enumerate(x):
            others = points(sample, float(radius[i]), norm, 200, 4)
            with torch.no_grad():
                change = model(others) - model(sample[None])
            fall = change - change[:, label[i], None]
            distance = p_norm(others - sample, norm)[:, None]
            assert bool((fall <= (fixed[i] + slope[i] * distance) * (1 + 1e-9) + 1e-9).all())
            assert bool((fixed >= 0).all())


@pytest.mark.parametrize(
    "name",
    [
        case(name, quick=name in {*QUICK, *STRUCTURES})
        for name in MODELS
        if name not in ("groupsort", "activation last")
    ],
)
def test_no_pair_changes_faster_than_its_constant_over_a_ball(name):
    model = randomised(MODELS[name](), 1, 0.4).double()
    x = 0.5 + 0.3 * random(2, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE, "real")
    part = _Part.of(certifier, certifier.bound, 60.0)
    label = model(x).argmax(1)
    assert suits(part.enclosure)
    for size in (1e-3, 0.3, 5.0):
        region = part.region(part.centre(x), torch.full((2,), size, dtype=torch.float64))
        for i, sample in enumerate(x):
            rivals = [j for j in range(part.classes) if j != label[i]]
            slope = part.slopes(region, i, int(label[i]), rivals, {})
            others = torch.cat([points(sample, size, "l2", 200, 4), ascended(model, sample, size)])
            with torch.no_grad():
                change = model(others) - model(sample[None])
            fall = change - change[:, label[i], None]
            distance = p_norm(others - sample, "l2")[:, None].clamp_min(1e-9)
            assert bool((fall[:, rivals].abs() <= slope[rivals] * distance * (1 + 1e-9) + 1e-9).all())
            assert bool((slope[rivals] < math.inf).all())


def ascended(model, x, radius):  # -> points of the ball's surface that change one pair far
    found = points(x, radius, "l2", 16, 5)
    for _ in range(15):
        found.requires_grad_()
        logits = model(found)
        (gradient,) = torch.autograd.grad((logits.amax(1) - logits.amin(1)).sum(), found)
        offset = found.detach() - x + radius * steepest(gradient, "l2")
        found = x + offset * (radius / p_norm(offset, "l2").clamp_min(1e-30)).reshape(-1, *[1] * x.dim())
    return found


@pytest.mark.parametrize(("name", "norm"), [one for one in CASES if one.values[1] != "l1" or one.values[0] == "conv"])
def test_no_attack_reaches_inside_a_radius(name, norm):
    model = randomised(MODELS[name](), 3, 0.4).double().requires_grad_(False)
    x = 0.5 + 0.3 * random(2, *SHAPE, seed=3)
    certifier = Certifier(model, SHAPE, norm=norm)
    margins = certifier.margins(x)
    found, whole = local_radii(certifier, x, margins, steps=4), certifier.radii(margins)
    assert bool((found.radius >= whole.radius).all())
    assert bool((found.real >= found.radius).all())
    for i, sample in enumerate(x):
        least = attacked(model, sample, int(margins.label[i]), float(found.radius[i]), norm)
        assert least > -1e-9


def test_balls_of_one_linear_piece_have_the_distance_to_the_nearest_boundary():
    """A ReLU net whose ball stays in one piece: the radius is the closed form."""
    model = randomised(dense(32, 12, 8, 4), 0, 0.4).double().requires_grad_(False)
    with torch.no_grad():
        model[1].bias += 100.0
        model[3].bias += 100.0 * model[1].weight.abs().sum()
        model[5].bias -= model(torch.zeros(1, *SHAPE, dtype=torch.float64))[0]
    x = 0.1 * random(5, *SHAPE, seed=1)
    certifier = Certifier(model, SHAPE, "real")
    margins = certifier.margins(x)
    found = local_radii(certifier, x, margins)
    rows = model[5].weight @ model[3].weight @ model[1].weight
    for i, label in enumerate(margins.label.tolist()):
        logits = model(x[i : i + 1])[0]
        exact = min(float((logits[label] - logits[j]) / (rows[label] - rows[j]).norm()) for j in range(4) if j != label)
        assert exact * (1 - 1e-6) <= float(found.radius[i]) <= exact


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [nn.ReLU, MaxMin, nn.Tanh, lambda: Householder(8)])
@pytest.mark.parametrize("seed", [0, case(1, quick=False)])
def test_no_point_of_a_grid_inside_a_radius_is_classified_otherwise(kind, norm, seed):
    """Two inputs: the ball is filled densely, surface included."""
    axis = torch.linspace(-1, 1, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    length = p_norm(grid, norm)
    grid = torch.cat([grid[length <= 1], grid[length > 0] / length[length > 0][:, None]])
    layers = [nn.Linear(2, 8), kind(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = randomised(nn.Sequential(*layers), seed, 0.6).double().requires_grad_(False)
    x = random(4, 2, seed=seed)
    certifier = Certifier(model, (2,), norm=norm)
    margins = certifier.margins(x)
    found = local_radii(certifier, x, margins)
    for i, label in enumerate(margins.label.tolist()):
        if 0 < float(found.radius[i]) < 1e6:
            logits = model(x[i] + grid * float(found.radius[i]))
            assert bool((logits[:, label, None] - logits >= -1e-9 * logits.abs().max()).all())


def distance_to_boundary(model, x, label):
    """The exact l-infinity distance to a tie of a one-layer ReLU net, by a linear program a pattern of its neurons."""
    first, last = model[0], model[2]
    w, b, v, c = (p.numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    least = math.inf
    for pattern in itertools.product((0.0, 1.0), repeat=len(b)):
        signs = 2 * np.array(pattern) - 1
        for j in range(len(c)):
            if j == label:
                continue
            row = (v[label] - v[j]) * pattern
            # variables: the point and the distance
            upper = [np.r_[-s * w_i, 0.0] for s, w_i in zip(signs, w, strict=True)] + [np.r_[row @ w, 0.0]]
            limits = [*(signs * b), -(row @ b + c[label] - c[j])]
            for axis in range(len(x)):
                for sign in (1.0, -1.0):
                    unit = np.zeros(len(x) + 1)
                    unit[axis], unit[-1] = sign, -1.0
                    upper.append(unit)
                    limits.append(sign * float(x[axis]))
            found = linprog(np.r_[np.zeros(len(x)), 1.0], np.array(upper), limits, bounds=(None, None))
            if found.status == 0:
                least = min(least, found.fun)
    return least


@pytest.mark.parametrize("seed", range(2))
def test_radii_stay_below_the_exact_distance(seed):
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), seed, 0.7).double()
    model.requires_grad_(False)
    x = random(2, 3, seed=seed)
    certifier = Certifier(model, (3,), "real", norm="linf")
    margins = certifier.margins(x)
    found = local_radii(certifier, x, margins).radius
    whole = certifier.radii(margins).radius
    for i, label in enumerate(margins.label.tolist()):
        exact = distance_to_boundary(model, x[i].numpy(), label)
        assert float(found[i]) <= exact * (1 + 1e-7)
        assert float(found[i]) >= min(0.3 * exact, 1.3 * float(whole[i]))  # and of their size


def test_slopes_and_lines_enclose_every_activation():
    """Differences from the centre at points of the range, for all kinds, narrow and wide ranges, errors included."""
    kinds = [name for name in MODELS if name[0].isupper()] + ["dense", "abs", "householder"]
    generator = seeded(0)
    for name in kinds:
        model = randomised(MODELS[name](), 1).double()
        certifier = Certifier(model, SHAPE, "real")
        part = _Part.of(certifier, certifier.bound, 60.0)
        slopes, call = part.enclosure.activation(0)
        centre = 3 * torch.randn(1, 1000, generator=generator, dtype=torch.float64)
        width = 10 ** (6 * torch.rand(2, 1, 1000, generator=generator, dtype=torch.float64) - 4)
        error = torch.tensor([[1e-3]], dtype=torch.float64)
        drawn = lines(slopes, call, (1000,), Range(centre, error, -width[0], width[1]))
        psi = {"householder": lambda u: 2 * u.clamp(max=0), "dense": torch.relu, "abs": torch.abs}.get(name)
        psi = getattr(nn, name)() if psi is None else psi
        for share in torch.linspace(0, 1, 13, dtype=torch.float64):
            for off in (-1e-3, 0.0, 1e-3):
                t = -width[0] * (1 - share) + width[1] * share
                change = psi(centre + off + t) - psi(centre + off)
                room = 1e-12 * (1 + centre.abs() + width.sum(0))
                assert bool((change <= drawn.high_slope * t + drawn.high + room).all()), name
                assert bool((change >= drawn.low_slope * t + drawn.low - room).all()), name
                assert bool(((change <= drawn.most + room) & (change >= drawn.least - room)).all()), name
                middle, half = drawn.cone
                assert bool(((change - middle * t).abs() <= half * t.abs() + room).all()), name


def test_budget_and_steps_only_cost_radius():
    model = randomised(MODELS["dense"](), 2).double()
    x = random(4, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE)
    margins = certifier.margins(x)
    whole, nothing = certifier.radii(margins), local_radii(certifier, x, margins, budget=0.0)
    assert torch.equal(nothing.radius, whole.radius)
    assert set(nothing.method) == {"global"}
    few, more = (local_radii(certifier, x, margins, steps=steps).radius for steps in (1, 8))
    assert bool((whole.radius <= few).all())
    assert bool((few <= more * (1 + 1e-12)).all())


@pytest.mark.parametrize("value", [{"steps": 0}, {"budget": -1.0}, {"budget": math.nan}])
def test_steps_and_seconds_that_make_no_sense_are_refused(value):
    certifier = Certifier(randomised(MODELS["dense"](), 2).double(), SHAPE)
    x = random(2, *SHAPE, seed=2)
    with pytest.raises(ValueError, match=f"^{next(iter(value))}: expected"):
        local_radii(certifier, x, certifier.margins(x), **value)


@pytest.mark.parametrize("kind", ["clamp", "softshrink"])
def test_functions_whose_ends_are_unknown_take_their_slopes_of_the_whole_line(kind):
    numbers = Range(*(torch.tensor([[v]], dtype=torch.float64) for v in (0.0, 0.0, -1.0, 1.0)))
    drawn = lines(Slopes(kind, 0.0, 1.0), Call("here", None, (), {}, (1,), (1,)), (1,), numbers)
    assert (float(drawn.slope_low), float(drawn.slope_high)) == (0.0, 1.0)


def test_misclassified_samples_keep_a_radius_of_zero():
    model = randomised(MODELS["dense"](), 2).double()
    x = random(4, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE)
    wrong = (certifier.margins(x).prediction + 1) % 4
    found = local_radii(certifier, x, certifier.margins(x, wrong))
    assert bool((found.radius == 0).all())
    assert bool((found.real == 0).all())


def test_margins_of_other_samples_or_networks_are_refused():
    certifier = Certifier(randomised(MODELS["dense"](), 2).double(), SHAPE)
    x = random(4, *SHAPE).float().double()
    margins = certifier.margins(x)
    with pytest.raises(ValueError, match="expected the 4 samples"):
        local_radii(certifier, x[:3], margins)
    for other in (x.flip(0), x + 1e-15, 0 * x):
        with pytest.raises(ValueError, match=r"^margins: expected those of these samples[^\n]*$"):
            local_radii(certifier, other, margins)
    another = Certifier(randomised(MODELS["dense"](), 3).double(), SHAPE)
    with pytest.raises(ValueError, match="by this certifier"):
        local_radii(another, x, margins)
    assert len(local_radii(certifier, x.float(), margins, budget=0.0).radius) == 4  # the same numbers


def test_the_first_ball_can_gain():
    model = randomised(MODELS["dense"](), 2).double()
    x = random(4, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE, norm="linf")
    margins = certifier.margins(x)
    found, whole = local_radii(certifier, x, margins, steps=1), certifier.radii(margins)
    assert bool((found.radius > whole.radius * 1.2).all())
    assert set(found.method) == {"crown"}


def test_budget_is_kept_with_many_classes():
    model = randomised(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1000)), 2)
    x = random(256, 20, seed=2)
    certifier = Certifier(model, (20,))
    margins = certifier.margins(x)
    begun = time.process_time()
    found = local_radii(certifier, x, margins, budget=0.5)
    assert time.process_time() - begun < 0.5 * 1.2 + 2
    assert bool((found.radius >= certifier.radii(margins).radius).all())


def test_pairs_in_pieces_fall_alike(monkeypatch):
    model = randomised(MODELS["dense"](), 2).double()
    x = random(3, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE)
    part, label = _Part.of(certifier, certifier.bound, 60.0), model(x).argmax(1)
    region = part.region(part.centre(x), torch.full((3,), 0.3, dtype=torch.float64))
    whole = part.falls(region, label)
    monkeypatch.setattr(local, "_ENTRIES", 1)
    for piece, one in zip(part.falls(region, label), whole, strict=True):
        torch.testing.assert_close(piece, one, rtol=1e-12, atol=1e-15)


def test_setting_up_needs_no_row_of_a_large_map(monkeypatch):
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16 * 16, 10)),
    )
    certifier = Certifier(randomised(model, 1), (3, 32, 32))
    rows, adjoint = [], Convolution.adjoint
    monkeypatch.setattr(Convolution, "adjoint", lambda self, y: rows.append(len(y)) or adjoint(self, y))
    part = _Part.of(certifier, certifier.bound, 1e6)
    assert part.enclosure.sizes == (3072, 16384, 2048)
    assert sum(rows) < 100  # a few for the lower ends of norms


def test_late_bounds_stop_within_their_work():
    certifier = Certifier(randomised(MODELS["dense"](), 2).double(), SHAPE)
    part = _Part.of(certifier, certifier.bound, 60.0)
    centre, radius = part.centre(random(2, *SHAPE)), torch.ones(2, dtype=torch.float64)
    region = part.region(centre, radius)
    part.enclosure.deadline = 0.0
    for work in (lambda: part.region(centre, radius), lambda: part.falls(region, torch.tensor([0, 1]))):
        with pytest.raises(Late):
            work()
    assert bool((part.slopes(region, 0, 0, [1, 2], {}) == math.inf).all())


CONVOLUTIONS = {
    "plain": lambda w: Convolution(w, (2, 5, 6), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "strided": lambda w: Convolution(w, (2, 5, 6), (2, 1), ((1, 0), (2, 2)), (1, 2)),
    "groups": lambda w: Convolution(w[:, :1], (2, 5, 6), (1, 1), ((0, 0), (1, 1)), (1, 1), groups=2),
    "circular": lambda w: Convolution(w, (2, 5, 6), (1, 1), ((1, 1), (1, 1)), (1, 1), padding_mode="circular"),
    "reflected": lambda w: Convolution(w, (2, 5, 6), (1, 1), ((1, 1), (1, 1)), (1, 1), padding_mode="reflect"),
    "scaled": lambda w: Chain((Diagonal(random(6), (2, 5, 6)), CONVOLUTIONS["plain"](w))),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("scale", [1.0, 1e-170])
def test_row_norms_without_rows_are_never_below_those_of_the_rows(name, norm, scale, monkeypatch):
    linear = CONVOLUTIONS[name](scale * random(4, 2, 3, 3))
    own = linear.apply(torch.eye(60, dtype=torch.float64).reshape(60, 2, 5, 6)).flatten(1).T.numpy() / scale
    exact = {"l2": np.linalg.norm(own, axis=1), "linf": abs(own).sum(1), "l1": abs(own).max(1)}[norm]
    monkeypatch.setattr(edges, "_HELD", 0)
    found = edge(Term(0, linear), 60, norm)
    assert found.matrix is None
    rows = found.rows.numpy() / scale
    assert (rows >= exact * (1 - 1e-14)).all()
    if name in ("plain", "strided", "groups") and (norm == "linf" or (norm == "l2" and scale == 1.0)):
        assert (rows <= exact * (1 + 1e-9)).all()


@pytest.mark.parametrize("share", [1e-3, 1e-7, 1e-12])
def test_a_crossed_kink_is_never_exactly_linear(share):
    """Slopes so close that their secants round to one of them."""
    model = dense(4, 4, 2, activation=lambda: nn.LeakyReLU(1 - 1e-9)).double().eval()
    certifier = Certifier(model, (4,), "real")
    slopes, call = _Part.of(certifier, certifier.bound, 60.0).enclosure.activation(0)
    centre, error = torch.tensor([[1.0, -1.0, 0.0, 1.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    low = torch.tensor([[-1 - share, -1.0, -share, math.nan]], dtype=torch.float64)
    high = torch.tensor([[1.0, 1 + share, 1.0, 1.0]], dtype=torch.float64)
    drawn = lines(slopes, call, (4,), Range(centre, error, low, high))
    assert bool((drawn.cone[1] > 0).all())
    away = Range(centre[:, :2], error, low[:, :2] + 1.5 * share + 1e-3, high[:, :2] - 1.5 * share - 1e-3)
    assert bool((lines(slopes, call, (2,), away).cone[1] == 0).all())


@pytest.mark.parametrize("scale", [1e-150, case(1e-30, quick=False), case(1e30, quick=False), 1e150])
def test_extreme_scales_prove_less_but_nothing_wrong(scale):
    model = randomised(MODELS["dense"](), 2).double()
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.mul_(scale)
        model[3].weight.mul_(1 / scale)
    x = random(4, *SHAPE, seed=2)
    certifier = Certifier(model, SHAPE, "real")
    margins = certifier.margins(x)
    found = local_radii(certifier, x, margins)
    for i, sample in enumerate(x):
        assert (
            attacked(model.requires_grad_(False), sample, int(margins.label[i]), float(found.radius[i]), "l2") > -1e-9
        )


def test_certified_radii_offers_the_method():
    model = randomised(MODELS["dense"](), 2).double()
    x = random(3, *SHAPE, seed=2)
    local = certified_radii(model, x, method="local", budget=5.0)
    assert bool((local >= certified_radii(model, x)).all())
    assert bool((local > certified_radii(model, x)).any())

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speccert.experiments.losses import LOSSES, build_loss

EPS, TEMPERATURE, OFFSET = 0.3, 0.25, 0.1


def problem(seed=0, batch=6, classes=4, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=dtype)
    y = torch.randint(classes, (batch,), generator=generator)
    half = torch.rand(classes, classes, generator=generator, dtype=dtype) + 0.2
    return logits, y, (half + half.T).fill_diagonal_(0.0)


def soft_maximum(z, y):
    """T log sum_j exp((z_j - z_y) / T), plainly."""
    return TEMPERATURE * math.log(sum(math.exp((value - z[y]) / TEMPERATURE) for value in z))


def cross_entropy(f, y, constants):
    return soft_maximum(f, y)


def offset_ce(f, y, constants):
    return soft_maximum([f[j] + (j != y) * (EPS * constants[y, j] + OFFSET) for j in range(len(f))], y)


def emma(f, y, constants):
    z = []
    for j in range(len(f)):
        reach = 0.0 if j == y else min(max((f[y] - f[j]) / constants[y, j], EPS / 100), EPS) * constants[y, j] + OFFSET
        z.append(f[j] + reach)
    return soft_maximum(z, y)


def gloro(f, y, constants):
    p = int(np.argmax(f))
    bottom = max(f[j] + EPS * constants[p, j] + OFFSET for j in range(len(f)) if j != p)
    return soft_maximum([*f, bottom], y)


def margin(f, y, constants):
    radii = [(f[y] - f[j]) / constants[y, j] for j in range(len(f)) if j != y]
    return sum(TEMPERATURE * math.log1p(math.exp((EPS + OFFSET - radius) / TEMPERATURE)) for radius in radii)


ORACLES = {"cross-entropy": cross_entropy, "margin": margin, "offset-ce": offset_ce, "gloro": gloro, "emma": emma}


def build(name):
    return build_loss(name, eps=EPS, temperature=TEMPERATURE, offset=OFFSET)


def test_every_loss_has_an_oracle():
    assert ORACLES.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", range(5))
def test_loss_is_its_formula(name, seed):
    logits, y, constants = problem(seed)
    expected = np.mean([ORACLES[name](f, t, constants.numpy()) for f, t in zip(logits.numpy(), y.numpy(), strict=True)])
    assert build(name)(logits, y, constants).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ORACLES)
def test_gradient_is_right(name):
    logits, y, constants = problem()
    constants.fill_diagonal_(1.0)  # the entries of the class itself must not matter
    inputs = (logits.requires_grad_(), constants.requires_grad_())
    if name == "emma":  # holds its radii constant, so compare with the formula that has them as numbers
        gaps = (logits.gather(1, y[:, None]) - logits).detach()
        eps = (gaps / constants.detach()[y]).clamp(EPS / 100, EPS)
        own = torch.nn.functional.one_hot(y, 4).bool()

        def reference(f, c):
            slack = (eps * c[y] + OFFSET).masked_fill(own, 0.0)
            return TEMPERATURE * torch.nn.functional.cross_entropy((f + slack) / TEMPERATURE, y)

        found = torch.autograd.grad(build(name)(logits, y, constants), inputs)
        torch.testing.assert_close(found, torch.autograd.grad(reference(*inputs), inputs))
        return
    assert torch.autograd.gradcheck(lambda f, c: build(name)(f, y, c), inputs)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_offset_ce_bounds_the_loss_of_every_reachable_logit_vector(seed):
    """With f_j - f_y moved by at most eps L[y, j], the plain loss is at most the offset one."""
    logits, y, constants = problem(seed)
    shift = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) * EPS * constants[y]
    plain = build_loss("cross-entropy", temperature=TEMPERATURE)(logits + shift, y)
    assert plain <= build_loss("offset-ce", eps=EPS, temperature=TEMPERATURE)(logits, y, constants) + 1e-12


@pytest.mark.parametrize("name", ["offset-ce", "emma", "margin"])
def test_a_low_temperature_gives_the_hinge(name):
    logits, y, constants = problem()
    loss = build_loss(name, eps=EPS, temperature=1e-5)(logits, y, constants)
    expected = []
    for f, t in zip(logits.numpy(), y.numpy(), strict=True):
        others = [j for j in range(4) if j != t]
        gaps, reach = np.array([f[t] - f[j] for j in others]), np.array([constants[t, j].item() for j in others])
        if name == "margin":
            expected.append(np.maximum(EPS - gaps / reach, 0).sum())
        else:
            eps = EPS if name == "offset-ce" else np.clip(gaps / reach, EPS / 100, EPS)
            expected.append(max((eps * reach - gaps).max(), 0.0))
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_without_eps_and_offset_the_cross_entropy_family_agrees(name):
    logits, y, _ = problem()
    loss = build_loss(name, temperature=TEMPERATURE)
    if name in ("offset-ce", "emma"):
        plain = build_loss("cross-entropy", temperature=TEMPERATURE)
        assert loss(logits, y, None).item() == plain(logits, y).item()
    assert loss.needs_bound == (name == "margin")
    assert build(name).needs_bound == (name != "cross-entropy")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e18])
def test_float32_stays_finite_and_near_float64(name, scale):
    logits, y, constants = problem(scale=scale)
    exact = build(name)(logits, y, constants)
    single = logits.float().requires_grad_()
    loss = build(name)(single, y, constants.float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)
    assert single.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("place", range(4))
def test_nan_is_never_hidden(name, place):
    logits, y, constants = problem()
    logits[2, place] = math.nan
    assert build(name)(logits, y, constants).isnan()


@pytest.mark.parametrize("name", ["margin", "offset-ce", "emma"])
def test_nan_in_the_bound_is_never_hidden(name):
    logits, y, constants = problem()
    constants[y[0], (y[0] + 1) % 4] = math.nan
    assert build(name)(logits, y, constants).isnan()


@pytest.mark.parametrize("name", ["margin", "offset-ce", "gloro", "emma"])
def test_a_missing_bound_is_an_error_not_a_guess(name):
    logits, y, _ = problem()
    with pytest.raises(ValueError, match=f"the loss {name} with eps=0.3 needs the pairwise Lipschitz constants"):
        build(name)(logits, y, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "hinge"}, "unknown loss 'hinge'; allowed: cross-entropy, margin, offset-ce, gloro, emma"),
        ({"eps": -0.1}, "eps must be finite and at least 0, got -0.1"),
        ({"eps": math.nan}, "eps must be finite"),
        ({"offset": math.inf}, "offset must be finite"),
        ({"temperature": 0.0}, "temperature must be finite and greater than 0, got 0"),
    ],
)
def test_bad_settings_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        build_loss(**{"name": "emma", "eps": 0.1, **change})


@pytest.mark.parametrize("name", LOSSES)
def test_bad_shapes_are_refused(name):
    logits, y, constants = problem()
    with pytest.raises(ValueError, match=r"expected logits B x K and labels B, got \(6, 4\) and \(5,\)"):
        build(name)(logits, y[:5], constants)
    with pytest.raises(ValueError, match=r"expected pairwise constants 4 x 4, got \(3, 3\)"):
        build(name)(logits, y, constants[:3, :3])

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from flint import acb, acb_mat, arb, fmpq
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random

from speccert.certify import grams, torus
from speccert.certify.grams import Grams, scaled_weight, stride_one
from speccert.certify.torus import torus_norm


def grams_of(weight, groups, dilation, sides):
    scaled, scale = scaled_weight(weight)
    kernel, units = stride_one(scaled.reshape(groups, -1, *scaled.shape[1:]), [stride for _, stride in sides], dilation)
    return Grams.of(kernel, units, [side // stride for side, stride in sides]), scale


def block_in_balls(weight, dilation, axes, base):
    """The frequency block [c_out, c_in * aliases] of one group, by its definition, in Arb balls of 128 bits."""
    c_out, c_in = weight.shape[:2]
    rows = [[] for _ in range(c_out)]
    for alias in itertools.product(*(range(stride) for _, stride, _ in axes)):
        turns = [
            fmpq(2 * b + int(2 * twist), 2 * side) + fmpq(a, stride)
            for b, a, (side, stride, twist) in zip(base, alias, axes, strict=True)
        ]
        for o, i in itertools.product(range(c_out), range(c_in)):
            total = acb(0)
            for tap in itertools.product(*map(range, weight.shape[2:])):
                angle = 2 * sum((f * t * d for f, t, d in zip(turns, tap, dilation, strict=True)), fmpq(0))
                phase = acb(arb.cos_pi_fmpq(angle), arb.sin_pi_fmpq(angle))
                total += acb(arb(float(weight[(o, i, *tap)]))) * phase
            rows[o].append(total)
    return acb_mat(rows)


def proved_too_small(block, bound, aliases):
    """Whether ||block|| / sqrt(aliases) > bound for sure: ||block v||^2 > bound^2 aliases ||v||^2 in balls."""
    middle = np.array([[complex(entry.mid()) for entry in row] for row in block.tolist()])
    vector = np.linalg.svd(middle)[2][0].conj()
    exact = acb_mat([[acb(arb(float(z.real)), arb(float(z.imag)))] for z in vector])
    size = sum((abs(entry) ** 2 for (entry,) in exact.tolist()), arb(0))
    image = sum((abs(entry) ** 2 for (entry,) in (block * exact).tolist()), arb(0))
    return bool(image > arb(bound) ** 2 * aliases * size)


def bases(axes):
    return itertools.product(*(range(side // stride) for side, stride, _ in axes))


SMALL = [  # shape, groups, dilation, sides
    ((3, 2, 3, 3), 1, (1, 1), ((4, 1), (5, 1))),
    ((2, 3, 3, 3), 1, (1, 1), ((4, 1), (3, 1))),
    ((3, 2, 4, 4), 1, (1, 1), ((6, 2), (4, 2))),
    ((9, 1, 3, 2), 1, (1, 1), ((6, 2), (4, 2))),
    ((2, 2, 2, 3), 1, (2, 3), ((6, 1), (8, 2))),
    ((2, 2, 1, 1), 1, (1, 1), ((4, 1), (6, 3))),
    ((2, 3, 5), 1, (1,), ((7, 1),)),
    ((2, 1, 2, 2, 2), 1, (1, 1, 1), ((2, 1), (3, 1), (4, 2))),
]
KERNELS = {
    "random": lambda shape: random(*shape, seed=1),
    "rank one": lambda shape: torch.ones(shape, dtype=torch.float64),
    "large": lambda shape: 1e30 * random(*shape, seed=2),
    "tiny": lambda shape: 1e-30 * random(*shape, seed=3),
    "largest": lambda shape: 1e305 * random(*shape, seed=4).clamp(-1, 1),
    "float32 denormals": lambda shape: (1e-41 * random(*shape, seed=5)).float().double(),
    "float64 denormals": lambda shape: 1e-318 * random(*shape, seed=6),
    "all magnitudes": lambda shape: 10 ** (60 * random(*shape, seed=7)),
    "cancelling": lambda shape: random(1, *shape[1:], seed=8).expand(shape) + 1e-9 * random(*shape, seed=9),
}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(("shape", "groups", "dilation", "sides"), SMALL)
def test_no_block_on_the_torus_exceeds_the_bound_in_ball_arithmetic(shape, groups, dilation, sides, kind):
    weight = KERNELS[kind](shape)
    for twisted in (False, True):
        found = torus_norm(weight, groups, dilation, sides, twisted=twisted)
        blocks = [block_in_balls(weight, dilation, found.axes, base) for base in bases(found.axes)]
        aliases = math.prod(stride for _, stride in sides)
        assert not any(proved_too_small(block, found.upper, aliases) for block in blocks)
        below = found.upper * (1 - 1e-8) if found.upper > 1e-300 else 0.9 * found.upper
        assert any(proved_too_small(block, below, aliases) for block in blocks)


@pytest.mark.parametrize("twisted", [False, True])
def test_the_least_twist_is_named(twisted):
    weight = torch.ones(2, 2, 3, 3, dtype=torch.float64)
    found = torus_norm(weight, 1, (1, 1), ((8, 1), (10, 1)), twisted=twisted)
    expected = 0.5 if twisted else 0.0  # the all-ones kernel peaks at frequency 0
    assert found.axes == ((8, 1, expected), (10, 1, expected))
    exact = 2 * math.prod(1 + 2 * math.cos(2 * math.pi * expected / side) for side in (8, 10))
    assert exact <= found.upper <= exact * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bound_holds_for_drawn_kernels(data):
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 2))
    strides = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    sides = [(stride * data.draw(st.integers(1, 3)), stride) for stride in strides]
    dilation = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    shape = [groups * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))]
    shape += [data.draw(st.integers(1, 3)) for _ in range(dims)]
    powers = st.floats(-40, 40) if data.draw(st.booleans()) else st.just(0.0)
    entries = data.draw(st.lists(st.tuples(st.floats(-1, 1), powers), min_size=1, max_size=12))
    values = [number * 10**power for number, power in entries]
    count = math.prod(shape)
    weight = torch.tensor((values * count)[:count], dtype=torch.float64).reshape(shape)
    found = torus_norm(weight, groups, dilation, sides, twisted=data.draw(st.booleans()))
    aliases = math.prod(strides)
    for group in weight.chunk(groups):
        for base in bases(found.axes):
            assert not proved_too_small(block_in_balls(group, dilation, found.axes, base), found.upper, aliases)


@pytest.mark.parametrize("kind", ["random", "rank one", "all magnitudes", "cancelling"])
@pytest.mark.parametrize(("shape", "sides"), [((4, 5, 3, 3), ((7, 1), (6, 1))), ((6, 2, 4, 4), ((8, 2), (6, 2)))])
def test_rounding_of_a_gram_matrix_is_within_its_bound(kind, shape, sides):
    """Against extended precision: twice the digits of float32, three more than float64."""
    family, scale = grams_of(KERNELS[kind](shape), 1, (1, 1), sides)
    frequencies = family.frequencies((0.5, 0.0))
    phases = family.phases(frequencies)
    weight = (KERNELS[kind](shape) * scale).numpy().astype(np.longdouble)
    for dtype in (torch.complex64, torch.complex128):
        blocks = family.blocks(phases, dtype)[:, 0].numpy()
        for block, frequency in zip(blocks, frequencies.tolist(), strict=True):
            exact = long_gram(weight, frequency, sides)
            lower = np.tril(block) + np.tril(block, -1).conj().T
            error = np.linalg.norm((lower - exact).astype(complex), 2)
            assert error <= family.error(dtype) <= 1e-4


def long_gram(weight, frequency, sides):
    """The Gram matrix on the outputs' side, from all aliases, in extended precision."""
    pi = np.longdouble("3.14159265358979323846264338327950288")
    rows = []
    for alias in itertools.product(*(range(stride) for _, stride in sides)):
        angles = [pi * (f + 2 * a * (n // s)) / n for f, a, (n, s) in zip(frequency, alias, sides, strict=True)]
        first, second = (np.exp(1j * a * np.arange(k)) for a, k in zip(angles, weight.shape[2:], strict=True))
        rows.append(np.einsum("oiyx,y,x->oi", weight, first, second))
    symbol = np.concatenate(rows, 1) / np.sqrt(np.longdouble(len(rows)))
    return symbol @ symbol.conj().T


@pytest.mark.parametrize("kind", KERNELS)
def test_frobenius_norms_are_upper_bounds(kind):
    family, _ = grams_of(KERNELS[kind]((4, 3, 3, 3)), 2, (1, 1), ((5, 1), (6, 1)))
    frequencies = family.frequencies((0.0, 0.5))
    exact = torch.linalg.matrix_norm(family.blocks(family.phases(frequencies), torch.complex128))
    bound = family.frobenius(frequencies)
    assert bool((bound >= exact * (1 - 1e-12)).all())
    assert bool((bound <= exact * (1 + 1e-6) + 1e-6).all())


LAYERS = [
    ((12, 10, 3, 3), 1, ((9, 1), (8, 1))),
    ((12, 5, 4, 4), 2, ((8, 2), (10, 2))),
    ((8, 1, 3, 3), 8, ((9, 1), (8, 1))),
]


@pytest.mark.parametrize(("shape", "groups", "sides"), LAYERS)
def test_chunks_change_nothing_but_memory(shape, groups, sides, monkeypatch):
    weight = random(*shape)
    whole = torus_norm(weight, groups, (1, 1), sides, twisted=True)
    for name in ("_CHUNK_ENTRIES", "_LARGE_ENTRIES", "_PHASE_ENTRIES"):
        monkeypatch.setattr(grams, name, 1)
    parts = torus_norm(weight, groups, (1, 1), sides, twisted=True)
    assert parts.axes == whole.axes
    assert parts.upper == pytest.approx(whole.upper, rel=1e-9)


def exact_on(axes, weight, groups):
    blocks = [block_in_balls(group, (1, 1), axes, base) for group in weight.chunk(groups) for base in bases(axes)]
    aliases = math.prod(stride for _, stride, _ in axes)
    return (
        max(np.linalg.norm([[complex(z.mid()) for z in row] for row in b.tolist()], 2) for b in blocks) / aliases**0.5
    )


@pytest.mark.parametrize(("shape", "groups", "sides"), LAYERS)
def test_bound_does_not_rest_on_estimates(shape, groups, sides, monkeypatch):
    """Wrong guesses of the largest eigenvalue cost time or tightness, never the proof."""
    weight = random(*shape, seed=3)
    exact = exact_on(tuple((side, stride, 0.0) for side, stride in sides), weight, groups)
    sampled, solved = torus._sampled, torch.linalg.eigvalsh
    for factor in (0.0, 0.5, 0.999, 1.001, 2.0):
        monkeypatch.setattr(torus, "_sampled", lambda *a, f=factor: max(f * sampled(*a), 1e-12))
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda blocks, f=factor: solved(blocks) * min(1.0, f + 0.3))
        found = torus_norm(weight, groups, (1, 1), sides, twisted=False)
        assert exact * (1 - 1e-13) <= found.upper <= 3 * exact


@pytest.mark.parametrize(("shape", "groups", "sides"), LAYERS)
def test_without_single_precision_the_bound_is_the_same(shape, groups, sides, monkeypatch):
    weight = random(*shape, seed=4)
    mixed = torus_norm(weight, groups, (1, 1), sides, twisted=True)
    monkeypatch.setattr(torus, "_MAX_SHARE", 0.0)
    assert torus_norm(weight, groups, (1, 1), sides, twisted=True).upper == pytest.approx(mixed.upper, rel=1e-9)


def test_equal_singular_values_are_settled_in_double_precision():
    """An orthogonal 1x1 kernel moved by one tap: every frequency has every singular value 1."""
    rotation = torch.linalg.qr(random(20, 20))[0]
    weight = torch.zeros(20, 20, 2, 2, dtype=torch.float64)
    weight[:10, :, 0, 1], weight[10:, :, 1, 0] = rotation[:10], rotation[10:]
    found = torus_norm(weight, 1, (1, 1), ((16, 1), (16, 1)), twisted=True)
    assert 1 - 1e-15 <= found.upper <= 1 + 1e-9


def test_zero_kernel():
    found = torus_norm(torch.zeros(2, 3, 3, 3), 1, (1, 1), ((6, 1), (6, 2)), twisted=True)
    assert (found.upper, found.axes) == (0.0, ((6, 1, 0.0), (6, 2, 0.0)))


def test_one_group_that_is_zero():
    weight = random(4, 2, 3, 3)
    alone = torus_norm(weight[:2], 1, (1, 1), ((6, 1), (6, 1)), twisted=True).upper
    weight[2:] = 0
    assert torus_norm(weight, 2, (1, 1), ((6, 1), (6, 1)), twisted=True).upper == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 33, 224])
def test_roots_of_unity_are_within_their_bound(period):
    for number, root in enumerate(grams._roots(period).tolist()):
        turn = fmpq(number, period)
        distance = abs(acb(arb.cos_pi_fmpq(turn), arb.sin_pi_fmpq(turn)) - acb(arb(root.real), arb(root.imag)))
        assert bool(distance < arb(34) * arb(2) ** -53)


def test_scaling_is_by_a_power_of_two_and_exact():
    weight = torch.tensor([1e-320, 3e-310, 2e-300], dtype=torch.float64).reshape(1, 1, 3)
    for values in (weight, weight[..., :2], 1e200 * weight, random(2, 2, 3), 1e307 * random(2, 2, 3).clamp(-1, 1)):
        scaled, scale = scaled_weight(values)
        assert math.frexp(scale)[0] == 0.5
        pairs = zip(scaled.flatten().tolist(), values.flatten().tolist(), strict=True)
        assert all(Fraction(new) == Fraction(old) * Fraction(scale) for new, old in pairs)


@pytest.mark.slow
def test_512_channels_on_32x32_need_less_than_2_gb():
    program = """
import resource, torch
from torch import nn
from speccert.certify import norm_bounds
torch.set_num_threads(1)
layer = nn.Conv2d(512, 512, 3, padding=1, bias=False).eval()
norm_bounds(nn.Conv2d(8, 8, 3, padding=1), (8, 40, 40))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert norm_bounds(layer, (512, 32, 32)).method == "torus"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(output) < 2e6  # kilobytes

"""Proofs of LipSDP: what is proved holds exactly, in rational arithmetic, and for every slope that is allowed."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_lipschitz import (
    ascended,
    feasible,
    least,
    norm_to_l2,
    proved_exactly,
    random_neurons,
    random_slopes,
    whole_form,
    with_slopes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import random

from speccert.certify.inequality import prove
from speccert.certify.neurons import Layer, Neurons, Part

NORMS = ("l2", "linf", "l1")
FEW = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


CASES = {
    "one layer": {"sizes": (4, 5), "outputs": 3},
    "two layers": {"sizes": (3, 5, 4), "outputs": 2},
    "four layers": {"sizes": (3, 4, 5, 4, 3), "outputs": 2},
    "one output": {"sizes": (3, 5, 4), "outputs": 1},
    "one input": {"sizes": (1, 5, 4), "outputs": 2},
    "width 1": {"sizes": (1, 1, 1), "outputs": 1},
    "wide start": {"sizes": (12, 4, 3), "outputs": 2},
    "very wide start": {"sizes": (40, 4, 3), "outputs": 2},
    "symmetric slopes": {"sizes": (3, 5, 4), "outputs": 2, "low": -1.0, "high": 1.0},
    "slopes of twice the negative": {"sizes": (3, 5, 4), "outputs": 2, "low": 0.0, "high": 2.0},
    "slopes of gelu": {"sizes": (3, 5, 4), "outputs": 2, "low": -0.125, "high": 1.125},
    "negative slopes": {"sizes": (3, 5, 4), "outputs": 2, "low": -2.0, "high": -0.5},
    "slopes from 1": {"sizes": (3, 5, 4), "outputs": 2, "low": 1.0, "high": 3.0},
    "one slope": {"sizes": (3, 5, 4), "outputs": 2, "low": 0.5, "high": 0.5},
    "groups of 2": {"sizes": (3, 6, 4), "outputs": 2, "low": -1.0, "high": 1.0, "group": 2},
    "groups of 3": {"sizes": (7, 6, 3), "outputs": 2, "low": -1.0, "high": 1.0, "group": 3},
    "all joined": {"sizes": (3, 4, 3, 4), "outputs": 2, "dense": True},
    "all joined, symmetric": {"sizes": (3, 4, 3, 4), "outputs": 2, "dense": True, "low": -1.0, "high": 1.0},
    "all joined, a wide start": {"sizes": (30, 4, 3, 4), "outputs": 2, "dense": True},
    "all joined, groups": {"sizes": (3, 4, 6, 4), "outputs": 2, "dense": True, "low": -1.0, "high": 1.0, "group": 2},
    "no layer": {"sizes": (4,), "outputs": 3},
}


def case(name, seed=0):
    return random_neurons(seed=seed, **CASES[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_proved_holds_exactly_and_is_hardly_more(name, norm, seed):
    """F >= 0 in rational arithmetic for the claimed bound, and about the least bound that the multipliers give."""
    net = case(name, seed)
    multipliers = feasible(net, seed)
    weights = torch.rand(net.sizes[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    weights = weights if norm == "linf" else None
    proved = prove(net, multipliers, norm, weights)
    expected = least(net, multipliers, norm, weights)
    assert expected < math.inf
    assert expected * (1 - 1e-12) <= proved.upper <= expected * (1 + 1e-7)
    if norm == "linf":
        assert proved_exactly(net, multipliers, proved.upper, norm, proved.weights)
    elif norm == "l2":
        assert proved_exactly(net, multipliers, proved.upper)
        assert float(proved.weights) <= proved.upper**2 * (1 + 1e-15)
    best = ascended(net, norm, seed, tries=3)
    assert best <= proved.upper


@pytest.mark.parametrize("name", CASES)
def test_no_allowed_slopes_exceed_what_is_proved(name):
    net = case(name, 5)
    bounds = {norm: prove(net, feasible(net, 5), norm).upper for norm in NORMS}
    rng = np.random.default_rng(0)
    for _ in range(60):
        jacobian = with_slopes(net, random_slopes(net, rng))
        for norm in NORMS:
            assert norm_to_l2(jacobian, norm) <= bounds[norm]


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_proved_in_absolute_value(name):
    if CASES[name]["outputs"] < 2:
        return
    net = case(name, 2)
    pair = net.pair(0, 1)
    bounds = {norm: prove(pair, feasible(pair, 2), norm).upper for norm in NORMS}
    rng = np.random.default_rng(0)
    for _ in range(100):
        jacobian = with_slopes(net, random_slopes(net, rng))
        for norm, order in (("l2", 2), ("linf", 1), ("l1", math.inf)):
            assert np.linalg.norm(jacobian[0] - jacobian[1], order) <= bounds[norm]


@st.composite
def nets(draw, errors=0.0):
    """Small networks of every sort, with multipliers of every size."""
    depth = draw(st.integers(0, 4))
    group = draw(st.sampled_from([1, 1, 1, 2]))
    sizes = [draw(st.integers(1, 7)), *(group * draw(st.integers(1, 3)) for _ in range(depth))]
    low, high = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-0.25, 1.25), (0.5, 0.5), (0.0, 2.0), (-3.0, 0.0)]))
    if group == 2:
        low, high = -1.0, 1.0
    net = random_neurons(
        sizes,
        draw(st.integers(1, 3)),
        draw(st.integers(0, 10**6)),
        dense=draw(st.booleans()),
        group=group,
        low=low,
        high=high,
        scale=draw(st.sampled_from([0.01, 0.5, 1.0, 3.0, 100.0])),
        errors=errors,
    )
    base = feasible(net, draw(st.integers(0, 100)), draw(st.sampled_from([0.05, 0.3, 1.0, 3.0])))
    spread = draw(st.sampled_from([0.0, 0.3, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    noise = [10 ** (spread * torch.randn(len(d), generator=generator, dtype=torch.float64)) for d in base]
    return net, [d * n for d, n in zip(base, noise, strict=True)]


@FEW
@given(nets(), st.sampled_from(NORMS))
def test_finite_exactly_where_the_inequality_holds(drawn, norm):
    """Feasible multipliers are proved and infeasible ones are not, but for those within rounding of the edge."""
    net, multipliers = drawn
    upper = prove(net, multipliers, norm).upper
    expected = least(net, multipliers, norm)
    if expected == math.inf:
        assert upper == math.inf
        return
    assert expected * (1 - 1e-9) <= upper
    if upper == math.inf:  # F is singular but for rounding, even with a larger bound
        assert least_eigenvalue(net, multipliers, 1.01 * expected) < 1e-6
    if norm == "l2" and upper < math.inf:
        assert proved_exactly(net, multipliers, upper)


def least_eigenvalue(net, multipliers, upper):
    """Of F scaled so that its diagonal is 1."""
    form = whole_form(net, multipliers, upper**2 * np.eye(net.sizes[0]))
    root = np.sqrt(np.maximum(np.abs(form.diagonal()), 1e-300))
    return float(np.linalg.eigvalsh(form / root[:, None] / root)[0])


@FEW
@given(nets(errors=0.05), st.integers(0, 10**6))
def test_matrices_within_their_errors_obey_the_bound(drawn, seed):
    """Every matrix moved as far as its error says, the whole inequality checked for the moved ones."""
    net, multipliers = drawn
    upper = {norm: prove(net, multipliers, norm).upper for norm in NORMS}
    rng = np.random.default_rng(seed)
    for _ in range(4):
        moved = perturbed(net, rng)
        for norm in NORMS:
            if upper[norm] < math.inf:
                assert norm_to_l2(with_slopes(moved, random_slopes(moved, rng)), norm) <= upper[norm] * (1 + 1e-12)
        if upper["l2"] < math.inf:
            form = whole_form(moved, multipliers, upper["l2"] ** 2 * np.eye(net.sizes[0]))
            assert np.linalg.eigvalsh(form)[0] >= -1e-10 * np.abs(form).max()


def perturbed(net, rng):
    def moved(parts):
        found = []
        for part in parts:
            noise = rng.normal(size=tuple(part.matrix.shape))
            if rng.random() < 0.5:
                noise = np.outer(rng.normal(size=noise.shape[0]), rng.normal(size=noise.shape[1]))
            noise *= part.error / np.linalg.norm(noise, 2)
            found.append(replace(part, matrix=part.matrix + torch.from_numpy(noise)))
        return tuple(found)

    return replace(net, layers=tuple(replace(a, parts=moved(a.parts)) for a in net.layers), output=moved(net.output))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("where", ["layer", "output", "start"])
def test_an_error_makes_the_bound_larger(where, norm):
    net = random_neurons((5, 3, 3), 2, 1)
    multipliers = feasible(net, 1)
    before = prove(net, multipliers, norm).upper
    last, size = before, 1e-6
    while size < 1e-3:
        found = prove(_with_error(net, where, size), multipliers, norm).upper
        assert found > last
        last, size = found, size * 10
    assert last > before * (1 + 1e-6)
    assert prove(_with_error(net, where, math.inf), multipliers, norm).upper == math.inf
    assert prove(_with_error(net, where, math.nan), multipliers, norm).upper == math.inf


def _with_error(net, where, size):
    if where == "output":
        return replace(net, output=tuple(replace(part, error=size) for part in net.output))
    k = {"start": 0, "layer": 1}[where]
    layers = list(net.layers)
    layers[k] = replace(layers[k], parts=tuple(replace(part, error=size) for part in layers[k].parts))
    return replace(net, layers=tuple(layers))


# known values


@pytest.mark.parametrize("norm", NORMS)
def test_a_matrix_has_its_norm(norm):
    matrix = random(3, 5)
    net = Neurons((5,), (), (Part(0, matrix),))
    found = prove(net, [], norm)
    exact = norm_to_l2(matrix.numpy(), norm)
    assert exact <= found.upper
    if norm != "linf":  # whose weights are to be chosen
        assert found.upper <= exact * (1 + 1e-7)


def test_weights_of_a_row_are_its_entries():
    row = torch.tensor([[3.0, -1.0, 0.5]], dtype=torch.float64)
    net = Neurons((3,), (), (Part(0, row),))
    found = prove(net, [], "linf", row.abs()[0])
    assert 4.5 <= found.upper <= 4.5 * (1 + 1e-7)
    assert prove(net, [], "linf").upper == pytest.approx(math.sqrt(3 * 10.25), rel=1e-7)


@pytest.mark.parametrize("d", [0.6, 1.0, 2.0, 50.0])
def test_one_relu_by_hand(d):
    """d (u - xi) xi >= 0 and end xi: rho - d^2 / 4 / (d - 1) >= 0, least at d = 2, where it is 1."""
    unit = torch.ones(1, 1, dtype=torch.float64)
    layer = Layer((Part(0, 3 * unit),), torch.zeros(1).double(), torch.ones(1).double(), torch.arange(1))
    net = Neurons((1, 1), (layer,), (Part(1, unit),))
    upper = prove(net, [torch.tensor([d], dtype=torch.float64)]).upper
    if d <= 1:
        assert upper == math.inf
    else:
        exact = 3 * d / 2 / math.sqrt(d - 1)
        assert exact * (1 - 1e-15) <= upper <= exact * (1 + 1e-7)


def test_cancelling_relus_are_seen():
    """relu(x) + relu(-x) = |x| has the constant 1, which LipSDP finds; slopes alone allow 2 for relu(x) - relu(-x)."""
    column = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    layer = Layer((Part(0, column),), torch.zeros(2).double(), torch.ones(2).double(), torch.arange(2))
    for row, d, exact in (([1.0, 1.0], 2 + 1e-6, 1.0), ([1.0, -1.0], 4.0, 2.0)):
        net = Neurons((1, 2), (layer,), (Part(1, torch.tensor([row], dtype=torch.float64)),))
        upper = prove(net, [torch.full((2,), d, dtype=torch.float64)]).upper
        assert exact <= upper <= exact * (1 + 1e-5)


def test_tied_groups_need_one_multiplier():
    """Sorting moves numbers across: a multiplier each would prove 1 for a row that reads one of two sorted numbers of
    scaled inputs, which a tied one does not."""
    scale = torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64))
    ends = (-torch.ones(2).double(), torch.ones(2).double())
    row = (Part(1, torch.tensor([[1.0, 0.0]], dtype=torch.float64)),)
    tied = Neurons((2, 2), (Layer((Part(0, scale),), *ends, torch.zeros(2, dtype=torch.int64)),), row)
    best = min(prove(tied, [torch.tensor([d], dtype=torch.float64)]).upper for d in np.geomspace(1.0001, 3, 50))
    assert 5.0 <= best <= 5.0 * (1 + 1e-3)


# infeasible and broken input


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-320, 1e308])
def test_multipliers_that_are_none_prove_nothing(value, norm):
    net = random_neurons((3, 4, 3), 2, 0)
    for k in range(2):
        multipliers = feasible(net)
        multipliers[k][1] = value
        assert prove(net, multipliers, norm).upper == math.inf


@pytest.mark.parametrize("norm", NORMS)
def test_infeasible_multipliers_prove_nothing(norm):
    net = random_neurons((3, 4, 3), 2, 0)
    for factor in (1e-12, 1e-3):
        assert prove(net, [factor * d for d in feasible(net)], norm).upper == math.inf


def test_multipliers_that_do_not_fit_are_refused():
    net = random_neurons((3, 4, 3), 2, 0)
    good = feasible(net)
    with pytest.raises(ValueError, match="expected 2 tensors, got 1"):
        prove(net, good[:1])
    with pytest.raises(ValueError, match=r"expected 4 numbers, got shape \(3,\)"):
        prove(net, [good[0][:3], good[1]])
    tied = random_neurons((3, 4), 2, 0, group=2, low=-1.0)
    with pytest.raises(ValueError, match=r"expected 2 numbers, got shape \(4,\)"):
        prove(tied, [torch.ones(4, dtype=torch.float64)])


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 0.0, 1.0],
        [1.0, -1.0, 3.0],
        [math.nan, 1.0, 1.0],
        [math.inf, 1.0, 1.0],
        [0.0, 0.0, 0.0],
        [1e-310, 1.0, 1.0],
    ],
)
def test_weights_that_are_none_prove_nothing(weights):
    net = random_neurons((3, 4), 2, 0)
    assert prove(net, feasible(net), "linf", torch.tensor(weights, dtype=torch.float64)).upper == math.inf


def test_one_weight_for_many_numbers_is_refused():
    """It would count one number where there are 16: relu(sum x) has the linf constant 16, and 5.4 was "proved"."""
    row = torch.ones(1, 16, dtype=torch.float64)
    unit = torch.ones(1, dtype=torch.float64)
    net = Neurons(
        (16, 1), (Layer((Part(0, row),), 0 * unit, unit, torch.zeros(1, dtype=torch.int64)),), (Part(1, row[:, :1]),)
    )
    with pytest.raises(ValueError, match="weights: expected 16 numbers"):
        prove(net, [1.2 * unit], "linf", unit)
    with pytest.raises(ValueError, match="norm: expected one of"):
        prove(net, [1.2 * unit], "Linf")
    assert prove(net, [1.2 * unit], "linf").upper >= 16


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_matrices_that_are_not_finite_prove_nothing(value, norm):
    net = random_neurons((3, 4, 3), 2, 0)
    for k in range(3):
        parts = [part for layer in net.layers for part in layer.parts] + list(net.output)
        held = parts[k].matrix.clone()
        held[0, 0] = value
        broken = replaced(net, k, held)
        assert prove(broken, feasible(net), norm).upper == math.inf


def replaced(net, k, matrix):
    """The chain with another k-th matrix."""
    if k == len(net.layers):
        return replace(net, output=(replace(net.output[0], matrix=matrix),))
    layers = list(net.layers)
    layers[k] = replace(layers[k], parts=(replace(layers[k].parts[0], matrix=matrix),))
    return replace(net, layers=tuple(layers))


# scales


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "powers",
    [(-40, 80, -40), (200, -400, 200), (-200, 400, -200), (-490, 0, 0), (0, 0, -490), (490, 0, 0), (0, 0, 490),
     (-166, -166, -166), (166, 166, 166), (500, -500, 0), (0, 500, -500), (-1000, 500, 500), (700, -700, 0)],
)  # fmt: skip
def test_scales_of_layers_change_nothing_or_prove_nothing(powers, wide, norm):
    """Weights times 2^p, the multipliers to match: the same bound times 2^(sum of p), or none, and never less."""
    net = random_neurons((9 if wide else 3, 4, 3), 2, 3)
    multipliers = feasible(net, 3)
    exact = prove(net, multipliers, norm).upper
    scaled, moved = net, []
    for k, power in enumerate(powers):
        part = net.output[0] if k == 2 else net.layers[k].parts[0]
        scaled = replaced(scaled, k, part.matrix * 2.0**power)
    for k, d in enumerate(multipliers):
        moved.append(d * 2.0 ** max(-1000, min(1000, 2 * sum(powers[k + 1 :]))))
    found = prove(scaled, moved, norm).upper
    expected = Fraction(exact) * Fraction(2) ** sum(powers)
    if found < math.inf:
        assert Fraction(found) >= expected * (1 - Fraction(1, 10**6))
    if max(map(abs, powers)) <= 40:
        assert Fraction(found) <= expected * (1 + Fraction(1, 10**6))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-150, 1e-75, 1e75, 1e150, 1e200, 1e300])
def test_huge_and_tiny_numbers_give_a_true_bound_or_none(scale, norm):
    """With the multipliers as they are: infeasible, overflowing or useless, but never wrong and never an exception."""
    net = random_neurons((6, 3, 3), 2, 0)
    for k in range(3):
        part = net.output[0] if k == 2 else net.layers[k].parts[0]
        scaled = replaced(net, k, part.matrix * scale)
        for factor in (1.0, min(scale, 1e40) ** 2, max(1 / scale, 1e-40) ** 2):
            upper = prove(scaled, [factor * d for d in feasible(net)], norm).upper
            assert upper > 0
            rng = np.random.default_rng(0)
            for _ in range(5):
                with np.errstate(over="ignore", invalid="ignore"):
                    jacobian = with_slopes(scaled, random_slopes(scaled, rng))
                assert norm_to_l2(jacobian / scale, norm) <= upper / scale * (1 + 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_dead_numbers_do_not_matter(norm):
    """Zero rows, zero columns, neurons that nothing reads, an input that nothing reads."""
    net = random_neurons((5, 4, 3), 2, 2)
    first, second = (layer.parts[0].matrix.clone() for layer in net.layers)
    first[1], second[:, 2], first[:, 3] = 0.0, 0.0, 0.0
    dead = replaced(replaced(net, 0, first), 1, second)
    multipliers = feasible(dead, 2)
    upper = prove(dead, multipliers, norm).upper
    assert least(dead, multipliers, norm) * (1 - 1e-12) <= upper <= least(dead, multipliers, norm) * (1 + 1e-6)
    assert ascended(dead, norm) <= upper


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_network_of_zeros_gives_no_negative_or_nan_bound(k, norm):
    net = random_neurons((3, 4, 3), 2, 0)
    part = net.output[0] if k == 2 else net.layers[k].parts[0]
    upper = prove(replaced(net, k, torch.zeros_like(part.matrix)), feasible(net), norm).upper
    assert upper >= 0


# wide starts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_wide_start_gives_the_same_bound_as_its_rows(norm, seed):
    """The bound of a start padded with numbers that nothing reads, and of the same inputs rotated (l2)."""
    net = random_neurons((3, 4, 3), 2, seed, dense=True)
    multipliers = feasible(net, seed)
    small = prove(net, multipliers, norm).upper
    rotation = torch.linalg.qr(random(60, 60, seed=seed))[0][:3]
    if norm == "l2":
        wide = _wider(net, rotation)
        assert prove(wide, multipliers, norm).upper == pytest.approx(small, rel=1e-7)
    padded = _wider(net, torch.eye(3, 60, dtype=torch.float64))
    weights = torch.cat([torch.ones(3), torch.full((57,), 1e-9)]).double()
    assert prove(padded, multipliers, norm, weights).upper == pytest.approx(small, rel=1e-6)


def _wider(net, matrix):
    def parts(own):
        return tuple(replace(p, matrix=p.matrix @ matrix) if p.source == 0 else p for p in own)

    layers = tuple(replace(layer, parts=parts(layer.parts)) for layer in net.layers)
    return replace(net, sizes=(matrix.shape[1], *net.sizes[1:]), layers=layers, output=parts(net.output))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_wide_start_of_low_rank(rank, norm):
    """Rows that depend on each other make the Gram matrix singular."""
    net = random_neurons((20, 6, 3), 2, 1)
    matrix = random(6, rank) @ random(rank, 20, seed=1)
    low = replaced(net, 0, matrix)
    multipliers = feasible(low, 1)
    upper = prove(low, multipliers, norm).upper
    expected = least(low, multipliers, norm)
    assert upper >= expected * (1 - 1e-12)
    if rank:
        assert upper <= expected * (1 + 1e-5)


def test_wide_starts_with_unlike_weights():
    net = random_neurons((30, 4, 3), 2, 1)
    multipliers = feasible(net, 1)
    for spread in (1.0, 4.0, 12.0):
        weights = 10 ** (spread * torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        found = prove(net, multipliers, "linf", weights)
        expected = least(net, multipliers, "linf", weights)
        assert expected * (1 - 1e-9) <= found.upper <= expected * (1 + 1e-4)
        assert proved_exactly(net, multipliers, found.upper, "linf", found.weights)


# the call leaves everything alone


def test_a_proof_changes_nothing_it_was_given():
    net = random_neurons((9, 4, 3), 2, 0)
    multipliers = feasible(net)
    before = [d.clone() for d in multipliers], [layer.parts[0].matrix.clone() for layer in net.layers]
    weights = torch.ones(9, dtype=torch.float64)
    state = torch.get_rng_state()
    for norm in NORMS:
        prove(net, multipliers, norm, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(multipliers, before[0], strict=True))
    assert all(torch.equal(a.parts[0].matrix, b) for a, b in zip(net.layers, before[1], strict=True))
    assert torch.equal(weights, torch.ones(9, dtype=torch.float64))


def test_multipliers_of_other_types_are_taken_as_they_are():
    net = random_neurons((3, 4, 3), 2, 0)
    multipliers = [d.float() for d in feasible(net)]
    found = prove(net, [d.requires_grad_() for d in multipliers])
    assert found.upper == prove(net, [d.detach().double() for d in multipliers]).upper
    assert not found.weights.requires_grad

"""The search of multipliers: values and gradients against the whole matrix, its end against another solver."""

import math
import time

import numpy as np
import pytest
import torch
from exact_lipschitz import ascended, feasible, interior_point, least, random_neurons
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speccert.certify.inequality import prove
from speccert.certify.multipliers import SCHEDULE, initial, problem, search, shared

NORMS = ("l2", "linf", "l1")
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOON = 20.0

CASES = {
    "one layer": {"sizes": (4, 5), "outputs": 3},
    "three layers": {"sizes": (3, 4, 5, 4), "outputs": 3},
    "wide start": {"sizes": (12, 4, 3), "outputs": 3},
    "symmetric slopes": {"sizes": (3, 5, 4), "outputs": 3, "low": -1.0, "high": 1.0},
    "slopes of twice the negative": {"sizes": (3, 5, 4), "outputs": 3, "low": 0.0, "high": 2.0},
    "slopes of gelu": {"sizes": (3, 5, 4), "outputs": 3, "low": -0.125, "high": 1.125},
    "slopes from 1": {"sizes": (3, 5, 4), "outputs": 3, "low": 1.0, "high": 3.0},
    "negative slopes": {"sizes": (3, 5, 4), "outputs": 3, "low": -2.0, "high": -0.5},
    "groups": {"sizes": (3, 6, 4), "outputs": 3, "low": -1.0, "high": 1.0, "group": 2},
    "all joined": {"sizes": (3, 4, 3, 4), "outputs": 3, "dense": True},
    "all joined, wide start": {"sizes": (30, 4, 3, 4), "outputs": 3, "dense": True},
    "all joined, groups": {"sizes": (3, 4, 4), "outputs": 3, "dense": True, "low": -1.0, "high": 1.0, "group": 2},
}
PAIRS = [(0, 1), (2, 0), (1, 2)]


def case(name, seed=0):
    return random_neurons(seed=seed, **CASES[name])


def split(net, row, norm):
    """Multipliers a layer, and weights in linf."""
    counts = [layer.multipliers for layer in net.layers]
    parts = torch.split(row.exp(), [*counts, len(row) - sum(counts)])
    return list(parts[:-1]), parts[-1] if norm == "linf" else None


def somewhere(net, norm, seed=0):
    """Logarithms of multipliers well inside, and of uneven weights."""
    logs = [d.log() for d in feasible(net, seed)]
    if norm == "linf":
        logs.append(torch.from_numpy(np.random.default_rng(seed).normal(size=net.sizes[0])))
    return torch.cat(logs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_value_is_that_of_the_whole_matrix(name, norm):
    net = case(name)
    x = somewhere(net, norm)
    found = problem(net, None, norm).evaluate(x[None], 100.0)
    exact = 2 * math.log(least(net, *_ordered(split(net, found.logs[0], norm), norm)))
    assert float(found.true) == pytest.approx(exact, abs=1e-9)
    size = net.sizes[0]
    assert exact - 1e-9 <= float(found.smooth) <= exact + math.log(size) / 100 + 1e-9


def _ordered(parts, norm):
    return parts[0], norm, parts[1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_values_of_pairs_are_those_of_their_own_networks(name, norm):
    net = case(name, 1)
    x = torch.stack([somewhere(net.pair(*pair), norm, seed) for seed, pair in enumerate(PAIRS)])
    found = problem(net, PAIRS, norm).evaluate(x, 50.0)
    for row, pair in enumerate(PAIRS):
        parts, weights = split(net, found.logs[row], norm)
        assert float(found.true[row]) == pytest.approx(
            2 * math.log(least(net.pair(*pair), parts, norm, weights)), abs=1e-9
        )
        alone = problem(net.pair(*pair), None, norm).evaluate(x[row : row + 1], 50.0)
        torch.testing.assert_close(alone.slope[0], found.slope[row], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("power", [2.0, 30.0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_gradient_agrees_with_finite_differences(name, norm, power):
    net = case(name)
    given_ = problem(net, None, norm)
    x = somewhere(net, norm)
    found = given_.evaluate(x[None], power).slope[0]
    shift = 1e-5 * torch.eye(len(x), dtype=torch.float64)
    numeric = torch.stack(
        [
            (given_.evaluate((x + s)[None], power).smooth - given_.evaluate((x - s)[None], power).smooth)[0]
            for s in shift
        ]
    )
    torch.testing.assert_close(found, numeric / 2e-5, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_outside_the_domain_the_value_is_infinite(norm):
    net = case("three layers")
    x = torch.stack([somewhere(net, norm), somewhere(net, norm) - 30, torch.full_like(somewhere(net, norm), -math.inf)])
    given_ = problem(net, [(0, 1)] * 3, norm)
    found = given_.evaluate(x, 20.0)
    assert torch.isfinite(found.smooth).tolist() == torch.isfinite(found.true).tolist() == [True, False, False]
    assert bool((found.slope[1:] == 0).all())
    assert bool(torch.isfinite(found.slope).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_start_is_inside(name, norm):
    for seed in range(3):
        net = case(name, seed)
        for pairs in (None, PAIRS):
            given_ = problem(net, pairs, norm)
            x = initial(given_)
            assert bool(torch.isfinite(given_.evaluate(x, 20.0).smooth).all())
            for row, part in enumerate([net] if pairs is None else [net.pair(*pair) for pair in pairs]):
                assert prove(part, *_ordered(split(part, x[row], norm), norm)).upper < math.inf


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 2.0), (-0.125, 1.125), (0.5, 1.0)])
def test_start_of_a_chain_is_no_worse_than_the_product(low, high, seed):
    net = random_neurons((5, 6, 4, 5), 3, seed, low=low, high=high)
    parts = [*(layer.parts[0] for layer in net.layers), *net.output]
    product = math.prod(float(torch.linalg.matrix_norm(part.matrix, 2)) for part in parts)
    product *= max(abs(low), abs(high)) ** len(net.layers)
    x = initial(problem(net, None, "l2"))
    assert prove(net, split(net, x[0], "l2")[0]).upper <= product * (1 + 1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", CASES)
def test_search_comes_to_the_optimum(name, norm):
    """Against Clarabel on the whole matrix; never below, but for that solver's own tolerance."""
    net = case(name)
    optimum, _ = interior_point(net, norm)
    given_ = problem(net, None, norm)
    x = search(given_, initial(given_), time.monotonic() + SOON)
    upper = prove(net, *_ordered(split(net, x[0], norm), norm)).upper
    assert optimum * (1 - 1e-5) <= upper <= optimum * (1 + 2e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_search_of_pairs_is_the_search_of_each(norm):
    net = random_neurons((3, 4, 4), 3, 3)
    given_ = problem(net, PAIRS, norm)
    x = search(given_, initial(given_), time.monotonic() + SOON)
    for row, pair in enumerate(PAIRS):
        part = net.pair(*pair)
        alone = problem(part, None, norm)
        own = search(alone, initial(alone), time.monotonic() + SOON)
        together = prove(part, *_ordered(split(part, x[row], norm), norm)).upper
        assert together == pytest.approx(prove(part, *_ordered(split(part, own[0], norm), norm)).upper, rel=2e-3)
        assert together >= ascended(part, norm, tries=2)


@st.composite
def nets(draw):
    depth = draw(st.integers(1, 4))
    group = draw(st.sampled_from([1, 1, 2]))
    sizes = [draw(st.integers(1, 9)), *(group * draw(st.integers(1, 3)) for _ in range(depth))]
    low, high = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-0.25, 1.25), (0.0, 2.0), (-3.0, 0.0), (0.9, 1.0)]))
    if group == 2:
        low, high = -1.0, 1.0
    return random_neurons(
        sizes,
        draw(st.integers(2, 3)),
        draw(st.integers(0, 10**6)),
        dense=draw(st.booleans()),
        group=group,
        low=low,
        high=high,
        scale=draw(st.sampled_from([0.01, 1.0, 100.0])),
    )


@pytest.mark.slow
@FEW
@given(nets(), st.sampled_from(NORMS), st.booleans())
def test_search_never_ends_above_its_start(net, norm, paired):
    given_ = problem(net, [(0, 1), (1, 0)] if paired else None, norm)
    start = initial(given_)
    found = search(given_, start, time.monotonic() + 1.0, ((20.0, 1e-3), (500.0, 1e-4)))
    before, after = (given_.evaluate(x, 20.0).true for x in (start, found))
    assert bool(torch.isfinite(before).all())
    assert bool((after <= before + 1e-12).all())
    part = net.pair(0, 1) if paired else net
    upper = prove(part, *_ordered(split(part, found[0], norm), norm)).upper
    assert ascended(part, norm, tries=2, sweeps=2) <= upper < math.inf
    if paired:
        assert float(after[0]) == pytest.approx(float(after[1]), abs=5e-2)


def test_search_stops_at_its_deadline():
    net = random_neurons((40, 60, 60, 60), 10, 0)
    pairs = [(i, j) for i in range(10) for j in range(i)]
    given_ = problem(net, pairs, "l2")
    start = initial(given_)
    begin = time.monotonic()
    assert torch.equal(search(given_, start, begin - 1.0), start)
    assert time.monotonic() - begin < 1.0
    begin = time.monotonic()
    found = search(given_, start, begin + 1.0)
    assert time.monotonic() - begin < 6.0
    before, after = (given_.evaluate(x, 20.0).true for x in (start, found))
    assert bool((after <= before).all())
    assert bool((after < before - 1e-3).any())


def test_a_problem_outside_stays_and_leaves_the_others_alone():
    net = case("three layers")
    given_ = problem(net, PAIRS, "l2")
    start = initial(given_)
    start[1] -= 50
    found = search(given_, start, time.monotonic() + SOON)
    assert torch.equal(found[1], start[1])
    values = given_.evaluate(found, 20.0).true
    assert torch.isfinite(values).tolist() == [True, False, True]
    alone = search(given_.chosen(torch.tensor([0])), start[:1], time.monotonic() + SOON)
    assert float(given_.chosen(torch.tensor([0])).evaluate(alone, 20.0).true) == pytest.approx(
        float(values[0]), abs=1e-3
    )


def test_search_is_the_same_each_time_and_leaves_the_generator():
    net = case("all joined", 2)
    given_ = problem(net, None, "l2")
    state = torch.get_rng_state()
    first, second = (search(given_, initial(given_), time.monotonic() + SOON) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", NORMS)
def test_a_wide_start_is_searched_through_its_rows(norm):
    """As many variables as there are multipliers (and inputs in linf), the small side in the matrices."""
    net = random_neurons((200, 4, 3), 2, 1)
    given_ = problem(net, None, norm)
    assert given_.sizes == (4, 4, 3)
    x = search(given_, initial(given_), time.monotonic() + SOON, SCHEDULE[:2])
    assert x.shape == (1, 7 + (200 if norm == "linf" else 0))
    assert float(given_.evaluate(x, 20.0).true) == pytest.approx(
        2 * math.log(least(net, *_ordered(split(net, x[0], norm), norm))), abs=1e-8
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e-40, 1e40, 1e160, 1e308])
def test_numbers_of_any_size_do_not_break_the_search(scale, norm):
    """Zero or overflowing forms give values that are infinite, not exceptions; what is finite can be proved."""
    for k in range(3):
        net = random_neurons((5, 3, 3), 2, 0)
        parts = [net.layers[0].parts[0], net.layers[1].parts[0], net.output[0]]
        parts[k].matrix.mul_(scale)
        for pairs in (None, [(0, 1)]):
            given_ = problem(net, pairs, norm)
            x = search(given_, initial(given_), time.monotonic() + 0.2, ((20.0, 1e-6),))
            assert x.shape[0] == 1
            part = net if pairs is None else net.pair(0, 1)
            upper = prove(part, *_ordered(split(part, x[0], norm), norm)).upper
            assert upper >= 0


# one set of multipliers for all pairs

SHARED = [name for name, options in CASES.items() if options.get("low") != -1.0]


@pytest.mark.parametrize("name", SHARED)
def test_shared_multipliers_give_each_pair_its_least_bound(name):
    """s times the shared multipliers, s the square of the pair's bound, which is the least for that direction."""
    net = case(name, 4)
    pairs = [(0, 1), (0, 2), (1, 2)]
    found = shared(net, pairs)
    whole = problem(net, None, "l2")
    start = initial(whole)
    start = start - whole.evaluate(start, 100.0).true[:, None] - 1e-3
    x = search(found, start, time.monotonic() + SOON)
    squares = found.squares(x)[0][0]
    for pair, square in zip(pairs, squares.tolist(), strict=True):
        multipliers = split(net, x[0] + math.log(square), "l2")[0]
        assert least(net.pair(*pair), multipliers) <= math.sqrt(square) * (1 + 1e-7)
        smaller = [d * 0.99 for d in multipliers]
        assert not least(net.pair(*pair), smaller) <= math.sqrt(0.99 * square) * (1 - 1e-4)
        upper = prove(net.pair(*pair), [d * (1 + 1e-9) for d in multipliers]).upper
        assert ascended(net.pair(*pair), tries=2) <= upper <= math.sqrt(square) * (1 + 1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_gradient_of_shared_multipliers_agrees_with_finite_differences(name):
    net = case(name, 4)
    found, whole = shared(net, [(0, 1), (1, 2)]), problem(net, None, "l2")
    x = somewhere(net, "l2")
    x = x - whole.evaluate(x[None], 100.0).true - 0.5
    slope = found.evaluate(x[None], 20.0).slope[0]
    shift = 1e-5 * torch.eye(len(x), dtype=torch.float64)
    values = [[found.evaluate((x + sign * s)[None], 20.0).smooth[0] for sign in (1, -1)] for s in shift]
    numeric = torch.stack([(above - below) / 2e-5 for above, below in values])
    torch.testing.assert_close(slope, numeric, rtol=2e-5, atol=1e-7)


def test_shared_multipliers_outside_have_no_value():
    net = case("three layers")
    found = shared(net, PAIRS)
    x = somewhere(net, "l2")[None]
    value = found.evaluate(x + 60, 20.0)
    assert float(value.smooth) == math.inf
    assert bool((value.slope == 0).all())


@pytest.mark.parametrize("name", ["symmetric slopes", "groups"])
def test_symmetric_slopes_share_nothing(name):
    assert shared(case(name), PAIRS) is None

"""Local errors against sums in the worst orders and against every number of a half type."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speccert.certify.arithmetic import ARITHMETICS, Arithmetic
from speccert.certify.local_errors import local_error, sum_error
from speccert.certify.rules import EXACT, Rounding

HALF = np.float16
# float16 that accumulates in itself: every rounding can be played through
COARSE = Arithmetic("coarse", 2.0**-11, 2.0**-11, 2.0**-24, 65504.0)


def bound(error, size, image):
    return error.p * size + error.q * image + error.h


def in_order(products, tree):
    """The computed sum of rounded products, in an order that `tree` (a list of pairs of positions) gives."""
    values = list(products)
    for first, second in tree:
        a, b = values[first % len(values)], values[second % len(values)]
        if first % len(values) == second % len(values):
            continue
        for index in sorted({first % len(values), second % len(values)}, reverse=True):
            values.pop(index)
        values.append(HALF(a + b))
    while len(values) > 1:
        values = [HALF(values[0] + values[1]), *values[2:]]
    return values[0]


numbers = st.floats(-8, 8, width=16)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12),
    numbers,
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12),
    st.sampled_from(["random", "signs", "sizes"]),
)
def test_a_sum_of_products_in_any_order_errs_within_the_bound(pairs, bias, biased, tree, order):
    weights, inputs = (np.array(part, dtype=HALF) for part in zip(*pairs, strict=True))
    with np.errstate(all="ignore"):
        products = [HALF(w * x) for w, x in zip(weights, inputs, strict=True)]
        terms = products + ([HALF(bias)] if biased else [])
        if order != "random":
            key = (lambda value: (value < 0, abs(value))) if order == "signs" else abs
            terms, tree = sorted(terms, key=key), []
        computed = in_order(terms, tree)
    exact = sum((Fraction(float(w)) * Fraction(float(x)) for w, x in zip(weights, inputs, strict=True)), Fraction(0))
    exact += Fraction(float(HALF(bias))) if biased else 0
    rounding = Rounding("dot", len(terms), offset=abs(bias) if biased else 0.0)
    rows = float(np.abs(weights.astype(np.float64)).sum())
    gain = float(np.linalg.norm(weights.astype(np.float64)))
    error = local_error(rounding, COARSE, gain * (1 + 1e-12), rows, 1)
    size = float(np.linalg.norm(inputs.astype(np.float64))) * (1 + 1e-12)
    assert abs(Fraction(float(computed)) - exact) <= Fraction(bound(error, size, abs(float(exact))))


def test_the_worst_order_comes_near_the_bound():
    """Equal terms, all positive first: the partial sums are large for long."""
    count = 64
    terms = [HALF(1.003)] * count + [HALF(-1.003)] * count
    computed = in_order(terms, [])
    error = local_error(Rounding("dot", 2 * count), COARSE, (2 * count) ** 0.5, 2.0 * count, 1)
    size = 1.003 * (2 * count) ** 0.5
    assert 0.005 * bound(error, size, 0.0) < abs(float(computed)) <= bound(error, size, 0.0)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_grow_with_everything(name):
    arithmetic = ARITHMETICS[name]
    base = Rounding("dot", 10, offset=1.0)
    small = local_error(base, arithmetic, 2.0, 3.0, 4)
    for rounding, gain, rows, results in (
        (Rounding("dot", 11, offset=1.0), 2.0, 3.0, 4),
        (Rounding("dot", 10, offset=1.5), 2.0, 3.0, 4),
        (Rounding("dot", 10, offset=1.0, repeats=2), 2.0, 3.0, 4),
        (base, 2.5, 3.0, 4),
        (base, 2.0, 4.0, 4),
        (base, 2.0, 3.0, 5),
    ):
        large = local_error(rounding, arithmetic, gain, rows, results)
        assert bound(large, 1.0, 1.0) >= bound(small, 1.0, 1.0)
    assert bound(small, 1.0, 1.0) >= arithmetic.unit * 2


def test_half_types_round_the_stored_results_too():
    rounding = Rounding("dot", 100, offset=1.0)
    half = local_error(rounding, ARITHMETICS["float16"], 1.0, 1.0, 1)
    assert half.q >= 2 * 2.0**-11
    assert half.q <= 2.1 * 2.0**-11
    scattered = local_error(Rounding("dot", 100, partials=18), ARITHMETICS["float16"], 1.0, 1.0, 1)
    assert scattered.p >= 18 * 2.0**-11


@pytest.mark.parametrize("values", [np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16)])
@pytest.mark.parametrize("factor", [0.1, 3.0, 1e-5, 1000.0])
def test_steps_cover_a_product_with_a_rounded_constant(values, factor):
    values = values[values.astype(np.float64) * factor < 60000]
    computed = (values * HALF(factor)).astype(np.float64)
    error = local_error(Rounding("steps", 2), COARSE, factor, 0.0, 1)
    exact = values.astype(np.float64) * factor
    assert (np.abs(computed - exact) <= error.p * values.astype(np.float64) + error.h).all()


def test_sums_round_once_and_their_constant_too():
    error = sum_error(ARITHMETICS["float32"], 5.0, 9)
    assert error.p == 0.0
    assert error.q == 2.0**-24
    assert 5 * 2.0**-24 <= error.h <= 5.001 * 2.0**-24


def test_nothing_is_lost_by_moves_and_in_real_arithmetic():
    for error in (
        local_error(EXACT, ARITHMETICS["float16"], 1.0, 1.0, 10),
        local_error(Rounding("dot", 10, offset=3.0, jump=1.0), ARITHMETICS["real"], 1.0, 1.0, 10),
        sum_error(ARITHMETICS["real"], 5.0, 9),
    ):
        assert (error.p, error.q, error.h) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("rounding", "name"),
    [
        (Rounding("dot", 2**22 + 1), "float32"),
        (Rounding("dot", 2**21 + 1), "float16"),
        (Rounding("dot", 9, partials=2 * 49), "bfloat16"),
        (Rounding("steps", 65), "bfloat16"),
    ],
)
def test_too_many_roundings_have_no_bound(rounding, name):
    assert local_error(rounding, ARITHMETICS[name], 1.0, 1.0, 1).h == float("inf")

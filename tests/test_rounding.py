"""Every proved number against exact rational arithmetic (python-flint), or balls of 300 bits where that is too slow."""

import math

import flint
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random

from speccert.certify.rounding import (
    cholesky_factor,
    dot_factor,
    down,
    down_add,
    down_div,
    down_mul,
    down_sqrt,
    gamma,
    largest_entry,
    norm_up,
    power_of_two,
    proved_below,
    proved_norm,
    sum_up,
    unit,
    up,
    up_add,
    up_div,
    up_mul,
    up_sqrt,
)

TINIEST = 5e-324


def exact(value):
    return flint.fmpq(*float(value).as_integer_ratio())


def exact_matrix(tensor):
    return [[exact(entry) for entry in row] for row in tensor.detach().double().tolist()]


def gram(rows):
    columns = list(zip(*rows, strict=True))
    return [[sum((a * b for a, b in zip(c, d, strict=True)), flint.fmpq(0)) for d in columns] for c in columns]


def is_semidefinite(matrix):
    """Whether an exact symmetric matrix is positive semidefinite, by elimination: a zero pivot needs a zero row."""
    matrix = [list(row) for row in matrix]
    for k, pivot_row in enumerate(matrix):
        pivot = pivot_row[k]
        if pivot < 0 or (pivot == 0 and any(pivot_row[k + 1 :])):
            return False
        for row in matrix[k + 1 :]:
            if row[k] != 0:
                factor = row[k] / pivot
                row[k:] = [a - factor * b for a, b in zip(row[k:], pivot_row[k:], strict=True)]
    return True


def less(level, matrix):
    """level * I - matrix."""
    return [[(level if i == j else 0) - entry for j, entry in enumerate(row)] for i, row in enumerate(matrix)]


def is_norm_bound(tensor, bound):
    """Whether ||tensor||_2 <= bound, exactly: bound^2 I - W^T W is positive semidefinite."""
    rows = exact_matrix(tensor if tensor.shape[0] >= tensor.shape[1] else tensor.T)
    return is_semidefinite(less(exact(bound) ** 2, gram(rows)))


def assert_proved(tensor, width=1e-8):
    proof = proved_norm(tensor)
    assert is_norm_bound(tensor, proof.upper)
    assert proof.lower <= proof.upper <= proof.lower * (1 + width)
    if proof.lower > 0:
        assert not is_norm_bound(tensor, proof.lower * (1 - 1e-15))
    return proof


# scalars

positive = st.floats(0, 1e300, allow_subnormal=True)
some = st.lists(positive, min_size=1, max_size=5)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6))
def test_sums_of_floats_enclose_the_exact_sum(terms):
    total = sum((exact(term) for term in terms), flint.fmpq(0))
    assert exact(down_add(*terms)) <= total <= exact(up_add(*terms))


@given(st.lists(st.one_of(st.floats(0, 1e60), st.floats(0, 1e-200)), min_size=1, max_size=5))
def test_products_of_floats_enclose_the_exact_product(factors):
    total = flint.fmpq(1)
    for factor in factors:
        total *= exact(factor)
    assert exact(down_mul(*factors)) <= total <= exact(up_mul(*factors))
    if min(factors) > 1e-50:
        assert up_mul(*factors) <= down_mul(*factors) * (1 + 1e-14)


@given(positive, st.floats(1e-300, 1e300))
def test_quotients_and_roots_enclose_the_exact_ones(a, b):
    if math.isfinite(up_div(a, b)):
        assert exact(down_div(a, b)) <= exact(a) / exact(b) <= exact(up_div(a, b))
    assert exact(down_sqrt(a)) ** 2 <= exact(a) <= exact(up_sqrt(a)) ** 2


def test_zeros_ones_and_infinities():
    assert up_mul(0.0, math.inf) == up_mul(math.inf, 0.0, 3.0) == down_mul(0.0, 7.0) == up_div(0.0, 3.0) == 0.0
    assert up_mul(1.0, 0.1, 1.0) == down_mul(0.1, 1.0) == up_add(0.0, 0.1) == up_add(0.1, 0.0) == 0.1
    assert up_mul() == 1.0
    assert up_add() == up_sqrt(0.0) == down_sqrt(0.0) == down_div(0.0, 2.0) == 0.0
    assert up_div(1.0, 0.0) == up_mul(1e300, 1e300) == up_add(1.7e308, 1.7e308) == up_sqrt(math.inf) == math.inf
    assert up_mul(1e-300, 1e-300) == TINIEST
    assert down_mul(1e-300, 1e-300) == 0.0


def test_gamma_and_units():
    assert unit(torch.float64) == unit(torch.complex128) == 2.0**-53
    assert (unit(torch.float32), unit(torch.float16), unit(torch.bfloat16)) == (2.0**-24, 2.0**-11, 2.0**-8)
    for n in (0, 1, 7, 1000, 10**9):
        share = n * exact(2.0**-53)
        assert exact(gamma(n)) >= share / (1 - share)
        assert gamma(n) <= n * 2.0**-53 * (1 + 1e-6)
    assert gamma(2**24, 2.0**-24) == gamma(300, 2.0**-8) == math.inf
    assert dot_factor(8, torch.float64) == gamma(8)
    assert dot_factor(8, torch.complex64) >= math.sqrt(2) * gamma(16, 2.0**-24)
    assert gamma(8) < cholesky_factor(8, torch.float64) < gamma(20)
    assert cholesky_factor(2**24, torch.float32) == math.inf


@given(st.lists(st.floats(-1e308, 1e308, allow_subnormal=True), min_size=1, max_size=12))
def test_sums_and_norms_of_tensors_are_upper_bounds(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    total, squares = float(sum_up(tensor)), float(norm_up(tensor))
    assert total == math.inf or exact(total) >= sum((abs(exact(v)) for v in values), flint.fmpq(0))
    assert squares == math.inf or exact(squares) ** 2 >= sum((exact(v) ** 2 for v in values), flint.fmpq(0))


@pytest.mark.parametrize("scale", [TINIEST, 1e-310, 1e-160, 1.0, 1e160, 1e304])
def test_sums_and_norms_are_tight_at_every_scale(scale):
    tensor = torch.full((3, 4), scale, dtype=torch.float64)
    for values, dim, count in ((sum_up(tensor), 1, 4), (sum_up(tensor, 0), 0, 3)):
        assert values.shape == (tensor.shape[1 - dim],)
        assert bool((values >= scale * count).all())
        assert bool((values <= scale * count * (1 + 1e-14) + 2 * TINIEST).all())
    assert 2 * scale <= float(norm_up(tensor)[0]) <= 2 * scale * (1 + 1e-14) + 2 * TINIEST


def test_sums_of_zeros_and_of_nothing_are_zero():
    for function in (sum_up, norm_up):
        assert function(torch.zeros(2, 3)).tolist() == [0.0, 0.0]
        assert function(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
        assert function(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))[0] == 0.0
    assert largest_entry(torch.zeros(0)) == 0.0
    assert largest_entry(torch.tensor([1 - 5j, 2 + 3j])) == 5.0
    assert math.isnan(largest_entry(torch.tensor([1.0, math.nan, 3.0])))


def test_neighbours_and_powers_of_two():
    values = torch.tensor([1.0, -1.0, 0.0, 1e308], dtype=torch.float64)
    assert bool((down(values) < values).all())
    assert bool((values < up(values)).all())
    assert power_of_two(torch.tensor([3.0, -700.0])) == 1.0
    for value in (1e-300, 1e300, TINIEST):
        scale = power_of_two(torch.tensor([value], dtype=torch.float64))
        assert math.frexp(scale)[0] == 0.5
        assert 1e-30 < value * scale < 1e30


# one matrix

shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))
entries = st.one_of(
    st.floats(-2, 2), st.sampled_from([0.0, 1.0, -1.0, 1 + 2.0**-52]), st.floats(-1e-200, 1e-200, allow_subnormal=True)
)


@settings(max_examples=150, deadline=None)
@given(st.data(), shapes, st.sampled_from([0, 0, 0, -1000, -500, 500, 1000]))
def test_proved_norm_dominates_the_exact_norm(data, shape, exponent):
    values = data.draw(st.lists(entries, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    assert_proved(torch.tensor([math.ldexp(v, exponent) for v in values], dtype=torch.float64).reshape(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_is_read_exactly(dtype):
    assert_proved(random(4, 6).to(dtype))


SPECIAL = {
    "one number": torch.tensor([[-0.1]]),
    "row": random(1, 9),
    "column": random(9, 1),
    "rank one": torch.outer(random(6), random(4, seed=1)),
    "ones": torch.ones(7, 5),
    "identity": torch.eye(6) * 0.1,
    "Hadamard": torch.tensor([[1.0, 1.0], [1.0, -1.0]]).kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / 3,
    "float32 denormals": torch.tensor([[1e-45, 2e-45], [3e-45, 1e-42]]),
    "denormals": torch.tensor([[TINIEST, 1e-320], [3e-322, 1e-310]], dtype=torch.float64),
    "tiny": random(4, 3) * 1e-300,
    "huge": random(4, 3) * 1e300,
    "largest": torch.full((3, 3), 5e307, dtype=torch.float64),
    "huge beside tiny": torch.diag(torch.tensor([1e300, 1.0, 1e-300], dtype=torch.float64)),
    "graded": random(5, 5) * 10.0 ** -torch.arange(0, 50, 10).double(),
    "transposed": random(3, 6).T,
    "strided": random(8, 8)[::2, 1::3],
    "expanded": random(1, 4).expand(5, 4),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_matrices(name):
    before = SPECIAL[name].clone()
    assert_proved(SPECIAL[name])
    assert torch.equal(SPECIAL[name], before)


def test_reflections_have_norm_1_and_little_more_is_said():
    """All singular values are equal, so that t I - G is nearly singular in every direction."""
    for size in (3, 60, 300):
        vector = random(size)
        matrix = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(vector, vector) / vector.square().sum()
        assert 1 - 1e-10 < proved_norm(matrix).lower <= proved_norm(matrix).upper < 1 + 1e-10


def test_scaling_by_a_power_of_two_changes_nothing():
    matrix = random(9, 7)
    proof = proved_norm(matrix)
    assert proved_norm(matrix * 2.0**300).upper == pytest.approx(proof.upper * 2.0**300, rel=1e-15)
    assert proved_norm(matrix.T).upper == pytest.approx(proof.upper, rel=1e-12)


def test_naive_float_norms_fall_below_the_true_one_and_the_proof_does_not():
    below = 0
    for seed in range(60):
        matrix = random(6, 4, seed=seed).float()
        single = matrix.T @ matrix
        below += not is_norm_bound(matrix, math.sqrt(float(torch.linalg.eigvalsh(single.double())[-1])))
        below += not is_norm_bound(matrix, float(torch.linalg.matrix_norm(matrix.double(), 2)))
        assert_proved(matrix, width=1e-13)
    assert below > 20


def test_zero_and_empty_matrices():
    for shape in ((3, 4), (0, 4), (4, 0), (0, 0)):
        assert proved_norm(torch.zeros(shape)).upper == proved_norm(torch.zeros(shape)).lower == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 3, 300])
def test_entries_that_are_not_finite_are_refused(bad, size):
    matrix = torch.ones(size, size)
    matrix[size // 2, -1] = bad
    with pytest.raises(ValueError, match="finite"):
        proved_norm(matrix)


def test_the_search_leaves_gradients_and_random_state_alone():
    matrix, state = random(300, 300).requires_grad_(), torch.get_rng_state()
    proved_norm(matrix)
    assert matrix.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def with_spectrum(values, rows):
    """A matrix [rows, n] with about these singular values."""
    left, right = torch.linalg.qr(random(rows, len(values)))[0], torch.linalg.qr(random(len(values), len(values)))[0]
    return left * values @ right


SPECTRA = {
    "random": lambda n: random(n, n),
    "wide": lambda n: random(n // 2, 2 * n),
    "orthogonal": lambda n: torch.linalg.qr(random(n, n))[0],
    "rank one": lambda n: torch.outer(random(n), random(n, seed=1)),
    "nearly equal": lambda n: with_spectrum(1 - 1e-7 * torch.linspace(0, 1, n).double(), n),
    "linear": lambda n: with_spectrum(torch.linspace(0, 1, n).double(), n),
    "one far above": lambda n: with_spectrum(torch.cat([torch.tensor([100.0]), torch.ones(n - 1)]).double(), n),
    "two at the top": lambda n: with_spectrum(torch.cat([torch.ones(2), torch.linspace(0, 0.9, n - 2)]).double(), n),
    "graded": lambda n: with_spectrum(10.0 ** -torch.linspace(0, 30, n).double(), n),
}


def assert_tight(matrix):
    proof, true = proved_norm(matrix), float(torch.linalg.svdvals(matrix)[0])
    assert true * (1 - 1e-8) <= proof.lower <= true * (1 + 1e-13)
    assert true * (1 - 1e-13) <= proof.upper <= true * (1 + 1e-8)


@pytest.mark.parametrize("size", [40, 200, 400])
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_are_tight_whatever_the_spectrum(name, size):
    assert_tight(SPECTRA[name](size))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_of_large_matrices_are_tight(name):
    assert_tight(SPECTRA[name](1024))


def ball_cholesky(matrix):
    """Whether a factorisation in balls of 300 bits proves a symmetric exact matrix positive definite."""
    size = len(matrix)
    rows = [[flint.arb(entry) for entry in row[: i + 1]] for i, row in enumerate(matrix)]
    for j in range(size):
        for i in range(j, size):
            rows[i][j] -= sum((a * b for a, b in zip(rows[i][:j], rows[j][:j], strict=True)), flint.arb(0))
            if i == j and not rows[j][j] > 0:
                return False
            rows[i][j] = rows[j][j].sqrt() if i == j else rows[i][j] / rows[j][j]
    return True


@pytest.mark.parametrize("kind", ["random", "orthogonal", "nearly equal"])
def test_a_larger_matrix_in_ball_arithmetic(kind):
    matrix = SPECTRA[kind](48)
    proof, products = proved_norm(matrix), gram(exact_matrix(matrix))
    with flint.ctx.workprec(300):
        assert ball_cholesky(less(exact(proof.upper) ** 2, products))
        assert not ball_cholesky(less(exact(proof.lower) ** 2, products))


# blocks

KINDS = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def hermitian(count, size, dtype, seed=0):
    entries = random(count, size, size, seed=seed)
    if dtype.is_complex:
        entries = torch.complex(entries, random(count, size, size, seed=seed + 1))
    return (entries @ entries.mH / size).to(dtype)


def real_form(block):
    """The real symmetric matrix with the eigenvalues of a Hermitian one, each twice; reads the lower triangle."""
    lower = block.tril().to(torch.complex128)
    whole = lower + lower.tril(-1).mH
    whole = torch.complex(whole.real, whole.imag.tril(-1) + whole.imag.triu(1))
    return torch.cat([torch.cat([whole.real, -whole.imag], 1), torch.cat([whole.imag, whole.real], 1)])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_levels_that_pass_are_upper_bounds_of_the_exact_eigenvalue(dtype, size):
    """Levels around the true eigenvalue: a factorisation may end below it, and the bound must cover that."""
    blocks = hermitian(40, size, dtype, seed=size)
    top = torch.linalg.eigvalsh(blocks.to(torch.complex128 if dtype.is_complex else torch.float64))[:, -1]
    passed = 0
    for steps in (-20.0, -2.0, -1.0, 0.0, 1.0, 3.0, 30.0, 1e4):
        bounds = proved_below(blocks, top * (1 + steps * unit(dtype)))
        for block, bound in zip(blocks, bounds.tolist(), strict=True):
            if bound < math.inf:
                passed += 1
                assert is_semidefinite(less(exact(bound), exact_matrix(real_form(block))))
        if steps > 1e3:
            assert bool((bounds <= top * (1 + 2e4 * unit(dtype))).all())
    assert passed > 80


@pytest.mark.parametrize("dtype", KINDS)
def test_singular_blocks_whose_factorisation_may_end_below_the_eigenvalue(dtype):
    vectors = random(30, 4, seed=8).to(dtype)
    if dtype.is_complex:
        vectors = vectors + 1j * random(30, 4, seed=9).to(dtype)
    blocks = vectors[:, :, None] * vectors[:, None, :].conj()
    for steps in (-3.0, 0.0, 2.0, 50.0):
        level = vectors.abs().square().sum(1) * (1 + steps * unit(dtype))
        for block, bound in zip(blocks, proved_below(blocks, level).tolist(), strict=True):
            assert bound == math.inf or is_semidefinite(less(exact(bound), exact_matrix(real_form(block))))


@pytest.mark.parametrize("dtype", KINDS)
def test_levels_clearly_below_fail_and_blocks_are_left_alone(dtype):
    blocks = hermitian(6, 4, dtype)
    before, top = blocks.clone(), torch.linalg.eigvalsh(blocks)[:, -1]
    assert proved_below(blocks, top * 0.99).tolist() == [math.inf] * 6
    mixed = proved_below(blocks, torch.where(torch.arange(6) % 2 == 0, top * 2, top / 2))
    assert mixed.isfinite().tolist() == [True, False] * 3
    assert mixed.dtype == torch.float64
    assert torch.equal(blocks, before)
    assert proved_below(blocks[0], float(top[0]) * 2).shape == ()
    assert proved_below(blocks.reshape(2, 3, 4, 4), 100.0).shape == (2, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (3, 3)])
@pytest.mark.parametrize("dtype", KINDS)
def test_blocks_that_are_not_finite_are_never_proved(dtype, place, bad):
    blocks = hermitian(3, 4, dtype)
    blocks[1][place] = bad
    bounds = proved_below(blocks, 100.0)
    assert bounds[1] == math.inf
    assert bool(bounds[[0, 2]].isfinite().all())
    assert bool(proved_below(hermitian(2, 3, dtype), bad).isinf().all())


def test_no_blocks_and_blocks_of_no_size():
    assert proved_below(torch.zeros(0, 3, 3), 1.0).shape == (0,)
    assert proved_below(torch.zeros(2, 0, 0), 1.0).tolist() == [0.0, 0.0]

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import matrix_norm, random

from speccert.certify.linear import (
    Chain,
    Channelwise,
    Concat,
    Dense,
    Diagonal,
    LinearMap,
    Reindex,
    Sum,
    add,
    chain,
    check_norm,
    converted,
    float64,
    identity,
    joined,
    largest_norm,
    magnitude,
    matrix_bounds,
)

NORMS = ("l2", "linf", "l1")


def flip(shape):
    return Reindex(lambda x: x.flip(-1), shape, shape)


def pool(shape):
    image = (*shape[:-1], shape[-1] // 2)
    return Channelwise(lambda x: x.unflatten(-1, (-1, 2)).mean(-1), shape, image)


def matrix_of(linear):
    size = math.prod(linear.in_shape)
    return linear.apply(torch.eye(size, dtype=torch.float64).reshape(size, *linear.in_shape)).flatten(1).T


MAPS = {
    "dense": Dense(random(4, 6), (6,)),
    "dense on the last axis": Dense(random(4, 6), (3, 6)),
    "diagonal": Diagonal(random(6), (6,)),
    "diagonal by channel": Diagonal(random(3, 1), (3, 5)),
    "number": Diagonal(torch.tensor(-2.5, dtype=torch.float64), (3, 4)),
    "identity": identity((4, 2)),
    "reindex": flip((3, 4)),
    "channelwise": pool((3, 8)),
    "chain": Chain((Dense(random(4, 6), (6,)), Diagonal(random(4, seed=1), (4,)), Dense(random(3, 4, seed=2), (4,)))),
    "chain of one": Chain((flip((6,)), Dense(random(4, 6), (6,)))),
    "chain of none": Chain((flip((6,)), flip((6,)))),
    "sum": Sum((Dense(random(6, 6), (6,)), identity((6,)))),
    "concat": Concat((Dense(random(4, 6), (6,)), identity((6,)), Dense(random(2, 6, seed=4), (6,))), 0),
    "concat on an inner axis": Concat((identity((2, 6)), Dense(random(4, 6), (2, 6))), 1),
    "nested": Chain((Sum((Dense(random(6, 6), (6,)), identity((6,)))), Concat((identity((6,)), flip((6,))), 0))),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linear", MAPS.values(), ids=MAPS)
def test_bounds_enclose_the_matrix_norm(linear, norm):
    exact, bounds = matrix_norm(matrix_of(linear), norm), linear.bounds(norm)
    assert bounds.lower <= exact * (1 + 1e-12)
    assert exact * (1 - 1e-12) <= bounds.upper <= exact * (1 + 1e-8)
    assert magnitude(linear, norm) >= exact * (1 - 1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linear", MAPS.values(), ids=MAPS)
def test_structured_bounds_are_upper_bounds(linear, norm):
    structured = linear._structured(norm)
    assert structured is None or structured.upper >= matrix_norm(matrix_of(linear), norm)


@pytest.mark.parametrize("linear", MAPS.values(), ids=MAPS)
def test_adjoint_and_rows_are_those_of_the_matrix(linear):
    matrix, y = matrix_of(linear), random(3, *linear.out_shape, seed=9)
    torch.testing.assert_close(linear.adjoint(y).flatten(1), y.flatten(1) @ matrix)
    torch.testing.assert_close(linear.rows(), matrix)
    assert linear.apply(torch.zeros(2, *linear.in_shape, dtype=torch.float64)).shape == (2, *linear.out_shape)


@pytest.mark.parametrize("first", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("last", ["dense", "diagonal", "concat", "sum"])
def test_chains_fold_without_changing_the_map(first, last):
    size = math.prod(first.out_shape)
    flat = Reindex(lambda x: x.flatten(1), first.out_shape, (size,))
    second = {
        "dense": Dense(random(5, size, seed=3), (size,)),
        "diagonal": Diagonal(random(size, seed=3), (size,)),
        "concat": Concat((identity((size,)), Dense(random(2, size), (size,))), 0),
        "sum": Sum((identity((size,)), Dense(random(size, size), (size,)))),
    }[last]
    torch.testing.assert_close(matrix_of(chain([first, flat, second])), matrix_of(second) @ matrix_of(first))


@pytest.mark.parametrize("name", [name for name, m in MAPS.items() if m.in_shape == m.out_shape])
def test_sums_fold_without_changing_the_map(name):
    first = MAPS[name]
    second = Diagonal(torch.tensor(0.5, dtype=torch.float64), first.in_shape)
    for total in (add(first, second), add(second, first), add(first, first)):
        expected = matrix_of(first) + (matrix_of(first) if total is None else 0)
        assert total.in_shape == first.in_shape
        assert expected.shape == matrix_of(total).shape
    torch.testing.assert_close(
        matrix_of(add(first, second)), matrix_of(first) + 0.5 * torch.eye(len(matrix_of(first))).double()
    )
    torch.testing.assert_close(matrix_of(add(first, first)), 2 * matrix_of(first))


def test_neighbours_fold_into_one_map():
    dense, factor = Dense(random(4, 6), (6,)), Diagonal(random(6), (6,))
    assert isinstance(chain([factor, dense]), Dense)
    assert isinstance(chain([dense, Diagonal(random(4), (4,))]), Dense)
    assert isinstance(chain([factor, factor]), Diagonal)
    assert isinstance(add(factor, identity((6,))), Diagonal)


def test_cancelling_sum_is_small_but_covers_its_rounding():
    weight = random(6, 6)
    bounds = Sum((Dense(weight, (6,)), Dense(-weight, (6,)))).bounds()
    assert 0.0 < bounds.upper < 1e-10


def test_an_isometry_needs_no_matrix():
    assert flip((3, 200, 200)).bounds() == identity((3, 200, 200)).bounds()
    assert flip((3, 200, 200)).bounds().upper == 1.0


def test_a_large_map_without_a_structure_is_refused():
    linear = Channelwise(lambda x: x.flip(-1), (1, 5000), (1, 5000))
    with pytest.raises(ValueError, match="too large"):
        linear.bounds()


@pytest.mark.parametrize("norm", ["L2", "2", "", "l3"])
def test_unknown_norms_are_refused(norm):
    with pytest.raises(ValueError, match="expected one of l2, linf, l1"):
        check_norm(norm)
    with pytest.raises(ValueError, match="expected one of l2, linf, l1"):
        MAPS["dense"].bounds(norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [Dense, Diagonal])
def test_weights_that_are_not_finite_are_refused(norm, bad, kind):
    weight = random(4, 4) if kind is Dense else random(4)
    weight[-1] = bad
    with pytest.raises(ValueError, match="finite"):
        kind(weight, (4,)).bounds(norm)
    with pytest.raises(ValueError, match="finite"):
        Chain((identity((4,)), kind(weight, (4,)), Dense(random(2, 4), (4,)))).bounds(norm)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 1), (1, 7), (30, 30)])
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_matrix_bounds_of_every_size_and_scale(shape, scale):
    matrix = random(*shape)
    for norm in NORMS:
        exact, bounds = matrix_norm(matrix, norm) * scale, matrix_bounds(matrix * scale, norm, "test")
        assert exact * (1 - 1e-8) <= bounds.lower <= exact <= bounds.upper <= exact * (1 + 1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("matrix", [torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(3, 0)])
def test_zero_and_empty_matrices_have_norm_0(matrix, norm):
    assert matrix_bounds(matrix, norm, "test").upper == 0.0


def test_rank_one_matrix_of_ones_is_exact():
    bounds = matrix_bounds(torch.ones(40, 90), "l2", "test")
    assert bounds.lower <= 60.0 <= bounds.upper <= 60.0 * (1 + 2e-9)


@pytest.mark.parametrize("kind", ["real", "complex", "wide", "alike", "one large", "many zeros"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_largest_block_is_found(kind, count):
    blocks = random(count, 4, 9 if kind == "wide" else 4)
    if kind == "complex":
        blocks = torch.complex(blocks, random(count, 4, 4, seed=1))
    elif kind == "alike":
        blocks = blocks[:1].expand(count, -1, -1).clone()
    elif kind == "one large":
        blocks[-1] = torch.outer(random(4), random(4, seed=1)) * 3
    elif kind == "many zeros":
        blocks[1:] = 0
    exact = float(torch.linalg.matrix_norm(blocks, 2).max())
    assert largest_norm(blocks) == pytest.approx(exact, rel=1e-9)
    assert largest_norm(blocks, floor=2 * exact) == pytest.approx(2 * exact, rel=1e-9)
    assert exact / 2 * (1 - 1e-9) <= largest_norm(blocks, give_up=exact / 2) <= exact * (1 + 1e-9)


def test_blocks_of_equal_frobenius_norm_hide_nothing():
    """The block with the largest norm has the least Frobenius norm: the first guess of the search is wrong."""
    blocks = torch.eye(6, dtype=torch.float64).repeat(50, 1, 1)
    blocks[31] = torch.diag(torch.tensor([1.5, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert largest_norm(blocks) == pytest.approx(1.5, rel=1e-9)


def test_joined_constants():
    assert joined([3.0, 4.0], "l2") == 5.0
    assert joined([3.0, 4.0], "linf") == 4.0
    assert joined([3.0, 4.0], "l1") == 7.0


def test_conversion_reaches_nested_maps_and_keeps_them():
    nested = Chain((Sum((Dense(random(3, 3).float(), (3,)), identity((3,)))), Diagonal(random(3).float(), (3,))))
    exact = float64(nested)
    assert matrix_of(exact).dtype == torch.float64
    assert nested.maps[1].scale.dtype == torch.float32
    assert converted(nested, lambda tensor: 2 * tensor).maps[1].scale.equal(2 * nested.maps[1].scale)


@dataclass(frozen=True)
class Cumulative(LinearMap):
    """A user's map with the two methods that must be written."""

    in_shape: tuple[int, ...]

    @property
    def out_shape(self):
        return self.in_shape

    def apply(self, x):
        return x.cumsum(-1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_map_with_the_two_mandatory_methods_is_bounded(norm):
    linear = Cumulative((7,))
    exact = matrix_norm(torch.ones(7, 7).tril(), norm)
    assert exact <= linear.bounds(norm).upper <= exact * (1 + 1e-8)

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from exact_norms import bounded_by, product, rational, scaled, total, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import matrix_norm, random

from speccert.certify.linear import (
    Chain,
    Channelwise,
    Concat,
    Dense,
    Diagonal,
    LinearMap,
    NormBounds,
    Reindex,
    Sum,
    add,
    chain,
    check_norm,
    converted,
    float64,
    identity,
    joined,
    matrix_bounds,
    widest,
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
    assert linear.absolute(norm) >= exact * (1 - 1e-12)


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
    for both in (add(first, second), add(second, first), add(first, first)):
        assert both.out_shape == first.out_shape
        assert both.in_shape == first.in_shape
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


def test_joined_constants():
    assert 5.0 <= joined([3.0, 4.0], "l2") <= 5.0 * (1 + 1e-14)
    assert joined([3.0, 4.0], "linf") == 4.0
    assert 7.0 <= joined([3.0, 4.0], "l1") <= 7.0 * (1 + 1e-14)


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


# what the tensors of folded and composed maps miss of the exact operator

AWKWARD = st.sampled_from([0.1, -0.1, 1 / 3, 0.7, 1 + 2.0**-52, -7e3, 3e-5, 1e-300, 0.0, 1.0, -1.0])


def difference(exact, tensor):
    return [[a - b for a, b in zip(u, v, strict=True)] for u, v in zip(exact, rational(tensor), strict=True)]


def assert_covers(linear, exact):
    """The exact operator (rows of Fractions) is below every bound, and within `slack` of the held one."""
    for norm in NORMS:
        bounds = linear.bounds(norm)
        assert bounded_by(exact, bounds.upper, norm)
        assert bounds.upper - bounds.lower <= 1e-13 * linear.absolute(norm) + 3 * linear.slack
        assert bounded_by(difference(exact, matrix_of(float64(linear))), linear.matrix_error(norm), norm)
        assert bounded_by([[abs(a) for a in row] for row in exact], linear.absolute(norm), norm)
        assert linear.absolute(norm) <= widest(linear)


def tensor_of(data, *shape):
    values = data.draw(st.lists(AWKWARD, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def entries(tensor):
    return [Fraction(value) for value in tensor.double().flatten().tolist()]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([torch.float64, torch.float32]))
def test_folding_accounts_for_its_rounding(data, dtype):
    weight, before, after, other = (tensor_of(data, *shape).to(dtype) for shape in ((3, 4), (4,), (3,), (3,)))
    dense = Dense(weight, (4,))
    rows = scaled(rational(weight), entries(after))
    exact = [[value * factor for value, factor in zip(row, entries(before), strict=True)] for row in rows]
    folded = chain([Diagonal(before, (4,)), dense, Diagonal(after, (3,))])
    assert isinstance(folded, Dense)
    assert_covers(folded, exact)
    both = add(Diagonal(after, (3,)), Diagonal(other, (3,)))
    assert isinstance(both, Diagonal)
    summed = total(scaled(unit(3), entries(after)), scaled(unit(3), entries(other)))
    for norm in NORMS:
        assert bounded_by(summed, both.bounds(norm).upper, norm)
    scale = chain([Diagonal(after, (3,)), Diagonal(other, (3,))])
    for norm in NORMS:
        assert bounded_by(scaled(scaled(unit(3), entries(after)), entries(other)), scale.bounds(norm).upper, norm)


def test_exact_factors_leave_no_slack():
    dense = Dense(random(3, 4), (4,))
    for scale in (torch.ones(4), -torch.ones(()), torch.tensor([1.0, -1.0, 0.0, 1.0])):
        assert chain([Diagonal(scale, (4,)), dense]).slack == 0.0
    assert 0 < chain([Diagonal(torch.full((), 0.1), (4,)), dense]).slack < 1e-14
    assert add(Diagonal(random(4), (4,)), identity((4,))).slack > 0


@pytest.mark.parametrize("norm", NORMS)
def test_slack_of_the_parts_reaches_the_bound_of_the_whole(norm):
    """Operators that differ from the held ones by as much as the slack allows."""
    held, off = torch.eye(3, dtype=torch.float64), 0.25
    rough, plain = Dense(held, (3,), slack=off), Dense(held, (3,))
    scale = Diagonal(torch.tensor(2.0), (3,), slack=0.5)
    assert rough.bounds(norm).upper >= 1.25
    assert rough.bounds(norm).lower <= 0.75
    assert Diagonal(torch.tensor(2.0), (3,), slack=0.5).bounds(norm).upper >= 2.5
    assert Chain((rough, plain, rough)).bounds(norm).upper >= 1.25**2
    assert chain([rough, scale]).bounds(norm).upper >= 1.25 * 2.5
    assert chain([scale, rough]).bounds(norm).upper >= 1.25 * 2.5
    assert chain([scale, scale]).bounds(norm).upper >= 2.5**2
    assert Sum((rough, plain)).bounds(norm).upper >= 2.25
    assert add(scale, scale).bounds(norm).upper >= 5.0
    assert Concat((rough, rough), 0).bounds(norm).upper >= {"l2": 1.25 * math.sqrt(2), "linf": 1.25, "l1": 2.5}[norm]
    assert Channelwise(lambda x: 2 * x, (2, 3), (2, 3), slack=0.5).bounds(norm).upper >= 2.5
    assert Chain((rough, Sum((rough, Dense(-held, (3,)))))).bounds(norm).upper >= 0.25 * 1.25


def composites(seed):
    a, b, c = random(3, 4, seed=seed), random(3, 3, seed=seed + 1), random(4, 3, seed=seed + 2)
    near = b * (1 + 1e-13)
    dense = {name: Dense(t, (t.shape[1],)) for name, t in {"a": a, "b": b, "c": c, "-b": -near}.items()}
    exact = {name: rational(linear.weight) for name, linear in dense.items()}
    return {
        "chain": (Chain((dense["a"], dense["b"], dense["c"])), product(exact["c"], product(exact["b"], exact["a"]))),
        "wide": (Chain((dense["c"], dense["a"])), product(exact["a"], exact["c"])),
        "cancelling sum": (Sum((dense["b"], dense["-b"])), total(exact["b"], exact["-b"])),
        "cancelling, then a chain": (
            Chain((dense["a"], Sum((dense["b"], dense["-b"])), dense["c"])),
            product(exact["c"], product(total(exact["b"], exact["-b"]), exact["a"])),
        ),
        "concat": (
            Chain((dense["a"], Concat((dense["b"], dense["c"]), 0))),
            product([*exact["b"], *exact["c"]], exact["a"]),
        ),
        "folded inside": (
            chain([Diagonal(torch.full((), 0.1, dtype=torch.float64), (4,)), dense["a"], dense["b"]]),
            product(exact["b"], scaled(exact["a"], [Fraction(0.1)] * 3)),
        ),
    }


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("name", composites(0))
def test_composed_maps_cover_the_rounding_of_their_matrix(name, seed):
    linear, exact = composites(seed)[name]
    for norm in NORMS:
        assert bounded_by(exact, linear.bounds(norm).upper, norm)
        for matrix in (matrix_of(linear), linear.rows()):
            assert bounded_by(difference(exact, matrix), linear.matrix_error(norm), norm)
        assert linear.matrix_error(norm) < 1e-12


def test_products_that_underflow_on_the_way_are_not_lost():
    tiny, huge = (Dense(torch.eye(2, dtype=torch.float64) * scale, (2,)) for scale in (1e-200, 1e200))
    for norm in NORMS:
        bounds = Chain((tiny, tiny, huge, huge)).bounds(norm)
        assert bounded_by(scaled(unit(2), [Fraction(1e-200) ** 2 * Fraction(1e200) ** 2] * 2), bounds.upper, norm)


def test_broadcast_sums_are_bounded():
    one, many = Dense(random(1, 4), (4,)), Dense(random(3, 4, seed=1), (4,))
    whole = total([rational(one.weight)[0]] * 3, rational(many.weight))
    linear = Sum((one, many))
    for norm in NORMS:
        assert bounded_by(whole, linear.bounds(norm).upper, norm)
        assert bounded_by(whole, linear._structured(norm).upper, norm)


def test_maps_fused_from_live_tensors_have_no_bound():
    live = chain([Dense(random(3, 4).requires_grad_(), (4,)), Diagonal(random(3), (3,))])
    assert live.slack == math.inf
    with pytest.raises(ValueError, match="slack is infinite"):
        live.bounds()
    with pytest.raises(ValueError, match="slack is infinite"):
        Chain((live, Dense(random(2, 3), (3,)))).bounds()
    assert Dense(random(3, 4).requires_grad_(), (4,)).bounds().upper < math.inf


def test_terms_count_the_roundings_of_a_path():
    dense, scale = Dense(random(3, 4), (4,)), Diagonal(random(3), (3,))
    chained = Chain((dense, scale, Dense(random(5, 3), (3,))))
    assert (dense.terms, dense.adjoint_terms, dense.matrix_terms, scale.terms, flip((3,)).terms) == (4, 3, 0, 1, 0)
    assert (chained.terms, chained.adjoint_terms) == (4 + 1 + 3, 3 + 1 + 5)
    assert Sum((dense, dense, dense)).terms == 6
    assert Concat((dense, dense), 0).adjoint_terms == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_slack_follows_the_type_that_was_rounded_to(dtype):
    dense = Dense(random(3, 4).to(dtype), (4,))
    folded = chain([Diagonal(random(4, seed=1).to(dtype), (4,)), dense])
    exact = [
        [value * factor for value, factor in zip(row, entries(random(4, seed=1).to(dtype)), strict=True)]
        for row in rational(dense.weight)
    ]
    assert folded.weight.dtype == dtype
    for norm in NORMS:
        assert bounded_by(exact, folded.bounds(norm).upper, norm)
        assert bounded_by(difference(exact, folded.weight), folded.slack, norm)
    assert replace(folded, slack=0.0).bounds("linf").upper < folded.bounds("linf").upper


def test_a_bound_from_its_parts_names_them():
    wide = [Channelwise(lambda x: 2 * x, (4, 900), (4, 900)), Dense(random(900, 900), (4, 900))]
    for linear, method in ((Chain(tuple(wide)), " * "), (Sum(tuple(wide)), "sum"), (Concat(tuple(wide), 0), "concat")):
        bounds = linear.bounds("linf")
        assert method in bounds.method
        assert [type(piece) for piece, _ in bounds.pieces] == [Channelwise, Dense]
        assert [bracket for _, bracket in bounds.pieces] == [part.bounds("linf") for part in wide]
    single = Chain((flip((6,)), Dense(random(4, 6), (6,)))).bounds()
    assert [bracket.method for _, bracket in single.pieces] == ["isometry", "dense"]
    assert Chain((Dense(random(4, 6), (6,)), Dense(random(4, 4), (4,)))).bounds().pieces == ()
    assert NormBounds(1.0, 2.0, "torus", torus=((5, 1, 0.5),)).widened(0.5).torus == ((5, 1, 0.5),)

import math
import warnings
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from oracles import large_operator_norm, matrix_norm, operator_matrix, operator_norm, random, randomised
from torch import nn

from speccert.certify import linear_map_of, norm_bounds
from speccert.certify.convolution import Convolution, torus_bound, torus_of
from speccert.certify.linear import Diagonal, float64

ROUNDING = 1e-9
ORACLE = 1e-13  # rounding of the oracles' own singular values and sums
EVEN_SAME = "Using padding='same' with even kernel lengths"  # torch's own remark on speed
pytestmark = pytest.mark.filterwarnings(f"ignore:{EVEN_SAME}")


def conv(channels_in, channels_out, *arguments, dims=2, **options):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return randomised(kind(channels_in, channels_out, *arguments, **options))


def transposed(channels_in, channels_out, *arguments, dims=2, **options):
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    return randomised(kind(channels_in, channels_out, *arguments, **options))


def stride_and_padding_cases():
    for kernel in range(1, 8):
        for stride in (1, 2, 3):
            for padding in sorted({0, kernel // 2, kernel}):
                yield conv(2, 3, kernel, stride, padding), (2, 8, 7)


def padding_mode_cases():
    for mode in ("zeros", "circular", "reflect", "replicate"):
        for kernel, stride, padding in [(3, 1, 1), (3, 1, 0), (3, 2, 1), (5, 3, 2), (3, 1, 4), (2, 1, 1), (4, 2, 3)]:
            yield conv(2, 2, kernel, stride, padding, padding_mode=mode), (2, 6, 9)
        yield conv(2, 3, (3, 5), padding="same", padding_mode=mode), (2, 7, 8)
        yield conv(2, 3, (2, 4), padding="same", padding_mode=mode), (2, 7, 8)
        yield conv(2, 3, 3, padding="same", dilation=2, padding_mode=mode), (2, 7, 8)
        yield conv(2, 3, (1, 3), (2, 3), (0, 2), padding_mode=mode), (2, 5, 8)


def other_cases():
    yield conv(2, 3, 3, padding="valid"), (2, 6, 6)
    for dilation, stride, padding in [(2, 1, 2), (3, 1, 3), (2, 2, 2), (2, 3, 1), (3, 2, 0), ((1, 3), (2, 1), (1, 2))]:
        yield conv(2, 2, 3, stride, padding, dilation), (2, 9, 10)
    for groups in (1, 2, 4):
        yield conv(4, 8, 3, padding=1, groups=groups), (4, 6, 5)
        yield conv(8, 4, 3, stride=2, padding=1, groups=groups), (8, 6, 5)
    yield conv(6, 6, 3, padding=1, groups=6), (6, 7, 7)
    yield conv(4, 12, 5, padding=2, stride=2, groups=4, padding_mode="circular"), (4, 8, 8)
    yield conv(1, 1, 7, padding=3), (1, 3, 3)
    yield conv(2, 2, 3, padding=9), (2, 3, 3)
    yield conv(2, 2, 3, padding=1), (2, 1, 1)
    for kernel, stride, padding in [(1, 1, 0), (3, 1, 1), (5, 2, 2), (4, 3, 1), (7, 1, 6)]:
        yield conv(3, 2, kernel, stride, padding, dims=1), (3, 11)
        yield conv(2, 2, kernel, stride, min(padding, 2), dims=1, padding_mode="circular"), (2, 12)
    yield conv(2, 4, 3, 2, 2, 2, 2, dims=1), (2, 13)
    yield conv(2, 2, 3, 1, 1, dims=3), (2, 4, 3, 5)
    yield conv(1, 2, 2, 2, 1, dims=3), (1, 4, 5, 3)


def transposed_cases():
    for kernel, stride, padding, extra in [
        *((1, 1, 0, 0), (3, 1, 1, 0), (3, 2, 1, 1), (3, 2, 0, 0), (4, 2, 1, 0), (5, 3, 2, 2), (2, 2, 0, 1)),
        *((2, 3, 0, 0), (3, 1, 2, 0), (7, 2, 3, 1)),
    ]:
        yield transposed(2, 3, kernel, stride, padding, extra), (2, 4, 5)
    yield transposed(4, 6, 3, 2, 1, 1, groups=2), (4, 4, 3)
    yield transposed(4, 4, 3, 1, 1, 0, groups=4), (4, 4, 3)
    yield transposed(2, 2, 3, 1, 1, 2, dilation=3), (2, 5, 4)  # output_padding beyond the stride
    yield transposed(2, 2, 3, 2, 2, 1, dilation=2), (2, 5, 4)
    yield transposed(2, 2, 3, (1, 2), (0, 1), (0, 1)), (2, 5, 4)
    yield transposed(3, 2, 4, 2, 1, 0, dims=1), (3, 7)
    yield transposed(1, 2, 3, 2, 1, 1, dims=3), (1, 3, 2, 3)


CASES = [*stride_and_padding_cases(), *padding_mode_cases(), *other_cases(), *transposed_cases()]


def fits(layer, shape):
    """Reflect padding must be below the size, circular at most the size: torch itself refuses the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", EVEN_SAME)
        try:
            layer(torch.zeros(1, *shape))
        except RuntimeError:
            return False
    return True


CASES = [pytest.param(*case, id=f"{number}-{case[0]}-{case[1]}") for number, case in enumerate(CASES) if fits(*case)]


def test_there_are_enough_configurations():
    assert len(CASES) >= 120


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_bounds_enclose_the_norm_of_the_materialised_operator(layer, shape):
    matrix = operator_matrix(layer, shape)
    for norm in ("l2", "linf", "l1"):
        exact, bounds = matrix_norm(matrix, norm), norm_bounds(layer, shape, norm)
        assert bounds.lower <= exact * (1 + ORACLE)
        assert exact * (1 - ORACLE) <= bounds.upper <= exact * (1 + ROUNDING)


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_structured_bounds_without_a_matrix_are_upper_bounds(layer, shape):
    matrix, linear = operator_matrix(layer, shape), float64(linear_map_of(layer, shape))
    for norm in ("l2", "linf", "l1"):
        exact, bounds = matrix_norm(matrix, norm), linear._structured(norm)
        assert (0.9 * exact if norm == "l2" else 0.0) <= bounds.lower <= exact * (1 + ORACLE)
        assert bounds.upper >= exact * (1 - ORACLE)


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_absolute_norms_bound_those_of_the_matrix_of_absolute_entries(layer, shape):
    with torch.no_grad():
        layer.weight.abs_()
    matrix, linear = operator_matrix(layer, shape), float64(linear_map_of(layer, shape))
    for norm in ("l2", "linf", "l1"):
        assert linear.absolute(norm) >= matrix_norm(matrix, norm) * (1 - ORACLE)
    for norm in ("linf", "l1"):
        assert linear.absolute(norm) == pytest.approx(linear._structured(norm).upper, rel=ORACLE)


@pytest.mark.parametrize(("layer", "shape"), CASES)
@torch.no_grad()
def test_roundings_are_counted_on_the_longest_path(layer, shape):
    """Number of products that reach one output or one input: the largest column of a matrix of ones and its copies."""
    linear = float64(linear_map_of(layer, shape))
    ones = replace(linear, weight=torch.ones_like(linear.weight))
    image = ones.apply(torch.ones(1, *shape, dtype=torch.float64))
    back = ones.adjoint(torch.ones(1, *linear.out_shape, dtype=torch.float64))
    assert float(image.max()) <= linear.terms
    if getattr(layer, "padding_mode", "zeros") == "zeros":
        assert float(back.max()) <= linear.adjoint_terms
    entries = operator_matrix_of(ones)
    assert float(entries.max()) <= max(1, linear.matrix_terms)


def operator_matrix_of(linear):
    size = math.prod(linear.in_shape)
    return linear.apply(torch.eye(size, dtype=torch.float64).reshape(size, *linear.in_shape)).flatten(1)


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_map_and_adjoint_are_those_of_the_layer(layer, shape):
    matrix, linear = operator_matrix(layer, shape), float64(linear_map_of(layer, shape))
    x, y = random(2, *shape), random(2, *linear.out_shape, seed=1)
    torch.testing.assert_close(linear.apply(x).flatten(1), x.flatten(1) @ matrix.T)
    torch.testing.assert_close(linear.adjoint(y).flatten(1), y.flatten(1) @ matrix)


@pytest.mark.parametrize("padding_mode", ["circular"])
@pytest.mark.parametrize(("kernel", "stride", "shape"), [(3, 1, (2, 6, 5)), (3, 2, (2, 6, 8)), (5, 3, (3, 9, 6))])
def test_circular_torus_is_exact_where_the_stride_divides_the_side(padding_mode, kernel, stride, shape):
    layer = conv(shape[0], 4, kernel, stride, kernel // 2, padding_mode=padding_mode)
    linear = float64(linear_map_of(layer, shape))
    assert torus_bound(linear) == pytest.approx(operator_norm(layer, shape), rel=1e-9)


def same_padded(kernel, channels_in, channels_out, shape):
    return conv(channels_in, channels_out, kernel, padding="same"), (channels_in, *shape)


def mean_excess(cases, upper, exact):
    ratios = [upper(layer, shape) / exact(layer, shape) for layer, shape in cases]
    assert min(ratios) >= 1 - 1e-12
    return sum(ratios) / len(ratios)


def test_torus_is_within_2_percent_of_the_exact_norm_of_same_padded_layers():
    cases = [same_padded(kernel, 2, 3, shape) for kernel in range(1, 8) for shape in ((16, 16), (24, 16), (20, 28))]
    mean = mean_excess(cases, lambda c, s: torus_bound(float64(linear_map_of(c, s))), large_operator_norm)
    assert mean <= 1.02


def test_public_bound_is_within_2_percent_where_no_matrix_is_made():
    cases = [same_padded(kernel, 4, 4, shape) for kernel in range(1, 8) for shape in ((24, 24), (32, 32), (17, 20))]
    assert all(norm_bounds(layer, shape).method == "torus" for layer, shape in cases)
    mean = mean_excess(cases, lambda c, s: norm_bounds(c, s).upper, large_operator_norm)
    assert mean <= 1.02


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_bracket_of_layers_too_large_for_a_matrix(stride, padding_mode):
    layer, shape = conv(6, 12, 5, stride, 2, padding_mode=padding_mode), (6, 15, 16)
    bounds, exact = norm_bounds(layer, shape), large_operator_norm(layer, shape)
    if math.prod(linear_map_of(layer, shape).out_shape) > 1024:
        assert bounds.method == "torus"
    assert 0.97 * exact <= bounds.lower <= exact * (1 + 1e-9) <= bounds.upper * (1 + 2e-9)


def test_transposed_layer_too_large_for_a_matrix():
    layer, shape = transposed(8, 8, 4, 2, 1), (8, 12, 12)
    bounds, exact = norm_bounds(layer, shape), large_operator_norm(layer, shape)
    assert bounds.method == "torus"
    assert exact <= bounds.upper <= 1.02 * exact


def test_all_ones_kernel_is_not_its_reshaped_matrix():
    layer = conv(4, 4, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    exact = 4 * (1 + 2 * math.cos(math.pi / 9)) ** 2  # 4 J times the squared norm of the 8 x 8 tridiagonal band
    bounds = norm_bounds(layer, (4, 8, 8))
    assert matrix_norm(layer.weight.flatten(1)) == pytest.approx(12.0)
    assert exact == pytest.approx(33.2, abs=0.1)
    assert exact <= bounds.upper <= exact * (1 + ROUNDING)
    assert exact <= torus_bound(float64(linear_map_of(layer, (4, 8, 8)))) <= 36.0


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 40, 40)])
def test_identity_kernel_has_norm_1(shape):
    layer = conv(3, 3, 5, padding=2, bias=False)
    nn.init.dirac_(layer.weight)
    assert norm_bounds(layer, shape).upper == pytest.approx(1.0, abs=3e-9)
    assert norm_bounds(layer, shape).lower == pytest.approx(1.0, abs=3e-9)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 40, 40)])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_zero_kernel_has_norm_0(shape, norm):
    layer = conv(3, 3, 5, padding=2)
    nn.init.zeros_(layer.weight)
    bounds = norm_bounds(layer, shape, norm)
    assert (bounds.lower, bounds.upper) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 40, 40)])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_bounds_scale_with_the_weights(scale, shape, norm):
    layer = conv(3, 4, 3, padding=1).double()
    plain = norm_bounds(layer, shape, norm)
    with torch.no_grad():
        layer.weight.mul_(scale)
    scaled = norm_bounds(layer, shape, norm)
    assert scaled.upper == pytest.approx(plain.upper * scale, rel=1e-8)
    assert scaled.lower == pytest.approx(plain.lower * scale, rel=1e-3)


def test_groups_take_the_maximum_not_the_product():
    layer = conv(4, 4, 3, padding=1, groups=4, bias=False)
    nn.init.dirac_(layer.weight, groups=4)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.1, 0.2, 3.5, 0.3]).reshape(4, 1, 1, 1))
    for shape in ((4, 6, 6), (4, 40, 40)):
        assert norm_bounds(layer, shape).upper == pytest.approx(3.5, rel=1e-6)


def test_bias_does_not_matter():
    layer = conv(2, 3, 3, padding=1)
    before = norm_bounds(layer, (2, 6, 6))
    with torch.no_grad():
        layer.bias.mul_(1e6)
    assert norm_bounds(layer, (2, 6, 6)) == before


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 2, "dilation": 2}, {"padding": "same"}])
@pytest.mark.parametrize("groups", [1, 2])
def test_identity_plus_convolution_is_one_kernel(mode, options, groups):
    layer, shape = conv(4, 4, 3, bias=False, padding_mode=mode, groups=groups, **options), (4, 5, 6)
    linear = float64(linear_map_of(layer, shape))
    total = linear.plus(Diagonal(torch.tensor(0.7, dtype=torch.float64), shape))
    assert isinstance(total, Convolution)
    x = random(2, *shape)
    torch.testing.assert_close(total.apply(x), linear.apply(x) + 0.7 * x)


@pytest.mark.parametrize(
    "options", [{"padding": 0}, {"padding": 2}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2}]
)
def test_kernel_without_a_centre_absorbs_no_identity(options):
    layer, shape = conv(2, 2, 3, **options), (2, 6, 6)
    assert linear_map_of(layer, shape).plus(Diagonal(torch.ones(()), shape)) is None


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channel_factors_fold_on_both_sides(groups):
    layer, shape = conv(4, 8, 3, padding=1, groups=groups), (4, 5, 6)
    linear = float64(linear_map_of(layer, shape))
    before, after = Diagonal(random(4, 1, 1), shape), Diagonal(random(8, 1, 1, seed=1), linear.out_shape)
    x = random(2, *shape)
    torch.testing.assert_close(linear.fused(before).apply(x), linear.apply(before.apply(x)))
    torch.testing.assert_close(linear.followed_by(after).apply(x), after.apply(linear.apply(x)))


def largest_deviation(held, exact):
    """The larger of the l1 and linf norms of the entrywise difference, in rational numbers."""
    rows = [[abs(Fraction(a) - b) for a, b in zip(*pair, strict=True)] for pair in zip(held, exact, strict=True)]
    return max(max(map(sum, rows)), max(sum(row[j] for row in rows) for j in range(len(rows[0]))))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_slack_covers_the_rounding_of_fused_weights(mode):
    """A 1x1 kernel on one pixel: its held weights against the exact products and sums in rational numbers."""
    shape, options = (3, 1, 1), {"bias": False, "padding_mode": mode}
    linear = float64(linear_map_of(conv(3, 3, 1, **options), shape))
    before, after, extra = (Diagonal(random(3, 1, 1, seed=seed), shape) for seed in (1, 2, 3))
    weight = [[Fraction(float(w)) for w in row] for row in linear.weight.flatten(1)]
    first, last, identity = ([Fraction(float(f)) for f in d.scale.flatten()] for d in (before, after, extra))
    scaled = [[w * f for w, f in zip(row, first, strict=True)] for row in weight]
    fused = linear.fused(before)
    assert 0 < largest_deviation(fused.weight.flatten(1).tolist(), scaled) <= Fraction(fused.slack)
    both = fused.followed_by(after)
    scaled = [[w * f for w in row] for row, f in zip(scaled, last, strict=True)]
    assert 0 < largest_deviation(both.weight.flatten(1).tolist(), scaled) <= Fraction(both.slack)
    total = both.plus(extra)
    for index, value in enumerate(identity):
        scaled[index][index] += value
    assert 0 < largest_deviation(total.weight.flatten(1).tolist(), scaled) <= Fraction(total.slack)
    assert total.slack < 1e-14


def test_slack_widens_every_bound():
    for size in (4, 40):
        linear = float64(linear_map_of(conv(3, 4, 3, padding=1), (3, size, size)))
        for norm in ("l2", "linf", "l1"):
            plain, wide = linear.bounds(norm), replace(linear, slack=0.5).bounds(norm)
            assert plain.upper + 0.5 <= wide.upper <= plain.upper + 0.5 + 1e-12
            assert wide.lower <= max(0.0, plain.lower - 0.5)
            assert linear.absolute(norm) + 0.5 <= replace(linear, slack=0.5).absolute(norm) + 1e-12
            adjoint = float64(linear_map_of(transposed(3, 4, 3, padding=1), (3, size, size)))
            assert replace(adjoint, slack=0.5).bounds(norm).upper >= adjoint.bounds(norm).upper + 0.5


def test_factors_that_vary_inside_a_channel_do_not_fold():
    linear = linear_map_of(conv(2, 2, 3, padding=1), (2, 5, 6))
    assert linear.fused(Diagonal(random(1, 5, 6), (2, 5, 6))) is None
    assert linear.followed_by(Diagonal(random(2, 5, 1), (2, 5, 6))) is None


def test_an_early_stop_never_lowers_the_bound():
    """The least of the four twisted tori, each computed alone."""
    for seed in range(3):
        linear = float64(linear_map_of(randomised(nn.Conv2d(9, 10, 3, padding=1), seed), (9, 8, 9)))
        exact = matrix_norm(operator_matrix(randomised(nn.Conv2d(9, 10, 3, padding=1), seed), (9, 8, 9)))
        twists = ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5))
        alone = [dense_torus_norm(linear.weight, (9, 10), twist) for twist in twists]
        assert min(alone) >= exact
        assert torus_bound(linear) == pytest.approx(min(alone), rel=1e-9)


def dense_torus_norm(weight, sides, twist):
    """The largest symbol norm over the whole torus, without chunks, halves or screening."""
    largest = 0.0
    for a in range(sides[0]):
        for b in range(sides[1]):
            first = torch.exp(
                -2j * math.pi * (a + twist[0]) / sides[0] * torch.arange(weight.shape[2], dtype=torch.float64)
            )
            second = torch.exp(
                -2j * math.pi * (b + twist[1]) / sides[1] * torch.arange(weight.shape[3], dtype=torch.float64)
            )
            symbol = torch.einsum("oiyx,y,x->oi", weight.to(first.dtype), first, second)
            largest = max(largest, float(torch.linalg.matrix_norm(symbol, 2)))
    return largest


def test_replaced_fields_keep_the_norm_of_the_adjoint():
    """A transposed convolution has the norm of the convolution it is the adjoint of."""
    layer = transposed(3, 2, 3, 2, 1, 0)
    linear = float64(linear_map_of(layer, (3, 5, 6)))
    forward = replace(linear.forward)
    assert forward.out_shape == linear.in_shape
    assert forward.bounds().upper == pytest.approx(linear.bounds().upper, rel=1e-8)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 2, 5), (2, 3, 3)),
        (nn.Conv2d(2, 2, 3), (3, 8, 8)),
        (nn.Conv2d(2, 2, 3), (2, 8)),
        (nn.Conv2d(2, 2, 3), (2, 8, 8, 8)),
        (nn.Conv1d(5, 5, 3), (9,)),
        (nn.ConvTranspose2d(2, 2, 3), (3, 8, 8)),
        (nn.Conv2d(2, 2, 3, padding=3, padding_mode="reflect"), (2, 3, 3)),
        (nn.Conv2d(2, 2, 3, padding=4, padding_mode="circular"), (2, 3, 3)),
        (nn.ConvTranspose2d(2, 2, 1, padding=2), (2, 3, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(layer, shape):
    with pytest.raises(ValueError, match=r"expected|does not fit"):
        norm_bounds(layer, shape)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 60, 60)])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_weights_that_are_not_finite_are_refused(bad, shape, norm):
    layer = conv(2, 2, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        norm_bounds(layer, shape, norm)


def test_map_without_centre_tap_in_reach():
    """Padding beyond the kernel: the tap that would read the pixel itself does not exist."""
    linear = Convolution(random(2, 2, 1, 1), (2, 4, 4), (1, 1), ((1, 0), (0, 1)), (1, 1))
    assert linear.plus(Diagonal(torch.ones(()), (2, 4, 4))) is None


def torus_layers():
    yield conv(3, 4, 3, padding=1), (3, 7, 8)
    yield conv(3, 4, 3, 2, 1), (3, 7, 8)
    yield conv(3, 4, 5, 3, (0, 2), dilation=(1, 2)), (3, 9, 11)
    yield conv(4, 6, 3, 2, 1, groups=2, padding_mode="circular"), (4, 8, 7)
    yield conv(3, 4, 3, 2, 1, padding_mode="replicate"), (3, 8, 7)
    yield transposed(4, 3, 4, 2, 1), (4, 5, 6)


@pytest.mark.parametrize(("layer", "shape"), list(torus_layers()))
def test_torus_is_one_of_which_the_layer_is_a_compression(layer, shape):
    """Its sides hold the picture and every place that is read, and a twist needs a seam that nothing reads across."""
    linear = float64(linear_map_of(layer, shape))
    axes = linear._structured("l2").torus
    linear = getattr(linear, "forward", linear)
    assert axes == torus_of(linear).axes
    for axis, (side, stride, twist) in enumerate(axes):
        size, (before, after) = linear.in_shape[axis + 1], linear.padding[axis]
        assert side % stride == 0
        assert twist in (0.0, 0.5)
        if linear.padding_mode == "circular":
            assert (side, twist) == (size, 0.0)
            assert stride in (1, linear.stride[axis])
            continue
        size += before + after if linear.padding_mode != "zeros" else 0
        before = before if linear.padding_mode == "zeros" else 0
        outputs = (linear.out_shape[axis + 1] - 1) * linear.stride[axis]
        assert stride == linear.stride[axis]
        assert side >= size + before
        assert side > outputs + linear.spans[axis] - before
        assert side > outputs


KERNELS = {
    "denormal": lambda weight: weight * 1e-43,
    "huge": lambda weight: weight * 1e38 / weight.abs().max(),
    "mixed": lambda weight: weight * torch.logspace(-30, 30, weight.shape[2])[:, None],
    "mixed channels": lambda weight: (
        weight * torch.logspace(-38, 38, len(weight)).reshape(-1, 1, 1, 1).clamp(1e-37, 1e37)
    ),
    "cancelling taps": lambda weight: weight - weight.mean((2, 3), keepdim=True),
    "cancelling channels": lambda weight: weight[:1] * torch.tensor([1.0, -1.0, 1 + 1e-7, -1.0])[:, None, None, None],
    "rank one": torch.ones_like,
    "single entry": lambda weight: nn.init.dirac_(torch.empty_like(weight)) * 3,
}


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("kind", KERNELS)
def test_bounds_of_adversarial_kernels(kind, mode):
    layer, shape = conv(4, 4, 3, padding=1, bias=False, padding_mode=mode), (4, 6, 7)
    with torch.no_grad():
        layer.weight.copy_(KERNELS[kind](layer.weight))
    scale = float(layer.weight.detach().abs().max())
    exact = matrix_norm(operator_matrix(layer, shape) / scale) * scale  # no square over- or underflows
    bounds, structured = norm_bounds(layer, shape), float64(linear_map_of(layer, shape))._structured("l2")
    assert bounds.lower <= exact * (1 + ORACLE)
    assert structured.lower <= exact * (1 + ORACLE)
    assert exact * (1 - ORACLE) <= min(bounds.upper, structured.upper)
    assert structured.upper <= exact * (1 + ROUNDING if mode == "circular" else 1.2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kernel", "stride", "channels"), [(4, 2, 16), (3, 1, 16), (5, 1, 8)])
def test_lower_end_stays_near_the_norm_of_larger_layers(kernel, stride, channels, seed):
    layer = randomised(nn.Conv2d(channels, 16, kernel, stride, (kernel - 1) // 2), seed)
    bounds = norm_bounds(layer, (channels, 24, 24))
    assert bounds.method == "torus"
    assert 0.96 * bounds.upper <= bounds.lower <= bounds.upper


def test_materialised_bounds_name_no_torus():
    bounds = norm_bounds(conv(2, 2, 3, padding=1), (2, 5, 5))
    assert (bounds.method, bounds.torus) == ("materialised", ())


def test_orthogonal_1x1_kernel_has_norm_1():
    layer, shape = conv(64, 64, 1, bias=False).double(), (64, 32, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(random(64, 64))[0][..., None, None])
    bounds = norm_bounds(layer, shape)
    assert bounds.method == "torus"
    assert 1 - 1e-12 <= bounds.upper <= 1 + ROUNDING
    assert 1 - ROUNDING <= bounds.lower <= 1 + 1e-12

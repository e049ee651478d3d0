"""Properties of random graphs: bounds dominate exact norms, and no float inside a radius changes the answer."""

import math
from fractions import Fraction

import pytest
import torch
from exact_norms import bounded_by, entries, product, rational, root, scaled, total, unit
from flips import assert_no_flip, exact_copy, executed, keeps, near_boundary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Wired, seeded
from torch import nn

from speccert.attacks import attack
from speccert.attacks.exact import strictly_inside
from speccert.certify import certified_radii, lipschitz, norm_bounds
from speccert.certify.convolution import torus_bound
from speccert.certify.linear import float64
from speccert.certify.rules import linear_map_of

NORMS = ("l2", "linf", "l1")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

norms = st.sampled_from(NORMS)
seeds = st.integers(0, 2**31)
scales = st.floats(-6, 6).map(lambda power: 10.0**power)


def filled(module, seed, scale=1.0, sparse=0.0):
    """The module in eval mode with normal weights of a size, some of them 0, and statistics of all sizes."""
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            kept = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) >= sparse
            tensor.copy_(scale * values * kept)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(10 ** (6 * torch.rand(buffer.shape, generator=generator, dtype=torch.float64) - 4))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return module.eval().requires_grad_(False)


# Norms of layers


@st.composite
def convolutions(draw, transposed=False):
    """A convolution that fits a small map, and the map's shape."""
    groups = draw(st.sampled_from([1, 1, 2]))
    c_in, c_out = (groups * draw(st.integers(1, 2)) for _ in range(2))
    options = {name: (draw(st.integers(1, 3)), draw(st.integers(1, 3))) for name in ("kernel_size", "stride")}
    options["dilation"] = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    reach = [d * (k - 1) for d, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    size = [draw(st.integers(3, 5)) for _ in range(2)]
    if transposed:
        layer = nn.ConvTranspose2d(c_in, c_out, groups=groups, bias=draw(st.booleans()), **options)
        return layer, (c_in, *size)
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    most = {"zeros": [3, 3], "circular": size, "reflect": [n - 1 for n in size], "replicate": [3, 3]}[mode]
    padding = [draw(st.integers(max(0, -(-(r + 1 - n) // 2)), m)) for r, n, m in zip(reach, size, most, strict=True)]
    layer = nn.Conv2d(c_in, c_out, padding=tuple(padding), padding_mode=mode, groups=groups, **options)
    return layer, (c_in, *size)


@st.composite
def layers(draw):
    """Any affine layer and an input shape."""
    kind = draw(st.sampled_from(["dense", "conv", "conv", "conv", "transposed", "conv1d"]))
    if kind == "dense":
        return nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9))), None
    if kind == "conv1d":
        return nn.Conv1d(2, 3, draw(st.integers(1, 4)), padding=draw(st.integers(0, 3))), (2, draw(st.integers(4, 9)))
    return draw(convolutions(transposed=kind == "transposed"))


def check_layer(case, norm, seed, scale, double, sparse):
    layer, shape = case
    shape = shape or (layer.in_features,)
    layer = filled(layer.double() if double else layer, seed, scale, sparse)
    exact = entries(layer, shape)
    bounds = norm_bounds(layer, shape, norm)
    assert bounded_by(exact, bounds.upper, norm)
    if norm == "l2" and isinstance(layer, nn.Conv2d):
        assert bounded_by(exact, torus_bound(float64(linear_map_of(layer, shape))))
    if bounds.lower > 0:
        assert not bounded_by(exact, bounds.lower * (1 - 1e-9), norm)


@given(layers(), norms, seeds, scales, st.booleans(), st.sampled_from([0.0, 0.0, 0.7]))
@FEW
def test_bounds_of_layers_dominate_the_exact_norm(case, norm, seed, scale, double, sparse):
    check_layer(case, norm, seed, scale, double, sparse)


@pytest.mark.slow
@given(layers(), norms, seeds, scales, st.booleans(), st.sampled_from([0.0, 0.0, 0.7]))
@MANY
def test_bounds_of_many_layers_dominate_the_exact_norm(case, norm, seed, scale, double, sparse):
    check_layer(case, norm, seed, scale, double, sparse)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 1), (3, 2)])
def test_bounds_of_average_pools_dominate_the_exact_norm(norm, kernel, stride):
    layer = nn.AvgPool2d(kernel, stride)
    exact = [[value.limit_denominator(1000) for value in row] for row in entries(layer, (1, 5, 5))]
    assert bounded_by(exact, norm_bounds(layer, (1, 5, 5), norm).upper, norm)
    assert bounded_by(exact, torus_bound(float64(linear_map_of(layer, (1, 5, 5)))))


def batch_norm_scales(layer):
    values = zip(layer.weight.tolist(), layer.running_var.tolist(), strict=True)
    return [Fraction(w) / root(Fraction(v) + Fraction(layer.eps)) for w, v in values]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("norm", NORMS)
def test_bounds_of_batch_norm_dominate_the_exact_norm(norm, seed):
    layer = filled(nn.BatchNorm1d(5), seed, 10.0 ** (seed % 7 - 3))
    exact = scaled(unit(5), batch_norm_scales(layer))
    assert bounded_by(exact, norm_bounds(layer, (5,), norm).upper, norm)


# Norms of affine graphs: everything folds into one run


class Sum(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        result = self.branches[0](x)
        for branch in self.branches[1:]:
            result = result + branch(x)
        return result


class Joined(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def graph_matrix(module, shape):
    """The exact matrix of an affine graph, layer by layer, and its output shape."""
    if isinstance(module, nn.Sequential):
        matrix = unit(math.prod(shape))
        for part in module:
            own, shape = graph_matrix(part, shape)
            matrix = product(own, matrix)
        return matrix, shape
    if isinstance(module, Sum):
        parts = [graph_matrix(branch, shape) for branch in module.branches]
        matrix = parts[0][0]
        for part, _ in parts[1:]:
            matrix = total(matrix, part)
        return matrix, parts[0][1]
    if isinstance(module, Joined):
        parts = [graph_matrix(branch, shape) for branch in module.branches]
        return [row for part, _ in parts for row in part], (sum(part[1][0] for part in parts), *parts[0][1][1:])
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        pixels = math.prod(shape[1:])
        factors = [factor for factor in batch_norm_scales(module) for _ in range(pixels)]
        return scaled(unit(math.prod(shape)), factors), shape
    with torch.no_grad():
        return entries(module, shape), tuple(module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])


@st.composite
def affine_graphs(draw, depth=2):
    """A graph of affine layers on vectors of one width."""
    width = 4

    def block(level):
        kind = draw(
            st.sampled_from(["linear", "linear", "norm", "sum", "cat", "chain"] if level else ["linear", "norm"])
        )
        if kind == "linear":
            return nn.Linear(width, width)
        if kind == "norm":
            return nn.BatchNorm1d(width)
        if kind == "sum":
            return Sum(block(level - 1), draw(st.sampled_from([nn.Identity(), None])) or block(level - 1))
        if kind == "cat":
            return nn.Sequential(Joined(block(level - 1), block(level - 1)), nn.Linear(2 * width, width))
        return nn.Sequential(block(level - 1), block(level - 1))

    return nn.Sequential(*(block(depth) for _ in range(draw(st.integers(1, 3)))), nn.Linear(width, 3)), (width,)


@st.composite
def affine_images(draw):
    """A graph of convolutions, batch norms and pools on small images, and a dense head."""
    convolution = nn.Conv2d(2, 2, 3, padding=1, padding_mode=draw(st.sampled_from(["zeros", "circular"])))
    parts = [convolution, nn.BatchNorm2d(2)] if draw(st.booleans()) else [nn.BatchNorm2d(2), convolution]
    body = nn.Sequential(*parts)
    if draw(st.booleans()):
        body = Sum(nn.Identity(), body)
    last = nn.Conv2d(2, 2, 2, stride=2) if draw(st.booleans()) else nn.Identity()
    size = 8 if isinstance(last, nn.Conv2d) else 32
    return nn.Sequential(body, last, nn.Flatten(), nn.Linear(size, 3)), (2, 4, 4)


graphs = st.one_of(affine_graphs(), affine_images())


def check_graph(case, norm, seed, scale, double):
    model, shape = case
    model = filled(model.double() if double else model, seed)
    model[-1].weight.mul_(scale)
    bound = lipschitz(model, shape, norm=norm)
    assert not bound.pairwise.requires_grad
    exact, _ = graph_matrix(exact_copy(model), shape)
    assert bounded_by(exact, bound.upper, norm)
    for i in range(3):
        for j in range(i):
            row = [[a - b for a, b in zip(exact[i], exact[j], strict=True)]]
            assert bounded_by(row, float(bound.pairwise[i, j]), norm)


@given(graphs, norms, seeds, scales, st.booleans())
@FEW
def test_bounds_of_affine_graphs_dominate_the_exact_norm(case, norm, seed, scale, double):
    check_graph(case, norm, seed, scale, double)


@pytest.mark.slow
@given(graphs, norms, seeds, scales, st.booleans())
@MANY
def test_bounds_of_many_affine_graphs_dominate_the_exact_norm(case, norm, seed, scale, double):
    check_graph(case, norm, seed, scale, double)


# Radii of executed networks

ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Hardtanh]


@st.composite
def networks(draw):
    """A small network with any mix of layers, and its input shape."""
    activation = draw(st.sampled_from(ACTIVATIONS))
    if draw(st.booleans()):
        width = draw(st.integers(2, 20))
        hidden = [nn.Linear(width, width), activation()]
        if draw(st.booleans()):
            hidden.insert(1, nn.BatchNorm1d(width))
        body = nn.Sequential(*hidden)
        if draw(st.booleans()):
            body = Wired(lambda m, x: x + m.inner(x), inner=body)
        elif draw(st.booleans()):
            body = nn.Sequential(Joined(nn.Identity(), body), nn.Linear(2 * width, width))
        return nn.Sequential(body, nn.Linear(width, draw(st.integers(2, 5)))), (width,)
    pool = draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(3, 1)]))
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect"])))
    body = nn.Sequential(convolution, nn.BatchNorm2d(3), activation(), pool, nn.Flatten())
    size = body.eval()(torch.zeros(1, 2, 4, 4)).shape[1]
    return nn.Sequential(body, nn.Linear(size, 3)), (2, 4, 4)


def check_radii(case, norm, seed, scale, kind):
    """Samples beside the decision boundary of the executed network keep their class inside their radii."""
    model, shape = case
    dtype = DTYPES[kind]
    model = filled(model, seed, scale=0.7)
    size = scale if kind in ("float32", "float64") else 10.0 ** (math.log10(scale) / 6)
    next(module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)).weight.mul_(size)
    model = model.to(dtype)
    x, other = (torch.rand(6, *shape, generator=seeded(seed + k), dtype=torch.float64).to(dtype) for k in (1, 2))
    if not bool(executed(model, torch.cat([x, other])).isfinite().all()):
        return
    x = near_boundary(model, x, other)
    radii = certified_radii(model, x, norm=norm)
    assert_no_flip(model, x, radii, norm, tries=2)
    if kind in ("float32", "float64"):
        y = executed(model, x).argmax(1)
        found = attack(model, x.clamp(0, 1), y, "rounding-search", norm=norm, rounds=20, descents=5)
        inside = strictly_inside(x, found.closest, radii, norm) & found.success & (radii > 0)
        assert not bool((inside & ~keeps(executed(model, found.closest), y)).any())


ROUNDED = ["float32", "float32", "float64", "float16", "bfloat16"]


@given(st.one_of(graphs, networks()), norms, seeds, scales, st.sampled_from(ROUNDED))
@FEW
def test_no_float_inside_the_radius_changes_the_answer(case, norm, seed, scale, kind):
    check_radii(case, norm, seed, scale, kind)


@pytest.mark.slow
@given(st.one_of(graphs, networks()), norms, seeds, scales, st.sampled_from(ROUNDED))
@MANY
def test_no_float_inside_the_radius_of_many_networks_changes_the_answer(case, norm, seed, scale, kind):
    check_radii(case, norm, seed, scale, kind)


def test_the_exact_oracle_knows_a_bound_from_a_lower_one():
    matrix = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert bounded_by(rational(matrix), norm * (1 + 1e-15))
    assert not bounded_by(rational(matrix), norm * (1 - 1e-15))
    assert bounded_by(rational(matrix), 9.0, "l1")
    assert not bounded_by(rational(matrix), 8.999, "linf")
    assert bounded_by([[Fraction(0)]], 0.0)
    assert not bounded_by([[Fraction(1, 10**300)]], 0.0)

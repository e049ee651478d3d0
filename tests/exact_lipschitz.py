"""Oracles of tight Lipschitz bounds: constants of tiny networks by their linear pieces, and LipSDP's inequality whole.

Nothing here comes from the package but the layer types and the fields of `Neurons`.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import flint
import numpy as np
import torch
from scipy.optimize import linprog
from torch import nn

from speccert.models import Abs, GroupSort, Householder, MaxMin

_BITS = 1500

# the two slopes of elementwise activations made of pieces
ENDS = {
    nn.ReLU: lambda layer: (0.0, 1.0),
    nn.LeakyReLU: lambda layer: (layer.negative_slope, 1.0),
    Abs: lambda layer: (-1.0, 1.0),
    nn.Hardtanh: lambda layer: (0.0, 1.0),
    nn.Identity: lambda layer: (1.0,),
}


def pieces(layer, size):
    """The Jacobians that a piecewise linear activation has: (positions, matrices) a block that chooses for itself."""
    if type(layer) in ENDS:
        return [([i], [np.array([[end]]) for end in ENDS[type(layer)](layer)]) for i in range(size)]
    if isinstance(layer, GroupSort):
        orders = [np.eye(layer.group_size)[list(p)] for p in itertools.permutations(range(layer.group_size))]
        starts = range(0, size, layer.group_size)
        return [(list(range(start, start + layer.group_size)), orders) for start in starts]
    half = size // 2
    if isinstance(layer, MaxMin):
        return [([i, i + half], [np.eye(2), np.eye(2)[::-1]]) for i in range(half)]
    assert isinstance(layer, Householder)
    angles = layer.angle.detach().double().numpy() / 2
    units = [np.array([np.sin(angle), -np.cos(angle)]) for angle in angles]
    return [([i, i + half], [np.eye(2), np.eye(2) - 2 * np.outer(v, v)]) for i, v in enumerate(units)]


def slopes(layer, size):
    """All Jacobians of an activation, [P, n, n]."""
    blocks = pieces(layer, size)
    found = []
    for choice in itertools.product(*(options for _, options in blocks)):
        matrix = np.zeros((size, size))
        for (positions, _), option in zip(blocks, choice, strict=True):
            matrix[np.ix_(positions, positions)] = option
        found.append(matrix)
    return np.array(found)


def corners(model):
    """The Jacobians [P, K, D] of a chain of dense layers and activations: all choices of pieces, reachable or not."""
    found = None
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().double().numpy()
            found = weight[None] if found is None else weight @ found
        else:
            choices = slopes(layer, found.shape[1])
            found = np.unique((choices[:, None] @ found[None]).reshape(-1, *found.shape[1:]), axis=0)
    return found


def reachable(model, margin=1e-9):
    """The Jacobians [P, K, D] of a chain of dense layers and ReLU or |x| on regions that hold a ball of some size.

    One linear program a region and neuron (Clarke's generalised Jacobian is their hull: for a piecewise linear map the
    largest norm among them is the Lipschitz constant).
    """
    inputs = model[0].in_features
    regions = [(np.eye(inputs), np.zeros(inputs), np.zeros((0, inputs)), np.zeros(0))]  # x -> A x + b on G x <= h
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight, bias = (part.detach().double().numpy() for part in (layer.weight, layer.bias))
            regions = [(weight @ a, weight @ b + bias, g, h) for a, b, g, h in regions]
        else:
            low, high = ENDS[type(layer)](layer)
            for i in range(len(regions[0][1])):
                regions = [half for region in regions for half in _halves(region, i, low, high, margin)]
    return np.array([a for a, _, _, _ in regions])


def _halves(region, i, low, high, margin):
    a, b, g, h = region
    for sign, slope in ((1.0, high), (-1.0, low)):
        rows, limits = np.vstack([g, -sign * a[i]]), np.append(h, sign * b[i])
        if _radius(rows, limits) > margin:
            scale = np.ones(len(b))
            scale[i] = slope
            yield scale[:, None] * a, scale * b, rows, limits


def _radius(rows, limits):
    """Of the largest ball in {x: rows x <= limits}, at most 1."""
    lengths = np.linalg.norm(rows, axis=1)
    if np.any((lengths < 1e-12) & (limits < 1e-12)):
        return 0.0
    system = np.hstack([rows, lengths[:, None]])
    cost = np.append(np.zeros(rows.shape[1]), -1.0)
    bounds = [(-1e6, 1e6)] * rows.shape[1] + [(0, 1)]
    found = linprog(cost, A_ub=system, b_ub=limits, bounds=bounds)
    return -found.fun if found.status == 0 else 0.0


def norm_to_l2(jacobian, norm):
    """||J|| from l2, linf (all signs, or a lower estimate for many inputs) or l1 to l2; in absolute value for a row."""
    if norm == "l2":
        return float(np.linalg.norm(jacobian, 2))
    if norm == "l1":
        return float(np.linalg.norm(jacobian, axis=0).max())
    if len(jacobian) == 1:
        return float(np.abs(jacobian).sum())
    if jacobian.shape[1] > 10:
        signs = np.sign(np.linalg.svd(jacobian)[2][0])
        for _ in range(10):
            signs = np.sign(jacobian.T @ (jacobian @ signs))
        return float(np.linalg.norm(jacobian @ signs))
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=jacobian.shape[1])))
    return float(np.linalg.norm(signs @ jacobian.T, axis=1).max())


def largest(jacobians, norm):
    """The largest norm to l2 among Jacobians [P, K, D]."""
    return max(norm_to_l2(jacobian, norm) for jacobian in jacobians)


def largest_same(jacobians, norm):
    """The largest norm among Jacobians, the same norm on both sides."""
    order = {"l2": 2, "linf": np.inf, "l1": 1}[norm]
    return max(float(np.linalg.norm(jacobian, order)) for jacobian in jacobians)


def pairs(jacobians, norm):
    """[K, K] exact constants of the pairs of outputs over Jacobians [P, K, D]."""
    order = {"l2": 2, "linf": 1, "l1": np.inf}[norm]
    gaps = jacobians[:, :, None] - jacobians[:, None]
    return np.linalg.norm(gaps, order, axis=3).max(0)


# Neurons


def random_neurons(sizes, outputs, seed=0, *, dense=False, group=1, low=0.0, high=1.0, scale=1.0, errors=0.0):
    """Random `Neurons`: a chain, or, `dense`, all groups joined to all later ones."""
    from speccert.certify.neurons import Layer, Neurons, Part

    generator = torch.Generator().manual_seed(seed)

    def matrix(m, n):
        return scale * torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(n)

    def parts(m, k):
        return tuple(Part(j, matrix(m, sizes[j]), errors) for j in (range(k) if dense else [k - 1]))

    layers = []
    for k in range(1, len(sizes)):
        n = sizes[k]
        ends = [torch.full((n,), float(end), dtype=torch.float64) for end in (low, high)]
        layers.append(Layer(parts(n, k), *ends, torch.arange(n) // group))
    return Neurons(tuple(sizes), tuple(layers), parts(outputs, len(sizes)))


def with_slopes(net, choices):
    """The matrix of the whole where the activations are the matrices `choices`, [n_k, n_k] a layer."""
    images = [np.eye(net.sizes[0])]
    for layer, choice in zip(net.layers, choices, strict=True):
        images.append(choice @ sum(part.matrix.numpy() @ images[part.source] for part in layer.parts))
    return sum(part.matrix.numpy() @ images[part.source] for part in net.output)


def random_slopes(net, rng):
    """Slopes that the layers allow, mostly extreme ones; a tied group gets an orthogonal matrix."""
    return [_random_slope(layer, rng) for layer in net.layers]


def _random_slope(layer, rng):
    low, high, tied = (part.numpy() for part in (layer.low, layer.high, layer.tied))
    matrix = np.zeros((len(low), len(low)))
    for group in np.unique(tied):
        (where,) = np.nonzero(tied == group)
        if len(where) > 1:
            matrix[np.ix_(where, where)] = np.linalg.qr(rng.normal(size=(len(where), len(where))))[0]
        else:
            share = rng.choice([0.0, 1.0, rng.uniform()], p=[0.45, 0.45, 0.1])
            matrix[where, where] = low[where] + share * (high[where] - low[where])
    return matrix


def ascended(net, norm="l2", seed=0, tries=5, sweeps=3):
    """A lower estimate of what LipSDP can prove at best: extreme slopes, changed one by one while the norm grows."""
    rng, best = np.random.default_rng(seed), 0.0
    for _ in range(tries):
        choices = random_slopes(net, rng)
        value = norm_to_l2(with_slopes(net, choices), norm)
        for _ in range(sweeps):
            before = value
            for k, layer in enumerate(net.layers):
                for i in range(len(layer.low)):
                    if int((layer.tied == layer.tied[i]).sum()) > 1:
                        continue
                    old = choices[k][i, i]
                    for end in (float(layer.low[i]), float(layer.high[i])):
                        choices[k][i, i] = end
                        found = norm_to_l2(with_slopes(net, choices), norm)
                        if found > value:
                            value, old = found, end
                    choices[k][i, i] = old
            if value == before:
                break
        best = max(best, value)
    return best


def whole_form(net, multipliers, start):
    """LipSDP's F [N, N] in float64 for one multiplier vector a layer and the matrix Q = `start` on the first group."""
    offsets = np.cumsum([0, *net.sizes])
    unit = np.eye(offsets[-1])
    take = [unit[offsets[k] : offsets[k + 1]] for k in range(len(net.sizes))]
    end = sum(part.matrix.numpy() @ take[part.source] for part in net.output)
    found = take[0].T @ start @ take[0] - end.T @ end
    for k, (layer, own) in enumerate(zip(net.layers, multipliers, strict=True), start=1):
        d = own.double().numpy()[layer.tied.numpy()][:, None]
        a, b = layer.low.numpy()[:, None], layer.high.numpy()[:, None]
        u = sum(part.matrix.numpy() @ take[part.source] for part in layer.parts)
        # d (xi - a u)(b u - xi), made symmetric
        first, second = take[k] - a * u, b * u - take[k]
        term = first.T @ (d * second)
        found = found - (term + term.T) / 2
    return found


def eliminated(net, multipliers, eps=0.0):
    """What maximising over the later groups leaves of ||end||^2 + sum .. by numpy; None where that is unbounded."""
    size = net.sizes[0]
    form = -whole_form(net, multipliers, np.zeros((size, size)))
    inner = -form[size:, size:]
    if len(inner) and np.linalg.eigvalsh(inner)[0] <= eps * np.abs(inner).max():
        return None
    rest = form[:size, :size]
    return rest + form[:size, size:] @ np.linalg.solve(inner, form[size:, :size]) if len(inner) else rest


def least(net, multipliers, norm="l2", weights=None):
    """The bound that these multipliers give in exact arithmetic, about."""
    rest = eliminated(net, multipliers)
    if rest is None:
        return math.inf
    if norm == "l1":
        return math.sqrt(rest.diagonal().max())
    tau = np.ones(len(rest)) if weights is None else weights.numpy()
    tau = tau / (tau.sum() if norm == "linf" else 1.0)
    root = tau**-0.5
    return math.sqrt(max(np.linalg.eigvalsh(root[:, None] * rest * root)[-1], 0.0))


def feasible(net, seed=0, factor=2.0):
    """Multipliers that make every S_k positive, from the end, with some scatter."""
    rng = np.random.default_rng(seed)
    found = [None] * len(net.layers)
    for k in range(len(net.layers) - 1, -1, -1):
        ends = net.sizes[: k + 2]
        later = range(k + 1, len(net.layers))
        rows = [(p, 1.0, None) for p in net.output if p.source == k + 1]
        form = sum((p.matrix.T @ p.matrix for p, _, _ in rows), torch.zeros(ends[-1], ends[-1], dtype=torch.float64))
        for j in later:
            layer, d = net.layers[j], found[j][net.layers[j].tied]
            bound = torch.maximum(layer.low.abs(), layer.high.abs()).square() * d * 4
            for part in layer.parts:
                if part.source == k + 1:
                    form = form + part.matrix.T @ (bound[:, None] * part.matrix)
        top = float(torch.linalg.eigvalsh(form)[-1]) if len(form) else 1.0
        count = net.layers[k].multipliers
        scatter = torch.from_numpy(1 + 0.5 * rng.random(count))
        found[k] = factor * (len(net.layers) ** 1.5) * max(top, 1e-3) * scatter
    return found


def rational_form(net, multipliers, start):
    """`whole_form` as an exact rational matrix; `start` is a list of rows of Fractions or floats."""
    total = sum(net.sizes)
    offsets = [sum(net.sizes[:k]) for k in range(len(net.sizes))]

    def acting(parts, rows):
        found = flint.fmpq_mat(rows, total)
        for part in parts:
            for i, row in enumerate(part.matrix.tolist()):
                for j, value in enumerate(row):
                    if value:
                        found[i, offsets[part.source] + j] += _fmpq(value)
        return found

    end = acting(net.output, len(net.output[0].matrix))
    found = -(end.transpose() * end)
    for i, row in enumerate(start):
        for j, value in enumerate(row):
            found[i, j] += _fmpq(value)
    for k, (layer, own) in enumerate(zip(net.layers, multipliers, strict=True), start=1):
        size = net.sizes[k]
        u = acting(layer.parts, size)
        first, second, weighted = (flint.fmpq_mat(size, total) for _ in range(3))
        for i in range(size):
            d, a, b = (_fmpq(float(v)) for v in (own[layer.tied[i]], layer.low[i], layer.high[i]))
            for j in range(total):
                own_value = _fmpq(1 if j == offsets[k] + i else 0)
                first[i, j], second[i, j] = own_value - a * u[i, j], b * u[i, j] - own_value
                weighted[i, j] = d * second[i, j]
        term = first.transpose() * weighted
        found = found - (term + term.transpose()) / 2
    return found


def _fmpq(value):
    value = Fraction(value)
    return flint.fmpq(value.numerator, value.denominator)


def is_positive(matrix):
    """Whether an exact rational matrix is positive definite, by LDL^T in balls of many digits; inexact ties count not.

    Rows and columns of zeros, of neurons that nothing reads, are left out.
    """
    size = matrix.nrows()
    kept = [i for i in range(size) if any(matrix[i, j] != 0 for j in range(size))]
    with flint.ctx.workprec(_BITS):
        rest = [[flint.arb(matrix[i, j]) for j in kept] for i in kept]
        for k in range(len(kept)):
            if not rest[k][k] > 0:
                return False
            for i in range(k + 1, len(kept)):
                if matrix[kept[i], kept[k]] == 0 and rest[i][k] == 0:
                    continue
                factor = rest[i][k] / rest[k][k]
                for j in range(k + 1, i + 1):
                    rest[i][j] = rest[i][j] - factor * rest[j][k]
        return True


def proved_exactly(net, multipliers, upper, norm="l2", weights=None):
    """Whether F is positive definite in exact arithmetic for the claimed `upper` (Q = upper^2 I, or diag(weights))."""
    size = net.sizes[0]
    if norm == "linf":
        values = [Fraction(value) for value in weights.tolist()]
        if sum(values) > Fraction(upper) ** 2:
            return False
    else:
        values = [Fraction(upper) ** 2] * size
    start = [[values[i] if i == j else 0 for j in range(size)] for i in range(size)]
    return is_positive(rational_form(net, multipliers, start))


def interior_point(net, norm="l2"):
    """LipSDP's optimum by another solver from the whole matrix: (bound, multipliers a layer)."""
    import cvxpy

    size, counts = net.sizes[0], [layer.multipliers for layer in net.layers]
    zero = [torch.zeros(count, dtype=torch.float64) for count in counts]
    base = whole_form(net, zero, np.zeros((size, size)))
    own = cvxpy.Variable(sum(counts), nonneg=True)
    tau = cvxpy.Variable(size if norm == "linf" else 1)
    form = base + _start_of(norm, tau, size, len(base))
    position = 0
    for k, count in enumerate(counts):
        for i in range(count):
            unit = [d.clone() for d in zero]
            unit[k][i] = 1.0
            form = form + own[position] * (whole_form(net, unit, np.zeros((size, size))) - base)
            position += 1
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(tau)), [(form + form.T) / 2 >> 0]).solve(solver=cvxpy.CLARABEL)
    found = torch.split(torch.from_numpy(np.atleast_1d(own.value)), counts)
    return math.sqrt(float(np.sum(tau.value))), list(found)


def _start_of(norm, tau, size, total):
    import cvxpy

    pad = np.eye(total)[:size]
    return pad.T @ cvxpy.diag(tau if norm == "linf" else tau * np.ones(size)) @ pad

"""The primal-dual method: its operators against matrices written out, its optimum against weak duality and cvxpy."""

import math
import time

import numpy as np
import pytest
import torch
from exact_lipschitz import random_neurons
from oracles import random

from speccert.certify.neurons import Layer, Neurons, Part
from speccert.certify.primal_dual import inside, minimise
from speccert.certify.semidefinite import System

NETS = {
    "chain": random_neurons((4, 5, 6), 3),
    "slopes of both signs": random_neurons((4, 5, 3), 2, low=-0.25, high=1.25),
    "joined to all": random_neurons((3, 4, 5, 4), 2, dense=True, low=-1.0),
    "tied": random_neurons((3, 4, 6), 2, group=2, low=-1.0),
}


def terms(net):
    """The matrices A_i written out one by one, in the order weights (one a number), multipliers."""
    ends = np.cumsum([0, *net.sizes])
    total = ends[-1]
    found = [np.diag(-np.eye(total)[i]) for i in range(net.sizes[0])]
    for k, layer in enumerate(net.layers, start=1):
        u = np.zeros((net.sizes[k], total))
        for part in layer.parts:
            u[:, ends[part.source] : ends[part.source + 1]] += part.matrix.numpy()
        for g in range(layer.multipliers):
            whole = np.zeros((total, total))
            for i in torch.nonzero(layer.tied == g).flatten().tolist():
                xi = np.eye(total)[ends[k] + i]
                p, q = xi - float(layer.low[i]) * u[i], float(layer.high[i]) * u[i] - xi
                whole += (np.outer(p, q) + np.outer(q, p)) / 2
            found.append(whole)
    return np.array(found)


def ends_matrix(net):
    ends = np.cumsum([0, *net.sizes])
    end = np.zeros((len(net.output[0].matrix), ends[-1]))
    for part in net.output:
        end[:, ends[part.source] : ends[part.source + 1]] += part.matrix.numpy()
    return end.T @ end


def system(net):
    count = net.sizes[0] + sum(layer.multipliers for layer in net.layers)
    return System(net, torch.arange(net.sizes[0]), torch.ones(count, dtype=torch.float64))


def symmetric(size, seed):
    matrix = random(size, size, seed=seed)
    return matrix @ matrix.T


@pytest.mark.parametrize("name", NETS)
def test_matrix_products_and_steps_are_those_of_the_terms(name):
    net = NETS[name]
    written, own = terms(net), system(net)
    y = random(own.count, seed=1).abs()
    whole = -ends_matrix(net) - np.einsum("i,ijk->jk", y.numpy(), written)
    np.testing.assert_allclose(own.matrix(y).numpy(), whole, atol=1e-12)
    x, inverse = symmetric(own.size, 2), symmetric(own.size, 3)
    np.testing.assert_allclose(own.products(x).numpy(), np.einsum("ijk,jk->i", written, x.numpy()), rtol=1e-10)
    direct = np.einsum("iab,bc,jcd,da->ij", written, x.numpy(), written, inverse.numpy(), optimize=True)
    direct = (direct + direct.T) / 2
    np.testing.assert_allclose(own.steps_matrix(x, inverse).numpy(), direct, atol=1e-10 * np.abs(direct).max())


@pytest.mark.parametrize("name", NETS)
def test_a_scale_is_a_congruence(name):
    net = NETS[name]
    tied = torch.arange(net.sizes[0])
    scale = random(system(net).count, seed=4).exp()
    own = System(net, tied, scale)
    y = random(own.count, seed=5).abs()
    root = scale[own.tied].sqrt()
    torch.testing.assert_close(own.matrix(y) * root[:, None] * root, system(net).matrix(y * scale))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_end_is_inside_and_no_worse_than_the_start(name, norm):
    net = NETS[name]
    start = safe(net)
    weights, multipliers = minimise(net, start, norm, math.inf)
    written = terms(net)
    y = np.concatenate([np.broadcast_to(weights.numpy(), net.sizes[0]), *(m.numpy() for m in multipliers)])
    smallest = np.linalg.eigvalsh(-ends_matrix(net) - np.einsum("i,ijk->jk", y, written))[0]
    assert smallest > 0
    assert all(bool((m > 0).all()) for m in multipliers)
    first = inside(net, start, torch.arange(net.sizes[0]) if norm == "linf" else torch.zeros(net.sizes[0]).long())
    assert float(weights.sum()) < float(first[: len(weights)].sum())


def safe(net):
    """Multipliers for which there are weights: later layers first, each far above what the later ones ask of it."""
    powers = range(len(net.layers), 0, -1)
    return [torch.full((one.multipliers,), 1e3**p).double() for one, p in zip(net.layers, powers, strict=True)]


def one_neuron(slope=2.0, end=3.0, low=0.0, high=1.0):
    unit = torch.ones(1, 1, dtype=torch.float64)
    layer = Layer((Part(0, slope * unit),), low * unit[0], high * unit[0], torch.zeros(1, dtype=torch.int64))
    return Neurons((1, 1), (layer,), (Part(1, end * unit),))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-0.25, 1.0), (0.5, 1.0)])
def test_one_neuron_has_the_product_of_its_slopes(low, high):
    weights, _ = minimise(one_neuron(low=low, high=high), [torch.tensor([100.0]).double()], "l2", math.inf)
    assert math.sqrt(float(weights.sum())) == pytest.approx(6.0, rel=1e-8)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NETS)
def test_optimum_is_that_of_cvxpy(name, norm):
    import cvxpy

    net = NETS[name]
    written, size = terms(net), net.sizes[0]
    y = cvxpy.Variable(len(written), nonneg=True)
    matrix = sum((-y[i] * written[i] for i in range(len(written))), -ends_matrix(net))
    wanted = [matrix >> 0, *([y[:size] == y[0]] if norm == "l2" else [])]
    objective = y[0] if norm == "l2" else cvxpy.sum(y[:size])
    least = cvxpy.Problem(cvxpy.Minimize(objective), wanted).solve(solver="CLARABEL")
    weights, _ = minimise(net, safe(net), norm, math.inf)
    assert float(weights.sum()) == pytest.approx(least, rel=1e-5)


def test_multipliers_outside_are_refused():
    with pytest.raises(ValueError, match="no weights of the start are enough"):
        minimise(one_neuron(end=3.0), [torch.tensor([8.9]).double()], "l2", math.inf)


def test_a_passed_deadline_gives_the_start():
    net = NETS["chain"]
    weights, multipliers = minimise(net, safe(net), "l2", time.monotonic() - 1)
    assert all(torch.allclose(a, b) for a, b in zip(multipliers, safe(net), strict=True))
    assert float(weights.sum()) > 0

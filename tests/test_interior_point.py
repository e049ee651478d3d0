"""Proposals of interior-point solvers: what they prove, against one another and a program written out for cvxpy."""

import math
from dataclasses import replace

import cvxpy
import numpy as np
import pytest
import torch
from exact_lipschitz import random_neurons, with_slopes
from oracles import random

from speccert.certify import interior_point
from speccert.certify.inequality import prove
from speccert.certify.interior_point import SOLVERS, SolverFailed, repaired, solve
from speccert.certify.neurons import Layer, Neurons, Part

OPEN = [name for name in SOLVERS if name == "built-in" or name.upper() in cvxpy.installed_solvers()]
NETS = {
    "chain": random_neurons((4, 6, 6), 3),
    "wide start": random_neurons((40, 5, 5), 3),
    "one number": random_neurons((5, 4, 4, 4), 1),
    "slopes of both signs": random_neurons((4, 5, 3), 2, low=-0.25, high=1.25),
    "abs": random_neurons((4, 5, 5), 3, low=-1.0),
    "joined to all": random_neurons((3, 4, 5, 4), 2, dense=True),
    "tied": random_neurons((3, 4, 6), 2, group=2, low=-1.0),
}


def proved(net, found, norm="l2"):
    weights = found[-1] if norm == "linf" else None
    return prove(net, found[: len(net.layers)], norm, weights).upper


def least(net, norm="l2", coupling="neuron"):
    """LipSDP's optimum by cvxpy from the inequality written out, no part of it ours."""
    ends = np.cumsum([0, *net.sizes])

    def rows(parts, count):
        whole = np.zeros((count, ends[-1]))
        for part in parts:
            whole[:, ends[part.source] : ends[part.source + 1]] += part.matrix.numpy()
        return whole

    tau = cvxpy.Variable(nonneg=True) if norm == "l2" else cvxpy.Variable(net.sizes[0], nonneg=True)
    start = np.eye(ends[-1])[: net.sizes[0]]
    end = rows(net.output, len(net.output[0].matrix))
    weights = tau * np.eye(net.sizes[0]) if norm == "l2" else cvxpy.diag(tau)
    matrix = start.T @ weights @ start - end.T @ end
    for k, layer in enumerate(net.layers, start=1):
        u, xi = rows(layer.parts, net.sizes[k]), np.eye(ends[-1])[ends[k] : ends[k + 1]]
        tied = layer.tied.numpy() if coupling == "neuron" else np.zeros(net.sizes[k], dtype=int)
        d = cvxpy.diag(np.eye(tied.max() + 1)[tied] @ cvxpy.Variable(tied.max() + 1, nonneg=True))
        p, q = xi - layer.low.numpy()[:, None] * u, layer.high.numpy()[:, None] * u - xi
        matrix = matrix - (p.T @ d @ q + q.T @ d @ p) / 2
    value = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(tau)), [matrix >> 0]).solve(solver="CLARABEL")
    return math.sqrt(value)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NETS)
def test_proves_the_optimum(name, norm):
    net = NETS[name]
    assert proved(net, solve(net, norm=norm), norm) == pytest.approx(least(net, norm), rel=2e-6)


@pytest.mark.parametrize("solver", OPEN)
@pytest.mark.parametrize("name", ["chain", "wide start", "abs", "tied"])
def test_every_solver_proves_nearly_the_optimum(name, solver):
    net = NETS[name]
    best = proved(net, solve(net))
    assert best * (1 - 1e-6) <= proved(net, solve(net, solver=solver)) <= best * (1 + 1e-3)


@pytest.mark.parametrize("solver", OPEN)
def test_weights_of_linf_come_last(solver):
    net = NETS["chain"]
    *multipliers, weights = solve(net, norm="linf", solver=solver)
    assert [len(m) for m in multipliers] == [6, 6]
    assert weights.shape == (4,)
    assert prove(net, multipliers, "linf", weights).upper == pytest.approx(least(net, "linf"), rel=1e-4)


@pytest.mark.parametrize("solver", OPEN)
@pytest.mark.parametrize("name", ["chain", "slopes of both signs"])
def test_a_multiplier_a_layer_is_looser_and_no_better_than_its_optimum(name, solver):
    net = NETS[name]
    found = solve(net, coupling="layer", solver=solver)
    assert all(float(one.max() - one.min()) <= 1e-6 * float(one.max()) for one in found)
    assert proved(net, found) == pytest.approx(least(net, coupling="layer"), rel=1e-4)
    assert proved(net, found) >= proved(net, solve(net)) * (1 - 1e-8)


@pytest.mark.parametrize("seed", range(25))
def test_never_below_the_norm_of_a_choice_of_slopes(seed):
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.uniform(-1, 1.5, 2))
    net = random_neurons((3, 4, 4), 2, seed, low=low, high=high)
    upper = proved(net, solve(net))
    for _ in range(50):
        choices = [np.diag(rng.choice([low, high], 4)) for _ in net.layers]
        assert np.linalg.norm(with_slopes(net, choices), 2) <= upper


@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_scales_of_the_end_and_of_the_layers(power):
    net = NETS["chain"]
    end = tuple(Part(p.source, p.matrix * 2.0**power) for p in net.output)
    scaled = replace(net, output=end)
    assert proved(scaled, solve(scaled)) == pytest.approx(proved(net, solve(net)) * 2.0**power, rel=1e-7)
    inner = replace(net.layers[0], parts=tuple(Part(p.source, p.matrix * 2.0**power) for p in net.layers[0].parts))
    scaled = replace(net, layers=(inner, *net.layers[1:]))
    assert proved(scaled, solve(scaled)) == pytest.approx(proved(net, solve(net)) * 2.0**power, rel=1e-7)


def test_numbers_beyond_the_range_prove_nothing_or_say_so():
    huge = tuple(Part(p.source, p.matrix * 1e300) for p in NETS["chain"].layers[0].parts)
    net = replace(NETS["chain"], layers=(replace(NETS["chain"].layers[0], parts=huge), NETS["chain"].layers[1]))
    try:
        found = solve(net)
    except SolverFailed:
        return
    assert prove(net, found).upper == np.inf


def test_an_end_of_zeros_needs_no_solver():
    net = replace(NETS["chain"], output=(Part(2, torch.zeros(3, 6, dtype=torch.float64)),))
    assert [len(one) for one in solve(net)] == [6, 6]


@pytest.mark.parametrize("noise", [1e-8, 1e-4, 1e-2])
@pytest.mark.parametrize("name", ["chain", "abs", "tied"])
def test_repair_of_multipliers_that_miss_the_inequality(name, noise):
    net = NETS[name]
    found = solve(net)
    best = proved(net, found)
    spoilt = [one * (1 - noise * random(len(one), seed=k).abs()) for k, one in enumerate(found)]
    assert best * (1 - 1e-7) <= proved(net, repaired(net, spoilt)) <= best * (1 + 100 * noise**0.5)


def test_repair_of_a_multiplier_that_a_solver_made_negative():
    """A neuron that nothing reads: its multiplier goes to 0."""
    net = random_neurons((4, 5), 3)
    net.output[0].matrix[:, 2] = 0.0
    found = solve(net)
    best = proved(net, found)
    found[0][2] = -1e-9
    assert best * (1 - 1e-7) <= proved(net, repaired(net, found)) <= best * (1 + 1e-5)


def test_repair_leaves_good_multipliers_nearly_alone():
    net = NETS["chain"]
    found = solve(net)
    again = repaired(net, found)
    assert proved(net, again) <= proved(net, found) * (1 + 1e-9)


def test_repair_of_nothing_still_proves_something():
    net = NETS["chain"]
    assert proved(net, repaired(net, [torch.zeros(6).double(), torch.zeros(6).double()])) < math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "network"}, "coupling: expected one of neuron, layer; got 'network'"),
        ({"solver": "gurobi"}, "solver: expected one of built-in, clarabel, scs, mosek; got 'gurobi'"),
        ({"norm": "l1"}, "norm: expected one of l2, linf; got 'l1'"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        solve(NETS["chain"], **options)


def test_a_solver_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(cvxpy, "installed_solvers", lambda: ["CLARABEL"])
    with pytest.raises(ValueError, match="mosek is not installed; cvxpy has clarabel"):
        solve(NETS["chain"], solver="mosek")


@pytest.mark.parametrize(("solver", "most"), [("built-in", 4096), ("clarabel", 200), ("scs", 400)])
def test_too_many_numbers_are_refused_before_any_work(solver, most):
    size = most // 2
    eye = torch.eye(size, dtype=torch.float64)
    layer = Layer((Part(0, eye),), torch.zeros(size).double(), torch.ones(size).double(), torch.arange(size))
    net = Neurons((size, size, 1), (layer, _row(size)), (Part(2, torch.ones(1, 1).double()),))
    with pytest.raises(SolverFailed, match=f"side {most + 1} is too large for {solver}: at most {most}"):
        solve(net, solver=solver)


def _row(size):
    one = torch.ones(1, dtype=torch.float64)
    return Layer((Part(1, torch.ones(1, size).double()),), 0 * one, one, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("status", ["infeasible", "unbounded", "solver_error", None])
def test_a_bad_status_gives_no_multipliers(status, monkeypatch):
    monkeypatch.setattr(interior_point, "_run", lambda program, solver, seconds: setattr(program, "_status", status))
    with pytest.raises(SolverFailed, match=f"scs ended with status {status!r}"):
        solve(NETS["chain"], solver="scs")


def lying(value):
    """A solver that calls one number the optimum everywhere."""

    def lie(program, solver, seconds):
        program._status = "optimal"
        for variable in program.variables():
            variable.save_value(np.full(variable.shape, value))

    return lie


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.3])
def test_wrong_values_called_optimal_do_not_matter(value, monkeypatch):
    monkeypatch.setattr(interior_point, "_run", lying(value))
    net = NETS["chain"]
    assert best_of(net) * (1 - 1e-9) <= proved(net, solve(net, solver="clarabel"))


def best_of(net):
    return proved(net, solve(net, solver="built-in"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value, monkeypatch):
    monkeypatch.setattr(interior_point, "_run", lying(value))
    with pytest.raises(SolverFailed, match="not finite"):
        solve(NETS["chain"], solver="scs")


@pytest.mark.parametrize("seconds", [1e-3, 20.0])
@pytest.mark.parametrize("solver", OPEN)
def test_little_time_gives_something_sound_or_says_so(solver, seconds):
    net = random_neurons((10, 16, 16, 16), 4)
    try:
        found = solve(net, solver=solver, seconds=seconds)
    except SolverFailed:
        assert solver != "built-in"
        return
    assert best_of(net) * (1 - 1e-9) <= proved(net, found) < math.inf

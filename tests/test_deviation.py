"""The recursion by hand on small graphs, and what it takes from the Lipschitz bound."""

import math

import pytest
import torch
from oracles import Wired
from torch import nn

from speccert.certify import lipschitz
from speccert.certify.arithmetic import ARITHMETICS
from speccert.certify.deviation import Norms, overflow_limit, peaks, plan, spread, step_errors
from speccert.certify.graph import trace
from speccert.certify.local_errors import LocalError
from speccert.certify.rules import leaf_types
from speccert.models import Normalize, Residual


def planned(model, shape):
    bound = lipschitz(model.eval(), shape)
    record = bound.records["l2"]
    norms = Norms({run.end: run.bounds.upper for run in record.runs}, dict(record.constants))
    steps = plan(trace(model, shape, leaf_types()), norms)
    return steps, {step.node.name: step for step in steps}, bound


def sizes_of(steps, value=1.0):
    return {step.node: torch.tensor([value], dtype=torch.float64) for step in steps}


def diagonal(*entries):
    layer = nn.Linear(len(entries), len(entries), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor(entries)))
    return layer


def named(steps, found):
    return {step.node.name: found[step.node] for step in steps}


def test_a_chain_multiplies_deviations_and_adds_local_errors():
    """E_1 = |W_1| E_0 + e_1, relu keeps it, E_2 = |W_2| E_1 + e_2; within the last run only e_2 is local."""
    model = nn.Sequential(diagonal(2.0, 1.0), nn.ReLU(), diagonal(3.0, 3.0))
    steps, by_name, _ = planned(model, (2,))
    errors = [
        LocalError(h=0.1 if step.node.op == "call_module" and step.rounding.kind == "dot" else 0.0) for step in steps
    ]
    found = named(steps, spread(steps, errors, sizes_of(steps), 0.5))
    assert float(found["_0"].whole) == pytest.approx(2 * 0.5 + 0.1)
    assert float(found["_0"].local) == pytest.approx(0.1)
    assert float(found["_1"].whole) == pytest.approx(1.1)
    assert float(found["_1"].local) == 0.0
    assert float(found["_2"].whole) == pytest.approx(3 * 1.1 + 0.1)
    assert float(found["_2"].local) == pytest.approx(0.1)
    assert by_name["_2"].anchor is by_name["_1"].node
    assert by_name["_2"].lipschitz == pytest.approx(6.0)


def test_within_a_run_the_proved_norm_replaces_the_product():
    """W_2 W_1 = identity: the deviation of the anchor keeps its size, a local error between grows."""
    model = nn.Sequential(diagonal(4.0, 0.25), diagonal(0.25, 4.0))
    steps, by_name, _ = planned(model, (2,))
    errors = [LocalError(h=0.1 if step.node.name == "_0" else 0.0) for step in steps]
    found = named(steps, spread(steps, errors, sizes_of(steps), 1.0))
    assert by_name["_1"].span == pytest.approx(1.0)
    assert float(found["_1"].whole) == pytest.approx(1.0 + 4 * 0.1)


def test_behind_an_invertible_part_the_growth_is_that_of_the_run():
    model = nn.Sequential(Normalize(0.1, 0.5), nn.Flatten(), nn.Linear(16, 4))
    _, by_name, bound = planned(model, (1, 4, 4))
    own = float(torch.linalg.matrix_norm(model[2].weight.detach().double(), 2))
    assert by_name["_1"].inverse == pytest.approx(0.5)
    assert own <= by_name["_2"].growth <= own * (1 + 1e-6)
    assert bound.upper == pytest.approx(2 * own, rel=1e-6)


def test_sums_and_concatenations():
    def forward(m, x):
        like = m.first(x) + x * 2.0
        unlike = like.relu() - like
        return torch.cat([unlike, m.second(x)], 1)

    model = Wired(forward, first=diagonal(1.0, 1.0), second=diagonal(3.0, 3.0))
    steps, by_name, _ = planned(model, (2,))
    found = named(steps, spread(steps, [LocalError(h=0.01)] * len(steps), sizes_of(steps), 1.0))
    # x * 2 and first(x) have the deviations 2.01 and 1.01 together, and the sum its own
    assert float(found["add"].whole) == pytest.approx(3.0 + 0.03)
    assert float(found["relu"].whole) == pytest.approx(3.04)
    assert float(found["sub"].whole) == pytest.approx(3.04 + 3.03 + 0.01)
    assert float(found["cat"].whole) == pytest.approx(math.hypot(6.08, 3.01) + 0.01)
    assert by_name["sub"].anchor is None
    assert by_name["add"].span == pytest.approx(3.0)


def test_a_tensor_added_to_itself_counts_twice():
    steps, _, _ = planned(Wired(lambda m, x: m.fc(x + x).relu() + 0.0, fc=diagonal(1.0, 1.0)), (2,))
    found = named(steps, spread(steps, [LocalError()] * len(steps), sizes_of(steps), 1.0))
    assert float(found["relu"].whole) == pytest.approx(2.0)


def test_local_errors_see_inputs_results_and_deviations():
    model = diagonal(2.0, 2.0)
    steps, _, _ = planned(nn.Sequential(model), (2,))
    sizes = {steps[0].node: torch.tensor([3.0], dtype=torch.float64), steps[1].node: torch.tensor([5.0]).double()}
    errors = [LocalError(), LocalError(0.1, 0.01, 7.0)]
    found = named(steps, spread(steps, errors, sizes, 1.0))
    assert float(found["_0"].local) == pytest.approx(0.1 * (3 + 1) + 0.01 * (5 + 2) + 7)
    slopes = named(steps, spread(steps, errors, sizes, 1.0, fixed=False))
    assert float(slopes["_0"].local) == pytest.approx(0.1 * (3 + 1) + 0.01 * (5 + 2))
    running = named(steps, spread(steps, errors, sizes, 0.0, computed=True))
    assert float(running["_0"].local) == pytest.approx((0.1 * 3 + 0.01 * 5 + 7) * 1.02)


def test_without_a_bound_nothing_finite_comes_out():
    steps, _, _ = planned(nn.Sequential(diagonal(1.0, 1.0), nn.ReLU(), diagonal(1.0, 2.0)), (2,))
    errors = [LocalError(h=math.inf if step.node.name == "_0" else 0.0) for step in steps]
    found = named(steps, spread(steps, errors, sizes_of(steps), 0.0))
    assert not math.isfinite(float(found["_2"].whole))


def test_peaks_bound_every_intermediate_number():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), Residual(nn.Tanh()))
    steps, _, _ = planned(model, (4,))
    sizes = sizes_of(steps, 2.0)
    errors = step_errors(steps, ARITHMETICS["float32"])
    bounds = peaks(steps, sizes, spread(steps, errors, sizes, 0.0))
    assert len(bounds) == 5  # all but the flattening; of the input too, whose conversion may overflow
    assert all(float(bound) >= 2.0 for bound in bounds)


def test_overflow_limits():
    arithmetic = ARITHMETICS["float16"]
    quarter = arithmetic.huge / 4
    fixed = [torch.tensor([0.0, quarter, 1.0, math.nan], dtype=torch.float64)]
    slopes = [torch.tensor([2.0], dtype=torch.float64)]
    limit = overflow_limit(arithmetic, fixed, slopes)
    assert limit[:3].tolist() == pytest.approx([quarter / 2, 0.0, (quarter - 1) / 2])
    assert float(limit[0]) < quarter / 2
    assert float(limit[3]) == 0.0
    assert overflow_limit(arithmetic, fixed).tolist() == [math.inf, 0.0, math.inf, 0.0]
    assert overflow_limit(ARITHMETICS["real"], [torch.tensor([1e300], dtype=torch.float64)]).tolist() == [math.inf]


def test_norms_of_another_model_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    graph = trace(model, (4,), leaf_types())
    with pytest.raises(ValueError, match="no norm of the layers up to _1"):
        plan(graph, Norms({}, {"input_1": 1.0}))
    with pytest.raises(ValueError, match="no constant of input_1"):
        plan(graph, Norms({"_1": 1.0}, {}))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_an_exact_operation_that_scales_has_a_norm_of_its_own(monkeypatch):
    from speccert.certify import rules
    from speccert.certify.linear import Diagonal

    for registry in ("_RULES", "_ROUNDINGS"):
        monkeypatch.setattr(rules, registry, dict(getattr(rules, registry)))
    rules.register_rule(Doubled, linear=lambda call: Diagonal(torch.tensor(2.0), call.in_shape), rounding=rules.EXACT)
    _, by_name, _ = planned(nn.Sequential(nn.Flatten(), Doubled(), nn.Linear(4, 3)), (2, 2))
    assert by_name["_0"].moves
    assert not by_name["_1"].moves
    assert by_name["_1"].inverse == pytest.approx(0.5)

import json
import math
import os
import sys

import pytest
import torch
from oracles import Wired, exact_copy, jacobian, matrix_norm, operator_norm, random, randomised
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from speccert import cli
from speccert.certify import lipschitz, rules
from speccert.experiments.audit import audit_model
from speccert.experiments.audit_text import verdict
from speccert.models import Normalize, constrain


def claims(model, input_shape, norm="l2", **given):
    return {claim.method: claim for claim in audit_model(model, input_shape, norm=norm, **given).claims}


def claim(model, input_shape, method, norm="l2"):
    (found,) = (found for name, found in claims(model, input_shape, norm).items() if method in name)
    return found


def net(*layers, inputs, classes=3):
    """The layers, eval mode, and a last layer to logits."""
    body = nn.Sequential(*layers, nn.Flatten()).eval()
    with torch.no_grad():
        size = body(torch.zeros(1, *inputs)).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), randomised(nn.Linear(size, classes)).float()).eval()


def ones_convolution(**options):
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False, **options)
    nn.init.ones_(layer.weight)
    return layer


def circulant_norm(side):
    """Norm of the zero-padded all-ones 3x3 convolution on one picture: that of the band matrix in each axis."""
    band = torch.diag(torch.ones(side)) + torch.diag(torch.ones(side - 1), 1) + torch.diag(torch.ones(side - 1), -1)
    return float(torch.linalg.eigvalsh(band.double())[-1]) ** 2


def test_the_reshaped_kernel_of_all_ones_claims_12_where_33_is_true():
    found = claim(net(ones_convolution(), inputs=(4, 8, 8)), (4, 8, 8), "reshaped")
    true = 4 * circulant_norm(8)
    assert found.claimed == pytest.approx(12.0, rel=1e-12)
    assert found.attained <= true * (1 + 1e-9) <= found.proved * (1 + 2e-9)
    assert found.proved == pytest.approx(true, rel=1e-6)
    assert true == pytest.approx(33.16, abs=0.01)
    assert found.excess == pytest.approx(true / 12, rel=1e-6)
    assert (found.verdict, verdict(found)) == ("too small", "radii 2.76 times too large")


def test_fft_on_the_grid_of_the_kernel():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():  # taps 1, 0, -1: on a grid of 3 its symbol is at most sqrt(3), on a long one 2
        layer.weight.copy_(torch.tensor([[0.0, 0, 0], [1, 0, -1], [0, 0, 0]]).reshape(1, 1, 3, 3))
    found = claim(net(layer, inputs=(1, 12, 12)), (1, 12, 12), "kernel's grid")
    assert found.claimed == pytest.approx(math.sqrt(3))
    assert found.attained > 1.9
    assert found.verdict == "too small"


def test_groups_are_a_maximum_not_a_product():
    layer = nn.Conv2d(2, 2, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 0.25]).reshape(2, 1, 1, 1))
    found = claim(net(layer, inputs=(2, 5, 5)), (2, 5, 5), "groups")
    assert found.claimed == pytest.approx(0.125, rel=1e-6)
    assert found.proved == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_repeats_pixels(mode):
    layer = ones_convolution(padding_mode=mode)
    found = claim(net(layer, inputs=(4, 6, 6)), (4, 6, 6), "padding for zeros")
    assert found.claimed == pytest.approx(4 * circulant_norm(6), rel=1e-6)
    assert found.attained <= operator_norm(layer, (4, 6, 6)) * (1 + 1e-9) <= found.proved * (1 + 2e-9)
    assert found.verdict == "too small"


def test_batch_normalisation():
    layer = nn.BatchNorm2d(3)
    layer.running_var.fill_(0.01 - layer.eps)
    layer.weight.data.fill_(0.5)
    found = claims(net(layer, nn.Conv2d(3, 3, 3), inputs=(3, 6, 6)), (3, 6, 6))
    assert found["counts batch normalisation as 1"].proved == pytest.approx(5.0, rel=1e-5)
    assert found["counts batch normalisation as 1"].excess == pytest.approx(5.0, rel=1e-5)
    assert found["takes the variance for its root in batch normalisation"].claimed == pytest.approx(50.0, rel=1e-5)
    assert found["takes the variance for its root in batch normalisation"].verdict == "safe here"


def test_input_normalisation():
    found = claims(net(Normalize([0.0, 0.0], [0.25, 0.5]), inputs=(2, 3, 3)), (2, 3, 3))
    assert found["leaves the input normalisation out"].claimed == 1.0
    assert found["leaves the input normalisation out"].excess == pytest.approx(4.0, rel=1e-6)
    assert found["divides by the largest std of the channels"].claimed == pytest.approx(2.0)
    assert found["divides by the largest std of the channels"].excess == pytest.approx(2.0, rel=1e-6)
    same = claims(net(Normalize(0.1, 0.5), inputs=(2, 3, 3)), (2, 3, 3))
    assert "divides by the largest std of the channels" not in same


def test_power_iteration_is_below_what_is_attained():
    model = nn.Sequential(randomised(nn.Linear(40, 40, bias=False), 3).float()).eval()
    found = claim(model, (40,), "power iterations")
    true = matrix_norm(model[0].weight.double())
    assert found.claimed < found.attained <= true * (1 + 1e-12) <= found.proved * (1 + 1e-12)
    assert found.verdict == "too small"


def test_a_start_at_all_ones_can_miss_everything():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    found = claim(model, (2,), "all ones")
    assert found.claimed == 0.0
    assert found.excess == math.inf
    assert verdict(found) == "radii infinitely too large"


@pytest.mark.parametrize(
    ("layer", "method", "factor"),
    [
        (nn.MaxPool2d(3, 1), "max pooling", 3.0),
        (nn.GELU(), "activation", 1.1289),
        (nn.LeakyReLU(-2.0), "activation", 2.0),
    ],
    ids=str,
)
def test_operations_counted_as_1(layer, method, factor):
    found = claim(net(layer, inputs=(1, 8, 8)), (1, 8, 8), method)
    assert found.claimed == 1.0
    assert found.excess == pytest.approx(factor, rel=1e-4)


def test_branches_are_no_chain():
    model = Wired(lambda m, x: m.head(x + m.identity(x)), identity=nn.Linear(3, 3, bias=False), head=nn.Linear(3, 3))
    for layer in (model.identity, model.head):
        nn.init.eye_(layer.weight)
    found = claim(model.eval(), (3,), "chain")
    assert found.claimed == pytest.approx(1.0, rel=1e-6)
    assert found.excess == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(("norm", "factor"), [("l2", math.sqrt(2)), ("linf", 2.0)])
def test_pairs_of_logits_move_apart(norm, factor):
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    model[0].weight.data = torch.eye(2) if norm == "l2" else torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = claim(model, (2,), "divides margins by L", norm)
    assert found.claimed == pytest.approx(1.0, rel=1e-6)
    assert found.excess == pytest.approx(factor, rel=1e-5)
    audit = audit_model(model, (2,), norm=norm)
    assert audit.network.gain == pytest.approx(1.0, rel=1e-5)


def test_a_penalty_is_no_promise_and_the_stored_tensor_is_not_the_weight():
    layer = randomised(nn.Linear(6, 6), 1).float()
    norm = matrix_norm(layer.weight.double())
    soft = net(constrain(nn.Sequential(layer), norm / 2, constraint="penalty"), inputs=(6,))
    found = claim(soft, (6,), "promises")
    assert found.claimed == pytest.approx(norm / 2)
    assert found.excess == pytest.approx(2.0, rel=1e-6)
    held = net(constrain(nn.Sequential(randomised(nn.Linear(6, 6), 1).float()), 2 * norm), inputs=(6,))
    parametrize.register_parametrization(held[0][0], "weight", Doubled(), unsafe=True)
    stored = claim(held, (6,), "stored")
    assert stored.claimed == pytest.approx(norm, rel=1e-6)
    assert stored.excess == pytest.approx(2.0, rel=1e-6)


class Noisy(nn.Module):
    def forward(self, weight):
        return weight + torch.rand(())


def test_a_weight_that_changes_between_reads_is_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", Noisy())
    problems = audit_model(model.eval(), (3,)).problems
    assert "its weight differs between two reads" in [problem.problem for problem in problems]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_torchs_own_spectral_norm_reshapes_the_kernel():
    layer = parametrizations.spectral_norm(ones_convolution(), n_power_iterations=50)
    found = claim(net(layer, inputs=(4, 8, 8)), (4, 8, 8), "promises")
    assert found.claimed == 1.0
    assert found.excess == pytest.approx(circulant_norm(8) / 3, rel=1e-3)


def test_a_plain_model_has_no_false_alarms():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).eval()
    model[0].weight.data, model[2].weight.data = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    audit = audit_model(model, (3,))
    assert [found.method for found in audit.claims if found.verdict == "too small"] == []
    assert audit.problems == ()


def test_brackets_are_those_of_the_bound_and_rules_are_named():
    model = net(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), inputs=(1, 8, 8))
    audit, bound = audit_model(model, (1, 8, 8)), lipschitz(model, (1, 8, 8))
    assert [(row.lower, row.upper) for row in audit.runs] == [(layer.lower, layer.upper) for layer in bound.layers]
    assert audit.runs[0].layers == ("0", "1")
    assert audit.network.upper == bound.upper
    assert audit.network.pairwise_highest == float(bound.pairwise.max())
    assert [(row.place, row.kind, row.rule, row.factor) for row in audit.operations] == [
        ("2", "ReLU", "factor", 1.0),
        ("3", "MaxPool2d", "factor", 1.0),
    ]
    assert audit.network.lower >= matrix_norm(jacobian(exact_copy(model), torch.zeros(1, 8, 8).double())) * 0.5


def test_sums_and_concatenations_are_named():
    model = Wired(
        lambda m, x: m.head(torch.cat([x + m.a(x).relu(), m.b(x)], dim=1)),
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 2),
        head=nn.Linear(5, 2),
    ).eval()
    rules = [row.rule for row in audit_model(model, (3,)).operations]
    assert rules == ["factor", "sum", "concat"]


class Inherits(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


def test_everything_that_stands_in_the_way_is_listed_at_once():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.CELU(), nn.Linear(16, 3)
    )
    model[1].weight.data[0, 0] = math.nan
    model[3].register_forward_hook(lambda *_: None)
    model.train()
    audit = audit_model(model, (1, 4, 4))
    assert audit.network is None
    places = {problem.place: problem for problem in audit.problems}
    assert "in training mode" in places["the model, 0, 1 and 4 more"].problem
    assert "model.eval()" in places["the model, 0, 1 and 4 more"].remedy
    assert "1 of 256 numbers are NaN or infinite" in places["1.weight"].problem
    assert "no forward hooks" in places["3"].problem
    assert "LayerNorm: no Lipschitz rule" in places["2"].problem
    assert "CELU: no Lipschitz rule" in places["4"].problem
    assert "register_rule(CELU" in places["4"].remedy
    assert len(audit.problems) == 5
    assert model.training


def test_what_is_left_of_a_model_without_a_bound_is_bounded_and_counting_1_is_shown():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.CELU(), nn.Linear(3, 2, bias=False)).eval()
    model[0].weight.data, model[2].weight.data = 2 * torch.eye(3), torch.tensor([[3.0, 0, 0], [0, 0, 0]])
    audit = audit_model(model, (3,))
    assert [row.upper for row in audit.runs] == pytest.approx([2.0, 3.0], rel=1e-6)
    (found,) = (found for found in audit.claims if found.method.startswith("counts what it does not know"))
    assert found.claimed == pytest.approx(6.0, rel=1e-6)
    assert found.proved == math.inf


def test_a_subclass_inherits_no_rule():
    layer = Inherits(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    model = nn.Sequential(layer, nn.Linear(4, 2)).eval()
    audit = audit_model(model, (4,))
    assert "a subclass of Linear inherits no rule" in audit.problems[0].problem
    (found,) = (found for found in audit.claims if "subclass" in found.method)
    assert found.claimed == pytest.approx(1.0, rel=1e-6)
    assert found.excess == pytest.approx(10.0, rel=1e-5)


class Choosy(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cant_be_traced_is_named_with_its_place():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Choosy(), nn.Linear(3, 3)), Choosy(), nn.Linear(3, 2)).eval()
    places = [problem.place.split()[0] for problem in audit_model(model, (3,)).problems]
    assert places == ["1.0", "2"]


def test_old_hooks_of_torch_are_told_apart():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 3))
    (problem,) = audit_model(nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 2)).eval(), (3,)).problems
    assert "parametrizations.weight_norm" in problem.remedy


def test_a_shape_that_does_not_fit_is_a_problem():
    (problem,) = audit_model(nn.Sequential(nn.Linear(3, 2)).eval(), (4,)).problems
    assert "does not fit" in problem.problem


def test_a_layer_whose_norm_is_out_of_reach_is_a_problem():
    pool = nn.AdaptiveAvgPool2d(33)  # neither structure nor a matrix of its own
    audit = audit_model(net(pool, nn.ReLU(), inputs=(1, 50, 50)), (1, 50, 50))
    assert "too large" in audit.problems[0].problem
    assert [row.layers for row in audit.runs] == [("3",)]


def test_the_model_is_left_as_it_was():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * torch.tensor(2.0) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Scaled(), nn.Linear(3, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = [set(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()
    audit_model(model, (3,))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == seen
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_norm_is_refused():
    with pytest.raises(ValueError, match="norm: expected one of"):
        audit_model(nn.Sequential(nn.Linear(3, 2)).eval(), (3,), norm="l3")


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_other_norms(norm):
    model = net(Normalize(0.0, 0.5), nn.Conv2d(1, 2, 3), nn.ReLU(), inputs=(1, 6, 6))
    found = claims(model, (1, 6, 6), norm)
    assert found["leaves the input normalisation out"].excess == pytest.approx(2.0, rel=1e-6)
    assert "takes the reshaped kernel's norm" not in found


def test_what_rounding_takes_is_bounded_at_the_samples():
    model = net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), inputs=(1, 8, 8))
    x = random(20, 1, 8, 8).float()
    found = audit_model(model, (1, 8, 8), points=x).execution
    with torch.no_grad():
        logits, exact = model(x).double(), exact_copy(model)(x.double())
    change = logits - exact
    worst = (change[:, :, None] - change[:, None, :]).abs().max()
    assert 0 < float(worst) <= found.lost
    assert (found.arithmetic, found.unit, found.samples, found.ties) == ("float32", 2.0**-24, 20, 0)
    assert found.radius <= found.real_radius
    top = exact.topk(2, dim=1).values
    assert found.margin == pytest.approx(float((top[:, 0] - top[:, 1]).median()), rel=1e-6)
    assert found.bfloat16 > float(worst)
    assert "eval-mode" in [item.id for item in found.assumptions]


def test_ties_and_the_runner_up():
    model = nn.Sequential(nn.Linear(2, 3)).double().eval()
    model[0].weight.data = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 10.0]], dtype=torch.float64)
    model[0].bias.data = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    audit = audit_model(model, (2,), points=torch.zeros(1, 2).double())
    (found,) = (found for found in audit.claims if "runner-up" in found.method)
    assert found.claimed == pytest.approx(0.1)  # 0.5 / 0.1 = 5, but the other class allows 1 / 10 only
    assert found.proved == pytest.approx(5.0)
    assert found.verdict == "not proved"
    assert audit.execution.radius == pytest.approx(0.1)
    model[0].bias.data.zero_()
    assert audit_model(model, (2,), points=torch.zeros(4, 2).double()).execution.ties == 4


class Unrounded(nn.Module):
    def forward(self, x):
        return x / 2


def test_a_rule_without_rounding_gives_a_bound_and_no_certificate(monkeypatch):
    monkeypatch.setitem(rules._RULES, Unrounded, rules.Rule(factor=lambda call, norm: 0.5))
    audit = audit_model(nn.Sequential(nn.Linear(3, 3), Unrounded(), nn.Linear(3, 2)).eval(), (3,))
    (problem,) = audit.problems
    assert (problem.place, problem.kind) == ("1", "rule")
    assert "no rounding rule" in problem.problem
    assert audit.network is not None
    assert audit.execution is None


def test_logits_that_are_not_finite_are_a_problem():
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    model[0].weight.data.fill_(3e38)
    (problem,) = audit_model(model, (3,), points=torch.ones(2, 3)).problems
    assert "expected finite numbers" in problem.problem


MODEL = """
import torch
from torch import nn
def build(input_shape, num_classes):
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, num_classes))
def broken(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(256), nn.CELU(), nn.Linear(256, num_classes))
"""


@pytest.fixture
def certify(capsys, monkeypatch, tmp_path):
    """Run a command in this process: its exit code, what it printed, and the lines of its errors."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err.splitlines()

    return call


@pytest.fixture
def module(tmp_path):
    name = f"audited_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    yield name
    sys.modules.pop(name, None)


def test_the_command_prints_and_saves_what_was_found(certify, module, tmp_path):
    given = ["--input-shape", "4,8,8", "--classes", "5", "--json", "audit.json"]
    code, out, err = certify("audit-model", f"{module}:build", *given)
    assert (code, err) == (0, [])
    assert "radii 2.76 times" in out
    assert "33.163" in out
    assert max(map(len, out.splitlines())) <= 100
    saved = json.loads((tmp_path / "audit.json").read_text())
    (found,) = (found for found in saved["claims"] if "reshaped" in found["method"])
    assert found["claimed"] == pytest.approx(12.0)
    assert found["excess"] == pytest.approx(33.1634 / 12, rel=1e-4)
    assert found["verdict"] == "too small"
    assert saved["problems"] == []
    assert saved["runs"][0]["upper"] == pytest.approx(33.1634, rel=1e-5)
    assert saved["network"]["upper"] >= saved["network"]["lower"] > 0


def test_help_has_an_example(certify):
    code, out, err = certify("audit-model", "--help")
    assert (code, err) == (0, [])
    assert "certify audit-model runs/" in out
    assert max(map(len, out.splitlines())) <= 110


def test_the_command_fails_where_there_is_no_bound_and_says_why(certify, module, tmp_path):
    given = ["--input-shape", "4,8,8", "--json", "audit.json"]
    code, out, err = certify("audit-model", f"{module}:broken", *given)
    assert code == 1
    assert "LayerNorm: no Lipschitz rule" in out
    assert "CELU: no Lipschitz rule" in out
    assert err == [f"certify: error: {module}:broken can't be certified: 2 problems, listed above"]
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["network"] is None
    assert [problem["place"] for problem in saved["problems"]] == ["1", "2"]
    assert saved["claims"][-1]["proved"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input-shape", "4,x"), "input-shape = '4,x': expected sizes > 0 such as 1,28,28"),
        (("--input-shape", "0"), "input-shape = '0': expected sizes > 0 such as 1,28,28"),
        (("--input-shape", "4,8,8", "--dataset", "digits"), "without a data set"),
        (("--input-shape", "4,8,8", "--norm", "l3"), "norm: expected one of l2, linf, l1; got 'l3'"),
        ((), "expected one for the model"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, certify, module):
    code, out, err = certify("audit-model", f"{module}:build", *arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]

import pytest
import torch
from oracles import Wired, assert_sound, matrix_norm, random, randomised
from torch import nn

from speccert.certify import Call, linear_map_of, lipschitz, norm_bounds, register_rule
from speccert.certify import rules as registry
from speccert.certify.linear import Dense, Diagonal


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


class Cube(nn.Module):
    def forward(self, x):
        return 5 * torch.sin(x)


class Twice(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # can't be traced: a registered layer is a leaf
            return 2 * x
        return x + x


class Mixed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T.contiguous()


def model_with(layer):
    return randomised(nn.Sequential(nn.Linear(4, 3), layer, nn.Linear(3, 3)), scale=1.0).double()


def test_unregistered_layer_is_refused_and_then_bounded():
    model = model_with(Cube())
    with pytest.raises(ValueError, match=r"no Lipschitz rule for sin; register one with .*register_rule"):
        lipschitz(model, (4,))
    register_rule(Cube, factor=5.0)
    assert_sound(model, (4,))


def test_linear_rule_folds_with_its_neighbours():
    register_rule(Twice, linear=lambda call: Diagonal(torch.tensor(2.0), call.in_shape))
    model = model_with(Twice())
    exact = matrix_norm(2 * model[2].weight @ model[0].weight)
    assert lipschitz(model, (4,)).upper == pytest.approx(exact, rel=1e-6)
    assert norm_bounds(Twice(), (3,)).upper == pytest.approx(2.0)


def test_linear_rule_of_a_subclass():
    register_rule(Mixed, linear=lambda call: Dense(call.module.weight, call.in_shape))
    assert_sound(model_with(Mixed(3, 3)), (4,))


def test_factor_by_norm_and_call():
    seen = []

    def factor(call: Call, norm: str) -> float:
        seen.append((call.place, call.in_shape, call.out_shape, norm))
        return {"l2": 5.0, "linf": 6.0, "l1": 7.0}[norm]

    register_rule(Cube, factor=factor)
    lipschitz(model_with(Cube()), (4,), norm="l1")
    assert {entry[3] for entry in seen} == {"l1", "l2"}
    assert {entry[:3] for entry in seen} == {("1", (3,), (3,))}


def test_functions_and_methods_may_be_registered():
    register_rule(torch.sin, "cos", factor=1.0)
    assert_sound(randomised(Wired(lambda m, x: torch.sin(m.fc(x)).cos(), fc=nn.Linear(3, 4))).double(), (3,))


def test_a_rule_of_the_wrong_shape_is_caught():
    register_rule(Cube, linear=lambda call: Dense(torch.ones(2, 3), call.in_shape))
    with pytest.raises(ValueError, match=r"1: its rule gives an operator to \(2,\), but the model gave \(3,\)"):
        lipschitz(model_with(Cube()), (4,))


def test_nothing_is_inherited():
    class Milder(nn.ReLU):
        def forward(self, x):
            return 10 * torch.sin(x)

    with pytest.raises(ValueError, match="no Lipschitz rule for sin"):
        lipschitz(model_with(Milder()), (4,))
    with pytest.raises(ValueError, match=r"no Lipschitz rule for .*Milder"):
        linear_map_of(Milder(), (3,))


@pytest.mark.parametrize("options", [{}, {"linear": lambda call: None, "factor": 1.0}])
def test_exactly_one_kind_of_rule(options):
    with pytest.raises(ValueError, match="exactly one"):
        register_rule(Cube, **options)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_factors_that_bound_nothing_are_refused(factor):
    with pytest.raises(ValueError, match="factor"):
        register_rule(Cube, factor=factor)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_factors_that_a_rule_computes_are_checked_too(factor):
    register_rule(Cube, factor=lambda call, norm: factor)
    with pytest.raises(ValueError, match=r"factor|overflow"):
        lipschitz(model_with(Cube()), (4,))


def test_a_second_rule_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="has a rule already"):
        register_rule(Cube, nn.ReLU, factor=100.0)
    with pytest.raises(ValueError, match="no Lipschitz rule for sin"):
        lipschitz(model_with(Cube()), (4,))


def test_two_tensor_inputs_have_no_rule():
    register_rule(torch.maximum, factor=1.0)
    model = randomised(Wired(lambda m, x: torch.maximum(m.fc(x), m.fc(random(1, 3) + x)), fc=nn.Linear(3, 3))).double()
    with pytest.raises(ValueError, match="one tensor input only"):
        lipschitz(model, (3,))

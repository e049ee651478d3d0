import copy
import math
import re

import pytest
import torch
from torch import nn

from speccert.certify import register_rule, rules
from speccert.experiments.uncertified import uncertified_rows, why_uncertified


class Gated(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Split(nn.Module):
    def forward(self, x):
        return torch.cat(x.split(4, 1)[::-1], 1)


class Maxed(nn.Module):
    def forward(self, x):
        return x - x.max(1, keepdim=True).values


class Masked(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, -x)


class Coarse(nn.Module):
    def forward(self, x):
        return x.half().float()


class Turned(nn.Module):  # the batch is its second axis for a while
    def forward(self, x):
        return x.t().relu().t()


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x.max(1, keepdim=True).values)


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(nn.ReLU())

    def forward(self, x, scale=2.0):
        return scale * self.net(x)


class First(nn.Module):
    def forward(self, x):
        return x[0].flatten(1)


class MixedAfterSplit(nn.Module):
    def forward(self, x):
        return torch.cat(x.split(4, 1)[::-1], 1) - x.mean(0)


class Own(nn.Module):
    def forward(self, x):
        return 0.5 * x


def net(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), *layers, nn.Linear(8, 4)).eval()


def hooked():
    model = net(nn.ReLU())
    model[1].register_forward_hook(lambda module, given, result: 2 * result)
    return model


def replaced():
    model = net(nn.ReLU())
    model[2].forward = torch.tanh
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: net(nn.LayerNorm(8)), "2: no Lipschitz rule for torch.nn.modules.normalization.LayerNorm"),
        (lambda: net(nn.Softmax(1)), "2: no Lipschitz rule for torch.nn.modules.activation.Softmax"),
        (lambda: net(Gated()), "mul: mul has a rule for one tensor input only"),
        (
            lambda: net(Branching()),
            r"2 \(.*test_uncertified.Branching\): can't be traced: symbolically traced variables",
        ),
        (hooked, r"1 \(torch.nn.modules.linear.Linear\): expected no forward hooks"),
        (replaced, r"2 \(torch.nn.modules.activation.ReLU\): expected the forward of its class"),
    ],
)
def test_what_no_certificate_covers_is_named_in_one_line(make, reason):
    model = make()
    before = copy.deepcopy(model.state_dict())
    found = why_uncertified(model, (1, 3, 4), "l2")
    assert found is not None
    assert "\n" not in found
    assert re.match(reason, found)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: net(Split()), "%split : .*: expected one tensor, got tuple"),
        (lambda: net(Maxed()), "%max_1 : .*: expected one tensor, got max"),
        (lambda: net(Masked()), "%gt : .*: expected floating-point numbers, got torch.bool"),
        (lambda: net(Coarse()), "%half : .*: expected numbers no coarser than torch.float32, got torch.float16"),
        (lambda: net(Turned()), "%t : .*: expected the batch to stay the first axis"),
        (lambda: net(Noisy()), "%max_1 : .*: expected one tensor, got max"),
        (lambda: net(nn.Unflatten(1, (2, 4)), nn.LSTM(4, 4, batch_first=True), First()), "%.* got tuple"),
        (Switched, "the model: expected one input tensor, got 2 inputs"),
    ],
)
def test_steps_that_are_no_tensors_of_floats_only_keep_a_model_from_a_certificate(make, reason):
    found = why_uncertified(make().eval(), (1, 3, 4), "l2")
    assert found is not None
    assert re.match(reason, found)


def test_a_rule_without_rounding_covers_no_radius(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    register_rule(Own, factor=0.5)
    assert why_uncertified(net(Own()), (1, 3, 4), "l2").startswith("2: no rounding rule for")


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), Mixing(), MixedAfterSplit()])
def test_other_models_have_no_such_reason(layer):
    assert why_uncertified(net(layer), (1, 3, 4), "linf") is None


@pytest.mark.parametrize("shape", [(1, 3, 5), (7,)])
def test_a_shape_that_does_not_fit_is_no_such_reason(shape):
    assert why_uncertified(net(nn.LayerNorm(8)), shape, "l2") is None


def test_training_mode_and_bad_weights_are_no_such_reason():
    assert why_uncertified(net(nn.LayerNorm(8)).train(), (1, 3, 4), "l2") is None
    model = net(nn.LayerNorm(8))
    model[1].bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"1\.bias: expected finite numbers; got NaN"):
        why_uncertified(model, (1, 3, 4), "l2")


def test_rows_have_radii_of_0():
    logits = torch.tensor([[2.0, 5.0, 1.0], [0.5, 0.0, -1.0]])
    samples, radii = uncertified_rows(logits, torch.tensor([1, 1]))
    assert samples["prediction"].tolist() == [1, 0]
    assert samples["margin"].tolist() == [3.0, -0.5]
    assert (samples[["radius_l2", "radius_linf", "radius_l1"]] == 0).all().all()
    assert all(radius.tolist() == [0, 0] for radius in radii.values())

"""The executed network against its float64 copy: rounding that the final logits don't show still lowers the radii."""

import copy

import pytest
import torch
from torch import nn

from speccert.attacks import attack
from speccert.certify import certified_radii
from speccert.certify.execution import float64_copy, logits_of, rounding_allowance
from speccert.models import constrain


def cancelling(bias: float = 1e5) -> nn.Sequential:
    """Hidden values of size `bias` that cancel in the logits: float32 keeps few digits of what is left."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.fill_(bias)
        model[2].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    return model


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_large_hidden_values_that_cancel_lower_the_radii_below_every_adversarial_distance():
    model, x = cancelling(), uniform(400, 2)
    y = model(x).argmax(1)
    radii = certified_radii(model, x, y)
    found = attack(model, x, y, "ddn", norm="l2")
    assert (radii > 0).any()
    assert (found.distance >= radii).all()


@pytest.mark.parametrize("wide", [False, True])
def test_random_points_inside_the_radius_of_a_linear_model_keep_the_class(wide):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(50, 2)
            self.register_buffer("factor", torch.ones((), dtype=torch.float64 if wide else torch.float32))

        def forward(self, x):
            return self.linear(x) * self.factor

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Scaled().eval()
    normal = (model.linear.weight[0] - model.linear.weight[1]).detach().double()
    x = uniform(300, 50)
    margin = (model.linear.weight.double() @ x.double().T + model.linear.bias.double()[:, None]).T.detach()
    # to within 1e-4 of the decision boundary, where rounding is a good part of the margin
    beside = torch.linspace(0, 1e-4, 300, dtype=torch.float64) / normal.norm()
    x = (x.double() + (beside - (margin[:, 0] - margin[:, 1]) / normal.square().sum())[:, None] * normal).float()
    y = model(x).argmax(1)
    radii = certified_radii(model, x, y)
    assert (radii > 0).sum() >= 100
    for seed in range(20):
        noise = torch.randn(300, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noise = noise - 30 * (normal / normal.norm()) * (1 - 2.0 * y.double())[:, None]  # mostly towards the boundary
        inside = x.double() + noise / noise.norm(dim=1, keepdim=True) * radii[:, None] * 0.999
        moved = inside.float()
        kept = (moved.double() - x.double()).norm(dim=1) < radii
        assert (model(moved).argmax(1) == y)[kept].all()


def test_the_copy_has_the_weights_that_run_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    constrain(model, 0.7, "cap", input_shape=(1, 4, 4)).eval()
    state = copy.deepcopy(model.state_dict())
    clone = float64_copy(model)
    for k in (0, 3):
        assert torch.equal(clone[k].weight, model[k].weight.double())
        assert type(clone[k]) in (nn.Conv2d, nn.Linear)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    x = uniform(3, 1, 4, 4)
    torch.testing.assert_close(clone(x.double()).float(), model(x))


def test_the_allowance_exceeds_the_deviation_at_the_samples():
    model, x = cancelling(1e4), uniform(300, 2)
    logits = logits_of(model, x)
    deviation = (logits.double() - float64_copy(model)(x.double())).abs().amax(1, keepdim=True)
    assert (rounding_allowance(model, x, logits) >= 2 * deviation).all()


def test_a_float64_model_keeps_nearly_all_of_its_radius():
    model = nn.Linear(6, 3).double().eval()
    x = uniform(50, 6).double()
    logits = logits_of(model, x)
    assert rounding_allowance(model, x, logits).max() <= 1e-11 * logits.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="expected finite inputs"):
        logits_of(nn.Linear(2, 2), torch.tensor([[0.0, bad]]))
    with pytest.raises(ValueError, match="at least one sample"):
        logits_of(nn.Linear(2, 2), torch.zeros(0, 2))

"""The network as it runs: plain weights, conversions, and the float64 pass that sees every tensor."""

import copy

import pytest
import torch
from oracles import Wired, randomised, seeded
from torch import nn

from speccert.attacks import attack
from speccert.certify import certified_radii
from speccert.certify.execution import Float64Pass, executed, logits_of, plain_copy
from speccert.certify.graph import trace
from speccert.certify.rules import leaf_types
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
    return torch.rand(*shape, generator=seeded())


def test_large_hidden_values_that_cancel_lower_the_radii_below_every_adversarial_distance():
    model, x = cancelling(), uniform(400, 2)
    y = model(x).argmax(1)
    radii = certified_radii(model, x, y)
    found = attack(model, x, y, "ddn", norm="l2")
    assert (radii > 0).any()
    assert (found.distance >= radii).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_points_inside_the_radius_of_a_linear_model_keep_the_class(wide, dtype):
    """The radius that real arithmetic gives is flipped at such points."""

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
    model.linear.to(dtype)
    weight, bias = model.linear.weight.detach().double(), model.linear.bias.detach().double()
    normal = weight[0] - weight[1]
    x = uniform(300, 50)
    margin = x.double() @ weight.T + bias
    # near the decision boundary, where rounding is a good part of the margin
    width = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.6}[dtype]
    beside = torch.linspace(0, width, 300, dtype=torch.float64) / normal.norm()
    x = (x.double() + (beside - (margin[:, 0] - margin[:, 1]) / normal.square().sum())[:, None] * normal).to(dtype)
    with torch.no_grad():
        y = model(x).argmax(1)
    radii, bare = certified_radii(model, x, y), certified_radii(model, x, y, arithmetic="real")
    assert (radii > 0).sum() >= 50
    assert (radii <= bare).all()
    flipped = 0
    for seed in range(20):
        noise = torch.randn(300, 50, generator=seeded(seed), dtype=torch.float64)
        noise = noise - 30 * (normal / normal.norm()) * (1 - 2.0 * y.double())[:, None]  # mostly towards the boundary
        noise = noise / noise.norm(dim=1, keepdim=True)
        for radius in (radii, bare):
            moved = (x.double() + noise * radius[:, None] * 0.999).to(dtype)
            kept = (moved.double() - x.double()).norm(dim=1) < radius
            with torch.no_grad():
                same = model(moved).argmax(1) == y
            if radius is radii:
                assert same[kept].all()
            else:
                flipped += int((~same[kept]).sum())
    assert flipped > 0 or dtype != torch.float32


def capped():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    return constrain(model, 0.7, "cap", input_shape=(1, 4, 4)).eval()


def test_the_copy_has_the_weights_that_run_and_leaves_the_model_alone():
    model = capped()
    state = copy.deepcopy(model.state_dict())
    clone = plain_copy(model)
    for k in (0, 3):
        assert torch.equal(clone[k].weight, model[k].weight)
        assert type(clone[k]) in (nn.Conv2d, nn.Linear)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    x = uniform(3, 1, 4, 4)
    assert torch.equal(clone(x), model(x))


def test_conversion_rounds_the_weights_that_run():
    model = capped()
    network = executed(model, "bfloat16")
    assert network.rounded
    assert torch.equal(network.model[3].weight, model[3].weight.bfloat16())
    assert network.rounds(torch.float32)
    assert not network.rounds(torch.bfloat16)
    x = uniform(3, 1, 4, 4)
    assert network.logits(x).dtype == torch.bfloat16
    same = executed(model)
    assert not same.rounded
    assert not same.rounds(torch.float32)
    assert not same.rounds(torch.float16)
    assert same.rounds(torch.float64)
    assert torch.equal(same.logits(x), model(x))
    with pytest.raises(ValueError, match="expected floating-point inputs"):
        same.converted(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))


def in_float64(model, shape, x):
    graph = trace(model, shape, leaf_types())
    seen = {}
    found = Float64Pass(graph).run(x, lambda node, value: seen.update({node.name: value}))
    assert set(seen) == {node.name for node in graph.shapes}
    return found, seen


def test_the_float64_pass_is_that_of_a_float64_model():
    model, x = capped(), uniform(7, 1, 4, 4)
    found, seen = in_float64(plain_copy(model), (1, 4, 4), x)
    assert torch.equal(found, plain_copy(model).double()(x.double()))
    assert all(value.dtype == torch.float64 and len(value) == 7 for value in seen.values())


def test_sizes_follow_the_batch_and_constants_are_those_that_run():
    def forward(m, x):
        flat = x.view(x.size(0), -1)
        return m.fc(flat * (m.scale + 0.1)) / x.shape[-1]

    model = randomised(Wired(forward, {"scale": torch.tensor(0.2)}, fc=nn.Linear(16, 3)))
    x = uniform(9, 1, 4, 4)
    found, _ = in_float64(model, (1, 4, 4), x)
    factor = (torch.tensor(0.2) + 0.1).double()  # rounded in float32
    exact = copy.deepcopy(model.fc).double()
    torch.testing.assert_close(found, exact(x.double().flatten(1) * factor) / 4, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="expected finite inputs"):
        logits_of(nn.Linear(2, 2), torch.tensor([[0.0, bad]]))
    with pytest.raises(ValueError, match="at least one sample"):
        logits_of(nn.Linear(2, 2), torch.zeros(0, 2))


def test_logits_that_overflow_are_refused():
    model = nn.Linear(2, 2).eval()
    with torch.no_grad():
        model.weight.fill_(6e4)
    with pytest.raises(ValueError, match="finite numbers; got NaN or infinity in float16"):
        certified_radii(model, torch.full((1, 2), 30.0), arithmetic="float16")

"""Constraints on stock layers: the norm that holds at eval is that of the materialised operator in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from speccert.models import CONSTRAINTS, constrain, retract, spectral_penalty
from speccert.models.constraints import SpectralConstraint

HARD = ["cap", "clip", "orthogonal", "orthogonal-bjorck", "orthogonal-projected"]
LAYERS = [
    ("linear", lambda: nn.Linear(12, 20), (12,)),
    ("wide linear", lambda: nn.Linear(30, 6), (30,)),
    ("conv2d", lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 9, 8)),
    ("strided", lambda: nn.Conv2d(4, 6, 4, stride=2, padding=1), (4, 8, 8)),
    ("grouped", lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 7, 7)),
    ("dilated", lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 8, 8)),
    ("circular", lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), (3, 8, 8)),
    ("reflect", lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), (3, 8, 8)),
    ("replicate", lambda: nn.Conv2d(3, 3, 5, padding=2, padding_mode="replicate"), (3, 8, 8)),
    ("conv1d", lambda: nn.Conv1d(3, 5, 5, padding=2), (3, 16)),
    ("transposed", lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (4, 5, 5)),
    ("transposed 1d", lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), (4, 6)),
]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def true_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Norm of the operator with the very weights that the layer uses, in float64."""
    exact = copy.deepcopy(layer)
    weight = exact.weight.detach().double()
    if nn.utils.parametrize.is_parametrized(exact):
        nn.utils.parametrize.remove_parametrizations(exact, "weight")
    exact = exact.double()
    size = math.prod(shape)
    with torch.no_grad():
        exact.weight = nn.Parameter(weight)
        exact.bias.zero_()
        matrix = exact(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("threshold", [0.3, 1.0])
@pytest.mark.parametrize("constraint", HARD)
@pytest.mark.parametrize(("make", "shape"), [case[1:] for case in LAYERS], ids=[case[0] for case in LAYERS])
def test_eval_norm_is_at_most_the_threshold(make, shape, constraint, threshold):
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(10)
    constrain(layer, threshold, constraint, input_shape=shape)
    layer.eval()
    assert true_norm(layer, shape) <= threshold * (1 + 1e-12)  # the oracle's own rounding


@pytest.mark.parametrize("make", [case[1] for case in LAYERS[:2]], ids=["tall", "wide"])
@pytest.mark.parametrize("constraint", ["cap", "clip", "orthogonal"])
def test_the_threshold_is_reached_not_only_obeyed(make, constraint):
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(10)
    shape = (layer.in_features,)
    constrain(layer, 2.0, constraint)
    assert true_norm(layer.eval(), shape) >= 2.0 * (1 - 1e-5)


def test_cap_leaves_a_weight_below_the_threshold_alone():
    layer = nn.Conv2d(3, 6, 3, padding=1)
    weight = layer.weight.detach().clone()
    constrain(layer, 100.0, "cap", input_shape=(3, 8, 8))
    assert torch.equal(layer.train().weight, weight)
    assert torch.equal(layer.eval().weight, weight)


def test_cap_in_training_uses_the_operator_and_not_the_reshaped_kernel():
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)  # reshaped kernel: norm 12; operator: 4 * (1 + 2 cos(pi / 9))^2 on 8 x 8
    constrain(layer, 1.0, "cap", input_shape=(4, 8, 8))
    layer.train()
    for _ in range(30):
        weight = layer.weight
    expected = 1 / (4 * (1 + 2 * math.cos(math.pi / 9)) ** 2)
    assert float(weight[0, 0, 0, 0].detach()) == pytest.approx(expected, rel=1e-4)


def test_cap_gradient_passes_through_the_norm():
    """W / ||W|| does not change when W is scaled, so its gradient is orthogonal to W."""
    layer = nn.Linear(6, 5).double()
    constrain(layer, 0.1, "cap")
    layer.train()
    for _ in range(200):
        weight = layer.weight
    probe = torch.randn(5, 6, dtype=torch.float64)
    (weight * probe).sum().backward()
    free = layer.parametrizations.weight.original
    assert abs(float((free.grad * free.detach()).sum())) <= 1e-9 * float(free.grad.norm() * free.detach().norm())
    # and it is that of c W / ||W|| with the norm differentiated through the SVD
    copied = free.detach().clone().requires_grad_()
    (0.1 * copied / torch.linalg.matrix_norm(copied, 2) * probe).sum().backward()
    torch.testing.assert_close(free.grad, copied.grad, rtol=1e-5, atol=1e-8)


def test_power_iteration_leaves_a_start_that_is_orthogonal_to_the_top_direction():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))  # all ones is sent to zero for ever
    constrain(layer, 0.5, "cap")
    assert float(layer.train().weight.detach().norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("change", ["in place", "through data", "load"])
def test_eval_follows_changes_of_the_weight(change):
    layer = constrain(nn.Linear(6, 6), 1.0, "cap").eval()
    before = layer.weight.clone()
    free = layer.parametrizations.weight.original
    state = layer.state_dict()
    replaced = torch.randn(6, 6) * 50
    with torch.no_grad():
        if change == "in place":
            free.copy_(replaced)
        elif change == "through data":
            free.data[:] = replaced
        else:
            layer.load_state_dict({**state, "parametrizations.weight.original": replaced})
    assert not torch.equal(layer.weight, before)
    assert true_norm(layer, (6,)) <= 1.0 + 1e-12


def test_eval_weight_is_a_constant_and_gradients_reach_the_input():
    layer = constrain(nn.Linear(4, 3), 1.0, "orthogonal").eval()
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.parametrizations.weight.original.grad is None


@pytest.mark.parametrize("constraint", HARD)
def test_training_reaches_the_free_weight(constraint):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    constrain(model, 1.0, constraint, input_shape=(1, 4, 4)).train()
    model(torch.randn(5, 1, 4, 4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("constraint", HARD)
def test_a_zero_weight_gives_finite_weights_and_gradients(constraint):
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    constrain(layer, 1.0, constraint).train()
    layer(torch.randn(2, 4)).sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()
    assert torch.isfinite(layer.eval().weight).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_hold_the_threshold_too(dtype):
    layer = nn.Linear(40, 40).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(20)
    constrain(layer, 1.0, "cap").eval()
    norm = torch.linalg.matrix_norm(layer.weight.double(), 2)
    assert layer.weight.dtype == dtype
    assert 0.9 <= float(norm) <= 1.0 + 1e-12


def test_copies_and_checkpoints_round_trip():
    layer = constrain(nn.Conv2d(2, 3, 3), 0.5, "cap", input_shape=(2, 6, 6))
    other = constrain(nn.Conv2d(2, 3, 3), 0.5, "cap", input_shape=(2, 6, 6))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval().weight, layer.eval().weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_a_layer_used_at_two_sizes_is_held_at_the_larger():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x[..., :4, :4]).sum() + self.conv(x).sum()

    model = constrain(Twice(), 1.0, "cap", input_shape=(2, 9, 9))
    rule = model.conv.parametrizations.weight[0]
    assert rule.operator(model.conv.weight).in_shape == (2, 9, 9)


def test_projected_weights_stay_orthonormal_over_steps():
    model = constrain(nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 16)), 2.0, "orthogonal-projected")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(64, 20)
    for _ in range(50):
        optimizer.zero_grad()
        (model.train()(x) - 3 * torch.randn(64, 16)).square().mean().backward()
        optimizer.step()
        retract(model)
    for layer in (model[0], model[2]):
        values = torch.linalg.svdvals(layer.weight.detach().double())
        assert float((values - 2).abs().max()) < 0.02
        assert float((torch.linalg.svdvals(layer.eval().weight.double()) - 2).abs().max()) < 1e-4


def test_retraction_recovers_from_a_step_that_is_far_too_large():
    layer = constrain(nn.Linear(8, 8), 1.0, "orthogonal-projected").train()
    free = layer.parametrizations.weight.original
    with torch.no_grad():
        free.mul_(100)
    for _ in range(20):
        retract(layer)
    assert float((torch.linalg.svdvals(free.detach()) - 1).abs().max()) < 1e-3


def test_penalty_is_the_squared_excess_of_the_norm():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    norms = [float(torch.linalg.matrix_norm(model[k].weight.detach(), 2)) for k in (0, 2)]
    threshold = min(norms) * 0.9
    weight = model[0].weight.detach().clone()
    constrain(model, threshold, "penalty").train()
    assert torch.equal(model[0].weight, weight)
    for _ in range(200):
        value = spectral_penalty(model)
    expected = sum((norm - threshold) ** 2 for norm in norms)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert model[0].parametrizations.weight.original.grad.norm() > 0
    assert float(spectral_penalty(nn.Linear(2, 2)).detach()) == 0.0


def test_baselines_and_infinity_leave_the_module_alone():
    for constraint in CONSTRAINTS:
        threshold = 1.0 if constraint in ("none", "weight-decay", "gradient-clip") else math.inf
        layer = nn.Linear(3, 3)
        assert constrain(layer, threshold, constraint) is layer
        assert not nn.utils.parametrize.is_parametrized(layer)


def test_constrain_leaves_mode_and_random_state_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    model[1].eval()
    statistics = model[1].running_mean.clone()
    state = torch.get_rng_state()
    constrain(model, 1.0, "cap", input_shape=(1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert torch.equal(model[1].running_mean, statistics)
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constrain(nn.Linear(2, 2), 0.0), "threshold: expected a number > 0 or inf, got 0.0"),
        (lambda: constrain(nn.Linear(2, 2), -1.0), "threshold: expected a number > 0"),
        (lambda: constrain(nn.Linear(2, 2), math.nan), "threshold: expected a number > 0"),
        (lambda: constrain(nn.Linear(2, 2), 1.0, "caps"), "constraint: expected one of cap, clip"),
        (lambda: constrain(nn.ReLU(), 1.0), "expected at least one dense or convolutional layer"),
        (lambda: constrain(nn.Conv2d(1, 1, 3), 1.0), "pass input_shape"),
        (lambda: constrain(nn.Conv2d(1, 1, 3), 1.0, input_shape=(2, 8, 8)), "does not fit the module"),
        (lambda: constrain(constrain(nn.Linear(2, 2)), 1.0), "has a parametrization already"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_nan_weights_are_refused():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite numbers; got NaN"):
        constrain(layer)


def test_a_constraint_of_ones_own_needs_one_method():
    class Halved(SpectralConstraint):
        def project(self, weight):
            return weight / 2

    layer = nn.Linear(4, 4)
    rule = Halved(layer, (4,), threshold=0.2)
    nn.utils.parametrize.register_parametrization(layer, "weight", rule)
    assert true_norm(layer.eval(), (4,)) <= 0.2 + 1e-12


@pytest.mark.parametrize("change", ["written into", "threshold", "dtype", "inference"])
def test_the_kept_weight_is_made_anew_when_it_no_longer_fits(change):
    layer = nn.Linear(5, 5)
    with torch.no_grad():
        layer.weight.mul_(20)
    constrain(layer, 1.0, "cap").eval()
    x, limit = torch.randn(2, 5), 1.0
    if change == "inference":
        with torch.inference_mode():
            layer(x)
        x.requires_grad_()
        layer(x).sum().backward()
    elif change == "written into":
        with torch.no_grad():
            layer.weight.mul_(3)
    elif change == "threshold":
        layer(x)
        layer.parametrizations.weight[0].threshold = limit = 0.5
    else:
        layer(x)
        layer.double()(x.double())
    assert float(torch.linalg.matrix_norm(layer.weight.double(), 2)) <= limit * (1 + 1e-12)


@pytest.mark.parametrize("constraint", HARD)
def test_half_precision_models_work_at_eval_under_every_constraint(constraint):
    layer = constrain(nn.Linear(6, 4), 1.0, constraint).to(torch.bfloat16).eval()
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).isfinite().all()
    assert float(torch.linalg.matrix_norm(layer.weight.double(), 2)) <= 1.0 + 1e-12

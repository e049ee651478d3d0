import math

import pytest
import torch
from oracles import exact_copy, p_norm, random, randomised
from torch import nn

from speccert.certify import (
    average_certified_radius,
    certified_accuracy,
    certified_curve,
    certified_radii,
    estimate_radii,
    lipschitz,
)

NORMS = ("l2", "linf", "l1")
DUAL = {"l2": 2, "linf": 1, "l1": math.inf}


def linear_model(dtype=torch.float32, seed=0):
    return randomised(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), seed).to(dtype)


def closed_form(model, x, y, norm):
    """min over j of (f_y - f_j)(x) / ||w_y - w_j||_*, in float64: the true distance to the decision boundary."""
    exact = exact_copy(model)
    weight, logits = exact[-1].weight.detach(), exact(x.double()).detach()
    distances = []
    for row, label in zip(logits, y.tolist(), strict=True):
        others = [j for j in range(len(row)) if j != label]
        pairs = [
            (row[label] - row[j]) / torch.linalg.vector_norm(weight[label] - weight[j], DUAL[norm]) for j in others
        ]
        distances.append(max(0.0, float(min(pairs))))
    return torch.tensor(distances, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_linear_model_has_the_closed_form_from_below(norm, dtype, seed):
    model, x = linear_model(dtype, seed), random(50, 3, 4, seed=seed).to(dtype)
    y = model(x).argmax(1)
    radii, exact = certified_radii(model, x, y, norm), closed_form(model, x, y, norm)
    assert radii.dtype == torch.float64
    assert bool((radii <= exact).all())
    scale = float(exact.max())
    torch.testing.assert_close(radii, exact, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("norm", NORMS)
def test_one_product_over_all_pairs_would_be_smaller(norm):
    """The pairwise constants are not sqrt(2) times the norm of the whole map."""
    model, x = linear_model(), random(20, 3, 4).float()
    logits = model(x).double()
    top = logits.topk(2, dim=1).values
    loose = (top[:, 0] - top[:, 1]) / (2 * lipschitz(model, (3, 4), norm=norm).upper)
    assert bool((certified_radii(model, x, norm=norm) >= loose.detach() * (1 - 1e-4)).all())


def test_labels_default_to_the_prediction():
    model, x = linear_model(), random(20, 3, 4).float()
    assert torch.equal(certified_radii(model, x), certified_radii(model, x, model(x).argmax(1)))


@pytest.mark.parametrize("norm", NORMS)
def test_misclassified_samples_have_radius_0(norm):
    model, x = linear_model(), random(20, 3, 4).float()
    wrong = (model(x).argmax(1) + 1) % 5
    assert bool((certified_radii(model, x, wrong, norm) == 0).all())


def biased(rows, biases, dtype=torch.float32):
    """A linear classifier with the given weights and biases; at x = 0 its logits are the biases."""
    model = nn.Linear(len(rows[0]), len(rows)).to(dtype).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(rows))
        model.bias.copy_(torch.tensor(biases))
    return model


def test_radius_is_the_least_over_pairs_not_that_of_the_runner_up():
    model = biased([[0.0, 0.0], [1.0, 0.0], [0.0, 8.0]], [2.0, 1.0, 0.0])
    radius = certified_radii(model, torch.zeros(1, 2), torch.tensor([0]))
    assert 0.249 < float(radius) <= 0.25


@pytest.mark.parametrize("row", [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, -0.0, -1.0]])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("weights", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("arithmetic", [None, "real", "float64"])
def test_a_tie_has_radius_0(row, label, weights, arithmetic):
    model = biased([[weights], [-weights], [0.0]], row)
    assert float(certified_radii(model, torch.zeros(1, 1), torch.tensor([label]), arithmetic=arithmetic)) == 0.0


def test_a_margin_of_rounding_size_has_radius_0_where_rounding_counts():
    model = biased([[1.0], [-1.0], [0.0]], [1.0, 1.0 - 2**-24, 0.0])
    assert float(certified_radii(model, torch.zeros(1, 1), torch.tensor([0]))) == 0.0
    assert float(certified_radii(model, torch.zeros(1, 1), torch.tensor([0]), arithmetic="real")) > 2**-26


def test_estimates_leave_rounding_out():
    pairwise = torch.tensor([[0, 1, 8], [1, 0, 1], [8, 1, 0]], dtype=torch.float64)
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 5.0, 0.0]])
    assert estimate_radii(logits, torch.tensor([0, 0, 0]), pairwise).tolist() == [0.25, 0.0, 0.0]
    assert estimate_radii(logits[:1], torch.tensor([0]), 0 * pairwise).tolist() == [math.inf]


def test_logits_that_overflow_are_refused():
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))).eval()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"finite|overflow"):
        certified_radii(model, 10 * torch.ones(1, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused(bad):
    x = torch.zeros(2, 3, 4)
    x[1, 0, 0] = bad
    with pytest.raises(ValueError, match="finite inputs"):
        certified_radii(linear_model(), x)


def test_weights_that_are_not_finite_are_refused():
    model = linear_model()
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1.weight"):
        certified_radii(model, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("norm", NORMS)
def test_constant_classifier_is_certified_as_far_as_nothing_overflows_or_not_at_all(norm):
    model = linear_model()
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.arange(5.0))
    x = random(3, 3, 4).float()
    right, wrong = torch.tensor([4, 4, 4]), torch.tensor([1, 2, 3])
    radii = certified_radii(model, x, right, norm)
    assert bool(((radii > 1e34) & torch.isfinite(radii)).all())
    assert bool((certified_radii(model, x, right, norm, arithmetic="real") > 1e300).all())
    for arithmetic in (None, "real"):
        assert bool((certified_radii(model, x, wrong, norm, arithmetic=arithmetic) == 0).all())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 5]), "labels 0..4"),
        (torch.tensor([-1, 0]), "labels 0..4"),
        (torch.tensor([0]), "expected"),
        (torch.tensor([[0], [1]]), "expected"),
        (torch.tensor([0.0, 1.0]), "integer labels"),
        (torch.tensor([True, False]), "integer labels"),
    ],
)
def test_labels_that_are_no_class_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        certified_radii(linear_model(), torch.zeros(2, 3, 4), y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type(dtype):
    model, x = linear_model(), random(6, 3, 4).float()
    y = model(x).argmax(1)
    assert torch.equal(certified_radii(model, x, y.to(dtype)), certified_radii(model, x, y))


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        certified_radii(linear_model(), torch.zeros(0, 3, 4))


def test_batches_do_not_matter():
    model, x = linear_model(), random(11, 3, 4).float()
    torch.testing.assert_close(certified_radii(model, x, batch_size=3), certified_radii(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_given_bound_is_used(norm):
    model, x = linear_model(), random(4, 3, 4).float()
    bound = lipschitz(model, (3, 4), norm=norm)
    assert torch.equal(certified_radii(model, x, norm=norm, bound=bound), certified_radii(model, x, norm=norm))


def test_a_bound_for_another_norm_or_shape_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    bound = lipschitz(model, (1, 8, 8))
    with pytest.raises(ValueError, match="expected one in linf"):
        certified_radii(model, torch.zeros(2, 1, 8, 8), norm="linf", bound=bound)
    with pytest.raises(ValueError, match="expected one for inputs"):
        certified_radii(model, torch.zeros(2, 1, 4, 4), bound=bound)


@pytest.mark.parametrize("given", [False, True])
def test_training_mode_is_refused_and_changes_nothing(given):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    bound = lipschitz(model, (3,)) if given else None
    model.train()
    before = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="training mode"):
        certified_radii(model, random(4, 3).float(), bound=bound)
    assert torch.equal(model[0].running_mean, before)
    assert model.training


def test_state_is_left_as_found():
    model, x = linear_model(), random(4, 3, 4).float().requires_grad_()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    torch.set_float32_matmul_precision("high")
    try:
        radii = certified_radii(model, x)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not radii.requires_grad
    assert x.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_autocast_does_not_reach_the_logits():
    model, x = linear_model(), random(30, 3, 4).float()
    plain = certified_radii(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(certified_radii(model, x), plain)


@pytest.mark.parametrize("norm", NORMS)
def test_no_closer_point_is_classified_otherwise(norm):
    """The nearest point of each decision boundary of a linear model, one part in 10^4 inside the radius."""
    model, x = linear_model(torch.float64), random(30, 3, 4)
    y = model(x).argmax(1)
    radii, weight = certified_radii(model, x, norm=norm), model[1].weight.detach()
    for j in range(5):
        direction = weight[j] - weight[y]  # [B, 12]
        if norm == "linf":
            step = direction.sign()
        elif norm == "l2":
            step = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        else:
            top = direction.abs().argmax(1, keepdim=True)
            step = torch.zeros_like(direction).scatter(1, top, direction.gather(1, top).sign())
        moved = x + ((1 - 1e-4) * radii[:, None] * step).reshape(x.shape)
        assert bool((p_norm(moved - x, norm) <= radii).all())
        assert torch.equal(model(moved).argmax(1), y)


def test_certified_accuracy_counts_strictly():
    radii = torch.tensor([0.0, 0.5, 1.0, math.inf], dtype=torch.float64)
    assert float(certified_accuracy(radii, 0.0)) == 0.75
    assert float(certified_accuracy(radii, 0.5)) == 0.5
    assert certified_accuracy(radii, [0.0, 0.5, 1.0]).tolist() == [0.75, 0.5, 0.25]
    assert float(certified_accuracy(radii.float(), 1.0)) == 0.25


@pytest.mark.parametrize("eps", [-1e-12, math.nan, [0.1, -0.1], [math.nan]])
def test_negative_eps_is_refused(eps):
    with pytest.raises(ValueError, match="eps"):
        certified_accuracy(torch.ones(3), eps)


def test_empty_radii_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        certified_accuracy(torch.zeros(0), 0.1)
    with pytest.raises(ValueError, match="at least one"):
        average_certified_radius(torch.zeros(0))


def test_average_radius_counts_misclassified_samples():
    assert average_certified_radius(torch.tensor([0.0, 1.0, 2.0])) == 1.0


def test_curve_falls_from_the_certified_share_to_0():
    radii = torch.tensor([0.0, 0.2, 0.4, math.inf], dtype=torch.float64)
    levels, shares = certified_curve(radii, 5)
    assert levels.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert shares.tolist() == [0.75, 0.75, 0.5, 0.5, 0.25]
    assert certified_curve(torch.tensor([math.inf]))[1].tolist() == [1.0] * 200


def test_a_bound_for_weights_before_their_rounding_is_refused():
    model = linear_model()
    with pytest.raises(ValueError, match="expected none where the model is converted to float16"):
        certified_radii(model, torch.zeros(1, 3, 4), bound=lipschitz(model, (3, 4)), arithmetic="float16")


@pytest.mark.parametrize("arithmetic", ["double", "", "Float32"])
def test_an_unknown_arithmetic_is_refused(arithmetic):
    with pytest.raises(
        ValueError, match="arithmetic: expected one of model, real, float64, float32, float16, bfloat16"
    ):
        certified_radii(linear_model(), torch.zeros(1, 3, 4), arithmetic=arithmetic)


def test_radii_shrink_with_the_precision():
    model, x = linear_model(), random(40, 3, 4).float()
    y = linear_model().half()(x.half()).argmax(1)
    radii = [certified_radii(model, x, y, arithmetic=name) for name in ("real", "float64", "float32", "float16")]
    medians = [float(found.median()) for found in radii]
    assert bool((radii[0] >= radii[1]).all())
    assert bool((radii[1] >= radii[2]).all())
    assert medians[0] > medians[1] > medians[2] > medians[3] > 0.9 * medians[0]
    assert medians[2] > 0.9999 * medians[0]

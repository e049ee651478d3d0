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
    lipschitz,
    radii_from_logits,
)
from speccert.certify.radii import _lowered_margins, limiting_classes

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


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


ONES = 1 - torch.eye(3, dtype=torch.float64)


def test_radius_is_the_least_over_pairs_not_that_of_the_runner_up():
    pairwise = torch.tensor([[0, 1, 8], [1, 0, 1], [8, 1, 0]], dtype=torch.float64)
    logits = logits_of([2.0, 1.0, 0.0])
    y = torch.tensor([0])
    assert float(radii_from_logits(logits, y, pairwise)) == pytest.approx(0.25)
    assert int(limiting_classes(logits, y, pairwise)) == 2


@pytest.mark.parametrize("row", [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, -0.0, -1.0]])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("scale", [0.0, 1e-300, 1.0, 1e300])
def test_a_tie_has_radius_0(row, label, scale):
    assert float(radii_from_logits(logits_of(row), torch.tensor([label]), scale * ONES)) == 0.0


def test_a_margin_of_rounding_size_has_radius_0():
    logits = torch.tensor([[1.0, 1.0 - 2**-24, 0.0]])
    assert float(radii_from_logits(logits, torch.tensor([0]), ONES)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_logits_that_are_not_finite_are_refused(bad, place):
    logits = logits_of([2.0, 1.0, 0.0], [3.0, 1.0, 0.0])
    logits[1, place] = bad
    with pytest.raises(ValueError, match="finite"):
        radii_from_logits(logits, torch.tensor([0, 0]), ONES)


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
def test_constant_classifier_is_certified_for_ever_or_not_at_all(norm):
    model = linear_model()
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.arange(5.0))
    x = random(3, 3, 4).float()
    assert bool(torch.isinf(certified_radii(model, x, torch.tensor([4, 4, 4]), norm)).all())
    assert bool((certified_radii(model, x, torch.tensor([1, 2, 3]), norm) == 0).all())


def test_margins_are_lowered_never_raised():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        logits = random(6, 4).to(dtype)
        y = logits.argmax(1)
        plain = logits.double().gather(1, y[:, None]) - logits.double()
        others = torch.ones_like(plain).scatter(1, y[:, None], 0).bool()
        assert bool((_lowered_margins(logits, y, None) < plain)[others].all())


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


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 3)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        radii_from_logits(torch.zeros(shape), torch.zeros(2, dtype=torch.int64), ONES)

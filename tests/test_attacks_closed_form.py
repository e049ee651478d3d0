"""Attacks on affine models, whose smallest adversarial distances are known in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks import attack, available_attacks

NORMS = ("l2", "linf", "l1")
DUAL = {"l2": 2.0, "linf": 1.0, "l1": float("inf")}
MINIMUM_NORM = [(name, norm) for norm in NORMS for name in available_attacks(norm, minimum_norm=True)]
FIXED: list[tuple[str, dict[str, Any], float]] = [
    ("fgsm", {}, 1.001),
    ("pgd", {"steps": 20}, 1.02),
    ("autoattack", {"steps": 20, "queries": 5}, 1.001),
]


def affine(
    classes: int, norm: str, features: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A model, samples around 0.5, labels, and min_j (f_y - f_j)(x) / ||w_y - w_j||_q, small enough for the box."""
    draw = torch.Generator().manual_seed(classes)
    model = nn.Linear(features, classes).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, features, generator=draw))
        model.bias.copy_(-model.weight.sum(1) / 2)
    x = (0.5 + 0.05 * torch.randn(16, features, generator=draw)).to(dtype)
    weight, logits = model.weight.detach().double(), model(x).detach().double()
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[y][:, None] - weight, ord=DUAL[norm], dim=2)
    distance = (gaps / slopes).masked_fill(gaps == 0, torch.inf).min(1).values
    kept = distance < {"l2": 0.3, "linf": 0.1, "l1": 0.3}[norm]
    assert kept.sum() >= 5
    return model, x[kept], y[kept], distance[kept]


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize(("name", "norm"), MINIMUM_NORM)
def test_minimum_norm_attacks_reach_the_closed_form(name: str, norm: str, classes: int) -> None:
    model, x, y, exact = affine(classes, norm)
    result = attack(model, x, y, name, norm=norm)
    assert result.success.all()
    assert (result.distance >= exact * (1 - 1e-9)).all()
    assert (result.distance <= exact * (1.01 if name == "fab" else 1.001)).all()


@pytest.mark.parametrize("shape", [(20,), (1, 4, 5), (5, 2, 2)], ids=str)
@pytest.mark.parametrize(("name", "norm"), MINIMUM_NORM)
def test_closed_form_in_float32_and_any_shape(name: str, norm: str, shape: tuple[int, ...]) -> None:
    model, x, y, exact = affine(4, norm, dtype=torch.float32)
    result = attack(nn.Sequential(nn.Flatten(), model), x.reshape(-1, *shape), y, name, norm=norm)
    assert result.x_adv.dtype == torch.float32
    assert (result.distance >= exact * (1 - 1e-4) - 1e-6).all()
    assert (result.distance <= exact * 1.01 + 1e-6).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("name", "options", "reach"), FIXED, ids=[name for name, *_ in FIXED])
def test_fixed_eps_attacks_turn_at_the_closed_form(name: str, options: dict[str, Any], reach: float, norm: str) -> None:
    model, x, y, exact = affine(2, norm)
    for image, label, distance in zip(x[:2], y[:2], exact[:2].tolist(), strict=True):
        below, above = (
            attack(model, image[None], label[None], name, norm=norm, eps=distance * scale, **options)
            for scale in (0.999, reach)
        )
        assert not below.success.any()
        assert below.distance.isinf().all()
        assert above.success.all()
        assert distance * (1 - 1e-9) <= above.distance.item() <= distance * reach


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_gradient_attacks_with_more_classes(name: str, norm: str, classes: int) -> None:
    model, x, y, exact = affine(classes, norm)
    for image, label, distance in zip(x[:2], y[:2], exact[:2].tolist(), strict=True):
        below, above = (
            attack(model, image[None], label[None], name, norm=norm, eps=distance * scale) for scale in (0.999, 2.5)
        )
        assert not below.success.any()
        assert above.success.all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_autoattack_reaches_the_closed_form(norm: str, classes: int) -> None:
    model, x, y, exact = affine(classes, norm)
    for image, label, distance in zip(x[:2], y[:2], exact[:2].tolist(), strict=True):
        result = attack(
            model, image[None], label[None], "autoattack", norm=norm, eps=distance * 1.01, steps=30, queries=5
        )
        assert result.success.all()


@pytest.mark.parametrize(("name", "norm"), MINIMUM_NORM)
def test_binding_box_never_beats_the_free_closed_form(name: str, norm: str) -> None:
    model, x, y, _ = affine(3, norm)
    corner = (x > 0.5).double()
    logits = model(corner).detach()
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(model.weight.detach()[y][:, None] - model.weight.detach(), ord=DUAL[norm], dim=2)
    free = (gaps / slopes).masked_fill(gaps == 0, torch.inf).min(1).values
    result = attack(model, corner, y, name, norm=norm)
    assert result.success.all()
    assert (result.distance >= free * (1 - 1e-9)).all()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("name", ["pgd", "autoattack", "fgsm", "cw", "ddn", "fmn", "deepfool"])
def test_scale_of_the_logits_hides_nothing(name: str, factor: float) -> None:
    """Float32 cross-entropy has no gradient at margins above 100: a steep copy of a model is not more robust."""
    model, x, y, exact = affine(2, "l2", dtype=torch.float32)
    with torch.no_grad():
        model.weight.mul_(factor)
        model.bias.mul_(factor)
    options: dict[str, Any] = {"queries": 1} if name == "autoattack" else {}
    result = attack(model, x, y, name, eps=exact.max().item() * 1.03, **options)
    assert result.success.all()


class Shifted(nn.Module):
    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + self.shift


@pytest.mark.parametrize("name", ["pgd", "autoattack", "fgsm", "cw", "ddn", "fmn", "deepfool"])
def test_shift_of_the_logits_changes_nothing(name: str) -> None:
    model, x, y, exact = affine(4, "l2")
    eps = exact.median().item() * 1.05
    options: dict[str, Any] = {"queries": 1, "steps": 20} if name == "autoattack" else {}
    plain, shifted = (attack(Shifted(model, shift), x, y, name, eps=eps, **options) for shift in (0.0, -100.0))
    assert plain.success.any()
    assert torch.equal(plain.success, shifted.success)

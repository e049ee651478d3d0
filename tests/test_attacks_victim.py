"""An attack leaves the model, its gradients and every random state as it found them."""

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from speccert.attacks import attack, available_attacks
from speccert.attacks.victim import Victim, derived_seed, seed_all, undisturbed

CASES = [(name, norm) for norm in ("l2", "linf", "l1") for name in available_attacks(norm)]
QUICK: dict[str, dict[str, Any]] = {
    "autoattack": {"steps": 3, "queries": 8},
    "cw": {"steps": 10, "searches": 2},
    "square": {"queries": 8},
}


def training_model() -> nn.Sequential:
    """A model in training mode, but for one frozen layer in eval mode; some parameters have gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )
    model(torch.rand(4, 1, 6, 6)).sum().backward()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    return model


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [t.clone() for t in model.state_dict().values()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()]
    return [tensors, gradients, flags, modes, hooks]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return bool(first == second)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_nothing_is_left_behind(name: str, norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = training_model()
    x, y = torch.rand(5, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    inputs, labels, before = x.clone(), y.clone(), snapshot(model)
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)
    attack(model, x, y, name, norm=norm, eps=0.1, **QUICK.get(name, {}))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected  # noqa: NPY002
    assert same(before, snapshot(model))
    assert torch.equal(x, inputs)
    assert torch.equal(y, labels)
    assert x.grad is None
    assert not x.requires_grad
    assert capsys.readouterr().out == ""


def test_training_model_is_attacked_in_eval_mode() -> None:
    model = training_model()
    x, y = torch.rand(5, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    result = attack(model, x, y, "ddn")
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(result.x_adv))


def test_state_is_restored_after_an_error() -> None:
    model = training_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="y must lie in"):
        attack(model, torch.rand(2, 1, 6, 6), torch.tensor([0, 9]), "fgsm", eps=0.1)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_gradient_mode_does_not_matter(context: Any) -> None:
    model = nn.Linear(4, 2)
    x, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    expected = attack(model, x, y, "ddn")
    with context():
        result = attack(model, x.clone(), y, "ddn")
        assert not torch.is_grad_enabled()
    assert torch.equal(result.x_adv, expected.x_adv)


def test_parametrized_weights_are_computed_once() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return 2 * weight

    model = nn.Linear(4, 2)
    nn.utils.parametrize.register_parametrization(model, "weight", Counted())
    calls.clear()
    attack(model, torch.rand(3, 4), torch.tensor([0, 1, 0]), "ddn")
    assert len(calls) == 1
    assert model.weight.requires_grad


def test_spectral_norm_buffers_stay() -> None:
    model = parametrizations.spectral_norm(nn.Linear(4, 2))
    before = snapshot(model)
    attack(model, torch.rand(3, 4), torch.tensor([0, 1, 0]), "fmn", norm="linf")
    assert same(before, snapshot(model))


def test_shared_gradients_are_counted() -> None:
    model = nn.Linear(4, 2)
    victim = Victim(model)
    with undisturbed(model, 0):
        victim.gradient(torch.rand(3, 4), lambda logits: logits[:, 0])
    assert (victim.forwards, victim.gradients) == (3, 3)


def test_derived_seeds_are_the_same_in_every_process() -> None:
    digest = hashlib.sha256(b"3\nfmn\nNone").digest()
    assert derived_seed(3, "fmn", None) == int.from_bytes(digest[:4], "big")
    seeds = {derived_seed(seed, name, eps) for seed in range(3) for name in ("pgd", "fmn") for eps in (0.1, 0.2)}
    assert len(seeds) == 12


def test_all_generators_are_seeded_and_restored() -> None:
    model, draws = nn.Linear(2, 2), []
    before = random.getstate(), torch.random.get_rng_state()
    with undisturbed(model, 0):
        for _ in range(2):
            seed_all(5)
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


class Elsewhere(nn.Module):
    """Class 0 where the entries sum to 1 or more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.sum(1), 2 - x.sum(1)], 1)


def test_each_batch_is_moved_to_the_models_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[torch.device, int]] = []
    plain = Tensor.to

    def recorded(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("copy"):
            moves.append((args[0], len(self)))
            return plain(self, "cpu", copy=True)
        return plain(self, *args, **kwargs)

    device = torch.device("meta")
    monkeypatch.setattr("speccert.attacks.base.device_of", lambda model, x: device)
    monkeypatch.setattr(Tensor, "to", recorded)
    result = attack(
        Elsewhere(), torch.full((5, 4), 0.3), torch.ones(5, dtype=torch.int64), "fgsm", eps=0.2, batch_size=3
    )
    assert moves == [(device, 3)] * 3 + [(device, 2)] * 3  # samples, labels, radii
    assert {t.device.type for t in (result.x_adv, result.success, result.distance, result.closest)} == {"cpu"}


class NoGradient(nn.Module):
    """Finite logits whose gradient is not: sqrt at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([1 + (x - x.detach()).sum(1).sqrt(), x.sum(1) * 0], 1)


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] not in ("square", "spsa")])
def test_broken_gradients_raise(name: str, norm: str) -> None:
    with pytest.raises(ValueError, match="model must have finite input gradients"):
        attack(NoGradient(), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), name, norm=norm, eps=0.1)


def test_module_without_parameters() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum(1), 2 - x.sum(1)], 1)

    x = torch.full((2, 4), 0.3)
    for name in ("fgsm", "pgd", "autoattack"):
        assert attack(Fixed(), x, torch.ones(2, dtype=torch.int64), name, eps=0.2, **QUICK.get(name, {})).success.all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_gpu(name: str, norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4)).cuda()
    x = torch.rand(6, 1, 6, 6, device="cuda")
    y = model(x).argmax(1).cpu()
    torch.cuda.manual_seed(3)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(3)
    first, second = (attack(model, x, y, name, norm=norm, eps=0.1, **QUICK.get(name, {})) for _ in range(2))
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    assert first.x_adv.is_cuda
    torch.testing.assert_close(first.x_adv, second.x_adv)
    order = {"l2": 2.0, "linf": float("inf"), "l1": 1.0}[norm]
    assert (torch.linalg.vector_norm((first.x_adv.double() - x.double()).flatten(1), order, 1) <= 0.1).all()


@pytest.mark.parametrize("name", ["fgsm", "pgd", "ddn"])
def test_a_model_that_changes_its_input_in_place_does_not_move_the_samples(name):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(x.sub_(0.5).div_(0.2))

    torch.manual_seed(0)
    model = InPlace()
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    y = torch.zeros(20, dtype=torch.int64)
    result = attack(model, x, y, name, norm="l2", eps=0.05)
    assert torch.equal(x, kept)
    assert ((result.x_adv.double() - kept.double()).norm(dim=1) <= 0.05).all()
    logits = model(result.x_adv.clone())  # in a batch of another size a point on the boundary may fall to either side
    margin = logits[:, 1:].amax(1) - logits[:, 0]
    assert (margin[result.success] > -1e-5).all()
    assert (margin[~result.success] < 1e-5).all()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-20])
def test_pgd_is_as_strong_on_flat_models(scale):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.rand(100, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    expected = attack(model, x, y, "pgd", norm="l2", eps=0.3).accuracy
    assert expected < 0.9
    with torch.no_grad():
        model[2].weight.mul_(scale)
        model[2].bias.mul_(scale)
    assert attack(model, x, y, "pgd", norm="l2", eps=0.3).accuracy <= expected + 0.02

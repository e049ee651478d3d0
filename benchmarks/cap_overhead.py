"""Time of a training step with the spectral cap over the unconstrained one, beside other libraries' constraints.

A step is forward, cross-entropy, backward and SGD update, with every constrained weight computed once, as our training
loop does. "cap alone" is the constrained weights' own forward and backward pass, which a busy machine blurs least. The
MLP is the hardest case: its plain step is short. spectral_norm is torch's, which holds the reshaped kernel's norm and
not the convolution's. deel-torchlip comes as it is (Bjorck) and without Bjorck; `pip install deel-torchlip` brings it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator

import torch
from common import milliseconds, ratio, show, start, times_in_turn
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from speccert.models import build_model, constrain

BATCH = 256
ROUNDS = {"mlp": 15, "convnet-4c3f": 7, "convnet-6c2f": 5}
ALONE = "cap alone"
HAS_DEEL = importlib.util.find_spec("deel") is not None
IMAGES = ((1, 28, 28), (3, 32, 32))
CELLS = [("mlp", IMAGES[0]), *((net, image) for net in ("convnet-4c3f", "convnet-6c2f") for image in IMAGES)]


def _torch_spectral_norm(model: nn.Module) -> nn.Module:
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            spectral_norm(layer)
    return model


def _deel(model: nn.Module, *, bjorck: bool) -> nn.Module:
    from deel import torchlip

    options = {} if bjorck else {"eps_bjorck": None}

    def swapped(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            return torchlip.SpectralConv2d(*sizes, **options)  # type: ignore[no-any-return]
        if isinstance(layer, nn.Linear):
            return torchlip.SpectralLinear(layer.in_features, layer.out_features, **options)  # type: ignore[no-any-return]
        return layer

    return nn.Sequential(*(swapped(layer) for layer in model.children()))


def variants(name: str, shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """The same net under each constraint; "plain" is the reference."""
    plain = build_model(name, shape, 10)
    models = {
        "plain": plain,
        "cap": constrain(copy.deepcopy(plain), 1.0, "cap", input_shape=shape),
        "spectral_norm": _torch_spectral_norm(copy.deepcopy(plain)),
    }
    if HAS_DEEL:
        models["deel-torchlip"] = _deel(plain, bjorck=True)
        models["deel, no Bjorck"] = _deel(plain, bjorck=False)
    return {key: model.train() for key, model in models.items()}


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One update of the model as a job."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def job() -> None:
        optimizer.zero_grad()
        with parametrize.cached():
            loss = functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return job


def weights_alone(model: nn.Module) -> Callable[[], None]:
    """Forward and backward of the constrained weights, without a network around them."""
    layers = [layer for layer in model.modules() if parametrize.is_parametrized(layer, "weight")]

    def job() -> None:
        terms = [layer.weight.square().sum() for layer in layers]  # type: ignore[operator]
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    return job


def rows() -> Iterator[dict[str, str]]:
    for name, shape in CELLS:
        x, y = torch.rand(BATCH, *shape), torch.randint(10, (BATCH,))
        models = variants(name, shape)
        jobs = {key: step(model, x, y) for key, model in models.items()} | {ALONE: weights_alone(models["cap"])}
        seconds = times_in_turn(jobs, ROUNDS[name])
        row = {"net": name, "input": "x".join(map(str, shape)), "plain step, ms": milliseconds(seconds["plain"])}
        yield row | {f"{key} / plain": f"{ratio(seconds[key], seconds['plain']):.2f}" for key in jobs if key != "plain"}


if __name__ == "__main__":
    start(f"Training step under a constraint over the unconstrained step, batch {BATCH}")
    if not HAS_DEEL:
        print("deel-torchlip is not installed: its columns are left out.\n")
    show(list(rows()))

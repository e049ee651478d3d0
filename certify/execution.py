"""The network that runs: its logits in full float32, and how far rounding takes them from the exact ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .graph import floating_like

# Share of the largest logit that rounding may take at least, by the coarsest type of the model's tensors.
RELATIVE_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-2, torch.bfloat16: 2e-1}
_PROBES = 256
_PROBE_NOISE = 0.01
_MULTIPLE = 8.0


@torch.no_grad()
def logits_of(
    model: nn.Module,
    x: Tensor,  # [B, *input_shape]
    batch_size: int = 1024,
) -> Tensor:  # [B, K]
    """The model's logits, without TF32 and autocast; ValueError for no samples, NaN or infinite inputs."""
    if x.numel() == 0:
        raise ValueError("x: expected at least one sample, got none")
    if not all(bool(torch.isfinite(end)) for end in x.aminmax()):  # one pass; NaN goes through both ends
        raise ValueError("x: expected finite inputs; got NaN or infinity")
    with _full_precision(x.device):
        return torch.cat([model(part) for part in torch.split(x, batch_size)])


@torch.no_grad()
def rounding_allowance(
    model: nn.Module,
    x: Tensor,  # [B, *input_shape]
    logits: Tensor,  # [B, K], the model's at x
) -> Tensor:  # [B, 1] float64
    """What each margin is lowered by: a relative share of the largest logit, plus a multiple of the deviation found.

    The deviation is the largest between the model and its float64 copy on points near the samples, so that large hidden
    values that cancel in the logits are seen. It is measured, with a safety factor of 8, and not yet proved.
    """
    dtypes = {tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()}
    share = max(RELATIVE_ROUNDING.get(dtype, 2e-1) for dtype in {logits.dtype, x.dtype, *dtypes})
    allowance = share * logits.double().abs().amax(1, keepdim=True)
    if floating_like(model).dtype == torch.float64 and share < 1e-9:
        return allowance
    probes = _probes(x)
    with _full_precision(x.device):
        found = model(probes).double()
        exact = float64_copy(model)(probes.double()).double()
    return allowance + _MULTIPLE * float((found - exact).abs().max())


def _probes(x: Tensor) -> Tensor:
    """Points near the first samples: rounding errors at one point alone may happen to cancel, e.g. at zero."""
    generator = torch.Generator().manual_seed(0)
    chosen = x[torch.arange(_PROBES, device=x.device) % len(x)]
    noise = torch.rand(chosen.shape, generator=generator) * (2 * _PROBE_NOISE) - _PROBE_NOISE
    return chosen + noise.to(chosen)


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy with the very weights that the model runs with, parametrized ones made plain, converted to float64."""
    clone = copy.deepcopy(model)
    for own, live in zip(list(clone.modules()), list(model.modules()), strict=True):
        if not parametrize.is_parametrized(own):
            continue
        weights = {name: getattr(live, name).detach().clone() for name in live.parametrizations}  # type: ignore[union-attr]
        # torch's own remove_parametrizations deletes the property from a class that copies share with the original
        own.__class__ = parametrize.type_before_parametrizations(own)
        del own._modules["parametrizations"]
        for name, weight in weights.items():
            own.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return clone.double()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 and no autocast, whose rounding the allowance does not cover; the settings are restored."""
    product, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(product)
        torch.backends.cudnn.allow_tf32 = convolution

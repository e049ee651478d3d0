"""Certified radii from margins and pairwise Lipschitz bounds, and what is counted from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .graph import check_model
from .lipschitz import LipschitzBound, lipschitz

# Allowance for the rounding of the executed network's logits, relative to the largest of them. A later version bounds
# it layer by layer; float64 networks use the same share of their own precision.
_LOGIT_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def certified_radii(
    model: nn.Module,
    x: Tensor,  # [B, *input_shape], raw inputs
    y: Tensor | None = None,  # [B] int64; the prediction where None
    norm: str = "l2",
    method: str = "product",
    *,
    bound: LipschitzBound | None = None,
    batch_size: int = 1024,
) -> Tensor:  # [B] float64
    """r(x) = min over j != y of (f_y - f_j)(x) / Lip(f_y - f_j): no point closer than r is classified otherwise.

    0 where the prediction is not y, and at a tie. In units of the raw input, in `norm`. The margin is lowered by an
    allowance for rounding. `bound` re-uses constants computed before for this very model and norm.

    Raises:
        ValueError: as `lipschitz`; NaN or infinite inputs or logits; labels that are no class.

    Reference: Tsuzuku, Sato, Sugiyama, "Lipschitz-margin training", NeurIPS 2018, with the pairwise constants of Leino,
    Wang, Fredrikson, "Globally-robust neural networks", ICML 2021.
    """
    if bound is None:
        bound = lipschitz(model, tuple(x.shape[1:]), method, norm)
    elif bound.norm != norm:
        raise ValueError(f"bound: expected one in {norm}, got one in {bound.norm}")
    elif bound.input_shape not in ((), tuple(x.shape[1:])):
        raise ValueError(f"bound: expected one for inputs {tuple(x.shape[1:])}, got one for {bound.input_shape}")
    check_model(model)
    logits = _logits(model, x, batch_size)
    return radii_from_logits(logits, logits.argmax(1) if y is None else y, bound.pairwise)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    if x.numel() == 0:
        raise ValueError("x: expected at least one sample, got none")
    if not all(bool(torch.isfinite(end)) for end in x.aminmax()):  # one pass; NaN goes through both ends
        raise ValueError("x: expected finite inputs; got NaN or infinity")
    with _full_precision(x.device):
        return torch.cat([model(part) for part in x.split(batch_size)])  # type: ignore[no-untyped-call]


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


def radii_from_logits(
    logits: Tensor,  # [B, K]
    y: Tensor,  # [B] int64
    pairwise: Tensor,  # [K, K]
) -> Tensor:  # [B] float64
    """The radius of each row: min over j != y of margin / pairwise bound, 0 where the margin is not positive.

    A pair whose bound is 0 never changes its order: it does not limit the radius, which may then be infinite.

    Raises:
        ValueError: NaN or infinite logits, shapes that do not fit, labels outside 0..K-1.
    """
    radii: Tensor = _pair_radii(logits, y, pairwise).amin(1).clamp_min(0.0)
    return radii


def limiting_classes(
    logits: Tensor,  # [B, K]
    y: Tensor,  # [B] int64
    pairwise: Tensor,  # [K, K]
) -> Tensor:  # [B] int64
    """The class j whose pair with y sets each sample's radius."""
    return _pair_radii(logits, y, pairwise).argmin(1)


def _pair_radii(logits: Tensor, y: Tensor, pairwise: Tensor) -> Tensor:
    """Margin over pairwise bound, [B, K] float64; infinite in column y."""
    _check(logits, y, pairwise.shape[0])
    y = y.to(logits.device, torch.int64)
    margins = lowered_margins(logits, y)
    constants = pairwise.to(logits.device)[y]
    radii = torch.where(constants > 0, margins / constants, torch.where(margins > 0, torch.inf, 0.0))
    return radii.scatter(1, y[:, None], torch.inf)


def _check(logits: Tensor, y: Tensor, classes: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != classes or y.shape != logits.shape[:1]:
        raise ValueError(f"logits, y: expected [B, {classes}] and [B], got {tuple(logits.shape)} and {tuple(y.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits: expected finite numbers; got NaN or infinity")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"y: expected integer labels, got {y.dtype}")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise ValueError(f"y: expected labels 0..{classes - 1}, got {int(y.min())}..{int(y.max())}")


def lowered_margins(
    logits: Tensor,  # [B, K]
    y: Tensor,  # [B]
) -> Tensor:  # [B, K] float64
    """f_y - f_j in float64, less the allowance for rounding; entry y of each row means nothing."""
    exact = logits.double()
    allowance = _LOGIT_ROUNDING.get(logits.dtype, 2e-1) * exact.abs().amax(1, keepdim=True)
    return exact.gather(1, y[:, None]) - exact - allowance


def certified_accuracy(
    radii: Tensor,  # [B]
    eps: float | Sequence[float],
) -> Tensor:  # [] or [len(eps)] float64
    """Share of samples whose certified radius exceeds eps (strictly: on the boundary a tie is possible).

    Raises:
        ValueError: a negative or NaN eps, or no samples.
    """
    levels = torch.as_tensor(eps, dtype=torch.float64)
    if not bool((levels >= 0).all()):
        raise ValueError(f"eps: expected numbers >= 0, got {eps}")
    if radii.numel() == 0:
        raise ValueError("radii: expected at least one sample, got none")
    return (radii.double().cpu() > levels[..., None]).double().mean(-1)


def average_certified_radius(
    radii: Tensor,  # [B]
) -> float:
    """Mean radius over all samples, misclassified ones counting 0 (Zhai et al., "MACER", ICLR 2020).

    Raises:
        ValueError: no samples.
    """
    if radii.numel() == 0:
        raise ValueError("radii: expected at least one sample, got none")
    return float(radii.double().mean())


def certified_curve(
    radii: Tensor,  # [B]
    points: int = 200,
) -> tuple[Tensor, Tensor]:  # [points] eps, [points] certified accuracy
    """Certified accuracy on an even grid of eps from 0 to the largest finite radius."""
    finite = radii[torch.isfinite(radii)].double().cpu()
    top = float(finite.max()) if len(finite) else 1.0
    levels = torch.linspace(0.0, top, points, dtype=torch.float64)
    return levels, certified_accuracy(radii, levels.tolist())

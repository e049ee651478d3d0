"""Certified radii from margins and pairwise Lipschitz bounds, and what is counted from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .execution import RELATIVE_ROUNDING, logits_of, rounding_allowance
from .graph import check_model
from .lipschitz import LipschitzBound, lipschitz


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
    logits = logits_of(model, x, batch_size)
    allowance = rounding_allowance(model, x, logits)
    return radii_from_logits(logits, logits.argmax(1) if y is None else y, bound.pairwise, allowance)


def radii_from_logits(
    logits: Tensor,  # [B, K]
    y: Tensor,  # [B] int64
    pairwise: Tensor,  # [K, K]
    allowance: Tensor | None = None,  # [B, 1] float64
) -> Tensor:  # [B] float64
    """The radius of each row: min over j != y of margin / pairwise bound, 0 where the margin is not positive.

    A pair whose bound is 0 never changes its order: it does not limit the radius, which may then be infinite. Margins
    are lowered by `allowance` for the rounding of the network that gave the logits (see `rounding_allowance`); where it
    is None, by a share of the largest logit that suits the logits' type and a well-scaled network.

    Raises:
        ValueError: NaN or infinite logits, shapes that do not fit, labels outside 0..K-1.
    """
    radii: Tensor = _pair_radii(logits, y, pairwise, allowance).amin(1).clamp_min(0.0)
    return radii


def limiting_classes(
    logits: Tensor,  # [B, K]
    y: Tensor,  # [B] int64
    pairwise: Tensor,  # [K, K]
) -> Tensor:  # [B] int64
    """The class j whose pair with y sets each sample's radius."""
    return _pair_radii(logits, y, pairwise).argmin(1)


def _pair_radii(logits: Tensor, y: Tensor, pairwise: Tensor, allowance: Tensor | None = None) -> Tensor:
    """Margin over pairwise bound, [B, K] float64; infinite in column y."""
    _check(logits, y, pairwise.shape[0])
    y = y.to(logits.device, torch.int64)
    margins = _lowered_margins(logits, y, allowance)
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


def _lowered_margins(logits: Tensor, y: Tensor, allowance: Tensor | None) -> Tensor:
    """f_y - f_j in float64, [B, K], less the allowance for rounding; entry y of each row means nothing."""
    exact = logits.double()
    if allowance is None:
        allowance = RELATIVE_ROUNDING.get(logits.dtype, 2e-1) * exact.abs().amax(1, keepdim=True)
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

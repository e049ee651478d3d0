"""Certified radii of the executed network, and what is counted from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .certifier import Certifier
from .lipschitz import LipschitzBound
from .local import local_radii


def certified_radii(
    model: nn.Module,
    x: Tensor,  # [B, *input_shape], raw inputs
    y: Tensor | None = None,  # [B] integers; the prediction where None
    norm: str = "l2",
    method: str = "product",
    *,
    bound: LipschitzBound | None = None,
    arithmetic: str | None = None,
    batch_size: int = 1024,
    budget: float = 60.0,
) -> Tensor:  # [B] float64
    """Radii within which the network as executed, in floating point, gives the class y.

    r = min over j != y of (m_j - D_j) / (K_j + D_j'): m_j a proved lower bound of the real network's margin f_y - f_j
    at x, K_j the Lipschitz constant of that difference, and D_j + D_j' r what rounding can take off it anywhere in the
    ball (see `deviation`). 0 where the prediction is not y, and at a tie; in units of the raw input, in `norm`. For all
    inputs that the network's type can represent, on machines for which the `assumptions` of the arithmetic hold.

    Args:
        model: any module whose operations have rules, in eval mode.
        x: the samples.
        y: the classes to certify.
        norm: "l2", "linf" or "l1".
        method: of the Lipschitz bound, see `lipschitz`; "local" also takes what holds around each sample only, so that
            no radius is smaller (see `local_radii`).
        bound: constants computed before for this very model and norm.
        arithmetic: None takes that of the model's own type; "float64", "float32", "float16" and "bfloat16" certify the
            model converted to that type, "real" the network of the stored weights without any rounding.
        batch_size: samples at once.
        budget: seconds, for the constants and again for "local": about; not used by "product".

    Raises:
        ValueError: as `lipschitz`; NaN or infinite inputs or logits; labels that are no class; an operation without a
            rounding rule; a bound for another norm or shape, or for weights before their conversion.

    References: Tsuzuku, Sato, Sugiyama, "Lipschitz-margin training", NeurIPS 2018; pairwise constants of Leino, Wang,
    Fredrikson, "Globally-robust neural networks", ICML 2021; rounding after Higham, "Accuracy and stability of
    numerical algorithms", 2nd ed.
    """
    shape = tuple(x.shape[1:])
    certifier = Certifier(model, shape, arithmetic, norm=norm, method=method, bound=bound, budget=budget)
    margins = certifier.margins(x, y, batch_size)
    if method == "local":
        return local_radii(certifier, x, margins, budget=budget).radius
    return certifier.radii(margins).radius


def estimate_radii(
    logits: Tensor,  # [B, K]
    y: Tensor,  # [B] integers
    pairwise: Tensor,  # [K, K]
) -> Tensor:  # [B] float64
    """min over j != y of (f_y - f_j) / pairwise bound, of logits as they are: to choose an epoch, never a certificate.

    Rounding is left out; `certified_radii` proves. 0 where a margin is not positive.
    """
    exact = logits.double()
    margins, constants = exact.gather(1, y[:, None]) - exact, pairwise.to(logits.device)[y]
    radii = torch.where(constants > 0, margins / constants, torch.where(margins > 0, torch.inf, 0.0))
    found: Tensor = radii.scatter(1, y[:, None], torch.inf).amin(1).clamp_min(0.0)
    return found


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

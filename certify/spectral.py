"""Norm bracket of one layer, and the warm-started power iteration that approaches a norm from below."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .arithmetic import proving
from .graph import check_unchanged, type_name
from .linear import SAFETY, LinearMap, NormBounds, check_norm, converted, float64, like_of
from .power import estimate_norm, improve, starting_vector
from .rules import linear_map_of

# Base classes of the affine layers that compute something else in training mode.
_MODE_DEPENDENT = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@proving()
def norm_bounds(layer: nn.Module, input_shape: tuple[int, ...], norm: str = "l2") -> NormBounds:
    """Bracket `lower <= ||A|| <= upper` of a linear layer's operator A on inputs of `input_shape`.

    A is the map that runs: a convolution on its real input size with its padding and stride, eval-mode batch
    normalisation, pooling. `upper` is proved, every rounding included; `lower` is attained, proved for one matrix and
    otherwise an estimate of power iteration.

    Args:
        layer: a module with a linear rule (nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, batch norm, average
            pooling, ...), in eval mode where that matters.
        input_shape: shape of one input, without the batch.
        norm: "l2", "linf" or "l1", used on both sides.

    Raises:
        ValueError: no linear rule for the layer, NaN or infinite weights, a shape that does not fit, forward hooks, or
            batch normalisation or dropout in training mode.
    """
    check_norm(norm)
    check_unchanged(layer, type_name(layer))
    if layer.training and isinstance(layer, _MODE_DEPENDENT):
        raise ValueError(f"{type_name(layer)}: expected eval mode, got training mode; call layer.eval() first")
    return bracket(linear_map_of(layer, tuple(input_shape)), norm)


@proving()
def bracket(linear: LinearMap, norm: str = "l2", steps: int = 50) -> NormBounds:
    """The bounds of a map, with the lower end raised by power iteration where only an upper bound is known."""
    bounds = linear.bounds(norm)
    if bounds.lower > 0 or bounds.upper == 0 or norm != "l2":
        return bounds
    exact, start = float64(linear), None
    if 1e-6 < bounds.upper < 1e6:  # float32 finds the direction several times faster; its norm is taken in float64
        rounded = converted(exact, lambda tensor: tensor.float())
        start = improve(rounded, starting_vector(linear.in_shape, like_of(rounded).float()), steps).double()
        start, steps = start / start.norm(), 0
    lower = float(estimate_norm(exact, start, steps)[0])
    return replace(bounds, lower=min(bounds.upper, lower * (1 - SAFETY)))

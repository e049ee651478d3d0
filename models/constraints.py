"""Spectral constraints as torch parametrizations on stock layers.

In training mode a constraint is a differentiable function of the free weight. In eval mode the weight is a constant
whose proved norm is at most the threshold: gradients reach the inputs, not the parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..certify import LinearMap, estimate_norm, linear_map_of
from ..certify.convolution import Convolution, Transposed
from ..certify.graph import eval_mode, plain_type
from ..certify.linear import SAFETY, Dense
from ..certify.power import starting_vector
from .projections import almost_orthogonal, bjorck, cayley, clip_convolution, clip_singular_values, newton_schulz

Operator = Dense | Convolution | Transposed
_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_POINTWISE: tuple[type[nn.Module], ...] = (nn.Linear,)  # the norm does not depend on the input size


class SpectralConstraint(nn.Module, ABC):
    """Holds the spectral norm of a layer's operator to `threshold`.

    Must write: `project`, the differentiable map from the free weight used in training. What it returns may exceed the
    threshold slightly in training; in eval mode it is scaled so that its proved norm is at most the threshold, and kept
    until the free weight changes.
    """

    vector: Tensor

    def __init__(self, layer: nn.Module, input_shape: tuple[int, ...], threshold: float) -> None:
        super().__init__()
        weight = cast(Tensor, layer.weight)
        template = cast(Operator, linear_map_of(layer, input_shape))
        # the template must not hold the weight itself, which moves, is copied and is saved with the layer
        self._template = replace(template, weight=torch.empty_like(weight, device="meta"))
        self.threshold = threshold
        self._fixed: Tensor | None = None
        self._key: tuple[Tensor, int, float] | None = None
        start = starting_vector(template.in_shape, weight.detach())
        self.register_buffer("vector", estimate_norm(replace(template, weight=weight.detach()), start, steps=20)[1])

    def operator(self, weight: Tensor) -> LinearMap:
        """The layer's operator with this weight."""
        return replace(self._template, weight=weight)

    @abstractmethod
    def project(self, weight: Tensor) -> Tensor:
        """The constrained weight, differentiable in the free one."""

    def extra_repr(self) -> str:
        """Shows the threshold."""
        return f"threshold={self.threshold:g}"

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses: `project` in training, the verified constant in eval mode."""
        if self.training:
            return self.project(weight)
        return self._verified(weight.detach())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _verified(self, weight: Tensor) -> Tensor:
        if self._fixed is None or not self._is_current(weight):
            free = weight.clone()  # a tensor made in inference mode can't be kept for later gradients
            wide = free.float() if free.dtype in (torch.float16, torch.bfloat16) else free
            self._fixed = self._held(self.project(wide).to(free.dtype))
            self._key = (free, self._fixed._version, self.threshold)
        return self._fixed

    def _is_current(self, weight: Tensor) -> bool:
        """Whether the kept weight belongs to this free one, and nobody has written into it."""
        if self._key is None or self._fixed is None:
            return False
        seen, version, threshold = self._key
        if (seen.device, seen.dtype, threshold) != (weight.device, weight.dtype, self.threshold):
            return False
        # by content: writing through .data or load_state_dict leaves no other trace that can be trusted
        return self._fixed._version == version and torch.equal(seen, weight)

    def _held(self, weight: Tensor) -> Tensor:
        """`weight`, scaled down where its bound exceeds the threshold so that its norm, after rounding, does not.

        Scaling rounds each entry by at most eps relative: an operator E with |E| <= eps |W|, and
        ||E||_2 <= sqrt(||E||_1 ||E||_inf) <= eps sqrt(||W||_1 ||W||_inf).
        """
        operator = self.operator(weight)
        upper = operator.bounds().upper
        if upper <= self.threshold:
            return weight
        rounding = math.sqrt(operator.bounds("l1").upper * operator.bounds("linf").upper)
        kind = torch.finfo(weight.dtype)
        subnormal = math.sqrt(weight.numel()) * kind.smallest_normal  # entries near underflow are rounded absolutely
        rounding = 1.01 * kind.eps * (rounding + subnormal * upper / self.threshold)
        return weight * (self.threshold / (upper + rounding) * (1 - SAFETY))

    def norm_estimate(self, weight: Tensor) -> Tensor:
        """Lower estimate of the operator's norm by a warm-started power step, differentiable in the weight."""
        norm, vector = estimate_norm(self.operator(weight), self.vector.detach(), steps=1 if self.training else 0)
        if self.training:
            self.vector = vector
        return norm


class Cap(SpectralConstraint):
    """W * min(1, c / ||W||): the whole weight is scaled down to norm c, and left alone below.

    In training the norm is estimated by one warm-started power step on the true operator; gradients pass through it.
    """

    def project(self, weight: Tensor) -> Tensor:
        """See the class."""
        if not self.training:
            return weight
        return weight * (self.threshold / self.norm_estimate(weight).clamp_min(self.threshold))


class Clip(Cap):
    """Singular values above c are clipped to c: by SVD for a dense layer; in the Fourier domain for a convolution.

    A clipped convolution is cut back to its kernel's support, which can raise its norm again; it is then capped.
    """

    def project(self, weight: Tensor) -> Tensor:
        """See the class."""
        if isinstance(self._template, Dense):
            return clip_singular_values(weight, self.threshold)
        forward = self._template.forward if isinstance(self._template, Transposed) else self._template
        sides = tuple(n + max(pad) for n, pad in zip(forward.in_shape[1:], forward.padding, strict=True))
        return super().project(clip_convolution(weight, self.threshold, sides, forward.groups))


class Orthogonal(SpectralConstraint):
    """c * Q: Q has orthonormal rows or columns by the Cayley transform; a convolution is almost orthogonal (AOL)."""

    def project(self, weight: Tensor) -> Tensor:
        """See the class."""
        if isinstance(self._template, Dense):
            return self.threshold * self._orthonormal(weight)
        return self.threshold * almost_orthogonal(weight, self._template.groups)

    def _orthonormal(self, weight: Tensor) -> Tensor:
        return cayley(weight)


class OrthogonalBjorck(Orthogonal):
    """As `Orthogonal`, with Bjorck's iteration for dense layers."""

    def _orthonormal(self, weight: Tensor) -> Tensor:
        return bjorck(weight)


class OrthogonalProjected(OrthogonalBjorck):
    """As `OrthogonalBjorck`, by projected descent: the free weight itself is kept orthonormal by `retract` in training.

    A step costs one Newton-Schulz iteration instead of a transform and its gradient. Convolutions are AOL, as above.
    """

    def __init__(self, layer: nn.Module, input_shape: tuple[int, ...], threshold: float) -> None:
        super().__init__(layer, input_shape, threshold)
        if isinstance(self._template, Dense):
            weight = cast(Tensor, layer.weight)
            with torch.no_grad():
                weight.copy_(bjorck(weight))

    def _orthonormal(self, weight: Tensor) -> Tensor:
        return weight if self.training else bjorck(weight)

    @torch.no_grad()
    def retract(self, weight: Tensor) -> None:
        """Move a dense free weight back towards orthonormal rows or columns, in place."""
        if not isinstance(self._template, Dense):
            return
        norm = self.norm_estimate(weight)
        weight.div_(norm.clamp_min(1.0))  # the iteration needs singular values below sqrt(3)
        weight.copy_(newton_schulz(weight))


class Penalty(SpectralConstraint):
    """No hard constraint: the weight is left alone; `spectral_penalty` adds max(0, ||W|| - c)^2 to the loss."""

    def project(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def _held(self, weight: Tensor) -> Tensor:
        return weight

    def penalty(self, weight: Tensor) -> Tensor:
        """max(0, ||W|| - c)^2 with the norm estimated by a warm-started power step."""
        return (self.norm_estimate(weight) - self.threshold).clamp_min(0).square()


_CONSTRAINTS: dict[str, type[SpectralConstraint]] = {
    "cap": Cap,
    "clip": Clip,
    "orthogonal": Orthogonal,
    "orthogonal-bjorck": OrthogonalBjorck,
    "orthogonal-projected": OrthogonalProjected,
    "penalty": Penalty,
}
BASELINES = ("none", "weight-decay", "gradient-clip")
CONSTRAINTS = (*_CONSTRAINTS, *BASELINES)


def constrain(
    module: nn.Module,
    threshold: float = 1.0,
    constraint: str = "cap",
    *,
    input_shape: tuple[int, ...] | None = None,
) -> nn.Module:
    """Hold every dense and convolutional layer of `module` to spectral norm `threshold`, in place.

    Args:
        module: an nn.Linear, nn.Conv1d/2d, nn.ConvTranspose1d/2d, or a model that contains such layers.
        threshold: c > 0; infinity leaves the module as it is, whatever the constraint.
        constraint: "cap", "clip", "orthogonal", "orthogonal-bjorck", "orthogonal-projected" (call `retract` after each
            optimiser step), "penalty", or a baseline that constrains no weight ("none", "weight-decay",
            "gradient-clip": the optimiser's or the training loop's business).
        input_shape: shape of one input of `module`, without the batch; needed where there are convolutions, since a
            convolution's norm is that of the operator on its real input size.

    Returns:
        The same module.

    Raises:
        ValueError: threshold not above 0, an unknown constraint, no layer to constrain, a layer that is constrained
            already, NaN weights, convolutions without `input_shape`.
    """
    if not threshold > 0:
        raise ValueError(f"threshold: expected a number > 0 or inf, got {threshold}")
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint: expected one of {', '.join(CONSTRAINTS)}; got {constraint!r}")
    layers = [(name, layer) for name, layer in module.named_modules() if plain_type(layer) in _LAYERS]
    _check_layers(layers, input_shape)
    if constraint in BASELINES or math.isinf(threshold):
        return module
    shapes = _input_shapes(module, layers, input_shape)
    for name, layer in layers:
        rule = _CONSTRAINTS[constraint](layer, shapes[name], threshold)
        rule.train(layer.training)
        parametrize.register_parametrization(layer, "weight", rule, unsafe=True)
    return module


def _check_layers(layers: list[tuple[str, nn.Module]], input_shape: tuple[int, ...] | None) -> None:
    if not layers:
        raise ValueError("module: expected at least one dense or convolutional layer, found none")
    for name, layer in layers:
        place = name or "module"
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"{place}: expected a layer without a constraint, got one that has a parametrization already"
            )
        if not bool(torch.isfinite(cast(Tensor, layer.weight)).all()):
            raise ValueError(f"{place}.weight: expected finite numbers; got NaN or infinity")
        if input_shape is None and plain_type(layer) not in _POINTWISE:
            raise ValueError(f"{place}: a convolution's norm depends on its input size; pass input_shape=(C, H, W)")


def _input_shapes(
    module: nn.Module, layers: list[tuple[str, nn.Module]], input_shape: tuple[int, ...] | None
) -> dict[str, tuple[int, ...]]:
    """The shape that reaches each layer; the largest per axis where a layer is used more than once."""
    if input_shape is None:
        return {name: (cast(nn.Linear, layer).in_features,) for name, layer in layers}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, x: Tensor) -> None:
        shape = tuple(x.shape[1:])
        shapes[name] = tuple(map(max, shapes[name], shape)) if name in shapes else shape

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0])) for name, layer in layers
    ]
    like = cast(Tensor, layers[0][1].weight)
    try:
        with eval_mode(module), torch.no_grad():
            module(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    except RuntimeError as error:
        raise ValueError(f"input_shape: {input_shape} does not fit the module: {str(error).splitlines()[0]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name, _ in layers if name not in shapes]
    if unused:
        raise ValueError(f"{', '.join(unused)}: expected every layer to be used by the module's forward")
    return shapes


def _constraints(module: nn.Module) -> Iterator[tuple[SpectralConstraint, Tensor]]:
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            listed = layer.parametrizations.weight  # type: ignore[union-attr]
            rule = listed[0]  # type: ignore[index]
            if isinstance(rule, SpectralConstraint):
                yield rule, cast(Tensor, listed.original)  # type: ignore[union-attr]


def retract(module: nn.Module) -> None:
    """After an optimiser step: bring the weights under `orthogonal-projected` back to orthonormal; others are left."""
    for rule, weight in _constraints(module):
        if isinstance(rule, OrthogonalProjected):
            rule.retract(weight)


def spectral_penalty(module: nn.Module) -> Tensor:
    """Sum over the layers under `penalty` of max(0, ||W|| - c)^2, differentiable; 0 where there are none."""
    terms = [rule.penalty(weight) for rule, weight in _constraints(module) if isinstance(rule, Penalty)]
    return torch.stack(terms).sum() if terms else torch.zeros(())

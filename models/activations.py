"""Activation functions that keep the norm of the gradient, and the table of all activations by name.

All act along dimension 1 (channels or features) of an N x C x ... tensor and can be traced by ``torch.fx``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import wrap

__all__ = ["ACTIVATIONS", "Abs", "GroupSort", "Householder", "MaxMin", "build_activation"]

GROUP_SIZE = 4


@wrap
def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_channels(x.shape[1], 2)
    a, b = x.chunk(2, dim=1)
    return a, b


@wrap
def _groups(x: Tensor, size: int) -> Tensor:
    _check_channels(x.shape[1], size)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _check_channels(channels: int, size: int) -> None:
    if channels < 1 or channels % size:
        raise ValueError(f"the activation needs a positive multiple of {size} channels, got {channels}")


class Abs(nn.Module):
    """y = |x|. 1-Lipschitz in every l_p norm; keeps the norm of the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return |x|, elementwise."""
        return x.abs()


class MaxMin(nn.Module):
    """Sorts pairs: channel i and channel i + C/2 become their maximum and their minimum.

    y[:, i] = max(x[:, i], x[:, i + C/2]) and y[:, i + C/2] = min of the same two, for i < C/2. A permutation
    at each input, so 1-Lipschitz in every l_p norm (Anil et al. 2019, "Sorting out Lipschitz function approximation").
    """

    def forward(self, x: Tensor) -> Tensor:  # N x C x ..., C even
        """Return the sorted pairs, in the shape of ``x``; ValueError when C is odd."""
        halves = _halves(x)
        a, b = halves[0], halves[1]
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)


class GroupSort(nn.Module):
    """Sorts every group of ``group_size`` neighbouring channels in ascending order.

    A permutation at each input, so 1-Lipschitz in every l_p norm (Anil et al. 2019).

    Args:
        group_size: channels in a group, at least 2; it must divide the number of channels.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {group_size}")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:  # N x C x ..., C a multiple of group_size
        """Return the sorted groups, in the shape of ``x``; ValueError when the group size does not divide C."""
        return torch.sort(_groups(x, self.group_size), dim=2).values.flatten(1, 2)

    def extra_repr(self) -> str:
        """Show the group size."""
        return f"group_size={self.group_size}"


class Householder(nn.Module):
    """Reflects each pair z = (x[:, i], x[:, i + C/2]) that lies on the negative side of a learned line.

    y = z - 2 v min(v^T z, 0) with the unit vector v = (sin(t/2), -cos(t/2)) and one angle t a pair. It is continuous,
    its Jacobian is the identity or a reflection, so it is 1-Lipschitz in l2 and keeps the norm of the gradient;
    in linf and l1 its constant is |cos t| + |sin t|. The start t = pi/2 is MaxMin.

    Args:
        channels: number of channels C, even.

    Reference: Singla, Singla and Feizi 2022, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100".
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_channels(channels, 2)
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, x: Tensor) -> Tensor:  # N x C x ...
        """Return the reflected pairs, in the shape of ``x``; ValueError when C is not the number of channels."""
        return _reflect(x, self.angle)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"channels={2 * self.angle.numel()}"


@wrap
def _reflect(x: Tensor, angle: Tensor) -> Tensor:
    if x.shape[1] != 2 * angle.numel():
        raise ValueError(f"this Householder layer has {2 * angle.numel()} channels, got an input with {x.shape[1]}")
    half = angle.view(-1, *[1] * (x.ndim - 2)) / 2
    sin, cos = half.sin(), half.cos()
    a, b = x.chunk(2, dim=1)
    below = 2 * torch.clamp(sin * a - cos * b, max=0)
    return torch.cat((a - sin * below, b + cos * below), dim=1)


def _maxmin(channels: int) -> nn.Module:
    _check_channels(channels, 2)
    return MaxMin()


def _groupsort(channels: int) -> nn.Module:
    _check_channels(channels, GROUP_SIZE)
    return GroupSort(GROUP_SIZE)


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "abs": lambda channels: Abs(),
    "gelu": lambda channels: nn.GELU(),
    "groupsort": _groupsort,
    "householder": Householder,
    "identity": lambda channels: nn.Identity(),
    "leaky-relu": lambda channels: nn.LeakyReLU(),
    "maxmin": _maxmin,
    "relu": lambda channels: nn.ReLU(),
    "sigmoid": lambda channels: nn.Sigmoid(),
    "silu": lambda channels: nn.SiLU(),
    "softplus": lambda channels: nn.Softplus(),
    "tanh": lambda channels: nn.Tanh(),
}


def build_activation(name: str, channels: int) -> nn.Module:
    """Build one activation layer by name.

    Args:
        name: a key of ``ACTIVATIONS``.
        channels: size of dimension 1 of its input; even for maxmin and householder, a multiple of 4 for groupsort.

    Raises:
        ValueError: unknown name, or a number of channels that the activation cannot group.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](channels)

"""Architectures by name, from stock layers without constraints; `constrain` puts those on afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import build_activation
from .imported import import_model
from .layers import Normalize

__all__ = ["ARCHITECTURES", "build_model"]

_NEAR_IDENTITY = 0.1  # norm of the random part of a residual kernel at the start, over sqrt(depth)
_LIPCONVNET_BLOCKS = 5


@dataclass(frozen=True)
class _Plan:
    """What every architecture is built from; width and depth are None where the default shall be taken."""

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    width: int | None
    depth: int | None
    activation: str

    @property
    def image(self) -> tuple[int, int]:
        """(channels, side) of the square image at the input."""
        if len(self.input_shape) != 3 or self.input_shape[1] != self.input_shape[2]:
            raise ValueError(f"{self.name} needs square images C x H x H, got the input shape {self.input_shape}")
        return self.input_shape[0], self.input_shape[1]


class _Stack:
    """A growing list of layers that knows the shape which the next layer will see."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.layers: list[nn.Module] = []
        self.shape = plan.input_shape

    def activate(self) -> None:
        self.layers.append(build_activation(self.plan.activation, self.shape[0]))

    def dense(self, features: int, *, activate: bool = True) -> None:
        if len(self.shape) > 1:
            self.layers.append(nn.Flatten())
        self.layers.append(_initialise(nn.Linear(math.prod(self.shape), features)))
        self.shape = (features,)
        if activate:
            self.activate()

    def conv(self, channels: int, kernel: int, *, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
        """A zero-padded convolution, its activation, and the new shape; "same" padding where the kernel is odd."""
        channels_in, side, _ = self.shape
        padding = (kernel - 1) // 2 if padding is None else padding
        layer = nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=padding)
        side = (side + 2 * padding - kernel) // stride + 1
        self.shape = (channels, side, side)
        self.layers.append(_initialise(layer))
        self.activate()
        return layer

    def unshuffle(self) -> None:
        channels, side, _ = self.shape
        self.layers.append(nn.PixelUnshuffle(2))
        self.shape = (4 * channels, side // 2, side // 2)


def _mlp(plan: _Plan) -> _Stack:
    stack = _Stack(plan)
    for _ in range(plan.depth or 3):
        stack.dense(plan.width or 256)
    return stack


def _convnet(plan: _Plan, kernels: Sequence[tuple[int, int]], dense: int) -> _Stack:
    """(channel multiple, kernel) a convolution: kernel 3 keeps the side, kernel 4 halves it while it is even or > 1."""
    if plan.depth is not None:
        raise ValueError(f"{plan.name} has a fixed depth, got depth={plan.depth}; leave it unset")
    width, stack = plan.width or 32, _Stack(plan)
    _ = plan.image
    for multiple, kernel in kernels:
        halves = kernel == 4 and stack.shape[1] > 1
        stack.conv(multiple * width, kernel if halves else 3, stride=2 if halves else 1, padding=1)
    for _ in range(dense):
        stack.dense(16 * width)
    return stack


def _convnet_4c3f(plan: _Plan) -> _Stack:
    return _convnet(plan, [(1, 3), (1, 4), (2, 3), (2, 4)], dense=2)


def _convnet_6c2f(plan: _Plan) -> _Stack:
    return _convnet(plan, [(1, 3), (1, 3), (1, 4), (2, 3), (2, 3), (2, 4)], dense=1)


def _lipconvnet(plan: _Plan) -> _Stack:
    """Blocks of convolutions, twice the channels each; the last one of a block sees the pixel-unshuffled map."""
    width, depth, stack = plan.width or 32, plan.depth or 5, _Stack(plan)
    blocks = min(_LIPCONVNET_BLOCKS, depth, _factors_of_two(plan.image[1]))
    lengths = [depth // blocks + (block < depth % blocks) for block in range(blocks)] if blocks else [depth]
    for block, length in enumerate(lengths):
        for position in range(length):
            if blocks and position == length - 1:
                stack.unshuffle()
            stack.conv(width * 2**block, 3 if stack.shape[1] > 1 else 1)
    return stack


def _factors_of_two(side: int) -> int:
    return (side & -side).bit_length() - 1


def _liresnet(plan: _Plan) -> _Stack:
    """Stem, `depth` times act(x + conv(x)), a strided neck without overlap, one dense layer.

    x + conv(x) is itself one convolution, so it is written as a stock layer that starts near the identity: a constraint
    on that layer then holds for the whole residual sum, and its norm is bounded as one operator.
    """
    width, depth, stack = plan.width or 64, plan.depth or 8, _Stack(plan)
    side = plan.image[1]
    stack.conv(width, 5 if side >= 16 else 3, stride=2 if side >= 16 else 1)
    for _ in range(depth):
        _near_identity(stack.conv(width, 3), depth)
    stride = next((stride for stride in (4, 2) if stack.shape[1] % stride == 0), 1)
    stack.conv(width, stride, stride=stride, padding=0)
    stack.dense(4 * width)
    return stack


@torch.no_grad()
def _near_identity(layer: nn.Conv2d, depth: int) -> None:
    noise = torch.randn_like(layer.weight) * (_NEAR_IDENTITY / math.sqrt(depth * layer.weight[0].numel()))
    nn.init.dirac_(layer.weight).add_(noise)


ARCHITECTURES: dict[str, Callable[[_Plan], _Stack]] = {
    "mlp": _mlp,
    "convnet-4c3f": _convnet_4c3f,
    "convnet-6c2f": _convnet_6c2f,
    "lipconvnet": _lipconvnet,
    "liresnet": _liresnet,
}


def build_model(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    activation: str = "maxmin",
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> nn.Module:
    """Build a classifier N x input_shape -> N x num_classes. Weights are drawn from torch's global generator.

    Args:
        name: "mlp" (`depth` hidden layers of `width`, default 3 x 256), "convnet-4c3f" and "convnet-6c2f" (of Wong et
            al. 2018 and Lee et al. 2020; `width` channels in the first layers, default 32), "lipconvnet" (Singla and
            Feizi 2021; `depth` convolutions, default 5, first `width` 32), "liresnet" (Hu et al. 2023; `depth` residual
            layers of `width` channels, default 8 x 64), or "module:function" for a model of one's own: the function is
            called with input_shape= and num_classes= and takes none of the other settings.
        input_shape: D or C x H x H, without the batch.
        num_classes: at least 2.
        width: see `name`; the activation must be able to group it.
        depth: see `name`; the convnets have none.
        activation: see `build_activation`.
        mean: where it or `std` is given, a `Normalize` layer with them comes first.
        std: see `mean`.

    Raises:
        ValueError: an unknown name, a size below its minimum, an input shape that the architecture cannot take, or a
            function that cannot be imported or gives no such model.
    """
    shape = tuple(int(size) for size in input_shape)
    _check_sizes(shape, num_classes, width, depth)
    if ":" in name:
        if width is not None or depth is not None:
            raise ValueError(f"the model {name} takes no width and depth, got width={width}, depth={depth}")
        body = import_model(name, shape, num_classes)
    else:
        body = _build(_Plan(name, shape, num_classes, width, depth, activation))
    if mean is None and std is None:
        return body
    first = Normalize(0.0 if mean is None else mean, 1.0 if std is None else std)
    _check_channels(first, shape)
    return nn.Sequential(first, *body) if type(body) is nn.Sequential else nn.Sequential(first, body)


def _build(plan: _Plan) -> nn.Sequential:
    if plan.name not in ARCHITECTURES:
        raise ValueError(f"unknown model {plan.name!r}; allowed: {', '.join(ARCHITECTURES)}, or module:function")
    stack = ARCHITECTURES[plan.name](plan)
    stack.dense(plan.num_classes, activate=False)
    return nn.Sequential(*stack.layers)


def _initialise(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Orthogonal kernel (as a matrix) and no bias, so that a signal keeps its size through many layers."""
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _check_sizes(shape: tuple[int, ...], num_classes: int, width: int | None, depth: int | None) -> None:
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"input_shape must be (D,) or (C, H, W) with sizes of at least 1, got {shape}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    for key, value in (("width", width), ("depth", depth)):
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")


def _check_channels(first: Normalize, shape: tuple[int, ...]) -> None:
    for key, vector in (("mean", first.mean), ("std", first.std)):
        if len(vector) not in (1, shape[0]):
            raise ValueError(f"{key} must hold 1 or {shape[0]} numbers for inputs of shape {shape}, got {len(vector)}")

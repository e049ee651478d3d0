"""Show a victim to torchattacks in the form that its classes are right for.

torchattacks 3.5.1 wants 4-d float32 images, a module with parameters (it takes its device from them, and prints when
there are none), and logits on a scale where float32 cross-entropy still has a gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .task import Task


@dataclass(frozen=True)
class Layout:
    """How samples of `shape` (without batch) become (C, H, W) images, and back.

    Images stay as they are and anything else becomes one row of pixels. With `square`, for Square, whose windows
    must fit into both sides and whose l2 form wants five of them side by side, anything but a (C, H, H) image with
    such an H is filled up with grey pixels on which the model does not depend.
    """

    shape: tuple[int, ...]
    square: bool = False

    def images(self, x: Tensor) -> Tensor:  # x: (B, *shape); returns (B, C, H, W) float32
        """Return the samples as torchattacks sees them."""
        channels, height, width = self._image
        pixels = x.float().reshape(len(x), self._kept[0], -1)
        spare = channels * height * width // self._kept[0] - pixels.shape[2]
        return nn.functional.pad(pixels, (0, spare), value=0.5).reshape(len(x), channels, height, width)

    def samples(self, images: Tensor) -> Tensor:  # images: (B, C, H, W); returns (B, *shape)
        """Return what the model sees of the images."""
        channels, size = self._kept
        return images.reshape(len(images), channels, -1)[:, :, :size].reshape(len(images), *self.shape)

    @property
    def _kept(self) -> tuple[int, int]:
        channels = self.shape[0] if len(self.shape) == 3 else 1
        return channels, math.prod(self.shape) // channels

    @property
    def _image(self) -> tuple[int, int, int]:
        channels, size = self._kept
        if self.square:
            side = max(5, math.isqrt(size - 1) + 1)
            # torchattacks lays side // (side // 5) windows: 6 or 7 of them, for side 12 say, run over the edge.
            while side >= 10 and side // (side // 5) > 5:
                side += 1
            return channels, side, side
        if len(self.shape) == 3:
            return channels, self.shape[1], self.shape[2]
        return 1, 1, size


class Adapter(nn.Module):
    """The victim as a module on images; `view` turns its logits into those that torchattacks gets."""

    def __init__(
        self,
        task: Task,
        view: Callable[[Tensor], Tensor],
        *,
        square: bool = False,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, device=task.x.device), requires_grad=False)
        self.layout = Layout(tuple(task.x.shape[1:]), square)
        self._task = task
        self._view = view
        self._watch = watch
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # images: (B, C, H, W); returns (B, K)
        """Evaluate the victim; `watch`, where given, is called with the points and their logits."""
        z = self.layout.samples(images).to(self._task.x.dtype)
        if z.requires_grad:
            z.register_hook(self._task.victim.seen_gradient)  # type: ignore[no-untyped-call]
            if self._view is precise:
                z.register_hook(_unit_rows)  # type: ignore[no-untyped-call]
        # FAB's points turn to NaN where a gradient is 0. That is no fault of the model, which must not see them;
        # the attack cannot use such a point either, and `Task.admit` drops it.
        logits = self._task.victim.logits(torch.nan_to_num(z, nan=0.5, posinf=1.0, neginf=0.0))
        if self._watch is not None:
            self._watch(z.detach(), logits.detach())
        return self._view(logits)

    def attack(self, member: Callable[[Tensor, Tensor], Tensor], task: Task) -> Tensor:
        """Run a torchattacks attack that was built on this adapter; return points of x's shape and type."""
        images = member(self.layout.images(task.x), task.y)
        return self.layout.samples(images.detach()).to(task.x.dtype)


def _unit_rows(gradient: Tensor) -> Tensor:  # gradient: (B, ...)
    """Return each row at length 1: torchattacks divides by a length plus 1e-10, which stops on flat models."""
    flat = gradient.flatten(1)
    peak = flat.abs().amax(1, keepdim=True)
    scaled = torch.where(peak > 0, flat / peak, 0.0)  # first by the peak, since squares of tiny entries are 0
    size = scaled.norm(dim=1, keepdim=True)
    return torch.where(size > 0, scaled / size, 0.0).reshape(gradient.shape)


def plain(logits: Tensor) -> Tensor:
    """Return a float32 copy, which torchattacks may write into (Square does)."""
    return logits.float().clone()


def relative(logits: Tensor) -> Tensor:
    """Return float32 logits shifted and scaled to a range of 1, row by row.

    FAB only uses ratios of logit differences to their gradients, but it takes gradients below 1e-8 for 0.
    """
    values = logits.detach()
    spread = values.amax(1, keepdim=True) - values.amin(1, keepdim=True)
    scale = torch.where(spread > 0, 1 / spread, 1.0)
    return ((logits - values.amax(1, keepdim=True)) * scale).float()


def precise(logits: Tensor) -> Tensor:
    """Return float64 logits through which a gradient comes back in full, at unit length.

    In float32 the cross-entropy loses the true class's share of its gradient at a margin of 17, and all of it at
    about 100; in float64 it keeps some up to 700, and larger margins are scaled down to 300. Attacks that use the
    direction alone (sign or normalised) do not notice the scaling.
    """
    wide = logits.double()
    first, second = wide.detach().topk(2, dim=1).values.unbind(1)
    tempered = wide * (300 / (first - second).clamp_min(300)).unsqueeze(1)
    if wide.requires_grad:
        top = wide.detach().argmax(1, keepdim=True)

        def condition(gradient: Tensor) -> Tensor:
            # Losses that are blind to a shift of the logits have gradients that sum to 0: restore the top entry,
            # 1 - softmax, which cancels, from the others, which do not.
            others = gradient.scatter(1, top, 0.0)
            whole = others.scatter(1, top, -others.sum(1, keepdim=True))
            size = whole.abs().amax(1, keepdim=True)
            return torch.where(size > 0, whole / size, 0.0)

        wide.register_hook(condition)  # type: ignore[no-untyped-call]
    return tempered

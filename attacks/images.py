"""Samples of any shape as images, for attacks that work with squares of pixels."""

import math
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Images:
    """How samples of `shape` (without batch) become (C, H, W) images, and back.

    Images stay as they are. Anything else becomes one square of pixels, row by row, filled up at the end with grey
    pixels on which the model does not depend: a flattened handwritten digit gets its own form back.
    """

    shape: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:  # x: (B, *shape); returns (B, C, H, W)
        """Return the samples as images."""
        if len(self.shape) == 3:
            return x
        spare = self._side**2 - math.prod(self.shape)
        return nn.functional.pad(x.flatten(1), (0, spare), value=0.5).reshape(len(x), 1, self._side, self._side)

    def samples(self, images: Tensor) -> Tensor:  # images: (B, C, H, W); returns (B, *shape)
        """Return what the model sees of the images."""
        if len(self.shape) == 3:
            return images
        return images.flatten(1)[:, : math.prod(self.shape)].reshape(len(images), *self.shape)

    @property
    def _side(self) -> int:
        return math.isqrt(math.prod(self.shape) - 1) + 1

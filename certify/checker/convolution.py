"""The checker's own convolutions as linear maps, transposed or not, in exact numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from flint import fmpz

from .balls import Fixed, Integers, absolute, plus, product, times, zeros
from .maps import Gather, Indices, Linear, Shape


@dataclass(frozen=True)
class Convolution(Linear):
    """A convolution without bias: padding (zeros or a repetition of pixels), then sums over the kernel's taps."""

    weight: Fixed  # [c_out, c_in / groups, *kernel]
    in_shape: Shape
    out_shape: Shape
    stride: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    groups: int = 1
    mode: str = "zeros"

    @property
    def kernel(self) -> Shape:
        """Taps per spatial axis."""
        return self.weight.shape[2:]

    @cached_property
    def reads(self) -> list[Indices]:
        """Per axis [tap, out]: the input place that is read, -1 for a zero."""
        return [self._reads(axis) for axis in range(len(self.stride))]

    def _reads(self, axis: int) -> Indices:
        size, (before, _) = self.in_shape[axis + 1], self.padding[axis]
        taps = np.arange(self.kernel[axis]) * self.dilation[axis]
        places: Indices = np.arange(self.out_shape[axis + 1]) * self.stride[axis] - before + taps[:, None]
        return pad_places(places, size, self.mode)

    @cached_property
    def table(self) -> Indices:
        """[taps, places of one flat output channel]: the place of the flat input channel that is read, -1: a zero."""
        total = np.zeros((1, 1), dtype=np.int64)
        for size, reads in zip(self.in_shape[1:], self.reads, strict=True):
            inner = total[:, None, :, None] * size + reads[None, :, None, :]
            missing = (total < 0)[:, None, :, None] | (reads < 0)[None, :, None, :]
            total = np.where(missing, -1, inner).reshape(len(total) * len(reads), -1)
        return total

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        batch, places = len(x.mant), self.table.shape[1]
        flat = x.mant.reshape(batch, self.groups, -1, math.prod(self.in_shape[1:]))
        extended = np.concatenate([flat, zeros((*flat.shape[:3], 1))], 3)
        images = []
        for group, weight in enumerate(self._groups()):
            columns = extended[:, group][:, :, self.table]  # [B, c_in / groups, taps, places]
            columns = columns.transpose(1, 2, 0, 3).reshape(weight.shape[1], batch * places)
            images.append(product(weight, x.moved(columns)))
        return _joined([image.reshape(-1, batch, places) for image in images], (1, 0, 2), (batch, *self.out_shape))

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        batch, (taps, places) = len(y.mant), self.table.shape
        flat = y.mant.reshape(batch, self.groups, -1, places)
        pulls = []
        for group, weight in enumerate(self._groups()):
            rows = y.moved(flat[:, group].transpose(1, 0, 2).reshape(-1, batch * places))
            pull = product(weight.moved(weight.mant.T), rows)  # [c_in / groups * taps, B * places]
            image = zeros((math.prod(self.in_shape[1:]), pull.shape[0] // taps, batch))
            parts = pull.mant.reshape(-1, taps, batch, places)
            for tap, row in enumerate(self.table):
                used = row >= 0
                np.add.at(image, row[used], parts[:, tap][:, :, used].transpose(2, 0, 1))
            pulls.append(Fixed(image.transpose(1, 2, 0), pull.exp, pull.err * taps * self.collisions))
        return _joined(pulls, (1, 0, 2), (batch, *self.in_shape))

    @cached_property
    def collisions(self) -> int:
        """How often one tap reads one place at most."""
        return max((int(np.bincount(row[row >= 0]).max()) for row in self.table if (row >= 0).any()), default=1)

    def _groups(self) -> list[Fixed]:
        """The weight of each group as a matrix [c_out / groups, c_in / groups * taps]."""
        rows = self.weight.mant.reshape(self.groups, self.weight.shape[0] // self.groups, -1)
        return [self.weight.moved(row) for row in rows]

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return replace(self, weight=absolute(self.weight))

    def scaled_inputs(self, scale: Fixed) -> Convolution:
        """This convolution after a factor per input channel [c_in]."""
        factor = scale.mant.reshape(self.groups, 1, -1).repeat(self.weight.shape[0] // self.groups, 1)
        return self._scaled(scale, factor.reshape(*self.weight.shape[:2]))

    def scaled_outputs(self, scale: Fixed) -> Convolution:
        """This convolution before a factor per output channel [c_out]."""
        return self._scaled(scale, scale.mant.reshape(-1, 1))

    def _scaled(self, scale: Fixed, factor: Integers) -> Convolution:
        factor = factor.reshape(*factor.shape, *(1 for _ in self.kernel))
        return replace(self, weight=times(self.weight, scale.moved(factor)))

    def with_centre(self, scale: Fixed) -> Convolution | None:
        """This convolution plus a factor per channel, where the stride is 1 and a tap reads the pixel itself."""
        aligned = all(before % d == 0 for (before, _), d in zip(self.padding, self.dilation, strict=True))
        if not aligned or any(s != 1 for s in self.stride) or self.in_shape != self.out_shape:
            return None
        centre = tuple(before // d for (before, _), d in zip(self.padding, self.dilation, strict=True))
        if any(c >= k for c, k in zip(centre, self.kernel, strict=True)):
            return None
        added = zeros(self.weight.shape)
        for channel, value in enumerate(scale.mant):
            added[(channel, channel % self.weight.shape[1], *centre)] = value
        return replace(self, weight=plus(self.weight, scale.moved(added)))


def pad_places(places: Indices, size: int, mode: str) -> Indices:
    """Places of a padded axis as places of the axis itself, -1 for a zero."""
    if mode == "zeros":
        return np.where((places >= 0) & (places < size), places, -1)
    if mode == "circular":
        return places % size
    if mode == "replicate":
        return places.clip(0, size - 1)
    if mode != "reflect":
        raise ValueError(f"the checker has no rule for the padding mode {mode!r}")
    mirrored: Indices = (size - 1) - np.abs((size - 1) - np.abs(places))
    return mirrored


def _joined(parts: list[Fixed], order: Shape, shape: Shape) -> Fixed:
    """Parts [c, B, P] joined along c, axes moved, reshaped; in one unit."""
    exp = min(part.exp for part in parts)
    mants = [part.mant << (part.exp - exp) if part.exp > exp else part.mant for part in parts]
    err = max((part.err << (part.exp - exp) for part in parts), default=fmpz(0))
    return Fixed(np.concatenate(mants, 0).transpose(order).reshape(shape), exp, err)


@dataclass(frozen=True)
class Transposed(Linear):
    """The adjoint of `forward`, on inputs that may lack the last places of forward's outputs."""

    forward: Convolution
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        """What `forward` takes."""
        return self.forward.in_shape

    @cached_property
    def _embedding(self) -> Gather:
        index = np.full(self.forward.out_shape, -1, dtype=np.int64)
        index[tuple(slice(0, size) for size in self.in_shape)] = np.arange(math.prod(self.in_shape)).reshape(
            self.in_shape
        )
        return Gather(index.reshape(-1), self.in_shape, self.forward.out_shape)

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        return self.forward.adjoint(self._embedding.apply(x))

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        return self._embedding.adjoint(self.forward.apply(y))

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return replace(self, forward=replace(self.forward, weight=absolute(self.forward.weight)))

"""The checker's own linear maps of a network: how each acts on vectors, and on absolute values, in exact numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from flint import fmpz
from numpy.typing import NDArray

from .balls import Fixed, absolute, integers, product, times, zeros

Indices = NDArray[np.int64]
Shape = tuple[int, ...]


class Linear(ABC):
    """A linear map between tensors of `in_shape` and `out_shape`, both without the batch."""

    in_shape: Shape
    out_shape: Shape

    @abstractmethod
    def apply(self, x: Fixed) -> Fixed:
        """The image of each row of [B, *in_shape]."""

    @abstractmethod
    def adjoint(self, y: Fixed) -> Fixed:
        """The adjoint's image of each row of [B, *out_shape]."""

    @abstractmethod
    def magnitude(self) -> Linear:
        """A map whose matrix is at least the entrywise absolute value of this one's."""

    @property
    def moves_only(self) -> bool:
        """Whether it only moves entries, drops them or adds zeros: norm at most 1 in l1, l2 and linf."""
        return False


@dataclass(frozen=True)
class Gather(Linear):
    """out[i] = in[index[i]], 0 where the index is -1: reshapes, shuffles, padding of every kind."""

    index: Indices  # [prod(out_shape)]
    in_shape: Shape
    out_shape: Shape

    @cached_property
    def repeats(self) -> int:
        """How often one entry is read at most."""
        used = self.index[self.index >= 0]
        return int(np.bincount(used).max()) if len(used) else 0

    @property
    def moves_only(self) -> bool:
        """See `Linear.moves_only`."""
        return self.repeats <= 1

    @property
    def passes(self) -> bool:
        """Whether it is the identity but for the shape."""
        return math.prod(self.in_shape) == len(self.index) and bool((self.index == np.arange(len(self.index))).all())

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        if self.passes:
            return x.reshape(len(x.mant), *self.out_shape)
        flat = x.mant.reshape(len(x.mant), -1)
        taken = np.concatenate([flat, zeros((len(flat), 1))], 1)[:, self.index]
        return x.moved(taken.reshape(len(flat), *self.out_shape))

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        flat, used = y.mant.reshape(len(y.mant), -1), self.index >= 0
        image = zeros((len(flat), math.prod(self.in_shape)))
        if self.moves_only:
            image[:, self.index[used]] = flat[:, used]
        else:
            np.add.at(image.T, self.index[used], flat[:, used].T)
        return Fixed(image.reshape(len(flat), *self.in_shape), y.exp, y.err * max(1, self.repeats))

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return self


def identity(shape: Shape) -> Gather:
    """The map that changes nothing."""
    return Gather(np.arange(math.prod(shape)), shape, shape)


@dataclass(frozen=True)
class Scale(Linear):
    """factor * x, the factor broadcast over the shape."""

    factor: Fixed
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        """As `in_shape`."""
        return self.in_shape

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        return times(x, self.factor)

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        return times(y, self.factor)

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return Scale(absolute(self.factor), self.in_shape)

    @property
    def channels(self) -> Fixed | None:
        """The factor per channel [C] where it is constant over each channel."""
        padded = self.factor.reshape(*(1,) * (len(self.in_shape) - len(self.factor.shape)), *self.factor.shape)
        if math.prod(padded.shape[1:]) != 1:
            return None
        return padded.moved(np.broadcast_to(padded.mant.reshape(-1), (self.in_shape[0],)))


@dataclass(frozen=True)
class Dense(Linear):
    """weight @ x on the last axis."""

    weight: Fixed  # [out, in]
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        """All axes but the last as they were."""
        return (*self.in_shape[:-1], self.weight.shape[0])

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        return self._through(self.weight, x, self.out_shape)

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        return self._through(self.weight.moved(self.weight.mant.T), y, self.in_shape)

    @staticmethod
    def _through(weight: Fixed, x: Fixed, shape: Shape) -> Fixed:
        columns = x.moved(x.mant.reshape(-1, weight.shape[1]).T)
        image = product(weight, columns)
        return image.moved(image.mant.T.reshape(len(x.mant), *shape))

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return Dense(absolute(self.weight), self.in_shape)


@dataclass(frozen=True)
class Windows(Linear):
    """The same weighted sums on every channel: out[c, p] = weight[p] * sum over k of in[c, index[p, k]]; -1: none."""

    index: Indices  # [P, k], places of one flat channel
    weight: Fixed  # [P], not negative
    in_shape: Shape  # (C, ...)
    out_shape: Shape  # (C, ...), P entries a channel

    def apply(self, x: Fixed) -> Fixed:
        """See `Linear.apply`."""
        flat = x.mant.reshape(len(x.mant), self.in_shape[0], -1)
        extended = np.concatenate([flat, zeros((*flat.shape[:2], 1))], 2)
        total = extended[:, :, self.index].sum(3)
        image = times(Fixed(total, x.exp, x.err * self.index.shape[1]), self.weight)
        return image.reshape(len(flat), *self.out_shape)

    def adjoint(self, y: Fixed) -> Fixed:
        """See `Linear.adjoint`."""
        flat = times(y.reshape(len(y.mant), self.in_shape[0], -1), self.weight)
        image = zeros((len(flat.mant), self.in_shape[0], math.prod(self.in_shape[1:])))
        for column in self.index.T:
            used = column >= 0
            np.add.at(image.transpose(2, 0, 1), column[used], flat.mant[:, :, used].transpose(2, 0, 1))
        return Fixed(image.reshape(len(flat.mant), *self.in_shape), flat.exp, flat.err * self.index.size)

    def magnitude(self) -> Linear:
        """See `Linear.magnitude`."""
        return replace(self, weight=absolute(self.weight))

    @property
    def one_channel(self) -> Windows:
        """The map of one channel alone, which has the same norm."""
        return replace(self, in_shape=(1, *self.in_shape[1:]), out_shape=(1, *self.out_shape[1:]))


def ones(shape: Shape) -> Fixed:
    """A batch of one tensor of ones."""
    return Fixed(integers([fmpz(1)] * math.prod(shape), (1, *shape)), 0)

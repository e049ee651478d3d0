"""LipSDP's inequality as a semidefinite program over all numbers of a network.

Over weights tau of the start and multipliers d >= 0, gathered in y, minimise sum tau with

    Z = F(y) = -C^T C - sum_i y_i A_i >= 0,    A_i = (p_i q_i^T + q_i p_i^T) / 2,

p_i = xi_i - a u_i and q_i = b u_i - xi_i for a neuron, p_i = x_i and q_i = -x_i for a number of the start.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .neurons import Neurons


class System:
    """The inequality of a network, its numbers scaled so that `scale`, weights and multipliers, becomes all ones.

    Args:
        net: the network.
        start_tied: [start] the position of each number's weight, as `Layer.tied` has it for multipliers.
        scale: [weights + multipliers] > 0.
    """

    def __init__(self, net: Neurons, start_tied: Tensor, scale: Tensor) -> None:
        tied, count = [start_tied], int(start_tied.max()) + 1
        self.weights = count
        for layer in net.layers:
            tied.append(layer.tied + count)
            count += layer.multipliers
        self.tied, self.count, self.size = torch.cat(tied), count, sum(net.sizes)
        zero = torch.zeros(net.sizes[0], dtype=torch.float64)
        self._low = torch.cat([zero, *(layer.low for layer in net.layers)])
        self._high = torch.cat([zero, *(layer.high for layer in net.layers)])
        ends = torch.tensor([0, *net.sizes]).cumsum(0).tolist()
        slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        root = scale[self.tied].rsqrt()
        self._blocks = [
            (slices[k], slices[part.source], part.matrix * root[slices[part.source]] / root[slices[k]][:, None])
            for k, layer in enumerate(net.layers, start=1)
            for part in layer.parts
        ]
        end = torch.zeros(len(net.output[0].matrix), self.size, dtype=torch.float64)
        for part in net.output:
            end[:, slices[part.source]] += part.matrix
        end = end * root
        self.end = end.T @ end
        self.start = slices[0]

    def _rows(self, matrix: Tensor) -> Tensor:
        """U M, where u = U xi."""
        image = torch.zeros_like(matrix)
        for target, source, block in self._blocks:
            image[target] += block @ matrix[source]
        return image

    def _columns(self, matrix: Tensor) -> Tensor:
        """U^T M."""
        image = torch.zeros_like(matrix)
        for target, source, block in self._blocks:
            image[source] += block.T @ matrix[target]
        return image

    def matrix(self, y: Tensor) -> Tensor:
        """F(y), [N, N]."""
        return -self.end - self.combined(y)

    def combined(self, y: Tensor) -> Tensor:
        """The sum of y_i A_i."""
        each = y[self.tied]
        cross = self._columns(torch.diag((self._low + self._high) / 2 * each))
        whole = cross + cross.T - torch.diag(each)
        inner = self._low * self._high * each
        if bool((inner != 0).any()):
            whole -= self._columns(self._columns(torch.diag(inner)).T)
        return whole

    def products(self, x: Tensor) -> Tensor:
        """<A_i, X> for symmetric X, [weights + multipliers]."""
        image = self._rows(x)
        squares = self._rows(image.T).diagonal() if bool((self._low != 0).any()) else 0.0
        each = -x.diagonal() + (self._low + self._high) * image.diagonal() - self._low * self._high * squares
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.tied, each)

    def steps_matrix(self, x: Tensor, inverse: Tensor) -> Tensor:
        """tr(A_i X A_j Z^-1), symmetric."""
        left, right = self._between(x), self._between(inverse)
        whole = left[0] * right[2]
        whole += left[2] * right[0]
        whole += left[1] * right[1].T
        whole += left[1].T * right[1]
        whole /= 4
        if self.count < self.size:
            half = torch.zeros(self.size, self.count, dtype=torch.float64).index_add_(1, self.tied, whole)
            whole = torch.zeros(self.count, self.count, dtype=torch.float64).index_add_(0, self.tied, half)
        return (whole + whole.T) / 2

    def _between(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p_i^T X p_j, p_i^T X q_j and q_i^T X q_j, X symmetric."""
        image = self._rows(x)
        both = self._rows(image.T)
        low, high = self._low[:, None] * image, self._high[:, None] * image
        pp = x - low - low.T + self._low[:, None] * self._low * both
        qq = x - high - high.T + self._high[:, None] * self._high * both
        return pp, high.T + low - x - self._low[:, None] * self._high * both, qq

"""The processes that train one model together, each on its share of every batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

__all__ = ["ALONE", "Group"]

_T = TypeVar("_T")
_BatchStatistics = nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Group:
    """One of `size` processes, counted from 0; torch's default process group joins them where there are several.

    Attributes:
        rank: this process.
        size: how many there are; one alone is a group too, and communicates with nobody.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process validates, writes and reports for all."""
        return self.rank == 0

    def part(self, count: int) -> tuple[slice, int]:
        """Which samples of a batch of `count` this process takes, and how many of them are its own.

        The parts are contiguous and differ by at most one sample. Where there are fewer samples than processes, some
        own none; they take the first one all the same, for nothing, so that every process does the same steps.
        """
        start, stop = self.rank * count // self.size, (self.rank + 1) * count // self.size
        return slice(start, stop) if stop > start else slice(0, 1), stop - start

    def weight(self, own: int, count: int) -> float:
        """Factor of this process's mean loss, so that the mean over the processes is that of the whole batch."""
        return own * self.size / count

    def joined(self, module: nn.Module) -> nn.Module:
        """The module, with the gradients of its parameters averaged over the processes at the end of each backward.

        Raises:
            ValueError: a layer whose output or state depends on the whole batch, which no process sees.
        """
        if self.size == 1:
            return module
        if found := [name for name, layer in module.named_modules() if _sees_the_batch(layer)]:
            raise ValueError(
                f"{', '.join(found)}: normalisation by the batch can't be trained by several processes, each of which "
                "sees a part of the batch; use one process, or another normalisation"
            )
        # With find_unused_parameters the buckets in which gradients are sent stay as they were first laid out. Without,
        # they are laid out anew after the first step, in the order in which gradients came, and with them the order of
        # sums over more than two processes: a resumed training would differ from an unbroken one in the last bits.
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, equal to the last bit in each; in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of every process by those of the first, lest rounding drives them apart."""
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.contiguous()
                distributed.broadcast(sent, src=0)
                if sent is not tensor:
                    tensor.copy_(sent)

    def agreed(self, value: _T) -> _T:
        """What the first process holds."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


ALONE = Group(0, 1, torch.device("cpu"))


def _sees_the_batch(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchStatistics):
        return False
    return layer.track_running_stats or isinstance(layer, nn.modules.batchnorm._BatchNorm)

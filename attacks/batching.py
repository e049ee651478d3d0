"""How many samples are attacked at once: as many as memory holds, and few enough to be fast."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .memory import free_memory

Part = TypeVar("Part")

# More samples at once make small networks no faster: on a CPU the activations leave the caches (FMN on a network with
# two layers of 256: 1.2 times the time of 512 samples at once; convolutions on 32 x 32 images: 0.7 times).
_MOST, _MOST_ON_CPU = 1024, 256
# Of the free memory, what an attack may take: the allocator's blocks and temporaries in the model take the rest.
_SHARE = 0.5
# Float64 tensors of x's shape that an attack holds beside the graph: its points, steps, gradients and best finds.
_COPIES = 32


def automatic_size(model: nn.Module, x: Tensor) -> int:  # x: (B, ...), B >= 1
    """Return how many of the samples to attack at once: all, or a power of two, at most 256 on a CPU and else 1024.

    It is the largest for which twice what a forward pass keeps for the backward pass, and 32 float64 copies of the
    samples, fit into half the free memory of the model's device. The model is evaluated on one sample and on two;
    what they differ by is a sample's share, so weights do not count. The model must be in eval mode.
    """
    device = device_of(model, x)
    size = min(len(x), _MOST_ON_CPU if device.type == "cpu" else _MOST)
    if size == 1:
        return size
    first = x[:1].to(device)
    one, two = _kept(model, first), _kept(model, torch.cat([first, first]))
    sample = 2 * max(0, two - one) + _COPIES * 8 * first.numel()
    free = _SHARE * free_memory(device)
    while size > 1 and size * sample > free:
        size = 1 << ((size - 1).bit_length() - 1)  # the next smaller power of two
    return size


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Return the device of the model's first parameter or buffer; x's where it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return x.device


def in_batches(run: Callable[[int, int], Part], count: int, size: int) -> Iterator[Part]:
    """Yield run(start, stop) for the batches of [0, count), `size` at once, half as many after each lack of memory.

    Raises:
        RuntimeError: the model's own error, where memory does not hold a single sample.
    """
    start = 0
    while start < count:
        stop = min(count, start + size)
        part = _or_none(run, start, stop)
        if part is None:
            size = (stop - start) // 2
            continue
        yield part
        start = stop


def _or_none(run: Callable[[int, int], Part], start: int, stop: int) -> Part | None:
    """Return run(start, stop), or None where memory did not hold it and it can be split.

    The error is gone before the next try: its traceback holds the tensors of the failed one.
    """
    try:
        return run(start, stop)
    except RuntimeError as error:
        if stop - start == 1 or not _out_of_memory(error):
            raise
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return None


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU allocator raises a plain RuntimeError: "DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _kept(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass at `x` keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # a freed storage's address could come again
        return tensor

    held: list[Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x.clone().requires_grad_().clone())  # a model may change its input in place
    return sum(storages.values())

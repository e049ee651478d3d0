"""Digests that tie a certificate to its model and its samples: SHA-256, equal on every machine and device.

Equal digests mean the same graph of operations with the same arguments on tensors of the same bits. Neither the device
nor gradients nor the names of Python variables enter; the code of the user's own modules that the trace does not look
into does not either, only their type's name.
"""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .graph import Graph, eval_mode, type_name

_INPUT, _MODEL = b"speccert-input-1\n", b"speccert-model-1\n"
_BOOKKEEPING = {"training", *vars(nn.Module())}  # what every module has
_PARAMETRIZATIONS = "parametrizations"


def input_digests(
    x: Tensor,  # [B, *input_shape]
) -> list[str]:
    """The digest of each sample: its type, its shape without the batch, its bytes in C order, little-endian."""
    head = _INPUT + f"{_dtype(x.dtype)}\n{','.join(map(str, x.shape[1:]))}\n".encode()
    return [_named(hashlib.sha256(head + _bytes(sample))) for sample in x.detach().cpu()]


@torch.no_grad()
def model_digest(graph: Graph) -> str:
    """The digest of a traced model: its operations in order, its modules' settings, and all its tensors.

    Parametrized tensors enter as the values that they have in eval mode, in the model's own type, and not by what they
    are computed from.

    Raises:
        ValueError: an argument of an operation that is neither a number, text, type, tensor nor a collection of these.
    """
    found = hashlib.sha256(_MODEL)
    with eval_mode(graph.model):
        tensors = dict(_registered(graph.model))
    names = set(tensors)
    found.update(_text({"nodes": _nodes(graph, names), "modules": _modules(graph)}))
    for name, tensor in sorted({**tensors, **dict(_held(graph, names))}.items()):
        found.update(_text([name, _dtype(tensor.dtype), list(tensor.shape)]))
        found.update(_bytes(tensor))
    return _named(found)


def _named(found: Any) -> str:
    return f"sha256:{found.hexdigest()}"


def _text(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _nodes(graph: Graph, registered: set[str]) -> list[Any]:
    positions = {node: position for position, node in enumerate(graph.nodes)}
    described: list[Any] = [
        [*_target(node, registered), *(_value(part, positions, node.name) for part in (node.args, node.kwargs))]
        for node in graph.nodes
        if node.op != "placeholder"
    ]
    return [positions[graph.input], positions[graph.output], described]


def _target(node: fx.Node, registered: set[str]) -> tuple[str, str]:
    """The operation; of a constant tensor without a name of its own, whose name the tracer counts up, none."""
    if not isinstance(node.target, str):
        return node.op, f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
    return (node.op, node.target) if node.op != "get_attr" or node.target in registered else ("constant", "")


def _value(value: Any, positions: Mapping[fx.Node, int], place: str) -> Any:
    """An argument as JSON that tells types apart; tensors of the graph by their node's position."""
    if isinstance(value, fx.Node):
        return ["node", positions[value]]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_value(part, positions, place) for part in value)]
    if isinstance(value, Mapping):
        return ["mapping", sorted([str(key), _value(part, positions, place)] for key, part in value.items())]
    if isinstance(value, slice):
        return ["slice", *(_value(part, positions, place) for part in (value.start, value.stop, value.step))]
    if (plain := _plain(value)) is not None:
        return plain
    raise ValueError(f"{place}: expected arguments that a digest can cover, got {type(value).__name__}")


def _plain(value: Any) -> list[Any] | None:
    """A single simple value as JSON that tells types apart, or None for anything else."""
    if isinstance(value, bool | str):
        return [type(value).__name__, value]
    if isinstance(value, numbers.Integral):
        return ["int", int(value)]
    if isinstance(value, numbers.Real):
        return ["float", float(value).hex()]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout) or value is None or value is ...:
        return ["constant", str(value)]
    return ["device"] if isinstance(value, torch.device) else None


def _called(graph: Graph) -> Iterator[tuple[str, nn.Module]]:
    """The called modules and the modules in them, by name; not what parametrized weights are computed by."""
    for target in sorted({str(node.target) for node in graph.nodes if node.op == "call_module"}):
        for name, module in graph.model.get_submodule(target).named_modules(prefix=target):
            if _PARAMETRIZATIONS not in name.split("."):
                yield name, module


def _modules(graph: Graph) -> list[Any]:
    """Of each called module: name, plain type, simple settings."""
    return [[name, type_name(module), _settings(module)] for name, module in _called(graph)]


def _settings(module: nn.Module) -> list[Any]:
    """Attributes that are simple values or collections of these; of torch's own modules the public ones."""
    own = not type_name(module).startswith("torch.")
    found = []
    for key, value in sorted(vars(module).items()):
        if key in _BOOKKEEPING or (key.startswith("_") and not own):
            continue
        try:
            found.append([key, _value(value, {}, key)])
        except ValueError:  # no simple value, e.g. a function
            continue
    return found


def _registered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, parametrized ones evaluated."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if _PARAMETRIZATIONS in prefix.split("."):
            continue
        tensors = {**module._parameters, **module._buffers}
        if parametrize.is_parametrized(module):
            tensors |= {name: getattr(module, name) for name in module.parametrizations}
        for name, tensor in tensors.items():
            if tensor is not None:
                yield (f"{prefix}.{name}" if prefix else name), tensor


def _held(graph: Graph, registered: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are neither parameters nor buffers: constants of the graph, attributes of called modules."""
    for position, node in enumerate(graph.nodes):
        if node.op == "get_attr" and node.target not in registered and isinstance(graph.constants[node], Tensor):
            yield f"constant {position}", graph.constants[node]
    for name, module in _called(graph):
        yield from ((f"attribute {name}.{key}", value) for key, value in vars(module).items() if torch.is_tensor(value))

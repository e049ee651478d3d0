"""The traced graph of a model: shapes, constants, and the refusals that keep a trace honest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's type before parametrizations were put on it."""
    return parametrize.type_before_parametrizations(module)


def type_name(module: nn.Module) -> str:
    """The plain type's qualified name, for messages."""
    kind = plain_type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; every submodule's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_model(model: nn.Module) -> None:
    """Raise ValueError where a model can't be certified as it stands.

    Refused, each in one line that names the place: training mode, forward hooks and replaced `forward` functions (they
    can change what a layer computes behind its rule), NaN or infinite parameters and buffers.
    """
    for name, module in model.named_modules():
        place = f"{name or 'the model'} ({type_name(module)})"
        if module.training:
            raise ValueError(f"{place}: expected eval mode, got training mode; call model.eval() first")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise ValueError(f"{place}: expected no forward hooks, since a hook can change what the layer computes")
        if "forward" in vars(module):
            raise ValueError(f"{place}: expected the forward of its class, got one set on the instance")
    check_finite_state(model)


def check_finite_state(model: nn.Module) -> None:
    """Raise ValueError where a parameter or buffer holds NaN or infinity, naming it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite numbers; got NaN or infinity")


def floating_like(model: nn.Module) -> Tensor:
    """A detached tensor of the model's dtype and device: its first floating parameter or buffer."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((tensor.detach() for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


class _Tracer(fx.Tracer):
    def __init__(self, leaves: frozenset[type[nn.Module]]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = plain_type(m)
        if kind is nn.Sequential:
            return False
        return kind in self._leaves or kind.__module__.startswith("torch.nn") or parametrize.is_parametrized(m)


@dataclass(frozen=True)
class Graph:
    """A traced model: nodes in order, the value of every constant node, the shape of every tensor that depends on x."""

    model: nn.Module
    nodes: list[fx.Node]
    constants: dict[fx.Node, Any]
    shapes: dict[fx.Node, tuple[int, ...]]  # without the batch
    input: fx.Node
    output: fx.Node  # the node that the model returns

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a call_module node calls."""
        return self.model.get_submodule(str(node.target))


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


_BATCH = 5  # a reshape that mixes samples shows as a first axis other than this


def trace(model: nn.Module, input_shape: tuple[int, ...], leaves: frozenset[type[nn.Module]]) -> Graph:
    """Trace `model` (one tensor in, one tensor out) and record what each node gives on an input of `input_shape`.

    Raises:
        ValueError: control flow that depends on data, several inputs or outputs, a shape that does not fit the model, or
            an operation that mixes the samples of a batch.
    """
    try:
        graph = _Tracer(leaves).trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(f"the model can't be traced by torch.fx: {_one_line(error)}") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"the model: expected one input tensor, got {len(inputs)} inputs")
    values = _record(model, graph, input_shape)
    nodes = list(graph.nodes)
    returned = nodes[-1].args[0]
    if not isinstance(returned, fx.Node) or not isinstance(values[returned], Tensor):
        raise ValueError("the model: expected one tensor as output, got a structure")
    dependent = _dependent(nodes, inputs[0], values)
    for node in dependent:
        if values[node].dim() < 1 or values[node].shape[0] != _BATCH:
            raise ValueError(
                f"{node.format_node()}: expected the batch to stay the first axis, got {_BATCH} -> {values[node].shape}"
            )
    constants = {node: value for node, value in values.items() if node not in dependent}
    shapes = {node: tuple(values[node].shape[1:]) for node in dependent}
    if returned not in dependent:
        raise ValueError("the model: its output does not depend on its input")
    return Graph(model, nodes[:-1], constants, shapes, inputs[0], returned)


@torch.no_grad()
def _record(model: nn.Module, graph: fx.Graph, input_shape: tuple[int, ...]) -> dict[fx.Node, Any]:
    like = floating_like(model)
    recorder = _Recorder(fx.GraphModule(model, graph))
    with eval_mode(model):
        try:
            recorder.run(torch.zeros(_BATCH, *input_shape, dtype=like.dtype, device=like.device))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"input_shape: {input_shape} does not fit the model: {_one_line(error)}") from error
    return recorder.values


def _dependent(nodes: list[fx.Node], source: fx.Node, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """Nodes whose tensor value depends on the input's; sizes and shapes taken from it are constants."""
    found = {source}
    for node in nodes:
        if isinstance(values.get(node), Tensor) and any(parent in found for parent in node.all_input_nodes):
            found.add(node)
        elif node.op != "output" and not _static(values.get(node)) and any(p in found for p in node.all_input_nodes):
            raise ValueError(f"{node.format_node()}: expected one tensor, got {type(values.get(node)).__name__}")
    return found


def _static(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_static(part) for part in value)
    return value is None or isinstance(value, (int, float, str, torch.dtype, torch.device))


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""The traced graph of a model: shapes, constants, and the refusals that keep a trace honest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FORWARDS = ("forward", "_conv_forward")

# The only numbers that may be read from a tensor: they follow from its shape and type.
_SIZES = ("size", "dim", "ndimension", "numel", "nelement")
_SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")

# Relative deviation that rounding can cause between two runs of a model with batches of two sizes.
_REPLAY = {torch.float64: 1e-7, torch.float32: 1e-3}


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
        check_unchanged(module, place)
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise ValueError("expected no global forward hooks, since a hook can change what a layer computes")
    check_finite_state(model)


def check_unchanged(module: nn.Module, place: str) -> None:
    """Raise ValueError where a module need not compute what its type says: forward hooks, a replaced forward."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"{place}: expected no forward hooks, since a hook can change what the layer computes")
    if own := _replaced(module):
        raise ValueError(f"{place}: expected the {own} of its class, got one set on the instance")
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{place}: expected a module that is not compiled, since a compiler may fuse and reorder")
    if isinstance(module, nn.modules.conv._ConvNd) and not parametrize.is_parametrized(module):
        _check_convolution(module, place)


def _replaced(module: nn.Module) -> str:
    """The name of a method that is set on the instance, where there is one."""
    for name, value in vars(module).items():
        if name in _FORWARDS or (callable(value) and callable(getattr(type(module), name, None))):
            return name
    return ""


def _check_convolution(layer: nn.modules.conv._ConvNd, place: str) -> None:
    """Raise ValueError where what a convolution says of itself is not what it computes."""
    outer, inner = layer.out_channels, layer.in_channels
    if layer.transposed:
        outer, inner = inner, outer
    if layer.weight.shape != (outer, inner // layer.groups, *layer.kernel_size):
        raise ValueError(f"{place}: expected weights of its channels and kernel size, got {tuple(layer.weight.shape)}")
    if not isinstance(layer.padding, str):
        pads = [pad for pad in reversed(layer.padding) for _ in range(2)]
        if list(layer._reversed_padding_repeated_twice) != pads:
            raise ValueError(f"{place}: expected to pad by its padding, got {layer._reversed_padding_repeated_twice}")


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
    sample: Tensor  # the batch on which it was recorded
    image: Tensor  # what the graph gave for it

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


_MORE = 11  # samples of another replay, in which products may be summed in yet another order
_MORE_SLACK = 100.0
_BATCH = 5  # a reshape that mixes samples shows as a first axis other than this


def trace(model: nn.Module, input_shape: tuple[int, ...], leaves: frozenset[type[nn.Module]]) -> Graph:
    """Trace `model` (one tensor in, one tensor out) and record what each node gives on an input of `input_shape`.

    Raises:
        ValueError: control flow that depends on data, several inputs or outputs, a shape that does not fit the model,
            an operation that mixes the samples of a batch, or a tensor changed in place that is used again.
    """
    attributes = set(vars(model))
    try:
        graph = _symbolic(model, leaves)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise ValueError(f"the model: expected one input tensor, got {len(inputs)} inputs")
        sample = _sample(model, input_shape)
        values = _record(model, graph, sample)
    finally:  # torch.fx stores tensors that are no parameter or buffer as attributes of the model
        for name in [name for name in vars(model) if name not in attributes]:
            delattr(model, name)
    nodes = list(graph.nodes)
    returned = nodes[-1].args[0]
    if not isinstance(returned, fx.Node) or not isinstance(values[returned], Tensor):
        raise ValueError("the model: expected one tensor as output, got a structure")
    dependent = _dependent(nodes, inputs[0], values)
    for node in dependent:
        _check_value(node, values[node], sample.dtype)
    _check_in_place(model, nodes, values, inputs[0], dependent)
    constants = {node: value for node, value in values.items() if node not in dependent}
    shapes = {node: tuple(values[node].shape[1:]) for node in dependent}
    if returned not in dependent:
        raise ValueError("the model: its output does not depend on its input")
    return Graph(model, nodes[:-1], constants, shapes, inputs[0], returned, sample, values[returned])


def _symbolic(model: nn.Module, leaves: frozenset[type[nn.Module]]) -> fx.Graph:
    try:
        graph = _Tracer(leaves).trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError, NameError, AttributeError) as error:
        raise ValueError(f"the model can't be traced by torch.fx: {_one_line(error)}") from error
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_method" else ""
        if node.kwargs.get("out") is not None or (name.endswith("_") and not name.endswith("__")):
            raise ValueError(f"{node.format_node()}: expected no change in place of a tensor")
    return graph


def _sample(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(_BATCH, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(floating_like(model))


@torch.no_grad()
def _record(model: nn.Module, graph: fx.Graph, sample: Tensor) -> dict[fx.Node, Any]:
    recorder = _Recorder(fx.GraphModule(model, graph))
    with eval_mode(model), _errors_of_shape(sample):
        recorder.run(sample.clone())
    return recorder.values


@torch.no_grad()
def check_replay(graph: Graph) -> None:
    """Raise ValueError where the model itself gives other outputs than its graph did.

    On the batch that was recorded, to the last bit: the same operations on the same numbers. A trace forgets that two
    names are one tensor (`b = a; a += x` also changes b), leaves out contexts such as autocast, and takes for constants
    what is drawn at random or counted from call to call. On fewer and on more samples up to rounding, which can
    depend on the batch: a sample's output must not depend on its neighbours, nor on their number, as far as is tried.
    """
    sample = graph.sample
    with _errors_of_shape(sample):
        again, fewer = graph.model(sample.clone()), graph.model(sample[:2].clone())
        more = graph.model(torch.cat([sample, sample, sample])[:_MORE])
    if not _same(again, graph.image):
        raise ValueError(
            "the model: expected its traced graph to give the same outputs to the last bit; a tensor in use is changed "
            "in place, the forward pass switches autocast, draws random numbers, or changes from call to call"
        )
    image = graph.image.nan_to_num(0.0, 0.0, 0.0)
    tolerance = _REPLAY.get(image.dtype, 0.1)
    # per output: one that is large and constant, such as that of a masked class, must not hide the others' deviation
    allowed = tolerance * (image.amax(0) - image.amin(0)) + tolerance / 100 * image.abs().amax(0)
    for found, slack in ((fewer, 1.0), (more, _MORE_SLACK)):
        expected = torch.cat([graph.image] * 3)[: len(found)]
        same = (found == expected) | (found.isnan() & expected.isnan())
        if not bool((same | ((found - expected).abs() <= slack * allowed)).all()):
            raise ValueError("the model: expected a sample's output not to depend on the other samples of its batch")


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and bool(((found == expected) | (found.isnan() & expected.isnan())).all())


@contextmanager
def _errors_of_shape(sample: Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = tuple(sample.shape[1:])
        raise ValueError(f"input_shape: {shape} does not fit the model: {_one_line(error)}") from error


def _dependent(nodes: list[fx.Node], source: fx.Node, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """Nodes whose tensor value depends on the input's; sizes and shapes taken from it are constants."""
    found = {source}
    for node in nodes:
        if node.op == "output" or not any(parent in found for parent in node.all_input_nodes):
            continue
        if isinstance(values.get(node), Tensor):
            found.add(node)
        elif not _is_size(node):
            raise ValueError(f"{node.format_node()}: expected one tensor, got {type(values.get(node)).__name__}")
    return found


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZES
    return node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES


def _check_value(node: fx.Node, value: Tensor, dtype: torch.dtype) -> None:
    if value.dim() < 1 or value.shape[0] != _BATCH:
        raise ValueError(
            f"{node.format_node()}: expected the batch to stay the first axis, got {_BATCH} -> {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{node.format_node()}: expected floating-point numbers, got {value.dtype}")
    if torch.promote_types(value.dtype, dtype) != value.dtype:
        raise ValueError(f"{node.format_node()}: expected numbers no coarser than {dtype}, got {value.dtype}")


def _check_in_place(
    model: nn.Module, nodes: list[fx.Node], values: dict[fx.Node, Any], source: fx.Node, dependent: set[fx.Node]
) -> None:
    """Raise ValueError where an operation changes a tensor in place that is read again afterwards."""

    def memory(node: fx.Node) -> int:
        return int(values[node].untyped_storage().data_ptr()) if node in dependent else 0

    for position, node in enumerate(nodes):
        if not _in_place(model, node):
            continue
        changed = next(iter(node.all_input_nodes), None)
        earlier = {old for old in nodes[:position] if changed is not None and memory(old) == memory(changed)}
        later = {parent for user in nodes[position + 1 :] for parent in user.all_input_nodes}
        if changed not in dependent or source in earlier or earlier & later:
            raise ValueError(f"{node.format_node()}: expected no change in place of a tensor that is used elsewhere")


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    return bool(node.kwargs.get("inplace"))


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

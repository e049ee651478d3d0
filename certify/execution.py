"""The network that runs: its plain copy in an arithmetic, its logits, and one float64 pass that sees every tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .arithmetic import DTYPES, REAL, Arithmetic, arithmetic_for, exact_arithmetic
from .graph import Graph, floating_like

Visit = Callable[[fx.Node, Tensor], None]


@dataclass(frozen=True, eq=False)
class Executed:
    """A network as it runs: parametrizations made plain, tensors in the arithmetic's type, inputs converted to it."""

    model: nn.Module
    arithmetic: Arithmetic
    dtype: torch.dtype
    rounded: bool  # whether its weights are rounded from another type

    def converted(self, x: Tensor) -> Tensor:
        """The inputs as the network gets them; ValueError where they are no floating-point numbers."""
        if not x.is_floating_point():
            raise ValueError(f"x: expected floating-point inputs, got {x.dtype}")
        return x.to(self.dtype)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether the conversion rounds inputs of this type."""
        return torch.promote_types(dtype, self.dtype) != self.dtype

    def logits(self, x: Tensor, batch_size: int = 1024) -> Tensor:  # [B, *input_shape] -> [B, K]
        """The logits that it gives; ValueError as `logits_of`, and where they are NaN or infinite."""
        logits = logits_of(self.model, self.converted(x), batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"logits: expected finite numbers; got NaN or infinity in {self.arithmetic.name}")
        return logits


def executed(model: nn.Module, arithmetic: str | None = None) -> Executed:
    """The network as it runs in an arithmetic; None, "model" and "real" leave the types as they are.

    Raises:
        ValueError: an arithmetic that is unknown, a model of several half types.
    """
    own, chosen = arithmetic_for(model), arithmetic_for(model, arithmetic)
    plain = plain_copy(model)
    if chosen in (own, REAL):
        return Executed(plain, chosen, floating_like(model).dtype, False)
    dtype = DTYPES[chosen.name]
    return Executed(plain.to(dtype), chosen, dtype, True)


@torch.no_grad()
def logits_of(
    model: nn.Module,
    x: Tensor,  # [B, *input_shape]
    batch_size: int = 1024,
) -> Tensor:  # [B, K]
    """The model's logits in `exact_arithmetic`; ValueError for no samples, NaN or infinite inputs."""
    if x.numel() == 0:
        raise ValueError("x: expected at least one sample, got none")
    if not all(bool(torch.isfinite(end)) for end in x.aminmax()):  # one pass; NaN goes through both ends
        raise ValueError("x: expected finite inputs; got NaN or infinity")
    with exact_arithmetic(x.device):
        return torch.cat([model(part) for part in torch.split(x, batch_size)])


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with the very weights that the model runs with, parametrized ones made plain."""
    clone = copy.deepcopy(model)
    for own, live in zip(list(clone.modules()), list(model.modules()), strict=True):
        if not parametrize.is_parametrized(own):
            continue
        weights = {name: getattr(live, name).detach().clone() for name in live.parametrizations}  # type: ignore[union-attr]
        # torch's own remove_parametrizations deletes the property from a class that copies share with the original
        own.__class__ = parametrize.type_before_parametrizations(own)
        del own._modules["parametrizations"]
        for name, weight in weights.items():
            own.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return clone


class Float64Pass:
    """The traced network in float64: tensors and constants are those of the executed one, converted exactly."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._model = copy.deepcopy(graph.model).double()
        self._constants = {node: _double(value) for node, value in graph.constants.items()}
        self._live = _depending(graph)
        self._last = _last_uses(graph)

    @torch.no_grad()
    def run(
        self,
        x: Tensor,  # [B, *input_shape]
        visit: Visit,
    ) -> Tensor:  # [B, K]
        """The logits; `visit` is told every tensor that depends on the input as soon as it is computed."""
        values: dict[fx.Node, Any] = {}
        with exact_arithmetic(x.device):
            for node in self._graph.nodes:
                values[node] = self._value(node, values, x)
                if node in self._graph.shapes:
                    if values[node].dtype != torch.float64:
                        raise ValueError(
                            f"{node.format_node()}: expected float64 from float64, got {values[node].dtype}"
                        )
                    visit(node, values[node])
                for done in self._last.get(node, ()):
                    del values[done]
        found: Tensor = values[self._graph.output]
        return found

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], x: Tensor) -> Any:
        if node.op == "placeholder":
            return x.double()
        if node not in self._live:
            return self._constants[node]
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            return self._model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _depending(graph: Graph) -> set[fx.Node]:
    """Tensors that depend on the input, and the sizes taken from them: these follow the batch."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        below = any(parent in found for parent in node.all_input_nodes)
        if node in graph.shapes or (below and not isinstance(graph.constants[node], Tensor)):
            found.add(node)
    return found


def _last_uses(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """By node: the nodes whose values are not needed after it."""
    last = {node: node for node in graph.nodes}
    for node in graph.nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    last.pop(graph.output, None)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, end in last.items():
        found.setdefault(end, []).append(node)
    return found

"""Models of the user's own, named as "module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["import_model"]


def import_model(location: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Import the function, call it with input_shape= and num_classes=, and check the model that it gives.

    Args:
        location: "module:function", both importable from the current Python path.
        input_shape: of one input, without the batch.
        num_classes: the length of one output.

    Raises:
        ValueError: no such module or function, or its result is not a model N x input_shape -> N x num_classes.
    """
    function = _find(location)
    try:
        model = function(input_shape=input_shape, num_classes=num_classes)
    except TypeError as error:
        raise ValueError(f"{location}: a call with input_shape= and num_classes= failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{location} must return a torch.nn.Module, got {type(model).__name__}")
    output = _probe(location, model, input_shape)
    if output.shape != (1, num_classes):
        raise ValueError(f"{location}: expected logits of shape (1, {num_classes}), got {tuple(output.shape)}")
    return model


def _find(location: str) -> Callable[..., Any]:
    module_name, _, function_name = location.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"expected module:function, got {location!r}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{location}: {error}; expected module:function of an importable module") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{location}: the module {module_name} has no function {function_name}")
    found: Callable[..., Any] = function
    return found


@torch.no_grad()
def _probe(location: str, model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        output = model(torch.zeros(1, *input_shape))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{location}: the model cannot take inputs of shape {input_shape}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor):
        raise ValueError(f"{location}: expected the model to return one tensor, got {type(output).__name__}")
    return output

"""Weights on disk: written whole or not at all, read without running a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .store import StoreError, write_atomic

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a `state_dict` as a safetensors file, whole or not at all.

    Raises:
        StoreError: an entry that is not a tensor, or a folder that cannot be written.
    """
    from safetensors.torch import save

    if foreign := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise StoreError(f"{path}: expected tensors only, got other values for {_some(foreign)}")
    # Cloned, since safetensors refuses tensors that share memory.
    write_atomic(path, save({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}))


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fill a model with the weights in a .safetensors file, or in a torch file of a `state_dict`; never runs a pickle.

    Raises:
        StoreError: the file is missing, truncated or of another kind; weights are missing, unexpected, of another
            shape, NaN or infinite. The model is then left as it was.
    """
    state = _read_state(Path(path))
    expected = model.state_dict()
    shared = [key for key in expected if key in state]
    wrong = [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in shared
        if state[key].shape != expected[key].shape
    ]
    faults = {
        "missing weights": [key for key in expected if key not in state],
        "unexpected weights": sorted(key for key in state if key not in expected),
        "shapes that differ": wrong,
        "NaN or infinite weights": [key for key in shared if not bool(torch.isfinite(state[key]).all())],
    }
    if found := [f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys]:
        raise StoreError(f"{path}: does not fit the model; {'; '.join(found)}")
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors":
            state: Any = load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise StoreError(f"{path}: truncated or not a safetensors file ({error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StoreError(
            f"{path}: damaged, or not a torch file of model.state_dict(); pickled code is not run"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"{path}: expected a state_dict (names to tensors), got {type(state).__name__}")
    return dict(state)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

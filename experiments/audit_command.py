"""`certify audit-model`: open a model, audit it, print and save what was found."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from ..certify.graph import floating_like
from ..certify.linear import check_norm
from ..models.imported import import_model
from .audit import audit_model
from .audit_rows import Audit
from .audit_text import print_audit, save_audit
from .checkpoints import load_checkpoint
from .config import ConfigError
from .precision import exact_float32
from .stages import open_model
from .sweep import check_device

__all__ = ["audit_one"]


def audit_one(
    name: str,
    *,
    console: Console,
    checkpoint: Path | None = None,
    dataset: str | None = None,
    input_shape: str | None = None,
    classes: int = 10,
    norm: str = "l2",
    device: str = "cpu",
    data_root: Path | None = None,
    json_path: Path | None = None,
) -> Audit:
    """Audit a run folder or "module:function", on its data set or on random inputs of "C,H,W" (or "D"), and print it.

    Raises:
        ConfigError: an unknown norm, a shape that is none, both a data set and a shape, or neither.
        ValueError: files, data or weights that can't be used.
    """
    try:
        check_norm(norm)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    points: Tensor | None = None
    if input_shape is None:
        opened = open_model(name, checkpoint=checkpoint, dataset=dataset, data_root=data_root, device=device)
        model, shape, shown = opened.model, opened.data.input_shape, opened.name
        points = opened.data.test.x[:256].to(floating_like(model))
    else:
        if dataset is not None or Path(name).is_dir():
            raise ConfigError("input-shape: expected it for a module:function model without a data set")
        shape = _shape(input_shape)
        model, shown = _imported(name, checkpoint, shape, classes, device), name
    audit = audit_model(model, shape, norm=norm, points=points, name=shown)
    print_audit(audit, console)
    if json_path is not None:
        save_audit(audit, json_path)
    return audit


def _imported(name: str, checkpoint: Path | None, shape: tuple[int, ...], classes: int, device: str) -> nn.Module:
    check_device(device)
    exact_float32()
    model = import_model(name, shape, classes)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.to(device).eval()


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"input-shape = {text!r}: expected sizes > 0 such as 1,28,28")
    return tuple(int(part) for part in parts)

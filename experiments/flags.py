"""Settings given as text, on the command line: one flag a field of `CellConfig`, and one for presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import DURATIONS, CellConfig, ConfigError
from .presets import DEFAULT_THRESHOLDS, DEFAULTS, PRESETS
from .spec import LISTS

__all__ = ["HELP", "SWITCHES", "default_text", "parse_settings"]

HELP = {
    "preset": f"settings under a name: {', '.join(PRESETS)}, or one of the spec file; they win over the file",
    "dataset": "digits, mnist, fashion-mnist, cifar10, a path to an .npz file, or module:function",
    "model": "mlp, convnet-4c3f, convnet-6c2f, lipconvnet, liresnet, or module:function",
    "width": "neurons or channels of the model's layers",
    "depth": "hidden layers or blocks of the model",
    "activation": "abs, gelu, groupsort, householder, identity, leaky-relu, maxmin, relu, sigmoid, silu, "
    "softplus, tanh",
    "normalise": "first layer of the model: none, center (subtract the mean) or standard (divide by the deviation too)",
    "constraint": "cap, clip, orthogonal, orthogonal-bjorck, orthogonal-projected, penalty, none, weight-decay, "
    "gradient-clip",
    "threshold": "spectral norm that each layer is held to, above 0 or inf, e.g. 0.5,1,2,inf",
    "seed": "seed of weights, data order and splits",
    "loss": "cross-entropy, margin, offset-ce, gloro or emma",
    "loss_eps": "radius that the loss asks for, in raw input units",
    "loss_offset": "further margin that the loss asks for, in logit units",
    "temperature": "temperature of the loss",
    "optimizer": "sgd, adam or adamw",
    "lr": "peak learning rate",
    "weight_decay": "weight decay",
    "momentum": "momentum of sgd",
    "schedule": "constant, cosine, step or linear",
    "warmup_epochs": "epochs over which the learning rate rises",
    "epochs": "passes over the training part",
    "batch_size": "samples a step",
    "augment": "none, shift or shift-flip",
    "gradient_clip": "largest global gradient norm",
    "penalty_weight": "weight of the spectral penalty",
    "validation_fraction": "share of the training part that chooses the epoch",
    "train_samples": "size of a training subset",
    "test_samples": "size of a test subset",
    "attack_samples": "how many test samples to attack",
    "norm": "norm of the perturbation: l2, linf or l1",
    "eps": "perturbation sizes in raw input units, e.g. 0.1,0.3 or 36/255",
    "attacks": "fgsm, pgd, apgd-ce, apgd-dlr, apgd-t, fab, square, autoattack, eot-pgd, spsa, deepfool, cw, ddn, fmn, "
    "rounding-search; comma-separated",
    "attack_schedule": "cascade (cheapest attack first, each on what still stands) or each (all on all samples)",
    "audit": "attack certified samples too, and all of them harder",
    "integer_pixels": "count only adversarial points whose pixels are whole numbers of 255",
    "max_gradients": "gradients that the attacks may take, a mean over the correctly classified samples",
    "max_seconds": "time that the attacks may take, e.g. 90, 90s or 2m",
    "bound": "Lipschitz bound: product, closed-form, lipsdp, lipsdp-layer, lipsdp-first-order, local or auto",
    "bound_budget": "time that a tighter bound may take, in each norm, e.g. 90, 90s or 2m",
    "arithmetic": "that the certified network runs in: model (its own), real, float64, float32, float16 or bfloat16",
    "checkpoint": "weights to start from, a .safetensors or weights-only torch file",
}
_ALWAYS_LISTS = ("constraint", "threshold", "seed", *LISTS)  # given as a list, even one of one value
SWITCHES = ("audit", "integer_pixels")  # settings that are on or off
_TYPES = {"preset": "str", **{field.name: str(field.type) for field in dataclasses.fields(CellConfig)}}


def default_text(key: str) -> str:
    """A setting's default in words, and what single data sets have instead."""
    fields = {field.name: field.default for field in dataclasses.fields(CellConfig)}
    values = {"": {**fields, "threshold": DEFAULT_THRESHOLDS, "preset": None}[key]}
    values |= {f" for {name}": defaults[key] for name, defaults in DEFAULTS.items() if key in defaults}
    return "; ".join(f"{_shown(value)}{where}" for where, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_shown(part) for part in value)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse_settings(flags: Mapping[str, str | bool | None]) -> dict[str, Any]:
    """The settings that were given (not None), each text turned into its field's type.

    Commas separate the values that a setting spans, those of eps and attacks the items of their one value. A
    checkpoint is one path, commas or not.

    Raises:
        ConfigError: a text that is no number where one is expected; all such are named in one line.
    """
    settings: dict[str, Any] = {}
    problems = []
    for key, text in flags.items():
        if text is None:
            continue
        if isinstance(text, bool):
            settings[key] = text
            continue
        try:
            values = [_value(key, part) for part in ([text] if key == "checkpoint" else text.split(","))]
            settings[key] = values if key in _ALWAYS_LISTS or len(values) > 1 else values[0]
        except ValueError:
            problems.append(f"{key} = {text!r}: expected {'integers' if 'int' in _TYPES[key] else 'numbers'}")
    if problems:
        raise ConfigError("; ".join(problems))
    return settings


def _value(key: str, text: str) -> Any:
    text = text.strip()
    kind = _TYPES[key]
    if text == "unset" and "None" in kind:
        return None
    if "int" in kind:
        return int(text)
    if "float" in kind:  # a ratio such as 36/255, or a duration, is the config's to read
        return text if "/" in text or key in DURATIONS else float(text)
    return text

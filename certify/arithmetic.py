"""Floating-point arithmetics that a network may run in, what is assumed of them, and the settings that make it so."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Arithmetic:
    """Constants of an arithmetic, as the error bounds use them.

    A stored result r of exact value e obeys |r - e| <= unit |e| + tiny. Sums inside one operation are accumulated with
    `accumulation` in place of `unit`. `tiny` is the smallest normal number, so that subnormal numbers may be flushed to
    zero, as inputs and as results; that of float16 is its smallest subnormal, since conversions from and to float16
    keep subnormals whatever the processor's settings. `huge` is the largest finite number.
    """

    name: str
    unit: float
    accumulation: float
    tiny: float
    huge: float


ARITHMETICS = {
    arithmetic.name: arithmetic
    for arithmetic in (
        Arithmetic("real", 0.0, 0.0, 0.0, math.inf),
        Arithmetic("float64", 2.0**-53, 2.0**-53, 2.0**-1022, torch.finfo(torch.float64).max),
        Arithmetic("float32", 2.0**-24, 2.0**-24, 2.0**-126, torch.finfo(torch.float32).max),
        # products of half-precision numbers are exact in float32; their sums may even be truncated, as by tensor cores
        Arithmetic("float16", 2.0**-11, 2.0**-23, 2.0**-24, torch.finfo(torch.float16).max),
        Arithmetic("bfloat16", 2.0**-8, 2.0**-23, 2.0**-126, torch.finfo(torch.bfloat16).max),
    )
}
REAL, FLOAT64 = ARITHMETICS["real"], ARITHMETICS["float64"]

DTYPES = {name: getattr(torch, name) for name in ARITHMETICS if name != "real"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Assumption:
    """Something that a certificate takes for granted about the machine that runs the network."""

    id: str
    text: str


_EXACT = Assumption("eval-mode", "the model runs in eval mode, and the samples of a batch do not influence each other")
_ROUNDED = (
    Assumption(
        "round-to-nearest",
        "+, -, * and / are rounded to nearest with the stated unit, with or without fused multiply-add; the square "
        "root errs by at most 2 units; divisions by a constant may multiply by its rounded reciprocal",
    ),
    Assumption(
        "summation",
        "sums of products are made of these operations in any order; no TF32 nor other reduced precision (cuBLAS, "
        "cuDNN, oneDNN), and no product or convolution of fewer multiplications (Winograd, FFT, Strassen)",
    ),
    Assumption(
        "elementary-functions",
        "exp, log, tanh, erf, sin and cos, and the activations made of them, are as accurate as the rounding rules "
        "state: within 4 to 8 units in the last place",
    ),
)
_HALF = (
    Assumption(
        "accumulation",
        "operations on half-precision tensors accumulate in float32 at least and round each result once or twice",
    ),
    Assumption("subnormals", "conversions from and to float16 keep subnormal numbers"),
)


def assumptions(arithmetic: Arithmetic) -> tuple[Assumption, ...]:
    """What a certificate for a network run in `arithmetic` assumes."""
    if arithmetic.unit == 0.0:
        return (_EXACT,)
    half = arithmetic.unit != arithmetic.accumulation
    return (_EXACT, *_ROUNDED, *(_HALF if half else ()))


def check_arithmetic(name: str | None) -> None:
    """Raise ValueError where `name` is neither None, "model" nor the name of an arithmetic."""
    if name not in (None, "model", *ARITHMETICS):
        raise ValueError(f"arithmetic: expected one of model, {', '.join(ARITHMETICS)}; got {name!r}")


def arithmetic_for(model: nn.Module, name: str | None = None) -> Arithmetic:
    """The arithmetic of that name; for None or "model" that of the model's coarsest floating-point tensors.

    A model without any takes torch's default type.

    Raises:
        ValueError: an unknown name; tensors of both half types, which no one arithmetic describes.
    """
    check_arithmetic(name)
    if name not in (None, "model"):
        return ARITHMETICS[name]
    tensors = [*model.parameters(), *model.buffers()]
    names = {_NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors if tensor.is_floating_point()}
    if names - set(DTYPES) or {"float16", "bfloat16"} <= names:
        raise ValueError(f"the model: expected tensors of one of {', '.join(DTYPES)}, got {', '.join(sorted(names))}")
    return max((ARITHMETICS[name] for name in names or {_default()}), key=lambda arithmetic: arithmetic.unit)


def _default() -> str:
    return str(torch.get_default_dtype()).removeprefix("torch.")


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No TF32, no autocast, no reduced-precision sums and no Winograd convolutions for a while; all is restored.

    Raises:
        ValueError: oneDNN is told by the environment to compute in less than float32.
    """
    for name in _ONEDNN_MODES:
        if (mode := os.environ.get(name, "STRICT")).upper() != "STRICT":
            raise ValueError(f"{name}: expected STRICT or nothing, got {mode}, which computes in less than float32")
    cudnn = torch.backends.cudnn
    precisions, sums, enabled = float32_precisions(), _half_sums(), cudnn.enabled
    _set_precisions(dict.fromkeys(precisions, _FULL))
    _set_half_sums(dict.fromkeys(sums, False))
    cudnn.enabled = False  # its convolutions may be Winograd's, and so may NNPACK's
    try:
        with torch.backends.nnpack.flags(enabled=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set_precisions(precisions)
        _set_half_sums(sums)
        cudnn.enabled = enabled


@contextmanager
def proving() -> Iterator[None]:
    """What computing a bound takes, whatever the caller's settings: `exact_arithmetic` on the CPU, subnormals kept.

    Also a decorator. Inference mode is left too, since adjoints come from autograd. Everything is restored.
    """
    flushed = _SMALLEST_NORMAL / 2 == 0.0
    torch.set_flush_denormal(False)
    try:
        with torch.inference_mode(False), exact_arithmetic(torch.device("cpu")):
            yield
    finally:
        torch.set_flush_denormal(flushed)


_SMALLEST_NORMAL = 2.0**-1022


def full_precision() -> None:
    """For this process: nothing below float32 in float32 operations (TF32) or in the sums of half-precision ones."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    _set_precisions(dict.fromkeys(float32_precisions(), _FULL))
    _set_half_sums(dict.fromkeys(_half_sums(), False))


_ONEDNN_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
_FULL = "ieee"
# Where torch 2.9 and later keep the precision of float32 operations; its older functions fail once these were set.
_PRECISIONS = (
    "",
    "cuda.matmul",
    "cudnn",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn",
    "mkldnn.conv",
    "mkldnn.matmul",
    "mkldnn.rnn",
)
_OLD = "all"  # key of torch 2.8's setting of products and convolutions


def float32_precisions() -> dict[str, Any]:
    """In how many bits float32 operations may compute, by torch's names ("tf32", "bf16", "ieee", "none")."""
    if not hasattr(torch.backends, "fp32_precision"):
        return {_OLD: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)}
    return {name: _backend(name).fp32_precision for name in _PRECISIONS}


def _set_precisions(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name == _OLD:
            product, tf32 = ("highest", False) if value == _FULL else value
            torch.set_float32_matmul_precision(product)
            torch.backends.cudnn.allow_tf32 = tf32
        else:
            _backend(name).fp32_precision = value


def _backend(name: str) -> Any:
    return operator.attrgetter(name)(torch.backends) if name else torch.backends


_HALF_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",  # torch 2.7 on
)


def _half_sums() -> dict[str, bool]:
    products = torch.backends.cuda.matmul
    return {name: getattr(products, name) for name in _HALF_SUMS if hasattr(products, name)}


def _set_half_sums(values: dict[str, bool]) -> None:
    for name, value in values.items():
        setattr(torch.backends.cuda.matmul, name, value)

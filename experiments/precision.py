"""The float settings that a certificate assumes: set them, and say which of its assumptions hold on this machine."""

from __future__ import annotations

import platform
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..certify.arithmetic import (
    ARITHMETICS,
    Assumption,
    assumptions,
    exact_arithmetic,
    float32_precisions,
    full_precision,
)
from ..certify.rounding_rules import SMOOTH
from . import probes, probes_activations, probes_library

__all__ = ["Check", "check_machine", "exact_float32", "report"]

PROOFS = Assumption(
    "proofs",
    "bounds are proved on the CPU: its float64 and complex products are sums of products of entries, in any order, and "
    "its Cholesky factorisation is the usual one",
)
_WIDTH = 98
_ULPS = SMOOTH / 2  # a unit in the last place is two units
_BATCH_NORM = 12.0  # units that its rounding rule allows
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)


def exact_float32() -> None:
    """Turn off, for this process, arithmetic below float32 in float32 operations: TF32 products and convolutions."""
    full_precision()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@dataclass(frozen=True)
class Check:
    """What was found of one fact, and whether an assumption holds in it (None for a mere fact).

    `assumption` is the id under which certificates name it, empty for facts about the machine.
    """

    name: str
    found: str
    holds: bool | None = None
    assumption: str = ""


def check_machine() -> list[Check]:
    """What this machine is, and which of the certificates' assumptions hold on it, each tried where it can be."""
    return [*_facts(), *_assumptions()]


def report(checks: Iterable[Check]) -> list[str]:
    """The checks as lines: facts, then every assumption with what was tried of it."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.assumption, []).append(check)
    lines = [line for check in groups.pop("", []) for line in _lines(check)]
    for assumption in _assumed():
        lines += ["", *textwrap.wrap(f"{assumption.id}: {assumption.text}", _WIDTH)]
        tried = groups.get(assumption.id, [])
        lines += [line for check in tried for line in _lines(check)] or [
            "     checked for each model, when it is traced"
        ]
    return lines


def _lines(check: Check) -> list[str]:
    mark = {None: "    ", True: "ok  ", False: "FAIL"}[check.holds]
    first, *rest = textwrap.wrap(f"{check.name}: {check.found}", _WIDTH - 5, break_on_hyphens=False)
    return [f"{mark} {first}", *(f"       {line}" for line in rest)]


def _assumed() -> list[Assumption]:
    """Every assumption of any arithmetic once, and that of the proofs."""
    found = {item.id: item for arithmetic in ARITHMETICS.values() for item in assumptions(arithmetic)}
    return [*found.values(), PROOFS]


def _facts() -> list[Check]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    settings = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    vectors = torch.backends.cpu.get_cpu_capability()
    return [
        Check("python", platform.python_version()),
        Check("torch", torch.__version__),
        Check("processor", f"{platform.machine()}, {vectors}, {torch.get_num_threads()} threads"),
        Check("linear algebra", settings.group(1) if settings else "unknown"),
        Check("oneDNN, NNPACK", f"{_switch(torch.backends.mkldnn)}, {_switch(torch.backends.nnpack)}"),
        Check("GPUs", ", ".join(gpus) if gpus else "none"),
    ]


def _switch(backend: Any) -> str:
    return "on" if backend.is_available() and getattr(backend, "enabled", True) else "off"


def _assumptions() -> list[Check]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reduced = [name or "all" for name, value in float32_precisions().items() if value in ("tf32", "bf16")]
    found = [
        Check(
            "float32 in fewer bits", f"allowed in {', '.join(reduced)}" if reduced else "off", not reduced, "summation"
        )
    ]
    for device in devices:
        text, _ = _each(probes.convolutions, (torch.float32, *_HALVES), device)
        found.append(Check(f"convolutions with the settings of this process ({device})", text, None, "summation"))
        with exact_arithmetic(torch.device(device)):
            found += _of_device(device)
    return [*found, *_of_proofs()]


def _of_device(device: str) -> Iterator[Check]:
    def check(
        name: str,
        assumption: str,
        probe: Callable[[torch.dtype, str], probes.Found],
        dtypes: tuple[torch.dtype, ...],
    ) -> Check:
        return Check(f"{name} ({device})", *_each(probe, dtypes, device), assumption)

    yield check("rounding", "round-to-nearest", probes.rounding, _FLOATS)
    yield check("batch normalisation", "round-to-nearest", _batch_norm, (torch.float32, *_HALVES))
    yield Check(f"square roots of tensors ({device})", probes_library.square_root(device), None, "round-to-nearest")
    yield Check(f"fused multiply-add ({device})", probes.fused(device), None, "round-to-nearest")
    kept = ", ".join(f"{_name(dtype)} {probes.subnormals(dtype, device)}" for dtype in _FLOATS)
    yield Check(f"subnormal results ({device})", f"{kept}; certificates allow for both", None, "round-to-nearest")
    yield check("digits of inputs", "summation", lambda dtype, device: probes.tf32(device), (torch.float32,))
    yield check("products", "summation", probes.products, _FLOATS)
    yield check("convolutions", "summation", probes.convolutions, _FLOATS)
    for dtype in _FLOATS:
        text, holds = probes_library.elementary(dtype, device, _ULPS)
        yield Check(f"{_name(dtype)} ({device}), units in the last place", text, holds, "elementary-functions")
        text, holds = probes_activations.activations(dtype, device)
        yield Check(f"{_name(dtype)} ({device}), share of what rules allow", text, holds, "elementary-functions")
    yield check("sums of half types", "accumulation", probes.accumulation, _HALVES)
    yield Check(f"float16 conversions ({device})", *probes.half_subnormals(device), "subnormals")


def _batch_norm(dtype: torch.dtype, device: str) -> probes.Found:
    return probes_library.batch_norm(dtype, device, _BATCH_NORM)


def _of_proofs() -> Iterator[Check]:
    def check(name: str, found: probes.Found) -> Check:
        return Check(name, *found, "proofs")

    complexes = (torch.complex64, torch.complex128)
    yield check("float64 products", probes_library.exact_products())
    yield check("complex products", _each(probes.complex_products, complexes))
    yield check("Cholesky factors", probes_library.cholesky())
    yield check("indefinite matrices", _each(probes_library.refused_cholesky, (torch.float64, *complexes)))
    yield check("known norms", probes_library.known_norms())


def _each(probe: Callable[..., probes.Found], dtypes: tuple[torch.dtype, ...], *device: str) -> probes.Found:
    """A probe on several types; types that found the same are named together."""
    found = {dtype: probe(dtype, *device) for dtype in dtypes}
    texts: dict[str, list[str]] = {}
    for dtype, (text, _) in found.items():
        texts.setdefault(text, []).append(_name(dtype))
    told = "; ".join(f"{', '.join(names)} {text}" for text, names in texts.items())
    return told, all(holds for _, holds in found.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

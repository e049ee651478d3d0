"""What a Slurm job asks for: the `[slurm]` table of a spec, or flags `--slurm KEY=VALUE`, checked when built."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from .config import ConfigError

__all__ = ["OPTIONS", "SlurmOptions", "parse_options"]

_USUAL_JOBS = 200  # few enough for any scheduler, enough to fill a large cluster
# sbatch options that follow from the fields, or that requeueing depends on
_MANAGED = {
    *(
        "account",
        "array",
        "chdir",
        "clusters",
        "cpus-per-task",
        "error",
        "gpus",
        "gpus-per-node",
        "gpus-per-task",
        "job-name",
    ),
    *("mem", "mem-per-cpu", "mem-per-gpu", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output"),
    *("parsable", "partition", "qos", "requeue", "signal", "test-only", "time", "wait", "wrap"),
}
_SIZE = re.compile(r"[1-9]\d*[KMGT]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What the jobs of a study ask of Slurm; none of it changes a result. "A cell" is one training with its evaluation.

    A job runs `cells_per_job` cells, `cells_at_once` side by side, on one node. It asks for `cells_at_once` times the
    CPUs and memory of a cell, and for `gpus` for every group of cells that share them.

    Attributes:
        time: Limit of a job in minutes; also given as "MM", "HH:MM:SS" or "D-HH:MM:SS". A job that runs into it is
            requeued and goes on where it was, at most `max_requeues` times. Preemptions don't count, unless the
            limit is at most 10 minutes: submitit then takes each for a time-out.
        memory: Whole number with unit K, M, G or T.
        signal_delay_s: Seconds before the limit at which Slurm tells the job to stop. Slurm may do it up to a minute
            early; the time must suffice to end a training step and to write a checkpoint.
        sbatch: Further options of sbatch, without the leading dashes; true for one without a value.
        setup: Shell lines run before Python. A line that fails does not end the job unless one says `set -e`.
        python: Shell command that starts a Python with speccert, None for the running interpreter.

    Raises:
        ConfigError: names every bad option in one line.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: int = 60
    cpus: int = 1
    memory: str | None = None
    gpus: int = 0
    parallelism: int | None = None
    cells_per_job: int | None = None
    cells_at_once: int = 1
    sbatch: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    setup: tuple[str, ...] = ()
    signal_delay_s: int = 90
    python: str | None = None
    max_requeues: int = 20

    def __post_init__(self) -> None:
        values = {key: _canonical(key, getattr(self, key)) for key in OPTIONS}
        problems = [
            f"{key} = {values[key]!r}: expected {text}" for key, (test, text) in _RULES.items() if not test(values[key])
        ]
        if problems := problems or _clashes(values):
            raise ConfigError("slurm: " + "; ".join(problems))
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> SlurmOptions:
        """Build from the keys of the `[slurm]` table; None stands for unset.

        Raises:
            ConfigError: names every unknown key, with close matches and all allowed keys, or every bad value.
        """
        if unknown := [key for key in mapping if key not in OPTIONS]:
            raise ConfigError(f"slurm: unknown option {_hints(unknown)}; allowed: {', '.join(OPTIONS)}")
        return cls(**{key: value for key, value in mapping.items() if value is not None})

    def chunk_size(self, cells: int, max_jobs: int) -> int:
        """Cells a job, so that `cells` of them fit into `max_jobs` jobs (by default into 200, if those fit).

        Raises:
            ConfigError: `cells_per_job` is set and would make more than `max_jobs` jobs.
        """
        if self.cells_per_job is None:
            return max(self.cells_at_once, math.ceil(cells / min(max_jobs, _USUAL_JOBS)))
        jobs = math.ceil(cells / self.cells_per_job)
        if jobs > max_jobs:
            raise ConfigError(
                f"slurm: cells_per_job = {self.cells_per_job}: {cells} cells make {jobs} jobs, the cluster takes "
                f"{max_jobs} in an array; raise cells_per_job to at least {math.ceil(cells / max_jobs)}"
            )
        return self.cells_per_job

    def job_memory(self) -> str | None:
        """Memory of a job in sbatch's form, None for the cluster's default."""
        return None if self.memory is None else f"{int(self.memory[:-1]) * self.cells_at_once}{self.memory[-1]}"

    def job_gpus(self, cells_per_gpu: int) -> int:
        """GPUs of a job whose cells share GPUs in groups of `cells_per_gpu`."""
        return math.ceil(self.cells_at_once / cells_per_gpu) * self.gpus


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` flags into what `SlurmOptions.from_mapping` takes.

    `sbatch.NAME=VALUE` (or `sbatch.NAME`, for an option without a value) sets a further option of sbatch; `setup=LINE`
    may be repeated.

    Raises:
        ConfigError: a text without `=` or key, or a key given twice.
    """
    found: dict[str, Any] = {}
    sbatch: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if key == "setup" and equals:
            found.setdefault("setup", []).append(value)
            continue
        further = key.startswith("sbatch.")
        target, name = (sbatch, key.removeprefix("sbatch.")) if further else (found, key)
        if not name or not (equals or further):
            raise ConfigError(f"slurm option {text!r}: expected KEY=VALUE, e.g. qos=long or sbatch.constraint=a100")
        if name in target:
            raise ConfigError(f"slurm option {key} is given twice, expected it once")
        target[name] = value in ("", "true") or value if further else _typed(key, value)
    return found | ({"sbatch": sbatch} if sbatch else {})


OPTIONS = tuple(field.name for field in dataclasses.fields(SlurmOptions))
_Rule: TypeAlias = tuple[Callable[[Any], bool], str]  # a test of a canonical value, and what it expects in words


_INTEGERS = {field.name for field in dataclasses.fields(SlurmOptions) if "int" in str(field.type).split(" | ")}


def _typed(key: str, text: str) -> str | int:
    return int(text) if key in _INTEGERS and re.fullmatch(r"-?\d+", text) else text


def _canonical(key: str, value: Any) -> Any:
    """The one form in which a good value is kept; a bad value stays as it came."""
    if key == "time":
        return _minutes(value)
    if key == "memory" and isinstance(value, str):
        return value.upper() if _SIZE.fullmatch(value.upper()) else value
    if key == "setup":
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    if key == "sbatch" and isinstance(value, Mapping):
        return {str(name).replace("_", "-"): option for name, option in value.items()}
    return value


def _minutes(value: Any) -> Any:
    """A time limit in minutes, rounded up as Slurm does."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\d+", value):
        return int(value)
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)
    return value


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def _is_sbatch(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        re.fullmatch(r"[a-z][a-z0-9-]+", name) and (option is True or _is_int(option, 0) or _is_line(option))
        for name, option in value.items()
    )


def _int(low: int) -> _Rule:
    return lambda value: _is_int(value, low), f"an integer >= {low}"


def _optional(rule: _Rule) -> _Rule:
    return lambda value: value is None or rule[0](value), rule[1] + ", or unset"


_NAME: _Rule = (lambda value: isinstance(value, str) and re.fullmatch(r"[^\s,=]+", value) is not None, "a name")
_RULES: dict[str, _Rule] = {
    "partition": _optional(
        (lambda v: isinstance(v, str) and re.fullmatch(r"[^\s,=]+(,[^\s,=]+)*", v) is not None, "a name")
    ),
    "account": _optional(_NAME),
    "qos": _optional(_NAME),
    "time": (lambda v: _is_int(v, 1), 'minutes >= 1, "HH:MM:SS" or "D-HH:MM:SS"'),
    "cpus": _int(1),
    "memory": _optional((lambda v: isinstance(v, str) and _SIZE.fullmatch(v) is not None, "a size such as 8G or 500M")),
    "gpus": _int(0),
    "parallelism": _optional(_int(1)),
    "cells_per_job": _optional(_int(1)),
    "cells_at_once": _int(1),
    "sbatch": (_is_sbatch, "a table of sbatch options, each a text, an integer >= 0 or true"),
    "setup": (lambda v: isinstance(v, tuple) and all(_is_line(line) for line in v), "a list of shell lines"),
    "signal_delay_s": _int(1),
    "python": _optional((_is_line, "a shell command")),
    "max_requeues": _int(0),
}


def _clashes(values: Mapping[str, Any]) -> list[str]:
    """One clause for each clash between good values."""
    found = []
    if managed := sorted(name for name in values["sbatch"] if name in _MANAGED):
        refused = ", ".join(sorted(_MANAGED))
        found.append(f"sbatch = {', '.join(managed)}: follows from the other options, expected none of {refused}")
    if values["signal_delay_s"] > 30 * values["time"]:
        limit = f"at most half of time = {values['time']} minutes, {30 * values['time']}"
        found.append(f"signal_delay_s = {values['signal_delay_s']}: expected {limit}")
    if values["cells_per_job"] is not None and values["cells_at_once"] > values["cells_per_job"]:
        limit = f"at most cells_per_job = {values['cells_per_job']}"
        found.append(f"cells_at_once = {values['cells_at_once']}: expected {limit}")
    return found


def _hints(unknown: Iterable[str]) -> str:
    close = ((key, difflib.get_close_matches(key, OPTIONS, n=2)) for key in unknown)
    return ", ".join(repr(key) + (f" (did you mean {' or '.join(names)}?)" if names else "") for key, names in close)

"""What every benchmark shares: the machine's line, timing in turn, and Markdown tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tabulate import tabulate

THREADS = 1


def start(title: str) -> None:
    """Set the number of threads and print the benchmark's title with the machine that it runs on."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(f"## {title}\n\nMachine: {machine()}.\n")


def machine() -> str:
    """CPU model, cores, threads in use and the versions that matter; no host name."""
    cores = len(_cpuinfo("processor")) or "unknown number of"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{_cpu_model()}, {cores} cores, {torch.get_num_threads()} thread in use, {versions}"


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == key]


def _cpu_model() -> str:
    return next(iter(_cpuinfo("model name")), platform.processor() or "unknown CPU")


def times_in_turn(jobs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of CPU time of each job, one a round; all jobs run once a round, so that other load meets all alike.

    With one thread the CPU time of the process is the wall time of an idle machine; waiting for a core does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(warm_up + rounds):
        for name, job in jobs.items():
            begin = time.process_time()
            job()
            if number >= warm_up:
                seconds[name].append(time.process_time() - begin)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of one job's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, for a table."""
    return f"{1000 * statistics.median(seconds):.1f}"


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows as a Markdown table; the values are shown as they are given."""
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) + "\n", flush=True)

"""What a study of many tiny cells costs beyond its cells, on the local executor and on Slurm, and to look at it.

    python study_overhead.py [--cells 2000] [--folder DIR] [local] [slurm]

Overhead a cell: (wall time of `certify run` x cells at once - sum of the cells' own times) / cells. The wall time holds
everything: imports, start of the workers, leases, files, the queue, tables and pictures. A cell's own time is `cell_s`
of its summary. Slurm is left out where none answers; its jobs hold a quarter of the cells each, two at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import show, start

WORKERS = 2
CERTIFY = [sys.executable, "-c", "from speccert.cli import main; main()"]
TINY = [
    *("--width", "8", "--epochs", "1", "--train-samples", "100", "--test-samples", "20"),
    *("--attack-samples", "5", "--attacks", "fgsm", "--loss", "cross-entropy", "--thresholds", "1"),
]


def certify(*arguments: str | Path) -> float:
    """Wall seconds of a command."""
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*CERTIFY, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begin


def flags(executor: str, cells: int) -> list[str]:
    if executor == "local":
        return ["--executor", "local", "--jobs", str(WORKERS)]
    options = ["memory=1500M", f"cells_per_job={-(-cells // 4)}", f"parallelism={WORKERS}"]
    return ["--executor", "slurm", *(part for option in options for part in ("--slurm", option))]


def rows(executors: list[str], cells: int, folder: Path) -> Iterator[dict[str, str]]:
    seeds = ",".join(map(str, range(cells)))
    for executor in executors:
        output = folder / executor
        command: list[str | Path] = ["run", "-o", output, *TINY, "--seeds", seeds, *flags(executor, cells)]
        wall = certify(*command)
        own = sum(json.loads(path.read_text())["cell_s"] for path in output.glob("*/summary.json"))
        yield {
            "executor": executor,
            "cells": str(len(list(output.glob("*/summary.json")))),
            "wall, s": f"{wall:.1f}",
            "a cell's own time, s": f"{own / cells:.3f}",
            "overhead a cell, s": f"{(wall * WORKERS - own) / cells:.3f}",
            "certify status, s": f"{certify('status', output):.2f}",
            "certify table, s": f"{certify('table', output):.2f}",
            "certify run again, s": f"{certify(*command):.1f}",
        }


def has_slurm() -> bool:
    try:
        return subprocess.run(["sinfo", "-h"], capture_output=True, timeout=5).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("executors", nargs="*", help="local, slurm; both where not given")
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="empty; on a file system that the Slurm nodes share")
    given = parser.parse_args()
    executors = given.executors or ["local", *(["slurm"] if has_slurm() else [])]
    start("Overhead of a study of many tiny cells")
    with tempfile.TemporaryDirectory() as temporary:
        show(list(rows(executors, given.cells, given.folder or Path(temporary))))


if __name__ == "__main__":
    main()

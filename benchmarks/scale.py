"""What the size of a study costs: index, status and table of N finished cells, and file-system operations a cell.

    python benchmarks/scale.py [CELLS ...]

Finished cells are copies of one real cell under other seeds. File-system calls are counted with strace, as the
difference between runs of 40 and of 20 cells and between 11 epochs and 1, so that start-up does not count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import show, start

from speccert.experiments.config import config_id
from speccert.experiments.spec import RunSpec
from speccert.experiments.study import write_plan

TINY = {
    "width": 8,
    "epochs": 1,
    "train_samples": 100,
    "test_samples": 20,
    "attack_samples": 5,
    "attacks": ["fgsm"],
    "threshold": 1.0,
}
CERTIFY = [sys.executable, "-c", "from speccert.cli import main; main()"]
KINDS = {
    "look-ups (stat, access, readlink)": r"stat|statx|newfstatat|access|faccessat2?|readlink(at)?",
    "opens": r"open(at)?",
    "of these, creations": r"create",
    "renames and removals": r"rename(at2?)?|unlink(at)?",
    "folders made or listed": r"mkdir(at)?|getdents64",
    "flushes to disk": r"fsync|fdatasync",
}


def seconds(*arguments: str | Path) -> float:
    """Wall time of a whole command."""
    begin = time.perf_counter()
    subprocess.run([*CERTIFY, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def real_cell(folder: Path) -> dict[str, object]:
    flags = [f"--{key.replace('_', '-')}={','.join(v) if isinstance(v, list) else v}" for key, v in TINY.items()]
    seconds("run", "-o", folder, "--executor", "inline", *flags)
    summary: dict[str, object] = json.loads(next(folder.glob("*/summary.json")).read_text())
    return summary


def populate(folder: Path, summary: dict[str, object], count: int) -> None:
    """`count` finished cells, as far as the index and the table look."""
    cells = RunSpec.from_mapping({**TINY, "seed": list(range(count))}).cells()
    for cell in cells:
        run = folder / config_id(cell)
        run.mkdir(parents=True)
        (run / "config.json").write_text(cell.to_json())
        (run / "summary.json").write_text(json.dumps({**summary, "id": run.name, "seed": cell.seed}, indent=2))
    write_plan(folder, cells)


def sizes(counts: list[int], scratch: Path) -> None:
    summary = real_cell(scratch / "one")
    rows = []
    for count in counts:
        folder = scratch / f"study-{count}"
        populate(folder, summary, count)
        first = seconds("status", folder)
        index = folder / "index.parquet"
        rows.append(
            {
                "finished cells": count,
                "index built by the first status, s": f"{first:.2f}",
                "index, MB": f"{index.stat().st_size / 1e6:.2f}",
                "status, s": f"{min(seconds('status', folder) for _ in range(3)):.2f}",
                "table, s": f"{min(seconds('table', folder, '--file', scratch / 'table.csv') for _ in range(3)):.2f}",
            }
        )
        shutil.rmtree(folder)
    show(rows)


def traced(folder: Path, count: int, epochs: int = 1) -> Counter[str]:
    """System calls of one worker on `count` cells that name a run folder or a file in one."""
    log = folder.with_suffix(".strace")
    calls = (
        "openat,open,stat,statx,newfstatat,access,faccessat,faccessat2,readlink,readlinkat,rename,renameat,renameat2"
    )
    calls += ",unlink,unlinkat,mkdir,mkdirat,getdents64,fsync,fdatasync"
    flags = [f"--{key.replace('_', '-')}={','.join(v) if isinstance(v, list) else v}" for key, v in TINY.items()]
    flags += [f"--epochs={epochs}", f"--seeds={','.join(map(str, range(count)))}"]
    command = [*CERTIFY, "run", "-o", str(folder), "--jobs=1", *flags]
    subprocess.run(
        ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(log), *command], check=True, stdout=subprocess.DEVNULL
    )
    found: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)", line)
        if match and re.search(re.escape(str(folder)) + r"/[0-9a-f]{12}", match[2]):
            found[match[1]] += 1
            found["create"] += "O_CREAT" in match[2]
    return found


def operations(scratch: Path) -> None:
    if shutil.which("strace") is None:
        print("strace is not installed: file-system operations were not counted.\n")
        return
    few, many, long = traced(scratch / "few", 20), traced(scratch / "many", 40), traced(scratch / "long", 20, epochs=11)
    rows = []
    for kind, pattern in KINDS.items():
        counts = [sum(found[call] for call in found if re.fullmatch(pattern, call)) for found in (few, many, long)]
        cell, epoch = (counts[1] - counts[0]) / 20, (counts[2] - counts[0]) / 200
        rows.append(
            {"file-system calls in a run folder": kind, "a cell of one epoch": cell, "each further epoch": epoch}
        )
    show([{key: value if key.startswith("file") else f"{value:.1f}" for key, value in row.items()} for row in rows])


def main() -> None:
    start("Size of a study")
    counts = [int(text) for text in sys.argv[1:]] or [2000, 20000, 100000]
    with tempfile.TemporaryDirectory(dir=os.environ.get("SPECCERT_SCRATCH")) as scratch:
        operations(Path(scratch))
        sizes(counts, Path(scratch))


if __name__ == "__main__":
    main()

"""Free memory of a device, in bytes."""

import os
from pathlib import Path

import torch

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> float:
    """Return the bytes that can still be allocated on `device`; infinity where nothing tells.

    On a GPU: what the driver has free and what torch has reserved but does not use. Otherwise: what the system calls
    available, or less where a control group, in which containers and cluster jobs run, allows less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([_system(), *_groups()])


def _system() -> float:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else torch.inf
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest}
    return 1024.0 * sizes.get("MemAvailable", sizes["MemFree"])


def _groups() -> list[float]:
    """Return what each control group of this process, and each group around it, has left."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _climb(_CGROUPS, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            left += _climb(_CGROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return left


def _climb(root: Path, path: str, limit: str, usage: str) -> list[float]:
    """Return limit - usage of the group at `path` and of all above it that can be seen from here."""
    left = []
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        if root not in (group, *group.parents):
            break
        try:
            most, used = (group / limit).read_text().strip(), float((group / usage).read_text())
        except (OSError, ValueError):
            continue
        if most != "max":
            left.append(max(0.0, float(most) - used + _reclaimable(group)))
    return left


def _reclaimable(group: Path) -> float:
    """Return the bytes of the page cache that the group's usage counts, but that the kernel gives back when needed."""
    try:
        rows = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0.0
    sizes = {row[0]: float(row[1]) for row in rows if len(row) == 2}
    return sizes.get("total_inactive_file", sizes.get("inactive_file", 0.0))

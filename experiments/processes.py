"""Which process is which: told apart across machines, containers, reboots, reused ids and requeued Slurm jobs."""

from __future__ import annotations

import functools
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["is_process", "is_requeued", "this_process"]


def this_process() -> dict[str, Any]:
    """What tells this process from all others, in plain values: host, machine, pid, start, Slurm job and restarts."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "start": _started(pid), **_slurm_job()}


def is_process(content: Mapping[str, Any]) -> bool | None:
    """Whether a process, as `this_process` described it, is alive; None where it can't be told from here."""
    pid, start = content.get("pid"), content.get("start")
    if content.get("machine") != _machine() or type(pid) is not int or pid < 1:
        return None
    found = _started(pid)
    if found is not None:
        return None if start is None else found == start
    return None if _exists(pid) else False


def is_requeued(content: Mapping[str, Any]) -> bool:
    """Whether a process belonged to this very Slurm job before it was requeued, which ended it."""
    job = _slurm_job()
    restarts = content.get("restarts")
    return (
        bool(job["job"]) and content.get("job") == job["job"] and type(restarts) is int and restarts < job["restarts"]
    )


@functools.cache
def _machine() -> str:
    """Names the set of processes that this one can see: a boot of a host, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _slurm_job() -> dict[str, Any]:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return {"job": job, "restarts": int(restarts) if restarts.isdecimal() else 0}


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, "" if it is a zombie; None where that can't be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Whether there is a process of this id: of another user where /proc hides those, or on a system without /proc."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True

"""The files of leases: created by one process only, rewritten in place, and aged by the clock that stamps them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Content", "clock", "create", "lease_numbers", "lease_path", "read", "rewrite"]

Content = dict[str, Any]
_NAME = re.compile(r"lease\.([1-9]\d*)", re.ASCII)
_SIZE = 2048  # bytes; always the same, so that a lease is rewritten in place, at once, and on a full disk
_clocks: dict[Path, tuple[float, float]] = {}  # of each study: when it was asked, and what it said


def lease_path(folder: Path, number: int) -> Path:
    """The file of one number."""
    return folder / f"lease.{number}"


def lease_numbers(folder: Path) -> list[int]:
    """The numbers of all leases in a folder, in any order; none where there is no folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def create(path: Path, content: Mapping[str, Any]) -> bool:
    """Make a lease file; whether nobody was faster. Raises OSError, and leaves no file, where it can't be written."""
    try:
        file = path.open("xb", buffering=0)
    except FileExistsError:
        return False
    try:
        with file:
            if file.write(_encoded(content)) < _SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except BaseException:
        path.unlink(missing_ok=True)  # or nobody could take the cell for a while
        raise
    return True


def _encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).ljust(_SIZE).encode()


def _decoded(text: bytes) -> Content:
    """Empty where it is being written, or was written by a process that died of it."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read(path: Path) -> tuple[Content, float | None]:
    """What a lease says, and when it was written; empty and None where it is gone."""
    try:
        with path.open("rb", buffering=0) as file:
            return _decoded(file.read()), os.fstat(file.fileno()).st_mtime
    except OSError:
        return {}, None


def rewrite(path: Path, key: str | None, content: Mapping[str, Any]) -> bool:
    """Replace the content of a lease with this key in place, so that one that was removed does not come back.

    Returns:
        Whether no error was in the way; one with another key, or that was taken over, is left as it is.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            old = _decoded(file.read())
            if old.get("key") != key or "taken" in old:
                return True
            try:
                file.seek(0)
                file.write(_encoded(content))
            except OSError:
                os.utime(file.fileno())  # no space, even in place: but alive
                return False
    except FileNotFoundError:
        return True
    except OSError:  # a server away: the next beat may pass
        return False
    return True


def clock(folder: Path, max_age_s: float) -> float:
    """The time by the clock that stamps files, asked no longer ago than `max_age_s`, in this study."""
    asked, said = _clocks.get(folder.parent, (-math.inf, 0.0))
    if time.monotonic() - asked >= max_age_s:
        asked, said = time.monotonic(), _asked_clock(folder)
        _clocks[folder.parent] = asked, said
    return said + time.monotonic() - asked


def _asked_clock(folder: Path) -> float:
    probe = folder / f".probe.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # read-only for this user, full, or gone: the local clock must do
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)

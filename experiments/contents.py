"""Content of the files and modules that a config names: its id covers their names only."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from pathlib import Path

from .config import CellConfig, ConfigError

__all__ = ["check_contents", "content_digest", "contents_digest"]

_LOCATION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
_KEYS = ("dataset", "model", "checkpoint")


def content_digest(name: str | None) -> str | None:
    """First 16 hex digits of the SHA-256 of what a setting names; None where it names no file of the user.

    Args:
        name: a path (of an .npz file, of a checkpoint), or module:function, for which the module's source counts.
    """
    path = _file_of(name)
    return None if path is None else _file_digest(path)


def _file_digest(path: Path) -> str | None:
    path = path.absolute()
    try:
        found = path.stat()
        return _digest(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    except OSError:
        return None  # missing: whoever reads it says so better


@functools.lru_cache(maxsize=64)  # asked once a cell; the stamps tell a changed file
def _digest(path: Path, stamps: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def contents_digest(config: CellConfig) -> str | None:
    """What a cell is computed from beyond its settings, as "dataset=DIGEST model=DIGEST checkpoint=DIGEST".

    Only those of the three that name a file or a module are in it; None where none does.
    """
    return " ".join(f"{key}={digest}" for key, digest in _digests(config).items()) or None


def check_contents(config: CellConfig, recorded: object, folder: Path) -> None:
    """Refuse a finished cell that was computed from other content than its names have now.

    What is missing by now is not held against it.

    Args:
        config: of the cell.
        recorded: `contents_digest` when it was computed.
        folder: its run folder, for the message.

    Raises:
        ConfigError: the content differs.
    """
    now = _digests(config)
    before = dict(part.split("=", 1) for part in str(recorded or "").split() if "=" in part)
    changed = [f"{key} {getattr(config, key)}" for key in now if key in before and before[key] != now[key]]
    if changed:
        raise ConfigError(
            f"{folder}: computed from other content of {', '.join(changed)}; give changed content a new name, or "
            "delete the folder"
        )


def _digests(config: CellConfig) -> dict[str, str]:
    found = {key: content_digest(getattr(config, key)) for key in _KEYS[:2]}
    found["checkpoint"] = None if config.checkpoint is None else _file_digest(Path(config.checkpoint))
    return {key: digest for key, digest in found.items() if digest is not None}


def _file_of(name: str | None) -> Path | None:
    if name is None:
        return None
    if (match := _LOCATION.fullmatch(name)) is None:
        return Path(name) if "." in name or "/" in name else None
    try:
        spec = importlib.util.find_spec(match[1])
    except Exception:  # any: finding a module runs its packages; whoever imports it says what is wrong
        return None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None

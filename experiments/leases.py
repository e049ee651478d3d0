"""Who works on a cell: a lease in its folder, kept alive by its owner and lost by a dead one.

A lease is a file `lease.N`. The one with the highest N counts. To take a cell, a process

1. lists the folder and reads the highest lease, `lease.N` (N = 0: there is none); it stops where the owner is live;
2. creates `lease.N+1`, which the file system lets one process do (also NFS since version 3);
3. lists and reads again: where the two highest are not its own and the very `lease.N` it saw, it withdraws;
4. asks whether the cell is finished (its caller does), and only then works on it.

The owner of a finished cell removes the leases from the lowest up to its own, after the summary was written; one that
fails or is stopped marks its own as released. So two never own one cell: of those that saw the same N, one creates
N+1; who saw an older N finds N+1 taken; and who was so slow that the cell was finished meanwhile and its numbers are
given anew finds at step 3 that the lease he saw is gone, or at step 4 the summary.

An owner is dead when its process is (seen on its own machine), when its Slurm job was requeued, or when its lease was
not rewritten for `LEASE_S` seconds by the clock that stamps files, which on NFS is the server's. The last is a guess:
an owner may have been stopped, or cut off. Therefore it asks before whatever it writes whether its lease is still the
highest, and its own (`Lease.check`). A stop between that question and the write remains: it costs the time of one
cell, and puts a whole file in place of a whole file of the same config.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .lease_files import Content, clock, create, lease_numbers, lease_path, read, rewrite
from .processes import is_process, is_requeued, this_process
from .store import StoreError

__all__ = ["BEAT_S", "LEASE_S", "CancelledRunError", "Lease", "LeaseLostError", "LeaseState", "claim", "read_lease"]

BEAT_S = 10.0
LEASE_S = 60.0
_STAGE_LENGTH = 400
_CLOCK_S = 10.0


class LeaseLostError(RuntimeError):
    """Another process has taken this cell over, since this one seemed dead; or its folder was deleted."""


class CancelledRunError(RuntimeError):
    """`certify cancel` ended the run."""


@dataclass(frozen=True)
class LeaseState:
    """What the highest lease of a cell says.

    Attributes:
        number: N of `lease.N`, 0 where there is none.
        live: whether its owner works on the cell.
        content: what the owner wrote; empty where it could not be read.
    """

    number: int
    live: bool
    content: Mapping[str, Any]

    @property
    def owner(self) -> str:
        """The owner in words."""
        job = f" (Slurm job {self.content['job']})" if self.content.get("job") else ""
        return f"process {self.content.get('pid', '?')} on {self.content.get('host', '?')}{job}"


def read_lease(folder: Path) -> LeaseState:
    """The highest lease of a run folder; a missing folder has none."""
    number = max(lease_numbers(folder), default=0)
    if not number:
        return LeaseState(0, False, {})
    content, written = read(lease_path(folder, number))
    return LeaseState(number, _is_live(folder, content, written), content)


class Lease:
    """A cell held by this process; use it in a `with` statement.

    Args:
        folder: the run folder.
        number: N of the lease file, which has been created.
        content: what is in it.
        is_cancelled: asked at every `check`.
    """

    def __init__(self, folder: Path, number: int, content: Content, is_cancelled: Callable[[], bool]) -> None:
        self.number = number
        self._folder, self._path = folder, lease_path(folder, number)
        self._content, self._is_cancelled = content, is_cancelled
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._is_finished = False

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go: the cell is finished (the leases are removed) or free for the next owner."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a lease that can't be marked ends with its process
            if self._is_finished:
                self._remove()
            elif not self._write({"state": "released"}):
                self._withdraw()

    def progress(self, stage: str, fraction: float) -> None:
        """Note where the cell stands; others read it at the next beat."""
        with self._lock:
            self._content |= {"stage": stage[:_STAGE_LENGTH], "fraction": fraction}
            if fraction > 0 and "first" not in self._content:
                self._content |= {"first": fraction, "first_s": self._elapsed_s}

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            LeaseLostError: the cell has another owner by now, or its folder is gone.
            CancelledRunError: the run was cancelled.
        """
        if not self._is_mine or max(lease_numbers(self._folder), default=0) != self.number:
            raise LeaseLostError(f"{self._folder}: taken over by another process, or deleted")
        if self._is_cancelled():
            raise CancelledRunError("cancelled")

    def finish(self) -> None:
        """The cell's summary is written: no lease is needed any more."""
        self._is_finished = True

    def stuck_stage(self, times: int) -> str | None:
        """Where the last `times` owners all died without a whole epoch between them; None if they did not.

        Such a cell would kill this owner too: it takes more memory than there is, or an epoch more time than a job has.
        """
        numbers = range(max(1, self.number - times), self.number)
        contents = [read(lease_path(self._folder, number))[0] for number in numbers]
        if len(contents) < times or any(content.get("state") != "held" for content in contents):
            return None
        if any(content.get("resume") != self._content["resume"] for content in contents):
            return None
        return str(contents[-1].get("stage"))

    @property
    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._start, 1)

    @property
    def _is_mine(self) -> bool:
        """Whether the file is still the one that this owner created, and nobody has written into it that it is lost."""
        with self._lock:
            content, _ = read(self._path)
        return content.get("key") == self._content["key"] and "taken" not in content

    def _follows(self, found: LeaseState) -> bool:
        """Whether this lease took the cell over from the one that was found, and not from a later one of its number.

        The one that was found is marked as taken: its owner, should it live, sees that at once, while its listing of
        the folder may be a minute old on NFS.
        """
        if sorted((0, *lease_numbers(self._folder)))[-2:] != [found.number, self.number] or not self._is_mine:
            return False
        if found.number == 0:
            return True
        path, key = lease_path(self._folder, found.number), found.content.get("key")
        rewrite(path, key, {**found.content, "taken": True})
        return read(path)[0].get("key") == key

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._write()

    def _write(self, changes: Mapping[str, Any] | None = None) -> bool:
        """Rewrite the file where it is there and mine; whether it was not kept from that by an error."""
        with self._lock:
            self._content |= {"elapsed_s": self._elapsed_s, **(changes or {})}
            return rewrite(self._path, self._content["key"], self._content)

    def _withdraw(self) -> None:
        if self._is_mine:
            self._path.unlink(missing_ok=True)

    def _remove(self) -> None:
        if self._is_mine:
            for number in sorted(lease_numbers(self._folder)):  # upwards: mine is the highest to the end
                if number <= self.number:
                    lease_path(self._folder, number).unlink(missing_ok=True)


def claim(folder: Path, token: str, is_cancelled: Callable[[], bool] = lambda: False) -> Lease | LeaseState:
    """Take a cell for this process, or say who has it.

    Whether the cell is finished must be asked after the claim: the last owner may have ended just before it.

    Args:
        folder: the run folder, made if missing.
        token: of the run that this process belongs to.
        is_cancelled: asked at every `Lease.check`.

    Returns:
        The lease, or the state of the one that is in the way; it may not be live any more.

    Raises:
        StoreError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = read_lease(folder)
        if found.live:
            return found
        lease = _create(folder, found.number + 1, token, is_cancelled)
        if lease is None:
            return read_lease(folder)
        if not lease._follows(found):
            lease._withdraw()
            return read_lease(folder)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be claimed ({error.strerror or error})") from error
    return lease


def _create(folder: Path, number: int, token: str, is_cancelled: Callable[[], bool]) -> Lease | None:
    """A new lease; None where somebody else was faster."""
    content = {
        "key": uuid.uuid4().hex,
        **this_process(),
        "token": token,
        "state": "held",
        "stage": "starting",
        "fraction": 0.0,
        "resume": _resume_stamp(folder),
    }
    return Lease(folder, number, content, is_cancelled) if create(lease_path(folder, number), content) else None


def _resume_stamp(folder: Path) -> int | None:
    """Changes with every epoch that is kept."""
    try:
        return (folder / "resume.pt").stat().st_mtime_ns
    except OSError:
        return None


def _is_live(folder: Path, content: Mapping[str, Any], written: float | None) -> bool:
    if content.get("state") == "released" or "taken" in content:
        return False
    alive = is_process(content)
    if alive is not None:
        return alive
    if is_requeued(content):
        return False
    if written is None:
        return True  # gone since it was listed: somebody is at work
    # the cached clock may say that it is alive; that it is dead only the clock itself
    return any(abs(clock(folder, max_age_s) - written) < LEASE_S for max_age_s in (_CLOCK_S, 0.0))

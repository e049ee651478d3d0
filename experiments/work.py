"""One cell as a worker runs it: claimed, logged, its error kept, and let go for the next owner."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from .cell import Progress, run_cell
from .config import CellConfig, config_id
from .distributed import RankDiedError
from .evaluation import CertificateViolationError
from .execution import Execution
from .index import read_failure
from .leases import CancelledRunError, Lease, LeaseLostError, LeaseState, claim, read_lease
from .store import RunFolder, StoreError, write_atomic

__all__ = ["Finished", "is_fatal", "recalled", "work"]

_ATTEMPTS = 3  # owners that may die without a whole epoch between them
_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENODEV),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY),
}
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Finished:
    """The end of one cell here.

    Attributes:
        id: of the cell.
        summary: its results, where it is finished.
        error: what ended it.
        held: who else works on it.
    """

    id: str
    summary: dict[str, Any] | None = None
    error: Exception | None = None
    held: str | None = None


def is_fatal(error: Exception) -> bool:
    """Whether an error ends the whole run: a broken certificate means that no other number can be trusted."""
    return isinstance(error, CertificateViolationError)


def recalled(failure: Mapping[str, Any]) -> Exception:
    """The error that `failed.json` keeps; it ends the whole run again if it did then."""
    kind = CertificateViolationError.__name__
    text = str(failure["error"])
    return CertificateViolationError(text, {}) if failure.get("kind") == kind else RuntimeError(text)


def work(cell: CellConfig, execution: Execution, report: Report = lambda progress: None) -> Finished:
    """Run a cell unless it is finished, or somebody else has it, or it has failed in this very run.

    The error of a cell that would fail again is kept in `failed.json`; one of the machine (a full disk, a killed
    process) is not: the cell goes on when it is run the next time.
    """
    identity, folder = config_id(cell), RunFolder.of(execution.output, cell)
    try:
        lease = claim(folder.path, execution.token, execution.cancel_path.exists)
    except StoreError as error:
        return Finished(identity, error=error)
    if isinstance(lease, LeaseState):
        return Finished(identity, held=lease.owner)
    with lease, _threads(execution.threads):
        if folder.is_finished:
            lease.finish()
            return Finished(identity, summary=folder.read_summary())
        failure = read_failure(folder)
        if failure is not None and failure.get("token") == execution.token:  # a requeued job comes by again
            return Finished(identity, error=recalled(failure))
        return _ended(folder, lease, cell, execution, report)


def _ended(folder: RunFolder, lease: Lease, cell: CellConfig, execution: Execution, report: Report) -> Finished:
    try:
        lease.check()
        with _Log.open(folder) as log:
            summary = _computed(folder, lease, log, cell, execution, report)
    except CancelledRunError as error:
        return Finished(folder.id, error=error)
    except Exception as error:  # any, as the user's own model may raise any: kept, told, and no other cell suffers
        if _is_lost(lease, error):
            return Finished(folder.id, held=read_lease(folder.path).owner)
        if not _is_of_the_machine(error):
            with contextlib.suppress(StoreError):  # the error itself is what matters
                _keep(folder, error, execution.token)
        return Finished(folder.id, error=error)
    lease.finish()
    return Finished(folder.id, summary=summary)


def _computed(
    folder: RunFolder, lease: Lease, log: _Log, cell: CellConfig, execution: Execution, report: Report
) -> dict[str, Any]:
    def advance(progress: Progress) -> None:
        lease.check()
        lease.progress(progress.stage, progress.fraction)
        log.line(progress.stage)
        report(progress)

    stage = lease.stuck_stage(_ATTEMPTS)
    if stage is not None:
        raise RuntimeError(
            f"{_ATTEMPTS} workers died one after the other ({stage}) without a whole epoch between them: "
            "out of memory, or an epoch longer than the time limit?"
        )
    folder.failure_path.unlink(missing_ok=True)
    try:
        return run_cell(cell, execution, report=advance)
    except SystemExit as error:  # of the user's own code, and no reason to end a worker with its other cells
        raise RuntimeError(f"the model or the data set called sys.exit({error.code!r})") from error


def _is_lost(lease: Lease, error: Exception) -> bool:
    """Whether another process has the cell by now: what went wrong here does not count then."""
    if isinstance(error, LeaseLostError):
        return True
    try:
        lease.check()
    except LeaseLostError:
        return True
    except (CancelledRunError, OSError):
        return False
    return False


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says nothing about the cell: a full disk, a killed process."""
    while error is not None:
        if isinstance(error, RankDiedError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
            return True
        error = error.__cause__
    return False


def _keep(folder: RunFolder, error: Exception, token: str) -> None:
    content = {
        "error": _one_line(error),
        "kind": type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
        "time": _now(),
        "host": socket.gethostname(),
        "token": token,
    }
    write_atomic(folder.failure_path, (json.dumps(content, indent=2) + "\n").encode())


def _one_line(error: Exception) -> str:
    try:
        return " ".join(str(error).split()) or type(error).__name__
    except Exception:  # any: the text of a user's error may itself be faulty
        return type(error).__name__


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Log:
    """The log of a cell: a line an event, each with its time; kept over all attempts."""

    file: BinaryIO

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: RunFolder) -> Iterator[_Log]:
        with folder.log_path.open("ab", buffering=0) as file:
            job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
            log = cls(file)
            log.line(f"begins in process {os.getpid()} on {socket.gethostname()}{job}")
            try:
                yield log
            except Exception as error:
                log.line(f"ended by {type(error).__name__}\n{''.join(traceback.format_exception(error))}")
                raise
            except BaseException:
                log.line("stopped from outside")
                raise
            log.line("finished")

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the log is not what matters
            self.file.write(f"{_now()}  {text.rstrip()}\n".encode(errors="backslashreplace"))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

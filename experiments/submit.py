"""Slurm: submit the chunks of a study as one job array through submitit, ask for their states, cancel them.

The only file that knows submitit and Slurm's commands. No job's result is read back: what a job did is in the store.

A job needs from its environment only what sbatch gives to it (its `SLURM_*` variables), a Python that imports speccert
and submitit at the same path on every node (`SlurmOptions.python`), and the study's folder on a shared file system.
Variables of the submitting shell reach it where sbatch exports them, which is its default.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .config import ConfigError
from .slurm_options import SlurmOptions

if TYPE_CHECKING:
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

__all__ = ["Job", "SlurmError", "cancel", "check_cluster", "log_paths", "outcome", "states", "submit"]

GONE = "GONE"  # our name for a job that Slurm has forgotten; it keeps ended jobs for some minutes (MinJobAge)
_DONE = {"COMPLETED"}
_CANCELLED = {"CANCELLED", "REVOKED"}
# PREEMPTED is how a job ends where preemption cancels; where it requeues, the job is PENDING again
_FAILED = {"BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
_PATIENCE_S = 90  # the commands themselves retry for about a minute where the controller does not answer
_IDS_A_CALL = 1000
_IN_JOBS = re.compile(r"SLURM_(?!CONF$)|SLURMD_|SUBMITIT_")

Outcome = Literal["alive", "done", "failed", "cancelled", "gone"]


class SlurmError(RuntimeError):
    """A Slurm command that failed; often Slurm is only busy or restarting, and it works when tried again."""


class Job:
    """The task of one job: run the cells of a chunk file. Pickled by submitit, so it holds nothing but strings.

    Args:
        chunk: Path of the chunk file.
        module: Name of the module whose `run_chunk(path)` runs it and whose `stop()` ends what that started.
    """

    def __init__(self, chunk: str, module: str) -> None:
        self.chunk = chunk
        self.module = module

    def __call__(self) -> None:
        """Run the chunk. Cells that are done are skipped, so that running it again goes on where it was."""
        importlib.import_module(self.module).run_chunk(self.chunk)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues when the job is preempted or near its time limit: the same task again."""
        from submitit.helpers import DelayedSubmission

        if self.module in sys.modules:
            sys.modules[self.module].stop()
        return DelayedSubmission(self)


_CHUNKS = f"{__package__}.chunks"


def submit(
    folder: Path,
    options: SlurmOptions,
    chunks: Sequence[Path],
    *,
    cells_per_gpu: int = 1,
    name: str = "speccert",
    module: str = _CHUNKS,
) -> list[str]:
    """Submit one job a chunk file, as one array; returns the ids of the jobs, in the order of the chunks.

    Args:
        folder: Where scripts, pickled tasks and logs go, named by job id; on a file system that all nodes share.
        cells_per_gpu: Cells that share a GPU, or a group of `options.gpus` GPUs.
        name: Name of the jobs in squeue.
        module: See `Job`.

    Raises:
        ConfigError: submitit or Slurm is missing, or the folder's path has a percent sign.
        SlurmError: sbatch refused, with its reason.
    """
    if not chunks:
        return []
    executor = _executor(folder, _parameters(options, len(chunks), cells_per_gpu, name), options)
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    tasks = [Job(str(chunk.absolute()), module) for chunk in chunks]
    try:
        with _as_outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
            return [job.job_id for job in executor.submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch: {_one_line(str(error))}") from error


def check_cluster(options: SlurmOptions, cells: int, *, cells_per_gpu: int = 1) -> int:
    """Hold the options against the real cluster, without submitting anything; returns the cells a job.

    Raises:
        ConfigError: no Slurm here, an unknown partition, a time over its limit, more jobs than an array may have, or
            what `sbatch --test-only` says of the very script that would be submitted (account, qos, sizes, ...).
    """
    try:
        partitions = _check_partitions(options)
        size = options.chunk_size(cells, _max_array_size())
    except SlurmError as error:
        raise ConfigError(f"executor slurm: expected a Slurm that answers: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        jobs = math.ceil(cells / size)
        executor = _executor(Path(folder), _parameters(options, jobs, cells_per_gpu, "speccert"), options)
        script = Path(folder, "test.sh")
        script.write_text(_script(executor, jobs), encoding="utf-8")
        try:
            _call("sbatch", "--test-only", str(script))
        except SlurmError as error:
            # said of sizes that no node has, but also while nodes that have them are down: then sbatch may well accept
            if not ("node configuration is not available" in str(error) and any(part.is_down for part in partitions)):
                raise ConfigError(f"slurm: {error}") from error
    return size


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """Slurm's state of each job (`PENDING`, `RUNNING`, `COMPLETED`, ...), by one call of squeue for all.

    Jobs that Slurm has forgotten are looked up in its accounting, and are "GONE" where there is none.

    Raises:
        SlurmError: squeue failed.
    """
    wanted = list(job_ids)
    found = dict.fromkeys(wanted, GONE)
    if not wanted:
        return found
    _update(found, _squeue(wanted))
    if gone := [job for job, state in found.items() if state == GONE]:
        with contextlib.suppress(SlurmError):  # a cluster without accounting
            _update(found, _call("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(_arrays(gone))))
    return found


def outcome(state: str) -> Outcome:
    """What a state says: "alive" (waiting, running, or one this version does not know), or how the job ended.

    "done" says only that the job's process ended well; "gone" that Slurm has forgotten it. The store knows the cells.
    """
    if state in _DONE:
        return "done"
    if state in _FAILED:
        return "failed"
    if state in _CANCELLED:
        return "cancelled"
    return "gone" if state == GONE else "alive"


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs, also running ones; those that have ended or are unknown are left out in silence.

    Raises:
        SlurmError: scancel failed.
    """
    ids = list(job_ids)
    for start in range(0, len(ids), _IDS_A_CALL):
        _call("scancel", "--quiet", *ids[start : start + _IDS_A_CALL])


def log_paths(folder: Path, job_id: str) -> tuple[Path, Path]:
    """Where the standard output and the standard error of a job go; a requeued job appends."""
    return folder / f"{job_id}_0_log.out", folder / f"{job_id}_0_log.err"


def _parameters(options: SlurmOptions, jobs: int, cells_per_gpu: int, name: str) -> dict[str, Any]:
    """The options in submitit's words; it leaves out what is None."""
    cpus = options.cpus * options.cells_at_once
    return {
        "job_name": name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "mem": options.job_memory(),
        "gpus_per_node": options.job_gpus(cells_per_gpu) or None,
        "array_parallelism": options.parallelism or jobs,
        "signal_delay_s": options.signal_delay_s,
        "setup": list(options.setup) or None,
        "wckey": None,  # submitit's own key is refused where a cluster checks them
        # a step inherits neither the CPUs (since Slurm 22.05) nor, after --export=NONE, the environment of its script
        "srun_args": [f"--cpus-per-task={cpus}", "--export=ALL"],
        "additional_parameters": {"requeue": True, **options.sbatch},  # clusters may forbid requeueing by default
    }


def _executor(folder: Path, parameters: dict[str, Any], options: SlurmOptions) -> SlurmExecutor:
    if "%" in str(folder.absolute()):
        raise ConfigError(f"{folder}: expected a path without %, which Slurm replaces in the names of logs")
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise ConfigError("executor slurm: submitit is not installed; pip install 'speccert[slurm]'") from error
    try:
        executor = SlurmExecutor(folder, max_num_timeout=options.max_requeues, python=options.python)
    except RuntimeError as error:
        raise ConfigError("executor slurm: srun is not on PATH, expected Slurm's commands on this machine") from error
    executor.update_parameters(**parameters)
    return executor


@contextlib.contextmanager
def _as_outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the Slurm job that this process itself runs in: sbatch would hand them on.

    submitit's own helper also hides SLURM_CONF, which says where Slurm is, and the SBATCH_* defaults of the user.
    """
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {key: value for key, value in os.environ.items() if inside and _IN_JOBS.match(key)}
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _call(*command: str) -> str:
    """Output of a Slurm command; SlurmError with its message where it fails, is missing or does not end."""
    try:
        with _as_outside_of_jobs():
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S, check=True
            )
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]} is not on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer in {_PATIENCE_S} s") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"{command[0]}: {_one_line(error.stderr) or f'exit status {error.returncode}'}") from error
    return done.stdout


def _one_line(text: str) -> str:
    """The messages of a command, without what each starts with."""
    lines = (re.sub(r"^s\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines())
    return "; ".join(line for line in lines if line)


class _Partition(NamedTuple):
    name: str
    limit_min: float
    is_down: bool  # some of its nodes are down or drained


def _check_partitions(options: SlurmOptions) -> list[_Partition]:
    """The partitions that the jobs may run in; ConfigError for an unknown one, or where the time is over all limits."""
    known = [_partition(line) for line in _call("sinfo", "--all", "--noheader", "--format=%P|%l|%T").splitlines()]
    names = [part.name.rstrip("*") for part in known]
    wanted = options.partition.split(",") if options.partition else [name[:-1] for name, *_ in known if name[-1] == "*"]
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(
            f"slurm: partition = {', '.join(unknown)!r}: expected one of {', '.join(dict.fromkeys(names))}"
        )
    found = [part for part in known if part.name.rstrip("*") in wanted]
    limit = max((part.limit_min for part in found), default=math.inf)
    if options.time > limit and options.qos is None:  # a job over the limit waits for ever; a qos may lift it
        raise ConfigError(
            f"slurm: time = {options.time} min: expected at most {limit:g}, the limit of partition {', '.join(wanted)}"
        )
    return found


def _partition(line: str) -> _Partition:
    name, limit, state = line.split("|")
    is_down = state.startswith(("down", "drain", "fail", "inval", "maint", "unknown"))
    return _Partition(name, _limit_min(limit), is_down)


def _limit_min(text: str) -> float:
    """A time limit as sinfo shows it, [[D-]HH:]MM:SS or infinite, in minutes."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _max_array_size() -> int:
    """Most jobs of one array; 1 where the cluster has arrays switched off."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise SlurmError("scontrol show config has no MaxArraySize")
    return max(1, int(found[1]))


def _script(executor: SlurmExecutor, jobs: int) -> str:
    """The text that submitit hands to sbatch, less the command: an array where there are several jobs."""
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text("true", "")


def _arrays(job_ids: Iterable[str]) -> list[str]:
    return sorted({job_id.split("_")[0] for job_id in job_ids})


def _squeue(job_ids: Iterable[str]) -> str:
    arrays = ",".join(_arrays(job_ids))
    try:
        return _call("squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={arrays}")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # the one array that was asked for is forgotten
            return ""
        raise


def _update(found: dict[str, str], output: str) -> None:
    """Take over the lines `ID|STATE` of the jobs in `found`; accounting says "CANCELLED by UID"."""
    for line in output.splitlines():
        job_id, _, state = line.partition("|")
        if job_id in found and state:
            found[job_id] = state.partition("|")[0].split()[0]

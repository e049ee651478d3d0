"""Logging of a training to TensorBoard or MLflow, both optional.

A tracker is a copy for people to look at: no result is read from it, and one that fails ends its own logging only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from .config import FIELDS, CellConfig, ConfigError
from .execution import MACHINERY
from .leases import CancelledRunError, LeaseLostError
from .store import RunFolder, StoreError, write_atomic

__all__ = ["TRACKERS", "Tracker", "check_trackers", "make_tracker"]

TRACKERS = ("tensorboard", "mlflow")

_LOGGER = logging.getLogger("speccert")
_LOCK_S = 20.0  # longer than it takes to make an experiment; a lock that stays has no owner any more
_REQUEST_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_Values = dict[str, float]


class _Sink(Protocol):
    """One tracker's end of one cell."""

    name: str
    errors: tuple[type[Exception], ...]  # what its machinery raises when a disk or a server fails

    def open(self) -> None:
        """Get ready, behind what earlier attempts logged."""

    def epoch(self, step: int, values: _Values) -> None:
        """The numbers of an epoch, from 1."""

    def finish(self, step: int, values: _Values, text: Mapping[str, str]) -> None:
        """The final numbers and texts; `step` comes behind all epochs."""

    def close(self, status: str | None) -> None:
        """Let go; FINISHED, FAILED, KILLED, or None where the cell belongs to another process by now."""


class Tracker:
    """Logs one cell to the trackers that it was made for; use it in a `with` statement.

    Numbers that are not finite are left out. At the first failure of a tracker (a full disk, a server that is gone) the
    logger "speccert" gets one warning and that tracker logs no more of this cell: the training goes on.
    """

    def __init__(self, config: CellConfig, identity: str, sinks: Sequence[_Sink]) -> None:
        self._config, self._identity, self._sinks = config, identity, list(sinks)
        self._finished = False

    def __enter__(self) -> Tracker:
        self._each(lambda sink: sink.open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = _status(error, self._finished)
        self._each(lambda sink: sink.close(status))

    def epoch(self, row: Mapping[str, float]) -> None:
        """Log a row of the training history; its `epoch`, from 1, is the step."""
        step, values = int(row["epoch"]), _numbers(row, without=("epoch",))
        self._each(lambda sink: sink.epoch(step, values))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the results in a summary as `final/<name>`, truth values as 0 and 1, behind the last possible epoch."""
        values = {f"final/{key}": value for key, value in _numbers(summary, without=FIELDS).items()}
        text = {key: value for key, value in summary.items() if isinstance(value, str) and key not in FIELDS}
        self._each(lambda sink: sink.finish(self._config.epochs + 1, values, text))
        self._finished = True

    def _each(self, act: Callable[[_Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except sink.errors as error:
                self._sinks.remove(sink)
                _LOGGER.warning("cell %s: no more logging to %s: %s", self._identity, sink.name, _line(error))


def check_trackers(names: Sequence[str]) -> None:
    """To be called before anything runs: each tracker is known and installed, and MLflow's store answers.

    Raises:
        ConfigError: says which names are allowed, what to install, or which store can't be reached.
    """
    _check_names(names)
    if "tensorboard" in names:
        _load("tensorboard", "torch.utils.tensorboard")
    if "mlflow" in names:
        _check_mlflow_store()


def make_tracker(names: Sequence[str], config: CellConfig, folder: RunFolder, study: str) -> Tracker:
    """A tracker of one cell; with no names, one that does nothing and imports nothing.

    tensorboard: event files in <run folder>/tensorboard. A resumed training goes on at its epoch, and what was logged
    from there on before is purged.

    mlflow: one run a cell, tagged `speccert.cell`, in the experiment `study`, or MLFLOW_EXPERIMENT_NAME where that is
    set; in the store MLFLOW_TRACKING_URI, or in `mlruns` beside the run folder. The run's id is kept in the run folder
    (mlflow.json), so that a resumed cell goes on in its run, without the epochs that are there; a cell that starts over
    replaces its run. Its status is FINISHED after `finish`, FAILED after an error, KILLED when stopped. Requests
    end after 20 s and two retries, unless MLFLOW_HTTP_REQUEST_TIMEOUT and MLFLOW_HTTP_REQUEST_MAX_RETRIES are set.

    Args:
        names: out of `TRACKERS`.
        config: of the cell; its fields become parameters, but those that are unset.
        folder: of the cell.
        study: name of the MLflow experiment.

    Raises:
        ConfigError: a tracker that is unknown or not installed.
    """
    _check_names(names)
    sinks: list[_Sink] = []
    if "tensorboard" in names:
        sinks.append(_TensorBoard(config, folder))
    if "mlflow" in names:
        sinks.append(_Mlflow(config, folder, study))
    return Tracker(config, folder.id, sinks)


def _check_names(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ConfigError(f"track = {', '.join(map(repr, unknown))}: expected names out of {', '.join(TRACKERS)}")


class _TensorBoard:
    name = "tensorboard"
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, config: CellConfig, folder: RunFolder) -> None:
        self._new_writer = _load(self.name, "torch.utils.tensorboard").SummaryWriter
        # Without the list of all parameters, which every cell would write: TensorBoard gathers it from the cells.
        _, self._start, self._success = _load(self.name, "torch.utils.tensorboard.summary").hparams(
            _parameters(config), {}
        )
        self._path = folder.path / "tensorboard"
        self._writer: Any = None

    def open(self) -> None:
        """The writer is made at the first step, since that step is where older ones are purged."""

    def epoch(self, step: int, values: _Values) -> None:
        if self._writer is None:
            self._writer = self._new_writer(str(self._path), purge_step=step)
            self._writer.file_writer.add_summary(self._start)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, step: int, values: _Values, text: Mapping[str, str]) -> None:
        self.epoch(step, values)
        # Success only: TensorBoard keeps the first end that it reads, and a failed cell can be resumed.
        self._writer.file_writer.add_summary(self._success)

    def close(self, status: str | None) -> None:
        if self._writer is not None:
            self._writer.close()


class _Mlflow:
    name = "mlflow"
    errors: tuple[type[Exception], ...] = (Exception,)  # the very class that its file store raises when it is gone

    def __init__(self, config: CellConfig, folder: RunFolder, study: str) -> None:
        self._entities = _load(self.name, "mlflow.entities")
        self._failure = _load(self.name, "mlflow.exceptions").MlflowException
        self._parameters, self._folder = _parameters(config), folder
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or _local_store(folder.path.parent)
        self._experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or study
        self._client: Any = None
        self._experiment = self._run = ""
        self._last = 0  # step

    def open(self) -> None:
        # Held alone, since the file store would make two experiments of one name.
        with _alone(self._folder.path.parent / MACHINERY / "mlflow.lock"):
            self._client = _client(self._uri)
            self._experiment = self._find_experiment()
        self._run = self._known_run()
        if self._run:
            self._client.update_run(self._run, status="RUNNING")
            self._last = self._last_step()
        else:
            self._start_run()

    def epoch(self, step: int, values: _Values) -> None:
        if step == 1 and self._last:
            self._client.delete_run(self._run)
            self._start_run()
        self._log(step, values)

    def finish(self, step: int, values: _Values, text: Mapping[str, str]) -> None:
        tags = [self._entities.RunTag(f"speccert.{key}", value) for key, value in text.items()]
        self._client.log_batch(self._run, tags=tags)
        self._log(step, values)

    def close(self, status: str | None) -> None:
        if status is not None:
            self._client.set_terminated(self._run, status)

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment_name)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment_name))
            except self._failure as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self._experiment_name)  # another study was faster
        return str(found.experiment_id)

    @property
    def _note(self) -> Path:
        return self._folder.path / "mlflow.json"

    def _known_run(self) -> str:
        """Id of the run of an earlier attempt, "" where there is none in this store.

        Not searched by its tag: the file store reads every run for that, also those being written by other workers.
        """
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            run = self._client.get_run(note["run_id"])
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self._note}: damaged; delete it to log to a new run") from error
        except self._failure as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return ""
            raise
        known = run.info.lifecycle_stage == "active" and run.info.experiment_id == self._experiment
        return str(run.info.run_id) if known else ""

    def _last_step(self) -> int:
        keys = self._client.get_run(self._run).data.metrics
        return max((point.step for key in keys for point in self._client.get_metric_history(self._run, key)), default=0)

    def _start_run(self) -> None:
        identity = self._folder.id
        run = self._client.create_run(self._experiment, tags={"speccert.cell": identity}, run_name=identity)
        self._run, self._last = str(run.info.run_id), 0
        note = {"tracking_uri": self._uri, "experiment": self._experiment_name, "run_id": self._run}
        write_atomic(self._note, (json.dumps(note, indent=2) + "\n").encode())
        parameters = [self._entities.Param(_key(key), str(value)) for key, value in self._parameters.items()]
        self._client.log_batch(self._run, params=parameters)

    def _log(self, step: int, values: _Values) -> None:
        if step <= self._last:
            return  # logged by an earlier attempt, and MLflow only appends
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_key(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)
        self._last = step


def _check_mlflow_store() -> None:
    _load("mlflow", "mlflow.entities")
    with tempfile.TemporaryDirectory() as folder:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or _local_store(Path(folder))
        try:
            _client(uri).search_experiments(max_results=1)
        except Exception as error:  # as each kind of store raises its own
            raise ConfigError(f"track = 'mlflow': the store {uri} can't be used: {_line(error)}") from error


def _client(uri: str) -> Any:
    """With explicit runs only: MLflow's functions keep one active run a process in global state."""
    for key, value in _REQUEST_DEFAULTS.items():  # MLflow's own would stop a training for minutes
        os.environ.setdefault(key, value)
    return _load("mlflow", "mlflow.tracking").MlflowClient(tracking_uri=uri)


def _local_store(study: Path) -> str:
    """A file store, in which parallel workers write to files of their own, also over NFS; not so SQLite."""
    return (study.resolve() / "mlruns").as_uri()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file against other processes, also of other machines; an abandoned one is waited for, then taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            path.open("x").close()
            break
        except FileExistsError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _load(name: str, module: str) -> Any:
    """A module of an optional package."""
    try:
        with warnings.catch_warnings():
            # MLflow 2 and TensorBoard still use it; nothing that a user of speccert could change
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"track = {name!r}: can't be imported ({_line(error)}); install it: pip install 'speccert[{name}]'"
        ) from error


def _status(error: BaseException | None, finished: bool) -> str | None:
    if isinstance(error, LeaseLostError):
        return None
    if isinstance(error, Exception) and not isinstance(error, CancelledRunError):
        return "FAILED"
    return "FINISHED" if finished and error is None else "KILLED"


def _numbers(row: Mapping[str, Any], *, without: Sequence[str]) -> _Values:
    """What is finite, as MLflow's databases would turn infinity into the largest float."""
    found = {key: float(value) for key, value in row.items() if isinstance(value, Real) and key not in without}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _parameters(config: CellConfig) -> dict[str, bool | int | float | str]:
    values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    return {key: ", ".join(map(str, value)) if isinstance(value, tuple) else value for key, value in values.items()}


def _key(name: str) -> str:
    """A name that every MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", name)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

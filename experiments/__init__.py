"""Experiments: config, data, training, evaluation, run folders, sweeps, tables and pictures.

The names below are imported when first used, so that reading a config needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CellConfig, ConfigError
    from .data import Dataset, load_dataset
    from .evaluation import CertificateViolationError, evaluate
    from .report import write_report
    from .spec import RunSpec
    from .sweep import CellError, run, write_results
    from .tables import pivot_table, robustness_table
    from .training import TrainResult, train

_PLACES = {
    "CellConfig": "config",
    "CellError": "sweep",
    "CertificateViolationError": "evaluation",
    "ConfigError": "config",
    "Dataset": "data",
    "RunSpec": "spec",
    "TrainResult": "training",
    "evaluate": "evaluation",
    "load_dataset": "data",
    "pivot_table": "tables",
    "robustness_table": "tables",
    "run": "sweep",
    "train": "training",
    "write_report": "report",
    "write_results": "sweep",
}

__all__ = [
    "CellConfig",
    "CellError",
    "CertificateViolationError",
    "ConfigError",
    "Dataset",
    "RunSpec",
    "TrainResult",
    "evaluate",
    "load_dataset",
    "pivot_table",
    "robustness_table",
    "run",
    "train",
    "write_report",
    "write_results",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)

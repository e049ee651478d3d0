"""Frames as `find_runs` gives them, made by hand."""

from dataclasses import asdict

import pandas as pd

from speccert.experiments.config import CellConfig, config_id

RESULTS = {
    "clean_accuracy": 0.9,
    "lipschitz_upper": 2.0,
    "lipschitz_lower": 1.5,
    "certified_accuracy_eps_0.3": 0.5,
    "certified_accuracy_attacked_eps_0.3": 0.48,
    "worst_case_accuracy_eps_0.3": 0.6,
    "accuracy_pgd_eps_0.3": 0.62,
    "accuracy_ddn_eps_0.3": 0.61,
    "mean_certified_radius": 0.32,
    "mean_certified_radius_attacked": 0.3,
    "mean_distance": 0.4,
    "tightness": 0.75,
    "gradient_norm": 0.05,
    "step_ratio": 1.1,
    "train_s": 12.5,
    "test_count": 100,
    "attacked_count": 50,
    "diverged": False,
    "status": "finished",
    "machine": "x86_64, 1 threads",
}


def cell(**settings):
    return CellConfig(**{"eps": (0.3,), "attacks": ("pgd", "ddn"), **settings})


def run(state="done", error=None, results=None, **settings):
    """One row; only a finished run has results."""
    config = cell(**settings)
    key = config_id(config)
    start = {"folder": f"runs/{key}", "id": key, "state": state, "finished": state == "done", "error": error}
    return start | asdict(config) | ({**RESULTS, **(results or {})} if state == "done" else {})


def frame(*runs):
    return pd.DataFrame(list(runs))

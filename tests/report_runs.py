"""Hand-made run folders with known numbers, for the report: eight samples, of which six are classified right."""

import json
import math

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from speccert.experiments.store import RunFolder

RADIUS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.0, 0.0, 0.0]
DISTANCE = [0.2, 0.4, 0.6, 0.8, math.inf, 0.3, 0.0, 0.0]
RIGHT = [True] * 6 + [False] * 2
NO_ATTACK = [math.nan] * 8
LAYERS = [
    {"name": "0 + 2", "kind": "Chain", "lower": 0.5, "upper": 0.75, "method": "materialised"},
    {"name": "4", "kind": "Dense", "lower": 0.5, "upper": 0.5, "method": "dense"},
]
BRACKET = {"lower": 1.5, "upper": 3.0, "pairwise_min": 1.0, "pairwise_max": 4.0, "layers": LAYERS}
BOUNDS = {"l2": BRACKET, "linf": BRACKET | {"lower": 0.0}, "l1": BRACKET | {"upper": None}}


def share(values, eps):
    return sum(value > eps for value in values) / len(values)


def finish(output, cell, *, radius=RADIUS, distance=DISTANCE, right=RIGHT, diverged=False, history=None, **results):
    """A finished run; `history` holds columns, `results` join its summary."""
    folder = RunFolder.of(output, cell)
    folder.create(cell)
    attacked = [not math.isnan(value) for value in distance]
    rows = {"index": range(len(right)), "label": 1, "prediction": [int(one) for one in right], "margin": 0.5}
    rows |= {f"radius_{cell.norm}": radius, "radius_l2": radius, "attacked": attacked, "distance": distance}
    folder.write_samples(pd.DataFrame(rows))
    columns = {"epoch": [1, 2], "train_loss": 1.0, "gradient_norm": [4.0, 1.0], "validation_accuracy": [0.5, 0.75]}
    folder.write_history(pd.DataFrame(columns | {"validation_certified_accuracy": [0.25, 0.5]} | (history or {})))
    summary = {"clean_accuracy": share(right, 0), "test_count": len(right), "attacked_count": sum(attacked)}
    summary |= {"lipschitz_lower": 1.5, "lipschitz_upper": 3.0, "tightness": 0.5, "train_s": 30.0, "evaluate_s": 30.0}
    summary |= {"speccert_version": "9.8.7", "torch_version": "7.6.5", "python_version": "3.99", "machine": "abacus"}
    for eps in cell.eps:
        summary[f"certified_accuracy_eps_{eps:g}"] = share(radius, eps)
        if any(attacked):
            summary[f"certified_accuracy_attacked_eps_{eps:g}"] = share(radius, eps)
            summary[f"worst_case_accuracy_eps_{eps:g}"] = share(distance, eps)
    folder.write_summary(summary | {"diverged": diverged} | results)
    return folder


def fail(output, cell, error, traceback="Traceback (most recent call last): here"):
    folder = RunFolder.of(output, cell)
    folder.create(cell)
    told = {"error": error, "traceback": traceback, "time": "2026-01-02T03:04:05+00:00"}
    folder.failure_path.write_text(json.dumps(told))
    return folder


def record(folder, *, shape=(1, 2, 2), count=3, bounds=BOUNDS):
    """Bounds and nearest adversarial examples as a cell writes them; returns the arrays of these."""
    folder.bounds_path.write_text(json.dumps(bounds))
    ramp = np.arange(count * math.prod(shape), dtype=np.float32).reshape(count, *shape) / (count * math.prod(shape))
    change = np.zeros(shape, np.float32)
    change.flat[0], change.flat[1] = 0.25, -0.125
    arrays = {"x": ramp, "x_adv": ramp + change}
    arrays |= {name: np.full(count, value) for name, value in (("label", 1), ("prediction", 7))}
    arrays |= {"index": np.arange(count), "distance": np.linspace(0.5, 0.75, count), "radius": np.full(count, 0.25)}
    save_file(arrays, folder.closest_path)
    return arrays

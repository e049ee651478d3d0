"""The committed examples: every spec file is valid, and the script runs and prints what it says."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from speccert.experiments.slurm_options import SlurmOptions
from speccert.experiments.spec import RunSpec

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_spec_files_are_valid(path):
    assert RunSpec.from_toml(path).cells()


@pytest.mark.parametrize(("name", "preset"), [("mnist.toml", "mnist-dense"), ("cifar10.toml", "cifar10-liresnet")])
def test_recipes_are_the_built_in_presets(name, preset):
    assert RunSpec.from_toml(EXAMPLES / name) == RunSpec.from_mapping({"preset": preset})


def test_the_study_spans_what_its_comments_say():
    spec = RunSpec.from_toml(EXAMPLES / "study.toml")
    cells = spec.cells()
    assert len(cells) == 216 + 24 + 12
    assert {cell.seed for cell in cells} == {0, 1, 2}
    assert {cell.dataset for cell in cells} == {"mnist", "fashion-mnist", "cifar10"}
    assert set(spec.execution) == {"executor", "device", "threads", "gpus_per_cell", "cells_per_gpu", "track"}
    assert set(spec.slurm) == {
        *("partition", "account", "qos", "time", "cpus", "memory", "gpus"),
        *("parallelism", "cells_per_job", "cells_at_once", "sbatch", "setup"),
    }
    assert SlurmOptions(**spec.slurm).cells_at_once == spec.execution["cells_per_gpu"]
    smoke = RunSpec.from_toml(EXAMPLES / "study.toml", {"preset": "quick", "seed": 0}).cells()
    assert {(cell.epochs, cell.train_samples, cell.seed) for cell in smoke} == {(1, 500, 0)}


def test_own_model_runs_and_keeps_certified_below_observed(capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "own_model.py"), run_name="__main__")
    text = capsys.readouterr().out
    bracket = re.search(r"constant between (\S+) and (\S+)", text)
    assert float(bracket[1]) <= float(bracket[2])
    pairs = re.findall(r"certified accuracy (\S+) <= accuracy under PGD (\S+)", text)
    assert len(pairs) == 2
    assert all(float(certified) <= float(observed) for certified, observed in pairs)

"""The committed examples: every spec file is valid, and the script runs and prints what it says."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from speccert.experiments.config import RunSpec

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_spec_files_are_valid(path):
    assert RunSpec.from_toml(path).cells()


def test_own_model_runs_and_keeps_certified_below_observed(capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "own_model.py"), run_name="__main__")
    text = capsys.readouterr().out
    bracket = re.search(r"constant between (\S+) and (\S+)", text)
    assert float(bracket[1]) <= float(bracket[2])
    pairs = re.findall(r"certified accuracy (\S+) <= accuracy under PGD (\S+)", text)
    assert len(pairs) == 2
    assert all(float(certified) <= float(observed) for certified, observed in pairs)

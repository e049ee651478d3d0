import dataclasses
import json
import pickle

import pytest

from speccert.experiments.execution import MACHINERY, Execution


def test_defaults_and_the_place_of_the_marker(tmp_path):
    execution = Execution(output=str(tmp_path))
    assert (execution.device, execution.threads, execution.jobs) == ("cpu", 1, None)
    assert execution.cancel_path == tmp_path / MACHINERY / f"run-{execution.token}.cancel"


def test_every_run_has_its_own_token():
    assert len({Execution(output="a").token for _ in range(100)}) == 100


def test_it_goes_to_other_processes_and_into_files():
    execution = Execution(output="a", jobs=3, track=("mlflow",), token="t")
    assert pickle.loads(pickle.dumps(execution)) == execution
    values = json.loads(json.dumps(dataclasses.asdict(execution)))
    assert Execution(**{**values, "track": tuple(values["track"])}) == execution


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threads": 0}, "threads: expected an integer >= 1, got 0"),
        ({"jobs": 0}, "jobs: expected an integer >= 1, got 0"),
        ({"jobs": -1, "gpus_per_cell": 0}, "jobs: .* got -1; gpus_per_cell: .* got 0"),
        ({"cells_per_gpu": 0}, "cells_per_gpu: expected"),
        ({"threads": 1.5}, "threads: expected an integer >= 1, got 1.5"),
        ({"threads": "2"}, "threads: expected an integer >= 1, got '2'"),
        ({"jobs": True}, "jobs: expected an integer >= 1, got True"),
        ({"gpus_per_cell": 2, "cells_per_gpu": 2}, "gpus_per_cell = 2 with cells_per_gpu = 2: one must be 1"),
    ],
)
def test_bad_counts_are_refused_in_one_line(settings, match):
    with pytest.raises(ValueError, match=match) as caught:
        Execution(output="a", **settings)
    assert "\n" not in str(caught.value)

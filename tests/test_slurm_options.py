"""Slurm options: every bad one is named in one line before anything is submitted; sizes of jobs."""

import dataclasses
import json
import subprocess
import sys
import tomllib

import pytest

from speccert.experiments.config import ConfigError
from speccert.experiments.slurm_options import OPTIONS, SlurmOptions, parse_options

TABLE = """
partition = "gpu,long"
account = "team-7"
qos = "high"
time = "1-02:30:00"
cpus = 4
memory = "16g"
gpus = 1
parallelism = 50
cells_per_job = 20
cells_at_once = 4
sbatch = { constraint = "a100&nvlink", exclusive = true, mail_type = "END", nice = 100 }
setup = ["module load cuda", "set -e"]
signal_delay_s = 120
python = "singularity exec image.sif python3"
max_requeues = 3
"""


def test_a_full_table_is_read():
    options = SlurmOptions.from_mapping(tomllib.loads(TABLE))
    assert dataclasses.asdict(options) == {
        "partition": "gpu,long",
        "account": "team-7",
        "qos": "high",
        "time": 26 * 60 + 30,
        "cpus": 4,
        "memory": "16G",
        "gpus": 1,
        "parallelism": 50,
        "cells_per_job": 20,
        "cells_at_once": 4,
        "sbatch": {"constraint": "a100&nvlink", "exclusive": True, "mail-type": "END", "nice": 100},
        "setup": ("module load cuda", "set -e"),
        "signal_delay_s": 120,
        "python": "singularity exec image.sif python3",
        "max_requeues": 3,
    }


@pytest.mark.parametrize("text", ["", TABLE])
def test_options_survive_json(text):
    options = SlurmOptions.from_mapping(tomllib.loads(text))
    assert SlurmOptions.from_mapping(json.loads(json.dumps(dataclasses.asdict(options)))) == options


@pytest.mark.parametrize(
    ("given", "minutes"),
    [(90, 90), ("90", 90), ("01:30:00", 90), ("00:04:01", 5), ("100:00:00", 6000), ("2-00:00:00", 2880)],
)
def test_time_in_minutes(given, minutes):
    assert SlurmOptions(time=given).time == minutes


BAD = [
    ("time", 0, 'expected minutes >= 1, "HH:MM:SS" or "D-HH:MM:SS"'),
    ("time", "12:00", 'expected minutes >= 1, "HH:MM:SS"'),  # Slurm reads minutes and seconds, most people hours
    ("time", "00:99:00", "expected minutes"),
    ("time", True, "expected minutes"),
    ("time", 1.5, "expected minutes"),
    ("partition", "", "expected a name"),
    ("partition", "a b", "expected a name"),
    ("partition", "a,,b", "expected a name"),
    ("account", 7, "expected a name"),
    ("qos", "x\n#SBATCH --uid=0", "expected a name"),
    ("cpus", 0, "expected an integer >= 1"),
    ("cpus", "four", "expected an integer >= 1"),
    ("memory", "8", "expected a size such as 8G or 500M"),
    ("memory", 8, "expected a size"),
    ("memory", "1.5G", "expected a size"),
    ("gpus", -1, "expected an integer >= 0"),
    ("gpus", True, "expected an integer >= 0"),
    ("parallelism", 0, "expected an integer >= 1"),
    ("cells_per_job", 0, "expected an integer >= 1"),
    ("cells_at_once", 0, "expected an integer >= 1"),
    ("sbatch", "exclusive", "expected a table of sbatch options"),
    ("sbatch", {"exclusive": False}, "each a text, an integer >= 0 or true"),
    ("sbatch", {"comment": "two\nlines"}, "expected a table"),
    ("sbatch", {"p": "gpu"}, "expected a table"),
    ("sbatch", {"array": "0-3"}, "array: follows from the other options, expected none of account, array"),
    ("sbatch", {"cpus_per_task": 3, "signal": "USR1"}, "cpus-per-task, signal: follows from the other options"),
    ("setup", ["a\nb"], "expected a list of shell lines"),
    ("setup", [1], "expected a list of shell lines"),
    ("signal_delay_s", 0, "expected an integer >= 1"),
    ("signal_delay_s", 1801, "expected at most half of time = 60 minutes, 1800"),
    ("python", "", "expected a shell command"),
    ("max_requeues", -1, "expected an integer >= 0"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_a_bad_value_is_named_in_one_line(key, value, expected):
    with pytest.raises(ConfigError) as caught:
        SlurmOptions.from_mapping({key: value})
    message = str(caught.value)
    assert message.startswith(f"slurm: {key} = ")
    assert expected in message
    assert "\n" not in message


def test_all_bad_values_are_named_at_once():
    with pytest.raises(ConfigError, match=r"cpus = 0: .*; memory = 'lots': .*; python = '': "):
        SlurmOptions(cpus=0, memory="lots", python="")


def test_the_default_signal_is_too_early_for_a_short_job():
    with pytest.raises(ConfigError, match="signal_delay_s = 90: expected at most half of time = 2 minutes, 60"):
        SlurmOptions(time=2)
    assert SlurmOptions(time=2, signal_delay_s=60).signal_delay_s == 60


def test_more_cells_at_once_than_cells_are_refused():
    with pytest.raises(ConfigError, match="cells_at_once = 4: expected at most cells_per_job = 3"):
        SlurmOptions(cells_per_job=3, cells_at_once=4)


def test_unknown_options_are_named_with_close_matches():
    with pytest.raises(
        ConfigError, match=r"unknown option 'partion' \(did you mean partition.*\), 'x'; allowed: "
    ) as caught:
        SlurmOptions.from_mapping({"partion": "gpu", "x": 1})
    assert all(key in str(caught.value) for key in OPTIONS)


@pytest.mark.parametrize(
    ("options", "cells", "max_jobs", "size"),
    [
        ({}, 12, 1001, 1),
        ({}, 200, 1001, 1),
        ({}, 201, 1001, 2),
        ({}, 100_000, 1001, 500),
        ({}, 1000, 10, 100),  # a cluster of short arrays
        ({}, 7, 1, 7),  # arrays switched off
        ({"cells_at_once": 8}, 12, 1001, 8),
        ({"cells_per_job": 3}, 3000, 1000, 3),
    ],
)
def test_cells_a_job(options, cells, max_jobs, size):
    assert SlurmOptions(**options).chunk_size(cells, max_jobs) == size


def test_too_many_jobs_say_how_many_cells_a_job_must_have():
    with pytest.raises(
        ConfigError, match=r"2001 cells make 1001 jobs.* 1000 in an array; raise cells_per_job to at least 3"
    ):
        SlurmOptions(cells_per_job=2).chunk_size(2001, 1000)


@pytest.mark.parametrize(
    ("at_once", "cells_per_gpu", "gpus", "expected"),
    [(1, 1, 0, 0), (1, 1, 1, 1), (4, 1, 1, 4), (4, 2, 1, 2), (5, 2, 1, 3), (2, 1, 4, 8), (3, 8, 1, 1)],
)
def test_gpus_of_a_job(at_once, cells_per_gpu, gpus, expected):
    assert SlurmOptions(cells_at_once=at_once, gpus=gpus).job_gpus(cells_per_gpu) == expected


def test_memory_of_a_job():
    assert SlurmOptions(memory="500m", cells_at_once=3).job_memory() == "1500M"
    assert SlurmOptions(cells_at_once=3).job_memory() is None


def test_flags_are_read_with_their_types():
    texts = ["partition=gpu", "account=12345", "cpus=4", "time=1-00:00:00", "setup=a=b", "setup=c", "sbatch.nice=100"]
    texts += ["sbatch.exclusive", "sbatch.requeue_x=true", "sbatch.comment=a=b"]
    assert parse_options(texts) == {
        "partition": "gpu",
        "account": "12345",
        "cpus": 4,
        "time": "1-00:00:00",
        "setup": ["a=b", "c"],
        "sbatch": {"nice": "100", "exclusive": True, "requeue_x": True, "comment": "a=b"},
    }


def test_flags_of_bad_values_are_left_to_the_options():
    with pytest.raises(ConfigError, match="cpus = 'four': expected an integer >= 1"):
        SlurmOptions.from_mapping(parse_options(["cpus=four"]))


@pytest.mark.parametrize("text", ["partition", "=gpu", "", "sbatch.", "setup"])
def test_a_text_that_is_no_option_is_refused(text):
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_options([text])


@pytest.mark.parametrize("texts", [["cpus=1", "cpus=2"], ["sbatch.nice=1", "sbatch.nice=2"]])
def test_an_option_given_twice_is_refused(texts):
    with pytest.raises(ConfigError, match="given twice"):
        parse_options(texts)


def test_importing_loads_nothing_heavy():
    code = "import sys, speccert.experiments.submit; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "pyarrow", "submitit"} & set(loaded)

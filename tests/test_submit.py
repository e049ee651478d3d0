"""Submitting to Slurm: the script against what it must say, failing commands, and real jobs where a Slurm answers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm.cluster import needs_slurm

from speccert.experiments.config import ConfigError
from speccert.experiments.slurm_options import SlurmOptions
from speccert.experiments.submit import (
    SlurmError,
    cancel,
    check_cluster,
    log_paths,
    outcome,
    states,
    submit,
)

pytest.importorskip("submitit", reason="submitit is not installed; pip install 'speccert[slurm]'")

HERE = Path(__file__).parent
SMALL = {"memory": "200M", "cells_per_job": 1}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Make a folder the only one on PATH; the function given puts a shell script into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name, body):
        path = folder / name
        path.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{body}\n")
        path.chmod(0o755)

    write("srun", "exit 1")
    write("sbatch", "echo Submitted batch job 42")
    return write


def chunk_files(folder, contents):
    paths = [folder / f"chunk-{k}" for k in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(str(content))
    return paths


def script(folder, options, jobs, **more):
    """The parts of the script that sbatch gets: the options, the lines before the command, the command."""
    ids = submit(folder, options, [Path(f"chunk-{k}") for k in range(jobs)], **more)
    assert ids == (["42"] if jobs == 1 else [f"42_{k}" for k in range(jobs)])
    lines = (folder / "42_submission.sh").read_text().splitlines()
    flags = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    return flags, [line for line in lines if line and not line.startswith("#")]


def test_the_script_of_the_defaults(commands, tmp_path):
    flags, lines = script(tmp_path, SlurmOptions(), 3)
    logs = f"{tmp_path}/%A_%a_0_log"
    assert flags == {
        "--array=0-2%3",
        "--cpus-per-task=1",
        f"--error={logs}.err",
        "--job-name=speccert",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--open-mode=append",
        f"--output={logs}.out",
        "--requeue",
        "--signal=USR2@90",
        "--time=60",
    }
    assert lines[0] == "export SUBMITIT_EXECUTOR=slurm"
    assert f" --cpus-per-task=1 --export=ALL {sys.executable} -u -m submitit.core._submit {tmp_path}" in lines[1]
    assert len(lines) == 2


def test_the_script_of_all_options(commands, tmp_path):
    options = SlurmOptions(
        partition="gpu,long",
        account="team",
        qos="high",
        time="02:00:00",
        cpus=3,
        memory="8G",
        gpus=2,
        parallelism=5,
        cells_at_once=4,
        sbatch={"constraint": "a100&nvlink", "exclusive": True, "nice": 100},
        setup=("module load cuda", "export A='b c'"),
        signal_delay_s=120,
        python="singularity exec image.sif python3",
    )
    flags, lines = script(tmp_path / "with space", options, 8, cells_per_gpu=2, name="study")
    logs = f"{tmp_path}/with space/%A_%a_0_log"
    assert flags == {
        "--account=team",
        "--array=0-7%5",
        "--constraint='a100&nvlink'",
        "--cpus-per-task=12",
        f"--error='{logs}.err'",
        "--exclusive",
        "--gpus-per-node=4",
        "--job-name=study",
        "--mem=32G",
        "--nice=100",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--open-mode=append",
        f"--output='{logs}.out'",
        "--partition=gpu,long",
        "--qos=high",
        "--requeue",
        "--signal=USR2@120",
        "--time=120",
    }
    assert lines[:3] == ["module load cuda", "export A='b c'", "export SUBMITIT_EXECUTOR=slurm"]
    assert " --cpus-per-task=12 --export=ALL singularity exec image.sif python3 -u -m submitit" in lines[3]


def test_one_chunk_is_no_array(commands, tmp_path):
    flags, _ = script(tmp_path, SlurmOptions(), 1)
    assert f"--output={tmp_path}/%j_0_log.out" in flags
    assert not any(flag.startswith("--array") for flag in flags)


def test_nothing_is_submitted_for_no_chunks(commands, tmp_path):
    commands("sbatch", "exit 1")
    assert submit(tmp_path, SlurmOptions(), []) == []


def test_logs_are_where_submitit_puts_them(tmp_path):
    from submitit.core.utils import JobPaths

    for job_id in ("42", "42_7"):
        paths = JobPaths(tmp_path, job_id=job_id)
        assert log_paths(tmp_path, job_id) == (paths.stdout, paths.stderr)


def test_a_submission_from_inside_a_job_hides_that_job(commands, tmp_path, monkeypatch):
    commands("sbatch", f"env > {tmp_path}/seen; echo Submitted batch job 42")
    for key in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURMD_NODENAME", "SUBMITIT_FOLDER"):
        monkeypatch.setenv(key, "1")
    kept = {"SLURM_CONF": "/etc/my.conf", "SBATCH_ACCOUNT": "mine"}
    for key, value in kept.items():
        monkeypatch.setenv(key, value)
    submit(tmp_path, SlurmOptions(), [Path("chunk")])
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert {key: value for key, value in seen.items() if key.startswith(("SLURM", "SBATCH", "SUBMITIT"))} == kept
    assert os.environ["SLURM_JOB_ID"] == "1"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo sbatch: error: invalid account >&2; echo sbatch: error: no >&2; exit 1", "sbatch: invalid account; no$"),
        ("echo what", "sbatch: .*what"),
    ],
)
def test_a_refused_submission_is_one_line(commands, tmp_path, capfd, body, expected):
    commands("sbatch", body)
    with pytest.raises(SlurmError, match=expected) as caught:
        submit(tmp_path, SlurmOptions(), [Path("a"), Path("b")])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_with_a_percent_sign_is_refused(commands, tmp_path):
    with pytest.raises(ConfigError, match="expected a path without %"):
        submit(tmp_path / "50%", SlurmOptions(), [Path("a")])


def test_submitit_missing_says_what_to_install(commands, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"submitit is not installed; pip install 'speccert\[slurm\]'"):
        submit(tmp_path, SlurmOptions(), [Path("a")])


# -- asking for states, with made-up answers --------------------------------------------------------------------------


def test_states_of_two_arrays_by_one_call(commands, tmp_path):
    commands(
        "squeue", f'echo "$@" >> {tmp_path}/calls; printf "7_0|RUNNING\\n7_1|PENDING\\n9|COMPLETED\\n7_5|FAILED\\n"'
    )
    assert states(["7_0", "9", "7_1"]) == {"7_0": "RUNNING", "9": "COMPLETED", "7_1": "PENDING"}
    assert (tmp_path / "calls").read_text().split() == [
        "--all",
        "--noheader",
        "--array",
        "--states=all",
        "--format=%i|%T",
        "--jobs=7,9",
    ]


FORGOTTEN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"


@pytest.mark.parametrize(
    ("sacct", "expected"),
    [
        ("printf '7_0|COMPLETED\\n7_1|CANCELLED by 1000\\n7_[2-3]|PENDING\\n'", ["COMPLETED", "CANCELLED", "GONE"]),
        ("printf 'JobID|State|NodeList\\n7_0|TIMEOUT|n1\\n'", ["TIMEOUT", "GONE", "GONE"]),
        ("echo Slurm accounting storage is disabled >&2; exit 1", ["GONE", "GONE", "GONE"]),
        (None, ["GONE", "GONE", "GONE"]),
    ],
)
def test_forgotten_jobs_are_looked_up_in_the_accounting(commands, sacct, expected):
    commands("squeue", FORGOTTEN)
    if sacct is not None:
        commands("sacct", sacct)
    jobs = ["7_0", "7_1", "7_2"]
    assert states(jobs) == dict(zip(jobs, expected, strict=True))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "squeue: .*Unable to contact"),
        ("exit 3", "squeue: exit status 3"),
        ("sleep 5", "squeue did not answer in 0.2 s"),
        (None, "squeue is not on PATH"),
    ],
)
def test_a_failing_squeue_is_told(commands, monkeypatch, body, expected):
    monkeypatch.setattr("speccert.experiments.submit._PATIENCE_S", 0.2)
    if body is not None:
        commands("squeue", body)
    with pytest.raises(SlurmError, match=expected):
        states(["7_0"])


def test_no_jobs_need_no_slurm(commands):
    assert states([]) == {}
    cancel([])


def test_cancel_names_all_jobs_and_tells_failures(commands, tmp_path):
    commands("scancel", f'echo "$@" >> {tmp_path}/calls')
    cancel(f"7_{k}" for k in range(1500))
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [job for _, *jobs in calls for job in jobs] == [f"7_{k}" for k in range(1500)]
    assert [call[0] for call in calls] == ["--quiet", "--quiet"]
    commands("scancel", "echo scancel: error: Access denied >&2; exit 1")
    with pytest.raises(SlurmError, match="scancel: Access denied"):
        cancel(["7"])


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        ("alive", "PENDING RUNNING CONFIGURING COMPLETING REQUEUED REQUEUE_HOLD SUSPENDED STAGE_OUT STOPPED NEWER"),
        ("done", "COMPLETED"),
        ("failed", "FAILED NODE_FAIL OUT_OF_MEMORY TIMEOUT BOOT_FAIL DEADLINE PREEMPTED"),
        ("cancelled", "CANCELLED REVOKED"),
        ("gone", "GONE"),
    ],
)
def test_what_a_state_says(expected, names):
    assert {outcome(name) for name in names.split()} == {expected}


# -- checking the options against a made-up cluster -------------------------------------------------------------------


@pytest.fixture
def cluster(commands):
    commands(
        "sinfo", "printf 'main*|1-00:00:00|idle\\nmain*|1-00:00:00|mixed\\ngpu|30:00|down*\\nlong|infinite|idle\\n'"
    )
    commands("scontrol", "printf 'Configuration data\\nMaxArraySize            = 100\\nMaxJobCount = 5\\n'")
    commands("sbatch", "echo sbatch: Job 1 to start >&2")
    return commands


@pytest.mark.parametrize(
    ("options", "cells", "size"),
    [({}, 50, 1), ({}, 101, 2), ({"time": 1440}, 5, 1), ({"partition": "gpu,long", "time": 9000}, 5, 1)],
)
def test_good_options_pass_and_give_the_cells_a_job(cluster, options, cells, size):
    assert check_cluster(SlurmOptions(**options), cells) == size


def test_the_very_script_of_the_submission_is_tested(cluster, commands, tmp_path):
    commands("sbatch", f'cat "$2" > {tmp_path}/tested; echo "$1" >> {tmp_path}/tested')
    check_cluster(SlurmOptions(cells_per_job=10, gpus=1, cells_at_once=4), 100, cells_per_gpu=2)
    lines = (tmp_path / "tested").read_text().splitlines()
    assert {"#SBATCH --array=0-9%10", "#SBATCH --gpus-per-node=2", "#SBATCH --cpus-per-task=4"} <= set(lines)
    assert lines[-1] == "--test-only"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"partition": "long,gpus"}, "slurm: partition = 'gpus': expected one of main, gpu, long"),
        ({"time": 1441}, "slurm: time = 1441 min: expected at most 1440, the limit of partition main"),
        ({"partition": "gpu", "time": 31}, "expected at most 30, the limit of partition gpu"),
        ({"cells_per_job": 9}, "raise cells_per_job to at least 10"),
    ],
)
def test_options_that_the_cluster_has_not_are_refused(cluster, options, expected):
    with pytest.raises(ConfigError, match=expected):
        check_cluster(SlurmOptions(**options), 1000)


def test_a_qos_may_lift_the_limit_of_a_partition(cluster):
    assert check_cluster(SlurmOptions(time=1441, qos="long"), 10) == 1


UNAVAILABLE = "echo allocation failure: Requested node configuration is not available >&2; exit 1"


def test_slurms_own_reason_is_told(cluster):
    cluster("sbatch", "echo sbatch: error: Invalid qos >&2; exit 1")
    with pytest.raises(ConfigError, match=r"^slurm: sbatch: Invalid qos$"):
        check_cluster(SlurmOptions(), 10)


def test_sizes_that_no_node_has_are_refused_but_nodes_may_be_down(cluster):
    cluster("sbatch", UNAVAILABLE)
    with pytest.raises(ConfigError, match="Requested node configuration is not available"):
        check_cluster(SlurmOptions(), 10)
    assert check_cluster(SlurmOptions(partition="gpu", time=30), 10) == 1


@pytest.mark.parametrize("missing", ["sinfo", "scontrol"])
def test_a_slurm_that_does_not_answer_is_told(cluster, missing):
    cluster(missing, "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(
        ConfigError, match=f"executor slurm: expected a Slurm that answers: {missing}: Unable to contact"
    ):
        check_cluster(SlurmOptions(), 10)


def test_a_machine_without_slurm_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="executor slurm: expected a Slurm that answers: sinfo is not on PATH"):
        check_cluster(SlurmOptions(), 10)
    with pytest.raises(ConfigError, match="srun is not on PATH"):
        submit(tmp_path, SlurmOptions(), [Path("a")])


# -- a real Slurm -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Submits chunks of `fake_chunks`; what is left of them at the end is cancelled."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "slurm"))
    submitted = []

    def start(contents, **options):
        chunks = chunk_files(tmp_path, contents)
        ids = submit(tmp_path / "jobs", SlurmOptions(**{**SMALL, **options}), chunks, module="fake_chunks")
        submitted.extend(ids)
        return ids

    yield start
    cancel(submitted)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def ended(ids):
    return all(outcome(state) != "alive" for state in states(ids).values())


def starts(tmp_path, chunk=0):
    path = tmp_path / f"chunk-{chunk}.starts"
    return path.read_text().splitlines() if path.exists() else []


@needs_slurm
def test_an_array_runs_and_a_failing_job_is_told_from_the_others(run, tmp_path):
    ids = run([1, "error", 1])
    assert set(states(ids)) == set(ids)
    wait_for(lambda: ended(ids))
    assert [outcome(state) for state in states(ids).values()] == ["done", "failed", "done"]
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["chunk-0.done", "chunk-2.done"]
    assert "RuntimeError: this chunk fails" in log_paths(tmp_path / "jobs", ids[1])[1].read_text()


@needs_slurm
def test_a_job_needs_nothing_from_the_shell_that_submits_it(run, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    wanted = {"sbatch": {"export": "NONE"}, "setup": (f"export PYTHONPATH={HERE}/slurm",)}
    ids = run([1], **wanted)
    wait_for(lambda: ended(ids))
    assert set(states(ids).values()) == {"COMPLETED"}


@needs_slurm
def test_a_job_sees_its_gpus(run, tmp_path):
    if "gpu" not in subprocess.run(["sinfo", "-h", "-o", "%G"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("the cluster has no GPUs")
    ids = run([1, 1], gpus=1, cpus=2)
    wait_for(lambda: ended(ids))
    assert [outcome(state) for state in states(ids).values()] == ["done", "done"]
    assert [len(line.split()[1].split(",")) for k in range(2) for line in starts(tmp_path, k)] == [1, 1]
    assert "-" not in starts(tmp_path)[0].split()


@needs_slurm
def test_a_signalled_array_job_is_requeued_and_resumes(run, tmp_path):
    ids = run([2, 1])
    wait_for(lambda: starts(tmp_path))
    subprocess.run(["scancel", "--signal=USR2", ids[0]], check=True)
    wait_for(lambda: len(starts(tmp_path)) == 2)
    wait_for(lambda: ended(ids))
    assert set(states(ids).values()) == {"COMPLETED"}
    output = log_paths(tmp_path / "jobs", ids[0])[0].read_text()
    assert "stopped" in output  # what the chunk had started
    assert len(starts(tmp_path, 1)) == 1


@needs_slurm
def test_cancel_ends_running_and_waiting_jobs(run, tmp_path):
    ids = run([9, 9, 9], parallelism=2)
    wait_for(lambda: starts(tmp_path, 0) and starts(tmp_path, 1))
    assert states(ids)[ids[2]] == "PENDING"
    cancel([*ids, "67000000"])
    wait_for(lambda: ended(ids))
    assert set(states([*ids, "67000000"]).values()) == {"CANCELLED", "GONE"}
    cancel(ids)


@needs_slurm
@pytest.mark.parametrize(
    "options", [{"partition": "no-such"}, {"memory": "900T"}, {"gpus": 500}, {"sbatch": {"no-such-option": "3"}}]
)
def test_the_cluster_refuses_what_it_has_not_before_anything_is_submitted(options):
    with pytest.raises(ConfigError, match="slurm: "):
        check_cluster(SlurmOptions(**options), 10)


@needs_slurm
def test_the_cluster_accepts_what_it_has():
    assert check_cluster(SlurmOptions(**SMALL), 10) == 1


def partitions():
    return subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=True).stdout.split()


@needs_slurm
@pytest.mark.slow
def test_a_preempted_job_gives_way_and_resumes(run, tmp_path):
    if not {"low", "high"} <= set(partitions()):
        pytest.skip("the cluster has no partitions low and high")
    count = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%D"], capture_output=True, text=True, check=True)
    full = int(count.stdout.split()[0])
    low = run([2] * full, partition="low", time=30, sbatch={"exclusive": True})
    wait_for(lambda: all(starts(tmp_path, k) for k in range(full)))
    high = submit(
        tmp_path / "jobs",
        SlurmOptions(**SMALL, partition="high", sbatch={"exclusive": True}),
        chunk_files(tmp_path / "jobs", [1]),
        module="fake_chunks",
    )
    wait_for(lambda: ended(high))
    assert set(states(high).values()) == {"COMPLETED"}
    again = next(k for k in range(full) if outcome(states(low)[low[k]]) == "alive" and states(low)[low[k]] != "RUNNING")
    wait_for(lambda: ended([low[again]]), 120)
    assert states(low)[low[again]] == "COMPLETED"


@needs_slurm
@pytest.mark.slow
def test_a_job_that_runs_into_its_time_limit_resumes_until_it_may_not(run, tmp_path):
    ids = run([2, 9], time=1, signal_delay_s=30, max_requeues=1)
    wait_for(lambda: ended(ids), 300)
    assert states(ids) == {ids[0]: "COMPLETED", ids[1]: "FAILED"}
    assert len(starts(tmp_path, 1)) == 2
    assert "timed-out too many times" in log_paths(tmp_path / "jobs", ids[1])[1].read_text()

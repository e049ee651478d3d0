"""Whether a Slurm answers here; `tests/slurm/start.sh` starts one. Use as `from slurm.cluster import needs_slurm`."""

import shutil
import subprocess

import pytest


def _answers():
    try:
        return (
            bool(shutil.which("sinfo"))
            and subprocess.run(["sinfo", "-h"], capture_output=True, timeout=5).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False


needs_slurm = pytest.mark.skipif(not _answers(), reason="no Slurm answers; tests/slurm/start.sh starts one")

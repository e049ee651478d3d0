"""Study folders made by hand: finished, failed and begun cells, without training."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from speccert.experiments.config import CellConfig
from speccert.experiments.store import RunFolder

ROOT = Path(__file__).parent.parent


def console(width=100):
    """A console that keeps what is shown, for `text`."""
    return Console(file=io.StringIO(), width=width, color_system=None)


def text(shown):
    """What was shown."""
    return shown.file.getvalue()


def weights(scale=1.0):
    """The weights of a flattened linear model of the digits."""
    generator = torch.Generator().manual_seed(0)
    return {"1.weight": scale * torch.randn(10, 64, generator=generator) / 8, "1.bias": torch.zeros(10)}


def user_module(folder, monkeypatch, name, text):
    """A module of the user's in the current folder, which becomes `folder`."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def finish(output, results=None, **settings):
    """A finished cell; its folder."""
    cell = CellConfig(**settings)
    folder = RunFolder.of(output, cell)
    folder.create(cell)
    folder.write_summary({"clean_accuracy": 0.5} if results is None else results)
    return folder


def begin(output, **settings):
    """A cell with a config and nothing else; its folder."""
    cell = CellConfig(**settings)
    folder = RunFolder.of(output, cell)
    folder.create(cell)
    return folder


def fail(folder, error="ValueError: broken", **further):
    """Leave the mark of an error in a run folder."""
    folder.failure_path.write_text(json.dumps({"error": error, "traceback": f"Traceback\n{error}\n", **further}))


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of its own at `path`; skips the test where this user can't mount one."""
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def process(code, *arguments, **environment):
    """A Python process that runs `code`, with pipes; it is killed at the end of its `with` block."""
    return Killed(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


class Killed(subprocess.Popen):
    """A process that does not outlive its `with` block, stopped or not."""

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)

    def line(self):
        """Its next line."""
        return self.stdout.readline().strip()

    def tell(self, text):
        """Give it a line."""
        self.stdin.write(text + "\n")
        self.stdin.flush()

"""What proved rounding takes off the radii: of a run's model on its test set, or of a dense net trained for a minute.

    python benchmarks/rounding_loss.py [RUN_FOLDER] [--data DATA_ROOT]

The loss is 1 - r / r_real over the samples that are certified in real arithmetic, both in l2.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import show, start
from torch import nn

from speccert.certify import Certifier
from speccert.experiments.cell import cell_data, load_model, train_cell
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset
from speccert.experiments.store import RunFolder

ARITHMETICS = ("float64", "float32", "float16", "bfloat16")
SAMPLES = 10_000
DENSE = CellConfig(
    dataset="digits", width=256, depth=5, constraint="orthogonal", loss="offset-ce", loss_eps=1.0, epochs=10
)


def opened(folder: Path | None, data_root: Path | None) -> tuple[nn.Module, Dataset]:
    """The model of a run folder and its data, or a dense net trained on the digits."""
    if folder is not None:
        run = RunFolder(folder.resolve())
        data = cell_data(run.read_config(), data_root)
        return load_model(run, data), data
    data = cell_data(DENSE, data_root)
    with tempfile.TemporaryDirectory() as place:
        return train_cell(DENSE, data, RunFolder.of(place, DENSE)).model.eval(), data


def rows(model: nn.Module, data: Dataset) -> Iterator[dict[str, str]]:
    x, y = data.test.x[:SAMPLES], data.test.y[:SAMPLES]
    for name in ARITHMETICS:
        certifier = Certifier(model, data.input_shape, name)
        margins = certifier.margins(x, y)
        found = certifier.radii(margins)
        counted = found.real > 0
        lost = 1 - found.radius[counted] / found.real[counted]
        wide = found.real > found.real[counted].median() / 10
        shares = 1 - found.radius[wide] / found.real[wide]
        yield {
            "arithmetic": name,
            "certified": f"{int(counted.sum())} of {len(x)}",
            "mean radius, real": f"{float(found.real.mean()):.4f}",
            "proved": f"{float(found.radius.mean()):.4f}",
            "loss, median": f"{float(lost.median()):.2%}",
            "99 %": f"{float(lost.quantile(0.99)):.2%}",
            "max": f"{float(lost.max()):.2%}",
            "max over radii > median / 10": f"{float(shares.max()):.2%}",
            "overflow": str(int(found.overflow.sum())),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    chosen = parser.parse_args()
    start("Radius that proved rounding takes off")
    show(list(rows(*opened(chosen.folder, chosen.data))))

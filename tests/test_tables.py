import csv
import io
import math
import re

import pytest
from rich.console import Console

from speccert.experiments.config import CellConfig, RunSpec
from speccert.experiments.store import RunFolder
from speccert.experiments.tables import print_table, robustness_table, to_csv, to_latex, to_markdown, write_table

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
    "test_count": 100,
    "attacked_count": 50,
    "diverged": False,
}


def finish(output, cell, **changes):
    folder = RunFolder.of(output, cell)
    folder.create(cell)
    folder.write_summary({**RESULTS, **changes})


def cell(**settings):
    return CellConfig(**{"eps": (0.3,), "attacks": ("pgd", "ddn"), **settings})


def lines(text):
    return [
        [part.strip() for part in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_rows_are_sorted_by_constraint_and_threshold_with_infinity_last(tmp_path):
    for one in RunSpec.from_mapping(
        {"constraints": ["none", "clip", "cap"], "thresholds": [math.inf, 4, 0.5, 10], "eps": [0.3]}
    ).cells():
        finish(tmp_path, one)
    table = robustness_table(tmp_path)
    thresholds = [0.5, 4.0, 10.0, math.inf]
    expected = [(name, threshold) for name in ("cap", "clip") for threshold in thresholds] + [("none", math.inf)]
    assert list(zip(table["constraint"], table["threshold"], strict=True)) == expected


def test_mean_and_sample_deviation_over_seeds(tmp_path):
    for seed, accuracy in enumerate([0.8, 0.9, 0.85]):
        finish(tmp_path, cell(seed=seed), clean_accuracy=accuracy)
    (row,) = robustness_table(tmp_path).to_dict("records")
    assert row["runs"] == 3
    assert row["clean_accuracy"] == pytest.approx(0.85, abs=1e-15)
    assert row["clean_accuracy_std"] == pytest.approx(0.05, abs=1e-15)  # sqrt((0.05² + 0.05²) / 2)
    assert row["tightness_std"] == 0
    assert "85.0 ± 5.0 |" in to_markdown(robustness_table(tmp_path))


def test_a_row_a_seed(tmp_path):
    for seed in (1, 0):
        finish(tmp_path, cell(seed=seed), clean_accuracy=0.5 + 0.1 * seed)
    table = robustness_table(tmp_path, aggregate=False)
    assert table["seed"].tolist() == [0, 1]
    assert table["clean_accuracy"].tolist() == [0.5, 0.6]
    assert not [name for name in table.columns if name.endswith("_std")]


def test_one_run_has_no_deviation(tmp_path):
    finish(tmp_path, cell())
    assert math.isnan(robustness_table(tmp_path)["clean_accuracy_std"].item())
    assert "±" not in to_markdown(robustness_table(tmp_path))


def test_cells_of_the_shown_table(tmp_path):
    finish(tmp_path, cell())
    text = to_markdown(robustness_table(tmp_path))
    overview, distances, accuracy = (lines(part) for part in re.split(r"\*\*.*\*\*", text)[1:])
    assert overview[0] == [
        "constraint",
        "threshold",
        "clean (%)",
        "Lipschitz bound",
        "lower estimate",
        "gradient norm",
        "step time ratio",
    ]
    assert overview[2] == ["cap", "1", "90.0", "2", "1.5", "0.05", "1.1"]
    assert distances[2] == ["cap", "1", "0.32", "0.3", "0.4", "0.75"]
    assert accuracy[0][2:] == ["certified", "certified (attacked)", "worst case", "pgd", "ddn"]
    assert accuracy[2] == ["cap", "1", "50.0", "48.0", "60.0", "62.0", "61.0"]
    assert "**digits, mlp, l2: accuracy (%) at ε = 0.3**" in text


def test_attacked_columns_are_shown_for_a_subset_only(tmp_path):
    finish(tmp_path, cell(), attacked_count=100)
    table = robustness_table(tmp_path)
    assert "attacked" not in to_markdown(table)
    assert "certified_accuracy_attacked_eps_0.3" in table.columns


def test_unfinished_diverged_and_undefined_are_shown(tmp_path):
    finish(tmp_path, cell(seed=0))
    finish(tmp_path, cell(seed=1), diverged=True, clean_accuracy=None)
    RunFolder.of(tmp_path, cell(seed=2)).create(cell(seed=2))
    finish(tmp_path, cell(threshold=2.0), tightness=None, diverged=True)
    RunFolder.of(tmp_path, cell(threshold=3.0)).create(cell(threshold=3.0))
    table = robustness_table(tmp_path)
    assert table["status"].tolist() == ["1 of 3 diverged, 1 of 3 unfinished", "diverged", "unfinished"]
    assert table["clean_accuracy"].tolist()[:2] == [0.9, 0.9]
    assert table["tightness"].isna().tolist() == [False, True, True]
    rows = [row for row in lines(to_markdown(table)) if "unfinished" in row]
    assert rows
    assert all(set(row[4:]) == {"\N{EN DASH}"} for row in rows)


def test_runs_that_differ_otherwise_are_kept_apart(tmp_path):
    finish(tmp_path, cell(), clean_accuracy=0.1)
    finish(tmp_path, cell(width=32), clean_accuracy=0.2)
    finish(tmp_path, cell(constraint="weight-decay", threshold=math.inf, weight_decay=0.1), clean_accuracy=0.3)
    table = robustness_table(tmp_path)
    assert "weight_decay" not in table.columns  # it only follows the constraint
    assert table["width"].fillna(0).tolist() == [32, 0, 0]
    assert table["clean_accuracy"].tolist() == [0.2, 0.1, 0.3]


def test_several_folders_and_frames(tmp_path):
    finish(tmp_path / "a", cell())
    finish(tmp_path / "b", cell(model="liresnet"))
    table = robustness_table([tmp_path / "a", tmp_path / "b"])
    assert sorted(table["model"]) == ["liresnet", "mlp"]
    assert "| liresnet" in to_markdown(table)


def test_chosen_eps(tmp_path):
    finish(tmp_path, cell(eps=(0.1, 0.3, 36 / 255)))
    names = robustness_table(tmp_path, eps=[36 / 255]).columns
    assert [name for name in names if "certified_accuracy_eps" in name and "std" not in name] == [
        "certified_accuracy_eps_0.141176"
    ]


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one run, got none"):
        robustness_table(tmp_path)
    with pytest.raises(ValueError, match="expected at least one run"):
        robustness_table([])
    finish(tmp_path / "a", cell())
    finish(tmp_path / "b", cell())
    with pytest.raises(ValueError, match=r"expected every run once, got one run in .*a.* and .*b"):
        robustness_table([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"nothing was evaluated at eps 0.5, expected some of 0.3"):
        robustness_table(tmp_path / "a", eps=[0.5])
    with pytest.raises(ValueError, match=r"table.xls: expected a table named \*.csv, \*.md, \*.tex"):
        write_table(robustness_table(tmp_path / "a"), tmp_path / "table.xls")


def test_csv_keeps_every_digit(tmp_path):
    finish(tmp_path, cell(threshold=math.inf), clean_accuracy=1 / 3, tightness=None)
    table = robustness_table(tmp_path)
    (row,) = csv.DictReader(io.StringIO(to_csv(table)))
    assert float(row["clean_accuracy"]) == 1 / 3
    assert float(row["threshold"]) == math.inf
    assert row["tightness"] == ""
    assert list(row) == table.columns.tolist()


def test_latex_is_escaped_and_complete(tmp_path):
    for seed in (0, 1):
        finish(tmp_path, cell(threshold=math.inf, seed=seed, model="my_nets:build"), tightness=None)
    text = to_latex(robustness_table(tmp_path))
    assert text.count(r"\toprule") == text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert r"\caption{digits, my\_nets:build, l2: accuracy (\%) at $\varepsilon$ = 0.3}" in text
    assert r"$\infty$" in text
    assert r"90.0 $\pm$ 0.0" in text
    assert text.isascii()


def test_markdown_escapes_bars(tmp_path):
    finish(tmp_path, cell(dataset="a|b.npz"))
    finish(tmp_path, cell())
    assert r"a\|b.npz" in to_markdown(robustness_table(tmp_path))


@pytest.mark.parametrize(("name", "start"), [("t.csv", "dataset,"), ("t.md", "**digits"), ("t.tex", "\\begin{table}")])
def test_files(tmp_path, name, start):
    finish(tmp_path / "runs", cell())
    write_table(robustness_table(tmp_path / "runs"), tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


@pytest.mark.parametrize("width", [100, 120])
def test_terminal_blocks_fit_and_lose_nothing(tmp_path, width):
    names = ("fgsm", "pgd", "autoattack", "deepfool", "cw", "ddn", "fmn")
    attacked = {f"accuracy_{name}_eps_0.3": 0.7 + 0.01 * at for at, name in enumerate(names)}
    for seed in (0, 1):
        one = cell(constraint="gradient-clip", threshold=math.inf, gradient_clip=1.0, seed=seed, attacks=names)
        finish(tmp_path, one, **attacked)
    stream = io.StringIO()
    print_table(robustness_table(tmp_path), Console(file=stream, width=width))
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for at, name in enumerate(names):
        assert name in shown
        assert f"{70 + at}.0 ± 0.0" in shown


def test_diverged_rows_are_marked_in_the_terminal(tmp_path):
    finish(tmp_path, cell(), diverged=True)
    stream = io.StringIO()
    print_table(robustness_table(tmp_path), Console(file=stream, width=100))
    assert stream.getvalue().count("diverged") == 3

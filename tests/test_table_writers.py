import csv
import io
import math

import pandas as pd
import pytest
from frames import frame, run
from rich.console import Console

from speccert.experiments.table_text import MISSING
from speccert.experiments.table_writers import (
    print_table,
    to_csv,
    to_latex,
    to_markdown,
    to_parquet,
    write_table,
)
from speccert.experiments.tables import pivot_table, robustness_table

PIVOT = pd.DataFrame(
    {
        "model": ["mlp", "my_net"],
        "clean_accuracy[threshold=0.5]": [0.85, 0.9],
        "clean_accuracy_ci95[threshold=0.5]": [0.0123, math.nan],
        "runs[threshold=0.5]": [3, 1],
        "status[threshold=0.5]": ["1 of 3 failed", ""],
        "clean_accuracy[threshold=inf]": [math.nan, math.nan],
        "clean_accuracy_ci95[threshold=inf]": [math.nan, math.nan],
        "runs[threshold=inf]": [2, 0],
        "status[threshold=inf]": ["pending", ""],
    }
)


def shown(table, **options):
    stream = io.StringIO()
    print_table(table, Console(file=stream, **options))
    return stream.getvalue()


def test_a_bound_that_all_share_is_in_the_title_and_the_product_beside_it():
    extra = {"certified_accuracy_product_eps_0.3": 0.25}
    text = to_markdown(robustness_table(frame(run(bound="auto", results=extra), run(constraint="clip", bound="auto"))))
    assert "**digits, mlp, l2, bound auto: accuracy and bounds**" in text
    assert "certified (product)" in text
    assert "| 25.0 |" in " ".join(text.split())
    mixed = to_markdown(robustness_table(frame(run(bound="auto", results=extra), run())))
    assert "**digits, mlp, l2: accuracy and bounds**" in mixed
    assert "| auto " in mixed


def test_markdown_of_a_pivot():
    assert to_markdown(PIVOT) == (
        "**clean (%), mean ± 95 % interval**\n\n"
        "| model   |              threshold=0.5 |   threshold=∞ |\n"
        "|---------|----------------------------|---------------|\n"
        f"| mlp     | 85.0 ± 1.2 (1 of 3 failed) |   {MISSING} (pending) |\n"
        "| my_net  |                   **90.0** |               |\n"
    )


def test_latex_of_a_pivot():
    assert to_latex(PIVOT) == (
        "\\begin{table}\n\\centering\n\\caption{clean (\\%), mean $\\pm$ 95 \\% interval}\n"
        "\\begin{tabular}{lrr}\n\\toprule\n"
        "model & threshold=0.5 & threshold=$\\infty$ \\\\\n\\midrule\n"
        "mlp & 85.0 $\\pm$ 1.2 (1 of 3 failed) & -- (pending) \\\\\n"
        "my\\_net & \\textbf{90.0} &  \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def test_terminal_of_a_pivot():
    lines = [line.rstrip() for line in shown(PIVOT, width=100).splitlines()]
    assert lines == [
        "clean (%), mean ± 95 % interval",
        "",
        " model                 threshold=0.5   threshold=∞",
        " ─────────────────────────────────────────────────",
        f" mlp      85.0 ± 1.2 (1 of 3 failed)   {MISSING} (pending)",
        " my_net                         90.0",
        "",
    ]


def test_markdown_of_a_robustness_table():
    runs = frame(
        *(run(seed=seed, results={"clean_accuracy": value}) for seed, value in enumerate([0.8, 0.9, 0.85])),
        run(threshold=math.inf, results={"clean_accuracy": 0.95, "step_ratio": 0.9}),
        run("pending", threshold=2.0),
    )
    title, _, *rows = to_markdown(robustness_table(runs)).split("\n\n**")[0].splitlines()
    assert title == "**digits, mlp, l2: accuracy and bounds, mean ± 95 % interval**"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][:5] == ["constraint", "threshold", "runs", "done", "status"]
    assert cells[0][5:] == ["clean (%)", "Lipschitz bound", "lower estimate", "gradient norm", "step time ratio"]
    assert cells[2] == ["cap", "1", "3", "3", "", "85.0 ± 12.4", "2 ± 0", "1.5 ± 0", "0.05 ± 0", "1.1 ± 0"]
    assert cells[3] == ["cap", "2", "1", "0", "pending", *[MISSING] * 5]
    assert cells[4] == ["cap", "∞", "1", "1", "", "**95.0**", "2", "1.5", "0.05", "**0.9**"]


def test_the_best_is_bold_in_a_terminal_and_bad_rows_are_red():
    runs = frame(
        run(), run(threshold=2.0, results={"clean_accuracy": 0.8}), run(threshold=3.0, results={"diverged": True})
    )
    text = shown(robustness_table(runs), width=120, force_terminal=True, color_system="standard")
    assert "\x1b[1m  90.0" in text
    assert "\x1b[1m  80.0" not in text
    assert "\x1b[31m diverged" in text
    assert text.count("diverged") == 3
    assert "\x1b" not in shown(robustness_table(runs), width=120)


@pytest.mark.parametrize("width", [100, 120])
def test_terminal_blocks_fit_and_lose_nothing(width):
    names = ("fgsm", "pgd", "autoattack", "deepfool", "cw", "ddn", "fmn")
    attacked = {f"accuracy_{name}_eps_0.3": 0.7 + 0.01 * at for at, name in enumerate(names)}
    one = {"constraint": "gradient-clip", "threshold": math.inf, "gradient_clip": 1.0, "attacks": names}
    table = robustness_table(frame(*(run(**one, seed=seed, results=attacked) for seed in (0, 1))))
    text = shown(table, width=width)
    assert max(map(len, text.splitlines())) <= width
    for at, name in enumerate(names):
        assert name in text
        assert f"{70 + at}.0 ± 0.0" in text


def test_brackets_in_a_terminal_are_no_markup():
    assert "a[bold]b.npz" in shown(robustness_table(frame(run(dataset="a[bold]b.npz"), run())), width=120)


def test_csv_keeps_every_digit_and_only_numbers():
    runs = frame(run(threshold=math.inf, results={"clean_accuracy": 1 / 3, "tightness": None}), run())
    table = robustness_table(runs)
    _, row = csv.DictReader(io.StringIO(to_csv(table)))
    assert float(row["clean_accuracy"]) == 1 / 3
    assert float(row["threshold"]) == math.inf
    assert row["tightness"] == row["clean_accuracy_ci95"] == ""
    assert list(row) == table.columns.tolist()
    assert "*" not in to_csv(table)


@pytest.mark.parametrize("kind", ["robustness", "pivot"])
def test_parquet_reads_back_as_the_table(kind):
    runs = frame(run(), run("pending", threshold=2.0, width=8), run("failed", "x", threshold=math.inf))
    table = robustness_table(runs) if kind == "robustness" else pivot_table(runs, "threshold", "width", "tightness")
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(to_parquet(table))), table)


def test_markdown_escapes_bars():
    assert r"a\|b.npz" in to_markdown(robustness_table(frame(run(dataset="a|b.npz"), run())))


FLAGGED = {
    "masking_flags": ["flat-loss"],
    "attack_complete": False,
    "tightness_median": 0.81,
    "attack_forwards": 51200,
    "attack_gradients": 25600,
    "attack_s": 12.0,
    "certified_skipped_eps_0.3": 20,
}


@pytest.mark.parametrize("width", [80, 100, 160])
def test_flags_are_in_every_format_and_fit_a_terminal(width):
    table = robustness_table(frame(run(results=FLAGGED), run(threshold=2.0)))
    first, _ = csv.DictReader(io.StringIO(to_csv(table)))
    assert first["flags"] == "flat-loss, attacks incomplete"
    assert pd.read_parquet(io.BytesIO(to_parquet(table)))["flags"].tolist() == ["flat-loss, attacks incomplete", ""]
    for text in (shown(table, width=width), to_markdown(table), to_latex(table)):
        assert text.count("A: flat-loss, attacks incomplete") == 2  # below radii and distances, and accuracies
        assert "after X: accuracy left by the attack X and the cheaper ones before it" in text
    assert max(map(len, shown(table, width=max(width, 100)).splitlines())) <= max(width, 100)


def test_files_hold_what_the_terminal_leaves_out():
    table = robustness_table(frame(run(results=FLAGGED)))
    assert "gradients" in shown(table, width=120)
    assert "spared" not in shown(table, width=120)
    wide = io.StringIO()
    print_table(table, Console(file=wide, width=120), wide=True)
    for text in (wide.getvalue(), to_markdown(table), to_latex(table)):
        assert "spared" in text
        assert "seconds" in text
    (row,) = csv.DictReader(io.StringIO(to_csv(table)))
    assert (row["gradients_per_sample"], row["forwards_per_sample"], row["certified_skipped_eps_0.3"]) == (
        *("512.0", "1024.0", "20.0"),
    )  # fmt: skip


def test_latex_notes_stand_inside_the_table():
    text = to_latex(robustness_table(frame(run(results=FLAGGED))))
    assert "\\end{tabular}\n\\par{\\footnotesize A: flat-loss" in text
    assert text.isascii()


NASTY = r"data\50%_{a}&b#1~2^3$<>|.npz"


def test_latex_is_escaped_and_complete():
    runs = frame(run(dataset=NASTY, threshold=math.inf), run(dataset=NASTY, threshold=math.inf, seed=1), run())
    text = to_latex(robustness_table(runs))
    assert text.count(r"\toprule") == text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert (
        r"data\textbackslash{}50\%\_\{a\}\&b\#1\textasciitilde{}2\textasciicircum{}3\$\textless{}\textgreater{}" in text
    )
    assert r"$\infty$" in text
    assert r"90.0 $\pm$ 0.0" in text
    assert r"\varepsilon" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("name", "start"),
    [("t.csv", b"dataset,"), ("t.md", b"**digits"), ("t.tex", b"\\begin{table}"), ("t.parquet", b"PAR1")],
)
def test_files(tmp_path, name, start):
    write_table(robustness_table(frame(run())), tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table.xls: expected a table named \*.csv, \*.md, \*.tex, \*.parquet"):
        write_table(PIVOT, tmp_path / "table.xls")

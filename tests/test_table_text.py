import math
import re

import pandas as pd
import pytest
from frames import frame, run
from hypothesis import given, settings
from hypothesis import strategies as st

from speccert.experiments.table_text import MISSING, _column, blocks
from speccert.experiments.tables import pivot_table, robustness_table


def pivot(*rows, value="tightness"):
    """A hand-made pivot of one column: rows of mean, half-width, runs and status."""
    names = ("mean", "half", "runs", "status")
    filled = [
        {**dict.fromkeys(names), "half": math.nan, "runs": 1, "status": "", **dict(zip(names, row, strict=False))}
        for row in rows
    ]
    place = "[seed=0]"
    columns = (f"{value}{place}", f"{value}_ci95{place}", f"runs{place}", f"status{place}")
    parts = {column: [row[name] for row in filled] for column, name in zip(columns, names, strict=True)}
    return pd.DataFrame({"model": [f"m{at}" for at in range(len(rows))], **parts})


def texts(table):
    (block,) = blocks(table, math.inf)
    return [row[1].shown() for row in block.rows]


def best(table):
    (block,) = blocks(table, math.inf)
    return [row[1].best for row in block.rows]


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.32415, 0.0125, "0.324 ± 0.013"),
        (0.32415, 0.096, "0.324 ± 0.096"),
        (0.32415, 0.0996, "0.32 ± 0.10"),
        (0.32415, 0.00012, "0.32415 ± 0.00012"),
        (12.345, 1.25, "12.3 ± 1.2"),
        (12.345, 34.5, "12 ± 34"),
        (1234.5, 124.9, "1230 ± 120"),
        (-0.001, 0.5, "0.00 ± 0.50"),
        (0.0, 2e-5, "(0.0 ± 2.0)e-5"),
        (3.2e-7, 1.25e-8, "(3.20 ± 0.12)e-7"),
        (1.2345e8, 2.1e6, "(1.234 ± 0.021)e8"),
        (0.75, 0.0, "0.75 ± 0"),
        (2.0, 1e-12, "2 ± 0"),
        (0.1 + 0.2, 5e-17, "0.3 ± 0"),
        (123456.0, 0.001, "123456 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (5e-324, 5e-324, "0 ± 0"),
        (0.324159, math.nan, "0.3242"),
        (10000.0, math.nan, "10000"),
        (12345.678, math.nan, "1.235e+04"),
        (math.inf, math.nan, "∞"),
        (math.nan, math.nan, MISSING),
    ],
)
def test_digits(mean, half, text):
    assert texts(pivot((mean, half))) == [text]


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.85, 0.1242, "85.0 ± 12.4"),
        (0.85, 0.0, "85.0 ± 0.0"),
        (0.85, 1e-9, "85.0 ± 0.0"),
        (1 / 3, math.nan, "33.3"),
        (1.0, 2.5412, "100.0 ± 254.1"),
        (math.nan, math.nan, MISSING),
    ],
)
def test_accuracies_are_percent_with_one_decimal(mean, half, text):
    assert texts(pivot((mean, half), value="worst_case_accuracy_eps_0.3")) == [text]


@settings(deadline=None, max_examples=300)
@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_shown_numbers_are_close_and_short(mean, half):
    (text,) = texts(pivot((mean, half)))
    found = re.fullmatch(r"\(?(-?[\d.e+-]+) ± ([\d.]+)\)?(?:e(-?\d+))?", text)
    scale = 10.0 ** int(found[3] or 0)
    size = max(abs(mean), half)
    assert abs(float(found[1]) * scale - mean) <= max(0.051 * half, 5.1e-4 * size, 1e-300)
    assert abs(float(found[2]) * scale - half) <= max(0.051 * half, 5.1e-5 * size, 1e-300)
    assert len(found[2].replace(".", "").strip("0")) <= 2
    decimals = [len(part.partition(".")[2]) for part in found.groups()[:2]]
    assert float(found[2]) == 0 or decimals[0] == decimals[1]


def test_best_is_the_highest_and_ties_as_shown_are_all_best():
    assert best(pivot((0.30004,), (0.30001,), (0.2,))) == [True, True, False]
    assert best(pivot((0.90049,), (0.9001,), (0.89,), value="clean_accuracy")) == [True, True, False]
    assert best(pivot((0.5,), (0.5,))) == [True, True]


def test_a_mean_with_few_digits_shown_does_not_win_by_them():
    table = pivot((0.97, 12.0), (0.98, 0.011))
    assert texts(table) == ["1 ± 12", "0.980 ± 0.011"]
    assert best(table) == [False, True]


def test_best_step_ratio_is_the_lowest():
    assert best(pivot((1.5,), (0.9,), (1.1,), value="step_ratio")) == [False, True, False]


@pytest.mark.parametrize("value", ["lipschitz_upper", "lipschitz_lower", "gradient_norm", "test_count", "train_s"])
def test_columns_without_a_best(value):
    assert best(pivot((1.5,), (0.9,), value=value)) == [False, False]


def test_one_number_is_no_winner():
    assert best(pivot((0.5,))) == [False]
    assert best(pivot((0.5,), (math.nan, math.nan, 1, "pending"))) == [False, False]
    assert best(pivot((math.nan,), (math.nan,))) == [False, False]


def test_rows_with_a_diverged_run_or_a_broken_certificate_never_win():
    table = pivot(
        (0.9, math.nan, 1, "diverged"),
        (0.8, math.nan, 3, "1 of 3 certificate broken"),
        (0.1,),
        (0.2, 0.1, 3, "1 of 3 failed"),
    )
    assert best(table) == [False, False, False, True]
    assert best(pivot((0.9, math.nan, 1, "diverged"), (0.8, math.nan, 1, "diverged"))) == [False, False]


def test_a_pivot_shows_states_and_leaves_blank_what_is_absent():
    table = pivot(
        (0.3, 0.1, 3, "1 of 3 pending"), (math.nan, math.nan, 2, "pending"), (math.nan, math.nan, 0, ""), (math.nan,)
    )
    assert texts(table) == ["0.30 ± 0.10 (1 of 3 pending)", f"{MISSING} (pending)", "", MISSING]
    (block,) = blocks(table, math.inf)
    assert block.title == "tightness, mean ± 95 % interval"
    assert block.headers == ["model", "seed=0"]
    assert block.align == ["left", "right"]


@pytest.mark.parametrize(
    ("value", "title"),
    [
        ("certified_accuracy_eps_0.3", "certified accuracy (%) at ε = 0.3"),
        ("accuracy_pgd_eps_0.3", "pgd accuracy (%) at ε = 0.3"),
        ("clean_accuracy", "clean (%)"),
        ("train_s", "train_s"),
    ],
)
def test_titles_of_pivots(value, title):
    (block,) = blocks(pivot_table(frame(run()), "model", "threshold", value), math.inf)
    assert block.title == title


def test_infinite_thresholds_in_heads():
    runs = frame(run(threshold=math.inf, dataset="a=info.npz"))
    (block,) = blocks(pivot_table(runs, "model", ["threshold", "dataset"], "tightness"), math.inf)
    assert block.headers == ["model", "threshold=∞, dataset=a=info.npz"]


def test_blocks_of_the_robustness_table():
    overview, distances, accuracy = blocks(robustness_table(frame(run())), math.inf)
    assert overview.title == "digits, mlp, l2: accuracy and bounds"
    assert overview.headers == [
        "constraint", "threshold", "clean (%)", "Lipschitz bound", "lower estimate", "gradient norm", "step time ratio",
    ]  # fmt: skip
    assert [cell.shown() for cell in overview.rows[0]] == ["cap", "1", "90.0", "2", "1.5", "0.05", "1.1"]
    assert [cell.shown() for cell in distances.rows[0]] == ["cap", "1", "0.32", "0.3", "0.4", "0.75"]
    assert accuracy.title == "digits, mlp, l2: accuracy (%) at ε = 0.3"
    assert accuracy.headers[2:] == ["certified", "certified (attacked)", "worst case", "after pgd", "after ddn"]
    assert [cell.shown() for cell in accuracy.rows[0]] == ["cap", "1", "50.0", "48.0", "60.0", "62.0", "61.0"]


def test_attacked_columns_are_shown_for_a_subset_only():
    table = robustness_table(frame(run(results={"attacked_count": 100})))
    assert not any("attacked" in header for block in blocks(table, math.inf) for header in block.headers)
    assert "certified_accuracy_attacked_eps_0.3" in table.columns


def test_counts_and_status_are_shown_where_they_say_something():
    def labels(*runs, **options):
        return blocks(robustness_table(frame(*runs), **options), math.inf)[0].headers[:-5]

    assert labels(run()) == ["constraint", "threshold"]
    assert labels(run(), run(seed=1)) == ["constraint", "threshold", "runs"]
    assert labels(run(), run("pending", seed=1)) == ["constraint", "threshold", "runs", "done", "status"]
    assert labels(run(), run("pending", threshold=2.0)) == ["constraint", "threshold", "status"]
    assert labels(run(), run(model="liresnet")) == ["model", "constraint", "threshold"]
    assert labels(run(), run(seed=1), aggregate=False) == ["constraint", "threshold", "seed"]
    assert labels(run(), run(seed=1), by=["model", "norm"]) == ["model", "norm", "runs"]


def test_missing_numbers_are_shown_as_missing():
    for block in blocks(robustness_table(frame(run(), run("failed", "x", threshold=2.0))), math.inf):
        bad = block.rows[1]
        assert [cell.shown() for cell in bad[:3]] == ["cap", "2", "failed"]
        assert {cell.shown() for cell in bad[3:]} == {MISSING}
        assert all(cell.bad for cell in bad)
        assert not any(cell.bad for cell in block.rows[0])


def test_rows_of_other_norms_do_not_compete_for_the_best():
    rows = {"norm": ["l2", "l2", "linf", "linf"], "status": [""] * 4, "clean_accuracy": [0.9, 0.8, 0.3, 0.4]}
    assert [cell.best for cell in _column(pd.DataFrame(rows), "clean_accuracy").cells] == [True, False, False, True]


COSTS = {"attack_forwards": 51200, "attack_gradients": 25600, "attack_s": 12.0, "certified_skipped_eps_0.3": 20}


def doubted(*flags, complete=True, **settings):
    values = {"masking_flags": list(flags), "attack_complete": complete, "tightness_median": 0.81, **COSTS}
    return run(results={**values, **settings.pop("results", {})}, **settings)


def test_costs_of_attacks_are_a_block_of_their_own_and_all_of_them_where_it_is_wide():
    table = robustness_table(frame(doubted(), doubted(seed=1, results={"attack_gradients": 30000})))
    narrow = blocks(table, math.inf, wide=False)[-1]
    assert narrow.title == "digits, mlp, l2: attacks"
    assert narrow.headers == [
        "constraint", "threshold", "runs", "samples attacked", "gradients a sample", "forwards a sample",
    ]  # fmt: skip
    assert [cell.shown() for cell in narrow.rows[0]] == ["cap", "1", "2", "50", "556", "1024"]  # (512 + 600) / 2
    assert narrow.notes == []
    wide = blocks(table, math.inf)[-1]
    assert wide.headers[-2:] == ["seconds", "spared at 0.3"]
    assert [cell.shown() for cell in wide.rows[0]][-2:] == ["12", "20"]
    assert wide.notes == ["spared: samples that attacks at that ε left out, since they are certified there"]


def test_the_median_of_radius_over_distance_is_with_the_radii():
    distances = blocks(robustness_table(frame(doubted())), math.inf)[1]
    assert dict(zip(distances.headers, distances.rows[0], strict=True))["median radius/distance"].text == "0.81"


def test_flags_are_letters_told_below_each_block_of_what_attacks_found():
    table = robustness_table(
        frame(
            doubted("flat-loss", "zero-gradients"),
            doubted(threshold=2.0),
            doubted(threshold=3.0, complete=False),
            doubted("zero-gradients", "flat-loss", threshold=4.0),
            doubted("flat-loss", "zero-gradients", threshold=5.0),
        )
    )
    overview, distances, accuracy, costs = blocks(table, math.inf)
    assert "flags" not in overview.headers + costs.headers
    assert overview.notes == []
    for block in (distances, accuracy):
        at = block.headers.index("flags")
        assert [row[at].shown() for row in block.rows] == ["A", "", "B", "C", "A"]
        told = [note for note in block.notes if ": " in note and note[0] in "ABC"]
        assert told == ["A: flat-loss, zero-gradients", "B: attacks incomplete", "C: zero-gradients, flat-loss"]
        assert "attacks with flags may have been too weak: masked gradients, or a budget that ended them" in block.notes


def test_every_letter_is_told_where_there_are_more_than_the_alphabet():
    rows = [doubted(*[f"flag-{word}" for word in "abcde"[: 1 + at // 8]], *[f"z{'q' * at}"], threshold=1.0 + at)
            for at in range(30)]  # fmt: skip
    block = blocks(robustness_table(frame(*rows)), math.inf)[1]
    letters = [row[block.headers.index("flags")].text for row in block.rows]
    assert letters[:2] + letters[25:28] == ["A", "B", "Z", "AA", "AB"]
    assert {note.partition(":")[0] for note in block.notes} >= set(letters)


def test_blocks_without_a_flag_have_neither_column_nor_note():
    for block in blocks(robustness_table(frame(run(attack_schedule="each"))), math.inf):
        assert "flags" not in block.headers
        assert block.notes == []


def test_attacks_of_a_cascade_are_headed_and_told_as_such():
    accuracy = blocks(robustness_table(frame(run())), math.inf)[2]
    assert accuracy.headers[-2:] == ["after pgd", "after ddn"]
    assert accuracy.notes == ["after X: accuracy left by the attack X and the cheaper ones before it"]
    each = blocks(robustness_table(frame(run(attack_schedule="each"))), math.inf)[2]
    assert each.headers[-2:] == ["pgd", "ddn"]
    mixed = blocks(robustness_table(frame(run(), run(threshold=2.0, attack_schedule="each"))), math.inf)[2]
    assert mixed.headers[-2:] == ["pgd", "ddn"]
    assert [row[mixed.headers.index("attack_schedule")].text for row in mixed.rows] == ["cascade", "each"]
    assert mixed.notes == ["cascade: the accuracy of an attack is what it and the cheaper ones before it left"]


def test_what_flagged_attacks_left_standing_never_wins():
    rows = frame(
        doubted("flat-loss", results={"worst_case_accuracy_eps_0.3": 0.9, "certified_accuracy_eps_0.3": 0.8}),
        doubted(threshold=2.0, results={"worst_case_accuracy_eps_0.3": 0.7}),
        doubted(threshold=3.0, complete=False, results={"worst_case_accuracy_eps_0.3": 0.8}),
    )
    accuracy = blocks(robustness_table(rows), math.inf)[2]
    columns = dict(zip(accuracy.headers, zip(*accuracy.rows, strict=True), strict=True))
    assert [cell.best for cell in columns["worst case"]] == [False, True, False]
    assert [cell.best for cell in columns["certified"]] == [True, False, False]  # rests on no attack
    pivoted = blocks(pivot_table(rows, "threshold", "seed", "worst_case_accuracy_eps_0.3"), math.inf)[0]
    assert [row[1].best for row in pivoted.rows] == [False, True, False]
    assert [row[1].note for row in pivoted.rows] == ["flat-loss", "", "attacks incomplete"]
    assert pivoted.notes == ["attacks with flags may have been too weak: masked gradients, or a budget that ended them"]


def test_a_cascade_alone_may_win_in_a_pivot():
    rows = frame(run(), run(threshold=2.0, results={"accuracy_pgd_eps_0.3": 0.4}))
    (block,) = blocks(pivot_table(rows, "threshold", "seed", "accuracy_pgd_eps_0.3"), math.inf)
    assert [row[1].shown("*{}*") for row in block.rows] == ["*62.0* (cascade)", "40.0 (cascade)"]
    assert block.notes == ["cascade: the accuracy of an attack is what it and the cheaper ones before it left"]

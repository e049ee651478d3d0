import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from frames import RESULTS, cell, frame, run
from hypothesis import given, settings
from hypothesis import strategies as st

from speccert.experiments.spec import RunSpec
from speccert.experiments.store import RunFolder
from speccert.experiments.tables import collect_runs, pivot_table, robustness_table


def finish(output, config, **changes):
    folder = RunFolder.of(output, config)
    folder.create(config)
    folder.write_summary({**RESULTS, **changes})


def test_rows_are_sorted_by_constraint_and_threshold_with_infinity_last():
    thresholds = [math.inf, 4.0, 0.5, 10.0]
    runs = [run(constraint=name, threshold=at) for name in ("clip", "cap") for at in thresholds]
    table = robustness_table(frame(run(constraint="none", threshold=math.inf), *runs))
    expected = [(name, threshold) for name in ("cap", "clip") for threshold in sorted(thresholds)] + [
        ("none", math.inf)
    ]
    assert list(zip(table["constraint"], table["threshold"], strict=True)) == expected


def test_columns_and_means():
    runs = frame(*(run(seed=seed, results={"clean_accuracy": value}) for seed, value in enumerate([0.8, 0.9])))
    table = robustness_table(runs)
    labels = ["dataset", "model", "norm", "constraint", "threshold", "runs", "done", "status", "attack_schedule"]
    assert table.columns[:11].tolist() == [*labels, "clean_accuracy", "clean_accuracy_ci95"]
    assert "accuracy_ddn_eps_0.3_ci95" in table.columns
    (row,) = table.to_dict("records")
    assert row["clean_accuracy"] == pytest.approx(0.85)
    assert row["clean_accuracy_ci95"] == pytest.approx(12.7062 * 0.05, rel=1e-5)  # s / sqrt(2) = 0.05
    assert not [name for name in table.columns if name.endswith("_std")]


def tighter(bound="auto", **changes):
    extra = {"certified_accuracy_product_eps_0.3": 0.25, "lipschitz_product_upper": 4.0, "bounds_s": 3.0}
    return run(bound=bound, results={**extra, **changes})


def test_a_tighter_bound_is_named_and_stands_beside_the_product():
    mixed = robustness_table(frame(run(), tighter()))
    assert mixed.columns[:6].tolist() == ["dataset", "model", "norm", "bound", "constraint", "threshold"]
    assert mixed["bound"].tolist() == ["auto", "product"]
    assert mixed["certified_accuracy_product_eps_0.3"].tolist() == [0.25, pytest.approx(math.nan, nan_ok=True)]
    names = [name for name in mixed.columns if "_eps_" in name and not name.endswith("_ci95")]
    assert names[:2] == ["certified_accuracy_eps_0.3", "certified_accuracy_product_eps_0.3"]
    assert robustness_table(frame(tighter()))["bound"].tolist() == ["auto"]


def test_without_a_tighter_bound_nothing_is_added():
    table = robustness_table(frame(run()))
    assert not {"bound", "certified_accuracy_product_eps_0.3"} & set(table.columns)
    assert robustness_table(frame(run(), tighter()), by="bound")["bound"].tolist() == ["auto", "product"]


def test_a_row_a_seed():
    table = robustness_table(
        frame(*(run(seed=seed, results={"clean_accuracy": 0.5 + 0.1 * seed}) for seed in (1, 0))), aggregate=False
    )
    assert table["seed"].tolist() == [0, 1]
    assert table["clean_accuracy"].tolist() == [0.5, 0.6]
    assert not [name for name in table.columns if name.endswith("_ci95") or name in ("runs", "done")]


def test_one_run_has_no_interval():
    assert math.isnan(robustness_table(frame(run()))["clean_accuracy_ci95"].item())


def test_cells_that_are_not_finished_are_rows():
    runs = frame(
        run(seed=0),
        run("failed", "out of memory", seed=1),
        run("pending", threshold=2.0),
        run("failed", "certificate broken: sample 3", threshold=3.0),
        run("running", threshold=4.0, seed=0),
        run("pending", threshold=4.0, seed=1),
    )
    table = robustness_table(runs)
    assert table["threshold"].tolist() == [1, 2, 3, 4]
    assert table["runs"].tolist() == [2, 1, 1, 2]
    assert table["done"].tolist() == [1, 0, 0, 0]
    assert table["status"].tolist() == [
        "1 of 2 failed",
        "pending",
        "certificate broken",
        "1 of 2 running, 1 of 2 pending",
    ]
    assert table["clean_accuracy"].isna().tolist() == [False, True, True, True]


def test_a_study_of_which_nothing_is_finished_has_all_its_rows_and_columns():
    table = robustness_table(frame(run("pending"), run("pending", threshold=2.0)))
    assert table["status"].tolist() == ["pending", "pending"]
    assert table["certified_accuracy_eps_0.3"].isna().all()


def test_runs_that_differ_otherwise_are_kept_apart():
    runs = frame(
        run(results={"clean_accuracy": 0.1}),
        run(width=32, results={"clean_accuracy": 0.2}),
        run(constraint="weight-decay", threshold=math.inf, weight_decay=0.1, results={"clean_accuracy": 0.3}),
    )
    table = robustness_table(runs)
    assert "weight_decay" not in table.columns  # it only follows the constraint
    assert table["width"].fillna(0).tolist() == [32, 0, 0]
    assert table["clean_accuracy"].tolist() == [0.2, 0.1, 0.3]


def test_rows_by_any_field_are_means_over_everything_else():
    spec = {"constraints": ["cap", "clip"], "thresholds": [1, 2], "seeds": [0, 1], "eps": [0.3]}
    rng = np.random.default_rng(0)
    rows = [
        run(model=model, constraint=one.constraint, threshold=one.threshold, seed=one.seed,
            results={"tightness": rng.random()})
        for model in ("mlp", "liresnet")
        for one in RunSpec.from_mapping(spec).cells()
    ]  # fmt: skip
    runs = frame(*rows)
    table = robustness_table(runs, by=("model", "constraint"))
    assert table.columns[:5].tolist() == ["model", "constraint", "runs", "done", "status"]
    expected = runs.groupby(["model", "constraint"])["tightness"].agg(["mean", "std"])
    assert list(zip(table["model"], table["constraint"], strict=True)) == expected.index.tolist()
    np.testing.assert_allclose(table["tightness"], expected["mean"])
    np.testing.assert_allclose(table["tightness_ci95"], 3.182446 * expected["std"] / 2, rtol=1e-6)  # n = 4
    assert robustness_table(runs, by="seed")["runs"].tolist() == [8, 8]


def test_several_folders(tmp_path):
    finish(tmp_path / "a", cell())
    RunFolder.of(tmp_path / "b", cell(model="liresnet")).create(cell(model="liresnet"))
    finish(tmp_path / "b", cell(model="liresnet", seed=1))
    table = robustness_table([tmp_path / "a", tmp_path / "b"])
    assert table["model"].tolist() == ["liresnet", "mlp"]
    assert table["status"].tolist() == ["1 of 2 interrupted", ""]
    assert table["clean_accuracy"].tolist() == [0.9, 0.9]


def test_chosen_eps():
    names = robustness_table(frame(run(eps=(0.1, 0.3, 36 / 255))), eps=[36 / 255]).columns
    assert [name for name in names if "certified_accuracy_eps" in name and "ci95" not in name] == [
        "certified_accuracy_eps_0.141176"
    ]


def test_bad_requests_are_refused(tmp_path):
    runs = frame(run())
    with pytest.raises(ValueError, match="expected at least one run, got none"):
        robustness_table([])
    with pytest.raises(ValueError, match=r"expected every run once, got one run in runs/\w+ and runs/\w+"):
        collect_runs(frame(run(), run()))
    with pytest.raises(ValueError, match=r"nothing was evaluated at eps 0.5, expected some of 0.3"):
        robustness_table(runs, eps=[0.5])
    with pytest.raises(
        ValueError, match=r"^unknown config field 'modle' \(did you mean model.*\); allowed: dataset, model"
    ):
        robustness_table(runs, by=["modle"])
    with pytest.raises(ValueError, match="expected one or more different config fields, got none"):
        robustness_table(runs, by=[])
    with pytest.raises(ValueError, match="expected one or more different config fields, got seed, seed"):
        robustness_table(runs, by=["seed", "seed"])
    with pytest.raises(ValueError, match="seed among the fields of by"):
        robustness_table(runs, by="model", aggregate=False)


@st.composite
def studies(draw):
    models, thresholds, seeds = (draw(st.integers(1, size)) for size in (2, 3, 3))
    value = st.floats(0, 1, allow_subnormal=False)
    rows = [
        run(
            model=("mlp", "liresnet")[model],
            threshold=0.5 * (1 + threshold),
            seed=seed,
            results={"tightness": draw(value)},
        )
        for model in range(models)
        for threshold in range(thresholds)
        for seed in range(seeds)
    ]
    kept = draw(st.lists(st.sampled_from(rows), min_size=1, unique_by=lambda row: row["id"]))
    return frame(*kept)


@settings(deadline=None, max_examples=25)
@given(studies(), st.sampled_from([("model", "threshold"), ("threshold", "seed"), ("seed", "model")]))
def test_pivots_agree_with_pandas(runs, fields):
    rows, columns = fields
    expected = runs.pivot_table("tightness", rows, columns, sort=True)
    table = pivot_table(runs, rows, columns, "tightness")
    assert table[rows].tolist() == expected.index.tolist()
    shown = [name for name in table.columns if name.startswith("tightness[")]
    assert shown == [f"tightness[{columns}={value:g}]" if columns != "model" else f"tightness[model={value}]"
                     for value in expected.columns]  # fmt: skip
    np.testing.assert_allclose(table[shown].to_numpy(), expected.to_numpy(), rtol=1e-12)
    counts = runs.pivot_table("tightness", rows, columns, aggfunc="count", fill_value=0)
    np.testing.assert_array_equal(table[[name for name in table if name.startswith("runs[")]], counts)


def test_a_pivot_tells_what_is_absent_from_what_is_not_finished():
    runs = frame(
        run(seed=0, results={"tightness": 0.2}),
        run("pending", seed=1),
        run("pending", threshold=math.inf),
        run(constraint="none", threshold=math.inf),
    )
    table = pivot_table(runs, "constraint", ["threshold", "norm"], "tightness")
    assert table["constraint"].tolist() == ["cap", "none"]
    one, many = "[threshold=1, norm=l2]", "[threshold=inf, norm=l2]"
    parts = ("tightness", "tightness_ci95", "runs", "status")
    assert table.columns.tolist() == ["constraint", *(f"{part}{place}" for place in (one, many) for part in parts)]
    assert table[f"tightness{one}"].fillna(-1).tolist() == [0.2, -1]
    assert table[f"runs{one}"].tolist() == [2, 0]
    assert table[f"status{one}"].tolist() == ["1 of 2 pending", ""]
    assert table[f"tightness{many}"].fillna(-1).tolist() == [-1, 0.75]
    assert table[f"status{many}"].tolist() == ["pending", ""]


def test_columns_of_a_pivot_are_sorted_and_never_merged():
    thresholds = [10.0, math.inf, 0.12345678, 0.12345679]
    runs = frame(*(run(threshold=at) for at in thresholds), run(threshold=2.0, width=8))
    table = pivot_table(runs, "model", "threshold", "clean_accuracy")
    assert [name for name in table if name.startswith("runs[")] == [
        "runs[threshold=0.12345678]", "runs[threshold=0.12345679]", "runs[threshold=2]", "runs[threshold=10]",
        "runs[threshold=inf]",
    ]  # fmt: skip
    assert [name for name in pivot_table(runs, "model", "width", "tightness") if "runs" in name] == [
        "runs[width=8]",
        "runs[width=unset]",
    ]


def test_results_of_a_pivot():
    runs = frame(run(), run(seed=1, results={"diverged": True}))
    assert (
        pivot_table(runs, "model", "norm", "certified_accuracy", eps=0.3)["certified_accuracy_eps_0.3[norm=l2]"].item()
        == 0.5
    )
    assert pivot_table(runs, "model", "norm", "train_s")["train_s[norm=l2]"].item() == 12.5
    assert pivot_table(runs, "model", "norm", "diverged")["diverged[norm=l2]"].item() == 0.5
    pending = pivot_table(frame(run("pending")), "model", "norm", "accuracy_pgd_eps_0.3")
    assert pending["status[norm=l2]"].tolist() == ["pending"]


NEW = {
    "tightness_median": 0.81,
    "attack_forwards": 51200,
    "attack_gradients": 25600,
    "attack_s": 12.0,
    "attack_complete": True,
    "masking_flags": [],
    "certified_skipped_eps_0.3": 20,
}


def newer(seed=0, masking_flags=(), **changes):
    """A run with what the attacks recorded of themselves."""
    results = {key: changes.pop(key) for key in list(changes) if key in NEW}
    return run(seed=seed, results={**NEW, "masking_flags": list(masking_flags), **results}, **changes)


def test_cost_of_attacks_is_told_a_sample_attacked():
    table = robustness_table(frame(newer(0), newer(1, attack_gradients=51200), run(threshold=2.0)))
    assert table["gradients_per_sample"].iloc[0] == (25600 / 50 + 51200 / 50) / 2
    assert table["forwards_per_sample"].iloc[0] == 1024
    assert table["attack_s"].iloc[0] == 12
    assert table["tightness_median"].iloc[0] == pytest.approx(0.81)
    assert table["certified_skipped_eps_0.3"].iloc[0] == 20
    assert table.loc[1, ["gradients_per_sample", "tightness_median", "certified_skipped_eps_0.3"]].isna().all()


def test_runs_of_earlier_versions_have_none_of_the_newer_columns():
    table = robustness_table(frame(run(attack_schedule="each")))
    newer_ones = {"flags", "attack_schedule", "tightness_median", "gradients_per_sample", "attack_s"}
    assert not newer_ones & set(table.columns)
    assert not [name for name in table.columns if "skipped" in name]


def test_no_sample_attacked_has_no_cost_a_sample():
    rows = frame(newer(attack_gradients=0) | {"attacked_count": 0}, newer(1))
    assert robustness_table(rows, aggregate=False)["gradients_per_sample"].fillna(-1).tolist() == [-1, 512]


def test_flags_are_named_with_the_number_of_finished_runs_that_have_them():
    rows = frame(
        newer(0, ["flat-loss"], attack_complete=False),
        newer(1, ["zero-gradients", "flat-loss"]),
        run("pending", seed=2),
        newer(0, threshold=2.0),
        newer(0, ["flat-loss"], threshold=4.0, attack_complete=False),
    )
    table = robustness_table(rows)
    assert table["flags"].tolist() == [
        "flat-loss, 1 of 2 zero-gradients, 1 of 2 attacks incomplete",
        "",
        "flat-loss, attacks incomplete",
    ]
    assert table.columns.tolist().index("flags") == table.columns.tolist().index("status") + 2
    singles = robustness_table(rows, aggregate=False)
    assert singles["flags"].tolist()[:3] == ["flat-loss, attacks incomplete", "zero-gradients, flat-loss", ""]
    assert robustness_table(rows, by="model")["flags"].tolist() == [
        "3 of 4 flat-loss, 1 of 4 zero-gradients, 2 of 4 attacks incomplete"
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["flat-loss", "zero-gradients"],
        np.array(["flat-loss", "zero-gradients"]),
        "flat-loss, zero-gradients",
        "['flat-loss', 'zero-gradients']",
    ],
)
def test_flags_are_read_as_an_index_keeps_them(flags):
    rows = frame(run(results={"masking_flags": flags}), run(threshold=2.0, results={"masking_flags": None}))
    assert robustness_table(rows)["flags"].tolist() == ["flat-loss, zero-gradients", ""]


def test_flags_survive_the_folder_and_its_index(tmp_path):
    finish(tmp_path, cell(), **NEW | {"masking_flags": ["flat-loss"], "attack_complete": False})
    finish(tmp_path, cell(threshold=2.0))
    for _ in range(2):  # read from the folders, then from the index
        table = robustness_table(tmp_path)
        assert table["flags"].tolist() == ["flat-loss, attacks incomplete", ""]
    assert (tmp_path / "index.parquet").exists()


def test_the_schedule_of_attacks_is_a_column_where_it_is_a_cascade():
    assert robustness_table(frame(run()))["attack_schedule"].tolist() == ["cascade"]
    mixed = frame(run(), run(threshold=2.0, attack_schedule="each"))
    table = robustness_table(mixed)
    assert table.columns.tolist().count("attack_schedule") == 1
    assert dict(zip(table["threshold"], table["attack_schedule"], strict=True)) == {1.0: "cascade", 2.0: "each"}
    assert robustness_table(mixed, by="model")["attack_schedule"].tolist() == ["cascade, each"]


def test_pivots_of_attacks_name_flags_and_cascades():
    rows = frame(newer(0, ["flat-loss"]), newer(1), newer(0, threshold=2.0, attack_schedule="each"))
    one, two = "[threshold=1]", "[threshold=2]"

    def notes(value):
        table = pivot_table(rows, "model", "threshold", value)
        return [table[f"notes{place}"].item() for place in (one, two) if f"notes{place}" in table]

    assert notes("accuracy_pgd_eps_0.3") == ["1 of 2 flat-loss, cascade", ""]
    assert notes("worst_case_accuracy_eps_0.3") == notes("tightness_median") == ["1 of 2 flat-loss", ""]
    assert notes("certified_accuracy_eps_0.3") == []
    assert pivot_table(rows, "model", "threshold", "gradients_per_sample")[f"gradients_per_sample{one}"].item() == 512


def test_an_attack_that_an_audit_added_is_a_column():
    rows = frame(run(results={"accuracy_rounding-search_eps_0.3": 0.7}))
    assert robustness_table(rows)["accuracy_rounding-search_eps_0.3"].tolist() == [0.7]


def test_attacks_of_a_cascade_stand_in_the_order_in_which_they_ran():
    results = {"accuracy_fmn_eps_0.3": 0.8, "accuracy_square_eps_0.3": 0.7}
    cascade, each = (
        run(attacks=("square", "fmn"), attack_schedule=one, results=results) for one in ("cascade", "each")
    )

    def order(row):
        names = [name.removeprefix("accuracy_") for name in robustness_table(frame(row), eps=[0.3]).columns]
        return [name for name in names if name in ("fmn_eps_0.3", "square_eps_0.3")]

    assert order(cascade) == ["fmn_eps_0.3", "square_eps_0.3"]
    assert order(each) == ["square_eps_0.3", "fmn_eps_0.3"]


def test_newer_results_of_an_unfinished_study_may_be_asked_for():
    table = pivot_table(frame(run("pending")), "model", "norm", "tightness_median")
    assert table["tightness_median[norm=l2]"].isna().all()


def test_bad_pivots_are_refused():
    runs = frame(run())
    with pytest.raises(
        ValueError,
        match=r"^unknown result 'tightnes' \(did you mean tightness or .*\?\); allowed: clean_accuracy, .*train_s",
    ):
        pivot_table(runs, "model", "norm", "tightnes")
    with pytest.raises(ValueError, match="unknown result 'machine'"):
        pivot_table(runs, "model", "norm", "machine")
    with pytest.raises(ValueError, match=r"unknown result 'certified_accuracy_eps_0\.4'"):
        pivot_table(runs, "model", "norm", "certified_accuracy", eps=0.4)
    with pytest.raises(ValueError, match="unknown config field 'x', 'y'; allowed: dataset"):
        pivot_table(runs, ["x", "y"], "norm", "tightness")
    with pytest.raises(ValueError, match="expected every field in rows or in columns, got norm in both"):
        pivot_table(runs, ["model", "norm"], "norm", "tightness")


def test_a_wide_pivot_gives_no_warning():
    runs = frame(*(run(seed=seed) for seed in range(60)))
    assert len(pivot_table(runs, "model", "seed", "tightness").columns) == 1 + 4 * 60


def test_tables_need_no_torch():
    code = "import sys, speccert.experiments.tables, speccert.experiments.table_writers; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_frame_is_left_as_it_was():
    runs = frame(run(), run("pending", seed=1))
    before = runs.copy()
    robustness_table(runs)
    pivot_table(runs, "eps", "norm", "tightness")
    pd.testing.assert_frame_equal(runs, before)

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from frames import frame, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from speccert.experiments.grouping import config_labels, group_ids, group_runs, half_width, in_order

# Two-sided 95 % quantiles of Student's t, of a printed table, by degrees of freedom.
QUANTILES = {1: 12.7062, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 30: 2.042272, 120: 1.979930}


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_half_width_is_the_printed_quantile_of_the_standard_error(freedom, quantile):
    n = freedom + 1
    assert half_width(3.0, n) == pytest.approx(quantile * 3.0 / math.sqrt(n), rel=1e-6)


def test_fewer_than_two_values_have_no_interval():
    assert np.isnan(half_width([0.0, math.nan, 1.0], [0, 1, 1])).all()
    assert half_width([[0.0, 1.0]], [[2, 1]])[0, 0] == 0


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_half_width_agrees_with_scipy(values):
    assume(np.std(values) > 1e-9)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, scale=scipy.stats.sem(values))
    assert half_width(np.std(values, ddof=1), len(values)) == pytest.approx((high - low) / 2, rel=1e-6)


def test_mean_and_interval_over_seeds_by_hand():
    runs = frame(*(run(seed=seed, results={"clean_accuracy": value}) for seed, value in enumerate([0.8, 0.9, 0.85])))
    (row,) = group_runs(runs, ["constraint"], ["clean_accuracy", "tightness"]).to_dict("records")
    assert (row["constraint"], row["runs"], row["done"], row["status"]) == ("cap", 3, 3, "")
    assert row["clean_accuracy"] == pytest.approx(0.85, abs=1e-15)
    assert row["clean_accuracy_ci95"] == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-6)
    assert row["tightness_ci95"] == 0


@settings(deadline=None, max_examples=25)
@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_seeds_have_a_half_width_of_zero(value, count):
    runs = frame(*(run(seed=seed, results={"tightness": value}) for seed in range(count)))
    found = group_runs(runs, ["model"], ["tightness"])
    assert found["tightness"].item() == pytest.approx(value, rel=1e-15, abs=1e-300)
    assert found["tightness_ci95"].item() == 0


def test_only_finished_runs_that_have_a_result_count():
    runs = frame(
        run(seed=0, results={"tightness": 0.2}),
        run(seed=1, results={"tightness": 0.4}),
        run(seed=2, results={"tightness": None}),
        {**run("interrupted", seed=3), "tightness": 9.0},
        run("pending", threshold=2.0),
    )
    found = group_runs(runs, ["threshold"], ["tightness", "unheard_of"])
    assert found["threshold"].tolist() == [1.0, 2.0]
    assert found["runs"].tolist() == [4, 1]
    assert found["done"].tolist() == [3, 0]
    assert found["tightness"].iloc[0] == pytest.approx(0.3)
    assert found["tightness_ci95"].iloc[0] == pytest.approx(12.7062 * math.sqrt(0.02) / math.sqrt(2), rel=1e-5)
    assert math.isnan(found["tightness"].iloc[1])
    assert found["unheard_of"].isna().all()


BROKEN = "certificate broken: sample 3 has certified l2 radius 0.4"


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([("done", None)] * 3, ""),
        ([("pending", None)], "pending"),
        ([("pending", None)] * 3, "pending"),
        ([("done", None), ("done", None), ("pending", None)], "1 of 3 pending"),
        ([("failed", "out of memory"), ("failed", "x"), ("done", None)], "2 of 3 failed"),
        ([("failed", BROKEN)], "certificate broken"),
        ([("failed", BROKEN), ("done", None)], "1 of 2 certificate broken"),
        (
            [("running", None), ("interrupted", None), ("failed", "x")],
            "1 of 3 failed, 1 of 3 interrupted, 1 of 3 running",
        ),
        ([("diverged", None)], "diverged"),
        ([("diverged", None), ("diverged", None), ("running", BROKEN)], "2 of 3 diverged, 1 of 3 certificate broken"),
    ],
)
def test_status_says_how_many_runs_are_not_well(states, status):
    rows = [
        run("done", seed=seed, results={"diverged": True}) if state == "diverged" else run(state, error, seed=seed)
        for seed, (state, error) in enumerate(states)
    ]
    assert group_runs(frame(*rows), ["model"], ["tightness"])["status"].tolist() == [status]


def test_a_frame_without_error_and_results_will_do():
    runs = frame(run("pending"), run("pending", seed=1)).drop(columns="error")
    assert group_runs(runs, ["seed"], ["tightness"])["status"].tolist() == ["pending", "pending"]


def test_unset_fields_are_one_group_and_lists_are_text():
    runs = frame(run(), run(seed=1), run(seed=2, width=8), run(seed=3, eps=(0.1, 36 / 255)))
    labels = config_labels(runs, ["width", "eps", "attacks"])
    assert labels["eps"].tolist() == ["0.3", "0.3", "0.3", "0.1, 0.141176"]
    assert labels["attacks"].unique().tolist() == ["pgd, ddn"]
    assert group_ids(labels, ["width"]).tolist() == [0, 0, 1, 0]
    assert group_runs(runs, ["width"], ["tightness"])["runs"].tolist() == [3, 1]


def test_lists_may_be_arrays():
    runs = frame(run(), run(seed=1))
    runs["eps"] = [np.array([0.3]), np.array([0.3])]
    assert config_labels(runs, ["eps"])["eps"].tolist() == ["0.3", "0.3"]


def test_order_of_constraints_thresholds_and_unset():
    rows = pd.DataFrame(
        {
            "constraint": ["none", "clip", "cap", "cap", "clip"],
            "threshold": [math.inf, 2.0, math.inf, 0.5, 2.0],
            "width": [math.nan, math.nan, 4.0, 4.0, 8.0],
        }
    )
    assert in_order(rows, ["constraint", "threshold", "width"]).index.tolist() == [3, 2, 4, 1, 0]


def test_text_is_no_number():
    with pytest.raises(ValueError, match=r"machine: expected numbers in every summary.json \(.*\)$"):
        group_runs(frame(run()), ["model"], ["machine"])


def test_means_over_runs_of_which_some_were_not_attacked_say_so():
    rows = {"constraint": ["cap", "cap"], "state": ["done", "done"], "certified_accuracy_eps_0.3": [0.9, 0.4]}
    frame = pd.DataFrame(rows | {"worst_case_accuracy_eps_0.3": [math.nan, 0.5]})
    metrics = ["certified_accuracy_eps_0.3", "worst_case_accuracy_eps_0.3"]
    assert group_runs(frame, ["constraint"], metrics)["status"].tolist() == ["1 of 2 not attacked"]
    assert group_runs(frame[1:], ["constraint"], metrics)["status"].tolist() == [""]

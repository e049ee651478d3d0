"""Notes on attacks: doubts, schedules and costs of runs made by hand."""

import numpy as np
import pandas as pd
import pytest
from frames import frame, run

from speccert.experiments.attack_notes import (
    casts_doubt,
    counted,
    group_notes,
    is_attacked,
    is_cascade,
    is_observed,
    run_flags,
    with_effort,
)


@pytest.mark.parametrize(
    ("metric", "observed", "attacked"),
    [
        ("worst_case_accuracy_eps_0.3", True, True),
        ("accuracy_pgd_eps_0.3", True, True),
        ("mean_distance", True, True),
        ("tightness_median", False, True),
        ("certified_accuracy_attacked_eps_0.3", False, False),
        ("clean_accuracy", False, False),
        ("mean_certified_radius", False, False),
    ],
)
def test_results_of_attacks(metric, observed, attacked):
    assert (is_observed(metric), is_attacked(metric)) == (observed, attacked)


@pytest.mark.parametrize(
    ("schedule", "found"),
    [("cascade", True), ("cascade, each", True), ("each", False), ("", False), (None, False), (np.nan, False)],
)
def test_cascades(schedule, found):
    assert is_cascade(schedule) == found


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["flat-loss", "a-b-c"], ["flat-loss", "a-b-c"]),
        (np.array(["flat-loss"], object), ["flat-loss"]),
        ([], []),
        ("", []),
        ("[]", []),
        ("none", []),
        (None, []),
        (np.nan, []),
        ("flat-loss,zero-gradients", ["flat-loss", "zero-gradients"]),
    ],
)
def test_flags_of_a_run(value, names):
    assert run_flags(frame(run(results={"masking_flags": value}))).tolist() == [names]


def test_attacks_that_a_budget_ended_come_after_masked_gradients():
    rows = frame(
        run(results={"masking_flags": ["flat-loss"], "attack_complete": False}),
        run(seed=1, results={"attack_complete": True}),
        run(seed=2),
        run("failed", seed=3) | {"masking_flags": ["flat-loss"], "attack_complete": False},
    )
    assert run_flags(rows).tolist() == [["flat-loss", "attacks incomplete"], [], [], []]


def test_counts_of_flags():
    assert counted([["a"], ["a", "b"]]) == ["a", "1 of 2 b"]
    assert counted([["attacks incomplete"], ["b"], []]) == ["1 of 3 b", "1 of 3 attacks incomplete"]
    assert counted([[], []]) == counted([]) == []


@pytest.mark.parametrize(
    ("text", "found"), [("", False), ("cascade", False), ("flat-loss", True), ("a, cascade", True)]
)
def test_a_cascade_is_no_doubt(text, found):
    assert casts_doubt(text) == found


def test_notes_are_those_of_the_groups_in_order_of_their_first_run():
    rows = frame(
        run(threshold=2.0, results={"masking_flags": ["b"]}),
        run(threshold=1.0, attack_schedule="each"),
        run(threshold=2.0, seed=1, results={"masking_flags": ["a"]}),
        run("pending", threshold=3.0),
    )
    notes = group_notes(rows, ["threshold"])
    assert notes["flags"].tolist() == ["1 of 2 b, 1 of 2 a", "", ""]
    assert notes["attack_schedule"].tolist() == ["cascade", "each", "cascade"]
    assert group_notes(rows, ["threshold", "attack_schedule"]).columns.tolist() == ["flags"]


def test_without_anything_to_say_there_are_no_notes():
    rows = frame(run(attack_schedule="each"), run(attack_schedule="each", seed=1))
    notes = group_notes(rows, ["seed"])
    assert notes.shape == (2, 0)
    old = rows.drop(columns="attack_schedule")
    assert group_notes(old, ["seed"]).shape == (2, 0)


def test_evaluations_a_sample():
    rows = frame(run(results={"attack_gradients": 300, "attack_forwards": 75}), run(seed=1))
    found = with_effort(rows)
    assert found["gradients_per_sample"].fillna(-1).tolist() == [300 / 50, -1]
    assert found["forwards_per_sample"].fillna(-1).tolist() == [75 / 50, -1]
    pd.testing.assert_frame_equal(with_effort(frame(run())), frame(run()))

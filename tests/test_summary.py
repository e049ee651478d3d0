import dataclasses
import json
import math

import numpy as np
import pytest
from blobs import CLASSES, ORDERS, blobs, linear, settings

from speccert.attacks import Attempt
from speccert.experiments.evaluation import evaluate
from speccert.experiments.summary import attempts_json, bounds_json

DUAL_ORDERS = {"l2": 2, "linf": 1, "l1": math.inf}


@pytest.fixture(scope="module")
def data():
    return blobs()


@pytest.fixture(scope="module")
def model(data):
    return linear(data)


@pytest.fixture(scope="module")
def found(data, model):
    return evaluate(model, settings(attacks=("fgsm",), attack_samples=10), data)


def test_attempts_as_json_have_no_times():
    attempts = [Attempt("pgd", 0.3, 10, 4, 5, 400, 390, 1.5), Attempt("fmn", None, 10, 10, 0, 900, 800, 2.5, "budget")]
    told = json.loads(attempts_json(attempts))
    assert told[0] == {
        "attack": "pgd",
        "eps": 0.3,
        "attacked": 10,
        "broken": 4,
        "standing": 5,
        "forwards": 400,
        "gradients": 390,
        "note": "",
    }
    assert (told[1]["eps"], told[1]["note"]) == (None, "budget")
    assert attempts_json([]) == b"[]\n"


def test_equal_evaluations_tell_equal_attempts(data, model, found):
    again = evaluate(model, settings(attacks=("fgsm",), attack_samples=10), data)
    assert attempts_json(again.attempts) == attempts_json(found.attempts)
    assert found.results["attack_gradients"] == sum(attempt.gradients for attempt in found.attempts) > 0
    assert found.results["attack_forwards"] == sum(attempt.forwards for attempt in found.attempts) > 0
    assert found.results["attack_s"] > 0


def test_bounds_as_json_have_every_norm_and_layer(data, model, found):
    told = json.loads(bounds_json(found.bounds))
    assert list(told) == list(found.bounds)
    assert set(told) == set(ORDERS)
    weight = model[1].weight.detach().double().numpy()
    for norm, order in DUAL_ORDERS.items():
        pairs = [np.linalg.norm(weight[i] - weight[j], order) for i in range(CLASSES) for j in range(i)]
        assert told[norm]["pairwise_min"] == pytest.approx(min(pairs), rel=1e-6)
        assert told[norm]["pairwise_max"] == pytest.approx(max(pairs), rel=1e-6)
    (layer,) = told["l2"]["layers"]
    exact = np.linalg.norm(weight, 2)
    assert layer["lower"] <= exact * (1 + 1e-9)
    assert exact <= layer["upper"] == pytest.approx(told["l2"]["upper"], rel=1e-6)
    assert 0 < told["l2"]["lower"] <= told["l2"]["upper"]
    assert layer.keys() == {"name", "kind", "lower", "upper", "method"}
    (attempt,) = told["l2"]["attempts"]
    assert attempt == {**attempt, "method": "product", "upper": told["l2"]["upper"], "proved": True, "note": ""}


def test_bounds_as_json_have_null_for_what_overflows(found):
    endless = {"l1": dataclasses.replace(found.bounds["l1"], upper=math.inf)}
    assert json.loads(bounds_json(endless))["l1"]["upper"] is None

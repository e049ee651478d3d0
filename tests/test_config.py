import dataclasses
import hashlib
import json
import math

import pytest

from speccert.certify.lipschitz import METHODS
from speccert.experiments.config import (
    ACTIVATIONS,
    ATTACK_NORMS,
    BOUNDS,
    FIELDS,
    MODELS,
    NORMS,
    CellConfig,
    ConfigError,
    config_id,
)
from speccert.experiments.spec import RunSpec

INF = math.inf


@pytest.mark.parametrize("threshold", [0.5, 1.0, INF])
def test_json_round_trip_is_exact(threshold):
    cell = CellConfig(threshold=threshold, eps=(0.1, 36 / 255), gradient_clip=None, seed=7)
    again = CellConfig.from_json(cell.to_json())
    assert again == cell
    assert json.loads(cell.to_json())["threshold"] == ("inf" if threshold == INF else threshold)


def test_json_has_no_literal_infinity():
    assert "Infinity" not in CellConfig(threshold=INF).to_json()


def test_id_is_the_start_of_the_sha256_of_the_canonical_json():
    cell = CellConfig()
    values = {**dataclasses.asdict(cell), "format": 2}
    for later in ("bound_budget", "audit", "integer_pixels", "max_gradients", "max_seconds"):
        del values[later]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert config_id(cell) == hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, "b3327a68a7a9"),
        ({"threshold": INF}, "982d8806d4df"),
        (
            {
                "constraint": "none",
                "threshold": INF,
                "seed": 7,
                "eps": ("36/255", 1),
                "gradient_clip": 2,
                "attacks": (),
            },
            "8368529ab381",
        ),
        (
            {
                "model": "liresnet",
                "width": 128,
                "dataset": "päth/data.npz",
                "checkpoint": "w.safetensors",
                "norm": "linf",
                "attacks": ("pgd",),
                "lr": 1e-5,
                "train_samples": 5,
            },
            "960ba38747ac",
        ),
    ],
)
def test_ids_stay_what_they_were(settings, known):
    old = {"threshold": 1.0, **settings, "attack_schedule": "each"}  # as there was no other
    assert config_id(CellConfig(**old)) == known
    spec = RunSpec(parts=[{key: [value] for key, value in old.items()}])
    assert [config_id(cell) for cell in spec.cells()] == [known]


def test_settings_that_came_later_are_written_only_where_they_are_not_the_default():
    old = json.loads(CellConfig(bound="auto").to_json())
    assert "bound_budget" not in old
    assert CellConfig.from_json(json.dumps(old | {"bound_budget": 60})) == CellConfig(bound="auto")
    changed = CellConfig(bound="auto", bound_budget=5)
    assert json.loads(changed.to_json())["bound_budget"] == 5.0
    assert CellConfig.from_json(changed.to_json()) == changed
    assert config_id(changed) != config_id(CellConfig(bound="auto"))


def test_a_config_without_a_schedule_means_each_attack_by_itself():
    new = CellConfig()
    values = json.loads(new.to_json())
    assert values.pop("attack_schedule") == new.attack_schedule == "cascade"
    old = CellConfig.from_json(json.dumps(values))
    assert old.attack_schedule == "each"
    assert (old.audit, old.integer_pixels, old.max_gradients, old.max_seconds) == (False, False, None, None)
    assert config_id(old) == "b3327a68a7a9" != config_id(new)
    assert CellConfig.from_json(old.to_json()) == old
    changed = CellConfig(audit=True, integer_pixels=True, max_gradients=5, max_seconds="2m")
    assert changed.max_seconds == 120.0
    assert CellConfig.from_json(changed.to_json()) == changed


def test_bounds_are_those_of_the_package():
    assert BOUNDS == METHODS


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), (" 2m", 120.0), ("1.5 h", 5400.0), (".5s", 0.5), (7, 7.0), ("1/2", 0.5)],
)
def test_durations_are_seconds(text, seconds):
    assert CellConfig(bound_budget=text).bound_budget == seconds


@pytest.mark.parametrize("text", ["0", "-1", "soon", "2 days", "", "inf", "nan", True, None, 0, [60]])
def test_no_duration(text):
    with pytest.raises(ConfigError, match=r"bound_budget = .*: expected seconds > 0, such as 90, 90s or 2m"):
        CellConfig(bound_budget=text)


def test_equal_configs_have_equal_ids_at_zero():
    assert config_id(CellConfig(loss_eps=-0.0)) == config_id(CellConfig(loss_eps=0.0))


def test_id_depends_on_values_not_on_how_they_were_written():
    assert config_id(CellConfig(threshold=1, eps=[0.3, 0.1])) == config_id(CellConfig(threshold=1.0, eps=(0.1, 0.3)))
    assert CellConfig(eps=("36/255",)).eps == (36 / 255,)
    assert CellConfig(eps=("8.001/255",)).eps == (8001 / 255000,)


@pytest.mark.parametrize("field", [name for name in FIELDS if name not in ("bound", "checkpoint", "dataset")])
def test_every_field_changes_the_id(field):
    other = {
        "model": "liresnet",
        "width": 8,
        "depth": 2,
        "activation": "relu",
        "normalise": "none",
        "constraint": "clip",
        "schedule": "constant",
        "attack_schedule": "each",
        "audit": True,
        "integer_pixels": True,
        "max_gradients": 100,
        "max_seconds": 60.0,
        "loss": "margin",
        "optimizer": "sgd",
        "augment": "shift",
        "gradient_clip": 2.0,
        "arithmetic": "float16",
        "norm": "l1",
        "eps": (0.2,),
        "attacks": ("deepfool",),
        "warmup_epochs": 1,
        "train_samples": 5,
        "test_samples": 5,
        "attack_samples": 5,
    }.get(field)
    base = CellConfig(attacks=("fmn",))
    value = other if other is not None else getattr(base, field) + (0.0625 if field != "seed" else 1)
    if field in ("epochs", "batch_size"):
        value = 3
    assert config_id(dataclasses.replace(base, **{field: value})) != config_id(base)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "expected a config in JSON"),
        ("[]", "expected a config as a JSON object, got list"),
        ("{}", "format None is not readable here, expected 2"),
        ('{"format": 1}', "format 1 is not readable"),
        (
            CellConfig().to_json().replace('"seed"', '"sed"'),
            r"unknown setting 'sed' \(did you mean seed\?\).*seed is missing",
        ),
        (
            CellConfig().to_json().replace('"threshold": 1.0', '"threshold": NaN'),
            "threshold = nan: expected a number > 0",
        ),
    ],
)
def test_bad_json_is_refused(text, match):
    with pytest.raises(ConfigError, match=match):
        CellConfig.from_json(text)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"threshold": 0}, r"threshold = 0.0: expected a number > 0, or inf"),
        ({"threshold": -1.0}, "threshold = -1.0"),
        ({"threshold": -INF}, "threshold = -inf"),
        ({"threshold": math.nan}, "threshold = nan"),
        ({"threshold": True}, "threshold = True"),
        ({"threshold": 10**400}, "threshold = 1000"),
        ({"seed": 1.0}, "seed = 1.0: expected an integer >= 0"),
        ({"seed": 2**63}, "seed = 9223372036854775808"),
        ({"seed": False}, "seed = False"),
        ({"epochs": 0}, "epochs = 0: expected an integer >= 1"),
        ({"eps": ()}, r"eps = \(\): expected a list"),
        ({"eps": (-0.1,)}, "eps = "),
        ({"eps": (INF,)}, "eps = "),
        ({"eps": 0.1}, "eps = 0.1"),
        ({"eps": (0.1, 0.10000001)}, "differ in their first six digits"),
        ({"eps": ("1/0",)}, "eps = "),
        ({"attacks": ("pgd", "pgd")}, "different names out of fgsm, pgd"),
        ({"attacks": ("squre",)}, "different names"),
        ({"validation_fraction": 1.0}, r"validation_fraction = 1.0: expected a number in \(0, 1\)"),
        ({"validation_fraction": 0}, "validation_fraction = 0.0"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"dataset": "imagenet"}, "dataset = 'imagenet': expected one of digits"),
        ({"model": "a:b c"}, "model = 'a:b c'"),
        ({"checkpoint": ""}, "checkpoint = ''"),
        ({"warmup_epochs": 40, "epochs": 40}, "warmup_epochs = 40: expected fewer than epochs = 40"),
        ({"constraint": "none"}, "threshold = 1.0: the baseline none has no threshold, expected inf"),
        ({"constraint": "weight-decay", "threshold": INF}, "weight_decay = 0.0: the constraint weight-decay needs"),
        ({"constraint": "gradient-clip", "threshold": INF}, "gradient_clip = None: the constraint gradient-clip needs"),
        ({"constraint": "penalty", "penalty_weight": 0}, "penalty_weight = 0.0: the constraint penalty needs"),
        ({"norm": "linf"}, "attacks = ddn: not for norm linf, expected some of fgsm, pgd, apgd-ce, apgd-dlr, apgd-t"),
        (
            {"norm": "l1"},
            "attacks = ddn: not for norm l1, expected some of fgsm, pgd, fab, deepfool, fmn, rounding-search",
        ),
        ({"attack_schedule": "all"}, "attack_schedule = 'all': expected one of cascade, each"),
        ({"audit": 1}, "audit = 1: expected true or false"),
        ({"integer_pixels": "yes"}, "integer_pixels = 'yes': expected true or false"),
        ({"max_gradients": 0}, "max_gradients = 0: expected an integer >= 1, or unset"),
        ({"max_gradients": True}, "max_gradients = True: expected an integer >= 1, or unset"),
        ({"max_seconds": 0}, "max_seconds = 0.0: expected seconds > 0, such as 90, 90s or 2m, or unset"),
        ({"max_seconds": INF}, "max_seconds = inf: expected seconds > 0"),
        ({"max_seconds": "soon"}, "max_seconds = 'soon': expected seconds > 0"),
    ],
)
def test_bad_values_are_refused_when_built(values, match):
    with pytest.raises(ConfigError, match=match) as caught:
        CellConfig(**values)
    assert "\n" not in str(caught.value)


def test_all_bad_values_are_in_one_message():
    with pytest.raises(ConfigError, match=r"loss = 'hinge'.*lr = 0.0.*epochs = -1"):
        CellConfig(lr=0, epochs=-1, loss="hinge")


def test_norms_of_the_attacks_are_those_that_the_attacks_have():
    from speccert.attacks import available_attacks

    for norm in NORMS:
        assert tuple(name for name, norms in ATTACK_NORMS.items() if norm in norms) == available_attacks(norm)


def test_names_are_those_of_the_models():
    from speccert.models.activations import ACTIVATIONS as BUILT_ACTIVATIONS
    from speccert.models.architectures import ARCHITECTURES

    assert set(ACTIVATIONS) == set(BUILT_ACTIVATIONS)
    assert set(MODELS) == set(ARCHITECTURES)

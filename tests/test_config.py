import dataclasses
import hashlib
import json
import math

import pytest

from speccert.experiments.config import (
    ACTIVATIONS,
    ATTACK_NORMS,
    DEFAULTS,
    FIELDS,
    MODELS,
    NORMS,
    CellConfig,
    ConfigError,
    RunSpec,
    config_id,
)

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
    values = {**dataclasses.asdict(cell), "format": 1}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert config_id(cell) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_id_depends_on_values_not_on_how_they_were_written():
    assert config_id(CellConfig(threshold=1, eps=[0.3, 0.1])) == config_id(CellConfig(threshold=1.0, eps=(0.1, 0.3)))
    assert CellConfig(eps=("36/255",)).eps == (36 / 255,)


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
        "loss": "margin",
        "optimizer": "sgd",
        "augment": "shift",
        "gradient_clip": 2.0,
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
        ("{}", "format None is not readable here, expected 1"),
        ('{"format": 2}', "format 2 is not readable"),
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
        ({"norm": "linf"}, "attacks = ddn: not for norm linf, expected some of fgsm, pgd, autoattack, deepfool, fmn"),
        ({"norm": "l1"}, "attacks = fgsm, pgd, ddn: not for norm l1, expected some of deepfool, fmn"),
    ],
)
def test_bad_values_are_refused_when_built(values, match):
    with pytest.raises(ConfigError, match=match) as caught:
        CellConfig(**values)
    assert "\n" not in str(caught.value)


def test_all_bad_values_are_in_one_message():
    with pytest.raises(ConfigError, match=r"loss = 'hinge'.*lr = 0.0.*epochs = -1"):
        CellConfig(lr=0, epochs=-1, loss="hinge")


def test_grid_is_ordered_and_baselines_come_once_a_seed():
    spec = RunSpec.from_mapping(
        {"constraints": ["cap", "none", "weight-decay"], "thresholds": [2, 0.5, 2.0, INF], "seeds": [1, 0]}
    )
    found = [(cell.constraint, cell.threshold, cell.seed) for cell in spec.cells()]
    caps = [("cap", threshold, seed) for threshold in (2.0, 0.5, INF) for seed in (1, 0)]
    assert found == [*caps, ("none", INF, 1), ("none", INF, 0), ("weight-decay", INF, 1), ("weight-decay", INF, 0)]
    assert {cell.weight_decay for cell in spec.cells() if cell.constraint == "weight-decay"} == {5e-3}
    assert {cell.weight_decay for cell in spec.cells() if cell.constraint != "weight-decay"} == {0.0}


def test_a_set_value_wins_over_the_baseline_and_the_data_set():
    spec = RunSpec.from_mapping({"dataset": "mnist", "constraint": "gradient-clip", "gradient_clip": 3, "epochs": 2})
    (cell,) = spec.cells()
    assert (cell.gradient_clip, cell.epochs, cell.eps) == (3.0, 2, DEFAULTS["mnist"]["eps"])


@pytest.mark.parametrize("dataset", DEFAULTS)
def test_defaults_of_each_data_set_are_good(dataset):
    cells = RunSpec.from_mapping({"dataset": dataset}).cells()
    assert {cell.dataset for cell in cells} == {dataset}
    assert len({cell.threshold for cell in cells}) == len(cells) > 1


@pytest.mark.parametrize(
    ("norm", "attacks"), [("l2", CellConfig().attacks), ("linf", ("fgsm", "pgd")), ("l1", ("deepfool", "fmn"))]
)
def test_default_attacks_follow_the_norm(norm, attacks):
    (cell,) = RunSpec.from_mapping({"norm": norm, "thresholds": [1]}).cells()
    assert cell.attacks == attacks


def test_norms_of_the_attacks_are_those_that_the_attacks_have():
    from speccert.attacks import available_attacks

    for norm in NORMS:
        assert {name for name, norms in ATTACK_NORMS.items() if norm in norms} == set(available_attacks(norm))


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        (
            {"treshold": 1},
            r"unknown setting 'treshold' \(did you mean threshold.*allowed: constraints, thresholds, seeds, da",
        ),
        ({"zzz": 1, "epoch": 2}, r"'zzz', 'epoch' \(did you mean epochs"),
        ({"threshold": 1, "thresholds": [1]}, "set threshold or thresholds, not both"),
        ({"thresholds": []}, r"thresholds = \[\]: expected a list with at least one value"),
        ({"thresholds": [1, 0]}, "threshold = 0.0: expected a number > 0, or inf"),
        ({"constraints": ["cap", "cup"]}, "constraint = 'cup': expected one of cap, clip"),
        ({"constraint": "weight-decay", "weight_decay": 0}, "weight_decay = 0.0"),
        ({"seeds": [[1]]}, r"seed = \(1,\)"),
    ],
)
def test_bad_grids_are_refused_when_built(mapping, match):
    with pytest.raises(ConfigError, match=match):
        RunSpec.from_mapping(mapping)


def test_a_grid_needs_lists():
    with pytest.raises(ConfigError, match=r"thresholds = 1\.0: expected a list"):
        RunSpec(thresholds=1.0)


def test_toml_file(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text('thresholds = [0.5, inf]\nseed = [0, 1]\nconstraint = "clip"\neps = ["36/255", 1]\nwidth = 64\n')
    spec = RunSpec.from_toml(path)
    assert (spec.thresholds, spec.seeds, spec.constraints) == ((0.5, INF), (0, 1), ("clip",))
    assert {cell.eps for cell in spec.cells()} == {(36 / 255, 1.0)}
    copy = tmp_path / "copy.toml"
    copy.write_text(spec.to_toml())
    assert RunSpec.from_toml(copy).cells() == spec.cells()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("epochs = ", r"spec.toml: .*Invalid value"),
        ("epochs = 0", r"spec.toml: epochs = 0"),
        ("[run]\nepochs = 1", r"spec.toml: unknown setting 'run'"),
        ("loss = '\xff'", None),
    ],
)
def test_bad_toml_names_the_file(tmp_path, text, match):
    path = tmp_path / "spec.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=match or "spec.toml: 'utf-8' codec"):
        RunSpec.from_toml(path)


def test_overrides_win_over_the_file_under_either_name(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text("thresholds = [0.5, 2]\nepochs = 3\nlr = 0.5\n")
    (cell,) = RunSpec.from_toml(path, {"threshold": 4, "epochs": 5}).cells()
    assert (cell.threshold, cell.epochs, cell.lr) == (4.0, 5, 0.5)


def test_missing_toml_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: .*No such file"):
        RunSpec.from_toml(tmp_path / "none.toml")


def test_names_are_those_of_the_models():
    from speccert.models.activations import ACTIVATIONS as BUILT_ACTIVATIONS
    from speccert.models.architectures import ARCHITECTURES

    assert set(ACTIVATIONS) == set(BUILT_ACTIVATIONS)
    assert set(MODELS) == set(ARCHITECTURES)

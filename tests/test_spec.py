import itertools
import math
import subprocess
import sys
import time
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speccert.experiments.config import (
    ATTACK_NORMS,
    FIELDS,
    MODELS,
    NORMS,
    CellConfig,
    ConfigError,
    config_id,
    usable_attacks,
)
from speccert.experiments.presets import DEFAULT_THRESHOLDS, DEFAULTS, PRESETS
from speccert.experiments.spec import EXECUTION, PLURALS, RunSpec

INF = math.inf


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
    ("norm", "attacks"),
    [("l2", CellConfig().attacks), ("linf", ("fgsm", "pgd", "fmn")), ("l1", ("fgsm", "pgd", "fmn"))],
)
def test_default_attacks_follow_the_norm(norm, attacks):
    (cell,) = RunSpec.from_mapping({"norm": norm, "thresholds": [1]}).cells()
    assert cell.attacks == attacks


def test_where_none_of_the_attacks_knows_the_norm_the_usual_ones_run():
    assert usable_attacks(("apgd-t",), "l1") == usable_attacks((), "l1") == ("fgsm", "pgd", "fmn")
    assert usable_attacks(("fgsm", "ddn", "cw"), "linf") == ("fgsm", "fmn")  # a search of the smallest distance stays
    assert usable_attacks(("fmn", "ddn"), "l1") == ("fmn",)
    assert usable_attacks(("autoattack", "fmn"), "l1") == ("fmn",)


def combinations(cells, *fields):
    return [tuple(getattr(cell, field) for field in fields) for cell in cells]


def test_every_field_spans_a_full_product_in_the_order_of_the_fields():
    axes = {
        "model": ["mlp", "convnet-4c3f"],
        "width": [8, 16],
        "lr": [0.1, 0.2, 0.3],
        "eps": [[0.1, 0.2], [0.3]],
        "attacks": [["pgd"], [], ["ddn", "fgsm"]],
        "constraint": ["clip", "cap"],
        "threshold": [2.0, 1.0],
        "seed": [1, 0],
    }
    cells = RunSpec.from_mapping(dict(reversed(axes.items()))).cells()
    eps, attacks = [(0.1, 0.2), (0.3,)], [("pgd",), (), ("ddn", "fgsm")]
    assert combinations(cells, *axes) == list(itertools.product(*{**axes, "eps": eps, "attacks": attacks}.values()))


OTHER_VALUES = {
    "dataset": ["digits", "mnist"],
    "model": ["mlp", "liresnet"],
    "activation": ["relu", "abs"],
    "normalise": ["none", "center"],
    "constraint": ["cap", "clip"],
    "loss": ["margin", "emma"],
    "optimizer": ["sgd", "adam"],
    "schedule": ["step", "linear"],
    "augment": ["none", "shift"],
    "arithmetic": ["real", "float16"],
    "norm": ["l1", "l2", "linf"],
    "momentum": [0.5, 0.25],
    "validation_fraction": [0.5, 0.25],
    "eps": [[1], [2, 3]],
    "attacks": [["fmn"], ["deepfool", "fmn"]],
    "bound": ["product"],
    "checkpoint": ["a", "b"],
    "attack_schedule": ["each", "cascade"],
    "audit": [True, False],
    "integer_pixels": [False, True],
}


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_may_be_a_list(field):
    values = OTHER_VALUES.get(field, [1, 2])
    cells = RunSpec.from_mapping({"threshold": 1, "epochs": 3, "attacks": ["fmn"], field: values}).cells()
    kept = [tuple(value) if isinstance(value, list) else value for value in values]
    assert combinations(cells, field) == [(value,) for value in kept]


@pytest.mark.parametrize(("one", "many"), [pair for pair in PLURALS.items() if pair[0] != "preset"])
def test_plurals_are_second_names(one, many):
    values = OTHER_VALUES.get(one, [1, 2])
    assert RunSpec.from_mapping({many: values}) == RunSpec.from_mapping({one: values})


def test_thresholds_left_out_are_the_defaults():
    assert combinations(RunSpec().cells(), "threshold") == [(threshold,) for threshold in DEFAULT_THRESHOLDS]


def test_defaults_follow_the_data_set_the_norm_and_the_constraint_of_each_cell():
    spec = {
        "dataset": ["mnist", "cifar10"],
        "norm": ["l1", "l2"],
        "constraints": ["cap", "weight-decay", "gradient-clip"],
        "threshold": 2,
    }
    cells = RunSpec.from_mapping(spec).cells()
    assert len(cells) == 12
    for cell in cells:
        assert (cell.epochs, cell.eps) == (DEFAULTS[cell.dataset]["epochs"], DEFAULTS[cell.dataset]["eps"])
        assert cell.model == {"mnist": "mlp", "cifar10": "liresnet"}[cell.dataset]
        assert cell.attacks == {"l1": ("fgsm", "pgd", "fmn"), "l2": ("fgsm", "pgd", "ddn")}[cell.norm]
        assert cell.threshold == (2.0 if cell.constraint == "cap" else INF)
        assert cell.weight_decay == (5e-3 if cell.constraint == "weight-decay" else 0.0)
        assert cell.gradient_clip == (1.0 if cell.constraint == "gradient-clip" else None)


def test_every_cell_of_a_grid_is_what_the_checked_constructor_builds():
    spec = RunSpec.from_mapping(
        {"dataset": list(DEFAULTS), "norm": list(NORMS), "constraint": ["cap", "none"], "lr": [1, "1/3"]}
    )
    for cell in spec.cells():
        again = CellConfig(**{field: getattr(cell, field) for field in FIELDS})
        assert again == cell
        assert again.to_json() == cell.to_json()
        assert list(vars(cell)) == list(vars(again))


@pytest.mark.parametrize(
    ("mapping", "field", "value"),
    [
        ({"gradient_clip": "unset"}, "gradient_clip", None),
        ({"dataset": "mnist", "attack_samples": "unset"}, "attack_samples", None),
        ({"dataset": "mnist", "attack_samples": None}, "attack_samples", None),
        ({"thresholds": ["inf"]}, "threshold", INF),
        ({"threshold": "1/4"}, "threshold", 0.25),
        ({"eps": ["36/255", 0]}, "eps", (0.0, 36 / 255)),
        ({"attacks": []}, "attacks", ()),
    ],
)
def test_values_in_words(mapping, field, value):
    spec = RunSpec.from_mapping(mapping)
    assert {getattr(cell, field) for cell in spec.cells()} == {value}
    assert RunSpec.from_mapping(tomllib.loads(spec.to_toml())) == spec


def test_the_study_is_the_union_of_the_parts_without_repeats():
    spec = RunSpec.from_mapping(
        {
            "epochs": 3,
            "seeds": [0, 1],
            "part": [
                {"thresholds": [1, 2]},
                {"constraint": "none", "epochs": 4},
                {"threshold": [2, 3], "seed": [1, 2]},
                {},
            ],
        }
    )
    found = combinations(spec.cells(), "constraint", "threshold", "epochs", "seed")
    first = [("cap", threshold, 3, seed) for threshold in (1.0, 2.0) for seed in (0, 1)]
    second = [("none", INF, 4, 0), ("none", INF, 4, 1)]
    third = [("cap", 2.0, 3, 2), ("cap", 3.0, 3, 1), ("cap", 3.0, 3, 2)]
    last = [("cap", t, 3, seed) for t in DEFAULT_THRESHOLDS for seed in (0, 1) if (t, seed) not in [(1, 0), (1, 1)]]
    assert found == [*first, *second, *third, *last]


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"preset": "a"}, [(1, 8)]),
        ({"preset": "a", "epochs": 7}, [(7, 8)]),
        ({"preset": ["a", "b"]}, [(1, 8), (2, None)]),
        ({"preset": ["a", "a"]}, [(1, 8)]),
        ({"preset": "on-a"}, [(5, 8)]),
        ({"preset": "on-both"}, [(1, 9), (2, 9)]),
        ({"preset": "axis"}, [(3, None), (4, None)]),
        ({"preset": "empty"}, [(30, None)]),
        ({"preset": "a", "part": [{"preset": "b"}]}, [(2, 8)]),
        ({"epochs": 7, "part": [{"preset": "b"}, {}]}, [(2, None), (7, None)]),
        ({"epochs": 7, "part": [{"preset": ["b", "a"], "width": 6}]}, [(2, 6), (1, 6)]),
        ({"preset": ["a", "b"], "part": [{"width": 4}, {"epochs": 6}]}, [(1, 4), (2, 4), (6, 8), (6, None)]),
    ],
)
@pytest.mark.parametrize("where", ["preset", "presets"])
def test_presets_go_under_the_settings_beside_them(mapping, expected, where):
    defined = {
        "a": {"epochs": 1, "width": 8},
        "b": {"epochs": 2},
        "on-a": {"preset": "a", "epochs": 5},
        "on-both": {"presets": ["a", "b"], "width": 9},
        "axis": {"epochs": [3, 4]},
        "empty": {},
    }
    if where == "preset" in mapping:  # a key can be given once
        mapping = {"presets" if key == "preset" else key: value for key, value in mapping.items()}
    spec = RunSpec.from_mapping({"threshold": 1, **mapping, where: defined})
    assert combinations(spec.cells(), "epochs", "width") == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dataset", DEFAULTS)
def test_built_in_presets_fit_every_data_set(preset, dataset):
    assert RunSpec.from_mapping({"preset": preset, "dataset": dataset}).cells()
    part = {"part": [{"dataset": dataset, "warmup_epochs": 3, "epochs": 9}]}
    assert RunSpec.from_mapping(part, {"preset": preset}).cells()


def test_the_quick_preset_is_small():
    (cell,) = RunSpec.from_mapping({"dataset": "cifar10", "preset": "quick", "threshold": 1}).cells()
    assert (cell.model, cell.epochs, cell.train_samples, cell.test_samples) == ("liresnet", 1, 500, 100)


ALLOWED = f"allowed: {', '.join((*FIELDS, *PLURALS.values(), 'preset'))}"
BUILT_IN = "quick, mnist-dense, cifar10-liresnet"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"treshold": 1},
            f"unknown setting 'treshold' (did you mean threshold or thresholds?); {ALLOWED}, part, execution, slurm",
        ),
        (
            {"zzz": 1, "epoch": 2},
            f"unknown setting 'zzz', 'epoch' (did you mean epochs or depth?); {ALLOWED}, part, execution, slurm",
        ),
        ({"part": [{}, {"execution": {}}]}, f"part 2: unknown setting 'execution'; {ALLOWED}"),
        ({"part": [{"part": []}]}, f"part 1: unknown setting 'part' (did you mean preset?); {ALLOWED}"),
        (
            {"preset": {"small": {"epoch": 1}}},
            f"preset small: unknown setting 'epoch' (did you mean epochs or depth?); {ALLOWED}",
        ),
        ({"threshold": 1, "thresholds": [1]}, "set threshold or thresholds, not both"),
        ({"part": [{"model": "mlp", "models": ["mlp"]}]}, "part 1: set model or models, not both"),
        ({"preset": "quick", "presets": ["quick"]}, "set preset or presets, not both"),
        ({"preset": {}, "presets": {}}, "define presets under preset or presets, not both"),
        ({"thresholds": []}, "thresholds = []: expected a list with at least one value"),
        ({"lr": []}, "lr = []: expected a list with at least one value"),
        ({"part": [{"seed": []}]}, "part 1: seed = []: expected a list with at least one value"),
        ({"preset": []}, "preset = []: expected a list with at least one value"),
        (
            {"eps": []},
            "eps = (): expected a list of finite numbers >= 0 that differ in their first six digits",
        ),
        (
            {"eps": [[0.1], []]},
            "eps = (): expected a list of finite numbers >= 0 that differ in their first six digits",
        ),
        (
            {"eps": [[0.1], 0.2]},
            "eps = 0.2: expected a list of finite numbers >= 0 that differ in their first six digits",
        ),
        ({"attacks": "pgd"}, f"attacks = 'pgd': expected a list of different names out of {', '.join(ATTACK_NORMS)}"),
        ({"thresholds": [1, 0]}, "threshold = 0.0: expected a number > 0, or inf"),
        ({"threshold": [1, math.nan]}, "threshold = nan: expected a number > 0, or inf"),
        ({"threshold": ["infinity"]}, "threshold = 'infinity': expected a number > 0, or inf"),
        ({"threshold": [True]}, "threshold = True: expected a number > 0, or inf"),
        (
            {"lr": ["inf", "unset"]},
            "lr = 'inf': expected a finite number > 0; lr = 'unset': expected a finite number > 0",
        ),
        ({"seed": [0, False]}, "seed = False: expected an integer >= 0"),
        ({"epochs": [1, 2.0]}, "epochs = 2.0: expected an integer >= 1"),
        ({"width": [8, "none"]}, "width = 'none': expected an integer >= 1, or unset"),
        ({"lr": {"a": 1}}, "lr = {'a': 1}: expected a finite number > 0"),
        ({"seeds": [[1]]}, "seed = (1,): expected an integer >= 0"),
        (
            {"constraint": "weight-decay", "weight_decay": [0, 1]},
            "weight_decay = 0.0: the constraint weight-decay needs a number > 0",
        ),
        (
            {"part": [{}, {"warmup_epochs": [0, 5], "epochs": [4, 6]}]},
            "part 2: warmup_epochs = 5: expected fewer than epochs = 4",
        ),
        (
            {"norm": ["l2", "linf"], "attacks": [["pgd"], ["pgd", "ddn"]]},
            (
                "attacks = ddn: not for norm linf, expected some of fgsm, pgd, apgd-ce, apgd-dlr, apgd-t, fab, square, "
                "autoattack, eot-pgd, spsa, deepfool, fmn, rounding-search"
            ),
        ),
        (
            {"dataset": ["digits", "mnist"], "warmup_epochs": 10},
            "warmup_epochs = 10: expected fewer than epochs = 10",
        ),
        ({"part": {}}, "part = {}: expected tables, each under [[part]]"),
        ({"part": []}, "part = []: expected tables, each under [[part]]"),
        ({"part": [3]}, "part 1 = 3: expected a table"),
        ({"preset": {"small": 3}}, "preset small = 3: expected a table"),
        ({"preset": 3}, "preset = 3: expected a name or a list of names"),
        ({"part": [{"preset": {"a": {}}}]}, "part 1: preset = {'a': {}}: expected a name or a list of names"),
        ({"preset": {"quick": {}}}, "preset quick: a built-in preset has this name"),
        ({"preset": "quik"}, f"unknown preset 'quik' (did you mean quick?); allowed: {BUILT_IN}"),
        (
            {"preset": {"a": {"preset": "b"}}, "part": [{"preset": "c"}]},
            f"part 1: unknown preset 'c'; allowed: {BUILT_IN}, a; preset a: unknown preset 'b'; allowed: {BUILT_IN}, a",
        ),
        ({"preset": {"a": {"preset": "a"}}}, "presets build on one another in a circle: a -> a"),
        (
            {"preset": {"x": {"preset": ["quick", "a"]}, "a": {"preset": "b"}, "b": {"presets": ["quick", "a"]}}},
            "presets build on one another in a circle: a -> b -> a",
        ),
        ({"execution": 3}, "execution = 3: expected a table"),
        ({"slurm": ["gpu"]}, "slurm = ['gpu']: expected a table"),
        (
            {"execution": {"job": 1}},
            f"execution: unknown setting 'job' (did you mean jobs?); allowed: {', '.join(EXECUTION)}",
        ),
        (
            {"execution": {"executor": "cluster"}},
            "execution: executor = 'cluster': expected one of inline, local, slurm",
        ),
        ({"execution": {"jobs": 0}}, "execution: jobs = 0: expected an integer >= 1, or unset"),
        ({"execution": {"threads": True}}, "execution: threads = True: expected an integer >= 1"),
        ({"execution": {"gpus_per_cell": 1.0}}, "execution: gpus_per_cell = 1.0: expected an integer >= 1"),
        ({"execution": {"cells_per_gpu": -1}}, "execution: cells_per_gpu = -1: expected an integer >= 1"),
        ({"execution": {"device": "cuda:"}}, "execution: device = 'cuda:': expected cpu, cuda or cuda:N"),
        (
            {"execution": {"track": "mlflow"}},
            "execution: track = 'mlflow': expected a list of different names out of tensorboard, mlflow",
        ),
        (
            {"execution": {"track": ["mlflow", "mlflow"]}},
            "execution: track = ['mlflow', 'mlflow']: expected a list of different names out of tensorboard, mlflow",
        ),
        ({"execution": {"data_root": ""}}, "execution: data_root = '': expected a path, or unset"),
        (
            {
                "epochs": 0,
                "part": [{}, {"threshold": -1, "preset": "small"}, {"preset": "smal"}],
                "preset": {"small": {"lr": 0}},
                "execution": {"jobs": "two"},
            },
            (
                "epochs = 0: expected an integer >= 1; preset small: lr = 0.0: expected a finite number > 0; "
                "part 2: threshold = -1.0: expected a number > 0, or inf; "
                "execution: jobs = 'two': expected an integer >= 1, or unset; "
                f"part 3: unknown preset 'smal' (did you mean small?); allowed: {BUILT_IN}, small"
            ),
        ),
    ],
)
def test_bad_studies_are_refused_in_one_line(mapping, message):
    with pytest.raises(ConfigError) as caught:
        RunSpec.from_mapping(mapping)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": []}, r"parts = \[\]: expected at least one"),
        ({"parts": [3]}, "^settings = 3: expected a table"),
        ({"parts": [{}, {"lr": 0}]}, r"part 2: lr = 0\.0"),
        ({"parts": [{"lr": 0}]}, r"^lr = 0\.0"),
        ({"parts": [{"preset": "quick"}]}, "unknown setting 'preset'"),
        ({"parts": [{"warmup_epochs": 30}]}, "warmup_epochs = 30: expected fewer than epochs = 30"),
        ({"execution": {"jobs": 0}}, "execution: jobs = 0"),
        ({"slurm": 3}, "slurm = 3: expected a table"),
    ],
)
def test_the_constructor_checks_too(given, message):
    with pytest.raises(ConfigError, match=message):
        RunSpec(**given)


def test_execution_and_slurm_are_plain_tables_and_do_not_change_the_cells():
    execution = {"executor": "slurm", "jobs": 4, "device": "cuda:1", "track": ("mlflow",), "data_root": None}
    slurm = {"partition": "gpu", "sbatch": {"mail-type": "FAIL", "requeue": True}, "setup": ["module load x"]}
    spec = RunSpec.from_mapping({"execution": execution, "slurm": slurm})
    assert spec.execution == {"executor": "slurm", "jobs": 4, "device": "cuda:1", "track": ["mlflow"]}
    assert spec.slurm == slurm
    assert spec.cells() == RunSpec().cells()
    assert RunSpec.from_mapping(tomllib.loads(spec.to_toml())) == spec


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
REALS = st.floats(1e-6, 1e6)
AXES = {
    "dataset": st.sampled_from(["digits", "mnist", "päth.npz", "mine:load"]),
    "model": st.sampled_from(MODELS),
    "width": st.none() | st.integers(1, 99),
    "constraint": st.sampled_from(["cap", "penalty", "none", "weight-decay", "gradient-clip"]),
    "threshold": REALS | st.just(INF) | st.integers(1, 9),
    "seed": st.integers(0, 2**63 - 1),
    "lr": REALS | st.just("1/3"),
    "gradient_clip": REALS,
    "eps": st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    "attacks": st.lists(st.sampled_from(["deepfool", "fmn"]), unique=True),
    "norm": st.sampled_from(NORMS),
    "checkpoint": st.none() | TEXTS.filter(lambda text: text not in ("", "unset")),
}


def axis(key):
    values = st.lists(AXES[key], min_size=1, max_size=3)
    return values if key in ("eps", "attacks") else AXES[key] | values


SETTINGS = st.fixed_dictionaries({}, optional={key: axis(key) for key in AXES})
TOML = st.recursive(
    TEXTS | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


@given(SETTINGS, st.lists(SETTINGS, max_size=3), st.dictionaries(TEXTS, TOML, max_size=3))
def test_writing_and_reading_gives_an_equal_study(shared, parts, slurm):
    mapping = {**shared, "slurm": slurm, "execution": {"threads": 2}, **({"part": parts} if parts else {})}
    spec = RunSpec.from_mapping(mapping)
    again = RunSpec.from_mapping(tomllib.loads(spec.to_toml()))
    assert again == spec
    assert [config_id(cell) for cell in again.cells()] == [config_id(cell) for cell in spec.cells()]


@given(SETTINGS)
def test_cells_are_counted_by_the_product_of_the_axes(settings):
    counts = {
        key: len(set(map(str, value))) if isinstance(value, list) else 1
        for key, value in settings.items()
        if key not in ("constraint", "threshold", "eps", "attacks")
    }
    counts |= {key: len({str(sorted(one)) for one in settings[key]}) for key in ("eps",) if key in settings}
    counts |= {key: len(set(map(tuple, settings[key]))) for key in ("attacks",) if key in settings}

    def listed(key, default):
        value = settings.get(key, default)
        return set(value) if isinstance(value, list | tuple) else {value}

    baselines = {"none", "weight-decay", "gradient-clip"}
    constraints = listed("constraint", "cap")
    thresholds = len({float(threshold) for threshold in listed("threshold", DEFAULT_THRESHOLDS)})
    rows = sum(1 if constraint in baselines else thresholds for constraint in constraints)
    cells = RunSpec.from_mapping(settings).cells()
    assert len(cells) == rows * math.prod(counts.values())
    assert len({config_id(cell) for cell in cells}) == len(cells)


def test_a_hundred_thousand_cells_take_seconds():
    mapping = {"lr": [1 / k for k in range(1, 101)], "momentum": [k / 100 for k in range(100)], "seed": list(range(10))}
    start = time.process_time()
    cells = RunSpec.from_mapping({**mapping, "threshold": 1}).cells()
    assert len(cells) == 100_000
    assert time.process_time() - start < 10  # a second where nothing else runs


def test_reading_a_spec_loads_nothing_heavy():
    code = "import sys, speccert.experiments.flags; print(*{m.split('.')[0] for m in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "pandas", "pyarrow"} & set(result.stdout.split()) == set()


def test_toml_file(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(
        'thresholds = [0.5, inf]\nseed = [0, 1]\nconstraint = "clip"\neps = ["36/255", 1]\nwidth = 64\n'
        '[presets.small]\nepochs = 2\n[[part]]\npreset = "small"\n[[part]]\nepochs = [3, 4]\n'
        '[execution]\njobs = 2\n[slurm]\ntime = "4:00:00"\n'
    )
    spec = RunSpec.from_toml(path)
    expected = [(epochs, threshold, seed) for epochs in (2, 3, 4) for threshold in (0.5, INF) for seed in (0, 1)]
    assert combinations(spec.cells(), "epochs", "threshold", "seed") == expected
    assert {(cell.eps, cell.constraint, cell.width) for cell in spec.cells()} == {((36 / 255, 1.0), "clip", 64)}
    assert (spec.execution, spec.slurm) == ({"jobs": 2}, {"time": "4:00:00"})
    copy = tmp_path / "copy.toml"
    copy.write_text(spec.to_toml(), encoding="utf-8")
    assert RunSpec.from_toml(copy) == spec


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("epochs = ", r"spec.toml: .*Invalid value"),
        ("epochs = 0", r"spec.toml: epochs = 0"),
        ("[run]\nepochs = 1", r"spec.toml: unknown setting 'run'"),
        ("[[part]]\nepochs = 0", r"spec.toml: part 1: epochs = 0"),
        ("preset = 'a'\n[preset.a]\nepochs = 0", r"spec.toml: Cannot overwrite .*define presets as \[presets.NAME\]"),
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


FILE = {
    "threshold": 1,
    "epochs": 3,
    "preset": {"small": {"epochs": 5, "width": 8}, "wide": {"width": 99}},
    "part": [{"epochs": [6, 7], "seeds": [1, 2]}, {"preset": "small"}],
}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [(6, None, 1), (6, None, 2), (7, None, 1), (7, None, 2), (5, 8, 0)]),
        ({"epochs": 1}, [(1, None, 1), (1, None, 2), (1, 8, 0)]),
        ({"seed": [3, 4], "epochs": 1}, [(1, None, 3), (1, None, 4), (1, 8, 3), (1, 8, 4)]),
        ({"width": None, "epochs": 1}, [(1, None, 1), (1, None, 2), (1, None, 0)]),
        ({"preset": "quick"}, [(1, None, 1), (1, None, 2), (1, 8, 0)]),
        ({"preset": "quick", "epochs": 2, "seed": 0}, [(2, None, 0), (2, 8, 0)]),
        ({"preset": ["quick", "wide"], "seed": 0}, [(1, None, 0), (6, 99, 0), (7, 99, 0), (1, 8, 0), (5, 99, 0)]),
    ],
)
def test_flags_win_everywhere_in_the_file(overrides, expected):
    spec = RunSpec.from_mapping(FILE, overrides)
    assert combinations(spec.cells(), "epochs", "width", "seed") == expected


def test_a_bad_flag_is_not_the_files_fault_and_hides_no_clash(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text("epochs = 0\nwarmup_epochs = 2\n")
    with pytest.raises(ConfigError, match=r"^lr = 0\.0"):
        RunSpec.from_toml(path, {"lr": 0})
    with pytest.raises(ConfigError, match=r"spec.toml: warmup_epochs = 2: expected fewer than epochs = 2"):
        RunSpec.from_toml(path, {"epochs": 2})
    assert {cell.epochs for cell in RunSpec.from_toml(path, {"epochs": 3}).cells()} == {3}


def test_missing_toml_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: .*No such file"):
        RunSpec.from_toml(tmp_path / "none.toml")

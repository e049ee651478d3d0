import dataclasses
import itertools

import pytest

from speccert.experiments.config import CellConfig, ConfigError
from speccert.experiments.flags import HELP, SWITCHES, default_text, parse_settings
from speccert.experiments.spec import RunSpec


def test_every_setting_has_a_flag_with_help():
    assert list(HELP) == ["preset", *(field.name for field in dataclasses.fields(CellConfig))]
    assert all(HELP.values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"epochs": "3"}, {"epochs": 3}),
        ({"epochs": " 3 "}, {"epochs": 3}),
        ({"width": "16"}, {"width": 16}),
        ({"lr": "1e-3"}, {"lr": 1e-3}),
        ({"gradient_clip": "2"}, {"gradient_clip": 2.0}),
        ({"model": "mlp"}, {"model": "mlp"}),
        ({"constraint": "cap, clip"}, {"constraint": ["cap", "clip"]}),
        ({"threshold": "0.5,1,inf"}, {"threshold": [0.5, 1.0, float("inf")]}),
        ({"seed": "0,1"}, {"seed": [0, 1]}),
        ({"eps": "36/255,0.3"}, {"eps": ["36/255", 0.3]}),
        ({"attacks": "fgsm, ddn"}, {"attacks": ["fgsm", "ddn"]}),
        ({"epochs": None, "lr": None}, {}),
        ({"model": "mlp, convnet-4c3f"}, {"model": ["mlp", "convnet-4c3f"]}),
        ({"lr": "1e-3,1/300"}, {"lr": [1e-3, "1/300"]}),
        ({"epochs": "1,2"}, {"epochs": [1, 2]}),
        ({"width": "unset, 64"}, {"width": [None, 64]}),
        ({"attack_samples": "unset"}, {"attack_samples": None}),
        ({"checkpoint": "a,b.safetensors"}, {"checkpoint": "a,b.safetensors"}),
        ({"checkpoint": "unset"}, {"checkpoint": None}),
        ({"bound_budget": "90, 2m"}, {"bound_budget": ["90", "2m"]}),
        ({"max_seconds": "90s"}, {"max_seconds": "90s"}),
        ({"max_seconds": "unset"}, {"max_seconds": None}),
        ({"max_gradients": "500"}, {"max_gradients": 500}),
        ({"max_gradients": "100, unset"}, {"max_gradients": [100, None]}),
        ({"attack_schedule": "each, cascade"}, {"attack_schedule": ["each", "cascade"]}),
        ({"audit": True, "integer_pixels": False}, {"audit": True, "integer_pixels": False}),
        ({"audit": None}, {}),
        ({"preset": "quick"}, {"preset": "quick"}),
        ({"preset": "small, big"}, {"preset": ["small", "big"]}),
    ],
)
def test_texts_become_their_types(flags, expected):
    assert parse_settings(flags) == expected


def test_flags_make_the_same_cell_as_values():
    flags = {"eps": "36/255, 0.5", "threshold": "2", "seed": "4", "attacks": "ddn", "loss_eps": "1/10", "epochs": "2"}
    (cell,) = RunSpec.from_mapping(parse_settings(flags)).cells()
    assert cell == CellConfig(eps=(36 / 255, 0.5), threshold=2.0, seed=4, attacks=("ddn",), loss_eps=0.1, epochs=2)


def test_commas_span_a_grid_but_for_eps_and_attacks():
    flags = {"model": "mlp,liresnet", "lr": "0.1,0.2,0.3", "eps": "0.1,0.2", "attacks": "pgd,ddn", "threshold": "1"}
    cells = RunSpec.from_mapping(parse_settings(flags)).cells()
    assert [(cell.model, cell.lr) for cell in cells] == list(itertools.product(["mlp", "liresnet"], [0.1, 0.2, 0.3]))
    assert {(cell.eps, cell.attacks) for cell in cells} == {((0.1, 0.2), ("pgd", "ddn"))}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("preset", "unset"),
        ("threshold", "0.5,0.7,1,1.5,inf"),
        ("constraint", "cap"),
        ("seed", "0"),
        ("width", "unset"),
        ("epochs", "30; 10 for mnist; 10 for fashion-mnist; 60 for cifar10"),
        ("model", "mlp; liresnet for cifar10"),
        ("audit", "off"),
        ("max_seconds", "unset"),
    ],
)
def test_defaults_in_words(key, expected):
    assert default_text(key) == expected


def test_switches_are_the_settings_that_are_true_or_false():
    assert set(SWITCHES) == {field.name for field in dataclasses.fields(CellConfig) if field.type is bool}


def test_every_flag_has_a_default_in_words():
    assert all(default_text(key) for key in HELP)


def test_every_text_that_is_no_number_is_named_in_one_line():
    numbers = {"epochs": "many", "lr": "fast", "seed": "0,x", "eps": "", "model": "mlp", "width": "1.5"}
    with pytest.raises(ConfigError) as raised:
        parse_settings({**numbers, "max_gradients": "few"})
    assert str(raised.value).split("; ") == [
        "epochs = 'many': expected integers",
        "lr = 'fast': expected numbers",
        "seed = '0,x': expected integers",
        "eps = '': expected numbers",
        "width = '1.5': expected integers",
        "max_gradients = 'few': expected integers",
    ]

import dataclasses

import pytest

from speccert.experiments.config import CellConfig, ConfigError, RunSpec
from speccert.experiments.flags import HELP, parse_settings


def test_every_setting_has_a_flag_with_help():
    assert list(HELP) == [field.name for field in dataclasses.fields(CellConfig)]
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
    ],
)
def test_texts_become_their_types(flags, expected):
    assert parse_settings(flags) == expected


def test_flags_make_the_same_cell_as_values():
    flags = {"eps": "36/255, 0.5", "threshold": "2", "seed": "4", "attacks": "ddn", "loss_eps": "1/10", "epochs": "2"}
    (cell,) = RunSpec.from_mapping(parse_settings(flags)).cells()
    assert cell == CellConfig(eps=(36 / 255, 0.5), threshold=2.0, seed=4, attacks=("ddn",), loss_eps=0.1, epochs=2)


def test_every_text_that_is_no_number_is_named_in_one_line():
    with pytest.raises(ConfigError) as raised:
        parse_settings({"epochs": "many", "lr": "fast", "seed": "0,x", "eps": "", "model": "mlp", "width": "1.5"})
    assert str(raised.value).split("; ") == [
        "epochs = 'many': expected integers",
        "lr = 'fast': expected numbers",
        "seed = '0,x': expected integers",
        "eps = '': expected numbers",
        "width = '1.5': expected integers",
    ]

import contextlib
import math

import pytest
import torch
from torch import nn

from speccert.certify.arithmetic import (
    ARITHMETICS,
    DTYPES,
    _set_precisions,
    arithmetic_for,
    assumptions,
    exact_arithmetic,
    float32_precisions,
    full_precision,
)


@pytest.mark.parametrize("name", list(DTYPES))
def test_constants_are_those_of_the_type(name):
    arithmetic, info = ARITHMETICS[name], torch.finfo(DTYPES[name])
    assert arithmetic.unit == info.eps / 2
    assert arithmetic.huge == info.max
    assert arithmetic.tiny == (info.smallest_normal * info.eps if name == "float16" else info.smallest_normal)
    assert arithmetic.accumulation == (2.0**-23 if name in ("float16", "bfloat16") else info.eps / 2)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_no_number_rounds_by_more_than_unit_and_tiny(dtype):
    exponents = torch.linspace(-60, 15, 5000, dtype=torch.float64)
    values = torch.exp2(exponents) * (1 + torch.rand(5000, generator=torch.Generator().manual_seed(0)).double())
    name = next(key for key, value in DTYPES.items() if value == dtype)
    arithmetic = ARITHMETICS[name]
    errors = (values.to(dtype).double() - values).abs()
    assert (errors <= arithmetic.unit * values + arithmetic.tiny).all()


def test_a_model_has_the_arithmetic_of_its_coarsest_tensors():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert arithmetic_for(model).name == "float32"
    assert arithmetic_for(model.double(), "model").name == "float64"
    model[0].bfloat16()
    assert arithmetic_for(model).name == "bfloat16"
    assert arithmetic_for(model, "real").unit == 0.0
    assert arithmetic_for(nn.Flatten()).name == "float32"


def test_models_of_both_half_types_are_refused():
    model = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16())
    with pytest.raises(ValueError, match=r"expected tensors of one of .*, got bfloat16, float16"):
        arithmetic_for(model)


def test_assumptions_have_distinct_ids_and_half_types_have_more():
    for arithmetic in ARITHMETICS.values():
        found = assumptions(arithmetic)
        assert len({one.id for one in found}) == len(found)
    count = {name: len(assumptions(arithmetic)) for name, arithmetic in ARITHMETICS.items()}
    assert count["real"] < count["float64"] == count["float32"] < count["float16"] == count["bfloat16"]


def settings():
    products = torch.backends.cuda.matmul
    return (
        float32_precisions(),
        *(torch.backends.cudnn.enabled, torch._C._get_nnpack_enabled()),
        *(products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction),
        torch.is_autocast_enabled("cpu"),
    )


def is_full(values):
    return not {"tf32", "bf16"} & set(values.values())


@pytest.fixture
def restored():
    before = settings()
    yield
    _set_precisions(before[0])
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before[3]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before[4]
    assert settings() == before


def _old_ways():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def _new_ways():
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def _safe_ways():
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "ieee"


@pytest.mark.parametrize("change", [_old_ways, _new_ways, _safe_ways])
def test_settings_hold_inside_and_are_restored(change, restored):
    if change is not _old_ways and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has the old ways only")
    change()
    changed = settings()
    with torch.autocast("cpu"):
        with contextlib.suppress(KeyError), exact_arithmetic(torch.device("cpu")):
            assert is_full(settings()[0])
            assert settings()[1:] == (False, False, False, False, False)
            raise KeyError
        assert torch.is_autocast_enabled("cpu")
    assert settings() == changed
    full_precision()
    assert is_full(settings()[0])
    assert settings()[3:5] == (False, False)


def test_a_reduced_mode_of_onednn_is_refused(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    message = "ONEDNN_DEFAULT_FPMATH_MODE: expected STRICT or nothing, got BF16"
    with pytest.raises(ValueError, match=message), exact_arithmetic(torch.device("cpu")):
        pass


def test_real_arithmetic_never_overflows():
    assert ARITHMETICS["real"].huge == math.inf

import pytest
import torch

from speccert.experiments import precision
from speccert.experiments.precision import check_machine, exact_float32


@pytest.fixture(autouse=True)
def restored_settings():
    cudnn = torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:]


def found(name):
    (check,) = (check for check in check_machine() if name in check.name)
    return check


def test_the_assumptions_hold_after_setting_them():
    exact_float32()
    checks = check_machine()
    assert all(check.holds is not False for check in checks)
    assert sum(check.holds is True for check in checks) >= 5
    assert found("torch").found == torch.__version__


def test_tf32_is_turned_off_and_told_when_it_is_on():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    assert found("TF32").holds is False
    exact_float32()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert found("TF32").holds is True


def test_flushed_subnormals_are_told():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert found("subnormal").holds is False
    finally:
        torch.set_flush_denormal(False)


def test_products_of_lower_precision_are_told(monkeypatch):
    """bfloat16 inputs, as a fast mode might take them, err far beyond the float32 bound."""
    honest = torch.Tensor.to

    def coarse(tensor, target, *rest):
        return honest(tensor, torch.bfloat16).to(torch.float32) if target == "cpu" else honest(tensor, target, *rest)

    monkeypatch.setattr(precision.torch.Tensor, "to", coarse)
    assert precision._product_check(torch.float32, "cpu").holds is False

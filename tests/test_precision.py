import pytest
import torch

from speccert.certify.arithmetic import ARITHMETICS, assumptions
from speccert.experiments import precision
from speccert.experiments.precision import Check, check_machine, exact_float32, report


@pytest.fixture(autouse=True)
def restored_settings():
    cudnn, sums = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    halves = sums.allow_fp16_reduced_precision_reduction, sums.allow_bf16_reduced_precision_reduction
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:]
    sums.allow_fp16_reduced_precision_reduction, sums.allow_bf16_reduced_precision_reduction = halves


@pytest.fixture(scope="module")
def checks():
    exact_float32()
    return check_machine()


def found(name, checks):
    (check,) = (check for check in checks if name in check.name)
    return check


def test_the_assumptions_hold_after_setting_them(checks):
    assert [check.name for check in checks if check.holds is False] == []
    assert sum(check.holds is True for check in checks) >= 15
    assert found("torch", checks).found == torch.__version__
    assert str(torch.get_num_threads()) in found("processor", checks).found


def test_every_assumption_is_named_once_and_every_check_belongs_to_one(checks):
    lines = report(checks)
    ids = {item.id for arithmetic in ARITHMETICS.values() for item in assumptions(arithmetic)}
    for name in (*ids, "proofs"):
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
    assert {check.assumption for check in checks} <= {*ids, "proofs", ""}
    assert {check.assumption for check in checks if check.holds is not None} == {*ids, "proofs"} - {"eval-mode"}
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for check in checks:
        assert f"{check.name}: {check.found}" in text


def test_marks():
    lines = report([Check("a", "one"), Check("b", "two", True, "summation"), Check("c", "three", False, "summation")])
    assert lines[0] == "     a: one"
    assert "ok   b: two" in lines
    assert "FAIL c: three" in lines


def test_tf32_is_turned_off_and_told_when_it_is_on():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    assert found("float32 in fewer bits", precision._assumptions()).holds is False
    exact_float32()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_flushed_subnormals_are_told_and_harm_nothing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        flushed = found("subnormal results (cpu)", precision._assumptions())
    finally:
        torch.set_flush_denormal(False)
    assert "float32 flushed to zero" in flushed.found
    assert flushed.holds is None

"""Batches fit into memory, shrink where they do not, and lie on the model's device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speccert.attacks import batching, make_attack, memory
from speccert.attacks.batching import automatic_size, device_of, in_batches
from speccert.attacks.memory import free_memory

CPU = torch.device("cpu")
GIB = 2**30


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(batching, "free_memory", lambda device: size)


class Wide(nn.Module):
    """Keeps the product of its input with ten constants: 40 bytes for the graph of each entry, and 4 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(10**6))

    def forward(self, x: Tensor) -> Tensor:
        many = (x.flatten(1).unsqueeze(1) * self.weight[:10, None]).exp()  # exp keeps its result
        return torch.stack([many.sum((1, 2)), -x.flatten(1).sum(1)], 1)


def test_size_is_what_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1000, 100)
    sample = 2 * 4 * 10 * 100 + 32 * 8 * 100  # twice the graph, and 32 float64 copies
    for count in (1, 2, 4, 32, 64):
        free(monkeypatch, 2 * sample * count * 1.1)
        assert automatic_size(Wide(), x) == count
        free(monkeypatch, 2 * sample * count * 0.9)
        assert automatic_size(Wide(), x) == max(1, count // 2)


def test_size_where_memory_does_not_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, float("inf"))
    assert automatic_size(Wide(), torch.rand(10_000, 3)) == 256
    assert automatic_size(Wide(), torch.rand(37, 3)) == 37
    assert automatic_size(Wide(), torch.rand(1, 3)) == 1
    free(monkeypatch, 0.0)
    assert automatic_size(Wide(), torch.rand(37, 3)) == 1


def test_weights_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 10**5), nn.Linear(10**5, 3))
    free(monkeypatch, 64 * 2**20)  # the weights have 3.2 MB, a sample's activations 0.4 MB
    with torch.no_grad():
        assert 16 <= automatic_size(model, torch.rand(1000, 4)) <= 64


def test_model_that_changes_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    x = torch.rand(3, 4)
    kept = x.clone()
    assert automatic_size(InPlace(), x) == 3
    assert torch.equal(x, kept)


def test_device_is_the_models() -> None:
    x = torch.rand(2, 3)
    assert device_of(nn.Identity(), x) == CPU
    assert device_of(nn.Linear(3, 2, device="meta"), x).type == "meta"
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta"), x).type == "meta"


def lack(kind: str) -> RuntimeError:
    text = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    return torch.OutOfMemoryError("CUDA out of memory.") if kind == "cuda" else RuntimeError(text)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_batches_are_halved_where_memory_lacks(kind: str) -> None:
    calls = []

    def run(start: int, stop: int) -> list[int]:
        calls.append((start, stop))
        if stop - start > 3:
            raise lack(kind)
        return list(range(start, stop))

    parts = list(in_batches(run, 11, 8))
    assert [index for part in parts for index in part] == list(range(11))
    assert calls == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]


def test_other_errors_and_single_samples_raise() -> None:
    def lacking(start: int, stop: int) -> None:
        raise lack("cuda")

    def broken(start: int, stop: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(lacking, 4, 4))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(in_batches(broken, 4, 4))


class Small(nn.Module):
    """Runs out of memory on more than `most` samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most = nn.Linear(6, 3), most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise lack("cuda")
        logits: Tensor = self.linear(x)
        return logits


def problem(count: int = 10) -> tuple[Small, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Small(10**9)
    x = torch.rand(count, 6, generator=torch.Generator().manual_seed(2))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("name", ["fgsm", "deepfool", "pgd"])
def test_attack_goes_on_after_a_lack_of_memory(name: str) -> None:
    model, x, y = problem()
    options: dict[str, Any] = {"random_start": False} if name == "pgd" else {}
    expected = make_attack(name, **options)(model, x, y, eps=0.2)
    model.most = 3
    state = torch.random.get_rng_state()
    result = make_attack(name, **options)(model, x, y, eps=0.2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert torch.equal(result.success, expected.success)
    torch.testing.assert_close(result.distance, expected.distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), [("fgsm", {}), ("deepfool", {}), ("ddn", {"steps": 20})])
def test_batch_size_does_not_matter_without_random_numbers(name: str, options: dict[str, Any]) -> None:
    model, x, y = problem(6)
    whole, parts, single = (
        make_attack(name, **options)(model, x, y, eps=0.2, batch_size=size) for size in (None, 4, 1)
    )
    for other in (parts, single):
        torch.testing.assert_close(other.distance, whole.distance, rtol=1e-3, atol=1e-6)
        assert (other.success == whole.success).float().mean() > 0.9


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    model, x, y = problem()
    attack = make_attack("pgd", steps=2)
    first = attack(model, x, y, eps=0.05, batch_size=5, seed=3)
    other = torch.cat([x.flip(1)[:5], x[5:]])
    again = attack(model, other, torch.cat([model(other[:5]).argmax(1), y[5:]]), eps=0.05, batch_size=5, seed=3)
    assert torch.equal(first.x_adv[5:], again.x_adv[5:])
    assert not torch.equal(attack(model, x, y, eps=0.05, batch_size=5, seed=4).x_adv, first.x_adv)


def group(folder: Path, limit: str, usage: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available and no control group."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemFree: {GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    return tmp_path


def test_memory_of_the_system(system: Path) -> None:
    assert free_memory(CPU) == 8 * GIB
    (system / "proc/self/cgroup").unlink()
    assert free_memory(CPU) == 8 * GIB
    (system / "proc/meminfo").unlink()
    assert free_memory(CPU) > 0


def test_memory_of_a_control_group_and_those_around_it(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/job/step\n")
    group(system / "groups/job/step", "max", 5, 0)
    assert free_memory(CPU) == 8 * GIB
    group(system / "groups/job", str(4 * GIB), 3 * GIB, GIB // 2)
    assert free_memory(CPU) == 1.5 * GIB
    group(system / "groups/job/step", str(2 * GIB), GIB, 0)
    assert free_memory(CPU) == GIB
    group(system / "groups/job/step", str(GIB), 2 * GIB, 0)
    assert free_memory(CPU) == 0


def test_memory_of_an_old_control_group(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("5:devices:/x\n4:memory:/job\n0::/\n")
    folder = system / "groups/memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    assert free_memory(CPU) == 2 * GIB


def test_memory_of_this_machine() -> None:
    assert 0 < free_memory(CPU) < 2**50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("side", ["model", "samples"])
def test_model_and_samples_on_different_devices(side: str) -> None:
    model, x, y = problem()
    expected = make_attack("fmn")(model, x, y, eps=0.2)
    model, x = (model.cuda(), x) if side == "model" else (model, x.cuda())
    result = make_attack("fmn")(model, x, y, eps=0.2)
    assert result.x_adv.device == result.distance.device == result.logits.device == x.device
    torch.testing.assert_close(result.distance.cpu(), expected.distance, rtol=1e-3, atol=1e-5)
    assert free_memory(torch.device("cuda")) > 0

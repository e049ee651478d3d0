import math

import pytest
import torch
from torch import nn

from speccert.experiments.checkpoints import load_checkpoint, save_checkpoint
from speccert.experiments.store import StoreError


def model():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["ours.safetensors", "torch.pt", "nested.pth"])
def test_checkpoints_round_trip(tmp_path, kind):
    source, target, path = model(), model(), tmp_path / kind
    if kind.endswith(".safetensors"):
        save_checkpoint(path, source.state_dict())
    else:
        torch.save({"state_dict": source.state_dict()} if kind == "nested.pth" else source.state_dict(), path)
    load_checkpoint(target, path)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_shared_and_transposed_weights_are_saved(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path / "a.safetensors", {"a": weight, "b": weight.T})
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "a.safetensors")["b"], weight.T)


def test_only_tensors_are_saved(tmp_path):
    with pytest.raises(StoreError, match="expected tensors only, got other values for step"):
        save_checkpoint(tmp_path / "a.safetensors", {"step": 3})


def changed(state, **changes):
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"0.weight": None, "1.bias": None}, "missing weights: 0.weight, 1.bias"),
        ({"2.weight": torch.zeros(1)}, "unexpected weights: 2.weight"),
        ({"0.weight": torch.zeros(2, 4)}, r"0.weight has shape \(2, 4\), expected \(2, 3\)"),
        ({"0.bias": torch.tensor([0.0, math.nan])}, "NaN or infinite weights: 0.bias"),
        ({"0.bias": torch.tensor([0.0, math.inf])}, "NaN or infinite weights: 0.bias"),
        ({str(i): torch.zeros(1) for i in range(7)}, "unexpected weights: 0, 1, 2, 3, 4 and 2 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, match):
    target, path = model(), tmp_path / "a.safetensors"
    save_checkpoint(path, changed(model().state_dict(), **changes))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(StoreError, match=match):
        load_checkpoint(target, path)
    assert all(torch.equal(target.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("keep", [0, 5, 60, -10])
def test_truncated_checkpoints_are_refused(tmp_path, name, keep):
    path = tmp_path / name
    if name == "a.pt":
        torch.save(model().state_dict(), path)
    else:
        save_checkpoint(path, model().state_dict())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=rf"{name}: (truncated|damaged)") as caught:
        load_checkpoint(model(), path)
    assert "\n" not in str(caught.value)


def test_no_pickled_code_is_run(tmp_path):
    torch.save(model(), tmp_path / "whole.pt")
    with pytest.raises(StoreError, match="pickled code is not run"):
        load_checkpoint(model(), tmp_path / "whole.pt")


def test_other_content_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(StoreError, match=r"expected a state_dict \(names to tensors\), got list"):
        load_checkpoint(model(), tmp_path / "list.pt")
    with pytest.raises(StoreError, match=r"none.pt: cannot be read \(No such file"):
        load_checkpoint(model(), tmp_path / "none.pt")


@pytest.mark.parametrize("kind", ["a.safetensors", "a.pt"])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path, kind):
    (tmp_path / kind).mkdir()
    with pytest.raises(StoreError, match=rf"{kind}: cannot be (read|written) \("):
        load_checkpoint(model(), tmp_path / kind)
    if kind == "a.safetensors":
        with pytest.raises(StoreError, match=rf"{kind}: cannot be written \("):
            save_checkpoint(tmp_path / kind, model().state_dict())


def test_weights_of_another_device_layout_and_type_keep_their_bits(tmp_path):
    state = {"a": torch.rand(3, 4, dtype=torch.float64).T, "b": torch.tensor([1, 2]), "c": torch.rand(2).bfloat16()}
    save_checkpoint(tmp_path / "a.safetensors", state)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "a.safetensors")
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in state.items())

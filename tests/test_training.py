import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from speccert.certify import certified_radii
from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split
from speccert.experiments.store import StoreError
from speccert.experiments.training import forget, train

TIMES = ["epoch_s", "step_s"]


def blobs(classes=3, count=120, noise=0.08, seed=0):
    """Images 1 x 4 x 4: a bright patch a class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(classes, 1, 4, 4, generator=generator)

    def split(size):
        y = torch.arange(size) % classes
        return Split((centres[y] + noise * torch.randn(size, 1, 4, 4, generator=generator)).clamp(0, 1), y)

    return Dataset("blobs", split(count), split(45), split(45), (1, 4, 4), classes, (0.5,), (0.25,))


def cell(**settings):
    small = {"width": 8, "depth": 2, "epochs": 4, "batch_size": 32, "lr": 1e-2, "eps": (0.05, 0.1, 0.2)}
    return CellConfig(**{**small, "loss_eps": 0.1, **settings})


def weights(result):
    return {key: value.cpu() for key, value in result.model.state_dict().items()}


def assert_same(first, second):
    """Equal bits in everything but the times."""
    assert first.history.drop(columns=TIMES).equals(second.history.drop(columns=TIMES))
    assert (first.best_epoch, first.status) == (second.best_epoch, second.status)
    assert weights(first).keys() == weights(second).keys()
    assert all(torch.equal(value, weights(second)[key]) for key, value in weights(first).items())


def test_training_learns_and_logs():
    rows = []
    result = train(cell(epochs=12), blobs(), on_epoch=rows.append)
    history = result.history
    assert result.status == "finished"
    assert not result.diverged
    assert history["epoch"].tolist() == list(range(1, 13))
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert history["validation_accuracy"].iloc[-1] > 0.9
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert np.isfinite(history.to_numpy()).all()
    assert (history[TIMES] > 0).all().all()
    assert result.step_s == pytest.approx(history["step_s"].median())
    assert result.gradient_norm == pytest.approx(history["gradient_norm"].mean())
    assert result.train_s == pytest.approx(history["epoch_s"].sum())
    assert not any(layer.training for layer in result.model.modules())
    assert all(p.grad is None for p in result.model.parameters())


@pytest.mark.parametrize("threshold", [1.0, math.inf])
def test_the_best_epoch_is_kept_by_certified_accuracy_then_accuracy_then_later(threshold):
    result = train(cell(epochs=6, threshold=threshold), blobs(noise=0.3))
    ranks = result.history[["validation_certified_accuracy", "validation_accuracy", "epoch"]].apply(tuple, axis=1)
    assert result.best_epoch == int(result.history["epoch"][ranks.idxmax()])
    part = blobs(noise=0.3).validation
    radii = certified_radii(result.model, part.x, part.y)
    row = result.history.set_index("epoch").loc[result.best_epoch]
    assert row["validation_certified_accuracy"] == pytest.approx((radii > 0.1).double().mean().item())
    assert row["validation_accuracy"] == pytest.approx(
        (result.model(part.x).argmax(1) == part.y).double().mean().item()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "emma", "augment": "shift-flip", "optimizer": "sgd", "schedule": "step"},
        {"loss": "gloro", "constraint": "none", "threshold": math.inf, "optimizer": "adam", "weight_decay": 0.01},
        {"loss": "margin", "constraint": "penalty", "gradient_clip": 0.5, "warmup_epochs": 1},
        {"constraint": "orthogonal", "activation": "householder", "normalise": "standard"},
        {"constraint": "clip", "model": "convnet-4c3f", "depth": None, "width": 2, "normalise": "none"},
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, settings):
    config, data = cell(**settings), blobs()
    whole = train(config, data)

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, data, folder=tmp_path, on_epoch=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["resume.pt"]
    torch.rand(3)  # the global generator must not matter
    epochs = []
    resumed = train(config, data, folder=tmp_path, on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [3, 4]
    assert_same(resumed, whole)
    forget(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


class Stop(Exception):
    pass


def test_what_on_epoch_raises_is_passed_on_and_costs_no_epoch(tmp_path):
    """A lost lease or a cancelled run stops a training so."""
    config, data = cell(epochs=3), blobs()
    for number in (1, 2, 3):
        rows = []

        def stop(row, rows=rows):
            rows.append(row)
            assert torch.load(tmp_path / "resume.pt", weights_only=True)["state"]["history"][-1] == row
            raise Stop

        with pytest.raises(Stop):
            train(config, data, folder=tmp_path, on_epoch=stop)
        assert [row["epoch"] for row in rows] == [number]
    assert_same(train(config, data, folder=tmp_path, on_epoch=stop), train(config, data))


def test_a_kill_within_an_epoch_goes_on_after_the_last_whole_one(tmp_path, monkeypatch):
    config, data = cell(), blobs()
    whole = train(config, data)
    step, calls = torch.optim.AdamW.step, []

    def killed(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 7:  # 4 steps an epoch
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, data, folder=tmp_path)
    assert_same(train(config, data, folder=tmp_path), whole)


def test_a_resume_file_of_another_config_is_refused(tmp_path):
    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cell(), blobs(), folder=tmp_path, on_epoch=interrupt)
    with pytest.raises(StoreError, match="expected the state of run"):
        train(cell(lr=1e-4), blobs(), folder=tmp_path)


def test_the_seed_sets_the_result_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first, again, other = (train(cell(seed=seed, epochs=1), blobs()) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(first, again)
    assert not torch.equal(*(next(iter(result.model.parameters())) for result in (first, other)))


@pytest.mark.parametrize("lr", [1e4, 1e9, 1e30, 1e36])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("constraint", ["none", "cap", "orthogonal"])
def test_a_huge_learning_rate_is_named_and_leaves_no_bad_weights(tmp_path, lr, optimizer, constraint):
    threshold = math.inf if constraint == "none" else 1.0
    config = cell(lr=lr, optimizer=optimizer, constraint=constraint, threshold=threshold, epochs=6, schedule="constant")
    result = train(config, blobs(classes=10, noise=1.0), folder=tmp_path)
    assert result.status in ("non-finite", "at-chance", "finished")
    if constraint == "none" and lr >= 1e9:
        assert result.diverged
    if result.status == "non-finite":
        assert len(result.history) < 6 or result.history["validation_accuracy"].isna().iloc[-1]
        assert result.best_epoch < len(result.history)
    assert all(value.isfinite().all() for value in weights(result).values())
    assert not any(layer.training for layer in result.model.modules())
    forget(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


DIVERGING = {"lr": 1e30, "constraint": "none", "threshold": math.inf, "optimizer": "sgd", "epochs": 5}


def test_a_diverged_training_is_not_trained_again(tmp_path):
    rows = []
    first, again = (train(cell(**DIVERGING), blobs(), folder=tmp_path, on_epoch=rows.append) for _ in range(2))
    assert len(rows) == len(first.history) < 5
    assert first.status == "non-finite"
    assert_same(first, again)


def test_no_resume_file_holds_bad_weights(tmp_path):
    def check(row):
        for path in tmp_path.glob("resume.pt"):
            state = torch.load(path, weights_only=True)["state"]
            for weights in (state["best"]["weights"], state.get("model", {})):
                assert all(value.isfinite().all() for value in weights.values())

    config = cell(**DIVERGING)
    result = train(config, blobs(), folder=tmp_path, on_epoch=check)
    assert result.status == "non-finite"
    assert result.best_epoch == 0
    assert math.isnan(result.gradient_norm)


def test_accuracy_at_chance_is_flagged():
    data = blobs(classes=10, noise=0.0)
    shuffled = data.train.y[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    data = dataclasses.replace(data, train=Split(data.train.x, shuffled))
    result = train(cell(lr=1e-9, epochs=2), data)
    assert result.history["train_accuracy"].iloc[-1] <= 0.15
    assert (result.status, result.diverged) == ("at-chance", True)


def test_baselines_train_with_any_loss_and_report_their_norms():
    result = train(cell(constraint="none", threshold=math.inf, loss="cross-entropy", epochs=8), blobs())
    row = result.history.iloc[-1]
    assert row["validation_accuracy"] > 0.9
    assert row["lipschitz_bound"] >= row["largest_layer_norm"] > 0


def test_cells_that_differ_in_the_bound_alone_train_the_same_network():
    assert_same(train(cell(), blobs()), train(cell(bound="local", bound_budget=1e9), blobs()))


def test_the_cap_holds_every_layer():
    result = train(cell(threshold=0.7), blobs())
    assert (result.history["largest_layer_norm"] <= 0.7 * (1 + 1e-3)).all()
    assert (result.history["lipschitz_bound"] <= 0.7**3 * (1 + 1e-2)).all()


@pytest.mark.parametrize(("normalise", "scale"), [("none", 1.0), ("center", 1.0), ("standard", 4.0)])
def test_normalisation_counts_in_the_bound(normalise, scale):
    result = train(cell(normalise=normalise, epochs=1, constraint="orthogonal"), blobs())
    assert result.history["lipschitz_bound"].iloc[0] == pytest.approx(scale, rel=1e-2)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_validation_is_in_the_norm_of_the_config(norm):
    result = train(cell(norm=norm, attacks=("fmn",), epochs=2, eps=(0.02,)), blobs())
    part = blobs().validation
    radii = certified_radii(result.model, part.x, part.y, norm=norm)
    row = result.history.set_index("epoch").loc[result.best_epoch]
    assert row["validation_certified_accuracy"] == pytest.approx((radii > 0.02).double().mean().item())


def test_start_weights_come_from_a_checkpoint_of_either_kind(tmp_path):
    plain = train(cell(constraint="none", threshold=math.inf, epochs=2), blobs())
    capped = train(cell(epochs=2), blobs())
    for kind, result in (("none", plain), ("cap", capped)):
        path = tmp_path / f"{kind}.safetensors"
        save_checkpoint(path, result.model.state_dict())
        config = cell(checkpoint=str(path), lr=1e-12, epochs=1, constraint=kind, threshold=cell_threshold(kind))
        part = blobs().test.x
        again = train(config, blobs()).model
        torch.testing.assert_close(again(part), result.model(part), atol=1e-3, rtol=1e-3)


def cell_threshold(kind):
    return math.inf if kind == "none" else 1.0


def test_a_checkpoint_that_fits_neither_way_is_refused_by_the_names_of_the_plain_model(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"1.weight": torch.zeros(2, 2)})
    with pytest.raises(StoreError, match=r"missing weights: 0\.mean"):
        train(cell(checkpoint=str(tmp_path / "a.safetensors")), blobs())
    with pytest.raises(StoreError, match="cannot be read"):
        train(cell(checkpoint=str(tmp_path / "absent.safetensors")), blobs())


def test_an_error_that_is_no_overflow_is_passed_on(tmp_path, monkeypatch):
    (tmp_path / "odd_nets.py").write_text(
        "import torch\n"
        "class Odd(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return torch.linalg.matrix_exp(super().forward(x.flatten(1))[:, :, None] * 0).sum(2)\n"
        "def net(*, input_shape, num_classes):\n"
        "    return Odd(torch.nn.Linear(16, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = cell(
        model="odd_nets:net", width=None, depth=None, loss="cross-entropy", constraint="none", threshold=math.inf
    )
    try:
        with pytest.raises(ValueError):  # noqa: PT011 (whichever part refuses it)
            train(config, blobs())
    finally:
        sys.modules.pop("odd_nets", None)


def test_flat_inputs_train_and_cannot_be_shifted():
    data = blobs()
    flat = {
        part: Split(getattr(data, part).x.flatten(1), getattr(data, part).y) for part in ("train", "validation", "test")
    }
    data = dataclasses.replace(data, **flat, input_shape=(16,))
    assert not train(cell(epochs=6), data).diverged
    with pytest.raises(ValueError, match="the augmentation shift needs images"):
        train(cell(augment="shift"), data)

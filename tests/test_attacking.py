import dataclasses
import pickle

import numpy as np
import pytest
import torch
from blobs import CLASSES, ORDERS, SIDE, blobs, linear, settings
from torch import nn

from speccert.experiments.attacking import Attacked, CertificateViolationError, check_witness
from speccert.experiments.data import Split
from speccert.experiments.evaluation import evaluate


@pytest.fixture(scope="module")
def data():
    return blobs()


@pytest.fixture(scope="module")
def model(data):
    return linear(data)


def moved(*moves, wrong=None):
    """Attacked samples in the middle of the box, all entries of each moved by so much; None where nothing was found."""
    x = torch.full((len(moves), 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    closest = torch.stack([one + (0.0 if move is None else move) for one, move in zip(x, moves, strict=True)])
    distance = torch.tensor([torch.inf if move is None else SIDE * move for move in moves], dtype=torch.float64)
    none = torch.zeros(len(moves), dtype=torch.bool)
    index, label = torch.arange(len(moves)) + 3, torch.zeros(len(moves), dtype=torch.int64)
    return Attacked(index, x, label, none if wrong is None else wrong, distance, closest, {}, None, 0.0)


def radii(value, count=9):
    return torch.full((count,), value, dtype=torch.float64)


@pytest.mark.parametrize("norm", list(ORDERS))
def test_a_point_inside_a_certified_ball_is_told_in_every_norm(norm):
    attacked = moved(None, 0.01, 0.02)
    least = 0.01 * (SIDE**2) ** (1 / ORDERS[norm])  # of a move of 0.01 of every entry
    safe = {other: radii(0.0) for other in ORDERS}
    check_witness(attacked, {**safe, norm: radii(0.999 * least)})
    with pytest.raises(CertificateViolationError, match=rf"sample 4 has certified {norm} radius .* \(1 such") as raised:
        check_witness(attacked, {**safe, norm: radii(1.001 * least)})
    example = raised.value.example
    assert float(example["distance"]) == pytest.approx(least)
    assert torch.equal(example["x_adv"], attacked.closest[1])


def test_of_several_broken_certificates_the_deepest_is_told():
    with pytest.raises(CertificateViolationError, match=r"sample 4 .* \(2 such samples\)"):
        check_witness(
            moved(0.02, 0.01, None), {norm: radii(10.0) for norm in ("l2",)} | {"linf": radii(0), "l1": radii(0)}
        )


def test_a_misclassified_sample_with_a_radius_is_told():
    attacked = moved(0.0, wrong=torch.tensor([True]))
    with pytest.raises(CertificateViolationError, match="an adversarial example lies at 0"):
        check_witness(attacked, {norm: radii(0.1) for norm in ORDERS})


def test_every_adversarial_point_is_kept_by_ascending_index(data, model):
    y = data.test.y.clone()
    y[:3] = (y[:3] + 1) % CLASSES
    changed = dataclasses.replace(data, test=Split(data.test.x, y))
    found = evaluate(model, settings(attacks=("fgsm",), eps=(0.1, 0.3), attack_samples=30), changed)
    rows = found.samples[found.samples["attacked"] & (found.samples["label"] == found.samples["prediction"])]
    broken = rows[np.isfinite(rows["distance"])]
    kept = found.adversarial
    assert 12 < len(broken) == len(kept["x_adv"])
    for name in ("index", "label", "distance"):
        assert kept[name].tolist() == broken[name].tolist()
    apart = (kept["x_adv"].double() - data.test.x[kept["index"]].double()).flatten(1)
    assert torch.linalg.vector_norm(apart, dim=1).tolist() == pytest.approx(kept["distance"].tolist())
    with torch.no_grad():
        logits = model(kept["x_adv"])
    assert (logits.argmax(1) != kept["label"]).logical_or(logits.topk(2).values.diff().abs()[:, 0] < 1e-6).all()
    assert (kept["prediction"] != kept["label"]).all()
    dtypes = {"index": torch.int64, "label": torch.int64, "prediction": torch.int64, "distance": torch.float64}
    assert {name: value.dtype for name, value in kept.items()} == {**dtypes, "x_adv": torch.float32}


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_closest_adversarial_examples_are_kept(data, model, norm):
    y = data.test.y.clone()
    y[:3] = (y[:3] + 1) % CLASSES
    changed = dataclasses.replace(data, test=Split(data.test.x, y))
    found = evaluate(model, settings(norm=norm, attacks=("fgsm",), eps=(0.1, 0.3), attack_samples=30), changed)
    rows = found.samples[found.samples["attacked"] & (found.samples["label"] == found.samples["prediction"])]
    nearest = rows[np.isfinite(rows["distance"])].sort_values("distance", kind="stable").head(12)
    closest = {name: value.numpy() for name, value in found.closest.items()}
    assert 5 < len(nearest) == len(closest["x"])
    for name, column in {
        "index": "index",
        "label": "label",
        "distance": "distance",
        "radius": f"radius_{norm}",
    }.items():
        assert closest[name].tolist() == nearest[column].tolist()
    assert (closest["x"] == data.test.x.numpy()[closest["index"]]).all()
    apart = (closest["x_adv"].astype(np.float64) - closest["x"]).reshape(len(nearest), -1)
    assert np.linalg.norm(apart, ORDERS[norm], axis=1) == pytest.approx(closest["distance"], rel=1e-6)
    with torch.no_grad():
        logits = model(found.closest["x_adv"]).numpy()
    assert (closest["prediction"] != closest["label"]).all()
    assert (logits[range(len(logits)), closest["prediction"]] == logits.max(1)).all()
    assert [value.dtype for value in found.closest.values()] == [torch.float32] * 2 + [torch.int64] * 3 + [
        torch.float64
    ] * 2


def test_at_a_tie_the_prediction_is_the_other_class():
    tied = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES)).double().eval()
    with torch.no_grad():
        tied[1].weight.zero_()
        tied[1].bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    attacked = dataclasses.replace(moved(0.1), index=torch.tensor([0]))
    for closest in (attacked.nearest(tied, radii(0.05)), attacked.adversarial(tied)):
        assert (closest["label"].item(), closest["prediction"].item()) == (0, 1)


def test_only_the_chosen_samples_are_attacked_and_all_cells_share_them(data, model):
    first, again, other = (
        evaluate(model, settings(attacks=("fgsm",), attack_samples=10, seed=seed), data) for seed in (1, 1, 2)
    )
    attacked = first.samples["attacked"]
    assert attacked.sum() == 10
    spared = first.samples.loc[~attacked]
    columns = [name for name in spared if name.startswith(("distance", "robust_"))]
    assert spared[columns].isna().all().all()
    assert first.samples.loc[attacked, columns].notna().all().all()
    assert first.samples.equals(again.samples)
    assert attacked.equals(other.samples["attacked"])


def test_a_violation_survives_the_way_between_processes():
    error = CertificateViolationError("broken", {"x": torch.zeros(3)})
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, CertificateViolationError)
    assert str(copy) == "broken"

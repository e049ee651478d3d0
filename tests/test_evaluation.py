import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from speccert.certify import rules
from speccert.certify.linear import Dense
from speccert.experiments.config import CellConfig
from speccert.experiments.data import Dataset, Split
from speccert.experiments.evaluation import CertificateViolationError, bounds_json, evaluate

CLASSES, SIDE = 4, 6
ORDERS = {"l2": 2, "linf": math.inf, "l1": 1}
DUAL_ORDERS = {"l2": 2, "linf": 1, "l1": math.inf}


def blobs(count=40, seed=0):
    """Classes around centres inside [0.3, 0.7], far from the edges of the box."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.35 + 0.3 * torch.rand(CLASSES, 1, SIDE, SIDE, generator=generator)

    def split(size):
        y = torch.arange(size) % CLASSES
        noise = 0.05 * torch.randn(size, 1, SIDE, SIDE, generator=generator)
        return Split((centres[y] + noise).clamp(0.2, 0.8), y)

    return Dataset("blobs", split(200), split(40), split(count), (1, SIDE, SIDE), CLASSES, (0.5,), (0.25,))


def linear(data, scale=1.0):
    """Least squares on the train part: its decision boundaries, and so all distances to them, are known."""
    x = np.hstack([data.train.x.flatten(1).double().numpy(), np.ones((len(data.train), 1))])
    targets = np.eye(CLASSES)[data.train.y.numpy()]
    solution = np.linalg.lstsq(x, targets, rcond=1e-3)[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(scale * solution[:-1].T))
        model[1].bias.copy_(torch.from_numpy(scale * solution[-1]))
    return model.eval()


def settings(**changes):
    base = {"constraint": "none", "threshold": math.inf, "attacks": ("fgsm", "ddn"), "eps": (0.05, 0.15, 0.3)}
    return CellConfig(**{**base, **changes})


def closed_form_radii(model, split, norm):
    """min over j of (f_y - f_j)(x) / dual norm of the row difference, 0 where misclassified; in float64."""
    weight, bias = (t.detach().double().numpy() for t in (model[1].weight, model[1].bias))
    x, y = split.x.flatten(1).double().numpy(), split.y.numpy()
    logits = x @ weight.T + bias
    radii = []
    for row, label in zip(logits, y, strict=True):
        others = [j for j in range(CLASSES) if j != label]
        sizes = [np.linalg.norm(weight[label] - weight[j], DUAL_ORDERS[norm]) for j in others]
        radii.append(max(0.0, min((row[label] - row[j]) / s for j, s in zip(others, sizes, strict=True))))
    return np.array(radii)


def scaled_rule(monkeypatch, factor):
    rule = rules.Rule(linear=lambda call: Dense(call.module.weight * factor, call.in_shape))
    monkeypatch.setitem(rules._RULES, nn.Linear, rule)


@pytest.fixture(scope="module")
def data():
    return blobs()


@pytest.fixture(scope="module")
def model(data):
    return linear(data)


@pytest.fixture(scope="module")
def found(data, model):
    return evaluate(model, settings(), data)


@pytest.mark.parametrize("norm", list(ORDERS))
def test_radii_of_a_linear_model_are_its_closed_form(data, model, found, norm):
    exact = closed_form_radii(model, data.test, norm)
    radii = found.samples[f"radius_{norm}"].to_numpy()
    assert (exact > 0).sum() > 30
    assert (radii <= exact).all()
    assert radii == pytest.approx(exact, rel=1e-3, abs=1e-5)
    assert set(found.samples[f"radius_method_{norm}"]) == {"product"}


def test_rows_are_the_test_part_in_order(data, model, found):
    samples = found.samples
    with torch.no_grad():
        logits = model(data.test.x).double()
    assert samples["index"].tolist() == list(range(40))
    assert samples["label"].tolist() == data.test.y.tolist()
    assert samples["prediction"].tolist() == logits.argmax(1).tolist()
    own = logits[torch.arange(40), data.test.y]
    others = logits.masked_fill(nn.functional.one_hot(data.test.y, CLASSES).bool(), -math.inf).amax(1)
    assert samples["margin"].to_numpy() == pytest.approx((own - others).numpy(), abs=1e-6)


def test_the_proved_margin_is_below_the_true_one(data, model, found):
    weight, bias = (t.detach().double() for t in (model[1].weight, model[1].bias))
    logits = data.test.x.flatten(1).double() @ weight.T + bias
    own = logits.gather(1, data.test.y[:, None]).squeeze(1)
    exact = (own - logits.scatter(1, data.test.y[:, None], -math.inf).amax(1)).numpy()
    proved = found.samples["proved_margin"].to_numpy()
    assert (proved <= exact + 1e-15).all()
    assert proved == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("arithmetic", ["real", "float64", "float16", "bfloat16"])
def test_another_arithmetic_is_certified_and_attacked(data, model, found, arithmetic):
    other = evaluate(model, settings(arithmetic=arithmetic), data)
    dtype = torch.float64 if arithmetic == "real" else getattr(torch, arithmetic)  # float64 stands for real
    converted = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES)).eval()
    converted.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = converted.to(dtype)(data.test.x.to(dtype))
        moved = converted(other.closest["x_adv"].to(dtype))
    assert other.samples["prediction"].tolist() == logits.argmax(1).tolist()
    label = other.closest["label"]
    rivals = moved.double().scatter(1, label[:, None], -math.inf).amax(1)
    assert (rivals >= moved.double().gather(1, label[:, None]).squeeze(1)).all()
    attacked = other.samples[other.samples["attacked"]]
    assert (attacked["radius_l2"] <= attacked["distance"]).all()
    losses = {"real": 0.0, "float64": 1e-12, "float16": 0.02, "bfloat16": 0.15}
    assert 0.0 <= other.results["rounding_loss"] <= losses[arithmetic]
    assert other.results["overflow_count"] == 0
    assert found.results["rounding_loss"] <= 1e-4


def test_a_possible_overflow_is_counted(data):
    big = linear(data, 4e3)  # logits fit into float16, but not with room to spare
    found = evaluate(big, settings(arithmetic="float16", attacks=()), data)
    assert found.results["overflow_count"] > 0
    assert (found.samples["radius_l2"] >= 0).all()


def test_the_smallest_distance_of_a_linear_model_is_its_radius(found):
    right = found.samples["label"] == found.samples["prediction"]
    radius, distance = found.samples.loc[right, "radius_l2"], found.samples.loc[right, "distance"]
    assert (radius <= distance).all()
    assert distance.to_numpy() == pytest.approx(radius.to_numpy(), rel=0.02)
    assert found.results["tightness"] == pytest.approx(1.0, abs=0.02)
    assert found.results["tightness"] <= 1


def recomputed(samples, config):
    """The results by their definitions, from the rows alone."""
    attacked = samples[samples["attacked"]]
    radius, here, distance = (
        part.to_numpy()
        for part in (samples[f"radius_{config.norm}"], attacked[f"radius_{config.norm}"], attacked["distance"])
    )
    results = {
        "clean_accuracy": (samples["label"] == samples["prediction"]).mean(),
        "test_count": len(samples),
        "attacked_count": len(attacked),
        "mean_certified_radius": radius.mean(),
        "mean_certified_radius_attacked": here.mean(),
        "mean_distance": distance[np.isfinite(distance)].mean(),
    }
    results["found_count"] = np.isfinite(distance).sum()
    results["tightness"] = here[np.isfinite(distance)].mean() / results["mean_distance"]
    for eps in config.eps:
        results[f"certified_accuracy_eps_{eps:g}"] = (radius > eps).mean()
        results[f"certified_accuracy_attacked_eps_{eps:g}"] = (here > eps).mean()
        results[f"worst_case_accuracy_eps_{eps:g}"] = (distance > eps).mean()
        for name in config.attacks:
            results[f"accuracy_{name}_eps_{eps:g}"] = attacked[f"robust_{name}_eps_{eps:g}"].astype(bool).mean()
    return results


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attack_samples": 11, "seed": 3},
        {"norm": "linf", "attacks": ("fgsm", "pgd"), "eps": (0.0, 0.01, 0.05)},
        {"norm": "l1", "attacks": ("fmn",), "eps": (0.2, 1.0), "attack_samples": 10},
    ],
    ids=["l2", "subset", "linf", "l1"],
)
def test_results_follow_from_the_rows(data, model, changes):
    config = settings(**changes)
    found = evaluate(model, config, data)
    for key, value in recomputed(found.samples, config).items():
        assert found.results[key] == pytest.approx(value, rel=1e-12), key
    bounds = {"lipschitz_upper", "lipschitz_lower", "lipschitz_pair_upper", "lipschitz_pair_lower"}
    bounds |= {"evaluate_s", "rounding_loss", "overflow_count"}
    assert found.results.keys() == recomputed(found.samples, config).keys() | bounds
    assert 0 < found.results["lipschitz_lower"] <= found.results["lipschitz_upper"]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_certified_is_below_observed_and_flags_agree_with_distances(data, model, norm):
    config = settings(norm=norm, attacks=("fgsm", "pgd"), eps=(0.01, 0.05, 0.15), attack_samples=25)
    found = evaluate(model, config, data)
    rows = found.samples[found.samples["attacked"]]
    assert (rows[f"radius_{norm}"] <= rows["distance"]).all()
    each = rows[[f"distance_{name}" for name in config.attacks]]
    assert rows["distance"].to_numpy() == pytest.approx(each.min(axis=1).to_numpy())
    for eps in config.eps:
        assert ((rows[f"radius_{norm}"] > eps) <= (rows["distance"] > eps)).all()
        observed = [found.results[f"accuracy_{name}_eps_{eps:g}"] for name in config.attacks]
        worst = found.results[f"worst_case_accuracy_eps_{eps:g}"]
        assert found.results[f"certified_accuracy_attacked_eps_{eps:g}"] <= worst <= min(observed)
        for name in config.attacks:
            flags = rows[f"robust_{name}_eps_{eps:g}"].astype(bool)
            assert (flags == (rows[f"distance_{name}"] > eps)).all()


def deep(data, seed=0):
    """A ReLU network of three layers: random features, and least squares on the last of them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    )
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            layer.bias.zero_()
        features = model[:5](data.train.x).double()
        targets = nn.functional.one_hot(data.train.y, CLASSES).double()
        model[5].weight.copy_(torch.linalg.lstsq(features, targets, driver="gelsd").solution.T)
        model[5].bias.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def network(data):
    return deep(data)


@pytest.mark.parametrize(
    ("method", "norm"), [("lipsdp", "l2"), ("lipsdp-first-order", "l2"), ("auto", "linf"), ("local", "l2")]
)
def test_tighter_bounds_stand_beside_the_product(data, network, method, norm):
    options = {"norm": norm, "attacks": ("pgd",), "eps": (0.002, 0.01, 0.05)}
    product = evaluate(network, settings(**options), data)
    config = settings(**options, bound=method, bound_budget=1)
    found = evaluate(network, config, data)
    for key, value in product.results.items():
        if key.startswith("certified_accuracy_eps"):
            assert found.results[key.replace("accuracy", "accuracy_product")] == value
            assert found.results[key] >= value
    assert found.results["lipschitz_product_upper"] == product.results["lipschitz_upper"]
    assert found.results["mean_certified_radius_product"] == product.results["mean_certified_radius"]
    assert found.results["mean_certified_radius"] > 1.2 * product.results["mean_certified_radius"]
    assert product.results["lipschitz_lower"] <= found.results["lipschitz_lower"] * (1 + 1e-6)
    assert found.results["lipschitz_lower"] <= found.results["lipschitz_upper"] <= product.results["lipschitz_upper"]
    assert 0 < found.results["lipschitz_pair_lower"] <= found.results["lipschitz_pair_upper"]
    assert found.results["bounds_s"] > 0
    assert found.samples["radius_product"].equals(product.samples[f"radius_{norm}"].rename("radius_product"))
    for one in ORDERS:
        assert (found.samples[f"radius_{one}"] >= product.samples[f"radius_{one}"] * (1 - 1e-9)).all()
        methods = set(found.samples[f"radius_method_{one}"])
        assert any(name.startswith("local") for name in methods) == (method == "local")
        assert methods != {"product"}
    rows = found.samples[found.samples["attacked"]]
    assert (rows[f"radius_{norm}"] <= rows["distance"]).all()
    told = json.loads(bounds_json(found.bounds))
    assert told[norm]["attempts"][0]["method"] == "product"
    assert len(told[norm]["attempts"]) > 1


def test_local_radii_are_held_against_the_attacks(data, network, monkeypatch):
    from speccert.experiments import evaluation

    def larger(*given, **more):
        found = honest(*given, **more)
        return dataclasses.replace(found, radius=10 * found.radius)

    honest = evaluation.local_radii
    monkeypatch.setattr(evaluation, "local_radii", larger)
    config = settings(attacks=("ddn",), bound="local", bound_budget=0.5)
    with pytest.raises(CertificateViolationError, match="certificate broken"):
        evaluate(network, config, data)


def test_misclassified_samples_have_radius_and_distance_zero(data, model):
    y = data.test.y.clone()
    y[:5] = (y[:5] + 1) % CLASSES
    found = evaluate(model, settings(), dataclasses.replace(data, test=Split(data.test.x, y)))
    wrong = found.samples[found.samples["label"] != found.samples["prediction"]]
    assert len(wrong) >= 5
    zero = ["radius_l2", "radius_linf", "radius_l1", "distance", "distance_fgsm", "distance_ddn"]
    assert (wrong[zero] == 0).all().all()
    assert not wrong[[name for name in wrong if name.startswith("robust_")]].any().any()
    assert (wrong["margin"] < 0).all()


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


def test_a_sample_without_an_adversarial_example_has_infinite_distance(data):
    found = evaluate(linear(data, 1e-3), settings(attacks=("fgsm",), eps=(1e-4,)), data)
    right = found.samples["label"] == found.samples["prediction"]
    assert np.isinf(found.samples.loc[right, "distance"]).any()
    assert found.results["mean_distance"] is None
    assert found.results["accuracy_fgsm_eps_0.0001"] > 0.9


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


def test_at_a_tie_the_prediction_is_the_other_class(data):
    tied = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES)).eval()
    with torch.no_grad():
        tied[1].weight.zero_()
        tied[1].bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    from speccert.experiments.evaluation import _Attacked, _closest

    x = torch.full((1, 1, SIDE, SIDE), 0.5)
    state = _Attacked(torch.tensor([0]), x, torch.tensor([0]), torch.tensor([0.1], dtype=torch.float64), x.clone())
    closest = _closest(tied, state, torch.tensor([False]), torch.tensor([0.05], dtype=torch.float64))
    assert (closest["label"].item(), closest["prediction"].item()) == (0, 1)


def test_bounds_as_json_have_every_norm_and_layer(data, model, found):
    told = json.loads(bounds_json(found.bounds))
    assert list(told) == list(found.bounds)
    assert set(told) == set(ORDERS)
    weight = model[1].weight.detach().double().numpy()
    for norm, order in DUAL_ORDERS.items():
        pairs = [np.linalg.norm(weight[i] - weight[j], order) for i in range(CLASSES) for j in range(i)]
        assert told[norm]["pairwise_min"] == pytest.approx(min(pairs), rel=1e-6)
        assert told[norm]["pairwise_max"] == pytest.approx(max(pairs), rel=1e-6)
    (layer,) = told["l2"]["layers"]
    exact = np.linalg.norm(weight, 2)
    assert layer["lower"] <= exact * (1 + 1e-9)
    assert exact <= layer["upper"] == pytest.approx(told["l2"]["upper"], rel=1e-6)
    assert 0 < told["l2"]["lower"] <= told["l2"]["upper"]
    assert layer.keys() == {"name", "kind", "lower", "upper", "method"}
    (attempt,) = told["l2"]["attempts"]
    assert attempt == {**attempt, "method": "product", "upper": told["l2"]["upper"], "proved": True, "note": ""}


def test_bounds_as_json_have_null_for_what_overflows(found):
    endless = {"l1": dataclasses.replace(found.bounds["l1"], upper=math.inf)}
    assert json.loads(bounds_json(endless))["l1"]["upper"] is None


def test_without_attacks_there_is_no_distance(data, model):
    found = evaluate(model, settings(attacks=()), data)
    assert len(found.closest["x"]) == len(found.closest["label"]) == 0
    assert found.results["mean_distance"] is None
    assert found.results["tightness"] is None
    assert not any(key.startswith(("worst", "accuracy")) for key in found.results)


def test_a_model_without_parameters_is_evaluated(data):
    class Doubled(nn.Module):
        def forward(self, x):
            return x.flatten(1) * 2.0

    found = evaluate(Doubled().eval(), settings(attacks=("fgsm",), attack_samples=5), data)
    assert found.results["lipschitz_upper"] == pytest.approx(2.0)


def test_the_model_and_the_random_state_are_left_as_they_were(data):
    model = linear(data)
    model[1].weight.requires_grad_(False)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    stages = []
    evaluate(model, settings(attack_samples=5), data, report=stages.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad) == (False, True)
    assert model[1].bias.grad is None
    assert stages == ["bounds", "radii", "fgsm eps 0.05", "fgsm eps 0.15", "fgsm eps 0.3", "ddn"]


def test_a_sound_bound_passes_and_a_broken_one_is_found(data, model, monkeypatch):
    scaled_rule(monkeypatch, 1.0)
    evaluate(model, settings(), data)
    scaled_rule(monkeypatch, 0.9)
    with pytest.raises(
        CertificateViolationError, match=r"certificate broken: sample \d+ has certified l2 radius"
    ) as raised:
        evaluate(model, settings(), data)
    example = raised.value.example
    x, x_adv = example["x"], example["x_adv"]
    distance = float(torch.linalg.vector_norm((x_adv.double() - x.double()).flatten()))
    assert distance == pytest.approx(float(example["distance"]), rel=1e-9)
    assert distance < float(example["radius"])
    index, label = int(example["index"]), int(example["label"])
    assert torch.equal(x, data.test.x[index])
    assert label == data.test.y[index]
    with torch.no_grad():
        logits = model(x_adv[None])[0]
    assert logits.argmax() != label or logits.topk(2).values.diff().abs() < 1e-6


@pytest.mark.parametrize(("attacked", "broken"), [("l2", "linf"), ("linf", "l1")])
def test_a_broken_radius_in_another_norm_is_found_too(data, model, monkeypatch, attacked, broken):
    from speccert.experiments import evaluation

    honest = evaluation.lipschitz

    def lying(model, shape, method, norm, **points):
        bound = honest(model, shape, method, norm, **points)
        return dataclasses.replace(bound, pairwise=bound.pairwise * (0.01 if norm == broken else 1.0))

    monkeypatch.setattr(evaluation, "lipschitz", lying)
    with pytest.raises(CertificateViolationError, match=f"certified {broken} radius"):
        evaluate(model, settings(norm=attacked, attacks=("fgsm",), eps=(0.05, 0.3)), data)


def test_a_bound_that_a_jacobian_disproves_is_broken_without_an_example_too(data, monkeypatch):
    scaled_rule(monkeypatch, 0.9)
    with pytest.raises(CertificateViolationError, match=r"certificate broken: .*Jacobian") as raised:
        evaluate(linear(data), settings(attacks=()), data)
    assert raised.value.example == {}


def test_a_violation_survives_the_way_between_processes():
    error = CertificateViolationError("broken", {"x": torch.zeros(3)})
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, CertificateViolationError)
    assert str(copy) == "broken"


def spoiled(model, value):
    with torch.no_grad():
        model[1].weight[0, 0] = value
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: linear(data).train(), "expected eval mode, got training mode"),
        (lambda data: spoiled(linear(data), math.nan), "1.weight: expected finite numbers; got NaN or infinity"),
        (lambda data: spoiled(linear(data), -math.inf), "1.weight: expected finite numbers; got NaN or infinity"),
        (lambda data: nn.Sequential(*linear(data), nn.LogSoftmax(1)).eval(), "no Lipschitz rule"),
    ],
)
def test_a_model_that_cannot_be_certified_is_refused_in_one_line(data, make, message):
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(make(data), settings(), data)
    assert "\n" not in str(raised.value)

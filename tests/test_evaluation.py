import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from blobs import CLASSES, ORDERS, SIDE, blobs, linear, settings
from torch import nn

from speccert.certify import rules
from speccert.certify.linear import Dense
from speccert.experiments.data import Split
from speccert.experiments.evaluation import CertificateViolationError, evaluate
from speccert.experiments.summary import bounds_json

DUAL_ORDERS = {"l2": 2, "linf": 1, "l1": math.inf}


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
    assert distance.to_numpy() == pytest.approx(radius.to_numpy(), rel=0.03)
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
    right = np.isfinite(distance) & (attacked["label"] == attacked["prediction"]).to_numpy()
    results["tightness_median"] = np.median(here[right] / distance[right])
    for eps in config.eps:
        has_ball = not set(config.attacks) <= {"ddn", "fmn"}
        results[f"certified_skipped_eps_{eps:g}"] = (here > eps).sum() if has_ball else 0
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
        {"attack_samples": 11, "seed": 2**40 + 3},
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
    bounds |= {"attack_forwards", "attack_gradients", "attack_s", "attack_complete", "masking_flags"}
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


def test_a_sample_without_an_adversarial_example_has_infinite_distance(data):
    found = evaluate(linear(data, 1e-3), settings(attacks=("fgsm",), eps=(1e-4,)), data)
    right = found.samples["label"] == found.samples["prediction"]
    assert np.isinf(found.samples.loc[right, "distance"]).any()
    assert found.results["mean_distance"] is None
    assert found.results["accuracy_fgsm_eps_0.0001"] > 0.9


def test_without_attacks_there_is_no_distance(data, model):
    found = evaluate(model, settings(attacks=()), data)
    assert len(found.closest["x"]) == len(found.closest["label"]) == len(found.adversarial["x_adv"]) == 0
    assert (found.attempts, found.diagnosis, found.results["masking_flags"]) == ((), None, None)
    assert (found.results["attack_gradients"], found.results["attack_complete"]) == (0, True)
    assert found.results["mean_distance"] is None
    assert found.results["tightness"] is None
    assert not any(key.startswith(("worst", "accuracy", "certified_skipped")) for key in found.results)


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
    assert stages[:2] == ["bounds", "radii"]
    assert stages[2].startswith("fgsm eps 0.3: ")  # certified at the smaller ones
    assert stages[3].startswith("ddn: ")
    assert stages[4:] == ["diagnostics"]


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


@pytest.mark.parametrize("make", [lambda data: linear(data).train(), lambda data: spoiled(linear(data), math.nan)])
def test_what_is_wrong_with_a_model_is_not_taken_for_a_missing_certificate(data, make):
    with pytest.raises(ValueError, match=r"expected eval mode|expected finite numbers"):
        evaluate(make(data), settings(), data, uncertified=True)


def test_a_model_without_a_certificate_is_attacked_with_radii_of_0(data, model, found):
    softmax = evaluate(nn.Sequential(*model, nn.LogSoftmax(1)).eval(), settings(), data, uncertified=True)
    assert softmax.no_certificate.startswith("2: no Lipschitz rule for torch.nn.modules.activation.LogSoftmax")
    assert found.no_certificate is None
    assert softmax.bounds == {}
    assert not softmax.samples[[f"radius_{norm}" for norm in ORDERS]].any().any()
    right = softmax.samples["label"] == softmax.samples["prediction"]
    assert softmax.samples["prediction"].equals(found.samples["prediction"])
    expected = found.samples.loc[right, "distance"].to_numpy()
    assert softmax.samples.loc[right, "distance"].to_numpy() == pytest.approx(expected, rel=0.03)
    results = softmax.results
    assert (results["certified_accuracy_eps_0.05"], results["certified_skipped_eps_0.05"]) == (0, 0)
    assert (results["mean_certified_radius"], results["tightness"], results["tightness_median"]) == (0, 0, 0)
    assert "lipschitz_upper" not in results
    assert results["clean_accuracy"] == found.results["clean_accuracy"]


def test_an_audit_attacks_what_a_cascade_spares(data, model, monkeypatch):
    from speccert.experiments import evaluation

    honest = evaluation.Certifier.radii

    def tenfold(certifier, *given):
        found = honest(certifier, *given)
        return dataclasses.replace(found, radius=10 * found.radius)

    monkeypatch.setattr(evaluation.Certifier, "radii", tenfold)
    config = settings(attacks=("fgsm",), eps=(0.3,), attack_samples=20)
    assert evaluate(model, config, data).results["certified_skipped_eps_0.3"] > 15
    with pytest.raises(CertificateViolationError, match="certified l2 radius"):
        evaluate(model, dataclasses.replace(config, audit=True), data)


@pytest.mark.parametrize("schedule", ["cascade", "each"])
def test_schedules_agree_on_the_worst_case_and_skip_only_what_is_certified(data, model, schedule):
    config = settings(attacks=("pgd", "fgsm"), eps=(0.1, 0.15, 0.2), attack_schedule=schedule)
    found = evaluate(model, config, data)
    rows, results = found.samples, found.results
    spared = [results[f"certified_skipped_eps_{eps:g}"] for eps in config.eps]
    assert spared == [(rows["radius_l2"] > eps).sum() if schedule == "cascade" else 0 for eps in config.eps]
    for eps in config.eps:
        shares = [results[f"accuracy_{name}_eps_{eps:g}"] for name in ("fgsm", "pgd")]
        worst = results[f"worst_case_accuracy_eps_{eps:g}"]
        assert results[f"certified_accuracy_attacked_eps_{eps:g}"] <= worst <= min(shares)
        if schedule == "cascade":  # cheapest first: after pgd nothing more comes
            assert shares[0] >= shares[1] == worst
        for attempt in (one for one in found.attempts if one.eps == eps):
            assert attempt.standing / len(rows) == results[f"accuracy_{attempt.attack}_eps_{eps:g}"]
    assert [attempt.attack for attempt in found.attempts] == ["fgsm"] * 3 + ["pgd"] * 3 or schedule == "each"


def test_a_budget_ends_the_attacks_and_is_told(data, model):
    found = evaluate(model, settings(max_gradients=1, attack_samples=20), data)
    assert found.results["attack_complete"] is False
    assert any(attempt.note == "budget" for attempt in found.attempts)
    assert evaluate(model, settings(attack_samples=5), data).results["attack_complete"] is True


def test_integer_pixels_need_such_samples_and_keep_to_them(data, model):
    with pytest.raises(ValueError, match="grid k / 255"):
        evaluate(model, settings(integer_pixels=True), data)
    rounded = Split((255 * data.test.x).round() / 255, data.test.y)
    found = evaluate(model, settings(integer_pixels=True), dataclasses.replace(data, test=rounded))
    levels = 255 * found.adversarial["x_adv"].double()
    assert len(levels) > 20
    assert (levels - levels.round()).abs().max() < 1e-4
    rows = found.samples[found.samples["attacked"]]
    assert (rows["radius_l2"] <= rows["distance"]).all()


def test_signs_of_masked_gradients_are_looked_for_at_the_middle_eps(data, model, monkeypatch):
    from speccert.attacks import Diagnosis, Flag
    from speccert.experiments import attacking

    seen = []

    def diagnose(model, x, y, **given):
        seen.append((len(x), given))
        return Diagnosis((Flag("flat-loss", 0.5, "the loss is flat"),), {"flat-loss": 0.5}, 10, 20, 30)

    monkeypatch.setattr(attacking, "diagnose", diagnose)
    found = evaluate(model, settings(eps=(0.0, 0.1, 0.3), seed=2**32 + 1), data)
    right = (found.samples["label"] == found.samples["prediction"]).sum()
    assert seen == [(right, {"norm": "l2", "eps": pytest.approx(0.2), "seed": 1, "batch_size": None})]
    assert found.results["masking_flags"] == ["flat-loss"]
    assert evaluate(model, settings(eps=(0.0,)), data).results["masking_flags"] is None
    assert evaluate(model, settings(), data, diagnosed=False).diagnosis is None
    assert len(seen) == 1

import json
import math
from fractions import Fraction
from pathlib import Path

import jsonschema
import pytest
import torch
from oracles import random, randomised
from torch import nn

from speccert.certify import ARITHMETICS, Certificate, certified_radii, certify, lipschitz, load_certificate, verify
from speccert.certify.digests import input_digests
from speccert.certify.lipschitz import METHODS
from speccert.models import build_model, constrain

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "certificate.schema.json").read_text(encoding="utf-8"))
SHAPE = (2, 8, 8)


class Branches(nn.Module):
    """A convolution with batch norm, a residual sum of like and of unlike branches, a concatenation, pooling."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU()
        self.inner, self.branch = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1)
        self.pool, self.flat = nn.MaxPool2d(3, stride=1), nn.Flatten()
        self.mix, self.last = nn.Linear(32, 16), nn.Linear(48, 5)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = x + self.inner(x)
        x = x + self.branch(self.act(x))
        x = self.flat(torch.cat((self.pool(x), self.pool(-x)), 1))
        return self.last(torch.cat((x, self.act(self.mix(x))), 1))


def seeded(build):
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.normal_()
    return model


def linear():
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 5)))


def dense():
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 5)))


def large():
    """A convolution too large to be made a matrix."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 80, 3, padding=1), nn.ReLU(), nn.Conv2d(80, 80, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(1280, 5)),
        )
    )


def constrained():
    torch.manual_seed(0)
    return constrain(dense(), constraint="cap", threshold=0.5).eval()


MODELS = {"linear": linear, "dense": dense, "branches": lambda: seeded(Branches), "constrained": constrained}


def inputs(count=6):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def checked(certificate, folder):
    """The certificate, after it was written, validated against the schema, and read back as it was."""
    path = certificate.save(folder / "net.json")
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text(encoding="utf-8")))
    assert load_certificate(path) == certificate
    return certificate


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("name", MODELS)
def test_radii_and_bounds_are_those_of_the_library(name, norm, tmp_path):
    model, x = MODELS[name](), inputs()
    made = checked(certify(model, x, norm=norm), tmp_path)
    assert isinstance(made, Certificate)
    assert [row.radius for row in made.samples] == certified_radii(model, x, norm=norm).tolist()
    bound = lipschitz(model, SHAPE, norm=norm)
    assert made.lipschitz == pytest.approx(bound.upper, rel=1e-9)
    assert torch.allclose(torch.tensor(made.pairwise, dtype=torch.float64), bound.pairwise, rtol=1e-9, atol=0)
    with torch.no_grad():
        assert [row.prediction for row in made.samples] == model(x).argmax(1).tolist()
    assert [row.label for row in made.samples] == [row.prediction for row in made.samples]
    assert [row.input for row in made.samples] == input_digests(x)
    assert set(made.bounds) == {"l2", norm}
    assert (made.norm, made.method, made.model.input_shape, made.model.classes) == (norm, "product", SHAPE, 5)
    assert made.model.dtype == "float32"


@pytest.mark.parametrize("arithmetic", ["real", "float64", "float32", "bfloat16", "float16"])
def test_every_arithmetic_says_what_it_is_and_what_it_assumes(arithmetic, tmp_path):
    made = checked(certify(dense(), inputs(), arithmetic=arithmetic), tmp_path)
    assert vars(made.arithmetic) == vars(ARITHMETICS[arithmetic])
    assert made.assumptions[0].id == "eval-mode"
    assert ("summation" in [one.id for one in made.assumptions]) == (arithmetic != "real")
    assert made.model.digest == certify(dense(), inputs()).model.digest
    assert made.model.dtype == "float32"


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_linear_model_is_certified_to_the_exact_numbers(norm, tmp_path):
    model, x = linear(), inputs()
    made = checked(certify(model, x, norm=norm, arithmetic="real"), tmp_path)
    weight = [[Fraction(entry) for entry in row] for row in model[1].weight.tolist()]
    bias = [Fraction(entry) for entry in model[1].bias.tolist()]
    for row, sample in zip(x.flatten(1).tolist(), made.samples, strict=True):
        logits = [
            sum(w * Fraction(v) for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)
        ]
        others = [j for j in range(5) if j != sample.label]
        margin = min(logits[sample.label] - logits[j] for j in others)
        assert Fraction(sample.margin) <= margin
        assert sample.margin == pytest.approx(float(margin), rel=1e-9)
        ratios = []
        for j in others:
            difference = [abs(a - b) for a, b in zip(weight[sample.label], weight[j], strict=True)]
            dual = {"l2": lambda d: sum(e * e for e in d), "linf": lambda d: sum(d) ** 2, "l1": lambda d: max(d) ** 2}
            ratios.append((logits[sample.label] - logits[j]) ** 2 / dual[norm](difference))
        assert Fraction(sample.radius) ** 2 <= min(ratios)
        assert sample.radius == pytest.approx(math.sqrt(min(ratios)), rel=1e-9)


def test_misclassified_samples_have_radius_zero_and_a_negative_margin():
    model, x = dense(), inputs(20)
    right = certify(model, x)
    labels = torch.tensor([(row.prediction + (k % 2)) % 5 for k, row in enumerate(right.samples)])
    made = certify(model, x, labels)
    for k, (row, other) in enumerate(zip(made.samples, right.samples, strict=True)):
        assert (row.label, row.prediction) == (labels[k], other.prediction)
        assert row.radius == (other.radius if k % 2 == 0 else 0.0)
        assert (row.margin > 0) == (k % 2 == 0)


def test_runs_constants_and_pieces_show_how_the_bound_was_found():
    claim = certify(seeded(Branches), inputs(1)).bounds["l2"]
    assert [run.end for run in claim.runs][:2] == ["add", "branch"]
    assert claim.runs[0].parts == ("conv", "norm", "inner")
    assert claim.runs[0].out_shape == (4, 4, 4)
    nodes = [constant.node for constant in claim.constants]
    assert nodes[0] == "x"
    assert {"act", "add_1", "pool", "pool_1"} <= set(nodes)
    constants = {constant.node: constant.upper for constant in claim.constants}
    runs = {run.end: run.upper for run in claim.runs}
    assert constants["x"] == 1.0
    assert constants["act"] == pytest.approx(runs["add"], rel=1e-12)
    assert constants["add_1"] == pytest.approx(runs["add"] + runs["branch"] * constants["act"], rel=1e-12)
    assert constants["pool"] == pytest.approx(2 * constants["add_1"], rel=1e-12)
    assert claim.last_constant == constants[nodes[-1]]
    assert claim.upper == pytest.approx(runs[claim.runs[-1].end] * claim.last_constant, rel=1e-12)
    for run in claim.runs:
        assert 0.0 <= run.lower <= run.upper


def test_a_convolution_carries_its_torus_and_a_chain_its_pieces():
    claim = certify(large(), inputs(1)).bounds["l2"]
    first, second, last = claim.runs
    assert (first.kind, first.method, first.torus, first.pieces) == ("Convolution", "materialised", None, ())
    assert (second.kind, second.method) == ("Convolution", "torus")
    assert [axis[:2] for axis in second.torus] == [(10, 2), (10, 2)]
    assert all(axis[2] in (0.0, 0.5) for axis in second.torus)
    assert (last.kind, last.method, last.torus) == ("Chain", "dense", None)
    assert [(piece.kind, piece.method) for piece in last.pieces] == [("Reindex", "isometry"), ("Dense", "dense")]
    assert last.pieces[0].upper == 1.0
    assert last.pieces[1].upper == last.upper


def test_pieces_multiply_and_add_up():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(1100, 1100) for _ in range(3))
            self.last = nn.Linear(1100, 3)

        def forward(self, x):
            x = torch.relu(self.two(self.one(x)))
            return self.last(torch.relu(x + self.three(self.two(x))))

    claim = certify(seeded(Sums), torch.rand(1, 1100)).bounds["l2"]
    chain, total, _ = claim.runs
    assert (chain.kind, chain.method) == ("Chain", "dense * dense")
    assert chain.upper >= chain.pieces[0].upper * chain.pieces[1].upper
    assert chain.upper == pytest.approx(chain.pieces[0].upper * chain.pieces[1].upper, rel=1e-12)
    assert (total.kind, total.method) == ("Sum", "sum")
    assert [piece.kind for piece in total.pieces] == ["Diagonal", "Chain"]
    assert total.upper == pytest.approx(1.0 + total.pieces[1].upper, rel=1e-12)
    assert [piece.kind for piece in total.pieces[1].pieces] == ["Dense", "Dense"]


def test_positions_of_the_samples_are_kept():
    assert [row.index for row in certify(dense(), inputs(3), index=[1, 5, 9]).samples] == [1, 5, 9]


@pytest.mark.parametrize("index", [[0, 1], [0, 0, 1], [2, 1, 0], [-1, 0, 1]])
def test_positions_that_do_not_fit_are_refused(index):
    with pytest.raises(ValueError, match=r"index: expected 3 increasing integers >= 0"):
        certify(dense(), inputs(3), index=index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l3"}, "norm: expected one of l2, linf, l1"),
        ({"method": "guess"}, "method: expected one of product"),
        ({"method": "local"}, 'method: a certificate can\'t hold radii by "local"'),
        ({"method": "auto", "budget": 0.0}, "budget: expected a finite number of seconds > 0"),
        ({"arithmetic": "float8"}, "arithmetic: expected one of"),
        ({"y": torch.zeros(2, dtype=torch.int64)}, "y"),
        ({"x": torch.full((1, *SHAPE), torch.nan)}, "x: expected finite inputs"),
    ],
)
def test_what_cannot_be_certified_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        certify(**{"model": dense(), "x": inputs(), **change})


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="expected eval mode"):
        certify(dense().train(), inputs())


def test_the_model_and_the_random_state_are_left_as_they_were():
    model, random = constrained(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    certify(model, inputs())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_network_of_the_library_is_certified(tmp_path):
    torch.manual_seed(0)
    model = build_model("convnet-4c3f", (1, 8, 8), 10, width=4).eval()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    checked(certify(model, x, norm="linf"), tmp_path)


def test_large_batches_go_through_in_batches(tmp_path):
    x = torch.rand(2500, *SHAPE, generator=torch.Generator().manual_seed(1))
    made = checked(certify(dense(), x), tmp_path)
    assert len(made.samples) == 2500
    for one, other in zip(certify(dense(), x[:3]).samples, made.samples, strict=False):
        assert (one.input, one.radius) == (other.input, pytest.approx(other.radius, rel=1e-9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_has_the_same_certificate():
    model, x = constrained(), inputs()
    assert certify(model.cuda(), x.cuda()) == certify(model.cpu(), x)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "local"])
def test_every_method_of_the_library_makes_certificates_that_the_checker_accepts(method):
    layers = (nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model = randomised(nn.Sequential(*layers), 0, 0.7)
    x = random(4, 5).float()
    made = certify(model, x, method=method, budget=5)
    assert made.method == method
    assert bool(made.relaxations) == (method != "product")
    assert verify(made, model, x).valid

"""The committed example models load, reach what is written, and an audit finds all wrong radii and no right one."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from speccert.attacks.diagnostics import diagnose
from speccert.attacks.ensemble import run_ensemble
from speccert.attacks.exact import strictly_inside
from speccert.attacks.registry import attack
from speccert.certify import certified_radii
from speccert.experiments import load_dataset
from speccert.experiments.checkpoints import load_checkpoint
from speccert.models.imported import import_model

ROOT = Path(__file__).parent.parent
NAMES = ["plain", "robust", "capped", "orthogonal", "quantised"]
CERTIFIED = NAMES[:4]
COUNT = 12


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Built as the commands do it from a checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        made = {name: import_model(f"examples.example_models:{name}", (1, 8, 8), 10) for name in NAMES}
    for name, model in made.items():
        load_checkpoint(model.eval(), ROOT / "examples" / "models" / f"{name}.safetensors")
    return made


@pytest.fixture(scope="module")
def samples():
    test = load_dataset("digits").test
    return test.x[:COUNT], test.y[:COUNT]


def test_every_file_is_small_and_has_a_builder():
    files = sorted((ROOT / "examples" / "models").glob("*.safetensors"))
    assert sorted(path.stem for path in files) == sorted(NAMES)
    assert all(path.stat().st_size <= 60_000 for path in files)


def test_the_readme_names_every_model_with_its_accuracy(models):
    text = (ROOT / "examples" / "models" / "README.md").read_text()
    written = dict(re.findall(r"\| `(\w+)` \|.*?\| ([\d.]+) \|", text))
    test = load_dataset("digits").test
    measured = {
        name: f"{100 * (model(test.x).argmax(1) == test.y).double().mean():.1f}" for name, model in models.items()
    }
    assert written == measured


def test_training_again_is_deterministic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    examples = importlib.import_module("examples.example_models")
    monkeypatch.setattr(examples, "EPOCHS", 1)
    for name in ("robust", "orthogonal", "quantised"):
        with torch.random.fork_rng():
            first, second = (examples.train(name).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
    sys.modules.pop("examples.example_models")


@pytest.mark.parametrize(("name", "norm"), [*((name, "l2") for name in CERTIFIED), ("capped", "linf")])
def test_an_audit_finds_no_violation(name, norm, models, samples):
    x, y = samples
    radii = certified_radii(models[name], x, y, norm)
    assert (radii > 0).any()
    found = run_ensemble(models[name], x, y, ["fmn"], norm=norm, eps=[], certified=radii, audit=True)
    assert found.complete
    assert found.distance.isfinite().all()
    assert not strictly_inside(x, found.closest, radii, norm)[found.distance > 0].any()
    assert (found.distance >= radii).all()


@pytest.mark.parametrize(("name", "factor"), [("plain", 2.0), ("robust", 1.1), ("capped", 1.1), ("orthogonal", 1.5)])
def test_radii_beyond_a_known_point_are_caught(name, factor, models, samples):
    """Sample by sample the right radius is scaled until it is `factor` times a distance at which another attack was."""
    x, y = samples
    known = attack(models[name], x, y, "ddn").distance
    radii = certified_radii(models[name], x, y)
    scale = torch.where(known > 0, factor * known / radii, 1.0)
    wrong = torch.where(known > 0, radii * scale, 0.0)
    found = run_ensemble(models[name], x, y, ["fmn"], norm="l2", eps=[], certified=wrong, audit=True)
    caught = strictly_inside(x, found.closest, wrong, "l2") & (found.distance < wrong)
    assert caught[known > 0].all()


def test_one_factor_for_all_radii_is_caught(models, samples):
    """The bound of a whole model too small by a factor, as with a forgotten layer: some sample shows it."""
    x, y = samples
    radii = certified_radii(models["orthogonal"], x, y)
    known = attack(models["orthogonal"], x, y, "ddn").distance
    tightest = float((known / radii)[radii > 0].min())
    assert 1 <= tightest < 2
    for factor, expected in ((0.99, False), (1.05, True)):
        wrong = radii * (tightest * factor)
        found = run_ensemble(models["orthogonal"], x, y, ["fmn"], norm="l2", eps=[], certified=wrong, audit=True)
        assert bool(strictly_inside(x, found.closest, wrong, "l2").any()) is expected


@pytest.mark.parametrize("name", NAMES)
def test_only_the_quantised_model_is_flagged(name, models):
    test = load_dataset("digits").test
    found = diagnose(models[name], test.x, test.y, eps=0.3, samples=16)
    flags = {flag.name for flag in found.flags}
    assert flags >= {"zero-gradients"} if name == "quantised" else not flags

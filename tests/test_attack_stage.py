import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from studies import console, text, user_module, weights
from torch import nn

from speccert.attacks import Diagnosis, Flag, available_attacks
from speccert.certify import rules
from speccert.certify.linear import Dense
from speccert.experiments import attack_stage, attacking
from speccert.experiments.attack_stage import attack_one
from speccert.experiments.bound_stage import BoundRequest, bound_one
from speccert.experiments.cell import run_cell
from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import CellConfig, ConfigError
from speccert.experiments.evaluation import CertificateViolationError
from speccert.experiments.execution import Execution
from speccert.experiments.stages import open_model
from speccert.experiments.store import RunFolder

TINY = {**tiny.TINY, "seed": 3}
MODELS = """
import torch
from torch import nn
def linear(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
class Summed(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)
def unknown(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), Summed())
class Training(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 10)
    def train(self, mode=True):
        return super().train(True)
    def forward(self, x):
        return self.last(x.flatten(1))
def training(input_shape, num_classes):
    return Training()
"""


def rows(shown):
    """The cells of the lines of its tables."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text(shown).splitlines() if "│" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    config = CellConfig(**TINY)
    return RunFolder.of(output, config), run_cell(config, Execution(output=str(output)))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of the user's, `attack_models`, in the current folder."""
    return user_module(tmp_path, monkeypatch, "attack_models", MODELS)


def attacked(folder, shown=None, **settings):
    return attack_one(open_model(str(folder.path)), settings, console=shown or console())


def test_the_attack_of_a_run_folder_repeats_its_results(finished):
    folder, summary = finished
    found = attacked(folder)
    results = {key: value for key, value in found.results.items() if key not in ("evaluate_s", "attack_s")}
    assert results.pop("masking_flags") == summary["masking_flags"]
    assert results == pytest.approx({key: summary[key] for key in results})


def test_other_attacks_and_eps_on_a_run_folder(finished):
    shown = console()
    found = attacked(finished[0], shown, attacks=["pgd", "fgsm"], eps=[0.2], attack_samples=7, seed=[1])
    results = found.results
    assert results["attacked_count"] == 7
    assert results["certified_accuracy_attacked_eps_0.2"] <= results["worst_case_accuracy_eps_0.2"]
    told = rows(shown)
    keys = {"certified": "certified_accuracy_attacked", "after fgsm": "accuracy_fgsm", "after pgd": "accuracy_pgd"}
    expected = [
        [title, f"{100 * results[f'{key}_eps_0.2']:.1f}"]
        for title, key in {**keys, "worst case": "worst_case_accuracy"}.items()
    ]
    assert [row for row in told if len(row) == 2] == expected
    for attempt, row in zip(found.attempts, [row for row in told if len(row) == 7], strict=True):
        counts = [attempt.attacked, attempt.broken, attempt.forwards, attempt.gradients]
        assert row[:-1] == [attempt.attack, "0.2", *map(str, counts)]


def test_each_attack_by_itself(finished):
    shown = console()
    settings = {"attacks": ["pgd", "fgsm"], "eps": [0.2], "attack_samples": 7, "attack_schedule": "each"}
    found = attacked(finished[0], shown, **settings)
    assert [row[0] for row in rows(shown)[:4]] == ["certified", "pgd", "fgsm", "worst case"]
    assert {attempt.attacked for attempt in found.attempts} == {
        (found.samples["margin"][found.samples["attacked"]] > 0).sum()
    }


@pytest.mark.parametrize(("norm", "attacks"), [("linf", ("fgsm", "fmn")), ("l1", ("fgsm", "fmn"))])
def test_without_attacks_named_those_that_know_the_norm_run(norm, attacks, finished):
    found = attacked(finished[0], norm=norm, attack_samples=4)
    assert {key.split("_")[1] for key in found.samples if key.startswith("robust_")} == set(attacks)


def test_where_none_knows_the_norm_the_usual_ones_run(finished):
    opened = open_model(str(finished[0].path))
    object.__setattr__(opened, "config", CellConfig(**{**TINY, "attacks": ["apgd-t"]}))
    found = attack_one(opened, {"norm": "l1", "attack_samples": 2}, console=console())
    assert {attempt.attack for attempt in found.attempts} == {"fgsm", "pgd", "fmn"}


def test_a_table_of_all_attacks_is_not_cut(finished, monkeypatch):
    def quick(model, x, y, attacks, **options):
        found = honest(model, x, y, ["fgsm"], **options)
        named = dict.fromkeys(attacks, found.by_attack["fgsm"])
        tried = dict.fromkeys(attacks, found.attempted["fgsm"])
        attempts = [dataclasses.replace(one, attack=name, note="budget") for name in attacks for one in found.attempts]
        return dataclasses.replace(found, by_attack=named, attempted=tried, attempts=tuple(attempts), complete=False)

    honest = attacking.run_ensemble
    monkeypatch.setattr(attacking, "run_ensemble", quick)
    shown = console()
    attacked(finished[0], shown, attacks=available_attacks("l2"), attack_samples=3)
    assert "…" not in text(shown)
    names = [row[0] for row in rows(shown)]
    assert all(name in names and f"after {name}" in names for name in available_attacks("l2"))
    assert all(len(line) <= 100 for line in text(shown).splitlines() if "│" in line)
    assert "attacks incomplete: a budget ended them" in text(shown)


def test_brackets_and_signs_of_masked_gradients_are_shown(finished, monkeypatch):
    def diagnose(model, x, y, **given):
        return Diagnosis((Flag("flat-loss", 0.5, "the loss is flat at half the samples"),), {}, 1, 2, 3)

    monkeypatch.setattr(attacking, "diagnose", diagnose)
    shown = console()
    results = attacked(finished[0], shown).results
    lines = text(shown).splitlines()
    (mean,) = (line for line in lines if line.startswith("mean of the"))
    found = re.fullmatch(r".*: certified radius (\S+), smallest distance found (\S+), tightness (\S+)", mean)
    assert float(found[1]) / float(found[2]) == pytest.approx(float(found[3]), rel=2e-3)  # of the same samples
    assert float(found[3]) == pytest.approx(results["tightness"], rel=1e-3)
    (median,) = (line for line in lines if line.startswith("median of the"))
    found = re.fullmatch(r".*: certified radius (\S+) <= l2 robustness <= (\S+), tightness (\S+)", median)
    assert 0 < float(found[1]) <= float(found[2])
    assert float(found[3]) == pytest.approx(results["tightness_median"], rel=1e-3)
    assert lines[-1] == "warning, flat-loss: the loss is flat at half the samples"
    spared = {eps: results[f"certified_skipped_eps_{eps:g}"] for eps in (0.1, 0.3, 0.5)}
    told = ", ".join(f"{count} at eps {eps:g}" for eps, count in spared.items() if count)
    assert f"certified, and so spared by attacks with an eps: {told}" in lines


def test_certified_samples_that_no_attack_tried_are_told(finished):
    told, searched = console(), console()
    attacked(finished[0], told, attacks=["fgsm"], eps=[0.001])
    attacked(finished[0], searched, attacks=["fgsm", "ddn"], eps=[0.001])
    assert re.search(r"\n\d+ of them no attack has tried at all: ", text(told))
    assert "spared by attacks with an eps" in text(searched)
    assert "no attack has tried" not in text(searched)


@pytest.mark.parametrize("output", [None, "found"])
def test_a_broken_bound_saves_its_example_in_the_current_folder_or_the_output(output, models, monkeypatch):
    save_checkpoint(models / "weights.safetensors", weights())
    rule = rules.Rule(linear=lambda call: Dense(call.module.weight * 0.01, call.in_shape))
    monkeypatch.setitem(rules._RULES, nn.Linear, rule)
    opened = open_model("attack_models:linear", checkpoint=models / "weights.safetensors", dataset="digits")
    path = Path("counterexample.safetensors") if output is None else Path(output) / "counterexample.safetensors"
    settings, folder = {"attacks": ["ddn"], "attack_samples": 100}, None if output is None else Path(output)
    with pytest.raises(CertificateViolationError, match=f"; saved in {path}"):
        attack_one(opened, settings, console=console(), output=folder)
    example = load_file(models / path)
    distance = torch.linalg.vector_norm((example["x_adv"].double() - example["x"].double()).flatten())
    assert distance < example["radius"]
    with torch.no_grad():
        logits = opened.model(example["x_adv"][None])[0]
    assert logits.topk(2).indices.tolist()[0] != example["label"] or logits.topk(2).values.diff().abs() < 1e-5


def test_a_bound_that_a_jacobian_disproves_leaves_no_results_of_before_in_the_output(finished, monkeypatch, tmp_path):
    opened, settings = open_model(str(finished[0].path)), {"attacks": ["fgsm"], "attack_samples": 20}
    attack_one(opened, settings, console=console(), output=tmp_path / "found")

    def disproved(*arguments, **options):
        raise CertificateViolationError("certificate broken: a Jacobian norm exceeds the bound", {})

    monkeypatch.setattr(attack_stage, "evaluate", disproved)
    with pytest.raises(CertificateViolationError, match=r"exceeds the bound; saved in .*found.summary\.json"):
        attack_one(opened, settings, console=console(), output=tmp_path / "found")
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["summary.json"]
    row = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert not row["finished"]
    assert row["error"] == "certificate broken: a Jacobian norm exceeds the bound"
    with pytest.raises(CertificateViolationError, match=r"exceeds the bound$"):
        attack_one(opened, settings, console=console())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": [-0.1]}, r"eps = \(-0.1,\): expected a list of finite numbers >= 0"),
        ({"eps": []}, r"eps = \(\)"),
        ({"attacks": ["pdg"]}, "attacks = "),
        ({"seed": [0, 1]}, "seed: expected one, got 2"),
        ({"attack_samples": 0}, "attack_samples = 0"),
        ({"norm": "linf", "attacks": ["ddn"]}, "attacks = ddn: not for norm linf"),
        ({"attack_schedule": "all"}, "attack_schedule = 'all': expected one of cascade, each"),
        ({"max_gradients": 0}, "max_gradients = 0: expected an integer >= 1, or unset"),
        ({"max_seconds": "soon"}, "max_seconds = 'soon': expected seconds > 0, such as 90, 90s or 2m, or unset"),
        ({"audit": 1}, "audit = 1: expected true or false"),
    ],
)
def test_bad_attack_settings_are_refused(settings, message, finished):
    with pytest.raises(ConfigError, match=message):
        attack_one(open_model(str(finished[0].path)), settings, console=console())


def test_a_model_in_training_mode_is_refused_in_one_line(models):
    opened = open_model("attack_models:training", dataset="digits")
    for call in (
        lambda: bound_one(opened, BoundRequest(), console=console()),
        lambda: attack_one(opened, {}, console=console()),
    ):
        with pytest.raises(ValueError, match="expected eval mode, got training mode"):
            call()


def test_a_model_without_a_certificate_is_attacked_all_the_same(models):
    opened = open_model("attack_models:unknown", dataset="digits")
    with pytest.raises(ValueError, match="cumsum: no Lipschitz rule for cumsum"):
        bound_one(opened, BoundRequest(), console=console())
    shown, settings = console(), {"attacks": ["fgsm", "fmn"], "attack_samples": 5, "norm": "linf", "eps": [0.01, 0.1]}
    found = attack_one(opened, settings, console=shown)
    assert "no certificate: cumsum: no Lipschitz rule for cumsum; register one with" in text(shown)
    assert ["certified", "0.0", "0.0"] in rows(shown)
    assert found.results["worst_case_accuracy_eps_0.1"] <= found.results["worst_case_accuracy_eps_0.01"]
    assert not found.samples["radius_linf"].any()


def test_integer_pixels_of_samples_that_have_none_are_refused(finished):
    with pytest.raises(ValueError, match="grid k / 255"):
        attacked(finished[0], integer_pixels=True)

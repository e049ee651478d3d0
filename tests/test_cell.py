import json
import math
import platform

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY

from speccert import __version__
from speccert.certify import certified_radii
from speccert.experiments import cell as cells
from speccert.experiments.cell import cell_data, check_cell, load_model, run_cell, train_cell
from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import CellConfig, config_id
from speccert.experiments.evaluation import CertificateViolationError
from speccert.experiments.execution import Execution
from speccert.experiments.store import RunFolder, StoreError


def tiny(**settings):
    return CellConfig(**{**TINY, **settings})


def into(output):
    return Execution(output=str(output))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    reports = []
    summary = run_cell(tiny(), into(output), report=reports.append)
    return RunFolder.of(output, tiny()), summary, reports


def test_a_run_folder_has_these_files_and_no_others(finished):
    folder, summary, _ = finished
    names = {"config.json", "checkpoint.safetensors", "samples.parquet", "history.parquet", "summary.json"}
    names |= {"bounds.json", "attempts.json", "adversarial.safetensors", "closest.safetensors"}
    assert {path.name for path in folder.path.iterdir()} == names
    assert summary == folder.read_summary()
    assert folder.read_config() == tiny()


def test_the_summary_is_flat_strict_json_with_all_its_keys(finished):
    folder, summary, _ = finished
    raw = json.loads(folder.summary_path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert all(isinstance(value, str | int | float | list | None) for value in raw.values())
    keys = {"id", "clean_accuracy", "lipschitz_upper", "lipschitz_lower", "mean_certified_radius", "mean_distance"}
    keys |= {"mean_certified_radius_attacked", "tightness", "gradient_norm", "step_s", "step_ratio", "train_s"}
    keys |= {"tightness_median", "attack_forwards", "attack_gradients", "attack_s", "attack_complete", "masking_flags"}
    keys |= {"evaluate_s", "test_count", "attacked_count", "best_epoch", "diverged", "speccert_version"}
    keys |= {
        "ranks",
        "content",
        "cell_s",
        "torch_version",
        "python_version",
        "device",
        "machine",
        *CellConfig.__dataclass_fields__,
    }
    for eps in ("0.1", "0.3", "0.5"):
        names = (
            "certified_accuracy",
            "certified_accuracy_attacked",
            "worst_case_accuracy",
            "accuracy_fgsm",
            "accuracy_ddn",
            "certified_skipped",
        )
        keys |= {f"{name}_eps_{eps}" for name in names}
    assert keys <= summary.keys()
    assert (summary["id"], summary["test_count"], summary["attacked_count"]) == (config_id(tiny()), 60, 20)
    assert (summary["speccert_version"], summary["torch_version"]) == (__version__, torch.__version__)
    assert (summary["python_version"], summary["device"]) == (platform.python_version(), "cpu")
    assert all(summary[key] > 0 for key in ("step_s", "step_ratio", "train_s", "evaluate_s", "gradient_norm"))


def test_summary_and_rows_agree(finished):
    folder, summary, _ = finished
    samples, history = pd.read_parquet(folder.samples_path), pd.read_parquet(folder.history_path)
    attacked = samples[samples["attacked"]]
    assert (len(samples), len(attacked)) == (60, 20)
    assert summary["clean_accuracy"] == pytest.approx((samples["label"] == samples["prediction"]).mean())
    for eps in (0.1, 0.3, 0.5):
        assert summary[f"certified_accuracy_eps_{eps}"] == pytest.approx((samples["radius_l2"] > eps).mean())
        assert summary[f"certified_accuracy_attacked_eps_{eps}"] == pytest.approx((attacked["radius_l2"] > eps).mean())
        assert summary[f"worst_case_accuracy_eps_{eps}"] == pytest.approx((attacked["distance"] > eps).mean())
        for name in ("fgsm", "ddn"):
            flags = attacked[f"robust_{name}_eps_{eps}"].astype(bool)
            assert summary[f"accuracy_{name}_eps_{eps}"] == pytest.approx(flags.mean())
    assert (attacked["radius_l2"] <= attacked["distance"]).all()
    assert history["epoch"].tolist() == [1, 2]
    assert summary["train_s"] == pytest.approx(history["epoch_s"].sum())
    assert summary["gradient_norm"] == pytest.approx(history["gradient_norm"].mean())
    assert summary["best_epoch"] in (1, 2)


def test_what_the_attacks_did_is_kept(finished):
    folder, summary, _ = finished
    attempts = json.loads(folder.attempts_path.read_text())
    assert [(row["attack"], row["eps"]) for row in attempts] == [
        *(("fgsm", eps) for eps in (0.1, 0.3, 0.5)),
        ("ddn", None),
    ]
    assert summary["attack_gradients"] == sum(row["gradients"] for row in attempts)
    assert isinstance(summary["masking_flags"], list)
    kept = load_file(folder.adversarial_path)
    samples = folder.read_samples().set_index("index")
    assert kept["distance"].tolist() == samples.loc[kept["index"].tolist(), "distance"].tolist()
    assert len(kept["index"]) == summary["found_count"] - (samples["distance"] == 0).sum() > 0
    attacked = samples[samples["attacked"]]
    assert attacked["attempted_ddn"].tolist() == (attacked["distance"] > 0).tolist()


def test_pixels_that_are_not_whole_are_refused_before_any_training(tmp_path):
    config = tiny(integer_pixels=True)  # digits have 17 levels
    for call in (lambda: run_cell(config, into(tmp_path)), lambda: check_cell(config, cell_data(config, None))):
        with pytest.raises(ValueError, match="integer_pixels: expected test samples whose pixels are k/255"):
            call()
    assert not list(tmp_path.iterdir())


def test_the_saved_model_gives_the_saved_radii(finished):
    folder, _, _ = finished
    data = cell_data(tiny(), None)
    model = load_model(folder, data)
    samples = folder.read_samples()
    assert not model.training
    for norm in ("l2", "linf", "l1"):
        radii = certified_radii(model, data.test.x, data.test.y, norm)
        assert samples[f"radius_{norm}"].to_numpy() == pytest.approx(radii.numpy(), rel=1e-6, abs=1e-7)


def test_progress_goes_from_training_through_the_epochs_to_the_attacks(finished):
    folder, _, reports = finished
    assert {report.id for report in reports} == {folder.id}
    stages = [report.stage.split(" loss")[0] for report in reports]
    attacks = [f"fgsm eps {eps}" for eps in (0.1, 0.3, 0.5)]  # but where nothing stands or all is certified
    ends = ["diagnostics", "step time", "writing"]
    assert stages[:6] == ["training", "epoch 1/2", "epoch 2/2", "trained", "bounds", "radii"]
    told = [stage.partition(":")[0] for stage in stages[6:]]
    assert told == [*(one for one in attacks if one in told), "ddn", *ends]
    assert len(told) > 4
    assert [report.fraction for report in reports] == [0.0, 0.5, *[1.0] * (len(reports) - 2)]


def test_a_cell_starts_from_the_weights_of_another_run(finished, tmp_path):
    folder, _, _ = finished
    start = tiny(checkpoint=str(folder.checkpoint_path), epochs=1, lr=1e-9)
    assert run_cell(start, into(tmp_path))["step_ratio"] > 0
    before, after = load_file(folder.checkpoint_path), load_file(RunFolder.of(tmp_path, start).checkpoint_path)
    weights = [key for key in before if key.endswith(("original", "bias"))]
    assert len(weights) == 8
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in weights)


def test_a_training_that_diverges_is_told_and_evaluated(tmp_path):
    summary = run_cell(tiny(optimizer="sgd", lr=1e30, constraint="none", threshold=math.inf), into(tmp_path))
    assert (summary["diverged"], summary["status"], summary["best_epoch"]) == (True, "non-finite", 0)
    assert summary["masking_flags"] is None
    assert summary["gradient_norm"] is None or math.isfinite(summary["gradient_norm"])
    assert summary["certified_accuracy_attacked_eps_0.1"] <= summary["worst_case_accuracy_eps_0.1"]


def broken(model, config, data, report, diagnosed):
    raise CertificateViolationError("certificate broken: sample 3", {"x": torch.ones(2), "radius": torch.tensor(0.5)})


def test_a_violation_saves_its_example_and_no_results(tmp_path, monkeypatch):
    config = tiny(epochs=1)
    folder = RunFolder.of(tmp_path, config)
    path = folder.path / "counterexample.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", broken)
        with pytest.raises(CertificateViolationError, match=f"sample 3; saved in {path}"):
            run_cell(config, into(tmp_path))
    assert torch.equal(load_file(path)["x"], torch.ones(2))
    assert not folder.summary_path.exists()
    assert not folder.samples_path.exists()
    run_cell(config, into(tmp_path))  # the bound has been mended: the old example must not stay beside good results
    assert not path.exists()
    assert folder.is_finished


def test_a_check_writes_nothing_and_leaves_the_random_state():
    data, before = cell_data(tiny(), None), torch.get_rng_state()
    check_cell(tiny(), data)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="multiple of 2 channels, got 15"):
        check_cell(tiny(width=15), data)


def test_a_folder_that_was_not_trained_or_is_damaged_has_no_model(finished, tmp_path):
    data = cell_data(tiny(), None)
    folder = RunFolder.of(tmp_path, tiny())
    folder.create(tiny())
    with pytest.raises(StoreError, match=r"checkpoint.safetensors: missing; the run has not been trained to its end"):
        load_model(folder, data)
    folder.checkpoint_path.write_bytes(finished[0].checkpoint_path.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"checkpoint.safetensors: truncated"):
        load_model(folder, data)
    state = load_file(finished[0].checkpoint_path)
    save_checkpoint(folder.checkpoint_path, {**state, "2.bias": state["2.bias"] * math.nan})
    with pytest.raises(StoreError, match=r"NaN or infinite weights: 2.bias"):
        load_model(folder, data)


def test_a_damaged_resume_file_is_named(tmp_path):
    folder = RunFolder.of(tmp_path, tiny())
    train_cell(tiny(), cell_data(tiny(), None), folder)
    resume = folder.path / "resume.pt"
    resume.write_bytes(resume.read_bytes()[:1000])
    with pytest.raises(StoreError, match=r"resume.pt: damaged; delete it to start over"):
        run_cell(tiny(), into(tmp_path))


class Stopped(Exception):
    """Raised by a report, as where the lease was lost."""


WRITTEN = (
    *("history.parquet", "checkpoint.safetensors", "samples.parquet", "bounds.json", "attempts.json"),
    *("adversarial.safetensors", "closest.safetensors"),
)


@pytest.mark.parametrize(
    ("stage", "written"), [("training", 0), ("epoch 1/2", 0), ("trained", 0), ("bounds", 2), ("writing", 2)]
)
def test_what_a_report_raises_ends_the_cell_before_anything_more_is_written(tmp_path, stage, written):
    def report(progress):
        if progress.stage.startswith(stage):
            raise Stopped

    with pytest.raises(Stopped):
        run_cell(tiny(), into(tmp_path), report=report)
    folder = RunFolder.of(tmp_path, tiny())
    assert [name for name in WRITTEN if (folder.path / name).exists()] == list(WRITTEN[:written])
    assert not folder.summary_path.exists()
    assert folder.resume_path.exists() == (stage != "training")
    run_cell(tiny(), into(tmp_path))
    assert folder.is_finished
    assert not folder.resume_path.exists()


def test_the_content_of_named_files_is_in_the_summary(finished, tmp_path):
    assert finished[1]["content"] is None
    start = tiny(checkpoint=str(finished[0].checkpoint_path), epochs=1)
    assert run_cell(start, into(tmp_path))["content"].startswith("checkpoint=")


def test_a_broken_certificate_is_told_also_where_its_example_cannot_be_saved(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise CertificateViolationError("certificate broken: sample 3", {"x": torch.zeros(1)})

    def full(path, state):
        if path.name == "counterexample.safetensors":
            raise StoreError("no space")
        save_checkpoint(path, state)

    monkeypatch.setattr(cells, "evaluate", broken)
    monkeypatch.setattr(cells, "save_checkpoint", full)
    with pytest.raises(CertificateViolationError, match="sample 3; the example could not be saved: no space"):
        run_cell(tiny(), into(tmp_path))

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch import nn

from speccert import cli
from speccert.certify import load_certificate, rules
from speccert.certify.linear import Dense
from speccert.experiments import sweep
from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import CellConfig, config_id

COMMANDS = (
    "run",
    "train",
    "bound",
    "attack",
    "verify",
    "status",
    "cancel",
    "logs",
    "table",
    "report",
    "plot",
    "doctor",
)
TINY = {
    "width": "16",
    "epochs": "2",
    "train-samples": "300",
    "test-samples": "60",
    "attack-samples": "20",
    "attacks": "fgsm,ddn",
    "loss": "cross-entropy",
    "thresholds": "1,inf",
    "eps": "0.1,0.3",
}
MODEL = """
from torch import nn
def build(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def flags(**changes):
    values = {**TINY, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A folder of its own, sys.path put back, no pictures, the width of a pipe."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sweep, "write_figures", lambda *_: [])
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def certify(capsys):
    """Run a command in this process: its exit code, what it printed, and the lines of its errors."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err.splitlines()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "write_figures", lambda *_: [])
        with pytest.raises(SystemExit):
            cli.main(["run", "-o", str(output), "--executor", "inline", *flags()])
    return output


@pytest.fixture
def folder(finished):
    (path,) = (path.parent for path in finished.glob("*/summary.json") if '"inf"' not in path.read_text())
    return path


def test_help_needs_no_torch():
    script = (
        "import sys\nfrom speccert.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([name for name in ('torch', 'pandas', 'matplotlib', 'sklearn', 'rich') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "certify run spec.toml" in ended.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, certify):
    code, out, err = certify(command, "--help")
    assert (code, err) == (0, [])
    assert len(re.findall(rf"certify {command}\b", out)) >= 1
    assert max(map(len, out.splitlines())) <= 110


def test_without_a_command_the_help_is_shown(certify):
    code, out, err = certify()
    assert (code, err) == (0, [])
    assert all(f"  {command} " in out for command in COMMANDS)


def test_version(certify):
    code, out, _ = certify("--version")
    assert code == 0
    assert out.startswith("certify, version ")


def test_run_prints_the_whole_table_plainly_and_where_the_files_are(finished, certify):
    code, out, err = certify("run", "-o", finished, "--executor", "inline", *flags())
    assert (code, err) == (0, [])
    assert "2 of 2 cells were finished before and are kept" in out
    assert out.splitlines()[-1] == f"tables: {finished}/robustness.csv .md .tex .parquet   pictures: {finished}/figures"
    assert "\x1b" not in out
    assert "…" not in out
    table = pd.read_csv(finished / "robustness.csv")
    rows = [line.split() for line in out.splitlines()]
    for row in table.to_dict("records"):
        start = ["cap", "1" if row["threshold"] == 1 else "∞"]
        shown = [line[2:] for line in rows if line[:2] == start]
        for eps in ("0.1", "0.3"):
            keys = (
                "certified_accuracy",
                "certified_accuracy_attacked",
                "worst_case_accuracy",
                "accuracy_fgsm",
                "accuracy_ddn",
            )
            assert [f"{100 * row[f'{key}_eps_{eps}']:.1f}" for key in keys] in shown
        assert any(f"{row['lipschitz_upper']:.4g}" in line for line in shown)


def test_run_says_what_each_cell_gave(certify, tmp_path):
    code, out, _ = certify("run", "-o", tmp_path, "--executor", "inline", *flags(thresholds="2"))
    assert code == 0
    (path,) = tmp_path.glob("*/summary.json")
    summary = json.loads(path.read_text())
    values = [
        100 * summary[key]
        for key in ("clean_accuracy", "certified_accuracy_attacked_eps_0.3", "worst_case_accuracy_eps_0.3")
    ]
    told = "cap 2 seed 0: clean {:.1f} %, at eps 0.3 certified {:.1f} %, observed {:.1f} %".format(*values)
    assert out.splitlines()[0].startswith(told)


def test_a_spec_file_and_flags_do_the_same_and_flags_win(certify, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "run", lambda spec, *_, **__: seen.append(spec.cells()) or pd.DataFrame())
    monkeypatch.setattr("speccert.experiments.table_writers.print_table", lambda *_: None)
    lines = ['width = 16\nepochs = 2\ntrain_samples = 300\nloss = "cross-entropy"\nthresholds = [1, inf]\n']
    lines += ['test_samples = 60\nattack_samples = 20\nattacks = ["fgsm", "ddn"]\neps = [0.1, "3/10"]\n']
    (tmp_path / "spec.toml").write_text("".join(lines))
    assert certify("run", "spec.toml")[0] == 0
    assert certify("run", *flags())[0] == 0
    assert seen[0] == seen[1]
    assert [cell.threshold for cell in seen[0]] == [1.0, math.inf]
    assert certify("run", "spec.toml", "--threshold", "2", "--epochs", "5", "--eps", "36/255")[0] == 0
    assert [(cell.threshold, cell.epochs, cell.eps, cell.width) for cell in seen[2]] == [(2.0, 5, (36 / 255,), 16)]


def test_tables_from_a_folder_of_runs_and_from_one_run(finished, folder, certify, tmp_path):
    code, out, _ = certify("table", finished)
    assert code == 0
    assert "at ε = 0.1" in out
    assert "at ε = 0.3" in out
    assert certify("table", folder)[0] == 0
    code, out, _ = certify("table", finished, "--eps", "3/10", "--file", "new.csv", "--per-seed")
    assert (code, out) == (0, "")
    columns = pd.read_csv(tmp_path / "new.csv").columns
    assert "seed" in columns
    assert {name.partition("_eps_")[2] for name in columns if "_eps_" in name} == {"0.3"}


def test_pictures_from_a_folder_of_runs(finished, certify, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "speccert.experiments.plots.write_figures", lambda *given: drawn.append(given) or [tmp_path / "a.pdf"]
    )
    assert certify("plot", finished)[1] == f"{tmp_path / 'a.pdf'}\n"
    assert certify("plot", finished, "-o", "here")[0] == 0
    assert [(given[0], str(given[1])) for given in drawn] == [(finished, f"{finished}/figures"), (finished, "here")]


def test_bound_and_attack_of_a_run_folder(folder, certify):
    code, out, err = certify("bound", folder)
    assert (code, err) == (0, [])
    upper = json.loads((folder / "summary.json").read_text())["lipschitz_upper"]
    assert re.search(rf"<= L <= {upper:.6g} \(tightness \S+, product\)", out)
    assert all(len(line) <= 100 for line in out.splitlines())
    code, out, err = certify("attack", folder, "--attacks", "fgsm", "--eps", "36/255", "--samples", "5", "--seed", "1")
    assert (code, err) == (0, [])
    assert "accuracy on 5 attacked samples" in out
    assert "0.141176" in out
    assert certify("attack", folder, "--norm", "linf", "--samples", "3")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schedule", "all"), "attack_schedule = 'all': expected one of cascade, each"),
        (("--attacks", "pdg"), "attacks = ('pdg',): expected a list of different names out of fgsm, pgd, apgd-ce"),
        (("--max-gradients", "0"), "max_gradients = 0: expected an integer >= 1, or unset"),
        (("--max-seconds", "soon"), "max_seconds = 'soon': expected seconds > 0, such as 90, 90s or 2m, or unset"),
        (("--norm", "l1", "--attacks", "square"), "attacks = square: not for norm l1, expected some of fgsm, pgd, fab"),
        (
            ("--output", "mine"),
            "output: expected a new folder, an empty one, or one of an earlier attack; mine holds a",
        ),
    ],
)
def test_bad_options_of_an_attack_end_in_one_line(options, message, folder, certify, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").touch()
    code, out, err = certify("attack", folder, *options)
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a"]


def test_an_attack_with_all_its_options(folder, certify, tmp_path):
    options = (
        "--attacks",
        "pgd,fmn",
        "--norm",
        "linf",
        "--eps",
        "0.02,0.1",
        "--samples",
        "6",
        "--seed",
        "2",
        "--audit",
    )
    limits = ("--max-gradients", "2000", "--max-seconds", "10m", "--batch-size", "4", "--schedule", "cascade")
    code, out, err = certify("attack", folder, *options, *limits, "--output", "found/here")
    assert (code, err) == (0, [])
    assert all(len(line) <= 100 for line in out.splitlines() if "│" in line)
    assert "after rounding-search" in out
    assert out.splitlines()[-1] == "results: found/here"
    row = json.loads((tmp_path / "found" / "here" / "summary.json").read_text())
    limits = (row["max_gradients"], row["max_seconds"], row["audit"], row["attacked_count"], row["seed"])
    assert limits == (2000, 600.0, True, 6, 2)
    assert row["certified_skipped_eps_0.02"] == 0
    assert certify("attack", folder, "--samples", "3", "--output", "found/here")[0] == 0


def test_a_model_without_a_certificate_is_attacked(certify, tmp_path):
    name = f"softmax_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL.replace("num_classes))", "num_classes), nn.LayerNorm(num_classes))"))
    given = (f"{name}:build", "--dataset", "digits", "--attacks", "autoattack", "--eps", "0.5", "--samples", "4")
    code, out, err = certify("attack", *given, "--max-gradients", "500", "--output", "found")
    assert (code, err) == (0, [])
    assert "no certificate: 2: no Lipschitz rule for torch.nn.modules.normalization.LayerNorm" in out
    row = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert row["no_certificate"].startswith("2: no Lipschitz rule")
    assert (
        not pd.read_parquet(tmp_path / "found" / "samples.parquet")[["radius_l2", "radius_linf", "radius_l1"]]
        .any()
        .any()
    )
    code, _, err = certify("bound", *given[:3])
    assert (code, len(err)) == (1, 1)


def test_a_broken_certificate_ends_an_attack_with_its_example(certify, tmp_path, monkeypatch):
    name = f"broken_attack_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    weight = torch.eye(10, 64) / 2
    save_checkpoint(tmp_path / "weights.safetensors", {"1.weight": weight, "1.bias": torch.zeros(10)})
    rule = rules.Rule(linear=lambda call: Dense(call.module.weight * 0.01, call.in_shape))
    monkeypatch.setitem(rules._RULES, nn.Linear, rule)
    given = (f"{name}:build", "--checkpoint", "weights.safetensors", "--dataset", "digits", "--attacks", "fmn")
    code, _, err = certify("attack", *given, "--output", "found")
    assert (code, len(err)) == (1, 1)
    assert re.fullmatch(r"certify: error: certificate broken: .*; saved in found/counterexample.safetensors", err[0])
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"summary.json", "counterexample.safetensors"}


def test_an_interrupted_attack_does_not_promise_to_go_on(certify, folder, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("speccert.experiments.attack_stage.attack_one", interrupted)
    code, _, err = certify("attack", folder)
    assert (code, err) == (130, ["certify: error: interrupted; the same command begins anew"])


def test_a_users_model_in_the_current_folder_is_bounded_and_attacked(certify, tmp_path):
    name = f"mymodel_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    weight = torch.eye(10, 64) / 2
    save_checkpoint(tmp_path / "weights.safetensors", {"1.weight": weight, "1.bias": torch.zeros(10)})
    given = [f"{name}:build", "--checkpoint", "weights.safetensors", "--dataset", "digits"]
    code, out, err = certify("bound", *given)
    assert (code, err) == (0, [])
    assert "Lipschitz constant (l2): 0.5 <= L <= 0.5 (tightness 1, product)" in out
    assert "largest pair of logits: 0.707107 <= L <= 0.707107 (tightness 1)" in out
    code, out, err = certify("attack", *given, "--attacks", "ddn", "--samples", "10")
    assert (code, err) == (0, [])
    assert "accuracy on 10 attacked samples" in out


def test_a_certificate_of_a_run_folder_is_written_and_verified(folder, finished, certify, tmp_path):
    code, out, err = certify("bound", folder, "--certificate", "net.json", "--samples", "4")
    assert (code, err) == (0, [])
    assert "<= L <=" in out
    assert out.splitlines()[-1].startswith("net.json: 4 samples, ")
    assert [path.name for path in tmp_path.iterdir()] == ["net.json"]
    code, out, err = certify("verify", "net.json", "--model", folder)
    assert (code, err) == (0, [])
    assert out.startswith("valid: ")
    (other,) = (path.parent for path in finished.glob("*/summary.json") if path.parent != folder)
    code, out, err = certify("verify", "net.json", "--model", other)
    assert (code, err) == (1, [])
    assert out.startswith("invalid: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "0"), "samples: expected 1 to 60, as many as there are test samples; got 0"),
        (("--samples", "61"), "samples: expected 1 to 60"),
        (("--arithmetic", "float8"), "arithmetic: expected one of"),
        (("--certificate", "file"), "file: is there already and is no certificate; nothing was written"),
    ],
)
def test_a_certificate_that_cannot_be_made_is_refused_before_anything_is_computed(
    options, message, folder, certify, tmp_path
):
    (tmp_path / "file").write_text("mine")
    code, out, err = certify("bound", folder, "--certificate", "net.json", *options)
    assert (code != 0, out, len(err)) == (True, "", 1)
    assert message in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_larger_radius_is_found_out(folder, certify, tmp_path):
    assert certify("bound", folder, "--certificate", "net.json", "--samples", "9")[0] == 0
    made = load_certificate("net.json")
    best = max(made.samples, key=lambda row: row.radius)
    larger = dataclasses.replace(best, radius=best.radius + 1e-4)
    dataclasses.replace(made, samples=tuple(larger if row is best else row for row in made.samples)).save("net.json")
    code, out, err = certify("verify", "net.json", "--model", folder)
    assert (code, err) == (1, [])
    assert out.startswith("invalid: ")
    assert "radius" in out
    assert str(best.index) in out


def test_a_users_model_is_certified_and_verified_by_its_checkpoint_and_data(certify, tmp_path):
    name = f"certified_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    weights = {"1.weight": torch.eye(10, 64) / 2, "1.bias": torch.zeros(10)}
    save_checkpoint(tmp_path / "weights.safetensors", weights)
    given = ["--checkpoint", "weights.safetensors", "--data", "digits"]
    options = ["--samples", "2", "--norm", "linf", "--arithmetic", "bfloat16", "--certificate", "net.json"]
    code, _, err = certify("bound", f"{name}:build", "--checkpoint", given[1], "--dataset", "digits", *options)
    assert (code, err) == (0, [])
    made = load_certificate("net.json")
    assert (made.norm, made.arithmetic.name, len(made.samples)) == ("linf", "bfloat16", 2)
    assert certify("verify", "net.json", "--model", f"{name}:build", *given)[0] == 0
    save_checkpoint(tmp_path / "weights.safetensors", {**weights, "1.bias": torch.full((10,), 1e-30)})
    code, out, _ = certify("verify", "net.json", "--model", f"{name}:build", *given)
    assert code == 1
    assert out.startswith("invalid: ")


def test_run_puts_a_certificate_into_each_cell(finished, certify, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(finished, copy)
    command = ("run", "-o", copy, "--executor", "inline", "--certificate", "net.json", *flags())
    code, out, err = certify(*command)
    assert (code, err) == (0, [])
    cells = sorted(path.parent.name for path in copy.glob("*/summary.json"))
    lines = [line for line in out.splitlines() if ": net.json" in line]
    assert sorted(line.split(":")[0] for line in lines) == cells
    assert all(len(load_certificate(copy / cell / "net.json").samples) == 60 for cell in cells)
    assert out.splitlines()[-1].startswith("tables: ")
    assert certify(*command)[1].count("net.json is kept: 60 samples") == 2


def test_train_then_bound(certify, tmp_path):
    code, out, err = certify("train", "-o", "runs", *flags(thresholds=None, threshold="0.5"))
    assert (code, err) == (0, [])
    (path,) = (tmp_path / "runs").glob("*/checkpoint.safetensors")
    assert f"checkpoint in runs/{path.parent.name}" in out
    assert "<= L <=" in certify("bound", path.parent)[1]


def test_doctor(certify, monkeypatch):
    from speccert.experiments import precision

    code, out, err = certify("doctor")
    assert (code, err) == (0, [])
    assert torch.__version__ in out
    assert "FAIL" not in out
    monkeypatch.setattr(precision, "_assumptions", lambda: [precision.Check("sums", "wrong", holds=False)])
    code, out, err = certify("doctor")
    assert code == 1
    assert "FAIL sums: wrong" in out
    assert err == ["certify: error: an assumption of the certificates does not hold on this machine"]


def test_a_broken_bound_ends_the_command_with_the_example_and_no_table(certify, tmp_path, monkeypatch):
    name = f"broken_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    rule = rules.Rule(linear=lambda call: Dense(call.module.weight * 0.1, call.in_shape))
    monkeypatch.setitem(rules._RULES, nn.Linear, rule)
    given = flags(width=None, thresholds=None, attacks="ddn", model=f"{name}:build", constraint="none", seeds="0,1")
    code, out, err = certify("run", "-o", "runs", "--executor", "inline", "--normalise", "none", *given)
    assert code == 1
    assert len(err) == 1
    assert re.fullmatch(
        r"certify: error: certificate broken: .*; saved in (runs/\w+/counterexample.safetensors)", err[0]
    )
    assert len(list((tmp_path / "runs").glob("*/counterexample.safetensors"))) == 1
    assert not list((tmp_path / "runs").glob("*/summary.json"))
    assert not list((tmp_path / "runs").glob("robustness.*"))
    assert "tables:" not in out


BAD_SPECS = {
    "syntax.toml": b"epochs = = 3",
    "key.toml": b"epcohs = 3",
    "binary.toml": b"\xff\xfe\x00",
    "list.toml": b"eps = []",
    "section.toml": b"[model]\nwidth = 3",
    "bad_syntax.py": b"def f(:",
    "bad_import.py": b"import not_there_at_all",
}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "none.toml"), 2, "File 'none.toml' does not exist"),
        (("run", "syntax.toml"), 2, "syntax.toml: Invalid value"),
        (("run", "key.toml"), 2, "key.toml: unknown setting 'epcohs' (did you mean epochs"),
        (("run", "binary.toml"), 2, "binary.toml: "),
        (("run", "list.toml"), 2, "list.toml: eps = (): expected a list of finite numbers >= 0"),
        (("run", "section.toml"), 2, "section.toml: model = {'width': 3}: expected one of mlp"),
        (("run", "--eps", "-0.1"), 2, "eps = (-0.1,): expected a list of finite numbers >= 0"),
        (("run", "--eps", ""), 2, "eps = '': expected numbers"),
        (("run", "--eps", "1/0"), 2, "eps = ('1/0',): expected a list"),
        (("run", "--threshold", "0"), 2, "threshold = 0.0: expected a number > 0, or inf"),
        (("run", "--thresholds", "1,nan"), 2, "threshold = nan: expected a number > 0, or inf"),
        (("run", "--constraint", "kap"), 2, "constraint = 'kap': expected one of cap, clip"),
        (("run", "--epochs", "many"), 2, "epochs = 'many': expected integers"),
        (("run", "--norm", "l3"), 2, "norm = 'l3': expected one of l2, linf, l1"),
        (
            ("run", "--norm", "l1", "--attacks", "autoattack"),
            2,
            "attacks = autoattack: not for norm l1, expected some of fgsm, pgd, fab, deepfool, fmn",
        ),
        (("run", "--sead", "1"), 2, "No such option '--sead'"),
        (("run", "--jobs", "0"), 2, "jobs = 0: expected an integer >= 1, or unset"),
        (("run", "--executor", "inline", "--jobs", "0"), 2, "jobs = 0: expected an integer >= 1, or unset"),
        (("run", "--jobs", "two"), 2, "Invalid value for '--jobs'"),
        (("run", "--executor", "cloud"), 2, "executor = 'cloud': expected one of inline, local, slurm"),
        (("run", "--dry-run", "--threads", "0"), 2, "threads = 0: expected an integer >= 1"),
        (("run", "--dry-run", "--slurm", "queue=gpu"), 2, "slurm: unknown option 'queue'"),
        (("run", "--device", "abacus"), 1, "device: expected cpu, cuda or cuda:N of this machine, got 'abacus'"),
        (("run", "--device", "meta"), 1, "device: expected cpu, cuda or cuda:N of this machine, got 'meta'"),
        (("run", "--width", "15", "--thresholds", "1,2"), 1, "multiple of 2 channels, got 15"),
        (("run", "--dataset", "none.npz"), 1, "none.npz: cannot be read"),
        (("run", "--model", "no_module_here:f"), 1, "No module named 'no_module_here'"),
        (("run", "-o", "file"), 2, "Directory 'file' is a file"),
        (("run", "-o", "file/below"), 1, "cannot be written (Not a directory)"),
        (("run", "--data-root", "file"), 2, "Directory 'file' is a file"),
        (("train", "--thresholds", "1,2"), 2, "got 2 cells; use certify run"),
        (("bound", "nothing"), 2, "model: expected a run folder or module:function, got 'nothing'"),
        (("bound", "."), 1, "config.json: cannot be read"),
        (("bound", "json:dumps", "--dataset", "digits"), 1, "json:dumps: a call with input_shape= and num_classes="),
        (("bound", "bad_syntax:f", "--dataset", "digits"), 1, "bad_syntax:f: invalid syntax"),
        (("run", "--model", "bad_import:f"), 1, "bad_import:f: No module named 'not_there_at_all'"),
        (("bound",), 2, "Missing argument 'MODEL'"),
        (("bound", ".", "--samples", "3"), 2, "--samples and --arithmetic are for a certificate or local radii; give"),
        (
            ("bound", ".", "--method", "magic"),
            2,
            "method: expected one of product, closed-form, lipsdp, lipsdp-layer, lipsdp-first-order, local, auto; got",
        ),
        (("bound", ".", "--norm", "l3"), 2, "norm: expected one of l2, linf, l1; got 'l3'"),
        (("bound", ".", "--budget", "soon"), 2, "budget: expected seconds > 0, such as 90, 90s or 2m; got 'soon'"),
        (("bound", ".", "--budget", "0"), 2, "budget: expected seconds > 0, such as 90, 90s or 2m; got '0'"),
        (
            ("bound", ".", "--solver", "scs"),
            2,
            "solver: for the methods lipsdp and lipsdp-layer; got the method product",
        ),
        (
            ("bound", ".", "--method", "local", "--certificate", "net.json"),
            2,
            "a certificate can't hold local radii; give another --method, such as auto",
        ),
        (
            ("run", "--dry-run", "--bound-budget", "-1"),
            2,
            "bound_budget = '-1': expected seconds > 0, such as 90, 90s or 2m",
        ),
        (("run", "--dry-run", "--bound", "sdp"), 2, "bound = 'sdp': expected one of product, closed-form, lipsdp"),
        (("run", "--bound", "local", "--certificate", "net.json"), 2, "certificate: can't hold local radii"),
        (("run", "--certificate", "net.txt"), 2, "certificate: expected a file name without a folder that ends in"),
        (("run", "--certificate", "a/net.json"), 2, "certificate: expected a file name without a folder that ends in"),
        (("run", "--certificate", "net.json", "--no-wait"), 2, "certificate: made when the cells are finished"),
        (("verify", "net.json"), 2, "Missing option '--model'"),
        (("verify", "net.json", "--model", "nothing"), 2, "model: expected a run folder or module:function"),
        (("verify", "net.json", "--model", "json:dumps"), 2, "dataset: expected one for the model json:dumps"),
        (("attack", "json:dumps"), 2, "dataset: expected one for the model json:dumps; give --dataset"),
        (("attack", ".", "--eps", "near"), 2, "eps = 'near': expected numbers"),
        (("attack", ".", "--max-gradients", "few"), 2, "max_gradients = 'few': expected integers"),
        (("attack", ".", "--batch-size", "0"), 2, "Invalid value for '--batch-size': 0 is not in the range x>=1"),
        (("attack", ".", "--audit", "hard"), 2, "Got unexpected extra argument (hard)"),
        (("attack", ".", "--output", "file"), 2, "Directory 'file' is a file"),
        (("run", "--attack-schedule", "all"), 2, "attack_schedule = 'all': expected one of cascade, each"),
        (("run", "--max-gradients", "0"), 2, "max_gradients = 0: expected an integer >= 1, or unset"),
        (("run", "--max-seconds", "soon"), 2, "max_seconds = 'soon': expected seconds > 0, such as 90, 90s or 2m"),
        (("run", "--integer-pixels", "--executor", "inline"), 1, "integer_pixels: expected test samples whose pixels"),
        (("table", "none"), 2, "Directory 'none' does not exist"),
        (("table", "."), 1, "expected at least one run, got none"),
        (("plot", "."), 1, "expected at least one run, got none"),
        (("plot", "file"), 2, "Directory 'file' is a file"),
        (("fly",), 2, "No such command 'fly'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_ends_in_one_line_and_writes_nothing(arguments, code, message, certify, tmp_path):
    for name, content in {**BAD_SPECS, "file": b"mine"}.items():
        (tmp_path / name).write_bytes(content)
    found, out, err = certify(*arguments)
    assert found == code
    assert len(err) == 1
    assert err[0].startswith("certify: error: ")
    assert message in err[0]
    assert out == ""
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert written <= {*BAD_SPECS, "file", "runs"}
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("arguments", [("--eps", "9"), ("--file", "table.doc"), ("--file", "none/there/../table.doc")])
def test_a_table_that_cannot_be_made_ends_in_one_line(arguments, finished, certify):
    code, out, err = certify("table", finished, *arguments)
    assert (code, out, len(err)) == (1, "", 1)


@pytest.mark.parametrize("damaged", ["config.json", "summary.json", "checkpoint.safetensors", "samples.parquet"])
def test_a_truncated_file_of_a_run_is_named(damaged, finished, folder, certify, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(finished, copy)
    path = copy / folder.name / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    commands = {
        "config.json": ("bound", copy / folder.name),
        "summary.json": ("table", copy),
        "checkpoint.safetensors": ("bound", copy / folder.name),
        "samples.parquet": ("plot", copy),
    }
    code, out, err = certify(*commands[damaged])
    assert (code, out, len(err)) == (1, "", 1)
    assert err[0].startswith(f"certify: error: {path}: ")


def test_paths_with_marks_of_rich_are_printed_as_they_are(certify, tmp_path):
    output = tmp_path / "[red]runs[" / ":smile:" / ("long" * 30)
    shown = certify("run", "-o", output, "--executor", "inline", *flags(thresholds="1", epochs="1"))[1]
    assert shown.splitlines()[-1].startswith(f"tables: {output}/robustness.csv")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_ends_in_one_line(certify, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, _, err = certify("run", "-o", disk, "--executor", "inline", *flags(thresholds="1"))
        assert code == 1
        assert len(err) == 1
        assert "No space left on device" in err[0]
        assert not list(disk.rglob("*.tmp"))
        assert not list(disk.rglob("summary.json"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_a_read_only_disk_ends_in_one_line(certify, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, out, err = certify("run", "-o", disk / "runs", "--executor", "inline", *flags())
        assert (code, out) == (1, "")
        assert len(err) == 1
        assert err[0].startswith(f"certify: error: {disk}/runs/.certify/plan-")
        assert err[0].endswith(": cannot be written (Read-only file system)")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_terminal_of_100_columns_shows_the_table_uncut(finished, capsys, monkeypatch):
    from rich.console import Console

    from speccert.experiments.table_writers import print_table
    from speccert.experiments.tables import robustness_table

    console = Console(width=100, force_terminal=True, color_system=None)
    print_table(robustness_table(finished), console)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 100
    for word in ("clean", "Lipschitz", "gradient", "ratio", "tightness", "certified", "worst", "fgsm", "ddn"):
        assert word in out


def test_flags_name_the_same_run_as_the_config(finished):
    settings = {"width": 16, "epochs": 2, "train_samples": 300, "test_samples": 60, "attack_samples": 20}
    config = CellConfig(attacks=("fgsm", "ddn"), loss="cross-entropy", threshold=math.inf, eps=(0.1, 0.3), **settings)
    assert (finished / config_id(config) / "summary.json").exists()

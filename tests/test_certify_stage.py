import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import jsonschema
import pytest
import tiny
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from speccert.certify import CertificateError, certified_radii, load_certificate
from speccert.experiments import certify_stage
from speccert.experiments.bound_stage import BoundRequest
from speccert.experiments.cell import run_cell
from speccert.experiments.certify_stage import certify_cells, certify_one, certifying, check_name, verify_one
from speccert.experiments.config import ConfigError
from speccert.experiments.execution import Execution
from speccert.experiments.spec import RunSpec
from speccert.experiments.stages import open_model
from speccert.experiments.store import RunFolder
from speccert.experiments.sweep import CellError

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "certificate.schema.json").read_text(encoding="utf-8"))
SPEC = RunSpec.from_mapping({**tiny.TINY, "thresholds": [0.5, 1.0], "attacks": ["fgsm"], "attack_samples": 5})


def console():
    return Console(file=io.StringIO(), width=100, color_system=None)


def text(shown):
    return shown.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    for cell in SPEC.cells():
        run_cell(cell, Execution(output=str(output)))
    return output


@pytest.fixture
def folder(finished):
    return RunFolder.of(finished, SPEC.cells()[0])


@pytest.fixture
def cells(finished, tmp_path):
    """A copy of the finished cells."""
    for path in finished.glob("*/*"):
        copy = tmp_path / "runs" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "runs"


def one(folder, path, shown=None, **changes):
    return certify_one(open_model(str(folder.path)), path, BoundRequest(**changes), console=shown or console())


def in_cells(output, name="net.json", spec=SPEC):
    shown = console()
    certify_cells(spec, output, name, data_root=None, console=shown)
    return text(shown).splitlines()


@pytest.mark.parametrize("samples", [None, 7])
def test_test_samples_are_certified_as_everywhere(samples, folder, tmp_path):
    shown = console()
    made = one(folder, tmp_path / "net.json", shown, samples=samples)
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / "net.json").read_text()))
    assert load_certificate(tmp_path / "net.json") == made
    opened, count = open_model(str(folder.path)), samples or 60
    x, y = opened.data.test.x[:count], opened.data.test.y[:count]
    assert [row.radius for row in made.samples] == certified_radii(opened.model, x, y).tolist()
    assert [row.index for row in made.samples] == list(range(count))
    assert [row.label for row in made.samples] == y.tolist()
    mean = math.fsum(row.radius for row in made.samples) / count
    line = f"net.json: {count} samples, "
    assert line in text(shown)
    assert f"mean certified l2 radius {mean:.4g}, float32 arithmetic" in text(shown)


@pytest.mark.parametrize("samples", [0, -1, 61])
def test_samples_that_there_are_not_are_refused(samples, folder, tmp_path):
    with pytest.raises(ConfigError, match=rf"samples: expected 1 to 60, .*; got {samples}"):
        one(folder, tmp_path / "net.json", samples=samples)


def test_other_settings_are_in_the_certificate(folder, tmp_path):
    made = one(folder, tmp_path / "net.json", norm="linf", arithmetic="real", samples=3)
    assert (made.norm, made.arithmetic.name, set(made.bounds)) == ("linf", "real", {"l2", "linf"})
    with pytest.raises(ValueError, match=r"arithmetic: expected one of"):
        one(folder, tmp_path / "net.json", arithmetic="float8")


def test_a_run_in_another_arithmetic_is_certified_in_it(folder, tmp_path):
    opened = open_model(str(folder.path))
    opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, arithmetic="bfloat16"))
    for arithmetic, expected in ((None, "bfloat16"), ("float32", "float32")):
        request = BoundRequest(samples=2, arithmetic=arithmetic)
        assert certify_one(opened, tmp_path / "net.json", request, console=console()).arithmetic.name == expected


def test_a_foreign_file_is_refused_before_anything_is_computed(folder, tmp_path, monkeypatch):
    (tmp_path / "net.json").write_text("mine")
    monkeypatch.setattr(certify_stage, "certify", lambda *_, **__: pytest.fail("computed in vain"))
    with pytest.raises(CertificateError, match=r"net.json: is there already and is no certificate"):
        one(folder, tmp_path / "net.json")
    assert (tmp_path / "net.json").read_text() == "mine"


def test_every_finished_cell_gets_its_certificate_and_keeps_it(cells):
    lines = in_cells(cells)
    keys = [RunFolder.of(cells, cell).id for cell in SPEC.cells()]
    assert [line.split(":")[0] for line in lines] == keys
    assert all("net.json: 60 samples, " in line for line in lines)
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*/net.json")}
    assert len(before) == 2
    assert all("net.json is kept: 60 samples, " in line for line in in_cells(cells))
    assert {path: path.stat().st_mtime_ns for path in cells.glob("*/net.json")} == before
    for cell in SPEC.cells():
        samples = RunFolder.of(cells, cell).read_samples()
        found = load_certificate(RunFolder.of(cells, cell).path / "net.json")
        assert [row.prediction for row in found.samples] == samples["prediction"].tolist()
        assert [row.radius for row in found.samples] == pytest.approx(samples["radius_l2"].tolist())


def test_a_certificate_of_another_model_or_of_other_settings_is_made_anew(cells):
    in_cells(cells)
    first, second = (RunFolder.of(cells, cell) for cell in SPEC.cells())
    weights = load_file(first.checkpoint_path)
    key = next(key for key in weights if key.endswith("bias"))
    weights[key].view(-1)[0] += 1.0
    save_file(weights, first.checkpoint_path)
    old = load_certificate(second.path / "net.json")
    one(second, second.path / "net.json", arithmetic="real")
    assert all("net.json: 60 samples, " in line for line in in_cells(cells))
    assert load_certificate(second.path / "net.json") == old
    dataclasses.replace(old, samples=old.samples[:9]).save(second.path / "net.json")
    first_line, second_line = in_cells(cells)
    assert "is kept" in first_line
    assert "net.json: 60 samples, " in second_line


def test_cells_that_are_not_finished_are_left_alone(cells):
    RunFolder.of(cells, SPEC.cells()[1]).summary_path.unlink()
    assert len(in_cells(cells)) == 1
    assert len(list(cells.glob("*/net.json"))) == 1


def test_a_cell_that_cannot_be_certified_is_named_after_the_others_are_done(cells):
    first, second = (RunFolder.of(cells, cell) for cell in SPEC.cells())
    (first.path / "net.json").write_text("mine")
    with pytest.raises(ValueError, match=rf"^cell {first.id}: .*net.json: is there already and is no certificate"):
        in_cells(cells)
    assert load_certificate(second.path / "net.json").samples


def test_certificates_are_made_after_the_run_and_for_the_cells_that_did_not_fail(cells):
    with certifying(SPEC, cells, None, data_root=None, console=console()):
        pass
    assert not list(cells.glob("*/net.json"))
    with certifying(SPEC, cells, "net.json", data_root=None, console=console()):
        assert not list(cells.glob("*/net.json"))
    assert len(list(cells.glob("*/net.json"))) == 2
    for error, count in (
        (CellError("one failed"), 2),
        (ValueError("a bad setting"), 0),
        (KeyboardInterrupt("stop"), 0),
    ):
        for path in cells.glob("*/net.json"):
            path.unlink()
        with (
            pytest.raises(type(error), match=str(error)),
            certifying(SPEC, cells, "net.json", data_root=None, console=console()),
        ):
            raise error
        assert len(list(cells.glob("*/net.json"))) == count


@pytest.mark.parametrize("name", ["net", "a/net.json", "../net.json", ".net.json", "config.json", "summary.json", ""])
def test_names_that_cannot_be_are_refused(name):
    with pytest.raises(ConfigError, match=r"certificate: expected a file name without a folder that ends in .json"):
        check_name(name)
    check_name("net.json")
    with pytest.raises(ConfigError, match=r"certificate: made when the cells are finished"):
        check_name("net.json", wait=False)


def test_a_certificate_is_verified_against_its_model_and_data(folder, finished, tmp_path):
    one(folder, tmp_path / "net.json", samples=3)
    shown = console()
    assert verify_one(tmp_path / "net.json", open_model(str(folder.path)), console=shown).valid
    assert text(shown).startswith("valid: ")
    other = RunFolder.of(finished, SPEC.cells()[1])
    shown = console()
    assert not verify_one(tmp_path / "net.json", open_model(str(other.path)), console=shown).valid
    assert text(shown).startswith("invalid: ")
    assert len(text(shown).splitlines()) == 1


def test_a_certificate_of_samples_that_the_data_do_not_have_is_refused(folder, tmp_path):
    made = one(folder, tmp_path / "net.json", samples=3)
    last = dataclasses.replace(made.samples[-1], index=60)
    dataclasses.replace(made, samples=(*made.samples[:-1], last)).save(tmp_path / "net.json")
    shown = console()
    assert not verify_one(tmp_path / "net.json", open_model(str(folder.path)), console=shown).valid
    assert "60" in text(shown)
    with pytest.raises(CertificateError, match=r"none.json: cannot be read"):
        verify_one(tmp_path / "none.json", open_model(str(folder.path)), console=console())


def test_a_models_state_is_left_as_it_was(folder, tmp_path):
    opened = open_model(str(folder.path))
    before = {key: value.clone() for key, value in opened.model.state_dict().items()}
    random = torch.get_rng_state()
    certify_one(opened, tmp_path / "a.json", BoundRequest(samples=2), console=console())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[key], value) for key, value in opened.model.state_dict().items())
    with contextlib.suppress(StopIteration):
        assert next(opened.model.parameters()).requires_grad

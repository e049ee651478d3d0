import dataclasses
import hashlib
import json
import os
from pathlib import Path
from random import Random

import jsonschema
import pandas as pd
import pytest
from certificates import certificate, matrix, norm_claim, samples
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import small_disk

from speccert.certify.certificate_file import load_certificate
from speccert.certify.claims import CertificateError
from speccert.certify.sample_claims import samples_digest

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "certificate.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FLOATS = st.floats(min_value=0.0, allow_nan=False, allow_infinity=True)


def content(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize(("count", "files"), [(1, 1), (200, 1), (201, 2)])
def test_round_trip(norm, count, files, tmp_path):
    made = certificate(count, norm)
    assert made.save(tmp_path / "below" / "net.json") == tmp_path / "below" / "net.json"
    assert load_certificate(tmp_path / "below" / "net.json") == made
    assert len(list((tmp_path / "below").iterdir())) == files
    VALIDATOR.validate(content(tmp_path / "below" / "net.json"))


@settings(max_examples=30, deadline=None)
@given(
    upper=FLOATS,
    radius=FLOATS,
    margin=st.floats(max_value=1e308, allow_nan=False),
    text=st.text(st.characters(exclude_categories=["C", "Z"])),
)
def test_numbers_and_texts_are_kept_to_the_last_bit(tmp_path_factory, upper, radius, margin, text):
    path = tmp_path_factory.mktemp("any") / "net.json"
    row = dataclasses.replace(samples(1)[0], margin=margin, radius=radius)
    bounds = {"l2": norm_claim(upper, end=text)}
    made = certificate(speccert=text, lipschitz=upper, pairwise=matrix(1.0), bounds=bounds, samples=(row,))
    if text != "fc":
        made.save(path)
        found = load_certificate(path)
        assert found == made
        assert str(found.samples[0].margin) == str(margin)  # -0.0 is not 0.0
        VALIDATOR.validate(content(path))


def test_the_parquet_file_is_for_everybody_and_bound_to_the_json_file(tmp_path):
    made = certificate(300)
    made.save(tmp_path / "net.json")
    side = tmp_path / "net.samples.parquet"
    frame = pd.read_parquet(side)
    assert list(frame) == ["index", "input", "label", "prediction", "margin", "radius"]
    assert frame["radius"].tolist() == [row.radius for row in made.samples]
    assert frame["input"][7].hex() == made.samples[7].input.removeprefix("sha256:")
    stored = content(tmp_path / "net.json")["samples"]
    assert stored["file"] == side.name
    assert stored["sha256"] == "sha256:" + hashlib.sha256(side.read_bytes()).hexdigest()


def test_the_digest_of_samples_is_the_same_in_both_forms_and_shows_every_change(tmp_path):
    many = samples(201)
    certificate(201).save(tmp_path / "many.json")
    assert content(tmp_path / "many.json")["samples"]["digest"] == samples_digest(many)
    row = many[100]
    changes = {"index": 201, "input": many[99].input, "label": 2, "prediction": 0, "margin": -1.0, "radius": 0.5}
    changed = [(*many[:100], dataclasses.replace(row, **{key: value}), *many[101:]) for key, value in changes.items()]
    found = {samples_digest(rows) for rows in (many, many[:-1], many[1:], *changed)}
    assert len(found) == 9


def test_files_can_be_moved_together(tmp_path):
    made = certificate(300)
    made.save(tmp_path / "net.json")
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "net.json", tmp_path / "net.samples.parquet"):
        path.rename(tmp_path / "there" / path.name)
    assert load_certificate(tmp_path / "there" / "net.json") == made


def edited(change, count=3, norm="linf"):
    """A certificate's text after `change` has been at its content."""

    def make(path):
        certificate(count, norm).save(path)
        found = content(path)
        found = change(found) or found
        path.write_text(json.dumps(found), encoding="utf-8")

    return make


def replaced(*keys, value):
    def change(found):
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return edited(change)


def without(*keys):
    def change(found):
        for key in keys[:-1]:
            found = found[key]
        del found[keys[-1]]

    return edited(change)


def written(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(path):
    certificate().save(path)
    path.write_text(path.read_text(encoding="utf-8")[:-100], encoding="utf-8")


def literal(old, new):
    def make(path):
        certificate().save(path)
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return make


def side(change):
    def make(path):
        certificate(300).save(path)
        change(path.with_name("net.samples.parquet"))

    return make


def other_samples(rehash):
    """Rows that are others than the digest says, with or without a fitting hash of the Parquet file."""

    def make(path):
        certificate(300).save(path)
        parquet = path.with_name("net.samples.parquet")
        frame = pd.read_parquet(parquet)
        frame.loc[5, "radius"] = 2.0
        frame.to_parquet(parquet)
        if rehash:
            found = content(path)
            found["samples"]["sha256"] = "sha256:" + hashlib.sha256(parquet.read_bytes()).hexdigest()
            path.write_text(json.dumps(found))

    return make


RUN = ("bounds", "l2", "runs", 0)
ROW = ("samples", "rows", 1)
RELAXATION = ("relaxations", 0)
DAMAGES = {
    "missing": (lambda path: None, "net.json: cannot be read (No such file or directory)"),
    "a folder": (lambda path: path.mkdir(), "net.json: cannot be read (Is a directory)"),
    "empty": (written(""), "expected a certificate in JSON"),
    "cut": (cut, "expected a certificate in JSON"),
    "binary": (written(b"\xff\xfe\x00"), "a file that is no UTF-8 text"),
    "more behind the end": (literal("\n}\n", "\n}\n{}"), "expected a certificate in JSON (Extra data"),
    "a list": (written("[]"), "expected a certificate of format 'speccert-certificate', got 'list'"),
    "another format": (replaced("format", value="other"), "of format 'speccert-certificate', got 'other'"),
    "a later version": (replaced("version", value=3), "expected version 2 of the format, got 3"),
    "an earlier version": (replaced("version", value=1), "expected version 2 of the format, got 1"),
    "a version of another type": (replaced("version", value=True), "expected version 2 of the format, got True"),
    "an unknown key": (replaced("extra", value=1), "unknown key 'extra'; expected format, version"),
    "an unknown key inside": (replaced(*RUN, "extra", value=1), "bounds.l2.runs[0]: unknown key 'extra'"),
    "a missing key": (without("lipschitz"), "missing key 'lipschitz'"),
    "a missing key inside": (without("model", "dtype"), "model: missing key 'dtype'"),
    "a key twice": (literal('"norm": "l2"', '"norm": "l2", "norm": "l1"'), "key 'norm' appears twice"),
    "NaN": (literal('"lipschitz": "inf"', '"lipschitz": NaN'), "NaN is no number"),
    "infinity": (literal('"lipschitz": "inf"', '"lipschitz": Infinity'), "Infinity is no number"),
    "too large a number": (literal('"lipschitz": "inf"', '"lipschitz": 1e999'), "1e999 is too large a number"),
    "too large an integer": (replaced("lipschitz", value=10**400), "lipschitz: expected a number, got 1000"),
    "thousands of digits": (literal('"lipschitz": "inf"', '"lipschitz": 1' + "0" * 5000), "4300"),
    "an integer that no float holds": (
        replaced("lipschitz", value=2**53 + 1),
        "expected a number, got 9007199254740993",
    ),
    "a negative bound": (replaced("lipschitz", value=-1.0), 'lipschitz: expected a number >= 0 or "inf", got -1.0'),
    "a bound as a text": (replaced("lipschitz", value="1.0"), 'lipschitz: expected a number, got "1.0"'),
    "a truth value for a number": (replaced("lipschitz", value=True), "lipschitz: expected a number, got true"),
    "an infinite margin": (
        replaced(*ROW, "margin", value="inf"),
        'samples.rows[1].margin: expected a number, got "inf"',
    ),
    "a negative radius": (replaced(*ROW, "radius", value=-0.5), "samples.rows[1].radius: expected a number >= 0"),
    "a class that is none": (replaced(*ROW, "label", value=3), "samples.rows[1]: expected classes 0..2, got label 3"),
    "a label as a float": (
        replaced(*ROW, "label", value=1.0),
        "samples.rows[1].label: expected an integer >= 0, got 1.0",
    ),
    "an index twice": (replaced(*ROW, "index", value=0), "samples.rows[1]: expected an index above 0, got 0"),
    "too large an index": (
        replaced(*ROW, "index", value=2**63),
        "index: expected an integer >= 0, got 9223372036854775808",
    ),
    "another radius": (replaced(*ROW, "radius", value=0.5), "samples.digest: samples.rows holds other samples"),
    "another count": (
        replaced("samples", "count", value=4),
        "samples.count: expected 3 as there are in samples.rows, got 4",
    ),
    "no samples": (
        replaced("samples", "rows", value=[]),
        "samples.rows: expected a list of at least 1 entries, got []",
    ),
    "a digest in capitals": (
        replaced("model", "digest", value="sha256:" + "A" * 64),
        'model.digest: expected "sha256:" and 64',
    ),
    "no digest": (replaced(*ROW, "input", value="md5:0"), "samples.rows[1].input: expected"),
    "one class": (replaced("model", "classes", value=1), "model.classes: expected an integer >= 2, got 1"),
    "a shape with a zero": (
        replaced("model", "input_shape", value=[1, 0]),
        "model.input_shape[1]: expected an integer >= 1",
    ),
    "another norm": (replaced("norm", value="l3"), 'norm: expected "l2" or "linf" or "l1", got "l3"'),
    "no bounds of the norm": (without("bounds", "linf"), "bounds: expected l2 and linf, got l2"),
    "bounds of a norm too many": (
        edited(lambda f: f["bounds"].update(l1=f["bounds"]["l2"])),
        "bounds: expected l2 and linf",
    ),
    "bounds of no norm": (
        edited(lambda f: f["bounds"].update(l3=f["bounds"]["l2"])),
        "bounds: expected an object of norms",
    ),
    "a small matrix": (replaced("pairwise", value=[[0.0, 1.0], [1.0, 0.0]]), "pairwise: expected 3 rows of 3 numbers"),
    "a ragged matrix": (
        replaced("bounds", "linf", "pairwise", 1, value=[0.0]),
        "bounds.linf.pairwise: expected 3 rows of 3",
    ),
    "a relaxation in a norm too many": (
        replaced(*RELAXATION, "norm", value="l1"),
        "relaxations[0].norm: expected l2 or linf, got l1",
    ),
    "a class that a relaxation can't have": (
        replaced(*RELAXATION, "pair", value=[0, 3]),
        "relaxations[0].pair: expected two of the classes 0..2, got [0, 3]",
    ),
    "a class and itself": (replaced(*RELAXATION, "pair", value=[1, 1]), "pair: expected two of the classes"),
    "three classes": (replaced(*RELAXATION, "pair", value=[0, 1, 2]), "relaxations[0].pair: expected two classes"),
    "a multiplier below zero": (
        replaced(*RELAXATION, "multipliers", 0, 1, value=-0.5),
        "relaxations[0].multipliers[0][1]: expected a number > 0, got -0.5",
    ),
    "a multiplier of zero": (replaced(*RELAXATION, "multipliers", 0, 1, value=0.0), "expected a number > 0, got 0.0"),
    "an infinite multiplier": (
        replaced(*RELAXATION, "multipliers", 0, 1, value="inf"),
        'multipliers[0][1]: expected a number, got "inf"',
    ),
    "a matrix of multipliers": (
        replaced(*RELAXATION, "multipliers", 0, 1, value=[1.0, 0.5]),
        "relaxations[0].multipliers[0][1]: expected a number, got [1.0, 0.5]",
    ),
    "a multiplier of two numbers": (
        replaced(*RELAXATION, "couplings", value=[]),
        "relaxations[0]: unknown key 'couplings'",
    ),
    "a relaxed bound of zero": (replaced(*RELAXATION, "upper", value=0), "relaxations[0].upper: expected a number > 0"),
    "weights that are none": (
        replaced("relaxations", 1, "weights", 3, value=-1.0),
        "weights[3]: expected a number > 0",
    ),
    "no list of relaxations": (replaced("relaxations", value={}), "relaxations: expected a list, got {}"),
    "a run twice": (replaced(*RUN, "end", value="fc"), "bounds.l2.runs: 'fc' appears twice"),
    "an anchor twice": (
        replaced("bounds", "l2", "constants", 0, "node", value="act"),
        "constants: 'act' appears twice",
    ),
    "an assumption twice": (replaced("assumptions", 0, "id", value="two"), "assumptions: 'two' appears twice"),
    "no sides": (replaced(*RUN, "torus", value=None), "bounds.l2.runs[0].torus: expected sides for the method 'torus'"),
    "sides for nothing": (replaced(*RUN, "method", value="dense"), "bounds.l2.runs[0].torus: expected sides"),
    "a twist that is none": (replaced(*RUN, "torus", 0, 2, value=0.25), "torus[0]: expected 0.0 or 0.5, got 0.25"),
    "half a side": (replaced(*RUN, "torus", 0, value=[3, 1]), "torus[0]: expected [side, stride, twist]"),
    "a path": (
        edited(lambda f: f["samples"].update(file="../net.samples.parquet"), 300),
        "samples.file: expected the plain name",
    ),
    "both forms": (edited(lambda f: f["samples"].update(rows=[{}]), 300), "samples: unknown key 'file'"),
    "no Parquet file": (side(Path.unlink), "net.samples.parquet: cannot be read (No such file"),
    "a cut Parquet file": (
        side(lambda p: p.write_bytes(p.read_bytes()[:-9])),
        "samples.sha256: net.samples.parquet has another",
    ),
    "another Parquet file": (other_samples(rehash=False), "samples.sha256: net.samples.parquet has another content"),
    "others in it": (other_samples(rehash=True), "net.samples.parquet: expected the columns index int64, input"),
    "nested too deeply": (written("[" * 100_000), "expected a certificate in JSON"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused_in_one_line(damage, message, tmp_path):
    path = tmp_path / "net.json"
    damage(path)
    with pytest.raises(CertificateError) as raised:
        load_certificate(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_pieces_nested_too_deeply_are_refused(tmp_path):
    def deep(found):
        piece = found["bounds"]["l2"]["runs"][1]
        for _ in range(250):
            inner = {key: value for key, value in piece.items() if key not in ("end", "parts", "lower")}
            piece["pieces"] = [{**inner, "pieces": []}]
            piece = piece["pieces"][0]

    edited(deep)(tmp_path / "net.json")
    with pytest.raises(CertificateError, match=r"nested too deeply"):
        load_certificate(tmp_path / "net.json")


@pytest.mark.parametrize("other", ["not mine", "{}", '{"format": "something"}', "", "[1, 2"])
def test_a_file_that_is_no_certificate_is_not_overwritten(other, tmp_path):
    path = tmp_path / "net.json"
    path.write_text(other)
    with pytest.raises(
        CertificateError, match=r"net.json: is there already and is no certificate; nothing was written"
    ):
        certificate(300).save(path)
    assert path.read_text() == other
    assert list(tmp_path.iterdir()) == [path]


def test_a_parquet_file_of_somebody_else_is_not_overwritten(tmp_path):
    side = tmp_path / "net.samples.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(side)
    before = side.read_bytes()
    with pytest.raises(CertificateError, match=r"net.samples.parquet: is there already; nothing was written"):
        certificate(300).save(tmp_path / "net.json")
    assert side.read_bytes() == before
    certificate(3).save(tmp_path / "net.json")
    assert side.read_bytes() == before


def test_a_certificate_is_replaced(tmp_path):
    for count in (300, 250, 3, 400):
        made = certificate(count)
        made.save(tmp_path / "net.json")
        assert load_certificate(tmp_path / "net.json") == made


@pytest.mark.parametrize("target", ["file/net.json", ""])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(target, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CertificateError) as raised:
        certificate(300).save(tmp_path / target)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_certificate_and_nothing_half_written(tmp_path):
    old, new = certificate(300), certificate(20_000)
    with small_disk(tmp_path, 256 * 1024):
        old.save(tmp_path / "net.json")
        with pytest.raises(CertificateError, match=r"cannot be written \(No space left on device\)"):
            new.save(tmp_path / "net.json")
        assert load_certificate(tmp_path / "net.json") == old
        assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.samples.parquet"]


def test_the_json_file_comes_last(tmp_path, monkeypatch):
    order = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append(Path(to).name) or replace(self, to))
    monkeypatch.setattr(os, "fsync", lambda file: order.append("flushed"))
    certificate(300).save(tmp_path / "net.json")
    assert order == ["flushed", "flushed", "net.samples.parquet", "net.json"]


def test_a_changed_byte_never_ends_in_anything_but_one_line(tmp_path):
    path, random = tmp_path / "net.json", Random(0)
    made = certificate(4, "linf")
    made.save(path)
    original, messages = path.read_bytes(), []
    for _ in range(400):
        damaged = bytearray(original)
        damaged[random.randrange(len(damaged))] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            found = load_certificate(path)
        except CertificateError as error:
            messages.append(str(error))
        else:
            assert samples_digest(found.samples) == samples_digest(made.samples)
    assert [message for message in messages if "\n" in message] == []

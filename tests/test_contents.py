import hashlib
import os
import sys

import numpy as np
import pytest

from speccert.experiments.config import CellConfig, ConfigError
from speccert.experiments.contents import check_contents, content_digest, contents_digest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with data, weights and modules, on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / "weights.pt").write_bytes(b"weights")
    (tmp_path / "own_net.py").write_text("def build(): pass\n")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "net.py").write_text("def build(): pass\n")
    (tmp_path / "own_broken").mkdir()
    (tmp_path / "own_broken" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    (tmp_path / "own_broken" / "net.py").write_text("")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", [None, "digits", "mnist", "mlp", "none.npz", "no_module:build", "own_broken.net:f", "x:y"]
)
def test_what_names_no_file_has_no_content(place, name):
    assert content_digest(name) is None


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("data.npz", "data.npz"),
        ("./data.npz", "data.npz"),
        ("own_net:build", "own_net.py"),
        ("own_package.net:build", "own_package/net.py"),
        ("own_package:build", "own_package/__init__.py"),
    ],
)
def test_the_digest_is_that_of_the_file(place, name, path):
    assert content_digest(name) == hashlib.sha256((place / path).read_bytes()).hexdigest()[:16]


def test_a_relative_name_is_that_of_the_current_folder(place, monkeypatch):
    before = content_digest("data.npz")
    (place / "other").mkdir()
    (place / "other" / "data.npz").write_bytes(b"x" * (place / "data.npz").stat().st_size)
    monkeypatch.chdir(place / "other")
    assert content_digest("data.npz") != before


def test_a_change_is_seen_even_at_the_same_size_and_time(place):
    before, found = content_digest("data.npz"), os.stat("data.npz")
    (place / "data.npz").write_bytes(b"x" * found.st_size)
    os.utime("data.npz", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert content_digest("data.npz") != before


CONFIGS = {
    "dataset": ("data.npz", "data.npz"),
    "model": ("own_net:build", "own_net.py"),
    "checkpoint": ("weights", "weights"),  # neither a dot nor a slash in it
}


@pytest.mark.parametrize("key", CONFIGS)
def test_changed_content_under_an_old_name_is_refused_by_name(place, key):
    name, path = CONFIGS[key]
    config = CellConfig(**{key: name})
    recorded = contents_digest(config)
    assert recorded.startswith(f"{key}=")
    check_contents(config, recorded, place / "cell")
    (place / path).write_text("changed")
    with pytest.raises(ConfigError, match=rf"cell: computed from other content of {key} {name}; give changed"):
        check_contents(config, recorded, place / "cell")


def test_only_what_has_changed_is_named(place):
    config = CellConfig(**{key: name for key, (name, _) in CONFIGS.items()})
    recorded = contents_digest(config)
    assert [part.split("=")[0] for part in recorded.split()] == ["dataset", "model", "checkpoint"]
    (place / "weights").write_text("changed")
    with pytest.raises(ConfigError, match=r"other content of checkpoint weights; "):
        check_contents(config, recorded, place)
    (place / "weights").unlink()  # nothing is computed from it any more
    check_contents(config, recorded, place)


@pytest.mark.parametrize("recorded", [None, "", float("nan"), "0123456789abcdef", 3])
def test_what_was_not_recorded_is_not_held_against_it(place, recorded):
    check_contents(CellConfig(dataset="data.npz"), recorded, place)


def test_a_cell_of_built_in_names_has_no_content():
    assert contents_digest(CellConfig()) is None

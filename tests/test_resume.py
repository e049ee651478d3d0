import pickle

import pytest
import torch

from speccert.experiments.resume import ResumeFile
from speccert.experiments.store import StoreError


def test_state_comes_back_as_it_was(tmp_path):
    file = ResumeFile(tmp_path / "resume.pt", "abc")
    state = {"w": torch.rand(3), "nested": {"rows": [{"a": 1.5, "b": float("nan")}]}, "count": 3}
    file.write(state)
    found = file.read()
    assert torch.equal(found["w"], state["w"])
    assert found["nested"]["rows"][0]["a"] == 1.5
    assert found["nested"]["rows"][0]["b"] != found["nested"]["rows"][0]["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["resume.pt"]
    file.remove()
    file.remove()
    assert file.read() is None


def test_a_write_that_fails_leaves_the_old_state(tmp_path):
    file = ResumeFile(tmp_path / "resume.pt", "abc")
    file.write({"count": 1})
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        file.write({"count": 2, "bad": lambda: None})
    assert file.read() == {"count": 1}


@pytest.mark.parametrize("content", [b"", b"no torch file", b"cut"])
def test_a_damaged_file_is_refused(tmp_path, content):
    file = ResumeFile(tmp_path / "resume.pt", "abc")
    if content == b"cut":
        file.write({"w": torch.rand(100)})
        content = file.path.read_bytes()[:200]
    file.path.write_bytes(content)
    with pytest.raises(StoreError, match=r"resume.pt: damaged; delete it to start over"):
        file.read()


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    torch.save(Bomb(), tmp_path / "resume.pt")
    with pytest.raises(StoreError, match="damaged"):
        ResumeFile(tmp_path / "resume.pt", "abc").read()


def test_a_file_of_another_run_is_refused(tmp_path):
    ResumeFile(tmp_path / "resume.pt", "abc").write({})
    with pytest.raises(StoreError, match="expected the state of run xyz"):
        ResumeFile(tmp_path / "resume.pt", "xyz").read()


def test_a_file_of_another_format_is_refused(tmp_path):
    torch.save({"format": 1, "owner": "abc", "state": {}}, tmp_path / "resume.pt")
    with pytest.raises(StoreError, match="expected the state of run abc; delete it to start over"):
        ResumeFile(tmp_path / "resume.pt", "abc").read()

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from studies import user_module
from torch import nn

from speccert.certify import certified_radii, lipschitz
from speccert.experiments.bound_stage import BoundRequest, bound_one
from speccert.experiments.checkpoints import save_checkpoint
from speccert.experiments.config import BOUNDS, ConfigError
from speccert.experiments.stages import open_model

MODELS = """
from torch import nn
def linear(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def deep(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(),
        nn.Linear(12, num_classes))
"""


def console(width=100):
    return Console(file=io.StringIO(), width=width, color_system=None)


def text(shown):
    return shown.file.getvalue()


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of the user's, `bound_models`, in the current folder."""
    return user_module(tmp_path, monkeypatch, "bound_models", MODELS)


@pytest.fixture
def deep(models):
    """Three layers of random weights on digits, whose labels are its own predictions."""
    opened = open_model("bound_models:deep", dataset="digits")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in opened.model:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
                layer.bias.zero_()
        test = dataclasses.replace(opened.data.test, y=opened.model(opened.data.test.x).argmax(1))
    return dataclasses.replace(opened, data=dataclasses.replace(opened.data, test=test))


def rows(shown, first):
    """The cells of the lines of tables that begin with a word."""
    lines = ([cell.strip() for cell in line.strip("│").split("│")] for line in text(shown).splitlines())
    return [cells for cells in lines if cells[0] == first]


def medians(shown):
    words = text(shown).split()
    return [float(words[at + 1]) for at, word in enumerate(words) if word == "median"]


def test_the_bound_of_a_users_linear_model_is_its_norm(models):
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    save_checkpoint(models / "weights.safetensors", {"1.weight": weight, "1.bias": torch.zeros(10)})
    shown = console()
    opened = open_model("bound_models:linear", checkpoint=models / "weights.safetensors", dataset="digits")
    found = bound_one(opened, BoundRequest(), console=shown)
    exact = float(torch.linalg.matrix_norm(weight.double(), 2))
    assert exact <= found.upper <= exact * (1 + 1e-6)
    assert found.lower == pytest.approx(exact, rel=1e-9)
    pairs = torch.cdist(weight.double(), weight.double())
    assert (found.pairwise >= pairs - 1e-9).all()
    smallest, largest = f"{pairs[pairs > 0].min():.6g}", f"{pairs.max():.6g}"
    assert f"Lipschitz constant (l2): {exact:.6g} <= L <= {exact:.6g} (tightness 1, product)" in text(shown)
    assert f"largest pair of logits: {largest} <= L <= {largest} (tightness 1)" in text(shown)
    assert f"all pairs: {smallest} to {largest} <= L <= {smallest} to {largest} (tightness 1 to 1)" in text(shown)
    assert rows(shown, "product") == []
    linf = bound_one(opened, BoundRequest(norm="linf"), console=console())
    assert linf.upper >= float(weight.double().abs().sum(1).max())


@pytest.mark.parametrize("method", ["lipsdp", "lipsdp-layer", "lipsdp-first-order", "auto"])
def test_a_row_for_each_method(method, deep):
    shown = console()
    found = bound_one(deep, BoundRequest(method=method, budget="2s"), console=shown)
    product = lipschitz(deep.model, deep.data.input_shape)
    ((_, upper, tightness, pair, *_, proof, _),) = rows(shown, "product")
    assert (upper, pair, proof) == (f"{product.upper:.6g}", f"{product.pairwise.max():.6g}", "proved")
    assert tightness == f"{product.upper / found.lower:.4g}"
    assert found.upper < product.upper
    for attempt in found.attempts:
        told = f"{attempt.upper:.6g}" if attempt.proved else "-"
        assert [row[1] for row in rows(shown, attempt.method)] == [told]
    assert min(one.upper for one in found.attempts) == found.upper
    told = f"{found.lower:.6g} <= L <= {found.upper:.6g} (tightness {found.upper / found.lower:.4g}, {method})"
    assert told in text(shown)
    assert all(len(line) <= 100 for line in text(shown).splitlines())


def test_local_radii_stand_beside_global_ones(deep):
    shown = console()
    bound_one(deep, BoundRequest(method="local", budget="2", samples=30), console=shown)
    assert "certified l2 radii of the first 30 test samples (30 classified correctly):" in text(shown)
    whole, local = medians(shown)
    x, y = deep.data.test.x[:30], deep.data.test.y[:30]
    product = float(certified_radii(deep.model, x, y).median())
    assert product * (1 - 1e-3) <= whole < local


def test_local_radii_in_another_arithmetic(deep):
    found = []
    for arithmetic in ("real", "bfloat16"):
        shown = console()
        request = BoundRequest(method="local", budget="1", samples=5, arithmetic=arithmetic)
        bound_one(deep, request, console=shown)
        found.append(medians(shown))
    assert found[1][0] < found[0][0]
    assert found[1][1] < found[0][1]


def test_bounds_print_without_broken_lines(deep):
    shown = console(60)
    bound_one(deep, BoundRequest(method="lipsdp-first-order", budget="1"), console=shown)
    (line,) = (line for line in text(shown).splitlines() if line.startswith("Lipschitz constant"))
    assert line.endswith("lipsdp-first-order)")
    assert "…" not in text(shown)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sdp"}, f"method: expected one of {', '.join(BOUNDS)}; got 'sdp'"),
        ({"norm": "fro"}, "norm: expected one of l2, linf, l1; got 'fro'"),
        ({"budget": "two"}, "budget: expected seconds > 0, such as 90, 90s or 2m; got 'two'"),
        ({"budget": "0m"}, "budget: expected seconds > 0, such as 90, 90s or 2m; got '0m'"),
        ({"solver": "simplex", "method": "lipsdp"}, "solver: expected one of built-in, clarabel, scs, mosek"),
        ({"solver": "scs", "method": "auto"}, "solver: for the methods lipsdp and lipsdp-layer; got the method auto"),
        ({"norm": "fro", "budget": "x"}, "got 'fro'; budget: expected"),
    ],
)
def test_bad_requests_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError) as raised:
        BoundRequest(**settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("samples", [0, 361])
def test_samples_that_are_not_there_are_refused_before_anything_is_computed(samples, deep, monkeypatch):
    monkeypatch.setattr("speccert.experiments.bound_stage.lipschitz", lambda *_, **__: pytest.fail("computed in vain"))
    with pytest.raises(ConfigError, match=rf"samples: expected 1 to \d+, .*; got {samples}"):
        bound_one(deep, BoundRequest(method="local", samples=samples), console=console())


def test_durations_have_units():
    assert [BoundRequest(budget=text).seconds for text in ("90", "90s", "2m", "1.5m")] == [90.0, 90.0, 120.0, 90.0]

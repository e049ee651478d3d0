import ast
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import speccert.certify
from speccert.certify import Rounding, certify, register_rule
from speccert.certify.certificate_file import load_certificate
from speccert.certify.checker import verify
from speccert.certify.checker.network import read, traced
from speccert.models import GroupSort, Householder, MaxMin, Normalize, Residual

BOUND_MAKERS = {
    "linear", "convolution", "torus", "grams", "spectral", "rules", "layer_rules", "walk", "lipschitz", "rounding",
    "rounding_rules", "local_errors", "deviation", "radii", "certifier", "arithmetic", "execution", "jacobian", "power",
    "certificate", "neurons", "slopes", "inequality", "multipliers", "sdp", "primal_dual", "interior_point", "local",
    "local_slopes", "preactivations", "edges",
}  # fmt: skip


def _imports(path):
    """The files of the package that one of its files imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            yield from (folder / f"{name}.py" for name in names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.module.startswith("speccert")
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("speccert") for alias in node.names)


def test_the_checker_imports_nothing_that_makes_bounds():
    folder = Path(speccert.certify.__file__).parent
    seen, left = set(), set((folder / "checker").glob("*.py"))
    while left:
        path = left.pop()
        seen.add(path)
        left |= set(_imports(path)) - seen
    names = {path.stem for path in seen if path.parent == folder}
    assert not names & BOUND_MAKERS
    assert {"graph", "digests", "certificate_file"} <= names
    assert all(path.parent in (folder, folder / "checker") for path in seen)


@pytest.fixture
def dense():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.rand(12, 3, 2, 2)
    y = model(x).argmax(1)
    y[4] = (y[4] + 1) % 3  # a misclassified sample
    return model, x, y, certify(model, x, y)


def _with(certificate, path, value):
    """The certificate with one field replaced; steps are names, positions and keys."""
    step, *rest = path
    if isinstance(certificate, tuple):
        changed = value if not rest else _with(certificate[step], rest, value)
        return (*certificate[:step], changed, *certificate[step + 1 :])
    if isinstance(certificate, dict):
        return {**certificate, step: value if not rest else _with(certificate[step], rest, value)}
    inner = value if not rest else _with(getattr(certificate, step), rest, value)
    return dataclasses.replace(certificate, **{step: inner})


def _get(certificate, path):
    for step in path:
        certificate = certificate[step] if isinstance(certificate, tuple | dict) else getattr(certificate, step)
    return certificate


def test_an_honest_certificate_is_valid(dense, tmp_path):
    model, x, y, certificate = dense
    verdict = verify(certificate, model, x, y)
    assert verdict.valid
    assert verdict.claim == ""
    assert verdict.counts == {"runs": 3, "constants": 3, "samples": 12}
    assert verdict.message.startswith("valid: 12 of 12 samples, 11 with a radius > 0 in l2, float32 arithmetic")
    path = certificate.save(tmp_path / "net.json")
    assert verify(path, model, x, y) == verdict


@pytest.mark.parametrize("method", ["product", "auto"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_model_without_any_affine_layer(norm, method):
    model, x = nn.Sequential(nn.ReLU()).eval(), torch.rand(2, 4)
    verdict = verify(certify(model, x, norm=norm, method=method, budget=0.5), model, x)
    assert verdict.valid, verdict
    assert "0 norms and " in verdict.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bounds", "l2", "upper"), "x"),
        (("bounds", "l2", "runs"), None),
        (("bounds", "l2", "constants", 0), None),
        (("pairwise",), None),
        (("lipschitz",), None),
        (("samples", 0, "radius"), "x"),
        (("relaxations",), (None,)),
    ],
)
def test_values_of_a_wrong_type_are_refused(dense, path, value):
    model, x, y, certificate = dense
    verdict = verify(_with(certificate, path, value), model, x, y)
    assert not verdict.valid
    assert "\n" not in verdict.message


@pytest.mark.parametrize("arithmetic", ["real", "float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_every_arithmetic_and_norm(dense, norm, arithmetic):
    model, x, y, _ = dense
    verdict = verify(certify(model, x, y, norm=norm, arithmetic=arithmetic), model, x, y)
    assert verdict.valid, verdict.message


class Branches(nn.Module):
    """Sums and concatenations of like and unlike branches, constants, scalings, reshapes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(24, 4)
        self.register_buffer("shift", torch.rand(6))

    def forward(self, x):
        h = x - self.a(x) * 0.5 + self.shift + 0.1
        h = h + torch.relu(self.b(h))
        h = torch.cat([h, -h / 3], 1)
        h = torch.cat([torch.tanh(h), h], 1)
        return self.c(h.view(-1, 4, 6).flatten(1)) + 1.5


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.third, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        h = h + self.second(h)
        h = self.third(h) + torch.relu(self.second(h))
        return self.last(nn.functional.avg_pool2d(h, 6).flatten(1))


def _conv(mode, stride):
    layer = nn.Conv2d(2, 4, 3, stride=stride, padding=2, padding_mode=mode, groups=2, dilation=(1, 2))
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), (2, 5, 6)


NETS = {
    "branches": lambda: (Branches(), (6,)),
    "blocks": lambda: (Blocks(), (3, 6, 6)),
    **{f"{mode} stride {s}": lambda mode=mode, s=s: _conv(mode, s)
       for mode in ("zeros", "circular", "reflect", "replicate") for s in (1, 2)},
    "large torus": lambda: (
        nn.Sequential(Normalize([0.1, 0.2], [0.5, 2.0]), nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(),
                      nn.AvgPool2d(3, 2, 1), nn.Flatten(), nn.LazyLinear(3)), (2, 46, 48)),
    "large transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), MaxMin(), nn.MaxPool2d(3, 2),
                      nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.LazyLinear(3)), (2, 24, 24)),
    "linear residual": lambda: (
        nn.Sequential(Residual(nn.Conv2d(2, 2, 3, padding=1)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), (2, 5, 5)),
    "pools": lambda: (
        nn.Sequential(nn.Conv2d(1, 6, 4), nn.BatchNorm2d(6), GroupSort(3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2),
                      nn.AvgPool2d(2, 1, 1, ceil_mode=True, count_include_pad=False), nn.Flatten(), nn.LazyLinear(3)),
        (1, 11, 11)),
    "activations": lambda: (
        nn.Sequential(nn.Linear(5, 8), Householder(8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Softplus(), nn.Tanh(),
                      nn.ELU(), nn.Hardtanh(), nn.LeakyReLU(0.3), nn.Linear(8, 8), nn.Sigmoid(), nn.LogSigmoid(),
                      nn.Softsign(), nn.Softshrink(0.01), nn.Tanhshrink(), nn.ReLU6(), nn.GELU("tanh"),
                      nn.Linear(8, 3)), (5,)),
    "moves": lambda: (
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2), nn.ChannelShuffle(1),
                      nn.ZeroPad2d((1, 0, 2, 1)), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2)), (1, 6, 6)),
    "one and three axes": lambda: (
        nn.Sequential(nn.Conv1d(3, 6, 5, stride=2, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2),
                      nn.Unflatten(1, (1, 6, 1)), nn.Conv3d(1, 2, (3, 1, 3)), nn.Flatten(), nn.LazyLinear(4)), (3, 20)),
    "parametrized": lambda: (
        nn.Sequential(torch.nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.ReLU(),
                      torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))), (8,)),
    "double": lambda: (nn.Sequential(nn.Linear(9, 70), nn.ReLU(), nn.Linear(70, 66), nn.Tanh(),
                                     nn.Linear(66, 3)).double(), (9,)),
    "activation last": lambda: (nn.Sequential(nn.Linear(9, 4), nn.ReLU()), (9,)),
}  # fmt: skip


def _built(name):
    torch.manual_seed(3)
    model, shape = NETS[name]()
    x = torch.rand(3, *shape, dtype=torch.float64 if name == "double" else torch.float32)
    model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval(), x


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NETS)
def test_honest_certificates_of_many_networks_are_valid(name, norm):
    model, x = _built(name)
    verdict = verify(certify(model, x, norm=norm), model, x)
    assert verdict.valid, verdict.message


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["branches", "blocks", "activations", "moves", "large transposed"])
def test_rounded_networks_are_valid(name, arithmetic):
    model, x = _built(name)
    verdict = verify(certify(model, x, norm="l1", arithmetic=arithmetic), model, x)
    assert verdict.valid, verdict.message


def _less(value, share=1e-6):
    return value * (1 - share)


L2 = ("bounds", "l2")
TAMPERINGS = {
    "run lowered": ((*L2, "runs", 1, "upper"), _less, r"run _3 \(l2\)"),
    "run lowered a little": ((*L2, "runs", 2, "upper"), lambda v: _less(v, 1e-12), r"run _5 \(l2\)"),
    "run of another name": ((*L2, "runs", 1, "end"), lambda v: "_4", r"run _3 \(l2\)"),
    "run that is no number": ((*L2, "runs", 1, "upper"), lambda v: math.nan, r"run _3 \(l2\)"),
    "run below zero": ((*L2, "runs", 1, "upper"), lambda v: -v, r"run _3 \(l2\)"),
    "runs swapped": ((*L2, "runs"), lambda v: (v[1], v[0], v[2]), r"runs \(l2\)"),
    "run missing": ((*L2, "runs"), lambda v: v[:2], r"run _5 \(l2\)"),
    "run too many": ((*L2, "runs"), lambda v: (*v, dataclasses.replace(v[0], end="_0")), r"run _0 \(l2\)"),
    "run of other shapes": ((*L2, "runs", 1, "in_shape"), lambda v: (10,), r"run _3 \(l2\)"),
    "estimate above the bound": ((*L2, "runs", 1, "lower"), lambda v: v * 2, r"run _3 \(l2\)"),
    "pair of a class with itself": (("pairwise", 1, 1), lambda v: 1.0, "pairwise 1, 1"),
    "constant lowered": ((*L2, "constants", 1, "upper"), _less, r"constant _2 \(l2\)"),
    "constant of the input lowered": ((*L2, "constants", 0, "upper"), _less, r"constant input_1 \(l2\)"),
    "constant missing": ((*L2, "constants"), lambda v: v[:-1], r"constant _4 \(l2\)"),
    "constant too many": (
        (*L2, "constants"), lambda v: (*v, dataclasses.replace(v[0], node="_5")), r"constant _5 \(l2\)"),
    "last constant lowered": ((*L2, "last_constant"), _less, r"last constant \(l2\)"),
    "upper lowered": ((*L2, "upper"), _less, r"upper \(l2\)"),
    "pair of l2 lowered": ((*L2, "pairwise", 0, 2), _less, r"pairwise 0, 2 \(l2\)"),
    "pair lowered": (("pairwise", 2, 1), _less, "pairwise 2, 1"),
    "pair that is no number": (("pairwise", 2, 1), lambda v: math.nan, "pairwise 2, 1"),
    "pairs cut": (("pairwise",), lambda v: v[:2], "pairwise"),
    "lipschitz lowered": (("lipschitz",), _less, "lipschitz"),
    "margin raised": (("samples", 3, "margin"), lambda v: v + 1e-6, "margin 3"),
    "margin that is no number": (("samples", 3, "margin"), lambda v: math.nan, "margin 3"),
    "radius raised": (("samples", 7, "radius"), lambda v: v * (1 + 1e-6), "radius 7"),
    "radius infinite": (("samples", 7, "radius"), lambda v: math.inf, "radius 7"),
    "radius that is no number": (("samples", 7, "radius"), lambda v: math.nan, "radius 7"),
    "radius below zero": (("samples", 7, "radius"), lambda v: -v, "radius 7"),
    "radius of a misclassified sample": (("samples", 4, "radius"), lambda v: 1e-9, "radius 4"),
    "prediction changed": (("samples", 5, "prediction"), lambda v: (v + 1) % 3, "prediction 5"),
    "prediction that is no class": (("samples", 5, "prediction"), lambda v: 3, "label 5"),
    "label changed": (("samples", 6, "label"), lambda v: (v + 1) % 3, "label 6"),
    "index changed": (("samples", 11, "index"), lambda v: 12, "samples"),
    "index twice": (("samples", 2, "index"), lambda v: 1, "samples"),
    "input changed": (("samples", 2, "input"), lambda v: "sha256:" + 64 * "0", "input 2"),
    "samples swapped": (("samples",), lambda v: (v[1], v[0], *v[2:]), "samples"),
    "no samples": (("samples",), lambda v: (), "samples"),
    "arithmetic renamed": (("arithmetic", "name"), lambda v: "real", "arithmetic"),
    "unknown arithmetic": (("arithmetic", "name"), lambda v: "float8", "arithmetic"),
    "unit changed": (("arithmetic", "unit"), lambda v: v / 2, "arithmetic"),
    "accumulation changed": (("arithmetic", "accumulation"), lambda v: v / 2, "arithmetic"),
    "tiny changed": (("arithmetic", "tiny"), lambda v: 0.0, "arithmetic"),
    "huge changed": (("arithmetic", "huge"), lambda v: math.inf, "arithmetic"),
    "assumptions removed": (("assumptions",), lambda v: v[:1], "assumptions"),
    "assumption emptied": (("assumptions", 1, "text"), lambda v: " ", "assumptions"),
    "another model": (("model", "digest"), lambda v: "sha256:" + 64 * "1", "model digest"),
    "another type": (("model", "dtype"), lambda v: "float64", "model dtype"),
    "more classes": (("model", "classes"), lambda v: 4, "classes"),
    "another shape": (("model", "input_shape"), lambda v: (12,), "input shape"),
    "absurd shape": (("model", "input_shape"), lambda v: (10**9, 10**9), "input shape"),
    "another norm": (("norm",), lambda v: "linf", "bounds linf"),
    "unknown norm": (("norm",), lambda v: "l3", "format"),
    "unknown method": (("method",), lambda v: "magic", "format"),
    "bounds missing": (("bounds",), lambda v: {}, "bounds l2"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_named(dense, name):
    model, x, y, certificate = dense
    path, change, claim = TAMPERINGS[name]
    tampered = _with(certificate, path, change(_get(certificate, path)))
    verdict = verify(tampered, model, x, y)
    assert not verdict.valid
    assert re.fullmatch(claim, verdict.claim), verdict
    assert verdict.message.startswith(f"invalid: {verdict.claim}: ")
    assert "\n" not in verdict.message


def test_a_consistently_lowered_constant_is_found(dense):
    """Everything that follows from the run is lowered with it: only its own proof can tell."""
    model, x, y, certificate = dense
    l2 = certificate.bounds["l2"]
    factor = 0.99
    runs = (dataclasses.replace(l2.runs[0], upper=l2.runs[0].upper * factor, pieces=()), *l2.runs[1:])
    constants = (l2.constants[0], *(dataclasses.replace(c, upper=c.upper * factor) for c in l2.constants[1:]))
    pairwise = tuple(tuple(v * factor for v in row) for row in l2.pairwise)
    lowered = dataclasses.replace(
        l2, upper=l2.upper * factor, runs=runs, constants=constants, pairwise=pairwise,
        last_constant=l2.last_constant * factor,
    )  # fmt: skip
    tampered = dataclasses.replace(certificate, bounds={"l2": lowered}, pairwise=pairwise)
    verdict = verify(tampered, model, x, y)
    assert verdict.claim == "run _1 (l2)"
    assert "claimed" in verdict.message


def test_pieces_must_be_those_of_the_model(dense):
    model, x, y, certificate = dense
    path = (*L2, "runs", 0, "pieces")
    for pieces in ((), _get(certificate, path)[:1], _get(certificate, path) * 2):
        verdict = verify(_with(certificate, path, pieces), model, x, y)
        assert verdict.valid or verdict.claim == "run _1 (l2)"
    run = _get(certificate, (*L2, "runs", 0))
    small = tuple(dataclasses.replace(piece, upper=piece.upper / 2) for piece in run.pieces)
    assert verify(_with(certificate, path, small), model, x, y).claim == "run _1 (l2)"


def test_one_step_beyond_the_provable_radius_is_refused(dense):
    """The largest radius that passes is found by bisection; the next float does not pass."""
    model, x, y, certificate = dense
    path = ("samples", 7, "radius")

    def valid(value):
        return verify(_with(certificate, path, value), model, x, y).valid

    low, high = certificate.samples[7].radius, certificate.samples[7].radius * 1.01
    assert valid(low)
    assert not valid(high)
    while math.nextafter(low, math.inf) < high:
        middle = low + (high - low) / 2
        low, high = (middle, high) if valid(middle) else (low, middle)
    assert valid(low)
    assert not valid(math.nextafter(low, math.inf))
    assert low <= certificate.samples[7].radius * (1 + 1e-6)


def test_a_single_changed_bit_of_a_weight_is_found(dense):
    model, x, y, certificate = dense
    with torch.no_grad():
        bits = model[3].weight.view(torch.int32)
        bits[0, 0] ^= 1
    assert verify(certificate, model, x, y).claim == "model digest"


def test_other_layers_are_found(dense):
    model, x, y, certificate = dense
    swapped = nn.Sequential(*model[:2], nn.Tanh(), *model[3:]).eval()
    assert verify(certificate, swapped, x, y).claim == "model digest"


def test_another_picture_is_found(dense):
    model, x, y, certificate = dense
    changed = x.clone()
    changed[9, 0, 0, 0] += 1e-7
    assert verify(certificate, model, changed, y).claim == "input 9"
    assert verify(certificate, model, x.flip(0), y).claim == "input 0"
    assert verify(certificate, model, x[:5], y[:5]).claim == "samples"


def test_samples_are_found_by_their_index(dense):
    model, x, y, _ = dense
    certificate = certify(model, x[[2, 5, 6]], y[[2, 5, 6]], index=[2, 5, 6])
    verdict = verify(certificate, model, x, y)
    assert verdict.valid
    assert "3 of 12 samples" in verdict.message


def test_a_model_in_training_mode_is_refused(dense):
    model, x, y, certificate = dense
    verdict = verify(certificate, model.train(), x, y)
    assert verdict.claim == "model"
    assert "eval" in verdict.message


class Cube(nn.Module):
    def forward(self, x):
        return x.clamp(-1, 1) ** 3


register_rule(Cube, factor=3.0, rounding=Rounding("steps", 4, gain=1.0))


def test_a_layer_with_a_registered_rule_is_named():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), Cube(), nn.Linear(3, 2)).eval(), torch.rand(2, 3)
    verdict = verify(certify(model, x), model, x)
    assert verdict.claim == "model"
    assert re.search(r"1: the checker has no rule for .*Cube", verdict.message)


class Plain(nn.Module):
    def forward(self, x):
        return torch.nn.functional.hardswish(x)


def test_no_rule_is_one_clear_line():
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), Plain()).eval()
    with pytest.raises(ValueError, match="the checker has no rule for hardswish"):
        read(traced(other, (3, 2, 2)))


def _with_torus(certificate, change):
    path = (*L2, "runs", 0)
    run = _get(certificate, path)
    assert run.torus is not None
    return _with(certificate, path, dataclasses.replace(run, torus=change(run.torus)))


@pytest.mark.parametrize(
    "change",
    [
        lambda axes: ((axes[0][0] - 4, *axes[0][1:]), axes[1]),  # too small
        lambda axes: ((axes[0][0] + 1, 2, 0.0), axes[1]),  # no multiple of the stride
        lambda axes: ((10**9, 1, 0.0), axes[1]),
        lambda axes: ((axes[0][0], 0, 0.0), axes[1]),
        lambda axes: ((axes[0][0], 1, 0.25), axes[1]),
        lambda axes: axes[:1],
        lambda axes: (*axes, axes[0]),
    ],
)
def test_an_impossible_torus_is_refused(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(2, 2, 33, 33)
    model(x)
    model.eval()
    certificate = certify(model, x)
    assert verify(certificate, model, x).valid
    verdict = verify(_with_torus(certificate, change), model, x)
    assert verdict.claim == "run _0 (l2)"


def test_a_damaged_file_is_one_line(dense, tmp_path):
    model, x, y, certificate = dense
    path = certificate.save(tmp_path / "net.json")
    text = path.read_text()
    for broken in (text[:-20], text.replace('"radius"', '"radii"', 1), "[]", text.replace("float32", "nan", 1)):
        path.write_text(broken)
        verdict = verify(path, model, x, y)
        assert not verdict.valid
        assert "\n" not in verdict.message
    assert not verify(tmp_path / "missing.json", model, x, y).valid


def test_a_file_is_read_as_it_was_written(dense, tmp_path):
    path = dense[3].save(tmp_path / "net.json")
    assert load_certificate(path) == dense[3]


def test_the_model_is_left_as_it_was(dense):
    model, x, y, certificate = dense
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requires = [p.requires_grad for p in model.parameters()]
    verify(certificate, model, x, y)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert requires == [p.requires_grad for p in model.parameters()]
    assert not any(m.training for m in model.modules())


def _places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


JUNK = [
    0,
    -1,
    1e308,
    5e-324,
    "inf",
    "nan",
    None,
    True,
    [],
    {},
    "x",
    10**30,
    2**62,
    [[10**9, 1, 0.0]],
    "sha256:" + 64 * "0",
]


def test_no_damage_raises(dense, tmp_path):
    """Every place of the file in turn holds junk; what is checked, says so in one line."""
    model, x, y, _ = dense
    text = certify(model, x[:2], y[:2]).save(tmp_path / "net.json").read_text()
    path = tmp_path / "other.json"
    for number, place in enumerate(_places(json.loads(text))):
        content = json.loads(text)
        junk = JUNK[number % len(JUNK)]
        if place:
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = junk
        path.write_text(json.dumps(content if place else junk))
        verdict = verify(path, model, x, y)
        assert "\n" not in verdict.message
        assert verdict.valid == (verdict.claim == "")


@pytest.mark.parametrize("value", [0.9, 1.0])
def test_padding_by_a_value_is_no_zero_padding(value):
    model = nn.Sequential(nn.ZeroPad1d((1, 0)), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(3, 1, 3)
    certificate = certify(model, x)
    model[0].value = value
    forged = _with(certificate, ("model", "digest"), certify(model, x).model.digest)
    verdict = verify(forged, model, x)
    assert not verdict.valid
    assert "padding by" in verdict.message


def test_a_rectifier_with_other_ends_is_read_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.ReLU6(), nn.Linear(8, 2)).eval()
    x = 4 * torch.rand(6, 3)
    certificate = certify(model, x)
    model[2].max_val = 0.1
    assert verify(certify(model, x), model, x).valid
    forged = _with(certificate, ("model", "digest"), certify(model, x).model.digest)
    assert not verify(forged, model, x).valid


def test_inputs_that_overflow_in_the_arithmetic_have_no_radius():
    model = nn.Sequential(nn.Flatten()).eval()
    x = torch.tensor([[1.0, 60000.0]])
    certificate = certify(model, x, arithmetic="float16")
    assert certificate.samples[0].radius == 0.0
    forged = _with(certificate, ("samples", 0, "radius"), 10.0)
    assert not verify(forged, model, x).valid


def test_a_layer_that_computes_something_else_than_its_tables_say():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    Twice.__module__, Twice.__qualname__ = "torch.nn.modules.linear", "Linear"
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    x = torch.rand(3, 3)
    certificate = certify(model, x)
    model[0].__class__ = Twice
    assert not verify(certificate, model, x).valid


@pytest.mark.parametrize(("x", "y"), [([[1.0]], None), (None, None), (torch.rand(12, 3, 2, 2), [0] * 12)])
def test_data_that_are_no_tensors(dense, x, y):
    assert "expected data and labels as dense tensors" in verify(dense[3], dense[0], x, y).message

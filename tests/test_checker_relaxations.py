import dataclasses
import itertools
import json
import math
from fractions import Fraction

import jsonschema
import numpy as np
import pytest
import torch
from checker_nets import FORMS, network_of
from flint import ctx, fmpz, fmpz_mat
from test_certificate_file import SCHEMA
from test_checker import _get, _places, _with
from torch import nn

from speccert.certify import Certifier, certify, load_certificate
from speccert.certify.certificate import _checkable
from speccert.certify.checker import parts, verify
from speccert.certify.checker.balls import approximate, fixed
from speccert.certify.checker.definite import UNIT, Symmetric, floats, semidefinite
from speccert.certify.checker.matrices import Refused
from speccert.certify.checker.narrowing import narrowed, selected, stacked
from speccert.certify.checker.network import read, traced
from speccert.certify.checker.parts import part_from
from speccert.certify.checker.quadratics import Quadratic
from speccert.certify.checker.relaxations import Prover
from speccert.certify.claims import ConstantClaim, NormClaim, RelaxationClaim
from speccert.certify.lipschitz import METHODS
from speccert.models import Abs


@pytest.fixture(autouse=True)
def _precision():
    with ctx.workprec(128):
        yield


# --- the proof that a matrix is positive semidefinite


def _symmetric(matrix, sizes, spread=0):
    ends = list(itertools.accumulate([0, *sizes]))
    blocks = {}
    for k in range(len(sizes)):
        for low in range(k + 1):
            block = matrix[ends[k] : ends[k + 1], ends[low] : ends[low + 1]]
            whole = [int(Fraction(value) * 2 ** (2 * UNIT)) for value in block.reshape(-1).tolist()]
            blocks[k, low] = fmpz_mat(*block.shape, whole)
    return Symmetric(tuple(sizes), blocks, [[fmpz(spread)] * size for size in sizes])


@pytest.mark.parametrize("sizes", [(1,), (3, 2), (4, 1, 5, 3), (30, 40, 20)])
def test_positive_matrices_are_proved_and_others_are_not(sizes):
    torch.manual_seed(0)
    side = sum(sizes)
    random, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64))
    for least in (0.5, 1e-6, 1e-11):
        values = torch.linspace(0, 1, side, dtype=torch.float64) ** 3
        values[0] = least
        values[1:] += 1e-4
        for sign in (1, -1):
            values[0] = sign * least
            matrix = (random * values) @ random.T
            matrix = ((matrix + matrix.T) / 2).numpy()
            assert semidefinite(_symmetric(matrix, sizes)) == (sign > 0), (least, sign)


def test_what_rows_may_differ_by_counts():
    matrix = np.eye(4) * 0.5
    matrix[0, 1] = matrix[1, 0] = 0.4375
    room = 2 ** (2 * UNIT) // 16
    assert semidefinite(_symmetric(matrix, (2, 2), room // 2 - 2**80))
    assert not semidefinite(_symmetric(matrix, (2, 2), room + 2**80))


def test_no_tiny_negative_part_is_overlooked():
    """A rank-one matrix less 2^-100 of the identity has no float that shows it."""
    vector = np.array([0.5, 0.25, -0.75])
    whole = _symmetric(np.outer(vector, vector), (1, 2))
    for shift in (1, -1):
        blocks = {
            place: block
            + fmpz_mat(*map(int, (block.nrows(), block.ncols())), [
                shift * 2**12 * (place[0] == place[1] and i == j)
                for i in range(int(block.nrows())) for j in range(int(block.ncols()))
            ])
            for place, block in whole.blocks.items()
        }  # fmt: skip
        assert not semidefinite(Symmetric(whole.sizes, blocks, whole.spread)) or shift > 0


# --- the inequality, against numpy


def _dense(part, multipliers, pair):
    """F without Q by its definition, in float64."""
    ends = list(itertools.accumulate([0, *part.sizes]))
    side = ends[-1]

    def over(rows):
        found = np.zeros((len(next(iter(rows.values())).mant), side))
        for source, one in rows.items():
            found[:, ends[source] : ends[source + 1]] = approximate(one)
        return found

    end = over(part.end)
    end = end if pair is None else end[[pair[0]]] - end[[pair[1]]]
    form = -end.T @ end
    for k, layer in enumerate(part.layers, start=1):
        d = np.diag(np.array(multipliers[k - 1])[layer.conditions])
        u, xi = over(layer.rows), np.eye(side)[ends[k] : ends[k + 1]]
        first, second = xi - layer.low / 2**26 * u, layer.high / 2**26 * u - xi
        cross = first.T @ d @ second
        form -= (cross + cross.T) / 2
    return form


def _multipliers(part, pair, seed=0):
    """Some for which the inequality can hold, by elimination from the end in numpy, and the form left on the start."""
    random, held = np.random.default_rng(seed), [np.ones(layer.count) for layer in part.layers]
    ends = list(itertools.accumulate([0, *part.sizes]))
    for k in range(len(part.layers), 0, -1):
        rest = _dense(part, [*(0 * h for h in held[:k]), *held[k:]], pair)
        rest = _schur(rest, ends[k + 1])
        own = -rest[ends[k] : ends[k + 1], ends[k] : ends[k + 1]]
        level = max(float(np.linalg.eigvalsh(own)[-1]), 1e-3)
        held[k - 1] = 2 * level * random.uniform(1.0, 1.3, part.layers[k - 1].count)
    return held, -_schur(_dense(part, held, pair), ends[1])


def _schur(form, count):
    """What is left on the first numbers when the others are minimised over."""
    if count == len(form):
        return form
    inner = form[count:, count:]
    return form[:count, :count] - form[:count, count:] @ np.linalg.solve(inner, form[count:, :count])


@pytest.mark.parametrize("pair", [None, (2, 0)])
@pytest.mark.parametrize("name", FORMS)
def test_the_matrix_is_that_of_the_inequality(name, pair):
    _, _, graph = network_of(name)
    network = read(graph)
    part = part_from(network, network.nodes[0].name)
    random = np.random.default_rng(0)
    held = [10 ** random.uniform(-3, 3, layer.count) for layer in part.layers]
    form = Quadratic(part, held, pair, np.arange(part.sizes[0]) % 7 - 3)
    found = form.symmetric(fmpz_mat(part.sizes[0], part.sizes[0]))
    ends = list(itertools.accumulate([0, *part.sizes]))
    expected = _dense(part, held, pair)
    powers = np.concatenate(form._powers)
    for (k, low), block in found.blocks.items():
        rows, columns = slice(ends[k], ends[k + 1]), slice(ends[low], ends[low + 1])
        scaled = np.ldexp(np.ldexp(expected[rows, columns], powers[rows, None]), powers[None, columns])
        assert np.abs(floats(block) - scaled).max(initial=0.0) <= 1e-12 * max(1.0, np.abs(scaled).max(initial=0.0))
        expected[rows, columns] = expected[columns, rows] = 0
    assert not expected.any()


# --- claims


def _claim(part, network, norm, pair, *, slack=1e-9, seed=0):
    """A claim just above what numpy finds for some multipliers, and that value."""
    held, left = _multipliers(part, pair, seed)
    left, weights = (left + left.T) / 2, None
    if norm == "l2":
        value = math.sqrt(np.linalg.eigvalsh(left)[-1])
    elif norm == "l1":
        value = math.sqrt(left.diagonal().max())
    else:
        tau = np.abs(left).sum(1) * (1 + slack) + 1e-12 * np.abs(left).max()
        value, weights = math.sqrt(tau.sum()), tuple(tau.tolist())
    multipliers = tuple(tuple(row.tolist()) for row in held)
    start = network.nodes[0].name
    upper = value * (1 + slack)
    return RelaxationClaim(norm, start, network.output, pair, 1.0, upper, multipliers, weights, "test"), value


def _prover(network, norm):
    constants = tuple(ConstantClaim(node.name, 1.0) for node in network.anchors)
    bounds = NormClaim(1.0, (), constants, 1.0, ())
    return Prover(network, {"l2": bounds, norm: bounds}, norm)


def _proved(prover, claim):
    try:
        prover.prove(claim)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("pair", [None, (0, 2)])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("name", FORMS)
def test_claims_just_above_are_proved_and_just_below_are_not(name, norm, pair):
    _, _, graph = network_of(name)
    network = read(graph)
    prover = _prover(network, norm)
    claim, value = _claim(part_from(network, network.nodes[0].name), network, norm, pair)
    assert _proved(prover, claim)
    assert _proved(prover, dataclasses.replace(claim, upper=value * 2))
    assert not _proved(prover, dataclasses.replace(claim, upper=value * (1 - 1e-9)))
    assert not _proved(prover, dataclasses.replace(claim, upper=value / 2))


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("sizes", [(50, 6, 5, 3), (3, 9, 7, 2), (30, 4, 2)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_wide_and_narrow_starts_of_any_scale(sizes, norm, scale):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    with torch.no_grad():
        layers[0].weight *= scale
        layers[-1].weight /= math.sqrt(scale)
    model = nn.Sequential(*itertools.chain(*((layer, nn.ReLU()) for layer in layers)))[:-1].eval()
    network = read(traced(model, sizes[:1]))
    part, prover = part_from(network, network.nodes[0].name), _prover(network, norm)
    assert (narrowed(part, None).sizes[0] < sizes[0]) == (sizes[1] < sizes[0])
    ends = list(itertools.accumulate([0, *part.sizes]))
    held = []
    for k in range(len(part.layers), 0, -1):  # d for each layer so that half is left for it
        guess = [np.zeros(layer.count) for layer in part.layers[:k]] + held
        rest = -_schur(_dense(part, guess, (0, 1)), ends[k + 1])[ends[k] :, ends[k] :]
        held.insert(0, np.full(part.sizes[k], 2 * float(np.linalg.eigvalsh(rest)[-1])))
    left = -_schur(_dense(part, held, (0, 1)), ends[1])
    tau = np.abs(left).sum(1) * (1 + 1e-9)
    value = {"l2": np.linalg.eigvalsh(left)[-1], "l1": left.diagonal().max(), "linf": tau.sum()}[norm] ** 0.5
    claim = RelaxationClaim(
        norm, network.nodes[0].name, network.output, (0, 1), 1.0, float(value) * (1 + 1e-9),
        tuple(tuple(d.tolist()) for d in held), tuple(tau.tolist()) if norm == "linf" else None, "test",
    )  # fmt: skip
    assert _proved(prover, claim)
    assert not _proved(prover, dataclasses.replace(claim, upper=float(value) * (1 - 1e-9)))


def _exact(model, low, high, multipliers, pair):
    """F without Q in fractions, from the weights: each layer's numbers come from those of the layer before."""
    weights = [
        [[Fraction(v) for v in row] for row in layer.weight.tolist()] for layer in model if hasattr(layer, "bias")
    ]
    held = [[Fraction(v) for v in row] for row in multipliers]
    sizes = [len(weights[0][0]), *map(len, held)]
    ends = list(itertools.accumulate([0, *sizes]))
    form = [[Fraction(0)] * ends[-1] for _ in range(ends[-1])]

    def add(first, second, factor):
        for i, a in first.items():
            for j, b in second.items():
                form[i][j] += factor * a * b / 2
                form[j][i] += factor * a * b / 2

    for k, row in enumerate(held, start=1):
        for i, d in enumerate(row):
            u = {ends[k - 1] + j: v for j, v in enumerate(weights[k - 1][i])}
            first = {**{j: -low * v for j, v in u.items()}, ends[k] + i: Fraction(1)}
            second = {**{j: high * v for j, v in u.items()}, ends[k] + i: Fraction(-1)}
            add(first, second, -d)
    last = [a - b for a, b in zip(weights[-1][pair[0]], weights[-1][pair[1]], strict=True)]
    end = {ends[-2] + j: v for j, v in enumerate(last)}
    add(end, end, -1)
    return form


def _eliminated(form, least):
    """Take the last numbers out until `least` are left: whether pivots were positive, or rows zero, and the rest."""
    form = [list(row) for row in form]
    while len(form) > least:
        pivot, row = form[-1][-1], form[-1][:-1]
        if pivot < 0 or (pivot == 0 and any(row)):
            return False, form
        form = [
            [v - (row[i] * row[j] / pivot if pivot else 0) for j, v in enumerate(line[:-1])]
            for i, line in enumerate(form[:-1])
        ]
    return True, form


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("activation", [nn.ReLU, Abs, lambda: nn.LeakyReLU(0.25)])
@pytest.mark.parametrize("sizes", [(5, 2, 3, 2), (2, 3, 3, 2)])
def test_the_least_proved_bound_holds_in_exact_arithmetic(sizes, activation, norm):
    """At the least that the checker accepts, by bisection, the inequality holds in fractions, and not much below."""
    torch.manual_seed(len(sizes) + sizes[0])
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*itertools.chain(*((layer, activation()) for layer in layers)))[:-1].eval()
    network = read(traced(model, sizes[:1]))
    part, prover = part_from(network, network.nodes[0].name), _prover(network, norm)
    claim, value = _claim(part, network, norm, (0, 1))
    if norm == "linf":
        claim = dataclasses.replace(claim, upper=value * 1.01)
    low, high = value * (1 - 1e-6), claim.upper
    assert _proved(prover, claim)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _proved(prover, dataclasses.replace(claim, upper=middle)) else (middle, high)
    slopes = [Fraction(part.layers[0].low, 2**26), Fraction(part.layers[0].high, 2**26)]
    form = _exact(model, *slopes, claim.multipliers, (0, 1))

    def holds(upper):
        square = Fraction(upper) ** 2
        if norm == "l1":
            definite, rest = _eliminated(form, sizes[0])
            return definite and all(-rest[i][i] <= square for i in range(sizes[0]))
        weights = [square] * sizes[0] if norm == "l2" else list(map(Fraction, claim.weights))
        whole = [
            [v + (weights[i] if i == j < sizes[0] else 0) for j, v in enumerate(row)] for i, row in enumerate(form)
        ]
        return (norm == "l2" or sum(weights) <= square) and _eliminated(whole, 0)[0]

    assert holds(high)
    assert not holds(high * (1 - 1e-9))


def test_an_ellipsoid_covers_the_start():
    """||y||^2 <= x^T W^-1 x where G y = M x, also with weights and rows that are almost dependent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 2)).double().eval()
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[4] + 1e-7 * model[0].weight[5]
        model[0].weight[6] *= 1e-6
        model[0].weight[7] = 0
    part = part_from(read(traced(model, (40,))), "input_1")
    for weights in (None, (10 ** np.random.default_rng(0).uniform(-6, 6, 40)).tolist()):
        rows = approximate(narrowed(part, weights).layers[0].rows[0])
        wide = model[0].weight.detach().numpy() / np.sqrt(1.0 if weights is None else np.array(weights))
        root = np.linalg.pinv(rows) @ wide
        assert np.linalg.norm(root, 2) <= 1 + 1e-6
        slack = rows @ rows.T - wide @ wide.T
        assert np.linalg.eigvalsh(slack)[0] >= -1e-14 * np.abs(rows @ rows.T).max()
        assert np.abs(slack).max() <= 1e-9 * np.abs(wide @ wide.T).max()
    assert stacked(part).shape == (9, 40)
    assert selected(part)[0].sizes == (9, 9)


@pytest.mark.parametrize("size", [4, 40])
def test_a_tiny_constant_in_l1_is_proved(size):
    """Weights that are subnormal in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight *= 1e-38
    x = torch.rand(1, size)
    certificate = certify(model, x, norm="l1", method="auto", budget=0.5)
    assert any(one.norm == "l1" for one in certificate.relaxations)
    assert verify(certificate, model, x).valid, verify(certificate, model, x)


def test_errors_of_entries_count():
    """With matrices that are only known to 2^-20 a claim needs room for that."""
    _, _, graph = network_of("ReLU()")
    network = read(graph)
    part = part_from(network, network.nodes[0].name)
    claim, value = _claim(part, network, "l2", (0, 1))

    def loose(rows):
        exact = {source: fixed(torch.from_numpy(approximate(one))) for source, one in rows.items()}
        return {s: dataclasses.replace(one, err=fmpz(1) << -20 - one.exp) for s, one in exact.items()}

    layers = tuple(dataclasses.replace(layer, rows=loose(layer.rows)) for layer in part.layers)
    for other in (dataclasses.replace(part, layers=layers), dataclasses.replace(part, end=loose(part.end))):
        prover = _prover(network, "l2")
        prover._parts[claim.start] = other
        assert not _proved(prover, dataclasses.replace(claim, upper=value * (1 + 1e-7)))
        assert _proved(prover, dataclasses.replace(claim, upper=value * (1 + 1e-2)))


# --- whole certificates


@pytest.fixture(scope="module")
def relaxed():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.rand(3, 3, 2, 2)
    y = model(x).argmax(1)
    return model, x, y, certify(model, x, y, method="lipsdp-first-order", budget=5.0)


def test_an_honest_certificate_is_valid(relaxed, tmp_path):
    model, x, y, certificate = relaxed
    assert len(certificate.relaxations) == 4
    verdict = verify(certificate, model, x, y)
    assert verdict.valid, verdict
    assert verdict.counts == {"runs": 3, "constants": 3, "relaxations": 4, "samples": 3}
    assert "3 norms, 3 constants and 4 relaxations proved" in verdict.message
    path = certificate.save(tmp_path / "net.json")
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))
    assert load_certificate(path) == certificate
    assert verify(path, model, x, y) == verdict


def test_without_relaxations_nothing_of_theirs_is_proved(relaxed):
    model, x, y, certificate = relaxed
    verdict = verify(dataclasses.replace(certificate, relaxations=()), model, x, y)
    assert verdict.claim == "pairwise 0, 1"
    fewer = tuple(one for one in certificate.relaxations if one.pair != (0, 2))
    assert verify(dataclasses.replace(certificate, relaxations=fewer), model, x, y).claim == "pairwise 0, 2"
    pairs = tuple(one for one in certificate.relaxations if one.pair is not None)
    assert verify(dataclasses.replace(certificate, relaxations=pairs), model, x, y).claim == "lipschitz"


def test_the_whole_bounds_the_pairs_too(relaxed):
    model, x, y, certificate = relaxed
    (whole,) = (one for one in certificate.relaxations if one.pair is None)
    level = whole.upper * math.sqrt(2) * (1 + 1e-12)
    product = certificate.bounds["l2"].pairwise
    pairwise = tuple(tuple(min(value, level) for value in row) for row in product)
    made = dataclasses.replace(certificate, relaxations=(whole,), pairwise=pairwise, samples=certificate.samples[:1])
    made = _with(made, ("samples", 0, "radius"), 0.0)
    assert verify(made, model, x, y).valid
    lower = tuple(tuple(min(value, level * (1 - 1e-9)) for value in row) for row in product)
    assert verify(dataclasses.replace(made, pairwise=lower), model, x, y).claim.startswith("pairwise")


def _less(value, share=1e-6):
    return value * (1 - share)


FIRST, LAST = ("relaxations", 0), ("relaxations", 3)
TAMPERINGS = {
    "bound lowered": ((*FIRST, "upper"), _less),
    "bound of the whole lowered": ((*LAST, "upper"), _less),
    "bound below zero": ((*FIRST, "upper"), lambda v: -v),
    "bound far below zero": ((*FIRST, "upper"), lambda v: -1e300),
    "bound of zero": ((*FIRST, "upper"), lambda v: 0.0),
    "bound that is no number": ((*FIRST, "upper"), lambda v: math.nan),
    "infinite bound": ((*FIRST, "upper"), lambda v: math.inf),
    "another norm": ((*FIRST, "norm"), lambda v: "linf"),
    "unknown norm": ((*FIRST, "norm"), lambda v: "l3"),
    "another start": ((*FIRST, "start"), lambda v: "_2"),
    "start in a run": ((*FIRST, "start"), lambda v: "_1"),
    "start that is no node": ((*FIRST, "start"), lambda v: "x"),
    "another end": ((*FIRST, "end"), lambda v: "_3"),
    "end that is no node": ((*FIRST, "end"), lambda v: "y"),
    "another pair": ((*FIRST, "pair"), lambda v: (1, 2)),
    "pair of one": ((*FIRST, "pair"), lambda v: (1, 1)),
    "pair out of range": ((*FIRST, "pair"), lambda v: (0, 3)),
    "pair below zero": ((*FIRST, "pair"), lambda v: (0, -1)),
    "three classes": ((*FIRST, "pair"), lambda v: (0, 1, 2)),
    "whole for a pair": ((*FIRST, "pair"), lambda v: None),
    "start's constant lowered": ((*FIRST, "start_constant"), _less),
    "start's constant raised": ((*FIRST, "start_constant"), lambda v: v * 1.001),
    "start's constant below zero": ((*FIRST, "start_constant"), lambda v: -v),
    "start's constant of zero": ((*FIRST, "start_constant"), lambda v: 0.0),
    "start's constant no number": ((*FIRST, "start_constant"), lambda v: math.nan),
    "start's constant infinite": ((*FIRST, "start_constant"), lambda v: math.inf),
    "multiplier raised": ((*FIRST, "multipliers", 1, 3), lambda v: v * 30),
    "multiplier lowered": ((*FIRST, "multipliers", 1, 3), lambda v: v / 30),
    "multiplier below zero": ((*FIRST, "multipliers", 0, 2), lambda v: -v),
    "multiplier of zero": ((*FIRST, "multipliers", 0, 2), lambda v: 0.0),
    "multiplier no number": ((*FIRST, "multipliers", 0, 2), lambda v: math.nan),
    "multiplier infinite": ((*FIRST, "multipliers", 0, 2), lambda v: math.inf),
    "multiplier tiny": ((*FIRST, "multipliers", 0, 2), lambda v: 5e-324),
    "multiplier huge": ((*FIRST, "multipliers", 0, 2), lambda v: 1e308),
    "multipliers of a layer tiny": ((*FIRST, "multipliers", 0), lambda v: (1e-300,) * len(v)),
    "multiplier missing": ((*FIRST, "multipliers", 0), lambda v: v[:-1]),
    "multiplier too many": ((*FIRST, "multipliers", 0), lambda v: (*v, 1.0)),
    "layers swapped": ((*FIRST, "multipliers"), lambda v: v[::-1]),
    "layer missing": ((*FIRST, "multipliers"), lambda v: v[:1]),
    "layer too many": ((*FIRST, "multipliers"), lambda v: (*v, (1.0,))),
    "multipliers of one layer swapped": ((*FIRST, "multipliers", 0), lambda v: v[::-1]),
    "no multipliers": ((*FIRST, "multipliers"), lambda v: ()),
    "weights in l2": ((*FIRST, "weights"), lambda v: (1.0,) * 12),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_and_named(relaxed, name):
    model, x, y, certificate = relaxed
    path, change = TAMPERINGS[name]
    verdict = verify(_with(certificate, path, change(_get(certificate, path))), model, x, y)
    assert verdict.claim == f"relaxation {path[1]}", verdict
    assert "\n" not in verdict.message


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_numbers_far_apart_are_refused_by_name(norm):
    """Without a warning, which here is an error, where guesses in float64 overflow."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ELU(3.0), nn.Linear(4, 3)).eval()
    x = torch.rand(2, 6)
    certificate = certify(model, x, norm=norm, method="lipsdp-first-order", budget=1.0)
    place = len(certificate.relaxations) - 1
    path = ("relaxations", place, "multipliers")
    for low, high in itertools.product((5e-324, 1e-300, 1e-150), (1e150, 1e300, 1.7e308)):
        for extreme in ([low, high], [high, low], [low, low], [high, high]):
            made = tuple((value, *row[1:]) for value, row in zip(extreme, _get(certificate, path), strict=True))
            verdict = verify(_with(certificate, path, made), model, x)
            assert verdict.valid or verdict.claim == f"relaxation {place}", verdict


@pytest.mark.parametrize(
    ("field", "value"), [("pair", [0, 1]), ("upper", "x"), ("multipliers", None), ("start_constant", None)]
)
def test_values_of_a_wrong_type_are_refused(relaxed, field, value):
    model, x, y, certificate = relaxed
    verdict = verify(_with(certificate, (*FIRST, field), value), model, x, y)
    assert not verdict.valid
    assert "\n" not in verdict.message


@pytest.mark.parametrize(
    ("path", "change", "claim"),
    [
        (("pairwise", 2, 1), _less, "pairwise 2, 1"),
        (("lipschitz",), _less, "lipschitz"),
        (("samples", 1, "radius"), lambda v: v * (1 + 1e-6), "radius 1"),
        (("method",), lambda v: "local", "format"),
        (("method",), lambda v: "magic", "format"),
    ],
)
def test_what_follows_is_found_too(relaxed, path, change, claim):
    model, x, y, certificate = relaxed
    assert verify(_with(certificate, path, change(_get(certificate, path))), model, x, y).claim == claim


@pytest.mark.parametrize("method", [method for method in METHODS if method != "local"])
def test_every_method_that_certify_takes_is_known(relaxed, method):
    model, x, y, _ = relaxed
    verdict = verify(certify(model, x[:1], y[:1], method=method, budget=0.5), model, x, y)
    assert verdict.valid, verdict


def test_names_of_methods_are_no_claim(relaxed):
    model, x, y, certificate = relaxed
    assert verify(_with(certificate, (*FIRST, "method"), "by hand"), model, x, y).valid


def test_either_order_of_a_pair_is_the_same(relaxed):
    model, x, y, certificate = relaxed
    assert verify(_with(certificate, (*FIRST, "pair"), certificate.relaxations[0].pair[::-1]), model, x, y).valid


def test_a_consistently_lowered_constant_is_found(relaxed):
    model, x, y, certificate = relaxed
    one = certificate.relaxations[0]
    i, j = one.pair
    made = _with(certificate, (*FIRST, "upper"), one.upper * 0.99)
    for path in ((i, j), (j, i)):
        made = _with(made, ("pairwise", *path), one.upper * 0.99)
    assert verify(made, model, x, y).claim == "relaxation 0"


@pytest.fixture(scope="module")
def relaxed_linf():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x = torch.rand(2, 12)
    return model, x, certify(model, x, norm="linf", method="lipsdp-first-order", budget=5.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: None,
        lambda w: w[:-1],
        lambda w: (*w, 1e-9),
        lambda w: (w[0] * 1.001, *w[1:]),
        lambda w: (w[0] * 0.999, *w[1:]),
        lambda w: (-w[0], *w[1:]),
        lambda w: (0.0, *w[1:]),
        lambda w: (math.nan, *w[1:]),
        lambda w: (math.inf, *w[1:]),
        lambda w: tuple(v / 2 for v in w),
        lambda w: w[::-1],
    ],
)
def test_weights_of_the_input_are_checked(relaxed_linf, change):
    model, x, certificate = relaxed_linf
    assert verify(certificate, model, x).valid, verify(certificate, model, x)
    place = next(i for i, one in enumerate(certificate.relaxations) if one.norm == "linf")
    path = ("relaxations", place, "weights")
    verdict = verify(_with(certificate, path, change(_get(certificate, path))), model, x)
    assert verdict.claim == f"relaxation {place}", verdict


@pytest.mark.parametrize("name", ["ReLU()", "GroupSort(group_size=4)", "convolutions", "branches"])
@pytest.mark.parametrize(("norm", "arithmetic"), [("l2", None), ("linf", "float32"), ("l1", "bfloat16")])
def test_what_the_library_finds_is_valid(name, norm, arithmetic, tmp_path):
    model, shape, _ = network_of(name)
    x = torch.rand(2, *shape, dtype=torch.float64)
    certificate = certify(model, x, norm=norm, method="auto", arithmetic=arithmetic, budget=0.5)
    path = certificate.save(tmp_path / "net.json")
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))
    verdict = verify(path, model, x)
    assert verdict.valid, verdict


class Pooled(nn.Module):
    """A network whose head alone is a form: maxima have no slopes."""

    def __init__(self):
        super().__init__()
        self.first, self.pool = nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.head(self.pool(self.first(x)))


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_later_start_counts_with_its_constant(norm):
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.rand(2, 1, 6, 6)
    certificate = certify(model, x, norm=norm, method="auto", budget=1.0)
    assert {one.start for one in certificate.relaxations} == {"pool"}
    assert verify(certificate, model, x).valid, verify(certificate, model, x)
    path = ("relaxations", 0)
    one = _get(certificate, path)
    wrong = dataclasses.replace(one, start="x", start_constant=1.0)
    assert "no slopes" in verify(_with(certificate, path, wrong), model, x).message
    share = 1 - 1e-6
    lower = dataclasses.replace(one, start_constant=one.start_constant * share, upper=one.upper * share)
    assert verify(_with(certificate, path, lower), model, x).claim == "relaxation 0"


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_what_is_too_large_for_the_checker_is_left_out(norm, monkeypatch):
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.rand(2, 1, 6, 6)
    whole = certify(model, x, norm=norm, method="auto", budget=1.0)
    monkeypatch.setattr(parts, "_NUMBERS", 12)
    assert "more than the checker takes" in verify(whole, model, x).message
    left = certify(model, x, norm=norm, method="auto", budget=1.0)
    product = certify(model, x, norm=norm)
    assert left.relaxations == ()
    assert dataclasses.replace(left, method="product") == product
    assert verify(left, model, x).valid, verify(left, model, x)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_only_what_is_too_large_is_left_out(norm):
    """A relaxation from the input, through maxima that have no slopes, among those behind them."""
    torch.manual_seed(0)
    certifier = Certifier(Pooled().eval(), (1, 6, 6), norm=norm, method="auto", budget=1.0)
    bound = certifier.bound
    false = dataclasses.replace(bound.relaxations[0], start="x", upper=1e-9)
    certifier.bound = dataclasses.replace(bound, relaxations=(false, *bound.relaxations), upper=0.1)
    found = _checkable(certifier)
    assert found.relaxations == bound.relaxations
    assert found.upper == bound.upper
    assert torch.equal(found.pairwise, bound.pairwise)


def test_a_path_around_the_start_is_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.last(torch.cat([h, torch.relu(self.second(x))], 1))

    model = Around().eval()
    with pytest.raises(Refused, match="on a path around 'relu'"):
        part_from(read(traced(model, (4,))), "relu")


JUNK = [0, -1, 1e308, 5e-324, "inf", "nan", None, True, [], {}, "x", 10**30, [[1.0]], "linf"]


def test_no_damage_raises(relaxed, tmp_path):
    """Every place of a relaxation in turn holds junk; what is checked, says so in one line."""
    model, x, y, certificate = relaxed
    text = certificate.save(tmp_path / "net.json").read_text()
    path = tmp_path / "other.json"
    for number, place in enumerate(_places(json.loads(text)["relaxations"][:2])):
        content = json.loads(text)
        inner = {"all": content["relaxations"]}
        for key in ("all", *place)[:-1]:
            inner = inner[key]
        inner[("all", *place)[-1]] = JUNK[number % len(JUNK)]
        path.write_text(json.dumps(content))
        verdict = verify(path, model, x, y)
        assert "\n" not in verdict.message
        assert verdict.valid == (verdict.claim == "")

"""The portfolio of LipSDP methods on traced networks: proposals, proofs, budgets and fallbacks."""

import itertools
import math
import time

import pytest
import torch
from exact_lipschitz import corners, interior_point, largest, pairs, random_neurons
from oracles import Wired, random, randomised
from torch import nn
from torch.nn import functional

from speccert.certify.graph import trace
from speccert.certify.inequality import prove
from speccert.certify.linear import float64
from speccert.certify.lipschitz import lipschitz
from speccert.certify.rules import leaf_types
from speccert.certify.sdp import MOST_PAIRS, SDP_METHODS, Proposal, Tightener, closed_form, first_order
from speccert.certify.walk import Walk
from speccert.models import Abs, GroupSort, Householder, MaxMin

NORMS = ("l2", "linf", "l1")


def tightener(model, shape):
    graph = trace(model, shape, leaf_types())
    constants = dict(lipschitz(model, shape).records["l2"].constants)
    return Tightener(graph, constants, graph.shapes[graph.output][0])


def dense(*sizes, activation=nn.ReLU, seed=0, scale=0.7):
    layers = []
    for first, second in itertools.pairwise(sizes):
        layers += [nn.Linear(first, second), activation()]
    return randomised(nn.Sequential(*layers[:-1]).double(), seed, scale)


# proposals


@pytest.mark.parametrize("norm", NORMS)
def test_proposals_are_one_for_the_whole_or_one_a_pair(norm):
    net = random_neurons((4, 6, 5), 3, 0)
    asked = [(0, 1), (1, 2)]
    for found in (closed_form(net, None, norm), first_order(net, None, norm, seconds=2)):
        assert len(found) == 1
    for found in (closed_form(net, asked, norm), first_order(net, asked, norm, seconds=2)):
        assert len(found) == 2
        for proposal, pair in zip(found, asked, strict=True):
            assert [len(part) for part in proposal.multipliers] == [6, 5]
            assert (proposal.weights is not None) == (norm == "linf")
            assert prove(net.pair(*pair), proposal.multipliers, norm, proposal.weights).upper < math.inf


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("seed", range(3))
def test_first_order_comes_to_the_optimum(seed, norm):
    net = random_neurons((4, 6, 5), 3, seed, dense=seed == 2)
    (whole,) = first_order(net, None, norm, seconds=20)
    assert prove(net, whole.multipliers, norm, whole.weights).upper <= interior_point(net, norm)[0] * (1 + 2e-3)
    pair = net.pair(0, 2)
    (own,) = first_order(net, [(0, 2)], norm, seconds=20)
    assert prove(pair, own.multipliers, norm, own.weights).upper <= interior_point(pair, norm)[0] * (1 + 2e-3)


def test_a_warm_start_is_taken():
    """With no time left for a search the proposal is the warm start, and pairs are no worse than by the whole end."""
    net = random_neurons((4, 6, 5), 3, 0)
    (whole,) = first_order(net, seconds=10)
    (same,) = first_order(net, warm=whole, seconds=-1.0)
    for a, b in zip(whole.multipliers, same.multipliers, strict=True):
        torch.testing.assert_close(a, b)
    upper = prove(net, whole.multipliers).upper
    asked = list(itertools.combinations(range(3), 2))
    for pair, own in zip(asked, first_order(net, asked, warm=whole, seconds=-1.0), strict=True):
        assert prove(net.pair(*pair), own.multipliers).upper <= math.sqrt(2) * upper * (1 + 1e-7)


def test_first_order_keeps_its_time():
    net = random_neurons((100, 200, 200, 200), 10, 0)
    asked = list(itertools.combinations(range(10), 2))
    for seconds in (0.5,):
        begin = time.monotonic()
        found = first_order(net, asked, seconds=seconds)
        assert time.monotonic() - begin < seconds + 10
        assert len(found) == 45
    assert prove(net.pair(0, 1), found[0].multipliers).upper < math.inf


def test_batches_of_pairs_give_what_one_batch_gives(monkeypatch):
    net = random_neurons((3, 4, 3), 4, 0)
    asked = list(itertools.combinations(range(4), 2))
    whole = first_order(net, asked, seconds=30)
    monkeypatch.setattr("speccert.certify.sdp._BATCH", 200)
    split = first_order(net, asked, seconds=60)
    for pair, a, b in zip(asked, whole, split, strict=True):
        first, second = (prove(net.pair(*pair), p.multipliers).upper for p in (a, b))
        assert first == pytest.approx(second, rel=2e-3)


# on traced networks

METHODS = (*SDP_METHODS, "auto")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_relaxations_are_above_all_pieces_of_the_network(method, norm):
    model = dense(3, 4, 4, 3)
    jacobians = corners(model)
    found = tightener(model, (3,)).tighten(method, norm, 30.0)
    exact = pairs(jacobians, norm)
    seen = set()
    for one in found.relaxations:
        seen.add(one.pair)
        assert one.norm == norm
        assert (one.start, one.start_constant) == ("input_1", 1.0)
        least = largest(jacobians, norm) if one.pair is None else exact[one.pair]
        assert least <= one.upper
        assert one.upper <= 4 * least
        assert (one.weights is None) == (norm == "l1")
        assert one.method in SDP_METHODS
    assert seen == {None, (0, 1), (0, 2), (1, 2)}
    tried = [attempt.method for attempt in found.attempts]
    assert tried == [method] if method != "auto" else (tried[0] == "closed-form" and set(tried) <= set(SDP_METHODS))
    for attempt in found.attempts:
        own = [one for one in found.relaxations if one.method == attempt.method]
        assert attempt.proved
        assert attempt.upper == min(one.upper for one in own if one.pair is None)
        best = [min(one.upper for one in own if one.pair == pair) for pair in {one.pair for one in own} - {None}]
        assert attempt.pair_upper == max(best, default=math.inf)


def test_methods_are_ordered():
    """More freedom gives smaller bounds: closed form, a multiplier a layer, one a neuron."""
    model = dense(4, 6, 6, 2)
    product = lipschitz(model, (4,)).upper
    uppers = {m: tightener(model, (4,)).tighten(m, "l2", 60.0).attempts[-1].upper for m in METHODS}
    assert uppers["lipsdp"] <= uppers["lipsdp-layer"] * (1 + 1e-4)
    assert uppers["lipsdp"] * (1 - 1e-4) <= uppers["lipsdp-first-order"] <= uppers["lipsdp"] * (1 + 2e-3)
    assert uppers["lipsdp-layer"] <= uppers["closed-form"] * (1 + 1e-6)
    assert uppers["closed-form"] <= product * (1 + 1e-6)
    assert uppers["lipsdp"] < 0.9 * product


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["closed-form", "lipsdp", "lipsdp-first-order"])
@pytest.mark.parametrize("activation", [Abs, MaxMin, lambda: GroupSort(2), lambda: Householder(4)])
def test_grouped_activations_are_above_all_their_pieces(activation, method, norm):
    model = dense(3, 4, 4, 2, activation=activation, seed=1)
    jacobians = corners(model)
    found = tightener(model, (3,)).tighten(method, norm, 30.0)
    exact = pairs(jacobians, norm)
    assert found.relaxations
    for one in found.relaxations:
        assert (largest(jacobians, norm) if one.pair is None else exact[one.pair]) <= one.upper


# networks without a form


def test_a_network_with_a_pool_is_bounded_behind_it():
    model = randomised(
        nn.Sequential(
            *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU()),
            *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        )
    ).double()
    product = lipschitz(model, (1, 6, 6))
    found = tightener(model, (1, 6, 6)).tighten("auto", "linf", 30.0)
    constants = dict(product.records["l2"].constants)
    (whole,) = {one.upper for one in found.relaxations if one.pair is None and one.method == "lipsdp-first-order"}
    for one in found.relaxations:
        assert one.norm == "l2"
        assert one.start_constant == constants[one.start] > 0
        assert one.start != "input_1"
    head = nn.Sequential(*list(model)[4:]).eval()
    assert whole >= found.relaxations[0].start_constant * lipschitz(head, (12,), points=random(50, 12)).lower
    assert whole <= product.records["l2"].upper * (1 + 1e-6)
    assert "behind" in found.attempts[0].note


class Own(nn.Module):
    def forward(self, x):
        return torch.sin(x)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_tighten_is_said_so(method):
    """A pool at the end leaves no part with activations."""
    model = Wired(
        lambda m, x: m.pool(m.act(m.conv(x))).flatten(1), conv=nn.Conv1d(1, 2, 3), act=nn.ReLU(), pool=nn.MaxPool1d(2)
    )
    found = tightener(randomised(model).double(), (1, 6)).tighten(method, "l2", 10.0)
    assert found.relaxations == []
    for attempt in found.attempts:
        assert not attempt.proved
        assert attempt.upper == attempt.pair_upper == math.inf
        assert attempt.note
        assert len(attempt.note.splitlines()) == 1


def test_a_linear_network_has_nothing_to_tighten_or_its_norm():
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))).double()
    found = tightener(model, (4,)).tighten("auto", "l2", 10.0)
    exact = float(torch.linalg.matrix_norm((model[1].weight @ model[0].weight).detach(), 2))
    assert all(one.upper >= exact for one in found.relaxations if one.pair is None)


def test_a_budget_that_is_too_small_is_said_so():
    model = dense(50, 300, 300, 10, scale=0.05)
    begin = time.monotonic()
    found = tightener(model, (50,)).tighten("auto", "l2", 0.05)
    assert time.monotonic() - begin < 20
    assert found.attempts[0].method == "closed-form"
    for attempt in found.attempts:
        assert attempt.proved == (attempt.upper < math.inf)
        assert attempt.proved or attempt.note


def test_many_classes_are_bounded_by_the_whole_end():
    classes = next(k for k in itertools.count(2) if k * (k - 1) // 2 > MOST_PAIRS)
    model = dense(4, 6, classes)
    found = tightener(model, (4,)).tighten("auto", "l2", 20.0)
    assert {one.pair for one in found.relaxations} == {None}
    model = dense(4, 6, classes - 1)
    found = tightener(model, (4,)).tighten("closed-form", "l2", 20.0)
    assert len(found.relaxations) == 1 + (classes - 1) * (classes - 2) // 2


# networks at the edge


def zeroed(model, k):
    with torch.no_grad():
        model[k].weight.zero_()
    return model


EDGES = {
    "zeros in the first layer": lambda: zeroed(dense(3, 4, 4, 3), 0),
    "zeros in the middle": lambda: zeroed(dense(3, 4, 4, 3), 2),
    "zeros in the last layer": lambda: zeroed(dense(3, 4, 4, 3), 4),
    "width 1": lambda: dense(1, 1, 1, 2),
    "two classes": lambda: dense(3, 4, 2),
    "the same rows": lambda: _same_rows(dense(3, 4, 3)),
    "an identity": lambda: dense(3, 4, 3, activation=nn.Identity),
    "an activation at both ends": lambda: nn.Sequential(nn.ReLU(), *dense(3, 4, 3), nn.ReLU()).eval(),
    "weights of 1e-170": lambda: dense(3, 4, 4, 3, scale=1e-170),
    "weights of 1e-60": lambda: dense(3, 4, 4, 3, scale=1e-60),
    "weights of 1e60": lambda: dense(3, 4, 4, 3, scale=1e60),
    "weights of 1e100": lambda: dense(3, 4, 4, 3, scale=1e100),
    "unlike weights": lambda: _unlike(dense(3, 4, 4, 3)),
    "very unlike weights": lambda: _unlike(dense(3, 4, 4, 3), 1e160),
    "a dead neuron": lambda: _dead(dense(3, 4, 4, 3)),
    "steep activations": lambda: dense(3, 4, 3, activation=lambda: nn.LeakyReLU(1e7)),
    "steep but known activations": lambda: dense(3, 4, 3, activation=lambda: nn.LeakyReLU(1e5)),
    "slopes of one": lambda: dense(3, 4, 3, activation=lambda: nn.LeakyReLU(1.0)),
}


def _same_rows(model):
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
    return model


def _unlike(model, size=1e80):
    with torch.no_grad():
        model[0].weight.mul_(size)
        model[2].weight.div_(size)
    return model


def _dead(model):
    with torch.no_grad():
        model[0].weight[1], model[2].weight[:, 2], model[2].weight[3], model[4].weight[:, 0] = 0.0, 0.0, 0.0, 0.0
    return model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", EDGES)
def test_edges_give_true_bounds_and_no_exception(name, norm):
    model = EDGES[name]()
    found = tightener(model, (model[0].in_features if hasattr(model[0], "in_features") else 3,))
    chain = nn.Sequential(*[layer for layer in model if not isinstance(layer, nn.Identity)])
    known = all(isinstance(layer, (nn.Linear, nn.ReLU, nn.LeakyReLU)) for layer in chain)
    known &= isinstance(chain[0], nn.Linear)
    jacobians = corners(chain) if known else None
    for method in SDP_METHODS:
        result = found.tighten(method, norm, 2.0)
        assert result.attempts
        for one in result.relaxations:
            assert 0 <= one.upper < math.inf
            if known and one.norm == norm and one.start_constant == 1.0:
                least = largest(jacobians, norm) if one.pair is None else pairs(jacobians, norm)[one.pair]
                assert least <= one.upper * (1 + 1e-12)


def test_functions_count_as_their_layers():
    first = dense(3, 4, 4, 3)
    second = Wired(
        lambda m, x: m.c(functional.relu(m.b(torch.relu(m.a(x))))), a=first[0], b=first[2], c=first[4]
    ).eval()
    uppers = [tightener(m, (3,)).tighten("closed-form", "l2", 10.0).attempts[0].upper for m in (first, second)]
    assert uppers[0] == uppers[1]


def test_a_proposal_holds_what_it_is_given():
    parts = (torch.ones(2),)
    assert Proposal(parts).multipliers is parts
    assert Proposal(parts).weights is None


def test_tightening_leaves_model_and_generator_alone():
    model = dense(3, 4, 4, 3, activation=lambda: Householder(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for method in METHODS:
        tightener(model, (3,)).tighten(method, "l2", 5.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_large_convolutions_have_a_form_or_say_why(mode):
    """Both sides above 1024, beyond what the product makes into matrices: never an exception."""
    model = Wired(
        lambda m, x: m.head(m.act(m.pool(m.conv(m.act(m.first(x))))).flatten(1)),
        first=nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode),
        conv=nn.Conv2d(1, 1, 3, padding=1, stride=1, padding_mode=mode),
        pool=nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True),
        act=nn.ReLU(),
        head=nn.Linear(289, 2),
    )
    model = randomised(model).double()
    found = tightener(model, (1, 33, 33)).tighten("closed-form", "l2", 30.0)
    assert found.attempts[0].proved or found.attempts[0].note


def test_walk_of_a_tightener_is_over_the_same_graph():
    """Anchors have the same names as in the product's walk, whose constants it takes."""
    model = Wired(lambda m, x: m.b(m.act(x + m.a(m.act(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 2), act=nn.ReLU())
    graph = trace(randomised(model).double(), (4,), leaf_types())
    walk = Walk(graph, norm_of=lambda *_: 1.0, factor_of=lambda *_: 1.0, prepare=float64)
    assert [name for name, _ in walk.anchors()] == [name for name, _ in lipschitz(model, (4,)).records["l2"].constants]


# what a review found


class ZeroBranch(nn.Module):
    """x + W2 relu(W1 x) with W2 = 0, as residual branches are often initialised, before a last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x + self.second(self.first(x).relu()))


@pytest.mark.parametrize("method", ["closed-form", "lipsdp", "lipsdp-first-order"])
def test_a_layer_that_nothing_reads_does_not_stop_the_proof(method):
    model = randomised(ZeroBranch().double(), 0, 0.7)
    nn.init.zeros_(model.second.weight)
    found = lipschitz(model, (4,), method, budget=5)
    norm = float(torch.linalg.matrix_norm(model.last.weight.detach(), 2))
    assert found.attempts[-1].proved
    assert norm <= found.attempts[-1].upper <= norm * (2.0 if method == "closed-form" else 1.01)


def test_l1_of_many_inputs_asks_for_no_matrix_of_them():
    model = randomised(nn.Sequential(nn.Linear(60000, 2), nn.ReLU(), nn.Linear(2, 2)), 0, 0.1)
    found = lipschitz(model, (60000,), "closed-form", "l1", budget=5)  # 60000^2 numbers would be 29 GB
    assert not found.attempts[-1].proved
    assert "no multipliers" in found.attempts[-1].note
    assert found.upper == found.attempts[0].upper


def test_the_solver_is_chosen_by_what_it_keeps_of_the_start():
    model = randomised(nn.Sequential(nn.Linear(500, 6), nn.ReLU(), nn.Linear(6, 3)), 0, 0.3)
    assert [one.method for one in lipschitz(model, (500,), "auto", budget=3).attempts][-1] == "lipsdp"
    in_linf = lipschitz(model, (500,), "auto", "linf", budget=3)
    assert [one.method for one in in_linf.attempts][-1] == "lipsdp-first-order"


def test_no_time_is_said_so():
    model = randomised(nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3)))
    found = lipschitz(model, (6,), "lipsdp-first-order", budget=1e-3)
    assert "0 s are too few for 600 neurons" in found.attempts[-1].note


@pytest.mark.parametrize("method", ["auto", "lipsdp", "lipsdp-layer"])
@pytest.mark.parametrize("scale", [1e-60, 1e25])
def test_numbers_out_of_range_leave_the_product(scale, method):
    layers = [one for _ in range(8) for one in (nn.Linear(3, 3), nn.ReLU())]
    model = randomised(nn.Sequential(*layers[:-1]).double(), 0, 1.0)
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight *= scale
    found = lipschitz(model, (3,), method, budget=2)
    assert 0 <= found.upper <= found.attempts[0].upper < math.inf

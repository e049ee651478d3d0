"""The form xi_k = psi_k(sum A_kl xi_l): it gives the differences of the tensors that the network computes."""

import math
from fractions import Fraction

import pytest
import torch
from exact_norms import entries, product, rational, root
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Wired, random, randomised
from torch import fx, nn

from speccert.certify.graph import trace
from speccert.certify.linear import float64
from speccert.certify.neurons import Neurons, NoForm, Part, form, neurons
from speccert.certify.rules import leaf_types, register_rule
from speccert.certify.walk import Walk
from speccert.models import Abs, GroupSort, Householder, MaxMin, Normalize, Residual, build_model

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def traced(model, shape):
    graph = trace(model, shape, leaf_types())
    return graph, Walk(graph, norm_of=lambda *_: 1.0, factor_of=lambda *_: 1.0, prepare=float64)


def formed(model, shape):
    graph, walk = traced(model, shape)
    return form(graph, walk, graph.output)


class Recorded(fx.Interpreter):
    """The tensors that a traced model computes, by node."""

    def __init__(self, graph):
        nodes = graph.nodes[0].graph
        super().__init__(fx.GraphModule(graph.model, nodes))
        self.values = {}

    def run_node(self, n):
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def recorded(graph, x):
    run = Recorded(graph)
    with torch.no_grad():
        run.run(x)
    return run.values


def inner(module, v):
    """u and xi = psi(u) of an activation by its definition, from its input v."""
    if isinstance(module, MaxMin):
        a, b = v.chunk(2, 1)
        return a - b, (a - b).abs()
    if isinstance(module, GroupSort):
        groups = v.unflatten(1, (-1, module.group_size))
        u = (groups - groups.mean(2, keepdim=True)).flatten(1, 2)
        return u, u.unflatten(1, (-1, module.group_size)).sort(2).values.flatten(1, 2)
    if isinstance(module, Householder):
        half = (module.angle.detach() / 2).reshape(-1, *[1] * (v.dim() - 2))
        a, b = v.chunk(2, 1)
        u = half.sin() * a - half.cos() * b
        return u, 2 * u.clamp(max=0)
    return v, None


def differences(graph, found, points, others):
    """Per group the flattened differences (u, xi), and that of the end, as the network gives them."""
    first, second = recorded(graph, points), recorded(graph, others)
    start = (first[found.start.name] - second[found.start.name]).flatten(1)
    groups = []
    for one in found.activations:
        (source,) = one.node.all_input_nodes
        module = graph.module(one.node) if one.node.op == "call_module" else None
        pair = []
        for values in (first, second):
            u, xi = inner(module, values[source.name])
            pair.append((u.flatten(1), (values[one.node.name] if xi is None else xi).flatten(1)))
        groups.append((pair[0][0] - pair[1][0], pair[0][1] - pair[1][1]))
    return start, groups, (first[found.end.name] - second[found.end.name]).flatten(1)


def acting(parts, xi):
    return sum(xi[part.source] @ part.matrix.T for part in parts)


def check(model, shape, start=None, points=5, graph=None):
    """The matrices join the differences of real tensors, and these obey the slopes."""
    graph, walk = traced(model, shape)
    nodes = {node.name: node for node in graph.nodes}
    found = form(graph, walk, graph.output, nodes[start] if start else None)
    net = neurons(found)
    x, other = random(points, *shape, seed=11), random(points, *shape, seed=12)
    first, groups, end = differences(
        graph, found, x, torch.where(random(points, *[1] * len(shape)) > 0, other, x + 0.01 * other)
    )
    xi = [first, *(own for _, own in groups)]
    assert net.sizes == found.sizes == tuple(part.shape[1] for part in xi)
    for layer, (u, own) in zip(net.layers, groups, strict=True):
        assert [part.source for part in layer.parts] == sorted({part.source for part in layer.parts})
        torch.testing.assert_close(acting(layer.parts, xi), u, **CLOSE)
        room = (own - layer.low * u) * (layer.high * u - own)
        summed = torch.zeros(len(u), layer.multipliers, dtype=torch.float64).index_add(1, layer.tied, room)
        assert float(summed.min()) >= -1e-10 * max(1.0, float(u.square().max()))
        assert layer.low.shape == layer.high.shape == layer.tied.shape == u.shape[1:]
        assert sorted(set(layer.tied.tolist())) == list(range(layer.multipliers))
    torch.testing.assert_close(acting(net.output, xi), end, **CLOSE)
    parts = [part for layer in net.layers for part in layer.parts] + list(net.output)
    assert all(0 <= part.error < 1e-4 * max(1.0, float(part.matrix.norm())) for part in parts)
    assert not any(part.matrix.requires_grad for part in parts)
    return net


def wired(function, **modules):
    return randomised(Wired(function, **modules), seed=4, scale=0.5).double()


def parts():
    return {
        "fc": nn.Linear(4, 4),
        "other": nn.Linear(4, 4),
        "wide": nn.Linear(8, 3),
        "act": nn.ReLU(),
        "tanh": nn.Tanh(),
        "conv": nn.Conv2d(2, 2, 3, padding=1),
        "ring": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        "down": nn.Conv2d(2, 4, 3, stride=2),
        "up": nn.ConvTranspose2d(2, 2, 2, 2),
        "bn": nn.BatchNorm2d(2),
        "pool": nn.AvgPool2d(2),
        "maxmin": MaxMin(),
        "sort": GroupSort(2),
        "turn": Householder(4),
        "turn2": Householder(2),
        "norm": Normalize([0.2, 0.5], [0.5, 2.0]),
    }


WIRINGS = {
    "one layer": (lambda m, x: m.fc(x), (4,)),
    "nothing": (lambda m, x: x, (4,)),
    "activation alone": (lambda m, x: m.act(x), (4,)),
    "activation at the end": (lambda m, x: m.act(m.fc(x)), (4,)),
    "activation at the start": (lambda m, x: m.fc(m.act(x)), (4,)),
    "two activations in a row": (lambda m, x: m.fc(m.tanh(m.act(x))), (4,)),
    "an activation used twice": (lambda m, x: m.fc(m.act(m.fc(m.act(x)))), (4,)),
    "a residual": (lambda m, x: x + m.fc(m.act(m.other(x))), (4,)),
    "a residual twice": (lambda m, x: _twice(lambda y: y + m.fc(m.act(m.other(y))), x), (4,)),
    "a difference": (lambda m, x: m.tanh(x) - m.fc(m.act(m.other(x))), (4,)),
    "a difference the other way": (lambda m, x: torch.sub(m.fc(m.act(x)), x), (4,)),
    "a difference as a method": (lambda m, x: m.act(x).sub(m.tanh(m.fc(x))), (4,)),
    "a sum that cancels": (lambda m, x: _minus(m.act(m.fc(x))), (4,)),
    "a tensor with itself": (lambda m, x: _plus(m.act(m.fc(x))), (4,)),
    "sums of sums": (lambda m, x: (m.act(x) + m.tanh(x)) - (m.fc(x) - m.act(m.other(x))), (4,)),
    "factors and constants": (lambda m, x: 2 * m.act(x) - m.tanh(x) / 4 + 1, (4,)),
    "joined": (lambda m, x: m.wide(torch.cat([m.act(m.fc(x)), x], 1)), (4,)),
    "joined, and through": (lambda m, x: m.wide(m.tanh(torch.cat([m.act(m.fc(x)), m.tanh(x)], 1))), (4,)),
    "joined by keywords": (lambda m, x: m.wide(torch.cat(tensors=(m.act(x), m.fc(x)), dim=-1)), (4,)),
    "joined with itself": (lambda m, x: m.wide(_joined(m.act(x), m.act(m.fc(x)))), (4,)),
    "joined and summed": (lambda m, x: torch.cat([m.act(x), x], 1) + torch.cat([x, m.tanh(x)], 1), (4,)),
    "dense net": (lambda m, x: _dense(m, x), (4,)),
    "max and min": (lambda m, x: m.fc(m.maxmin(m.other(x))), (4,)),
    "max and min at both ends": (lambda m, x: m.maxmin(m.fc(m.maxmin(x))), (4,)),
    "residual max and min": (lambda m, x: x - m.fc(m.maxmin(m.other(x))), (4,)),
    "sorted": (lambda m, x: m.fc(m.sort(m.other(x))), (4,)),
    "sorted twice": (lambda m, x: m.sort(m.fc(m.sort(x))), (4,)),
    "turned": (lambda m, x: m.turn(m.fc(m.turn(m.other(x)))), (4,)),
    "all in a row": (lambda m, x: m.fc(m.turn(m.fc(m.sort(m.fc(m.maxmin(m.act(x))))))), (4,)),
    "grouped without a layer between": (lambda m, x: m.turn(m.sort(m.maxmin(x))), (4,)),
    "functions": (lambda m, x: torch.relu(m.fc(x)).tanh() + torch.sigmoid(x).abs(), (4,)),
    "residual convolutions": (lambda m, x: (x + m.conv(m.act(m.conv(x)))).flatten(1), (2, 4, 4)),
    "residual convolutions and norm": (
        lambda m, x: m.act(m.bn(x) + m.ring(m.act(m.bn(m.conv(x))))).flatten(1),
        (2, 4, 4),
    ),
    "linear residual": (lambda m, x: m.act(m.norm(x) + m.conv(m.norm(x))).flatten(1), (2, 4, 4)),
    "down and up": (lambda m, x: m.up(m.act(m.pool(m.conv(x)))).flatten(1), (2, 4, 4)),
    "strided": (lambda m, x: m.turn(m.down(m.maxmin(m.conv(x)))).flatten(1), (2, 7, 5)),
    "sorted channels": (lambda m, x: m.sort(m.down(m.sort(x))).flatten(1), (2, 7, 5)),
    "turned channels": (lambda m, x: m.turn2(m.conv(m.turn2(x))).flatten(1), (2, 3, 4)),
    "channels joined": (lambda m, x: torch.cat([m.act(m.conv(x)), x], 1).flatten(1), (2, 3, 4)),
    "rows joined": (lambda m, x: torch.cat([m.act(m.conv(x)), x, m.tanh(x)], 2).flatten(1), (2, 3, 4)),
    "columns joined": (lambda m, x: torch.cat([x, m.act(m.conv(x))], -1).flatten(1), (2, 3, 4)),
    "means": (lambda m, x: m.act(m.conv(x)).mean((2, 3)), (2, 4, 4)),
}


def _twice(function, x):
    return function(function(x))


def _minus(x):
    return x - x


def _plus(x):
    return x + x


def _joined(x, y):
    return torch.cat([x, x], 1) + torch.cat([y, x], 1)


def _dense(m, x):
    first = m.act(m.fc(x))
    second = m.tanh(m.other(x + first))
    third = m.act(m.fc(x + first + second))
    return m.wide(torch.cat([third + x, second - first], 1))


@pytest.mark.parametrize("name", WIRINGS)
def test_form_gives_the_differences_of_the_network(name):
    function, shape = WIRINGS[name]
    check(wired(function, **parts()), shape)


ACTIVATIONS = ("abs", "gelu", "groupsort", "householder", "identity", "leaky-relu", "maxmin", "relu", "sigmoid", "silu")
MODELS = [
    *(("mlp", (6,), {"width": 8, "depth": 2, "activation": act}) for act in (*ACTIVATIONS, "softplus", "tanh")),
    *(("convnet-4c3f", (1, 8, 8), {"width": 4, "activation": act}) for act in ("relu", "maxmin", "groupsort")),
    ("convnet-6c2f", (2, 8, 8), {"width": 4, "activation": "householder"}),
    *(("lipconvnet", (1, 8, 8), {"width": 4, "depth": 4, "activation": act}) for act in ("maxmin", "householder")),
    ("liresnet", (1, 8, 8), {"width": 4, "depth": 3, "activation": "groupsort"}),
    ("liresnet", (1, 8, 8), {"width": 4, "depth": 2, "activation": "relu", "mean": 0.3, "std": 0.4}),
]


@pytest.mark.parametrize(("name", "shape", "options"), MODELS)
def test_form_gives_the_differences_of_every_architecture(name, shape, options):
    check(randomised(build_model(name, shape, 3, **options), scale=0.4).double(), shape)


def test_form_of_a_residual_layer():
    block = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), MaxMin(), nn.Conv2d(4, 2, 3, padding=1))
    model = nn.Sequential(
        Residual(block), nn.ReLU(), Residual(nn.ReLU(), nn.Conv2d(2, 2, 1)), nn.Flatten(), nn.Linear(24, 3)
    )
    check(randomised(model).double(), (2, 3, 4))


# random graphs


@st.composite
def graphs(draw):
    """A list of steps over a growing list of tensors of 4 numbers."""
    steps = []
    for position in range(1, draw(st.integers(1, 7)) + 1):
        kind = draw(st.sampled_from(["fc", "act", "act", "sum", "difference", "cat", "scale"]))
        first, second = (draw(st.integers(0, position - 1)) for _ in range(2))
        steps.append((kind, first, second, draw(st.integers(0, 5))))
    return steps, draw(st.integers(0, 1000))


def grown(steps):
    def forward(m, x):
        values = [x]
        for kind, i, j, which in steps:
            a, b = values[i], values[j]
            values.append(
                {
                    "fc": lambda a=a, w=which: m.layers[w](a),
                    "act": lambda a=a, w=which: m.acts[w](a),
                    "sum": lambda a=a, b=b: a + b,
                    "difference": lambda a=a, b=b: a - b,
                    "cat": lambda a=a, b=b: m.narrow(torch.cat([a, b], 1)),
                    "scale": lambda a=a: -a / 3,
                }[kind]()
            )
        return values[-1]

    return forward


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_random_graphs_have_their_differences(case):
    steps, seed = case
    acts = [nn.ReLU(), nn.Tanh(), MaxMin(), GroupSort(4), Householder(4), Abs()]
    model = Wired(
        grown(steps),
        layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(6)),
        acts=nn.ModuleList(acts),
        narrow=nn.Linear(8, 4),
    )
    check(randomised(model, seed, 0.6).double(), (4,))


# parts of a network


@pytest.mark.parametrize(
    "name", ["an activation used twice", "a residual twice", "dense net", "all in a row", "strided"]
)
def test_parts_behind_an_anchor(name):
    """From every anchor that the end does not bypass; a part around an anchor is refused."""
    function, shape = WIRINGS[name]
    model = wired(function, **parts())
    _, walk = traced(model, shape)
    formed = 0
    for anchor, _ in walk.anchors():
        try:
            net = check(model, shape, start=anchor)
        except NoForm as error:
            assert "on a path around" in str(error)  # noqa: PT017
        else:
            formed += 1
            assert len(net.layers) <= len(check(model, shape).layers)
    assert formed >= 2


def test_a_part_between_two_anchors():
    model = wired(lambda m, x: m.fc(m.tanh(m.fc(m.act(m.other(x))))), **parts())
    graph, walk = traced(model, (4,))
    by_name = {node.name: node for node in graph.nodes}
    net = neurons(form(graph, walk, by_name["tanh"], by_name["act"]))
    assert net.sizes == (4, 4)
    torch.testing.assert_close(net.layers[0].parts[0].matrix, model.fc.weight.detach())
    torch.testing.assert_close(net.output[0].matrix, torch.eye(4, dtype=torch.float64))
    assert net.output[0].error == net.layers[0].parts[0].error == 0.0


def test_a_part_without_activations_is_its_matrix():
    model = wired(lambda m, x: m.fc(m.other(x)) + x, **parts())
    net = neurons(formed(model, (4,)))
    assert net.layers == ()
    expected = (model.fc.weight @ model.other.weight).detach() + torch.eye(4)
    torch.testing.assert_close(net.output[0].matrix, expected)


def test_a_start_is_the_end():
    model = wired(lambda m, x: m.act(x), **parts())
    graph, walk = traced(model, (4,))
    net = neurons(form(graph, walk, graph.output, graph.output))
    assert net.layers == ()
    torch.testing.assert_close(net.output[0].matrix, torch.eye(4, dtype=torch.float64))


# refusals


def test_pools_have_no_form():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)).double().eval()
    with pytest.raises(NoForm, match="MaxPool2d has no slopes") as caught:
        formed(model, (1, 6, 6))
    assert len(str(caught.value).splitlines()) == 1


class Own(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def test_own_activations_have_no_form_without_slopes(monkeypatch):
    monkeypatch.setattr(
        "speccert.certify.rules._RULES", dict(__import__("speccert.certify.rules", fromlist=["_"])._RULES)
    )
    register_rule(Own, factor=1.0)
    with pytest.raises(NoForm, match="Own has no slopes"):
        formed(nn.Sequential(nn.Linear(2, 2), Own(), nn.Linear(2, 2)).eval(), (2,))


def test_no_form_is_a_value_error():
    assert issubclass(NoForm, ValueError)


def test_too_many_neurons_are_refused():
    found = formed(randomised(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))), (3,))
    assert neurons(found, most=8).sizes == (3, 8)
    with pytest.raises(NoForm, match="8 neurons are more than 7"):
        neurons(found, most=7)


def test_matrices_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("speccert.certify.neurons._ENTRIES", 64)
    small = randomised(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert neurons(formed(small, (8,))).sizes == (8, 8)
    with pytest.raises(NoForm, match="9 x 8 is too large"):
        neurons(formed(randomised(nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 2))), (8,)))


def test_identities_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("speccert.certify.neurons._ENTRIES", 64)
    model = wired(lambda m, x: x + m.act(x), **parts())
    with pytest.raises(NoForm, match="too large"):
        neurons(formed(model, (9,)))


# matrices


def test_matrices_of_unit_vectors_on_either_side(monkeypatch):
    """In one batch or several, wide or tall."""
    for step in (1, 60, 1 << 24):
        monkeypatch.setattr("speccert.certify.neurons._AT_ONCE", step)
        for sizes in ((3, 11, 4), (11, 3, 4)):
            model = randomised(nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(*sizes[1:]))).double()
            net = neurons(formed(model, (sizes[0],)))
            assert torch.equal(net.layers[0].parts[0].matrix, model[0].weight.detach())
            assert torch.equal(net.output[0].matrix, model[2].weight.detach())
            assert net.output[0].error == net.layers[0].parts[0].error == 0.0


def exact_error(part, exact):
    """An upper bound of ||held - exact|| by its Frobenius norm."""
    held = rational(part.matrix)
    total = sum((a - b) ** 2 for u, v in zip(held, exact, strict=True) for a, b in zip(u, v, strict=True))
    return root(total) * (1 + Fraction(1, 10**50))


FOLDED = {
    "two layers": lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)),
    "three layers": lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)),
    "a convolution and a layer": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(15, 4)
    ),
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("name", FOLDED)
def test_matrices_are_within_their_error_of_the_true_ones(name, scale):
    model = randomised(nn.Sequential(FOLDED[name](), nn.ReLU()), scale=scale).double()
    exact, shape = None, (5,)
    for layer in model[0]:
        rows = entries(layer, shape)
        exact = rows if exact is None else product(rows, exact)
        shape = tuple(layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    (part,) = neurons(formed(model, (5,))).layers[0].parts
    assert exact_error(part, exact) <= Fraction(part.error)


def test_error_includes_what_folding_rounds():
    """Normalisation by 0.3 folds into the layer; its reciprocal is no float."""
    model = randomised(nn.Sequential(Normalize(0.0, 0.3), nn.Linear(5, 4), nn.ReLU())).double()
    std = Fraction(float(model[0].std[0]))
    exact = [[value / std for value in row] for row in rational(model[1].weight)]
    (part,) = neurons(formed(model, (5,))).layers[0].parts
    assert 0 < exact_error(part, exact) <= Fraction(part.error)


# pairs


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-10, 1.0, 1e150, 1e200])
@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_pair_is_the_difference_of_two_rows(error, scale):
    """Within its error of the exact difference, for any matrix within the error of the two."""
    matrix = scale * random(4, 6)
    matrix[0, 0], matrix[2, 0] = scale, scale * (2 / 3 + 2.0**-40)
    net = Neurons((6,), (), (Part(0, matrix, error * scale),))
    pair = net.pair(2, 0)
    (part,) = pair.output
    assert part.matrix.shape == (1, 6)
    exact = [[Fraction(a) - Fraction(b) for a, b in zip(matrix[2].tolist(), matrix[0].tolist(), strict=True)]]
    own = exact_error(part, exact)
    assert own + root(Fraction(2)) * Fraction(error * scale) * (1 - Fraction(1, 10**50)) <= Fraction(part.error)
    assert part.error <= (1.5 * error + 1e-14) * scale
    assert (pair.sizes, pair.layers) == (net.sizes, net.layers)


def test_pair_of_a_residual_has_all_parts():
    model = wired(lambda m, x: m.fc(x) - m.act(m.other(x)), **parts())
    net = neurons(formed(model, (4,)))
    pair = net.pair(1, 3)
    assert [part.source for part in pair.output] == [0, 1]
    torch.testing.assert_close(pair.output[0].matrix[0], (model.fc.weight[1] - model.fc.weight[3]).detach())
    torch.testing.assert_close(pair.output[1].matrix, torch.tensor([[0.0, -1.0, 0.0, 1.0]], dtype=torch.float64))


# groups


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_tied_numbers_are_those_that_are_sorted_together(shape, size):
    """Numbers share a multiplier exactly where one can change the place of the other."""
    model = nn.Sequential(nn.Identity(), GroupSort(size)).double().eval()
    (layer,) = neurons(formed(model, shape)).layers
    count = math.prod(shape)
    sorts = torch.func.jacrev(lambda v: model(v[None])[0])
    linked = torch.eye(count) > 0
    for seed in range(60):
        linked |= (sorts(random(*shape, seed=seed)).reshape(count, count) != 0).reshape(count, count)
    assert torch.equal(linked, layer.tied[:, None] == layer.tied[None])
    assert layer.multipliers == count // size


def test_untied_numbers_have_a_multiplier_each():
    net = neurons(formed(wired(lambda m, x: m.maxmin(m.turn(m.act(x))), **parts()), (4,)))
    assert [layer.tied.tolist() for layer in net.layers] == [[0, 1, 2, 3], [0, 1], [0, 1]]
    assert [layer.multipliers for layer in net.layers] == [4, 2, 2]


# the model stays as it is


def test_a_form_leaves_the_model_alone():
    model = randomised(build_model("liresnet", (1, 8, 8), 3, width=4, depth=2, activation="householder"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    net = neurons(formed(model, (1, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(part.matrix.dtype == torch.float64 for layer in net.layers for part in layer.parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_type_convert_without_rounding(dtype):
    model = randomised(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))).to(dtype)
    net = neurons(formed(model, (5,)))
    assert torch.equal(net.layers[0].parts[0].matrix, model[0].weight.detach().double())
    assert net.layers[0].parts[0].error == 0.0

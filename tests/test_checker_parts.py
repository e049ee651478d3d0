import numpy as np
import pytest
import torch
from checker_nets import FORMS, network_of
from flint import ctx
from torch import nn

from speccert.certify.checker import matrices, parts
from speccert.certify.checker.balls import approximate
from speccert.certify.checker.chains import Chain, Sum
from speccert.certify.checker.maps import Gather, Scale, Windows
from speccert.certify.checker.matrices import Refused
from speccert.certify.checker.network import read, traced
from speccert.certify.checker.parts import check_size, part_from
from speccert.models import GroupSort, Householder, MaxMin


@pytest.fixture(autouse=True)
def _precision():
    with ctx.workprec(128):
        yield


def _inner(layer, x):
    """psi(R x) of the activations that are more than one function a number."""
    if isinstance(layer, MaxMin):
        first, second = x.chunk(2, 1)
        return (first - second).abs()
    if isinstance(layer, Householder):
        half = layer.angle.reshape(-1, *[1] * (x.dim() - 2)) / 2
        first, second = x.chunk(2, 1)
        return 2 * (half.sin() * first - half.cos() * second).clamp(max=0)
    if isinstance(layer, GroupSort):
        groups = x.unflatten(1, (-1, layer.group_size))
        return (groups - groups.mean(2, keepdim=True)).sort(2).values.flatten(1, 2)
    return None


class _Values(torch.fx.Interpreter):
    def __init__(self, graph, network):
        super().__init__(torch.fx.GraphModule(graph.model, graph.nodes[0].graph))
        self.found, self._kinds = [], {node.name: node.kind for node in network.nodes}

    def run_node(self, node):
        value = super().run_node(node)
        if self._kinds.get(node.name) == "activation":
            layer = self.module.get_submodule(node.target) if node.op == "call_module" else None
            own = _inner(layer, self.env[node.all_input_nodes[0]])
            self.found.append(value if own is None else own)
        return value


class Block(nn.Module):
    """x + W act(x): an activation that passes a part of its input on, inside a sum."""

    def __init__(self, width):
        super().__init__()
        self.act, self.last = MaxMin(), nn.Linear(width, width)
        self.last.weight.data /= 4

    def forward(self, x):
        return x + self.last(self.act(x))


class Steps(nn.Module):
    """h_(n + 1) = h_n + W h_(n - 1): sums of maps that begin with nothing in common."""

    def __init__(self, count):
        super().__init__()
        self.first, self.act = nn.Linear(3, 4), MaxMin()
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        for step in self.steps:
            step.weight.data /= 4

    def forward(self, x):
        before = self.act(self.first(x))
        now = self.act(before)
        for step in self.steps:
            before, now = now, self.act(now) + step(before)
        return now


def _deep(model, shape):
    torch.manual_seed(0)
    made = model().eval().double()
    return made, shape, traced(made, shape)


DEEP = {
    "blocks": (lambda: nn.Sequential(nn.Linear(3, 4), *(Block(4) for _ in range(14)), nn.Linear(4, 2)), (3,)),
    "steps": (lambda: Steps(20), (3,)),
}


@pytest.mark.parametrize("name", [*FORMS, *DEEP])
def test_the_form_is_that_of_the_network(name):
    """Differences of the numbers that torch computes fit the matrices, and lie between the slopes.

    A deep network takes a time that doubles with each block where its sums are worked out one by one.
    """
    _, shape, graph = _deep(*DEEP[name]) if name in DEEP else network_of(name)
    network = read(graph)
    part = part_from(network, network.nodes[0].name)
    for scale in (1e-2, 1.0, 10.0):
        x, other = torch.randn(2, 30, *shape, dtype=torch.float64) * scale
        with torch.no_grad():
            runs = [_Values(graph, network) for _ in range(2)]
            ends = [run.run(batch).flatten(1) for run, batch in zip(runs, (x, other), strict=True)]
        values = [[x, *runs[0].found], [other, *runs[1].found]]
        groups = [(a.flatten(1) - b.flatten(1)).numpy().T for a, b in zip(*values, strict=True)]
        assert [len(group) for group in groups] == list(part.sizes)
        for layer, xi in zip(part.layers, groups[1:], strict=True):
            u = sum(approximate(rows) @ groups[source] for source, rows in layer.rows.items())
            low, high = layer.low / 2**26, layer.high / 2**26
            terms = (xi - low * u) * (high * u - xi)
            sums = np.zeros((layer.count, terms.shape[1]))
            np.add.at(sums, layer.conditions, terms)
            assert (sums >= -1e-12 * scale**2).all()
        end = sum(approximate(rows) @ groups[source] for source, rows in part.end.items())
        assert np.abs(end - (ends[0] - ends[1]).numpy().T).max() <= 1e-11 * scale


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, lambda: nn.GELU("tanh"), nn.Tanh, nn.ELU, nn.Softplus])
def test_slopes_are_reached_on_their_grid(activation):
    model = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 3)).eval()
    layer = part_from(read(traced(model, (6,))), "input_1").layers[0]
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation()(x).sum(), x)
    assert layer.low / 2**26 <= float(slopes.min()) + 1e-9
    assert layer.high / 2**26 >= float(slopes.max()) - 1e-9
    assert layer.low / 2**26 >= float(slopes.min()) - 1e-6
    assert layer.high / 2**26 <= float(slopes.max()) + 1e-6


@pytest.mark.parametrize("activation", [MaxMin, lambda: GroupSort(2), lambda: GroupSort(3), lambda: Householder(3072)])
def test_slopes_of_many_channels_are_small(activation):
    """No matrix of all channels by all channels, which every certificate would pay for."""
    network = read(traced(nn.Sequential(nn.Linear(2, 3072), activation(), nn.Linear(3072, 2)).eval(), (2,)))
    (slopes,) = (node.activation.slopes for node in network.nodes if node.kind == "activation")
    for linear in (slopes.before, slopes.after, slopes.skip):
        for step in Chain((linear,), linear.in_shape).steps:
            for part in (step.first, step.second) if isinstance(step, Sum) else (step,):
                for inner in part.steps if isinstance(part, Chain) else (part,):
                    assert isinstance(inner, Gather | Scale | Windows)


def test_large_parts_are_refused_before_they_are_made(monkeypatch):
    network = read(traced(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU()).eval(), (9,)))
    check_size(network, "input_1")
    for place, name, value, message in (
        (parts, "_NUMBERS", 14, "15 numbers of activations"),
        (matrices, "_SIDE", 7, "a matrix of 8 x 9"),
        (matrices, "_ENTRIES", 71, "a matrix of 8 x 9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            patch.setattr(parts, "materialised", None)
            for function in (check_size, part_from):
                with pytest.raises(Refused, match=message):
                    function(network, "input_1")

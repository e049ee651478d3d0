import numpy as np
import pytest
import torch
from checker_nets import FORMS, network_of
from flint import ctx
from torch import nn

from speccert.certify.checker.balls import approximate
from speccert.certify.checker.network import read, traced
from speccert.certify.checker.parts import part_from
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


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_that_of_the_network(name):
    """Differences of the numbers that torch computes fit the matrices, and lie between the slopes."""
    _, shape, graph = network_of(name)
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

"""The executed network, run at random points of a ball, against what the checker says that rounding can do."""

import copy
import math

import pytest
import torch
from flint import arb, ctx
from torch import nn

from speccert.certify import certify
from speccert.certify.checker.bounds import row_differences
from speccert.certify.checker.deviation import Deviation
from speccert.certify.checker.network import plain_copy, read, traced
from speccert.certify.checker.rounds import FORMATS
from speccert.certify.checker.samples import Radii, forward
from speccert.models import GroupSort, Householder, Normalize


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(24, 3)

    def forward(self, x):
        h = x.flatten(1)
        h = h * 1.7 - self.a(h) / 0.3 + 0.1
        h = h + torch.relu(self.b(h))
        return self.c(torch.cat([torch.tanh(h), h], 1))


NETS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(),
                                   nn.Linear(40, 3)),
    "conv": lambda: nn.Sequential(Normalize([0.3], [0.1]), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8),
                                  GroupSort(4), nn.ConvTranspose2d(8, 4, 2), nn.AvgPool2d(2, 1), nn.Flatten(),
                                  nn.Linear(16, 3)),
    "smooth": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), Householder(16), nn.SiLU(),
                                    nn.Linear(16, 16), nn.Softplus(), nn.ELU(), nn.Linear(16, 3)),
    "sums": Sums,
}  # fmt: skip


@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_the_executed_network_stays_within_the_deviation(name, arithmetic):
    torch.manual_seed(0)
    model, x = NETS[name]().eval(), torch.rand(3, 3, 2, 2)
    number = FORMATS[arithmetic]
    l2 = certify(model, x, arithmetic=arithmetic).bounds["l2"]
    run = plain_copy(model, number.dtype)
    exact = copy.deepcopy(run).double()
    with ctx.workprec(128), torch.no_grad():
        network = read(traced(run, (3, 2, 2)))
        deviation = Deviation(
            network, {r.end: r.upper for r in l2.runs}, {c.node: c.upper for c in l2.constants}, number
        )
        constants = [[arb(v) for v in row] for row in l2.pairwise]
        rounds = arithmetic != "float32"
        radii = Radii(deviation, constants, row_differences(network, "l2"), arb(1), rounds=rounds)
        for sample, passed in zip(x, forward(network, x, str), strict=True):
            centre = radii.at_centre(passed)
            for rho in (0.0, 0.01, 1.0):
                away = torch.randn(200, 3, 2, 2)
                points = sample + away * (rho / away.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
                distance = (points.double() - sample.double()).flatten(1).norm(dim=1).max()
                found = run(points.to(number.dtype)).double() - exact(points.double())
                for i in range(3):
                    for j in range(i):
                        gap = (found[:, i] - found[:, j]).abs().max()
                        allowed = radii.lost(centre, i, j) + radii.loss(i, j) * arb(float(distance))
                        assert allowed >= float(gap)
                        assert math.isfinite(float(allowed.upper()))


def test_real_arithmetic_deviates_by_nothing():
    model = NETS["dense"]().eval()
    network = read(traced(model, (3, 2, 2)))
    deviation = Deviation(network, {}, {n.name: 1.0 for n in network.anchors}, FORMATS["real"])
    assert all(step.p.is_zero() and step.q.is_zero() and step.h.is_zero() for step in deviation.steps.values())

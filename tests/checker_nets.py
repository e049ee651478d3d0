"""Small networks of every kind that has slopes, for tests of the checker's relaxations."""

import torch
from torch import nn

from speccert.certify.checker.network import traced
from speccert.models import Abs, GroupSort, Householder, MaxMin, Normalize, Residual


class Branches(nn.Module):
    """Unlike sums, differences and concatenations, activations that pass a part on, a scaling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(18, 4)
        self.pairs = MaxMin()

    def forward(self, x):
        h = x - torch.relu(self.a(x)) * 0.5 + 0.1
        g = torch.tanh(self.b(h)) - self.pairs(h)
        return self.c(torch.cat([h, g, torch.relu(self.b(g))], 1))


class ConvBranches(nn.Module):
    """Convolutions, a residual sum, activations of groups at every place, a concatenation of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 1)
        self.turn, self.sort, self.last = Householder(4), GroupSort(2), nn.Linear(32, 3)
        nn.init.uniform_(self.turn.angle, -3, 3)

    def forward(self, x):
        h = self.turn(self.a(x))
        h = torch.cat([h + self.sort(self.b(h)), h], 1)
        return self.last(torch.relu(h).flatten(1))


def _plain(activation):
    return lambda: nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3))


FORMS = {
    **{str(make()): (_plain(make), (6,)) for make in (
        nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Sigmoid, nn.Softplus, nn.ELU,
        nn.GELU, nn.SiLU, nn.Softshrink, Abs, MaxMin, lambda: nn.Hardtanh(-0.3, 0.4), lambda: nn.LeakyReLU(-2.0),
        lambda: nn.LeakyReLU(0.3), lambda: nn.ELU(1.5), lambda: nn.GELU("tanh"), lambda: GroupSort(4),
        lambda: GroupSort(2), lambda: Householder(8))},
    "branches": (Branches, (6,)),
    "convolutions": (ConvBranches, (2, 4, 4)),
    "folded": (lambda: nn.Sequential(Normalize([0.1, 0.2], [0.3, 0.5]), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3),
                                     nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), (2, 3, 3)),
    "residual": (lambda: nn.Sequential(Residual(nn.Sequential(nn.Linear(5, 5), nn.ReLU())), nn.Linear(5, 3)), (5,)),
    "odd groups": (lambda: nn.Sequential(nn.Linear(6, 9), GroupSort(3), nn.Linear(9, 3)), (6,)),
    "affine": (lambda: nn.Sequential(nn.Linear(5, 3)), (5,)),
}  # fmt: skip


def network_of(name):
    """The model in float64, its input shape, its graph."""
    torch.manual_seed(5)
    make, shape = FORMS[name]
    model = make().eval().double()
    return model, shape, traced(model, shape)

"""Square: random search over squares of pixels, without gradients."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .base import Attack
from .checks import whole
from .images import Images
from .norms import per_sample
from .standing import Standing
from .task import Task

# After how many queries the area of the squares is halved again.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_AREA = 0.8  # of the first squares, as a share of the image


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """At each query, one square of pixels at a random place changes; the change stays where the margin gets larger.

    In l-infinity the square takes x +- eps, one sign a channel, from a start of vertical stripes. In l2 the square
    takes a pair of pyramids of opposite signs and the perturbation of a second square, from a start of 5 x 5 such
    pairs, and the whole is scaled to the sphere. All samples get the same places and different signs.

    Attributes:
        queries: queries of each restart, >= 1.
        restarts: random starts, >= 1.

    Reference: Andriushchenko et al., Square Attack: a Query-efficient Black-box Adversarial Attack via Random Search,
    ECCV 2020, algorithms 1 to 3, with the squares of AutoAttack: the area starts at 0.8 of the image and is halved
    after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries, whatever `queries` is.
    """

    name = "square"
    norms = ("l2", "linf")

    queries: int = 5000
    restarts: int = 1

    def __post_init__(self) -> None:
        whole("queries", self.queries)
        whole("restarts", self.restarts)

    def cost(self, classes: int) -> float:
        """Return the work of the queries, half a gradient each."""
        return 0.5 * self.queries * self.restarts

    def hardened(self) -> "Square":
        """Return at least 3 restarts."""
        return replace(self, restarts=max(self.restarts, 3))

    @torch.no_grad()
    def _run(self, task: Task) -> Tensor:
        standing = Standing(task)
        for _ in range(self.restarts):
            if len(standing) == 0:
                break
            _Search(standing).run(self.queries)
        return standing.best.point


class _Search:
    """One run over the samples that stand; `z` are the best images of each, `margin` their margins."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.images = Images(tuple(standing.part.x.shape[1:]))
        self.x = self.images.of(standing.part.x)
        self.propose = self._window if standing.part.norm.name == "linf" else self._pyramids
        self.z = self._stripes() if standing.part.norm.name == "linf" else self._tiles()
        self.margin = torch.full((len(self.z),), -torch.inf, dtype=self.z.dtype, device=self.z.device)
        self._take(self.z)

    def run(self, queries: int) -> None:
        """Make that many queries, or as many as some sample stands for."""
        for query in range(queries):
            if len(self.standing) == 0:
                return
            area = _AREA / 2 ** sum(query > limit for limit in _HALVINGS)
            self._take(self.propose(math.sqrt(area * self.x.shape[2] * self.x.shape[3])))

    def _take(self, z: Tensor) -> None:
        part = self.standing.part
        points = self.images.samples(z)
        logits = part.victim.logits(points)
        margin = part.margin(logits).to(self.margin.dtype)
        better = (margin > self.margin) | (margin >= 0)
        self.z = torch.where(per_sample(better, z), z, self.z)
        self.margin = torch.where(better, margin, self.margin)
        keep = self.standing.offer(points, logits)
        if keep is not None:
            self.x, self.z, self.margin = self.x[keep], self.z[keep], self.margin[keep]

    @property
    def _eps(self) -> float:
        return self.standing.part.eps

    def _signs(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.x.device, dtype=self.x.dtype).sub(0.5).sign()

    def _corner(self, side: int) -> tuple[int, int]:
        height, width = self.x.shape[2:]
        return int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))

    def _stripes(self) -> Tensor:
        count, channels, _, width = self.x.shape
        return (self.x + self._eps * self._signs(count, channels, 1, width)).clamp(0.0, 1.0)

    def _window(self, side: float) -> Tensor:
        size = min(max(round(side), 1), *self.x.shape[2:])
        row, column = self._corner(size)
        z, change = self.z.clone(), 2 * self._eps * self._signs(self.x.shape[1], 1, 1)
        here = (..., slice(row, row + size), slice(column, column + size))
        x = self.x[here]
        z[here] = torch.maximum(torch.minimum(z[here] + change, x + self._eps), x - self._eps).clamp(0.0, 1.0)
        return z

    def _tiles(self) -> Tensor:
        count, channels, height, width = self.x.shape
        side = max(min(height, width) // 5, 1)
        delta = torch.zeros_like(self.x)
        for row in range(height % side // 2, height - side + 1, side):
            for column in range(width % side // 2, width - side + 1, side):
                pair = _pyramid_pair(side, self.x) * self._signs(count, channels, 1, 1)
                delta[:, :, row : row + side, column : column + side] = pair
        return self._on_sphere(delta)

    def _pyramids(self, side: float) -> Tensor:
        """Move the l2 mass of one square, and what is missing to eps, into another one."""
        count, channels, height, width = self.x.shape
        size = max(round(side), 3)
        size = min(size + 1 - size % 2, height, width)
        delta = self.z - self.x
        spare = (self._eps**2 - (delta**2).sum((1, 2, 3), keepdim=True)).clamp_min(0.0)
        row, column = self._corner(size)
        gone_row, gone_column = self._corner(size)
        here = (..., slice(row, row + size), slice(column, column + size))
        gone = (..., slice(gone_row, gone_row + size), slice(gone_column, gone_column + size))
        both = torch.zeros(height, width, dtype=torch.bool, device=delta.device)
        both[here], both[gone] = True, True
        mass = (delta**2 * both).sum((2, 3), keepdim=True) + spare / channels
        shape = _pyramid_pair(size, self.x) * self._signs(count, channels, 1, 1) + _unit(delta[here])
        delta[gone] = 0.0
        delta[here] = _unit(shape) * mass.sqrt()
        return self._on_sphere(delta)

    def _on_sphere(self, delta: Tensor) -> Tensor:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        return (self.x + self._eps * delta / per_sample(length, delta)).clamp(0.0, 1.0)


def _unit(window: Tensor) -> Tensor:  # (B, C, s, s)
    unit: Tensor = window / (window**2).sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    return unit


def _pyramid_pair(side: int, like: Tensor) -> Tensor:  # returns (side, side)
    """Return two halves of opposite signs at l2 size 1: a pyramid each, upright or lying at random."""
    upper = _pyramid(side // 2, side, like)
    lower = -_pyramid(side - side // 2, side, like)
    pair = nn.functional.normalize(torch.cat([upper, lower]).flatten(), dim=0).reshape(side, side)
    return pair.T if bool(torch.rand(()) > 0.5) else pair


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:  # returns (height, width)
    """Return sum_k 1 / k^2 on nested rectangles that grow by one pixel on each side, at l2 size 1."""
    values = like.new_zeros(height, width)
    top, left = height // 2, width // 2
    for ring in range(max(top, left) + 1):
        values[max(top - ring, 0) : top + ring + 1, max(left - ring, 0) : left + ring + 1] += 1 / (ring + 1) ** 2
    return nn.functional.normalize(values.flatten(), dim=0).reshape(height, width)

"""Integer pixels: adversarial points all of whose entries are k / 255, as an image file holds them.

The ball stays that of the floats: ||z - x|| <= eps, measured in float64 on the tensors. The float32 numbers next to
k / 255 are off by up to 3e-8, so eight levels always lie within eps = 8.001 / 255, but not always within 8 / 255.
"""

import torch
from torch import Tensor

from .norms import per_sample
from .slopes import inward
from .task import Task

_TOP = 255
# How a point that failed is tried again: the ball's radius over its distance, and the step up the gradient over that.
_TRIES = ((1.0, 0.0), (1.02, 0.25), (1.1, 1.0), (1.5, 4.0), (1.5, 0.5), (1.5, 0.1))
# Rounds of the search for nearer points; each takes a gradient and three evaluations.
_ROUNDS = 12


def levels(like: Tensor) -> Tensor:
    """Return the 256 floats of `like`'s type nearest to k / 255, on its device."""
    return (torch.arange(_TOP + 1, dtype=torch.float64, device=like.device) / _TOP).to(like.dtype)


def valid_grid(x: Tensor) -> None:
    """ValueError unless every entry of `x` is the float nearest to k / 255 for some k."""
    off = x != levels(x)[_level(x)]
    if bool(off.any()):
        share = f"{int(off.sum())} of {x.numel()} entries"
        raise ValueError(f"integer_pixels needs x on the grid k / 255, got {x[off][0].item()!r} ({share} are off it)")


def confirm(task: Task, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (grid point (B, ...) in the ball beside `candidate`, its logits (B, K)), re-scored on that very tensor.

    Tried one after the other, on the samples that still stand: the candidate rounded to the nearest levels, towards
    x, and as the gradient of the margin asks for, then also some steps up that gradient and, where eps leaves room,
    farther out. Of several failures, the one with the largest margin is returned.
    """
    delta = _moves(task, task.admit(candidate))
    reach, every = task.norm.size(delta), torch.full((len(delta),), task.eps, dtype=torch.float64, device=delta.device)
    best = _Best(task, _rounded(task, delta, every, None))
    rows = best.standing(reach > 0)
    best.offer(rows, _rounded(task[rows], delta[rows], every[rows], torch.zeros_like(delta[rows])))
    for stretch, stride in _TRIES:
        rows = best.standing(reach > 0)
        if len(rows) == 0:
            break
        radius = (stretch * reach[rows] + 1 / _TOP).clamp_max(task.eps)
        best.offer(rows, _guided(task[rows], delta[rows], best.gradient(rows), radius, stride))
    return best.point, best.logits


def shorten(task: Task, point: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Search for grid points nearer than each adversarial grid `point`; return the nearest met and its logits.

    A round takes the gradient of the margin at the nearest point so far and tries: that point drawn towards x into
    a smaller ball, the steepest point of that ball, and the nearest point with those levels given back that the
    margin has to spare. The ball's radius is bisected, from the certified radius up.
    """
    best = _Best(task, point, logits)
    distance = task.distance(point)
    low = torch.where(task.certified < distance, task.certified, 0.0)
    share = torch.ones_like(distance)
    for _ in range(_ROUNDS):
        rows = (distance > 0).nonzero().squeeze(1)
        part, before = task[rows], distance[rows]
        gradient = best.gradient(rows)
        delta, radius = _moves(part, best.point[rows]), (low[rows] + before) / 2
        for stride in (0.0, 4.0):
            best.offer(rows, _guided(part, delta, gradient, radius, stride))
        distance = task.distance(best.point)
        low[rows] = torch.where(distance[rows] < before, low[rows], radius)
        before = distance[rows]
        best.offer(rows, _given_back(part, best, rows, gradient, share[rows]))
        distance = task.distance(best.point)
        share[rows] = torch.where(distance[rows] < before, 1.0, share[rows] / 2)
    return best.point, best.logits


class _Best:
    """The nearest adversarial point of each sample or, as long as there is none, that with the largest margin."""

    def __init__(self, task: Task, point: Tensor, logits: Tensor | None = None) -> None:
        self.task, self.point = task, point.clone()
        self.logits = (task.victim.logits(point) if logits is None else logits).clone()

    def standing(self, among: Tensor) -> Tensor:  # among: (B,) bool; returns indices
        """Return which of the samples `among` have no adversarial point yet."""
        return (among & (self.task.margin(self.logits) < 0)).nonzero().squeeze(1)

    def gradient(self, rows: Tensor) -> Tensor:  # returns (b, ...)
        """Return the gradient of the margin at the points of `rows`."""
        part = self.task[rows]
        with torch.enable_grad():
            return part.victim.gradient(self.point[rows], part.margin)[1]

    def offer(self, rows: Tensor, z: Tensor) -> None:  # z: (b, ...)
        """Take the points of `rows` that are better than those held."""
        if len(rows) == 0:
            return
        part, logits = self.task[rows], self.task.victim.logits(z)
        offered, held = part.margin(logits), part.margin(self.logits[rows])
        nearer = part.distance(z) < part.distance(self.point[rows])
        better = torch.where(held >= 0, (offered >= 0) & nearer, offered > held)
        self.point[rows[better]], self.logits[rows[better]] = z[better], logits[better]


def _level(x: Tensor) -> Tensor:
    return (x.double() * _TOP).round().long()


def _moves(task: Task, z: Tensor) -> Tensor:
    """Return z - x in float64."""
    return z.double() - task.x.double()


def _guided(task: Task, delta: Tensor, gradient: Tensor, radius: Tensor, stride: float) -> Tensor:
    """Return x + delta + stride * radius * (steepest direction), drawn into the ball, rounded as `gradient` asks."""
    free = inward(task.x + delta.to(task.x.dtype), gradient)
    step = per_sample(stride * radius, delta) * task.norm.steepest(free).double()
    inside = ((task.x.double() + delta + step).clamp(0.0, 1.0)) - task.x.double()
    # A hair inside, so that what rounding towards x leaves is in the ball however it is summed.
    return _rounded(task, task.norm.project(inside, radius * (1 - 1e-9)), radius, gradient)


def _rounded(task: Task, delta: Tensor, radius: Tensor, gradient: Tensor | None) -> Tensor:
    """Return x + delta with each entry on the level before it, seen from x, or on the next one if the ball allows it.

    The next one is taken where it is nearer to x + delta or, given a gradient, where it raises the margin; those come
    first that gain most for the room they take in the ball. A gradient of 0 rounds all entries towards x.
    """
    x, table = task.x.flatten(1), levels(task.x)
    own, flat = _level(x), delta.flatten(1)
    sign = torch.where(flat == 0, 0.0 if gradient is None else gradient.flatten(1).sign().double(), flat.sign()).long()
    steps = (flat.abs() * _TOP + 1e-3).floor().long()  # the slack is for points that are on the grid already
    lower = (own + sign * steps).clamp(0, _TOP)
    beyond = (table[lower].double() - x.double()).abs() > flat.abs()
    steps = torch.where(beyond & (steps > 0), steps - 1, steps)
    lower, upper = (own + sign * steps).clamp(0, _TOP), (own + sign * (steps + 1)).clamp(0, _TOP)
    gain = flat.abs() * _TOP - steps - 0.5 if gradient is None else (gradient.flatten(1) * sign).double()
    order = task.norm.order if task.norm.order < torch.inf else 1.0
    cost = _power(table[upper], x, order) - _power(table[lower], x, order)
    wanted = (gain > 0) & (upper != lower)
    if task.norm.order < torch.inf:
        wanted = _affordable(wanted, gain, cost, radius**order - _power(table[lower], x, order).sum(1))
    else:
        wanted &= (table[upper].double() - x.double()).abs() <= radius.unsqueeze(1)
    return _inside(task, table, lower, upper, wanted, radius)


def _power(z: Tensor, x: Tensor, order: float) -> Tensor:
    return (z.double() - x.double()).abs() ** order


def _affordable(wanted: Tensor, gain: Tensor, cost: Tensor, room: Tensor) -> Tensor:
    """Return those wanted entries (B, D) that fit into `room` (B,), the largest gain for its cost first."""
    worth = torch.where(wanted, gain / cost.clamp_min(1e-300), -torch.inf)
    order = worth.argsort(dim=1, descending=True, stable=True)
    spent = torch.where(wanted, cost, 0.0).gather(1, order).cumsum(1)
    return wanted & torch.zeros_like(wanted).scatter(1, order, spent <= room.unsqueeze(1))


def _inside(task: Task, table: Tensor, lower: Tensor, upper: Tensor, wanted: Tensor, radius: Tensor) -> Tensor:
    """Return the point with `upper` where wanted; where rounding of sums put it out of the ball, with `lower` alone."""
    shape = task.x.shape
    point = table[torch.where(wanted, upper, lower)].reshape(shape)
    outside = task.distance(point) > radius
    return torch.where(per_sample(outside, point), table[lower].reshape(shape), point)


def _given_back(task: Task, best: _Best, rows: Tensor, gradient: Tensor, share: Tensor) -> Tensor:
    """Return the nearest points with as many entries one level nearer to x as `share` (b,) of the margin pays for."""
    x, table, point = task.x.flatten(1), levels(task.x), best.point[rows].flatten(1)
    own, at = _level(x), _level(point)
    sign = (at - own).sign()
    order = task.norm.order if task.norm.order < torch.inf else 1.0
    gain = _power(point, x, order) - _power(table[at - sign], x, order)
    loss = (gradient.flatten(1) * sign).double() / _TOP
    ranking = torch.where(sign != 0, loss / gain.clamp_min(1e-300), torch.inf).argsort(dim=1, stable=True)
    spent = torch.where(sign != 0, loss, torch.inf).gather(1, ranking).cumsum(1)
    spare = (share * task.margin(best.logits[rows]).double()).unsqueeze(1)
    paid = spent <= spare
    paid[:, 0] = True  # one at least: the gradient is no exact price
    back = torch.zeros_like(paid).scatter(1, ranking, paid)
    return table[torch.where(back, at - sign, at)].reshape(task.x.shape)

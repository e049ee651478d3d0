"""Points inside a certified radius at which the executed network answers otherwise: the search that must find none."""

from __future__ import annotations

import copy
import math

import torch
from oracles import p_norm, seeded

from speccert.attacks.exact import strictly_inside

_SHARES = (1 - 1e-12, 1 - 1e-7, 1 - 1e-3, 0.5)
_FAR = 1e3  # stands for an infinite radius


def exact_copy(model):
    return copy.deepcopy(model).double().eval().requires_grad_(False)


def executed(model, x):
    with torch.no_grad():
        return model(x)


def keeps(logits, y):  # [B, K], [B] -> [B] bool
    """Whether the label's logit is above all others, ties and NaN excluded."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own > logits.scatter(1, y[:, None], -math.inf).amax(1)


def believable(logits, real, y):  # [B, K] executed and float64, [B] -> [B] bool
    """Whether each executed margin errs by less than the real one, as a proof at this point needs.

    Where a ball is certified, rounding may take away all of a margin inside it at most, and so it may add as much.
    """
    size = real.abs().amax(1, keepdim=True)
    margins, found = (v.gather(1, y[:, None]) - v for v in (real, logits.double()))
    return ((found - margins).abs() <= margins + 1e-11 * size).all(1)


def directions(exact, x, y, norm, classes=3):  # -> [D, B, ...] float64 of norm 1
    """Steepest ways to the strongest other classes at x in the float64 model, and a random one."""
    z = x.double().requires_grad_()
    logits = exact(z)
    rivals = logits.detach().scatter(1, y[:, None], -math.inf).topk(min(classes, logits.shape[1] - 1), 1).indices
    found = [torch.randn(x.shape, generator=seeded(11), dtype=torch.float64)]
    for column in rivals.T:
        gap = logits.gather(1, column[:, None]) - logits.gather(1, y[:, None])
        found.append(torch.autograd.grad(gap.sum(), z, retain_graph=True)[0])
    return torch.stack([_unit(gradient, norm) for gradient in found])


def _unit(gradient, norm):
    flat = gradient.flatten(1)
    if norm == "linf":
        return gradient.sign()
    if norm == "l1":
        largest = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).reshape(gradient.shape)
    scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-300)
    flat = flat / scale
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)).reshape(gradient.shape)


def candidates(exact, x, y, radii, norm, tries):
    """Floats near the surface of each ball, in the type of x, rounded this way and that; not all lie inside."""
    generator = seeded(5)
    reach = radii.clamp_max(_FAR).reshape(-1, *[1] * (x.dim() - 1))
    for direction in directions(exact, x, y, norm):
        for share in _SHARES:
            target = x.double() + share * reach * direction
            near = target.to(x.dtype)
            yield torch.where((near.double() - x.double()).abs() > reach, torch.nextafter(near, x), near)
            for _ in range(tries):
                sides = torch.rand(x.shape, generator=generator) - 0.5
                other = torch.nextafter(near, torch.copysign(torch.tensor(math.inf), sides).to(x.dtype))
                beyond = (other.double() - x.double()).abs() > reach
                yield torch.where(beyond, torch.nextafter(other, x), other)


def assert_no_flip(model, x, radii, norm, *, tries=3, exact=None):
    """No float strictly inside a radius, decided in integers, that the executed model answers otherwise.

    Nor one at which rounding changes a margin by more than there is of it. A row with radius 0 claims nothing. `exact`
    is the float64 model, where it is not a plain copy. Returns how many points were tried.
    """
    exact = exact or exact_copy(model)
    y = executed(model, x).argmax(1)
    kept = radii > 0
    x, y, radii = x[kept], y[kept], radii[kept]
    tried = 0
    if not len(x):
        return tried
    for z in candidates(exact, x, y, radii, norm, tries):
        logits = executed(model, z)
        tried += int((p_norm(z.double() - x.double(), norm) < radii).sum())
        rows = (~(keeps(logits, y) & believable(logits, executed(exact, z.double()), y))).nonzero().squeeze(1)
        broken = rows[strictly_inside(x[rows], z[rows], radii[rows], norm)]
        assert not len(broken), message(x, z, y, radii, logits, norm, int(broken[0]))
    return tried


def message(x, z, y, radii, logits, norm, row):
    distance = float(p_norm((z.double() - x.double())[row : row + 1], norm))
    return (
        f"certified radius {float(radii[row])!r} in {norm}, but at distance {distance!r} the logits are "
        f"{logits[row].tolist()} for label {int(y[row])}; x = {x[row].tolist()}, z = {z[row].tolist()}"
    )


def near_boundary(model, x, other, shares=(1e-6, 1e-4, 1e-2)):
    """Points on the segments from x to `other`, just before the executed answer changes, and some way back.

    Margins there are small, so that rounding is a good part of them. Rows whose answer does not change stay at x.
    """
    start = executed(model, x).argmax(1)
    low, high = torch.zeros(len(x), dtype=torch.float64), torch.ones(len(x), dtype=torch.float64)

    def at(t):
        t = t.reshape(-1, *[1] * (x.dim() - 1))
        return (x.double() + t * (other.double() - x.double())).to(x.dtype)

    changes = executed(model, at(high)).argmax(1) != start
    for _ in range(50):
        middle = (low + high) / 2
        same = executed(model, at(middle)).argmax(1) == start
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    low = torch.where(changes, low, 0.0)
    return torch.cat([at(low), *(at((low - share).clamp_min(0.0)) for share in shares)])

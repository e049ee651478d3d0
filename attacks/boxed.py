"""Moves from x that stay in the box [0, 1]: nearest in a ball, steepest in a ball, and shortest onto a hyperplane.

Clipping what a formula for the ball alone gives falls short of these wherever the box binds, at most pixels of a
handwritten digit. Each move is a sign pattern times sizes that are capped by the room an entry has; one number per
row decides the rest, and is found exactly from the entries that are at their cap.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .norms import Norm
from .task import Task

SPARSITY = 0.01  # the share of the entries that one l1 step moves
_ROUNDS = 100  # each one finds at least one more entry at its cap; a handful is usual


def room(x: Tensor, direction: Tensor) -> Tensor:  # (B, ...) each
    """Return how far each entry of x may move in the direction of that sign."""
    return torch.where(direction > 0, 1.0 - x, x)


def project(task: Task, delta: Tensor) -> Tensor:  # (B, ...)
    """Return the d nearest to `delta` with ||d||_p <= eps and x + d in the box, up to rounding."""
    flat = delta.flatten(1)
    size = torch.minimum(flat.abs(), room(task.x.flatten(1), flat))
    if task.norm.name == "linf":
        capped = size.clamp_max(task.eps)
    else:
        outside = torch.linalg.vector_norm(size, ord=task.norm.order, dim=1) > task.eps
        if not bool(outside.any()):
            return (size * flat.sign()).reshape(delta.shape)
        caps, full = room(task.x.flatten(1), flat)[outside], flat[outside].abs()
        size[outside] = _scaled(full, caps, task.eps) if task.norm.name == "l2" else _thresholded(full, caps, task.eps)
        capped = size
    return (capped * flat.sign()).reshape(delta.shape)


def steepest(task: Task, gradient: Tensor) -> Tensor:  # (B, ...)
    """Return the d with the largest <gradient, d> such that ||d||_p <= eps and x + d lies in the box."""
    flat = gradient.flatten(1)
    caps = torch.where(flat != 0, room(task.x.flatten(1), flat), 0.0)
    if task.norm.name == "linf":
        size = caps.clamp_max(task.eps)
    elif task.norm.name == "l2":
        size = _scaled(_relative(flat.abs()), caps, task.eps)
    else:
        size = _filled(flat, caps, task.eps)
    return (size * flat.sign()).reshape(gradient.shape)


def sparse_step(z: Tensor, gradient: Tensor, length: float) -> Tensor:  # (B, ...) each
    """Return the steepest l1 step of that length within the box, spread over at least 1 % of the entries."""
    flat = gradient.flatten(1)
    caps = room(z.flatten(1), flat).clamp_max(length / math.ceil(SPARSITY * flat.shape[1]))
    return (_filled(flat, caps, length) * flat.sign()).reshape(z.shape)


def shortest(norm: Norm, x: Tensor, gradient: Tensor, gap: Tensor) -> Tensor:  # (B, ...), (B, ...), (B,)
    """Return the shortest d with <gradient, d> = gap such that x + d lies in the box; the best corner where none does.

    This is the projection onto a hyperplane and the box of Croce and Hein, Minimally Distorted Adversarial Examples
    with a Fast Adaptive Boundary Attack, ICML 2020, section 2.1, in each norm.
    """
    uphill = gradient.flatten(1) * gap.sign().unsqueeze(1).to(gradient.dtype)
    peak = uphill.abs().amax(1, keepdim=True)
    steep = _relative(uphill.abs())
    missing = (gap.abs() / peak.squeeze(1).clamp_min(torch.finfo(steep.dtype).tiny)).to(steep.dtype)
    caps = torch.where(steep > 0, room(x.flatten(1), uphill), 0.0)
    if norm.name == "l1":
        order = steep.argsort(dim=1, descending=True)
        ordered, gains = caps.gather(1, order), (caps * steep).gather(1, order)
        left = (missing.unsqueeze(1) - (gains.cumsum(1) - gains)).clamp_min(0.0)
        moved = torch.minimum(ordered, left / steep.gather(1, order).clamp_min(torch.finfo(steep.dtype).tiny))
        size = torch.zeros_like(caps).scatter(1, order, moved)
    else:
        speed = steep if norm.name == "l2" else (steep > 0).to(steep.dtype)
        size = _gaining(steep, speed, caps, missing)
    return (size * uphill.sign()).reshape(x.shape)


def random_start(task: Task) -> Tensor:  # returns (B, ...)
    """Return random points of the sphere ||z - x||_p = eps, clipped to the box.

    In l1 a random 1 % of the entries differ from x: mass that lies on all entries takes many steps to gather.
    """
    if task.norm.name == "linf":
        draw = 2 * torch.rand_like(task.x) - 1
    elif task.norm.name == "l2":
        draw = torch.randn_like(task.x)
    else:
        draw = _sparse(torch.randn_like(task.x))
    size = task.norm.size(draw).clamp_min(1e-12).to(task.x.dtype)
    scale = (task.eps / size).reshape(-1, *[1] * (draw.dim() - 1))
    return (task.x + scale * draw).clamp(0.0, 1.0)


def _filled(gradient: Tensor, caps: Tensor, total: float) -> Tensor:  # (B, n) each
    """Return sizes that take `total` from the caps of the entries, those with the steepest gradient first."""
    order = gradient.abs().argsort(dim=1, descending=True)
    ordered = caps.gather(1, order)
    spent = ordered.cumsum(1) - ordered
    return torch.zeros_like(caps).scatter(1, order, torch.minimum(ordered, (total - spent).clamp_min(0.0)))


def _sparse(draw: Tensor) -> Tensor:
    flat = draw.flatten(1)
    kept = torch.rand_like(flat).topk(math.ceil(SPARSITY * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).reshape(draw.shape)


def _relative(size: Tensor) -> Tensor:
    """Return each row divided by its largest entry, so that squares neither vanish nor overflow."""
    return size / size.amax(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def _scaled(size: Tensor, caps: Tensor, radius: float) -> Tensor:  # (b, n) each
    """Return min(c size, caps) with c such that its l2 norm is `radius`; the caps where they are shorter than that."""
    squares, cap_squares = size**2, caps**2
    scale = torch.zeros_like(size[:, :1])
    for _ in range(_ROUNDS):
        stuck = (scale * size >= caps).to(size.dtype)
        used, free = _dot(stuck, cap_squares), _dot(1 - stuck, squares)
        better = torch.where(free > 0, ((radius**2 - used).clamp_min(0.0) / free).sqrt(), scale)
        if not bool((better > scale).any()):
            break
        scale = torch.maximum(scale, better)
    return torch.minimum(scale * size, caps)


def _gaining(steep: Tensor, speed: Tensor, caps: Tensor, gap: Tensor) -> Tensor:  # (b, n) three times, (b,)
    """Return min(c speed, caps) with c such that <steep, .> is `gap`; the caps where even they gain less."""
    gains, rates = steep * caps, steep * speed
    time = torch.zeros_like(steep[:, :1])
    for _ in range(_ROUNDS):
        stuck = (time * speed >= caps).to(steep.dtype)
        gained, rate = _dot(stuck, gains), _dot(1 - stuck, rates)
        later = torch.where(rate > 0, (gap.unsqueeze(1) - gained).clamp_min(0.0) / rate, time)
        if not bool((later > time).any()):
            break
        time = torch.maximum(time, later)
    return torch.minimum(time * speed, caps)


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (b, n) each; returns (b, 1)
    product: Tensor = torch.linalg.vecdot(a, b).unsqueeze(1)
    return product


def _thresholded(size: Tensor, caps: Tensor, radius: float) -> Tensor:  # (b, n) each
    """Return min(max(size - t, 0), caps) with t such that its sum is `radius`, where it is larger at t = 0."""
    corners = torch.cat([size, size - caps], 1).double()
    turns = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1).double()
    ordered, order = corners.sort(dim=1, descending=True)
    slope = turns.gather(1, order).cumsum(1)
    total = pad((slope[:, :-1] * (ordered[:, :-1] - ordered[:, 1:])).cumsum(1), (1, 0))
    piece = torch.searchsorted(total, torch.full_like(total[:, :1], radius)).clamp_max(total.shape[1] - 1)
    below = (piece - 1).clamp_min(0)
    spare = (total.gather(1, piece) - radius) / slope.gather(1, below).clamp_min(1.0)
    threshold = (ordered.gather(1, piece) + spare).clamp_min(0.0).to(size.dtype)
    return torch.minimum((size - threshold).clamp_min(0.0), caps)

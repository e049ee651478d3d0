"""Oracles that share no code with the package: operators made into matrices by running the layer itself in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def randomised(module, seed=0, scale=0.3):
    """The module in eval mode with reproducible random weights, biases and statistics, whatever its default start."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.2 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def exact_copy(module):
    """The same module in float64: its float32 weights convert without rounding."""
    return copy.deepcopy(module).double().eval()


@torch.no_grad()
def operator_matrix(module, input_shape):  # -> [out, in] float64
    """The matrix of an affine module, one column an image of a unit vector, less the image of zero."""
    exact = exact_copy(module)
    size = math.prod(input_shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *input_shape)
    return (exact(basis) - exact(torch.zeros(1, *input_shape, dtype=torch.float64))).flatten(1).T


def matrix_norm(matrix, norm="l2"):
    array = np.asarray(matrix.detach() if isinstance(matrix, torch.Tensor) else matrix, dtype=np.float64)
    if array.size == 0:
        return 0.0
    return float(np.linalg.norm(array, {"l2": 2, "linf": np.inf, "l1": 1}[norm]))


def operator_norm(module, input_shape, norm="l2"):
    return matrix_norm(operator_matrix(module, input_shape), norm)


def large_operator_norm(module, input_shape):
    """The largest singular value of an operator too large for a matrix, by Lanczos iteration in float64."""
    exact = exact_copy(module).requires_grad_(False)
    zero = torch.zeros(1, *input_shape, dtype=torch.float64)
    offset = exact(zero)
    image_shape = offset.shape

    def forward(vector):
        return (exact(torch.from_numpy(vector.reshape(zero.shape)).double()) - offset).numpy().ravel()

    def backward(vector):
        x = zero.clone().requires_grad_()
        image = exact(x)
        return torch.autograd.grad(image, x, torch.from_numpy(vector.reshape(image_shape)).double())[0].numpy().ravel()

    operator = LinearOperator((offset.numel(), zero.numel()), matvec=forward, rmatvec=backward, dtype=np.float64)
    start = random(min(operator.shape), seed=3).numpy()
    return float(svds(operator, k=1, return_singular_vectors=False, v0=start, tol=1e-9, maxiter=5000)[0])


def jacobian(model, x):  # [*input_shape] -> [K, D]
    return torch.func.jacrev(lambda v: model(v[None])[0])(x).flatten(1)


def p_norm(vectors, norm):  # [B, ...] -> [B]
    return torch.linalg.vector_norm(vectors.flatten(1), {"l2": 2, "linf": math.inf, "l1": 1}[norm], dim=1)


def stretch(model, x, other, norm):  # [B, ...] -> [B, K, K]
    """|change of f_i - f_j| / ||x - x'|| for pairs of points: at most the pair's Lipschitz constant."""
    change = (model(x) - model(other)).double()
    distance = p_norm((x - other).double(), norm)
    return (change[:, :, None] - change[:, None, :]).abs() / distance[:, None, None]


def separated_points(model, x, norm, steps=20):  # [B, ...] -> [B, ...]
    """Second points near x that stretch one pair of logits as far as gradient ascent finds."""
    generator = seeded(7)
    other = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)).requires_grad_()
    size = 0.1
    for _ in range(steps):
        change = model(other) - model(x)
        value = (change.amax(1) - change.amin(1)).sum()
        (gradient,) = torch.autograd.grad(value, other)
        step = steepest(gradient, norm)
        other = (x + _onto_sphere(other.detach() - x + 0.03 * step, size, norm)).requires_grad_()
    return other.detach()


def steepest(gradient, norm):
    flat = gradient.flatten(1)
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)).reshape(gradient.shape)
    largest = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).reshape(gradient.shape)


def _onto_sphere(offset, size, norm):
    length = p_norm(offset, norm).clamp_min(1e-30)
    return offset * (size / length).reshape(-1, *[1] * (offset.dim() - 1))


class Wired(torch.nn.Module):
    """A model whose forward is a given function of itself and its input; modules are given by name."""

    def __init__(self, function, buffers=None, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)


def assert_sound(model, input_shape, *, points=6, seed=5, slack=1e-6):
    """Every norm's bound of a float64 model holds at random points, at close pairs and at ascended pairs."""
    from speccert.certify import lipschitz

    x = random(points, *input_shape, seed=seed)
    bounds = {}
    for norm in ("l2", "linf", "l1"):
        bound = bounds[norm] = lipschitz(model, input_shape, norm=norm)
        for other in (random(points, *input_shape, seed=seed + 1), separated_points(model, x, norm, steps=8)):
            with torch.no_grad():
                worst = stretch(model, x, other, norm).amax(0)
            assert bool((worst <= bound.pairwise * (1 + slack) + 1e-9).all()), f"{norm}: {worst} above {bound.pairwise}"
        for point in x:
            assert matrix_norm(jacobian(model, point), norm) <= bound.upper * (1 + slack) + 1e-9
    return bounds

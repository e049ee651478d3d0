"""Networks evaluated with 400 bits, layer by layer from their definitions: what real arithmetic gives, for tests."""

import copy
import functools

import mpmath
import numpy as np
import torch
from mpmath import mp
from torch import nn

from speccert.models import Abs, GroupSort, Householder, MaxMin, Normalize, Residual

mp.prec = 400


def exact_array(tensor):
    """A tensor's numbers, converted without rounding."""
    values = tensor.detach().double().numpy()
    found = np.empty(values.shape, dtype=object)
    found.flat = [mpmath.mpf(float(value)) for value in values.flat]
    return found


def each(function):
    return np.vectorize(function, otypes=[object])


def matrix_of(layer, shape):
    """The matrix of a bias-free copy; entries are the weights themselves, since products with 0 and 1 are exact."""
    bare = copy.deepcopy(layer).double()
    if getattr(bare, "bias", None) is not None:
        bare.bias = None
    size = int(np.prod(shape))
    with torch.no_grad():
        image = bare(torch.eye(size, dtype=torch.float64).reshape(size, *shape))
    return exact_array(image.flatten(1).T), tuple(image.shape[1:])


def linear(layer, x):
    matrix, shape = matrix_of(layer, x.shape)
    y = (matrix @ x.reshape(-1)).reshape(shape)
    if layer.bias is None:
        return y
    bias = exact_array(layer.bias)
    return y + (bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (len(shape) - 1)))


def batch_norm(layer, x):
    shape = (-1, *[1] * (x.ndim - 1))
    mean, variance, weight, bias = (
        exact_array(part).reshape(shape) for part in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / each(mpmath.sqrt)(variance + mpmath.mpf(layer.eps)) * weight + bias


def normalize(layer, x):
    shape = (-1, *[1] * (x.ndim - 1))
    return (x - exact_array(layer.mean).reshape(shape)) / exact_array(layer.std).reshape(shape)


def windows(layer, x, reduce):
    kernel, stride = layer.kernel_size, layer.stride
    height, width = ((size - kernel) // stride + 1 for size in x.shape[1:])
    rows = [
        [
            [
                reduce(list(plane[i * stride : i * stride + kernel, j * stride : j * stride + kernel].flat))
                for j in range(width)
            ]
            for i in range(height)
        ]
        for plane in x
    ]
    return np.array(rows, dtype=object)


def maxmin(layer, x):
    a, b = np.split(x, 2)
    return np.concatenate([np.maximum(a, b), np.minimum(a, b)])


def groupsort(layer, x):
    return np.sort(x.reshape(-1, layer.group_size, *x.shape[1:]), axis=1).reshape(x.shape)


def householder(layer, x):
    half = exact_array(layer.angle).reshape(-1, *[1] * (x.ndim - 1)) / 2
    sin, cos = each(mpmath.sin)(half), each(mpmath.cos)(half)
    a, b = np.split(x, 2)
    below = 2 * np.minimum(sin * a - cos * b, mpmath.mpf(0))
    return np.concatenate([a - sin * below, b + cos * below])


def sigmoid(v):
    return 1 / (1 + mpmath.exp(-v))


SCALAR = {
    nn.ReLU: lambda layer, v: max(v, mpmath.mpf(0)),
    nn.ReLU6: lambda layer, v: min(max(v, mpmath.mpf(0)), mpmath.mpf(6)),
    Abs: lambda layer, v: abs(v),
    nn.Tanh: lambda layer, v: mpmath.tanh(v),
    nn.Sigmoid: lambda layer, v: sigmoid(v),
    nn.SiLU: lambda layer, v: v * sigmoid(v),
    nn.GELU: lambda layer, v: (
        v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2
        if layer.approximate == "none"
        else v / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (v + mpmath.mpf("0.044715") * v**3)))
    ),
    nn.Softplus: lambda layer, v: mpmath.log(1 + mpmath.exp(layer.beta * v)) / layer.beta,
    nn.LogSigmoid: lambda layer, v: -mpmath.log(1 + mpmath.exp(-v)),
    nn.Tanhshrink: lambda layer, v: v - mpmath.tanh(v),
    nn.Softsign: lambda layer, v: v / (1 + abs(v)),
    nn.ELU: lambda layer, v: v if v > 0 else mpmath.mpf(layer.alpha) * mpmath.expm1(v),
    nn.LeakyReLU: lambda layer, v: v if v > 0 else mpmath.mpf(layer.negative_slope) * v,
    nn.Softshrink: lambda layer, v: mpmath.sign(v) * max(abs(v) - mpmath.mpf(layer.lambd), mpmath.mpf(0)),
    nn.Hardtanh: lambda layer, v: min(max(v, mpmath.mpf(layer.min_val)), mpmath.mpf(layer.max_val)),
}
WHOLE = {
    nn.Linear: linear,
    nn.Conv2d: linear,
    nn.ConvTranspose2d: linear,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    Normalize: normalize,
    MaxMin: maxmin,
    GroupSort: groupsort,
    Householder: householder,
    nn.AvgPool2d: lambda layer, x: windows(layer, x, lambda part: sum(part) / len(part)),
    nn.MaxPool2d: lambda layer, x: windows(layer, x, max),
    nn.AdaptiveAvgPool2d: lambda layer, x: (x.sum((1, 2)) / (x.shape[1] * x.shape[2])).reshape(-1, 1, 1),
    nn.Flatten: lambda layer, x: x.reshape(-1),
    nn.Identity: lambda layer, x: x,
    Residual: lambda layer, x: run(layer.shortcut, x) + run(layer.block, x),
    nn.Sequential: lambda layer, x: functools.reduce(lambda value, part: run(part, value), layer, x),
}


def run(layer, x):
    """The image of one sample (an array of mpf, without the batch axis)."""
    if type(layer) in SCALAR:
        return each(lambda v: SCALAR[type(layer)](layer, v))(x)
    return WHOLE[type(layer)](layer, x)


def exact_logits(model, x):  # [B, ...] -> [B, K] of mpf
    return np.array([run(model, exact_array(sample)) for sample in x], dtype=object)


def deviations(model, executed, x):
    """|(exec_i - exec_j) - (real_i - real_j)| at each point, [B, K, K] float64; `model` holds the executed weights."""
    real, found = exact_logits(model, x), exact_array(executed)
    error = found - real
    return (error[:, :, None] - error[:, None, :]).__abs__().astype(np.float64)

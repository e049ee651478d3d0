"""LipSDP multipliers by interior-point solvers: our own, or one that cvxpy brings.

They solve the program over the inequality of `inequality`: least sum of tau, over tau and d >= 0, for which F >= 0.
What they return is a proposal: statuses, tolerances and rounding of a solver prove nothing, `inequality.prove` does.
"""

from __future__ import annotations

import importlib
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .inequality import prove
from .multipliers import initial, problem
from .neurons import Neurons, Part
from .primal_dual import inside, minimise
from .rounding import largest_entry
from .semidefinite import System

SOLVERS = ("built-in", "clarabel", "scs", "mosek")
COUPLINGS = ("neuron", "layer")
_NORMS = ("l2", "linf")

# Numbers of the start that are left and neurons: beyond these a solver takes many gigabytes or hours.
_MOST = {"built-in": 4096, "clarabel": 200, "scs": 400, "mosek": 1000}
_FARTHEST = 400  # exponent of a scale
_BLENDS = (0.0, *(10.0**exponent for exponent in range(-10, 0)), 0.2, 0.4, 0.7, 1.0)
_USABLE = ("optimal", "optimal_inaccurate", "user_limit")


class SolverFailed(RuntimeError):
    """A solver that gave no multipliers; one line says why."""


def solve(
    net: Neurons,
    *,
    norm: str = "l2",
    coupling: str = "neuron",
    solver: str | None = None,
    seconds: float | None = None,
) -> list[Tensor]:
    """The multipliers at or near the optimum, per layer [multipliers]; in linf then the weights [start] as one more.

    Args:
        net: the network.
        norm: of the start, "l2" or "linf".
        coupling: "neuron", one multiplier each as in LipSDP-Neuron, or "layer", one a layer as in LipSDP-Layer.
        solver: "built-in" (`primal_dual`, None), or through cvxpy "clarabel", "scs", or "mosek" where it is installed.
        seconds: after which the solver stops, about; what it has by then is returned if it is of use.

    Raises:
        SolverFailed: too many numbers for the solver, a status that says that there is no solution, or numbers so
            large or small that no step is possible.
        ValueError: an unknown name, or a solver that is not installed.
    """
    solver = "built-in" if solver is None else solver
    for name, value, known in (("coupling", coupling, COUPLINGS), ("solver", solver, SOLVERS), ("norm", norm, _NORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
    if solver != "built-in" and solver.upper() not in _installed():
        raise ValueError(f"solver: {solver} is not installed; cvxpy has {', '.join(_installed()).lower()}")
    balanced, scales = _balanced(_narrowed(net) if norm == "l2" else net)
    small, factor = _unit_end(balanced)
    side = sum(small.sizes)
    if side > _MOST[solver]:
        raise SolverFailed(f"an inequality of side {side} is too large for {solver}: at most {_MOST[solver]}")
    if factor == 0.0:
        return [torch.ones(layer.multipliers, dtype=torch.float64) for layer in net.layers]
    if coupling == "layer":
        small = replace(small, layers=tuple(replace(one, tied=torch.zeros_like(one.tied)) for one in small.layers))
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    try:
        start = _start(small)
        if solver == "built-in":
            weights, found = minimise(small, start, norm, deadline)
        else:
            weights, found = _by_cvxpy(small, start, norm, solver, seconds)
    except (ValueError, torch.linalg.LinAlgError) as reason:  # type: ignore[attr-defined]
        raise SolverFailed(f"{solver}: {reason}") from reason
    if coupling == "layer":
        found = [one.expand(layer.multipliers) for one, layer in zip(found, net.layers, strict=True)]
    found = [one * (factor / scale) * (factor / scale) for one, scale in zip(found, scales, strict=True)]
    if norm == "linf":
        return [*repaired(net, found, norm, weights), weights]
    return repaired(net, found)


def repaired(
    net: Neurons,
    multipliers: Sequence[Tensor],
    norm: str = "l2",
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Multipliers that prove as small a bound as possible next to those given, which may miss F >= 0 by a little.

    The multipliers for which there are weights with F >= 0 form a convex set: those given are mixed with some that are
    well inside, by the share that gives the least proved bound.

    Args:
        net: the network.
        multipliers: per layer [multipliers], a solver's answer.
        norm: "l2" or "linf".
        weights: [start] for linf.
    """
    safe = _start(net)
    size = [float(one.abs().max()) for one in multipliers]
    held = [one.clamp_min(largest * 1e-9) for one, largest in zip(multipliers, size, strict=True)]
    best, least = held, math.inf
    for share in _BLENDS:
        tried = [(1 - share) * one + share * other for one, other in zip(held, safe, strict=True)]
        upper = prove(net, tried, norm, weights).upper
        if upper < least:
            best, least = tried, upper
        elif least < math.inf:
            break
    return best


def _start(net: Neurons) -> list[Tensor]:
    """Multipliers well inside."""
    logs = initial(problem(net, None, "l2"))[0]
    return list(torch.split(logs.exp(), [layer.multipliers for layer in net.layers]))


def _narrowed(net: Neurons) -> Neurons:
    """The same bound in l2 with fewer numbers at the start: M = (M Q) Q^T acts like M Q, Q^T Q = I."""
    if not 0 < net.start_rows < net.sizes[0]:
        return net
    return net.with_start(torch.linalg.qr(torch.cat([part.matrix for part in net.start_parts]).T, mode="r").R.T)


def _balanced(net: Neurons) -> tuple[Neurons, list[float]]:
    """The network with the numbers of each activation divided by a power of two near their size, which is returned."""
    scales = [1.0]
    layers = []
    for layer in net.layers:
        sizes = [largest_entry(part.matrix) * scales[part.source] for part in layer.parts]
        size = max(sizes, default=0.0)
        exponent = round(math.log2(size)) if 0 < size < math.inf else 0
        scales.append(2.0**exponent if abs(exponent) <= _FARTHEST else 1.0)
        parts = tuple(Part(p.source, p.matrix * (scales[p.source] / scales[-1])) for p in layer.parts)
        layers.append(replace(layer, parts=parts))
    output = tuple(Part(part.source, part.matrix * scales[part.source]) for part in net.output)
    return Neurons(net.sizes, tuple(layers), output), scales[1:]


def _unit_end(net: Neurons) -> tuple[Neurons, float]:
    """The network with its end divided by its largest entry, which is returned too."""
    factor = max((largest_entry(part.matrix) for part in net.output), default=0.0)
    if factor in (0.0, 1.0):
        return net, factor
    return replace(net, output=tuple(Part(part.source, part.matrix / factor) for part in net.output)), factor


def _cvxpy() -> Any:
    """The module, whose types are incomplete; its import takes a second."""
    return importlib.import_module("cvxpy")


def _installed() -> list[str]:
    return list(_cvxpy().installed_solvers())


def _by_cvxpy(
    net: Neurons, start: Sequence[Tensor], norm: str, solver: str, seconds: float | None
) -> tuple[Tensor, list[Tensor]]:
    cvxpy = _cvxpy()
    size = net.sizes[0]
    tied = torch.arange(size) if norm == "linf" else torch.zeros(size, dtype=torch.int64)
    scale = inside(net, start, tied)
    system = System(net, tied, scale)
    y = cvxpy.Variable(system.count, nonneg=True)
    side = system.size
    columns = _sparse([system.combined(unit).flatten() for unit in torch.eye(system.count, dtype=torch.float64)])
    matrix = cvxpy.reshape(-(columns @ y) - system.end.flatten().numpy(), (side, side), order="F")
    objective = scale[: system.weights] / scale[: system.weights].sum()
    program = cvxpy.Problem(cvxpy.Minimize(objective.numpy() @ y[: system.weights]), [matrix >> 0])
    _run(program, solver, seconds)
    if program.status not in _USABLE or y.value is None:
        raise SolverFailed(f"{solver} ended with status {program.status!r} and no multipliers")
    found = torch.from_numpy(y.value).double().clamp_min(0) * scale
    if not bool(found.isfinite().all()):
        raise SolverFailed(f"{solver} gave numbers that are not finite")
    return found[: system.weights], list(torch.split(found[system.weights :], [one.multipliers for one in net.layers]))


def _sparse(columns: list[Tensor]) -> Any:
    from scipy.sparse import csc_array, hstack

    return hstack([csc_array(column[:, None].numpy()) for column in columns], format="csc")


def _run(program: Any, solver: str, seconds: float | None) -> None:
    options: dict[str, Any] = {"eps": 1e-7, "max_iters": 100_000} if solver == "scs" else {}
    if seconds is not None and solver == "mosek":
        options["mosek_params"] = {"MSK_DPAR_OPTIMIZER_MAX_TIME": seconds}
    elif seconds is not None:
        options["time_limit" if solver == "clarabel" else "time_limit_secs"] = seconds
    with warnings.catch_warnings():
        # the status says so too, and the answer is proved anew
        warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
        try:
            program.solve(solver=solver.upper(), **options)
        except _cvxpy().SolverError as reason:
            raise SolverFailed(f"{solver}: {' '.join(str(reason).split())}") from reason

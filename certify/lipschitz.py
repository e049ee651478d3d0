"""Lipschitz bounds of whole networks: the product over a traced graph, per pair of logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import (  # registers the rules of torch's own layers
    layer_rules,  # noqa: F401
    rounding_rules,  # noqa: F401
)
from .arithmetic import proving
from .ascent import LowerEstimates, lower_estimates
from .digests import model_digest
from .graph import Graph, check_finite_state, check_model, check_replay, floating_like, trace
from .inequality import Relaxation
from .linear import LinearMap, NormBounds, check_norm, converted, float64
from .power import estimate_norm
from .rounding import ROOT_2, UNIT, norm_up, sum_up, up, up_mul, up_sqrt
from .rules import leaf_types
from .sdp import Attempt, Found, Tightener
from .spectral import bracket
from .walk import Place, Walk

METHODS = ("product", "closed-form", "lipsdp", "lipsdp-layer", "lipsdp-first-order", "local", "auto")
_ESTIMATE = 1e-7  # relative rounding of an estimate from below, in float64,
_CANCELLATION = 1e-11  # and in parts of the product of the norms, where large terms cancel
_TIGHT = 1e-3  # relative gain that is not worth a search
_ASCENT = 80  # steps of the search for the largest Jacobian


@dataclass(frozen=True)
class LayerBound:
    """Bracket of one affine run's norm, or of one layer's: names joined by " + ", in the order of the graph."""

    name: str
    kind: str
    lower: float
    upper: float
    method: str


@dataclass(frozen=True, eq=False)
class Run:
    """An affine run whose norm is used: the graph's node that ends it, its layers, its operator, the norm's bracket."""

    end: str
    parts: tuple[str, ...]
    operator: LinearMap
    bounds: NormBounds


@dataclass(frozen=True, eq=False)
class NormRecord:
    """How the constants of one norm were found, for those who prove more with them or prove them again.

    Attributes:
        upper: as in `LipschitzBound`, from this norm alone, and so is `pairwise`.
        runs: all runs whose norm is used, in the order of the graph.
        constants: from the input to every anchor (the input, each non-affine operation, each sum or concatenation of
            unlike branches), by the graph's node.
        last_constant: that of the output's anchor.
    """

    upper: float
    runs: tuple[Run, ...]
    constants: tuple[tuple[str, float], ...]
    last_constant: float
    pairwise: Tensor


@dataclass(frozen=True)
class LipschitzBound:
    """Bounds of a network's Lipschitz constants on the whole input space, inputs in raw units.

    Attributes:
        upper: bound of the map from inputs to all logits, the same norm on both sides.
        lower: largest Jacobian norm found (an estimate from below, 0 where not asked for).
        pairwise: [K, K] float64; entry (i, j) bounds |f_i - f_j| per unit of the input norm; zero diagonal.
        layers: brackets of the affine runs.
        norm: the input norm.
        input_shape: the shape of the inputs it holds for, without the batch.
        pair_methods: per pair, [K][K]: "product", "equivalence" (from l2 by norm equivalence), or the method of the
            relaxation that gave the constant, with " by equivalence" where that is one in l2; see `lipschitz`.
        records: by norm, that of the bound and "l2": how the constants of the product were found.
        relaxations: those that set `upper` or a pairwise constant.
        attempts: what each method gave, that of the product first.
        lower_pairwise: [K, K] estimates from below; zeros where not asked for.
        digest: of the model's graph and weights, see `digests.model_digest`: a bound is good for no other.
    """

    upper: float
    lower: float
    pairwise: Tensor
    layers: tuple[LayerBound, ...]
    norm: str = "l2"
    input_shape: tuple[int, ...] = ()
    pair_methods: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    records: Mapping[str, NormRecord] = field(default_factory=dict, repr=False, compare=False)
    digest: str = field(default="", repr=False)
    relaxations: tuple[Relaxation, ...] = field(default=(), repr=False, compare=False)
    attempts: tuple[Attempt, ...] = field(default=(), repr=False, compare=False)
    lower_pairwise: Tensor | None = field(default=None, repr=False, compare=False)


@proving()
def lipschitz(
    model: nn.Module,
    input_shape: Sequence[int],
    method: str = "product",
    norm: str = "l2",
    *,
    points: Tensor | None = None,
    budget: float = 60.0,
    solver: str | None = None,
) -> LipschitzBound:
    """Bound the Lipschitz constants of a network's logits, and of their pairwise differences.

    With f = A g + b, A the last affine run and g everything before, |f_i - f_j| <= Lip(g) ||A_i - A_j||_* ||x - x'||,
    the dual norm of the row difference; Lip(g) is the product of the norms of the affine runs and of the
    factors of the other operations, sums for residual branches, roots of squares for concatenations. Everything is
    proved in float64 on the CPU, each rounding outward: a bound of the network in real arithmetic, with its
    stored weights, and with parametrized weights and constants as its own type computes them. For linf and l1
    each pair takes the smaller of that product in its own norm and of norm equivalence, ||d||_2 <= sqrt(n) ||d||_inf
    and ||d||_2 <= ||d||_1, times the l2 bound.

    Args:
        model: any module whose operations have rules, in eval mode.
        input_shape: shape of one input, without the batch.
        method: "product"; "closed-form", LipSDP with multipliers that need no search; "lipsdp" and "lipsdp-layer", by
            an interior-point solver, for small networks; "lipsdp-first-order", by descent; "auto", the best that the
            budget allows, which is what "local" takes too, whose own part depends on the sample (see `local`). Each
            keeps the product where that is smaller.
        norm: "l2", "linf" or "l1".
        points: [B, *input_shape] from which to look for the largest Jacobian norm, in float64, at the points alone for
            "product" and by ascent from there for the others; None leaves `lower` at 0.
        budget: seconds that tightening may take, about; not used by "product".
        solver: of "lipsdp" and "lipsdp-layer": None or "built-in", or "clarabel", "scs", "mosek" through cvxpy.

    Raises:
        ValueError: training mode, NaN weights, an operation without a rule, a shape that does not fit, output not
            [B, K].
        ArithmeticError: a Jacobian above the bound, which would disprove it.
    """
    check_norm(norm)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if not 0 < budget < math.inf:
        raise ValueError(f"budget: expected a finite number of seconds > 0, got {budget}")
    check_model(model)
    graph = trace(model, tuple(input_shape), leaf_types())
    bound = _product(graph, tuple(input_shape), norm)
    if method != "product" and points is not None and _tight(bound, model, points):
        bound = replace(bound, attempts=(replace(bound.attempts[0], note="attained at the points: no search"),))
    elif method != "product":
        device = floating_like(model).device
        bound = _tightened(graph, bound, method, budget, solver, device if device.type == "cuda" else "cpu")
    if points is None:
        return bound
    return _with_lower(bound, lower_estimates(model, points, norm, steps=0 if method == "product" else _ASCENT))


def _tight(bound: LipschitzBound, model: nn.Module, points: Tensor) -> bool:
    """Whether the product is attained at the points, as by networks of isometries: no method could gain much."""
    lower = lower_estimates(model, points, bound.norm, steps=0)
    pairs = bool((bound.pairwise <= lower.pairwise * (1 + _TIGHT)).all())
    return pairs and bound.upper <= lower.whole * (1 + _TIGHT)


def _with_lower(bound: LipschitzBound, lower: LowerEstimates) -> LipschitzBound:
    """The bound with its estimates from below; ArithmeticError where one exceeds it."""
    rounding = _CANCELLATION * bound.attempts[0].upper
    if lower.whole > bound.upper * (1 + _ESTIMATE) + rounding:
        raise ArithmeticError(f"a Jacobian norm of {lower.whole} exceeds the bound {bound.upper}: the bound is wrong")
    wrong = torch.nonzero(lower.pairwise > bound.pairwise * (1 + _ESTIMATE) + rounding)
    if len(wrong):
        i, j = wrong[0].tolist()
        found, claimed = float(lower.pairwise[i, j]), float(bound.pairwise[i, j])
        raise ArithmeticError(
            f"a slope of {found} exceeds the bound {claimed} of the pair {i}, {j}: the bound is wrong"
        )
    pairwise = torch.minimum(lower.pairwise, bound.pairwise)
    return replace(bound, lower=min(lower.whole, bound.upper), lower_pairwise=pairwise)


def _product(graph: Graph, input_shape: tuple[int, ...], norm: str) -> LipschitzBound:
    begin = time.monotonic()
    record = _product_in(graph, norm)
    records = {name: record if name == norm else _product_in(graph, name) for name in dict.fromkeys((norm, "l2"))}
    layers = tuple(_layer_bound(run) for run in record.runs if run.parts)
    bare = LipschitzBound(
        record.upper, 0.0, record.pairwise, layers, norm, input_shape, (), records, model_digest(graph)
    )
    bound = by_relaxations(bare, ())
    attempt = Attempt("product", bound.upper, float(bound.pairwise.max()), time.monotonic() - begin)
    return replace(bound, attempts=(attempt,))


def by_relaxations(bound: LipschitzBound, relaxations: Sequence[Relaxation]) -> LipschitzBound:
    """The bound from its records, the product's, and these relaxations alone: of each constant the smallest."""
    norm, own, l2, classes = bound.norm, bound.records[bound.norm], bound.records["l2"], len(bound.pairwise)
    upper, pairwise = own.upper, own.pairwise.clone()
    names = [["product"] * classes for _ in range(classes)]
    inner, outer = _equivalence(norm, bound.input_shape, classes)
    if norm != "l2":
        upper = min(upper, up_mul(l2.upper, inner, outer))
        _take(pairwise, names, _times(l2.pairwise, inner), "equivalence")
    used: dict[tuple[int, int] | None, Relaxation] = {}  # by pair; that of the whole end at None and in `shared`
    shared: list[Relaxation] = []
    for one in sorted(relaxations, key=lambda one: one.pair is None):  # pairs first: fewer need the whole end's
        same = one.norm == norm
        constant = one.upper if same else up_mul(one.upper, inner)
        label = one.method if same else f"{one.method} by equivalence"
        if one.pair is None:
            if up_mul(constant, outer) < upper:
                upper, used[None] = up_mul(constant, outer), one
            every = torch.full_like(pairwise, up_mul(constant, ROOT_2)).fill_diagonal_(0.0)
            if _take(pairwise, names, every, label):
                shared.append(one)
        elif constant < float(pairwise[one.pair]):
            i, j = one.pair
            pairwise[i, j] = pairwise[j, i] = constant
            names[i][j] = names[j][i] = label
            used[one.pair] = one
    kept = tuple(dict.fromkeys((*used.values(), *shared)))
    return replace(bound, upper=upper, pairwise=pairwise, pair_methods=tuple(map(tuple, names)), relaxations=kept)


def _take(pairwise: Tensor, names: list[list[str]], other: Tensor, label: str) -> bool:
    """Take smaller constants, in place; whether there were any."""
    better = other < pairwise
    pairwise.copy_(torch.minimum(pairwise, other))
    for i, j in torch.nonzero(better).tolist():
        names[i][j] = label
    return bool(better.any())


def _equivalence(norm: str, input_shape: tuple[int, ...], classes: int) -> tuple[float, float]:
    """What takes an l2 constant to one in `norm`: from the inputs' norm to l2, and from l2 of the logits to theirs."""
    inner = up_sqrt(float(math.prod(input_shape))) if norm == "linf" else 1.0
    return inner, up_sqrt(float(classes)) if norm == "l1" else 1.0


def _tightened(
    graph: Graph,
    bound: LipschitzBound,
    method: str,
    budget: float,
    solver: str | None,
    device: torch.device | str,
) -> LipschitzBound:
    """The bound with the smaller constant of its own and of every relaxation that is proved."""
    constants, classes = dict(bound.records["l2"].constants), len(bound.pairwise)
    found = Tightener(graph, constants, classes, solver).tighten(method, bound.norm, budget, device)
    attempts = (*bound.attempts, *(_in_norm(one, bound, found) for one in found.attempts))
    return replace(by_relaxations(bound, found.relaxations), attempts=attempts)


def _in_norm(attempt: Attempt, bound: LipschitzBound, found: Found) -> Attempt:
    """The attempt's numbers in the norms of the bound; pairs that were left out follow from the whole end."""
    own = [one for one in found.relaxations if one.method == attempt.method]
    if not own:
        return attempt
    inner, outer = _equivalence(bound.norm, bound.input_shape, len(bound.pairwise))
    if own[0].norm == bound.norm:
        inner = 1.0
    pair = attempt.pair_upper if attempt.pair_upper < math.inf else up_mul(attempt.upper, ROOT_2)
    return replace(attempt, upper=up_mul(attempt.upper, inner, outer), pair_upper=up_mul(pair, inner))


def _layer_bound(run: Run) -> LayerBound:
    bounds = run.bounds
    return LayerBound(" + ".join(run.parts), type(run.operator).__name__, bounds.lower, bounds.upper, bounds.method)


def _product_in(graph: Graph, norm: str) -> NormRecord:
    runs: list[Run] = []

    def norm_of(name: str, parts: tuple[str, ...], linear: LinearMap) -> float:
        runs.append(Run(name, parts, linear, bracket(linear, norm)))
        return runs[-1].bounds.upper

    walk = Walk(
        graph,
        norm_of=norm_of,
        factor_of=lambda rule, call: rule.factor(call, norm) if rule.factor else math.inf,
        prepare=float64,
        norm=norm,
    )
    _check_logits(graph.shapes[graph.output])
    check_replay(graph)
    upper = float(walk.constant(graph.output))
    if not math.isfinite(upper):
        raise ValueError(f"the model's Lipschitz bound overflows: {upper}")
    last = float(walk.anchor_constant(walk.output.anchor))
    pairwise = _pairwise(walk.output, last, graph.shapes[graph.output], norm)
    order = {node.name: position for position, node in enumerate(graph.nodes)}
    runs.sort(key=lambda run: order[run.end])
    return NormRecord(upper, tuple(runs), walk.anchors(), last, pairwise)


def _check_logits(shape: tuple[int, ...]) -> None:
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            f"the model: expected logits [B, K] with K >= 2, got an output of shape [B, {', '.join(map(str, shape))}]"
        )


@torch.no_grad()
def _pairwise(place: Place, constant: float, shape: tuple[int, ...], norm: str) -> Tensor:
    """constant * ||A_i - A_j||_*, rounded up; a row of error E of the matrix has ||e_i^T E||_* <= ||E||."""
    rows, error = torch.eye(shape[0], dtype=torch.float64), 0.0
    if place.operator is not None:
        rows = place.operator.rows()
        error = up_mul(2.0, place.operator.matrix_error(norm))
    differences = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i in range(len(rows) - 1):
        found = _dual_norms(rows[i + 1 :] - rows[i], norm)
        found = found if error == 0.0 else up(found + error)
        differences[i, i + 1 :] = differences[i + 1 :, i] = _times(found, constant)
    return differences


def _dual_norms(
    differences: Tensor,  # [K, D], each entry rounded once
    norm: str,
) -> Tensor:  # [K] upper bounds
    if norm == "l1":
        found = differences.abs().amax(1)
    else:
        found = norm_up(differences, 1) if norm == "l2" else sum_up(differences, 1)
    return _times(found, 1 + 4 * UNIT)  # an exact difference is at most 1 + u times the rounded one


def _times(
    constants: Tensor,  # >= 0
    factor: float,
) -> Tensor:
    """Upper bounds of the products; zeros stay."""
    if factor == 0.0:
        return torch.zeros_like(constants)
    return constants if factor == 1.0 else torch.where(constants == 0, constants, up(constants * factor))


class TrainingBound:
    """Differentiable estimate of the pairwise Lipschitz constants, for losses that use the current bound.

    Warm-started power iteration on each affine run, as `lipschitz` walks them; an estimate from below, which drives
    training and never a certificate. Works in training mode; batch normalisation enters with its running statistics.

    Args:
        model: any module whose operations have rules.
        input_shape: shape of one input, without the batch.
        steps: power steps a call.
        through_norms: let gradients pass through the norms of the runs before the last. To be switched off where these
            norms are fixed and all singular values equal, as under an orthogonal constraint: there the gradient of the
            norm is that of an arbitrary one of them, and only disturbs training.
    """

    def __init__(
        self, model: nn.Module, input_shape: Sequence[int], steps: int = 1, *, through_norms: bool = True
    ) -> None:
        check_finite_state(model)
        self._retrace: Callable[[], Graph] = lambda: trace(model, tuple(input_shape), leaf_types())
        self._graph = self._retrace()
        _check_logits(self._graph.shapes[self._graph.output])
        live = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        constants = self._graph.constants.values()
        self._derived = any(isinstance(value, Tensor) and id(value) not in live for value in constants)
        self._steps, self._through_norms = steps, through_norms
        self._vectors: dict[str, Tensor] = {}  # by the name of the run's last node

    def pairwise(self) -> Tensor:
        """The current estimate [K, K], in the model's dtype, with gradients to the weights; zero diagonal."""
        like = floating_like(self._graph.model)
        if self._derived:  # constants computed from weights follow them, without a gradient
            self._graph = self._retrace()
        walk = Walk(
            self._graph,
            norm_of=self._estimate,
            factor_of=lambda rule, call: rule.factor(call, "l2") if rule.factor else math.inf,
            prepare=lambda linear: converted(linear, lambda tensor: tensor.to(like)),
        )
        rows = self._rows(walk.output)
        differences = rows[:, None] - rows[None]
        lengths = (differences.square().sum(2) + torch.finfo(rows.dtype).tiny).sqrt()
        off_diagonal = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        result: Tensor = walk.anchor_constant(walk.output.anchor) * lengths * off_diagonal
        return result

    def state(self) -> dict[str, Tensor]:
        """The warm starts, for a resume file."""
        return dict(self._vectors)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up warm starts given by `state`."""
        self._vectors = dict(state)

    def _estimate(self, name: str, parts: tuple[str, ...], linear: LinearMap) -> Tensor | float:
        if linear.isometry:
            return 1.0
        warm = self._vectors.get(name)
        norm, vector = estimate_norm(linear, warm, self._steps if warm is not None else 10)
        self._vectors[name] = vector
        return norm if self._through_norms else norm.detach()

    def _rows(self, place: Place) -> Tensor:
        if place.operator is not None:
            return place.operator.rows()
        like = floating_like(self._graph.model)
        return torch.eye(self._graph.shapes[self._graph.output][0], dtype=like.dtype, device=like.device)

"""What one executed operation may differ from the real one on the same input: the inequalities, and their numbers.

All norms are l2. With M >= ||input||, N >= ||the real operation's result on that input||, m results, u the unit of
stored numbers, v that of accumulation and t the largest error of an underflow (see `Arithmetic`), the local error is

    e = p M + q N + h.

**Sums of products** ("dot"). Let one result be y = sum of products p_j = w_j x_j and perhaps a bias, n terms, computed
along any binary tree, with or without fused multiply-add: every product and every inner node is rounded at most once,
so that the error is the sum over these of d_k c_k + t_k, |d_k| <= v, |t_k| <= t, with c_k the number before its
rounding. A product's is |p_j|, and these sum to at most S_i = sum |w_ij||x_j| + |b_i|. An inner node holds a partial
sum over a subset of the terms; its exact value lies between minus the sum of the negative terms and the sum of the
positive ones, the larger of which is (S_i + |y_i|) / 2, and it was computed to within gamma_n(v) S_i (Higham,
"Accuracy and stability of numerical algorithms", 2nd ed., section 4.2: any order). There are n - 1 inner nodes:

    |error_i| <= v S_i + (n - 1) v ((S_i + |y_i|) / 2 + gamma_n(v) S_i) + 2 t (2 n + sum |w_ij| + sum |x_j|).

The last term: at most 2 n roundings may underflow, weights and inputs below t may be taken for zero, and such errors
are at most doubled by later roundings, since n v <= 1/4 is required. Over all results, ||S|| <= alpha M + beta with
alpha the norm of |W| and beta = ||b||, and ||sum_j |x_j||| over the inputs of each result is at most
sqrt(m n k) M with k = `repeats`, how often one input may enter one result.

Half types store the sum once, or twice where the bias is added to a stored sum, and `partials` further partial sums
(transposed convolutions, which may scatter stored products): w stored numbers of at most N + beta + error, or S + error
for partial sums, err by at most (1 + w u) u times their sum, since (1 + u)^w - 1 <= w u (1 + w u) for w u <= 1.

**Steps.** At most T roundings of a number: (1 + u)^T - 1 <= T u (1 + T u) of it. Underflow of inputs, constants and
results is at most t each, enlarged by at most 1 + the gain, or t M where a constant underflows.

**Sums of tensors.** One rounding of N, one of a constant's conversion, and three underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arithmetic import Arithmetic
from .rounding import gamma, up_add, up_mul, up_sqrt
from .rules import Rounding

_MOST = 0.25  # of n times the unit


@dataclass(frozen=True)
class LocalError:
    """e = p M + q N + h, see the module; infinite h where nothing is proved."""

    p: float = 0.0
    q: float = 0.0
    h: float = 0.0


NO_ERROR = LocalError()
_UNBOUNDED = LocalError(0.0, 0.0, math.inf)


def local_error(
    rounding: Rounding,
    arithmetic: Arithmetic,
    gain: float,
    rows: float,
    results: int,
) -> LocalError:
    """The numbers p, q and h of one operation.

    Args:
        rounding: how it rounds.
        arithmetic: in which it runs.
        gain: alpha of the operation.
        rows: the largest sum of absolute weights of one result.
        results: how many numbers it gives.
    """
    if rounding.kind == "exact" or arithmetic.unit == 0.0:
        return NO_ERROR
    root = up_sqrt(float(results))
    if rounding.kind == "dot":
        return _dot(rounding, arithmetic, gain, rows, root)
    steps = up_mul(float(rounding.terms), arithmetic.unit)
    if steps > _MOST:
        return _UNBOUNDED
    relative = up_mul(steps, up_add(1.0, steps))
    lost = up_mul(float(max(rounding.terms, 1)), arithmetic.tiny)
    fixed = up_add(up_mul(relative, rounding.offset), up_mul(2.0, lost, up_add(1.0, gain), root), rounding.jump)
    return LocalError(up_add(up_mul(relative, gain), lost), 0.0, fixed)


def _dot(rounding: Rounding, arithmetic: Arithmetic, gain: float, rows: float, root: float) -> LocalError:
    terms, tiny, unit = float(rounding.terms), arithmetic.tiny, arithmetic.unit
    fine = arithmetic.accumulation if rounding.wide else unit
    if up_mul(terms, fine) > _MOST:
        return _UNBOUNDED
    lost = up_mul(2.0, tiny, root)
    share = up_mul(fine, up_add(1.0, up_mul(max(terms - 1, 0.0), up_add(0.5, gamma(rounding.terms, fine)))))
    p = up_add(up_mul(share, gain), up_mul(lost, up_sqrt(up_mul(terms, float(rounding.repeats)))))
    q = up_mul(max(terms - 1, 0.0) / 2, fine)
    h = up_add(up_mul(share, rounding.offset), up_mul(lost, up_add(2 * terms, rows)))
    if unit == fine:
        return LocalError(p, q, h)
    stores, partials = (2.0 if rounding.offset else 1.0), float(rounding.partials)
    steps = up_mul(stores + partials, unit)
    if steps > _MOST:
        return _UNBOUNDED
    whole, part = up_mul(stores, unit, up_add(1.0, steps)), up_mul(partials, unit, up_add(1.0, steps))
    grown = up_add(1.0, whole, part)
    return LocalError(
        up_add(up_mul(grown, p), up_mul(part, gain)),
        up_add(up_mul(grown, q), whole),
        up_add(up_mul(grown, h), up_mul(up_add(whole, part), rounding.offset), up_mul(stores + partials, lost)),
    )


def sum_error(arithmetic: Arithmetic, constant: float, results: int) -> LocalError:
    """The numbers of a sum or difference of two tensors, or of a tensor and a constant of the norm `constant`."""
    if arithmetic.unit == 0.0:
        return NO_ERROR
    conversion = up_mul(arithmetic.unit, up_add(1.0, arithmetic.unit), constant)
    lost = up_mul(3.0, arithmetic.tiny, up_sqrt(float(results)))
    return LocalError(0.0, arithmetic.unit, up_add(conversion, lost))

"""From a tangent vector back to the manifold: the doubled tree `W + xi`, and its rounding."""

from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

from decompositions.formats.gauge import cut_or_warn
from decompositions.formats.network import Network
from decompositions.geometry.blocks import along, flatten, normal_basis, padded, unflatten
from decompositions.geometry.gauges import _given
from decompositions.geometry.tangent import Tangent
from decompositions.linalg import full_precision
from decompositions.lockstep import Job, alone

N = TypeVar("N", bound=Network)


@full_precision
def retract(
    xi: Tangent[N],
    step: float = 1.0,
    *,
    rank: int | Sequence[int] | Mapping[str, int] | None = None,
    tol: float | None = None,
) -> N:
    """Back to the manifold: `round(W + step xi)`, to the ranks of the point, to other ranks, or by a tolerance.

    A second-order retraction: `R(t xi) = W + t xi + O(t^2)`, and the tangential part of the second-order term is zero,
    so that f(R(t xi)) has the Riemannian gradient and Hessian as derivatives. By `tol` it is the step of
    rank-adaptive schemes: ranks may double or shrink, and `‖result - (W + step xi)‖ <= tol ‖W + step xi‖`.
    Cost: a QR of the deltas and a rounding at doubled ranks, O(sum_v n_v (2 r)^(deg + 1)).

    Args:
        xi: the tangent vector.
        step: its factor, a real number.
        rank: see `round`; by default the ranks of the point where there is no tolerance.
        tol: relative Frobenius error of the rounding.

    Raises:
        TypeError: a step that is not a real number.
        ValueError: a step that is not finite; what `round` refuses.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from decompositions.geometry import project, retract
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2)
        >>> retract(project(net, torch.randn(6, 5)), -0.1).ranks
        (2, 2)
    """
    if not isinstance(xi, Tangent):
        raise TypeError(f"retract: xi must be a Tangent, got {type(xi).__name__}; project(point, z) makes one")
    scalar = step.ndim == 0 and not step.is_complex() if isinstance(step, Tensor) else isinstance(step, Real)
    if not scalar:
        raise TypeError(f"retract: step must be a real number, got {step!r}")
    if not isfinite(step):
        raise ValueError(f"retract: step must be finite, got {step}")
    if rank is None and tol is None:
        rank = xi.at.net.ranks
    return cut_or_warn("retract", extend(xi * step), rank, tol, center=xi.at.root, gauged=True)


def extend(xi: Tangent[N]) -> N:
    """`W + xi` with all cores but the root isometries toward it: bases `[U_v, Q_v]`, U_v verbatim in front.

    The deltas are orthogonal to U_v, so that only they are factored. A basis that is square already is not extended.
    Cost: one QR of (others x r) a bond instead of (others x 2 r), and the doubled cores.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> from decompositions.geometry import project
        >>> from decompositions.geometry.retraction import extend
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64)
        >>> xi = project(net, torch.randn(6, 5, dtype=torch.float64))
        >>> float((to_dense(extend(xi)) - to_dense(net) - xi.to_dense()).norm()) < 1e-12
        True
    """
    return alone(extending(xi))


def extending(xi: Tangent[N]) -> Job[N]:
    """`extend` as a job, for many tangent vectors in lockstep."""
    at, below, above = xi.at, xi.at.below, xi.at.above
    new: dict[int, Tensor] = {}  # core v in the extended bases
    turn: dict[int, Tensor] = {}  # delta half above v = Q_v turn[v]
    for v in (*(edge.child for edge in reversed(at.edges)), at.root):
        plain, delta = at.up[v], xi.deltas[v]
        if v == at.root:
            plain = delta = delta + at.center[v]
        wide = list(delta.shape)
        for edge in below[v]:
            wide[at.axis(v, edge.bond)] += turn[edge.child].shape[0]
        moved = padded(delta, wide)
        for edge in below[v]:
            axis = at.axis(v, edge.bond)
            if turn[edge.child].shape[0]:
                half = along(_given(at.down[edge.child]), axis, turn[edge.child])
                place = moved.narrow(axis, delta.shape[axis], half.shape[axis])
                for k, size in enumerate(half.shape):
                    place = place.narrow(k, 0, size)
                place += half
        if v == at.root:
            new[v] = moved
            continue
        axis = at.axis(v, above[v].bond)
        wide[axis] = plain.shape[axis]
        basis, rest = flatten(padded(plain, wide), axis), flatten(moved, axis)
        q = yield from normal_basis(basis, rest)
        turn[v] = q.mH @ rest
        wide[axis] += q.shape[1]
        new[v] = unflatten(torch.cat([basis, q], 1), wide, axis)
    return at.net._unchecked([new[v] for v in range(len(new))], at.net.legs, at.net.rows, at.net.cols)

"""From a tangent vector back to the manifold: the doubled tree `W + xi`, and its rounding."""

from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from decompositions.formats.gauge import cut_or_warn
from decompositions.formats.network import Network, TreeEdge
from decompositions.geometry.blocks import along, flatten, normal_basis, padded, unflatten
from decompositions.geometry.gauges import Gauges, _given
from decompositions.geometry.tangent import Tangent
from decompositions.linalg import full_precision, positive_qr
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


class Moved(NamedTuple):
    """A tree that has moved along a tangent vector, at the same ranks.

    Args:
        net: its cores but the root are isometries toward the root.
        overlaps: bond -> `U'_e^H U_e`, the new bases below every bond against the old ones.
    """

    net: Any
    overlaps: dict[str, Tensor]


def galerkin_retract(xi: Tangent[N]) -> N:
    """Back to the manifold without a singular value decomposition: W + xi projected on the bases that it moves to.

    From the leaves up, the new basis below a bond is that of `W + xi` in the new bases below and the old one above,
    `U'_e R = K_e` with `K_e = U_e S_e + delta_e` at a leaf; the root core is W + xi in the new bases: basis update and
    Galerkin with one Euler step of the constant field xi. A retraction, `R(t xi) = W + t xi + O(t^2)` (first order:
    `retract` is second order and nearer to W + t xi), exact for a matrix where xi moves one basis and nothing else; no
    inverse of a core is formed, so that small singular values do no harm.
    Cost: one QR a bond, O(sum_v n_v r^(deg + 1)), nothing at doubled ranks.

    Returns:
        A tree of the ranks of the point, its cores but the root isometries toward it.

    References:
        G. Ceruti, C. Lubich, An unconventional robust integrator for dynamical low-rank approximation, BIT 2022;
        G. Ceruti, C. Lubich, H. Walach, Time integration of tree tensor networks, SIAM J. Numer. Anal. 2021.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> from decompositions.geometry import project
        >>> from decompositions.geometry.retraction import galerkin_retract
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64)
        >>> xi = project(net, torch.randn(6, 5, dtype=torch.float64)) * 1e-5
        >>> float((to_dense(galerkin_retract(xi)) - to_dense(net) - xi.to_dense()).norm()) < 1e-7
        True
    """
    net: N = alone(galerkin_retracting(xi)).net
    return net


def galerkin_retracting(xi: Tangent[Any], *, near: bool = False) -> Job[Moved]:
    """`galerkin_retract` as a job, for many tangent vectors in lockstep; also how its bases overlap the old ones.

    `near`: steps are expected to be small beside the singular values; bases then come by products and a Cholesky
    factorization where that is accurate, and by a QR elsewhere.
    """
    at, below, above = xi.at, xi.at.below, xi.at.above
    new: dict[int, Tensor] = {}
    overlaps: dict[str, Tensor] = {}
    turned: dict[str, Tensor] = {}  # U'^H of what xi adds below a bond, in the basis V_e
    for v in (*(edge.child for edge in reversed(at.edges)), at.root):
        moved, old = at.center[v] + xi.deltas[v], at.up[v]
        inner = [(at.axis(v, edge.bond), edge) for edge in below[v]]
        for k, edge in inner:
            moved = along(moved, k, overlaps[edge.bond])
            if v != at.root:
                old = along(old, k, overlaps[edge.bond])
        for k, edge in inner:
            moved = moved + _beside(at.down[edge.child], k, turned[edge.bond], inner, overlaps)
        if v == at.root:
            new[v] = moved
            continue
        bond = above[v].bond
        axis = at.axis(v, bond)
        q, r = yield from _new_basis(flatten(moved, axis), at.links[bond] if near else None)
        new[v] = unflatten(q, moved.shape, axis)
        overlaps[bond] = q.mH @ flatten(old, axis)
        turned[bond] = r - overlaps[bond] @ at.links[bond]
    return Moved(at.net._unchecked([new[v] for v in range(len(new))], at.net.legs, at.net.rows, at.net.cols), overlaps)


def _beside(
    core: Tensor | None,
    axis: int,
    matrix: Tensor,
    inner: Sequence[tuple[int, TreeEdge]],
    overlaps: Mapping[str, Tensor],
) -> Tensor:
    """A core times a matrix at one of its lower bonds, and times the overlaps at the others."""
    made = along(_given(core), axis, matrix)
    for other, edge in inner:
        if other != axis:
            made = along(made, other, overlaps[edge.bond])
    return made


def basis_overlaps(at: Gauges[Any], before: Gauges[Any]) -> dict[str, Tensor]:
    """`U'_e^H U_e` at every bond: the bases below it at one point against those at another one, of any ranks.

    Cost: one product of a core with itself a bond.

    Example:
        >>> from decompositions import TT
        >>> from decompositions.geometry import gauges
        >>> at = gauges(TT.random(row_modes=(4, 4, 4), rank=2))
        >>> float((basis_overlaps(at, at)["b1"] - torch.eye(2)).norm()) < 1e-5
        True
    """
    found: dict[str, Tensor] = {}
    for edge in reversed(at.edges):
        old = before.up[edge.child]
        for lower in at.below[edge.child]:
            old = along(old, at.axis(edge.child, lower.bond), found[lower.bond])
        axis = at.axis(edge.child, edge.bond)
        found[edge.bond] = flatten(at.up[edge.child], axis).mH @ flatten(old, axis)
    return found


NEAR = 0.25
"""How far from the identity `X^H X` may be for its Cholesky factor to make X orthonormal to rounding."""


def _new_basis(moved: Tensor, link: Tensor | None) -> Job[Sequence[Tensor]]:
    """Q and R of a basis `U S + delta`, S being `link`.

    `X = U + delta S^-1` has the same span and nearly orthonormal columns where delta is small beside S: the Cholesky
    factor of `X^H X`, which is near 1, then makes it orthonormal to rounding. The inverse is but a change of basis
    that the check below passes or not: where S is singular to rounding, or the step large, it does not.
    """
    if link is not None and link.shape[0] == link.shape[1] and moved.shape[0] >= 2 * moved.shape[1]:
        change, _ = torch.linalg.inv_ex(link)
        x = moved @ change  # whatever `change` lost to rounding, the span is that of `moved`
        square = x.mH @ x
        off = square - torch.eye(len(square), dtype=square.dtype, device=square.device)
        if bool(torch.linalg.matrix_norm(off) < NEAR):
            factor, _ = torch.linalg.cholesky_ex(square)
            q = x @ torch.linalg.inv_ex(factor)[0].mH
            return q, q.mH @ moved
    found: Sequence[Tensor] = yield positive_qr, moved
    return found


def follow(
    at: Gauges[Any], before: Gauges[Any], overlaps: Mapping[str, Tensor], deltas: Sequence[Tensor]
) -> list[Tensor]:
    """Deltas of one point as deltas of another that it was moved to: every one in the new bases around its core.

    A vector transport: it differs from projection by terms of the size of the move, and costs two products a bond and
    core. What the new bases have taken in of a delta goes on in the cores above, as in the projection. Not so the
    other way: a projection also turns what U'_e has lost of U_e, times the large deltas above, into deltas below. An
    optimizer that scales small deltas up must not have that: it diverges (`RankAdaptive` did so on trees from a
    learning rate of .001 on, where it now takes .03). The result still has parts along U'_e; `gauge_fix` removes them.

    Args:
        at: the new point, of any ranks.
        before: the old one.
        overlaps: of the bases below every bond, new against old (`basis_overlaps`).
        deltas: at the old point, of the shapes of its cores.

    Example:
        >>> from decompositions import TT
        >>> from decompositions.geometry import gauges, project
        >>> at = gauges(TT.random(row_modes=(4, 4, 4), rank=2))
        >>> xi = project(at, torch.randn(4, 4, 4))
        >>> same = follow(at, at, basis_overlaps(at, at), xi.deltas)
        >>> all(float((a - b).norm()) < 1e-4 for a, b in zip(same, xi.deltas))
        True
    """
    above: dict[str, Tensor] = {}  # the same for the bases above every bond
    for edge in at.edges:
        new, old = _given(at.down[edge.child]), _given(before.down[edge.child])
        for other in at.below[edge.parent]:
            if other.bond != edge.bond:
                old = along(old, at.axis(edge.parent, other.bond), overlaps[other.bond])
        if edge.parent in at.above:
            bond = at.above[edge.parent].bond
            old = along(old, at.axis(edge.parent, bond), above[bond])
        axis = at.axis(edge.parent, edge.bond)
        above[edge.bond] = flatten(new, axis).mH @ flatten(old, axis)
    found: dict[int, Tensor] = {}
    turned: dict[str, Tensor] = {}  # what the deltas below a bond have in the new bases, in the old one above
    for v in (*(edge.child for edge in reversed(at.edges)), at.root):
        delta = deltas[v]
        inner = [(at.axis(v, edge.bond), edge) for edge in at.below[v]]
        for k, edge in inner:
            delta = along(delta, k, overlaps[edge.bond])
        for k, edge in inner:
            delta = delta + _beside(before.down[edge.child], k, turned[edge.bond], inner, overlaps)
        if v != at.root:
            bond = at.above[v].bond
            axis = at.axis(v, bond)
            turned[bond] = flatten(at.up[v], axis).mH @ flatten(delta, axis)
            delta = along(delta, axis, above[bond])
        found[v] = delta
    return [found[v] for v in range(len(found))]

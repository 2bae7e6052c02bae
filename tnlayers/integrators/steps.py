"""One step of every scheme, for any tree: written on cores, gauges and restricted fields alone.

Names: U_v is core v as an isometry toward its parent, V_v everything above it, C_v the center core; a hat marks an
augmented basis. The matrix schemes are the case of LowRank rooted at its middle core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompositions import Network, norm
from decompositions import round as cut
from decompositions.formats.network import TreeEdge, tree_edges
from decompositions.geometry import Gauges, Tangent, gauges
from decompositions.geometry.blocks import along, flatten, unflatten
from decompositions.geometry.tangent import gauge_fix
from decompositions.linalg import positive_qr
from tnlayers.integrators.fields import CoreField, Field

Substep = Callable[[CoreField, Tensor, float, float], Tensor]


def euler(f: CoreField, y: Tensor, t: float, h: float) -> Tensor:
    """Explicit Euler, order 1."""
    return y + h * f(t, y)


def rk4(f: CoreField, y: Tensor, t: float, h: float) -> Tensor:
    """The classical Runge-Kutta scheme, order 4."""
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + h / 2, y + h / 2 * k2)
    k4 = f(t + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


SUBSTEPS: dict[str, Substep] = {"euler": euler, "rk4": rk4}


class Truncate(NamedTuple):
    """How a step ends: by a relative tolerance, an absolute one, ranks, or a mixture."""

    tol: float | None
    theta: float | None
    rank: Any

    def __call__(self, net: Network, root: int) -> Network:
        """The network cut to what is allowed."""
        tol = self.tol
        if self.theta is not None:
            size = float(norm(net))
            relative = self.theta / size if size > 0 else 0.0
            tol = relative if tol is None else min(tol, relative)
        tol = None if tol == 0 else tol  # what is redundant is removed all the same
        return cut(net, rank=self.rank, tol=tol, center=root)

    def budget(self, net: Network) -> float:
        """What may be discarded, absolute."""
        size = float(norm(net))
        amounts = [a for a in (self.theta, None if self.tol is None else self.tol * size) if a is not None]
        return min(amounts, default=0.0)


@dataclass
class Stepper:
    """What all schemes share: the field, the sub-integrator, the truncation, the root."""

    field: Field
    substep: Substep
    truncate: Truncate
    root: int

    def evolve(self, net: Network, core: int, t: float, h: float, start: Tensor | None = None) -> Tensor:
        """Integrate the center core, the others fixed; `start` in place of the net's own.

        Raises:
            ValueError: the result is not finite.
        """
        done = self.substep(self.field.restrict(net, core), net.cores[core] if start is None else start, t, h)
        if not bool(torch.isfinite(done).all()):
            raise ValueError(
                f"integrate: Y is not finite in the step from t = {t:.6g} by {h:.3g}; take more steps, or a method "
                "without a backward step (augmented, parallel) where F is stiff"
            )
        return done

    def edges(self, net: Network) -> tuple[TreeEdge, ...]:
        """Bonds from the root down."""
        return tree_edges(net.legs, net.rows, net.cols, self.root)


# --- projector splitting: every core forward, every bond backward ---


class _Walk:
    """A tree with its center on the move."""

    def __init__(self, step: Stepper, net: Network) -> None:
        from decompositions import orthogonalize

        self.step, self.net, self.center = step, orthogonalize(net, step.root), step.root
        above = {edge.child: edge for edge in step.edges(net)}
        self.above = above

    def _set(self, changed: dict[int, Tensor]) -> None:
        cores = [changed.get(k, core) for k, core in enumerate(self.net.cores)]
        self.net = self.net._unchecked(cores, self.net.legs, self.net.rows, self.net.cols)

    def shift(self, target: int, time: tuple[float, float] | None = None) -> None:
        """Move the center over one bond; with `time` the bond's matrix is integrated backward on the way."""
        source, net = self.center, self.net
        bond = next(label for label in net.legs[source] if label in net.legs[target])
        axis, other = net.legs[source].index(bond), net.legs[target].index(bond)
        q, r = positive_qr(flatten(net.cores[source], axis))
        shape = net.cores[source].shape
        if time is not None:
            restricted = self.step.field.restrict(net, source)

            def backward(t: float, s: Tensor) -> Tensor:
                return -(q.mH @ flatten(restricted(t, unflatten(q @ s, shape, axis)), axis))

            r = self.step.substep(backward, r, *time)
        self._set({source: unflatten(q, shape, axis), target: along(net.cores[target], other, r)})
        self.center = target

    def go(self, target: int) -> None:
        """Move the center to a core."""
        up = [target]
        while up[-1] != self.step.root:
            up.append(self.above[up[-1]].parent)
        own = [self.center]
        while own[-1] not in up:
            own.append(self.above[own[-1]].parent)
        for core in (*own[1:], *reversed(up[: up.index(own[-1])])):
            self.shift(core)


def _splitting_order(net: Network, edges: Sequence[TreeEdge], root: int) -> list[tuple[int, int | None]]:
    """(core, None): the core forward; (core, other): the bond between them backward, the center moving to the other."""
    order: list[tuple[int, int | None]] = []
    trail: list[TreeEdge] = []

    def leave() -> None:
        edge = trail.pop()
        order.extend([(edge.child, None), (edge.child, edge.parent)])

    for edge in edges:
        while trail and trail[-1].child != edge.parent:
            leave()
        trail.append(edge)
    while trail:
        leave()
    return [*order, (root, None)]


def splitting(step: Stepper, net: Network, t: float, h: float, *, symmetric: bool = False) -> Network:
    """Projector-splitting (Lie), or with `symmetric` its composition with the adjoint (Strang); ranks stay.

    References:
        C. Lubich, I. Oseledets, BIT 2014; C. Lubich, I. Oseledets, B. Vandereycken, SIAM J. Numer. Anal. 2015;
        G. Ceruti, C. Lubich, H. Walach, Time integration of tree tensor networks, SIAM J. Numer. Anal. 2021.
    """
    walk = _Walk(step, net)
    order = _splitting_order(net, step.edges(net), step.root)
    span = h / 2 if symmetric else h
    _split(walk, order, t, span)
    if symmetric:
        back = [(core, None) if other is None else (other, core) for core, other in reversed(order)]
        _split(walk, back, t + span, span)
    walk.go(step.root)
    return walk.net


def _split(walk: _Walk, order: Sequence[tuple[int, int | None]], t: float, h: float) -> None:
    for core, other in order:
        walk.go(core)
        if other is None:
            walk._set({core: walk.step.evolve(walk.net, core, t, h)})
        else:
            walk.shift(other, (t, h))


def _given(core: Tensor | None) -> Tensor:
    assert core is not None
    return core


# --- basis update and Galerkin: new bases from the leaves up, the root core last ---


def _old_bases(at: Gauges[Any], new: dict[int, Tensor], core: int) -> list[Tensor]:
    """Cores with the center at `core`: new bases where they exist, old ones elsewhere."""
    cores = list(at.centered(core).cores)
    on_path = {core}
    k = core
    while k != at.root:
        k = at.above[k].parent
        on_path.add(k)
    return [new[k] if k in new and k not in on_path else c for k, c in enumerate(cores)]


def _children(at: Gauges[Any], core: int) -> list[tuple[int, int]]:
    """(axis, child) of the bonds below a core."""
    return [(at.axis(core, edge.bond), edge.child) for edge in at.below[core]]


def _unchecked(net: Network, cores: Sequence[Tensor]) -> Network:
    return net._unchecked(cores, net.legs, net.rows, net.cols)


def _bottom_up(at: Gauges[Any]) -> list[int]:
    """Cores but the root, children before parents."""
    return [edge.child for edge in reversed(at.edges)]


def _subtree(at: Gauges[Any], core: int) -> set[int]:
    found = {core}
    for edge in at.edges:
        if edge.parent in found:
            found.add(edge.child)
    return found


def _with_new_children(at: Gauges[Any], new: dict[int, Tensor], core: int, value: Tensor) -> Network:
    """The tree centered at `core` (which holds `value`): new bases below it, old ones everywhere else."""
    below = _subtree(at, core) - {core}
    cores = [new[k] if k in below else c for k, c in enumerate(at.centered(core).cores)]
    cores[core] = value
    return _unchecked(at.net, cores)


def bug(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Basis update and Galerkin at fixed ranks ("unconventional").

    References:
        G. Ceruti, C. Lubich, An unconventional robust integrator for dynamical low-rank approximation, BIT 2022.
    """
    at = gauges(net, step.root)
    new: dict[int, Tensor] = {}
    overlap: dict[int, Tensor] = {}  # M_v = U1_v^H U0_v
    for v in _bottom_up(at):
        axis = at.axis(v, at.above[v].bond)
        start, old = at.center[v], at.up[v]
        for k, child in _children(at, v):
            start, old = along(start, k, overlap[child]), along(old, k, overlap[child])
        k1 = step.evolve(_with_new_children(at, new, v, start), v, t, h)
        q, _ = positive_qr(flatten(k1, axis))
        new[v] = unflatten(q, k1.shape, axis)
        overlap[v] = q.mH @ flatten(old, axis)
    start = at.center[at.root]
    for k, child in _children(at, at.root):
        start = along(start, k, overlap[child])
    last = _with_new_children(at, new, at.root, start)
    cores = [new.get(k, core) for k, core in enumerate(last.cores)]
    cores[at.root] = step.evolve(last, at.root, t, h)
    return _unchecked(net, cores)


def pad(core: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind along an axis: the coordinates in an augmented basis that begins with the old one."""
    if core.shape[axis] == size:
        return core
    shape = list(core.shape)
    shape[axis] = size - core.shape[axis]
    return torch.cat([core, core.new_zeros(shape)], axis)


def complement(basis: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormal columns that span what `vectors` add to the span of `basis` (n, r), at most n - r of them.

    What rounding leaves of vectors inside the span is no direction and is dropped.
    """
    rest = vectors - basis @ (basis.mH @ vectors)
    rest = rest - basis @ (basis.mH @ rest)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    size = float(torch.linalg.vector_norm(vectors))
    keep = int((s > 10 * torch.finfo(s.dtype).eps * max(size, 1e-300)).sum())
    u = u[:, : min(keep, basis.shape[0] - basis.shape[1])]
    for _ in range(2):
        u = u - basis @ (basis.mH @ u)
        u = torch.linalg.qr(u).Q
    return u


Directions = Callable[[Network, int, Tensor], Tensor]
"""(tree centered at a core with augmented bases below, the core, its start value) -> directions to add."""


def augment(at: Gauges[Any], directions: Directions) -> dict[int, Tensor]:
    """Bases `[U_v, new]` of every subtree, leaves first, U_v kept verbatim in the first columns."""
    new: dict[int, Tensor] = {}
    for v in _bottom_up(at):
        axis = at.axis(v, at.above[v].bond)
        start, old = at.center[v], at.up[v]
        for k, child in _children(at, v):
            width = new[child].shape[at.axis(child, at.above[child].bond)]
            start, old = pad(start, k, width), pad(old, k, width)
        found = directions(_with_new_children(at, new, v, start), v, start)
        basis = flatten(old, axis)
        q = torch.cat([basis, complement(basis, flatten(found, axis))], 1)
        new[v] = unflatten(q, old.shape, axis)
    return new


def _in_bases(at: Gauges[Any], new: dict[int, Tensor], center: Tensor) -> Network:
    """The tree in augmented bases, its root core padded."""
    for k, child in _children(at, at.root):
        center = pad(center, k, new[child].shape[at.axis(child, at.above[child].bond)])
    cores = [new.get(k, core) for k, core in enumerate(at.up)]
    cores[at.root] = center
    return _unchecked(at.net, cores)


def _augmented(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Augmented BUG before truncation; its bases begin with the old ones."""
    at = gauges(net, step.root)
    new = augment(at, lambda tree, v, start: step.evolve(tree, v, t, h))
    last = _in_bases(at, new, at.center[at.root])
    cores = list(last.cores)
    cores[at.root] = step.evolve(last, at.root, t, h)
    return _unchecked(net, cores)


def augmented(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Rank-adaptive augmented BUG: the Galerkin step in old and new bases together, then truncation.

    References:
        G. Ceruti, J. Kusch, C. Lubich, A rank-adaptive robust integrator for dynamical low-rank approximation, BIT
        2022; G. Ceruti, C. Lubich, D. Sulz, Rank-adaptive time integration of tree tensor networks, SIAM J. Numer.
        Anal. 2023.
    """
    return step.truncate(_augmented(step, net, t, h), step.root)


def midpoint(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Second-order midpoint BUG: bases from an augmented half step and the field there, one full Galerkin step.

    References:
        G. Ceruti, L. Einkemmer, J. Kusch, C. Lubich, A robust second-order low-rank BUG integrator based on the
        midpoint rule, BIT 2024.
    """
    first = gauges(net, step.root)
    half = augment(first, lambda tree, v, start: step.evolve(tree, v, t, h / 2))
    middle = _in_bases(first, half, first.center[first.root])
    cores = list(middle.cores)
    cores[step.root] = step.evolve(middle, step.root, t, h / 2)
    # the bases of the half step are kept as they are: they begin with those of Y0, whose coordinates are zero-padded
    at = gauges(_unchecked(net, cores), step.root)
    at = _with_up(at, half, cores[step.root])
    new = augment(at, lambda tree, v, start: step.field.restrict(tree, v)(t + h / 2, start))
    last = _in_bases(at, new, middle.cores[step.root])
    done = list(last.cores)
    done[step.root] = step.evolve(last, step.root, t, h)
    return step.truncate(_unchecked(net, done), step.root)


def _with_up(at: Gauges[Any], up: dict[int, Tensor], center: Tensor) -> Gauges[Any]:
    """The gauges with given orthonormal bases instead of those that QR chose: U, C and S change, V stays."""
    cores = [up.get(k, core) for k, core in enumerate(at.up)]
    cores[at.root] = center
    down: list[Tensor | None] = list(at.down)
    centers, links = list(cores), dict(at.links)
    for edge in at.edges:
        axis = at.axis(edge.parent, edge.bond)
        q, r = positive_qr(flatten(centers[edge.parent], axis))
        down[edge.child] = unflatten(q, centers[edge.parent].shape, axis)
        centers[edge.child] = along(cores[edge.child], at.axis(edge.child, edge.bond), r)
        links[edge.bond] = r.mT
    net = _unchecked(at.net, cores)
    return Gauges(net, at.root, at.edges, tuple(cores), tuple(down), tuple(centers), links)


# --- parallel: all cores from the old bases at once, assembled as a step along the tangent space ---


def _parallel(step: Stepper, at: Gauges[Any], t: float, h: float) -> Tangent[Any]:
    """`Y1 - Y0` before truncation, as a tangent vector at the gauges (whose bases may be augmented)."""
    moved = []
    for v in range(len(at.up)):
        tree = _unchecked(at.net, at.centered(v).cores)
        moved.append(step.evolve(tree, v, t, h) - at.center[v])
    return gauge_fix(at, moved)


def parallel(step: Stepper, net: Network, t: float, h: float, *, safety: float = 10.0, retries: int = 3) -> Network:
    """Parallel BUG: every core evolves from the old bases; a step whose new bases see much of the field is repeated.

    `Y1 = round(Y0 + xi)` with the deltas C_v(t + h) - C_v. The block that is missing at a bond is O(h eta), eta the
    norm of F between the new directions of both sides; where `h eta > safety x budget` at some bond, the step starts
    again from Y0 in the augmented bases.

    References:
        G. Ceruti, J. Kusch, C. Lubich, A parallel rank-adaptive integrator for dynamical low-rank approximation, SIAM
        J. Sci. Comput. 2024; the same with D. Sulz for trees, arXiv 2412.00858.
    """
    at = gauges(net, step.root)
    for attempt in range(retries + 1):
        xi = _parallel(step, at, t, h)
        made = xi.to_network(point=True)
        result = step.truncate(made, step.root)
        if step.truncate.rank is not None or attempt == retries or not _rejected(step, at, xi, result, t, h, safety):
            return result
        at = widen(at, xi.deltas)
    return result


def _rejected(
    step: Stepper, at: Gauges[Any], xi: Tangent[Any], result: Network, t: float, h: float, safety: float
) -> bool:
    budget = step.truncate.budget(result)
    if budget <= 0:
        return False
    new = widen(at, xi.deltas)
    for edge in at.edges:
        v, axis = edge.child, at.axis(edge.child, edge.bond)
        old_u, old_v = at.up[v].shape[axis], at.center[v].shape[axis]
        wide = flatten(new.up[v], axis)
        if wide.shape[1] == old_u or new.center[v].shape[axis] == old_v:
            continue  # nothing new on one side
        tree = _unchecked(new.net, new.centered(v).cores)
        seen = step.field.restrict(tree, v)(t, new.center[v])
        block = (wide.mH @ flatten(seen, axis))[old_u:, old_v:]
        if h * float(torch.linalg.vector_norm(block)) > safety * budget:
            return True
    return False


def widen(at: Gauges[Any], deltas: Sequence[Tensor]) -> Gauges[Any]:
    """The same point with bases augmented on both sides of every bond by what the deltas add.

    U grows from the leaves up by the deltas (padded to the new bases below), V from the root down by the deltas of the
    core above; coordinates of Y0 are padded with zeros, so that no basis depends on vanishing singular values.
    """
    up = augment(at, lambda tree, v, start: _pad_like(deltas[v], start))
    return _assemble(at, up, lambda tree, v, start: _pad_like(deltas[v], start))


def _pad_like(value: Tensor, like: Tensor) -> Tensor:
    for axis, size in enumerate(like.shape):
        value = pad(value, axis, size)
    return value


def _assemble(at: Gauges[Any], up: dict[int, Tensor], directions: Directions) -> Gauges[Any]:
    """Gauges in augmented bases: `up` is given, V grows from the root down by what the old U see of the directions."""
    cores = [up.get(k, core) for k, core in enumerate(at.up)]
    centers: list[Tensor] = list(at.center)
    down: list[Tensor | None] = list(at.down)
    links = dict(at.links)
    for k, child in _children(at, at.root):
        centers[at.root] = pad(centers[at.root], k, up[child].shape[at.axis(child, at.above[child].bond)])
    cores[at.root] = centers[at.root]
    for edge in at.edges:
        child, parent = edge.child, edge.parent
        axis, own = at.axis(parent, edge.bond), at.axis(child, edge.bond)
        old = _given(at.down[child])
        target = [*centers[parent].shape]
        target[axis] = old.shape[axis]
        basis = flatten(_pad_like(old, centers[parent].new_empty(target)), axis)
        tree, k = list(cores), parent
        tree[k] = centers[k]
        while k != at.root:
            tree[at.above[k].parent], k = _given(down[k]), at.above[k].parent
        found = directions(_unchecked(at.net, tree), parent, centers[parent])
        found = found.narrow(axis, 0, at.up[child].shape[own])
        q = torch.cat([basis, complement(basis, flatten(found, axis))], 1)
        down[child] = unflatten(q, centers[parent].shape, axis)
        link = pad(pad(links[edge.bond], 0, up[child].shape[own]), 1, q.shape[1])
        links[edge.bond] = link
        centers[child] = along(cores[child], own, link.mT)
    return Gauges(_unchecked(at.net, cores), at.root, at.edges, tuple(cores), tuple(down), tuple(centers), links)


def parallel2(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Second-order parallel BUG: the parallel step from bases augmented by the field at the old point.

    References:
        J. Kusch, Second-order robust parallel integrators for dynamical low-rank approximation, arXiv 2403.02834.
    """
    at = gauges(net, step.root)

    def seen(tree: Network, v: int, start: Tensor) -> Tensor:
        return step.field.restrict(tree, v)(t, start)

    xi = _parallel(step, _assemble(at, augment(at, seen), seen), t, h)
    return step.truncate(xi.to_network(point=True), step.root)


def corrected(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Backward-corrected splitting: the backward steps are replaced by keeping the old basis beside the new one.

    On a matrix: U is updated and augmented, then the other side is integrated whole in the augmented basis. That is the
    augmented scheme rooted at a core with outside legs, on any tree: the last core with an outside leg.

    References:
        J. Kusch, S. Schotthoefer, A. Walter, An augmented backward-corrected projector splitting integrator for
        dynamical low-rank training, 2025, arXiv 2502.03006.
    """
    outside = set(net.outside)
    root = max(k for k, leg in enumerate(net.legs) if outside & set(leg))
    inner = Stepper(step.field, step.substep, step.truncate, root)
    return inner.truncate(_augmented(inner, net, t, h), step.root)


SCHEMES: dict[str, Callable[[Stepper, Network, float, float], Network]] = {
    "splitting": splitting,
    "strang": lambda step, net, t, h: splitting(step, net, t, h, symmetric=True),
    "bug": bug,
    "augmented": augmented,
    "midpoint": midpoint,
    "parallel": parallel,
    "parallel2": parallel2,
    "corrected": corrected,
}

ORDERS = {
    "splitting": 1,
    "strang": 2,
    "bug": 1,
    "augmented": 1,
    "midpoint": 2,
    "parallel": 1,
    "parallel2": 2,
    "corrected": 1,
}
FIXED = ("splitting", "strang", "bug")
"""Schemes that keep the ranks of the start."""

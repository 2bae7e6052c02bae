"""Parallel BUG: all cores from the old bases at once, assembled as a step along the tangent space."""

from typing import Any

import torch
from torch import Tensor

from decompositions import Network
from decompositions.geometry import Gauges, Tangent, gauges
from decompositions.geometry.blocks import along, flatten, unflatten
from decompositions.geometry.retraction import extend
from decompositions.geometry.tangent import gauge_fix
from tnlayers.integrators.bug import Directions, augment
from tnlayers.integrators.operators import FixedField
from tnlayers.integrators.steps import Stepper, children, complement, given, pad, with_cores


def _parallel(step: Stepper, at: Gauges[Any], t: float, h: float) -> Tangent[Any]:
    """`Y1 - Y0` before truncation, as a tangent vector at the gauges (whose bases may be augmented)."""
    moved = []
    for v in range(len(at.up)):
        tree = with_cores(at.net, at.centered(v).cores)
        moved.append(step.evolve(tree, v, t, h) - at.center[v])
    return gauge_fix(at, moved)


def parallel(step: Stepper, net: Network, t: float, h: float, *, safety: float = 10.0, retries: int = 3) -> Network:
    """Parallel BUG: every core evolves from the old bases; a step whose new bases see much of the field is repeated.

    `Y1 = round(Y0 + xi)` with the deltas C_v(t + h) - C_v. The block that is missing at a bond is O(h eta), eta the
    norm of F between the new directions of both sides; where `h eta > safety x budget` at some bond, the step starts
    again from Y0 in the augmented bases. Bonds at their cap are left alone. (The published scheme also repeats a step
    that discarded nothing; the error that this could hide is the block that eta measures.)

    References:
        G. Ceruti, J. Kusch, C. Lubich, A parallel rank-adaptive integrator for dynamical low-rank approximation, SIAM
        J. Sci. Comput. 2024; the same with D. Sulz for trees, arXiv 2412.00858.
    """
    at = gauges(net, step.root)
    for attempt in range(retries + 1):
        xi = _parallel(step, at, t, h)
        result = step.truncate(extend(xi), step.root, gauged=True)
        if attempt == retries or not _rejected(step, at, xi, result, t, h, safety):
            return result
        at = widen(xi)
    return result


def _rejected(
    step: Stepper, at: Gauges[Any], xi: Tangent[Any], result: Network, t: float, h: float, safety: float
) -> bool:
    budget = step.truncate.budget(result)
    if budget <= 0:
        return False
    sizes, new = result.sizes, widen(xi)
    for edge in at.edges:
        if step.truncate.capped(sizes[edge.bond]):
            continue
        v, axis = edge.child, at.axis(edge.child, edge.bond)
        old_u, old_v = at.up[v].shape[axis], at.center[v].shape[axis]
        basis = flatten(new.up[v], axis)
        if basis.shape[1] == old_u or new.center[v].shape[axis] == old_v:
            continue  # nothing new on one side
        tree = with_cores(new.net, new.centered(v).cores)
        seen = step.field.restrict(tree, v)(t, new.center[v])
        block = (basis.mH @ flatten(seen, axis))[old_u:, old_v:]
        if abs(h) * float(torch.linalg.vector_norm(block)) > safety * budget:
            return True
    return False


def widen(xi: Tangent[Any]) -> Gauges[Any]:
    """The same point with bases augmented on both sides of every bond by what xi adds there.

    U grows from the leaves up, V from the root down, by xi as every core sees it; coordinates of Y0 are padded with
    zeros, so that no basis depends on vanishing singular values.
    """
    field = FixedField(xi.to_network())

    def seen(tree: Network, v: int, start: Tensor) -> Tensor:
        return field.restrict(tree, v)(0.0, start)

    return _assemble(xi.at, augment(xi.at, seen), seen)


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
    for k, child in children(at, at.root):
        centers[at.root] = pad(centers[at.root], k, up[child].shape[at.axis(child, at.above[child].bond)])
    cores[at.root] = centers[at.root]
    for edge in at.edges:
        child, parent = edge.child, edge.parent
        axis, own = at.axis(parent, edge.bond), at.axis(child, edge.bond)
        old = given(at.down[child])
        target = [*centers[parent].shape]
        target[axis] = old.shape[axis]
        basis = flatten(_pad_like(old, centers[parent].new_empty(target)), axis)
        tree, k = list(cores), parent
        tree[k] = centers[k]
        while k != at.root:
            tree[at.above[k].parent], k = given(down[k]), at.above[k].parent
        found = directions(with_cores(at.net, tree), parent, centers[parent])
        found = found.narrow(axis, 0, at.up[child].shape[own])
        q = torch.cat([basis, complement(basis, flatten(found, axis))], 1)
        down[child] = unflatten(q, centers[parent].shape, axis)
        link = pad(pad(links[edge.bond], 0, up[child].shape[own]), 1, q.shape[1])
        links[edge.bond] = link
        centers[child] = along(cores[child], own, link.mT)
    return Gauges(with_cores(at.net, cores), at.root, at.edges, tuple(cores), tuple(down), tuple(centers), links)


def parallel2(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Second-order parallel BUG: the parallel step from bases augmented by the field at the old point.

    References:
        J. Kusch, Second-order robust parallel integrators for dynamical low-rank approximation, arXiv 2403.02834.
    """
    at = gauges(net, step.root)

    def seen(tree: Network, v: int, start: Tensor) -> Tensor:
        return step.field.restrict(tree, v)(t, start)

    xi = _parallel(step, _assemble(at, augment(at, seen), seen), t, h)
    return step.truncate(extend(xi), step.root, gauged=True)

"""Basis update and Galerkin: new bases from the leaves up, the root core last."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decompositions import Network
from decompositions.geometry import Gauges, gauges
from decompositions.geometry.blocks import along, flatten, unflatten
from decompositions.linalg import positive_qr
from tnlayers.integrators.steps import Stepper, bottom_up, children, complement, pad, with_cores, with_new_children


def bug(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Basis update and Galerkin at fixed ranks ("unconventional").

    References:
        G. Ceruti, C. Lubich, An unconventional robust integrator for dynamical low-rank approximation, BIT 2022.
    """
    at = gauges(net, step.root)
    new: dict[int, Tensor] = {}
    overlap: dict[int, Tensor] = {}  # M_v = U1_v^H U0_v
    for v in bottom_up(at):
        axis = at.axis(v, at.above[v].bond)
        start, old = at.center[v], at.up[v]
        for k, child in children(at, v):
            start, old = along(start, k, overlap[child]), along(old, k, overlap[child])
        k1 = step.evolve(with_new_children(at, new, v, start), v, t, h)
        q, _ = positive_qr(flatten(k1, axis))
        new[v] = unflatten(q, k1.shape, axis)
        overlap[v] = q.mH @ flatten(old, axis)
    start = at.center[at.root]
    for k, child in children(at, at.root):
        start = along(start, k, overlap[child])
    last = with_new_children(at, new, at.root, start)
    cores = [new.get(k, core) for k, core in enumerate(last.cores)]
    cores[at.root] = step.evolve(last, at.root, t, h)
    return with_cores(net, cores)


Directions = Callable[[Network, int, Tensor], Tensor]
"""(tree centered at a core with augmented bases below, the core, its start value) -> directions to add."""


def augment(at: Gauges[Any], directions: Directions) -> dict[int, Tensor]:
    """Bases `[U_v, new]` of every subtree, leaves first, U_v kept verbatim in the first columns."""
    new: dict[int, Tensor] = {}
    for v in bottom_up(at):
        axis = at.axis(v, at.above[v].bond)
        start, old = at.center[v], at.up[v]
        for k, child in children(at, v):
            width = new[child].shape[at.axis(child, at.above[child].bond)]
            start, old = pad(start, k, width), pad(old, k, width)
        found = directions(with_new_children(at, new, v, start), v, start)
        basis = flatten(old, axis)
        q = torch.cat([basis, complement(basis, flatten(found, axis))], 1)
        new[v] = unflatten(q, old.shape, axis)
    return new


def _in_bases(at: Gauges[Any], new: dict[int, Tensor], center: Tensor) -> Network:
    """The tree in augmented bases, its root core padded."""
    for k, child in children(at, at.root):
        center = pad(center, k, new[child].shape[at.axis(child, at.above[child].bond)])
    cores = [new.get(k, core) for k, core in enumerate(at.up)]
    cores[at.root] = center
    return with_cores(at.net, cores)


def _augmented(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Augmented BUG before truncation; its bases begin with the old ones."""
    at = gauges(net, step.root)
    new = augment(at, lambda tree, v, start: step.evolve(tree, v, t, h))
    last = _in_bases(at, new, at.center[at.root])
    cores = list(last.cores)
    cores[at.root] = step.evolve(last, at.root, t, h)
    return with_cores(net, cores)


def augmented(step: Stepper, net: Network, t: float, h: float) -> Network:
    """Rank-adaptive augmented BUG: the Galerkin step in old and new bases together, then truncation.

    References:
        G. Ceruti, J. Kusch, C. Lubich, A rank-adaptive robust integrator for dynamical low-rank approximation, BIT
        2022; G. Ceruti, C. Lubich, D. Sulz, Rank-adaptive time integration of tree tensor networks, SIAM J. Numer.
        Anal. 2023.
    """
    return step.truncate(_augmented(step, net, t, h), step.root, gauged=True)


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
    at = gauges(with_cores(net, cores), step.root)
    at = _with_up(at, half, cores[step.root])
    new = augment(at, lambda tree, v, start: step.field.restrict(tree, v)(t + h / 2, start))
    last = _in_bases(at, new, middle.cores[step.root])
    done = list(last.cores)
    done[step.root] = step.evolve(last, step.root, t, h)
    return step.truncate(with_cores(net, done), step.root, gauged=True)


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
    net = with_cores(at.net, cores)
    return Gauges(net, at.root, at.edges, tuple(cores), tuple(down), tuple(centers), links)


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

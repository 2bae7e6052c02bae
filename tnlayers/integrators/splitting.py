"""Projector splitting: every core forward, every bond backward, in the order of a walk over the tree."""

from collections.abc import Sequence

from torch import Tensor

from decompositions import Network, orthogonalize
from decompositions.formats.network import TreeEdge
from decompositions.geometry.blocks import along, flatten, unflatten
from decompositions.linalg import positive_qr
from tnlayers.integrators.steps import Stepper, with_cores


class _Walk:
    """A tree with its center on the move."""

    def __init__(self, step: Stepper, net: Network) -> None:
        self.step, self.net, self.center = step, orthogonalize(net, step.root), step.root
        above = {edge.child: edge for edge in step.edges(net)}
        self.above = above

    def _set(self, changed: dict[int, Tensor]) -> None:
        cores = [changed.get(k, core) for k, core in enumerate(self.net.cores)]
        self.net = with_cores(self.net, cores)

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
    bonds = sum(edge.parent == root for edge in edges)
    if bonds <= 2 and order and not set(net.legs[root]) & set(net.outside):
        return order[:-1]  # the root is a matrix that stands for its last bond: backward and forward cancel
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

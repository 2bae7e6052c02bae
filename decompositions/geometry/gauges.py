"""All orthogonal gauges of a tree at once: one sweep of QR up, one down."""

from dataclasses import dataclass
from operator import index
from typing import Generic, TypeVar

from torch import Tensor

from decompositions.formats.gauge import require_tree
from decompositions.formats.network import Network, TreeEdge, tree_edges
from decompositions.geometry.blocks import along, flatten, unflatten
from decompositions.linalg import full_precision, positive_qr
from decompositions.lockstep import Job, alone

N = TypeVar("N", bound=Network)


@dataclass(frozen=True, eq=False, repr=False)
class Gauges(Generic[N]):
    """A tree with the bases on both sides of every bond.

    `W` unfolded at a bond is `U_e S_e V_e^T`: U_e the dense basis of the side away from the root, made of the cores
    `up`; V_e that of the side with the root; both have orthonormal columns (also in the complex case, where nothing is
    conjugated in the product).

    Args:
        net: the network with core v replaced by `up[v]` (and the root by `center[root]`).
        root: the core that everything hangs from.
        edges: bonds from the root down, parents before children.
        up: core v as an isometry toward its parent; at the root its center core.
        down: the parent of v as an isometry toward v; None at the root.
        center: core v when it is the center: its bond to the parent is in the basis V_e, the others in U_e.
        links: S_e of every bond.
    """

    net: N
    root: int
    edges: tuple[TreeEdge, ...]
    up: tuple[Tensor, ...]
    down: tuple[Tensor | None, ...]
    center: tuple[Tensor, ...]
    links: dict[str, Tensor]

    def axis(self, core: int, bond: str) -> int:
        """Axis of a core that carries a bond."""
        return self.net.legs[core].index(bond)

    @property
    def above(self) -> dict[int, TreeEdge]:
        """The edge above every core but the root."""
        return {edge.child: edge for edge in self.edges}

    @property
    def below(self) -> dict[int, list[TreeEdge]]:
        """The edges below every core."""
        found: dict[int, list[TreeEdge]] = {k: [] for k in range(len(self.net.cores))}
        for edge in self.edges:
            found[edge.parent].append(edge)
        return found

    def centered(self, core: int) -> N:
        """The same tensor with its center at a core: every other core is an isometry toward it."""
        cores, above = list(self.up), self.above
        cores[core] = self.center[core]
        while core != self.root:
            cores[above[core].parent], core = _given(self.down[core]), above[core].parent
        return self.net.replace(cores)

    def __repr__(self) -> str:
        return f"Gauges({self.net!r}, root={self.root})"


def _given(core: Tensor | None) -> Tensor:
    assert core is not None
    return core


@full_precision
def gauges(net: N, root: int = 0, *, gauged: bool = False) -> Gauges[N]:
    """Orthonormalize a tree toward its root and away from it: every basis, center and link in two sweeps.

    Bonds larger than a side allows shrink to what it allows; U_e and V_e may then have different sizes. Derivatives
    (`requires_grad`) go through the QRs.
    Cost: two QRs a bond, O(sum_v n_v r^(deg + 1)).

    Args:
        net: a tree.
        root: index of the core to hang it from.
        gauged: whether all other cores are known to be isometries toward it: half of the QRs are not needed then.

    Raises:
        TypeError: no network, or a root that is not an int.
        ValueError: not a tree, or no such core.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> from decompositions.geometry import gauges
        >>> g = gauges(TT.random(row_modes=(4, 4, 4), rank=2))
        >>> s = torch.linalg.svdvals(g.links["b0"])
        >>> bool(torch.allclose(s.norm(), g.center[0].norm()))
        True
    """
    return alone(gauging(net, root, gauged=gauged))


def gauging(net: N, root: int = 0, *, gauged: bool = False) -> Job[Gauges[N]]:
    """`gauges` as a job, for many networks in lockstep."""
    if not isinstance(net, Network):
        raise TypeError(f"gauges: the point must be a Network, got {type(net).__name__}")
    try:
        root = index(root)
    except TypeError:
        raise TypeError(f"gauges: root must be an int, the number of a core, got {root!r}") from None
    require_tree("gauges", net)
    if not -len(net.cores) <= root < len(net.cores):
        raise ValueError(f"gauges: root must name one of the {len(net.cores)} cores, got {root}")
    root %= len(net.cores)
    legs, edges = net.legs, tree_edges(net.legs, net.rows, net.cols, root)
    up: list[Tensor] = list(net.cores)
    for edge in () if gauged else reversed(edges):
        axis = legs[edge.child].index(edge.bond)
        q, r = yield positive_qr, flatten(up[edge.child], axis)
        up[edge.child] = unflatten(q, up[edge.child].shape, axis)
        up[edge.parent] = along(up[edge.parent], legs[edge.parent].index(edge.bond), r)
    center = list(up)
    down: list[Tensor | None] = [None] * len(up)
    links = {}
    for edge in edges:
        axis = legs[edge.parent].index(edge.bond)
        q, r = yield positive_qr, flatten(center[edge.parent], axis)
        down[edge.child] = unflatten(q, center[edge.parent].shape, axis)
        center[edge.child] = along(up[edge.child], legs[edge.child].index(edge.bond), r)
        links[edge.bond] = r.mT
    return Gauges(net.replace(up), root, edges, tuple(up), tuple(down), tuple(center), links)


def gauges_of(point: N | Gauges[N]) -> Gauges[N]:
    """The gauges of a point that is given as a network or by its gauges."""
    return point if isinstance(point, Gauges) else gauges(point)

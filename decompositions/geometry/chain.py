"""Center-gauge gradients by the two-gauge chain: forward toward one end of a path, backward toward the other.

Where x meets the cores of W one after another along a path v_1 .. v_n of the tree, the forward contracts x with the
isometries toward v_n and with the center C_n last; the backward contracts the gradient of y with the isometries toward
v_1 in place of the forward's cores, and with the center C_1 last. Every product "saved operand x incoming
gradient" is then the gradient E_v of the core as the center, and what comes out at the end is the gradient of x: as
many products as autograd needs for the plain factored layer, no inverse, and no core of doubled ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Generic, TypeVar

from torch import Tensor

from decompositions.formats.contract import contract
from decompositions.formats.network import Labels, Network, TreeEdge, tree_edges
from decompositions.geometry.gauges import Gauges
from decompositions.geometry.tangent import center_gradients
from decompositions.linalg import full_precision

N = TypeVar("N", bound=Network)

BATCH = "the batch"
"""The label of x's first axis; formats use short names."""


def longest_path(net: Network) -> tuple[int, ...]:
    """A path of cores from one end of a tree to another, as long as there is one.

    Example:
        >>> from decompositions import TT, Tucker
        >>> longest_path(TT.random(row_modes=(2, 3, 4), rank=1))
        (0, 1, 2)
        >>> len(longest_path(Tucker.random(row_modes=(2, 3, 4), rank=1)))
        3
    """

    def farthest(root: int) -> tuple[int, ...]:
        trail: dict[int, tuple[int, ...]] = {root: (root,)}
        for edge in tree_edges(net.legs, net.rows, net.cols, root):
            trail[edge.child] = (*trail[edge.parent], edge.child)
        return max(trail.values(), key=len)

    return farthest(farthest(0)[-1])[::-1]


def _equation(left: Labels, right: Labels, result: Labels) -> str:
    letters = {label: chr(ord("a") + k) for k, label in enumerate(dict.fromkeys((*left, *right)))}

    def spell(leg: Labels) -> str:
        return "".join(letters[label] for label in leg)

    return f"{spell(left)},{spell(right)}->{spell(result)}"


def _meet(left: Labels, right: Labels) -> Labels:
    """Labels of a contraction: those that only one of the two has."""
    return (*(a for a in left if a not in right), *(b for b in right if b not in left))


@dataclass(frozen=True, eq=False)
class Chain(Generic[N]):
    """The two-gauge chain of a matrix W (rows x columns): `y = x W^T` and the gradients of all centers.

    Side branches of the tree are contracted into the cores of the path before x comes; the gradient of such a core is
    small and dense, and is projected onto its branches.

    Args:
        at: gauges whose root is a core of the path, with square links (`round` removes what is redundant).
        path: cores from neighbour to neighbour, without repetition.

    Raises:
        ValueError: a path that is none, or that does not pass the root; links that are not square.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> from decompositions.geometry import Chain, gauges, center_gradients
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64)
        >>> x, gy = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
        >>> chain = Chain(gauges(net, root=0), path=(2, 1, 0))
        >>> y, kept = chain.forward(x)
        >>> gx, found = chain.backward(kept, gy)
        >>> bool(torch.allclose(y, x @ to_dense(net).T)), bool(torch.allclose(gx, gy @ to_dense(net)))
        (True, True)
        >>> dense = center_gradients(chain.at, gy.T @ x)
        >>> all(torch.allclose(a, b) for a, b in zip(found, dense))
        True
    """

    at: Gauges[N]
    path: tuple[int, ...]

    def __post_init__(self) -> None:
        at, path = self.at, tuple(self.path)
        object.__setattr__(self, "path", path)
        bonds = {frozenset((edge.parent, edge.child)) for edge in at.edges}
        joined = all(frozenset(pair) in bonds for pair in pairwise(path)) and len(set(path)) == len(path)
        if not joined or at.root not in path:
            raise ValueError(
                f"Chain: path must run over neighbouring cores and pass the root {at.root} of the gauges, got {path}; "
                "gauges(net, root=path[-1]) hangs the tree from its end"
            )
        crooked = {bond: tuple(s.shape) for bond, s in at.links.items() if s.shape[0] != s.shape[1]}
        if crooked:
            raise ValueError(
                f"Chain: every bond must be no larger than its two sides allow, got links {crooked}; "
                "round(net) removes what is redundant"
            )

    @cached_property
    def branches(self) -> dict[int, tuple[TreeEdge, ...]]:
        """For every core of the path the edges that hang below it beside the path, parents before children."""
        owner = {core: core for core in self.path}
        found: dict[int, list[TreeEdge]] = {core: [] for core in self.path}
        for edge in self.at.edges:
            if edge.child not in owner:
                owner[edge.child] = owner[edge.parent]
                found[owner[edge.child]].append(edge)
        return {core: tuple(edges) for core, edges in found.items()}

    def _folded(self, core: int, value: Tensor) -> tuple[Tensor, Labels]:
        """A core of the path with its branches contracted into it."""
        net, labels = self.at.net, self.at.net.legs[core]
        for edge in self.branches[core]:
            leg = net.legs[edge.child]
            result = _meet(labels, leg)
            value = contract(_equation(labels, leg, result), value, self.at.up[edge.child])
            labels = result
        return value, labels

    def _toward(self, core: int, neighbour: int) -> Tensor:
        """A core as an isometry toward a neighbour."""
        edge = self.at.above.get(core)
        if edge is not None and edge.parent == neighbour:
            return self.at.up[core]
        down = self.at.down[neighbour]
        assert down is not None
        return down

    @cached_property
    def forward_cores(self) -> tuple[tuple[Tensor, Labels], ...]:
        """Isometries toward the last core of the path, and the center there."""
        *before, last = self.path
        cores = [self._toward(v, after) for v, after in zip(before, self.path[1:], strict=True)]
        return tuple(self._folded(v, core) for v, core in zip(self.path, [*cores, self.at.center[last]], strict=True))

    @cached_property
    def backward_cores(self) -> tuple[tuple[Tensor, Labels], ...]:
        """The center at the first core of the path, then isometries toward it."""
        first, *after = self.path
        cores = [self._toward(v, before) for v, before in zip(after, self.path[:-1], strict=True)]
        return tuple(self._folded(v, core) for v, core in zip(self.path, [self.at.center[first], *cores], strict=True))

    @full_precision
    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Labels]]]:
        """`y = x W^T` for x (batch, columns), and what `backward` needs: the operand of every product."""
        net = self.at.net
        width = prod(net.col_modes)
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"Chain: x must be (batch, {width}), got {tuple(x.shape)}")
        value, labels = x.reshape(x.shape[0], *net.col_modes), (BATCH, *net.cols)
        kept = []
        for k, (core, leg) in enumerate(self.forward_cores):
            kept.append((value, labels))
            result = (BATCH, *net.rows) if k == len(self.path) - 1 else _meet(labels, leg)
            value, labels = contract(_equation(labels, leg, result), value, core), result
        return value.reshape(x.shape[0], prod(net.row_modes)), kept

    @full_precision
    def backward(self, kept: Sequence[tuple[Tensor, Labels]], gy: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of x (batch, columns) and of every core as the center, from that of y (batch, rows)."""
        net = self.at.net
        batch, height = kept[0][0].shape[0], prod(net.row_modes)
        if tuple(gy.shape) != (batch, height):
            raise ValueError(f"Chain: gy must be {(batch, height)}, got {tuple(gy.shape)}")
        value, labels = gy.reshape(batch, *net.row_modes), (BATCH, *net.rows)
        found: dict[int, Tensor] = {}
        for k in reversed(range(len(self.path))):
            saved, leg = kept[k]
            own = self.forward_cores[k][1]
            found.update(self._unfold(self.path[k], contract(_equation(labels, leg, own), value, saved.conj()), own))
            core, own = self.backward_cores[k]
            value, labels = contract(_equation(labels, own, leg), value, core.conj()), leg
        return value.reshape(batch, prod(net.col_modes)), [found[v] for v in range(len(found))]

    def _unfold(self, core: int, gradient: Tensor, labels: Labels) -> dict[int, Tensor]:
        """The dense gradient of a folded core, projected onto the core and its branches."""
        edges = self.branches[core]
        at, net = self.at, self.at.net
        if not edges:
            return {core: gradient.permute([labels.index(label) for label in net.legs[core]])}
        members = [core, *(edge.child for edge in edges)]
        place = {v: k for k, v in enumerate(members)}
        legs = tuple(net.legs[v] for v in members)
        up = [at.center[core], *(at.up[edge.child] for edge in edges)]
        small = Gauges(
            Network._unchecked(up, legs, labels, ()),
            0,
            tuple(TreeEdge(place[edge.parent], place[edge.child], edge.bond) for edge in edges),
            tuple(up),
            (None, *(at.down[edge.child] for edge in edges)),
            tuple(at.center[v] for v in members),
            {edge.bond: at.links[edge.bond] for edge in edges},
        )
        return dict(zip(members, center_gradients(small, gradient), strict=True))

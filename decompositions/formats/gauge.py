"""Gauges of tree networks: orthogonalization, rounding and the singular values of every bond, from one piece of code.

The algorithms see labels and bonds only; LowRank, Tucker, TT, TT-matrix and any other tree run through the same lines.
"""

from collections.abc import Mapping, Sequence
from math import isfinite, prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from decompositions.formats.network import Network, TreeEdge, bond_sides, tree_edges
from decompositions.linalg import (
    accumulate_dtype,
    check_ranks,
    check_tol,
    direct_sum,
    full_precision,
    is_tight,
    positive_qr,
    safe_svd,
    truncation_rank,
    usable_tol,
    warn_truncation,
    work_dtype,
)

N = TypeVar("N", bound=Network)


@full_precision
def orthogonalize(net: N, center: int = 0) -> N:
    """Make every core but `center` an isometry toward it, without changing the represented tensor.

    Afterwards `‖W‖ = ‖cores[center]‖`. Bonds larger than a side allows shrink to what it allows.
    Cost: one QR a bond, O(sum_v n_v r^(deg + 1)); half precision is factored in float32.

    Args:
        net: a tree.
        center: index of the core that collects the norm.

    Raises:
        ValueError: not a tree, or no such core.

    References:
        L. Grasedyck, Hierarchical singular value decomposition of tensors, SIAM J. Matrix Anal. Appl. 2010.

    Example:
        >>> import torch
        >>> from decompositions import TT, orthogonalize
        >>> first = orthogonalize(TT.random(row_modes=(4, 4, 4), rank=2), center=2).cores[0]
        >>> bool(torch.allclose(first.T @ first, torch.eye(2), atol=1e-6))
        True
    """
    cores = _Cores("orthogonalize", net, center, accumulate_dtype(net.dtype))
    cores.sweep_up()
    return net.replace(cores.cast(net.dtype))


@full_precision
def bond_singular_values(net: Network) -> dict[str, Tensor]:
    """Singular values of the unfolding at every bond of a tree, in descending order.

    Cost: two sweeps of QR and SVD of cores; nothing is densified.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, bond_singular_values
        >>> net = LowRank(torch.eye(3, 2), torch.diag(torch.tensor([3.0, 2.0])), torch.eye(4, 2))
        >>> [s.tolist() for s in bond_singular_values(net).values()]
        [[3.0, 2.0], [3.0, 2.0]]
    """
    cores = _Cores("bond_singular_values", net, 0, accumulate_dtype(net.dtype))
    cores.sweep_up()
    cores.norm("bond_singular_values")
    spectra = cores.sweep_down(None, None)[0]
    return {bond: spectra[bond] for bond in net.bonds}


def possible_ranks(net: Network) -> tuple[int, ...]:
    """Largest useful size of every bond: the smaller of the dense sizes of its two sides.

    Example:
        >>> from decompositions import TT, possible_ranks
        >>> possible_ranks(TT.random(row_modes=(2, 3, 4), rank=1))
        (2, 4)
    """
    sizes = net.sizes
    return tuple(min(prod(sizes[label] for label in side) for side in bond_sides(net, bond)) for bond in net.bonds)


@full_precision
def round(
    net: N, rank: int | Sequence[int] | Mapping[str, int] | None = None, tol: float | None = None, *, center: int = 0
) -> N:
    """Cut the bonds of a tree to the ranks that a tolerance, or a cap, asks for.

    The squared errors of the cuts add up exactly, so `‖W - round(W)‖ <= tol ‖W‖`; with `rank` alone the result is
    within sqrt(#bonds) of the best of those ranks. With both the smaller rank wins, and if it binds a
    TruncationWarning states the error. With neither, only what is redundant (bonds larger than a side) is removed.
    Tolerances below 1e-4 run in double precision.
    Cost: one QR up, one QR down and one SVD a bond, O(sum_v n_v r^(deg + 1)).

    Args:
        net: a tree.
        rank: cap for every bond, or one entry a bond in the order of `net.bonds`, or a mapping from bond labels.
        tol: relative Frobenius error of the whole tensor.
        center: core that is the center afterwards; the others are isometries toward it.

    Raises:
        ValueError: not a tree, a rank that is not positive, a tolerance that is not a number >= 0.

    References:
        I. Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 2011, algorithm 2; for trees L. Grasedyck 2010.

    Example:
        >>> from decompositions import TT, add, round
        >>> net = TT.random(row_modes=(4, 4, 4), rank=2)
        >>> round(add(net, net), tol=1e-5).ranks
        (2, 2)
    """
    check_tol("round", tol)
    cores = _Cores("round", net, center, work_dtype(net.dtype, tol))
    caps = dict(zip(net.bonds, _caps(net, rank), strict=True))
    cores.sweep_up()
    total = cores.norm("round")
    threshold = None if tol is None else usable_tol(tol, net.dtype, len(cores.edges)) * total
    _, discarded, bound = cores.sweep_down(caps if rank is not None else None, threshold)
    result = net.replace(cores.cast(net.dtype))
    if tol is None or total == 0:
        return result
    measured = is_tight(tol, net.dtype, len(cores.edges))
    error = (_distance(net, result) if measured else sqrt(discarded)) / total
    if error > tol:
        warn_truncation("round", error, tol, f"rank={rank} binds" if bound else f"{net.dtype} resolves no less")
    return result


def _distance(a: Network, b: Network) -> float:
    """`‖A - B‖` of two trees with the same labels, in double precision: the center of their difference."""
    outside = set(a.outside)
    double = torch.promote_types(a.dtype, torch.float64)
    cores = []
    for k, (first, second, leg) in enumerate(zip(a.cores, b.cores, a.legs, strict=True)):
        bonds = [axis for axis, label in enumerate(leg) if label not in outside]
        first, second = first.detach().to(double), second.detach().to(double)
        cores.append(direct_sum(first, -second if k == 0 else second, bonds) if bonds else first - second)
    difference = _Cores("round", a.replace(cores), 0, double)
    difference.sweep_up()
    return difference.norm("round")


def _caps(net: Network, rank: int | Sequence[int] | Mapping[str, int] | None) -> list[int]:
    largest = max(net.ranks, default=1)  # a cap above the present rank is no error: nothing to cut
    if isinstance(rank, Mapping):
        unknown = set(rank) - set(net.bonds)
        if unknown:
            raise ValueError(
                f"round: rank names bonds of the network, expected some of {net.bonds}, got {sorted(unknown)}"
            )
        rank = [rank.get(bond, size) for bond, size in zip(net.bonds, net.ranks, strict=True)]
    if isinstance(rank, Sequence):
        rank = [min(r, largest) if isinstance(r, int) else r for r in rank]
    return check_ranks("round", rank, [largest] * len(net.bonds))


class _Cores:
    """Mutable cores of a rooted tree during a sweep: each core and the axis of each of its labels."""

    def __init__(self, name: str, net: Network, center: int, dtype: torch.dtype) -> None:
        if not net.is_tree:
            raise ValueError(
                f"{name}: the network must be a tree (every bond joins two cores, no cycle), got {net.equation}; "
                "hyper-edges and rings have no orthogonal gauge"
            )
        if not -len(net.cores) <= center < len(net.cores):
            raise ValueError(f"{name}: center must name one of the {len(net.cores)} cores, got {center}")
        self.center = center % len(net.cores)
        self.legs = net.legs
        self.edges = tree_edges(net.legs, net.rows, net.cols, self.center)
        self.values = [core.to(dtype) for core in net.cores]

    def cast(self, dtype: torch.dtype) -> list[Tensor]:
        return [core.to(dtype) for core in self.values]

    def matrix(self, k: int, bond: str) -> tuple[Tensor, int, torch.Size]:
        """Core k unfolded as (other legs) x bond; with the axis and the shape that `fold` needs."""
        axis = self.legs[k].index(bond)
        moved = self.values[k].movedim(axis, -1)
        return moved.reshape(-1, moved.shape[-1]), axis, moved.shape[:-1]

    def set_matrix(self, k: int, matrix: Tensor, axis: int, others: torch.Size) -> None:
        self.values[k] = matrix.reshape(*others, matrix.shape[-1]).movedim(-1, axis)

    def absorb(self, k: int, bond: str, factor: Tensor) -> None:
        """Multiply core k along a bond: the bond's new index is the first of `factor`."""
        axis = self.legs[k].index(bond)
        self.values[k] = torch.tensordot(self.values[k], factor, dims=([axis], [1])).movedim(-1, axis)

    def move(self, source: int, target: int, bond: str) -> None:
        """Make `source` an isometry toward `target`, which takes the rest."""
        matrix, axis, others = self.matrix(source, bond)
        q, r = positive_qr(matrix)
        self.set_matrix(source, q, axis, others)
        self.absorb(target, bond, r)

    def sweep_up(self) -> None:
        """Children before parents: every core becomes an isometry toward the center."""
        for edge in reversed(self.edges):
            self.move(edge.child, edge.parent, edge.bond)

    def norm(self, name: str) -> float:
        """Norm of the center after a sweep up, refused where it is not finite."""
        center = self.values[self.center].detach()
        value = float(torch.linalg.vector_norm(center, dtype=torch.promote_types(center.dtype, torch.float64)))
        if not isfinite(value):
            raise ValueError(f"{name}: the network must have a finite norm, got {value}; look for NaN, inf or overflow")
        return value

    def sweep_down(self, caps: dict[str, int] | None, threshold: float | None) -> tuple[dict[str, Tensor], float, bool]:
        """Depth first from the center: go down by QR, come back by SVD and cut each bond on the way.

        A bond is cut when its whole subtree is done, so that all later cuts are on the other side of it; only then do
        the squared errors add up. (Cutting on the way down, later cuts fall on both sides of a bond where the tree
        branches, and the cross terms do not vanish.)

        Returns the singular values before each cut, the discarded squared norm, and whether a cap cut more than the
        tolerance would have. What a cut leaves of its share of the budget goes to the later cuts.
        """
        spectra: dict[str, Tensor] = {}
        discarded, bound, left = 0.0, False, len(self.edges)
        budget = None if threshold is None else threshold**2

        def come_back(edge: TreeEdge) -> None:
            nonlocal discarded, bound, left
            matrix, axis, others = self.matrix(edge.child, edge.bond)
            u, s, vh = safe_svd(matrix)
            spectra[edge.bond] = s
            squares = s.detach().double().square()
            keep = most = s.numel() if caps is None else min(s.numel(), caps[edge.bond])
            if budget is not None:
                free = truncation_rank(squares, max(0.0, budget - discarded) / left, s.numel())
                keep, bound = min(free, most), bound or most < free
            discarded += float(squares[keep:].sum())
            left -= 1
            self.set_matrix(edge.child, u[:, :keep], axis, others)
            self.absorb(edge.parent, edge.bond, s[:keep, None] * vh[:keep])

        trail: list[TreeEdge] = []
        for edge in self.edges:
            while trail and trail[-1].child != edge.parent:
                come_back(trail.pop())
            self.move(edge.parent, edge.child, edge.bond)
            trail.append(edge)
        while trail:
            come_back(trail.pop())
        return spectra, discarded, bound

"""Gauges of tree networks: orthogonalization, rounding and the singular values of every bond, from one piece of code.

The algorithms see labels and bonds only; LowRank, Tucker, TT, TT-matrix and any other tree run through the same lines.
"""

from collections.abc import Callable, Mapping, Sequence
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
from decompositions.lockstep import Job, alone, triangular_factor

N = TypeVar("N", bound=Network)

_HALF_PRICE = (torch.float32, torch.complex64)
"""Dtypes whose cuts may read a Gram matrix in the next wider one: its eigenvalues resolve all that they hold."""


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
    return alone(orthogonalizing(net, center))


def orthogonalizing(net: N, center: int = 0) -> Job[N]:
    """`orthogonalize` as a job, for many networks in lockstep."""
    cores = _Cores("orthogonalize", net, center, accumulate_dtype(net.dtype))
    yield from cores.sweep_up()
    return net.replace(cores.cast(net.dtype))


@full_precision
def bond_singular_values(net: Network) -> dict[str, Tensor]:
    """Singular values of the unfolding at every bond of a tree, in descending order.

    Cost: a QR without Q and an SVD a bond; nothing is densified.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, bond_singular_values
        >>> net = LowRank(torch.eye(3, 2), torch.diag(torch.tensor([3.0, 2.0])), torch.eye(4, 2))
        >>> [s.tolist() for s in bond_singular_values(net).values()]
        [[3.0, 2.0], [3.0, 2.0]]
    """
    cores = _Cores("bond_singular_values", net, 0, accumulate_dtype(net.dtype))
    cuts = _Cuts(len(cores.edges))
    alone(cores.cut_all(cuts))
    return {bond: cuts.squares[bond].sqrt().to(net.cores[0].real.dtype) for bond in net.bonds}


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
    Cost: a QR without Q and an SVD a bond, O(sum_v n_v r^(deg + 1)), and a QR for bonds that the first path from the
    center to a leaf leaves out (none in a chain cut from its end). In single precision the SVD is that of a Gram
    matrix in double precision where its columns come out orthonormal, which is half the price.

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
    return cut_or_warn("round", net, rank, tol, center=center)


def cut_or_warn(
    name: str,
    net: N,
    rank: int | Sequence[int] | Mapping[str, int] | None,
    tol: float | None,
    *,
    center: int,
    gauged: bool = False,
) -> N:
    """`cut` with its inputs checked and a TruncationWarning where the tolerance was not reached."""
    check_tol(name, tol)
    result, error, bound = cut(net, rank, tol, center=center, gauged=gauged)
    if tol is not None and error > tol:
        warn_truncation(name, error, tol, f"rank={rank} binds" if bound else f"{net.dtype} resolves no less")
    return result


def cut(
    net: N,
    rank: int | Sequence[int] | Mapping[str, int] | None = None,
    tol: float | None = None,
    *,
    center: int = 0,
    gauged: bool = False,
) -> tuple[N, float, bool]:
    """`round` without its warning: the network, its relative error (0 without a tol), and whether `rank` was binding.

    A caller that knows all other cores to be isometries toward the center says so by `gauged`: they are not factored.
    """
    cores = _Cores("round", net, center, work_dtype(net.dtype, tol))
    caps = dict(zip(net.bonds, _caps(net, rank), strict=True))
    usable = None if tol is None else usable_tol(tol, net.dtype, len(cores.edges))
    cuts = _Cuts(len(cores.edges), caps if rank is not None else None, usable)
    alone(cores.cut_all(cuts, by_gram=True, gauged=gauged))
    result = net.replace(cores.cast(net.dtype))
    if tol is None or cuts.norm == 0:
        return result, 0.0, False
    measured = is_tight(tol, net.dtype, len(cores.edges))
    return result, (_distance(net, result) if measured else sqrt(cuts.discarded)) / cuts.norm, cuts.bound


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
    alone(difference.sweep_up())
    return difference.norm(difference.values[0])


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


def require_tree(name: str, net: Network) -> None:
    """Refuse networks that have no orthogonal gauge.

    Raises:
        ValueError: not a tree.
    """
    if not net.is_tree:
        raise ValueError(
            f"{name}: the network must be a tree (every bond joins two cores, no cycle), got {net.equation}; "
            "hyper-edges and rings have no orthogonal gauge"
        )


class _Cores:
    """Mutable cores of a rooted tree during a sweep: each core and the axis of each of its labels."""

    def __init__(self, name: str, net: Network, center: int, dtype: torch.dtype) -> None:
        require_tree(name, net)
        if not -len(net.cores) <= center < len(net.cores):
            raise ValueError(f"{name}: center must name one of the {len(net.cores)} cores, got {center}")
        self.name = name
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

    def absorb(self, k: int, bond: str, factor: Tensor) -> Tensor:
        """Core k multiplied along a bond: the bond's new index is the first of `factor`."""
        axis, core = self.legs[k].index(bond), self.values[k]
        if axis == core.ndim - 1:
            return torch.tensordot(core, factor, dims=([axis], [1]))
        return torch.tensordot(factor, core, dims=([1], [axis])).movedim(0, axis)

    def move(self, source: int, target: int, bond: str) -> Job[None]:
        """Make `source` an isometry toward `target`, which takes the rest."""
        matrix, axis, others = self.matrix(source, bond)
        q, r = yield positive_qr, matrix
        self.set_matrix(source, q, axis, others)
        self.values[target] = self.absorb(target, bond, r)

    def sweep_up(self, first: int = 0) -> Job[None]:
        """Children before parents: the child of every edge from `first` on becomes an isometry toward the center."""
        for edge in reversed(self.edges[first:]):
            yield from self.move(edge.child, edge.parent, edge.bond)

    def norm(self, center: Tensor) -> float:
        """Norm of the network from its center, refused where it is not finite."""
        center = center.detach()
        value = float(torch.linalg.vector_norm(center, dtype=torch.promote_types(center.dtype, torch.float64)))
        if not isfinite(value):
            raise ValueError(
                f"{self.name}: the network must have a finite norm, got {value}; look for NaN, inf or overflow"
            )
        return value

    def cut_all(self, cuts: "_Cuts", *, by_gram: bool = False, gauged: bool = False) -> Job[None]:
        """Depth first from the center: go down by QR, come back by SVD and cut each bond on the way.

        A bond is cut when its whole subtree is done, so that all later cuts are on the other side of it; only then do
        the squared errors add up. (Cutting on the way down, later cuts fall on both sides of a bond where the tree
        branches, and the cross terms do not vanish.)

        On the way down only the triangle R of everything above a bond is needed: R times the child is the center, and
        the child's new core is an isometry U into the center's columns. The parent then takes U^H times the child,
        which no Q was ever split off. So the path to the first leaf needs no sweep before: only what hangs beside it.
        Where the tree is `gauged`, nothing needs one, and R alone has the singular values of a bond above a leaf.
        """
        edges = self.edges
        path = next((k for k in range(1, len(edges)) if edges[k].parent != edges[k - 1].child), len(edges))
        if not gauged:
            yield from self.sweep_up(path)
        inner = {edge.parent for edge in edges}
        if not edges:
            cuts.norm = self.norm(self.values[self.center])
        above: dict[int, Tensor] = {}  # of the cores on the trail: R of all that lies above
        trail: list[TreeEdge] = []

        def come_back() -> Job[None]:
            edge = trail.pop()
            axis = self.legs[edge.child].index(edge.bond)
            moved = self.values[edge.child].movedim(axis, 0)
            child = moved.reshape(moved.shape[0], -1)
            leaf = gauged and edge.child not in inner
            center = above.pop(edge.child) if leaf else above.pop(edge.child) @ child
            if cuts.left == len(edges):
                cuts.norm = self.norm(center)
            u = yield from self._isometry(center, edge.bond, cuts, by_gram)
            if leaf:
                self.values[edge.child] = (u @ child).reshape(-1, *moved.shape[1:]).movedim(0, axis)
                self.values[edge.parent] = self.absorb(edge.parent, edge.bond, u.conj())
                return
            self.values[edge.child] = u.reshape(-1, *moved.shape[1:]).movedim(0, axis)
            self.values[edge.parent] = self.absorb(edge.parent, edge.bond, u.conj() @ child.mT)

        for edge in edges:
            while trail and trail[-1].child != edge.parent:
                yield from come_back()
            core = self.absorb(edge.parent, trail[-1].bond, above[edge.parent]) if trail else self.values[edge.parent]
            center = core.movedim(self.legs[edge.parent].index(edge.bond), -1)
            center = center.reshape(-1, center.shape[-1])
            # the derivative of a QR needs its Q
            *_, above[edge.child] = yield torch.linalg.qr if center.requires_grad else triangular_factor, center
            trail.append(edge)
        while trail:
            yield from come_back()

    def _isometry(self, center: Tensor, bond: str, cuts: "_Cuts", by_gram: bool) -> Job[Tensor]:
        """Rows u (kept, others), orthonormal, with `center ≈ (center u^H) u`, as many as the cut keeps."""
        if by_gram and center.dtype in _HALF_PRICE and not center.requires_grad:
            double = center.to(torch.promote_types(center.dtype, torch.float64))
            wide = double.shape[0] <= double.shape[1]
            values, vectors = yield torch.linalg.eigh, double @ double.mH if wide else double.mH @ double
            squares, rows = values.flip(0).clamp_min(0), vectors.flip(1).mH
            keep = cuts.choose(bond, squares)
            if not wide:
                return rows[: cuts.take(bond, squares, keep)].to(center.dtype)
            if float(squares[keep - 1]) > 1e-8 * float(squares[0]):  # the divisor is well above its error, 1e-16
                cuts.take(bond, squares, keep)
                return ((rows[:keep] @ double) / squares[:keep, None].sqrt()).to(center.dtype)
        _, s, rows = yield safe_svd, center
        squares = s.detach().double().square()
        return rows[: cuts.take(bond, squares, cuts.choose(bond, squares))]


class _Cuts:
    """What the cuts of a rounding found and what they may still discard; a cut's unspent share goes to the later."""

    def __init__(self, count: int, caps: Mapping[str, int] | None = None, tol: float | None = None) -> None:
        self.left = count
        self.caps, self.tol = caps, tol
        self.squares: dict[str, Tensor] = {}  # squared singular values before each cut
        self.norm, self.discarded, self.bound = 0.0, 0.0, False

    def _free(self, squares: Tensor) -> int:
        """Columns that the budget alone asks for."""
        if self.tol is None:
            return len(squares)
        budget = (self.tol * self.norm) ** 2
        return truncation_rank(squares, max(0.0, budget - self.discarded) / self.left, len(squares))

    def choose(self, bond: str, squares: Tensor) -> int:
        """How many columns to keep at a bond."""
        free = self._free(squares)
        return free if self.caps is None else min(free, self.caps[bond])

    def take(self, bond: str, squares: Tensor, keep: int) -> int:
        """Book a cut to `keep` columns; `bound` where that is less than the budget asks for."""
        self.bound = self.bound or (self.tol is not None and keep < self._free(squares))
        self.squares[bond] = squares
        self.discarded += float(squares[keep:].sum())
        self.left -= 1
        return keep


class _ChosenCuts(_Cuts):
    """Cuts that somebody else decides."""

    def __init__(self, count: int, chooser: Callable[[str, Tensor, float], int]) -> None:
        super().__init__(count)
        self._chooser = chooser

    def choose(self, bond: str, squares: Tensor) -> int:
        """As many as asked for, from one to all."""
        return max(1, min(self._chooser(bond, squares, self.norm), len(squares)))


@full_precision
def cut_by(
    net: N, choose: Callable[[str, Tensor, float], int], *, center: int = 0, gauged: bool = False
) -> tuple[N, float]:
    """Round a tree to the ranks that `choose(bond, squared singular values, norm)` returns, bond by bond.

    The values are those of the bond after all bonds of its subtree were cut, in descending order; the squared errors of
    the cuts add up.

    Args:
        net: a tree.
        choose: is asked once for every bond.
        center: core that is the center afterwards; the others are isometries toward it.
        gauged: whether all cores but the center are known to be isometries toward it already.

    Returns:
        The network, and its absolute error.

    Example:
        >>> from decompositions import TT
        >>> net, error = cut_by(TT.random(row_modes=(4, 4, 4), rank=3), lambda bond, squares, norm: 2)
        >>> net.ranks, error > 0
        ((2, 2), True)
    """
    return alone(cutting(net, choose, center=center, gauged=gauged))


def cutting(
    net: N, choose: Callable[[str, Tensor, float], int], *, center: int = 0, gauged: bool = False
) -> Job[tuple[N, float]]:
    """`cut_by` as a job, for many networks in lockstep."""
    cores = _Cores("round", net, center, accumulate_dtype(net.dtype))
    cuts = _ChosenCuts(len(cores.edges), choose)
    yield from cores.cut_all(cuts, by_gram=True, gauged=gauged)
    return net.replace(cores.cast(net.dtype)), sqrt(cuts.discarded)

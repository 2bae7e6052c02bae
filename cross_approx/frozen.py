"""Nested index sets on both sides of every bond: a cross that stays put while the tensor changes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from cross_approx.maxvol import dominant_rows
from decompositions.formats.gauge import cut
from decompositions.formats.network import Network
from decompositions.formats.tt import TT

TAU = 0.01
"""Slack of the dominant submatrices: no coefficient is larger than 1 + TAU."""


@dataclass(frozen=True, eq=False)
class FrozenCross:
    """The entries at (pivots before a mode) x (the mode) x (pivots after it), for every mode.

    Every pivot before mode k + 1 is one before mode k with an index of mode k behind it; every pivot after mode k - 1
    is an index of mode k before one after it. There are equally many on both sides of a bond.

    Args:
        shape: mode sizes.
        before: for each mode, (r, k) leading indices; the first is (1, 0).
        after: for each mode, (s, d - 1 - k) trailing indices; the last is (1, 0).

    Example:
        >>> import torch
        >>> none = torch.zeros(1, 0, dtype=torch.long)
        >>> cross = FrozenCross((3, 2), (none, torch.tensor([[2]])), (torch.tensor([[1]]), none))
        >>> cross.numel, [index.tolist() for index in cross.batches(4)]
        (5, [[[0, 1], [1, 1], [2, 1], [2, 0]], [[2, 1]]])
    """

    shape: tuple[int, ...]
    before: tuple[Int[Tensor, "r k"], ...]
    after: tuple[Int[Tensor, "s m"], ...]

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Sizes (r, n, s) of the fibers of every mode."""
        return [(len(b), n, len(a)) for b, n, a in zip(self.before, self.shape, self.after, strict=True)]

    @property
    def numel(self) -> int:
        """`sum_k r_{k-1} n_k r_k`: entries that the cross has, those in two blocks counted twice."""
        return sum(prod(block) for block in self.blocks)

    @property
    def pivots(self) -> tuple[Tensor, ...]:
        """The sets of bonds 1 ... d - 1: all leading ones, then all trailing ones."""
        return (*self.before[1:], *self.after[:-1])

    @classmethod
    def of_pivots(cls, name: str, pivots: Sequence[Tensor], shape: Sequence[int]) -> "FrozenCross":
        """From `pivots`, checked.

        Raises:
            ValueError: sets of other sizes, out of range or not nested.
        """
        shape, d = tuple(shape), len(shape)
        none = torch.zeros(1, 0, dtype=torch.long)
        if len(pivots) != 2 * (d - 1):
            raise ValueError(
                f"{name}: expected 2 (d - 1) = {2 * (d - 1)} pivot sets, got {len(pivots)}; take those of a result"
            )
        before = (none, *(p.cpu() for p in pivots[: d - 1]))
        after = (*(p.cpu() for p in pivots[d - 1 :]), none)
        for k in range(d - 1):
            left, right = before[k + 1], after[k]
            if left.ndim != 2 or left.shape[1] != k + 1 or right.shape != (len(left), d - 1 - k) or not len(left):
                raise ValueError(
                    f"{name}: bond {k} takes pivots (r, {k + 1}) and (r, {d - 1 - k}), "
                    f"got {tuple(left.shape)} and {tuple(right.shape)}"
                )
            both = torch.cat([left, right], 1)
            if both.is_floating_point() or bool(((both < 0) | (both >= torch.tensor(shape))).any()):
                raise ValueError(f"{name}: pivots of bond {k} must be integers within {shape}; they fit another tensor")
        cross = cls(shape, before, after)
        for k in range(d - 1):
            if bool((cross._prefixes(k) < 0).any()) or bool((_position(after[k][:, 1:], after[k + 1]) < 0).any()):
                raise ValueError(f"{name}: pivots must be nested, those of bond {k} are not; take those of a result")
        return cross

    def rows(self, k: int) -> Int[Tensor, "r"]:
        """Where the pivots of bond k + 1 are among (pivots before mode k) x mode k."""
        return self._prefixes(k) * self.shape[k] + self.before[k + 1][:, -1]

    def batches(self, size: int) -> Iterator[Int[Tensor, "B d"]]:
        """The multi-indices, block after block in C order, at most `size` at once."""
        parts, room = [], size
        for k, (_, n, s) in enumerate(self.blocks):
            at, total = 0, prod(self.blocks[k])
            while at < total:
                step = min(room, total - at)
                flat = torch.arange(at, at + step)
                mode = flat // s % n
                parts.append(torch.cat([self.before[k][flat // (n * s)], mode[:, None], self.after[k][flat % s]], 1))
                at, room = at + step, room - step
                if room == 0:
                    yield torch.cat(parts)
                    parts, room = [], size
        if parts:
            yield torch.cat(parts)

    def points(self) -> Int[Tensor, "r d"]:
        """Multi-indices through the largest bond, from which a search may start."""
        widest = max(range(1, len(self.shape)), key=lambda k: len(self.before[k]))
        return torch.cat([self.before[widest], self.after[widest - 1]], 1)

    def _prefixes(self, k: int) -> Tensor:
        return _position(self.before[k + 1][:, :-1], self.before[k])


def frozen_cross(network: Network, tol: float) -> FrozenCross:
    """The pivots at which a train interpolates itself, none of the tensor's entries being read.

    The train is rounded to `tol`. From the left, the rows of dominant volume of an orthonormal basis of (pivots so far)
    x mode are the next pivots; then the same from the right. So every core of the interpolant has entries of at most
    1 + TAU.
    Cost: O(d n r^3).

    Args:
        network: a train of order 1 or more without `axes`.
        tol: relative error that the ranks of the cross may leave.

    Example:
        >>> from decompositions import TT
        >>> net = TT([torch.ones(4, 2), torch.ones(2, 5)])  # of rank 1, written with 2
        >>> frozen_cross(net, 1e-10).blocks
        [(1, 4, 1), (1, 5, 1)]
    """
    shape = network.shape
    double = TT([core.detach().cpu().to(torch.promote_types(core.dtype, torch.float64)) for core in network.cores])
    cores = list(cut(double, None, tol)[0].cores)
    if len(cores) > 1:
        cores = [cores[0].unsqueeze(0), *cores[1:-1], cores[-1].unsqueeze(-1)]
    else:
        cores = [cores[0][None, :, None]]
    behind = _sweep(cores)
    ahead = _sweep([core.permute(2, 1, 0) for core in reversed(cores)])
    return FrozenCross(shape, tuple(behind), (*(pivots.flip(1) for pivots in reversed(ahead[1:])), behind[0]))


def _sweep(cores: list[Tensor]) -> list[Tensor]:
    """Nested pivots before every mode, in the order of the cores."""
    sets, core = [torch.zeros(1, 0, dtype=torch.long)], cores[0]
    for k in range(len(cores) - 1):
        r, n, s = core.shape
        basis, factor = torch.linalg.qr(core.reshape(r * n, s))
        rows, _ = dominant_rows(basis, TAU)
        sets.append(torch.cat([sets[-1][rows // n], (rows % n)[:, None]], 1))
        core = torch.tensordot(basis[rows] @ factor, cores[k + 1], 1)
    return sets


def singular_ratio(matrix: Tensor) -> float:
    """Smallest singular value over the largest; 0 for a zero matrix.

    Example:
        >>> singular_ratio(torch.diag(torch.tensor([1.0, 4.0])))
        0.25
    """
    values = torch.linalg.svdvals(matrix)
    return float(values[-1] / values[0]) if float(values[0]) > 0 else 0.0


def _position(rows: Tensor, among: Tensor) -> Tensor:
    """Where each of the rows is among the others, -1 where it is not."""
    same = (rows[:, None] == among[None]).all(-1)
    return torch.where(same.any(1), same.int().argmax(1), -1)
